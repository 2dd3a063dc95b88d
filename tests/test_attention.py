"""The mask and attention against plain Python loops."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.attention import Mask, Rule, Terms, alibi_slopes, attention, merge, partial_attention
from rlhf_jax.ops.attention.masks import ALL, NOTHING
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


def visible_by_loop(queries, keys, window=None, prefix=0, rule=Rule()):
    rows, length, slots = *queries.positions.shape, keys.positions.shape[1]
    seen = np.zeros((rows, length, slots), bool)
    for b in range(rows):
        for t in range(length):
            for s in range(slots):
                at, key = int(queries.positions[b, t]), int(keys.positions[b, s])
                same = int(queries.segments[b, t]) == int(keys.segments[b, s]) != 0
                near = (window is None or at - key < window) and (rule.stride is None or (at - key) % rule.stride == 0)
                summary = rule.block is not None and key % rule.block >= rule.block - rule.columns
                past = key <= at and (near or key < rule.sinks or summary)
                seen[b, t, s] = same and (past or (at < prefix and key < prefix))
    return seen


def attention_by_loop(q, k, v, seen, scale, softcap=None, slopes=None, sinks=None, places=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    per_group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        logits = {}
        for s in range(k.shape[1]):
            if seen[b, t, s]:
                logit = scale * float(q[b, t, h] @ k[b, s, h // per_group])
                logits[s] = softcap * math.tanh(logit / softcap) if softcap else logit
                if slopes is not None:
                    logits[s] -= float(slopes[h]) * int(places[0][b, t] - places[1][b, s])
        total = sum(math.exp(logit) for logit in logits.values())
        total += 0.0 if sinks is None else math.exp(sinks[h])
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
    mask = Mask.ranges(queries, keys, window=window, prefix=prefix)
    np.testing.assert_array_equal(mask.dense(), visible_by_loop(queries, keys, window, prefix))


RULES = [Rule(sinks=2), Rule(stride=2), Rule(stride=3, sinks=1), Rule(block=3, columns=1), Rule(block=2, columns=2)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("keys", [PACKED, CACHE], ids=["packed", "cache"])
def test_rules_show_exactly_what_they_say(rule, window, keys):
    queries = PACKED if keys is PACKED else LAST
    mask = Mask.ranges(queries, keys, window=window, rule=rule)
    np.testing.assert_array_equal(mask.dense(), visible_by_loop(queries, keys, window, rule=rule))


@pytest.mark.parametrize("rule", [Rule(), *RULES], ids=str)
@pytest.mark.parametrize("window", [None, 1, 3])
def test_blocks_are_certain_where_they_say_so(rule, window):
    lengths = [(7, 5, 12), (24,), (1, 2, 3, 4, 5), (3, 20)]
    positions, segments = np.zeros((4, 24), np.int32), np.zeros((4, 24), np.int32)
    for row, documents in enumerate(lengths):
        at = 0
        for number, length in enumerate(documents, start=1):
            positions[row, at : at + length], segments[row, at : at + length] = range(length), number
            at += length
    context = Context(jnp.asarray(positions), jnp.asarray(segments))
    mask = Mask.ranges(context, context, window=window, rule=rule)
    tiles = np.asarray(mask.dense()).reshape(4, 6, 4, 8, 3).swapaxes(2, 3)
    blocks = np.asarray(mask.blocks(4, 3))
    assert not tiles[blocks == NOTHING].any()
    assert tiles[blocks == ALL].all()
    if window is not None and rule in (Rule(), Rule(stride=2), Rule(stride=3, sinks=1)):
        assert (blocks == NOTHING).mean() > 0.6
    if window is None and rule == Rule():
        assert (blocks[1] == ALL).sum() > 8


def test_padding_a_mask_adds_what_nobody_sees():
    padded = Mask.ranges(PACKED, PACKED).padded(5, 3)
    dense = np.asarray(padded.dense())
    assert dense.shape == (2, 10, 9)
    np.testing.assert_array_equal(dense[:, :8, :8], Mask.ranges(PACKED, PACKED).dense())
    assert dense.sum() == np.asarray(Mask.ranges(PACKED, PACKED).dense()).sum()
    with pytest.raises(ValueError, match="8 queries and 8 keys are not multiples of the tiles 5 and 3"):
        Mask.ranges(PACKED, PACKED).blocks(5, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule(sinks=-1), "sinks must not be negative, got -1"),
        (lambda: Rule(stride=0), "stride must be at least 1, got 0"),
        (lambda: Rule(block=4), "block 4 and columns 0 go together"),
        (lambda: Rule(block=4, columns=5), "columns must be between 1 and block 4, got 5"),
    ],
)
def test_rules_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_mask_by_hand():
    dense = np.asarray(Mask.ranges(LAST, CACHE, window=3).dense())
    # Position 4 sees 2, 3, 4, which lie in slots 2, 5, 6; position 3 of segment 1 sees 1, 2, 3 in slots 2, 3, 0.
    np.testing.assert_array_equal(dense[:, 0], [[0, 0, 1, 0, 0, 1, 1, 0], [1, 0, 1, 1, 0, 0, 0, 0]])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("keys", [PACKED, CACHE], ids=["packed", "cache"])
def test_attention_equals_the_loop(kv_heads, softcap, keys):
    queries = PACKED if keys is PACKED else LAST
    q = 2 * draw(0, *queries.positions.shape, 4, 6)
    k, v = draw(1, *keys.positions.shape, kv_heads, 6), draw(2, *keys.positions.shape, kv_heads, 6)
    out = attention(q, k, v, Mask.ranges(queries, keys, window=3), scale=0.4, softcap=softcap)
    expected = attention_by_loop(q, k, v, visible_by_loop(queries, keys, window=3), 0.4, softcap)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_slopes_sinks_and_wide_values_equal_the_loop():
    q, k, v = draw(0, 2, 8, 4, 6), draw(1, 2, 8, 2, 6), draw(2, 2, 8, 2, 10)
    slopes, sinks = alibi_slopes(4), jnp.array([-1.0, 0.0, 2.0, 30.0])
    out = attention(q, k, v, Mask.ranges(PACKED, PACKED), scale=0.4, slopes=slopes, sink_logits=sinks)
    places = (np.asarray(PACKED.positions),) * 2
    expected = attention_by_loop(q, k, v, visible_by_loop(PACKED, PACKED), 0.4, None, slopes, sinks, places)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_alibi_slopes_are_the_published_ones():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-n for n in range(1, 9)])
    # 12 heads: those of 8, then every other of 16 (0.5 ** 0.5, 0.5 ** 1.5, ...).
    np.testing.assert_allclose(alibi_slopes(12)[8:], [0.5**0.5, 0.5**1.5, 0.5**2.5, 0.5**3.5], rtol=1e-6)


def test_a_sink_far_above_takes_everything_and_one_far_below_nothing():
    q, k, v = (draw(seed, 2, 8, 2, 4) for seed in range(3))
    mask = Mask.ranges(PACKED, PACKED)
    plain = attention(q, k, v, mask, scale=0.5)
    far = [attention(q, k, v, mask, scale=0.5, sink_logits=jnp.full(2, at)) for at in (-200.0, 200.0)]
    np.testing.assert_allclose(far[0], plain, atol=1e-7)
    assert not np.asarray(far[1]).any()
    grad = jax.grad(lambda s: (attention(q, k, v, mask, scale=0.5, sink_logits=s) * v).sum())(jnp.zeros(2))
    step = 1e-2
    for head in range(2):
        up, down = (
            (attention(q, k, v, mask, scale=0.5, sink_logits=jnp.zeros(2).at[head].set(at)) * v).sum()
            for at in (step, -step)
        )
        np.testing.assert_allclose(grad[head], (up - down) / (2 * step), atol=1e-3)


def test_merged_parts_equal_the_whole():
    q, k, v = (draw(seed, 2, 8, 2, 4) for seed in range(3))
    terms = Terms(scale=0.5)

    def whole(q, k, v):
        return partial_attention(q, k, v, Mask.ranges(PACKED, PACKED), terms)[0]

    def parts(q, k, v):
        cut = [Context(PACKED.positions[:, a:b], PACKED.segments[:, a:b]) for a, b in ((0, 3), (3, 8))]
        return merge([
            partial_attention(q, k[:, a:b], v[:, a:b], Mask.ranges(PACKED, keys), terms)
            for keys, (a, b) in zip(cut, ((0, 3), (3, 8)), strict=True)
        ])  # fmt: skip

    out, pull = jax.vjp(whole, q, k, v)
    merged, pull_merged = jax.vjp(parts, q, k, v)
    np.testing.assert_allclose(merged, out, atol=1e-6)
    for one, other in zip(pull(q), pull_merged(q), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)


def test_reference_is_exact_in_float64():
    with jax.enable_x64(True):
        q, k, v = (np.random.default_rng(seed).normal(size=(2, 8, 2, 4)) for seed in range(3))
        out = attention(*map(jnp.asarray, (q, k, v)), Mask.ranges(PACKED, PACKED), scale=0.5)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, attention_by_loop(q, k, v, visible_by_loop(PACKED, PACKED), 0.5), atol=1e-14)


def test_gradients_equal_finite_differences():
    q, k, v = (draw(seed, 2, 8, heads, 2) for seed, heads in ((3, 2), (4, 1), (5, 1)))
    mask, weight = Mask.ranges(PACKED, PACKED), np.asarray(draw(6, 2, 8, 2, 2), np.float64)
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
    mask = Mask.ranges(PACKED, PACKED)
    out, pull = jax.vjp(lambda *x: attention(*x, mask, scale=0.5), q, k, v)
    assert not np.asarray(out)[padding].any()
    grads = pull(jnp.ones_like(out))
    assert all(np.isfinite(g).all() for g in grads)
    assert all(not np.asarray(g)[padding].any() for g in grads)


def test_large_logits_do_not_overflow():
    q = k = v = 1e3 * draw(0, 2, 8, 2, 4)
    out, pull = jax.vjp(lambda q: attention(q, k, v, Mask.ranges(PACKED, PACKED), scale=1.0), q)
    assert np.isfinite(out).all() and np.isfinite(pull(out)[0]).all()


def test_bfloat16_keeps_the_softmax_in_float32():
    q, k, v = (draw(seed, 2, 8, 2, 4).astype(jnp.bfloat16) for seed in range(3))
    mask = Mask.ranges(PACKED, PACKED)
    out = attention(q, k, v, mask, scale=0.5)
    assert out.dtype == jnp.bfloat16
    exact = attention(*(a.astype(jnp.float32) for a in (q, k, v)), mask, scale=0.5)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


def test_dropout_keeps_the_mean():
    q, k, v = draw(0, 1, 1, 1, 4), draw(1, 1, 8, 1, 4), jnp.ones((1, 8, 1, 4))
    keys = Context.of_lengths(jnp.array([8]), 8)
    mask = Mask.ranges(Context(jnp.array([[7]]), jnp.array([[1]])), keys)

    def one(key):
        return attention(q, k, v, mask, scale=0.5, dropout=0.25, dropout_key=key)[0, 0, 0, 0]

    outs = jax.vmap(one)(jax.random.split(jax.random.key(3), 4000))
    assert outs.std() > 0.1
    np.testing.assert_allclose(outs.mean(), 1.0, atol=0.03)


def test_refusals():
    q, k = draw(0, 1, 8, 6, 4), draw(1, 1, 8, 4, 4)
    mask = Mask.ranges(Context.of_lengths(jnp.array([8]), 8), Context.of_lengths(jnp.array([8]), 8))
    with pytest.raises(ValueError, match="6 query heads are not a multiple of 4 key/value heads"):
        attention(q, k, k, mask, scale=1.0)
    with pytest.raises(
        ValueError, match="unknown attention implementation 'flash'; expected one of 'auto', "
    ):
        attention(k, k, k, mask, scale=1.0, implementation="flash")
