"""Imported models against forward passes in plain numpy, and against transformers where it is installed.

The second needs an interpreter with torch and transformers, named by the variable RLHF_JAX_PEERS_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from rlhf_jax.errors import BAD_DATA, MISSING_INPUT, REFUSED, UserError
from rlhf_jax.models.huggingface import import_folder
from rlhf_jax.stages.importing import import_output
from rlhf_jax.stages.outputs import load_output
from rlhf_jax.types import Context

GPT2 = {
    "model_type": "gpt2", "vocab_size": 13, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 12,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 10, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 12, "rope_theta": 100.0, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6])


def gpt2_shapes():
    width = GPT2["n_embd"]
    shapes = {"wte.weight": (13, width), "wpe.weight": (12, width), "ln_f.weight": (width,), "ln_f.bias": (width,)}
    for layer in range(2):
        for name, shape in {
            "ln_1": (width,), "ln_2": (width,), "attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width),
        }.items():  # fmt: skip
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[-1:]}
    return shapes


def llama_shapes(biases=False):
    shapes = {"model.embed_tokens.weight": (13, 8), "model.norm.weight": (8,), "lm_head.weight": (13, 8)}
    for layer in range(2):
        matrices = {
            "self_attn.q_proj": (24, 8), "self_attn.k_proj": (12, 8), "self_attn.v_proj": (12, 8),
            "self_attn.o_proj": (8, 24), "mlp.gate_proj": (10, 8), "mlp.up_proj": (10, 8), "mlp.down_proj": (8, 10),
        }  # fmt: skip
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{at}{name}.weight": (8,) for name in ("input_layernorm", "post_attention_layernorm")}
        if biases:
            shapes |= {f"{at}{name}.bias": shape[:1] for name, shape in matrices.items()}
    return shapes


def draw(shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        name: ((name.endswith(("norm.weight", "ln_1.weight"))) + 0.4 * rng.standard_normal(shape)).astype(dtype)
        for name, shape in shapes.items()
    }


def write(folder, settings, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    return folder


def softmax_attention(q, k, v):
    """[T, D] of one head, causal."""
    out = np.zeros_like(v)
    for t in range(len(q)):
        weights = np.exp(k[: t + 1] @ q[t] / np.sqrt(q.shape[1]))
        out[t] = weights @ v[: t + 1] / weights.sum()
    return out


def gpt2_in_numpy(w, tokens):
    def norm(x, name):
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for layer in range(2):
        at = f"h.{layer}."
        qkv = np.split(dense(norm(x, at + "ln_1"), at + "attn.c_attn"), 3, axis=-1)
        heads = [softmax_attention(*(part[:, 4 * h : 4 * h + 4] for part in qkv)) for h in range(2)]
        x = x + dense(np.concatenate(heads, -1), at + "attn.c_proj")
        h = dense(norm(x, at + "ln_2"), at + "mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + dense(h, at + "mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def llama_in_numpy(w, tokens, turn=lambda pair: 100.0 ** (-pair / 3), amplitude=1.0):
    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"model.{name}.weight"]

    def dense(x, name):
        return x @ w[f"model.{name}.weight"].T + w.get(f"model.{name}.bias", 0.0)

    def rotate(x):
        angles = np.arange(len(x))[:, None] * np.array([turn(pair) for pair in range(3)])
        x = amplitude * x
        one, two = x[:, :3], x[:, 3:]
        return np.concatenate(
            (one * np.cos(angles) - two * np.sin(angles), two * np.cos(angles) + one * np.sin(angles)), 1
        )

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(2):
        at = f"layers.{layer}."
        h = norm(x, at + "input_layernorm")
        q, k, v = (dense(h, f"{at}self_attn.{name}_proj").reshape(len(h), -1, 6) for name in "qkv")
        heads = [softmax_attention(rotate(q[:, i]), rotate(k[:, i // 2]), v[:, i // 2]) for i in range(4)]
        x = x + dense(np.concatenate(heads, -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm")
        gate = dense(h, at + "mlp.gate_proj")
        x = x + dense(gate / (1 + np.exp(-gate)) * dense(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    return norm(x, "norm") @ w["lm_head.weight"].T


def logits_of(model, params, tokens):
    tokens = jnp.atleast_2d(tokens)
    context = Context.of_lengths(jnp.full(len(tokens), tokens.shape[1]), tokens.shape[1])
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, tokens, context)[0])(params))


def test_gpt2_equals_numpy(tmp_path):
    weights = draw(gpt2_shapes())
    stored = {f"transformer.{name}": leaf for name, leaf in weights.items()}
    stored["transformer.h.0.attn.bias"] = np.ones((1, 1, 12, 12), np.float32)  # a buffer of old checkpoints
    stored["lm_head.weight"] = weights["wte.weight"]
    model, params = import_folder(write(tmp_path, GPT2, stored))
    np.testing.assert_allclose(logits_of(model, params, TOKENS)[0], gpt2_in_numpy(weights, TOKENS), atol=1e-4)


def test_gpt2_without_prefix_in_bfloat16(tmp_path):
    weights = draw(gpt2_shapes(), ml_dtypes.bfloat16)
    model, params = import_folder(write(tmp_path, GPT2, weights))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    exact = {name: leaf.astype(np.float32) for name, leaf in weights.items()}
    np.testing.assert_allclose(logits_of(model, params, TOKENS)[0], gpt2_in_numpy(exact, TOKENS), atol=1e-4)


@pytest.mark.parametrize("biases", [False, True])
def test_llama_equals_numpy(tmp_path, biases):
    weights = draw(llama_shapes(biases))
    settings = LLAMA | {"attention_bias": biases, "mlp_bias": biases}
    model, params = import_folder(write(tmp_path, settings, weights))
    np.testing.assert_allclose(logits_of(model, params, TOKENS)[0], llama_in_numpy(weights, TOKENS), atol=1e-4)


def llama3_turn(pair):
    """Of pairs that turn 8 / 2 pi = 1.27, 0.27 and 0.06 times in 8 tokens, the first two lie between the limits."""
    plain = 100.0 ** (-pair / 3)
    turns = 8 * plain / (2 * np.pi)
    mixed = (turns - 0.1) / (2.0 - 0.1)
    return plain / 4 if turns < 0.1 else mixed * plain + (1 - mixed) * plain / 4


def yarn_turn(pair):
    """The ramp runs from pair floor(6 ln(8 / 4 pi) / (2 ln 100)) -> 0 to ceil(6 ln(8 / 0.2 pi) / (2 ln 100)) = 2."""
    share = [0.0, 1 / 2, 1.0][pair]
    return 100.0 ** (-pair / 3) * (1 - share + share / 4)


LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 8, "low_freq_factor": 0.1,
    "high_freq_factor": 2.0,
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 2, "beta_slow": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "turn", "amplitude"),
    [
        ({"rope_scaling": LLAMA3}, llama3_turn, 1.0),
        ({"rope_parameters": {"rope_theta": 100.0, **YARN}}, yarn_turn, 0.1 * np.log(4) + 1),
        ({"rope_scaling": {**YARN, "attention_factor": 1.5}}, yarn_turn, 1.5),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, lambda pair: 100.0 ** (-pair / 3) / 2, 1.0),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, lambda pair: 100.0 ** (-pair / 3), 1.0),
    ],
    ids=["llama3", "yarn", "yarn-amplitude", "linear", "dynamic"],
)
def test_scaled_rotations_equal_numpy(tmp_path, fields, turn, amplitude):
    weights = draw(llama_shapes())
    model, params = import_folder(write(tmp_path, LLAMA | fields, weights))
    expected = llama_in_numpy(weights, TOKENS, turn, amplitude)
    np.testing.assert_allclose(logits_of(model, params, TOKENS)[0], expected, atol=1e-4)


def test_shards_give_the_same_model(tmp_path):
    weights = draw(llama_shapes())
    _, whole = import_folder(write(tmp_path / "whole", LLAMA, weights))
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    names = sorted(weights)
    index = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(index.values()):
        save_file({name: weights[name] for name in names if index[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    _, sharded = import_folder(folder)
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)


def test_an_imported_folder_is_an_output(tmp_path):
    """With its tokenizer, whose padding gets an id and a row of its own; the other logits do not change."""
    source, target = write(tmp_path / "source", LLAMA, draw(llama_shapes())), tmp_path / "target"
    with pytest.raises(UserError, match="no tokenizer.json"):
        import_output(source, target)
    vocabulary = {f"t{i}": i for i in range(LLAMA["vocab_size"] - 1)} | {"</s>": LLAMA["vocab_size"] - 1}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    words.save(str(source / "tokenizer.json"))
    import_output(source, target)
    output, (model, params) = load_output(target), import_folder(source)
    assert output.tokenizer.pad_id == LLAMA["vocab_size"] == model.vocab_size
    assert output.model == model.clone(vocab_size=model.vocab_size + 1)
    tokens = jnp.array([[1, 2, 3]])
    context = Context(jnp.arange(3)[None], jnp.ones_like(tokens))
    old, _, _ = model.apply({"params": params}, tokens, context)
    new, _, _ = output.model.apply({"params": output.params}, tokens, context)
    np.testing.assert_allclose(new[..., :-1], old, atol=1e-6)
    np.testing.assert_allclose(new[..., -1], old.mean(axis=-1), atol=1e-5)


def spoil(folder, change):
    """Apply one change to a good folder."""
    settings, weights = dict(LLAMA), draw(llama_shapes())
    change(folder, settings, weights)
    write(folder, settings, weights)


@pytest.mark.parametrize(
    ("change", "message", "code"),
    [
        (lambda f, s, w: s.update(auto_map={"AutoModel": "x.Y"}), "run code of its own", REFUSED),
        (lambda f, s, w: s.update(model_type="bert"), "model_type is 'bert'", 2),
        (lambda f, s, w: s.update(rope_scaling={"rope_type": "longrope"}), "rope scaling 'longrope'", 2),
        (lambda f, s, w: s.update(rope_scaling={"type": "yarn"}), "factor is None; expected a positive", BAD_DATA),
        (lambda f, s, w: s.update(rope_scaling=YARN | {"truncate": False}), "truncate is False", 2),
        (lambda f, s, w: s.update(rope_scaling={**LLAMA3, "low_freq_factor": "1"}), "low_freq_factor is '1'", BAD_DATA),
        (lambda f, s, w: s.update(hidden_act="tanh"), "hidden_act is 'tanh'", 2),
        (lambda f, s, w: s.pop("hidden_size"), "hidden_size is None; expected a positive integer", BAD_DATA),
        (lambda f, s, w: s.update(num_attention_heads=3), "3 query heads are not a multiple of 2", None),
        (lambda f, s, w: w.pop("model.norm.weight"), "'model.norm.weight' is missing", BAD_DATA),
        (lambda f, s, w: s.update(intermediate_size=11), r"has shape \(10, 8\); expected \(11, 8\)", BAD_DATA),
        (lambda f, s, w: w.update(extra=np.ones(1)), "1 tensors have no place.*'extra'", BAD_DATA),
    ],
)
def test_refusals(tmp_path, change, message, code):
    spoil(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        import_folder(tmp_path)
    assert getattr(caught.value, "exit_code", None) == code


def test_pickles_are_refused_with_advice(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"pickle, which can execute code.*save_pretrained") as caught:
        import_folder(tmp_path)
    assert caught.value.exit_code == REFUSED


@pytest.mark.parametrize(
    ("files", "message", "code"),
    [
        ({}, "config.json is missing", MISSING_INPUT),
        ({"config.json": "{"}, "not JSON", BAD_DATA),
        ({"config.json": json.dumps(LLAMA)}, "no .*safetensors file", MISSING_INPUT),
        ({"config.json": json.dumps(LLAMA), "model.safetensors": "hello"}, "not a safetensors file", BAD_DATA),
        (
            {
                "config.json": json.dumps(LLAMA),
                "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../a.safetensors"}}),
            },
            "names the file '../a.safetensors'",
            REFUSED,
        ),
        (
            {
                "config.json": json.dumps(LLAMA),
                "model.safetensors.index.json": json.dumps({"weight_map": {"a": "a.safetensors"}}),
            },
            "shard 'a.safetensors' is missing",
            MISSING_INPUT,
        ),
    ],
)
def test_broken_folders(tmp_path, files, message, code):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        import_folder(tmp_path)
    assert caught.value.exit_code == code


PEER = """
import sys, numpy as np, torch, transformers as t
folder, tokens = sys.argv[1], torch.from_numpy(np.load(sys.argv[1] + "/tokens.npy"))
size = dict(vocab_size=61, initializer_range=0.3)
gpt2 = dict(n_embd=32, n_layer=3, n_head=4, n_positions=24, **size)
llama = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
             max_position_embeddings=24, **size)
models = {
    "gpt2": t.GPT2LMHeadModel(t.GPT2Config(**gpt2)),
    "gpt2-exact-gelu": t.GPT2LMHeadModel(t.GPT2Config(activation_function="gelu", n_inner=40, **gpt2)),
    "llama": t.LlamaForCausalLM(t.LlamaConfig(**llama)),
    "llama-tied-biased": t.LlamaForCausalLM(t.LlamaConfig(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, **llama)),
    "llama3": t.LlamaForCausalLM(t.LlamaConfig(rope_parameters={
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8,
        "low_freq_factor": 0.2, "high_freq_factor": 1.0}, **llama)),
    "yarn": t.LlamaForCausalLM(t.LlamaConfig(rope_parameters={
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 3.0, "original_max_position_embeddings": 8,
        "beta_fast": 2.0, "beta_slow": 0.1}, **llama)),
    "linear": t.LlamaForCausalLM(t.LlamaConfig(rope_parameters={
        "rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}, **llama)),
}
for name, model in models.items():
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(f"{folder}/{name}", max_shard_size="20KB")
    with torch.no_grad():
        np.save(f"{folder}/{name}.npy", model(tokens).logits.numpy())
"""
PEERS = os.environ.get("RLHF_JAX_PEERS_PYTHON")


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Tiny random checkpoints of transformers with its logits."""
    if not PEERS:
        pytest.skip("RLHF_JAX_PEERS_PYTHON names no interpreter with torch and transformers")
    folder = tmp_path_factory.mktemp("peers")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 61, (2, 20)))
    subprocess.run([PEERS, "-c", PEER, str(folder)], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("name", ["gpt2", "gpt2-exact-gelu", "llama", "llama-tied-biased", "llama3", "yarn", "linear"])
def test_logits_equal_those_of_transformers(peers, name):
    model, params = import_folder(peers / name)
    expected = np.load(peers / f"{name}.npy")
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits_of(model, params, np.load(peers / "tokens.npy")), expected, atol=1e-4, rtol=1e-4)
