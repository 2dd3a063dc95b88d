"""The decoder's forward pass in plain numpy, written apart from the models: the oracle of their tests."""

from __future__ import annotations

import math

import jax
import numpy as np

from rlhf_jax.models import Learned, RMSNorm, RoPE, Sinusoidal, Transformer


def in_numpy(model: Transformer, params, tokens):
    """The whole forward pass of one document with loops over layers, heads and tokens, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    places, width = np.arange(len(tokens)), model.d_model

    def norm(x, weights, rms=None):
        if rms or isinstance(model.norm, RMSNorm):
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights["scale"]
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weights["scale"] + weights["bias"]

    def cap(x, limit):
        return x if limit is None else limit * np.tanh(x / limit)

    def rotated(x):
        if not isinstance(model.position, RoPE):
            return x
        half = x.shape[1] // 2
        turn = np.exp(1j * places[:, None] * model.position.base ** (-np.arange(half) / half))
        one, two = (x[:, 0::2], x[:, 1::2]) if model.position.interleaved else (x[:, :half], x[:, half:])
        turned, out = (one + 1j * two) * turn, np.empty_like(x)
        parts = (
            (slice(0, None, 2), slice(1, None, 2)) if model.position.interleaved else (slice(half), slice(half, None))
        )
        out[:, parts[0]], out[:, parts[1]] = turned.real, turned.imag
        return out

    def mix(x, mixer, weights):
        qkv = np.einsum("te,e...->t...", x, weights["qkv"]) + weights.get("qkv_bias", 0.0)
        per_group, y = mixer.heads // mixer.groups, np.zeros_like(x) + weights.get("out_bias", 0.0)
        for head in range(mixer.heads):
            q, k, v = (qkv[:, head // per_group, at] for at in (head % per_group, per_group, per_group + 1))
            if mixer.qk_norm:
                q, k = norm(q, weights["query_norm"], rms=True), norm(k, weights["key_norm"], rms=True)
            scores = cap(rotated(q) @ rotated(k).T / np.sqrt(q.shape[1]), mixer.softcap)
            for t in places:
                first = 0 if mixer.window is None else max(0, t - mixer.window + 1)
                seen = np.exp(scores[t, first : t + 1])
                y[t] += seen @ v[first : t + 1] / seen.sum() @ weights["out"][head]
        return y

    def feed(x, ffn, weights):
        hidden = np.einsum("te,epf->tpf", x, weights["in"]) + weights.get("in_bias", 0.0)
        gate = hidden[:, 0]
        active = {
            "silu": gate / (1 + np.exp(-gate)),
            "relu": np.maximum(gate, 0),
            "gelu": gate * (1 + np.vectorize(math.erf)(gate / np.sqrt(2))) / 2,
            "gelu_tanh": gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2,
        }[ffn.activation]
        return active * (hidden[:, 1] if ffn.gated else 1) @ weights["out"] + weights.get("out_bias", 0.0)

    x = params["embedding"][tokens]
    if isinstance(model.position, Learned):
        x = x + params["position_embedding"][places]
    if isinstance(model.position, Sinusoidal):
        for i in range(width):
            angle = places / model.position.base ** (i // 2 * 2 / width)
            x[:, i] += model.position.amplitude * (np.cos(angle) if i % 2 else np.sin(angle))
    for layer in range(model.layers):
        turn, at = divmod(layer, len(model.pattern))
        block = model.pattern[at]
        weights = jax.tree.map(lambda leaf: leaf[turn], params["stack"][f"blocks_{at}"])  # noqa: B023
        for name, act in (("mixer", mix), ("ffn", feed)):
            if getattr(block, name) is not None:
                inner = norm(x, weights[f"{name}_norm"]) if model.prenorm else x
                x = x + act(inner, getattr(block, name), weights[name])
                x = x if model.prenorm else norm(x, weights[f"{name}_norm"])
    x = norm(x, params["last_norm"]) if model.final_norm else x
    return cap(x @ params["embedding" if model.tie_embeddings else "unembedding"].T, model.logit_softcap)
