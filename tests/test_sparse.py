"""The patterns of the Sparse Transformer against plain loops, the dense form, and counts of the work."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.attention import Mask, Rule, Terms, reference
from rlhf_jax.ops.sparse import (
    by_residue,
    fixed_attention,
    from_residues,
    is_summary,
    most_summaries,
    own_block_attention,
    strided_attention,
    summary_slots,
)
from rlhf_jax.types import Context

TERMS = Terms(scale=0.4)


def quick(function):
    """Compile with little optimisation: these programs run a few times, on a few numbers."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


SHAPES = [(1, 1), (4, 2), (4, 4), (7, 3), (50, 9)]  # stride or block, columns


def packed(*rows, width):
    """Rows of documents of the given lengths, the second number of a pair being the first position of one."""
    positions, segments = np.zeros((2, len(rows), width), np.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, start=1):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = number
            start += length
    return Context(jnp.array(positions), jnp.array(segments))


ROWS = {
    "packed": packed((5, 13, 1, 8), (1, 1, 25), (29,), (4, 8, 12), width=29),
    "ragged": Context.of_lengths(jnp.array([29, 12, 1, 0]), 29),
    "even": Context.of_lengths(jnp.array([28, 28, 27, 5]), 28),
    "one": Context.of_lengths(jnp.array([1, 1, 1, 1]), 1),
}


def draw(context, *, heads=4, groups=2, width=8, values=6):
    shape = context.positions.shape
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (heads, width), (groups, width), (groups, values)
    return tuple(jax.random.normal(key, (*shape, *size)) for key, size in zip(keys, sizes, strict=True))


def strided_sees(at, key, stride):
    return key <= at and (at - key) % stride == 0


def fixed_sees(at, key, block, columns):
    return key <= at and (key // block == at // block or key % block >= block - columns)


def seen_by_loop(context, sees):
    positions, segments = np.asarray(context.positions), np.asarray(context.segments)
    seen = np.zeros((*positions.shape, positions.shape[1]), bool)
    for b, t, s in np.ndindex(seen.shape):
        same = segments[b, t] == segments[b, s] != 0
        seen[b, t, s] = same and sees(int(positions[b, t]), int(positions[b, s]))
    return seen


def attention_by_loop(q, k, v, seen, scale):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out, per_group = np.zeros((*q.shape[:3], v.shape[3])), q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        slots = np.flatnonzero(seen[b, t])
        weights = [math.exp(scale * float(q[b, t, h] @ k[b, s, h // per_group])) for s in slots]
        for s, weight in zip(slots, weights, strict=True):
            out[b, t, h] += weight / sum(weights) * v[b, s, h // per_group]
    return out


def strided(stride, implementation="auto"):
    return functools.partial(strided_attention, terms=TERMS, stride=stride, implementation=implementation)


def fixed(block, columns, implementation="auto"):
    return functools.partial(fixed_attention, terms=TERMS, block=block, columns=columns, implementation=implementation)


def dense(context, size, columns=None):
    """The same by one dense mask."""
    rule = Rule(stride=size) if columns is None else Rule(block=size, columns=columns)
    mask = Mask.ranges(context, context, rule=rule)
    if columns is not None:
        mask = mask.replace(start=context.positions // size * size)
    return lambda q, k, v: reference.attend(q, k, v, mask, TERMS)[0]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("size", "columns"), SHAPES)
def test_patterns_equal_a_plain_loop(rows, size, columns):
    context = ROWS[rows]
    q, k, v = draw(context)
    for sparse, sees in (
        (strided(size), functools.partial(strided_sees, stride=size)),
        (fixed(size, columns), functools.partial(fixed_sees, block=size, columns=columns)),
    ):
        expected = attention_by_loop(q, k, v, seen_by_loop(context, sees), TERMS.scale)
        np.testing.assert_allclose(quick(sparse)(q, k, v, context), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("rows", ["packed", "ragged"])
@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_gradients_equal_those_of_the_dense_mask(rows, kind):
    context = ROWS[rows]
    sparse, plain = (
        (strided(4), dense(context, 4)) if kind == "strided" else (fixed(4, 2), dense(context, 4, columns=2))
    )
    operands = draw(context)
    probe = jax.random.normal(jax.random.key(1), (*operands[0].shape[:3], operands[2].shape[3]))
    found = quick(jax.grad(lambda *x: jnp.sum(probe * sparse(*x, context)), (0, 1, 2)))(*operands)
    wanted = quick(jax.grad(lambda *x: jnp.sum(probe * plain(*x)), (0, 1, 2)))(*operands)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_softcap_and_slopes_reach_every_part(kind):
    context = ROWS["packed"]
    q, k, v = draw(context)
    terms = Terms(scale=0.4, softcap=0.7, slopes=jnp.array([0.5, 0.25, 0.1, 0.0]))
    if kind == "strided":
        out, mask = (
            strided_attention(q, k, v, context, terms, stride=3),
            Mask.ranges(context, context, rule=Rule(stride=3)),
        )
    else:
        out = fixed_attention(q, k, v, context, terms, block=4, columns=2)
        mask = Mask.ranges(context, context, rule=Rule(block=4, columns=2))
        mask = mask.replace(start=context.positions // 4 * 4)
    np.testing.assert_allclose(out, reference.attend(q, k, v, mask, terms)[0], rtol=2e-5, atol=2e-6)


def visible(attend, length):
    """Whom each token sees, read off the output: logits are equal, and token ``s`` has unit vector ``s`` as value."""
    context, zeros = Context.of_lengths(jnp.array([length]), length), jnp.zeros((1, length, 1, 1))
    return np.asarray(quick(attend)(zeros, zeros, jnp.eye(length)[None, :, None], context)[0, :, 0] > 0)


@pytest.mark.parametrize("length", [1, 16, 37, 64])
def test_two_layers_reach_every_token_of_the_past(length):
    size = max(1, math.isqrt(length))
    local = np.asarray(Mask.ranges(*(Context.of_lengths(jnp.array([length]), length),) * 2, window=size).dense()[0])
    past = np.tril(np.ones((length, length), bool))
    one, other = visible(strided(size), length), visible(fixed(size, 1), length)
    assert ((one @ local) == past).all()  # the first layer local, the second strided
    assert ((local @ one) == past).all()
    assert ((other @ other) == past).all()
    if length > 2:
        assert not (one == past).all() and not (other == past).all()


@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_the_future_changes_no_bit_of_the_past(kind):
    attend, context = quick({"strided": strided(4), "fixed": fixed(4, 2)}[kind]), ROWS["ragged"]
    operands = draw(context)
    before = attend(*operands, context)
    for t in (3, 4, 7, 8, 13):
        changed = [x.at[:, t:].add(100.0) for x in operands]
        assert jnp.array_equal(attend(*changed, context)[:, :t], before[:, :t])


@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_padding_and_other_documents_do_not_matter(kind):
    attend, context = quick({"strided": strided(4), "fixed": fixed(4, 2)}[kind]), ROWS["packed"]
    operands = draw(context)
    own = (context.segments == 2)[..., None, None]
    out = attend(*operands, context)
    loud = attend(*(jnp.where(own, x, 300.0) for x in operands), context)
    np.testing.assert_allclose(jnp.where(own, loud, 0.0), jnp.where(own, out, 0.0), rtol=1e-5, atol=1e-6)
    nobody = (context.segments == 0)[..., None, None]
    assert jnp.all(jnp.where(nobody, out, 0.0) == 0.0) and nobody.any()


@pytest.mark.parametrize(("kind", "size"), [("strided", 32), ("fixed", 32)])
def test_work_grows_as_the_length_to_three_halves(kind, size):
    """A length four times as large with a block twice as large: eight times the operations, where dense takes 16."""

    def compiled(length, size):
        attend = {"strided": strided(size, "reference"), "fixed": fixed(size, 4, "reference")}[kind]
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        place = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def program(q, k, v, positions, segments):
            return attend(q, k, v, Context(positions, segments))

        return jax.jit(program).lower(x, x, x, place, place).compile()

    short, long = compiled(size**2, size), compiled(4 * size**2, 2 * size)
    growth = long.cost_analysis()["flops"] / short.cost_analysis()["flops"]
    assert growth < 8 * 1.15
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", long.as_text())]
    assert max(sizes) < (4 * size**2) ** 2 / 4  # the largest array is far from [T, T]


def test_residues_are_a_transpose():
    x = jnp.arange(2 * 7 * 3).reshape(2, 7, 3)
    parted = by_residue(x, 3)
    assert parted.shape == (6, 3, 3)
    assert jnp.array_equal(parted[1], x[0, 1::3].tolist() + [[0, 0, 0]])
    assert jnp.array_equal(from_residues(parted, 3, 7), x)


def test_summary_slots_hold_every_summary_however_documents_are_packed():
    """The bound is met by the worst packing: documents that end where a column ends."""
    block, columns, length = 4, 2, 24
    generator = np.random.default_rng(0)
    splits = [
        np.diff([0, *sorted(generator.choice(np.arange(1, length), 5, replace=False)), length]) for _ in range(20)
    ]
    context = packed(*splits, (4,) * 6, width=length)
    most = most_summaries(length, block, columns)
    slots = summary_slots(context, block, columns, most)
    for row, chosen in enumerate(np.asarray(is_summary(context, block, columns))):
        wanted = np.flatnonzero(chosen)
        assert len(wanted) <= most
        assert slots[row].tolist() == [*wanted, *[length] * (most - len(wanted))]
    assert jnp.all(slots[-1] < length)


def test_own_blocks_may_begin_anywhere_in_a_tile():
    """A later piece of a document: positions from 6 on, in slots from 0 on."""
    context = Context(jnp.arange(6, 17, dtype=jnp.int32)[None], jnp.ones((1, 11), jnp.int32))
    q, k, v = draw(context)
    out, _ = quick(functools.partial(own_block_attention, terms=TERMS, block=4))(q, k, v, context)
    seen = seen_by_loop(context, lambda at, key: key <= at and key // 4 == at // 4)
    np.testing.assert_allclose(out, attention_by_loop(q, k, v, seen, TERMS.scale), rtol=2e-5, atol=2e-6)
