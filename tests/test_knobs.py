"""Every field of every `Config`, of variants and of tasks, refuses values of another type in one line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra import compose, initialize_config_dir

import variants
from bench import tasks
from bench.cli import errors
from bench.config.parse import parse
from variants.knobs import Declaration, Knob, Knobs, decisive, knob, knobs_of

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
    bool: [True],
    int: [3],
    float: [3, 2.5],
    str: ["3"],
    str | None: [None, "3"],
    int | None: [None, 3],
    float | None: [None, 3, 2.5],
    Literal["uint16", "uint32"] | None: [None],
    int | Literal["all"]: [3],
    tuple[int, ...]: [(), (3,)],
    tuple[str, ...]: [(), ("3",)],
}
"""Type of a knob → those of `VALUES` that are of it; their size may still be refused. No word of a choice is
among them."""
TYPED = {
    bool: "3",
    int: "2.5",
    float: "abc",
    str: "[a]",
    str | None: "[a]",
    int | None: "2.5",
    float | None: "abc",
    int | Literal["all"]: "2.5",
    tuple[int, ...]: "[2.5]",
    tuple[str, ...]: "[[a]]",
}
"""Type of a knob → what is not of it on a command line; for a choice of words a list."""


def every_knob() -> list[Any]:
    return [
        pytest.param(label, knob, id=f"{label}.{knob.name}")
        for label, config in CONFIGS.items()
        for knob in knobs_of(config).values()
    ]


def shown(value: Any) -> str:
    """As a user writes it."""
    if value is None or value is True:
        return "null" if value is None else "true"
    return repr(list(value) if isinstance(value, tuple) else value)


def assert_refused(config: type[Knobs], knob: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{knob}={re.escape(shown(value))}: allowed is \S") as refusal:
        config(**{knob: value})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("label", "knob"), every_knob())
def test_a_value_of_another_type_is_refused(label: str, knob: Knob) -> None:
    suit = [(type(value), value) for value in SUITS.get(knob.hint, [])]
    assert suit or knob.words
    others = [value for value in VALUES if (type(value), value) not in suit]
    assert len(others) + len(suit) == len(VALUES)
    for value in others:
        assert_refused(CONFIGS[label], knob.name, value)


@pytest.mark.parametrize(("label", "knob"), every_knob())
def test_a_command_line_refuses_it_too(label: str, knob: Knob) -> None:
    group = label.partition("=")[0]
    given = [label, f"{group}.{knob.name}={TYPED.get(knob.hint, '[a]')}"]
    folder = Path(__file__).parents[1] / "configs"
    with initialize_config_dir(str(folder), version_base="1.3"), pytest.raises(errors.KINDS) as caught:
        parse(compose("config", overrides=["device=cpu", *given]))
    message = errors.explain(caught.value, given, folder)
    assert re.match(rf"{group}\.{knob.name}\b", message)
    assert "\n" not in message


@pytest.mark.parametrize(("label", "knob"), every_knob())
def test_a_default_is_allowed_and_the_bounds_are_where_they_are_said_to_be(label: str, knob: Knob) -> None:
    assert knob.reject(knob.default) is None
    declaration, step = knob.declaration, knob.declaration.multiple or 1
    for bound, towards, is_allowed in (("least", -1, True), ("most", 1, True), ("above", -1, False)):
        if (at := getattr(declaration, bound)) is None:
            continue
        assert declaration.allows(at) == is_allowed
        assert not declaration.allows(float("nan"))
        past = at + towards * step
        assert_refused(CONFIGS[label], knob.name, (past,) if knob.is_list else past)
        assert f"{at:,}" in str(knob.reject((past,) if knob.is_list else past))
    if declaration.below is not None:
        assert_refused(CONFIGS[label], knob.name, declaration.below)


def test_words_that_are_near_are_named() -> None:
    with pytest.raises(ValueError, match=r"impl='spda': allowed is sdpa, naive, .*; did you mean sdpa\?$"):
        CONFIGS["variant=dense"](impl="spda")
    with pytest.raises(ValueError, match=r"^windw: unknown knob; allowed are .*; did you mean window\?$"):
        CONFIGS["variant=longformer"].of({"windw": 3})


BOUNDS = {
    "1 or more tokens": {"least": 1, "unit": "tokens"},
    "0 to 1": {"least": 0, "most": 1},
    "0 up to below 1": {"least": 0, "below": 1},
    "more than 0, up to 1": {"above": 0, "most": 1},
    "more than 0 seconds": {"above": 0, "unit": "seconds"},
    "4 or more tokens, a multiple of 4": {"least": 4, "multiple": 4, "unit": "tokens"},
    "a multiple of 2": {"multiple": 2},
    "up to 65,536": {"most": 65_536},
    "": {"unit": "tokens"},
}


@pytest.mark.parametrize("words", BOUNDS)
def test_bounds_in_words(words: str) -> None:
    assert Declaration(**BOUNDS[words]).bounds() == words


READ: dict[str, tuple[Any, Any, Any]] = {
    "a number as text": (int, "12", 12),
    "a number with an exponent": (float, "1e-3", 1e-3),
    "an integer for a number stays one": (float, 3, 3),
    "text that reads as a number": (str, 12, "12"),
    "text or null": (str | None, None, None),
    "the only entry of a list": (tuple[int, ...], 3, (3,)),
    "numbers as text in a list": (tuple[int, ...], [3, "4"], (3, 4)),
    "null in place of a list": (tuple[int, ...] | None, None, None),
    "true as text": (bool, "true", True),
    "a word or a number": (int | Literal["fit"], "fit", "fit"),
    "a number or a word": (int | Literal["fit"], "3", 3),
    "what does not fit": (int, "many", "many"),
}


@pytest.mark.parametrize("case", READ)
def test_a_value_is_read_as_its_knob_takes_it(case: str) -> None:
    hint, value, read = READ[case]
    found = Knob("x", hint, None, Declaration()).read(value)
    assert (type(found), found) == (type(read), read)


def test_what_decides_no_figure_and_what_is_younger_is_not_hashed() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(Knobs):
        plain: int = 1
        free: int = knob(1, decides=False)
        later: float = knob(1, younger=True)

    assert decisive(Own, Own().as_dict()) == {"plain": 1}
    assert decisive(Own, Own(free=2, later=2).as_dict()) == {"plain": 1, "later": 2}
    assert decisive(Own, {"later": 1.0, "other": 3}) == {"other": 3}


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

    for name, value, allowed in (
        ("sizes", ("a",), "a list of numbers"),
        ("share", "0.5", "null or a number"),
        ("share", 2, "below 1"),
        ("names", (1,), "a list of words"),
        ("flags", (1,), "null or a list of booleans"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}={re.escape(shown(value))}: allowed is {allowed}$"):
            Own(**{name: value})
    assert Own.of({"sizes": [1, 2.5], "flags": [True]}).as_dict()["sizes"] == [1, 2.5]
    with pytest.raises(TypeError, match="no_such"):
        Own(no_such=1)
