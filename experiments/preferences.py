"""Preferences without a reward model: the quickstart's market and rankings, and a loss on the policy itself.

Asks: how near does DPO come to PPO on a learned reward (quickstart.py) from the same rankings, and do its kin differ?

    rlhf-jax run experiments/preferences.py      DPO, one seed
    rlhf-jax sweep experiments/preferences.py    every loss, from the same pretraining and demonstrations
    rlhf-jax compare RUN...                      the table

Model, tokenizer, texts and demonstrations are the quickstart's. Every loss has one learning rate and one pass over
the rankings; no loss was tuned. Hardware: two CPU cores. Not measured yet.
"""

from rlhf_jax.data.chat import ChatFormat
from rlhf_jax.data.tasks.base import TaskDemonstrations, TaskPrompts, TaskRankings, TaskTexts
from rlhf_jax.data.tasks.market import Market
from rlhf_jax.experiment import Experiment
from rlhf_jax.models import Attention, Block, SwiGLU, Transformer
from rlhf_jax.objectives.rules import CPO, DPO, IPO, KTO, ORPO, Hinge, PlackettLuce, RobustDPO, SimPO
from rlhf_jax.sampling import Sampling
from rlhf_jax.stages.evaluation import Evaluation
from rlhf_jax.stages.language import FineTune, Pretrain
from rlhf_jax.stages.preference import PreferenceTune
from rlhf_jax.stages.settings import TrainedBPE, Training
from rlhf_jax.training.optimizer import Optimizer

RULES = {
    "dpo": DPO(0.1),
    "dpo-averaged": DPO(5.0, average=True),
    "cdpo": DPO(0.1, label_smoothing=0.1),
    "robust": RobustDPO(0.1, label_smoothing=0.1),
    "hinge": Hinge(0.1),
    "ipo": IPO(0.1),
    "ipo-averaged": IPO(0.1, average=True),
    "simpo": SimPO(2.0, gamma=0.5),
    "cpo": CPO(0.1),
    "orpo": ORPO(0.1),
    "plackett-luce": PlackettLuce(0.1),
    "kto": KTO(0.1),
    "kto-batch": KTO(0.1, baseline="batch"),
}


def config() -> Experiment:
    task = Market(largest_order=2)
    heldout = TaskTexts(task, 200, seed=10)

    def training(rate: float, batch: int, length: int, **duration) -> Training:
        optimizer = Optimizer(rate, schedule="cosine", warmup_fraction=0.1, b2=0.98)
        return Training(batch=batch, length=length, optimizer=optimizer, **duration)

    return Experiment(
        name="preferences",
        tokenizer=TrainedBPE(512, (TaskTexts(task, 2_000), TaskDemonstrations(task, 1_000))),
        chat=ChatFormat("Customer: ", "\n", "Clerk: ", "\n"),
        model=Transformer(
            vocab_size=512,
            d_model=96,
            pattern=(Block(Attention(heads=4), SwiGLU(256)),),
            repeats=2,
            unroll=True,
            max_length=96,
            init_std=0.1,
        ),
        stages=(
            Pretrain(train=training(6e-3, 32, 64, steps=900), data=(TaskTexts(task, 20_000),), heldout=(heldout,)),
            FineTune(
                train=training(2e-3, 32, 80, steps=250),
                data=(TaskDemonstrations(task, 8_000),),
                heldout=(TaskDemonstrations(task, 200, seed=11),),
            ),
            PreferenceTune(
                train=training(2e-4, 16, 80, epochs=1, evaluate_every=60),
                data=(TaskRankings(task, 5_000),),
                heldout=(TaskRankings(task, 100, seed=12),),
                rule=RULES["dpo"],
            ),
        ),
        evaluation=Evaluation(
            texts=(heldout,),
            text_length=64,
            prompts=(TaskPrompts(task, 200, split="heldout"),),
            prompt_length=28,
            sampling=Sampling(max_new_tokens=36),
            gold=task,
            batch=64,
        ),
    )


def sweep():
    for name, rule in RULES.items():
        yield name, {"stages.preference.rule": rule}
