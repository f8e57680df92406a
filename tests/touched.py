"""Which tests are about what a change touched: `pytest --touched`, run by `make test-touched`.

A test is about a changed file if

- the file holds the test, or helpers that the test's file imports;
- the test's file imports the module itself, or names it in a command (`bench.report`), or names a file of
  configs/ by its path or as an override (`measure=plan`). Only by name: what a module reaches through others
  is nearly everything;
- it is a case of the file itself, such as a page, or of the variant that the file defines;
- it is a case of any variant, and the file is shared by all: variants/base/, variants/ops/, ….

What no rule maps to a test (the Makefile) is left to the default tests.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from tiers import variants_of

ROOT = Path(__file__).resolve().parents[1]
TESTS, CONFIGS, SHARED = "tests", "configs", "variants"
"""Folders of the tests, of files that an override chooses, and of code that all variants share."""
ONE_VARIANT_EACH, ALL_VARIANTS = "variants/attention", "tests/variants"
"""The folder within SHARED with a file for each variant, and that of tests with cases for every variant."""
BASE = "CI_BASE"
"""Environment variable: the commit that a change is compared with."""
MAIN = ("origin/main", "main")
RECENT_SECONDS = 24 * 3600
"""On main itself, the change is what this long before its last commit was not there."""
EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"


def git(*arguments: str) -> str:
    """What git prints; raises pytest.UsageError where it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise pytest.UsageError(f"--touched: git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def base() -> str:
    """The commit or tree that the change began from.

    $CI_BASE, or on a branch the commit at which it left main, or on main the last commit that is a day older
    than HEAD. A younger history began from nothing.
    """
    if given := os.environ.get(BASE):
        return git("rev-parse", "--verify", f"{given}^{{commit}}")
    head = git("rev-parse", "HEAD")
    known = git("for-each-ref", "--format=%(refname:short)", "refs/heads/main", "refs/remotes/origin/main")
    for main in MAIN:
        if main in known.splitlines():
            left = git("merge-base", main, "HEAD")
            if left != head:
                return left
    before = int(git("show", "-s", "--format=%ct", head)) - RECENT_SECONDS
    return git("rev-list", "-1", f"--before={before}", head) or EMPTY_TREE


def changed() -> list[str]:
    """Paths of the files that differ from the base, with those that git does not know yet."""
    files = git("diff", "--name-only", "--no-renames", base()).splitlines()
    return sorted({*files, *git("ls-files", "--others", "--exclude-standard").splitlines()})


@cache
def names_in(path: Path) -> frozenset[str]:
    """Modules that a test file imports or names, files of configs/ that it names, and its overrides."""
    text = path.read_text()
    found = set(re.findall(r"\b(?:bench|variants)(?:\.\w+)+", text))
    found |= set(re.findall(rf"\b{CONFIGS}/[\w/.-]+\w", text))
    found |= set(re.findall(r"\b\w+=\w+", text))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def names_of(file: str) -> set[str]:
    """What a test calls a file: its module, its path, or the override that chooses it."""
    path = Path(file)
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    if path.suffix == ".py":
        return {path.stem} if path.parts[0] == TESTS else {module}
    return {file, f"{path.parent.name}={path.stem}"} if path.parts[0] == CONFIGS else set()


def of_one_variant(file: str) -> str | None:
    """The variant that a file defines."""
    path = Path(file)
    return path.stem if path.parent == Path(ONE_VARIANT_EACH) and path.stem != "__init__" else None


class Touched:
    """The files of a change, held against tests."""

    def __init__(self, files: list[str]) -> None:
        self.files = {*files}
        self.paths = {ROOT / file for file in files}
        self.variants = {name for file in files if (name := of_one_variant(file))}
        self.names = {name for file in files for name in names_of(file)}
        self.shared = any(f.startswith(f"{SHARED}/") and not of_one_variant(f) for f in files)

    def rank(self, path: Path, arguments: list[object]) -> int | None:
        """How closely a test with these arguments is about the change, 0 the closest; None: not at all."""
        relative = path.relative_to(ROOT)
        if relative.as_posix() in self.files:
            return 0
        if any(isinstance(one, Path) and one in self.paths for one in arguments):
            return 1
        about = variants_of(arguments)
        if about & self.variants or path.stem.removeprefix("test_") in self.variants:
            return 1
        if names_in(path) & self.names:
            return 2
        return 3 if self.shared and about and relative.parent == Path(ALL_VARIANTS) else None


def select(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """(tests about the change, the closest first; the others)."""
    touched = Touched(changed())
    ranked: list[tuple[int, pytest.Item]] = []
    others = []
    for item in items:
        call = getattr(item, "callspec", None)
        rank = touched.rank(item.path, [*call.params.values()] if call else [])
        if rank is None:
            others.append(item)
        else:
            ranked.append((rank, item))
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])], others
