"""Knobs are read from the sources of variants and tasks, and are those that a Python user meets."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import variants
from bench import tasks
from variants.base import Caps, Complexity, DepthSchedule, Info, SequenceMixer
from variants.declarations import Unreadable, attribute, declared, first_sentence, overrides
from variants.depth.stack import Stack
from variants.knobs import Knobs, knobs_of
from variants.slots import SLOTS

MODULES = {
    **{variants.module_of(name): variants.load(name) for name in variants.names()},
    **{f"bench.tasks.{name}": tasks.load(name) for name in (*tasks.names(), tasks.TEXT)},
    **{slot.module_of(name): slot.load(name) for slot in SLOTS.values() for name in slot.names()},
}


@pytest.mark.parametrize("module", MODULES)
def test_what_is_read_is_what_is_defined(module: str) -> None:
    config = MODULES[module].Config
    read = declared(module)
    assert list(knobs_of(read.config).values()) == list(knobs_of(config).values())
    assert read.config().as_dict() == config().as_dict()
    assert read.meanings.keys() == knobs_of(config).keys()


@pytest.mark.parametrize("module", MODULES)
def test_every_knob_has_a_meaning_in_one_line(module: str) -> None:
    for knob, meaning in declared(module).meanings.items():
        line = first_sentence(meaning)
        assert 10 < len(line) <= 100, f"{knob}: {line}"
        assert meaning[0].isupper()


@pytest.mark.parametrize("name", variants.mixers())
def test_plain_attributes_are_read_too(name: str) -> None:
    variant, module = variants.load_mixer(name), variants.module_of(name)
    read = attribute(module, None, "info")
    caps, complexity = Caps(**read.pop("caps")), Complexity(**read.pop("complexity"))
    assert Info(**read, caps=caps, complexity=complexity) == variant.info
    assert attribute(module, None, "no_such") is None


@pytest.mark.parametrize("name", variants.names())
def test_an_outline_agrees_with_the_variant(name: str) -> None:
    variant, outline = variants.load(name), variants.outline(name)
    has_checks = "__post_init__" in {key for owner in variant.Config.__mro__ for key in vars(owner)}
    methods = ("info_for", "mixers", "members")
    by_config = any(getattr(variant, m).__func__ is not getattr(SequenceMixer, m).__func__ for m in methods)
    if name not in variants.mixers() or has_checks or by_config:
        assert outline is None
        return
    assert outline is not None
    assert knobs_of(outline.config) == knobs_of(variant.Config)
    config = variant.Config()
    assert outline.causal == variant.info_for(config).caps.causal
    assert len(variant.mixers(config)) == 1
    assert variant.members(config) == ()


def test_a_stack_allows_what_needs_no_check() -> None:
    """Therefore a cell with an outline is checked without a `ModelSpec`."""
    assert Stack.unsupported.__func__ is DepthSchedule.unsupported.__func__  # type: ignore[attr-defined]


SHARED = """
from dataclasses import dataclass
import torch.nn as nn
from variants.knobs import Knobs, knob

MOST = 9


@dataclass(frozen=True, kw_only=True)
class Base(Knobs):
    size: int = knob(3, most=MOST)
    \"\"\"How large. And more.\"\"\"


class Layer(nn.Module):
    Config = Base
"""
OWN = """
from typing import ClassVar, Literal
from {package}.shared import Base, Layer
{extra}

class Own(Base):
    TABLE: ClassVar[int] = compute()
    {field}


class Mine(Layer):
    Config = Own
    info = Info(paper="A", caps=Caps(causal=True), sizes=[1, 2])
    computed = Info(paper=title())
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An importable package whose modules must not be imported."""
    folder = tmp_path / f"declared_{abs(hash(request.node.name))}"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "shared.py").write_text(SHARED)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return folder


def own(package: Path, field: str, extra: str = "") -> str:
    text = OWN.format(package=package.name, field=field, extra=extra)
    (package / "own.py").write_text(text)
    return f"{package.name}.own"


def test_bases_and_constants_are_followed_through_imports(package: Path) -> None:
    read = declared(own(package, 'kind: Literal["a", "b"] | None = None'))
    assert [*knobs_of(read.config)] == ["size", "kind"]
    assert knobs_of(read.config)["size"].allowed() == "an integer, up to 9"
    assert knobs_of(read.config)["kind"].allowed() == "null or a or b"
    assert read.meanings == {"size": "How large. And more."}
    assert first_sentence(read.meanings["size"]) == "How large"
    with pytest.raises(ValueError, match="size=10: allowed is up to 9"):
        read.config(size=10)


def test_the_keywords_of_calls_are_read_and_what_they_compute_is_not(package: Path) -> None:
    module = own(package, "n: int = 1")
    assert attribute(module, None, "info") == {"paper": "A", "caps": {"causal": True}, "sizes": [1, 2]}
    with pytest.raises(Unreadable, match=r"title\(\) is not a literal"):
        attribute(module, "Mine", "computed")


CHECKED = {
    "fields": ("n: int = 1", True),
    "a property": ("double = property(lambda self: 2 * self.size)", True),
    "a method": ("def twice(self): return 2 * self.size", True),
    "a check": ("def __post_init__(self): self.require('size', self.size != 2, 'not 2')", False),
    "another constructor": ("of = classmethod(lambda cls, values: cls())", False),
    "a conditional check": ("if True:\n        def __post_init__(self): pass", False),
}


@pytest.mark.parametrize("case", CHECKED)
def test_a_class_with_checks_of_its_own_is_not_complete(case: str, package: Path) -> None:
    field, complete = CHECKED[case]
    assert declared(own(package, field)).complete == complete


@pytest.mark.parametrize(
    ("body", "overridden"),
    [("pass", False), ("def info_for(cls, config): ...", True), ("info_for = other", True)],
)
def test_an_override_is_found_in_every_class_down_from_the_base(
    body: str, overridden: bool, package: Path
) -> None:
    (package / "own.py").write_text(
        f"from {package.name}.shared import Layer\n"
        f"class Between(Layer):\n    {body}\n"
        "class Mine(Between):\n    pass\n"
    )
    module, base = f"{package.name}.own", (f"{package.name}.shared", "Layer")
    assert overrides(module, "Mine", base, {"info_for"}) == overridden
    with pytest.raises(Unreadable, match=r"the base nn\.Module"):
        overrides(module, "Mine", (module, "Other"), {"mixers"})


def test_a_class_without_the_base_is_named(package: Path) -> None:
    with pytest.raises(Unreadable, match=r"does not inherit from a\.B"):
        overrides(own(package, "n: int = 1"), "Own", ("a", "B"), {"mixers"})


UNREADABLE = {
    "a computed default": ("n: int = len('abc')", "", r"len\('abc'\) is not a literal"),
    "no default": ("n: int", "", "has no default"),
    "a type of its own": ("n: Mine = 3", "", "the type Mine"),
    "code in a type": ("n: print('x') = 3", "", "the type print"),
    "a knob without sense": ("n: int = knob(1, lest=2)", "", "lest"),
    "a syntax error": ("n: int = (", "", "cannot be read"),
    "another class with a Config": ("n: int = 1", "class Other:\n    Config = Base\n", "2 of its classes"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_not_in_literals_is_named(case: str, package: Path) -> None:
    field, extra, says = UNREADABLE[case]
    with pytest.raises(Unreadable, match=says):
        declared(own(package, field, extra))


@pytest.mark.parametrize("module", ["no_such_package.module", "variants.attention.no_such", "sys"])
def test_what_is_not_there_is_named(module: str) -> None:
    with pytest.raises(Unreadable, match=module):
        declared(module)


def test_reading_imports_nothing(tmp_path: Path) -> None:
    code = """
import sys
from variants.declarations import declared
for module in ("variants.attention.sparse_fixed", "bench.tasks.listops"):
    declared(module)
loaded = {"torch", "numpy", "bench", "variants.attention.sparse_fixed"} & {*sys.modules}
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_class_that_was_read_is_one_of_knobs() -> None:
    config = declared("variants.attention.dense").config
    assert issubclass(config, Knobs)
    assert dataclasses.is_dataclass(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().impl = "naive"  # type: ignore[attr-defined]
