"""What overlap of rollout, scoring and update is worth: seconds of an iteration beside those of one that waits.

    python benchmarks/overlap.py            about ten minutes on two cores
    python benchmarks/overlap.py --tiny     whether it runs

RLOO of a small policy that ends hardly any response early, with a reward in plain Python that takes a chosen time for
each response, as a sandbox or a remote judge does, and no core meanwhile. Every way does the same work and takes turns
with the others, in runs of their own of a few iterations each; the first two of a run (compilation) do not count.
Writes results/overlap.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import experiment as programs
from rlhf_jax.data.chat import PLAIN
from rlhf_jax.data.tasks.base import TaskPrompts
from rlhf_jax.data.tasks.randomwalks import RandomWalks
from rlhf_jax.data.tokenizers import ByteTokenizer
from rlhf_jax.experiment import Experiment
from rlhf_jax.models import MLP, Attention, Block, Transformer, init_params
from rlhf_jax.objectives import group_presets
from rlhf_jax.ops.kl import FixedKL
from rlhf_jax.sampling import Sampling
from rlhf_jax.stages.outputs import Output, save_output
from rlhf_jax.stages.reinforce import Reinforce
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.optimizer import Optimizer

WAYS: dict[str, dict[str, int]] = {
    "waits": {},
    "rollout_parts=4": {"rollout_parts": 4},
    "ahead=1": {"ahead": 1},
    "ahead=1, rollout_parts=4": {"ahead": 1, "rollout_parts": 4},
}
MILLISECONDS = (0.0, 5.0, 20.0)
RESULTS = Path(__file__).resolve().parent / "results"
WARM = 2
"""Iterations of a run that are left out."""


@dataclass(frozen=True)
class Slow:
    """The share of a response's letters that are ``a``, after so many milliseconds."""

    milliseconds: float

    def golds(self, prompts: Sequence[Any], responses: Sequence[str]) -> np.ndarray:
        time.sleep(self.milliseconds * len(responses) / 1000)
        return np.array([text.count("a") / max(len(text), 1) for text in responses])


def experiment(policy: Path, milliseconds: float, iterations: int, tiny: bool, **way: Any) -> Experiment:
    task = RandomWalks()
    stage = Reinforce(
        policy=str(policy), reward=Slow(milliseconds), critic=None, prompts=(TaskPrompts(task, 20),), prompt_length=1,
        sampling=Sampling(max_new_tokens=8 if tiny else 120, samples_per_prompt=4),
        ppo=replace(group_presets.rloo, kl=FixedKL(0.0)), optimizer=Optimizer(1e-4), iterations=iterations,
        prompts_per_iteration=4 if tiny else 16, minibatch=16 if tiny else 64, save_every=10**6, **way,
    )  # fmt: skip
    return Experiment(
        name="overlap", tokenizer=ByteTokenizer(), chat=PLAIN, model=model(tiny), stages=(stage,),
        evaluation=None,
    )  # fmt: skip


def model(tiny: bool) -> Transformer:
    width, repeats = (16, 1) if tiny else (96, 2)
    return Transformer(
        vocab_size=ByteTokenizer().vocab_size, d_model=width, pattern=(Block(Attention(heads=4), MLP(4 * width)),),
        repeats=repeats, max_length=128,
    )  # fmt: skip


def measure(folder: Path, rounds: int, iterations: int, tiny: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds of every iteration, by milliseconds and way; the ways take turns."""
    net = model(tiny)
    params = jax.jit(lambda key: init_params(net, key))(jax.random.key(0))
    save_output(folder / "policy", Output(net, params, ByteTokenizer(), {}))
    found: dict[str, dict[str, list[float]]] = {f"{ms:g}": {way: [] for way in WAYS} for ms in MILLISECONDS}
    for number in range(rounds):
        for ms in MILLISECONDS:
            for name, way in WAYS.items():
                run = folder / f"{number}-{ms:g}-{name}"
                programs.run(experiment(folder / "policy", ms, WARM + iterations, tiny, **way), run)
                rows = read_metrics(run / "ppo/metrics.jsonl")[WARM:]
                # The last iteration draws nothing ahead, so it says nothing about the others.
                found[f"{ms:g}"][name] += [1 / row["perf/iterations_per_s"] for row in rows[:-1]]
                print(f"round {number + 1}, {ms:g} ms, {name}: {statistics.median(found[f'{ms:g}'][name]):.3f} s")
    return found


def table(found: dict[str, dict[str, list[float]]], responses: int) -> str:
    """Medians with their ranges, and how many times as fast as waiting."""
    lines = ["| reward takes | waits | " + " | ".join(list(WAYS)[1:]) + " |", "|---" * (1 + len(WAYS)) + "|"]
    for ms, ways in found.items():
        base = statistics.median(ways["waits"])
        cells = [f"{ms} ms a response, {float(ms) * responses / 1000:.2f} s in all"]
        for name, seconds in ways.items():
            middle = statistics.median(seconds)
            times = "" if name == "waits" else f", {base / middle:.2f} times"
            cells.append(f"{middle:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}){times}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=8, help="of a run, those for compilation not counted")
    options = parser.parse_args()
    rounds, iterations = (1, 2) if options.tiny else (options.rounds, options.iterations)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), rounds, iterations, options.tiny)
    responses = 16 if options.tiny else 64
    text = table(found, responses)
    print(text)
    if options.tiny:
        return
    load = f"{os.getloadavg()[1]:.1f}"
    machine = {
        "load": load,
        "machine": platform.machine(),
        "jax": jax.__version__,
        "device": str(jax.devices()[0].platform),
    }
    (RESULTS / "overlap.json").write_text(json.dumps({**machine, "responses": responses, "seconds": found}, indent=1))
    (RESULTS / "overlap.md").write_text(
        f"# Seconds of an iteration\n\n`benchmarks/overlap.py`, {rounds} rounds of {iterations - 1} iterations a way, "
        f"{responses} responses of at most 120 tokens, JAX {jax.__version__} on {machine['device']}: medians "
        f"(and ranges). Load at the end: {load} (with nothing else running, about 2).\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
