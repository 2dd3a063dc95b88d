"""What one device computes, moves and sends in one execution of a compiled program, read from its HLO."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

import numpy as np

from rlhf_jax.planning.hlo import Array, Computation, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all",
               "collective-broadcast")  # fmt: skip
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id iota "
    "opt-barrier add-dependency async-start async-update async-done copy-done all-gather-done all-reduce-done "
    "collective-permute-done reduce-scatter-done all-to-all-done send-done recv-done".split()
)
"""Opcodes that touch no memory themselves."""
READS_PART = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Collective:
    """One communication of a program.

    Args:
        kind: of ``COLLECTIVES``.
        payload: bytes of the whole that is gathered, reduced or exchanged, on one device.
        group: ids of the devices of its first group.
        times: how often it is run.
    """

    kind: str
    payload: int
    group: tuple[int, ...]
    times: float

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all its runs, by the algorithm that sends least (a ring)."""
        ways = len(self.group)
        share = 1.0 if self.kind in ("collective-permute", "collective-broadcast") else (ways - 1) / max(ways, 1)
        return self.times * self.payload * share * (2 if self.kind == "all-reduce" else 1)


@dataclass
class Counts:
    """Of one device and one execution.

    Args:
        flops: of matrix products; a multiplication and an addition are two.
        bytes: read and written in device memory, if every kernel reads its inputs and writes its outputs once.
        collectives: all communication.
        opaque: kernels whose FLOPs are not known from the text, by name, with their number of runs.
        unknown_loops: loops whose rounds the caller gave.
        halved_loops: loops that were taken to make half the rounds of the one around them.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    opaque: dict[str, float] = field(default_factory=dict)
    unknown_loops: list[str] = field(default_factory=list)
    halved_loops: list[str] = field(default_factory=list)


def count(module: Module, devices: int) -> Counts:
    """Everything, over all computations and their loops."""
    found = Counts(unknown_loops=module.unknown, halved_loops=module.halved)
    fused: dict[tuple, Collective] = {}
    for computation, instruction, times in module.executed():
        work = flops(computation, instruction)
        if work is None:
            target = _target(instruction)
            found.opaque[target] = found.opaque.get(target, 0.0) + times
        else:
            found.flops += times * work
        if computation.name in module.stream:
            found.bytes += times * moved(module, computation, instruction)
        sent = collective(computation, instruction, times, devices)
        if sent is not None and computation.name in module.stream:
            found.collectives.append(sent)
        elif sent is not None:
            # Compilers for TPUs write one communication down several times: in its start, in what it overlaps with.
            marks = re.findall(r'channel_id=\d+|op_name="[^"]*"', instruction.attributes)
            key = (*marks, sent.kind, sent.payload, sent.group)
            if key not in fused or sent.times > fused[key].times:
                fused[key] = sent
    found.collectives += fused.values()
    return found


def flops(computation: Computation, instruction: Instruction) -> float | None:
    """Of one run of an instruction itself (not of what it calls); None for a kernel that does not tell."""
    opcode, target = instruction.opcode, _target(instruction)
    if opcode == "dot":
        return _product(computation, instruction, _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", instruction))
    if opcode == "convolution":
        return _convolution(computation, instruction)
    if opcode != "custom-call":
        return 0.0
    if target.startswith(("__cublas", "__onednn$matmul")):
        return _product(computation, instruction, _numbers(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', instruction))
    if target.startswith("__cudnn$fmha"):
        return _cudnn_attention(computation, instruction)
    if target in ("tpu_custom_call", "mosaic_gpu", "mosaic_gpu_v2") or "triton" in target:
        return None
    return 0.0


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return "" if found is None else found.group(1)


def _numbers(pattern: str, instruction: Instruction) -> list[int]:
    found = re.search(pattern, instruction.attributes)
    return [] if found is None else [int(each) for each in re.findall(r"\d+", found.group(1))]


def _product(computation: Computation, instruction: Instruction, contracted: list[int]) -> float:
    left = computation.operand_arrays(instruction)[0][0]
    return 2.0 * instruction.arrays[0].size * int(np.prod([left.shape[axis] for axis in contracted]))


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """Only positions where the window lies on entries count: padding may stand for a batch dimension."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    inputs, kernels, outputs = labels.groups()
    left, right = (arrays[0].shape for arrays in computation.operand_arrays(instruction)[:2])
    out = instruction.arrays[0].shape
    sizes = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = {} if sizes is None else dict(re.findall(r"(\w+)=([\dx_\-]+)", sizes.group(1)))
    total = 2.0 * out[outputs.index("b")] * out[outputs.index("f")] * right[kernels.index("i")]
    for axis in (label for label in outputs if label.isdigit()):
        number = int(axis)

        def of(name: str, default: str, number: int = number) -> str:
            return window[name].split("x")[number] if name in window else default

        stride, dilation, spread = (int(of(name, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        low = int(of("pad", "0_0").split("_")[0])
        size, kernel, length = left[inputs.index(axis)], right[kernels.index(axis)], out[outputs.index(axis)]
        at = np.arange(length)[:, None] * stride + np.arange(kernel)[None, :] * dilation - low
        total *= int(np.sum((at >= 0) & (at < (size - 1) * spread + 1) & (at % spread == 0)))
    return total


def _cudnn_attention(computation: Computation, instruction: Instruction) -> float:
    """Two products forward, five backward (one of them again the logits), of which a causal mask leaves half."""
    query = computation.operand_arrays(instruction)[0][0]
    slots = _numbers(r'"intermediate_tensor_shape":\{[^}]*"dimensions":\[([\d,"]*)\]', instruction)
    backward = "Backward" in _target(instruction)
    keys = slots[-1] if slots else query.shape[1]
    causal = "CAUSAL" in instruction.attributes
    return 2.0 * query.size * keys * (5 if backward else 2) * (0.5 if causal else 1.0)


def moved(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes of device memory that one run of an instruction reads and writes."""
    opcode = instruction.opcode
    if opcode in FREE:
        return 0.0
    result, operands = _far(instruction.arrays), computation.operand_arrays(instruction)
    if opcode in READS_PART:
        return 2.0 * result
    if opcode == "dynamic-update-slice":
        return 2.0 * _far(operands[1])
    if opcode == "fusion":
        return _fused(module, computation, instruction)
    if _target(instruction).startswith("__cublas"):
        result = _far(instruction.arrays[:1])  # what follows is scratch
    return result + sum(map(_far, operands))


def _far(arrays: list[Array]) -> int:
    return sum(each.bytes for each in arrays if not each.near)


def _fused(module: Module, computation: Computation, fusion: Instruction) -> float:
    """A fusion reads of an operand what its insides read, and writes of a buffer what it updates there."""
    body = module.computations[fusion.called()["calls"][0]]
    inside = body.instructions
    total = 0.0
    parameters = [each for each in inside.values() if each.opcode == "parameter"]
    numbered = {int(each.attributes.split(")")[0]): each for each in parameters}
    for number, arrays in enumerate(computation.operand_arrays(fusion)):
        if number not in numbered:
            continue
        used = _uses(body, numbered[number].name)
        first = bool(used) and all(user.operands[0] == name for name, user in used)
        if first and all(user.opcode in READS_PART for _, user in used):
            total += sum(_far(user.arrays) for _, user in used) if _far(arrays) else 0
        elif not (first and all(user.opcode == "dynamic-update-slice" for _, user in used)):
            total += _far(arrays)
    root = body.root
    if root is None:
        return total + _far(fusion.arrays)
    parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for part, array in itertools.zip_longest(parts, fusion.arrays):
        source = part
        while source is not None and source.opcode in ("bitcast", "copy") and source.operands[0] in inside:
            source = inside[source.operands[0]]
        if source is not None and source.opcode == "dynamic-update-slice":
            total += 0 if array is None or array.near else _far(inside[source.operands[1]].arrays)
        elif array is not None and not array.near:
            total += array.bytes
    return total


def _uses(body: Computation, name: str) -> list[tuple[str, Instruction]]:
    """Who reads a value, through changes of its shape alone, and by which name."""
    found = []
    for each in body.instructions.values():
        if name in each.operands:
            found += _uses(body, each.name) if each.opcode in ("bitcast", "reshape") else [(name, each)]
    return found


def collective(computation: Computation, instruction: Instruction, times: float, devices: int) -> Collective | None:
    """The communication that an instruction is, or None."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    operands, arrays = len(instruction.operands), instruction.arrays
    if instruction.opcode.endswith("-start") and len(arrays) >= 2 * operands:
        arrays = arrays[operands : 2 * operands]  # what goes in stands before what comes out
    group = first_group(instruction.attributes, devices)
    payload = sum(each.bytes for each in arrays)
    if computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a TPU's: the fusion keeps one part of the sum
    elif kind == "reduce-scatter":
        payload *= len(group)
    return Collective(kind, payload, group, times)


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """Devices of the first group in any of the forms that HLO has for them."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs is not None:
        return tuple(map(int, pairs.groups()))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed is not None:
        return tuple(map(int, listed.group(1).split(",")))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota is not None:
        groups, size, shape, order = iota.groups()
        ids = np.arange(int(groups) * int(size)).reshape([int(each) for each in shape.split(",")])
        if order is not None:
            ids = ids.transpose([int(each) for each in order.split(",")])
        return tuple(ids.reshape(int(groups), int(size))[0].tolist())
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh is not None:
        named = {name: part for name, *part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh.group(2))}
        sizes: list[int] = []
        kept: list[bool] = []
        for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1)):
            before, part = named.get(name, ("", ""))
            # A part of an axis stands between what is cut before it and what is left.
            cuts = [int(before), int(part), int(size) // int(before) // int(part)] if before else [int(size)]
            sizes += cuts
            kept += [False, True, False] if before else [name in named]
        ids = np.arange(int(np.prod(sizes))).reshape(sizes)
        return tuple(np.ravel(ids[tuple(slice(None) if keep else 0 for keep in kept)]).tolist())
    return tuple(range(devices))
