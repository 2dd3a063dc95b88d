"""The breaks of ``benchmarks/mutations.py`` fit the code as it is, and the script tells caught from survived."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "mutations.py"
SPEC = importlib.util.spec_from_file_location("mutations", PATH)
assert SPEC is not None and SPEC.loader is not None
mutations = importlib.util.module_from_spec(SPEC)
sys.modules["mutations"] = mutations  # dataclasses look their module up by name
SPEC.loader.exec_module(mutations)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_break_fits_once_and_stays_python(mutation):
    text = (mutations.ROOT / mutation.file).read_text(encoding="utf-8")
    assert mutations.fits(mutation) == 1 and mutation.old != mutation.new
    compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")


def test_each_break_names_a_test_that_exists():
    assert len({mutation.name for mutation in mutations.MUTATIONS}) == len(mutations.MUTATIONS)
    for mutation in mutations.MUTATIONS:
        file, _, name = mutation.test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (mutations.ROOT / file).read_text(encoding="utf-8")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package of one function with a test that notices one break and not the other."""
    (tmp_path / "sums.py").write_text("def add(a, b):\n    return a + b\n\n\ndef twice(a):\n    return 2 * a\n")
    (tmp_path / "test_sums.py").write_text("import sums\n\n\ndef test_add():\n    assert sums.add(1, 2) == 3\n")
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    monkeypatch.setattr(mutations, "COPIED", ("sums.py", "test_sums.py"))
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        ("a + b", "a - b", 0, "1 of 1 breaks were caught"),
        ("2 * a", "3 * a", 1, "SURVIVED"),
        ("return", "return 1 +", 1, "do not fit exactly once: break"),
        ("c + d", "c - d", 1, "do not fit exactly once: break"),
        ("a + b", "a +", 1, "SURVIVED"),  # a file that cannot be read at all is no proof of the test
    ],
)
def test_the_script_tells_caught_from_survived(project, monkeypatch, capsys, old, new, code, said):
    one = mutations.Mutation("break", "sums.py", old, new, "test_sums.py::test_add")
    monkeypatch.setattr(mutations, "fits", lambda mutation: (project / mutation.file).read_text().count(mutation.old))
    monkeypatch.setattr(mutations, "MUTATIONS", (one,))
    monkeypatch.setattr(sys, "argv", ["mutations.py"])
    before = (project / "sums.py").read_text()
    assert mutations.main() == code
    assert said in capsys.readouterr().out and (project / "sums.py").read_text() == before
