"""Over-optimisation, and how to see it: a reward model that is trained on, and another one that only watches.

Asks: when a policy climbs a reward model, does a second one, trained on other rankings, notice that the gain is no
longer real (Bai et al. 2022, section 4.2, https://arxiv.org/abs/2204.05862: train and test preference models)? Do
ensembles help (Coste et al. 2023, https://arxiv.org/abs/2310.02743)?

    rlhf-jax run experiments/overoptimisation.py            every policy, one seed
    rlhf-jax reproduce experiments/overoptimisation.py      three seeds, with the expected bands

The market of ``preferences.py``. ``member-0`` to ``member-2`` learn from the same 300 rankings in orders of their own,
``test`` from 300 others. PPO with next to no KL penalty climbs one member, or all of them as their mean, their lowest,
or their mean less their variance. Every tenth of a run is a point: what it climbs, what ``test`` says, the true reward.

Found: the score that is climbed rises by 0.9, the test model's by about as much (its scale is its own), and the true
reward does not rise. So few rankings leave both models ignorant of the same things, and no ensemble helps. Hardware:
two CPU cores, five minutes a seed.
"""

import numpy as np
from matplotlib.figure import Figure

from rlhf_jax.data.chat import ChatFormat
from rlhf_jax.data.tasks.base import TaskDemonstrations, TaskPrompts, TaskRankings, TaskTexts
from rlhf_jax.data.tasks.market import Market
from rlhf_jax.experiment import Experiment
from rlhf_jax.models import Attention, Block, SwiGLU, Transformer
from rlhf_jax.objectives.ppo import PPO
from rlhf_jax.ops.kl import FixedKL
from rlhf_jax.rewards.compose import Ensemble, Sum
from rlhf_jax.runs.bands import Band, Runs
from rlhf_jax.sampling import Sampling
from rlhf_jax.stages.evaluation import Evaluation
from rlhf_jax.stages.language import FineTune, Pretrain
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.reward import TrainReward
from rlhf_jax.stages.settings import TrainedBPE, Training
from rlhf_jax.training.optimizer import Optimizer

TASK = Market(largest_order=2)
SEEN, OTHERS = (TaskRankings(TASK, 300),), (TaskRankings(TASK, 300, seed=3),)
HELDOUT = (TaskRankings(TASK, 100, seed=12),)
MEMBERS = ("member-0", "member-1", "member-2")
CLIMBED = {
    "single": "member-0",
    "mean": Ensemble(MEMBERS),
    "worst": Ensemble(MEMBERS, "worst"),
    "uncertainty": Ensemble(MEMBERS, "uncertainty", coef=1.0),
}
PARTS = 10
SPLIT = "Bai et al. 2022, section 4.2"
TOGETHER = "Coste et al. 2023"


def training(rate: float, batch: int, length: int, **duration) -> Training:
    optimizer = Optimizer(rate, schedule="cosine", warmup_fraction=0.1, b2=0.98)
    return Training(batch=batch, length=length, optimizer=optimizer, save_every=1000, **duration)


def config() -> Experiment:
    return Experiment(
        name="overoptimisation",
        tokenizer=TrainedBPE(512, (TaskTexts(TASK, 2_000), TaskDemonstrations(TASK, 1_000))),
        chat=ChatFormat("Customer: ", "\n", "Clerk: ", "\n"),
        model=Transformer(
            vocab_size=512,
            d_model=64,
            pattern=(Block(Attention(heads=4), SwiGLU(160)),),
            repeats=2,
            unroll=True,
            max_length=96,
            init_std=0.1,
        ),
        stages=(
            Pretrain(train=training(6e-3, 32, 64, steps=600), data=(TaskTexts(TASK, 20_000),)),
            FineTune(train=training(2e-3, 32, 80, steps=200), data=(TaskDemonstrations(TASK, 8_000),)),
            *(
                TrainReward(name=name, train=training(2e-3, 16, 80, epochs=1), data=data, heldout=HELDOUT)
                for name, data in (*((name, SEEN) for name in MEMBERS), ("test", OTHERS))
            ),
            *(
                Reinforce(
                    name=name,
                    reward=reward,
                    critic="policy",
                    prompts=(TaskPrompts(TASK, 1_000),),
                    prompt_length=28,
                    sampling=Sampling(max_new_tokens=36),
                    ppo=PPO(kl=FixedKL(0.01), value_coef=0.5),
                    optimizer=Optimizer(4e-4, warmup_steps=4, b2=0.98),
                    iterations=60,
                    prompts_per_iteration=64,
                    minibatch=32,
                    epochs=2,
                    gold=Sum(("test", TASK)),
                    save_every=60,
                )
                for name, reward in CLIMBED.items()
            ),
        ),
        evaluation=Evaluation(
            prompts=(TaskPrompts(TASK, 200, split="heldout"),),
            prompt_length=28,
            sampling=Sampling(max_new_tokens=36),
            gold=TASK,
            batch=50,
        ),
    )


def sweep():
    for seed in range(3):
        yield {"seed": seed}


def course(runs: Runs, name: str, metric: str) -> np.ndarray:
    """A metric of a policy in tenths of its run: one row for each run."""
    rows = [curve.values for curve in runs.curves(name, metric)]
    return np.array([[part.mean() for part in np.array_split(row, PARTS)] for row in rows])


def bands(runs: Runs):
    climbed, test, true = (course(runs, "single", m) for m in ("ppo/score", "gold/test", "gold/market"))
    rise = lambda found: found[:, -1] - found[:, 0]  # noqa: E731
    yield Band("one model: rise of its own score", rise(climbed), 0.0, source=SPLIT, judge="every")
    yield Band("less the rise of the test model's", rise(climbed) - rise(test), source=SPLIT)
    yield Band("true reward: its best tenth less its last", true.max(axis=1) - true[:, -1])
    ends = {name: course(runs, name, "gold/market")[:, -1] for name in CLIMBED}
    for name, end in ends.items():
        yield Band(f"true reward in the end, {name}", end)
    for name in ("mean", "worst", "uncertainty"):
        yield Band(f"{name} less single", ends[name] - ends["single"], source=TOGETHER)


def picture(runs: Runs) -> Figure:
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    colors = dict(zip(CLIMBED, ("#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=True))
    for name, color in colors.items():
        roots = np.sqrt(np.maximum(course(runs, name, "kl/sequence"), 0.0)).mean(axis=0)
        for axis, metric in zip(panels, ("ppo/score", "gold/test", "gold/market"), strict=True):
            found = course(runs, name, metric)
            axis.fill_between(roots, found.min(axis=0), found.max(axis=0), color=color, alpha=0.15, linewidth=0)
            axis.plot(roots, found.mean(axis=0), "o-", color=color, markersize=3, label=name)
    for axis, title in zip(panels, ("what is climbed", "the test model", "true reward"), strict=True):
        axis.set(title=title, xlabel="√KL from the fine-tuned policy (nats)")
    panels[0].set_ylabel("score")
    panels[2].legend(frameon=False)
    return figure
