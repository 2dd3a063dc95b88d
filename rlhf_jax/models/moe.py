"""A mixture of experts in place of a feed-forward: each token goes to a few of many narrow feed-forwards."""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Shaped

from rlhf_jax.models.ffn import ACTIVATIONS, MLP
from rlhf_jax.models.layers import Shared, parameter
from rlhf_jax.ops import routing
from rlhf_jax.ops.experts import check_implementation, expert_feedforward
from rlhf_jax.ops.routing import ExpertChoice, Routing, TopK

BALANCES = ("sequence", "batch")


class MoE(nn.Module):
    """``scale * sum_j w_j FFN_j(x)`` over the chosen experts, plus the shared ones.

    No token is dropped unless ``capacity`` says so: what a token gets depends on that token alone, so sampling and
    scoring agree, whatever else is in the batch. Padding goes to no expert and counts nowhere.

    It reports, one entry for each row first: "loss" (to add to the objective), "moe/balance", "moe/z", "moe/entropy",
    "moe/dropped" [B], "moe/load" [B, X] and "moe/experts" [B, T, k] (what ``Transformer(..., routing=)`` takes).

    Args:
        experts: number of routed experts, X.
        top_k: of them for each token.
        width: of the hidden layer of each; fine-grained experts are more and narrower ones.
        router: ``TopK``: how experts are chosen and weighed.
        shared_experts: so many more experts of this width serve every token, as one feed-forward.
        activation: as of ``MLP``.
        gated: as of ``MLP``.
        balance_coef: of the balance loss, 1 for an even load (Switch: 0.01; OLMoE: 0.01; DeepSeek-V3: 0.0001).
        balance: "sequence" takes load and probabilities of each row by itself; "batch" those of all rows, so that the
            loss depends on what else is in the microbatch.
        z_coef: of the z-loss (ST-MoE: 0.001).
        jitter: the router reads ``x`` times noise from ``[1 - jitter, 1 + jitter]`` unless the pass is deterministic.
        capacity: None for all; a number drops the slots beyond ``ceil(capacity * top_k * tokens / X)`` of each expert
            (GShard; 1.25 is usual). Which ones depends on the other tokens of the call: then prefill and decode differ
            from a full pass, and a row's result changes with the rows beside it. Not for reinforcement learning.
        implementation: of ``ops.experts.grouped_matmul``.
        bias_rate: step of the selection bias that balances without a loss (DeepSeek-V3: 0.001), a parameter
            "router_bias" without gradient which ``ops.routing.updated_bias`` moves; None for none.
        scale: factor on the routed sum (DeepSeek-V3: 2.5).
    """

    experts: int
    top_k: int
    width: int
    router: TopK | ExpertChoice = TopK()
    shared_experts: int = 0
    activation: str = "silu"
    gated: bool = True
    balance_coef: float = 0.01
    balance: str = "sequence"
    z_coef: float = 0.0
    jitter: float = 0.0
    capacity: float | None = None
    implementation: str = "auto"
    bias_rate: float | None = None
    scale: float = 1.0

    def __post_init__(self):
        for name in ("experts", "top_k", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a mixture of experts must be positive, got {getattr(self, name)}")
        if isinstance(self.router, ExpertChoice):
            raise ValueError(
                "ExpertChoice is not causal: whether an expert takes a token depends on later tokens, so a language "
                "model would see the future and could not sample what it scores; take router=TopK()"
            )
        self.router.check(self.experts, self.top_k)
        for name in ("shared_experts", "balance_coef", "z_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        if self.balance not in BALANCES:
            raise ValueError(f"unknown balance {self.balance!r}; expected one of {', '.join(BALANCES)}")
        if not 0.0 <= self.jitter < 1.0:
            raise ValueError(f"jitter must be in [0, 1), got {self.jitter}")
        if self.capacity is not None and self.capacity <= 0.0:
            raise ValueError(f"capacity must be positive, got {self.capacity}; None drops nothing")
        if self.bias_rate is not None and self.bias_rate < 0.0:
            raise ValueError(f"bias_rate must not be negative, got {self.bias_rate}; None has no bias")
        if self.scale <= 0.0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        check_implementation(self.implementation)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], shared: Shared
    ) -> tuple[Float[Array, "B T E"], dict[str, Shaped[Array, "B ..."]]]:
        style, d_model, parts = shared.style, x.shape[-1], 2 if self.gated else 1
        real = shared.queries.segments > 0
        routed = self._route(x, real, shared)
        kept = jnp.broadcast_to(real[..., None], routed.experts.shape)
        if self.capacity is not None:
            flat = routed.experts.reshape(-1, self.top_k)
            kept = routing.keep(flat, real.reshape(-1), self.experts, self.capacity).reshape(kept.shape)
        shape, axes = (self.experts, d_model, parts, self.width), ("expert", "embed", None, "expert_mlp")
        w_in = parameter(self, "in", shape, axes, style.init_std, style)
        shape, axes = (self.experts, self.width, d_model), ("expert", "expert_mlp", "embed")
        w_out = parameter(self, "out", shape, axes, style.residual_std, style)
        y = expert_feedforward(
            x,
            jnp.where(kept, routed.experts, self.experts),
            jnp.where(kept, routed.weights * self.scale, 0.0),
            w_in, w_out, functools.partial(_activated, self.activation, self.gated), self.implementation,
        )  # fmt: skip
        if self.shared_experts:
            always = MLP(self.shared_experts * self.width, self.activation, self.gated, name="shared")
            y = y + always(x, shared)[0]
        return y, self._report(routed, kept, real)

    def _route(self, x: Float[Array, "B T E"], real: Bool[Array, "B T"], shared: Shared) -> Routing:
        """The router, in fp32 throughout; it reads 0 where there is padding, whatever that holds."""
        exact = dataclasses.replace(shared.style, dtype=jnp.promote_types(x.dtype, jnp.float32))
        read = jnp.where(real[..., None], x, 0.0).astype(exact.dtype)
        if self.jitter > 0.0 and not shared.deterministic:
            read = routing.jittered(read, self.jitter, self.make_rng("dropout"))
        kernel = parameter(self, "router", (x.shape[-1], self.experts), ("embed", None), exact.init_std, exact)
        logits = jnp.matmul(read, kernel, precision=jax.lax.Precision.HIGHEST)
        bias = None
        if self.bias_rate is not None:
            start = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
            declared = cast(jax.Array, self.param("router_bias", start, (self.experts,), jnp.float32))
            bias = jax.lax.stop_gradient(declared)
        assert isinstance(self.router, TopK)
        return routing.route(logits, self.top_k, self.router, bias, shared.routing)

    def _report(
        self, routed: Routing, kept: Bool[Array, "B T k"], real: Bool[Array, "B T"]
    ) -> dict[str, Shaped[Array, "B ..."]]:
        load, probs = routing.loads(routed.experts, real, self.experts), routing.mean_probs(routed.probs, real)
        if self.balance == "batch":
            balance = routing.balance_loss(routing.batchwise(load, real), routing.batchwise(probs, real))
        else:
            balance = routing.balance_loss(load, probs)
        z = routing.z_loss(routed.logits, real)
        return {
            "loss": self.balance_coef * balance + self.z_coef * z,
            "moe/balance": balance,
            "moe/z": z,
            "moe/entropy": routing.entropy(routed.probs, real),
            "moe/dropped": routing.dropped_fraction(kept, real),
            "moe/load": load,
            "moe/experts": routed.experts,
        }


def _activated(activation: str, gated: bool, hidden: Float[Array, "R parts width"]) -> Float[Array, "R width"]:
    act = ACTIVATIONS[activation](hidden[:, 0])
    return act * hidden[:, 1] if gated else act
