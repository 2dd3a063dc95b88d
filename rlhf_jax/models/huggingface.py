"""Read GPT-2 and Llama from local Hugging Face folders: ``config.json`` and ``*.safetensors``.

Nothing is downloaded, unpickled or executed. Dropout stays off: it is a choice of the training, not of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.errors import BAD_DATA, REFUSED, UserError
from rlhf_jax.models.blocks import Block
from rlhf_jax.models.ffn import MLP
from rlhf_jax.models.layers import LayerNorm, RMSNorm
from rlhf_jax.models.mixers import Attention
from rlhf_jax.models.parameters import abstract_params
from rlhf_jax.models.positions import DynamicNTK, Learned, Linear, Llama3, RoPE, YaRN
from rlhf_jax.models.tensors import Tensors, read_json
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.types import PyTree

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu",
    "swish": "silu",
}  # fmt: skip
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Endings of tensors that are constants, not parameters."""


def import_folder(src: str | Path) -> tuple[Transformer, PyTree]:
    """The model of a Hugging Face folder and its parameters as numpy arrays in fp32.

    Args:
        src: folder with ``config.json`` and ``model.safetensors`` (or shards with their index).
    """
    src = Path(src)
    found = read_json(src / "config.json")
    if "auto_map" in found:
        raise UserError("the model wants to run code of its own (auto_map)", at=str(src / "config.json"),
                        expected="a model of type gpt2 or llama", exit_code=REFUSED)  # fmt: skip
    settings, kind = _Settings(found, src / "config.json"), found.get("model_type")
    families = {
        "gpt2": (_gpt2_model, _gpt2_block, _gpt2_rest, "transformer."),
        "llama": (_llama_model, _llama_block, _llama_rest, "model."),
    }
    if kind not in families:
        raise UserError(f"model_type is {kind!r}", at=str(src / "config.json"), expected=f"one of {list(families)}")
    build, block, rest, prefix = families[kind]
    model, tensors = build(settings), Tensors(src, prefix)
    params = _assemble(model, tensors, block, rest)
    tensors.check_all_read(_BUFFERS + (("lm_head.weight",) if model.tie_embeddings else ()))
    return model, params


def _assemble(model: Transformer, tensors: Tensors, block: Callable, rest: Callable) -> PyTree:
    """Fill the stacked parameters layer by layer."""
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), abstract_params(model))

    def fill(whole: np.ndarray, part: np.ndarray) -> None:
        assert whole.shape == part.shape, (whole.shape, part.shape)
        whole[...] = part

    for layer in range(model.repeats):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["stack"]["blocks_0"])
        jax.tree.map(fill, own, block(model, tensors, layer))
    stack = params.pop("stack")
    jax.tree.map(fill, params, rest(model, tensors))
    return params | {"stack": stack}


def _layers(model: Transformer) -> tuple[Attention, MLP]:
    """The attention and the feed-forward that all layers of these models repeat."""
    block = model.pattern[0]
    assert isinstance(block.mixer, Attention) and isinstance(block.ffn, MLP)
    return block.mixer, block.ffn


def _gpt2_model(settings: _Settings) -> Transformer:
    settings.refuse("scale_attn_by_inverse_layer_idx", False)
    settings.refuse("scale_attn_weights", True)
    settings.refuse("add_cross_attention", False)
    width = settings.number("n_embd")
    mlp = MLP(settings.number("n_inner", 4 * width), settings.activation("activation_function"), bias=True)
    return Transformer(
        vocab_size=settings.number("vocab_size"),
        d_model=width,
        pattern=(Block(Attention(settings.number("n_head"), qkv_bias=True, out_bias=True), mlp),),
        repeats=settings.number("n_layer"),
        position=Learned(),
        norm=LayerNorm(eps=settings.get("layer_norm_epsilon", 1e-5)),
        max_length=settings.number("n_positions"),
        tie_embeddings=settings.get("tie_word_embeddings", True),
    )


def _gpt2_block(model: Transformer, tensors: Tensors, layer: int) -> PyTree:
    """Its ``Conv1D`` kernels are [in, out]; queries, keys and values lie side by side, each of all heads."""
    width, (mixer, ffn) = model.d_model, _layers(model)
    head = mixer.width(width)

    def get(name: str, *shape: int) -> np.ndarray:
        return tensors.get(f"h.{layer}.{name}", *shape)

    def norm(name: str) -> PyTree:
        return {"scale": get(f"{name}.weight", width), "bias": get(f"{name}.bias", width)}

    def by_head(qkv: np.ndarray) -> np.ndarray:
        return np.swapaxes(qkv.reshape(*qkv.shape[:-1], 3, mixer.heads, head), -3, -2)

    return {
        "mixer_norm": norm("ln_1"),
        "mixer": {
            "qkv": by_head(get("attn.c_attn.weight", width, 3 * width)),
            "qkv_bias": by_head(get("attn.c_attn.bias", 3 * width)),
            "out": get("attn.c_proj.weight", width, width).reshape(mixer.heads, head, width),
            "out_bias": get("attn.c_proj.bias", width),
        },
        "ffn_norm": norm("ln_2"),
        "ffn": {
            "in": get("mlp.c_fc.weight", width, ffn.width)[:, None],
            "in_bias": get("mlp.c_fc.bias", ffn.width)[None],
            "out": get("mlp.c_proj.weight", ffn.width, width),
            "out_bias": get("mlp.c_proj.bias", width),
        },
    }


def _gpt2_rest(model: Transformer, tensors: Tensors) -> PyTree:
    vocab, width = model.vocab_size, model.d_model
    rest = {
        "embedding": tensors.get("wte.weight", vocab, width),
        "position_embedding": tensors.get("wpe.weight", model.max_length, width),
        "last_norm": {"scale": tensors.get("ln_f.weight", width), "bias": tensors.get("ln_f.bias", width)},
    }
    return rest if model.tie_embeddings else rest | {"unembedding": tensors.get("lm_head.weight", vocab, width)}


def _llama_model(settings: _Settings) -> Transformer:
    bias = settings.get("attention_bias", False)
    heads = settings.number("num_attention_heads")
    attention = Attention(
        heads,
        kv_heads=settings.number("num_key_value_heads", heads),
        head_dim=settings.get("head_dim", None),
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = MLP(
        settings.number("intermediate_size"),
        settings.activation("hidden_act"),
        gated=True,
        bias=settings.get("mlp_bias", False),
    )
    return Transformer(
        vocab_size=settings.number("vocab_size"),
        d_model=settings.number("hidden_size"),
        pattern=(Block(attention, mlp),),
        repeats=settings.number("num_hidden_layers"),
        position=_rope(settings),
        norm=RMSNorm(eps=settings.get("rms_norm_eps", 1e-6)),
        max_length=settings.number("max_position_embeddings"),
        tie_embeddings=settings.get("tie_word_embeddings", False),
    )


def _rope(settings: _Settings) -> RoPE:
    """Rotation with its rule of extrapolation, under the names of older files and of newer ones."""
    found = settings.get("rope_parameters", None) or settings.get("rope_scaling", None) or {}
    rope, limit = _Settings(found, settings.path), settings.number("max_position_embeddings")
    rope.refuse("partial_rotary_factor", 1.0)
    base = rope.positive("rope_theta", settings.positive("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise UserError(f"rope scaling {kind!r} is not supported", at=str(settings.path),
                        expected="default, linear, dynamic, yarn or llama3")  # fmt: skip
    if kind == "default":
        return RoPE(base)
    factor = rope.positive("factor")
    if kind == "linear":
        return RoPE(base, scaling=Linear(factor))
    if kind == "dynamic":  # scales beyond max_position_embeddings alone, that is, where max_length is raised
        return RoPE(base, scaling=DynamicNTK(limit, factor))
    if kind == "llama3":
        turns = (rope.positive("low_freq_factor"), rope.positive("high_freq_factor"))
        return RoPE(base, scaling=Llama3(factor, rope.number("original_max_position_embeddings"), *turns))
    rope.refuse("truncate", True)
    for name in ("mscale", "mscale_all_dim"):
        rope.refuse(name, None)
    length = rope.number("original_max_position_embeddings", limit)
    turns = (rope.positive("beta_fast", 32.0), rope.positive("beta_slow", 1.0))
    given = rope.get("attention_factor", None)
    return RoPE(
        base, scaling=YaRN(factor, length, *turns, None if given is None else rope.positive("attention_factor"))
    )


def _llama_block(model: Transformer, tensors: Tensors, layer: int) -> PyTree:
    """Its ``Linear`` kernels are [out, in]; our first product holds each key/value head beside its query heads."""
    width, (mixer, ffn) = model.d_model, _layers(model)
    head = mixer.width(width)

    def get(name: str, *shape: int) -> np.ndarray:
        return tensors.get(f"layers.{layer}.{name}", *shape)

    def joined(part: str, *rest: int) -> np.ndarray:
        """Queries, keys and values of each group as [K, G + 2, D, ...]."""
        heads = {"q": mixer.heads, "k": mixer.groups, "v": mixer.groups}
        pieces = [get(f"self_attn.{name}_proj.{part}", count * head, *rest) for name, count in heads.items()]
        return np.concatenate([piece.reshape(mixer.groups, -1, head, *rest) for piece in pieces], axis=1)

    attention = {
        "qkv": np.moveaxis(joined("weight", width), -1, 0),
        "out": get("self_attn.o_proj.weight", width, mixer.heads * head).T.reshape(mixer.heads, head, width),
    }
    if mixer.qkv_bias:
        attention |= {"qkv_bias": joined("bias"), "out_bias": get("self_attn.o_proj.bias", width)}
    gates = [get(f"mlp.{name}_proj.weight", ffn.width, width).T for name in ("gate", "up")]
    feed = {"in": np.stack(gates, axis=1), "out": get("mlp.down_proj.weight", width, ffn.width).T}
    if ffn.bias:
        biases = [get(f"mlp.{name}_proj.bias", ffn.width) for name in ("gate", "up")]
        feed |= {"in_bias": np.stack(biases), "out_bias": get("mlp.down_proj.bias", width)}
    return {
        "mixer_norm": {"scale": get("input_layernorm.weight", width)},
        "mixer": attention,
        "ffn_norm": {"scale": get("post_attention_layernorm.weight", width)},
        "ffn": feed,
    }


def _llama_rest(model: Transformer, tensors: Tensors) -> PyTree:
    shape = (model.vocab_size, model.d_model)
    rest = {
        "embedding": tensors.get("embed_tokens.weight", *shape),
        "last_norm": {"scale": tensors.get("norm.weight", model.d_model)},
    }
    return rest if model.tie_embeddings else rest | {"unembedding": tensors.get("lm_head.weight", *shape)}


class _Settings:
    """``config.json`` with errors that name the field."""

    def __init__(self, found: dict[str, Any], path: Path):
        self.found, self.path = found, path

    def get(self, name: str, default: Any) -> Any:
        value = self.found.get(name)
        return default if value is None else value

    def number(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name} is {value!r}", at=str(self.path), expected="a positive integer",
                            exit_code=BAD_DATA)  # fmt: skip
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{name} is {value!r}", at=str(self.path), expected="a positive number",
                            exit_code=BAD_DATA)  # fmt: skip
        return float(value)

    def activation(self, name: str) -> str:
        value = self.found.get(name)
        if value not in _ACTIVATIONS:
            raise UserError(f"{name} is {value!r}", at=str(self.path), expected=f"one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def refuse(self, name: str, usual: Any) -> None:
        """Only the usual value of a field has an equivalent here."""
        if self.get(name, usual) != usual:
            raise UserError(f"{name} is {self.found[name]!r}", at=str(self.path), expected=f"{usual!r}")
