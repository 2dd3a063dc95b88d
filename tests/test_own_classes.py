"""An experiment whose mixer its own file defines: trained, sampled and evaluated again."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_jax import config
from rlhf_jax.answering import answer
from rlhf_jax.errors import REFUSED, UserError
from rlhf_jax.experiment import evaluate, run

FILE = '''
import dataclasses

import tiny_experiment
from rlhf_jax.models import MLP, Attention, Block


class Twice(Attention):
    """Attention whose output counts double."""

    def _merge(self, mixed, d_model, shared):
        return 2.0 * super()._merge(mixed, d_model, shared)


def config():
    tiny = tiny_experiment.config()
    model = tiny.model.clone(pattern=(Block(Twice(heads=2), MLP(32)),))
    return dataclasses.replace(tiny, model=model)
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(FILE, encoding="utf-8")
    return config.load(path)


@pytest.fixture(scope="module")
def finished(file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "run"
    run(file.config(), folder, source=file.path)
    return folder


def test_every_stage_starts_from_a_model_with_the_users_own_mixer(finished):
    assert (finished / "summary.json").exists()


def test_the_file_has_to_be_named_again_to_read_the_run(file, finished):
    with pytest.raises(UserError, match="name that file again") as caught:
        answer(finished, ["a"])
    assert caught.value.exit_code == REFUSED
    known = config.names_in(file)
    assert set(known) == {"experiment:Twice", "experiment:config"}
    assert answer(finished, ["a"], known=known, max_new_tokens=3)
    assert evaluate(finished, known=known)
