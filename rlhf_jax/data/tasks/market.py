"""The market task: a clerk greets, repeats the whole order exactly, and thanks, in few words.

Customers order one to three goods. The demonstrations come from clerks of mixed quality, so that a policy which
imitates them is curt, forgets and miscounts; the reward is exact and says what a perfect reply is, so that how far
reinforcement learning gets is a number. Everything is short and simple enough to be learned from nothing by a
Transformer of a quarter of a million parameters in about a minute on two CPU cores.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from jaxtyping import Float

from rlhf_jax.data.tasks.base import Prompt, Split, check_pairs, check_responses, dense_ranks
from rlhf_jax.data.tasks.market_clerks import CAREFUL, COMPETITORS, DEMONSTRATORS, choose
from rlhf_jax.data.tasks.market_language import (
    COUNTS,
    GOODS,
    GREETINGS,
    REQUESTS,
    SMALL_TALK,
    THANKS,
    Mention,
    Sentence,
    list_goods,
    read_mentions,
    read_sentences,
)
from rlhf_jax.errors import UserError

GOODS_SHARE, GREETING_SHARE, THANKS_SHARE = 0.6, 0.2, 0.2
MALFORMED_FAULT = 0.2
REPETITION_FAULT = 0.1
EXCESS_WORD_FAULT = 0.05
FREE_WORDS, FREE_WORDS_PER_GOOD = 8, 3
LOWEST = -1.0

_RANK_STEP = 0.05
"""A labeller tells replies apart whose (noisy) scores differ by about this much; closer ones are ties."""

_NAMES = ("Anna", "Tom", "Mary", "Ben")
_SCENES = (
    "{name} writes a list: {goods}. At the market {name} asks for {goods}. The clerk packs {goods}.",
    "{name} buys {goods}. {name} takes {goods} home and puts {goods} on the table.",
    "{name} says: {request} The clerk packs {goods}. The clerk says: That is {goods}.",
    "{name} says: {request} The clerk says: Here you have {goods}. {name} says: {thanks}",
    "The clerk says: {greeting} {name} says: {request} The clerk says: I have {goods} for you.",
    "The clerk says: I have {goods} for you. {name} takes {goods} home. {talk}",
    "{name} needs {goods}. {other} says: {greeting} Here you have {goods}. {name} says: {thanks}",
)


@dataclass(frozen=True)
class Market:
    """Orders of up to ``largest_order`` goods; a fixed ``heldout_fraction`` of all orders is never trained on.

    Which orders are held out depends on the order alone (a hash), not on the seed: no training record, of whatever
    kind and seed, mentions a held-out order. ``label_noise`` is the standard deviation of what is added to the gold
    reward before responses are ranked.
    """

    largest_order: int = 3
    heldout_fraction: float = 0.1
    label_noise: float = 0.0

    def __post_init__(self):
        if not 1 <= self.largest_order <= len(COUNTS):
            raise UserError(
                f"an order of {self.largest_order} goods", at="largest_order", expected=f"1 to {len(COUNTS)}"
            )
        if not 0.0 < self.heldout_fraction < 1.0:
            raise UserError(
                f"a fraction of {self.heldout_fraction} held out", at="heldout_fraction", expected="between 0 and 1"
            )
        if not self.label_noise >= 0.0:
            raise UserError(f"label noise of {self.label_noise}", at="label_noise", expected="0 or more")

    def texts(self, n: int, seed: int) -> list[dict]:
        """Scenes at the market: the words of the task, and goods that are named again, but no serving of customers."""
        rng = Random(f"market texts {seed}")
        orders = self._orders(rng, "train")
        return [{"text": _scene(next(orders), rng)} for _ in range(n)]

    def demonstrations(self, n: int, seed: int) -> list[dict]:
        """A customer's request and the reply of some clerk, good or bad."""
        rng = Random(f"market demonstrations {seed}")
        orders = self._orders(rng, "train")
        return [self._demonstration(next(orders), rng) for _ in range(n)]

    def rankings(self, n: int, k: int, seed: int) -> list[dict]:
        """Requests with ``k`` replies each from clerks of all sorts, ranked by gold (plus noise); equal ones tie."""
        check_responses(k)
        rng = Random(f"market rankings {seed}")
        orders = self._orders(rng, "train")
        records: list[dict] = []
        while len(records) < n:
            order = next(orders)
            messages = [_user(_request(order, rng))]
            responses = [choose(COMPETITORS, rng).reply(order, rng) for _ in range(k)]
            ranks = self.ranks(messages, responses, rng)
            if max(ranks) > 0:
                records.append({"messages": messages, "responses": responses, "ranks": ranks})
        return records

    def ranks(self, prompt: Prompt, responses: Sequence[str], rng: Random) -> list[int]:
        """A labeller's ranks of any responses, such as a policy's samples; all 0 where they are equally good."""
        golds = self.golds([prompt] * len(responses), responses)
        noise = (rng.gauss(0.0, self.label_noise) for _ in responses)
        return dense_ranks([round((gold + error) / _RANK_STEP) for gold, error in zip(golds, noise, strict=True)])

    def prompts(self, n: int, seed: int, split: Split = "train") -> list[dict]:
        """Requests, no two of them for the same order."""
        rng = Random(f"market prompts {split} {seed}")
        requests: dict[tuple[Mention, ...], dict] = {}
        attempts = 0
        for order in self._orders(rng, split):
            if len(requests) == n:
                break
            attempts += 1
            if attempts > 20 * n + 1000:
                raise UserError(
                    f"{n} different orders were asked of the {split} split, which holds about {len(requests)}",
                    at="n",
                    fix="ask for fewer prompts or raise largest_order",
                )
            requests.setdefault(tuple(sorted(order)), {"messages": [_user(_request(order, rng))]})
        return list(requests.values())

    def best_response(self, prompt: Prompt) -> str:
        """A reply whose gold reward is the highest possible, 1."""
        return CAREFUL.reply(_order(prompt), Random(0))

    def gold(self, prompt: Prompt, response: str) -> float:
        r"""How well the reply serves the order, in [-1, 1].

        .. math:: \frac{\max(0, right - wrong)}{ordered} (0.6 + 0.2\,greeting + 0.2\,thanks) - faults

        Only well-formed confirmations name goods. ``right`` ones are ordered and never named with another count;
        ``wrong`` ones are, or were not ordered. A greeting counts when it is the only one and comes first, thanks when
        they are the only ones and come last, and neither without right goods.
        Faults: 0.2 for each malformed sentence, 0.1 for each sentence of a kind that came before (small talk
        included) and each good named again, 0.05 for each word beyond 8 + 3 for each good ordered.
        """
        order = dict(_order(prompt))
        sentences = read_sentences(response)
        mentions = Counter(mention for sentence in sentences for mention in sentence.mentions)
        named = {name for name, _ in mentions}
        wrong = {name for name, count in mentions if order.get(name) != count}
        fidelity = max(0, len(named - wrong) - len(wrong)) / len(order)
        faults = _faults(sentences, mentions.total() - len(named), len(response.split()), len(order))
        return max(LOWEST, fidelity * _manners(sentences) - faults)

    def golds(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Float[np.ndarray, " B"]:
        check_pairs(prompts, responses)
        return np.array([self.gold(prompt, response) for prompt, response in zip(prompts, responses, strict=True)])

    def _orders(self, rng: Random, split: Split) -> Iterator[tuple[Mention, ...]]:
        """Orders of the split without end: more large ones than small, no two goods in the same number."""
        sizes = range(1, self.largest_order + 1)
        while True:
            names = rng.sample(list(GOODS), k=rng.choices(sizes, weights=sizes)[0])
            order = tuple(zip(names, rng.sample(range(1, len(COUNTS) + 1), k=len(names)), strict=True))
            if self._is_heldout(order) == (split == "heldout"):
                yield order

    def _is_heldout(self, order: tuple[Mention, ...]) -> bool:
        digest = hashlib.sha256(list_goods(tuple(sorted(order))).encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.heldout_fraction * 2**64

    def _demonstration(self, order: tuple[Mention, ...], rng: Random) -> dict:
        reply = choose(DEMONSTRATORS, rng).reply(order, rng)
        return {"messages": [_user(_request(order, rng)), {"role": "assistant", "content": reply}]}


def _manners(sentences: Sequence[Sentence]) -> float:
    kinds = [sentence.kind for sentence in sentences]
    greets = kinds.count("greeting") == 1 and kinds[0] == "greeting"
    thanks = kinds.count("thanks") == 1 and kinds[-1] == "thanks"
    return GOODS_SHARE + GREETING_SHARE * greets + THANKS_SHARE * thanks


def _faults(sentences: Sequence[Sentence], goods_again: int, words: int, ordered: int) -> float:
    kinds = Counter(sentence.kind for sentence in sentences)
    malformed = kinds.pop("malformed", 0)
    again = kinds.total() - len(kinds) + goods_again
    excess = max(0, words - FREE_WORDS - FREE_WORDS_PER_GOOD * ordered)
    return MALFORMED_FAULT * malformed + REPETITION_FAULT * again + EXCESS_WORD_FAULT * excess


def _order(prompt: Prompt) -> tuple[Mention, ...]:
    """What the customer's last turn asks for."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    order = read_mentions(text)
    if not order:
        raise UserError(f"no goods are ordered in {text!r}", expected="a request as Market.prompts makes it")
    return order


def _user(content: str) -> dict:
    return {"role": "user", "content": content}


def _request(order: tuple[Mention, ...], rng: Random) -> str:
    return rng.choice(REQUESTS).format(goods=list_goods(order))


def _scene(order: tuple[Mention, ...], rng: Random) -> str:
    name, other = rng.sample(_NAMES, k=2)
    return rng.choice(_SCENES).format(
        name=name,
        other=other,
        goods=list_goods(order),
        request=_request(order, rng),
        greeting=rng.choice(GREETINGS),
        thanks=rng.choice(THANKS),
        talk=rng.choice(SMALL_TALK),
    )
