"""What was saved comes back bit for bit, every damage is noticed, and errors say what to do."""

from __future__ import annotations

import json
import os
import random
import shutil
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import IO, MISSING_INPUT, UserError
from rlhf_jax.training import arrays, durable
from rlhf_jax.training.checkpoint import Checkpoints, abstract, load_params, save_params


class Pair(NamedTuple):
    left: Any
    right: Any


def make_tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "params": {"dense": {"kernel": jnp.array(rng.normal(size=(4, 3)), jnp.float32), "bias": jnp.full(3, 0.1)}},
        "moments": (Pair(jnp.array(rng.normal(size=5), jnp.bfloat16), None), []),
        "step": jnp.array(seed, jnp.int32),
        "mask": jnp.array([True, False]),
        "nothing": jnp.zeros((0, 3)),
        "host": np.float32(0.3),
        "special": jnp.array([jnp.nan, -0.0, jnp.inf]),
    }


def same(a, b):
    chex.assert_trees_all_equal_structs(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        Checkpoints(directory).save(step, make_tree(step), {"data": {"position": step}, "kl": 0.1 + step})
    return directory


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved_once, tmp_path / "checkpoints")


@pytest.mark.parametrize("target", [make_tree, lambda: abstract(make_tree())])
def test_everything_comes_back_bit_for_bit(saved, target):
    snapshot = Checkpoints(saved).restore_latest(target())
    assert snapshot is not None
    assert snapshot.step == 2 and snapshot.extra == {"data": {"position": 2}, "kl": 2.1}
    same(snapshot.tree, make_tree(2))
    # What is restored can be donated.
    jax.jit(lambda t: jax.tree.map(lambda x: x, t), donate_argnums=0)(snapshot.tree)


def test_nothing_saved_is_none(tmp_path):
    assert Checkpoints(tmp_path / "absent").restore_latest(make_tree()) is None


def test_arrays_go_where_the_target_says(saved):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    target = abstract(make_tree())
    target["params"]["dense"]["kernel"] = jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=sharding)
    snapshot = Checkpoints(saved).restore_latest(target)
    assert snapshot is not None and snapshot.tree["params"]["dense"]["kernel"].sharding == sharding
    same(snapshot.tree, make_tree(2))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def expect_fallback(saved, caplog, *words):
    """Step 2 is refused with these words in the log, and step 1 is used."""
    caplog.clear()
    snapshot = Checkpoints(saved).restore_latest(make_tree())
    assert snapshot is not None and snapshot.step == 1
    same(snapshot.tree, make_tree(1))
    for word in ("step 2 rejected", *words):
        assert word in caplog.text


def test_every_flipped_bit_is_noticed(saved, caplog):
    checkpoints, dice = Checkpoints(saved), random.Random(0)
    folder, flips = checkpoints.folder(2), 0
    for path in files(folder):
        whole = path.read_bytes()
        for _ in range(6 if whole else 0):
            position, bit = dice.randrange(len(whole)), dice.randrange(8)
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
            with pytest.raises(durable.Damaged, match=path.name):
                durable.verify_folder(folder)
            flips += 1
        path.write_bytes(whole)
    assert flips >= 60
    durable.verify_folder(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    expect_fallback(saved, caplog, path.name, "00000002")


def test_every_missing_and_truncated_file_is_noticed(saved):
    folder = Checkpoints(saved).folder(2)
    for path in files(folder):
        whole = path.read_bytes()
        for shorter in {0, len(whole) // 2, len(whole) - 1} - {len(whole), -1}:
            path.write_bytes(whole[:shorter])
            with pytest.raises(durable.Damaged, match=path.name):
                durable.verify_folder(folder)
        path.unlink()
        with pytest.raises(durable.Damaged, match=f"{path.name} is missing"):
            durable.verify_folder(folder)
        path.write_bytes(whole)
    durable.verify_folder(folder)


def test_a_longer_file_is_noticed(saved, caplog):
    path = files(Checkpoints(saved).folder(2) / "arrays")[0]
    path.write_bytes(path.read_bytes() + b"x")
    expect_fallback(saved, caplog, "bytes; ")


@pytest.mark.parametrize("name", ["00000009", "9", "file"])
def test_what_is_named_like_a_step_but_is_none(name, saved, caplog):
    if name == "file":
        (saved / "00000009").write_text("")
    else:
        (saved / name).mkdir()
    checkpoints = Checkpoints(saved)
    snapshot = checkpoints.restore_latest(make_tree())
    assert snapshot is not None and snapshot.step == 2
    assert "step 9 rejected" in caplog.text
    # The next checkpoint does not mind it.
    checkpoints.save(3, make_tree(3), {})
    assert checkpoints.steps() == [2, 3]
    assert [p.name for p in saved.iterdir() if p.name.startswith("rejected")] == [
        f"rejected-{name if name != 'file' else '00000009'}"
    ]


def test_a_checkpoint_under_another_name_is_noticed(saved):
    (saved / "00000002").rename(saved / "00000007")
    snapshot = Checkpoints(saved).restore_latest(make_tree())
    assert snapshot is not None and snapshot.step == 1


def test_all_damaged_is_an_error_and_not_a_fresh_start(saved):
    (saved / "00000001" / "extra.json").unlink()
    (saved / "00000002" / "extra.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"(?s)none of 2.*00000002: extra.json has 2 bytes.*00000001: extra.json is miss"
    ) as e:
        Checkpoints(saved).restore_latest(make_tree())
    assert e.value.exit_code == IO


def test_a_rejected_checkpoint_is_replaced_and_does_not_push_out_good_ones(saved):
    checkpoints = Checkpoints(saved, keep=2)
    checkpoints.save(5, make_tree(5), {})
    (checkpoints.folder(5) / "extra.json").write_text("")
    checkpoints = Checkpoints(saved, keep=2)
    snapshot = checkpoints.restore_latest(make_tree())
    assert snapshot is not None and snapshot.step == 2
    checkpoints.save(3, make_tree(3), {})
    assert checkpoints.steps() == [2, 3]
    checkpoints.save(5, make_tree(5), {})
    snapshot = Checkpoints(saved).restore_latest(make_tree())
    assert snapshot is not None and snapshot.step == 5


@pytest.mark.parametrize("at", ["arrays", "manifest", "rename"])
def test_a_save_that_dies_is_never_restored_and_leaves_no_trace(at, saved, monkeypatch):
    """Dying is simulated by skipping the clean-up, which a killed process does not do."""

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(durable.shutil, "rmtree", lambda *args, **kwargs: None)
        target = {"arrays": (arrays, "_orbax"), "manifest": (durable, "_render"), "rename": (durable.os, "rename")}[at]
        patch.setattr(*target, die)
        with pytest.raises(Killed):
            Checkpoints(saved).save(3, make_tree(3), {})
    (leftover,) = (p for p in saved.iterdir() if p.name.startswith(".tmp-"))
    leftover.rename(saved / ".tmp-00000003-1")  # as by a process of another number
    checkpoints = Checkpoints(saved)
    snapshot = checkpoints.restore_latest(make_tree())
    assert snapshot is not None and snapshot.step == 2
    checkpoints.save(3, make_tree(3), {})
    assert sorted(p.name for p in saved.iterdir()) == ["00000002", "00000003"]


@pytest.mark.parametrize("at", ["write_text", "fsync"])
def test_a_full_disk_is_noticed_at_once(at, saved, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*(("pathlib.Path.write_text", full) if at == "write_text" else ("os.fsync", full)))
        with pytest.raises(
            UserError, match=r"step 3 could not be written.*No space left.*MiB.*last good.*step 2"
        ) as caught:
            Checkpoints(saved).save(3, make_tree(3), {})
    assert caught.value.exit_code == IO
    assert sorted(p.name for p in saved.iterdir()) == ["00000001", "00000002"]
    # Once there is room, the same call works.
    Checkpoints(saved).save(3, make_tree(3), {})


def test_orbax_failing_to_write_is_noticed(saved, monkeypatch):
    def fail(folder, tree):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr("rlhf_jax.training.checkpoint.write_arrays", fail)
    with pytest.raises(UserError, match="could not be written .RESOURCE_EXHAUSTED"):
        Checkpoints(saved).save(3, make_tree(3), {})


def test_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    synced, order = set(), []
    fsync, rename = os.fsync, os.rename

    def watch_fsync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def watch_rename(source, target):
        if str(target).endswith("00000001"):
            below = {str(p) for p in source.rglob("*")} | {str(source)}
            order.append(below - synced)
            synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "rename", watch_rename)
    Checkpoints(tmp_path).save(1, make_tree(), {})
    assert order == [set()]
    assert str(tmp_path) in synced


def test_another_architecture_is_told_in_the_words_of_the_model(saved):
    other = make_tree()
    other["params"]["dense"] = {"kernel": jnp.zeros((4, 7)), "gain": jnp.zeros(3)}
    other["step"] = jnp.zeros([])
    with pytest.raises(UserError) as caught:
        Checkpoints(saved).restore_latest(other)
    text = str(caught.value)
    assert "another architecture, 4 of 9 arrays differ" in text
    for line in (
        "params/dense/kernel: float32[4, 3]; expected float32[4, 7]",
        "params/dense/gain: missing; expected float32[3]",
        "params/dense/bias: float32[3]; expected nothing of this name",
        "step: int32[]; expected float32[]",
    ):
        assert line in text


def test_steps_are_kept_and_due(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every=5)
    assert [step for step in range(12) if checkpoints.due(step)] == [5, 10]
    assert not any(Checkpoints(tmp_path).due(step) for step in range(12))
    for step in (5, 10, 15):
        checkpoints.save(step, {"w": jnp.ones(2)}, {})
    assert checkpoints.steps() == [10, 15]
    checkpoints.save(15, {"w": jnp.zeros(2)}, {"again": True})
    snapshot = checkpoints.restore_latest({"w": jnp.ones(2)})
    assert snapshot is not None and snapshot.extra == {"again": True}
    with pytest.raises(UserError, match="saving step 12 beside the checkpoint of step 15.*resume the run"):
        checkpoints.save(12, {"w": jnp.ones(2)}, {})


def test_wrong_calls_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep is 1; expected at least 2"):
        Checkpoints(tmp_path, keep=1)
    with pytest.raises(ValueError, match="every is -1"):
        Checkpoints(tmp_path, every=-1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        Checkpoints(tmp_path).save(1, {}, {"x": np.zeros(2)})
    for tree in ({"a/b": jnp.ones(1)}, {"1": jnp.ones(1), 1: jnp.ones(1)}):
        with pytest.raises((ValueError, TypeError)):
            Checkpoints(tmp_path).save(1, tree, {})


def test_parameters_alone(tmp_path):
    params = make_tree()["params"]
    save_params(tmp_path / "params", params)
    same(load_params(tmp_path / "params", abstract(params)), params)
    save_params(tmp_path / "params", jax.tree.map(lambda x: x + 1, params))
    same(load_params(tmp_path / "params", params), jax.tree.map(lambda x: x + 1, params))
    assert [p.name for p in tmp_path.iterdir()] == ["params"]
    with pytest.raises(UserError, match="another architecture"):
        load_params(tmp_path / "params", {"w": jnp.ones(1)})
    with pytest.raises(UserError, match="no parameters here") as caught:
        load_params(tmp_path / "absent", params)
    assert caught.value.exit_code == MISSING_INPUT
    path = files(tmp_path / "params" / "arrays")[0]
    path.unlink()
    with pytest.raises(UserError, match=f"damaged parameters: arrays/.*{path.name} is missing") as caught:
        load_params(tmp_path / "params", params)
    assert caught.value.exit_code == IO


def test_the_manifest_lists_every_file(saved):
    folder = Checkpoints(saved).folder(2)
    listed = json.loads((folder / durable.MANIFEST).read_text())["files"]
    assert set(listed) == {p.relative_to(folder).as_posix() for p in files(folder)} - {durable.MANIFEST}
