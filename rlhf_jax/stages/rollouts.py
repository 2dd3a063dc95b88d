"""How a stage of reinforcement learning comes to its rollouts: sampled from the policy, then scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import Transformer
from rlhf_jax.rewards.base import Messages
from rlhf_jax.sampling import Sampling, sample
from rlhf_jax.sharding import Placement
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.training.loop import Batches
from rlhf_jax.types import Key, PromptBatch, PyTree, Rollout, Scores

Draw = Callable[[PyTree, PromptBatch, Key, jax.Array], Rollout]
Conversations = Sequence[Messages]
"""All that was said in each row of a rollout, the prompt and the last answer included."""


class Judge(Protocol):
    """Scores of a rollout and numbers to log; rows of several turns come with what was said in them."""

    def __call__(
        self, rollout: Rollout, said: Conversations | None = None, /
    ) -> tuple[Scores, Mapping[str, float]]: ...


class JudgeOfParts(Judge, Protocol):
    """One that can judge a rollout while its later rows are still being drawn: part by part, then as a whole."""

    def begin(self, part: Rollout, said: Conversations | None = None, /) -> Callable[[], Any]:
        """Some rows are on their way: what models say of them is dispatched. The function that comes back asks what
        runs on the host, which waits for the rows."""
        ...

    def conclude(self, rollout: Rollout, found: Sequence[Any], /) -> tuple[Scores, Mapping[str, float]]:
        """The verdict on the whole rollout, from what was found of each of its parts."""
        ...


def sampler(
    workspace: Workspace,
    policy: Transformer,
    policy_params: Callable[[PyTree], PyTree],
    sampling: Sampling,
    placement: Placement,
) -> Draw:
    """``(trained params, prompts, key, step) -> rollout``: drawn on ``placement``, left on that of training."""
    ids = {"eos_id": workspace.tokenizer.eos_id, "pad_id": workspace.tokenizer.pad_id}
    training, shardings = workspace.placement, placement.params(policy)

    def draw(params: PyTree, prompts: PromptBatch, key: Key, step: jax.Array) -> Rollout:
        own = placement.put(policy_params(params), shardings)
        with placement.active():
            prompts = placement.put_batch(prompts)
            # An array knows the mesh that it was made under, so these come anew from the host.
            bits = jnp.asarray(np.asarray(jax.random.key_data(key)))
            key = jax.random.wrap_key_data(bits, impl=jax.random.key_impl(key))
            step = jnp.asarray(np.asarray(step))
            rollout = sample(policy, own, prompts, sampling, key, step, **ids)
        return training.put_batch(rollout)

    return draw


class Narrowed:
    """A stream of prompts, padded to the first of some widths that holds all of a batch."""

    def __init__(self, prompts: Batches, widths: tuple[int, ...]) -> None:
        self._prompts, self._widths = prompts, widths

    def __next__(self) -> PromptBatch:
        batch = next(self._prompts)
        whole, longest = batch.tokens.shape[1], int(np.max(np.asarray(batch.lengths)))
        width = next((width for width in self._widths if longest <= width < whole), whole)
        return batch.replace(tokens=batch.tokens[:, :width])

    def get_state(self) -> Any:
        return self._prompts.get_state()

    def set_state(self, state: Any) -> None:
        self._prompts.set_state(state)


def narrowed(prompts: Batches, widths: tuple[int, ...]) -> Batches:
    """The stream with narrower batches; the same one without widths."""
    return Narrowed(prompts, widths) if widths else prompts
