"""How responses are drawn, as a value."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from rlhf_jax.errors import UserError
from rlhf_jax.ops.filters import filter_logits


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_new_tokens: a response ends here at the latest.
        temperature: logits are divided by it.
        top_k: 0 for all tokens; see ``ops.filters`` for the exact meaning of the filters and their order.
        top_p: 1 for all tokens.
        min_p: 0 for all tokens.
        greedy: take the most probable token (the first of equals) instead. Temperature and filters are then ignored,
            and log-probabilities are those of the unmodified distribution.
        stop_tokens: tokens that end a response as EOS does; like EOS they are part of it.
        samples_per_prompt: responses to each prompt, which share its prefill.
        record_routing: keep the experts that each token was sent to, for ``PolicyOptimization(replay=True)``.
        slots: rows that decode at a time; one that is finished hands its place to the next response in the queue, so
            that a long response does not hold the others up. None decodes all rows together. What is drawn is the same.
        regroup: numbers of new tokens, rising. The cache has room for the first, and grows at each of them; there rows
            that are finished leave. For rows that decode together; what is drawn is the same.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False
    stop_tokens: tuple[int, ...] = ()
    samples_per_prompt: int = 1
    record_routing: bool = False
    slots: int | None = None
    regroup: tuple[int, ...] = ()

    def __post_init__(self):
        self._require("max_new_tokens", self.max_new_tokens >= 1, "an integer of at least 1", integer=True)
        self._require("samples_per_prompt", self.samples_per_prompt >= 1, "an integer of at least 1", integer=True)
        fine = self.slots is None or (isinstance(self.slots, int) and self.slots >= 1)
        self._require("slots", fine, "an integer of at least 1, or None to decode all rows together")
        fine = all(isinstance(n, int) and n >= 1 for n in self.regroup) and list(self.regroup) == sorted(
            {*self.regroup}
        )
        self._require("regroup", fine, "positive numbers of new tokens, rising")
        self._require("regroup", not self.regroup or self.slots is None, "() with slots, which refill rows instead")
        self._require("top_k", self.top_k >= 0, "an integer of at least 0 (0 keeps all tokens)", integer=True)
        self._require("top_p", 0 < self.top_p <= 1, "a number in (0, 1] (1 keeps all tokens)")
        self._require("min_p", 0 <= self.min_p < 1, "a number in [0, 1) (0 keeps all tokens)")
        warm = 0 < self.temperature < math.inf
        self._require("temperature", self.greedy or warm, "a positive number (greedy=True takes the likeliest token)")
        if not isinstance(self.stop_tokens, tuple):
            raise UserError(f"{self.stop_tokens!r}", at="Sampling.stop_tokens", expected="a tuple of token ids")

    def _require(self, name: str, fine: bool, expected: str, integer: bool = False) -> None:
        value = getattr(self, name)
        if not fine or (integer and not isinstance(value, int)):
            raise UserError(f"{value!r}", at=f"Sampling.{name}", expected=expected)

    def filter(
        self, logits: Float[Array, "*rows V"], keep: Int[Array, "*rows"] | None = None
    ) -> Float[Array, "*rows V"]:
        """Logits of the distribution that responses are drawn from; ``keep`` as in ``ops.filters``."""
        if self.greedy:
            return logits
        return filter_logits(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, keep=keep
        )
