"""How ``blocked`` cuts one attention into tiles, and which of them it visits.

Query tiles hold all query heads of a key head below each other, so that a product has many rows and the gradients of
keys and values are summed over those heads by the product itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jaxtyping import Array, Float, Int

from rlhf_jax.ops.attention.masks import ALL, NOTHING, SOME, Mask, Rule
from rlhf_jax.ops.attention.terms import HIDDEN, Terms, this_device
from rlhf_jax.ops.meshes import active_mesh

LARGEST, SMALLEST = 256, 128
"""Products of this many rows keep two CPU cores busy; tiles below the smallest spend their time on being started."""


@dataclass(frozen=True)
class Tiling:
    """The shape of a tile.

    Args:
        queries: tokens of a tile of queries.
        keys: tokens of a tile of keys.
        rows: rows of the batch that share their tiles, which are visited when any of these rows needs them.
    """

    queries: int
    keys: int
    rows: int = 1

    @classmethod
    def of(cls, q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], mask: Mask) -> Tiling:
        """Tiles that suit the shapes and the device; a narrow window wants small ones, to see little beside it."""
        largest = LARGEST if mask.window is None else min(max(mask.window, SMALLEST), LARGEST)
        per_group = q.shape[2] // k.shape[2]
        # One CPU runs the products of one row as well as those of many, and skips more when it takes rows alone.
        alone = this_device()[0] == "cpu" and active_mesh() is None
        return cls(
            _even(q.shape[1], max(largest // per_group, SMALLEST)),
            _even(k.shape[1], largest),
            rows=1 if alone else q.shape[0],
        )

    def queries_apart(self, x: Float[Array, "B T H D"], groups: int) -> Float[Array, "query_tiles R K Gt D"]:
        """Whole tiles of queries (or of what has their shape)."""
        x = _pad(x, self.queries)
        return rearrange(x, "(b r) (n t) (k g) d -> (b n) r k (g t) d", r=self.rows, t=self.queries, k=groups)

    def queries_joined(self, x: Float[Array, "query_tiles R K Gt D"], like: Float[Array, "B T H D"]):
        """The inverse of ``queries_apart``; the result has the dtype and all but the width of ``like``."""
        rows, length, _, _ = like.shape
        x = rearrange(x, "(b n) r k (g t) d -> (b r) (n t) (k g) d", b=rows // self.rows, t=self.queries)
        return x[:, :length].astype(like.dtype)

    def numbers_apart(self, x: Float[Array, "B T H"], groups: int) -> Float[Array, "query_tiles R K G t"]:
        """Whole tiles of one number for each query and head."""
        x = _pad(x, self.queries)
        return rearrange(x, "(b r) (n t) (k g) -> (b n) r k g t", r=self.rows, t=self.queries, k=groups)

    def numbers_joined(self, x: Float[Array, "query_tiles R K G t"], like: Float[Array, "B T H D"]):
        """The inverse of ``numbers_apart``."""
        rows, length, _, _ = like.shape
        return rearrange(x, "(b n) r k g t -> (b r) (n t) (k g)", b=rows // self.rows)[:, :length]

    def keys_apart(self, x: Float[Array, "B S K D"]) -> Float[Array, "key_tiles R K s D"]:
        """Whole tiles of keys or values."""
        return rearrange(_pad(x, self.keys), "(b r) (n s) k d -> (b n) r k s d", r=self.rows, s=self.keys)

    def keys_joined(self, x: Float[Array, "key_tiles R K D s"], like: Float[Array, "B S K D"]):
        """Keys or values from tiles with their tokens last; dtype and shape of ``like``."""
        rows, slots, _, _ = like.shape
        x = rearrange(x, "(b n) r k d s -> (b r) (n s) k d", b=rows // self.rows)
        return x[:, :slots].astype(like.dtype)


def _even(length: int, largest: int) -> int:
    """The tile that cuts a length into as few tiles as the largest would, with the least padding."""
    tiles = -(-length // largest)
    return -(-length // (tiles * 8)) * 8


def _pad(x: Float[Array, "B T ..."], multiple: int) -> Float[Array, "B Tp ..."]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)) + ((0, 0),) * (x.ndim - 2))


@struct.dataclass
class Visits:
    """Of each tile on one side: the first ``seen[i]`` of ``order[i]`` are the tiles on the other that it meets."""

    order: Int[Array, "tiles others"]
    seen: Int[Array, " tiles"]

    @classmethod
    def of(cls, blocks: Int[Array, "groups tiles others"]) -> Visits:
        """From what each tile sees of each other; tiles and others are numbered through all groups of rows."""
        groups, tiles, others = blocks.shape
        first = jnp.arange(groups, dtype=jnp.int32)[:, None, None] * others
        order = jnp.argsort(blocks == NOTHING, axis=-1, stable=True).astype(jnp.int32) + first
        return cls(order.reshape(groups * tiles, others), (blocks != NOTHING).sum(-1).reshape(-1))


@struct.dataclass
class Tiles:
    """Where the tokens of every tile stand, and what every tile of queries sees of every tile of keys."""

    queries: Int[Array, "query_tiles R 4 t"]
    """start, end, position, segment"""
    keys: Int[Array, "key_tiles R 2 s"]
    """position, segment"""
    blocks: Int[Array, "groups tiles others"]
    rule: Rule = struct.field(pytree_node=False)

    @classmethod
    def of(cls, mask: Mask, tiling: Tiling) -> Tiles:
        """The tiles of a mask."""
        mask = mask.padded(tiling.queries, tiling.keys)
        queries = jnp.stack([mask.start, mask.end, mask.query_positions, mask.query_segments], axis=1)
        keys = jnp.stack([mask.key_positions, mask.key_segments], axis=1)
        blocks = rearrange(mask.blocks(tiling.queries, tiling.keys), "(b r) n m -> b r n m", r=tiling.rows)
        met = jnp.where((blocks != NOTHING).any(1), SOME, NOTHING)
        return cls(
            rearrange(queries, "(b r) c (n t) -> (b n) r c t", r=tiling.rows, t=tiling.queries),
            rearrange(keys, "(b r) c (n s) -> (b n) r c s", r=tiling.rows, s=tiling.keys),
            jnp.where((blocks == ALL).all(1), ALL, met),
            mask.rule,
        )

    def bias(self, i: Int[Array, ""], j: Int[Array, ""], dtype) -> Float[Array, "R 1 1 t s"]:
        """0 where the queries of tile ``i`` see the keys of tile ``j``, ``HIDDEN`` elsewhere."""

        def some():
            start, end, position, segment = jnp.moveaxis(self.queries[i], 1, 0)[..., None]
            key_position, key_segment = jnp.moveaxis(self.keys[j], 1, 0)[..., None, :]
            shown = self.rule.visible(position, start, end, key_position)
            return jnp.where(shown & (segment == key_segment) & (segment != 0), 0.0, HIDDEN).astype(dtype)

        def every():
            return jnp.zeros((self.queries.shape[1], self.queries.shape[3], self.keys.shape[3]), dtype)

        _, tiles, others = self.blocks.shape
        whole = self.blocks[i // tiles, i % tiles, j % others] == ALL
        # The branch also keeps the compiler from working the mask out again for each head.
        return jax.lax.cond(whole, every, some)[:, None, None]

    def logits(
        self, products: Float[Array, "R K Gt s"], i: Int[Array, ""], j: Int[Array, ""], terms: Terms
    ) -> tuple[Float[Array, "R K G t s"], Float[Array, "R K G t s"]]:
        """The logits of a tile: without the slopes' part and regardless of the mask, and complete."""
        position, key_position = self.queries[i][:, 2], self.keys[j][:, 0]
        products = rearrange(products, "r k (g t) s -> r k g t s", t=position.shape[-1])
        plain = terms.logits(products, None, None, None)
        bias = self.bias(i, j, products.dtype)
        if terms.slopes is None:
            return plain, plain + bias
        slopes = terms.slopes.astype(products.dtype).reshape(1, products.shape[1], -1, 1, 1)
        query, key = position[:, None, None, :, None], key_position[:, None, None, None, :]
        return plain, terms.logits(products, query, key, slopes) + bias


def zero_where_padded(x: Float[Array, "B T N D"], segments: Int[Array, "B T"]) -> Float[Array, "B T N D"]:
    """Whatever lies in padding cannot reach a result through a weight of 0 (NaN times 0 is NaN)."""
    return jnp.where((segments != 0)[:, :, None, None], x, 0)
