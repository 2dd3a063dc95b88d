"""What a reward model's zero is put on: the mean score of demonstrations, or of the first policy's own samples."""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rlhf_jax.data.packing import one_per_row
from rlhf_jax.data.pipelines import one_pass
from rlhf_jax.models import ScalarModel
from rlhf_jax.sampling import Sampling, sample
from rlhf_jax.scoring import sequence_scores
from rlhf_jax.sharding import fetch
from rlhf_jax.stages.outputs import Output
from rlhf_jax.stages.responses import Prompts, read_prompts, score_rollout
from rlhf_jax.stages.settings import Source, naming
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.types import PyTree, TokenBatch

log = logging.getLogger(__name__)

SCORED_AT_A_TIME = 32


@dataclass(frozen=True, kw_only=True)
class ReferenceSamples:
    """Responses of the language model that the reward model starts from, to normalise on (Ziegler et al. 2019).

    Args:
        prompts: what is answered.
        prompt_length: longest prompt in tokens; longer ones are left out.
        sampling: how.
        most: no more than this many prompts.
    """

    prompts: tuple[Source, ...]
    prompt_length: int
    sampling: Sampling
    most: int = 256

    def read(self, workspace: Workspace, stage: str) -> Prompts:
        """The prompts as a table."""
        return read_prompts(workspace, self.prompts, self.prompt_length, "drop", stage, self.most)


def check_centre(workspace: Workspace, centre: tuple[Source, ...] | ReferenceSamples, length: int, name: str) -> None:
    """Find what is wrong with the records before anything is trained."""
    if isinstance(centre, ReferenceSamples):
        centre.read(workspace, name)
    elif centre:
        demonstration_rows(workspace, centre, length, name)


def demonstration_scores(
    workspace: Workspace, model: ScalarModel, params: PyTree, sources: tuple[Source, ...], length: int, name: str
) -> np.ndarray:
    """The model's score of every demonstration that fits into a row."""
    rows = demonstration_rows(workspace, sources, length, name)
    found = [
        fetch(score_sequences(model, params, batch.tokens, np.sum(batch.segments > 0, axis=1)))
        for batch in workspace.stoppable(one_pass(rows, SCORED_AT_A_TIME))
    ]
    return np.concatenate(found)[: len(rows.tokens)]


def demonstration_rows(workspace: Workspace, sources: tuple[Source, ...], length: int, name: str) -> TokenBatch:
    """Demonstrations that fit into a row, one in each."""

    def make() -> TokenBatch:
        chat, tokenizer = workspace.chat, workspace.tokenizer
        with naming(sources, name):
            documents = [chat.dialogue_tokens(tokenizer, record["messages"]) for record in workspace.read(sources)]
            packed = one_per_row(documents, length, tokenizer.pad_id, "drop")
        log.info("%s: demonstrations: %s", name, packed.report.summary())
        return packed.rows

    return workspace.once(("one demonstration a row", sources, length), make)


def sample_scores(
    workspace: Workspace, model: ScalarModel, params: PyTree, policy: Output, reference: ReferenceSamples, name: str
) -> Float[np.ndarray, " B"]:
    """The model's score of a language model's own responses."""
    rows = reference.read(workspace, name).table.rows
    ids = {"eos_id": workspace.tokenizer.eos_id, "pad_id": workspace.tokenizer.pad_id}
    found = []
    for batch in workspace.stoppable(one_pass(rows, min(SCORED_AT_A_TIME, len(rows.tokens)))):
        filled = dataclasses.replace(batch, lengths=np.maximum(batch.lengths, 1))
        key = workspace.key(name, "reference samples")
        rollout = sample(policy.trunk, policy.trunk_params, filled, reference.sampling, key, **ids)
        found.append(fetch(score_rollout(model, params, rollout)))
    return np.concatenate(found)[: len(rows.tokens) * reference.sampling.samples_per_prompt]


@functools.partial(jax.jit, static_argnums=0)
def score_sequences(model: ScalarModel, params: PyTree, tokens, lengths):
    """Compiled ``scoring.sequence_scores``; an empty row gets some number."""
    return sequence_scores(model, params, tokens, jnp.maximum(lengths, 1))
