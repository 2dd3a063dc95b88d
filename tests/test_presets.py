"""Published architectures: their parameters are counted, never allocated."""

from __future__ import annotations

import pytest

from rlhf_jax.models import count_params, presets

EXACT = {
    presets.gpt1: 116_534_784,
    presets.gpt2: 124_439_808,
    presets.gpt2_medium: 354_823_168,
    presets.gpt2_large: 774_030_080,
    presets.gpt2_xl: 1_557_611_200,
}
MILLIONS = {
    presets.gpt3_small: 125.2,
    presets.gpt3_medium: 355.9,
    presets.gpt3_large: 760.3,
    presets.gpt3_xl: 1_315.7,
    presets.gpt3_2_7b: 2_651.6,
    presets.gpt3_6_7b: 6_658,
    presets.gpt3_13b: 12_853,
    presets.gpt3_175b: 174_600,
}


@pytest.mark.parametrize(("preset", "expected"), EXACT.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_counts_of_released_models(preset, expected):
    assert count_params(preset()) == expected


@pytest.mark.parametrize(("preset", "expected"), MILLIONS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_counts_of_gpt3(preset, expected):
    assert count_params(preset()) / 1e6 == pytest.approx(expected, rel=4e-4)


def test_gpt3_alternates_dense_and_banded_layers():
    model = presets.gpt3_175b()
    assert [block.mixer.window for block in model.pattern] == [None, 256]
    assert model.layers == 96 and model.pattern[1].mixer.width(model.d_model) == 128
    dense = presets.gpt3_175b(banded=False)
    assert [block.mixer.window for block in dense.pattern] == [None] and dense.layers == 96
    assert dense.max_length == model.max_length == 2048 and count_params(dense) == count_params(model)


def test_published_initialisation():
    assert presets.gpt1().style.residual_std == presets.gpt1().position.std == 0.02
    assert presets.gpt2().style.residual_std == pytest.approx(0.02 / 24**0.5)
    assert presets.gpt3_xl().style.residual_std == pytest.approx(0.02 / 48**0.5)
    assert presets.gpt2().position.std == 0.01
