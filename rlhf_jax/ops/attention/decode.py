"""One new query a row over a cache of keys and values, with the choice of how to read the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.ops.attention import partitioned, reference
from rlhf_jax.ops.attention.dispatch import check_implementation
from rlhf_jax.ops.attention.masks import Mask
from rlhf_jax.ops.attention.terms import CannotServe, Case, Terms, this_device, unproven
from rlhf_jax.ops.kernels import decode_tpu, decode_triton, hopper_decode
from rlhf_jax.ops.meshes import active_mesh


@dataclass(frozen=True)
class Decoder:
    """A way to read the cache: whether it can serve a case (None) or why not, the computation, and whether it suits."""

    refusal: Callable[[Case], str | None]
    attend: Callable[..., jax.Array]
    suits: Callable[[Case], bool] = lambda case: True


def decode_attention(
    q: Float[Array, "B H D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S Dv"],
    mask: Mask,
    terms: Terms,
    implementation: str = "auto",
) -> Float[Array, "B H Dv"]:
    """``attention`` of one query a row, over a cache in the order in which decoding reads it fastest.

    On a mesh each device decodes its own rows and heads.

    Args:
        q: queries; ``H`` is a multiple of ``K``.
        keys: of the cache.
        values: of the cache.
        mask: which slots each row sees.
        terms: what the logits are besides products.
        implementation: as for ``attention``; see ``choose_decoder``.
    """

    def here(q, keys, values, mask: Mask, terms: Terms):
        """On one device."""
        name = choose_decoder(implementation, decode_case(q, keys, values, mask, terms))
        return DECODERS[name].attend(q, keys, values, mask, terms)

    mesh = active_mesh()
    if mesh is None:
        return here(q, keys, values, mask, terms)
    return partitioned.decode(here, mesh, q, keys, values, mask, terms)


def decode_case(q, keys, values, mask: Mask, terms: Terms) -> Case:
    """The case of these arguments on the device that JAX runs on by default."""
    platform, device = this_device()
    rows, groups, slots, width = keys.shape
    return Case(
        platform, device, rows, 1, slots, q.shape[1], groups, width, values.shape[3],
        jnp.promote_types(q.dtype, keys.dtype).name, mask.rule, mask.causal, mask.window, False,
        terms.softcap is not None, terms.slopes is not None, terms.sink_logits is not None,
    )  # fmt: skip


def choose_decoder(implementation: str, case: Case) -> str:
    """The decoder that serves this case.

    Args:
        implementation: a name of ``attention``'s implementations, or "auto". One that has no decoder of its own (it is
            a schedule for many queries at once) decodes by "reference".
        case: what is to be computed, and where.

    Raises:
        ValueError: the name is unknown, or its decoder cannot serve; the message says why.
    """
    if implementation == "auto":
        return next(name for name, each in DECODERS.items() if each.refusal(case) is None and each.suits(case))
    if implementation not in DECODERS:
        check_implementation(implementation)
        return "reference"
    reason = DECODERS[implementation].refusal(case)
    if reason is not None:
        raise CannotServe(
            f"attention implementation {implementation!r} cannot decode: {reason}; take another, or 'auto' for the "
            "best that can"
        )
    return implementation


def _attend(q, keys, values, mask: Mask, terms: Terms):
    out, _ = reference.attend(q[:, None], keys.swapaxes(1, 2), values.swapaxes(1, 2), mask, terms, finite=True)
    return out[:, 0]


DECODERS: dict[str, Decoder] = {
    "hopper": Decoder(hopper_decode.refusal, hopper_decode.attend, unproven),
    "tpu": Decoder(decode_tpu.refusal, decode_tpu.attend, unproven),
    "triton": Decoder(decode_triton.refusal, decode_triton.attend, unproven),
    "reference": Decoder(reference.refusal, _attend),
}
"""In the order in which ``auto`` takes the first that serves and suits."""
