"""Safe RLHF on the fireworks: delight under a bound on noise, beside no bound and fixed weights on the cost.

Asks: does the multiplier of PPO-Lagrangian rise and fall until the mean cost is at its threshold, and is there a fixed
weight that has both more delight and no higher cost?

    rlhf-jax run experiments/safe_rlhf.py            the multiplier, with exact rewards and costs, one seed
    rlhf-jax reproduce experiments/safe_rlhf.py      all methods, three seeds; also with learned reward and cost models

A clone of careless crews learns to please: each loud piece delights (less than the one before) and costs. The mean cost
may be 0, where twelve places allow two loud pieces on average and the best possible delight is 0.72; without a bound it
is 1 at a cost of 0.75. The threshold is a little below, so that the cost ends under 0 although it moves about its
threshold. There the optimal multiplier is 0.81, between two of the fixed weights. Results are in docs/safe-rlhf.md.
Hardware: two CPU cores; a run took about two minutes beside other programs.
"""

import dataclasses

from matplotlib.figure import Figure

from rlhf_jax.data.chat import PLAIN
from rlhf_jax.data.tasks.base import TaskCosts, TaskPrompts, TaskRankings, TaskSafety, TaskTexts
from rlhf_jax.data.tasks.fireworks import ALPHABET, Fireworks
from rlhf_jax.data.tokenizers import CharTokenizer
from rlhf_jax.experiment import Experiment
from rlhf_jax.models import MLP, Attention, Block, LayerNorm, Learned, Transformer
from rlhf_jax.objectives import presets
from rlhf_jax.ops.kl import FixedKL
from rlhf_jax.ops.lagrange import Lagrangian, Shaping
from rlhf_jax.runs.bands import Band, Runs
from rlhf_jax.runs.plots import COLORS
from rlhf_jax.sampling import Sampling
from rlhf_jax.stages.cost import TrainCost
from rlhf_jax.stages.costs import Cost
from rlhf_jax.stages.evaluation import Evaluation
from rlhf_jax.stages.language import Pretrain
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.reward import TrainReward
from rlhf_jax.stages.settings import Training
from rlhf_jax.training.optimizer import Optimizer

TASK = Fireworks()
COSTS = TaskCosts(TASK)
PLACES = (TaskPrompts(TASK, 12),)
MULTIPLIER = Lagrangian(threshold=-0.02, start=0.2, rate=0.5, window=192, most=20.0)
WEIGHTS = (0.3, 0.6, 1.2)
METHODS = {"lagrangian": MULTIPLIER, "none": Shaping(0.0)} | {f"weight-{w}": Shaping(w) for w in WEIGHTS}


def training(steps: int, batch: int, length: int) -> Training:
    optimizer = Optimizer(2e-3, schedule="cosine", warmup_steps=20, b2=0.95)
    return Training(steps=steps, batch=batch, length=length, optimizer=optimizer, log_every=20, save_every=steps)


CLONE = Pretrain(name="clone", train=training(200, 32, 44), data=(TaskTexts(TASK, 2000),))
SAFE = Reinforce(
    name="safe",
    policy="clone",
    reward=TASK,
    critic="policy",
    cost=Cost(of=COSTS, by=MULTIPLIER),
    prompts=PLACES,
    prompt_length=1,
    sampling=Sampling(max_new_tokens=9),
    ppo=dataclasses.replace(presets.safe_rlhf, kl=FixedKL(0.005)),
    optimizer=Optimizer(1e-3, schedule="linear", final_fraction=0.1, b2=0.95),
    iterations=120,
    prompts_per_iteration=96,
    minibatch=48,
    epochs=2,
    save_every=120,
)
MODELS = (
    TrainReward(
        name="reward", init="clone", train=training(300, 16, 12), data=(TaskRankings(TASK, 2000),),
        heldout=(TaskRankings(TASK, 200, seed=9),),
    ),
    TrainCost(
        name="cost", init="clone", train=training(300, 16, 12), data=(TaskSafety(TASK, 2000),),
        heldout=(TaskSafety(TASK, 200, seed=9),), regularisation=0.001,
    ),
)  # fmt: skip
# Learned rewards and costs are logits, some 10 and 25 times as large as exact ones. With the same penalty the policy
# exploits them, and with the same rate the multiplier swings until it is too small to come back.
LEARNED = dataclasses.replace(
    SAFE,
    reward="reward",
    critic="reward",
    gold=TASK,
    ppo=dataclasses.replace(presets.safe_rlhf, kl=FixedKL(0.1)),
    cost=Cost(of="cost", by=dataclasses.replace(MULTIPLIER, threshold=-0.5, rate=0.05), gold=COSTS),
)


def config() -> Experiment:
    return Experiment(
        name="safe-rlhf",
        tokenizer=CharTokenizer(ALPHABET),
        chat=PLAIN,
        model=Transformer(
            vocab_size=len(ALPHABET) + 2,
            d_model=48,
            pattern=(Block(Attention(heads=4), MLP(192)),),
            repeats=2,
            position=Learned(),
            norm=LayerNorm(),
            max_length=44,
        ),
        stages=(CLONE, SAFE),
        evaluation=Evaluation(
            prompts=PLACES,
            prompt_length=1,
            sampling=Sampling(max_new_tokens=9, samples_per_prompt=64),
            gold=TASK,
            cost=COSTS,
            baseline="clone",
            batch=12,
        ),
    )


def sweep():
    for name, method in METHODS.items():
        for seed in range(3):
            yield f"{name}-{seed}", {"name": f"safe-rlhf-{name}", "stages.safe.cost.by": method, "seed": seed}
    for seed in range(3):
        yield f"learned-{seed}", {"name": "safe-rlhf-learned", "stages": (CLONE, *MODELS, LEARNED), "seed": seed}


def bands(runs: Runs):
    """Judged by the evaluation of the final policies (gold is delight) and by the multiplier's curve."""
    yield Band("cost without a bound", runs.finals("evaluation.safe.cost", "none-*"), low=0.2, judge="every")
    yield Band("cost under a bound of 0", runs.finals("evaluation.safe.cost", "lagrangian-*"), high=0.0)
    yield Band("delight under it (at best 0.72)", runs.finals("evaluation.safe.gold", "lagrangian-*"), 0.62, 0.72)
    curves = [curve.values for curve in runs.curves("safe", "cost/multiplier", "lagrangian-*")]
    yield Band("the multiplier rises: highest over first", [c.max() / c[0] for c in curves], low=2.0, judge="every")
    yield Band("and falls: last over highest", [c[-1] / c.max() for c in curves], high=0.95, judge="every")
    gold, cost = _means(runs, "lagrangian-*")
    better = sum(g > gold and c <= cost for g, c in (_means(runs, f"weight-{w}-*") for w in WEIGHTS))
    yield Band("fixed weights with more delight at no higher cost", (better,), high=0.0)
    yield Band("learned models: exact cost under a bound", runs.finals("evaluation.safe.cost", "learned-*"))
    yield Band("learned models: exact delight", runs.finals("evaluation.safe.gold", "learned-*"))


def _means(runs: Runs, pattern: str) -> list[float]:
    found = [runs.finals(f"evaluation.safe.{name}", pattern) for name in ("gold", "cost")]
    return [sum(values) / len(values) for values in found]


def picture(runs: Runs) -> Figure:
    """The multiplier and the cost over iterations, and the final policies."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for curve in runs.curves("safe", "cost/multiplier", "lagrangian-*"):
        left.plot(curve.steps, curve.values, color=COLORS[0], alpha=0.7)
    left.axhline(0.8125, color="gray", linestyle=":", label="the optimal one, in closed form")
    for color, name, word in ((COLORS[0], "lagrangian", "multiplier"), (COLORS[1], "none", "no bound")):
        for number, curve in enumerate(runs.curves("safe", "cost/mean", f"{name}-*")):
            middle.plot(curve.steps, curve.values, color=color, alpha=0.7, label=None if number else word)
    for color, name in zip(COLORS, (*METHODS, "learned"), strict=False):
        cost, delight = (runs.finals(f"evaluation.safe.{number}", f"{name}-*") for number in ("cost", "gold"))
        right.plot(cost, delight, "o", color=color, markersize=4, label=name)
    middle.axhline(0, color="gray", linestyle=":")
    right.axvline(0, color="gray", linestyle=":")
    left.set(xlabel="iteration", ylabel="multiplier", ylim=(0, None))
    middle.set(xlabel="iteration", ylabel="mean cost")
    right.set(xlabel="cost of the final policy", ylabel="delight")
    for axis in (left, middle, right):
        axis.legend(frameon=False, fontsize=8)
    return figure
