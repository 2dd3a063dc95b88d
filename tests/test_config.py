"""Configurations: typed overrides, exact round trips, and errors that a user can act on."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import config
from rlhf_jax.config import loading
from rlhf_jax.errors import MISSING_INPUT, REFUSED, UserError


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass(frozen=True)
class Train:
    lr: float = 1e-3
    steps: int = 100
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: float | None = 1.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    tags: tuple[str, ...] = ()
    color: Color = Color.RED
    folder: Path = Path("data")
    decay_rate: float = 0.1

    def __post_init__(self):
        if self.lr < 0:
            raise ValueError(f"lr is {self.lr}; expected a number >= 0")


class Mixer(nn.Module):
    heads: int = 4
    window: int | None = None
    activation: Callable = nn.gelu
    dtype: Any = jnp.float32

    def __call__(self, x):
        return x


class Model(nn.Module):
    mixer: Mixer = Mixer()
    pattern: tuple[Mixer, ...] = (Mixer(), Mixer(8))
    d_model: int = 64

    def __call__(self, x):
        return x


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    train: Train = Train()
    mixture: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"a/b.json": 0.5, "c": 0.5})


@dataclasses.dataclass(frozen=True)
class Experiment:
    model: Model = Model()
    stages: tuple[Stage, ...] = (Stage("sft"), Stage("ppo"))
    train: Train = Train()
    seed: int = 0


BASE = Experiment()


def get(value: Any, path: str) -> Any:
    return config.leaves(value)[path]


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("train.lr", "1e-4", 1e-4),
        ("train.lr", "1", 1.0),
        ("train.steps", "1_000", 1000),
        ("train.steps", "2e3", 2000),
        ("train.schedule", "cosine", "cosine"),
        ("train.clip_norm", "None", None),
        ("train.clip_norm", "0", 0.0),
        ("train.nesterov", "true", True),
        ("train.betas", "0.8,0.95", (0.8, 0.95)),
        ("train.tags", "(a, b,)", ("a", "b")),
        ("train.tags", "()", ()),
        ("train.color", "BLUE", Color.BLUE),
        ("train.color", "blue", Color.BLUE),
        ("train.folder", "/x/y", Path("/x/y")),
        ("model.d_model", "128", 128),
        ("model.mixer.window", "16", 16),
        ("model.mixer.dtype", "bfloat16", jnp.bfloat16),
        ("model.pattern.1.heads", "2", 2),
        ("stages.ppo.train.lr", "0.5", 0.5),
        ("stages.sft.mixture.a/b.json", "0.25", 0.25),
    ],
)
def test_override_reads_text_by_the_type_of_the_field(path, text, expected):
    changed = config.override(BASE, {path: text})
    assert get(changed, path) == expected
    assert type(get(changed, path)) is type(expected)
    others = {name: leaf for name, leaf in config.leaves(changed).items() if name != path}
    assert others == {name: leaf for name, leaf in config.leaves(BASE).items() if name != path}


def test_elements_are_reached_by_index_or_name():
    by_index = config.override(BASE, {"stages.1.train.lr": "0.5"})
    assert by_index == config.override(BASE, {"stages.ppo.train.lr": "0.5"})
    assert by_index.stages[0] == BASE.stages[0] and by_index.stages[1].train.lr == 0.5
    both = config.override(BASE, {"stages.1.train.lr": "0.5", "stages.ppo.train.steps": "7"})
    assert (both.stages[1].train.lr, both.stages[1].train.steps) == (0.5, 7)


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("train.steps", "1.5", ["train.steps", "'1.5'", "an integer"]),
        ("train.steps", "1.5e0", ["an integer"]),
        ("train.steps", "2.0", ["an integer"]),
        ("train.lr", "abc", ["train.lr", "'abc'", "a number"]),
        ("train.lr", "nan", ["a finite number"]),
        ("train.lr", "1e999", ["a finite number"]),
        ("train.lr", "-1", ["train.lr", ">= 0"]),
        ("train.clip_norm", "x", ["None or a number"]),
        ("train.schedule", "linear", ["'linear'", "constant, cosine"]),
        ("train.nesterov", "yes", ["true or false"]),
        ("train.betas", "0.9", ["2 values"]),
        ("train.color", "green", ["RED, BLUE"]),
        ("model.mixer.dtype", "float33", ["dtype"]),
        ("model.mixer.activation", "relu", ["experiment file"]),
        ("model.mixer", "gau", ["model.mixer.heads"]),
        ("stages.7.train.lr", "1", ["unknown field"]),
        ("seed.deep", "1", ["seed", "has no fields"]),
    ],
)
def test_a_wrong_override_names_the_path_and_what_fits(path, text, words):
    with pytest.raises(UserError) as caught:
        config.override(BASE, {path: text})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.learning_rate", "train.lr"),
        ("train.step", "train.steps"),
        ("stages.ppo.train.clip_nrm", "stages.ppo.train.clip_norm"),
        ("stages.dpo.train.lr", "stages.ppo.train.lr"),
        ("model.mixer.head", "model.mixer.heads"),
        ("d_model", "model.d_model"),
        ("model.mixer.n_heads", "model.mixer.heads"),
    ],
)
def test_an_unknown_field_names_the_nearest_path(wrong, right):
    with pytest.raises(UserError, match="unknown field") as caught:
        config.override(BASE, {wrong: "1"})
    assert f"did you mean {right}" in str(caught.value)


def test_nonsense_is_like_nothing():
    with pytest.raises(UserError, match="rlhf-jax show FILE lists every path"):
        config.override(BASE, {"xyzzy": "1"})


def test_fields_that_only_fit_together_are_set_together():
    @dataclasses.dataclass(frozen=True)
    class Shape:
        width: int = 8
        heads: int = 4

        def __post_init__(self):
            if self.width % self.heads:
                raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    assert config.override(Shape(), {"width": "9", "heads": "3"}) == Shape(9, 3)
    with pytest.raises(UserError, match="heads: width 8 is not a multiple of heads 3"):
        config.override(Shape(), {"heads": "3"})


def test_a_sweep_may_set_whole_objects_and_numbers_keep_their_kind():
    changed = config.override(BASE, {"model.mixer": Mixer(heads=1), "train.lr": 1, "train.tags": ("x",)})
    assert changed.model.mixer == Mixer(heads=1) and changed.train.tags == ("x",)
    assert type(changed.train.lr) is float
    for path, value in (("train.steps", 1.5), ("train.steps", True), ("train.lr", math.nan)):
        with pytest.raises(UserError, match=path):
            config.override(BASE, {path: value})


def test_assignments_are_read_from_words():
    assert config.parse_assignments(["a.b=1", "c=x=y", "d="]) == {"a.b": "1", "c": "x=y", "d": ""}
    for words in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(UserError):
            config.parse_assignments(words)


@pytest.fixture
def own_module(monkeypatch):
    """File the classes of this module under the experiment, as those of a loaded file are."""
    for cls in (Color, Train, Mixer, Model, Stage, Experiment):
        monkeypatch.setattr(cls, "__module__", loading.MODULE_PREFIX + "test")
    monkeypatch.setitem(sys.modules, loading.MODULE_PREFIX + "test", sys.modules[__name__])
    return config.ConfigFile(Path(__file__), sys.modules[__name__])


def test_describe_and_revive_are_inverse(own_module):
    value = config.override(
        BASE,
        {"model.mixer.dtype": "bfloat16", "train.clip_norm": "inf", "train.color": "BLUE", "stages.1.train.tags": "a"},
    )
    described = json.loads(json.dumps(config.describe(value), allow_nan=False))
    assert described == config.describe(value)
    assert config.revive(described, config.names_in(own_module)) == value
    assert config.revive(described, config.names(value)) == value
    assert described["class"] == "experiment:Experiment"
    assert described["model"]["mixer"]["activation"] == {"function": "jax.nn:gelu"}
    assert "parent" not in described["model"] and "name" not in described["model"]
    assert described["stages"][0]["name"] == "sft"


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text() | st.sampled_from(["class", "dtype"]), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_every_plain_value_survives_the_round_trip(value):
    text = json.dumps(config.describe(value), allow_nan=False)
    revived = config.revive(json.loads(text))
    assert revived == value and repr(revived) == repr(value)


def test_integer_keys_paths_and_own_classes_survive():
    value = {1: Path("a"), 2: np.dtype("int8")}
    assert config.revive(config.describe(value)) == value


def test_no_module_from_elsewhere_is_imported(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("import dataclasses\n@dataclasses.dataclass\nclass Trap:\n    x: int = 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for tag in ("class", "function", "enum"):
        with pytest.raises(UserError, match="refusing to load 'trap'") as caught:
            config.revive({tag: "trap:Trap"})
        assert caught.value.exit_code == REFUSED
    assert "trap" not in sys.modules


def test_only_own_classes_are_revived(tmp_path):
    marker = tmp_path / "ran"
    hostile = [
        {"class": "subprocess:Popen", "args": ["touch", str(marker)]},
        {"class": "os:system"},
        {"function": "os:system"},
        {"class": "rlhf_jax.config.loading:sys.exit"},
        {"function": "rlhf_jax.config.loading:importlib.import_module"},
        {"function": "rlhf_jax.config.loading:Path.home"},
        {"function": "jax.numpy:np.load"},
        {"class": "rlhf_jax.config.loading:Path"},
        {"class": "rlhf_jax.errors:UserError", "what": "x"},
        {"class": "rlhf_jax.nowhere:Thing"},
        {"class": "rlhf_jax.config.loading:ConfigFile", "wrong": 1},
        {"enum": "rlhf_jax.config.loading:ConfigFile", "member": "x"},
        {"dtype": "load"},
    ]
    for description in hostile:
        with pytest.raises(UserError):
            config.revive(description)
    assert not marker.exists()
    with pytest.raises(UserError, match="name that file again") as caught:
        config.revive({"a": {"class": "experiment:Mine"}})
    assert caught.value.exit_code == REFUSED and caught.value.at == "a"


def test_what_has_no_lasting_name_is_refused():
    for value in ({"f": lambda x: x}, {"f": np.zeros(2)}, {"f": math.nan}, {"f": object()}):
        with pytest.raises(UserError, match="^f: "):
            config.describe(value)


def test_fingerprint_is_of_the_content():
    described = config.describe(BASE)
    shuffled = dict(reversed(described.items()))
    assert config.fingerprint(described) == config.fingerprint(shuffled)
    # printf '{"a":1,"b":[1.5,null]}' | sha256sum
    assert config.fingerprint({"b": [1.5, None], "a": 1}).startswith("993a7a2c")
    other = config.describe(dataclasses.replace(BASE, seed=1))
    assert config.fingerprint(described) != config.fingerprint(other)
    assert config.fingerprint(described, without=("seed",)) == config.fingerprint(other, without=("seed",))
    one, same = config.describe(Train(lr=1)), config.describe(Train(lr=1.0))
    assert config.fingerprint(one) == config.fingerprint(same)


def test_diff_lists_the_leaves_that_changed():
    changed = config.override(BASE, {"stages.ppo.train.lr": "0.5", "model.mixer.dtype": "bfloat16"})
    assert config.diff(BASE, changed) == [
        ("model.mixer.dtype", "float32", "bfloat16"),
        ("stages.ppo.train.lr", 0.001, 0.5),
    ]
    shorter = dataclasses.replace(BASE, stages=BASE.stages[:1])
    assert ("stages.ppo.train.lr", 0.001, config.ABSENT) in config.diff(BASE, shorter)
    assert config.diff(BASE, BASE) == []


def write(folder: Path, text: str) -> Path:
    path = folder / "exp.py"
    path.write_text(text)
    return path


def test_a_file_is_loaded_with_classes_of_its_own(tmp_path):
    path = write(
        tmp_path,
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass(frozen=True)\nclass E:\n    lr: float = 0.1\n    seed: int = 0\n"
        "def config():\n    return E()\n"
        "def sweep():\n    for seed in range(2):\n        yield {'seed': seed, 'lr': '1e-2'}\n"
        "    yield 'named', {'lr': 3.0}\n",
    )
    file = config.load(path)
    value = file.config()
    assert config.override(value, {"lr": "2"}).lr == 2.0
    assert config.revive(config.describe(value), config.names_in(file)) == value
    assert file.sweep() == [
        ("seed=0,lr=1e-2", {"seed": 0, "lr": "1e-2"}),
        ("seed=1,lr=1e-2", {"seed": 1, "lr": "1e-2"}),
        ("named", {"lr": 3.0}),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", ["exp.py", "no config()"]),
        ("def config():\n    return 1 / 0\n", ["exp.py:2", "ZeroDivisionError"]),
        ("def inner():\n    return [][0]\ndef config():\n    return inner()\n", ["exp.py:2", "IndexError"]),
        ("import nowhere_to_be_found\n", ["exp.py:1", "ModuleNotFoundError"]),
        ("def config(:\n", ["exp.py:1", "SyntaxError"]),
        ("def config():\n    return int('x' * 3)\n", ["exp.py:2", "ValueError"]),
    ],
)
def test_a_faulty_file_is_named_with_its_line(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        config.load(write(tmp_path, text)).config()
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_is_missing_input(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(UserError) as caught:
            config.load(path)
        assert caught.value.exit_code == MISSING_INPUT and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "body", ["yield 3", "yield '../x', {}", "yield {'a': 1}\n    yield {'a': 1}", "yield 'x' * 200, {}", "1 / 0"]
)
def test_a_faulty_sweep_is_refused(tmp_path, body):
    with pytest.raises(UserError, match="exp.py"):
        config.load(write(tmp_path, f"def config(): pass\ndef sweep():\n    {body}\n")).sweep()


def test_the_package_loads_without_jax():
    code = "import sys, rlhf_jax.config, rlhf_jax.errors; sys.exit(any(m in sys.modules for m in ('jax', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_linen_modules_stay_usable_after_an_override():
    changed = config.override(BASE, {"model.pattern.0.heads": "2"}).model
    assert hash(changed) != hash(BASE.model)
    assert changed.apply({}, jnp.ones(2)).shape == (2,)
    assert isinstance(jax.eval_shape(changed.init, jax.random.key(0), jnp.ones(2)), dict)
