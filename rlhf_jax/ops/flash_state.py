"""What decoding keeps of a row under FLASH: one matrix for all complete chunks, and the tokens of the last one.

Its size does not depend on the number of tokens. Each row counts its own, so that rows of different lengths go on from
different places in their chunks; a chunk that becomes complete is taken up by the matrix, and its slots are free again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.ops.flash import flash_attention_chunks
from rlhf_jax.ops.gau_terms import Score, biased


@struct.dataclass
class FlashState:
    """The state of each row; ``R`` is the chunk, or the most tokens that the row will ever hold where these are fewer.

    Token ``count % chunk`` of the open chunk has the slot of that number; slots from ``count % chunk`` on are free.
    """

    matrix: Float[Array, "B D E"]
    k_local: Float[Array, "B R D"]
    k_global: Float[Array, "B R D"]
    values: Float[Array, "B R E"]
    count: Int[Array, " B"]

    @classmethod
    def empty(cls, rows: int, slots: int, width: int, value_width: int, dtype) -> FlashState:
        """Nothing read; the matrix is kept in fp32 or wider."""
        wide = jnp.promote_types(dtype, jnp.float32)
        keys = jnp.zeros((rows, slots, width), dtype)
        values = jnp.zeros((rows, slots, value_width), dtype)
        return cls(jnp.zeros((rows, width, value_width), wide), keys, keys, values, jnp.zeros((rows,), jnp.int32))


def extend(
    state: FlashState,
    q_local: Float[Array, "B T D"],
    k_local: Float[Array, "B T D"],
    q_global: Float[Array, "B T D"],
    k_global: Float[Array, "B T D"],
    v: Float[Array, "B T E"],
    real: Bool[Array, "B T"],
    *,
    chunk: int,
    score: Score,
    scale: float,
    normaliser: Float[Array, "B T"],
    bias: Float[Array, " R"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T E"], FlashState]:
    """New tokens of each row: their output (0 for padding), and the state with them.

    Args:
        state: of the tokens before.
        q_local: and the others, as in ``flash_attention``.
        real: False for padding, which is skipped wherever it stands.
    """
    arguments = (state, q_local, k_local, q_global, k_global, v, real, normaliser, bias)
    if v.shape[1] == 1:
        return _one(*arguments, chunk=chunk, score=score, scale=scale)
    return _many(*arguments, chunk=chunk, score=score, scale=scale, implementation=implementation)


def _one(state: FlashState, q_local, k_local, q_global, k_global, v, real, normaliser, bias, *, chunk, score, scale):
    """One token of each row, in time that does not depend on what was read."""
    slot, real = state.count % chunk, real[:, 0]
    size = state.values.shape[1]

    def enter(old, new):
        # Padding may write as well: the slot is free, and the next token takes it.
        place = (jnp.arange(old.shape[0]), slot)
        return old.at[place].set(new[:, 0].astype(old.dtype), mode="drop", unique_indices=True)

    k_local, k_global = enter(state.k_local, k_local), enter(state.k_global, k_global)
    values, wide = enter(state.values, v), state.matrix.dtype
    distance = slot[:, None] - jnp.arange(size)
    logits = scale * jnp.einsum("bd,bsd->bs", q_local[:, 0], k_local, preferred_element_type=wide)
    weights = jnp.where(distance >= 0, score.value(biased(logits, bias, distance)), 0.0) / normaliser.astype(wide)
    near = jnp.einsum("bs,bse->be", weights.astype(values.dtype), values, preferred_element_type=wide)
    query = q_global[:, 0].astype(values.dtype)
    far = jnp.einsum("bd,bde->be", query, state.matrix.astype(query.dtype), preferred_element_type=wide)
    full = real & (slot == chunk - 1)

    def take_up(matrix):
        taken = jnp.where(full[:, None, None], k_global, 0.0)
        return matrix + jnp.einsum("bsd,bse->bde", taken, values, preferred_element_type=wide)

    matrix = jax.lax.cond(jnp.any(full), take_up, lambda matrix: matrix, state.matrix)
    out = jnp.where(real[:, None], near + far, 0.0).astype(v.dtype)[:, None]
    return out, FlashState(matrix, k_local, k_global, values, state.count + real)


def _many(
    state: FlashState,
    q_local,
    k_local,
    q_global,
    k_global,
    v,
    real,
    normaliser,
    bias,
    *,
    chunk: int,
    score: Score,
    scale: float,
    implementation: str,
):
    """Each row moved behind the tokens of its open chunk, so that chunks begin at multiples of their length."""
    open_tokens = state.count % chunk
    total = -(-(v.shape[1] + chunk - 1) // chunk) * chunk
    # Padding gets a slot behind the last one, where it is dropped.
    slots = jnp.where(real, open_tokens[:, None] + jnp.cumsum(real, axis=1) - 1, total)
    rows = jnp.arange(v.shape[0])[:, None]
    inside = jnp.arange(chunk)

    def lay(new, kept=None, fill=0.0):
        laid = jnp.full((new.shape[0], total, *new.shape[2:]), fill, new.dtype)
        if kept is not None:
            # What lies in its free slots is written over, or is behind the row's last token.
            laid = laid.at[:, : kept.shape[1]].set(kept.astype(laid.dtype))
        return laid.at[rows, slots].set(new, mode="drop")

    k_local, k_global = lay(k_local, state.k_local), lay(k_global, state.k_global)
    values = lay(v, state.values)
    lengths = open_tokens + jnp.sum(real, axis=1)
    out, matrix = flash_attention_chunks(
        lay(q_local), k_local, lay(q_global), k_global, values, lengths, state.matrix,
        chunk=chunk,
        score=score,
        scale=scale,
        normaliser=lay(normaliser, fill=1.0),
        bias=bias,
        implementation=implementation,
    )  # fmt: skip
    last = jnp.minimum((lengths // chunk * chunk)[:, None] + inside[: state.values.shape[1]], total - 1)[..., None]

    def still_open(laid, old):
        return jnp.take_along_axis(laid, last, axis=1).astype(old.dtype)

    later = FlashState(
        matrix,
        still_open(k_local, state.k_local),
        still_open(k_global, state.k_global),
        still_open(values, state.values),
        state.count + jnp.sum(real, axis=1, dtype=state.count.dtype),
    )
    found = jnp.take_along_axis(out, jnp.minimum(slots, total - 1)[..., None], axis=1)
    return jnp.where(real[..., None], found, 0.0), later
