"""The random walks: published numbers of seven graphs, a metric computed by hand, and the refusal of broken graphs."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax.data.tasks.base import Task
from rlhf_jax.data.tasks.randomwalks import INVALID_LENGTH, RandomWalks
from rlhf_jax.errors import UserError


@pytest.fixture(scope="module")
def task() -> RandomWalks:
    return RandomWalks()


@pytest.mark.parametrize(
    "seed, mean", [(1000, 0.352), (1002, 0.790), (0, 0.415), (1, 0.212), (2, 0.484), (4, 0.279), (5, 0.185)]
)
def test_walks_are_as_optimal_as_published(seed, mean):
    walks = RandomWalks(seed=seed)
    assert round(float(walks.optimality(walks.walks).mean()), 3) == pytest.approx(mean, abs=6e-4)


def test_default_graph_has_the_published_facts(task):
    edges = task.adjacency.sum() - 1  # the goal's edge to itself is not counted
    assert edges == 51
    assert (task.shortest[1:].min(), task.shortest[1:].max()) == (2, 5)
    assert np.mean(task.lengths(task.walks) < INVALID_LENGTH) == 0.56
    scores: dict[str, float] = {}
    for walk, score in zip(task.walks, task.optimality(task.walks), strict=True):
        scores[walk[0]] = max(score, scores.get(walk[0], 0.0))
    assert len(scores) == 20
    assert np.mean(list(scores.values())) == pytest.approx(0.992, abs=5e-4)
    assert np.mean([score == 1.0 for score in scores.values()]) == 0.95


def test_walks_follow_edges_and_stop_at_the_goal(task):
    assert len(task.walks) == 1000
    for walk in task.walks:
        nodes = [task.alphabet.index(letter) for letter in walk]
        assert nodes[0] != 0 and len(nodes) <= 10 and 0 not in nodes[:-1]
        assert nodes[-1] == 0 or len(nodes) == 10
        assert all(task.adjacency[a, b] for a, b in zip(nodes, nodes[1:], strict=False))


def test_shortest_ways_agree_with_powers_of_the_adjacency(task):
    for start in range(1, task.nodes):
        reach = np.eye(task.nodes, dtype=int)[start]
        steps = 0
        while not reach[0]:
            reach, steps = reach @ task.adjacency, steps + 1
        assert task.shortest[start] == steps + 1


def by_hand(adjacency: np.ndarray, letters: str, shortest: dict[str, int]) -> tuple[int, float]:
    """The metric of one sample, written from the protocol's text alone."""
    edges = {(chr(97 + i), chr(97 + j)) for i, j in zip(*np.nonzero(adjacency), strict=True)}
    length = 100
    for end in range(1, len(letters) + 1):
        if end > 1 and (letters[end - 2], letters[end - 1]) not in edges:
            break
        if letters[end - 1] == "a":
            length = end
            break
    bound = 10 if length == 100 else length
    return length, (10 - bound) / (10 - shortest[letters[0]])


def test_metric_agrees_with_a_plain_loop(task):
    rng = np.random.default_rng(0)
    shortest = {letter: int(task.shortest[index]) for index, letter in enumerate(task.alphabet)}
    noise = ["".join(rng.choice(list(task.alphabet), size=rng.integers(1, 11))) for _ in range(300)]
    broken = [walk[: rng.integers(1, 11)] for walk in task.walks[:300]]
    samples = [sample for sample in noise + broken + list(task.walks[:300]) if sample[0] != "a"]
    expected = [by_hand(task.adjacency, sample, shortest) for sample in samples]
    np.testing.assert_array_equal(task.lengths(samples), [length for length, _ in expected])
    np.testing.assert_allclose(task.optimality(samples), [score for _, score in expected], atol=1e-12)


def test_metric_on_a_graph_small_enough_to_see():
    """Four nodes and every edge, so that the shortest way has 2 nodes everywhere and L = 5: (5 - l) / 3."""
    task = RandomWalks(seed=0, nodes=4, max_length=5, edge_probability=1.0, walk_count=10)
    samples = ["ba", "bca", "bcda", "bcdba", "bcdcb", "b", "bz", "bab", "b a", "bb"]
    lengths = [2, 3, 4, 5, 100, 100, 100, 2, 100, 100]
    np.testing.assert_array_equal(task.lengths(samples), lengths)
    np.testing.assert_allclose(task.optimality(samples), [1, 2 / 3, 1 / 3, 0, 0, 0, 0, 1, 0, 0], atol=1e-12)


@pytest.mark.parametrize("sample", ["", "a", "ab", "z", "?a", "BA"])
def test_samples_that_start_nowhere_score_zero(task, sample):
    assert task.optimality([sample])[0] == 0.0


def test_longer_walks_than_the_limit_score_zero():
    task = RandomWalks(seed=0, nodes=4, max_length=5, edge_probability=1.0, walk_count=10)
    assert task.optimality(["bcbcbca"])[0] == 0.0


def test_unreachable_graph_is_refused():
    with pytest.raises(UserError, match=r"seed 3 .*18 of 20 nodes \(b, c, d, e, h") as error:
        RandomWalks(seed=3)
    assert "1000" in str(error.value)


@pytest.mark.parametrize(
    "fields, named",
    [({"nodes": 27}, "27"), ({"nodes": 1}, "1 nodes"), ({"max_length": 2}, "2"), ({"edge_probability": 0.0}, "0.0")],
)
def test_impossible_settings_are_refused(fields, named):
    with pytest.raises(UserError, match=named):
        RandomWalks(**fields)


def test_records(task):
    assert isinstance(task, Task)
    texts = task.texts(1000, seed=5)
    assert sorted(record["text"] for record in texts) == sorted(task.walks)
    assert texts[:10] == task.texts(10, seed=5) != task.texts(10, seed=6)
    for text, demonstration in zip(texts[:20], task.demonstrations(20, seed=5), strict=True):
        user, assistant = demonstration["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"] + assistant["content"] == text["text"]
        assert task.gold([user], assistant["content"]) == task.optimality([text["text"]])[0]
    with pytest.raises(UserError, match="1001 walks"):
        task.texts(1001, seed=0)


def test_prompts_are_the_start_letters(task):
    letters = [record["messages"][0]["content"] for record in task.prompts(45, seed=0)]
    for start in (0, 20):
        assert sorted(letters[start : start + 20]) == list("bcdefghijklmnopqrstu")
    assert letters == [record["messages"][0]["content"] for record in task.prompts(45, seed=0, split="heldout")]


def test_rankings_order_by_optimality(task):
    rankings = task.rankings(30, k=4, seed=0)
    assert len(rankings) == 30 and rankings[:5] == task.rankings(5, k=4, seed=0)
    for record in rankings:
        golds = task.golds([record["messages"]] * 4, record["responses"])
        ranks = np.array(record["ranks"])
        assert ranks.min() == 0 < ranks.max()
        np.testing.assert_array_equal(np.sign(golds[:, None] - golds[None]), np.sign(ranks[None] - ranks[:, None]))
