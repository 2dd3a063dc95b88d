"""The peer's side of peers.py: transformers and TRL on PyTorch, as an ordinary user sets them up for speed.

Runs in the environment of peers-requirements.txt and answers on stdout (lines.py). fp32, SDPA attention (the default),
dropout 0, fused AdamW, gradient checkpointing off. ``--compile`` adds torch.compile where it applies.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import transformers
from lines import Questions
from sizes import EOS, FULL, PAD, TINY, Sizes
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel


def gpt2(sizes: Sizes) -> GPT2Config:
    return GPT2Config(
        vocab_size=sizes.vocab, n_positions=sizes.context, n_embd=sizes.width, n_layer=sizes.layers,
        n_head=sizes.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, num_labels=1,
        bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip


def language_model(sizes: Sizes, checkpoint: Path) -> GPT2LMHeadModel:
    """Both sides start from the weights in ``checkpoint``, so that their losses can be compared."""
    return GPT2LMHeadModel.from_pretrained(checkpoint, dtype=torch.float32)


def training_step(questions: Questions, sizes: Sizes, checkpoint: Path, compiled: bool) -> None:
    model = language_model(sizes, checkpoint).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )
    tokens = torch.from_numpy(np.load(checkpoint / "tokens.npy")).long()
    forward = torch.compile(model) if compiled else model

    def run() -> dict[str, Any]:
        losses = []
        for _ in range(sizes.steps):
            loss = forward(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return {"losses": losses, "count": sizes.steps}

    questions.serve(run)


def generation(questions: Questions, sizes: Sizes, checkpoint: Path, compiled: bool) -> None:
    model = language_model(sizes, checkpoint).eval()
    prompts = np.load(checkpoint / "prompts.npy")
    tokens, mask = left_padded(prompts, sizes)
    options: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}
    if compiled:
        model.forward = torch.compile(model.forward)

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            out = model.generate(
                input_ids=tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=sizes.new_tokens, min_new_tokens=None, eos_token_id=None, pad_token_id=PAD, **options,
            )  # fmt: skip
        return {"tokens": int(out[:, tokens.shape[1] :].numel()), "count": 1}

    questions.serve(run)


def left_padded(prompts: np.ndarray, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' generate wants the padding on the left."""
    tokens = np.full_like(prompts, PAD)
    for row, length in enumerate(sizes.prompt_lengths()):
        tokens[row, prompts.shape[1] - length :] = prompts[row, :length]
    return torch.from_numpy(tokens).long(), torch.from_numpy(tokens != PAD).long()


def ppo(questions: Questions, sizes: Sizes, checkpoint: Path, compiled: bool) -> None:
    """TRL's own training loop; a callback sleeps until the next question between two of its iterations."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    prompts = np.load(checkpoint / "prompts.npy")
    rows = [prompts[row, :length].tolist() for row, length in enumerate(sizes.prompt_lengths())]
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder, total_episodes=10_000 * sizes.prompts, per_device_train_batch_size=sizes.prompts,
            gradient_accumulation_steps=1, num_mini_batches=sizes.minibatches, num_ppo_epochs=sizes.epochs,
            local_rollout_forward_batch_size=sizes.prompts, response_length=sizes.new_tokens, temperature=1.0,
            learning_rate=sizes.learning_rate, optim="adamw_torch_fused", kl_coef=0.05, num_sample_generations=0,
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        policy, reference = language_model(sizes, checkpoint), language_model(sizes, checkpoint).eval()
        reward = GPT2ForSequenceClassification(gpt2(sizes)).eval()
        critic = GPT2ForSequenceClassification(gpt2(sizes))
        if compiled:
            for model in (policy, reference, reward.transformer, critic.transformer):
                model.forward = torch.compile(model.forward)
        trainer = PPOTrainer(
            args=args, processing_class=tokenizer(sizes), model=policy, ref_model=reference, reward_model=reward,
            value_model=critic, train_dataset=Dataset.from_dict({"input_ids": rows}), eval_dataset=None,
            callbacks=[pause(questions, sizes)],
        )  # fmt: skip
        try:
            trainer.train()
        except EOFError:
            pass


def pause(questions: Questions, sizes: Sizes) -> transformers.TrainerCallback:
    """Time every iteration of a trainer, from one question to the iteration's end."""

    class Pause(transformers.TrainerCallback):
        updates = 0

        def begin(self) -> None:
            if not questions.begin():
                raise EOFError

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begin()

        def on_step_end(self, *_: Any, optimizer: Any, **__: Any) -> None:
            before, self.updates = self.updates, max(int(state["step"]) for state in optimizer.state.values())
            questions.done(tokens=sizes.prompts * sizes.new_tokens, count=1, updates=self.updates - before)
            self.begin()

    return Pause()


def tokenizer(sizes: Sizes) -> transformers.PreTrainedTokenizerFast:
    """TRL asks for a tokenizer even where the prompts are tokens already: one word a token."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{token}": token for token in range(2, sizes.vocab)}}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")),
        pad_token="<pad>", eos_token="<eos>", padding_side="left",
    )  # fmt: skip


def save_inputs(sizes: Sizes, folder: Path) -> None:
    """The weights that both sides start from, and the tokens that both are given."""
    torch.manual_seed(0)
    GPT2LMHeadModel(gpt2(sizes)).save_pretrained(folder)
    tokens = np.random.default_rng(0)
    np.save(folder / "tokens.npy", tokens.integers(2, sizes.vocab, (sizes.step_rows, sizes.context), dtype=np.int32))
    prompts = tokens.integers(2, sizes.vocab, (sizes.prompts, sizes.longest_prompt), dtype=np.int32)
    for row, length in enumerate(sizes.prompt_lengths()):
        prompts[row, length:] = PAD
    np.save(folder / "prompts.npy", prompts)


TASKS = {"training_step": training_step, "generation": generation, "ppo": ppo}


def main() -> None:
    parser = argparse.ArgumentParser(description="The peer's side of peers.py.")
    parser.add_argument("task", choices=["inputs", *TASKS])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    sizes = TINY if options.tiny else FULL
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if options.task == "inputs":
        save_inputs(sizes, options.checkpoint)
        return
    import trl

    questions = Questions()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    questions.answer(versions=versions, parameters=language_model(sizes, options.checkpoint).num_parameters())
    TASKS[options.task](questions, sizes, options.checkpoint, options.compile)


if __name__ == "__main__":
    main()
