"""The laws of attention over every implementation and decoder that serves here, and over every mixer."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from rlhf_jax.checks import chunked, decoding, gated
from rlhf_jax.checks.attention import LAWS
from rlhf_jax.checks.layouts import Layout, documents
from rlhf_jax.checks.mixers import MIXER_LAWS
from rlhf_jax.checks.problems import Shape, Softmax
from rlhf_jax.checks.samples import SAMPLES
from rlhf_jax.checks.trial import Refused, measure
from rlhf_jax.models import mixers
from rlhf_jax.ops.attention import IMPLEMENTATIONS
from rlhf_jax.ops.attention.decode import DECODERS
from rlhf_jax.ops.gau import GAU_IMPLEMENTATIONS


def quick(function):
    """Compile with little optimisation: these programs run a few times, on a few numbers."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def refusal(name: str) -> str | None:
    """Why an implementation does not even serve a plain case on this device."""
    layout, plain = Layout(documents(7)), Softmax(IMPLEMENTATIONS[name], Shape(dtype="bfloat16"), quick)
    try:
        plain.ask(plain.draw(layout), layout)
    except Refused as refused:
        return str(refused)
    return None


REFUSALS = {name: refusal(name) for name in IMPLEMENTATIONS}
SERVING = [name for name, reason in REFUSALS.items() if reason is None]
ELSEWHERE = [name for name, reason in REFUSALS.items() if reason is not None]
TESTED_ELSEWHERE = {"window", "packed", "odd lengths", "head widths", "long rows"}
"""Laws whose programs take long to compile, and whose cases the implementations' own tests hold as well."""

NARROW = ("packed window", "sink logits", "log-sum-exp")


def check(found):
    """Every measurement keeps its bound; skips where all were refused."""
    assert found
    if all(each.refusal is not None for each in found):
        pytest.skip(found[0].refusal)
    assert [each for each in found if each.verdict == "failed"] == []


@pytest.mark.parametrize("law", [law for law in LAWS if law not in TESTED_ELSEWHERE])
@pytest.mark.parametrize("name", SERVING)
def test_implementations_keep_the_law(name, law):
    check(measure(LAWS[law], IMPLEMENTATIONS[name], "float32", quick))


@pytest.mark.parametrize("law", NARROW)
@pytest.mark.parametrize("name", [name for name in SERVING if name != "reference"])
def test_implementations_keep_the_law_in_bfloat16(name, law):
    check(measure(LAWS[law], IMPLEMENTATIONS[name], "bfloat16", quick))


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_does_not_run_here_says_why(name):
    reason = REFUSALS[name]
    assert reason is not None and len(reason.split()) > 2
    found = measure(LAWS["causal"], IMPLEMENTATIONS[name], "bfloat16", quick)
    assert [each.refusal for each in found] == [reason] and found[0].error is None


@pytest.mark.parametrize("law", ["packed window", "empty rows", "filled slots", "head grouping", "padding content"])
def test_decoding_keeps_the_law(law):
    check(measure(decoding.LAWS[law], DECODERS["reference"], "float32", quick))


@pytest.mark.parametrize("law", ["packed window", "cache with gaps", "bias", "packing", "causality"])
@pytest.mark.parametrize("name", ["reference", "blocked"])
def test_gated_attention_keeps_the_law(name, law):
    check(measure(gated.LAWS[law], GAU_IMPLEMENTATIONS[name], "float32", quick))


@pytest.mark.parametrize("law", ["packed", "state", "bias", "causality", "padding content"])
@pytest.mark.parametrize("name", ["reference", "blocked"])
def test_flash_keeps_the_law(name, law):
    check(measure(chunked.LAWS[law], name, "float32", quick))


@pytest.mark.parametrize("law", MIXER_LAWS)
@pytest.mark.parametrize("name", SAMPLES)
def test_mixers_keep_the_law(name, law):
    check(measure(MIXER_LAWS[law], SAMPLES[name], "float32", quick))


@pytest.mark.parametrize(("name", "law"), [("window and sinks", "prefill = decode"), ("GAU", "packing")])
def test_mixers_keep_the_law_by_tiles(name, law):
    (mixer,) = SAMPLES[name].mixers
    tiled = dataclasses.replace(SAMPLES[name], mixers=(mixer.clone(implementation="blocked"),))
    check(measure(MIXER_LAWS[law], tiled, "float32", quick))


def test_every_kind_of_mixer_has_a_sample():
    kinds = {kind for kind in vars(mixers).values() if isinstance(kind, type) and hasattr(kind, "empty_cache")}
    assert kinds == {type(mixer) for sample in SAMPLES.values() for mixer in sample.mixers}
