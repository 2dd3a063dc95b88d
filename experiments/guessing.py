"""Guess a number from 0 to 2 in two turns: reinforcement learning with an environment that answers.

Asks: does a policy learn to use what it is told between its turns? One turn hits the number in a third of the games,
two different guesses in two thirds, two independent ones in 0.56; who guesses 1 and then listens always does.

    rlhf-jax run experiments/guessing.py            two turns, one seed
    rlhf-jax reproduce experiments/guessing.py      two turns, and a single one; three seeds each, with bands

The prompt is a name of six letters that tells nothing, a turn is a digit, and the environment answers ``+`` where the
number is higher and ``-`` where it is lower. The policy starts from games with independent guesses (fine-tuning, 150
steps), then plays 128 games an iteration, 120 times, and meets no name twice. The reward is 1 for a hit. Expected
(``ppo/score``, mean of the last ten iterations, seeds 0 to 2): 0.99, 0.99, 0.99 with two turns; 0.34, 0.28, 0.28 with
one. Hardware: two CPU cores, 13 s of processor time a seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from rlhf_jax.data.chat import ChatFormat
from rlhf_jax.data.tokenizers import CharTokenizer
from rlhf_jax.experiment import Experiment
from rlhf_jax.models import MLP, Attention, Block, Transformer
from rlhf_jax.objectives.group import GroupPolicy
from rlhf_jax.ops.kl import FixedKL
from rlhf_jax.runs.bands import Band, Runs
from rlhf_jax.sampling import Sampling
from rlhf_jax.stages.language import FineTune
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.settings import Training
from rlhf_jax.stages.turns import Turns
from rlhf_jax.training.optimizer import Optimizer

NUMBERS, TURNS = 3, 2


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(guess: str, number: str) -> str | None:
    """What a guess is told; None where the game is over."""
    if guess == number or guess not in [str(n) for n in range(NUMBERS)]:
        return None
    return "+" if guess < number else "-"


@dataclass(frozen=True)
class Guessing:
    """The game's answers, and its reward: 1 where the last guess is the number."""

    reads = ("number",)

    def reply(self, messages, record):
        return answer(messages[-1]["content"], record["number"])

    def rewards(self, answers):
        return np.array([float(a.text == a.record["number"]) for a in answers])


@dataclass(frozen=True)
class Games:
    """Names of games and their numbers: prompts."""

    count: int
    seed: int = 0

    def records(self):
        random = np.random.default_rng(self.seed)
        names = random.permutation(4**6)[: self.count]
        return [{"messages": [user("".join("abcd"[name >> 2 * i & 3] for i in range(6)))],
                 "number": str(random.integers(NUMBERS))} for name in names]  # fmt: skip


@dataclass(frozen=True)
class RandomGames:
    """Games in which every guess is independent: demonstrations."""

    count: int
    seed: int = 1

    def records(self):
        random, found = np.random.default_rng(self.seed), []
        for game in Games(self.count, self.seed).records():
            said = list(game["messages"])
            for turn in range(TURNS):
                guess = str(random.integers(NUMBERS))
                said.append({"role": "assistant", "content": guess})
                told = answer(guess, game["number"])
                if told is None or turn == TURNS - 1:
                    break
                said.append(user(told))
            found.append({"messages": said})
        return found


def config() -> Experiment:
    tokenizer = CharTokenizer("012+-abcd>")
    return Experiment(
        name="guessing",
        tokenizer=tokenizer,
        chat=ChatFormat("", "", ">", "", "", ""),
        model=Transformer(
            vocab_size=tokenizer.vocab_size,
            d_model=32,
            pattern=(Block(Attention(heads=2), MLP(128)),),
            repeats=2,
            max_length=20,
            init_std=0.2,
        ),
        stages=(
            FineTune(
                train=Training(steps=150, batch=32, length=20, optimizer=Optimizer(3e-3), log_every=50, save_every=150),
                data=(RandomGames(1000),),
                init=None,
            ),
            Reinforce(
                policy="sft",
                reward=Guessing(),
                critic=None,
                prompts=(Games(4096),),
                prompt_length=7,
                sampling=Sampling(max_new_tokens=2, samples_per_prompt=8),
                turns=Turns(environment=Guessing(), most=TURNS, length=7),
                ppo=GroupPolicy(baseline="leave-one-out", scale="none", kl=FixedKL(0.0)),
                optimizer=Optimizer(1.5e-3),
                iterations=120,
                prompts_per_iteration=16,
                minibatch=128,
                save_every=120,
                name="game",
            ),
        ),
        evaluation=None,
    )


def sweep():
    for turns in (TURNS, 1):
        for seed in range(3):
            yield f"turns-{turns}-{seed}", {"seed": seed, "stages.game.turns.most": turns}


def bands(runs: Runs):
    """Of the last ten iterations. These ask for 160 numbers, so that a share of a third has a deviation of 0.04."""
    for turns, low, high in ((TURNS, 0.95, None), (1, None, 0.45)):
        hits = [curve.values[-10:].mean() for curve in runs.curves("game", "ppo/score", f"turns-{turns}-*")]
        yield Band(f"share of hits, {turns} turn{'s' if turns > 1 else ''}", hits, low, high, judge="every")


def picture(runs: Runs) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axis = figure.add_subplot()
    for turns, color, word in ((TURNS, "#0072B2", "two turns"), (1, "#D55E00", "one turn")):
        for number, curve in enumerate(runs.curves("game", "ppo/score", f"turns-{turns}-*")):
            axis.plot(curve.steps, curve.values, color=color, linewidth=1, alpha=0.7, label=None if number else word)
    for share, word in ((2 / 3, "at best without listening:\ntwo guesses"), (1 / 3, "one guess")):
        axis.axhline(share, color="#333A42", linestyle=":", linewidth=1)
        axis.text(1.01, share, word, fontsize=8, color="#333A42", va="center", transform=axis.get_yaxis_transform())
    axis.set(xlabel="iteration", ylabel="share of hits", ylim=(0, 1.03), xlim=(0, 121))
    axis.legend(frameon=False, loc=(0.8, 0.68))
    return figure
