"""Mixed local and global attention in linear time and memory: tiles of one chunk, and a state that walks over them.

Rows that are one document each are cut at their chunks. In packed rows a document begins anywhere, so that its chunks
do not fit the tiles; but two tokens that are more than one tile apart are never in one chunk. Each tile therefore meets
itself and the tile before it directly (pairs in one chunk by the score, pairs in two by the plain product), and all
earlier tiles through the state. That costs ``2 C (4 D + 2 E)`` operations a token beside ``2 C (D + E)`` of unpacked
rows, and needs no bound on the number of documents.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.ops.gau_terms import GauCase, Score, biased
from rlhf_jax.types import Context


def refusal(case: GauCase) -> str | None:
    """Nothing is refused."""
    return None


def chunks(
    q_local: Float[Array, "B T D"],
    k_local: Float[Array, "B T D"],
    q_global: Float[Array, "B T D"],
    k_global: Float[Array, "B T D"],
    v: Float[Array, "B T E"],
    lengths: Int[Array, " B"],
    normaliser: Float[Array, "B T"],
    bias: Float[Array, " R"] | None,
    state: Float[Array, "B D E"],
    *,
    chunk: int,
    score: Score,
    scale: float,
) -> tuple[Float[Array, "B T E"], Float[Array, "B D E"]]:
    """See ``flash_attention_chunks``."""
    slots = jnp.arange(v.shape[1])
    inside = jnp.arange(chunk)
    distance = inside[:, None] - inside[None, :]

    def local(tile):
        q, k, v, real, divisor = tile
        logits = scale * jnp.einsum("btd,bsd->bts", q, k, preferred_element_type=divisor.dtype)
        seen = (distance >= 0) & real[:, :, None]
        weights = jnp.where(seen, score.value(biased(logits, bias, distance)), 0.0) / divisor[..., None]
        return jnp.einsum("bts,bse->bte", weights.astype(v.dtype), v, preferred_element_type=divisor.dtype)

    real = slots < lengths[:, None]
    near = jax.lax.map(jax.checkpoint(local), tuple(_tiles(x, chunk) for x in (q_local, k_local, v, real, normaliser)))
    # Only complete chunks enter the state, so that it ends where the row's own last chunk begins.
    complete = slots < (lengths // chunk * chunk)[:, None]
    k_global = jnp.where(complete[..., None], k_global, 0.0)
    q_global = jnp.where(real[..., None], q_global, 0.0)
    q, k, values = (_tiles(x, chunk) for x in (q_global, k_global, v))
    far, state = _recur(q, k, values, jnp.ones(q.shape[:2], bool), state)
    return _rows(near + far).astype(v.dtype), state


def packed(
    q_local: Float[Array, "B T D"],
    k_local: Float[Array, "B T D"],
    q_global: Float[Array, "B T D"],
    k_global: Float[Array, "B T D"],
    v: Float[Array, "B T E"],
    context: Context,
    normaliser: Float[Array, "B T"],
    bias: Float[Array, " R"] | None,
    *,
    chunk: int,
    score: Score,
    scale: float,
) -> Float[Array, "B T E"]:
    """See ``flash_attention``: documents may begin anywhere, each without a gap and in the order of its tokens."""
    position, segment = context.positions, context.segments
    # Neighbours with one segment are one document unless the positions start again.
    follows = (segment[:, 1:] == segment[:, :-1]) & (position[:, 1:] == position[:, :-1] + 1)
    document = jnp.cumsum(jnp.pad(~follows, ((0, 0), (1, 0)), constant_values=True), axis=1) * (segment != 0)
    document, position = _tiles(document, chunk), _tiles(position, chunk)

    def nearby(tile):
        ql, kl, qg, kg, v, document, position, divisor = tile
        wide = divisor.dtype
        own, where = document[:, -chunk:, None], position[:, -chunk:, None]
        distance = where - position[:, None, :]
        same = (own == document[:, None, :]) & (own != 0)
        together = where // chunk == position[:, None, :] // chunk
        logits = biased(scale * jnp.einsum("btd,bsd->bts", ql, kl, preferred_element_type=wide), bias, distance)
        weights = jnp.where(same & together & (distance >= 0), score.value(logits), 0.0) / divisor[..., None]
        linear = jnp.einsum("btd,bsd->bts", qg, kg, preferred_element_type=wide)
        weights = weights + jnp.where(same & ~together & (distance >= 0), linear, 0.0)
        return jnp.einsum("bts,bse->bte", weights.astype(v.dtype), v, preferred_element_type=wide)

    ql, kl, qg, kg, values, divisor = (_tiles(x, chunk) for x in (q_local, k_local, q_global, k_global, v, normaliser))
    pairs = tuple(_with_previous(x) for x in (kl, kg, values, document, position))
    near = jax.lax.map(jax.checkpoint(nearby), (ql, pairs[0], qg, *pairs[1:], divisor))
    # At each tile the state holds the tokens, up to the tile before the last, of the document that was open there.
    last = document[:, :, -1]
    before = _delayed(last, 1)
    open_before = _delayed(last, 2)
    readable = (document == open_before[..., None]) & (document != 0)
    kept = _delayed(kg * (document == last[..., None])[..., None], 1)
    far, _ = _recur(
        qg * readable[..., None], kept, _delayed(values, 1), before == open_before,
        jnp.zeros((v.shape[0], kg.shape[-1], v.shape[-1]), divisor.dtype),
    )  # fmt: skip
    return _rows(near + far).astype(v.dtype)


def _tiles(x: Array, chunk: int) -> Array:
    """[B, T, ...] -> [tiles, B, chunk, ...]"""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _rows(x: Float[Array, "G B C E"]) -> Float[Array, "B T E"]:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[-1])


def _delayed(x: Array, tiles: int) -> Array:
    """Each tile gets what belongs to the tile so many before it, the first ones zeros."""
    return jnp.pad(x, ((tiles, 0), *((0, 0),) * (x.ndim - 1)))[: x.shape[0]]


def _with_previous(x: Array) -> Array:
    """Each tile behind the one before it: [G, B, 2 C, ...]."""
    return jnp.concatenate([_delayed(x, 1), x], axis=2)


@jax.custom_vjp
def _recur(
    q: Float[Array, "G B C D"],
    k: Float[Array, "G B C D"],
    v: Float[Array, "G B C E"],
    keep: Bool[Array, "G B"],
    state: Float[Array, "B D E"],
) -> tuple[Float[Array, "G B C E"], Float[Array, "B D E"]]:
    """``out_g = q_g S``, then ``S = keep_g S + k_g' v_g``. Keeps no state but the running one, backwards neither."""

    def step(state, tile):
        q, k, v, keep = tile
        return _next(state, k, v, keep), _product("btd,bde->bte", q, state)

    state, out = jax.lax.scan(step, state, (q, k, v, keep))
    return out, state


def _recur_forward(q, k, v, keep, state):
    return _recur(q, k, v, keep, state), (q, k, v, keep, state)


def _recur_backward(residuals, cotangents):
    q, k, v, keep, state = residuals
    out, last = cotangents

    def forwards(state, tile):
        k, v, keep, out = tile
        return _next(state, k, v, keep), _product("bte,bde->btd", out.astype(k.dtype), state)

    def backwards(state, tile):
        q, k, v, keep, out = tile
        dk, dv = _product("bte,bde->btd", v, state), _product("btd,bde->bte", k, state)
        return _next(state, q, out.astype(q.dtype), keep), (dk.astype(k.dtype), dv.astype(v.dtype))

    _, dq = jax.lax.scan(forwards, state, (k, v, keep, out))
    first, (dk, dv) = jax.lax.scan(backwards, last, (q, k, v, keep, out), reverse=True)
    return dq.astype(q.dtype), dk, dv, None, first


_recur.defvjp(_recur_forward, _recur_backward)


def _next(state, k, v, keep):
    return jnp.where(keep[:, None, None], state, 0.0) + jnp.einsum(
        "btd,bte->bde", k, v, preferred_element_type=state.dtype
    )


def _product(subscripts: str, x, state):
    """A product with the state in the dtype of the tokens, summed in that of the state."""
    return jnp.einsum(subscripts, x, state.astype(x.dtype), preferred_element_type=state.dtype)
