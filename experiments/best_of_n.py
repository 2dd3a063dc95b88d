"""Best-of-n against its closed form: how far from a policy do the best of n of its responses lie?

Asks: is KL(best-of-n, policy) equal to log n - (n - 1) / n, as Stiennon et al. 2020 and Gao et al. 2022 have it? Where
is it not (Beirami et al. 2024, https://arxiv.org/abs/2401.01879)? Does PPO use more KL for the same reward?

    rlhf-jax run experiments/best_of_n.py            one seed
    rlhf-jax reproduce experiments/best_of_n.py      three seeds, with the expected bands

A language model of words of four letters, which are few enough to know the probability of each. The reward is a liking
for each letter in each place, without ties. ``best-of-N`` draws N words 16,384 times (8,192 with N = 64) and keeps the
best of each N, which a copy of the policy imitates. The KL is measured twice without the formula: from the counts of
the words that were kept, and exactly, over all words, of the imitator. Two settings break what the formula assumes:
``ties-N`` rounds the reward, and ``letter-N`` draws words of one letter, each of which is probable.

PPO climbs the same reward without a KL penalty; its KL and reward are those of its samples, iteration by iteration, and
a cubic in the root of the KL goes through those below 4 nats. ``ppo-penalty`` has a penalty and is judged by its end.
The best reward at a KL is that of ``p exp(t reward)``. Expected: counts within 0.04 nats of the formula, imitators 0.01
(N = 2) to 0.13 (N = 64) under it. Hardware: two CPU cores, 111 s of processor time a seed.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rlhf_jax.data.chat import PLAIN
from rlhf_jax.data.tokenizers import CharTokenizer
from rlhf_jax.evaluation.outcomes import every_response, kl_of_draws
from rlhf_jax.experiment import Experiment
from rlhf_jax.models import MLP, Attention, Block, Transformer
from rlhf_jax.objectives.ppo import PPO
from rlhf_jax.ops.best_of_n import best_of_n, best_of_n_kl, best_of_n_kl_bound
from rlhf_jax.ops.kl import FixedKL
from rlhf_jax.runs.bands import Band, Runs
from rlhf_jax.runs.read import Run
from rlhf_jax.sampling import Sampling
from rlhf_jax.stages.best_of_n import ExpertIteration
from rlhf_jax.stages.evaluation import Evaluation
from rlhf_jax.stages.language import Pretrain
from rlhf_jax.stages.outputs import load_output
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.stages.settings import Training
from rlhf_jax.training.optimizer import Optimizer

NUMBERS, BROKEN = (2, 4, 8, 16, 64), (4, 64)
DRAWS = {2: 16_384, 4: 16_384, 8: 16_384, 16: 16_384, 64: 8_192}
LETTERS, ASKED, PLACES = "abcdef", ">", 4
TABLE = np.random.default_rng(7).normal(size=(PLACES, len(LETTERS) + 1))
ROUND = 2.0
WITHIN, NEAR, PENALTY = 0.04, 0.2, 0.5
SOURCE, BOUND = "Stiennon et al. 2020, appendix G.3", "Beirami et al. 2024, theorem 1"
LESS = "Gao et al. 2022: best-of-n uses less KL"


@dataclass(frozen=True)
class Words:
    """Words in which each letter depends on the one before: texts."""

    count: int
    seed: int = 0

    def records(self):
        chain = np.random.default_rng(5).dirichlet(np.full(len(LETTERS), 3.0), size=len(LETTERS))
        random = np.random.default_rng(self.seed)
        letters = [random.integers(len(LETTERS), size=self.count)]
        for _ in range(PLACES - 1):
            above = np.cumsum(chain[letters[-1]], axis=1) > random.random((self.count, 1))
            letters.append(above.argmax(axis=1))
        return [{"text": ASKED + "".join(LETTERS[i] for i in word)} for word in np.stack(letters, axis=1)]


@dataclass(frozen=True)
class Asked:
    """So many times the one prompt."""

    count: int

    def records(self):
        return [{"messages": [{"role": "user", "content": ASKED}]}] * self.count


@functools.cache
def liking(word: str) -> float:
    return float(sum(TABLE[place, (LETTERS + ASKED).index(letter)] for place, letter in enumerate(word)))


@dataclass(frozen=True)
class Taste:
    """How a word is liked, rounded to multiples of ``step``; with 0 no two words are liked alike."""

    step: float = 0.0

    def golds(self, prompts, responses):
        likings = np.array([liking(word) for word in responses])
        return likings if self.step == 0 else np.round(likings / self.step) * self.step


def best_of(n: int, name: str, step: float = 0.0, places: int = PLACES, rate: float = 0.0) -> ExpertIteration:
    return ExpertIteration(
        name=f"{name}-{n}",
        policy="base",
        reward=Taste(step),
        prompts=(Asked(DRAWS[n]),),
        prompt_length=1,
        sampling=Sampling(max_new_tokens=places, samples_per_prompt=n),
        optimizer=Optimizer(rate, schedule="cosine", b2=0.95),
        rounds=1,
        prompts_per_round=DRAWS[n],
        prompts_at_a_time=2048,
        minibatch=256,
        epochs=8 if rate else 1,
        export=True,
    )


def ppo(name: str, penalty: float, rate: float, iterations: int) -> Reinforce:
    return Reinforce(
        name=name,
        policy="base",
        reward=Taste(),
        critic="policy",
        prompts=(Asked(2048),),
        prompt_length=1,
        sampling=Sampling(max_new_tokens=PLACES),
        ppo=PPO(kl=FixedKL(penalty), value_coef=1.0),
        optimizer=Optimizer(rate, b2=0.95),
        iterations=iterations,
        prompts_per_iteration=2048,
        minibatch=512,
        epochs=1,
        save_every=iterations,
        samples_every=iterations,
    )


def config() -> Experiment:
    tokenizer = CharTokenizer(LETTERS + ASKED)
    imitated = [best_of(n, "best-of", rate=3e-3) for n in NUMBERS]
    broken = [best_of(n, "ties", step=ROUND) for n in BROKEN] + [best_of(n, "letter", places=1) for n in BROKEN]
    return Experiment(
        name="best-of-n",
        tokenizer=tokenizer,
        chat=PLAIN,
        model=Transformer(
            vocab_size=tokenizer.vocab_size,
            d_model=32,
            pattern=(Block(Attention(heads=2), MLP(128)),),
            repeats=1,
            max_length=24,
            init_std=0.1,
        ),
        stages=(
            Pretrain(
                name="base",
                train=Training(steps=200, batch=64, length=24, optimizer=Optimizer(3e-3), log_every=50, save_every=200),
                data=(Words(20_000),),
            ),
            *imitated,
            *broken,
            ppo("ppo", 0.0, 2e-4, 40),
            ppo("ppo-penalty", PENALTY, 3e-4, 80),
        ),
        evaluation=Evaluation(
            prompts=(Asked(64),),
            prompt_length=1,
            sampling=Sampling(max_new_tokens=PLACES, samples_per_prompt=64),
            gold=Taste(),
            baseline="base",
            best_of=NUMBERS,
        ),
    )


def sweep():
    for seed in range(3):
        yield {"seed": seed}


@functools.cache
def words(path: Path, stage: str = "base", places: int = PLACES) -> dict[str, float]:
    """Every word with its probability under the policy that a stage of a run has left."""
    output = load_output(path / stage / "output")
    prompt, end = output.tokenizer.encode(ASKED), output.tokenizer.eos_id
    return every_response(output.trunk, output.params, prompt, places, end).by_text(output.tokenizer.decode)


def drawn(run: Run, stage: str, places: int = PLACES) -> float:
    """The KL of the kept words from the base, by their counts."""
    rows = (run.path / stage / "kept-1.jsonl").read_text(encoding="utf-8").splitlines()
    counts = Counter(json.loads(row)["messages"][-1]["content"] for row in rows)
    base = words(run.path, places=places)
    return kl_of_draws(np.array([counts[word] for word in base]), np.array(list(base.values())))


def exact(run: Run, n: int, step: float = 0.0, places: int = PLACES) -> float:
    base = words(run.path, places=places)
    return best_of_n_kl(np.array(list(base.values())), Taste(step).golds(None, base), n)


def divergence(probs: np.ndarray, base: np.ndarray) -> float:
    there = probs > 0
    return float(np.sum(probs[there] * np.log(probs[there] / base[there])))


def imitated(run: Run, n: int) -> float:
    """The exact KL from the base of the policy that has imitated best-of-n."""
    base, copy = words(run.path), words(run.path, f"best-of-{n}")
    return divergence(np.array([copy[word] for word in base]), np.array(list(base.values())))


@dataclass(frozen=True)
class Frontier:
    """Reward over KL of one run: the best there is, best-of-n, and PPO."""

    best: tuple[np.ndarray, np.ndarray]
    chosen: tuple[np.ndarray, np.ndarray]
    ppo: tuple[np.ndarray, np.ndarray]
    penalised: tuple[float, float]

    def best_at(self, kl: float) -> float:
        return float(np.interp(kl, *self.best))

    def ppo_at(self, kl: float) -> float:
        """By a cubic in the root of the KL through the iterations below 4 nats."""
        kls, rewards = (values[self.ppo[0] < 4] for values in self.ppo)
        return float(np.polyval(np.polyfit(np.sqrt(np.maximum(kls, 0.0)), rewards, 3), np.sqrt(kl)))


def frontier(run: Run) -> Frontier:
    base = words(run.path)
    probs, likings = np.array(list(base.values())), Taste().golds(None, base)
    tilted = [probs * np.exp(t * (likings - likings.max())) for t in np.linspace(0, 6, 400)]
    tilted = [weights / weights.sum() for weights in tilted]
    best = np.array([divergence(each, probs) for each in tilted]), np.array([each @ likings for each in tilted])
    chosen = [best_of_n(probs, likings, n) for n in NUMBERS]
    kept = np.array([divergence(each, probs) for each in chosen]), np.array([each @ likings for each in chosen])
    curves, end = run.stages["ppo"].metrics, words(run.path, "ppo-penalty")
    last = np.array([end[word] for word in base])
    climbed = curves["kl/sequence"].values, curves["ppo/score"].values
    return Frontier(best, kept, climbed, (divergence(last, probs), float(last @ likings)))


def bands(runs: Runs):
    members = list(runs.values())
    for n in NUMBERS:
        off = [drawn(run, f"best-of-{n}") - best_of_n_kl_bound(n) for run in members]
        yield Band(f"KL of the best of {n} by its draws, less the closed form", off, -WITHIN, WITHIN, SOURCE, "every")
    for n in NUMBERS:
        off = [imitated(run, n) - best_of_n_kl_bound(n) for run in members]
        yield Band(f"KL of a policy that imitates the best of {n}, less the closed form", off, -NEAR, NEAR, SOURCE)
    for name, what, step, places in (("ties", "ties", ROUND, PLACES), ("letter", "probable outcomes", 0.0, 1)):
        for n in BROKEN:
            kls = [(drawn(run, f"{name}-{n}", places), exact(run, n, step, places)) for run in members]
            claim = f"{what}, best of {n}: draws less"
            yield Band(f"{claim} the exact KL", [a - b for a, b in kls], -WITHIN, WITHIN, judge="every")
            off = [a - best_of_n_kl_bound(n) for a, _ in kls]
            yield Band(f"{claim} the closed form", off, high=0.0, source=BOUND, judge="every")
    found = [frontier(run) for run in members]
    for i, n in enumerate(NUMBERS):
        gains = [(each.chosen[1][i], each.best_at(each.chosen[0][i]), each.ppo_at(each.chosen[0][i])) for each in found]
        claim = f"reward at the KL of the best of {n}: best-of-n less"
        yield Band(f"{claim} the best there is", [a - b for a, b, _ in gains])
        yield Band(f"{claim} PPO", [a - c for a, _, c in gains], low=0.0, source=LESS, judge="every")
    ends = [each.penalised for each in found]
    yield Band(f"KL of PPO with a penalty of {PENALTY:g}", [kl for kl, _ in ends])
    behind = [reward - each.best_at(kl) for each, (kl, reward) in zip(found, ends, strict=True)]
    yield Band("reward at that KL: PPO less the best there is", behind)


def picture(runs: Runs) -> Figure:
    """Left the KL over n, counted and exact; right the reward over the KL. Every seed is drawn."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    members, many = list(runs.values()), np.unique(np.geomspace(1, 100, 60).round().astype(int))
    left.plot(many, [best_of_n_kl_bound(int(n)) for n in many], "-", color="#333A42", label="log n - (n - 1) / n")
    for name, step, places, numbers, color, marker, label in (
        ("best-of", 0.0, PLACES, NUMBERS, "#0072B2", "o", "no ties"),
        ("ties", ROUND, PLACES, BROKEN, "#D55E00", "s", "ties"),
        ("letter", 0.0, 1, BROKEN, "#009E73", "^", "six probable outcomes"),
    ):
        counted = [drawn(run, f"{name}-{n}", places) for run in members for n in numbers]
        left.plot(numbers * len(members), counted, marker, color=color, fillstyle="none", label=f"{label}, counted")
        if name != "best-of":
            values = [exact(members[0], int(n), step, places) for n in many]
            left.plot(many, values, ":", color=color, label=f"{label}, exact")
    copies = [imitated(run, n) for run in members for n in NUMBERS]
    left.plot(NUMBERS * len(members), copies, "x", color="#CC79A7", markersize=5, label="no ties, imitated")
    left.set(xscale="log", xlabel="n", ylabel="KL from the base (nats)")
    left.set_xticks((1, *NUMBERS), [str(n) for n in (1, *NUMBERS)])
    left.minorticks_off()
    for number, each in enumerate(map(frontier, members)):
        for points, style, color, label in (
            (each.best, "-", "#333A42", "the best there is"),
            (each.chosen, "o", "#0072B2", "best of 2, 4, 8, 16, 64"),
            (each.ppo, ".", "#E69F00", "PPO without a penalty, on its way"),
            (each.penalised, "*", "#CC79A7", "PPO with one, its end"),
        ):
            right.plot(*points, style, color=color, fillstyle="none", label=None if number else label)
    right.set(xlabel="KL from the base (nats)", ylabel="reward", xlim=(-0.1, 4))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
    return figure
