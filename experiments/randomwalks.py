"""trlX's random walks: clone walks over a graph, then PPO towards the shortest way to the goal.

Asks: how near to optimal are sampled walks after the published 2,560 episodes? A clone of the data is at about 0.35.

    rlhf-jax run experiments/randomwalks.py            one seed
    rlhf-jax reproduce experiments/randomwalks.py      ten seeds, with the expected band
    python benchmarks/experiments.py randomwalks       five seeds, as a table with times

The graph (seed 1000), the 1,000 walks, the 20 start nodes as prompts, 128 rollouts an iteration, 4 epochs, clip 0.2,
lambda 0.95, no KL penalty and the reward are those of CarperAI/trlx, examples/randomwalks. The model is smaller
(two layers of width 64 instead of six of 144), its learning rate higher, and a rollout is cut into two minibatches of
64 instead of 100 + 28. Expected: 0.92 on the mean of ten seeds (0.86 to 0.98), with a clone of 0.30. Hardware: two CPU
cores, 25 s of processor time a seed.
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
from rlhf_jax.stages.language import Pretrain
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.settings import Training
from rlhf_jax.training.optimizer import Optimizer


def config() -> Experiment:
    task = RandomWalks()
    starts = (TaskPrompts(task, 20),)
    return Experiment(
        name="randomwalks",
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
            Reinforce(
                policy="clone",
                reward=task,
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
        ),
        evaluation=Evaluation(
            prompts=starts,
            prompt_length=1,
            sampling=Sampling(max_new_tokens=9, samples_per_prompt=64),
            gold=task,
            baseline="clone",
            batch=20,
        ),
    )


def sweep():
    for seed in range(10):
        yield {"seed": seed}


def bands(runs: Runs):
    yield Band("optimality, clone", runs.finals("evaluation.clone.gold"))
    yield Band("optimality, PPO", runs.finals("evaluation.ppo.gold"), low=0.90, source="trlX's protocol and budget")
    yield Band("KL to the clone (nats)", runs.finals("evaluation.ppo.kl"))


def picture(runs: Runs) -> Figure:
    return dots(tuple(bands(runs))[:2], "of sampled walks")
