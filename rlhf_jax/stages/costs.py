"""Costs in a stage of reinforcement learning: where they come from, and what is done about them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.ops.lagrange import Lagrangian, Shaping
from rlhf_jax.rewards.base import Reward, check_reward, has_steps, models_of
from rlhf_jax.sharding import fetch
from rlhf_jax.stages.cost import OF_COSTS
from rlhf_jax.stages.judging import Jury, check_rewards
from rlhf_jax.stages.outputs import Output
from rlhf_jax.stages.responses import Prompts
from rlhf_jax.stages.rollouts import Conversations, JudgeOfParts
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.types import Rollout, Scores

if TYPE_CHECKING:
    from rlhf_jax.stages.reinforce import Reinforce


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a policy is to avoid, and how hard.

    Args:
        of: the stage or path of a cost model, or any other value of ``rlhf_jax.rewards``; the higher, the worse, and
            unsafe above 0. ``TaskCosts`` are those of a built-in task.
        by: ``Lagrangian`` bounds the mean cost, with a critic and a multiplier of its own (PPO with separate critics);
            ``Shaping`` subtracts a fixed weight of it from the score (every method).
        gold: a cost to watch and not to train on.
    """

    of: Reward = "cost"
    by: Lagrangian | Shaping = Lagrangian()
    gold: Reward | None = None

    @property
    def sources(self) -> list[Reward]:
        """The costs to train on and to watch."""
        return [self.of] if self.gold is None else [self.of, self.gold]

    def check_stage(self, stage: Reinforce) -> None:
        """Whether a stage can do with this."""
        for name, source in zip(("of", "gold"), self.sources, strict=False):
            check_reward(source, f"stages.{stage.name}.cost.{name}")
            if has_steps(source):
                raise UserError("a cost of steps", at=f"{stage.name}.cost.{name}", fix="take one of whole responses",
                                expected="one cost for each response")  # fmt: skip
        if isinstance(self.by, Shaping):
            return
        if isinstance(stage.ppo, GroupPolicy) or stage.critic not in ("reward", "policy"):
            raise UserError(f"cost=Cost(by=Lagrangian(...)) with critic={stage.critic!r}", at=stage.name,
                            expected="critic='reward' or 'policy': the multiplier weighs the advantages of two "
                            "separate critics", fix="change critic, or take by=Shaping(weight)")  # fmt: skip
        if stage.ppo.score_scale is not None:
            raise UserError("score_scale with a Lagrangian", at=f"{stage.name}.ppo", fix="leave score_scale out",
                            expected="scores as they are, which the multiplier weighs against costs")  # fmt: skip
        if stage.ppo.score_scale is not None:
            raise UserError("score_scale with a Lagrangian", at=f"{stage.name}.ppo", expected="score_scale=None: the "
                            "multiplier weighs rewards and costs in their own units", fix="leave it out")  # fmt: skip
        if stage.critic == "reward" and not isinstance(self.of, str):
            raise UserError("critic='reward' with a cost that is no single model", at=f"{stage.name}.cost",
                            expected="the stage or path of a cost model, which the cost critic starts from",
                            fix="set critic='policy'")  # fmt: skip

    def check(self, stage: Reinforce, workspace: Workspace, prompts: Prompts) -> None:
        """Find what is wrong with its models and records before anything is trained."""
        for name, source in zip(("of", "gold"), self.sources, strict=False):
            check_rewards(source, workspace, prompts, f"stages.{stage.name}.cost.{name}", stage.name)

    def check_output(self, outputs: Mapping[str, Output], stage: str) -> None:
        """A single model in the place of a cost is one of costs: a reward model's sign is the other way round."""
        for source in self.sources:
            if isinstance(source, str) and not outputs[source].notes.get(OF_COSTS):
                raise UserError(f"{source!r} is no cost model", at=f"stages.{stage}.cost", expected="what TrainCost "
                                "has trained", fix="name its stage, or turn a reward into a cost by a Scale with a "
                                "negative factor")  # fmt: skip


def models_of_costs(cost: Cost | None) -> list[tuple[str, str]]:
    """The stages or paths that costs read, and of which kind each is."""
    return [] if cost is None else [model for source in cost.sources for model in models_of(source)]


@dataclass(frozen=True)
class CostJudge:
    """A judge that also tells costs; see ``with_costs``."""

    by: Lagrangian | Shaping
    workspace: Workspace
    judge: JudgeOfParts
    cost: Jury
    gold: Jury | None
    prompts: Prompts

    def __call__(self, rollout: Rollout, said: Conversations | None = None) -> tuple[Scores, Mapping[str, float]]:
        return self.conclude(rollout, [self.begin(rollout, said)()])

    def begin(self, part: Rollout, said: Conversations | None = None) -> Callable[[], Any]:
        answers = functools.cache(lambda: self.prompts.answers(fetch(part), self.workspace.tokenizer, said))
        first = self.judge.begin(part, said)
        rest = [jury.begin(part, answers) for jury in (self.cost, self.gold) if jury is not None]
        return lambda: (first(), [hear() for hear in rest])

    def conclude(self, rollout: Rollout, found: Sequence[Any]) -> tuple[Scores, Mapping[str, float]]:
        scores, metrics = self.judge.conclude(rollout, [one for one, _ in found])
        given = self.cost.conclude([heard[0] for _, heard in found])
        costs = given.values.total
        told = {"cost/mean": float(costs.mean()), "cost/unsafe": float((costs > 0).mean())}
        told |= {f"cost/{name}": value for name, value in given.notes.items()}
        if self.gold is not None:
            watched = self.gold.conclude([heard[1] for _, heard in found]).values.total
            told |= {"cost/gold": float(watched.mean()), "cost/gold_unsafe": float((watched > 0).mean())}
        if isinstance(self.by, Shaping):
            told["cost/unshaped_score"] = float(np.asarray(scores.score).mean())
            shaped = np.asarray(scores.score) - np.float32(self.by.weight) * costs.astype(np.float32)
            scores = dataclasses.replace(scores, score=shaped)
        return dataclasses.replace(scores, cost=costs.astype(np.float32)), {**metrics, **told}


def with_costs(
    stage: Reinforce, workspace: Workspace, judge: JudgeOfParts, cost: Jury, gold: Jury | None, prompts: Prompts
) -> JudgeOfParts:
    """A judge that also tells costs, and subtracts them from the score where ``stage.cost`` says so."""
    assert stage.cost is not None
    return CostJudge(stage.cost.by, workspace, judge, cost, gold, prompts)
