"""Updates that read each prompt once for all of its responses, as sampling does.

A group of k responses to a prompt of P tokens costs an update ``P + k N`` tokens instead of ``k (P + N)``. Prompts are
read into a cache first, responses go behind it a few rows at a time, and what they ask of the cache goes back through
the prompts at the end. By the law full = prefill, then decode, this changes rounding alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.objectives.critic_free import GroupOptimization, PolicyAlone, prompts_of
from rlhf_jax.objectives.group_experience import GroupExperience
from rlhf_jax.objectives.trimmed import cut, level_of, rising, used_slots
from rlhf_jax.scoring import ReadPrompts, read_prompts
from rlhf_jax.types import Key, Metrics, PyTree


@dataclass(frozen=True)
class SharedPrompts:
    """A group method on minibatches of whole groups, whose rows stand side by side.

    The step does not split such a minibatch; it is split in here, behind the prompts, with rows of about one length
    together. Memory is that of all prompts of the minibatch, and of the rows of one part.

    Args:
        objective: without mixtures of experts, whose reports are sums over all rows.
        samples_per_prompt: rows of a group.
        lengths: each part is cut to the first of these response lengths that holds it, as in ``Trimmed``.
        parts: of equally many rows.
    """

    objective: GroupOptimization
    samples_per_prompt: int
    lengths: tuple[int, ...] = ()
    parts: int = 1

    def __post_init__(self):
        if self.lengths and not rising(self.lengths):
            raise ValueError(f"lengths are {self.lengths}; expected positive numbers of tokens, rising")
        if self.objective.models.policy.routed_layers:
            raise ValueError("a mixture of experts with shared prompts; expected a model without")

    @property
    def models(self) -> PolicyAlone:
        """Those of the objective."""
        return self.objective.models

    def with_weights(self, experience: GroupExperience) -> GroupExperience:
        """The minibatch with its weights."""
        return self.objective.with_weights(experience)

    def loss(
        self, params: PyTree, experience: GroupExperience, key: Key | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """The objective's loss and metrics.

        The gradient is made in here, part by part, so that not all parts are remembered at a time.
        """
        rows = experience.tokens.shape[0]
        if rows % self.samples_per_prompt or rows % self.parts:
            raise ValueError(
                f"{rows} rows; expected whole groups of {self.samples_per_prompt}, which split into {self.parts} parts"
            )

        @jax.custom_vjp
        def summed(params: PyTree) -> tuple[Float[Array, ""], Metrics]:
            return self._with_gradient(params, experience, key)[0]

        def forward(params: PyTree) -> Any:
            return self._with_gradient(params, experience, key)

        def backward(grads: PyTree, cotangents: Any) -> tuple[PyTree]:
            return (jax.tree.map(lambda g, p: (cotangents[0] * g).astype(p.dtype), grads, params),)

        summed.defvjp(forward, backward)
        return summed(params)

    def _with_gradient(
        self, params: PyTree, experience: GroupExperience, key: Key | None
    ) -> tuple[tuple[Float[Array, ""], Metrics], PyTree]:
        policy = self.models.policy

        def read(params: PyTree) -> tuple[ReadPrompts, ReadPrompts]:
            return _apart(read_prompts(policy, params, *prompts_of(experience, self.samples_per_prompt)))

        prompts, back, rest = jax.vjp(read, params, has_aux=True)

        def part(rows: Int[Array, " R"]) -> Any:
            own = jax.tree.map(lambda x: x if jnp.ndim(x) == 0 else x[rows], experience)

            def at(length: int) -> Any:
                def loss(params: PyTree, prompts: ReadPrompts) -> tuple[Float[Array, ""], Metrics]:
                    asked = _joined(prompts, rest).rows(policy, rows // self.samples_per_prompt)
                    return self.objective.loss(params, cut(own, length), key, asked)

                return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

            level, lengths = level_of(own, self.lengths)
            found = jax.lax.switch(level, [at(length) for length in lengths], params, prompts)
            return jax.tree.map(lambda x: x.astype(jnp.float32), found)

        order = jnp.argsort(used_slots(experience), stable=True).reshape(self.parts, -1)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, order[0]))
        (found, (grads, asked)), _ = jax.lax.scan(
            lambda total, rows: (jax.tree.map(jnp.add, total, part(rows)), None), zeros, order
        )
        (through,) = back(jax.tree.map(lambda g, x: g.astype(x.dtype), asked, prompts))
        return found, jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, through)

    def conclude(self, params: PyTree, metrics: Metrics) -> tuple[PyTree, Metrics]:
        """The objective's own."""
        return self.objective.conclude(params, metrics)


def _apart(prompts: ReadPrompts) -> tuple[ReadPrompts, ReadPrompts]:
    """The floats of read prompts, and the rest, which has no gradient; None in place of the others."""

    def kept(floating: bool) -> ReadPrompts:
        return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) == floating else None, prompts)

    return kept(True), kept(False)


def _joined(floats: ReadPrompts, rest: ReadPrompts) -> ReadPrompts:
    return jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=lambda x: x is None)
