"""Gated attention tile by tile: O(T + S) memory, and only the tiles that a mask shows are visited.

Nothing has to be rescaled on the way, as it has to in softmax attention: the output is a plain sum over the tiles of
keys, and the backward pass computes the scores of a tile again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.attention.masks import NOTHING, Mask
from rlhf_jax.ops.gau_terms import GauCase, Score, biased

TILE = 512
"""Most queries and keys of a tile: products of this many rows keep two CPU cores busy."""


def refusal(case: GauCase) -> str | None:
    """Nothing is refused."""
    return None


def suits(case: GauCase) -> bool:
    """Whether this is the better choice: on CPU from two tiles on, elsewhere where the dense scores exceed 1 GiB.

    Shorter rows take the dense form, which is as fast there. Off the CPU tiles one after another are slow.
    """
    scores = case.length * case.slots
    return scores > TILE * TILE if case.platform == "cpu" else case.rows * scores > 2**28


def attend(
    q: Float[Array, "B T D"],
    k: Float[Array, "B S D"],
    v: Float[Array, "B S E"],
    mask: Mask,
    normaliser: Float[Array, "B T"],
    bias: Float[Array, " R"] | None,
    *,
    score: Score,
    scale: float,
    tile: int = TILE,
) -> Float[Array, "B T E"]:
    """See ``gau_attention``; sums in fp32 or wider. ``tile`` changes the speed and not the result."""
    length = q.shape[1]
    query_tile, key_tile = _even(length, tile), _even(k.shape[1], tile)

    def pad(x, multiple):
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0)))

    sums = _sums(
        score, scale, (query_tile, key_tile),
        pad(q, query_tile), pad(k, key_tile), pad(v, key_tile), mask.padded(query_tile, key_tile), bias,
    )  # fmt: skip
    divided = jnp.asarray(sums)[:, :length] / normaliser[..., None]
    return divided.astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(score: Score, scale: float, tiles: tuple[int, int], q, k, v, mask: Mask, bias) -> Float[Array, "B T E"]:
    """The undivided output in fp32 or wider."""
    view = _View(scale, tiles, mask, bias)
    rows, length, _ = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    out = jnp.zeros((rows, length // tiles[0], tiles[0], v.shape[-1]), wide)

    def visit(place, out):
        logits, shown = view.logits(place, q, k)
        weights = jnp.where(shown, score.value(logits), 0.0).astype(v.dtype)
        return _add(out, place[:2], jnp.dot(weights, view.keys(v, place), preferred_element_type=wide))

    return view.walk(visit, out).reshape(rows, length, -1)


def _forward(score, scale, tiles, q, k, v, mask, bias):
    return _sums(score, scale, tiles, q, k, v, mask, bias), (q, k, v, mask, bias)


def _backward(score, scale, tiles, residuals, cotangent):
    q, k, v, mask, bias = residuals
    view = _View(scale, tiles, mask, bias)
    wide = cotangent.dtype
    cotangent = cotangent.astype(v.dtype)

    def zeros(like, tile):
        return jnp.zeros((like.shape[0], like.shape[1] // tile, tile, like.shape[2]), wide)

    def visit(place, sums):
        dq, dk, dv, dbias = sums
        logits, shown = view.logits(place, q, k)
        weights = jnp.where(shown, score.value(logits), 0.0).astype(v.dtype)
        out = view.queries(cotangent, place)
        dv = _add(dv, place[::2], jnp.dot(weights.T, out, preferred_element_type=wide))
        dweights = jnp.dot(out, view.keys(v, place).T, preferred_element_type=wide)
        dlogits = jnp.where(shown, dweights * score.gradient(logits), 0.0)
        if bias is not None:
            entry = jnp.clip(view.distance(place), 0, bias.shape[0] - 1)
            dbias = dbias + jax.ops.segment_sum(dlogits.ravel(), entry.ravel(), bias.shape[0])
        dproducts = (scale * dlogits).astype(q.dtype)
        dq = _add(dq, place[:2], jnp.dot(dproducts, view.keys(k, place), preferred_element_type=wide))
        dk = _add(dk, place[::2], jnp.dot(dproducts.T, view.queries(q, place), preferred_element_type=wide))
        return dq, dk, dv, dbias

    dbias = None if bias is None else jnp.zeros(bias.shape, wide)
    start = (zeros(q, tiles[0]), zeros(k, tiles[1]), zeros(v, tiles[1]), dbias)
    dq, dk, dv, dbias = view.walk(visit, start)
    grads = [grad.reshape(like.shape).astype(like.dtype) for grad, like in ((dq, q), (dk, k), (dv, v))]
    return *grads, None, None if bias is None else dbias.astype(bias.dtype)


_sums.defvjp(_forward, _backward)


class _View:
    """The tiles of one call: which there are, and what each reads."""

    def __init__(self, scale: float, tiles: tuple[int, int], mask: Mask, bias):
        self.scale, self.tiles, self.mask, self.bias = scale, tiles, mask, bias

    def walk(self, visit, start):
        """``visit`` each tile (row, tile of queries, tile of keys) that shows anything, one after another."""
        shown = self.mask.blocks(*self.tiles) != NOTHING
        (places,) = jnp.nonzero(shown.ravel(), size=shown.size, fill_value=0)

        def step(index, sums):
            return visit(jnp.unravel_index(places[index], shown.shape), sums)

        return jax.lax.fori_loop(0, jnp.sum(shown), step, start)

    def queries(self, x, place):
        """What belongs to the tile's queries."""
        return _cut(x, place[0], place[1], self.tiles[0])

    def keys(self, x, place):
        """What belongs to the tile's keys."""
        return _cut(x, place[0], place[2], self.tiles[1])

    def distance(self, place) -> Int[Array, "q k"]:
        """How far each key lies before each query."""
        mask = self.mask
        return self.queries(mask.query_positions, place)[:, None] - self.keys(mask.key_positions, place)[None, :]

    def logits(self, place, q, k):
        """Logits, and whether the mask shows the key."""
        mask = self.mask
        wide = jnp.promote_types(q.dtype, jnp.float32)
        products = jnp.dot(self.queries(q, place), self.keys(k, place).T, preferred_element_type=wide)
        own, other = self.queries(mask.query_segments, place)[:, None], self.keys(mask.key_segments, place)[None, :]
        shown = mask.rule.visible(
            self.queries(mask.query_positions, place)[:, None],
            self.queries(mask.start, place)[:, None],
            self.queries(mask.end, place)[:, None],
            self.keys(mask.key_positions, place)[None, :],
        )
        return biased(self.scale * products, self.bias, self.distance(place)), shown & (own == other) & (own != 0)


def _even(length: int, largest: int) -> int:
    """The tile that cuts a length into as few tiles as the largest would, with the least padding."""
    return -(-length // -(-length // largest))


def _cut(x, row, tile, size: int):
    """One tile of one row."""
    start = (row, tile * size, *(0,) * (x.ndim - 2))
    return jax.lax.dynamic_slice(x, start, (1, size, *x.shape[2:]))[0]


def _add(sums: Float[Array, "B n t E"], place, part: Float[Array, "t E"]) -> Float[Array, "B n t E"]:
    """``part`` added to one tile, which lies in one piece of memory."""
    start = (*place, 0, 0)
    old = jax.lax.dynamic_slice(sums, start, (1, 1, *part.shape))
    return jax.lax.dynamic_update_slice(sums, old + part[None, None], start)
