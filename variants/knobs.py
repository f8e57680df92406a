"""Knobs: frozen dataclasses of values that a user may set, whose types and ranges are checked.

Imports no torch.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

_ONE = {
    type(None): "null",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a word",
}
_SEVERAL = {bool: "booleans", int: "integers", float: "numbers", str: "words"}


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value has the type that an annotation names. True and False are no integers."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_a(value, choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        entry, _ = get_args(hint)
        return isinstance(value, tuple) and all(_is_a(item, entry) for item in value)
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _described(hint: Any) -> str:
    """What an annotation allows, in words: "null or an integer"."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(sorted(map(_described, get_args(hint)), key=lambda words: words != "null"))
    if get_origin(hint) is tuple:
        return f"a list of {_SEVERAL[get_args(hint)[0]]}"
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    return _ONE[hint]


def unusable_heads(d_model: int, heads: int) -> str | None:
    """Why attention with rotary positions cannot have this width and number of heads, or None."""
    if heads < 1 or d_model % heads:
        near = _divisor(d_model, heads)
        return f"heads={heads}: must divide d_model={d_model}; the nearest that does is {near}"
    if (d_model // heads) % 2:
        return (
            f"heads={heads}: gives heads of {d_model // heads} channels of d_model={d_model}; "
            "rotary positions need an even number"
        )
    return None


def _divisor(number: int, near: int) -> int:
    """The divisor of a number that is nearest to another one; the smaller of two."""
    if near >= number:
        return max(number, 1)
    near = max(near, 1)
    below = next(n for n in range(near, 0, -1) if number % n == 0)
    above = (n for n in range(near + 1, 2 * near - below) if number % n == 0)
    return next(above, below)


def _shown(value: Any) -> str:
    """A value as a user writes it: a tuple as a list."""
    return repr(list(value) if isinstance(value, tuple) else value)


@cache
def _hints(knobs: type[Knobs]) -> dict[str, Any]:
    """Field → its type, of a subclass of `Knobs`."""
    hints = get_type_hints(knobs)
    return {field.name: hints[field.name] for field in fields(knobs)}


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Values that a user may set, checked when they are made.

    The type of each value is checked here, for every subclass; ranges are for `__post_init__` of the
    subclass, by `require`. Fields are bool, int, float, str or a Literal, one of these or None, or a tuple of
    one of the first four (`tuple[int, ...]`). A float field takes an integer too.

    Raises ValueError naming the knob, its value and what is allowed.
    """

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Check types before `__post_init__` compares the values with anything."""
        hints = _hints(cls)  # type: ignore[arg-type]  # mypy does not see that a class is hashable
        for knob, value in values.items():
            if knob in hints and not _is_a(value, hints[knob]):  # other names are for __init__ to refuse
                raise ValueError(f"{knob}={_shown(value)}: allowed is {_described(hints[knob])}")
        return super().__new__(cls)

    def require(self, knob: str, ok: bool, allowed: str) -> None:
        """Refuse a knob's value in one line."""
        if not ok:
            raise ValueError(f"{knob}={_shown(getattr(self, knob))}: allowed is {allowed}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The config with these values, in plain types: what `as_dict` gave, or some of it."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def as_dict(self) -> dict[str, Any]:
        """Knob → value, in plain types that JSON can hold."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
