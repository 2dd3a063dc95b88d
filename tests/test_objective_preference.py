"""Objectives from preferences: against plain Python on the tokens' own probabilities, and their laws."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.chat import PLAIN
from rlhf_jax.data.preferences import labelled_rows, preference_rows
from rlhf_jax.data.tables import ranking_table
from rlhf_jax.data.tokenizers import CharTokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import Attention, Block, SwiGLU, Transformer, init_params
from rlhf_jax.objectives.preference import Preference, read_responses
from rlhf_jax.objectives.rules import CPO, DPO, IPO, KTO, ORPO, Hinge, PlackettLuce, RobustDPO, SimPO
from rlhf_jax.objectives.unpaired import Unpaired
from rlhf_jax.types import Context, LabelledBatch, PreferenceBatch

MODEL = Transformer(
    vocab_size=17, d_model=16, pattern=(Block(Attention(heads=2), SwiGLU(24)),), max_length=32, init_std=0.3
)
PARAMS, REFERENCE = (init_params(MODEL, jax.random.key(seed)) for seed in (0, 1))
RANKS = jnp.asarray([[1, 0, 2, 2], [0, 1, -1, -1], [1, 1, -1, -1]])  # 5 pairs, 1 pair, none
LENGTHS = jnp.asarray([[5, 8, 3, 6], [4, 7, 0, 0], [7, 3, 0, 0]])
PROMPTS = jnp.asarray([2, 3, 1])
TOKENS = jax.random.randint(jax.random.key(1), (3, 4, 8), 1, 17) * (jnp.arange(8) < LENGTHS[..., None])
BATCH = PreferenceBatch(TOKENS, LENGTHS, PROMPTS, RANKS, jnp.zeros((3, 4)))
GOOD = jnp.asarray([True, False, True])
LABELLED = LabelledBatch(TOKENS[:, :2], LENGTHS[:, :2], PROMPTS, GOOD, jnp.zeros((3, 2)))

RULES = [
    DPO(),
    DPO(5.0, average=True),
    DPO(0.2, label_smoothing=0.1),
    RobustDPO(),
    Hinge(),
    IPO(),
    IPO(average=True),
    SimPO(),
    CPO(),
    ORPO(),
    PlackettLuce(0.3),
]
KTOS = [KTO(baseline=baseline, desirable_weight=1.3) for baseline in ("mismatched", "batch", "none")]
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)
every_kto = pytest.mark.parametrize("rule", KTOS, ids=lambda rule: rule.baseline)


@jax.jit
def log_softmax(params, tokens, lengths):
    logits, _, _ = MODEL.apply({"params": params}, tokens, Context.of_lengths(lengths, tokens.shape[1]))
    return jax.nn.log_softmax(logits)


def logprob(params, tokens, prompt: int, length: int) -> float:
    """Of one response, alone in its row, its tokens one by one."""
    table = np.asarray(log_softmax(params, tokens[None], jnp.asarray([length]))[0], float)
    return sum(table[t - 1, int(tokens[t])] for t in range(prompt, length))


@pytest.fixture(scope="module")
def alone():
    """(log p, log q, tokens) of every response that is there, by (row, k)."""
    return {
        (b, k): (
            logprob(PARAMS, TOKENS[b, k], int(PROMPTS[b]), int(LENGTHS[b, k])),
            logprob(REFERENCE, TOKENS[b, k], int(PROMPTS[b]), int(LENGTHS[b, k])),
            int(LENGTHS[b, k] - PROMPTS[b]),
        )
        for b in range(3)
        for k in range(4)
        if LENGTHS[b, k] > 0
    }


@pytest.fixture(scope="module")
def referenced():
    return jax.jit(Preference(MODEL).prepare)(REFERENCE, BATCH)


def value_and_grad(objective, batch, params=PARAMS):
    return jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(params, batch, None)


def soft(x: float) -> float:
    """-log sigmoid(x)"""
    return math.log1p(math.exp(-x))


def loss_of_pair(rule, better, worse) -> float:
    """The paper's formula of one pair of (log p, log q, tokens)."""
    (p1, q1, n1), (p2, q2, n2) = better, worse
    h = (p1 - q1) - (p2 - q2)
    match rule:
        case DPO(average=True):
            return soft(rule.beta * ((p1 - q1) / n1 - (p2 - q2) / n2))
        case DPO():
            e = rule.label_smoothing
            return (1 - e) * soft(rule.beta * h) + e * soft(-rule.beta * h)
        case RobustDPO(beta, e):
            return ((1 - e) * soft(beta * h) - e * soft(-beta * h)) / (1 - 2 * e)
        case Hinge(beta):
            return max(0.0, 1 - beta * h)
        case IPO(beta, average):
            h = (p1 - q1) / n1 - (p2 - q2) / n2 if average else h
            return (h - 1 / (2 * beta)) ** 2
        case SimPO(beta, gamma):
            return soft(beta * (p1 / n1 - p2 / n2) - gamma)
        case CPO(beta):
            return soft(beta * (p1 - p2))
        case ORPO(coef):
            odds = [math.exp(p / n) / (1 - math.exp(p / n)) for p, n in ((p1, n1), (p2, n2))]
            return coef * soft(math.log(odds[0] / odds[1]))
    raise AssertionError(rule)


def loss_of_prompt(rule, row: int, alone) -> float | None:
    """Mean over the prompt's pairs, or the likelihood of its ranking; None where all are tied."""
    there = [k for k in range(4) if (row, k) in alone]
    ranks = np.asarray(RANKS[row])
    if isinstance(rule, PlackettLuce):
        s = {k: rule.beta * (alone[row, k][0] - alone[row, k][1]) for k in there}
        behind = {k: [j for j in there if ranks[j] > ranks[k]] for k in there}
        if not any(behind.values()):
            return None
        return sum(math.log(math.exp(s[k]) + sum(math.exp(s[j]) for j in behind[k])) - s[k] for k in there)
    found = [loss_of_pair(rule, alone[row, i], alone[row, j]) for i in there for j in there if ranks[i] < ranks[j]]
    return float(np.mean(found)) if found else None


@pytest.fixture(scope="module")
def responses(referenced):
    return jax.jit(lambda params, batch: read_responses(MODEL, params, batch, None, None)[0])(PARAMS, referenced)


@every_rule
def test_loss_equals_the_formula_over_the_tokens(rule, alone, referenced, responses):
    objective = Preference(MODEL, rule)
    loss, metrics = objective.loss_of_responses(responses, objective.with_weights(referenced))
    expected = np.mean([x for row in range(3) if (x := loss_of_prompt(rule, row, alone)) is not None])
    np.testing.assert_allclose(metrics["preference/loss"], expected, rtol=2e-4)
    # The best responses: (0, 1) of 6 tokens and (1, 0) of 1.
    sft = -(alone[0, 1][0] + alone[1, 0][0]) / 7
    np.testing.assert_allclose(metrics["preference/sft_loss"], sft, rtol=1e-5)
    np.testing.assert_allclose(loss, expected + rule.sft_coef * sft, rtol=2e-4)
    assert metrics["preference/pairs"] == 6


def test_pairs_alike_and_prompts_alike_in_the_likelihood(alone, referenced, responses):
    objective = Preference(MODEL, normalise="pair", sft_coef=0.5, sft_mean="sequence", name="x")
    loss, metrics = objective.loss_of_responses(responses, objective.with_weights(referenced))
    five, one = loss_of_prompt(DPO(), 0, alone), loss_of_prompt(DPO(), 1, alone)
    assert five is not None and one is not None
    expected, sft = (5 * five + one) / 6, -(alone[0, 1][0] / 6 + alone[1, 0][0] / 1) / 2
    np.testing.assert_allclose([loss, metrics["x/loss"]], [expected + 0.5 * sft, expected], rtol=1e-4)


def test_metrics_are_means_over_pairs(alone, referenced, responses):
    objective = Preference(MODEL, DPO(0.2), normalise="pair")
    _, metrics = objective.loss_of_responses(responses, objective.with_weights(referenced))
    pairs = [((0, 1), (0, 0)), ((0, 1), (0, 2)), ((0, 1), (0, 3)), ((0, 0), (0, 2)), ((0, 0), (0, 3)), ((1, 0), (1, 1))]
    reward = {key: 0.2 * (p - q) for key, (p, q, _) in alone.items()}
    better, worse = [np.mean([reward[pair[side]] for pair in pairs]) for side in (0, 1)]
    right = np.mean([reward[i] > reward[j] for i, j in pairs])
    expected = {
        "chosen_reward": better, "rejected_reward": worse, "margin": better - worse, "accuracy": right,
        "chosen_logprob": np.mean([alone[i][0] for i, _ in pairs]),
        "rejected_logprob": np.mean([alone[j][0] for _, j in pairs]),
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[f"preference/{name}"], value, rtol=1e-4, err_msg=name)
    found = jax.jit(objective.rewards)(PARAMS, referenced)
    np.testing.assert_allclose(found[1, 1], reward[1, 1], rtol=1e-4)


def test_policy_that_is_the_reference_has_the_loss_of_a_coin(responses):
    same = responses.replace(ref_logprobs=responses.logprobs)
    loss, metrics = Preference(MODEL).loss_of_responses(same, Preference(MODEL).with_weights(BATCH))
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-5)
    assert abs(metrics["preference/margin"]) < 1e-5


def shuffled_and_padded(batch):
    """The same responses in another order, in wider rows whose padding is no zeros, with an absent one more."""
    order = jnp.asarray([2, 0, 3, 1])
    tokens = jnp.where(jnp.arange(8) < batch.lengths[..., None], batch.tokens, 7)
    tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, 3)), constant_values=5)[:, order]
    more = ((0, 0), (0, 1))
    return PreferenceBatch(
        jnp.pad(tokens, (*more, (0, 0)), constant_values=3), jnp.pad(batch.lengths[:, order], more),
        batch.prompt_lengths, jnp.pad(batch.ranks[:, order], more, constant_values=-1),
        jnp.pad(batch.ref_logprobs[:, order], more, constant_values=9.0),
    )  # fmt: skip


def assert_close(a, b, atol=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.all(jnp.isfinite(x))
        np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4)


@pytest.fixture(scope="module")
def whole(referenced):
    """The objective of the laws, its weighted batch, its compiled gradient, and what that gives."""
    objective = Preference(MODEL, sft_coef=0.3)
    weighted, compiled = objective.with_weights(referenced), jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    return objective, weighted, compiled, compiled(PARAMS, weighted, None)


def test_loss_reads_the_model_as_its_parts_do(whole, responses):
    objective, weighted, _, ((loss, metrics), _) = whole
    assert_close((loss, metrics), objective.loss_of_responses(responses, weighted))


def test_padding_order_and_absent_responses_change_nothing(whole, referenced):
    objective, _, compiled, found = whole
    assert_close(found, compiled(PARAMS, objective.with_weights(shuffled_and_padded(referenced)), None))


@every_rule
def test_what_is_said_of_absent_responses_changes_nothing(rule, referenced, responses):
    objective = Preference(MODEL, rule, sft_coef=0.3)
    weighted = objective.with_weights(referenced)
    odd = jnp.where(RANKS < 0, jnp.nan, responses.logprobs)

    def loss(logprobs):
        return objective.loss_of_responses(responses.replace(logprobs=logprobs), weighted)[0]

    assert_close(jax.value_and_grad(loss)(responses.logprobs), jax.value_and_grad(loss)(odd))


def test_microbatches_add_up(whole):
    _, weighted, compiled, found = whole
    parts = [compiled(PARAMS, jax.tree.map(lambda x, b=b: x[b : b + 1], weighted), None) for b in range(3)]
    assert_close(found, jax.tree.map(lambda *xs: sum(xs), *parts))


@every_rule
def test_losses_of_rules_add_up_over_microbatches(rule, referenced, responses):
    objective = Preference(MODEL, rule, sft_coef=0.3)
    weighted = objective.with_weights(referenced)
    parts = [
        objective.loss_of_responses(*jax.tree.map(lambda x, b=b: x[b : b + 1], (responses, weighted))) for b in range(3)
    ]
    assert_close(objective.loss_of_responses(responses, weighted), jax.tree.map(lambda *xs: sum(xs), *parts))


def test_chunks_change_nothing(whole):
    cut = dataclasses.replace(whole[0], chunk=20)
    assert_close(whole[3], value_and_grad(cut, whole[1]))


@every_rule
def test_batch_without_pairs_is_zero_and_finite(rule, referenced, responses):
    objective = Preference(MODEL, rule)
    tied = objective.with_weights(referenced.replace(ranks=jnp.zeros_like(RANKS)))
    loss, gradient = jax.value_and_grad(lambda p: objective.loss_of_responses(responses.replace(logprobs=p), tied)[0])(
        responses.logprobs
    )
    assert loss == 0 and bool(jnp.all(gradient == 0))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture(scope="module")
def labelled():
    return jax.jit(Unpaired(MODEL).prepare)(REFERENCE, LABELLED)


@every_kto
def test_kto_equals_the_formula_over_the_tokens(rule, alone, labelled, responses):
    objective = Unpaired(MODEL, rule, name="kto")
    two = jax.tree.map(lambda x: x[:, :2], responses)
    loss, metrics = objective.loss_of_responses(two, objective.with_weights(labelled))
    ratio = {key: p - q for key, (p, q, _) in alone.items()}
    column = {"mismatched": 1, "batch": 0}.get(rule.baseline)
    z = 0.0 if column is None else max(0.0, float(np.mean([ratio[b, column] for b in range(3)])))
    each = [
        1.3 * (1 - sigma(0.1 * (ratio[b, 0] - z))) if GOOD[b] else 1 - sigma(0.1 * (z - ratio[b, 0])) for b in range(3)
    ]
    np.testing.assert_allclose([loss, metrics["kto/baseline"]], [np.mean(each), z], rtol=1e-4, atol=1e-6)
    good, bad = 0.1 * (ratio[0, 0] + ratio[2, 0]) / 2, 0.1 * ratio[1, 0]
    found = [metrics[f"kto/{name}"] for name in ("chosen_reward", "rejected_reward", "margin", "desirable")]
    np.testing.assert_allclose(found, [good, bad, good - bad, 2 / 3], rtol=1e-4)


def test_kto_does_not_depend_on_padding_or_empty_rows(labelled, responses):
    objective = Unpaired(MODEL)
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 1), *((0, 0) for _ in x.shape[1:]))), labelled)
    wide = wide.replace(tokens=jnp.pad(wide.tokens, ((0, 0), (0, 0), (0, 3)), constant_values=5))
    loss, metrics = jax.jit(objective.loss)(PARAMS, objective.with_weights(wide), None)
    two = jax.tree.map(lambda x: x[:, :2], responses)
    assert_close((loss, metrics), objective.loss_of_responses(two, objective.with_weights(labelled)))


def test_kto_without_a_baseline_adds_up_over_microbatches(labelled, responses):
    objective = Unpaired(MODEL, KTO(baseline="none"))
    whole = jax.tree.map(lambda x: x[:, :1], responses), objective.with_weights(labelled)
    parts = [objective.loss_of_responses(*jax.tree.map(lambda x, b=b: x[b : b + 1], whole)) for b in range(3)]
    assert_close(objective.loss_of_responses(*whole), jax.tree.map(lambda *xs: sum(xs), *parts))


DIGITS = CharTokenizer("0123456789")


def record(prompt, responses, ranks):
    return {"messages": [{"role": "user", "content": prompt}], "responses": responses, "ranks": ranks}


RECORDS = [
    record("12", ["3", "45", "6", "77"], [1, 0, 2, 2]),
    record("5", ["8", "9"], [0, 0]),
    record("9", ["1234", "00"], [0, 1]),
]  # fmt: skip


@pytest.mark.parametrize("too_long", ["left", "right"])
def test_prompt_lengths_of_tables(too_long):
    assert preference_rows(ranking_table(RECORDS, DIGITS, PLAIN, 8)).prompt_lengths.tolist() == [2, 1, 1]
    short = ranking_table([record("1234", ["567", "8"], [0, 1])], DIGITS, PLAIN, 6, too_long=too_long)
    assert short.prompt_lengths.tolist() == [{"left": 2, "right": 4}[too_long]]
    text = DIGITS.decode(short.rows.tokens[0, 0, : short.prompt_lengths[0]].tolist())
    assert text == {"left": "34", "right": "1234"}[too_long]


def test_best_and_worst_become_good_and_bad_with_the_next_prompts_best():
    rows = preference_rows(ranking_table(RECORDS, DIGITS, PLAIN, 6))
    found = labelled_rows(rows, mismatched=True, pad_id=DIGITS.pad_id)

    def texts(k):
        ends = np.asarray(found.lengths)
        return [DIGITS.decode(found.tokens[row, k, : ends[row, k]].tolist()) for row in range(len(ends))]

    assert texts(0) == ["1245", "126", "1277", "91234", "900"]
    assert found.desirable.tolist() == [True, False, False, True, False]
    assert found.prompt_lengths.tolist() == [2, 2, 2, 1, 1]
    assert texts(1) == ["121234", "121234", "121234", "945", "945"]  # "1234" and its EOS, cut at 6 tokens
    assert found.lengths[:, 1].tolist() == [6, 6, 6, 4, 4]
    alone = labelled_rows(rows, mismatched=False, pad_id=0)
    assert alone.tokens.shape[1] == 1
    with pytest.raises(ValueError, match="no mismatched responses"):
        Unpaired(MODEL).loss(PARAMS, Unpaired(MODEL).with_weights(jax.tree.map(jnp.asarray, alone)), None)


def test_labels_need_two_ranks_and_two_prompts():
    tied = preference_rows(ranking_table(RECORDS[1:2], DIGITS, PLAIN, 6))
    with pytest.raises(UserError, match="no ranking has two different ranks"):
        labelled_rows(tied, mismatched=False, pad_id=0)
    single = preference_rows(ranking_table(RECORDS[:1], DIGITS, PLAIN, 6))
    with pytest.raises(UserError, match="a single prompt"):
        labelled_rows(single, mismatched=True, pad_id=0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DPO(0.0), "beta is 0.0; expected a number above 0"),
        (lambda: DPO(label_smoothing=0.5), "label_smoothing is 0.5; expected at least 0 and below 0.5"),
        (lambda: SimPO(gamma=-1.0), "gamma is -1.0; expected 0 or more"),
        (lambda: ORPO(coef=-1.0), "coef is -1.0; expected a number above 0"),
        (lambda: KTO(baseline="mean"), "baseline is 'mean'"),  # pyright: ignore[reportArgumentType]
        (lambda: KTO(undesirable_weight=-1.0), "undesirable_weight is -1.0"),
        (lambda: Preference(MODEL, normalise="x"), "normalise is 'x'"),  # pyright: ignore[reportArgumentType]
        (lambda: Preference(MODEL, sft_mean="x"), "sft_mean is 'x'"),  # pyright: ignore[reportArgumentType]
        (lambda: Preference(MODEL, sft_coef=-1), "sft_coef is -1"),
    ],
)
def test_bad_choices_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
