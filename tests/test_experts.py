"""Sorting, dispatch, combine and grouped matmuls against plain loops, for every implementation that a CPU runs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.attention.terms import CannotServe
from rlhf_jax.ops.experts import GROUPED_IMPLEMENTATIONS, choose, combine, counts, dispatch, grouped_matmul, sort
from rlhf_jax.ops.kernels.grouped_schedule import GroupedCase

SERVING = ("reference", "blocked", "ragged")
SIZES = {
    "uneven": [5, 40, 0, 83, 2],
    "empty": [0, 0, 130, 0, 0],
    "none": [0, 0, 0, 0, 0],
    "last": [0, 0, 0, 0, 130],
    "tiles": [32, 64, 32, 0, 2],
    "less": [20, 0, 33, 7, 1],
    "half": [650, 0, 20, 30, 0],
    "long": [1300, 1, 270, 600, 29],
}
DEPTH, WIDTH = 6, 7


def problem(name: str):
    """Rows (NaN where they are of no group), matrices, sizes and a cotangent, in float64."""
    sizes = np.array(SIZES[name], np.int32)
    rows = max(130, int(sizes.sum()))
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(shape) for shape in ((rows, DEPTH), (5, DEPTH, WIDTH), (rows, WIDTH)))
    x[sizes.sum() :] = np.nan
    return x, w, sizes, dy


def in_plain_python(x, w, sizes, dy):
    """(y, dx, dw) row by row."""
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            y[row], dx[row] = x[row] @ w[group], w[group] @ dy[row]
            dw[group] += np.outer(x[row], dy[row])
            row += 1
    return y, dx, dw


def value_and_gradients(implementation: str):
    def run(x, w, sizes, dy):
        y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return y, *back(dy)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("implementation", SERVING)
@pytest.mark.parametrize("name", SIZES)
def test_grouped_matmul_equals_a_plain_loop(name, implementation):
    x, w, sizes, dy = problem(name)
    with jax.enable_x64(True):
        found = value_and_gradients(implementation)(x, w, sizes, dy)
    for one, expected in zip(found, in_plain_python(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-12)


@pytest.mark.parametrize("implementation", SERVING)
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_narrow_types_sum_in_float32(implementation, dtype, bound):
    x, w, sizes, dy = problem("uneven")
    narrow = [jnp.asarray(each, dtype) for each in (x, w, dy)]
    found = value_and_gradients(implementation)(narrow[0], narrow[1], jnp.asarray(sizes), narrow[2])
    expected = in_plain_python(
        *(np.asarray(each, np.float64) for each in narrow[:2]), sizes, np.asarray(narrow[2], float)
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(np.asarray(one, float), other, rtol=bound, atol=bound)


@pytest.mark.parametrize("implementation", SERVING)
def test_no_rows_give_no_rows(implementation):
    sizes, w = jnp.zeros(3, jnp.int32), jnp.ones((3, 4, 5))
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), jnp.ones((0, 4)), w)
    assert y.shape == (0, 5) and not back(y)[1].any()


CHOSEN = np.array([[1, 4], [0, 1], [5, 5], [4, 0], [1, 2]])


def test_sorting_by_hand():
    # Slots 0..9 want 1 4 0 1 - - 4 0 1 2, where - (5) is nobody.
    sorting = sort(jnp.asarray(CHOSEN), 5)
    assert sorting.slots.tolist() == [2, 7, 0, 3, 8, 9, 1, 6, 4, 5]
    assert sorting.rows.tolist() == [[2, 6], [0, 3], [8, 9], [7, 1], [4, 5]]
    assert sorting.sizes.tolist() == [2, 3, 1, 0, 2]
    assert counts(jnp.array([3, 3, 9, 0]), 4).tolist() == [1, 0, 0, 2]


def test_dispatch_and_combine_equal_plain_loops_and_are_transposes():
    rng = np.random.default_rng(1)
    x, rows, weights = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 3), (10, 3), (5, 2)))
    sorting = sort(jnp.asarray(CHOSEN), 5)
    taken, to_x = jax.vjp(lambda x: dispatch(x, sorting), x)
    np.testing.assert_array_equal(taken, np.asarray(x)[np.asarray(sorting.slots) // 2])
    y, back = jax.vjp(lambda rows, weights: combine(rows, weights, sorting), rows, weights)
    place = np.asarray(sorting.rows)
    expected = [sum(weights[t, j] * rows[place[t, j]] for j in range(2)) for t in range(5)]
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    # Both against differentiation of plain gathers.
    plain = jax.vjp(lambda rows, weights: (rows[sorting.rows] * weights[..., None]).sum(1), rows, weights)[1]
    for one, other in zip(back(x), plain(x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    np.testing.assert_allclose(to_x(rows)[0], jax.vjp(lambda x: x[sorting.slots // 2], x)[1](rows)[0], rtol=1e-6)


def test_no_gradient_scatters():
    sorting = sort(jnp.asarray(CHOSEN), 5)

    def loss(x, weights, w):
        return combine(grouped_matmul(dispatch(x, sorting), w, sorting.sizes), weights, sorting).sum()

    arguments = jnp.ones((5, 3)), jnp.ones((5, 2)), jnp.ones((5, 3, 3))
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).as_text()
    assert "gather" in program and not re.search(r"scatter", program)
    plain = jax.jit(jax.grad(lambda x: (x[sorting.slots // 2] ** 2).sum())).lower(arguments[0]).as_text()
    assert "scatter" in plain


def test_combine_adds_up_in_the_dtype_of_the_weights():
    sorting = sort(jnp.asarray(CHOSEN), 5)
    y = combine(jnp.ones((10, 3), jnp.bfloat16), jnp.full((5, 2), 1.001, jnp.float32), sorting)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 2.002, rtol=1e-6)


ON_A_GPU = GroupedCase("gpu", "NVIDIA H200", 512, 256, 256, 4, "bfloat16")


def test_auto_takes_what_serves_and_has_run():
    assert choose("auto", GroupedCase("cpu", "cpu", 512, 256, 256, 4, "float32")) == "blocked"
    assert choose("auto", GroupedCase("tpu", "TPU v5", 512, 256, 256, 4, "bfloat16")) == "ragged"
    assert choose("auto", ON_A_GPU) == "blocked"
    assert list(GROUPED_IMPLEMENTATIONS)[-1] == "reference"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: choose("fast", ON_A_GPU), ValueError, "unknown grouped matmul implementation 'fast'; expected one of"),
        (lambda: choose("tpu", ON_A_GPU), CannotServe, "'tpu' cannot serve: .*'gpu'; take another, or 'auto'"),
        (
            lambda: grouped_matmul(jnp.ones((4, 3)), jnp.ones((2, 5, 6)), jnp.zeros(2, jnp.int32)),
            ValueError,
            r"rows \(4, 3\), matrices \(2, 5, 6\) and sizes \(2,\) do not fit together",
        ),
    ],
)
def test_refusals(build, error, message):
    with pytest.raises(error, match=message):
        build()
