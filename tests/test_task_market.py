"""The market task: gold rewards by hand, hacks that must not pay, splits, determinism and mediocre demonstrations."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from rlhf_jax.data.tasks.base import Task, TaskDemonstrations, TaskPrompts, TaskRankings, TaskTexts, dense_ranks
from rlhf_jax.data.tasks.market import Market
from rlhf_jax.data.tasks.market_clerks import CAREFUL, Clerk
from rlhf_jax.data.tasks.market_language import COUNTS, GOODS, list_goods, read_mentions, read_sentences
from rlhf_jax.errors import UserError

TASK = Market()
PROMPT = "I would like two apples, one melon and five eggs, please."
ORDER = "two apples, one melon and five eggs"


@pytest.mark.parametrize(
    "response, gold",
    [
        (f"Hello! That is {ORDER}. Thank you!", 1.0),
        (f"Good morning! I have {ORDER} for you. Many thanks!", 1.0),
        ("Hello! That is five eggs, two apples and one melon. Thank you!", 1.0),  # any order of the goods
        (f"  hello!  that is {ORDER}.\nTHANK YOU! ", 1.0),  # case and spacing do not matter
        (f"That is {ORDER}.", 0.6),
        (f"Hello! That is {ORDER}.", 0.8),
        (f"That is {ORDER}. Thank you!", 0.8),
        (f"Thank you! That is {ORDER}. Hello!", 0.6),  # manners in the wrong place
        ("Hello! That is two apples and one melon. Thank you!", 2 / 3),  # one forgotten
        ("Hello! That is two apples, two melons and five eggs. Thank you!", 1 / 3),  # 2 right - 1 wrong count
        ("Hello! That is two apples, one melon, five eggs and one bun. Thank you!", 2 / 3),  # 3 right - 1 not ordered
        ("Hello! That is three apples. Thank you!", 0.0),
        ("That is two apples and one melon. Here you have five eggs.", 0.6 - 0.1),  # two sentences of one kind
        (f"That is {ORDER}. That is {ORDER}.", 0.6 - 0.1 - 0.3 - 0.05),  # a kind, three goods, 18 words of 17
        (f"Hello! That is {ORDER}. Thank you! Thank you!", 0.8 - 0.1),  # no thanks that are the only ones
        (f"Hello! That is {ORDER}. My cat sleeps under the table. Thank you!", 1.0 - 0.05),  # 18 words of 17
        ("Hello! That is two apples, one melon, five eggs. Thank you!", -0.2),  # no "and": malformed
        (f"Hello! That is {ORDER}. Thank", 0.8 - 0.2),  # cut off
        (f"Hello! That is {ORDER}", -0.2),
        ("Hello! That is two apple, one melon and five eggs. Thank you!", -0.2),  # does not agree in number
        (f"Hello! We have {ORDER}. Thank you!", -0.2),  # not what a clerk says
        ("", 0.0),
        ("apples melon eggs", -0.2),
        ("Hello! Thank you!", 0.0),
    ],
)
def test_gold_by_hand(response, gold):
    assert TASK.gold(PROMPT, response) == pytest.approx(gold, abs=1e-12)


ALL_GOODS = list_goods(tuple((name, 2) for name in GOODS))
ALL_COUNTS = list_goods(tuple((name, count) for name in ("apple", "melon", "egg") for count in range(1, 6)))


@pytest.mark.parametrize(
    "hack",
    [
        "Thank you! " * 8,
        "Hello! Thank you!",
        "Hello! " * 10 + "Many thanks! " * 10,
        f"Hello! That is {ALL_GOODS}. Thank you!",
        f"Hello! That is {ALL_COUNTS}. Thank you!",
        f"Hello! {PROMPT} Thank you!",
        PROMPT * 3,
        "two one five " * 5,
        "Hello! That is two apples. Thank you! " * 4,
        f"Hello! Thank you! That is {ORDER}. Hello! Thank you! That is {ORDER}. Thank you!",
        "Hello! It is a fine day at the market. My cat sleeps under the table. Thank you!",
        "!!!!!!!!",
        ". " * 50,
    ],
)
def test_hacks_pay_less_than_a_curt_clerk(hack):
    assert TASK.gold(PROMPT, hack) < TASK.gold(PROMPT, f"That is {ORDER}.") - 0.1 + 1e-9


def test_gold_never_rises_by_saying_something_again():
    for record in TASK.demonstrations(300, seed=1):
        prompt, reply = record["messages"][:1], record["messages"][1]["content"]
        gold = TASK.gold(prompt, reply)
        for sentence in read_sentences(reply):
            assert TASK.gold(prompt, f"{sentence.text} {reply}") <= gold + 1e-12
            assert TASK.gold(prompt, f"{reply} {sentence.text}") <= gold + 1e-12


def test_gold_reads_the_last_turn_and_refuses_what_orders_nothing():
    messages = [{"role": "user", "content": "I need one bun."}, {"role": "user", "content": PROMPT}]
    assert TASK.gold(messages, f"That is {ORDER}.") == TASK.gold(PROMPT, f"That is {ORDER}.")
    with pytest.raises(UserError, match="How are you"):
        TASK.gold("How are you?", "Hello!")
    with pytest.raises(UserError, match="2 prompts .* 1 responses"):
        TASK.golds([PROMPT, PROMPT], ["Hello!"])


def test_reading_undoes_writing():
    rng = Random(0)
    for _ in range(200):
        names = rng.sample(list(GOODS), k=rng.randint(1, 5))
        goods = tuple((name, rng.randint(1, len(COUNTS))) for name in names)
        assert read_mentions(list_goods(goods)) == goods
        assert [s.kind for s in read_sentences(f"That is {list_goods(goods)}.")] == ["confirmation"]
    assert read_mentions("one apples, two apple, twoapples, two applesauce") == ()


def test_the_best_response_is_the_optimum_and_careful_clerks_reach_it():
    rng = Random(0)
    for record in TASK.prompts(200, seed=0, split="heldout"):
        assert TASK.gold(record["messages"], TASK.best_response(record["messages"])) == 1.0
        goods = read_mentions(record["messages"][0]["content"])
        assert TASK.gold(record["messages"], CAREFUL.reply(goods, rng)) == 1.0


def test_demonstrations_are_mediocre():
    """What makes the task need more than imitation: the mean is far below 1, few replies are perfect, and so the
    optimum beats a random demonstration nine times in ten."""
    records = TASK.demonstrations(4000, seed=0)
    golds = TASK.golds([r["messages"][:1] for r in records], [r["messages"][1]["content"] for r in records])
    assert 0.45 < golds.mean() < 0.6
    assert 0.08 < np.mean(golds == 1.0) < 0.14
    assert np.quantile(golds, 0.75) <= 0.8
    assert np.mean((golds < 1.0) + 0.5 * (golds == 1.0)) > 0.9
    greets = [read_sentences(r["messages"][1]["content"])[0].kind == "greeting" for r in records]
    assert np.mean(greets) < 0.5  # so that greedy decoding of an imitator does not greet either


def test_records_are_deterministic_and_extend_each_other():
    assert isinstance(TASK, Task)
    for make in (TASK.texts, TASK.demonstrations, lambda n, s: TASK.rankings(n, 4, s), TASK.prompts):
        assert make(20, 7) == make(20, 7)
        assert make(20, 7)[:5] == make(5, 7)
        assert make(20, 7) != make(20, 8)


def test_generated_text_is_pinned():
    """Published numbers depend on the data: it may change only together with them."""
    assert TASK.demonstrations(1, seed=0)[0]["messages"] == [
        {"role": "user", "content": "Hello. Please give me three pears, four tomatoes and two oranges."},
        {"role": "assistant", "content": "I have four tomatoes and two oranges for you."},
    ]
    assert TASK.texts(1, seed=0)[0]["text"] == (
        "The clerk says: Good morning! Ben says: I would like three buns, one egg and five apples, please. "
        "The clerk says: I have three buns, one egg and five apples for you."
    )
    assert TASK.prompts(1, seed=0, split="heldout")[0]["messages"][0]["content"] == (
        "Hello. Please give me three peaches, two eggs and five plums."
    )


def test_heldout_orders_are_in_no_training_record():
    heldout = {tuple(sorted(read_mentions(r["messages"][0]["content"]))) for r in TASK.prompts(400, 0, "heldout")}
    assert len(heldout) == 400
    training = TASK.demonstrations(3000, 1) + TASK.rankings(500, 3, 2) + TASK.prompts(3000, 3)
    seen = {tuple(sorted(read_mentions(record["messages"][0]["content"]))) for record in training}
    assert len(seen) > 4000 and not seen & heldout
    told = [sentence for record in TASK.texts(2000, 4) for sentence in record["text"].split(".")]
    assert not {tuple(sorted(set(read_mentions(sentence)))) for sentence in told} & heldout


def test_orders_have_different_goods_in_different_numbers():
    for record in TASK.prompts(300, seed=0):
        goods = read_mentions(record["messages"][0]["content"])
        assert 1 <= len(goods) <= 3
        assert len({name for name, _ in goods}) == len({count for _, count in goods}) == len(goods)


def test_heldout_fraction():
    rng = Random(0)
    orders = [tuple((n, rng.randint(1, 5)) for n in rng.sample(list(GOODS), k=3)) for _ in range(4000)]
    assert np.mean([TASK._is_heldout(order) for order in orders]) == pytest.approx(0.1, abs=0.02)
    assert all(TASK._is_heldout(order) == TASK._is_heldout(order[::-1]) for order in orders[:100])


@pytest.mark.parametrize("k", [2, 4, 6])
def test_rankings_follow_gold_with_ties(k):
    records = TASK.rankings(200, k, seed=0)
    ties = 0
    for record in records:
        golds = TASK.golds([record["messages"]] * k, record["responses"])
        ranks = np.array(record["ranks"])
        assert len(record["responses"]) == k and ranks.min() == 0 < ranks.max()
        better = golds[:, None] - golds[None] > 0.05 + 1e-9
        assert np.all((ranks[:, None] < ranks[None])[better])
        ties += len(set(record["ranks"])) < k
    assert k == 2 or ties > 50


def test_label_noise_makes_some_labels_wrong():
    def share_wrong(noise: float) -> float:
        task = Market(label_noise=noise)
        wrong = []
        for record in task.rankings(300, 2, seed=0):
            golds = task.golds([record["messages"]] * 2, record["responses"])
            if golds[0] != golds[1]:
                wrong.append(np.argmax(golds) != np.argmin(record["ranks"]))
        return float(np.mean(wrong))

    assert share_wrong(0.0) == 0.0
    assert 0.05 < share_wrong(0.2) < 0.35


def test_dense_ranks():
    assert dense_ranks([3, 1, 3, 2]) == [0, 2, 0, 1]
    assert dense_ranks([5.0]) == [0]


def test_clerks_habits():
    order = (("apple", 2), ("melon", 1), ("egg", 5))
    rng = Random(0)
    assert not read_sentences(Clerk().reply(order, rng))[1:]
    assert all(len(read_mentions(Clerk(forgets=1.0).reply(order, rng))) == 1 for _ in range(20))
    for _ in range(50):
        miscounted = read_mentions(Clerk(miscounts=1.0).reply(order, rng))
        assert [name for name, _ in miscounted] == ["apple", "melon", "egg"]
        assert all(good not in order for good in miscounted)
    added = [read_mentions(Clerk(adds=1.0).reply(order, rng)) for _ in range(20)]
    assert all(len(goods) == len({name for name, _ in goods}) == 7 for goods in added)


def test_sources_give_the_tasks_records():
    assert TaskTexts(TASK, 3, seed=9).records() == TASK.texts(3, 9)
    assert TaskDemonstrations(TASK, 3, seed=9).records() == TASK.demonstrations(3, 9)
    assert TaskRankings(TASK, 3, responses_per_prompt=5, seed=9).records() == TASK.rankings(3, 5, 9)
    assert TaskPrompts(TASK, 3, split="heldout", seed=9).records() == TASK.prompts(3, 9, "heldout")
    assert hash(TaskTexts(TASK, 3)) == hash(TaskTexts(Market(), 3))
    for bad in (lambda: TaskTexts(TASK, 0), lambda: TaskRankings(TASK, 3, responses_per_prompt=1)):
        with pytest.raises(UserError):
            bad()


@pytest.mark.parametrize(
    "fields", [{"largest_order": 0}, {"largest_order": 6}, {"heldout_fraction": 0.0}, {"label_noise": float("nan")}]
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        Market(**fields)


def test_too_many_prompts_are_refused():
    with pytest.raises(UserError, match="heldout"):
        Market(largest_order=1).prompts(500, 0, "heldout")
