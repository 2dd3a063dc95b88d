"""What a stage is planned as: programs with abstract arguments, and the shapes that go into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import abstract_params
from rlhf_jax.planning.work import Work
from rlhf_jax.sharding import Placement, with_shardings
from rlhf_jax.training.step import init_state
from rlhf_jax.types import (
    LabelledBatch,
    PreferenceBatch,
    PyTree,
    RankingBatch,
    RewardedBatch,
    SafetyBatch,
    TokenBatch,
    TrainState,
    filled,
)

STEPS = 10**9
"""Stands for a number of steps that is not known without the data; no shape depends on it."""


@dataclass(frozen=True)
class Program:
    """One compiled function and its abstract arguments.

    Args:
        name: what it does in the stage.
        function: jitted or not.
        arguments: abstract arrays with shardings (without, on one device).
        placement: the mesh that it is traced for.
        work: what it has to compute, by formula.
        shape: rows, on all devices, and tokens of one pass through a model.
        runs: executions in one step of the stage (one update, or one iteration of reinforcement learning).
        transient: arguments that are there for this program only, by what they are; the others are the stage's.
        parked: what of the stage's waits in the host's memory while it runs.
        loss: ``(params, batch) -> scalar`` and its arguments for one microbatch, if it is differentiated.
        trips: rounds of a loop that ends by its data.
        cache: keys and values that it makes, abstract, without shardings.
        smaller: the same program of a model with another number of repeats, where layers are not a loop in it.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    placement: Placement
    work: Work
    shape: tuple[int, int]
    runs: int = 1
    transient: Mapping[str, PyTree] = field(default_factory=dict)
    parked: tuple[str, ...] = ()
    loss: tuple[Callable[..., Any], PyTree, Callable[[int], PyTree], int] | None = None
    trips: int = 1
    cache: PyTree = None
    smaller: Callable[[int], Program] | None = None


@dataclass(frozen=True)
class Stage:
    """A stage as its programs, and what lies on the devices all the while.

    Args:
        name: of the stage.
        programs: in the order in which they run.
        resident: abstract arrays with shardings by what they are: "parameters", "optimizer", "average", "frozen" (what
            is not trained), "start" (what training began with), "reference", "teacher", "reward" and "ahead" (the
            next rollout, and the policy that draws it).
        tokens: of one step, which ``tokens/s`` counts.
        counted: what these tokens are.
    """

    name: str
    programs: tuple[Program, ...]
    resident: Mapping[str, PyTree]
    tokens: int
    counted: str


def train_state(
    params: PyTree, optimizer: Any, ema: bool, shardings: PyTree, frozen: PyTree | None = None
) -> TrainState:
    state = jax.eval_shape(lambda p, f: init_state(p, optimizer, ema=ema, frozen=f), params, frozen)
    return with_shardings(state, shardings)


def resident(state: TrainState) -> dict[str, PyTree]:
    found = {"parameters": state.params, "optimizer": (state.opt_state, state.step)}
    more = {"average": state.ema, "frozen": state.frozen}
    return found | {kind: tree for kind, tree in more.items() if tree is not None}


def placed(tree: PyTree, placement: Placement) -> PyTree:
    return with_shardings(tree, placement.batch(tree))


def params_of(model: Any, placement: Placement) -> PyTree:
    """Abstract parameters with their shardings."""
    return with_shardings(abstract_params(model), placement.params(model))


def of_trained(loss: Callable[..., Any], frozen: PyTree | None) -> Callable[..., Any]:
    """The loss as a function of what is trained alone; what is frozen has shapes and no values."""

    def filled_in(params: PyTree, *others: Any) -> Any:
        return loss(filled(params, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), frozen)), *others)

    return filled_in


def texts(length: int, rows: int) -> TokenBatch:
    whole = ints(rows, length)
    return TokenBatch(whole, whole, whole, jax.ShapeDtypeStruct((rows, length), jnp.float32))  # pyright: ignore


def rankings(responses: int, length: int, prompts: int) -> RankingBatch:
    each = ints(prompts, responses)
    return RankingBatch(ints(prompts, responses, length), each, each)


def safety(responses: int, length: int, prompts: int) -> SafetyBatch:
    """Labelled rankings, abstract."""
    each, unsafe = ints(prompts, responses), jax.ShapeDtypeStruct((prompts, responses), jnp.bool_)
    return SafetyBatch(ints(prompts, responses, length), each, each, unsafe)  # pyright: ignore


def preferences(responses: int, length: int, prompts: int) -> PreferenceBatch:
    """Rankings whose prompts are known, abstract."""
    each, said = ints(prompts, responses), jax.ShapeDtypeStruct((prompts, responses), jnp.float32)
    return PreferenceBatch(ints(prompts, responses, length), each, ints(prompts), each, said)  # pyright: ignore


def labels(sequences: int, length: int, rows: int) -> LabelledBatch:
    """Good and bad responses, abstract."""
    each, said = ints(rows, sequences), jax.ShapeDtypeStruct((rows, sequences), jnp.float32)
    good = jax.ShapeDtypeStruct((rows,), jnp.bool_)
    return LabelledBatch(ints(rows, sequences, length), each, ints(rows), good, said)  # pyright: ignore


def rewarded(length: int, rows: int) -> RewardedBatch:
    """Responses with rewards, abstract."""
    rewards = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    return RewardedBatch(ints(rows, length), ints(rows), ints(rows), rewards)  # pyright: ignore


def ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def random_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))
