"""Position encodings against loops, complex numbers and hand-made values."""

from __future__ import annotations

import cmath
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformer_in_numpy import frequencies_by_loop

from rlhf_jax.models.positions import NTK, DynamicNTK, Linear, Llama3, RoPE, YaRN
from rlhf_jax.ops.positions import apply_rope, dynamic_ntk_factor, rope_angles, sinusoidal

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


def score(position: RoPE, at: int, other: int, length: int | None = None, width: int = 8) -> float:
    """The product of a query at one place and a key at another."""
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, width))
    lengths = None if length is None else jnp.array([[length]])
    turned = [position.rotate(x, jnp.array([[p]]), lengths) for x, p in ((q, at), (k, other))]
    return float((turned[0] * turned[1]).sum())


SCALED = {
    "plain": RoPE(),
    "interleaved": RoPE(interleaved=True),
    "linear": RoPE(scaling=Linear(3.0)),
    "ntk": RoPE(scaling=NTK(3.0)),
    "yarn": RoPE(scaling=YaRN(3.0, 32)),
    "llama3": RoPE(scaling=Llama3(3.0, 32)),
}


@pytest.mark.parametrize("name", SCALED)
def test_rope_scores_depend_on_the_distance_alone(name):
    position = SCALED[name]
    assert math.isclose(score(position, 9, 4), score(position, 105, 100), abs_tol=1e-4)
    assert not math.isclose(score(position, 9, 4), score(position, 9, 5), abs_tol=1e-3)


def test_dynamic_scores_depend_on_the_distance_and_the_length():
    position = RoPE(scaling=DynamicNTK(16))
    assert math.isclose(score(position, 9, 4, 40), score(position, 29, 24, 40), abs_tol=1e-4)
    assert not math.isclose(score(position, 9, 4, 40), score(position, 9, 4, 30), abs_tol=1e-3)
    assert math.isclose(score(position, 9, 4, 16), score(RoPE(), 9, 4), abs_tol=1e-6)


def turns_of(position: RoPE, width: int, length: int | None = None) -> np.ndarray:
    """The angle by which each pair is turned at position 1 (and the amplitude), as complex numbers."""
    ones = jnp.concatenate([jnp.ones(width // 2), jnp.zeros(width // 2)])[None, None]
    lengths = None if length is None else jnp.array([[length]])
    out = np.asarray(position.rotate(ones, jnp.array([[1]]), lengths))[0, 0]
    return out[: width // 2] + 1j * out[width // 2 :]


RULES = [
    (Linear(2.5), 0), (NTK(4.0), 0), (DynamicNTK(64), 32), (DynamicNTK(64), 100), (DynamicNTK(64, 2.0), 100),
    (YaRN(4.0, 2048), 0), (YaRN(16.0, 512, fast=20.0, slow=2.0), 0), (Llama3(8.0, 2048), 0),
    (Llama3(4.0, 512, low=0.5, high=20.0), 0),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "length"), RULES, ids=str)
@pytest.mark.parametrize(("width", "base"), [(64, 10_000.0), (6, 100.0)])
def test_frequencies_equal_the_loop(rule, length, width, base):
    turned = turns_of(RoPE(base, scaling=rule), width, length)
    expected = frequencies_by_loop(rule, width, base, length)
    np.testing.assert_allclose(np.angle(turned), expected, rtol=2e-5)
    amplitude = 0.1 * math.log(rule.factor) + 1 if isinstance(rule, YaRN) else 1.0
    np.testing.assert_allclose(np.abs(turned), amplitude, rtol=1e-5)


def test_rules_by_hand():
    """Heads of 4 with base 100: the pairs turn by 1 and by 1/10 a token."""
    angle = {name: np.angle(turns_of(RoPE(100.0, scaling=rule), 4, 20)) for name, rule in {
        "linear": Linear(2.0),  # both halved
        "ntk": NTK(2.0),  # base 100 * 2^(4 / 2) = 400, of which 1 / 20 is the root
        "dynamic": DynamicNTK(10),  # 20 tokens are 2 times 10: as above
        "llama3": Llama3(4.0, 20, low=0.5, high=2.0),  # 3.18 turns: kept; 0.318 turns: a quarter
        "between": Llama3(4.0, 63, low=0.5, high=1.5),  # 1.0027 turns: half way (0.5027) from 1/40 to 1/10
        "yarn": YaRN(4.0, 63, fast=2.0, slow=0.1),
    }.items()}  # fmt: skip
    np.testing.assert_allclose(angle["linear"], [0.5, 0.05], rtol=1e-5)
    np.testing.assert_allclose(angle["ntk"], [1.0, 0.05], rtol=1e-5)
    np.testing.assert_allclose(angle["dynamic"], [1.0, 0.05], rtol=1e-5)
    np.testing.assert_allclose(angle["llama3"], [1.0, 0.025], rtol=1e-5)
    np.testing.assert_allclose(angle["between"], [1.0, 0.025 + 0.50268 * 0.075], rtol=1e-5)
    # ln(63 / 4 pi) * 4 / (2 ln 100) = 0.700 and ln(63 / 0.2 pi) * 4 / (2 ln 100) = 2.0013: the ramp is 0, 1/3, 2/3, 1.
    np.testing.assert_allclose(angle["yarn"], [1.0, 0.1 * (2 / 3) + 0.025 / 3], rtol=1e-5)


@pytest.mark.parametrize("rule", [Linear(1.0), NTK(1.0), DynamicNTK(16, 3.0), YaRN(1.0, 16), Llama3(1.0, 16)], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_scale_one_is_plain_rope(rule, interleaved):
    x = jax.random.normal(jax.random.key(0), (2, 4, 3, 8))
    lengths = jnp.full((2, 4), 16)
    scaled = RoPE(interleaved=interleaved, scaling=rule).rotate(x, POSITIONS, lengths)
    np.testing.assert_allclose(scaled, RoPE(interleaved=interleaved).rotate(x, POSITIONS), atol=1e-5)


def test_dynamic_factor_starts_at_one_and_grows():
    factors = dynamic_ntk_factor(jnp.array([[1, 10, 11, 20, 40]]), 2.0, 10)
    # 2 n / 10 - 1 beyond 10 tokens.
    np.testing.assert_allclose(factors, [[1.0, 1.0, 1.2, 3.0, 7.0]], rtol=1e-6)


def test_a_given_amplitude_replaces_the_published_one():
    turned = turns_of(RoPE(scaling=YaRN(4.0, 64, amplitude=1.25)), 8)
    np.testing.assert_allclose(np.abs(turned), 1.25, rtol=1e-6)


def test_sinusoidal_by_hand():
    out = np.asarray(sinusoidal(POSITIONS, 4))
    expected = [math.sin(5), math.cos(5), math.sin(5 / 100), math.cos(5 / 100)]
    np.testing.assert_allclose(out[0, 2], expected, atol=1e-6)
    assert sinusoidal(POSITIONS, 5).shape == (2, 4, 5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Linear(0.5), "Linear lengthens texts by a factor of at least 1, got 0.5"),
        (lambda: NTK(float("nan")), "NTK lengthens texts by a factor of at least 1, got nan"),
        (lambda: DynamicNTK(0), "original_length of DynamicNTK must be at least 1 token, got 0"),
        (lambda: YaRN(2.0, 64, fast=1.0, slow=1.0), "0 < slow < fast, got slow=1.0, fast=1.0"),
        (lambda: YaRN(2.0, 64, amplitude=0.0), "amplitude must be positive, got 0.0"),
        (lambda: Llama3(high=0.5), "0 < low < high, got low=1.0, high=0.5"),
        (lambda: RoPE(base=1.0), "base of RoPE must be above 1, got 1.0"),
        (lambda: RoPE().check(5), "heads of 5 cannot be paired; set an even head_dim"),
        (lambda: RoPE(scaling=NTK(2.0)).check(2), "heads of at least 4 dimensions, got 2"),
        (lambda: score(RoPE(scaling=DynamicNTK(4)), 1, 0), "dynamic NTK turns each key anew for each query"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
