"""The English of the market task: words, orders, what customers and clerks say, and how a sentence is understood.

Writing and reading live side by side because each undoes the other: ``read_mentions(list_goods(goods)) == goods``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

COUNTS = ("one", "two", "three", "four", "five")
GOODS = {
    "apple": "apples",
    "pear": "pears",
    "plum": "plums",
    "peach": "peaches",
    "melon": "melons",
    "lemon": "lemons",
    "orange": "oranges",
    "carrot": "carrots",
    "onion": "onions",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "cabbage": "cabbages",
    "egg": "eggs",
    "bun": "buns",
    "cake": "cakes",
    "pie": "pies",
}
"""Singular to plural of everything that is sold."""

Mention = tuple[str, int]
"""A good, by its singular, and how many of it."""

REQUESTS = (
    "I would like {goods}, please.",
    "May I have {goods}, please?",
    "Good morning. I need {goods}.",
    "Hello. Please give me {goods}.",
)
GREETINGS = ("Hello!", "Good morning!")
THANKS = ("Thank you!", "Many thanks!")
CONFIRMATIONS = ("That is {goods}.", "Here you have {goods}.", "I have {goods} for you.")
SMALL_TALK = (
    "It is a fine day at the market.",
    "My cat sleeps under the table.",
    "We close the shop at noon.",
    "The road was long and wet today.",
)

Kind = Literal["greeting", "confirmation", "thanks", "talk", "malformed"]


@dataclass(frozen=True)
class Sentence:
    """One sentence of a reply: its words, what it does, and the goods that it mentions if it is a confirmation."""

    text: str
    kind: Kind
    mentions: tuple[Mention, ...]


def list_goods(goods: tuple[Mention, ...]) -> str:
    """``"two apples, one melon and five eggs"``."""
    names = [f"{COUNTS[count - 1]} {name if count == 1 else GOODS[name]}" for name, count in goods]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def read_mentions(text: str) -> tuple[Mention, ...]:
    """All goods with a count in front that agrees in number ("two apple" is not a mention), in order."""
    return tuple(_MENTIONS[found] for found in _MENTION.findall(text.lower()))


def read_sentences(text: str) -> list[Sentence]:
    """The sentences of a reply. Case and spacing do not matter; words, commas and full stops do.

    A sentence is malformed when no clerk would say it: among others an unknown word, a list without "and", a last
    sentence that was cut off.
    """
    text = " ".join(text.lower().split())
    sentences = (part.strip() for part in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", text))
    return [_read_sentence(part) for part in sentences if part]


def _read_sentence(text: str) -> Sentence:
    if _CONFIRMATION.fullmatch(text):
        return Sentence(text, "confirmation", read_mentions(text))
    return Sentence(text, _KNOWN.get(text, "malformed"), ())


def _alternatives(words) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_MENTIONS: dict[str, Mention] = {
    list_goods(((name, count),)): (name, count) for name in GOODS for count in range(1, len(COUNTS) + 1)
}
_MENTION = re.compile(rf"\b(?:{_alternatives(_MENTIONS)})\b")
_LIST = rf"(?:{_alternatives(_MENTIONS)})"
_LIST = rf"{_LIST}(?:(?:, {_LIST})* and {_LIST})?"
_CONFIRMATION = re.compile("|".join(re.escape(c.lower()).replace(r"\{goods\}", _LIST) for c in CONFIRMATIONS))
_KNOWN: dict[str, Kind] = {
    **{sentence.lower(): "greeting" for sentence in GREETINGS},
    **{sentence.lower(): "thanks" for sentence in THANKS},
    **{sentence.lower(): "talk" for sentence in SMALL_TALK},
}
