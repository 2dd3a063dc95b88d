"""The compiled programs of a stage and the shapes that go into them, from its settings alone: nothing is allocated.

They are built from the same public parts as in ``stages``, with the same shardings; ``tests/test_planning_programs.py``
compares their text with that of the programs which a stage runs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.experiment import AnyStage
from rlhf_jax.models import ScalarModel, Transformer, abstract_params, empty_cache
from rlhf_jax.objectives.language import LanguageModel
from rlhf_jax.objectives.policy import PolicyOptimization, SeparateCritic, SharedCritic
from rlhf_jax.objectives.ptx import PtxMix
from rlhf_jax.objectives.reward import RewardModel
from rlhf_jax.planning import work
from rlhf_jax.planning.work import Work
from rlhf_jax.sampling import sample
from rlhf_jax.sharding import Placement, with_shardings
from rlhf_jax.stages.ppo import Reinforce
from rlhf_jax.stages.responses import score_rollout
from rlhf_jax.stages.reward import TrainReward
from rlhf_jax.training.reinforcement import take_rows
from rlhf_jax.training.step import init_state, make_train_step
from rlhf_jax.types import PromptBatch, PyTree, RankingBatch, TokenBatch, TrainState

STEPS = 10**9
"""Stands for a number of steps that is not known without the data; no shape depends on it."""
EOS, PAD = 1, 0
"""Ids that stand for the tokenizer's; no shape depends on them."""


@dataclass(frozen=True)
class Program:
    """One compiled function and its abstract arguments.

    Args:
        name: what it does in the stage.
        function: jitted or not.
        arguments: abstract arrays with shardings (without, on one device).
        placement: the mesh that it is traced for.
        work: what it has to compute, by formula.
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
        resident: abstract arrays with shardings by what they are: "parameters", "optimizer", "average", "start" (what
            training began with), "reference" and "reward".
        tokens: of one step, which ``tokens/s`` counts.
        counted: what these tokens are.
    """

    name: str
    programs: tuple[Program, ...]
    resident: Mapping[str, PyTree]
    tokens: int
    counted: str


def stage_programs(
    stage: AnyStage, model: Transformer, placement: Placement, devices: Sequence[Any] | None, responses: int = 2
) -> Stage:
    """The programs of one stage on these devices; call it with no mesh active, as the devices need not be there.

    Args:
        stage: of the experiment.
        model: the language model. Reward models are taken to have its architecture, also those from other runs.
        placement: of the experiment's layout.
        devices: for a sampling layout of its own.
        responses: K of rankings.
    """
    if isinstance(stage, Reinforce):
        return _reinforcement(stage, model, placement, devices)
    train = stage.train
    if isinstance(stage, TrainReward):
        trained = ScalarModel(model.clone(parent=None), head_init="reward")
        objective = RewardModel(trained, normalise=stage.normalise, centre_coef=stage.centre_coef, name=stage.name)
        rows, tokens = functools.partial(_rankings, responses, train.length), train.batch * responses * train.length
        forward = work.reading(model, train.batch * responses, train.length)
    else:
        trained = model
        objective = LanguageModel(model, name=stage.name, mean=getattr(stage, "mean", "token"))
        rows, tokens = functools.partial(_texts, train.length), train.batch * train.length
        forward = work.reading(model, train.batch, train.length, unembedded=tokens)
    params = with_shardings(abstract_params(trained), placement.params(trained))
    optimizer, ema = train.optimizer.build(STEPS if train.steps is None else train.steps), train.ema_decay is not None
    shardings = placement.state(optimizer, params, placement.params(trained), ema)
    state = _state(params, optimizer, ema, shardings)
    step = make_train_step(
        objective.loss, optimizer, with_weights=objective.with_weights, conclude=objective.conclude,
        microbatches=train.microbatches, ema_decay=train.ema_decay, state_shardings=shardings,
    )  # fmt: skip
    batch = _placed(rows(train.batch), placement)
    update = Program(
        "update", step, (state, batch, _key()), placement, forward.trained(), transient={"batch": batch},
        loss=(objective.loss, params, lambda n: jax.eval_shape(objective.with_weights, rows(n)),
              train.batch // train.microbatches),
    )  # fmt: skip
    # What training began with is held beside the state; a reward model also as it was drawn, for the sake of its head.
    start = (params, jax.tree.map(copy.copy, params)) if isinstance(stage, TrainReward) else params
    return Stage(stage.name, (update,), _resident(state) | {"start": start}, tokens, "tokens")


def _reinforcement(stage: Reinforce, model: Transformer, placement: Placement, devices: Sequence[Any] | None) -> Stage:
    objective = _objective(stage, model)
    models, scorer = objective.models, ScalarModel(model.clone(parent=None), head_init="reward")
    params = with_shardings(
        models.join(abstract_params(models.policy), abstract_params(models.critic)), models.placed(placement)
    )
    reference = with_shardings(abstract_params(model), placement.params(model))
    optimizer, ema = stage.optimizer.build(stage.updates), stage.ema_decay is not None
    shardings = placement.state(optimizer, params, models.placed(placement), ema)
    state = _state(params, optimizer, ema, shardings)
    frozen: dict[str, PyTree] = {"reference": reference}
    if isinstance(stage.reward, str):
        frozen["reward"] = with_shardings(abstract_params(scorer), placement.params(scorer))
    separate = placement.folded() if stage.sampling_layout is None else stage.sampling_layout.place(devices)
    sampler = sampling_program(stage, model, separate, moved=separate.mesh != placement.mesh)
    rollout = _placed(jax.eval_shape(sampler.function, *sampler.arguments), placement)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    scores = jax.ShapeDtypeStruct((stage.rollout,), jnp.float32)
    width, new = stage.prompt_length + stage.sampling.max_new_tokens, stage.sampling.max_new_tokens
    read = work.reading(model, stage.rollout, width)
    answers = work.reading(model, stage.rollout, width, unembedded=stage.rollout * new)
    programs = [sampler]
    if "reward" in frozen:
        programs.append(Program("score", functools.partial(score_rollout, scorer), (frozen["reward"], rollout),
                                placement, read, transient={"rollout": rollout},
                                parked=_parked(stage, "reward")))  # fmt: skip
    prepare = preparation(stage, objective)
    arguments = (params, reference, rollout, scores, number)
    shared = isinstance(models, SharedCritic)
    programs.append(Program("prepare", prepare, arguments, placement, answers + read, transient={"rollout": rollout},
                            parked=_parked(stage, "reference")))  # fmt: skip
    experience = _placed(jax.eval_shape(prepare, *arguments)[0], placement)

    def minibatch(rows: int) -> PyTree:
        chosen = jax.eval_shape(take_rows, experience, jax.ShapeDtypeStruct((rows,), jnp.int32))
        if stage.ptx is None:
            return chosen
        return jax.eval_shape(_mix(stage, objective).join, chosen,
                              _texts(stage.ptx.length, rows * stage.ptx.texts_per_episode))  # fmt: skip

    whole = objective if stage.ptx is None else _mix(stage, objective)
    step = make_train_step(
        whole.loss, optimizer, with_weights=whole.with_weights, conclude=whole.conclude,
        microbatches=stage.microbatches, ema_decay=stage.ema_decay, state_shardings=shardings,
    )  # fmt: skip
    share = stage.minibatch / stage.rollout
    forward = (answers if shared else answers + read).times(share)
    if stage.ptx is not None:
        texts = stage.minibatch * stage.ptx.texts_per_episode
        forward += work.reading(model, texts, stage.ptx.length, unembedded=texts * stage.ptx.length)
    batch = _placed(minibatch(stage.minibatch), placement)
    programs.append(Program(
        "update", step, (state, batch, _key()), placement, forward.trained(),
        runs=stage.epochs * (stage.rollout // stage.minibatch), transient={"batch": batch, "experience": experience},
        parked=_parked(stage, "optimizer"),
        loss=(whole.loss, params, lambda n: jax.eval_shape(whole.with_weights, minibatch(n)),
              stage.minibatch // stage.microbatches),
    ))  # fmt: skip
    return Stage(stage.name, tuple(programs), _resident(state) | frozen, stage.rollout * new,
                 "response tokens")  # fmt: skip


def sampling_program(stage: Reinforce, model: Transformer, placement: Placement, moved: bool) -> Program:
    """Sampling a rollout; ``moved`` where the policy is copied into a layout of its own for it."""
    sampling, prompts = stage.sampling, stage.prompts_per_iteration
    params = with_shardings(abstract_params(model), placement.params(model))
    asked = _placed(PromptBatch(_ints(prompts, stage.prompt_length), _ints(prompts), _ints(prompts)), placement)

    def draw(params: PyTree, prompts: PromptBatch, key: jax.Array, step: jax.Array):
        return sample(model, params, prompts, sampling, key, step, eos_id=EOS, pad_id=PAD)

    slots = min(-(-(stage.prompt_length + sampling.max_new_tokens - 1) // 8) * 8, model.max_length)
    return Program(
        "sample", draw, (params, asked, _key(), _ints()), placement,
        work.sampling(model, prompts, stage.prompt_length, sampling.samples_per_prompt, sampling.max_new_tokens),
        transient={"batch": asked} | ({"moved policy": params} if moved else {}),
        parked=_parked(stage),
        trips=sampling.max_new_tokens - 1,
        cache=jax.eval_shape(lambda: empty_cache(model, stage.rollout, slots)),
        smaller=lambda repeats: sampling_program(stage, model.clone(repeats=repeats), placement, moved),
    )  # fmt: skip


def preparation(stage: Reinforce, objective: PolicyOptimization) -> Callable[..., Any]:
    """From a rollout and its scores to experience and the metrics of the rollout."""

    @jax.jit
    def compiled(params: PyTree, ref_params: PyTree, rollout: PyTree, score: jax.Array, coef: jax.Array):
        experience = objective.prepare(params, ref_params, rollout, score, coef)
        return experience, stage.ppo.rollout_metrics(experience)

    return compiled


def _parked(stage: Reinforce, *needed: str) -> tuple[str, ...]:
    """What waits in the host's memory while only these of it are needed; the average goes with the optimizer."""
    found = [kind for kind in stage.offload if kind not in needed]
    return (*found, "average") if "optimizer" in found else tuple(found)


def _objective(stage: Reinforce, model: Transformer) -> PolicyOptimization:
    policy = model.clone(parent=None)
    critic = ScalarModel(policy, head_init="reward" if stage.critic == "reward" else "zero")
    models = SharedCritic(critic) if stage.critic == "shared" else SeparateCritic(policy, critic)
    return PolicyOptimization(stage.ppo, models, stage.sampling, rows=stage.rows_at_a_time, replay=stage.replay_routing)


def _mix(stage: Reinforce, objective: PolicyOptimization) -> PtxMix:
    assert stage.ptx is not None
    language = LanguageModel(objective.models.policy, name="ptx")
    return PtxMix(objective, language, stage.ptx.coef, stage.ptx.texts_per_episode)


def _state(params: PyTree, optimizer: Any, ema: bool, shardings: PyTree) -> TrainState:
    return with_shardings(jax.eval_shape(lambda p: init_state(p, optimizer, ema=ema), params), shardings)


def _resident(state: TrainState) -> dict[str, PyTree]:
    found = {"parameters": state.params, "optimizer": (state.opt_state, state.step)}
    return found if state.ema is None else found | {"average": state.ema}


def _placed(tree: PyTree, placement: Placement) -> PyTree:
    return with_shardings(tree, placement.batch(tree))


def _texts(length: int, rows: int) -> TokenBatch:
    whole = _ints(rows, length)
    return TokenBatch(whole, whole, whole, jax.ShapeDtypeStruct((rows, length), jnp.float32))  # pyright: ignore


def _rankings(responses: int, length: int, prompts: int) -> RankingBatch:
    each = _ints(prompts, responses)
    return RankingBatch(_ints(prompts, responses, length), each, each)


def _ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))
