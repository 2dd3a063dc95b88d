"""The decoder's forward pass in plain numpy, written apart from the models: the oracle of their tests."""

from __future__ import annotations

import math

import jax
import numpy as np

from rlhf_jax.models import NTK, ALiBi, DynamicNTK, Learned, Linear, MoE, RMSNorm, RoPE, Sinusoidal, Transformer, YaRN


def frequencies_by_loop(rule, width: int, base: float, length: int = 0) -> list[float]:
    """Each rule, written a second time from its paper: the frequency of each pair."""
    found = []
    for i in range(width // 2):
        plain = base ** (-2 * i / width)
        if rule is None:
            found.append(plain)
            continue
        turns = getattr(rule, "original_length", 0) * plain / (2 * math.pi)
        if isinstance(rule, Linear):
            plain = plain / rule.factor
        elif isinstance(rule, NTK):
            plain = (base * rule.factor ** (width / (width - 2))) ** (-2 * i / width)
        elif isinstance(rule, DynamicNTK):
            alpha = rule.factor * max(length, rule.original_length) / rule.original_length - (rule.factor - 1)
            plain = (base * alpha ** (width / (width - 2))) ** (-2 * i / width)
        elif isinstance(rule, YaRN):
            low, high = (
                width * math.log(rule.original_length / (2 * math.pi * turns)) / (2 * math.log(base))
                for turns in (rule.fast, rule.slow)
            )
            low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
            kept = 1 - min(max((i - low) / (high - low), 0), 1)
            plain = plain * kept + plain / rule.factor * (1 - kept)
        elif turns < rule.low:
            plain = plain / rule.factor
        elif turns < rule.high:
            smooth = (turns - rule.low) / (rule.high - rule.low)
            plain = (1 - smooth) * plain / rule.factor + smooth * plain
        found.append(plain)
    return found


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

    def rotated(x, places, length):
        """Rows of ``x`` at these places, in a text of so many tokens."""
        if not isinstance(model.position, RoPE):
            return x
        half, rule = x.shape[1] // 2, model.position.scaling
        turn = np.exp(1j * places[:, None] * frequencies_by_loop(rule, 2 * half, model.position.base, length))
        near, far = (slice(0, None, 2), slice(1, None, 2)), (slice(half), slice(half, None))
        one, two = near if model.position.interleaved else far
        turned, out = (x[:, one] + 1j * x[:, two]) * turn, np.empty_like(x)
        out[:, one], out[:, two] = turned.real, turned.imag
        return out * (0.1 * math.log(rule.factor) + 1 if isinstance(rule, YaRN) else 1)

    def mix(x, mixer, weights):
        qkv = np.einsum("te,e...->t...", x, weights["qkv"]) + weights.get("qkv_bias", 0.0)
        per_group, y = mixer.heads // mixer.groups, np.zeros_like(x) + weights.get("out_bias", 0.0)
        for head in range(mixer.heads):
            q, k, v = (qkv[:, head // per_group, at] for at in (head % per_group, per_group, per_group + 1))
            if mixer.qk_norm:
                q, k = norm(q, weights["query_norm"], rms=True), norm(k, weights["key_norm"], rms=True)
            for t in places:
                turned = rotated(q[t : t + 1], places[t : t + 1], t + 1)[0], rotated(k, places, t + 1)
                scores = cap(turned[1] @ turned[0] / np.sqrt(q.shape[1]), mixer.softcap)
                if isinstance(model.position, ALiBi):
                    scores = scores - 2.0 ** (-8 * (head + 1) / mixer.heads) * (t - places)
                near = places > t - (len(tokens) if mixer.window is None else mixer.window)
                seen = np.exp(scores) * ((near | (places < mixer.sinks)) & (places <= t))
                total = seen.sum() + (np.exp(weights["sink_logits"][head]) if mixer.sink_logits else 0.0)
                y[t] += seen @ v / total @ weights["out"][head]
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

    def routed(x, ffn, weights):
        """Each token through its own experts; with the router's default settings."""
        logits, y = x @ weights["router"], feed(x, ffn, weights["shared"]) if ffn.shared_experts else np.zeros_like(x)
        for t in range(len(x)):
            chosen = np.argsort(-logits[t])[: ffn.top_k]
            shares = np.exp(logits[t, chosen] - logits[t].max())
            for expert, share in zip(chosen, shares / shares.sum(), strict=True):
                own = {name: weights[name][expert] for name in ("in", "out")}
                y[t] += share * feed(x[t : t + 1], ffn, own)[0]
        return y

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
                act = routed if isinstance(getattr(block, name), MoE) else act
                inner = norm(x, weights[f"{name}_norm"]) if model.prenorm else x
                x = x + act(inner, getattr(block, name), weights[name])
                x = x if model.prenorm else norm(x, weights[f"{name}_norm"])
    x = norm(x, params["last_norm"]) if model.final_norm else x
    return cap(x @ params["embedding" if model.tie_embeddings else "unembedding"].T, model.logit_softcap)
