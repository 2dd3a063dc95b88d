"""The feed-forwards of the experts over tokens that already have theirs; on a mesh, split over its devices."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.experts.grouped import grouped_matmul
from rlhf_jax.ops.experts.rows import Sorting, combine, counts, dispatch, sort
from rlhf_jax.ops.meshes import CONTEXT, EXPERT, ROWS, TENSOR, active_mesh, ways

Activation = Callable[[Float[Array, "R parts width"]], Float[Array, "R width"]]


def expert_feedforward(
    x: Float[Array, "B T d"],
    experts: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    w_in: Float[Array, "X d parts width"],
    w_out: Float[Array, "X width d"],
    activate: Activation,
    implementation: str = "auto",
) -> Float[Array, "B T d"]:
    """``sum_j weights_j activate(x W_in[experts_j]) W_out[experts_j]`` for each token, no token dropped.

    On a mesh each device works on its own tokens, and with an ``expert`` axis on its own experts: tokens travel there
    and back. Rows that the mesh does not split evenly are filled up; tokens that it does not are on every device.

    Args:
        x: tokens.
        experts: of each token; X for none, which costs nothing and gives 0.
        weights: of the experts, fp32; the sum is in their dtype.
        w_in: of all experts; ``parts`` is 2 for a gate beside the values.
        w_out: of all experts.
        activate: from the parts to one hidden layer.
        implementation: of ``grouped_matmul``.

    Raises:
        ValueError: the experts are not a multiple of the mesh's ``expert`` axis.
    """
    local = functools.partial(_feedforward, activate=activate, implementation=implementation)
    mesh = active_mesh()
    if mesh is None:
        return local(x, experts, weights, w_in, w_out, owners=1).astype(x.dtype)
    owners, number, tensor = mesh.shape[EXPERT], w_in.shape[0], mesh.shape[TENSOR]
    if number % owners:
        raise ValueError(f"{number} experts are not a multiple of the mesh's expert axis of {owners} devices")
    hidden = TENSOR if w_out.shape[1] % tensor == 0 else None
    extra = -x.shape[0] % ways(mesh, ROWS)
    context = CONTEXT if x.shape[1] % mesh.shape[CONTEXT] == 0 else None

    def fill(array: jax.Array, value: int) -> jax.Array:
        return jnp.pad(array, ((0, extra), (0, 0), (0, 0)), constant_values=value) if extra else array

    def on_device(x, experts, weights, w_in, w_out):
        y = local(x, experts, weights, w_in, w_out, owners=owners)
        if hidden is not None and tensor > 1:
            y = jax.lax.psum(y, TENSOR)
        return y.astype(x.dtype)

    tokens, kernels = P(ROWS, context, None), (P(EXPERT, None, None, hidden), P(EXPERT, hidden, None))
    split = jax.shard_map(
        on_device, mesh=mesh, in_specs=(tokens, tokens, tokens, *kernels), out_specs=tokens, check_vma=False
    )
    return split(fill(x, 0), fill(experts, number), fill(weights, 0), w_in, w_out)[: x.shape[0]]


def _feedforward(x, experts, weights, w_in, w_out, *, activate: Activation, implementation: str, owners: int):
    """Of the tokens of one device, in the dtype of the weights."""
    shape = x.shape
    x, experts, weights = (each.reshape(-1, each.shape[-1]) for each in (x, experts, weights))

    def compute(rows: Float[Array, "R d"], sizes: Int[Array, " X"]) -> Float[Array, "R d"]:
        hidden = grouped_matmul(rows, w_in.reshape(*w_in.shape[:2], -1), sizes, implementation=implementation)
        hidden = activate(hidden.reshape(-1, *w_in.shape[2:]))
        return grouped_matmul(hidden, w_out, sizes, implementation=implementation)

    if owners == 1:
        sorting = sort(experts, w_in.shape[0])
        y = combine(compute(dispatch(x, sorting), sorting.sizes), weights, sorting)
    else:
        y = _travelling(x, experts, weights, compute, w_in.shape[0], owners)
    return y.reshape(shape)


def _travelling(x, experts, weights, compute, own: int, owners: int):
    """Tokens go to the devices that have their experts, and back: two all-to-alls of buffers that hold the worst case.

    Args:
        x: tokens [n, d] of this device.
        experts: of all devices; ``own * owners`` for none.
        weights: of the experts.
        compute: from rows sorted by expert of this device, and their numbers, to the experts' outputs.
        own: experts of each device.
        owners: devices along the ``expert`` axis.
    """
    n, k = experts.shape
    room = n * min(k, own)
    outgoing = sort(experts, own * owners)
    by_owner = outgoing.sizes.reshape(owners, own).sum(1)
    first = jnp.cumsum(by_owner) - by_owner
    # The buffer of each owner begins at a multiple of ``room``.
    place = jnp.arange(room)
    row = jnp.clip(first[:, None] + place, 0, n * k - 1)
    slots = jnp.where(place < by_owner[:, None], outgoing.slots[row], n * k).reshape(-1)
    owner = jnp.minimum(experts // own, owners - 1)
    rows = jnp.where(experts < own * owners, owner * room + outgoing.rows - first[owner], owners * room)
    buffer = Sorting(slots, rows, by_owner, holes=True)

    exchange = functools.partial(jax.lax.all_to_all, axis_name=EXPERT, split_axis=0, concat_axis=0, tiled=True)
    wanted = experts.reshape(-1).at[slots].get(mode="fill", fill_value=own * owners)
    wanted = exchange(jnp.where(slots < n * k, wanted % own, own))
    arrived = exchange(dispatch(x, buffer))
    inward = sort(wanted[:, None], own)
    done = compute(dispatch(arrived, inward), counts(wanted, own))
    # Back in the order of arrival: the same permutation, the other way round.
    outward = Sorting(inward.rows[:, 0], inward.slots[:, None], inward.sizes)
    return combine(exchange(dispatch(done, outward)), weights, buffer)
