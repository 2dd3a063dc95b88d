"""What is measured: one architecture and the shapes of the three measurements, the same on both sides.

Standard library only, because both environments import it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """A GPT-2 (pre-norm, learned positions, tanh GELU, tied unembedding, no dropout) and the batches it is given."""

    vocab: int = 8192
    width: int = 384
    layers: int = 6
    heads: int = 6
    context: int = 256
    step_rows: int = 8
    """Rows of ``context`` tokens in one training step."""
    steps: int = 4
    """Training steps in one timing."""
    prompts: int = 32
    shortest_prompt: int = 16
    longest_prompt: int = 64
    new_tokens: int = 128
    epochs: int = 4
    minibatches: int = 4
    """Updates in one PPO epoch, each on ``prompts / minibatches`` rows."""
    learning_rate: float = 1e-4

    @property
    def parameters(self) -> int:
        """Weights of the language model; the tied unembedding counts once."""
        block = 12 * self.width**2 + 13 * self.width
        return (self.vocab + self.context) * self.width + self.layers * block + 2 * self.width

    def prompt_lengths(self) -> list[int]:
        """Ragged lengths, spread evenly from the shortest to the longest."""
        span = self.longest_prompt - self.shortest_prompt
        return [self.shortest_prompt + round(row * span / max(self.prompts - 1, 1)) for row in range(self.prompts)]


FULL = Sizes()
TINY = Sizes(
    vocab=64, width=16, layers=2, heads=2, context=32, step_rows=2, steps=2,
    prompts=4, shortest_prompt=3, longest_prompt=8, new_tokens=8, epochs=2, minibatches=2,
)  # fmt: skip
PAD, EOS = 0, 1
"""Both sides keep these two tokens out of the random prompts."""
