"""Attention by tiles against the reference in float64, and what tiles must not change."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_scenes import PACKED, PROBLEMS, Problem, check, documents, values_and_gradients

from rlhf_jax.ops.attention import IMPLEMENTATIONS, Case, Mask, Rule, Terms, attention, blocked, choose, reference
from rlhf_jax.ops.attention.blocked_tiles import Tiles, Tiling, Visits
from rlhf_jax.types import Context

SMALL = Tiling(16, 8)


def draw(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize(("name", "rows"), [*((name, 1) for name in PROBLEMS), ("heads", 3), ("columns", 3)], ids=str)
def test_every_mask_and_term_equals_the_reference(name, rows):
    check(blocked.attend, PROBLEMS[name], jnp.float32, 5e-6, tiling=replace(SMALL, rows=rows))


@pytest.mark.parametrize("name", ["heads", "cache"])
def test_bf16_stays_as_near_as_the_dense_form_in_bf16(name):
    problem = PROBLEMS[name]
    exact = values_and_gradients(reference.attend, problem, jnp.bfloat16)
    ours = values_and_gradients(blocked.attend, problem, jnp.bfloat16, tiling=SMALL)
    dense = values_and_gradients(lambda *a: reference.attend(*a), problem, jnp.bfloat16)
    for key, value in ours.items():
        seen = exact[key] > -1e29
        errors = (np.abs(each[key] - exact[key])[seen].max() for each in (ours, dense))
        mine, theirs = errors
        assert mine <= 2 * theirs + 1e-3 * np.abs(exact[key][seen]).max(), (key, mine, theirs)
        assert np.isfinite(value).all()


@pytest.mark.parametrize(
    ("length", "heads", "tiling"),
    [
        (1, (4, 2), None),
        (7, (4, 1), SMALL),
        (65, (1, 1), Tiling(32, 24)),
        (65, (4, 4), None),
        (129, (4, 2), Tiling(32, 24)),
        (129, (4, 1), None),
    ],
    ids=str,
)
def test_any_length_and_any_grouping(length, heads, tiling):
    context = documents((length,), (length - length // 3, length // 3), width=length)
    problem = Problem(context, context, heads=heads[0], kv_heads=heads[1], width=8, value_width=8, window=50)
    check(blocked.attend, problem, jnp.float32, 5e-6, tiling=tiling)


@pytest.mark.parametrize(("queries", "keys"), [(8, 24), (48, 8), (48, 48)])
def test_tiles_do_not_change_the_result(queries, keys):
    problem = PROBLEMS["columns"]
    expected = values_and_gradients(blocked.attend, problem, jnp.float32, tiling=SMALL)
    found = values_and_gradients(blocked.attend, problem, jnp.float32, tiling=Tiling(queries, keys))
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=2e-6, err_msg=name)


def test_float64_is_kept():
    with jax.enable_x64(True):
        q, k, v = (draw(seed, 3, 45, 2, 8, dtype=jnp.float64) for seed in range(3))
        mask, terms = Mask.ranges(PACKED, PACKED), Terms(scale=0.3)
        out, lse = jax.jit(lambda *a: blocked.attend(*a, mask, terms, tiling=SMALL))(q, k, v)
        expected, expected_lse = reference.attend(q, k, v, mask, terms)
        assert out.dtype == lse.dtype == jnp.float64
        np.testing.assert_allclose(out, expected, atol=1e-14)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-14)


def test_packed_documents_equal_separate_ones():
    lengths = (20, 13, 9)
    q, k, v = (draw(seed, 1, sum(lengths), 2, 8) for seed in range(3))
    cut = np.cumsum((0, *lengths))

    def one(q, k, v, context):
        return blocked.attend(q, k, v, Mask.ranges(context, context), Terms(scale=0.3), tiling=SMALL)[0]

    def packed(q, k, v):
        return one(q, k, v, documents(lengths, width=sum(lengths)))

    def separate(q, k, v):
        parts = [
            one(q[:, a:b], k[:, a:b], v[:, a:b], documents((b - a,), width=b - a))
            for a, b in zip(cut[:-1], cut[1:], strict=True)
        ]
        return jnp.concatenate(parts, axis=1)

    def both(function):
        @jax.jit
        def run(*arrays):
            out, pull = jax.vjp(function, *arrays)
            return out, pull(out**2)

        return run(q, k, v)

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), both(packed), both(separate))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
def test_what_lies_in_padding_reaches_nothing(garbage):
    context = documents((20, 9), (5,), (), width=37)
    padding = np.asarray(context.segments == 0)[:, :, None, None]
    clean = [draw(seed, 3, 37, 2, 8) for seed in range(4)]
    dirty = [jnp.where(padding, garbage, x) for x in clean]
    mask, terms = Mask.ranges(context, context), Terms(scale=0.3)

    @jax.jit
    def run(q, k, v, cotangent):
        (out, lse), pull = jax.vjp(lambda *a: blocked.attend(*a, mask, terms, tiling=SMALL), q, k, v)
        return out, lse, *pull((cotangent, jnp.where(padding[..., 0], cotangent[..., 0], 1.0)))

    for one, other in zip(run(*dirty), run(*clean), strict=True):
        np.testing.assert_array_equal(one, other)
    out, lse, *gradients = run(*dirty)
    assert (np.asarray(lse)[padding[:, :, 0, 0]] == -1e30).all()
    for value in (out, *gradients):
        assert not np.asarray(value)[padding[:, :, 0, 0]].any()


def test_every_run_adds_alike():
    q, k, v = (draw(seed, 2, 300, 4, 16) for seed in range(3))
    context = documents((300,), (100, 170), width=300)
    mask, terms = Mask.ranges(context, context), Terms(scale=0.25)
    run = jax.jit(jax.grad(lambda *a: (blocked.attend(*a, mask, terms)[0] ** 2).sum(), (0, 1, 2)))
    first = run(q, k, v)
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, run(q, k, v), first)


@pytest.mark.parametrize("rows", [1, 2])
def test_tiles_outside_the_mask_are_not_visited(rows):
    context = documents((64,), (16, 16, 16, 16), width=64)
    tiling = Tiling(16, 16, rows=rows)
    visits = Visits.of(Tiles.of(Mask.ranges(context, context, window=17), tiling).blocks)
    # A window that reaches one tile back; of the second row, a document a tile.
    assert visits.seen.tolist() == ([1, 2, 2, 2] if rows == 2 else [1, 2, 2, 2, 1, 1, 1, 1])
    assert visits.order[3, :2].tolist() == [2, 3]
    if rows == 1:
        assert visits.order[6, 0] == 6
    full = Visits.of(Tiles.of(Mask.ranges(context, context), tiling).blocks)
    assert full.seen[:4].tolist() == [1, 2, 3, 4]


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporary(length):
        context = Context.of_lengths(jnp.array([length]), length)
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

        def loss(q, k, v, context):
            return blocked.attend(q, k, v, Mask.ranges(context, context), Terms(scale=0.25))[0].sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, context).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = [temporary(length) for length in (1024, 2048, 4096)]
    assert (sizes[2] - sizes[1]) / (sizes[1] - sizes[0]) < 2.5
    assert sizes[2] < 2 * 4096 * 4096 * 4 / 4


def test_one_jitted_function_serves_every_mask_of_a_shape():
    traces = 0

    @jax.jit
    def run(q, k, v, context):
        nonlocal traces
        traces += 1
        return blocked.attend(q, k, v, Mask.ranges(context, context), Terms(scale=0.3), tiling=SMALL)[0]

    q, k, v = (draw(seed, 1, 40, 2, 8) for seed in range(3))
    for lengths in ((40,), (13, 20), (1, 2, 3)):
        context = documents(lengths, width=40)
        expected = reference.attend(q, k, v, Mask.ranges(context, context), Terms(scale=0.3))[0]
        np.testing.assert_allclose(run(q, k, v, context), expected, atol=1e-6)
    assert traces == 1


def test_mapped_rows_equal_a_batch():
    q, k, v = (draw(seed, 3, 45, 2, 8) for seed in range(3))

    def one(q, k, v, positions, segments):
        context = Context(positions[None], segments[None])
        return blocked.attend(q[None], k[None], v[None], Mask.ranges(context, context), Terms(scale=0.3), tiling=SMALL)[
            0
        ][0]

    found = jax.vmap(one)(q, k, v, PACKED.positions, PACKED.segments)
    expected = reference.attend(q, k, v, Mask.ranges(PACKED, PACKED), Terms(scale=0.3))[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def case(length, slots=None, platform="cpu", rows=1, heads=8):
    slots = length if slots is None else slots
    return Case(platform, "", rows, length, slots, heads, heads, 64, 64, "float32")


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (case(255), "reference"),
        (case(256), "blocked"),
        (case(64, 1024), "blocked"),
        (case(1, 100_000), "reference"),
        (case(4096, platform="gpu"), "reference"),
        (case(8192, platform="gpu"), "blocked"),
        (replace(case(4096), dropout=True), "reference"),
    ],
)
def test_auto_takes_tiles_where_they_are_faster(asked, chosen, monkeypatch):
    monkeypatch.setattr(
        "rlhf_jax.ops.attention.dispatch.IMPLEMENTATIONS",
        {name: IMPLEMENTATIONS[name] for name in ("blocked", "reference")},
    )
    assert choose("auto", asked) == chosen


def test_auto_equals_the_reference_where_it_takes_tiles():
    context = documents((300,), (70, 200), width=300)
    q, k, v = draw(0, 2, 300, 4, 8), draw(1, 2, 300, 2, 8), draw(2, 2, 300, 2, 8)
    mask = Mask.ranges(context, context, window=90, rule=Rule(sinks=2))
    out = [attention(q, k, v, mask, scale=0.3, implementation=name) for name in ("auto", "blocked", "reference")]
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_allclose(out[0], out[2], atol=1e-6)
