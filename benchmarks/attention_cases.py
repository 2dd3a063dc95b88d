"""What attention.py measures: the shapes, how much work each is, and the least time that it could take.

Standard library and numpy only, because every contestant's process imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PEAK_FLOPS, PEAK_BYTES = 989e12, 4.8e12
"""Of an H200: bf16 products without sparsity, and memory, a second."""
SAMPLE = 64
"""Queries of the first row whose results are checked where the row is long."""
CHECKED = 2048
"""Up to this length all results of the first row are checked, and the gradients of keys and values too."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        kind: "attention", "decode" (one query a row over ``length`` keys), "gau" or "flash" (whose ``width`` is that of
            queries and keys, and ``value_width`` that of the values).
        mask: "causal", "window", or "packed" (several documents a row).
        rows: rows of the batch.
        length: tokens of a row.
        chunk: tokens of a chunk of "flash".
    """

    kind: str
    mask: str
    rows: int
    length: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: str = "bfloat16"
    window: int = 512
    chunk: int = 256

    @property
    def title(self) -> str:
        shape = f"{self.rows}x{self.length}, {self.heads}/{self.kv_heads} heads of {self.width}"
        if self.kind in ("gau", "flash"):
            shape = f"{self.rows}x{self.length}, widths {self.width} and {self.value_width}"
        return f"{self.kind} {self.mask} {shape}"

    @property
    def documents(self) -> list[int]:
        """Lengths of a row's documents: uneven, the same ones in each row."""
        if self.mask != "packed":
            return [self.length]
        shares = np.array([1, 3, 2, 6, 1, 2, 8, 1], np.float64) / 24
        ends = np.round(np.cumsum(shares) * self.length).astype(int)
        return [int(n) for n in np.diff(ends, prepend=0)]

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions and segments of one row."""
        documents = self.documents
        return (
            np.concatenate([np.arange(n, dtype=np.int32) for n in documents]),
            np.repeat(np.arange(1, len(documents) + 1, dtype=np.int32), documents),
        )

    def pairs(self) -> int:
        """Queries and keys of one row that see each other."""
        if self.kind == "decode":
            return self.length
        reach = {"window": self.window}.get(self.mask, self.length)
        lengths = self.documents
        if self.kind == "flash":
            lengths = [min(self.chunk, n - at) for n in lengths for at in range(0, n, self.chunk)]
        return sum(int(np.minimum(np.arange(1, n + 1), reach).sum()) for n in lengths)

    def flops(self, part: str) -> float:
        """Of the products alone; backwards the scores are made again, so that it has five products for two."""
        inner, outer = (1, 1) if part == "forward" else (3, 2)
        count = 2.0 * self.rows * self.heads * self.pairs() * (inner * self.width + outer * self.value_width)
        if self.kind == "flash":
            # The state takes up keys and values and is read by the queries; backwards each product has two.
            count += (2 if part == "forward" else 4) * 2.0 * self.rows * self.length * self.width * self.value_width
        return count

    def bytes(self, part: str) -> float:
        """Read and written once: queries, keys, values and output; backwards also their gradients."""
        size = 4 if self.dtype == "float32" else 2
        queries = 1 if self.kind == "decode" else self.length
        maps = 2 if self.kind == "flash" else 1
        own = maps * self.heads * self.width * queries + self.heads * self.value_width * queries
        others = self.kv_heads * self.length * (maps * self.width + self.value_width)
        return float(size * self.rows * (own + others) * (1 if part == "forward" else 2))

    def predicted(self, part: str) -> float:
        """Seconds on an H200 if nothing but its products or its memory took time."""
        return max(self.flops(part) / PEAK_FLOPS, self.bytes(part) / PEAK_BYTES)

    @property
    def dense_bytes(self) -> int:
        """Of the logits in fp32, if all of them were held at once."""
        return 4 * self.rows * self.heads * self.length * (1 if self.kind == "decode" else self.length)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("forward",) if self.kind == "decode" else ("forward", "backward")

    def described(self) -> dict[str, Any]:
        return asdict(self)


def numbers(case: Case) -> dict[str, np.ndarray]:
    """The same random inputs, and cotangent of the output, in every process."""
    queries = 1 if case.kind == "decode" else case.length
    shapes = {
        "q": (case.rows, queries, case.heads, case.width),
        "k": (case.rows, case.length, case.kv_heads, case.width),
        "v": (case.rows, case.length, case.kv_heads, case.value_width),
        "cotangent": (case.rows, queries, case.heads, case.value_width),
    }
    if case.kind == "flash":
        shapes |= {"q_global": shapes["q"], "k_global": shapes["k"]}
    drawn = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        # The bits of a few drawn numbers again and again would be drawn faster and cost a GPU less power.
        drawn[name] = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return drawn


def sampled(case: Case) -> np.ndarray:
    """The queries of the first row that are checked, in order; always the first and the last."""
    if case.kind == "decode":
        return np.zeros(1, np.int64)
    if case.length <= CHECKED:
        return np.arange(case.length)
    inside = np.random.default_rng(0).choice(np.arange(1, case.length - 1), SAMPLE - 2, replace=False)
    return np.sort(np.concatenate([[0, case.length - 1], inside]))


def _attention(length: int, width: int, mask: str = "causal", tokens: int = 16_384) -> Case:
    """As in the literature: 16k tokens in all (one row where that is longer), 2,048 columns of heads."""
    heads = 2048 // width
    return Case("attention", mask, max(tokens // length, 1), length, heads, heads, width, width)


def gpu_cases() -> Iterator[Case]:
    """The most telling first, because the time may run out."""
    lengths = (512, 1024, 2048, 4096, 16_384, 32_768, 65_536)
    yield _attention(8192, 128)
    for mask in ("packed", "window"):
        yield _attention(8192, 128, mask)
    for rows in (1, 8, 64):
        for context in (1024, 8192, 32_768):
            yield Case("decode", "causal", rows, context, 32, 8, 128, 128)
    for length in (2048, 8192):
        yield Case("gau", "causal", 16_384 // length, length, 1, 1, 128, 2048)
    for length in (8192, 32_768):
        yield Case("flash", "causal", max(16_384 // length, 1), length, 1, 1, 128, 2048)
    for length in lengths:
        yield _attention(length, 128)
    for width in (64, 256):
        for mask in ("causal", "packed", "window"):
            yield _attention(8192, width, mask)
    for mask in ("packed", "window"):
        for length in (2048, 32_768):
            yield _attention(length, 128, mask)
    for width in (64, 256):
        for length in lengths:
            yield _attention(length, width)


def cpu_cases() -> Iterator[Case]:
    """fp32, one row; FLASH over a range of lengths, because its time a token should not depend on it."""
    for length in (4096, 1024, 2048, 8192, 512, 256):
        yield Case("attention", "causal", 1, length, 8, 8, 64, 64, "float32")
    for mask in ("packed", "window"):
        yield Case("attention", mask, 1, 4096, 8, 8, 64, 64, "float32")
    for length in (1024, 2048, 4096, 8192, 16_384, 32_768):
        yield Case("flash", "causal", 1, length, 1, 1, 128, 512, "float32")
    for length in (1024, 4096):
        yield Case("gau", "causal", 1, length, 1, 1, 128, 512, "float32")
    for rows, context in ((1, 1024), (8, 1024), (1, 8192), (8, 8192)):
        yield Case("decode", "causal", rows, context, 8, 2, 64, 64, "float32")


def tiny_cases() -> Iterator[Case]:
    """Whether everything runs."""
    for mask in ("causal", "packed", "window"):
        yield Case("attention", mask, 2, 96, 2, 2, 16, 16, "float32", window=16)
    yield Case("decode", "causal", 2, 64, 4, 2, 16, 16, "float32")
    yield Case("gau", "causal", 1, 64, 1, 1, 16, 32, "float32")
    yield Case("flash", "causal", 1, 96, 1, 1, 16, 32, "float32", chunk=32)
