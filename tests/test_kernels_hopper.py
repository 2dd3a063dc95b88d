"""The Hopper attention kernels: their numbers in Mosaic GPU's interpreter, and what they refuse."""

from __future__ import annotations

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_scenes import Problem, check, documents

from rlhf_jax.ops.attention import Case, Rule
from rlhf_jax.ops.kernels import hopper_attention
from rlhf_jax.types import Context

# The interpreter runs the warpgroups of a kernel on threads of XLA's own pool, as many as NPROC says, or as the machine
# has cores; where they are too few, those that compute wait forever for those that wait for them.
THREADS = int(os.environ.get("NPROC", os.cpu_count() or 1))


def interpreted(test):
    """Where Mosaic GPU can be interpreted."""
    test = pytest.mark.skipif(THREADS < 8, reason=f"NPROC={THREADS} leaves the interpreter waiting; set it to 16")(test)
    old = jax.__version_info__ < (0, 11, 1)
    return pytest.mark.skipif(old, reason="Mosaic GPU has an interpreter from JAX 0.11.1 (Python 3.12)")(test)


# Documents that begin and end inside tiles of 64 and 128, and a row that is all padding.
PACKED = documents((70, 150, 20), (), width=250)
CACHE = documents((60, 50, 30), width=150, shuffle=1)
LATE = documents((50, 40, 25), width=120)
PROBLEMS = {
    "packed": Problem(PACKED, PACKED, heads=2, width=64, value_width=64),
    "everything": Problem(
        documents((200,), width=200), documents((200,), width=200), heads=2, width=64, value_width=64,
        window=40, rule=Rule(sinks=4), softcap=2.0, slopes=True, sinks=True,
    ),
    "prefix": Problem(LATE, LATE, kv_heads=2, prefix=30, sinks=True),
    "cache": Problem(
        Context(LATE.positions + 1, LATE.segments), CACHE, window=30, width=24, value_width=16, softcap=3.0
    ),
    "more steps than slots": Problem(
        documents((500,), width=500), documents((500,), width=500), heads=2, width=128, value_width=128, window=350
    ),
    "wide": Problem(
        documents((140,), width=140), documents((140,), width=140), heads=2, width=256, value_width=256, window=100
    ),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 1.5e-2), (jnp.float16, 2e-3)])
@pytest.mark.parametrize("name", ["packed", "everything"])
def test_values_and_gradients_equal_the_reference(name, dtype, tolerance, capfd):
    check(hopper_attention.attend, PROBLEMS[name], dtype, tolerance, interpret=True)
    assert "RACE" not in capfd.readouterr().out


@interpreted
@pytest.mark.parametrize("name", ["prefix", "cache", "more steps than slots", "wide"])
def test_other_masks_and_widths_equal_the_reference(name, capfd):
    check(hopper_attention.attend, PROBLEMS[name], jnp.float16, 2e-3, interpret=True)
    assert "RACE" not in capfd.readouterr().out


@interpreted
def test_what_hides_in_invisible_tiles_is_never_read():
    problem = Problem(documents((128, 60), width=188), documents((128, 60), width=188), width=64, value_width=64)
    arrays = problem.arrays(jnp.float16)
    # The first document would be NaN if a weight of 0 met what lies behind it.
    k, v = (arrays[name].at[:, 128:].set(jnp.nan) for name in ("k", "v"))
    out, _ = hopper_attention.attend(arrays["q"], k, v, problem.mask, problem.terms(None), interpret=True)
    assert np.isfinite(np.asarray(out)[:, :128]).all() and np.isnan(np.asarray(out)[:, 128:]).all()


SERVED = Case("gpu", "NVIDIA H200", 2, 1001, 1001, 8, 2, 128, 128, "bfloat16", window=77, sink_logits=True)


@pytest.fixture
def cuda(monkeypatch):
    """Let refusals see these versions of JAX and CUDA."""

    def pretend(version: int, jax_version=(0, 11, 2)):
        class Client:
            platform_version = f"PJRT C API\ncuda {version}"

        class Device:
            client = Client()

        monkeypatch.setattr(jax, "devices", lambda: [Device()])
        monkeypatch.setattr(jax, "__version_info__", jax_version)

    return pretend


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"device": "NVIDIA H100 80GB HBM3"},
        {"device": "NVIDIA GH200 480GB"},
        {"dtype": "float16", "width": 48, "value_width": 200},
        {"rule": Rule(sinks=4), "softcap": True, "slopes": True, "lse": True},
        {"rule": Rule(stride=1)},
    ],
)
def test_it_serves(change, cuda):
    cuda(13000)
    assert hopper_attention.refusal(replace(SERVED, **change)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu", "device": "cpu"}, "for NVIDIA Hopper (H100, H200), and this device is 'cpu'"),
        ({"device": "NVIDIA A100-SXM4-80GB"}, "this device is 'NVIDIA A100-SXM4-80GB'"),
        ({"device": "NVIDIA RTX H1000"}, "this device is 'NVIDIA RTX H1000'"),
        ({"dtype": "float32"}, "bfloat16 or float16, not float32"),
        ({"width": 320}, "heads of width 320 are wider than its registers hold (256)"),
        ({"rule": Rule(stride=4)}, "does not thin out ranges"),
        ({"rule": Rule(block=8, columns=2)}, "summary columns"),
        ({"dropout": True}, "dropout"),
    ],
)
def test_it_refuses_with_the_reason(change, reason, cuda):
    cuda(13000)
    assert reason in str(hopper_attention.refusal(replace(SERVED, **change)))


def test_it_refuses_old_versions(cuda):
    cuda(13000, (0, 10, 2))
    assert "need JAX 0.11.1 or newer" in str(hopper_attention.refusal(SERVED))
    cuda(12080)
    assert "CUDA 12.8 is known to miscompile it" in str(hopper_attention.refusal(SERVED))
    cuda(12091)
    assert hopper_attention.refusal(SERVED) is None
