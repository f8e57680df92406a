"""Every command of the README and of docs/ is one that works.

Commands of a page that says so in `RUN` are run as they stand, in the page's order. Elsewhere a sweep is
composed and checked up to the point where its first cell would run, because it would take minutes; a
download is tried without a network, where it must say what to do instead; and of make it is asked what it
would do.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG_SECONDS
from test_report import record, write
from tiers import slow

import variants

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLLOWED = {"adding-a-section.md", "adding-a-variant.md", "cluster.md"}
"""Pages that a test of their own follows."""
RUN = {"records.md"}
ELSEWHERE = ("pip install .", ".venv/bin/pre-commit install")
"""The wheel is installed and run by the slow test of packaging; hooks are nobody's to install in a test."""
COMPOSED = """
import json, sys
from bench.run import sweep
from bench.__main__ import main
sweep.run = lambda cells: print(len(cells), "cells") or []
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{' '.join(arguments)}: status {end.code}")
"""
"""Sweeps, composed and checked one after the other; the first that fails ends it."""


def commands(page: Path) -> list[str]:
    """The lines of its shell blocks, less comments; a backslash goes on in the next line."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.M | re.S)
    joined = "\n".join(blocks).replace("\\\n", " ")
    lines = [re.sub(r"(^|\s+)#.*$", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]


def call(words: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "bench" / "plugins"))
    return subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def checked(line: str, cwd: Path) -> None:
    """Whether a command that is no sweep would work, without doing what takes minutes."""
    words = shlex.split(line)
    if words[0] == "make":
        done = call(["make", "-n", *words[1:]], ROOT)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        return
    assert words[:2] == ["python", "-m"], f"{line}: no way to check it; add one here"
    module, arguments = words[2], words[3:]
    if module == "bench.corpora" and arguments[0] in ("fetch", "show") and "plays" not in arguments:
        offline = {"HF_HUB_OFFLINE": "1", "LONGCTX_BENCH_CACHE": str(cwd / "cache")}
        done = call([sys.executable, "-m", module, *arguments], cwd, **offline)
        assert done.returncode == 2, f"{line}\n{done.stdout}{done.stderr}"
        assert done.stderr.count("\n") == 1, done.stderr
        assert "usage" not in done.stderr
    elif module == "bench.generate":  # its arguments are understood, but nothing was trained
        done = call([sys.executable, "-m", module, *arguments], cwd)
        assert (done.returncode, "keeps no model" in done.stderr) == (2, True), f"{line}\n{done.stderr}"
    else:
        if module == "bench.report":
            for folder in (cwd / a for a in arguments if not a.startswith("-")):
                write(folder, [record(), record("chunked")])
        done = call([sys.executable, "-m", module, *arguments], cwd)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def composed(lines: list[str], cwd: Path) -> None:
    """Whether sweeps would start, and over how many cells."""
    sweeps = [shlex.split(line)[3:] for line in lines]
    for argument in itertools.chain(*sweeps):
        if argument.startswith("data.path="):
            file = cwd / argument.partition("=")[2].replace("*", "one")
            file.parent.mkdir(exist_ok=True)
            file.write_text("A text of some length. " * 2000)
    done = call([sys.executable, "-c", COMPOSED, json.dumps(sweeps)], cwd)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^[1-9]\d* cells$", done.stdout, re.M)) == len(sweeps), done.stdout


@pytest.mark.parametrize(
    "page",
    [*PAGES[:2], *slow(*(page for page in PAGES[2:] if page.name not in FOLLOWED))],
    ids=lambda page: page.name,
)
def test_commands(page: Path, tmp_path: Path) -> None:
    lines = [line for line in commands(page) if not line.startswith(ELSEWHERE)]
    sweeps = [line for line in lines if line.startswith("python -m bench ")]
    if page.name not in RUN and sweeps:
        composed(sweeps, tmp_path)
    for line in lines:
        if page.name in RUN:
            words = [sys.executable if word == "python" else word for word in shlex.split(line)]
            done = call(words, tmp_path)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
        elif line not in sweeps:
            checked(line, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_commands_within_sentences_are_targets_and_presets() -> None:
    """`make x` names a target, `experiment=x` a preset, `--flags` aside."""
    text = "\n".join(page.read_text() for page in PAGES)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    presets = {path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml")}
    assert set(re.findall(r"experiment=([a-z_]+)", text)) <= presets


def test_the_readme_names_every_variant() -> None:
    """Each once, in its table of mechanisms."""
    table = (ROOT / "README.md").read_text().partition("| exact |")[2].partition("\n\n")[0]
    named = [word for word in re.findall(r"`([a-z_0-9]+)`", table) if word in variants.names()]
    assert sorted(named) == sorted(variants.names())


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_help_lists_every_target() -> None:
    said = call(["make", "help"], ROOT).stdout
    assert "make bench" in said
