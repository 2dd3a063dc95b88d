"""The mask and attention against plain Python loops."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.attention import Mask, attention
from rlhf_jax.types import Context

PACKED = Context(
    positions=jnp.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 0, 0]]),
    segments=jnp.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]]),
)
# Row 0: a prompt of 3 in 5 slots, two decoded tokens, a free slot. Row 1: two documents, their keys out of order.
CACHE = Context(
    positions=jnp.array([[0, 1, 2, 0, 0, 3, 4, 0], [3, 0, 1, 2, 1, 0, 4, 0]]),
    segments=jnp.array([[1, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 2, 2, 1, 0]]),
)
LAST = Context(positions=jnp.array([[4], [3]]), segments=jnp.array([[1], [1]]))


def visible_by_loop(queries, keys, window=None, prefix=0):
    rows, length, slots = *queries.positions.shape, keys.positions.shape[1]
    seen = np.zeros((rows, length, slots), bool)
    for b in range(rows):
        for t in range(length):
            for s in range(slots):
                at, key = int(queries.positions[b, t]), int(keys.positions[b, s])
                same = int(queries.segments[b, t]) == int(keys.segments[b, s]) != 0
                past = key <= at and (window is None or at - key < window)
                seen[b, t, s] = same and (past or (at < prefix and key < prefix))
    return seen


def attention_by_loop(q, k, v, seen, scale, softcap=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    per_group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        logits = {}
        for s in range(k.shape[1]):
            if seen[b, t, s]:
                logit = scale * float(q[b, t, h] @ k[b, s, h // per_group])
                logits[s] = softcap * math.tanh(logit / softcap) if softcap else logit
        total = sum(math.exp(logit) for logit in logits.values())
        for s, logit in logits.items():
            out[b, t, h] += math.exp(logit) / total * v[b, s, h // per_group]
    return out


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("queries", "keys", "window", "prefix"),
    [
        (PACKED, PACKED, None, 0),
        (PACKED, PACKED, 1, 0),
        (PACKED, PACKED, 2, 0),
        (PACKED, PACKED, 99, 0),
        (PACKED, PACKED, None, 2),
        (LAST, CACHE, None, 0),
        (LAST, CACHE, 2, 0),
    ],
)
def test_mask_shows_exactly_the_range(queries, keys, window, prefix):
    mask = Mask.causal(queries, keys, window=window, prefix=prefix)
    np.testing.assert_array_equal(mask.dense(), visible_by_loop(queries, keys, window, prefix))


def test_mask_by_hand():
    dense = np.asarray(Mask.causal(LAST, CACHE, window=3).dense())
    # Position 4 sees 2, 3, 4, which lie in slots 2, 5, 6; position 3 of segment 1 sees 1, 2, 3 in slots 2, 3, 0.
    np.testing.assert_array_equal(dense[:, 0], [[0, 0, 1, 0, 0, 1, 1, 0], [1, 0, 1, 1, 0, 0, 0, 0]])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("keys", [PACKED, CACHE], ids=["packed", "cache"])
def test_attention_equals_the_loop(kv_heads, softcap, keys):
    queries = PACKED if keys is PACKED else LAST
    q = 2 * draw(0, *queries.positions.shape, 4, 6)
    k, v = draw(1, *keys.positions.shape, kv_heads, 6), draw(2, *keys.positions.shape, kv_heads, 6)
    out = attention(q, k, v, Mask.causal(queries, keys, window=3), scale=0.4, softcap=softcap)
    expected = attention_by_loop(q, k, v, visible_by_loop(queries, keys, window=3), 0.4, softcap)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_gradients_equal_finite_differences():
    q, k, v = (draw(seed, 2, 8, heads, 2) for seed, heads in ((3, 2), (4, 1), (5, 1)))
    mask, weight = Mask.causal(PACKED, PACKED), np.asarray(draw(6, 2, 8, 2, 2), np.float64)
    seen = visible_by_loop(PACKED, PACKED)
    grads = jax.grad(lambda *x: (attention(*x, mask, scale=0.7) * weight).sum(), (0, 1, 2))(q, k, v)
    inputs, step = [np.asarray(a, np.float64) for a in (q, k, v)], 1e-5
    for which, place in ((0, (0, 5, 1, 0)), (0, (1, 3, 0, 1)), (1, (0, 4, 0, 1)), (2, (1, 0, 0, 0))):
        moved = [[a.copy() for a in inputs] for _ in range(2)]
        moved[0][which][place] += step
        moved[1][which][place] -= step
        up, down = ((attention_by_loop(*m, seen, 0.7) * weight).sum() for m in moved)
        np.testing.assert_allclose(grads[which][place], (up - down) / (2 * step), atol=1e-4)


def test_query_that_sees_nothing_gets_zero_and_finite_gradients():
    q, k, v = (draw(seed, 2, 8, 2, 4) for seed in range(3))
    padding = np.asarray(PACKED.segments) == 0
    mask = Mask.causal(PACKED, PACKED)
    out, pull = jax.vjp(lambda *x: attention(*x, mask, scale=0.5), q, k, v)
    assert not np.asarray(out)[padding].any()
    grads = pull(jnp.ones_like(out))
    assert all(np.isfinite(g).all() for g in grads)
    assert all(not np.asarray(g)[padding].any() for g in grads)


def test_large_logits_do_not_overflow():
    q = k = v = 1e3 * draw(0, 2, 8, 2, 4)
    out, pull = jax.vjp(lambda q: attention(q, k, v, Mask.causal(PACKED, PACKED), scale=1.0), q)
    assert np.isfinite(out).all() and np.isfinite(pull(out)[0]).all()


def test_bfloat16_keeps_the_softmax_in_float32():
    q, k, v = (draw(seed, 2, 8, 2, 4).astype(jnp.bfloat16) for seed in range(3))
    mask = Mask.causal(PACKED, PACKED)
    out = attention(q, k, v, mask, scale=0.5)
    assert out.dtype == jnp.bfloat16
    exact = attention(*(a.astype(jnp.float32) for a in (q, k, v)), mask, scale=0.5)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


def test_dropout_keeps_the_mean():
    q, k, v = draw(0, 1, 1, 1, 4), draw(1, 1, 8, 1, 4), jnp.ones((1, 8, 1, 4))
    keys = Context.of_lengths(jnp.array([8]), 8)
    mask = Mask.causal(Context(jnp.array([[7]]), jnp.array([[1]])), keys)

    def one(key):
        return attention(q, k, v, mask, scale=0.5, dropout=0.25, dropout_key=key)[0, 0, 0, 0]

    outs = jax.vmap(one)(jax.random.split(jax.random.key(3), 4000))
    assert outs.std() > 0.1
    np.testing.assert_allclose(outs.mean(), 1.0, atol=0.03)


def test_refusals():
    q, k = draw(0, 1, 8, 6, 4), draw(1, 1, 8, 4, 4)
    mask = Mask.causal(Context.of_lengths(jnp.array([8]), 8), Context.of_lengths(jnp.array([8]), 8))
    with pytest.raises(ValueError, match="6 query heads are not a multiple of 4 key/value heads"):
        attention(q, k, k, mask, scale=1.0)
    with pytest.raises(ValueError, match="unknown attention implementation 'flash'; expected 'reference'"):
        attention(k, k, k, mask, scale=1.0, implementation="flash")
