"""Every field of every `Config`, of variants and of tasks, refuses values of another type in one line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

import variants
from bench import tasks
from bench.cli import errors
from bench.config.parse import parse
from variants.knobs import Knobs

CONFIGS = {
    **{f"variant={name}": variants.load(name).Config for name in variants.names()},
    **{f"data={name}": tasks.load(name).Config for name in tasks.names()},
}
VALUES: list[Any] = [
    None,
    True,
    3,
    2.5,
    "3",
    b"3",
    (),
    (3,),
    (2.5,),
    (True,),
    ("3",),
    (None,),
    [3],
    {3},
    {},
    3j,
]
SUITS = {
    "bool": [True],
    "int": [3],
    "float": [3, 2.5],
    "str": ["3"],
    "int | None": [None, 3],
    "tuple[int, ...]": [(), (3,)],
}
"""Type of a field → those of `VALUES` that are of it; their size may still be refused."""
YAML = {
    "bool": "3",
    "int": "2.5",
    "float": "abc",
    "str": "[a]",
    "int | None": "2.5",
    "tuple[int, ...]": "[2.5]",
}
"""Type of a field → what is not of it on a command line."""


def fields() -> list[Any]:
    return [
        pytest.param(label, field, id=f"{label}.{field.name}")
        for label, config in CONFIGS.items()
        for field in dataclasses.fields(config)
    ]


def shown(value: Any) -> str:
    """As a user writes it."""
    return repr(list(value) if isinstance(value, tuple) else value)


def assert_refused(config: type[Knobs], knob: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{knob}={re.escape(shown(value))}: allowed is \S") as refusal:
        config(**{knob: value})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("label", "field"), fields())
def test_a_value_of_another_type_is_refused(label: str, field: dataclasses.Field[Any]) -> None:
    suit = [(type(value), value) for value in SUITS[str(field.type)]]
    others = [value for value in VALUES if (type(value), value) not in suit]
    assert len(others) + len(suit) == len(VALUES)
    for value in others:
        assert_refused(CONFIGS[label], field.name, value)


@pytest.mark.parametrize(("label", "field"), fields())
def test_a_command_line_refuses_it_too(label: str, field: dataclasses.Field[Any]) -> None:
    group = label.partition("=")[0]
    given = [label, f"{group}.{field.name}={YAML[str(field.type)]}"]
    folder = Path(__file__).parents[1] / "configs"
    with initialize_config_dir(str(folder), version_base="1.3"), pytest.raises(errors.KINDS) as caught:
        parse(compose("config", overrides=["device=cpu", *given]))
    message = errors.explain(caught.value, given, folder)
    assert re.match(rf"{group}\.{field.name}\b", message)
    assert "\n" not in message


def test_a_subclass_is_checked_without_a_word_of_its_own() -> None:
    """A plug-in's config need not call anything; each type that a field may have is described."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(Knobs):
        sizes: tuple[float, ...] = ()
        share: float | None = None
        names: tuple[str, ...] = ("a",)
        flags: tuple[bool, ...] | None = None

        def __post_init__(self) -> None:
            self.require("share", self.share is None or self.share < 1, "below 1")

    for knob, value, allowed in (
        ("sizes", ("a",), "a list of numbers"),
        ("share", "0.5", "null or a number"),
        ("share", 2, "below 1"),
        ("names", (1,), "a list of words"),
        ("flags", (1,), "null or a list of booleans"),
    ):
        with pytest.raises(ValueError, match=rf"^{knob}={re.escape(shown(value))}: allowed is {allowed}$"):
            Own(**{knob: value})
    assert Own.of({"sizes": [1, 2.5], "flags": [True]}).as_dict()["sizes"] == [1, 2.5]
    with pytest.raises(TypeError, match="no_such"):
        Own(no_such=1)
