"""A policy trained by group methods: where parameters meet the arithmetic of ``group.py``. There is no critic.

Dropout stays off here, as in the sampler: with it the first ratio would not be 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.models import Transformer
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.objectives.group_experience import GroupExperience
from rlhf_jax.objectives.mixture import conclude, routing_terms
from rlhf_jax.objectives.policy import by_rows
from rlhf_jax.objectives.trimmed import by_length, cut, level_of
from rlhf_jax.ops.meshes import active_mesh
from rlhf_jax.sampling import Sampling
from rlhf_jax.scoring import ReadPrompts, read_prompts, response_logprobs, score_responses
from rlhf_jax.sharding import Placement
from rlhf_jax.types import Key, Metrics, PyTree, Rollout, Scores


@dataclass(frozen=True)
class PolicyAlone:
    """No critic: the parameters to train are the language model's own."""

    policy: Transformer

    def placed(self, placement: Placement) -> PyTree:
        """Shardings of the parameters to train; None on one device."""
        return placement.params(self.policy)

    def policy_params(self, params: PyTree) -> PyTree:
        """Parameters of the language model, as the sampler takes them."""
        return params


@dataclass(frozen=True)
class GroupOptimization:
    """A group method on a policy, as ``prepare``, ``with_weights`` and ``loss``.

    Args:
        group: the choices.
        models: the policy.
        sampling: how rollouts are drawn; log-probabilities are those of that distribution.
        rows: rollout rows that ``prepare`` puts through a model at a time; None takes all.
        chunk: positions to unembed at a time; None leaves it to ``scoring``.
        replay: train with the experts that the rollout's tokens were sent to, see ``PolicyOptimization``.
        lengths: ``prepare`` cuts the rows that it puts through a model together to the first of these response lengths
            that holds them, as ``Trimmed`` does in updates.
        share_prompts: ``prepare`` reads each prompt once for all of its responses; for updates see ``SharedPrompts``.
    """

    group: GroupPolicy
    models: PolicyAlone
    sampling: Sampling
    rows: int | None = None
    chunk: int | None = None
    replay: bool = False
    lengths: tuple[int, ...] = ()
    share_prompts: bool = False

    def start(self) -> PyTree:
        """The controller before the first rollout."""
        return self.group.start()

    def control(self, controller: PyTree, metrics: Metrics, episodes: int, scores: Scores) -> PyTree:
        """The controller after a rollout of so many episodes with these metrics and scores."""
        del scores
        return self.group.control(controller, metrics, episodes)

    def prepare(
        self,
        params: PyTree,
        ref_params: PyTree,
        rollout: Rollout,
        scores: Scores,
        controller: PyTree,
    ) -> GroupExperience:
        """Experience from a whole rollout and its scores. No gradient, and no model where the choices need none.

        Args:
            params: of the policy, the same that the rollout was sampled with.
            ref_params: of the reference policy; not read without a KL penalty.
            rollout: sampled responses, those to one prompt side by side.
            scores: what the rewards say of the responses.
            controller: see ``start``.
        """

        def logprobs(params: PyTree) -> Float[Array, "B N"]:
            model, copies = self.models.policy, self.sampling.samples_per_prompt
            asked = prompts_of(rollout, copies) if self.share_prompts else None
            prompts = None if asked is None else read_prompts(model, params, *asked)

            def forward(given: tuple[Rollout, Int[Array, "B"]]) -> Float[Array, "B N"]:
                own, group = given
                read = None if prompts is None else prompts.rows(model, group)
                level, lengths = level_of(own, self.lengths)

                def at(length: int) -> Callable[[], Float[Array, "B N"]]:
                    short, sampling = cut(own, length), self.sampling
                    said = {"entropy": False, "chunk": self.chunk, "prompts": read}
                    rest = [(0, 0), (0, lengths[-1] - length)]
                    return lambda: jnp.pad(response_logprobs(model, params, short, sampling, **said)[0], rest)

                return jax.lax.switch(level, [at(length) for length in lengths])

            total = rollout.tokens.shape[0]
            given = rollout, jnp.arange(total) // copies
            if self.rows is None or not self.lengths or active_mesh() is not None:
                return by_rows(forward, given, self.rows)
            order = by_length(rollout, max(1, total // self.rows))
            sorted_ = jax.tree.map(lambda x: x if x.ndim == 0 else x[order], given)
            return by_rows(forward, sorted_, self.rows)[jnp.argsort(order)]

        return self.group.prepare(
            rollout,
            scores.score,
            self.sampling.samples_per_prompt,
            controller,
            ref_logprobs=logprobs(ref_params) if self.group.uses_reference else None,
            logprobs=None if self.group.correction is None else logprobs(params),
            token_rewards=scores.token_rewards,
            steps=scores.steps,
            judged=scores.used,
            greedy=scores.baseline,
        )

    def rollout_metrics(self, experience: GroupExperience) -> Metrics:
        """What a rollout was like, before any update."""
        return self.group.rollout_metrics(experience, self.sampling.samples_per_prompt)

    def with_weights(self, experience: GroupExperience) -> GroupExperience:
        """The minibatch with its weights. Before any split of it."""
        return self.group.with_weights(experience)

    def loss(
        self,
        params: PyTree,
        experience: GroupExperience,
        key: Key | None = None,
        prompts: ReadPrompts | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The policy loss and its metrics. ``key`` is not used; ``prompts`` are those of the rows, if read before."""
        del key
        rollout = experience.rollout
        scored = score_responses(
            self.models.policy, params, rollout, self.sampling, chunk=self.chunk, replay=self.replay, prompts=prompts
        )
        assert scored.entropy is not None
        loss, metrics = self.group.policy_loss(scored.logprobs, scored.entropy, experience)
        rows, real = experience.token_weights.sum(axis=1), rollout.context.segments > 0
        routed, found = routing_terms(scored.aux, rows, real)
        return loss + routed, metrics | found

    def conclude(self, params: PyTree, metrics: Metrics) -> tuple[PyTree, Metrics]:
        """After the update: the load of experts as numbers. Their biases stay, as the policy is what sampled."""
        return params, conclude(self.models.policy, params, metrics, frozen=True)[1]


def prompts_of(rollout: Any, copies: int) -> tuple[Int[Array, "P W"], Int[Array, "P"]]:
    """Tokens and lengths of the prompts of a rollout, or of experience, each of which has ``copies`` rows in turn."""
    width = rollout.tokens.shape[1] - rollout.response_mask.shape[1]
    return rollout.tokens[::copies, :width], rollout.prompt_lengths[::copies]
