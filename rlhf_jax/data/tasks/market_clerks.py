"""Who serves at the market: clerks of mixed quality, whose replies are demonstrations and ranked responses."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from rlhf_jax.data.tasks.market_language import (
    CONFIRMATIONS,
    COUNTS,
    GOODS,
    GREETINGS,
    SMALL_TALK,
    THANKS,
    Mention,
    list_goods,
)


@dataclass(frozen=True)
class Clerk:
    """Habits, each the probability that it shows in a reply (``forgets``, ``miscounts``: for each good ordered).

    ``adds`` is the probability of one more good that nobody ordered, again after each; ``garbles`` that a word of the
    reply is lost or said twice, for each word.
    """

    greets: float = 0.0
    thanks: float = 0.0
    forgets: float = 0.0
    miscounts: float = 0.0
    adds: float = 0.0
    repeats: float = 0.0
    talks: float = 0.0
    garbles: float = 0.0

    def reply(self, order: tuple[Mention, ...], rng: Random) -> str:
        goods = self._goods(order, rng)
        confirmation = rng.choice(CONFIRMATIONS).format(goods=list_goods(goods))
        sentences = [rng.choice(GREETINGS)] if rng.random() < self.greets else []
        sentences.append(confirmation)
        if rng.random() < self.talks:
            sentences.append(rng.choice(SMALL_TALK))
        if rng.random() < self.thanks:
            sentences.append(rng.choice(THANKS))
        if rng.random() < self.repeats:
            sentences.append(rng.choice(sentences))
        return _garble(" ".join(sentences), self.garbles, rng)

    def _goods(self, order: tuple[Mention, ...], rng: Random) -> tuple[Mention, ...]:
        kept = [good for good in order if rng.random() >= self.forgets]
        goods = [self._counted(good, rng) for good in (kept or [rng.choice(order)])]
        while rng.random() < self.adds and len(goods) < 2 * len(order) + 1:
            name = rng.choice([name for name in GOODS if all(name != other for other, _ in (*order, *goods))])
            goods.append((name, rng.randint(1, len(COUNTS))))
        return tuple(goods)

    def _counted(self, good: Mention, rng: Random) -> Mention:
        name, count = good
        if rng.random() < self.miscounts:
            count = rng.choice([other for other in range(1, len(COUNTS) + 1) if other != count])
        return name, count


def _garble(text: str, rate: float, rng: Random) -> str:
    words: list[str] = []
    for word in text.split(" "):
        if rng.random() >= rate:
            words.append(word)
        elif rng.random() < 0.5:
            words.extend((word, word))
    return " ".join(words)


CAREFUL = Clerk(greets=1.0, thanks=1.0)
CURT = Clerk(greets=0.1, thanks=0.2)
FORGETFUL = Clerk(greets=0.4, thanks=0.4, forgets=0.5)
MUDDLED = Clerk(greets=0.5, thanks=0.5, miscounts=0.5)
CHATTY = Clerk(greets=0.6, thanks=0.4, talks=0.9, repeats=0.5, adds=0.2)
EAGER = Clerk(greets=0.5, thanks=0.6, adds=0.7, repeats=0.3)
MUMBLING = Clerk(greets=0.5, thanks=0.5, garbles=0.15)

Staff = tuple[tuple[float, Clerk], ...]
"""Clerks with their shares."""

DEMONSTRATORS: Staff = ((0.08, CAREFUL), (0.35, CURT), (0.25, FORGETFUL), (0.17, MUDDLED), (0.15, CHATTY))
"""Who is imitated: one in ten replies cannot be bettered, and the most common reply neither greets nor thanks."""

COMPETITORS: Staff = (
    (0.2, CAREFUL),
    (0.15, CURT),
    (0.2, FORGETFUL),
    (0.2, MUDDLED),
    (0.1, CHATTY),
    (0.08, EAGER),
    (0.07, MUMBLING),
)
"""Who is ranked: more of the best, and of the worst that a policy might drift to."""


def choose(staff: Staff, rng: Random) -> Clerk:
    return rng.choices([clerk for _, clerk in staff], weights=[share for share, _ in staff])[0]
