"""Updates on rows cut to a few lengths, so that short responses do not cost what the longest one does.

Losses do not depend on padding, so this changes their rounding alone. All lengths are compiled into the one program of
the step, which takes the branch that its rows need: nothing is compiled later, and the host is not asked.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.meshes import active_mesh
from rlhf_jax.types import Key, Metrics, PyTree


@dataclass(frozen=True)
class Trimmed:
    """An objective on experience whose microbatches are cut to the first of ``lengths`` that holds their responses.

    Rows of a minibatch are sorted before it is split, so that those of one microbatch are about equally long (on a mesh
    they stay where they are). A metric that is a maximum of each microbatch depends on which rows meet in one.

    Args:
        objective: has ``with_weights``, ``loss`` and ``conclude``.
        lengths: of responses in tokens, rising; the width of the rollout follows them by itself.
        microbatches: that the step splits a minibatch into.
    """

    objective: Any
    lengths: tuple[int, ...]
    microbatches: int = 1

    def __post_init__(self):
        if not self.lengths or not rising(self.lengths):
            raise ValueError(f"lengths are {self.lengths}; expected positive numbers of tokens, rising")

    @property
    def models(self) -> Any:
        """Those of the objective."""
        return self.objective.models

    def with_weights(self, experience: Any) -> Any:
        """The minibatch with its weights, in an order in which microbatches have rows of about one length."""
        experience = self.objective.with_weights(experience)
        if self.microbatches == 1 or active_mesh() is not None:
            return experience
        order = by_length(experience, self.microbatches)
        return jax.tree.map(lambda x: x if jnp.ndim(x) == 0 else x[order], experience)

    def loss(self, params: PyTree, experience: Any, key: Key | None = None) -> tuple[Float[Array, ""], Metrics]:
        """The objective's loss and metrics, of rows that are as short as they may be."""
        level, lengths = level_of(experience, self.lengths)

        def at(length: int) -> Any:
            return lambda params: self.objective.loss(params, cut(experience, length), key)

        # A gradient through the switch would keep what every branch wants to remember, so each branch takes its own.
        @jax.custom_vjp
        def chosen(params: PyTree) -> tuple[Float[Array, ""], Metrics]:
            return jax.lax.switch(level, [at(length) for length in lengths], params)

        def forward(params: PyTree) -> Any:
            branches = [jax.value_and_grad(at(length), has_aux=True) for length in lengths]
            return jax.lax.switch(level, branches, params)

        def backward(grads: PyTree, cotangents: Any) -> tuple[PyTree]:
            return (jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), grads),)

        chosen.defvjp(forward, backward)
        return chosen(params)

    def conclude(self, params: PyTree, metrics: Metrics) -> tuple[PyTree, Metrics]:
        """The objective's own."""
        return self.objective.conclude(params, metrics)


def rising(lengths: tuple[int, ...]) -> bool:
    """Whether these are positive numbers, each above the one before."""
    return list(lengths) == sorted(set(lengths)) and all(isinstance(n, int) and n >= 1 for n in lengths)


def level_of(experience: Any, lengths: tuple[int, ...]) -> tuple[Int[Array, ""], tuple[int, ...]]:
    """Which of the lengths these rows are to be cut to, and the lengths with that of the whole behind them."""
    whole = experience.response_mask.shape[1]
    lengths = (*(n for n in lengths if n < whole), whole)
    return jnp.searchsorted(jnp.array(lengths), jnp.max(used_slots(experience))), lengths


def by_length(experience: Any, parts: int) -> Int[Array, "B"]:
    """An order of rows in which those of one part are about equally long; part i of m takes rows i, i + m, ..."""
    rows = experience.tokens.shape[0]
    return jnp.argsort(used_slots(experience), stable=True).reshape(parts, rows // parts).T.reshape(-1)


def cut(experience: Any, length: int) -> Any:
    """Experience, or a rollout, without the response tokens from ``length`` on, of which there must be none.

    Rows get narrower by as many tokens as responses do. With ``routing``, its tokens are cut too.
    """
    whole, width = experience.response_mask.shape[1], experience.tokens.shape[1]
    narrow = width - whole + length

    def shorter(name: str, x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if name == "routing":
            return x[:, :, :narrow]
        if name == "tokens":
            return x[:, :narrow]
        return x[:, :length] if x.ndim == 2 and x.shape[1] == whole else x

    fields = (field.name for field in dataclasses.fields(experience))
    return dataclasses.replace(experience, **{name: shorter(name, getattr(experience, name)) for name in fields})


def used_slots(experience: Any) -> Int[Array, "B"]:
    """How many slots of each row's response matter: its tokens, and states with a value behind them."""
    used = experience.response_mask | getattr(experience, "value_mask", experience.response_mask)
    return jnp.max(jnp.where(used, jnp.arange(1, used.shape[1] + 1), 0), axis=1)
