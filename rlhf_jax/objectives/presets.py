"""PPO as published systems do it: each a combination of ``PPO``'s named choices, with the system's default numbers.

Only what ``PPO`` decides is here. Learning rates, epochs and batch sizes belong to the experiment, and so does the
rest of a system (how it samples, truncates or scores). Read from the systems' code in 2024 to 2026; where a system
keeps its critic apart, ``value_coef`` is 1 and its own optimizer sets the scale.
"""

from __future__ import annotations

from rlhf_jax.objectives.ppo import PPO, Whitening
from rlhf_jax.ops.kl import AdaptiveKL, FixedKL

BIASED = Whitening(variance="biased")
UNBIASED = Whitening(variance="unbiased")

openai2019 = PPO(
    kl=AdaptiveKL(coef=0.15, target=6.0, horizon=10_000),
    missing_eos="replace",
    missing_eos_value=-1.0,
    whiten_rewards=Whitening(shift_mean=False, variance="biased"),
    whiten_advantages=BIASED,
    value_coef=0.1,
)
"""Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; a response without its full stop scores -1."""

instructgpt = PPO(kl=FixedKL(0.02), whiten_advantages=BIASED, value_coef=1.0)
"""Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, appendix C.4. The paper prints the KL coefficient, the clip and
gamma; lambda and whitening are those of Stiennon et al. 2020 and the 2019 code. Its PPO-ptx is ``ptx.PtxMix``."""

trl = PPO(
    kl=FixedKL(0.05),
    score_placement="after_last",
    whiten_advantages=UNBIASED,
    value_coef=0.1,
    value_slots="rewarded",
)
"""``PPOTrainer`` of huggingface/trl: the score lands on the first padding slot, whose value is trained too."""

openrlhf = PPO(
    kl=FixedKL(0.01),
    kl_clamp=10.0,
    score_clip=10.0,
    whiten_advantages=BIASED,
    lam=1.0,
    ratio_clamp=20.0,
    value_clip=0.5,
    value_coef=1.0,
)
"""OpenRLHF/OpenRLHF, with its default ``kl`` in the reward."""

verl = PPO(
    kl=FixedKL(0.001),
    whiten_advantages=UNBIASED,
    lam=1.0,
    dual_clip=3.0,
    ratio_clamp=20.0,
    value_clip=0.5,
    value_coef=1.0,
)
"""volcengine/verl with ``use_kl_in_reward`` (off by default there, which is ``kl=FixedKL(0.0)`` here)."""

nemo_rl = PPO(
    kl=FixedKL(0.0),
    kl_estimator="k3",
    kl_placement="loss",
    kl_log_ratio_clamp=20.0,
    kl_clamp=10.0,
    whiten_advantages=BIASED,
    clip_high=0.28,
    dual_clip=10.0,
    value_coef=1.0,
)
"""NVIDIA-NeMo/RL, ``examples/configs/ppo_math_1B.yaml``."""

deepspeed_chat = PPO(
    kl=FixedKL(0.1),
    score_clip=5.0,
    score_placement="after_last",
    whiten_advantages=None,
    value_coef=1.0,
)
"""DeepSpeed-Chat: no whitening; the score lands one past the last token, and that slot's value is not trained."""

colossalchat = PPO(
    kl=FixedKL(0.1),
    score_clip=5.0,
    score_placement="every_token",
    whiten_advantages=None,
    value_coef=1.0,
    aggregation="seq-mean-token-mean",
    value_aggregation="token-mean",
)
"""ColossalChat: the score is added to every token, so that returns grow with the length."""

trlx = PPO(
    kl=FixedKL(0.001),
    score_clip=10.0,
    whiten_advantages=Whitening(over="all"),
    value_coef=1.0,
)
"""CarperAI/trlx: whitens over padding too, so that advantages depend on the batch's width."""

safe_rlhf = PPO(
    kl=FixedKL(0.02),
    reward_clip=50.0,
    whiten_advantages=None,
    value_clip=5.0,
    value_coef=1.0,
    aggregation="seq-mean-token-mean",
)
"""PKU-Alignment/safe-rlhf, its PPO without costs."""

nemo_aligner = PPO(kl=FixedKL(0.01), kl_estimator="abs", whiten_advantages=BIASED, value_coef=1.0)
"""NVIDIA/NeMo-Aligner: the penalty is the absolute log-ratio."""
