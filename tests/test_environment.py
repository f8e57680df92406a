"""Provenance: a figure's code decides its hash, and nothing else does."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest

import variants
from bench import environment

ROOT = Path(__file__).parents[1]

CHANGE_EACH_FILE = """
import json
from pathlib import Path
from bench.environment import code_sha256
import bench
root = Path.cwd()
assert Path(bench.__file__).is_relative_to(root), "not the copy"
NAMES = ["dense", "chunked", "longformer"]

def hashes():
    return [code_sha256.__wrapped__(name) for name in NAMES]

before, changed = hashes(), {}
for file in sorted([*root.glob("bench/**/*.py"), *root.glob("variants/*.py")]):
    content = file.read_bytes()
    file.write_bytes(content + b"# changed")
    changed[str(file.relative_to(root))] = [a != b for a, b in zip(before, hashes())]
    file.write_bytes(content)
assert hashes() == before
print(json.dumps(changed))
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bool]]:
    """File → whether a change of it changes the hash of dense, chunked, longformer; in a copy of the tree."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("bench", "variants", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", CHANGE_EACH_FILE], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer: dict[str, list[bool]] = json.loads(done.stdout)
    return answer


DECIDES = [
    *(
        f"bench/{name}.py"
        for name in (
            "accuracy",
            "cell",
            "checkpoints",
            "config",
            "curves",
            "evaluate",
            "gates",
            "history",
            "model",
            "reach",
            "residual",
            "train",
            "windows",
        )
    ),
    *(f"bench/corpora/{name}.py" for name in ("__init__", "base", "hub", "plays")),
    *(f"bench/measure/{name}.py" for name in ("flops", "memory", "nvml", "step", "surroundings", "timing")),
    *(f"bench/tasks/{name}.py" for name in ("base", "mqar", "text")),
    *(f"variants/{name}.py" for name in ("base", "layers", "patterns")),
]


@pytest.mark.parametrize("file", DECIDES)
def test_code_behind_the_figures_changes_the_hash(changed: dict[str, list[bool]], file: str) -> None:
    assert changed[file] == [True, True, True]


def test_code_that_runs_shows_or_prints_does_not(changed: dict[str, list[bool]]) -> None:
    others = ["bench/__main__.py", "bench/progress.py", "bench/sweep.py", "variants/__main__.py"]
    others += [file for file in changed if file.startswith("bench/report/")]
    assert len(others) > 6
    assert not [file for file in others if any(changed[file])]


def test_a_variants_hash_is_of_its_own_code_and_what_it_builds_on(changed: dict[str, list[bool]]) -> None:
    assert changed["variants/dense.py"] == [True, True, False], "chunked is a kind of dense"
    assert changed["variants/chunked.py"] == [False, True, False]
    assert changed["variants/longformer.py"] == [False, False, True]


@pytest.mark.parametrize("name", variants.names())
def test_a_hash_is_short_and_repeats(name: str) -> None:
    found = environment.code_sha256(name)
    assert len(found) == 16
    assert int(found, 16) >= 0
    assert environment.code_sha256.__wrapped__(name) == found


def test_provenance_says_where_a_record_came_from() -> None:
    found = environment.provenance()
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
    (folder / "bench").mkdir()
    (folder / "variants").mkdir()
    for file in ("bench/__init__.py", "bench/environment.py", "variants/__init__.py"):
        shutil.copy(ROOT / file, folder / file)
    return folder


def git_state(folder: Path) -> list[object]:
    asked = "import json; from bench.environment import provenance as p; f = p(); "
    asked += "print(json.dumps([f['git_commit'], f['git_dirty']]))"
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=folder, capture_output=True, text=True, check=True
    )
    answer: list[object] = json.loads(done.stdout)
    return answer


def test_git_state_is_that_of_the_code(tmp_path: Path) -> None:
    """Clean, changed, and below a checkout that it is no part of."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    copied(tmp_path)
    git("init", "--quiet")
    assert git_state(tmp_path) == [None, None], "not a tracked file of this checkout"
    git("add", ".")
    git("commit", "--quiet", "-m", "x")
    head = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == [head, False]
    with (tmp_path / "bench/__init__.py").open("a") as file:
        file.write("# changed")
    assert git_state(tmp_path) == [head, True]
