"""Attention on a mesh: each device attends for its own rows, tokens and heads, by whatever implementation serves there.

The partitioner cannot split kernels and splits loops over tiles badly, so the cuts are made here, by ``jax.shard_map``:
rows over the row axes, tokens over ``context``, heads over ``tensor``. One head (a gated unit's) has the width of its
values cut instead. Dimensions that do not divide stay whole. Masks are made of positions, so a part of a mask is a
mask, and every implementation sees a smaller problem of the kind that it knows.

Queries need all keys of their row. Where tokens are cut there are two ways:

- ``gather``: keys and values of the whole row are brought to every device (an all-gather; their gradients come back by
  a reduce-scatter). They stay in memory until the backward pass.
- ``ring``: keys and values travel round the devices (``ops.attention.ring``). No device ever holds those of a row, but
  the backward pass computes the weights once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from rlhf_jax.ops.attention import ring
from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import Terms
from rlhf_jax.ops.meshes import TENSOR, token_spec, ways

ACROSS = ("auto", "gather", "ring")
"""How keys reach queries on other devices; "auto" gathers up to ``LARGEST_GATHERED``."""
LARGEST_GATHERED = 256 << 20
"""Bytes of gathered keys and values, of one layer on one device, beyond which "auto" takes the ring."""

Attend = Callable[..., tuple[jax.Array, jax.Array]]
"""Attention of one device: (q, k, v, mask, terms, lse) to the output and the log-sum-exp, which matters if ``lse``."""


def check_across(name: str) -> None:
    """Refuse a way across devices that does not exist."""
    if name not in ACROSS:
        raise ValueError(f"unknown way across devices {name!r}; expected one of {', '.join(map(repr, ACROSS))}")


@dataclass(frozen=True)
class Cuts:
    """Which mesh axes each dimension of one attention is cut over; None is whole.

    An axis of one device cuts nothing and is named all the same: what lies over no axis has its gradient summed over
    it.

    Args:
        rows: axes of B.
        queries: axis of T.
        keys: axis of S; only where T has it too.
        heads: axis of H.
        kv_heads: axis of K. Where it is None and ``heads`` is not, devices pick the key heads of their query heads.
        values: axis of Dv.
        mesh: what is cut over.
    """

    rows: Any
    queries: str | None
    keys: str | None
    heads: str | None
    kv_heads: str | None
    values: str | None
    mesh: Any

    @classmethod
    def of(cls, mesh: Any, rows: int, length: int, slots: int, heads: int, kv_heads: int, value_width: int) -> Cuts:
        """The cuts of these sizes."""
        by_row, queries = token_spec(mesh, (rows, length))
        tensor = ways(mesh, TENSOR)
        by_head = heads % tensor == 0
        return cls(
            rows=by_row,
            queries=queries,
            keys=queries if slots % ways(mesh, queries) == 0 else None,
            heads=TENSOR if by_head else None,
            kv_heads=TENSOR if by_head and kv_heads % tensor == 0 else None,
            values=TENSOR if heads == 1 and not by_head and value_width % tensor == 0 else None,
            mesh=mesh,
        )

    @property
    def ring(self) -> str | None:
        """The axis along which devices hold other keys of the same rows; None where each holds all."""
        return self.keys if ways(self.mesh, self.keys) > 1 else None

    @property
    def queries_apart(self) -> bool:
        """Whether devices hold other queries of the same rows."""
        return ways(self.mesh, self.queries) > 1

    def mask(self, mask: Mask) -> Mask:
        """Where each array of a mask lies: the mask with specs in their place."""
        queries, keys = P(self.rows, self.queries), P(self.rows, self.keys)
        return mask.replace(  # pyright: ignore[reportAttributeAccessIssue]
            start=queries, end=queries, query_positions=queries, query_segments=queries,
            key_positions=keys, key_segments=keys,
        )  # fmt: skip

    def own_heads(self, x: Float[Array, "B S K D"], heads: int, axis: int = 2) -> Float[Array, "B S k D"]:
        """Of whole keys or values, the heads that this device's ``heads`` query heads read, each once."""
        if self.heads is None or self.kv_heads is not None:
            return x
        parts, groups = ways(self.mesh, self.heads), x.shape[axis]
        here = math.lcm(groups, parts) // parts
        readers = heads * parts // groups
        first = jax.lax.axis_index(self.heads) * heads
        chosen = (first + jnp.arange(here) * (heads // here)) // readers
        return jnp.take(x, chosen, axis=axis, mode="clip")

    def with_all_keys(
        self, k: Float[Array, "B s ..."], v: Float[Array, "B s ..."], mask: Mask
    ) -> tuple[Float[Array, "B S ..."], Float[Array, "B S ..."], Mask]:
        """The keys and values of this device's whole rows, and the mask of its queries over them."""

        def whole(x):
            return x if self.ring is None else jax.lax.all_gather(x, self.ring, axis=1, tiled=True)

        mask = mask.replace(  # pyright: ignore[reportAttributeAccessIssue]
            key_positions=whole(mask.key_positions),
            key_segments=whole(mask.key_segments),
            aligned=mask.aligned and not self.queries_apart,
        )
        return whole(k), whole(v), mask

    def by_ring(self, across: str, k: jax.Array, v: jax.Array) -> bool:
        """Whether keys travel, rather than being gathered; of one device's arrays."""
        check_across(across)
        if across != "auto":
            return across == "ring"
        return (k.nbytes + v.nbytes) * ways(self.mesh, self.keys) > LARGEST_GATHERED


def attend(
    here: Attend,
    mesh: Any,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    terms: Terms,
    *,
    across: str = "auto",
    lse: bool = True,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Attention in parts of its rows, tokens and heads, each on its device.

    Args:
        here: attention of one device's part.
        mesh: what ``active_mesh`` found.
        q: queries, and so on as in ``attention``.
        k: keys.
        v: values.
        mask: who sees whom.
        terms: what else the logits are made of.
        across: one of ``ACROSS``.
        lse: whether the log-sum-exp is wanted.
    """
    cuts = Cuts.of(mesh, q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], v.shape[3])

    def one_device(q, k, v, mask: Mask, terms: Terms):
        k, v = cuts.own_heads(k, q.shape[2]), cuts.own_heads(v, q.shape[2])
        if cuts.ring is not None and cuts.by_ring(across, k, v):
            size = ways(mesh, cuts.ring)
            part = partial(here, lse=True)
            return ring.attend(ring.Ring(part, cuts.ring, size, ring.steps(mask, size)), q, k, v, mask, terms)
        k, v, mask = cuts.with_all_keys(k, v, mask)
        return here(q, k, v, mask, terms, lse)

    keys = P(cuts.rows, cuts.keys, cuts.kv_heads, None)
    return jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(
            P(cuts.rows, cuts.queries, cuts.heads, None), keys, P(*keys[:3], cuts.values),
            cuts.mask(mask), jax.tree.map(lambda _: P(cuts.heads), terms),
        ),
        out_specs=(P(cuts.rows, cuts.queries, cuts.heads, cuts.values), P(cuts.rows, cuts.queries, cuts.heads)),
        check_vma=False,
    )(q, k, v, mask, terms)  # fmt: skip


def decode(
    here: Callable[..., jax.Array],
    mesh: Any,
    q: Float[Array, "B H D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S Dv"],
    mask: Mask,
    terms: Terms,
) -> Float[Array, "B H Dv"]:
    """One query a row over a cache, in parts of its rows and heads; ``here`` is one device's. Slots stay whole."""
    cuts = Cuts.of(mesh, q.shape[0], 1, keys.shape[2], q.shape[1], keys.shape[1], values.shape[3])

    def one_device(q, keys, values, mask: Mask, terms: Terms):
        own = partial(cuts.own_heads, heads=q.shape[1], axis=1)
        return here(q, own(keys), own(values), mask, terms)

    cache = P(cuts.rows, cuts.kv_heads, None, None)
    return jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(
            P(cuts.rows, cuts.heads, None), cache, P(*cache[:3], cuts.values),
            cuts.mask(mask), jax.tree.map(lambda _: P(cuts.heads), terms),
        ),
        out_specs=P(cuts.rows, cuts.heads, cuts.values),
        check_vma=False,
    )(q, keys, values, mask, terms)  # fmt: skip
