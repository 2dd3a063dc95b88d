"""A local Hugging Face folder becomes an output that stages start from: model, parameters, tokenizer."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from rlhf_jax.data.tokenizers import SavedTokenizer
from rlhf_jax.errors import MISSING_INPUT, UserError
from rlhf_jax.models import Transformer
from rlhf_jax.models.huggingface import import_folder
from rlhf_jax.stages.outputs import Output, save_output
from rlhf_jax.types import PyTree


def import_output(source: Path, target: Path, *, eos: str | None = None) -> Output:
    """Read GPT-2 or Llama with its ``tokenizer.json`` and write the folder that ``init="target"`` names.

    A tokenizer without a padding token of its own gets a new id; the embeddings then get a row for it.

    Args:
        source: with ``config.json``, ``*.safetensors`` and ``tokenizer.json``.
        target: folder to write.
        eos: the token that ends a text, where the tokenizer's own settings do not tell.
    """
    if not (source / "tokenizer.json").is_file():
        raise UserError("there is no tokenizer.json", at=str(source), expected="the tokenizer beside the model",
                        fix="save it in the `tokenizers` format", exit_code=MISSING_INPUT)  # fmt: skip
    model, params = import_folder(source)
    tokenizer = SavedTokenizer(str(source), eos=eos)
    model, params = with_rows(model, params, tokenizer.vocab_size)
    output = Output(model, params, tokenizer, {"imported_from": source.name})
    save_output(target, output)
    return output


def with_rows(model: Transformer, params: PyTree, vocab_size: int) -> tuple[Transformer, PyTree]:
    """The model with at least so many tokens; new ones get the mean of the old rows.

    The logit of such a token is the mean of all logits: far below those of likely tokens, so probabilities hardly move.
    """
    missing = vocab_size - model.vocab_size
    if missing <= 0:
        return model, params
    grown = dict(params)
    for name in ("embedding", "unembedding"):
        if name in grown:
            rows = jnp.asarray(grown[name])
            grown[name] = jnp.concatenate([rows, jnp.tile(rows.mean(axis=0, keepdims=True), (missing, 1))])
    return model.clone(vocab_size=vocab_size), grown
