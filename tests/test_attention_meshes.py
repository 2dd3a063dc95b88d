"""Attention on a mesh is attention on one device: values, gradients, what moves between devices, and memory.

Programs run in two processes of 8 simulated devices each (``meshes.run_on``).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from meshes import run_on

from rlhf_jax.models import Attention
from rlhf_jax.ops.attention import Mask, Rule
from rlhf_jax.ops.attention.partitioned import LARGEST_GATHERED, Cuts
from rlhf_jax.ops.attention.ring import steps
from rlhf_jax.sharding import Layout
from rlhf_jax.types import Context

ALL = "data x context x tensor"
PROGRAMS = {
    "gather": ("errors", [ALL], "gather", "reference", []),
    "gather for few key heads": ("errors", ["fsdp x tensor"], "gather", "reference", ["window", "one head"]),
    "ring of 8": ("errors", ["context 8"], "ring", "reference", ["window", "sinks"]),
    "decoding": ("decode_errors", [ALL]),
    "model ring": ("model_errors", ["context 4"], "ring"),
    "moved data": ("collectives", "data", "gather"),
    "moved tensor": ("collectives", "fsdp x tensor", "gather"),
    "ring": ("errors", [ALL], "ring", "reference", []),
    "ring blocked": ("errors", ["context 2"], "ring", "blocked", ["causal", "cap and slopes"]),
    "gated blocked": ("gated_errors", [ALL], "blocked"),
    "model gather": ("model_errors", [ALL], "gather"),
    "moved gather": ("collectives", "context 4", "gather"),
    "moved ring": ("collectives", "context 4", "ring"),
    "memory": ("memory", "ring", 8192, [1, 8]),
}
MORE = {
    "gather": ("errors", ["fsdp x tensor", "context 8"], "gather", "reference", []),
    "gather blocked": ("errors", ["data"], "gather", "blocked", ["causal", "cap and slopes"]),
    "gated": ("gated_errors", ["fsdp x tensor", "context 8"], "reference"),
}
"""For which others stand."""


@pytest.fixture(scope="module")
def ran() -> dict[str, Any]:
    """The result of every program, and what the compiler said of all of them under "log"."""
    names = list(PROGRAMS)
    halves = [{name: PROGRAMS[name] for name in half} for half in (names[:7], names[7:])]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda half: run_on(8, "attention_on_meshes", "several", half), halves))
    return {**done[0].value, **done[1].value, "log": done[0].log + done[1].log}


LAWS = [name for name, (function, *_) in PROGRAMS.items() if function.endswith("errors")]


def assert_same(found: dict[str, Any], layouts: list[str]) -> None:
    assert list(found) == layouts
    for layout, each in found.items():
        worst = max(each.values()) if isinstance(each, dict) else each
        assert worst < 1e-5, (layout, each)


@pytest.mark.parametrize("name", LAWS)
def test_a_mesh_changes_nothing(ran, name):
    assert_same(ran[name], PROGRAMS[name][1])


@pytest.mark.thorough
def test_other_meshes_change_nothing():
    found = run_on(8, "attention_on_meshes", "several", MORE).value
    for name, (_, layouts, *_) in MORE.items():
        assert_same(found[name], layouts)


def test_nothing_is_copied_whole_to_every_device(ran):
    """The partitioner says so in its log where it finds no other way."""
    assert "rematerialization" not in ran["log"]


@pytest.mark.parametrize("name", ["moved data", "moved tensor"])
def test_rows_and_heads_need_nothing_of_each_other(ran, name):
    assert ran[name] == {"values": [], "gradients": []}


def test_gathering_moves_keys_and_values_once_and_their_gradients_once(ran):
    """On 4 devices a row and 2 row parts: 4 rows of 32 tokens, 4 key heads of width 8."""
    row, part = 4 * 32, 4 * 32 * 4 * 8
    there = [["all-gather", row]] * 2 + [["all-gather", part]] * 2  # positions and segments, keys and values
    assert ran["moved gather"]["values"] == there
    assert ran["moved gather"]["gradients"] == there + [["reduce-scatter", part // 4]] * 2


def test_a_ring_never_holds_the_keys_of_a_row(ran):
    """Each step passes on one part of the keys; backwards also that of their gradients, which then are sent home."""
    numbers, part = 4 * 8, 4 * 8 * 4 * 8
    there = [["collective-permute", numbers]] * 2 + [["collective-permute", part]] * 2
    assert ran["moved ring"]["values"] == there
    back = [["collective-permute", part]] * 4  # in the loop, and home
    assert sorted(ran["moved ring"]["gradients"]) == sorted(2 * there + back)


def test_memory_of_a_ring_falls_with_its_length(ran):
    (alone, largest), (bytes_of_8, largest_of_8) = (ran["memory"][size] for size in ("1", "8"))
    assert largest_of_8 == largest / 8
    assert bytes_of_8 < 0.4 * alone  # tiles and steps have a size of their own


@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 6, 9, 13, 14, 99])
@pytest.mark.parametrize("size", [2, 4])
def test_a_ring_ends_where_no_query_sees_further(window, size):
    """Counted from the dense mask of a whole row: the farthest part before its own that a part sees."""
    length, part = 16, 16 // size
    whole = Context.of_lengths(jnp.array([length]), length)
    seen = np.asarray(Mask.ranges(whole, whole, window=window).dense())[0]
    blocks = seen.reshape(size, part, size, part).any(axis=(1, 3))
    expected = 1 + max(query - key for query in range(size) for key in range(size) if blocks[query, key])
    own = Context(whole.positions[:, :part], whole.segments[:, :part], packed=False)
    mask = Mask.ranges(own, own, window=window)
    assert steps(mask, size) == (size if window is None else expected)


def test_a_ring_goes_all_round_unless_the_window_alone_decides():
    own = Context.of_lengths(jnp.array([4]), 4)
    packed = replace(own, packed=True)
    assert steps(Mask.ranges(own, own, window=2), 4) == 2
    assert steps(Mask.ranges(own, own, window=2, rule=Rule(sinks=1)), 4) == 4
    assert steps(Mask.ranges(packed, packed, window=2), 4) == 4
    assert steps(Mask.ranges(own, own, window=2, prefix=3), 4) == 4


def cuts(*sizes: int, **layout: int) -> Cuts:
    """Of rows, length, slots, heads, key heads and value width, on a mesh without devices."""
    axes = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1} | layout
    return Cuts.of(AbstractMesh(tuple(axes.values()), tuple(axes)), *sizes)


def test_what_does_not_divide_stays_whole():
    found = cuts(6, 9, 9, 6, 3, 8, data=4, context=2, tensor=4)
    assert (found.rows, found.queries, found.keys, found.heads, found.kv_heads, found.values) == (None,) * 6


def test_heads_are_cut_where_key_heads_are_too_few():
    found = cuts(8, 8, 8, 12, 3, 8, tensor=2)
    assert (found.heads, found.kv_heads, found.values) == ("tensor", None, None)


def test_one_head_has_its_values_cut():
    found = cuts(8, 8, 8, 1, 1, 8, tensor=2)
    assert (found.heads, found.kv_heads, found.values) == (None, None, "tensor")


def test_keys_beyond_the_limit_travel():
    found, part = cuts(1, 8, 8, 1, 1, 8, context=2), jnp.zeros((1, 4, 1, 8))
    assert [found.by_ring(across, part, part) for across in ("auto", "gather", "ring")] == [False, False, True]
    large = np.broadcast_to(np.zeros((), np.int8), LARGEST_GATHERED // 4)
    assert not found.by_ring("auto", large, large)
    assert found.by_ring("auto", large, np.broadcast_to(np.int8(0), large.size + 1))
    assert not found.by_ring("gather", large, np.broadcast_to(np.int8(0), large.size + 1))


def test_unknown_ways_across_devices_are_refused():
    with pytest.raises(ValueError, match="unknown way across devices 'all_to_all'; expected one of 'auto'"):
        Attention(heads=2, across="all_to_all")


def test_layouts_of_these_tests_are_of_eight_devices():
    from attention_on_meshes import LAYOUTS

    assert all(np.prod(list(layout.sizes(8).values())) == 8 for layout in LAYOUTS.values())
    assert LAYOUTS["context 4"] == Layout(context=4)
