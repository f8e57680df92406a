"""Two people and one results folder: what one may read is read, what the group may write is shared, and the
rest is refused in a line. The other person's files are made as this one makes them, and then given away."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG_SECONDS
from test_sweep import apart
from tiers import slow

OTHER, GROUP = 65534, 0
PLAN = ["data=stdlib", "measure=plan", "seq_len=16", "depth=1", "model.d_model=16", "device=cpu"]
SCRIPT = """
import contextlib, importlib, io, json, os, sys
found = []
for umask, module, arguments in json.loads(sys.argv[1]):
    os.umask(int(umask, 8))
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            if module == "bench":
                from bench.run import sweep
                sweep.finished.clear()
                sys.argv = ["bench", *arguments]
                status = importlib.import_module("bench.__main__").main()
            else:
                status = importlib.import_module(module + ".__main__").main(arguments)
        except SystemExit as end:
            status = end.code
    found.append([status, out.getvalue(), errors.getvalue()])
print(json.dumps(found))
"""
Step = tuple[str, str, list[str]]
"""Umask, module and arguments of a command."""
UMASKS = ("022", "027", "077")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="needs root, to give files away, and setpriv, to be held to their permissions",
)


def run(folder: Path, steps: list[Step]) -> list[tuple[int, str, str]]:
    """Status, output and errors of each, in one process that is root no more: it has no capabilities."""
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", f"--regid={GROUP}", "--clear-groups"]
    command += [sys.executable, "-c", SCRIPT, json.dumps(steps)]
    done = subprocess.run(
        command, cwd=folder, env=apart(folder), capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return [(status, out, errors) for status, out, errors in json.loads(done.stdout)]


def bench(umask: str, results: Path, replicate: int) -> Step:
    return umask, "bench", [*PLAN, f"results_dir={results}", f"replicate={replicate}"]


def everything(umask: str, results: Path, replicate: int = 1) -> list[Step]:
    """Run a finished cell, a new one, check, report, compact."""
    folder = str(results / "adhoc")
    return [
        bench(umask, results, 0),
        bench(umask, results, replicate),
        (umask, "bench.records", ["check", folder]),
        (umask, "bench.report", [folder, "--no-plots"]),
        (umask, "bench.records", ["compact", folder]),
    ]


def give_away(results: Path, group: int = -1) -> None:
    for path in (results, *results.rglob("*")):
        os.chown(path, OTHER, group)


ALLOWED = {
    ("022", GROUP): [0, 2, 0, 2, 2],
    ("022", OTHER): [0, 2, 0, 2, 2],
    ("027", GROUP): [0, 2, 0, 2, 2],
    ("027", OTHER): [2, 2, 2, 2, 2],
    ("077", GROUP): [2, 2, 2, 2, 2],
    ("077", OTHER): [2, 2, 2, 2, 2],
}
"""(umask, group of the files) → statuses of everything, done to another person's folder."""


@pytest.mark.parametrize("owned", [[("027", GROUP), ("077", OTHER)], *slow([*ALLOWED])], ids=["some", "all"])
def test_what_may_be_read_is_read_and_the_rest_is_refused_in_a_line(
    owned: list[tuple[str, int]], tmp_path: Path
) -> None:
    folders = {(umask, group): tmp_path / f"{umask}-{group}" for umask, group in owned}
    made = run(tmp_path, [bench(umask, results, 0) for (umask, _), results in folders.items()])
    assert [status for status, *_ in made] == [0] * len(made), made
    for (_, group), results in folders.items():
        give_away(results, group)
    steps = [step for (umask, _), results in folders.items() for step in everything(umask, results)]
    found = run(tmp_path, steps)
    statuses = [status for status, *_ in found]
    assert statuses == [status for key in owned for status in ALLOWED[key]], found
    for status, out, errors in found:
        if status == 2:
            (line,) = errors.splitlines()
            assert str(tmp_path) in line
            assert "Permission denied" in line
            assert out == ""


@pytest.mark.parametrize("umasks", [["077"], *slow([*UMASKS])], ids=["private", "all"])
@pytest.mark.slow
def test_a_folder_that_its_group_may_write_is_shared(umasks: list[str], tmp_path: Path) -> None:
    """Each of two people does everything in turn, in the folder that the other has left."""
    folders = {umask: tmp_path / umask for umask in umasks}
    for results in folders.values():
        results.mkdir()
        results.chmod(0o2770)
    for replicate in (1, 2):
        for results in folders.values():
            give_away(results)
        found = run(tmp_path, [step for u, r in folders.items() for step in everything(u, r, replicate)])
        assert {status for status, *_ in found} == {0}, found
    for results in folders.values():
        rights = {path: stat.S_IMODE(path.stat().st_mode) for path in results.rglob("*")}
        assert len(rights) > 10
        assert {mode & 0o060 for mode in rights.values()} == {0o060}
        assert all(mode & 0o2070 == 0o2070 for path, mode in rights.items() if path.is_dir())


@pytest.mark.parametrize(
    "places", [["records", ".claims"], *slow(["curves", "gates"])], ids=["some", "others"]
)
def test_what_a_cell_could_not_write_is_known_before_it_is_measured(
    places: list[str], tmp_path: Path
) -> None:
    """And a folder that is nobody else's keeps to the umask."""
    run(tmp_path, [bench("077", tmp_path / place, 0) for place in places])
    assert {path.stat().st_mode & 0o077 for path in tmp_path.glob("*/adhoc/**/*")} == {0}
    for place in places:
        path = tmp_path / place / "adhoc" / place
        path.mkdir(exist_ok=True) if place != ".claims" else None
        path.chmod(0o555)
        os.chown(path, OTHER, OTHER)
    for place, (status, _, errors) in zip(
        places, run(tmp_path, [bench("022", tmp_path / place, 1) for place in places]), strict=True
    ):
        assert status == 2
        *read, line = errors.splitlines()
        assert all(said.startswith("data=") for said in read)
        assert line.startswith(f"error: results_dir: cannot {'lock' if place == '.claims' else 'write'}")
        assert f"/{place}/adhoc" in line
        assert len(list((tmp_path / place / "adhoc/records").glob("*.json"))) == 1
