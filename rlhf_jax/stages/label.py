"""The stage that lets a policy answer prompts and has the answers ranked: fresh preferences for later stages."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import processes
from rlhf_jax.data.pipelines import shuffled_batches
from rlhf_jax.errors import UserError
from rlhf_jax.models import Transformer
from rlhf_jax.rewards.base import Answer
from rlhf_jax.sampling import Sampling
from rlhf_jax.sharding import fetch
from rlhf_jax.stages.judging import check_rewards, jury, load_models, ready
from rlhf_jax.stages.labellers import People, Programmatic, agreement, records_of
from rlhf_jax.stages.language import check_length
from rlhf_jax.stages.responses import Prompts, read_prompts
from rlhf_jax.stages.rollouts import sampler
from rlhf_jax.stages.settings import Source
from rlhf_jax.stages.workspace import Workspace
from rlhf_jax.training.metrics import MetricsWriter
from rlhf_jax.types import Rollout

log = logging.getLogger(__name__)

REQUESTS_FILE = "requests.jsonl"


@dataclass(frozen=True, kw_only=True)
class Label:
    """Rankings of a policy's own responses; later stages read them as ``StageRecords(name)``.

    Responses without any text are left out.

    Args:
        policy: the stage or path of the language model that answers.
        prompts: what is answered.
        prompt_length: longest prompt in tokens.
        sampling: how; ``samples_per_prompt`` responses are ranked.
        labeller: who ranks them.
        count: prompts, drawn without replacement until all have had their turn.
        batch: prompts in one program.
        distinct: leave out all but the first of equal responses to a prompt; prompts with a single one are left out.
        too_long: whether a prompt over ``prompt_length`` is an error or left out.
    """

    policy: str = "sft"
    prompts: tuple[Source, ...]
    prompt_length: int
    sampling: Sampling
    labeller: Programmatic | People
    count: int
    batch: int = 64
    distinct: bool = True
    too_long: Literal["error", "drop"] = "error"
    name: str = "label"

    def __post_init__(self):
        if self.sampling.samples_per_prompt < 2:
            raise UserError(f"samples_per_prompt={self.sampling.samples_per_prompt}", at=f"{self.name}.sampling",
                            expected="at least 2 responses to rank", fix="raise it")  # fmt: skip
        for field in ("count", "batch", "prompt_length"):
            if getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)}", at=self.name, expected="at least 1", fix="raise it")

    def check(self, workspace: Workspace) -> None:
        check_length(workspace, self.prompt_length + self.sampling.max_new_tokens, self.name)
        workspace.check_reference(self.policy, f"stages.{self.name}.policy", self.name, Transformer)
        prompts, placement = self._prompts(workspace), workspace.placement
        placement.folded().check_rows(self.batch, "prompts", f"stages.{self.name}.batch")
        placement.check_tokens(self.prompt_length + self.sampling.max_new_tokens, f"stages.{self.name}")
        if isinstance(self.labeller, Programmatic):
            check_rewards(self.labeller.reward, workspace, prompts, f"stages.{self.name}.labeller", self.name)

    def run(self, workspace: Workspace) -> None:
        folder = workspace.stage_folder(self.name)
        processes.first(f"making of {folder}", lambda: folder.mkdir(parents=True, exist_ok=True))
        requests = folder / REQUESTS_FILE
        if isinstance(self.labeller, People) and processes.first("look for requests", requests.is_file):
            # Asked before: what was shown to people is not drawn anew.
            records, told = processes.first("reading of labels", lambda: self._read(requests)), {}
        else:
            records, told = self._draw(workspace, requests)
        if not records:
            raise UserError("no prompt has two different responses to rank", at=self.name,
                            expected="a policy whose samples differ",
                            fix="raise the temperature, or samples_per_prompt")  # fmt: skip
        told["records"] = float(len(records))
        with MetricsWriter(folder / "metrics.jsonl", workspace.sinks(self.name)) as metrics:
            metrics.truncate(None)  # of a stage that was interrupted behind this
            metrics.write(1, {f"{self.name}/{name}": value for name, value in told.items() if math.isfinite(value)})
        workspace.save_records(self.name, records)
        log.info("%s: %d rankings", self.name, len(records))

    def _draw(self, workspace: Workspace, requests: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Sample, rank, and describe; people are asked by an error that says where."""
        prompts, copies = self._prompts(workspace), self.sampling.samples_per_prompt
        policy = workspace.output(self.policy, f"stages.{self.name}.policy", Transformer)
        draw = sampler(workspace, policy.trunk, lambda params: params, self.sampling, workspace.placement.folded())
        key, stream = workspace.key(self.name, "sample"), shuffled_batches(
            [prompts.table.rows], self.batch, workspace.data_seed(self.name, "prompts")
        )  # fmt: skip
        judge, conversations, responses, rewards = self._judge(workspace), [], [], []
        for number in range(math.ceil(self.count / self.batch)):
            workspace.stop.check()
            rollout = draw(policy.params, next(stream), jax.random.fold_in(key, number), jnp.asarray(0))
            answers = prompts.answers(fetch(rollout), workspace.tokenizer)
            scores = judge(rollout, answers)
            for first in range(0, len(answers), copies):
                group = answers[first : first + copies]
                texts = [answer.text for answer in group]
                kept = [i for i, text in enumerate(texts)
                        if text.strip() and not (self.distinct and text in texts[:i])]  # fmt: skip
                if len(conversations) + 1 > self.count or len(kept) < 2:
                    continue
                conversations.append(group[0].messages)
                responses.append([texts[i] for i in kept])
                rewards.append([scores[first + i] for i in kept])
        if isinstance(self.labeller, People):
            asked = records_of(conversations, responses)
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in asked)
            processes.first("writing of requests", lambda: requests.write_text(lines, encoding="utf-8"))
            return processes.first("reading of labels", lambda: self._read(requests)), {}
        return self._ranked(workspace, conversations, responses, rewards)

    def _ranked(
        self, workspace: Workspace, conversations: list[Any], responses: list[list[str]], rewards: list[list[float]]
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        assert isinstance(self.labeller, Programmatic)
        ranks, agreed = [], []
        for number, row in enumerate(rewards):
            own = np.array([row])
            found = self.labeller.ranks(own, workspace.data_seed(self.name, f"ranks {number}"))
            ranks.append(found[0].tolist())
            agreed.append(agreement(found, own))
        told = [number for number, found in enumerate(ranks) if len(set(found)) > 1]  # a ranking of ties says nothing
        records = records_of([conversations[i] for i in told], [responses[i] for i in told],
                             ranks=[ranks[i] for i in told])  # fmt: skip
        whole = [reward for row in rewards for reward in row]
        finite = [share for share in agreed if math.isfinite(share)]
        return records, {
            "reward": float(np.mean(whole)) if whole else math.nan,
            "best_reward": float(np.mean([max(row) for row in rewards])) if rewards else math.nan,
            "agreement": float(np.mean(finite)) if finite else math.nan,
        }

    def _judge(self, workspace: Workspace) -> Callable[[Rollout, Sequence[Answer]], np.ndarray]:
        """The labeller's reward of each response, with its models loaded; zeros where people rank."""
        if isinstance(self.labeller, People):
            return lambda rollout, answers: np.zeros(len(answers))
        reward = self.labeller.reward
        ask = jury(reward, ready(load_models([reward], workspace, f"stages.{self.name}.labeller"), False), workspace)
        return lambda rollout, answers: ask(rollout, lambda: answers).values.total

    def _read(self, requests: Path) -> list[dict[str, Any]]:
        assert isinstance(self.labeller, People)
        return self.labeller.read(requests)

    def _prompts(self, workspace: Workspace) -> Prompts:
        return read_prompts(workspace, self.prompts, self.prompt_length, self.too_long, self.name)
