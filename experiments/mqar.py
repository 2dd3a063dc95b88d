"""Recall from context by mixer: associative recall (MQAR), induction and copying, against the size of the decode state.

Asks: how much of what stood earlier in a row can a layer bring back, for the bytes that it keeps while decoding?

    python experiments/mqar.py                 train all, then the table and the plot in runs/mqar-sweep/
    rlhf-jax sweep experiments/mqar.py         the training alone

The protocol of MQAR is Zoology's (arXiv 2312.04927) with a smaller vocabulary and shorter rows; ``--published`` takes
its sizes. The answer is written behind its question, where Zoology leaves a random token, since targets here are next
tokens. Models have two layers of attention with feed-forwards, or four gated units without, which have about as many
parameters. One model learns the mixture of all puzzles; tests have other seeds and are up to twice as long as in
training. Numbers are one seed each. Hardware: two CPU cores, about a minute a mixer.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table

from rlhf_jax import config as configuration
from rlhf_jax.data.pipelines import one_pass
from rlhf_jax.data.tables import demonstration_table
from rlhf_jax.data.tasks.base import TaskDemonstrations
from rlhf_jax.data.tasks.recall import MQAR, Copy, Induction, Unmarked, alphabet
from rlhf_jax.data.tokenizers import CharTokenizer
from rlhf_jax.experiment import Experiment, run
from rlhf_jax.models import FLASH, GAU, Attention, Block, SwiGLU, Transformer, count_params, empty_cache
from rlhf_jax.models.mixers import Fixed, Parallel, Strided
from rlhf_jax.stages.language import FineTune
from rlhf_jax.stages.outputs import Output, load_output
from rlhf_jax.stages.settings import Training
from rlhf_jax.training.optimizer import Optimizer

STAGE = "recall"


@dataclass(frozen=True)
class Protocol:
    """Sizes of everything.

    Args:
        vocab: number of tokens.
        length: of training rows, in which shorter examples are packed.
        longest: of any test.
        batch: rows of a step.
        steps: of training.
        trained: puzzles, and how many examples of each; one model learns the mixture.
        tested: puzzles by kind and name.
    """

    vocab: int
    length: int
    longest: int
    batch: int
    steps: int
    trained: Mapping[Any, int]
    tested: Mapping[str, Mapping[str, Any]]


SMALL = Protocol(
    vocab=32,
    length=32,
    longest=64,
    batch=64,
    steps=800,
    trained={MQAR(32, pairs, 32): 8_000 for pairs in (2, 4, 8)}
    | {Induction(32, 32): 12_000}
    | {Copy(tokens, 32): 700 for tokens in range(4, 16)},
    tested={
        "mqar": {
            f"{pairs} pairs in {length}": MQAR(length, pairs, 32) for length, pairs in ((32, 4), (32, 8), (64, 8))
        },
        "induction": {f"{length} tokens": Induction(length, 32) for length in (16, 32, 64)},
        "copy": {f"{tokens} tokens": Copy(tokens, 32) for tokens in (7, 15, 31)},
    },
)
PUBLISHED = Protocol(
    vocab=8192,
    length=256,
    longest=1024,
    batch=128,
    steps=20_000,
    trained={MQAR(64, 4): 100_000} | {MQAR(*sizes): 20_000 for sizes in ((128, 8), (256, 16), (256, 32), (256, 64))},
    tested={
        "mqar": {
            f"{pairs} pairs in {length}": MQAR(length, pairs)
            for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
        }
    },
)
"""Zoology's examples; the number of steps and the batch are ours."""


def layers(*mixers):
    """A pattern of these mixers, each before a feed-forward."""
    return tuple(Block(mixer, SwiGLU(128)) for mixer in mixers)


def units(mixer):
    """Four gated units, which are mixer and feed-forward in one."""
    return tuple(Block(mixer, ffn=None) for _ in range(4))


MIXERS = {
    "attention": layers(Attention(2), Attention(2)),
    "one-kv-head": layers(Attention(2, 1), Attention(2, 1)),
    **{f"window-{size}": layers(*[Attention(2, window=size)] * 2) for size in (4, 8, 16)},
    "window-8-sinks-2": layers(*[Attention(2, window=8, sinks=2)] * 2),
    "dense-then-window-8": layers(Attention(2), Attention(2, window=8)),
    "local-then-strided": layers(Attention(2, window=6), Strided(2, stride=6)),
    "local-beside-strided": layers(
        *[Parallel((Attention(1, head_dim=32, window=6), Strided(1, stride=6, head_dim=32)))] * 2
    ),
    "fixed": layers(*[Fixed(2, block=6, columns=1)] * 2),
    "gau": units(GAU(key_dim=32)),
    **{f"flash-{size}": units(FLASH(key_dim=32, chunk=size)) for size in (4, 8)},
}


def config(protocol: Protocol = SMALL) -> Experiment:
    optimizer = Optimizer(5e-3, schedule="cosine", warmup_fraction=0.1, b2=0.98)
    train = Training(
        steps=protocol.steps, batch=protocol.batch, length=protocol.length, optimizer=optimizer, log_every=50
    )
    data = tuple(TaskDemonstrations(task, count) for task, count in protocol.trained.items())
    return Experiment(
        name="mqar",
        tokenizer=CharTokenizer(alphabet(protocol.vocab)),
        chat=Unmarked(),
        model=Transformer(
            vocab_size=protocol.vocab + 2,
            d_model=64,
            pattern=MIXERS["attention"],
            max_length=protocol.longest,
            init_std=0.1,
        ),
        stages=(FineTune(name=STAGE, train=train, data=data, init=None),),
    )


def sweep():
    for name, pattern in MIXERS.items():
        yield name, {"model.pattern": pattern}


def accuracy(output: Output, task, count: int = 256) -> float:
    """The share of answers that are the likeliest next token."""
    records = TaskDemonstrations(task, count, seed=1000).records()
    length = sum(len(message["content"]) for message in records[0]["messages"])
    rows = demonstration_table(records, output.tokenizer, Unmarked(), length, pack=False).rows
    counts = [_right(output.trunk, output.params, batch) for batch in one_pass(rows, 64)]
    right, asked = np.sum(np.array(counts), axis=0)
    return float(right / asked)


@functools.partial(jax.jit, static_argnums=0)
def _right(model: Transformer, params, batch):
    logits, _, _ = model.apply({"params": params}, batch.tokens, batch.context)
    hits = (jnp.argmax(logits[:, :-1], axis=-1) == batch.tokens[:, 1:]) * batch.loss_mask[:, 1:]
    return jnp.sum(hits), jnp.sum(batch.loss_mask[:, 1:])


def state_bytes(model: Transformer, slots: int) -> int:
    """What the layers of one row keep while they decode ``slots`` tokens."""
    cache = jax.eval_shape(lambda: empty_cache(model, 1, slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))


def measure(directory: Path, protocol: Protocol) -> dict:
    """State size and accuracies of one run."""
    output = load_output(directory / STAGE / "output")
    scores = {
        kind: {name: accuracy(output, task) for name, task in tests.items()} for kind, tests in protocol.tested.items()
    }
    sizes = {"parameters": count_params(output.trunk), "state_bytes": state_bytes(output.trunk, protocol.length)}
    return {"name": directory.name, **sizes, **scores}


def tabulate(rows: list[dict], protocol: Protocol) -> Table:
    title = f"share of right answers; state of a row of {protocol.length} tokens"
    table = Table("mixer", "parameters", "state (kB)", title=title)
    tests = [(kind, name) for kind, found in protocol.tested.items() for name in found]
    for kind, name in tests:
        table.add_column(f"{kind}\n{name}", justify="right")
    for row in rows:
        numbers = [f"{row[kind][name]:.2f}" for kind, name in tests]
        table.add_row(row["name"], str(row["parameters"]), f"{row['state_bytes'] / 1000:.1f}", *numbers)
    return table


def picture(rows: list[dict], protocol: Protocol) -> Figure:
    """Accuracy against the size of the state: a panel for each kind of puzzle, a colour a mixer, a mark a test."""
    figure = Figure(figsize=(4.2 * len(protocol.tested) + 2.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(1, len(protocol.tested), sharey=True))
    colours = matplotlib.colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    for axis, (kind, tests) in zip(axes, protocol.tested.items(), strict=True):
        marks = dict(zip(tests, "osD^vP*", strict=False))
        for number, row in enumerate(rows):
            size, colour = row["state_bytes"] / 1000, colours[number % len(colours)]
            found = [row[kind][test] for test in tests]
            axis.plot([size, size], [min(found), max(found)], "-", lw=1, color=colour, alpha=0.6)
            for test, mark in marks.items():
                axis.plot(size, row[kind][test], mark, ms=6, color=colour, mec="white", mew=0.5)
        handles = [Line2D([], [], marker=mark, ls="", color="grey", label=test) for test, mark in marks.items()]
        axis.legend(handles=handles, fontsize=7, loc="upper left")
        axis.set(xscale="log", title=kind, xlabel="decode state of a row (kB)", ylim=(-0.03, 1.25))
        axis.set_yticks(np.arange(0.0, 1.01, 0.2))
        axis.grid(alpha=0.25)
    mixers = [
        Line2D([], [], marker="o", ls="", color=colours[i % len(colours)], label=row["name"])
        for i, row in enumerate(rows)
    ]
    figure.legend(handles=mixers, loc="outside right center", fontsize=8, title="mixer")
    axes[0].set_ylabel("share of right answers")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Train every mixer on the puzzles; write the table and the plot.")
    parser.add_argument("--root", type=Path, default=Path("runs") / "mqar-sweep")
    parser.add_argument("--published", action="store_true", help="MQAR in the published sizes; wants a GPU")
    parser.add_argument("--only", nargs="*", help="names of the sweep; all others are left out")
    arguments = parser.parse_args()
    console, protocol = Console(width=220), PUBLISHED if arguments.published else SMALL
    rows = []
    for name, changes in sweep():
        if arguments.only is not None and name not in arguments.only:
            continue
        directory = arguments.root / name
        experiment = configuration.override(config(protocol), changes)
        console.rule(name)
        run(experiment, directory, resume=True, source=Path(__file__), overrides=changes, announce=console.print)
        rows.append(measure(directory, protocol))
    (arguments.root / "recall.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    picture(rows, protocol).savefig(arguments.root / "recall.png", dpi=150)
    console.print(tabulate(rows, protocol))
    console.print(f"as numbers and as a picture: {arguments.root / 'recall.json'}, {arguments.root / 'recall.png'}")


if __name__ == "__main__":
    main()
