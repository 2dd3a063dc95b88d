"""What rl.py measures: one model, prompts, lengths and group, the same on both sides.

Standard library only, because both environments import it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sizes import Sizes


@dataclass(frozen=True)
class Case:
    """A GPT-2 (sizes.py) that answers ``prompts * group`` times before each update.

    The policy ends responses by a schedule: their lengths are log-normal with ``median`` and ``sigma`` tokens, cut at
    ``new_tokens``. Three coordinates of the residual stream are reserved for it, which no layer writes: positions put
    a large pair of numbers into two of them, which fixes the scale of the last norm, and the logit of EOS into the
    third; the embedding of EOS reads that, and no other token has anything in the three. Everything else is an
    ordinary model at its random start. ``median`` None never ends a response early.
    """

    model: Sizes = Sizes()
    prompt: int = 48
    new_tokens: int = 128
    prompts: int = 8
    group: int = 8
    microbatches: int = 8
    peer_microbatches: int = 8
    """Each side cuts an update as it is fastest."""
    slots: int = 32
    """Places of the part refill."""
    regroup: tuple[int, ...] = (16, 32, 48, 80)
    """Where our iterations let finished rows leave."""
    lengths: tuple[int, ...] = (16, 32, 48, 64, 96)
    """Response lengths that our updates are cut to, besides the longest."""
    median: float | None = 24.0
    sigma: float = 1.0
    learning_rate: float = 1e-6
    pool: int = 256
    """Different prompts; every rollout takes the next ones."""

    @property
    def responses(self) -> int:
        return self.prompts * self.group

    def logits(self) -> list[float]:
        """The logit of EOS after each response token so far (0 to ``new_tokens - 1``), beside logits near 0."""
        others = math.log(self.model.vocab - 1)
        return [max(-NEVER, math.log(h / (1 - h)) + others if 0 < h < 1 else -NEVER) for h in self.hazards()]

    def hazards(self) -> list[float]:
        """The probability that a response which has not ended yet ends with its next token."""
        if self.median is None:
            return [0.0] * self.new_tokens
        median, sigma = self.median, self.sigma

        def below(t: float) -> float:
            return 0.5 * (1 + math.erf(math.log(t / median) / sigma / math.sqrt(2))) if t > 0 else 0.0

        ends = [0.0, *(below(t + 0.5) for t in range(1, self.new_tokens + 1))]
        return [(after - before) / (1 - before) for before, after in zip(ends, ends[1:], strict=False)]


NEVER = 30.0
"""Minus the logit of EOS where a response must not end."""
PAIR = 40.0
"""The large pair of numbers."""

TINY_MODEL = Sizes(vocab=64, width=16, layers=2, heads=2, context=32)
CASES = {
    "long-tailed lengths": Case(),
    "no response ends early": Case(median=None, lengths=()),
}
TINY = {
    "long-tailed lengths": Case(TINY_MODEL, 6, 16, 2, 4, 2, 1, 4, (6,), (8,), 5.0, pool=8),
    "no response ends early": Case(TINY_MODEL, 6, 16, 2, 4, 2, 1, 4, (6,), (), None, pool=8),
}
EOS, PAD = 1, 0
EOS_AT, FIRST, SECOND = 0, 1, 2
"""Reserved coordinates."""


def good(tokens: list[int]) -> float:
    """The reward, in plain Python: the share of even tokens."""
    return sum(token % 2 == 0 for token in tokens) / max(len(tokens), 1)
