"""On-policy distillation on trlX's random walks: a clone of aimless walks learns from the policy that PPO has made.

Asks: does the clone reach its teacher's score from the teacher's token probabilities alone, without a reward, and which
divergence gets there?

    rlhf-jax run experiments/distillation.py            reverse KL on the student's own walks, one seed
    rlhf-jax reproduce experiments/distillation.py      every divergence, also on recorded walks, three seeds each

The teacher is that of randomwalks.py. The student answers 128 starts an iteration, 20 times (2,560 walks), with two
updates for each. "data" learns from the recorded aimless walks, "mixed" from either with even odds. Expected
(reverse): within 0.02 of the teacher on each seed. Hardware: two CPU cores, 38 s of processor time a seed.
"""

from matplotlib.figure import Figure

from rlhf_jax.data.chat import PLAIN
from rlhf_jax.data.tasks.base import TaskDemonstrations, TaskPrompts, TaskTexts
from rlhf_jax.data.tasks.randomwalks import RandomWalks
from rlhf_jax.data.tokenizers import CharTokenizer
from rlhf_jax.experiment import Experiment
from rlhf_jax.models import MLP, Attention, Block, LayerNorm, Learned, Transformer
from rlhf_jax.objectives.distillation import Divergence
from rlhf_jax.objectives.ppo import PPO
from rlhf_jax.ops.kl import FixedKL
from rlhf_jax.runs.bands import Band, Runs
from rlhf_jax.runs.reproductions import dots
from rlhf_jax.sampling import Sampling
from rlhf_jax.stages.distill import Distill
from rlhf_jax.stages.evaluation import Evaluation
from rlhf_jax.stages.language import Pretrain
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.settings import Training
from rlhf_jax.training.optimizer import Optimizer

TASK = RandomWalks()
WALKS = (TaskDemonstrations(TASK, 1000),)
WAYS = {
    "reverse": {},
    "forward": {"stages.distill.divergence": Divergence("forward")},
    "jsd": {"stages.distill.divergence": Divergence("jsd", beta=0.5)},
    "sampled": {"stages.distill.divergence": Divergence("sampled")},
    "data": {"stages.distill.on_policy": 0.0, "stages.distill.data": WALKS},
    "mixed": {"stages.distill.on_policy": 0.5, "stages.distill.data": WALKS},
}


def config() -> Experiment:
    starts = (TaskPrompts(TASK, 20),)
    return Experiment(
        name="distillation",
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
        stages=(
            Pretrain(
                name="clone",
                train=Training(
                    steps=300,
                    batch=32,
                    length=44,
                    optimizer=Optimizer(1e-3, schedule="cosine", warmup_steps=20, b2=0.95),
                    log_every=20,
                    save_every=300,
                ),
                data=(TaskTexts(TASK, 1000),),
            ),
            Reinforce(
                name="teacher",
                policy="clone",
                reward=TASK,
                critic="policy",
                prompts=starts,
                prompt_length=1,
                sampling=Sampling(max_new_tokens=9),
                ppo=PPO(kl=FixedKL(0.0), value_coef=1.2),
                optimizer=Optimizer(1e-3, b2=0.95),
                iterations=20,
                prompts_per_iteration=128,
                minibatch=64,
                epochs=4,
            ),
            Distill(
                student="clone",
                teacher="teacher",
                prompts=starts,
                prompt_length=1,
                sampling=Sampling(max_new_tokens=10),
                optimizer=Optimizer(1e-3, b2=0.95),
                iterations=20,
                prompts_per_iteration=128,
                minibatch=64,
                gold=TASK,
            ),
        ),
        evaluation=Evaluation(
            prompts=starts,
            prompt_length=1,
            sampling=Sampling(max_new_tokens=9, samples_per_prompt=64),
            gold=TASK,
            baseline="clone",
            batch=20,
        ),
    )


def sweep():
    for name, changes in WAYS.items():
        for seed in range(3):
            yield f"{name}-{seed}", {"name": f"distillation-{name}", "seed": seed, **changes}


def bands(runs: Runs):
    for name in WAYS:
        teacher = runs.finals("evaluation.teacher.gold", f"{name}-*")
        student = runs.finals("evaluation.distill.gold", f"{name}-*")
        behind = [a - b for a, b in zip(teacher, student, strict=True)]
        bound = {"high": 0.02, "judge": "every"} if name == "reverse" else {}
        yield Band(f"optimality of the teacher less that of the student, {name}", behind, **bound)
    yield from optimality(runs)


def optimality(runs: Runs):
    for name, policy in (("clone", "clone"), ("teacher", "teacher")):
        yield Band(f"optimality, {name}", runs.finals(f"evaluation.{policy}.gold", "reverse-*"))
    for name in WAYS:
        yield Band(f"optimality, {name}", runs.finals("evaluation.distill.gold", f"{name}-*"))


def picture(runs: Runs) -> Figure:
    return dots(tuple(optimality(runs)), "of sampled walks")
