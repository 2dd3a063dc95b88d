"""The program that draws responses, from shapes alone."""

from __future__ import annotations

from dataclasses import replace

import jax

from rlhf_jax.models import Transformer, empty_cache
from rlhf_jax.planning import work
from rlhf_jax.planning.pieces import Program, ints, params_of, placed, random_key
from rlhf_jax.sampling import Sampling, sample
from rlhf_jax.sharding import Placement
from rlhf_jax.types import PromptBatch, PyTree

EOS, PAD = 1, 0
"""Ids that stand for the tokenizer's; no shape depends on them."""


def sampling_program(
    model: Transformer,
    sampling: Sampling,
    *,
    prompts: int,
    width: int,
    placement: Placement,
    moved: bool = False,
    parked: tuple[str, ...] = (),
    runs: int = 1,
    name: str = "sample",
) -> Program:
    """Sampling responses to prompts.

    Args:
        model: the policy.
        sampling: how.
        prompts: answered at once.
        width: their tokens.
        placement: of the sampler.
        moved: whether the policy is copied into a layout of its own for it.
        parked: what waits in the host's memory meanwhile.
        runs: executions in one step of the stage.
        name: of the program.
    """
    sampling = replace(sampling, regroup=())  # a plan takes all responses to be as long as they may be: no row leaves
    params, copies, new = params_of(model, placement), sampling.samples_per_prompt, sampling.max_new_tokens
    asked = placed(PromptBatch(ints(prompts, width), ints(prompts), ints(prompts)), placement)

    def draw(params: PyTree, prompts: PromptBatch, key: jax.Array, step: jax.Array):
        return sample(model, params, prompts, sampling, key, step, eos_id=EOS, pad_id=PAD)

    def smaller(repeats: int) -> Program:
        fewer = model.clone(repeats=repeats, split=min(model.split, repeats - 1))
        return sampling_program(fewer, sampling, prompts=prompts, width=width, placement=placement, moved=moved,
                                parked=parked, runs=runs, name=name)  # fmt: skip

    slots = min(-(-(width + new - 1) // 8) * 8, model.max_length)
    return Program(
        name, draw, (params, asked, random_key(), ints()), placement,
        work.sampling(model, prompts, width, copies, new), (prompts, width), runs=runs,
        transient={"batch": asked} | ({"moved policy": params} if moved else {}),
        parked=parked, trips=new - 1, cache=jax.eval_shape(lambda: empty_cache(model, prompts * copies, slots)),
        smaller=smaller,
    )  # fmt: skip
