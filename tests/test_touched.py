"""What a change touched, and which tests are about it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import touched
from touched import EMPTY_TREE, ROOT, Touched

import variants

HERE = Path(__file__)
DAY = 24 * 3600


@pytest.mark.parametrize(
    ("file", "test", "arguments", "rank"),
    [
        ("tests/test_touched.py", "tests/test_touched.py", [], 0),
        ("tests/test_touched.py", "tests/test_records.py", [], None),
        ("tests/variants/oracles.py", "tests/variants/test_dense.py", [], 2),
        ("bench/measure/predict.py", "tests/test_planning.py", [], 2),
        ("bench/claims/__main__.py", "tests/test_planning.py", [], None),
        ("configs/measure/plan.yaml", "tests/test_planning.py", [], 2),
        ("variants/attention/dense.py", "tests/test_residual.py", ["dense"], 1),
        ("variants/attention/dense.py", "tests/test_residual.py", [variants.load("dense")], 1),
        ("variants/attention/dense.py", "tests/variants/test_contract.py", ["reformer", 5], None),
        ("variants/attention/dense.py", "tests/variants/test_dense.py", [], 1),
        ("variants/ops/patterns/masks.py", "tests/variants/test_contract.py", ["dense"], 3),
        ("variants/ops/patterns/masks.py", "tests/test_residual.py", ["dense"], None),
        ("README.md", "tests/test_docs.py", [ROOT / "README.md"], 1),
        ("README.md", "tests/test_docs.py", [ROOT / "docs/records.md"], None),
    ],
)
def test_how_closely_a_test_is_about_a_file(
    file: str, test: str, arguments: list[object], rank: int | None
) -> None:
    assert (ROOT / file).exists()
    assert Touched([file]).rank(ROOT / test, arguments) == rank


def test_the_folders_of_the_rules_exist_and_hold_what_they_say() -> None:
    for folder in (touched.TESTS, touched.CONFIGS, touched.SHARED):
        assert (ROOT / folder).is_dir()
    each = {
        touched.of_one_variant(file.relative_to(ROOT).as_posix())
        for file in (ROOT / touched.SHARED).glob("*/*.py")
    }
    assert each - {None} == {*variants.names()}
    assert [*(ROOT / touched.ALL_VARIANTS).glob("test_contract*.py")]
    named = {name for test in HERE.parent.rglob("test_*.py") for name in touched.names_in(test)}
    assert {name for name in named if name.startswith(f"{touched.CONFIGS}/") and (ROOT / name).is_file()}


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository of its own, in place of the project's."""
    monkeypatch.setattr(touched, "ROOT", tmp_path)
    monkeypatch.delenv(touched.BASE, raising=False)
    for key in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{key}_NAME", "a")
        monkeypatch.setenv(f"{key}_EMAIL", "a@b")
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=tmp_path, check=True)
    return tmp_path


def commit(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, *, when: int) -> str:
    """A commit with one more file, so many seconds after another time."""
    (folder / name).touch()
    for key in ("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"):
        monkeypatch.setenv(key, f"{1_700_000_000 + when} +0000")
    touched.git("add", name)
    touched.git("commit", "-q", "-m", name)
    return touched.git("rev-parse", "HEAD")


def test_on_main_a_change_is_what_the_last_day_brought(git: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = commit(git, "a", monkeypatch, when=0)
    assert touched.base() == EMPTY_TREE
    assert touched.changed() == ["a"]
    commit(git, "b", monkeypatch, when=DAY + 10)
    commit(git, "c", monkeypatch, when=DAY + 20)
    assert touched.base() == first
    (git / "d").touch()
    assert touched.changed() == ["b", "c", "d"]


def test_on_a_branch_a_change_is_what_it_brought(git: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = commit(git, "a", monkeypatch, when=0)
    left = commit(git, "b", monkeypatch, when=10)
    touched.git("checkout", "-q", "-b", "mine")
    commit(git, "c", monkeypatch, when=20)
    assert touched.base() == left
    monkeypatch.setenv(touched.BASE, first)
    assert touched.changed() == ["b", "c"]
    monkeypatch.setenv(touched.BASE, "nowhere")
    with pytest.raises(pytest.UsageError, match="nowhere"):
        touched.base()
