"""Listed responses against a plain loop, and the KL of draws against the exact one."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rlhf_jax.evaluation.outcomes import every_response, kl_of_draws
from rlhf_jax.models import MLP, Attention, Block, Transformer, init_params
from rlhf_jax.types import Context

EOS, PROMPT, TEMPERATURE = 3, (0, 2), 0.7


def test_probabilities_are_those_of_a_plain_loop():
    model = Transformer(
        vocab_size=4, d_model=8, pattern=(Block(Attention(heads=2), MLP(16)),), max_length=4, init_std=1
    )
    params = init_params(model, jax.random.key(1))
    found = every_response(model, params, PROMPT, 2, EOS, TEMPERATURE)
    rows = np.array([(*PROMPT, first) for first in range(4)])
    context = Context.of_lengths(np.full(4, 3), 3)
    logits = np.asarray(jax.jit(lambda params: model.apply({"params": params}, rows, context)[0])(params), np.float64)
    chosen = np.exp(logits[:, 1:] / TEMPERATURE)
    chosen /= chosen.sum(axis=-1, keepdims=True)
    want: dict[tuple[int, ...], float] = {(EOS,): chosen[0, 0, EOS]}
    for first in range(3):
        want |= {(first, second): chosen[0, 0, first] * chosen[first, 1, second] for second in range(4)}
    assert set(found.tokens) == set(want) and len(found.tokens) == 13 and found.probs.max() > 0.3
    np.testing.assert_allclose(found.probs, [want[tokens] for tokens in found.tokens], atol=1e-6)
    texts = found.by_text(lambda tokens: "".join("ab c"[token] for token in tokens if token < 2))
    assert texts["a"] == pytest.approx(sum(want[tokens] for tokens in [(0, 2), (2, 0), (0, EOS)]), abs=1e-6)
    assert sum(texts.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="expected at most"):
        every_response(model, params, PROMPT, 12, None)


def test_kl_of_draws_is_nearly_unbiased():
    """60 outcomes, 150 draws, 2,000 times; frequencies in the place of probabilities are off by 0.19."""
    rng = np.random.default_rng(0)
    base, other = rng.dirichlet(np.ones(60), size=2)
    exact = float(np.sum(other * np.log(other / base)))
    counts = rng.multinomial(150, other, size=2000)
    assert np.mean([kl_of_draws(row, base) for row in counts]) == pytest.approx(exact, abs=0.02)
    shares = counts / 150
    plain = np.sum(shares * np.log(np.where(shares > 0, shares, 1) / base), axis=1).mean()
    assert plain - exact > 0.1


def test_kl_of_two_draws_by_hand():
    """G(2) = psi(2) + (psi(3/2) - psi(1)) / 2 = 1 - gamma + 1 - log 2, so twice the one outcome is 0.0365 and not 0."""
    assert kl_of_draws(np.array([2]), np.array([1.0])) == pytest.approx(2 - np.euler_gamma - 2 * np.log(2))


@pytest.mark.parametrize(("counts", "probs"), [([1, 2], [1.0]), ([0], [1.0]), ([1, 1], [1.0, 0.0])])
def test_wrong_counts_are_refused(counts, probs):
    with pytest.raises(ValueError, match="expected"):
        kl_of_draws(np.array(counts), np.array(probs))
