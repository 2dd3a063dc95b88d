"""The checks themselves: their oracle against loops, that they notice what is broken, and what the command says."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from rlhf_jax import __main__ as program
from rlhf_jax.checks import attention, chunked, decoding, gated, matrix
from rlhf_jax.checks.gated_oracle import GatedProblem, solve_gated
from rlhf_jax.checks.layouts import Layout, layouts
from rlhf_jax.checks.measure import Measurement, distance, exact_bound, worst
from rlhf_jax.checks.mixers import MIXER_LAWS, Sample
from rlhf_jax.checks.oracle import Problem, rounded, solve
from rlhf_jax.checks.problems import Shape, Softmax
from rlhf_jax.checks.trial import bound, measure
from rlhf_jax.cli.check import refusals, tables
from rlhf_jax.models import Attention, RoPE
from rlhf_jax.ops import flash_reference, gau_reference
from rlhf_jax.ops.attention import IMPLEMENTATIONS, Terms, reference
from rlhf_jax.ops.attention.decode import DECODERS, Decoder
from rlhf_jax.ops.attention.dispatch import Implementation
from rlhf_jax.ops.flash import FLASH_IMPLEMENTATIONS, FlashImplementation
from rlhf_jax.ops.gau import GAU_IMPLEMENTATIONS, GauImplementation
from rlhf_jax.types import Context


def seen_by_loop(layout: Layout) -> np.ndarray:
    """Who sees whom, key by key."""
    own, keys, rule = layout.queries, layout.shown, layout.rule
    seen = np.zeros((*own.positions.shape, keys.positions.shape[1]), bool)
    for b, t, s in np.ndindex(seen.shape):
        at, key = int(own.positions[b, t]), int(keys.positions[b, s])
        if own.segments[b, t] == 0 or own.segments[b, t] != keys.segments[b, s]:
            continue
        near = layout.window is None or key > at - layout.window
        if rule.stride is not None:
            near = near and (at - key) % rule.stride == 0
        summary = rule.block is not None and key % rule.block in range(rule.block - rule.columns, rule.block)
        past = key <= at and (near or key < rule.sinks or summary)
        seen[b, t, s] = past or (at < layout.prefix and key < layout.prefix)
    return seen


@pytest.mark.parametrize("length", [1, 7, 23])
@pytest.mark.parametrize("kind", layouts(7))
def test_layouts_show_what_the_loop_shows(kind, length):
    layout = layouts(length)[kind]
    np.testing.assert_array_equal(layout.seen(), seen_by_loop(layout))


def test_layouts_are_what_they_are_called():
    found = layouts(23)
    assert any((found["packed"].queries.segments[0] == segment).sum() == 1 for segment in range(8))
    assert (found["ring"].shown.positions[0] != np.sort(found["ring"].shown.positions[0])).any()
    gaps = found["cache with gaps"].shown.segments[1].astype(bool)
    assert gaps[0] and not gaps.all() and np.abs(np.diff(gaps.astype(int))).sum() >= 3  # used, free, used, free
    assert (~found["empty rows"].seen().any(-1)).any(axis=1).tolist() == [True, True, True]
    assert (np.diff(found["prefix"].seen()[0].sum(axis=-1)) == 0).any()


def loop(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp, query by query."""
    out, lse = np.zeros((*p.q.shape[:3], p.v.shape[-1])), np.full(p.q.shape[:3], -1e30)
    for b, t, h in np.ndindex(*p.q.shape[:3]):
        weights, g = {}, h // (p.q.shape[2] // p.k.shape[2])
        for s in np.flatnonzero(p.seen[b, t]):
            logit = p.scale * sum(float(x * y) for x, y in zip(p.q[b, t, h], p.k[b, s, g], strict=True))
            logit = logit if p.softcap is None else p.softcap * math.tanh(logit / p.softcap)
            logit -= 0.0 if p.slopes is None else p.slopes[h] * p.distance[b, t, s]
            weights[s] = math.exp(logit)
        total = sum(weights.values()) + (0.0 if p.sink_logits is None else math.exp(p.sink_logits[h]))
        if total:
            lse[b, t, h] = math.log(total)
        for s, weight in weights.items():
            out[b, t, h] += weight / total * p.v[b, s, g]
    return out, lse


PROBLEMS = {
    "plain": {},
    "soft-cap": {"softcap": 1.3},
    "slopes": {"slopes": np.array([0.5, 0.25, 0.1, 0.05])},
    "sinks": {"sink_logits": np.array([-1.0, 0.0, 1.0, 3.0])},
}


def problem(**terms) -> Problem:
    """Two rows of queries and keys, one of the queries without keys."""
    generator = np.random.default_rng(0)
    q, k, v = (generator.normal(size=shape) for shape in ((2, 3, 4, 2), (2, 5, 2, 2), (2, 5, 2, 3)))
    seen = generator.random((2, 3, 5)) < 0.6
    seen[1, 1] = False
    return Problem(q, k, v, seen, generator.integers(0, 4, (2, 3, 5)).astype(float), 0.7, **terms)


@pytest.mark.parametrize("terms", PROBLEMS.values(), ids=PROBLEMS)
def test_the_oracle_equals_loops_and_finite_differences(terms):
    p, generator, step = problem(**terms), np.random.default_rng(1), 1e-6
    cotangents = generator.normal(size=(2, 3, 4, 3)), generator.normal(size=(2, 3, 4))
    solved, (out, lse) = solve(p, *cotangents), loop(p)
    np.testing.assert_allclose(solved["out"], out, atol=1e-12)
    np.testing.assert_allclose(solved["lse"], lse, atol=1e-12)

    def scalar(p: Problem) -> float:
        out, lse = loop(p)
        return float((out * cotangents[0]).sum() + (np.where(lse == -1e30, 0.0, lse) * cotangents[1]).sum())

    for field, name in {"q": "dq", "k": "dk", "v": "dv", "sink_logits": "dsinks"}.items():
        value = getattr(p, field)
        for place in [] if value is None else list(np.ndindex(value.shape))[::3]:
            moved = [value.copy() for _ in range(2)]
            moved[0][place] += step
            moved[1][place] -= step
            up, down = (scalar(dataclasses.replace(p, **{field: each})) for each in moved)
            assert solved[name][place] == pytest.approx((up - down) / (2 * step), abs=1e-7)


def test_a_plain_program_in_a_narrow_type_errs_as_that_type_does():
    p = problem()
    cotangents = np.ones((2, 3, 4, 3)), np.zeros((2, 3, 4))
    exact, plain = solve(p, *cotangents), solve(p, *cotangents, rounded("bfloat16"))
    for name in ("out", "dq", "dk", "dv"):
        assert 1e-4 < distance(plain[name], exact[name]) < 0.05


def gated_by_loop(p: GatedProblem) -> np.ndarray:
    """Gated attention and the linear part, pair by pair."""
    out = np.zeros((*p.q.shape[:2], p.v.shape[-1]))
    for b, t, s in np.ndindex(p.seen.shape):
        weight = 0.0
        if p.seen[b, t, s]:
            logit = p.scale * sum(float(x * y) for x, y in zip(p.q[b, t], p.k[b, s], strict=True))
            if p.bias is not None:
                logit += p.bias[max(0, min(int(p.back[b, t, s]), len(p.bias) - 1))]
            away = (logit - math.sqrt(0.5)) / math.sqrt(0.25 / math.pi)
            score = 0.5 * (1.0 + math.erf(away / math.sqrt(2.0))) if p.laplace else max(logit, 0.0) ** 2
            weight = score / p.normaliser[b, t]
        elif p.earlier is not None and p.earlier[b, t, s]:
            weight = sum(float(x * y) for x, y in zip(p.q_global[b, t], p.k_global[b, s], strict=True))
        out[b, t] += weight * p.v[b, s]
    return out


@pytest.mark.parametrize("laplace", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_the_gated_oracle_equals_loops_and_finite_differences(linear, laplace):
    generator, step = np.random.default_rng(0), 1e-6
    q, k, v, q_global, k_global = (
        generator.normal(size=(2, n, d)) for n, d in ((3, 2), (5, 2), (5, 3), (3, 2), (5, 2))
    )
    seen = generator.random((2, 3, 5)) < 0.6
    extra = {"q_global": q_global, "k_global": k_global, "earlier": ~seen} if linear else {}
    back, normaliser = generator.integers(-1, 6, (2, 3, 5)).astype(float), 1.0 + generator.random((2, 3))
    p = GatedProblem(q, k, v, seen, back, normaliser, 0.7, laplace, generator.normal(size=4), **extra)
    cotangent = generator.normal(size=(2, 3, 3))
    solved = solve_gated(p, cotangent)
    np.testing.assert_allclose(solved["out"], gated_by_loop(p), atol=1e-12)
    for name in ("q", "k", "v", "bias", *(("q_global", "k_global") if linear else ())):
        value = getattr(p, name)
        for place in list(np.ndindex(value.shape))[::3]:
            moved = [value.copy() for _ in range(2)]
            moved[0][place] += step
            moved[1][place] -= step
            up, down = (float((gated_by_loop(dataclasses.replace(p, **{name: x})) * cotangent).sum()) for x in moved)
            assert solved[f"d{name}"][place] == pytest.approx((up - down) / (2 * step), abs=1e-6)


def test_a_measurement_passes_within_its_bound_alone():
    def one(error, bound):
        return Measurement("values", "case", error, bound)

    assert one(1.0, 1.0).verdict == one(0.0, 0.0).verdict == "passed"
    assert Measurement("values", "", refusal="no").verdict == "refused"
    for error, limit in ((1.1, 1.0), (1e-9, 0.0), (math.nan, 1.0), (math.inf, 1.0)):
        assert one(error, limit).verdict == "failed" and one(error, limit).share > 1.0
    assert worst([one(0.5, 1.0), one(math.nan, 1.0), one(0.9, 1.0)]).share == math.inf
    assert math.isnan(distance([1.0, math.nan], [1.0, 2.0])) and distance([1.0], [1.0, 2.0]) == math.inf
    assert exact_bound([0.1]) == 5e-6 and exact_bound([-4.0]) == 2e-5


def softmax(**fields) -> Softmax:
    return Softmax(IMPLEMENTATIONS["reference"], Shape(), quick, **fields)


def test_numbers_are_the_same_at_every_call_and_bounds_grow_with_coarseness():
    layout, found = layouts(23)["packed"], softmax()
    one, other = found.draw(layout), found.draw(layout)
    assert all((one[name] == other[name]).all() for name in one)
    assert not one["lse"].any() and softmax(lse=True).draw(layout)["lse"].any()
    exact = found.expect(one, layout)["out"]
    bounds = [
        bound(exact, found.expect(one, layout, dtype)["out"], dtype) for dtype in ("float32", "float16", "bfloat16")
    ]
    assert bounds[0] < bounds[1] < bounds[2] < 0.1


def quick(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def wrong(change):
    """The reference with its arguments or results changed."""

    def attend(q, k, v, mask, terms):
        return change(q, k, v, mask, terms)

    return Implementation(reference.refusal, attend)


def _window_too_wide(q, k, v, mask, terms):
    wide = mask.start - 1 if mask.window is not None else mask.start
    return reference.attend(q, k, v, mask.replace(start=wide), terms)


def _no_segments(q, k, v, mask, terms):
    one = mask.replace(
        query_segments=jnp.minimum(mask.query_segments, 1), key_segments=jnp.minimum(mask.key_segments, 1)
    )
    return reference.attend(q, k, v, one, terms)


def _open_tail(q, k, v, mask, terms):
    tail = jnp.where(mask.start.shape[1] - jnp.arange(mask.start.shape[1]) <= 16, 1, 0)
    return reference.attend(q, k, v, mask.replace(end=mask.end + tail), terms)


@jax.custom_vjp
def _first_head_alone(x):
    return jnp.repeat(x, 2, axis=2)


_first_head_alone.defvjp(lambda x: (_first_head_alone(x), None), lambda _, g: (g[:, :, ::2],))


def _no_group_sum(q, k, v, mask, terms):
    if q.shape[2] == 2 * k.shape[2]:
        k, v = _first_head_alone(k), _first_head_alone(v)
    return reference.attend(q, k, v, mask, terms)


def _narrow(q, k, v, mask, terms):
    out, lse = reference.attend(q, k, v, mask, terms)
    return out.astype(jnp.bfloat16).astype(out.dtype), lse


def _no_sink(q, k, v, mask, terms):
    return reference.attend(q, k, v, mask, Terms(terms.scale, terms.softcap, terms.slopes))


def _no_cap_gradient(q, k, v, mask, terms):
    straight = reference.attend(q, k, v, mask, Terms(terms.scale, None, terms.slopes, terms.sink_logits))
    capped = reference.attend(q, k, v, mask, terms)
    return jax.tree.map(lambda a, b: a + jax.lax.stop_gradient(b - a), straight, capped)


def _no_lse_gradient(q, k, v, mask, terms):
    out, lse = reference.attend(q, k, v, mask, terms)
    return out, jax.lax.stop_gradient(lse)


def _slots_for_positions(q, k, v, mask, terms):
    slots = jnp.broadcast_to(jnp.arange(k.shape[1]), mask.key_positions.shape)
    return reference.attend(q, k, v, mask.replace(key_positions=slots), terms)


WRONG = {
    "window one too wide": (_window_too_wide, "window"),
    "segments ignored": (_no_segments, "packed"),
    "future seen in the last tile": (_open_tail, "causality"),
    "gradients of one query head of a group": (_no_group_sum, "causal"),
    "fp32 computed in bfloat16": (_narrow, "causal"),
    "sink logits dropped": (_no_sink, "sink logits"),
    "soft-cap without its gradient": (_no_cap_gradient, "soft-cap"),
    "no gradient through the log-sum-exp": (_no_lse_gradient, "log-sum-exp"),
    "slots taken for positions": (_slots_for_positions, "ring"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_laws_notice_what_is_wrong(name):
    attend, law = WRONG[name]
    found = measure(attention.LAWS[law], wrong(attend), "float32", quick)
    assert any(each.verdict == "failed" for each in found)


def _one_slot_too_many(q, keys, values, mask, terms):
    wide = mask.replace(start=jnp.maximum(mask.start - 1, 0), end=mask.end + 1, window=None)
    return DECODERS["reference"].attend(q, keys, values, wide, terms)


def _finished_rows_read(q, keys, values, mask, terms):
    return DECODERS["reference"].attend(q, keys, values, mask.replace(query_segments=mask.query_segments + 1), terms)


def _own_token_hidden(q, k, v, mask, normaliser, bias, **settings):
    return gau_reference.attend(q, k, v, mask.replace(end=mask.end - 1), normaliser, bias, **settings)


def _divided_by_one_more(q, k, v, mask, normaliser, bias, **settings):
    return gau_reference.attend(q, k, v, mask, normaliser + 1.0, bias, **settings)


def _bias_by_slot(q, k, v, mask, normaliser, bias, **settings):
    slots = mask.replace(key_positions=jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2]))
    return gau_reference.attend(q, k, v, slots if bias is not None else mask, normaliser, bias, **settings)


@pytest.mark.parametrize(
    ("attend", "law"), [(_one_slot_too_many, "packed window"), (_finished_rows_read, "empty rows")]
)  # fmt: skip
def test_the_laws_notice_a_wrong_decoder(attend, law):
    found = measure(decoding.LAWS[law], Decoder(lambda case: None, attend), "float32", quick)
    assert any(each.verdict == "failed" for each in found)


@pytest.mark.parametrize(
    ("attend", "law"), [(_own_token_hidden, "causal"), (_divided_by_one_more, "Laplace"), (_bias_by_slot, "bias")]
)  # fmt: skip
def test_the_laws_notice_wrong_gated_attention(attend, law):
    found = measure(gated.LAWS[law], GauImplementation(lambda case: None, attend), "float32", quick)
    assert any(each.verdict == "failed" for each in found)


def _stale_state(*arguments, **settings):
    """Leaves the state as it came."""
    *tokens, state = arguments
    return flash_reference.chunks(*tokens, state, **settings)[0], state


def _one_document(*arguments, **settings):
    *tokens, context, divisor, bias = arguments
    merged = Context(context.positions, jnp.minimum(context.segments, 1), packed=True)
    return flash_reference.attend(*tokens, merged, divisor, bias, **settings)


@pytest.mark.parametrize("law", ["state", "packed"])
def test_the_laws_notice_wrong_flash(law, monkeypatch):
    broken = FlashImplementation(lambda case: None, _stale_state, _one_document)
    monkeypatch.setitem(FLASH_IMPLEMENTATIONS, "reference", broken)
    assert any(each.verdict == "failed" for each in measure(chunked.LAWS[law], "reference", "float32", quick))


class Forgetful(Attention):
    """Loses what it was told before the last call."""

    def _remember(self, k, v, shared, cache):
        return super()._remember(k, v, shared, jax.tree.map(jnp.zeros_like, cache))


class Unsorted(Attention):
    """Lets documents of a row see each other."""

    def _attend(self, q, k, v, queries, keys, drop, terms, decoding):
        queries, keys = (dataclasses.replace(each, segments=jnp.minimum(each.segments, 1)) for each in (queries, keys))
        return super()._attend(q, k, v, queries, keys, drop, terms, decoding)


class Curious(Attention):
    """Looks one token ahead."""

    def _attend(self, q, k, v, queries, keys, drop, terms, decoding):
        ahead = Context(queries.positions + 1, queries.segments)
        return super()._attend(q, k, v, ahead, keys, drop, terms, decoding)


@pytest.mark.parametrize(
    ("kind", "law"), [(Forgetful, "prefill = decode"), (Forgetful, "ragged prompts"), (Unsorted, "packing"),
                      (Curious, "causality")]
)  # fmt: skip
def test_the_laws_notice_a_wrong_mixer(kind, law):
    found = measure(MIXER_LAWS[law], Sample((kind(2),), RoPE()), "float32", quick)
    assert any(each.verdict == "failed" for each in found)


@pytest.fixture
def few(monkeypatch):
    """A matrix of a few entries."""
    chosen = [("implementation", "reference", law, "float32") for law in ("causal", "ring")]
    chosen.append(("mixer", "grouped heads", "causality", "float32"))
    monkeypatch.setattr(matrix, "jobs", lambda dtypes: iter(chosen))
    return chosen


def test_the_command_prints_the_matrix_and_writes_it(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "found.json"
    assert program.main(["check", "attention", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    for word in ("causal", "ring", "float32", "reference", "grouped heads", "same bits", "≤", "0 failed"):
        assert word in out
    found = json.loads(file.read_text())
    assert found["passed"] == len(found["entries"]) == len(few) and found["platform"] == "cpu"
    first = next(entry for entry in found["entries"] if entry["subject"] == "reference")
    assert {each["what"] for each in first["found"]} == {"values", "gradients"}
    assert all(0 <= each["error"] <= each["bound"] for each in first["found"])


def test_the_command_fails_where_a_law_is_broken_or_a_program_dies(few, tmp_path, capsys, monkeypatch):
    def dies(q, k, v, mask, terms):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setitem(IMPLEMENTATIONS, "reference", wrong(_slots_for_positions))
    assert program.main(["check", "attention"]) == 1
    said = capsys.readouterr()
    assert "FAILED reference, ring, values" in said.out and "1 of" in said.err and "failed" in said.err
    monkeypatch.setitem(IMPLEMENTATIONS, "reference", wrong(dies))
    assert program.main(["check", "attention", "--json", str(tmp_path / "x.json")]) == 1
    assert "RuntimeError: no such" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["failed"] == 2


def test_what_was_refused_has_its_reason_and_has_not_passed(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "reference", Implementation(lambda case: "it is Sunday", reference.attend))
    assert program.main(["check", "attention", "--json", str(tmp_path / "x.json")]) == 0
    out = capsys.readouterr().out
    assert "reference refused everything: it is Sunday" in out and "1 entries passed, 0 failed, 2 refused" in out
    verdicts = [entry["verdict"] for entry in json.loads((tmp_path / "x.json").read_text())["entries"]]
    assert verdicts == ["refused", "refused", "passed"]


def test_refusals_name_what_they_cover():
    def entry(law, dtype, *found):
        return matrix.Entry("GAU", "tpu", law, dtype, found)

    measured, refused = Measurement("values", "", 0.0, 0.0), Measurement("values", "", refusal="too small")
    entries = [entry("a", "float32", refused), entry("b", "float32", refused),
               entry("a", "bfloat16", measured, refused), entry("b", "bfloat16", measured)]  # fmt: skip
    (said,) = refusals(entries)
    assert str(said) == "tpu refused everything in float32, a: too small"
    (page,) = tables(entries, "", 80)
    assert [str(column.header) for column in page.columns] == ["", "tpu\nbfloat16"]
    assert [str(text) for text in page.columns[1].cells] == ["same bits *", "same bits"]


@pytest.mark.parametrize(("width", "pages"), [(160, 1), (60, 2), (20, 4)])
def test_tables_fit_the_screen(width, pages):
    names = ("one", "two", "three", "four")
    entries = [matrix.Entry("GAU", name, "law", "float32", (Measurement("values", "", 1e-3, 2e-3),)) for name in names]
    made = list(tables(entries, "", width))
    assert len(made) == pages and sum(len(page.columns) - 1 for page in made) == 4
    console = Console(width=max(width, 30))
    for page in made:
        assert page.__rich_measure__(console, console.options).minimum <= max(width, 30)


def test_the_whole_matrix_holds_every_law_of_every_subject():
    jobs = list(matrix.jobs())
    assert len(set(jobs)) == len(jobs)
    known = {"implementation": (IMPLEMENTATIONS, attention), "decoder": (DECODERS, decoding),
             "GAU": (GAU_IMPLEMENTATIONS, gated), "FLASH": (FLASH_IMPLEMENTATIONS, chunked)}  # fmt: skip
    for kind, (subjects, laws) in known.items():
        found = {(name, law) for each, name, law, dtype in jobs if each == kind and dtype == "float32"}
        assert found == {(name, law) for name in subjects for law in laws.LAWS}
        assert set(matrix.KINDS[kind].bfloat16) | set(matrix.KINDS[kind].float16) <= set(laws.LAWS)
    assert {dtype for *_, dtype in jobs} == {"float32", "bfloat16", "float16"}
