"""The programs of stages on meshes; ``test_sharding.py`` runs them where there are eight simulated devices."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import Attention, Block, MoE, ScalarModel, SwiGLU, Transformer, init_params
from rlhf_jax.objectives.language import LanguageModel
from rlhf_jax.objectives.policy import Controller, PolicyOptimization, SeparateCritic, SharedCritic
from rlhf_jax.objectives.ppo import PPO
from rlhf_jax.objectives.ptx import PtxMix
from rlhf_jax.objectives.reward import RewardModel
from rlhf_jax.ops.routing import TopK
from rlhf_jax.sampling import Sampling, sample, sample_compiled
from rlhf_jax.sharding import Layout, Placement, fetch
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.optimizer import Optimizer
from rlhf_jax.training.step import init_state, make_train_step
from rlhf_jax.types import PromptBatch, RankingBatch, Scores, TokenBatch

MODEL = Transformer(
    vocab_size=32, d_model=16, repeats=2, max_length=32, init_std=0.2, tie_embeddings=False,
    pattern=(Block(Attention(heads=4, kv_heads=2, qkv_bias=True), SwiGLU(32)),),
)  # fmt: skip
EXPERTS = MODEL.clone(
    pattern=(Block(Attention(heads=4, kv_heads=2), MoE(4, 2, 16, router=TopK("sigmoid"), bias_rate=0.01)),)
)
SCORER = ScalarModel(MODEL)
SAMPLING = Sampling(max_new_tokens=8, samples_per_prompt=2)
KEY = jax.random.key(0)
COLLECTIVES = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def texts(rows: int = 16, length: int = 16) -> TokenBatch:
    """Rows with two documents and padding."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, MODEL.vocab_size, (rows, length)).astype(np.int32)
    slots = np.broadcast_to(np.arange(length), tokens.shape)
    first, end = random.integers(3, 7, (rows, 1)), random.integers(10, length + 1, (rows, 1))
    segments = np.where(slots < first, 1, np.where(slots < end, 2, 0)).astype(np.int32)
    positions = np.where(slots < first, slots, np.where(slots < end, slots - first, 0)).astype(np.int32)
    return TokenBatch(tokens, positions, segments, (segments > 0).astype(np.float32))


def rankings() -> RankingBatch:
    random = np.random.default_rng(1)
    tokens = random.integers(1, MODEL.vocab_size, (8, 3, 16)).astype(np.int32)
    ranks = np.broadcast_to(np.array([0, 2, 1], np.int32), (8, 3)).copy()
    ranks[::3, 2] = -1
    return RankingBatch(tokens, random.integers(4, 17, (8, 3)).astype(np.int32), ranks)


def prompts() -> PromptBatch:
    random = np.random.default_rng(2)
    tokens = random.integers(1, MODEL.vocab_size, (8, 8)).astype(np.int32)
    return PromptBatch(tokens, random.integers(2, 9, (8,)).astype(np.int32), np.arange(8, dtype=np.int32))


def params_of(model, seed: int, placement: Placement):
    return init_params(model, jax.random.key(seed), placement.params(model))


def language(placement: Placement):
    objective = LanguageModel(MODEL, name="lm")
    return objective, params_of(MODEL, 1, placement), placement.params(MODEL), texts()


def experts(placement: Placement):
    return LanguageModel(EXPERTS), params_of(EXPERTS, 1, placement), placement.params(EXPERTS), texts()


def reward(placement: Placement):
    return RewardModel(SCORER), params_of(SCORER, 2, placement), placement.params(SCORER), rankings()


def rollout(placement: Placement):
    sampling = placement.folded()
    policy = sampling.put(params_of(MODEL, 1, placement), sampling.params(MODEL))
    with sampling.active():
        found = sample(MODEL, policy, sampling.put_batch(prompts()), SAMPLING, KEY, eos_id=1, pad_id=0)
    return placement.put_batch(found)


def reinforcement(placement: Placement, shared: bool = False, ptx: bool = False):
    models = SharedCritic(SCORER) if shared else SeparateCritic(MODEL, SCORER)
    objective = PolicyOptimization(PPO(), models, SAMPLING, rows=8)
    params = models.join(params_of(MODEL, 1, placement), params_of(SCORER, 2, placement))
    score = jnp.linspace(-1.0, 1.0, 16)
    experience = jax.jit(objective.prepare)(
        params, params_of(MODEL, 3, placement), rollout(placement), Scores(score), Controller(jnp.asarray(0.1))
    )
    if not ptx:
        return objective, params, models.placed(placement), experience
    mix = PtxMix(objective, LanguageModel(MODEL, name="ptx"), 2.0, 1)
    return mix, params, models.placed(placement), mix.join(experience, placement.put_batch(texts()))


PROGRAMS: dict[str, Callable[[Placement], Any]] = {
    "language": language,
    "experts": experts,
    "reward": reward,
    "ppo": reinforcement,
    "ppo-shared": lambda placement: reinforcement(placement, shared=True),
    "ppo-ptx": lambda placement: reinforcement(placement, ptx=True),
}
OPTIMIZER = Optimizer(1e-3, weight_decay=0.1, eps=1e-3).build(10)
"""A large eps: Adam's first updates would otherwise turn gradients that are zero up to rounding into signs."""


def three_steps(program: str, placement: Placement, microbatches: int) -> dict[str, Any]:
    """Losses and gradient norms, the parameters after, how often the step was compiled, and its collectives.

    Those of the language model alone, since a step is traced once more for them.
    """
    objective, params, shardings, batch = PROGRAMS[program](placement)
    pinned = placement.state(OPTIMIZER, params, shardings, True)
    step = make_train_step(
        objective.loss, OPTIMIZER, with_weights=objective.with_weights, conclude=objective.conclude,
        microbatches=microbatches, ema_decay=0.5, state_shardings=pinned,
    )  # fmt: skip
    state = init_state(params, OPTIMIZER, ema=True, shardings=pinned)
    batch = placement.put_batch(batch)
    numbers, text = [], ""
    if program == "language" and placement.mesh is not None:
        text = step.lower(state, batch, KEY).compile().as_text()
    for _ in range(3):
        state, metrics = step(state, batch, KEY)
        numbers += [float(metrics["loss"]), float(metrics["grad_norm"])]
    leaves = jax.tree.leaves(fetch((state.params, state.ema)))
    found = COLLECTIVES.findall(text)
    return {
        "numbers": numbers,
        "leaves": [leaf.ravel() for leaf in leaves],
        "compiled": step._cache_size(),
        "collectives": {name: found.count(name) for name in sorted(set(found))},
    }


def compare(program: str, layouts: dict[str, dict[str, int]], microbatches: int) -> dict[str, Any]:
    """Largest differences from one device by layout, and what the step consists of."""
    alone = three_steps(program, Placement(), microbatches)
    result = {}
    for name, sizes in layouts.items():
        placement = Layout(**sizes).place()
        with placement.active():
            spread = three_steps(program, placement, microbatches)
        pairs = zip(spread.pop("leaves"), alone["leaves"], strict=True)
        result[name] = {
            **spread,
            "leaves": max(float(np.abs(a - b).max()) for a, b in pairs),
            "numbers": float(np.abs(np.subtract(spread["numbers"], alone["numbers"])).max()),
        }
    return result


def compare_all(plan: dict[str, dict[str, dict[str, int]]], microbatches: int) -> dict[str, Any]:
    """``compare`` by program."""
    return {program: compare(program, layouts, microbatches) for program, layouts in plan.items()}


def samples(layouts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Whether the same tokens are drawn, and the largest array that is gathered inside the decode loop."""
    alone = fetch(rollout(Placement()))
    result = {}
    for name, sizes in layouts.items():
        placement = Layout(**sizes).place()
        with placement.active():
            spread = fetch(rollout(placement))
        same = bool((spread.tokens == alone.tokens).all())
        result[name] = {"same": same, "logprobs": float(np.abs(spread.logprobs - alone.logprobs).max())}
    return result


def gathered_while_decoding(sizes: dict[str, int]) -> list[list[int]]:
    """The shape of every array that is gathered in the body of the decode loop."""
    placement = Layout(**sizes).place()
    with placement.active():
        policy = params_of(MODEL, 1, placement)
        batch = placement.put_batch(prompts())
        given = (MODEL, policy, batch, SAMPLING, KEY, jnp.zeros((), jnp.int32), (1,), 0)
        text = sample_compiled.lower(*given).compile().as_text()
    bodies = set(re.findall(r"while\(.*body=%?([\w.\-]+)", text))
    inside, found = False, []
    for line in text.splitlines():
        if line and not line.startswith((" ", "}")):
            inside = line.split(" ")[0].lstrip("%") in bodies
        if inside and " all-gather(" in line:
            shape = re.search(r"\[([\d,]*)\]", line)
            assert shape is not None
            found.append([int(size) for size in shape.group(1).split(",") if size])
    return found


def across_meshes(written: dict[str, int], read: list[dict[str, int]]) -> list[bool]:
    """Whether a checkpoint that one mesh wrote is the same on others, and lies as these want it."""
    first = Layout(**written).place()
    with first.active():
        shardings = first.state(OPTIMIZER, params_of(MODEL, 1, first), first.params(MODEL), False)
        state = init_state(params_of(MODEL, 1, first), OPTIMIZER, shardings=shardings)
    folder = Path(tempfile.mkdtemp())
    Checkpoints(folder).save(1, {"state": state}, {})
    result = []
    for sizes in [None, *read]:
        placement = Placement() if sizes is None else Layout(**sizes).place()
        with placement.active():
            params = params_of(MODEL, 7, placement)
            shardings = placement.state(OPTIMIZER, params, placement.params(MODEL), False)
            target = init_state(params, OPTIMIZER, shardings=shardings)
            snapshot = Checkpoints(folder).restore_latest({"state": target})
        assert snapshot is not None
        found = snapshot.tree["state"]
        same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), fetch(found), fetch(state))
        lies = True if shardings is None else jax.tree.map(
            lambda a, b: a.sharding.is_equivalent_to(b, a.ndim), found, shardings)  # fmt: skip
        result.append(all(jax.tree.leaves(same)) and all(jax.tree.leaves(lies)))
    return result


def several(calls: dict[str, list[Any]]) -> dict[str, Any]:
    """Results by name; each call is the name of a function here and its arguments. What one compiles, others use."""
    return {name: globals()[function](*given) for name, (function, *given) in calls.items()}
