"""What a stage says about the implementations of its layers."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_experiment import config

from rlhf_jax.models import Attention, Block, Transformer, plan
from rlhf_jax.ops.attention.terms import this_device
from rlhf_jax.overview import show
from rlhf_jax.stages.plans import stage_plan
from rlhf_jax.stages.ppo import Reinforce


def test_every_stage_names_what_its_layers_get():
    experiment = config()
    for stage in experiment.stages:
        uses = ["training", "prefill", "decode"] if isinstance(stage, Reinforce) else ["training"]
        plans = stage_plan(stage, experiment.model)
        assert list(plans) == [f"{at} Attention" for at in range(len(experiment.model.pattern))]
        assert all(list(found) == uses for found in plans.values())


def test_this_device_is_the_default():
    model = Transformer(8, 8, (Block(Attention(2)),))
    assert plan(model, 2, 512) == plan(model, 2, 512, device=this_device())


def test_a_layer_that_cannot_be_served_says_why():
    model = Transformer(8, 8, (Block(Attention(2, dropout=0.1, implementation="blocked")),))
    with pytest.raises(ValueError, match="'blocked' cannot serve: only 'reference' applies dropout"):
        plan(model, 2, 512)


def test_the_overview_shows_it(capsys):
    experiment = config()
    show(dataclasses.replace(experiment, evaluation=None))
    assert f"{experiment.stages[0].name}, layer 0 Attention of the pattern: training" in capsys.readouterr().out
