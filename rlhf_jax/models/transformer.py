"""The decoder: embeddings, a repeated pattern of blocks, and the unembedding.

One call serves training, prefill and decoding; the law is ``full(x) = prefill(x[:t]) then decode(x[t:])``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Shaped

from rlhf_jax.models.blocks import Aux, Block, Pattern, routes
from rlhf_jax.models.layers import RMSNorm, Shared, Style, dropped, parameter, product
from rlhf_jax.models.positions import Learned, Position, RoPE, Sinusoidal
from rlhf_jax.models.stacks import rounds_of
from rlhf_jax.ops.meshes import constrain_tokens
from rlhf_jax.ops.positions import sinusoidal
from rlhf_jax.types import Cache, Context, PyTree

REMAT_POLICIES = (
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
)
"""Names in ``jax.checkpoint_policies``: what the backward pass may keep instead of computing it again."""


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        vocab_size: number of tokens.
        d_model: width of the residual stream.
        pattern: blocks that follow each other; the whole pattern is repeated.
        repeats: how often; the number of layers is ``repeats * len(pattern)``.
        position: one of ``models.positions`` (``RoPE``, ``ALiBi``, ``Learned``, ``Sinusoidal``) or None.
        norm: ``LayerNorm`` or ``RMSNorm``, used for every norm of the model.
        prenorm: normalise what a layer reads; otherwise what it has written (GPT-1).
        final_norm: normalise before the unembedding.
        max_length: the context limit, in tokens of a row and slots of a cache.
        tie_embeddings: unembed with the embedding matrix.
        logit_softcap: bound the logits by ``cap * tanh(logits / cap)``.
        dropout: of embeddings and of what each layer writes.
        init_std: standard deviation of all weights that are not named otherwise.
        scale_residual_init: divide that of projections into the residual stream by the square root of their number.
        split: the first so many rounds hold their parameters in a stack of their own, ``lower``; nothing else changes.
        unroll: compile the rounds one after another instead of as a loop: a training step on CPU takes 0.85 times as
            long, compilation longer; the parameters stay the same.
        remat: one of ``REMAT_POLICIES``, applied to each round of the pattern; None keeps all activations.
        dtype: of the computation; norms' statistics, softmax and logits are always fp32.
        param_dtype: of the parameters.
    """

    vocab_size: int
    d_model: int
    pattern: tuple[Block, ...]
    repeats: int = 1
    position: Position | None = RoPE()
    norm: nn.Module = RMSNorm()
    prenorm: bool = True
    final_norm: bool = True
    max_length: int = 2048
    tie_embeddings: bool = True
    logit_softcap: float | None = None
    dropout: float = 0.0
    init_std: float = 0.02
    scale_residual_init: bool = True
    split: int = 0
    unroll: bool = False
    remat: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "repeats", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.split < self.repeats:
            raise ValueError(f"split must be at least 0 and below the {self.repeats} repeats, got {self.split}")
        if not self.pattern:
            raise ValueError("pattern is empty; expected at least one Block")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap must be positive, got {self.logit_softcap}; None switches it off")
        if self.remat is not None and self.remat not in REMAT_POLICIES:
            raise ValueError(f"unknown remat policy {self.remat!r}; expected None or one of {REMAT_POLICIES}")
        for block in self.pattern:
            block.mixer.check(self.d_model)
            if hasattr(block.mixer, "check_position"):
                block.mixer.check_position(self.position, self.d_model)
        kinds = {(block.ffn.experts, block.ffn.top_k) for block in self.pattern if routes(block)}  # pyright: ignore
        if len(kinds) > 1:
            raise ValueError(
                "all mixtures of experts of a model need equal experts and top_k, so that routing is one array; got "
                + " and ".join(f"{experts} experts with top_k {k}" for experts, k in sorted(kinds))
            )
        super().__post_init__()

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.repeats * len(self.pattern)

    @property
    def style(self) -> Style:
        """What the layers follow."""
        writers = self.repeats * sum(1 if block.ffn is None else 2 for block in self.pattern)
        residual_std = self.init_std * writers**-0.5 if self.scale_residual_init else self.init_std
        return Style(
            position=self.position,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            init_std=self.init_std,
            residual_std=residual_std,
            dropout=self.dropout,
            prenorm=self.prenorm,
        )

    def setup(self):
        exact = Style(dtype=jnp.float32, param_dtype=self.param_dtype)
        shape, axes = (self.vocab_size, self.d_model), ("vocab", "embed")
        self.embedding = parameter(self, "embedding", shape, axes, self.init_std, exact)
        if not self.tie_embeddings:
            self.unembedding = parameter(self, "unembedding", shape, axes, self.init_std, exact)
        if isinstance(self.position, Learned):
            shape, axes = (self.max_length, self.d_model), ("position", "embed")
            self.position_embedding = parameter(self, "position_embedding", shape, axes, self.position.std, exact)
        if self.split:
            self.lower = self._stacked(self.split)
        self.stack = self._stacked(self.repeats - self.split)
        if self.final_norm:
            self.last_norm = self.norm.clone(parent=None)

    def _stacked(self, rounds: int) -> Any:
        """Declares the parameters of so many rounds, each with a leading axis; see ``_through``."""
        return nn.scan(
            Pattern,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=rounds,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(**self._pattern())

    def _pattern(self) -> dict[str, Any]:
        """Fields of the repeated body, free of any tie to this module."""
        free = tuple(block.clone(parent=None, _deep_clone=True) for block in self.pattern)
        return {"blocks": free, "norm": self.norm.clone(parent=None)}

    @property
    def routed_layers(self) -> int:
        """Number of blocks whose feed-forward is a mixture of experts."""
        return self.repeats * sum(map(routes, self.pattern))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        context: Context,
        cache: Cache | None = None,
        deterministic: bool = True,
        routing: Int[Array, "routed B T k"] | None = None,
    ) -> tuple[Float[Array, "B T V"], Cache | None, Aux]:
        """Logits (fp32) of the next token after each token."""
        x, cache, aux = self.hidden(tokens, context, cache, deterministic, routing)
        return self.unembed(x), cache, aux

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        context: Context,
        cache: Cache | None = None,
        deterministic: bool = True,
        routing: Int[Array, "routed B T k"] | None = None,
    ) -> tuple[Float[Array, "B T E"], Cache | None, Aux]:
        """What the unembedding reads.

        Args:
            tokens: new tokens of each row.
            context: their positions and segments.
            cache: of the tokens before them; the new ones are entered at ``next_slot`` and after, which must exist.
            deterministic: no dropout; otherwise ``rngs={"dropout": key}`` is needed.
            routing: experts that the tokens go to, as an earlier pass reported them under "moe/experts"; None to
                choose them.

        Returns:
            The hidden states, the cache with the new tokens in it, and what layers report about themselves. Reports
            of one name are stacked on a leading axis of the layers that have it: all rounds of the first such block of
            the pattern, then those of the next.
        """
        if tokens.shape[1] > self.max_length:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens exceed the model's max_length {self.max_length}; shorten the rows "
                "or build the model with a larger max_length"
            )
        shared = Shared(context, context, style=self.style, deterministic=deterministic)
        x = dropped(self, self._embed(tokens, context), shared)
        if routing is not None:
            routing = self._by_round(routing)
        if cache is None:
            x, aux = self._through_stacks(x, shared, routing)
        else:
            cache = _enter(cache, context)
            keys = Context(cache.positions, cache.segments)
            shared = dataclasses.replace(shared, keys=keys, slot=cache.next_slot)
            x, layers, aux = self._through_cache(x, shared, cache.layers, routing)
            cache = dataclasses.replace(cache, layers=layers, next_slot=cache.next_slot + tokens.shape[1])
        if self.final_norm:
            x = self.last_norm(x, shared.style)
        return x, cache, _gather(aux)

    def unembed(self, hidden: Float[Array, "... E"]) -> Float[Array, "... V"]:
        """Logits in fp32."""
        matrix = self.embedding if self.tie_embeddings else self.unembedding
        logits = product(hidden.astype(jnp.float32), matrix.T)
        return logits if self.logit_softcap is None else self.logit_softcap * jnp.tanh(logits / self.logit_softcap)

    def _embed(self, tokens: Int[Array, "B T"], context: Context) -> Float[Array, "B T E"]:
        x = constrain_tokens(jnp.take(self.embedding, tokens, axis=0))
        if isinstance(self.position, Learned):
            x = x + jnp.take(self.position_embedding, context.positions, axis=0)
        elif isinstance(self.position, Sinusoidal):
            waves = sinusoidal(context.positions, self.d_model, self.position.base)
            x = x + self.position.amplitude * waves
        return x.astype(self.dtype)

    def _by_round(self, routing: Int[Array, "routed B T k"]) -> Int[Array, "repeats blocks B T k"]:
        """The routing of each round, from the order in which layers report."""
        if self.routed_layers == 0 or routing.shape[0] != self.routed_layers:
            raise ValueError(
                f"routing is for {routing.shape[0]} layers, and the model has {self.routed_layers} mixtures of experts"
            )
        return routing.reshape(-1, self.repeats, *routing.shape[1:]).swapaxes(0, 1)

    def _through_stacks(
        self, x: Float[Array, "B T E"], shared: Shared, routing: Int[Array, "repeats blocks B T k"] | None
    ):
        """All layers, without a cache."""
        if not self.split:
            return self._through(self.stack, x, shared, routing)
        below, above = (None, None) if routing is None else jnp.split(routing, [self.split])
        x, first = self._through(self.lower, x, shared, below)
        x, rest = self._through(self.stack, x, shared, above)
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), first, rest)

    def _through(
        self,
        stack: nn.Module,
        x: Float[Array, "B T E"],
        shared: Shared,
        routing: Int[Array, "rounds blocks B T k"] | None,
    ):
        """All rounds of one stack.

        The modules of ``setup`` declare its parameters. Where these exist, the loop is ``jax.lax.scan`` itself, which
        traces the body once and not twice, as ``nn.scan`` does: half of what a user waits for before XLA compiles.
        """
        if self.is_initializing():
            x, (_, aux) = stack(x, shared, None, routing)
            return x, aux
        params = stack.variables["params"]
        rounds = len(jax.tree.leaves(params)[0])
        body = Pattern(**self._pattern(), parent=None)
        draws = self.has_rng("dropout") and not shared.deterministic
        keys = jax.random.split(self.make_rng("dropout"), rounds) if draws else None

        def one(x: Float[Array, "B T E"], given: tuple[PyTree, Any, Any]):
            own, key, chosen = given
            rngs = None if key is None else {"dropout": key}
            y: Any = body.apply({"params": own}, x, shared, None, chosen, rngs=rngs)
            return y[0], y[1][1]

        one = self._rematerialised(one, prevent_cse=False)
        return jax.lax.scan(one, x, (params, keys, routing), unroll=rounds if self.unroll else 1)

    def _rematerialised(self, round_: Any, prevent_cse: bool = True) -> Any:
        """One round of the pattern, of which the backward pass keeps what ``remat`` says."""
        if self.remat is None:
            return round_
        return jax.checkpoint(round_, prevent_cse=prevent_cse, policy=getattr(jax.checkpoint_policies, self.remat))

    def _through_cache(
        self,
        x: Float[Array, "B T E"],
        shared: Shared,
        layers: tuple[PyTree, ...],
        routing: Int[Array, "repeats blocks B T k"] | None,
    ):
        """The layers one by one, each with its own cache buffers.

        A scan would slice and restack the cache at every step; separate buffers are updated in place inside a decode
        loop (measured: 2.5 times as fast).
        """
        rounds, width = self.stack.variables["params"], len(self.pattern)
        if "0" not in rounds:
            rounds = rounds_of(self, self.variables["params"])  # pyright: ignore[reportArgumentType]
        body = Pattern(**self._pattern(), parent=None)

        def one(params: PyTree, x: Float[Array, "B T E"], own: tuple[PyTree, ...], chosen: Any) -> Any:
            return body.apply({"params": params}, x, shared, own, chosen)

        if x.shape[1] > 1:  # several tokens behind a cache may be trained on
            one = self._rematerialised(one)
        written, found = [], []
        for index in range(self.repeats):
            own = layers[index * width : (index + 1) * width]
            chosen = None if routing is None else routing[index]
            x, (own, aux) = one(rounds[str(index)], x, own, chosen)
            written.extend(own)
            found.append(aux)
        return x, tuple(written), jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def empty_cache(model: Transformer, batch: int, slots: int) -> Cache:
    """A cache for ``batch`` rows of up to ``slots`` tokens, all slots free."""
    if slots > model.max_length:
        raise ValueError(f"a cache of {slots} slots exceeds the model's max_length {model.max_length}")
    mixers = [block.mixer for block in model.pattern] * model.repeats
    return Cache(
        layers=tuple(mixer.empty_cache(batch, slots, model.d_model, model.dtype) for mixer in mixers),
        positions=jnp.zeros((batch, slots), jnp.int32),
        segments=jnp.zeros((batch, slots), jnp.int32),
        next_slot=jnp.zeros((), jnp.int32),
    )


def _enter(cache: Cache, context: Context) -> Cache:
    """Note the new tokens' positions and segments in their slots."""
    place = (0, cache.next_slot)
    return dataclasses.replace(
        cache,
        positions=jax.lax.dynamic_update_slice(cache.positions, context.positions.astype(jnp.int32), place),
        segments=jax.lax.dynamic_update_slice(cache.segments, context.segments.astype(jnp.int32), place),
    )


def _gather(aux: tuple[dict[str, Shaped[Array, "repeats ..."]], ...]) -> Aux:
    """All values reported under one name, of all layers that report it."""
    names = dict.fromkeys(name for found in aux for name in found)
    return {name: jnp.concatenate([found[name] for found in aux if name in found]) for name in names}
