"""What a stage of reinforcement learning refuses, before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_jax.errors import UserError
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.objectives.trimmed import rising
from rlhf_jax.rewards.base import check_reward, has_steps
from rlhf_jax.sharding import Placement
from rlhf_jax.stages.offloading import OFFLOADABLE
from rlhf_jax.stages.overlap import check_one_device, check_overlap

if TYPE_CHECKING:
    from rlhf_jax.stages.reinforce import Reinforce


def check_fields(stage: Reinforce) -> None:
    """Fields that do not go together, whatever the run."""
    if stage.critic not in ("reward", "policy", "shared", None):
        raise UserError(f"critic={stage.critic!r}", at=stage.name, expected="'reward', 'policy', 'shared' or None")
    if (stage.critic is None) != isinstance(stage.ppo, GroupPolicy):
        raise UserError(f"critic={stage.critic!r} with ppo={type(stage.ppo).__name__}(...)", at=stage.name,
                        expected="critic=None with a GroupPolicy, and a critic with PPO",
                        fix="change one of them")  # fmt: skip
    if isinstance(stage.ppo, GroupPolicy) and stage.ppo.needs_groups and stage.sampling.samples_per_prompt < 2:
        raise UserError(f"samples_per_prompt={stage.sampling.samples_per_prompt}", at=f"{stage.name}.sampling",
                        expected="at least 2 responses to compare",
                        fix="raise it, or take a baseline that needs no group")  # fmt: skip
    check_reward(stage.reward, f"stages.{stage.name}.reward")
    if stage.gold is not None:
        check_reward(stage.gold, f"stages.{stage.name}.gold")
    if stage.cost is not None:
        stage.cost.check_stage(stage)
    if stage.turns is not None:
        stage.turns.check_stage(stage)
    if stage.on_error not in ("stop", "drop"):
        raise UserError(f"on_error={stage.on_error!r}", at=stage.name, expected="'stop' or 'drop'", fix="correct it")
    if has_steps(stage.reward) and isinstance(stage.ppo, GroupPolicy) and stage.ppo.process == "none":
        raise UserError("a reward of steps with process='none'", at=f"{stage.name}.ppo",
                        expected="a method that reads rewards of steps",
                        fix="set process='group' (DeepSeekMath), or take PPO")  # fmt: skip
    if stage.critic == "reward" and not stage.scalars:
        raise UserError("critic='reward' without a reward model", at=stage.name, fix="change critic",
                        expected="'policy' or 'shared' where the reward is plain Python")  # fmt: skip
    if stage.replay_routing and not stage.sampling.record_routing:
        raise UserError("replay_routing=True without recorded routing", at=stage.name,
                        expected="sampling=Sampling(record_routing=True)",
                        fix="set it, or leave replay out")  # fmt: skip
    for name, fine, expected in (
        ("more_batches", stage.more_batches == 0 or isinstance(stage.ppo, GroupPolicy), "0 without a GroupPolicy"),
        ("more_batches", stage.more_batches >= 0, "0 or more"),
        ("critic_warmup", stage.critic_warmup == 0 or stage.critic in ("reward", "policy"),
         "0 without a critic of its own (critic='reward' or 'policy')"),
        ("prompt_widths", rising(stage.prompt_widths), "positive numbers of tokens, rising"),
        ("prompt_widths", not (stage.prompt_widths and (stage.more_batches or stage.turns)),
         "() with more_batches or turns, which join rollouts of one width"),
        ("update_lengths", rising(stage.update_lengths), "positive numbers of tokens, rising"),
        ("share_prompts", not stage.share_prompts or isinstance(stage.ppo, GroupPolicy), "False without a GroupPolicy"),
        ("share_prompts", not (stage.share_prompts and stage.ptx), "False with ptx"),
        ("critic_warmup", 0 <= stage.critic_warmup <= stage.iterations, "from 0 to the number of iterations"),
    ):  # fmt: skip
        if not fine:
            raise UserError(f"{name}={getattr(stage, name)}", at=stage.name, expected=expected, fix="change it")
    for name in stage.offload:
        if name not in OFFLOADABLE:
            raise UserError(f"offload={name!r}", at=stage.name, expected=f"some of {', '.join(OFFLOADABLE)}",
                            fix="correct it")  # fmt: skip
    for name in ("iterations", "prompts_per_iteration", "minibatch", "microbatches", "epochs", "save_every",
                 "samples_every", "prompt_length"):  # fmt: skip
        if getattr(stage, name) < 1:
            raise UserError(f"{name}={getattr(stage, name)}", at=stage.name, expected="at least 1", fix="raise it")
    for part, whole in (("minibatch", stage.rollout), ("microbatches", stage.minibatch)):
        if whole % getattr(stage, part):
            raise UserError(
                f"{part}={getattr(stage, part)} does not divide {whole}", at=stage.name,
                expected="a divisor of the rollout (prompts_per_iteration * samples_per_prompt), and microbatches "
                "a divisor of the minibatch", fix="change one of them",
            )  # fmt: skip
    check_overlap(stage)
    greedy = isinstance(stage.ppo, GroupPolicy) and stage.ppo.baseline == "greedy"
    for rows in (stage.rollout, *([stage.prompts_per_iteration] if greedy else [])):
        if stage.rows_at_a_time is not None and rows % min(stage.rows_at_a_time, rows):
            raise UserError(f"rows_at_a_time={stage.rows_at_a_time} does not divide {rows}", at=stage.name,
                            expected=f"a divisor of the {rows} responses that are scored together",
                            fix="change it")  # fmt: skip
    if stage.share_prompts and stage.minibatch % stage.sampling.samples_per_prompt:
        raise UserError(f"minibatch={stage.minibatch} with share_prompts=True", at=stage.name,
                        expected=f"a multiple of samples_per_prompt={stage.sampling.samples_per_prompt}, as all "
                        "responses to a prompt are learned from together", fix="change one of them")  # fmt: skip


def check_placement(stage: Reinforce, placement: Placement) -> None:
    """The meshes split what is to be split on them."""
    at = f"stages.{stage.name}"
    check_one_device(stage, placement)
    if stage.share_prompts and placement.mesh is not None:
        raise UserError("share_prompts=True on several devices", at=at, expected="one device",
                        fix="set share_prompts=False, or leave the layout out")  # fmt: skip
    placement.check_rows(stage.minibatch // stage.microbatches, "microbatches", at)
    placement.check_rows(stage.rollout if stage.rows_at_a_time is None else stage.rows_at_a_time, "rollouts", at)
    placement.check_tokens(stage.prompt_length + stage.response_length, at)
    stage.sampling_placement(placement).check_rows(stage.prompts_per_iteration, "prompts", f"{at}.sampling_layout")
    drawing, slots = stage.sampling_placement(placement), stage.sampling.slots
    if slots is not None:
        drawing.check_rows(min(slots, stage.rollout), "slots", f"{at}.sampling.slots")
    if stage.ptx is not None:
        placement.check_tokens(stage.ptx.length, f"{at}.ptx")
