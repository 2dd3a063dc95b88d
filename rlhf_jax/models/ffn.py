"""Layers that work on each token alone: ``ffn(x, shared) -> (y, aux)``, ``aux`` naming scalars of the layer."""

from __future__ import annotations

import functools

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from rlhf_jax.models.layers import Shared, parameter, product

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""By the names that feed-forwards take."""


class MLP(nn.Module):
    """``activation(x W_in) W_out``, or ``(activation(x W_gate) * x W_up) W_out`` when gated.

    Args:
        width: of the hidden layer.
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        gated: multiply by a second, linear projection (https://arxiv.org/abs/2002.05202).
        bias: biases on both projections.
    """

    width: int
    activation: str = "gelu_tanh"
    gated: bool = False
    bias: bool = False

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"the feed-forward width must be positive, got {self.width}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], shared: Shared
    ) -> tuple[Float[Array, "B T E"], dict[str, Float[Array, ""]]]:
        style, d_model, parts = shared.style, x.shape[-1], 2 if self.gated else 1
        kernel = parameter(self, "in", (d_model, parts, self.width), ("embed", None, "mlp"), style.init_std, style)
        hidden = product(x, kernel)
        if self.bias:
            hidden = hidden + parameter(self, "in_bias", (parts, self.width), (None, "mlp"), 0.0, style)
        activate = ACTIVATIONS[self.activation]
        if self.gated:
            hidden = activate(hidden[..., 0, :]) * hidden[..., 1, :]
        else:
            hidden = activate(hidden[..., 0, :])
        kernel = parameter(self, "out", (self.width, d_model), ("mlp", "embed"), style.residual_std, style)
        y = product(hidden, kernel)
        return y + parameter(self, "out_bias", (d_model,), ("embed",), 0.0, style) if self.bias else y, {}


class SwiGLU(MLP):
    """The gated feed-forward of Llama."""

    activation: str = "silu"
    gated: bool = True


class GeGLU(MLP):
    """The gated feed-forward with GELU in its tanh form."""

    gated: bool = True
