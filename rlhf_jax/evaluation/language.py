"""How well a language model predicts held-out text: loss, perplexity, bits per byte."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax.evaluation import estimates
from rlhf_jax.evaluation.estimates import NOTHING, Estimate
from rlhf_jax.models import Transformer
from rlhf_jax.ops.logprobs import token_logprobs
from rlhf_jax.sharding import fetch
from rlhf_jax.types import PyTree, TokenBatch

CHUNK = 8192
"""Positions unembedded at a time."""

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class HeldOut:
    """Scores of a text. Perplexity depends on the tokenizer, bits per byte do not (where ``decode`` was given)."""

    loss: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate
    tokens: int
    bytes: int

    def estimates(self) -> dict[str, Estimate]:
        """By name, without what was not measured."""
        found = {"loss": self.loss, "perplexity": self.perplexity}
        return found if self.bytes == 0 else {**found, "bits_per_byte": self.bits_per_byte}


def held_out(
    model: Transformer, params: PyTree, batches: Iterable[TokenBatch], decode: Decode | None = None
) -> HeldOut:
    """Loss per target token over all batches, in nats, with intervals that resample rows.

    Every target counts once, however batches are cut; the first token of a document is no target (nothing is before
    it), so it adds neither to the loss nor to the bytes. ``decode`` (of the tokenizer) gives the bytes of each row's
    targets; a character that is cut by a row's end is counted as the three bytes of U+FFFD.
    """
    losses, tokens, sizes = [], [], []
    for batch in batches:
        row_losses, row_tokens = fetch(row_loss(model, params, batch))
        losses.append(np.asarray(row_losses, dtype=float))
        tokens.append(np.asarray(row_tokens, dtype=float))
        if decode is not None:
            sizes.append(target_bytes(batch, decode))
    if not losses:
        raise ValueError("no batches to evaluate; expected at least one")
    loss, count = np.concatenate(losses), np.concatenate(tokens)
    size = np.concatenate(sizes) if sizes else np.zeros(0)
    per_token = estimates.ratio(loss, count)
    per_byte = NOTHING if decode is None else estimates.ratio(loss / math.log(2), size)
    return HeldOut(per_token, perplexity(per_token), per_byte, int(count.sum()), int(size.sum()))


def perplexity(loss: Estimate) -> Estimate:
    """``exp(loss)``, interval included."""
    bounds = (float(np.exp(x)) for x in (loss.value, loss.low, loss.high))
    return replace(loss, **dict(zip(("value", "low", "high"), bounds, strict=True)))


def bits_per_byte(loss: float, tokens: int, size: int) -> float:
    r"""Bits per byte of a text of ``size`` bytes from its mean loss in nats: :math:`(T / B) \, loss / \ln 2`."""
    if size < 1:
        raise ValueError(f"a text of {size} bytes; expected at least 1")
    return tokens / size * loss / math.log(2)


@functools.partial(jax.jit, static_argnums=0)
def row_loss(model: Transformer, params: PyTree, batch: TokenBatch) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Summed loss and number of targets of each row. Target ``t`` is predicted from the tokens before it."""

    def apply(method: str, *arguments) -> Any:
        return model.apply({"params": params}, *arguments, method=method)

    hidden, _, _ = apply("hidden", batch.tokens, batch.context)
    unembed = functools.partial(apply, "unembed")
    logprobs, _ = token_logprobs(hidden[:, :-1], unembed, batch.tokens[:, 1:], chunk=CHUNK, entropy=False)
    weights = batch.loss_mask[:, 1:]
    return -jnp.sum(logprobs * weights, axis=1), jnp.sum(weights, axis=1)


def target_bytes(batch: TokenBatch, decode: Decode) -> Int[np.ndarray, " B"]:
    """UTF-8 bytes of each row's targets (special tokens decode to nothing)."""
    tokens, targets = np.asarray(batch.tokens), np.asarray(batch.loss_mask) > 0
    targets[:, 0] = False
    rows = (row[kept].tolist() for row, kept in zip(tokens, targets, strict=True))
    return np.array([len(decode(row).encode()) for row in rows])
