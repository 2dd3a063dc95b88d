"""State in slots that follow from positions, against a dictionary per row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.mixers.caches import Kept, ring
from rlhf_jax.types import Context

ROWS, HEADS, WIDTH = 3, 2, 4
SIZE, FIRST = 5, 2


def draw(seed: int, tokens: int) -> dict[str, jax.Array]:
    one, other = jax.random.split(jax.random.key(seed))
    shapes = {"keys": (ROWS, HEADS, tokens, WIDTH), "gates": (ROWS, tokens, 1)}
    return {name: jax.random.normal(key, shapes[name]) for name, key in zip(shapes, (one, other), strict=True)}


def empty(slots: int = FIRST + SIZE) -> Kept:
    return Kept.empty(ROWS, slots, jnp.float32, keys=(HEADS, WIDTH), gates=(1,))


def chunks(widths, seed=0):
    """Ragged, right-padded chunks: each row has up to ``width`` new tokens, and the padding holds nonsense."""
    rng, at = np.random.default_rng(seed), np.zeros(ROWS, np.int32)
    for number, width in enumerate(widths):
        lengths = rng.integers(0, width + 1, ROWS)
        slots = np.arange(width)
        segments = (slots < lengths[:, None]).astype(np.int32)
        positions = np.where(segments > 0, at[:, None] + slots, rng.integers(0, 50, (ROWS, width)))
        yield Context(jnp.asarray(positions, jnp.int32), jnp.asarray(segments)), draw(number + 100 * seed, width)
        at += lengths


@jax.jit
def enter(state: Kept, context: Context, new) -> Kept:
    return state.write(context, ring(context.positions, SIZE, FIRST), **new)


def test_ring_by_hand():
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6, 7, 8]])
    np.testing.assert_array_equal(ring(positions, 3), [[0, 1, 2, 0, 1, 2, 0, 1, 2]])
    np.testing.assert_array_equal(ring(positions, 3, first=2), [[0, 1, 2, 3, 4, 2, 3, 4, 2]])


@pytest.mark.parametrize("widths", [(1,) * 40, (3, 1, 9, 1, 1, 16, 2), (30,)], ids=str)
def test_writing_equals_a_dictionary_per_row(widths):
    state, expected = empty(), [{} for _ in range(ROWS)]
    for context, new in chunks(widths):
        state = enter(state, context, new)
        context, new = jax.tree.map(np.asarray, (context, new))
        for row, token in zip(*np.nonzero(context.segments), strict=True):
            place = int(context.positions[row, token])
            slot = place if place < FIRST else FIRST + (place - FIRST) % SIZE
            expected[row][slot] = (place, new["keys"][row, :, token], new["gates"][row, token])
    assert any(place >= FIRST + 2 * SIZE for row in expected for place, _, _ in row.values()), "the ring wraps twice"
    state = jax.tree.map(np.asarray, state)
    for row, slot in np.ndindex(state.segments.shape):
        assert state.segments[row, slot] == (slot in expected[row])
        if slot in expected[row]:
            place, keys, gates = expected[row][slot]
            assert state.positions[row, slot] == place
            np.testing.assert_array_equal(state.contents["keys"][row, :, slot], keys)
            np.testing.assert_array_equal(state.contents["gates"][row, slot], gates)


def test_the_last_of_the_tokens_that_name_a_slot_gets_it():
    context = Context(jnp.array([[4, 5, 6, 7]] * ROWS), jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]))
    state = jax.jit(Kept.write)(empty(), context, jnp.array([[3, 1, 3, 1]] * ROWS), **draw(0, 4))
    np.testing.assert_array_equal(state.positions[:, jnp.array([1, 3])], [[7, 6], [5, 6], [5, 4]])
    np.testing.assert_array_equal(np.asarray(state.segments).sum(1), 2)


@pytest.mark.parametrize("tokens", [1, 3])
def test_slots_out_of_range_drop_the_token(tokens):
    context = Context(jnp.ones((ROWS, tokens), jnp.int32), jnp.ones((ROWS, tokens), jnp.int32))
    for slot in (-1, FIRST + SIZE, 1000):
        state = jax.jit(Kept.write)(empty(), context, jnp.full((ROWS, tokens), slot), **draw(0, tokens))
        assert not np.asarray(state.segments).any() and not np.asarray(state.contents["keys"]).any()


def test_enlarging_by_zeros_changes_nothing():
    """A cache of few slots, enlarged behind each axis as the sampler does, equals one that was large at once."""
    (context, new), (later, more) = chunks((4, 9), seed=1)
    small, large = empty(4), empty()
    small, large = enter(small, context, new), enter(large, context, new)
    small = jax.tree.map(
        lambda old, full: jnp.pad(old, [(0, b - a) for a, b in zip(old.shape, full.shape, strict=True)]), small, large
    )
    jax.tree.map(np.testing.assert_array_equal, small, large)
    jax.tree.map(np.testing.assert_array_equal, enter(small, later, more), enter(large, later, more))


def test_a_chunk_lies_beside_what_is_kept():
    (context, new), (later, more) = chunks((4, 3))
    state = enter(empty(), context, new)
    contents, seen = state.beside(later, **more)
    for name in contents:
        np.testing.assert_array_equal(contents[name], np.concatenate([state.contents[name], more[name]], axis=-2))
    np.testing.assert_array_equal(seen.segments, np.concatenate([state.segments, later.segments], axis=1))
    np.testing.assert_array_equal(seen.positions, np.concatenate([state.positions, later.positions], axis=1))
    assert seen.packed, "kept tokens lie in any order"


def test_contents_keep_their_dtype():
    state = Kept.empty(ROWS, 4, jnp.bfloat16, keys=(HEADS, WIDTH), gates=(1,))
    for tokens in (1, 3):
        context = Context.of_lengths(jnp.full(ROWS, tokens), tokens)
        written = jax.eval_shape(Kept.write, state, context, context.positions, **draw(0, tokens))
        assert all(leaf.dtype == jnp.bfloat16 for leaf in written.contents.values())
        contents, _ = state.beside(context, **draw(0, tokens))
        assert all(leaf.dtype == jnp.bfloat16 for leaf in contents.values())


def test_one_token_is_written_in_place():
    """A decode loop does not copy its cache: the loop's body holds no copy as large as the keys."""
    state = Kept.empty(ROWS, 64, jnp.float32, keys=(HEADS, WIDTH))

    def loop(state):
        def step(number, state):
            context = Context(jnp.full((ROWS, 1), number), jnp.ones((ROWS, 1), jnp.int32))
            new = jnp.full((ROWS, HEADS, 1, WIDTH), number, jnp.float32)
            return state.write(context, ring(context.positions, 64), keys=new)

        return jax.lax.fori_loop(0, 100, step, state)

    program = jax.jit(loop, donate_argnums=0).lower(state).compile().as_text()
    copies = [line for line in program.splitlines() if " copy(" in line and "f32[3,2,64,4]" in line.split(" copy(")[0]]
    assert not copies, copies
