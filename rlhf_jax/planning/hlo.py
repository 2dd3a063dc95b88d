"""A compiled program's text (HLO) as computations of instructions, and how often each of them is executed.

XLA's own cost analysis counts the body of a loop once, and has none for GPUs that are not there. Loops say how often
they run in ``known_trip_count``, or by the constant that their condition compares with. Of others, one that lies inside
a loop of ``n`` rounds counts as ``(n + 1) / 2``, which is right for attention that visits the tiles below the diagonal;
one outside of every loop (a decode loop that ends with the last response) gets its number from the caller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"([a-z]+[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-<>$]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation|"
                     r"called_computations)=(\{[^}]*\}|%?[\w.\-<>$]+)")  # fmt: skip


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result. ``near``: it lies in a TPU's own memory (VMEM), not in HBM."""

    dtype: str
    shape: tuple[int, ...]
    near: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        width = BYTES[self.dtype] if self.dtype in BYTES else _width(self.dtype)
        return math.ceil(self.size * width)


def _width(dtype: str) -> float:
    found = re.search(r"\d+", dtype)
    return 4 if found is None else max(1, int(found.group()) // 8)


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: list[Array]
    operands: list[str]
    attributes: str
    root: bool = False

    def called(self) -> dict[str, list[str]]:
        """Computations that this one runs, by what for."""
        return {kind: _NAME.findall(names) or [names.strip("{}")] for kind, names in _CALLED.findall(self.attributes)}


@dataclass
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction | None:
        return next((each for each in self.instructions.values() if each.root), None)

    def operand_arrays(self, instruction: Instruction) -> list[list[Array]]:
        """The arrays of each operand that is made in this computation."""
        return [self.instructions[name].arrays for name in instruction.operands if name in self.instructions]


@dataclass
class Module:
    """A program.

    Args:
        computations: by name, callees before callers.
        entry: the one that is executed.
        runs: how often each computation is executed.
        stream: computations whose instructions read and write memory (not the insides of fusions).
        unknown: loops whose number of rounds was given by the caller.
        halved: loops that were taken to make half the rounds of the one around them.
    """

    computations: dict[str, Computation]
    entry: str
    runs: dict[str, float]
    stream: set[str]
    unknown: list[str]
    halved: list[str]

    def executed(self) -> Iterator[tuple[Computation, Instruction, float]]:
        """Every instruction that is run, with its computation and how often."""
        for name, computation in self.computations.items():
            times = self.runs.get(name, 0.0)
            if times:
                for instruction in computation.instructions.values():
                    yield computation, instruction, times


def parse(text: str, unknown_trips: float = 1.0) -> Module:
    """Read the text of an executable.

    Args:
        text: ``compiled.as_text()``.
        unknown_trips: rounds of a loop outside of others that does not say how many it makes.
    """
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head is not None:
            current = computations[head.group(2)] = Computation(head.group(2))
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation; expected that of an optimized HLO module")
    return _counted(computations, entry, unknown_trips)


def _counted(computations: dict[str, Computation], entry: str, unknown_trips: float) -> Module:
    """Callees stand before their callers in the text, so one pass from the end finds every number of runs."""
    runs, stream, around = {entry: 1.0}, {entry}, {entry: 1.0}
    unknown: list[str] = []
    halved: list[str] = []
    for name in reversed(computations):
        times = runs.get(name, 0.0)
        if not times:
            continue
        for instruction in computations[name].instructions.values():
            called = instruction.called()
            rounds = 1.0
            if instruction.opcode == "while":
                found, outer = _trips(instruction, computations), around.get(name, 1.0)
                if found is not None:
                    rounds = float(found)
                elif outer > 1:
                    rounds = (outer + 1) / 2
                    halved.append(instruction.name)
                else:
                    rounds = unknown_trips
                    unknown.append(instruction.name)
            for kind, names in called.items():
                for each in names:
                    if kind == "to_apply" and instruction.opcode not in ("call", "async-start"):
                        continue  # the arithmetic of a reduction
                    runs[each] = runs.get(each, 0.0) + times * rounds
                    around[each] = rounds if instruction.opcode == "while" else around.get(name, 1.0)
                    if instruction.opcode != "fusion" and name in stream:
                        stream.add(each)
    return Module(computations, entry, runs, stream, unknown, halved)


def _trips(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if found is not None:
        return int(found.group(1))
    condition = computations.get(loop.called().get("condition", [""])[0])
    root = None if condition is None else condition.root
    if condition is None or root is None:
        return None
    constants = [each for each in condition.instructions.values() if each.opcode == "constant"]
    if root.opcode == "fusion":  # the comparison alone, with the constant handed in
        inner = computations[root.called()["calls"][0]].root
        direction = "" if inner is None or inner.opcode != "compare" else inner.attributes
    else:
        direction = root.attributes if root.opcode == "compare" else ""
    bounds = [each for each in constants if each.name in root.operands]
    if "direction=LT" not in direction or len(bounds) != 1 or root.operands[-1] != bounds[0].name:
        return None
    bound = re.fullmatch(r"-?\d+", bounds[0].attributes.split(")")[0].strip())
    return None if bound is None else int(bound.group())


def _instruction(line: str) -> Instruction | None:
    found = _LINE.match(line)
    if found is None:
        return None
    rest = re.sub(r"/\*.*?\*/", "", found.group(3))
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opcode, _, inner = rest.partition("(")
    close = _closing("(" + inner, 0) - 1
    inside, attributes = inner[:close], inner[close + 1 :]
    operands = [] if opcode == "constant" else _NAME.findall(inside)
    if opcode in ("constant", "parameter"):
        attributes = inside + ")" + attributes
    return Instruction(found.group(2), opcode, _arrays(shape), operands, attributes, bool(found.group(1)))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text)


def _arrays(text: str) -> list[Array]:
    found = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        shape = tuple(int(size.strip("<=")) for size in sizes.split(",") if size.strip("<="))
        found.append(Array(dtype, shape, "S(1)" in layout))
    return found
