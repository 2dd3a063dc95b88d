"""FLASH, the chunked gated attention of "Transformer Quality in Linear Time". It is not FlashAttention.

Tokens of one chunk (``C`` positions of a document, from a multiple of ``C``) see each other by the scores of gated
attention; earlier chunks are seen through one matrix, the sum of ``k' v`` over their tokens. Time and memory are
linear in the length, and what decoding has to keep has a constant size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.ops import flash_blocked, flash_partitioned, flash_reference
from rlhf_jax.ops.attention.terms import unproven
from rlhf_jax.ops.gau import choose
from rlhf_jax.ops.gau_terms import GauCase, Score
from rlhf_jax.ops.kernels import hopper_flash, tpu_flash
from rlhf_jax.ops.meshes import active_mesh
from rlhf_jax.types import Context


@dataclass(frozen=True)
class FlashImplementation:
    """A schedule: whether it can serve a case (None) or why not, and the computation.

    ``chunks`` computes ``flash_attention_chunks``; ``packed`` the rows of ``flash_attention`` in which documents may
    begin anywhere, and is None where ``refusal`` refuses those.
    """

    refusal: Callable[[GauCase], str | None]
    chunks: Callable[..., tuple[jax.Array, jax.Array]]
    packed: Callable[..., jax.Array] | None = None
    suits: Callable[[GauCase], bool] = lambda case: True


FLASH_IMPLEMENTATIONS: dict[str, FlashImplementation] = {
    "hopper": FlashImplementation(hopper_flash.refusal, hopper_flash.chunks, hopper_flash.packed, unproven),
    "tpu": FlashImplementation(tpu_flash.refusal, tpu_flash.chunks, tpu_flash.packed, unproven),
    "blocked": FlashImplementation(flash_blocked.refusal, flash_blocked.chunks, flash_blocked.packed),
    "reference": FlashImplementation(flash_reference.refusal, flash_reference.chunks, flash_reference.attend),
}
"""In the order in which ``auto`` takes the first that serves and suits."""


def flash_attention(
    q_local: Float[Array, "B T D"],
    k_local: Float[Array, "B T D"],
    q_global: Float[Array, "B T D"],
    k_global: Float[Array, "B T D"],
    v: Float[Array, "B T E"],
    context: Context,
    *,
    chunk: int,
    score: Score,
    scale: float,
    normaliser: Float[Array, "B T"] | float,
    bias: Float[Array, " R"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T E"]:
    """Whole rows: ``sum_{s here} score(scale q k' + bias) v / normaliser + sum_{s before} (q_global k_global') v``.

    ``here`` are the tokens of the query's own chunk up to itself, ``before`` those of its document's earlier chunks
    (arXiv 2202.10447, section 3.3). The divisor of the second sum belongs into ``q_global``, which is linear. Sums are
    in fp32 (float64 inputs: in float64); padding gets 0. On a mesh see ``ops.flash_partitioned``.

    Args:
        q_local: queries of the quadratic part.
        k_local: its keys.
        q_global: queries of the linear part.
        k_global: its keys.
        v: values of both.
        context: where the tokens stand. Each document lies in its row without a gap and in order.
        chunk: tokens of a chunk.
        score: ``Relu2`` or ``Laplace``.
        scale: factor on the products of the quadratic part.
        normaliser: divisor of each query's quadratic part, positive; not trained.
        bias: as in ``gau_attention``, of the quadratic part.
        implementation: one of ``FLASH_IMPLEMENTATIONS``, or "auto".

    Raises:
        ValueError: shapes do not fit, or the named implementation is unknown or cannot serve.
    """
    _check(q_local, k_local, q_global, k_global, v, chunk)
    tokens, settings = (q_local, k_local, q_global, k_global, v), {"chunk": chunk, "score": score, "scale": scale}
    divisor = _divisor(normaliser, q_local, jnp.promote_types(v.dtype, jnp.float32))

    def rows(tokens, context: Context, divisor, bias):
        """Whole rows on one device."""
        return _rows(tokens, context, divisor, bias, implementation, **settings)

    def chunks(tokens, context: Context, divisor, bias, state):
        """Later chunks of the only document of a row on one device."""
        lengths = jnp.sum(context.segments != 0, axis=1)
        return _chunks(tokens, lengths, divisor, bias, state, implementation, **settings)[0]

    mesh = active_mesh()
    if mesh is None:
        return rows(tokens, context, divisor, bias)
    return flash_partitioned.attend(rows, chunks, mesh, tokens, context, divisor, bias, chunk=chunk)


def _rows(tokens, context: Context, divisor, bias, implementation: str, *, chunk: int, score: Score, scale: float):
    q_local, _, q_global, _, v = tokens
    rows, length, width = q_global.shape
    case = GauCase.of(q_local, q_local, v, score, bias, aligned=not context.packed, chunk=chunk, packed=context.packed)
    serving = FLASH_IMPLEMENTATIONS[choose(implementation, case, FLASH_IMPLEMENTATIONS)]
    missing = -length % chunk
    padded = [jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in tokens]
    divisor = jnp.pad(divisor, ((0, 0), (0, missing)), constant_values=1.0)
    if context.packed:
        assert serving.packed is not None
        positions, segments = (jnp.pad(x, ((0, 0), (0, missing))) for x in (context.positions, context.segments))
        out = serving.packed(
            *padded, Context(positions, segments), divisor, bias, chunk=chunk, score=score, scale=scale
        )
    else:
        lengths = jnp.sum(context.segments != 0, axis=1)
        state = jnp.zeros((rows, width, v.shape[-1]), divisor.dtype)
        out, _ = serving.chunks(*padded, lengths, divisor, bias, state, chunk=chunk, score=score, scale=scale)
    return out[:, :length]


def flash_attention_chunks(
    q_local: Float[Array, "B T D"],
    k_local: Float[Array, "B T D"],
    q_global: Float[Array, "B T D"],
    k_global: Float[Array, "B T D"],
    v: Float[Array, "B T E"],
    lengths: Int[Array, " B"],
    state: Float[Array, "B D E"],
    *,
    chunk: int,
    score: Score,
    scale: float,
    normaliser: Float[Array, "B T"] | float,
    bias: Float[Array, " R"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T E"], Float[Array, "B D E"]]:
    """Whole chunks of one document a row, after the chunks that ``state`` has taken up.

    Slot 0 is the first position of a chunk, ``T`` a multiple of ``chunk``, and slots from ``lengths`` on are padding,
    which sees nothing, gets 0 and is not taken up. Arguments as in ``flash_attention``.

    Returns:
        The output, and the state after the last complete chunk of each row (fp32 or wider).
    """
    _check(q_local, k_local, q_global, k_global, v, chunk)
    if v.shape[1] % chunk:
        raise ValueError(f"{v.shape[1]} slots are not a multiple of the chunk {chunk}; pad the rows")
    tokens, divisor = (q_local, k_local, q_global, k_global, v), _divisor(normaliser, q_local, state.dtype)

    def here(tokens, lengths, divisor, bias, state):
        """On one device."""
        return _chunks(tokens, lengths, divisor, bias, state, implementation, chunk=chunk, score=score, scale=scale)

    mesh = active_mesh()
    if mesh is None:
        return here(tokens, lengths, divisor, bias, state)
    return flash_partitioned.continued(here, mesh, tokens, lengths, divisor, bias, state)


def _chunks(tokens, lengths, divisor, bias, state, implementation: str, *, chunk: int, score: Score, scale: float):
    q_local, k_local, _, _, v = tokens
    case = GauCase.of(q_local, k_local, v, score, bias, aligned=True, chunk=chunk, state=True)
    serving = FLASH_IMPLEMENTATIONS[choose(implementation, case, FLASH_IMPLEMENTATIONS)]
    return serving.chunks(*tokens, lengths, divisor, bias, state, chunk=chunk, score=score, scale=scale)


def _divisor(normaliser, like, dtype) -> Float[Array, "B T"]:
    return jax.lax.stop_gradient(jnp.broadcast_to(jnp.asarray(normaliser, dtype), like.shape[:2]))


def _check(q_local, k_local, q_global, k_global, v, chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    shapes = {x.shape for x in (q_local, k_local, q_global, k_global)}
    if len(shapes) > 1 or q_local.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"queries {q_local.shape} and {q_global.shape}, keys {k_local.shape} and {k_global.shape}, and values "
            f"{v.shape} do not fit together"
        )
