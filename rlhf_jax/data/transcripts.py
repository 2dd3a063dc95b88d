"""Conversations written as one text, "\\n\\nHuman: ...\\n\\nAssistant: ...", cut into messages."""

from __future__ import annotations

import re

MARK = re.compile(r"\n\n(Human|Assistant):")
ROLE = {"Human": "user", "Assistant": "assistant"}


class Unusable(Exception):
    """A well-formed record that teaches nothing; its text is the reason that is counted."""


def messages_of(transcript: str) -> list[dict[str, str]]:
    """The turns of a transcript; white space around a turn belongs to the format and is removed."""
    before, *rest = MARK.split(transcript)
    if before.strip() or not rest:
        raise Unusable("text before the first turn")
    return [{"role": ROLE[who], "content": text.strip()} for who, text in zip(rest[::2], rest[1::2], strict=True)]


def pair_of_transcripts(chosen: str, rejected: str) -> tuple[list[dict[str, str]], list[str]]:
    """``(messages, [chosen response, rejected response])`` of two transcripts that share all but the last turn."""
    good, bad = messages_of(chosen), messages_of(rejected)
    if good[:-1] != bad[:-1]:
        raise Unusable("the transcripts differ before the last turn")
    expected = [("user", "assistant")[i % 2] for i in range(len(good))]
    for side in (good, bad):
        if [message["role"] for message in side] != expected or expected[-1] != "assistant":
            raise Unusable("the turns do not alternate up to the assistant")
        if not all(message["content"] for message in side):
            raise Unusable("an empty turn")
    return good[:-1], [good[-1]["content"], bad[-1]["content"]]
