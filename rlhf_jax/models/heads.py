"""A number for each token instead of a distribution: reward models and critics."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from rlhf_jax.models.blocks import Aux
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.types import Context

HEAD_INITS = ("reward", "zero")


class ScalarModel(nn.Module):
    """A language model's trunk with a linear head.

    ``params["trunk"]`` has exactly the structure of the trunk's own parameters, so it starts from those of a policy.

    Args:
        trunk: the language model; its unembedding stays unused.
        head_init: "reward" draws the head from N(0, 1/(d+1)) (Stiennon et al. 2020); "zero" starts a critic at 0.
    """

    trunk: Transformer
    head_init: str = "reward"

    def __post_init__(self):
        if self.head_init not in HEAD_INITS:
            raise ValueError(f"unknown head_init {self.head_init!r}; expected one of {', '.join(HEAD_INITS)}")
        super().__post_init__()

    def setup(self):
        draw = nn.initializers.normal((self.trunk.d_model + 1) ** -0.5)
        self.head = nn.Dense(
            1,
            kernel_init=nn.with_logical_partitioning(
                draw if self.head_init == "reward" else nn.initializers.zeros, ("embed", None)
            ),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (None,)),
            param_dtype=self.trunk.param_dtype,
            dtype=jnp.float32,
        )

    def __call__(self, tokens: Int[Array, "B T"], context: Context, deterministic: bool = True) -> Float[Array, "B T"]:
        """The head's output at each token, fp32."""
        return self.report(tokens, context, deterministic)[0]

    def report(
        self, tokens: Int[Array, "B T"], context: Context, deterministic: bool = True
    ) -> tuple[Float[Array, "B T"], Aux]:
        """The same, and what the trunk's layers report about themselves."""
        hidden, _, aux = self.trunk.hidden(tokens, context, deterministic=deterministic)
        return self.head(hidden.astype(jnp.float32))[..., 0], aux
