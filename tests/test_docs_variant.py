"""docs/adding-a-variant.md, followed line by line in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG_SECONDS
from hydra import compose, initialize_config_dir

from bench import CONFIGS, records
from bench.cli import guard
from bench.config.parse import parse
from bench.config.spec import CellSpec, SlotChoice
from bench.run.cell import CellRun
from variants import feed_forward, slots

ROOT = Path(__file__).parents[1]
VARIANT, FEED_FORWARD = "variants/attention/interleaved.py", "variants/feed_forward/squared_relu.py"
PAGE = (ROOT / "docs" / "adding-a-variant.md").read_text()


def run(line: str, cwd: Path) -> str:
    """A command of the page, in the copy; its output."""
    words = line.replace("python", sys.executable, 1)
    environment = {**os.environ, "PYTHONPATH": f"{cwd}{os.pathsep}{cwd / 'bench' / 'plugins'}"}
    done = subprocess.run(
        ["bash", "-c", words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the page's file in it."""
    copy = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("bench", "variants", "configs", "tests"):
        shutil.copytree(ROOT / part, copy / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    named = re.findall(r"^`([a-z_/]+\.(?:py|yaml))`:\n\n```(?:python|yaml)\n(.*?)^```$", PAGE, re.M | re.S)
    assert [path for path, _ in named] == [VARIANT, FEED_FORWARD], "one file each, and no other changes"
    for path, text in named:
        (copy / path).write_text(text)
    return copy


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def plan(line: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CellSpec, dict[str, Any]]:
    """A command of the page that predicts one cell with a layer of the copy, in this process: its cell and
    figures. A process of its own would take most of the time to start."""
    folders = [*feed_forward.__path__, str(project / FEED_FORWARD).rpartition("/")[0]]
    monkeypatch.setattr(feed_forward, "__path__", folders)
    monkeypatch.setitem(sys.modules, "variants.feed_forward.squared_relu", None)
    monkeypatch.delitem(sys.modules, "variants.feed_forward.squared_relu")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cell = parse(compose("config", overrides=guard.checked(["device=cpu", *line.split()[3:]])))
    found: dict[str, Any] = {}
    CellRun(cell, "0", "code", found.update).run()
    return cell.spec, found


@pytest.mark.slow
def test_the_page_works_as_it_is_written(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (planned,) = [line for line in commands() if line.startswith("python -m bench feed_forward=")]
    said = {line: run(line, project) for line in commands() if line != planned}
    (listed,) = [out for line, out in said.items() if line == "python -m variants"]
    assert "variant.stride=16" in listed
    helped, of_layer = [out for line, out in said.items() if "--help" in line]
    described = r"stride: 16 +# Distance between two tokens that are read \(an integer, 1 or more tokens\)"
    assert re.search(described, helped)
    for tests, least in zip((out for line, out in said.items() if "pytest" in line), (51, 6), strict=True):
        passed = re.search(r"(\d+) passed", tests)
        assert passed
        assert int(passed[1]) >= least, tests[-500:]
        assert "failed" not in tests
    names = ", ".join(sorted([*slots.FEED_FORWARD.names(), "squared_relu"]))
    assert re.search(rf"^  feed_forward: {names}$", of_layer, re.M)
    assert re.search(r"mult: 4 +# Width of the hidden layer .* \(an integer, 1 or more\)", of_layer)
    spec, figures = plan(planned, project, monkeypatch)
    assert spec.feed_forward == SlotChoice(name="squared_relu", params={"mult": 2})
    assert abs(figures["cost_ratio"] - 1) < 0.01
    assert figures["peak_bytes"] > 0
    mine = records.load(project / "results" / "mine")
    assert sorted(zip(mine.variant, mine.seq_len, strict=True)) == [
        ("dense", 512),
        ("dense", 1024),
        ("interleaved", 512),
        ("interleaved", 1024),
    ]
    assert (mine.status == "ok").all()
    own = mine[mine.variant == "interleaved"]
    assert (own.cost_ratio - 1).abs().max() < 0.01
    assert own.leak_max_abs.max() < 1e-5
    text = (project / "results" / "mine" / "report" / "summary.md").read_text()
    assert re.search(r"^\| interleaved ", text, re.M)


def test_a_rule_that_is_a_mask_takes_forty_lines(project: Path) -> None:
    assert len((project / VARIANT).read_text().splitlines()) <= 40


def test_the_example_is_in_style(project: Path) -> None:
    for tool in (["ruff", "check", "--config", str(ROOT / "pyproject.toml")], ["ruff", "format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", *tool, VARIANT, FEED_FORWARD],
            cwd=project,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
