"""docs/adding-a-section.md, followed in a copy of the project: its one file and its command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import HANG_SECONDS
from test_report import failed, record, write

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-a-section.md").read_text()
FILES = re.findall(r"^`([a-z_/]+\.py)`:\n\n```python\n(.*?)^```$", PAGE, re.M | re.S)
SECONDS = {"dense": 30.0, "chunked": 90.0}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report that the page's command builds in a copy with the page's file."""
    copy = tmp_path_factory.mktemp("project")
    for part in ("bench", "variants"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in FILES:
        assert not (copy / path).exists(), "the page adds files and changes none"
        (copy / path).write_text(text, encoding="utf-8")
    found = [record(name, replicate=r, seconds_total=s) for name, s in SECONDS.items() for r in range(2)]
    write(
        copy / "results" / "mine", [*found, failed("oom", "too much", variant="reformer", seconds_total=60.0)]
    )
    ((command,),) = (block.splitlines() for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S))
    run(command, copy)
    return copy / "results" / "mine" / "report"


def run(command: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, *command.split()[1:]],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_section_is_one_file() -> None:
    assert [path for path, _ in FILES] == ["bench/report/sections/run_time.py"]


@pytest.mark.slow
def test_the_section_of_the_page_is_in_every_output(report: Path) -> None:
    text = (report / "summary.md").read_text()
    section = text.split("## Run time\n")[1]
    assert "](plots/run_time.png)" in section
    assert re.search(r"\| chunked +\| +2 \| +180 s \| +60\.0 % \|", section)
    assert text.index("## Did not finish") < text.index("## Run time")
    written = pd.read_csv(report / "run_time.csv").set_index("label")
    assert written["seconds_total"].to_dict() == {"dense": 60.0, "chunked": 180.0, "reformer": 60.0}
    assert written["cells"].to_dict() == {"dense": 2, "chunked": 2, "reformer": 1}
    assert {path.name for path in (report / "plots").glob("run_time.*")} == {"run_time.png", "run_time.svg"}
    page = (report / "index.html").read_text()
    assert '<a href="#run-time">Run time</a>' in page
    assert '<section id="run-time"' in page


def test_the_file_of_the_page_is_in_the_style_of_the_project(tmp_path: Path) -> None:
    ((_, text),) = FILES
    (tmp_path / "run_time.py").write_text(text, encoding="utf-8")
    for words in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        command = [
            sys.executable,
            "-m",
            "ruff",
            *words,
            "--config",
            str(ROOT / "pyproject.toml"),
            "run_time.py",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
