"""Provenance: where a record came from."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.run import provenance

ROOT = Path(__file__).parents[1]


def test_provenance_says_where_a_record_came_from() -> None:
    found = provenance.provenance()
    assert set(found) >= {
        "git_commit",
        "git_dirty",
        "torch_version",
        "python_version",
        "cpu_model",
        "started_at",
        "load_average",
    }
    assert found["torch_version"] == version("torch")
    assert found["python_version"] == platform.python_version()
    assert found["cpu_model"]
    assert found["load_average"] >= 0
    started = datetime.fromisoformat(found["started_at"])
    assert timedelta() <= datetime.now(UTC) - started < timedelta(minutes=5)
    json.dumps(found, allow_nan=False)


def copied(folder: Path) -> Path:
    for package in ("bench", "bench/run", "variants", "variants/attention"):
        (folder / package).mkdir()
        shutil.copy(ROOT / package / "__init__.py", folder / package)
    for file in ("bench/run/provenance.py", "variants/safe_output.py"):
        shutil.copy(ROOT / file, folder / file)
    return folder


ASK = """
import json
from bench.run import provenance
provenance._GIT_SECONDS = {seconds}
found = provenance.provenance()
print(json.dumps([found["git_commit"], found["git_dirty"]]))
"""


def git_state(folder: Path, seconds: float = 60, **environment: str) -> list[object]:
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(seconds=seconds)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert (done.returncode, done.stderr) == (0, "")
    answer: list[object] = json.loads(done.stdout)
    return answer


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, "-c", "protocol.file.allow=always", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def committed(folder: Path) -> str:
    """Make the folder a repository with all that is in it; the commit."""
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "x")
    return git(folder, "rev-parse", "HEAD")


def test_git_state_is_that_of_the_code(tmp_path: Path) -> None:
    """Clean, changed, and below a checkout that it is no part of."""
    copied(tmp_path)
    git(tmp_path, "init", "--quiet")
    assert git_state(tmp_path) == [None, None], "not a tracked file of this checkout"
    head = committed(tmp_path)
    assert git_state(tmp_path) == [head, False]
    with (tmp_path / "bench/__init__.py").open("a") as file:
        file.write("# changed")
    assert git_state(tmp_path) == [head, True]


@pytest.mark.parametrize("quoted", ["true", "false"])
def test_names_that_are_not_utf_8_are_names(quoted: str, tmp_path: Path) -> None:
    odd = copied(tmp_path) / os.fsdecode(b"caf\xe9 \n.txt")
    odd.write_text("as it was")
    head = committed(tmp_path)
    git(tmp_path, "config", "core.quotePath", quoted)
    assert git_state(tmp_path) == [head, False]
    odd.write_text("changed")
    assert git_state(tmp_path) == [head, True]


def script(folder: Path, *lines: str) -> dict[str, str]:
    """A folder with another `git` before the system's."""
    (folder / "bin").mkdir()
    (folder / "bin" / "git").write_text("\n".join(lines))
    (folder / "bin" / "git").chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def owned_by_another(folder: Path) -> dict[str, str]:
    return {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}


def moved_into_a_bare_repository(folder: Path) -> None:
    (folder / ".git").rename(folder / "aside")
    git(folder, "clone", "--quiet", "--bare", "aside", "bare")
    shutil.rmtree(folder / "aside")
    for name in ("HEAD", "config", "objects", "refs", "packed-refs"):
        if (folder / "bare" / name).exists():
            (folder / "bare" / name).rename(folder / name)


def instead_of_the_repository(content: str | None) -> Callable[[Path], object]:
    """`.git` becomes a file with this content, or an empty folder."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder / ".git")
        (folder / ".git").mkdir() if content is None else (folder / ".git").write_text(content)

    return change


UNKNOWN: dict[str, Callable[[Path], object]] = {
    "no git": lambda folder: {"PATH": str(folder)},
    "git that may not be run": lambda folder: (folder / "git").touch() or {"PATH": str(folder)},
    "git that is no program": lambda folder: script(folder, "\x7fELF") | {"PATH": str(folder / "bin")},
    "not a repository": lambda folder: shutil.rmtree(folder / ".git"),
    "another's repository": owned_by_another,
    "empty .git": instead_of_the_repository(None),
    ".git is a file of nonsense": instead_of_the_repository("?"),
    ".git leads nowhere": instead_of_the_repository("gitdir: gone"),
    "broken index": lambda folder: (folder / ".git" / "index").write_bytes(b"nonsense"),
    "broken config": lambda folder: (folder / ".git" / "config").write_bytes(b"[\xff"),
    "a bare repository": moved_into_a_bare_repository,
    "git that asks": lambda folder: script(folder, "#!/bin/sh", "read answer || exit 1"),
    "git that fails": lambda folder: script(folder, "#!/bin/sh", "echo caf\351 >&2", "exit 128"),
    "git that is killed": lambda folder: script(folder, "#!/bin/sh", "kill -9 $$"),
}


@pytest.mark.parametrize("how", UNKNOWN)
def test_where_git_does_not_know_neither_does_a_record(how: str, tmp_path: Path) -> None:
    """And nothing fails, or is printed."""
    committed(copied(tmp_path))
    provenance = UNKNOWN[how](tmp_path)
    assert git_state(tmp_path, **(provenance if isinstance(provenance, dict) else {})) == [None, None]


def test_git_that_hangs_is_given_up(tmp_path: Path) -> None:
    committed(copied(tmp_path))
    provenance = script(tmp_path, "#!/bin/sh", "exec sleep 1000000")
    assert git_state(tmp_path, seconds=0.1, **provenance) == [None, None]


def test_a_head_that_is_lost_leaves_the_rest(tmp_path: Path) -> None:
    committed(copied(tmp_path))
    shutil.rmtree(tmp_path / ".git" / "refs")
    (tmp_path / ".git" / "refs").mkdir()
    commit, dirty = git_state(tmp_path)
    assert commit is None
    assert dirty in (True, None)


@pytest.mark.parametrize("kind", ["worktree", "submodule", "a hook of another repository"])
def test_the_repository_is_the_one_of_the_code(kind: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    head, other = committed(copied(tmp_path / "whole")), committed(tmp_path / "other")
    assert head != other
    if kind == "worktree":
        git(tmp_path / "whole", "worktree", "add", "--quiet", str(tmp_path / "tree"))
        assert git_state(tmp_path / "tree") == [head, False]
    elif kind == "submodule":
        git(tmp_path / "other", "submodule", "--quiet", "add", str(tmp_path / "whole"), "inside")
        assert git_state(tmp_path / "other" / "inside") == [head, False]
    else:
        hook = {"GIT_DIR": str(tmp_path / "other/.git"), "GIT_INDEX_FILE": str(tmp_path / "other/.git/index")}
        assert git_state(tmp_path / "whole", **hook) == [head, False]
