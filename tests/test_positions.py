"""Position encodings against loops and complex numbers."""

from __future__ import annotations

import cmath
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.ops.positions import apply_rope, rope_angles, sinusoidal

POSITIONS = jnp.array([[0, 1, 5, 2], [7, 0, 0, 100]])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_multiplies_complex_numbers(interleaved):
    width, base = 6, 100.0
    x = jax.random.normal(jax.random.key(0), (2, 4, 3, width))
    out = np.asarray(apply_rope(x, rope_angles(POSITIONS, width, base), interleaved=interleaved))
    for b, t, h in np.ndindex(2, 4, 3):
        for i in range(width // 2):
            one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
            angle = int(POSITIONS[b, t]) * base ** (-2 * i / width)
            turned = complex(x[b, t, h, one], x[b, t, h, two]) * cmath.exp(1j * angle)
            np.testing.assert_allclose(out[b, t, h, [one, two]], [turned.real, turned.imag], atol=2e-5)


def test_rope_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 8))

    def score(at, other):
        turn = [apply_rope(x, rope_angles(jnp.array([[p]]), 8, 10_000.0)) for x, p in ((q, at), (k, other))]
        return float((turn[0] * turn[1]).sum())

    assert math.isclose(score(9, 4), score(105, 100), abs_tol=1e-4)
    assert not math.isclose(score(9, 4), score(9, 5), abs_tol=1e-3)


def test_sinusoidal_by_hand():
    out = np.asarray(sinusoidal(POSITIONS, 4))
    expected = [math.sin(5), math.cos(5), math.sin(5 / 100), math.cos(5 / 100)]
    np.testing.assert_allclose(out[0, 2], expected, atol=1e-6)
    assert sinusoidal(POSITIONS, 5).shape == (2, 4, 5)
