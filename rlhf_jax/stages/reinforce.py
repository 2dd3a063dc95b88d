"""The stage that optimises a policy against a learned reward or one in plain Python: PPO, group methods, PPO-ptx."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.errors import UserError
from rlhf_jax.models import Transformer, join_lower, split_lower
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.objectives.ppo import PPO
from rlhf_jax.rewards.base import Reward, models_of
from rlhf_jax.rewards.plain import OnError
from rlhf_jax.sampling import Sampling
from rlhf_jax.sharding import Layout, Placement
from rlhf_jax.stages.collecting import against_greedy, later, once, responding, until_signal
from rlhf_jax.stages.costs import Cost, with_costs
from rlhf_jax.stages.freezing import check_shared, completed, parted
from rlhf_jax.stages.judging import check_rewards, judge_of, jury, load_models, ready
from rlhf_jax.stages.language import check_length, text_rows
from rlhf_jax.stages.learners import Objective, batches, begin, preparation, update_step
from rlhf_jax.stages.offloading import kept, rested, woken
from rlhf_jax.stages.outputs import Output
from rlhf_jax.stages.overlap import ahead_of_updates
from rlhf_jax.stages.reinforce_checks import check_fields, check_placement
from rlhf_jax.stages.responses import Prompts, read_prompts
from rlhf_jax.stages.rollouts import Draw, JudgeOfParts, narrowed, sampler
from rlhf_jax.stages.samples import SampleLog
from rlhf_jax.stages.settings import Source, check_schedule
from rlhf_jax.stages.turns import Turns, conversing
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.training.ahead import Begin
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.metrics import MetricsWriter
from rlhf_jax.training.optimizer import Optimizer
from rlhf_jax.training.reinforcement import Plan, Program, reinforce
from rlhf_jax.training.step import init_state
from rlhf_jax.types import PyTree, filled


@dataclass(frozen=True, kw_only=True)
class Ptx:
    """Pretraining gradients mixed into PPO (Ouyang et al. 2022, equation 2).

    Args:
        data: texts.
        length: tokens of a row.
        coef: weight of their loss (InstructGPT: 27.8).
        texts_per_episode: rows of text for each episode (InstructGPT: 8).
    """

    data: tuple[Source, ...]
    length: int
    coef: float = 27.8
    texts_per_episode: int = 8


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """PPO from a fine-tuned policy, or a method without a critic.

    One iteration samples ``prompts_per_iteration * sampling.samples_per_prompt`` responses (the rollout) and makes
    ``epochs * rollout / minibatch`` updates.

    Args:
        policy: the stage or path of the language model to start from.
        reference: that of the reference policy; None takes ``policy``.
        reward: the stage or path of a reward model, or any other reward of ``rlhf_jax.rewards``.
        critic: ``reward`` starts it from the reward model (the first of several), ``policy`` from the policy's trunk
            with a head of zeros, ``shared`` is a head of zeros on the policy's own trunk; None is for group methods,
            which have none.
        prompts: what is answered.
        prompt_length: longest prompt in tokens.
        sampling: how responses are drawn.
        ppo: the algorithm's choices; with ``critic=None`` those of a group method.
        optimizer: its ``groups`` may give policy and critic learning rates of their own.
        ptx: pretraining gradients; None for plain PPO.
        frozen_rounds: so many of the policy's first rounds (see ``Transformer.repeats``), and its embeddings, are not
            trained. They have no optimizer state, and the reference shares them (trlX: ``num_layers_unfrozen``).
        ema_decay: of an average of the weights (InstructGPT: 0.992), which then is what the stage leaves.
        gold: a reward to watch and not to train on; any that ``reward`` may be.
        cost: what to avoid, and how; None for nothing.
        on_error: whether a response whose reward raises or is not finite stops the run by name, or is left out of the
            loss (``drop``).
        too_long: whether a prompt over ``prompt_length`` is an error or left out.
        rows_at_a_time: rollout rows in a forward pass without gradient; None takes all.
        more_batches: of prompts that an iteration may draw on top of its own, until as many groups as it needs have
            scores that are not all equal (DAPO's dynamic sampling; a GroupPolicy).
        critic_warmup: iterations at the start in which the critic learns and the policy stays (separate models).
        replay_routing: for mixtures of experts, see ``PolicyOptimization.replay``.
        offload: what waits in the host's memory while it is not needed: ``reference`` and ``reward`` models, except
            when they score a rollout, and the ``optimizer``'s state, except during updates. Each costs a transfer to
            and fro in every iteration.
        turns: an environment that answers the policy, and the bounds of these conversations; None for one response.
        prompt_widths: in tokens; prompts are padded to the first that holds all of an iteration, instead of to
            ``prompt_length``. Programs are compiled once for each width that occurs.
        update_lengths: of responses in tokens; updates are computed on rows cut to the first that holds those of a
            microbatch, see ``objectives.trimmed``; so are the passes before the updates of a group method.
        share_prompts: updates (and the reference) read each prompt once for all of its responses, which stay in one
            minibatch; ``microbatches`` then split the responses alone. The same losses but for rounding. For group
            methods on one device, without ``ptx`` and mixtures of experts; see ``objectives.shared_prompts``.
        rollout_parts: the prompts of an iteration are drawn in so many parts, one after the other; each is judged on
            the host while the device draws the next. The same responses and scores, see docs/generation.md.
        ahead: 1 draws and judges each rollout during the updates of the iteration before, with the policy from before
            these; so all but the first come from a policy that is one iteration old. 0 waits for the updates.
        sampling_layout: the mesh to sample on; None takes that of training, with its context axis added to the data
            axis, since a decode step has one token of each row. The policy moves between the two on the devices.
    """

    policy: str = "sft"
    reference: str | None = None
    reward: Reward = "reward"
    critic: Literal["reward", "policy", "shared"] | None = "reward"
    prompts: tuple[Source, ...]
    prompt_length: int
    sampling: Sampling
    ppo: PPO | GroupPolicy
    optimizer: Optimizer
    iterations: int
    prompts_per_iteration: int
    minibatch: int
    microbatches: int = 1
    epochs: int = 1
    ptx: Ptx | None = None
    frozen_rounds: int = 0
    ema_decay: float | None = None
    gold: Reward | None = None
    cost: Cost | None = None
    on_error: OnError = "stop"
    too_long: Literal["error", "drop"] = "error"
    rows_at_a_time: int | None = None
    more_batches: int = 0
    critic_warmup: int = 0
    replay_routing: bool = False
    offload: tuple[Literal["reference", "reward", "optimizer"], ...] = ()
    prompt_widths: tuple[int, ...] = ()
    update_lengths: tuple[int, ...] = ()
    share_prompts: bool = False
    rollout_parts: int = 1
    ahead: int = 0
    sampling_layout: Layout | None = None
    turns: Turns | None = None
    save_every: int = 20
    samples_every: int = 10
    name: str = "ppo"

    def __post_init__(self):
        check_fields(self)

    @property
    def scalars(self) -> list[str]:
        """Stages or paths of the reward models in ``reward``."""
        return [reference for reference, kind in models_of(self.reward) if kind == "scalar"]

    @property
    def response_length(self) -> int:
        """Tokens behind a prompt at most, those of an environment included."""
        return self.sampling.max_new_tokens if self.turns is None else self.turns.length

    @property
    def rollout(self) -> int:
        """Responses of an iteration."""
        return self.prompts_per_iteration * self.sampling.samples_per_prompt

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.iterations * self.epochs * (self.rollout // self.minibatch)

    @property
    def episodes(self) -> int:
        """Responses of the whole stage."""
        return self.iterations * self.rollout

    @property
    def transformation(self) -> optax.GradientTransformation:
        """The optimizer; the policy waits while its critic warms up."""
        wait = self.critic_warmup * self.epochs * (self.rollout // self.minibatch)
        return self.optimizer.build(self.updates, ("policy", wait) if wait else None)

    def check(self, workspace: Workspace) -> None:
        check_length(workspace, self.prompt_length + self.response_length, self.name)
        for field in ("policy", "reference"):
            if getattr(self, field) is not None:
                workspace.check_reference(getattr(self, field), f"stages.{self.name}.{field}", self.name, Transformer)
        if not 0 <= self.frozen_rounds < workspace.model.repeats:
            raise UserError(f"frozen_rounds={self.frozen_rounds}", at=f"stages.{self.name}",
                            expected=f"from 0 to {workspace.model.repeats - 1}, as the model has "
                            f"{workspace.model.repeats} rounds and one must learn", fix="lower it")  # fmt: skip
        check_schedule(self.optimizer, self.updates, f"stages.{self.name}.optimizer")
        prompts = self._prompts(workspace)
        check_rewards(self.reward, workspace, prompts, f"stages.{self.name}.reward", self.name)
        if self.gold is not None:
            check_rewards(self.gold, workspace, prompts, f"stages.{self.name}.gold", self.name)
        if self.cost is not None:
            self.cost.check(self, workspace, prompts)
        if self.turns is not None:
            self.turns.check(self, workspace, prompts)
        check_placement(self, workspace.placement)
        if self.share_prompts and workspace.model.routed_layers:
            raise UserError("share_prompts=True for a mixture of experts", at=f"stages.{self.name}",
                            expected="a model without", fix="set share_prompts=False")  # fmt: skip
        if self.ptx is not None:
            check_length(workspace, self.ptx.length, self.name)
            text_rows(workspace, self.ptx.data, self.ptx.length, self.name)

    def run(self, workspace: Workspace) -> None:
        folder, at = workspace.stage_folder(self.name), f"stages.{self.name}"
        policy = workspace.output(self.policy, f"{at}.policy", Transformer)
        reference = (
            policy if self.reference is None else workspace.output(self.reference, f"{at}.reference", Transformer)
        )
        rewards = [self.reward] if self.gold is None else [self.reward, self.gold]
        costs = [] if self.cost is None else self.cost.sources
        judges = load_models([*rewards, *costs], workspace, f"{at}.reward")
        if self.cost is not None:
            self.cost.check_output(judges, self.name)
        scorer = judges[self.scalars[0]] if self.scalars else None
        placement, ema = workspace.placement, self.ema_decay is not None
        objective, params = begin(self, workspace, policy, scorer, judges)
        optimizer = self.transformation
        placed, below = parted(objective.models, objective.models.placed(placement), self.frozen_rounds)
        params, frozen = parted(objective.models, params, self.frozen_rounds)
        shardings = placement.state(optimizer, params, placed, ema, below)
        state = init_state(params, optimizer, ema=ema, frozen=frozen, shardings=shardings)
        compared = not isinstance(self.ppo, GroupPolicy) or self.ppo.uses_reference
        ref_params = self._reference(policy, reference) if compared else lambda policy: None
        models = ready(judges, "reward" in self.offload)
        del policy, reference, judges, scorer, params, frozen  # what was parked lies on the devices no more
        prompts = self._prompts(workspace)
        juries = [jury(reward, models, workspace, self.rows_at_a_time, self.on_error) for reward in rewards]
        samples = SampleLog(folder / "samples.jsonl", self.samples_every)
        judge = judge_of(self, workspace, juries[0], juries[1] if juries[1:] else None, prompts, samples)
        if costs:
            judged = [jury(source, models, workspace, self.rows_at_a_time) for source in costs]
            judge = with_costs(self, workspace, judge, judged[0], judged[1] if judged[1:] else None, prompts)
        streams = {}
        if self.ptx is not None:
            texts = text_rows(workspace, self.ptx.data, self.ptx.length, self.name)
            rows = self.minibatch * self.ptx.texts_per_episode
            streams["text"] = workspace.batches(self.name, "text", [texts], rows)
        prepare, collect = preparation(objective), self._begin(workspace, objective, judge, prompts)
        program = Program(
            collect=lambda *given: collect(*given)(),
            prepare=lambda params, rollout, scores, controller: prepare(
                params,
                ref_params(objective.models.policy_params(params)),
                rollout,
                jax.tree.map(jnp.asarray, scores),
                controller,
            ),
            batch=batches(self, objective, placement),
            update=update_step(self, objective, optimizer, shardings),
            control=lambda controller, scores, metrics: objective.control(controller, metrics, self.rollout, scores),
            rest=rested if "optimizer" in self.offload else lambda state: state,
            wake=woken if "optimizer" in self.offload else lambda state: state,
            ahead=ahead_of_updates(self, objective, collect) if self.ahead else None,
        )
        with MetricsWriter(folder / "metrics.jsonl", workspace.sinks(self.name)) as metrics:
            state = reinforce(
                program,
                Plan(
                    iterations=self.iterations,
                    minibatch=self.minibatch,
                    epochs=self.epochs,
                    together=self.sampling.samples_per_prompt if self.share_prompts else 1,
                    streams=streams,
                ),
                state,
                objective.start(),
                narrowed(
                    workspace.batches(self.name, "prompts", [prompts.table.rows], self.prompts_per_iteration),
                    self.prompt_widths,
                ),
                key=workspace.key(self.name, "train"),
                checkpoints=Checkpoints(folder / "checkpoints", every=self.save_every),
                metrics=metrics,
                stop=workspace.stop,
                prefix=self.name,
                on_row=workspace.watch(self.name, self.iterations),
            )
        left = state.whole if state.ema is None else filled(state.ema, state.frozen)
        trained = objective.models.policy_params(left)
        trained = join_lower(trained) if self.frozen_rounds else trained
        notes = {"stage": self.name, "iterations": self.iterations, "episodes": self.episodes}
        workspace.save(self.name, Output(workspace.model, trained, workspace.tokenizer, notes))

    def _begin(self, workspace: Workspace, objective: Objective, judge: JudgeOfParts, prompts: Prompts) -> Begin:
        """How an iteration comes to its rollout."""
        models, samples = objective.models, self.sampling.samples_per_prompt
        policy_params = (lambda copied: copied) if self.ahead else models.policy_params
        drawing = self.sampling_placement(workspace.placement)

        def drawn(sampling: Sampling) -> Draw:
            return sampler(workspace, models.policy, policy_params, sampling, drawing)

        if self.turns is None:
            respond = responding(drawn(self.sampling), judge, self.rollout_parts)
        else:
            respond = later(conversing(
                self.turns, drawn(self.sampling), drawn(replace(self.sampling, samples_per_prompt=1)), judge, prompts,
                tokenizer=workspace.tokenizer, chat=workspace.chat, max_new_tokens=self.sampling.max_new_tokens,
                placement=workspace.placement,
            ))  # fmt: skip
        if isinstance(self.ppo, GroupPolicy) and self.ppo.baseline == "greedy":
            greedy = replace(self.sampling, greedy=True, samples_per_prompt=1, record_routing=False, slots=None)
            respond = against_greedy(respond, responding(drawn(greedy), judge, self.rollout_parts), samples)
        if not self.more_batches:
            return once(respond)
        return until_signal(respond, samples, self.more_batches, workspace.placement)

    def _reference(self, policy: Output, reference: Output) -> Callable[[PyTree], PyTree]:
        """Gives the reference's parameters, for the policy's; frozen ones are the policy's own."""
        parked = "reference" in self.offload
        if not self.frozen_rounds:
            whole = kept(reference.params, parked)
            return lambda policy: whole()
        below, rest = split_lower(reference.params, self.frozen_rounds)
        if reference is not policy:
            check_shared(split_lower(policy.params, self.frozen_rounds)[0], below, f"stages.{self.name}.reference")
        own = kept(rest, parked)
        return lambda policy: completed(own(), policy)

    def sampling_placement(self, placement: Placement) -> Placement:
        return placement.folded() if self.sampling_layout is None else self.sampling_layout.place()

    def _prompts(self, workspace: Workspace) -> Prompts:
        return read_prompts(workspace, self.prompts, self.prompt_length, self.too_long, self.name)
