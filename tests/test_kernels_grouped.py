"""The grouped matmul kernels: their schedules, their numbers in the interpreters, and what they refuse."""

from __future__ import annotations

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.kernels import grouped_schedule, hopper_grouped, hopper_grouped_outer, tpu_grouped
from rlhf_jax.ops.kernels.grouped_schedule import ALIGNED, GroupedCase

# Mosaic GPU's interpreter runs the warpgroups of a kernel on threads of XLA's own pool, as many as NPROC says, or as
# the machine has cores; where they are too few, those that compute wait forever for those that wait for them.
THREADS = int(os.environ.get("NPROC", os.cpu_count() or 1))


def interpreted(test):
    """Where Mosaic GPU can be interpreted."""
    test = pytest.mark.skipif(THREADS < 8, reason=f"NPROC={THREADS} leaves the interpreter waiting; set it to 16")(test)
    old = jax.__version_info__ < (0, 11, 2)
    return pytest.mark.skipif(old, reason="the kernels for Hopper need JAX 0.11.2 or newer (Python 3.12)")(test)


SIZES = {
    "uneven": (40, (5, 0, 17, 12)),
    "all in one": (40, (0, 40, 0)),
    "aligned": (64, (16, 16, 32)),
    "behind the last": (37, (1, 2, 0, 3, 0)),
    "empty at the end": (32, (20, 12, 0, 0)),
    "none": (24, (0, 0)),
}
"""Rows, and those of each group."""


def groups_of(rows: int, sizes: tuple[int, ...]) -> list[int]:
    """The group of each row by counting; rows of no group have the number behind the last one."""
    listed = [group for group, size in enumerate(sizes) for _ in range(size)]
    return listed + [len(sizes)] * (rows - len(listed))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("tile", [8, 16])
def test_tiles_cover_every_row_once_for_its_group(name, tile):
    rows, sizes = SIZES[name]
    listed = jax.tree.map(np.asarray, grouped_schedule.tiles(jnp.array(sizes), rows, tile))
    assert listed.count <= len(listed.group)
    covered = []
    for i in range(listed.count):
        start, begin, end = (int(x[i]) for x in (listed.start, listed.begin, listed.end))
        assert start % ALIGNED == 0 and start <= begin < end <= start + tile
        covered += [int(listed.group[i])] * (end - begin)
    assert covered == groups_of(rows, sizes)


def test_tiles_by_hand():
    """Groups of 3, 18 and 0 rows of 24, tiles of 16: the rows 3 to 20 of the second lie in tiles from 0 and from 16."""
    listed = grouped_schedule.tiles(jnp.array([3, 18, 0]), 24, 16)
    assert int(listed.count) == 4
    np.testing.assert_array_equal(listed.group[:4], [0, 1, 1, 3])
    np.testing.assert_array_equal(listed.start[:4], [0, 0, 16, 16])
    np.testing.assert_array_equal(listed.begin[:4], [0, 3, 16, 21])
    np.testing.assert_array_equal(listed.end[:4], [3, 16, 21, 24])


@pytest.mark.parametrize(("rows", "sizes"), [(9, (1,)), (9, (1, 8)), (81, (7, 9) * 5)])
def test_lists_are_as_long_as_they_must_be(rows, sizes):
    listed = [
        make(jnp.array(sizes), rows, 8)
        for make in (grouped_schedule.tiles, grouped_schedule.visits_of_blocks, grouped_schedule.visits_of_groups)
    ]
    assert all(int(each.count) <= len(each.group) for each in listed)
    # Nine rows take two tiles; a boundary inside a tile makes one more.
    assert rows != 9 or int(listed[0].count) == 3


@pytest.mark.parametrize("name", SIZES)
def test_blocks_are_visited_for_each_group_in_them(name):
    rows, sizes = SIZES[name]
    visits = jax.tree.map(np.asarray, grouped_schedule.visits_of_blocks(jnp.array(sizes), rows, 16))
    listed = groups_of(rows, sizes)
    wanted = sorted({(row // 16, group) for row, group in enumerate(listed)})
    assert (
        list(zip(visits.block[: visits.count].tolist(), visits.group[: visits.count].tolist(), strict=True)) == wanted
    )
    for i, (block, group) in enumerate(wanted):
        own = [row for row in range(rows) if listed[row] == group]
        assert (visits.begin[i], visits.end[i]) == (own[0], own[-1] + 1)
        assert visits.first[i] == (i == 0 or wanted[i - 1][0] != block)


@pytest.mark.parametrize("name", SIZES)
def test_groups_visit_their_blocks_and_empty_ones_one(name):
    rows, sizes = SIZES[name]
    visits = jax.tree.map(np.asarray, grouped_schedule.visits_of_groups(jnp.array(sizes), rows, 16))
    listed = groups_of(rows, sizes)
    blocks = [sorted({row // 16 for row in range(rows) if listed[row] == group}) for group in range(len(sizes))]
    wanted = [(group, block) for group, own in enumerate(blocks) for block in own or [None]]
    assert visits.count == len(wanted)
    for i, (group, block) in enumerate(wanted):
        assert visits.group[i] == group and 0 <= visits.block[i] < -(-rows // 16)
        assert visits.block[i] == block if block is not None else visits.begin[i] == visits.end[i]
        assert visits.first[i] == (i == 0 or wanted[i - 1][0] != group)
        assert visits.last[i] == (i == len(wanted) - 1 or wanted[i + 1][0] != group)


def test_sizes_beyond_the_rows_are_cut_off():
    begins, ends = grouped_schedule.bounds(jnp.array([5, 7, 9]), 10)
    np.testing.assert_array_equal(begins, [0, 5, 10, 10])
    np.testing.assert_array_equal(ends, [5, 10, 10, 10])


def check(kernels, rows, sizes, depth, width, dtype, tolerance, **settings):
    """All three products against one plain product a group; rows of no group are not numbers."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return np.array(jnp.asarray(random.normal(size=shape), dtype).astype(jnp.float32))

    x, w, dy = draw(rows, depth), draw(len(sizes), depth, width), draw(rows, width)
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    wanted, outer, at = np.zeros((rows, width)), np.zeros((len(sizes), depth, width)), 0
    for group, size in enumerate(sizes):
        own = slice(at, at + size)
        wanted[own], outer[group] = x[own] @ w[group], x[own].T @ dy[own]
        at += size
    x, w, dy = (jnp.asarray(array, dtype) for array in (x, w, dy))
    numbers = jnp.array(sizes)
    results = (
        kernels.grouped_matmul(x, w, numbers, **settings),
        kernels.grouped_matmul(x, w.swapaxes(1, 2), numbers, True, **settings),
        kernels.grouped_outer(x, dy, numbers, **settings),
    )
    for result, expected in zip(results, (wanted, wanted, outer), strict=True):
        assert result.dtype == dtype
        result = np.asarray(result, np.float32)
        np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1))
        # What nothing is added to is nothing, and not almost nothing.
        assert (result[expected == 0] == 0).all()


@pytest.mark.parametrize("name", SIZES)
def test_on_tpus_the_products_are_those_of_each_group(name):
    check(tpu_grouped, *SIZES[name], 24, 40, jnp.float32, 1e-6, block=16, interpret=True)


def test_on_tpus_tiles_of_the_matrices_add_up():
    check(tpu_grouped, 40, (5, 0, 17, 12), 384, 640, jnp.bfloat16, 4e-3, block=16, interpret=True)


HOPPER = {
    "uneven": (300, (5, 0, 170, 100), 256, 256),
    "all in one": (330, (0, 330, 0), 128, 256),
    "small groups": (40, (0, 3, 0, 30, 1), 256, 384),
    "odd": (333, (130, 150, 7, 41), 128, 384),
    "none": (24, (0, 0), 128, 128),
}
"""Rows, those of each group, and the sides of the matrices: 128 and 64 rows a tile, 256 and 128 columns."""


@interpreted
@pytest.mark.parametrize("name", HOPPER)
def test_on_hopper_the_products_are_those_of_each_group(name, monkeypatch, capfd):
    for module in (hopper_grouped, hopper_grouped_outer):
        monkeypatch.setattr(module, "SHARE", 2)
    dtype, tolerance = (jnp.float16, 5e-4) if name == "odd" else (jnp.bfloat16, 4e-3)
    check(hopper_grouped, *HOPPER[name], dtype, tolerance, programs=2, interpret=True)
    assert "RACE" not in capfd.readouterr().out


H200 = GroupedCase("gpu", "NVIDIA H200", 16384, 2048, 768, 128, "bfloat16")
TPU = GroupedCase("tpu", "TPU v5p", 16384, 2048, 768, 128, "bfloat16")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu", "device": "cpu"}, "this device is 'cpu'"),
        ({"device": "NVIDIA A100-SXM4-80GB"}, "this device is 'NVIDIA A100-SXM4-80GB'"),
        ({"dtype": "float32"}, "bfloat16 or float16, not float32"),
        ({"k": 192}, "multiples of 128, got 192 and 768"),
        ({"n": 64}, "multiples of 128, got 2048 and 64"),
        ({"rows": 0}, "needs rows"),
    ],
)
def test_hopper_refuses_with_a_reason(monkeypatch, change, reason):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert hopper_grouped.refusal(H200) is None
    assert reason in str(hopper_grouped.refusal(replace(H200, **change)))


def test_hopper_refuses_an_old_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "need JAX 0.11.2 or newer" in str(hopper_grouped.refusal(H200))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "runs on 'cpu'"),
        ({"dtype": "float16"}, "not float16"),
        ({"k": 192}, "multiples of 128, got 192 and 768"),
        ({"rows": 0}, "needs rows"),
        ({"rows": 1 << 23}, "its list of 16512 visits is longer than 8192"),
    ],
)
def test_tpus_refuse_with_a_reason(change, reason):
    assert tpu_grouped.refusal(TPU) is None
    assert reason in str(tpu_grouped.refusal(replace(TPU, **change)))


def test_tiles_follow_the_size_of_groups():
    assert [hopper_grouped.tile_rows(rows, 8) for rows in (8, 512, 513, 1 << 14)] == [64, 64, 128, 128]
    # Never longer than the rows, and not much longer than a group.
    assert [tpu_grouped.block_of(rows, 8) for rows in (9, 1 << 10, 1 << 11, 1 << 14)] == [16, 128, 256, 512]
