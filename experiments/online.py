"""Online, iterated RLHF: label the policy's own answers, retrain the reward model, go on; or label once.

Asks: do 480 rankings of answers by the policy of each round serve better than as many of answers by the clone?

    rlhf-jax run experiments/online.py           three rounds, reward models on the union of labels, one seed
    rlhf-jax reproduce experiments/online.py     rounds (union, fresh), all labels at once; with noise; three seeds

Walks on trlX's random graph, from the clone of ``randomwalks.py``. Each round labels 160 answers of the current policy
(four to a start, ranked by the walks' exact reward with a Bradley-Terry noise of 0.1, so one pair in some is wrong),
trains a reward model from the clone on them, and makes 10 PPO iterations of 128 walks against it, from the last
round's policy, with the clone as reference. ``once`` spends all labels on the clone's answers and makes all 30
iterations against one reward model. Rewards of the task are only watched.

Measured, seeds 0 to 2, exact reward in the end: union 0.644 (0.508 to 0.799), fresh 0.505 (0.428 to 0.622), once 0.403
(0.314 to 0.456), with a noise of 0.5 union 0.565 and once 0.623; after one round of union 0.652. Hardware: two CPU
cores, 20 to 40 s of processor time a run.
"""

from matplotlib.figure import Figure

from rlhf_jax.data.chat import PLAIN
from rlhf_jax.data.tasks.base import TaskPrompts, TaskTexts
from rlhf_jax.data.tasks.randomwalks import RandomWalks
from rlhf_jax.data.tokenizers import CharTokenizer
from rlhf_jax.experiment import Experiment
from rlhf_jax.models import MLP, Attention, Block, LayerNorm, Learned, Transformer
from rlhf_jax.objectives.ppo import PPO
from rlhf_jax.ops.kl import FixedKL
from rlhf_jax.runs.bands import Band, Runs
from rlhf_jax.runs.reproductions import dots
from rlhf_jax.sampling import Sampling
from rlhf_jax.stages.evaluation import Evaluation
from rlhf_jax.stages.label import Label
from rlhf_jax.stages.labellers import Programmatic
from rlhf_jax.stages.language import Pretrain
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.reward import TrainReward
from rlhf_jax.stages.settings import StageRecords, Training
from rlhf_jax.training.optimizer import Optimizer

WALK = 9
TASK = RandomWalks()
STARTS = (TaskPrompts(TASK, 20),)
LABELS, ITERATIONS = 480, 30


def rounds(count: int, seen: str = "union", temperature: float = 0.1) -> tuple:
    """Stages of so many rounds that share labels and iterations; ``seen`` is ``union`` or ``fresh``."""
    stages = []
    for number in range(count):
        before = "clone" if number == 0 else f"ppo{number - 1}"
        labelled = range(number + 1) if seen == "union" else (number,)
        stages += [
            Label(
                name=f"label{number}",
                policy=before,
                prompts=STARTS,
                prompt_length=1,
                sampling=Sampling(max_new_tokens=WALK, samples_per_prompt=4),
                labeller=Programmatic(TASK, temperature=temperature),
                count=LABELS // count,
                batch=20,
                distinct=False,  # so that all ways have as many rankings
            ),
            TrainReward(
                name=f"reward{number}",
                init="clone",
                data=tuple(StageRecords(f"label{i}") for i in labelled),
                train=Training(
                    steps=120,
                    batch=16,
                    length=WALK + 2,
                    optimizer=Optimizer(1e-3, schedule="cosine", warmup_steps=10, b2=0.95),
                    save_every=120,
                ),
            ),
            Reinforce(
                name=f"ppo{number}",
                policy=before,
                reference="clone",
                reward=f"reward{number}",
                critic="policy",
                prompts=STARTS,
                prompt_length=1,
                sampling=Sampling(max_new_tokens=WALK),
                ppo=PPO(kl=FixedKL(0.05), value_coef=1.2),
                optimizer=Optimizer(5e-4, b2=0.95),
                iterations=ITERATIONS // count,
                prompts_per_iteration=128,
                minibatch=64,
                epochs=2,
                gold=TASK,
                save_every=ITERATIONS,
            ),
        ]
    return tuple(stages)


def clone() -> Pretrain:
    optimizer = Optimizer(1e-3, schedule="cosine", warmup_steps=20, b2=0.95)
    return Pretrain(
        name="clone",
        train=Training(steps=300, batch=32, length=44, optimizer=optimizer, log_every=20, save_every=300),
        data=(TaskTexts(TASK, 1000),),
    )


def config() -> Experiment:
    return Experiment(
        name="online",
        tokenizer=CharTokenizer(TASK.alphabet),
        chat=PLAIN,
        model=Transformer(
            vocab_size=23,
            d_model=64,
            pattern=(Block(Attention(heads=4), MLP(256)),),
            repeats=2,
            position=Learned(),
            norm=LayerNorm(),
            max_length=44,
        ),
        stages=(clone(), *rounds(3)),
        evaluation=Evaluation(
            prompts=STARTS,
            prompt_length=1,
            sampling=Sampling(max_new_tokens=WALK, samples_per_prompt=64),
            gold=TASK,
            baseline="clone",
            batch=20,
        ),
    )


WAYS = {
    "union": rounds(3),
    "fresh": rounds(3, seen="fresh"),
    "once": rounds(1),
    "union-noisy": rounds(3, temperature=0.5),
    "once-noisy": rounds(1, temperature=0.5),
}
ENDS = {name: 0 if name.startswith("once") else 2 for name in WAYS}


def sweep():
    for name, stages in WAYS.items():
        for seed in range(3):
            yield f"{name}-{seed}", {"name": f"online-{name}", "stages": (clone(), *stages), "seed": seed}


def bands(runs: Runs):
    yield from optimality(runs)
    for name, last in ENDS.items():
        yield Band(f"KL to the clone (nats), {name}", runs.finals(f"evaluation.ppo{last}.kl", f"{name}-?"))


def optimality(runs: Runs):
    yield Band("optimality, clone", runs.finals("evaluation.clone.gold", "union-?"))
    for number in range(2):
        yield Band(f"optimality, union, round {number + 1}", runs.finals(f"evaluation.ppo{number}.gold", "union-?"))
    for name, last in ENDS.items():
        yield Band(f"optimality, {name}", runs.finals(f"evaluation.ppo{last}.gold", f"{name}-?"))


def picture(runs: Runs) -> Figure:
    return dots(tuple(optimality(runs)), "of sampled walks")
