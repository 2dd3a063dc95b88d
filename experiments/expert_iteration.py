"""Expert iteration on trlX's random walks: sample walks, keep the best of each start, imitate them, and again.

Asks: how far does imitation of one's own best walks get with 2,560 walks (the budget of PPO in randomwalks.py and of
group methods in groups.py), and does it matter whether a round goes on from the last or starts anew?

    rlhf-jax run experiments/expert_iteration.py            going on, one seed
    rlhf-jax reproduce experiments/expert_iteration.py      both and rejection sampling, three seeds each, with bands

A round samples 16 walks from each of 20 starts and keeps the best two; eight rounds are 2,560 walks. Rejection sampling
spends them in one round, 128 walks from each start. Graph, model and clone are those of randomwalks.py. The evaluation
also gives what best-of-n makes of each policy (n to 64), ranked by the reward itself. Expected: 0.98 (0.96 to 1.00)
going on, 0.97 anew, 0.94 in one round, with a clone of 0.29. Hardware: two CPU cores, about 20 s of processor time a
seed.
"""

from matplotlib.figure import Figure

from rlhf_jax.data.chat import PLAIN
from rlhf_jax.data.tasks.base import TaskPrompts, TaskTexts
from rlhf_jax.data.tasks.randomwalks import RandomWalks
from rlhf_jax.data.tokenizers import CharTokenizer
from rlhf_jax.experiment import Experiment
from rlhf_jax.models import MLP, Attention, Block, LayerNorm, Learned, Transformer
from rlhf_jax.runs.bands import Band, Runs
from rlhf_jax.runs.reproductions import dots
from rlhf_jax.sampling import Sampling
from rlhf_jax.stages.best_of_n import ExpertIteration, Selection
from rlhf_jax.stages.evaluation import Evaluation
from rlhf_jax.stages.language import Pretrain
from rlhf_jax.stages.settings import Training
from rlhf_jax.training.optimizer import Optimizer

WAYS = {
    "going-on": {},
    "anew": {"stages.expert.restart": True},
    "one-round": {
        "stages.expert.rounds": 1,
        "stages.expert.sampling.samples_per_prompt": 128,
        "stages.expert.selection.keep": 16,
        "stages.expert.minibatch": 40,
        "stages.expert.epochs": 40,
    },
}


def config() -> Experiment:
    task = RandomWalks()
    starts = (TaskPrompts(task, 20),)
    return Experiment(
        name="expert-iteration",
        tokenizer=CharTokenizer(task.alphabet),
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
                data=(TaskTexts(task, 1000),),
            ),
            ExpertIteration(
                policy="clone",
                reward=task,
                prompts=starts,
                prompt_length=1,
                sampling=Sampling(max_new_tokens=9, samples_per_prompt=16),
                selection=Selection(keep=2),
                optimizer=Optimizer(1e-3, b2=0.95),
                rounds=8,
                prompts_per_round=20,
                minibatch=40,
                epochs=40,
            ),
        ),
        evaluation=Evaluation(
            prompts=starts,
            prompt_length=1,
            sampling=Sampling(max_new_tokens=9, samples_per_prompt=64),
            gold=task,
            baseline="clone",
            best_of=(1, 2, 4, 8, 16, 32, 64),
            batch=20,
        ),
    )


def sweep():
    for name, changes in WAYS.items():
        for seed in range(3):
            yield f"{name}-{seed}", {"name": f"expert-iteration-{name}", "seed": seed, **changes}


def bands(runs: Runs):
    yield Band("optimality, rounds that go on", runs.finals("evaluation.expert.gold", "going-on-*"), low=0.95)
    for name in ("anew", "one-round"):
        yield Band(f"optimality, {name}", runs.finals("evaluation.expert.gold", f"{name}-*"))
    yield Band("optimality, clone", runs.finals("evaluation.clone.gold", "going-on-*"))
    yield Band("best of 64 of the clone", runs.finals("evaluation.clone.gold_best_of_64", "going-on-*"))


def picture(runs: Runs) -> Figure:
    return dots(tuple(bands(runs)), "optimality of sampled walks")
