"""The pages against what they speak of: files, links, commands, code, and the tables of presets and exit codes."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_jax import config, errors
from rlhf_jax.cli import verbs
from rlhf_jax.objectives import presets
from rlhf_jax.objectives.ppo import PPO, Whitening
from rlhf_jax.ops.kl import AdaptiveKL, FixedKL

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "LOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LISTED_WHOLLY = ("rlhf_jax", "experiments", "benchmarks")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def tree() -> list[str]:
    """The paths of the README's tree of files, which it shows by indentation."""
    text = README.read_text(encoding="utf-8").split("## Every file")[1]
    found, folders = [], []
    for line in FENCE.findall(text)[0][1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            assert len(line.split()) > 1, f"{name} has no description"
            found.append("".join(folders) + name)
    return found


def test_every_listed_file_exists():
    assert [path for path in tree() if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("folder", LISTED_WHOLLY)
def test_every_file_of_the_code_is_listed_once(folder):
    there = {name_of(path) for path in (ROOT / folder).rglob("*.py") if not path.name.startswith(".")}
    listed = [path for path in tree() if path.startswith(f"{folder}/") and path.endswith(".py")]
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, section = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        if section:
            assert section in anchors(file), f"{name_of(page)} links to {target}"


def anchors(page: Path) -> set[str]:
    """Names by which a page's headings are linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_overrides_of_the_pages_fit_the_quickstart(page):
    experiment = config.load(ROOT / "experiments" / "quickstart.py").config()
    for word in re.findall(r"--set ([a-z_.\d]+=[^\s`)]+)", page.read_text(encoding="utf-8")):
        config.override(experiment, config.parse_assignments([word]))


def test_all_verbs_are_in_the_table_and_no_others():
    shown = set(re.findall(r"^\| `rlhf-jax (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    defined = {kind.__name__.lower() for kind in vars(verbs).values() if isinstance(kind, type) and is_verb(kind)}
    assert shown == defined


def is_verb(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) and kind.__module__ == verbs.__name__ and hasattr(kind, "run")


def test_the_example_is_an_experiment(tmp_path):
    examples = [code for page in [README] for kind, code in FENCE.findall(page.read_text()) if kind == "python"]
    file = tmp_path / "mine.py"
    file.write_text(examples[0] + "\n\n" + examples[1])
    loaded = config.load(file)
    assert [stage.name for stage in loaded.config().stages] == ["sft", "reward", "ppo"]
    assert len(loaded.sweep()) == 5
    assert config.revive(config.describe(loaded.config())) == loaded.config()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_on_the_pages_is_python(page):
    for kind, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if kind == "python":
            ast.parse(code)


def test_exit_codes_are_those_of_the_package():
    text = (ROOT / "docs" / "howto.md").read_text(encoding="utf-8")
    shown = {name: int(code) for code, name in re.findall(r"^\| (\d+) \| `([A-Z_]+)` \|", text, re.MULTILINE)}
    defined = {name: value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)}
    assert shown == defined


def preset_cells() -> Iterator[tuple[str, str, str]]:
    """(preset, field, cell) of the tables of presets; the first row of each is ``PPO()``."""
    text = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8").split("## The presets")[1]
    header: list[str] = []
    for line in (line for line in text.splitlines() if line.startswith("|")):
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if cells[0] == "preset":
            header = cells[1:]
        elif not cells[0].startswith("---"):
            yield from ((cells[0], name, cell) for name, cell in zip(header, cells[1:], strict=True))


def test_tables_of_presets_say_what_the_presets_are():
    names = {"FixedKL": FixedKL, "AdaptiveKL": AdaptiveKL, "Whitening": Whitening, "BIASED": presets.BIASED}
    known = {"PPO()": PPO()} | {name: value for name, value in vars(presets).items() if isinstance(value, PPO)}
    shown: dict[str, set[str]] = {name: set() for name in known}
    for preset, field, cell in preset_cells():
        expected = eval(cell, names) if cell else getattr(PPO(), field)
        assert getattr(known[preset], field) == expected, f"{preset}: {field}"
        assert cell or preset != "PPO()", f"the default of {field} is missing"
        shown[preset].add(field)
    for name, value in known.items():
        differing = {f.name for f in dataclasses.fields(PPO) if getattr(value, f.name) != getattr(PPO(), f.name)}
        assert differing <= shown[name], name


def test_fields_of_ppo_are_documented_with_their_choices():
    text = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8").split("## The fields")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [field.name for field in dataclasses.fields(PPO)]
