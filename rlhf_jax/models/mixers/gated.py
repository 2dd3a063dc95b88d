"""What the gated attention units share: their choices as values, their projections, and their gate.

``[U | V | Z] = SiLU(x W)``; queries and keys are scaled and shifted copies of the narrow ``Z``; the output is
``(U * mixed) W_o``, where ``mixed`` sums the ``V`` of other tokens (arXiv 2202.10447). Such a unit is mixer and
feed-forward in one: ``Block(GAU(), ffn=None)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from rlhf_jax.models.layers import Style, parameter, product
from rlhf_jax.models.positions import ALiBi, Position, RoPE
from rlhf_jax.ops.positions import apply_rope, rope_angles
from rlhf_jax.types import Context

BIAS_BASE = 10_000.0
"""Of the rotation in ``Rotary``, which does not depend on the model's own positions."""


@dataclass(frozen=True)
class SoftmaxPlus:
    """``softmax(log(n) / log(base) q k' / sqrt(s))`` over the ``n`` visible keys (GAU-alpha), instead of a score.

    It normalises itself, and the factor, 1 at ``n = base``, keeps the entropy from growing with the length.
    """

    base: int = 512

    def __post_init__(self):
        if self.base < 2:
            raise ValueError(f"the base of SoftmaxPlus must be at least 2 tokens, got {self.base}")


@dataclass(frozen=True)
class Count:
    """Divide each query's sum by the number of keys that it sees.

    It depends on nothing after the query, so prefill and decoding are equal to a full pass, and the amplitude neither
    grows with the length nor has to be chosen. Early tokens average over few keys, as under a softmax.
    """


@dataclass(frozen=True)
class Constant:
    """Divide every query's sum by ``tokens``: as exact as ``Count``, with an amplitude that grows along the row."""

    tokens: float

    def __post_init__(self):
        if not self.tokens > 0:
            raise ValueError(f"the constant normaliser must be positive, got {self.tokens}")


@dataclass(frozen=True)
class Length:
    """The paper's ``score(q k' / n + bias)`` with ``n`` the length of the document; only for models that never decode.

    ``n`` is unknown until the document ends: appending as many tokens again changed the first half of the output by
    300 % (of a random sequence), so a model that decodes cannot have it.
    """


Normaliser = Count | Constant | Length


@dataclass(frozen=True)
class Toeplitz:
    """A trained bias for each distance up to ``length`` positions; farther keys take the last one."""

    length: int = 512

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"the table of biases needs at least 1 entry, got {self.length}")


@dataclass(frozen=True)
class Rotary:
    """The bias ``<rope(a)_t, rope(b)_s>`` with two trained vectors as wide as the keys: for any distance."""


Bias = Toeplitz | Rotary


def check_unit(expansion: float, key_dim: int, bias: Bias | None) -> None:
    """Refuse widths that no gated unit can have."""
    if expansion < 1:
        raise ValueError(f"expansion must be at least 1 (values as wide as the model), got {expansion}")
    if key_dim < 1:
        raise ValueError(f"key_dim must be at least 1, got {key_dim}")
    if isinstance(bias, Rotary) and key_dim % 2:
        raise ValueError(f"the rotary bias turns pairs of dimensions; take an even key_dim, got {key_dim}")


def check_position(position: Position | None, key_dim: int) -> None:
    """Refuse a way of knowing positions that gated units do not have."""
    if isinstance(position, ALiBi):
        raise ValueError("ALiBi has one slope a head, and gated units have one head; take RoPE, and a bias if wanted")
    if isinstance(position, RoPE):
        if position.by_query:
            raise ValueError(
                "dynamic NTK turns each key anew for each query, which only softmax attention does; take "
                "RoPE(scaling=NTK(...)) or YaRN"
            )
        if key_dim % 2:
            raise ValueError(f"RoPE turns pairs of dimensions; take an even key_dim, got {key_dim}")
        position.check(key_dim)


def value_width(expansion: float, d_model: int) -> int:
    """Width of the values."""
    width = round(expansion * d_model)
    if abs(width - expansion * d_model) > 1e-6:
        raise ValueError(f"expansion {expansion} of d_model {d_model} is not a whole number of dimensions")
    return width


def project(
    module: nn.Module, x: Float[Array, "B T d"], expansion: float, key_dim: int, uses: int, style: Style
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"], list[Float[Array, "B T D"]]]:
    """The gate, the values, and as many versions of the narrow ``Z`` as there are uses.

    Each version has its own scale and offset. Scales start at 1 and not, as published, near 0: without a bias to start
    from, logits of the order 1e-5 leave relu² no gradient.
    """
    width = value_width(expansion, x.shape[-1])
    wide = parameter(module, "gates", (x.shape[-1], 2, width), ("embed", None, "mlp"), style.init_std, style)
    both = jax.nn.silu(product(x, wide))
    u, v = both[..., 0, :], both[..., 1, :]
    narrow = parameter(module, "keys", (x.shape[-1], key_dim), ("embed", "head_dim"), style.init_std, style)
    z = jax.nn.silu(product(x, narrow))
    scale = 1.0 + parameter(module, "use_scale", (uses, key_dim), (None, "head_dim"), style.init_std, style)
    offset = parameter(module, "use_bias", (uses, key_dim), (None, "head_dim"), 0.0, style)
    return u, v, [z * scale[use] + offset[use] for use in range(uses)]


def turned(
    copies: list[Float[Array, "B T D"]], positions: Int[Array, "B T"], style: Style
) -> list[Float[Array, "B T D"]]:
    """Queries and keys by the model's rotation, if it has one."""
    position = style.position
    return [position.rotate(x, positions) for x in copies] if isinstance(position, RoPE) else copies


def gated(module: nn.Module, u: Float[Array, "B T E"], mixed: Float[Array, "B T E"], d_model: int, style: Style):
    """The gate, and the projection into the residual stream."""
    shape = (u.shape[-1], d_model)
    kernel = parameter(module, "out", shape, ("mlp", "embed"), style.residual_std, style)
    return product(u * mixed, kernel)


def table(module: nn.Module, bias: Bias | None, style: Style) -> Float[Array, " R"] | None:
    """The biases by distance of ``Toeplitz``."""
    if not isinstance(bias, Toeplitz):
        return None
    return parameter(module, "bias_table", (bias.length,), (None,), style.init_std, style)


def rotary_table(module: nn.Module, key_dim: int, length: int, style: Style) -> Float[Array, " length"]:
    """The bias of ``Rotary`` for distances below ``length``: turning both vectors is turning one by the difference."""
    vectors = _bias_vectors(module, key_dim, style)
    distances = jnp.arange(length)[None]
    spread = jnp.broadcast_to(vectors[0], (1, length, key_dim))
    return (apply_rope(spread, rope_angles(distances, key_dim, BIAS_BASE)) @ vectors[1])[0]


def with_rotary_bias(
    module: nn.Module,
    bias: Bias | None,
    q: Float[Array, "B T D"],
    k: Float[Array, "B S D"],
    queries: Context,
    keys: Context,
    scale: float,
    style: Style,
) -> tuple[Float[Array, "B T D2"], Float[Array, "B S D2"]]:
    """Queries and keys whose products, times ``scale``, contain the bias of ``Rotary``.

    Its vectors are turned by the tokens' positions and stand beside the queries and keys, which costs one more product
    of the narrow width, and no implementation has to know of it.
    """
    if not isinstance(bias, Rotary):
        return q, k
    width = q.shape[-1]
    vectors = _bias_vectors(module, width, style)

    def beside(x, vector, positions):
        spread = jnp.broadcast_to(vector, x.shape)
        return jnp.concatenate([x, apply_rope(spread, rope_angles(positions, width, BIAS_BASE))], axis=-1)

    return beside(q, vectors[0] / scale, queries.positions), beside(k, vectors[1], keys.positions)


def _bias_vectors(module: nn.Module, width: int, style: Style) -> Float[Array, "2 D"]:
    return parameter(module, "bias_vectors", (2, width), (None, "head_dim"), style.init_std, style)


def document_lengths(context: Context) -> Int[Array, "B T"]:
    """The number of tokens in each token's document; documents lie in their rows without gaps and in order."""
    position, segment = context.positions, context.segments
    goes_on = (segment[:, 1:] == segment[:, :-1]) & (position[:, 1:] == position[:, :-1] + 1)
    slots = jnp.arange(position.shape[1])
    ends = jnp.where(jnp.pad(goes_on, ((0, 0), (0, 1))), position.shape[1] - 1, slots)
    return jnp.take_along_axis(position, jax.lax.cummin(ends, axis=1, reverse=True), axis=1) + 1


def times(q: Float[Array, "B T D"], factor: Float[Array, "B T"]) -> Float[Array, "B T D"]:
    """Each query times its own factor, which is exact to the precision of the queries."""
    return (q * factor[..., None]).astype(q.dtype)
