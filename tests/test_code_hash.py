"""The code that a record depends on: all that its figures depend on, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import variants
from bench.run import code_hash
from bench.run.code_hash import closure, code_sha256

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def forgotten() -> None:
    forget()


def forget() -> None:
    """Every file is read anew."""
    code_hash.code_sha256.cache_clear()
    code_hash._file_of.cache_clear()


# --- in a copy of the project -----------------------------------------------------------------------

CHANGE_EACH_FILE = """
import importlib, json
from pathlib import Path
import bench
from bench.run.code_hash import code_sha256
root = Path.cwd()
assert Path(bench.__file__).is_relative_to(root), "not the copy"

def hashes():
    code_sha256.cache_clear()  # every file is read anew; which file a module is stays the same
    return [code_sha256(name) for name in ("dense", "chunked", "longformer")]

before, changed = hashes(), {}
files = sorted([*root.glob("bench/**/*.py"), *root.glob("variants/**/*.py")])
for file in files:
    file.write_bytes(file.read_bytes() + b"\\n# a comment\\n'''A docstring.'''\\n")
assert hashes() == before, "a comment and a docstring change nothing"
for file in files:
    content = file.read_bytes()
    file.write_bytes(content + b"\\nchanged = 1\\n")
    changed[str(file.relative_to(root))] = [a != b for a, b in zip(before, hashes())]
    file.write_bytes(content)
assert hashes() == before
print(json.dumps(changed))
"""


def copy_of_the_project(folder: Path) -> Path:
    for name in ("bench", "variants", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(__file__, folder / "tests_of_code_hash.py")
    return folder


def python(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bool]]:
    """File → whether a statement more in it changes the hash of dense, chunked, longformer."""
    folder = copy_of_the_project(tmp_path_factory.mktemp("copy"))
    answer: dict[str, list[bool]] = json.loads(python(CHANGE_EACH_FILE, folder))
    return answer


@pytest.mark.slow
def test_all_that_measures_a_cell_changes_the_hash(changed: dict[str, list[bool]]) -> None:
    """Whatever a process that has just measured cells has imported of ours, but for what is named."""
    imported = python(
        "import sys, bench.run.isolate, bench.run.cell\n"
        "from bench import corpora, tasks\n"
        "[tasks.load(name) for name in (*tasks.names(), 'text')]\n"
        "import json\n"
        "ours = [m for name, m in sys.modules.items() if name.partition('.')[0] in ('bench', 'variants')]\n"
        "print(json.dumps([module.__file__ for module in ours]))",
        ROOT,
    )
    files = {str(Path(file).relative_to(ROOT)) for file in json.loads(imported)}
    assert len(files) > 30
    passed_over = {
        file for file in files if code_hash._is_excluded(file.removesuffix(".py").replace("/", "."))
    }
    passed_over |= {"bench/records/__init__.py", "bench/trackers/__init__.py"}
    assert not [file for file in files - passed_over if changed[file] != [True, True, True]]
    assert "bench/corpora/plays.py" not in files, "found by name when it is asked for"
    assert changed["bench/corpora/plays.py"] == [True, True, True]


def test_code_that_runs_stores_shows_or_prints_does_not(changed: dict[str, list[bool]]) -> None:
    others = ["bench/__main__.py", "bench/run/progress.py", "bench/run/sweep.py", "variants/__main__.py"]
    others += [
        "bench/run/code_hash.py",
        "bench/config/parse.py",
        "bench/records/store.py",
        "bench/corpora/__main__.py",
    ]
    others += [file for file in changed if file.startswith(("bench/report/", "bench/claims/"))]
    assert len(others) > 20
    assert not [file for file in others if any(changed[file])]


def test_a_variants_hash_is_of_its_own_code_and_what_it_builds_on(changed: dict[str, list[bool]]) -> None:
    assert changed["variants/attention/dense.py"] == [True, True, False], "chunked is a kind of dense"
    assert changed["variants/attention/chunked.py"] == [False, True, False]
    assert changed["variants/attention/longformer.py"] == [False, False, True]


def test_a_module_that_moves_into_a_package_still_counts(tmp_path: Path) -> None:
    """What a hash over a list of folders misses without a word."""
    folder = copy_of_the_project(tmp_path)
    (folder / "bench/networks").mkdir()
    (folder / "bench/networks/__init__.py").touch()
    (folder / "bench/model/language_model.py").rename(folder / "bench/networks/model.py")
    for file in folder.glob("bench/**/*.py"):
        file.write_text(file.read_text().replace("bench.model.language_model ", "bench.networks.model "))
    print_hash = "from bench.run.code_hash import code_sha256; print(code_sha256('dense'))"
    before = python(print_hash, folder)
    with (folder / "bench/networks/model.py").open("a") as file_:
        file_.write("changed = 1\n")
    assert python(print_hash, folder) != before
    assert "networks" in python("import bench.run.cell, sys; print(*sys.modules)", folder)


@pytest.mark.parametrize("name", variants.names())
def test_a_hash_is_short_and_repeats(name: str) -> None:
    found = code_sha256(name)
    assert len(found) == 16
    assert int(found, 16) >= 0
    forget()
    assert code_sha256(name) == found


def test_every_variant_has_a_hash_of_its_own() -> None:
    assert len({code_sha256(name) for name in variants.names()}) == len(variants.names())


def test_a_hash_loads_no_torch() -> None:
    code = "from bench.run.code_hash import code_sha256; code_sha256('reformer')"
    code += "; import sys; print(*sys.modules)"
    assert "torch" not in python(code, ROOT).split()


def test_what_is_excluded_would_count_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exclusion that excludes nothing is one too many."""
    excluded = code_hash.NOT_FIGURES
    monkeypatch.setattr(code_hash, "NOT_FIGURES", ())
    assert {*excluded} <= {*closure([code_hash.ROOT, "variants.attention.dense"])}


# --- over packages of other people --------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that modules are imported from."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write(folder: Path, **files: str) -> None:
    """`a__b="text"` is the file a/b.py."""
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


@pytest.mark.parametrize(
    ("statement", "imports_it"),
    [
        ("import theirs.helper", True),
        ("import theirs.helper as h", True),
        ("from theirs import helper", True),
        ("from theirs.helper import function", True),
        ("from . import helper", True),
        ("from .helper import function", True),
        ("from .deep import more", True),  # which imports it
        ("from theirs import *", False),
        ("def later():\n    from .helper import function", True),
        ("if True:\n    import theirs.helper", True),
        ("try:\n    import theirs.helper\nexcept ImportError: pass", True),
        ("if TYPE_CHECKING:\n    import theirs.helper", False),
        ("if typing.TYPE_CHECKING:\n    pass\nelse:\n    import theirs.helper", True),
        ("from ...too_far import helper", False),
        ("import json, torch", False),
        ("helper = 'theirs.helper'", False),
    ],
)
def test_import_statements_are_followed(statement: str, imports_it: bool, site: Path) -> None:
    write(site, theirs__start=statement, theirs__helper="function = 1")
    write(site, theirs__deep__more="from .. import helper")
    (site / "theirs/__init__.py").touch()
    (site / "theirs/deep/__init__.py").touch()
    found = closure(["theirs.start"])
    assert {"theirs", "theirs.start"} <= {*found}
    assert ("theirs.helper" in found) is imports_it


def test_a_namespace_package_and_a_single_module_are_found(site: Path) -> None:
    write(site, spaced__inner__start="from . import helper", spaced__inner__helper="")
    write(site, lonely="x = 1")
    assert {*closure(["spaced.inner.start"])} == {"spaced.inner.start", "spaced.inner.helper"}
    assert {*closure(["lonely"])} == {"lonely"}
    assert {*closure(["missing.module", "lonely.nothing"])} == {"lonely"}


BASE = '''
"""A module."""
import math

LIMIT = 3
"""What it is for."""


class Layer:
    """A layer."""

    size: int = 4
    """How large."""

    def forward(self, x):
        """Twice, at least."""
        return f"{x!r:>{4}}" + "text" if x else None
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('"""A module."""', "# nothing", True),
        ('"""Twice, at least."""', '"""Three times."""', True),
        ('        """Twice, at least."""\n', "", True),
        ('"""How large."""', '"""In bytes."""', True),
        ('"""What it is for."""', "", True),
        ("LIMIT = 3", "LIMIT  =  3  # a comment", True),
        ("LIMIT = 3", "LIMIT = (3)", True),
        ('"text"', "'text'", True),
        ("LIMIT = 3", "LIMIT = 3.0", False),
        ("LIMIT = 3", "LIMIT = True", False),
        ("LIMIT = 3", "LIMIT = '3'", False),
        ("LIMIT = 3", "LIMIT = None", False),
        ('"text"', '"Text"', False),
        ('"text"', 'b"text"', False),
        ("{x!r:>{4}}", "{x!s:>{4}}", False),
        ("{x!r:>{4}}", "{x!r:>{5}}", False),
        ("size: int = 4", "size: float = 4", False),
        ("import math", "import cmath", False),
        ("if x else", "if not x else", False),
        ("(self, x)", "(self, x, /)", False),
        ("(self, x)", "(self, *x)", False),
    ],
)
def test_a_hash_is_of_what_a_module_does(old: str, new: str, same: bool) -> None:
    assert BASE.count(old) == 1
    before, after = (code_hash._read(text.encode(), "")[1] for text in (BASE, BASE.replace(old, new)))
    assert (before == after) is same


def test_what_cannot_be_parsed_is_hashed_as_it_is() -> None:
    broken = b"def (:", b"def (: # comment", b"\x00", "x = 'ü'".encode("latin-1")
    assert len({code_hash._read(content, "") for content in broken}) == 4
