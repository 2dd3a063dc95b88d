"""Random walks on a directed graph: find the shortest way to the goal, having seen only aimless walks.

The protocol of trlX (``examples/randomwalks``, after the Decision Transformer paper, arXiv:2106.01345): a random graph
of 21 nodes named ``a`` .. ``u`` whose goal is ``a``; 1000 walks of at most 10 nodes; a sample scores 1 when it takes
the shortest way from its first node to the goal, 0 when it breaks off, uses an edge that does not exist or needs 10
nodes. A policy that imitates the walks of the default graph scores 0.35.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.data.tasks.base import Prompt, Split, check_pairs, check_responses, dense_ranks
from rlhf_jax.errors import UserError

GOAL = 0
INVALID_LENGTH = 100
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class RandomWalks:
    """The graph of one seed, its walks, and the optimality of a sample.

    Difficulty differs greatly between graphs: an aimless walk scores 0.79 on seed 1002 and 0.19 on seed 5. A graph with
    a node from which the goal is out of reach has no defined score and is refused.
    """

    seed: int = 1000
    nodes: int = 21
    max_length: int = 10
    walk_count: int = 1000
    edge_probability: float = 0.1

    def __post_init__(self):
        if not 2 <= self.nodes <= len(_LETTERS):
            raise UserError(f"{self.nodes} nodes cannot be named by one letter each", at="nodes", expected="2 to 26")
        if self.max_length < 3:
            raise UserError(
                f"max_length {self.max_length} leaves no walk that could be better than another",
                at="max_length",
                expected="at least 3",
                fix="raise it",
            )
        if not 0.0 < self.edge_probability <= 1.0:
            raise UserError(
                f"edge_probability {self.edge_probability} gives no edges",
                at="edge_probability",
                expected="more than 0 and at most 1",
                fix="change it",
            )
        unreachable = np.flatnonzero(self.shortest >= self.max_length)
        if unreachable.size:
            names = ", ".join(_LETTERS[node] for node in unreachable)
            raise UserError(
                f"in the graph of seed {self.seed} the goal '{_LETTERS[GOAL]}' cannot be reached within "
                f"{self.max_length - 1} nodes from {unreachable.size} of {self.nodes - 1} nodes ({names})",
                at="seed",
                expected="a graph in which every node reaches the goal",
                fix="take another seed; 1000 is the published graph",
            )

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, tuple[str, ...]]:
        state = np.random.RandomState(self.seed)
        adjacency = _draw_graph(state, self.nodes, self.edge_probability)
        walks = tuple(_draw_walk(state, adjacency, self.max_length) for _ in range(self.walk_count))
        return adjacency, walks

    @property
    def adjacency(self) -> Bool[np.ndarray, "nodes nodes"]:
        """``adjacency[i, j]``: whether there is an edge from ``i`` to ``j``. The goal leads only to itself."""
        return self._drawn[0]

    @property
    def walks(self) -> tuple[str, ...]:
        """The walks of the protocol, in the order in which they were drawn."""
        return self._drawn[1]

    @cached_property
    def shortest(self) -> Int[np.ndarray, " nodes"]:
        """Nodes on the shortest way to the goal, both ends counted; ``max_length`` where that is not enough."""
        return _shortest(self.adjacency, self.max_length)

    @property
    def alphabet(self) -> str:
        """The letters of all nodes; the goal is the first."""
        return _LETTERS[: self.nodes]

    def texts(self, n: int, seed: int) -> list[dict]:
        """``n`` of the protocol's walks in an order drawn from ``seed``; all of them where ``n`` is their number."""
        if n > self.walk_count:
            raise UserError(f"{n} walks were asked of {self.walk_count}", at="n", expected=f"at most {self.walk_count}")
        order = np.random.default_rng(seed).permutation(self.walk_count)[:n]
        return [{"text": self.walks[index]} for index in order]

    def demonstrations(self, n: int, seed: int) -> list[dict]:
        """``n`` of the protocol's walks as the start (prompt) and the rest (response)."""
        return [
            {"messages": [_user(text[0]), {"role": "assistant", "content": text[1:]}]}
            for text in (record["text"] for record in self.texts(n, seed))
        ]

    def rankings(self, n: int, k: int, seed: int) -> list[dict]:
        """``n`` start nodes with ``k`` walks each from the protocol's data, ranked by optimality."""
        check_responses(k)
        continuations: dict[str, list[str]] = {}
        for walk in self.walks:
            continuations.setdefault(walk[0], []).append(walk[1:])
        starts = sorted(start for start, rest in continuations.items() if len(set(self._scores(start, rest))) > 1)
        if not starts:
            raise UserError("no start node has two walks of different optimality", at="walk_count", fix="raise it")
        rng = np.random.default_rng(seed)
        records = []
        while len(records) < n:
            start = starts[rng.integers(len(starts))]
            pool = continuations[start]
            responses = [pool[index] for index in rng.integers(len(pool), size=k)]
            ranks = dense_ranks(self._scores(start, responses))
            if max(ranks) > 0:
                records.append({"messages": [_user(start)], "responses": responses, "ranks": ranks})
        return records

    def prompts(self, n: int, seed: int, split: Split = "train") -> list[dict]:
        """Start nodes: every pass over all of them in a new order. As in the protocol, both splits hold the same."""
        del split
        rng = np.random.default_rng(seed)
        starts = sorted({walk[0] for walk in self.walks})
        letters: list[str] = []
        while len(letters) < n:
            letters.extend(starts[index] for index in rng.permutation(len(starts)))
        return [{"messages": [_user(letter)]} for letter in letters[:n]]

    def gold(self, prompt: Prompt, response: str) -> float:
        """Optimality of the walk that starts with the prompt and goes on with the response."""
        return float(self.golds([prompt], [response])[0])

    def golds(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Float[np.ndarray, " B"]:
        check_pairs(prompts, responses)
        starts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        return self.optimality([start + response for start, response in zip(starts, responses, strict=True)])

    def optimality(self, samples: Sequence[str]) -> Float[np.ndarray, " B"]:
        r"""The protocol's reward of whole walks, in [0, 1].

        .. math:: (L - \min(\ell, L)) / (L - s)

        with ``L`` = ``max_length``, ``l`` = :meth:`lengths` and ``s`` the shortest number of nodes from the sample's
        start. A sample without a start, or that starts at the goal or with an unknown letter, has walked nowhere and
        scores 0 (the published code indexes out of range there); so does one that needs more than ``L`` nodes, which
        the protocol's 9 new tokens cannot produce.
        """
        lengths = np.minimum(self.lengths(samples), self.max_length)
        starts = np.array([self.alphabet.find(sample[:1]) if sample else -1 for sample in samples], dtype=int)
        scores = (self.max_length - lengths) / (self.max_length - self.shortest[starts])
        return np.where(starts > GOAL, scores, 0.0)

    def lengths(self, samples: Sequence[str]) -> Int[np.ndarray, " B"]:
        """Nodes up to the goal, both ends counted; 100 for a missing edge, an unknown letter, or no goal."""
        return np.array([self._length(sample) for sample in samples], dtype=int)

    def _length(self, sample: str) -> int:
        previous = None
        for index, letter in enumerate(sample):
            node = self.alphabet.find(letter)
            if node < 0 or (previous is not None and not self.adjacency[previous, node]):
                return INVALID_LENGTH
            if node == GOAL:
                return index + 1
            previous = node
        return INVALID_LENGTH

    def _scores(self, start: str, rest: Sequence[str]) -> list[float]:
        return self.optimality([start + letters for letters in rest]).tolist()


def _user(content: str) -> dict:
    return {"role": "user", "content": content}


def _draw_graph(state: np.random.RandomState, nodes: int, edge_probability: float) -> np.ndarray:
    """Edges at random, drawn again until every node has a successor; then the goal is made absorbing."""
    while True:
        adjacency = state.rand(nodes, nodes) > 1 - edge_probability
        np.fill_diagonal(adjacency, False)
        if adjacency.any(axis=1).all():
            break
    adjacency[GOAL] = False
    adjacency[GOAL, GOAL] = True
    return adjacency


def _draw_walk(state: np.random.RandomState, adjacency: np.ndarray, max_length: int) -> str:
    node = GOAL
    while node == GOAL:
        node = state.randint(len(adjacency))
    walk = [node]
    while len(walk) < max_length and node != GOAL:
        node = state.choice(np.flatnonzero(adjacency[node]))
        walk.append(node)
    return "".join(_LETTERS[node] for node in walk)


def _shortest(adjacency: np.ndarray, max_length: int) -> np.ndarray:
    """Breadth-first from the goal against the edges, level by level."""
    shortest = np.full(len(adjacency), max_length)
    reached = np.zeros(len(adjacency), dtype=bool)
    reached[GOAL] = True
    for length in range(1, max_length):
        shortest[reached & (shortest == max_length)] = length
        reached = reached | adjacency[:, reached].any(axis=1)
    return shortest
