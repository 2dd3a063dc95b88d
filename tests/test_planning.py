"""Machines and their figures, programs' texts and what is counted in them, work by formula, limits, and the verb."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from meshes import run_on

from rlhf_jax.errors import DOES_NOT_FIT, UserError
from rlhf_jax.models import Attention, Block, SwiGLU, Transformer, abstract_params
from rlhf_jax.planning import counts, hlo, machines, work
from rlhf_jax.planning.compiling import lowered
from rlhf_jax.planning.numbers import Numbers, Traffic, continued, roofline, total_traffic
from rlhf_jax.types import Context

TINY = Path(__file__).parent / "tiny_experiment.py"


@pytest.mark.parametrize(
    ("text", "devices", "platform"),
    [("h200:8", 8, "gpu"), ("h100:64", 64, "gpu"), ("v5e:4x4", 16, "tpu"), ("v5p:4x4x8", 128, "tpu"),
     ("cpu:3", 3, "cpu")],
)  # fmt: skip
def test_machines_are_named_by_kind_and_shape(text, devices, platform):
    machine = machines.parse(text)
    assert (machine.devices, machine.device.platform, str(machine)) == (devices, platform, text)
    assert machine.usable == pytest.approx(0.92 * machine.device.memory, rel=1e-9)


@pytest.mark.parametrize(
    ("text", "word"),
    [("b200:8", "h200:8"), ("h200", "a number of devices"), ("h200:0", "h200:8"), ("h200:8x2", "a number of devices"),
     ("v5e:16", "2 sizes"), ("v5p:4x4", "v5p:4x4x4"), ("v5e:axb", "v5e:4x4"), ("h200:12", "a multiple")],
)  # fmt: skip
def test_a_machine_that_does_not_exist_is_refused_with_what_does(text, word):
    with pytest.raises(UserError, match=word):
        machines.parse(text)


def test_a_group_that_spans_nodes_shares_their_ports():
    sixteen = machines.parse("h200:16")
    assert sixteen.speed(range(8)) == 450e9  # one node: NVLink
    assert sixteen.speed(range(16)) == 400e9  # eight ports of 50 GB/s on each side
    assert sixteen.speed((0, 8)) == 50e9  # one port
    assert machines.parse("v5p:4x4x4").speed(range(64)) == 200e9


PROGRAM = """HloModule hand, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%updated (p0: f32[4,8,16], p1: f32[8,16], p2: s32[]) -> f32[4,8,16] {
  %p0 = f32[4,8,16]{2,1,0} parameter(0)
  %p1 = f32[8,16]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %one = f32[1,8,16]{2,1,0} bitcast(%p1)
  ROOT %put = f32[4,8,16]{2,1,0} dynamic-update-slice(%p0, %one, %p2)
}

%body (state: (s32[], f32[8,16], f32[4,8,16])) -> (s32[], f32[8,16], f32[4,8,16]) {
  %state = (s32[], f32[8,16]{1,0}, f32[4,8,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %kept = f32[4,8,16]{2,1,0} get-tuple-element(%state), index=2
  %w = f32[16,16]{1,0} constant({...})
  %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %r = f32[8,16]{1,0} all-reduce(%y), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %new = f32[4,8,16]{2,1,0} fusion(%kept, %r, %i), kind=kLoop, calls=%updated
  ROOT %out = (s32[], f32[8,16]{1,0}, f32[4,8,16]{2,1,0}) tuple(%i, %r, %new)
}

%condition (state.1: (s32[], f32[8,16], f32[4,8,16])) -> pred[] {
  %state.1 = (s32[], /*index=1*/f32[8,16]{1,0}, f32[4,8,16]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%i.1, %four), direction=LT
}

ENTRY %main (x.1: f32[8,16]) -> f32[8,16] {
  %x.1 = f32[8,16]{1,0:T(8,128)S(1)} parameter(0)
  %zero = s32[] constant(0)
  %g = ((f32[4,16]{1,0}), (f32[8,16]{1,0})) all-gather-start(%half), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  %g.1 = f32[8,16]{1,0} all-gather-done(%g)
  %kept.1 = f32[4,8,16]{2,1,0} broadcast(%zero), dimensions={}
  %start = (s32[], f32[8,16]{1,0}, f32[4,8,16]{2,1,0}) tuple(%zero, %g.1, %kept.1)
  %loop = (s32[], f32[8,16]{1,0}, f32[4,8,16]{2,1,0}) while(%start), condition=%condition, body=%body LOOP
  %s = f32[2,16]{1,0} reduce-scatter(%g.1), channel_id=3, replica_groups=mesh['a'=2,'b'=2] {'a'}, to_apply=%add
  %p = bf16[2,16]{1,0} collective-permute(%s), channel_id=4, source_target_pairs={{0,2},{2,0}}
  %last = f32[4,8,16]{2,1,0} dynamic-update-slice(%kept.1, %p, %zero)
  ROOT %end = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize("loop", ["", ', backend_config={"known_trip_count":{"n":"4"}}'], ids=["condition", "told"])
def test_counts_of_a_program_by_hand(loop):
    found = counts.count(hlo.parse(PROGRAM.replace(" LOOP", loop)), 4)
    assert found.flops == 4 * 2 * 8 * 16 * 16
    by_kind = {each.kind: each for each in found.collectives}
    assert (by_kind["all-reduce"].times, by_kind["all-reduce"].payload) == (4, 8 * 16 * 4)
    assert by_kind["all-reduce"].sent == 4 * 2 * 512 / 2
    assert (by_kind["all-gather"].group, by_kind["all-gather"].payload) == ((0, 2), 512)
    assert (by_kind["reduce-scatter"].group, by_kind["reduce-scatter"].payload) == ((0, 2), 2 * 2 * 16 * 4)
    assert (by_kind["collective-permute"].group, by_kind["collective-permute"].sent) == ((0, 2), 2 * 16 * 2)
    # In each round: dot 512 + 1024 + 512, all-reduce 1024, the fusion reads and writes one row of the kept ones.
    rounds = 4 * (2048 + 1024 + (512 + 4) + 512)
    # Around: all-gather's pair of 256 + 512, broadcast 4 + 2048, reduce-scatter 512 + 128, permute 128 + 64, a compare
    # of 9 in each round, and the 64 of the last update, read and written.
    assert found.bytes == rounds + 768 + 2052 + 640 + 192 + 4 * (1 + 4 + 4) + 2 * 64


def test_a_loop_that_does_not_say_takes_the_callers_number():
    text = PROGRAM.replace(" LOOP", "").replace("direction=LT", "direction=NE")
    module = hlo.parse(text, unknown_trips=7)
    assert (module.unknown, module.halved) == (["loop"], [])
    assert counts.count(module, 4).flops == 7 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    ("text", "group"),
    [("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)), ("replica_groups={{1,3},{0,2}}", (1, 3)),
     ("replica_groups=[4,2]<=[8]", (0, 1)), ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
     ("replica_groups=mesh['x'=4,'y'=2] {'x'}", (0, 2, 4, 6)), ("replica_groups=mesh['x'=4,'y'=2] {'y'}", (0, 1)),
     ("replica_groups=mesh['x'=8] {'x':(2)2}", (0, 2))],
)  # fmt: skip
def test_groups_in_every_form(text, group):
    assert counts.first_group(text, 8) == group


def test_a_convolution_counts_where_its_window_lies_on_entries():
    # A TPU's product of 3 rows with a kernel for each of 4 heads: the window of 4 lies once on the one entry.
    text = """ENTRY %main (a: f32[1,3,5]) -> f32[4,3,6] {
  %a = f32[1,3,5]{2,1,0} parameter(0)
  %k = f32[4,5,6]{2,1,0} constant({...})
  ROOT %c = f32[4,3,6]{2,1,0} convolution(%a, %k), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=0bf_0io->0bf
}
"""
    assert counts.count(hlo.parse(text), 1).flops == 2 * 3 * 6 * 5 * 4
    # An ordinary one of width 3 over 5 entries, padded by one on either side: 2 + 3 + 3 + 3 + 2 products.
    text = """ENTRY %main (a: f32[5,3,5]) -> f32[5,3,6] {
  %a = f32[5,3,5]{2,1,0} parameter(0)
  %k = f32[3,5,6]{2,1,0} constant({...})
  ROOT %c = f32[5,3,6]{2,1,0} convolution(%a, %k), window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf
}
"""
    assert counts.count(hlo.parse(text), 1).flops == 2 * 3 * 6 * 5 * 13


def collectives_of_a_program() -> list[list]:
    """Kind, group, payload and runs in a program whose communication is known."""
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def each(x):
        def body(_, x):
            return jax.lax.psum(jnp.sin(jax.lax.psum(x, "a")), "a")

        x = jax.lax.fori_loop(0, 3, body, x)
        whole = jax.lax.all_gather(x, "b", tiled=True)
        return jax.lax.psum_scatter(whole, "b", tiled=True), jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])

    spec = P(("a", "b"))
    function = jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False)
    text = jax.jit(function).lower(jnp.ones((64, 8))).compile().as_text()
    found = counts.count(hlo.parse(text), 8)
    return sorted([one.kind, list(one.group), one.payload, one.times] for one in found.collectives)


def test_collectives_of_a_compiled_program():
    shard = 8 * 8 * 4
    assert run_on(8, "test_planning", "collectives_of_a_program").value == [
        ["all-gather", [0, 1], 2 * shard, 1],
        ["all-reduce", [0, 2, 4, 6], shard, 3],
        ["all-reduce", [0, 2, 4, 6], shard, 3],
        ["collective-permute", [0, 2], shard, 1],
        ["reduce-scatter", [0, 1], 2 * shard, 1],
    ]


def model(**changes) -> Transformer:
    block = Block(Attention(heads=4, kv_heads=2, implementation="reference"), SwiGLU(192))
    return Transformer(
        **{"vocab_size": 256, "d_model": 64, "pattern": (block,), "repeats": 3, "max_length": 64} | changes
    )


def forward_text(model: Transformer, rows: int, length: int):
    """The compiled forward pass with all logits."""
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def forward(params, tokens, lengths):
        return model.apply({"params": params}, tokens, Context.of_lengths(lengths, length))[0]

    return lowered(forward, (abstract_params(model), tokens, jax.ShapeDtypeStruct((rows,), jnp.int32))).compile()


def test_work_by_hand():
    # A layer: queries, keys and values 64 x (4 + 2 + 2) x 16, output 64 x 64, feed-forward 64 x 2 x 192 + 192 x 64.
    assert work.body_params(model()) == 3 * (64 * 128 + 64 * 64 + 3 * 64 * 192)
    read = work.reading(model(), rows=2, length=8, unembedded=16)
    assert read.products == 2 * 16 * 3 * 49_152 + 2 * 16 * 256 * 64
    assert read.attention == 2 * 3 * 4 * 4 * 16 * (8 * 9 / 2)  # rows, layers, 4 heads of 16, keys seen
    assert read.trained().flops == 3 * read.flops
    narrow = model(pattern=(Block(Attention(heads=4, kv_heads=2, window=2), SwiGLU(192)),))
    assert work.reading(narrow, 1, 8).attention == 3 * 4 * 4 * 16 * (1 + 7 * 2)
    # Two prompts of 3 tokens, four responses of 5 each; the last token of each is not read.
    drawn = work.sampling(model(), prompts=2, width=3, copies=4, new=5)
    assert drawn.products == 2 * (2 * 3 + 8 * 4) * 3 * 49_152 + 2 * (2 + 8 * 4) * 256 * 64
    assert drawn.attention == 3 * 4 * 4 * 16 * (2 * 6 + 8 * (4 + 5 + 6 + 7))


def test_compiled_flops_are_those_of_the_formula_and_of_xla_without_loops():
    rows, length = 4, 32
    formula = work.reading(model(), rows, length, unembedded=rows * length)
    dense = formula.products + rows * 3 * 4 * 4 * 16 * length**2  # the reference computes hidden keys as well
    looped, flat = (forward_text(model(unroll=unroll), rows, length) for unroll in (False, True))
    counted = [counts.count(hlo.parse(each.as_text()), 1).flops for each in (looped, flat)]
    assert counted == [dense, dense]
    xla = [each.cost_analysis()["flops"] for each in (looped, flat)]
    assert dense <= xla[1] <= 1.15 * dense  # XLA also counts what is not a product
    assert xla[0] < 0.6 * dense  # and the body of a loop once


def test_limits_by_hand():
    machine = machines.parse("h200:8")
    numbers = Numbers("compiled", 0, 0, 0, flops=989.4e12, flops_source="compiled", moved=2.4e12,
                      traffic={"all-reduce": Traffic(seconds=0.25)})  # fmt: skip
    limits = roofline(numbers, machine)
    assert (limits.compute, limits.memory, limits.network) == pytest.approx((1.0, 0.5, 0.25))
    assert (limits.seconds, limits.bound) == (limits.compute, "compute")
    one = counts.Collective("all-reduce", 450 * 10**9, tuple(range(8)), times=2)
    found = total_traffic([one, one], machine)["all-reduce"]
    assert (found.times, found.payload) == (4, 4 * 450e9)
    assert found.seconds == pytest.approx(4 * 2 * 7 / 8)


def test_continued_numbers_lie_on_the_line():
    def at(layers: int) -> Numbers:
        traffic = {"all-gather": Traffic(layers, 2.0 * layers, 3.0 * layers, 1.0)}
        return Numbers("compiled", 100 + 10 * layers, 5, 7, 1.0 + layers, "compiled", 2.0 * layers, traffic)

    found = continued(at(2), at(4), (2, 4), 80)
    assert (found.temporary, found.output, found.code, found.flops, found.moved) == (900, 5, 7, 81, 160)
    assert found.traffic["all-gather"] == Traffic(80, 160, 240, 1.0)
    assert found.source == "continued"


def test_programs_are_traced_for_the_device_of_the_mesh():
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    from rlhf_jax.ops.attention.terms import this_device

    with use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", None, "gpu"))):
        assert this_device() == ("gpu", "NVIDIA H200")
    assert this_device()[0] == "cpu"


def asked(*words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of ``rlhf-jax plan``."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "rlhf_jax", "plan", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TINY.parents[1])
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [("cpu:8", "--estimate"), ("h200:8",)], ids=["asked", "no-compiler"])
def test_estimates_are_marked_and_named(words):
    code, out, _ = asked(str(TINY), "--json", "--set", "layout.fsdp=4", "--on", *words)
    plan = json.loads(out)
    assert code == 0 and plan["fits"] and plan["layout"]["data"] == 2
    if words[0] == "h200:8":
        if not plan["notes"]:
            pytest.skip("the compiler for H200s is installed")
        assert "rlhf_jax[cuda]" in plan["notes"][0] and "estimated" in plan["notes"][0]
    rows = [row for stage in plan["stages"] for row in stage["programs"]]
    assert {row["source"] for row in rows} == {row["flops_source"] for row in rows} == {"estimated"}
    assert [stage["name"] for stage in plan["stages"]] == ["pretrain", "sft", "reward", "ppo"]
    assert all(row["memory"]["total"] > row["memory"]["resident"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(("--on", "h300:8"), "h200:8"), (("--on", "cpu:1", "--stage", "no"), "pretrain, sft, reward, ppo"),
     (("--on", "cpu:3", "--set", "layout.fsdp=2"), "a number of devices that 2 divides"),
     (("--on", "cpu:1", "--responses", "1"), "at least 2")],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(words, expected):
    code, out, said = asked(str(TINY), *words)
    assert code == 2 and expected in " ".join(said.split()) and "Traceback" not in said and out == ""


def test_what_does_not_fit_has_an_exit_code_of_its_own():
    words = ("--set", "model.d_model=65536", "--estimate", "--stage", "sft")
    code, out, said = asked(str(TINY), "--on", "v5e:2x2", *words)
    assert code == DOES_NOT_FIT and "takes" in said
    assert "≈" in out and max(len(line) for line in out.splitlines()) <= 100
