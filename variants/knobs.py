"""Knobs: values that a user may set, each declared once as a field of a frozen dataclass.

    window: int = knob(512, unit="tokens", least=1)
    \"\"\"Tokens that a query reads on each side, itself included.\"\"\"

The annotation is the type, `Literal` for a choice of words. `knob` gives the default, the bounds, the unit
and how the knob counts in the hash of a cell; the first sentence of the string below it is its meaning.
Checks, error messages, help and the configuration's defaults follow from it (see `variants.declarations`).

Imports no torch.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

_ONE = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_SEVERAL = {bool: "booleans", int: "integers", float: "numbers", str: "words"}


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What `knob` states about a field. Bounds of a list hold for each of its entries."""

    least: float | None = None
    """Smallest allowed number."""
    most: float | None = None
    """Largest allowed number."""
    above: float | None = None
    """Numbers must be larger than this."""
    below: float | None = None
    """Numbers must be smaller than this."""
    multiple: int | None = None
    """Numbers must be a multiple of this."""
    entries: int = 0
    """Fewest entries of a list."""
    unit: str = ""
    """What a number counts, in the plural."""
    decides: bool = True
    """Whether the knob can change a figure. If not, it is not part of a cell's hash."""
    younger: bool = False
    """Whether cells were hashed before the knob existed. Its default is then not part of a cell's hash."""

    def holds(self, number: float) -> bool:
        """Whether a number lies within the bounds; NaN lies within none."""
        return (
            (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
            and (self.multiple is None or number % self.multiple == 0)
        )

    def bounds(self) -> str:
        """The bounds in words, such as "1 or more tokens" or "0 up to below 1"; "" if there are none."""
        low = f"{self.least:,}" if self.least is not None else ""
        if self.above is not None:
            low = f"more than {self.above:,},"
        if self.most is not None:
            words = f"{low} {'to' if self.least is not None else 'up to'} {self.most:,}".strip()
        elif self.below is not None:
            words = f"{low} up to below {self.below:,}".strip()
        else:
            words = f"{low} or more" if self.least is not None else low.removesuffix(",")
        words = f"{words} {self.unit}".strip() if words else ""
        if self.multiple is not None:
            words = f"{words}, a multiple of {self.multiple}".removeprefix(", ")
        return words


PLAIN = Declaration()
"""Of a field that is declared without `knob`."""


def knob(
    default: Any,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    multiple: int | None = None,
    entries: int = 0,
    unit: str = "",
    decides: bool = True,
    younger: bool = False,
) -> Any:
    """A field of a subclass of `Knobs`: its default and what `Declaration` explains."""
    declaration = Declaration(
        least=least,
        most=most,
        above=above,
        below=below,
        multiple=multiple,
        entries=entries,
        unit=unit,
        decides=decides,
        younger=younger,
    )
    return field(default=default, metadata={"knob": declaration})


@dataclass(frozen=True)
class Knob:
    """One knob of a class: its name, type, default and declaration."""

    name: str
    hint: Any
    default: Any
    declaration: Declaration

    def refused(self, value: Any) -> str | None:
        """What is allowed instead of a value, or None if the value is allowed."""
        if not _is_a(value, self.hint):
            near = difflib.get_close_matches(value, self.words, n=1) if isinstance(value, str) else []
            return self.allowed() + (f"; did you mean {near[0]}?" if near else "")
        numbers = value if isinstance(value, tuple) else (value,)
        inside = all(self.declaration.holds(n) for n in numbers if type(n) in (int, float))
        if isinstance(value, tuple) and len(value) < self.declaration.entries:
            inside = False
        if inside:
            return None
        return self.allowed() if self.is_list else self._with_null(self.declaration.bounds())

    def allowed(self) -> str:
        """What is allowed, in words: "null or an integer, 1 or more tokens"."""
        bounds, least = self.declaration.bounds(), self.declaration.entries
        kinds = [
            f"a list of {f'{least} or more ' if least else ''}{_SEVERAL[get_args(kind)[0]]}"
            if get_origin(kind) is tuple
            else _ONE[kind]
            for kind in self._kinds()
            if get_origin(kind) is not Literal
        ]
        if kinds and bounds:
            kinds[-1] += f", each {bounds}" if self.is_list else f", {bounds}"
        listed = [*kinds, *self.words]
        words = " or ".join(filter(None, [", ".join(listed[:-1]), listed[-1]]))
        return self._with_null(words)

    @property
    def words(self) -> list[str]:
        """The words that its `Literal` allows."""
        return [str(word) for kind in self._kinds() if get_origin(kind) is Literal for word in get_args(kind)]

    @property
    def is_list(self) -> bool:
        """Whether its values are tuples."""
        return any(get_origin(kind) is tuple for kind in self._kinds())

    @property
    def is_text(self) -> bool:
        """Whether all its values are words, so that what reads as a number is one too."""
        return all(kind is str or get_origin(kind) is Literal for kind in self._kinds())

    def read(self, value: Any) -> Any:
        """A value as a configuration holds it → as the class takes it; what does not fit stays as it is.

        A list becomes a tuple, and so does the only entry of a list. Text stays text for a knob of words, and
        a number written as text becomes a number for any other.
        """
        if self.is_list and value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            (kind,) = (kind for kind in self._kinds() if get_origin(kind) is tuple)
            entry = Knob(self.name, get_args(kind)[0], None, PLAIN)
            return tuple(entry.read(one) for one in values)
        if self.is_text:
            return str(value) if type(value) in (int, float) else value
        if isinstance(value, str) and not _is_a(value, self.hint):
            for kind in self._kinds():
                if kind is bool and value.lower() in ("true", "false"):
                    return value.lower() == "true"
                if kind in (int, float):
                    return _number(value)
        return value

    def _kinds(self) -> list[Any]:
        """The types that its annotation joins, without None."""
        joined = get_origin(self.hint) in (Union, types.UnionType)
        return [kind for kind in (get_args(self.hint) if joined else [self.hint]) if kind is not type(None)]

    def _with_null(self, words: str) -> str:
        return f"null or {words}" if _is_a(None, self.hint) else words


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


def _number(text: str) -> int | float | str:
    """The number that a text spells, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _shown(value: Any) -> str:
    """A value as a user writes it: a tuple as a list, null for None."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(list(value) if isinstance(value, tuple) else value)


def knobs_of(owner: type[Knobs]) -> dict[str, Knob]:
    """Name → knob, of a subclass of `Knobs`, in the order of its fields."""
    return _knobs_of(owner)  # type: ignore[arg-type]  # mypy does not see that a class is hashable


@cache
def _knobs_of(owner: Any) -> dict[str, Knob]:
    hints = get_type_hints(owner)
    return {
        f.name: Knob(f.name, hints[f.name], f.default, f.metadata.get("knob", PLAIN)) for f in fields(owner)
    }


def decisive(owner: type[Knobs], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a class's values that are part of a cell's hash; a name that is no knob of the class is."""
    known = knobs_of(owner)
    kept = {}
    for name, value in values.items():
        plain = known[name].declaration if name in known else PLAIN
        if plain.decides and not (plain.younger and known[name].read(value) == known[name].default):
            kept[name] = value
    return kept


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Values that a user may set, checked when they are made.

    The type and the bounds of each value are checked here, for every subclass; what relates two knobs is for
    `__post_init__` of the subclass, by `require`. Fields are bool, int, float, str or a Literal of words, a
    union of these or with None, or a tuple of one of the first four (`tuple[int, ...]`). A float field takes
    an integer too.

    Raises ValueError naming the knob, its value and what is allowed.
    """

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Check the values before `__post_init__` compares them with each other."""
        known = knobs_of(cls)
        for name, value in values.items():
            if name in known and (allowed := known[name].refused(value)):  # other names are for __init__
                raise ValueError(f"{name}={_shown(value)}: allowed is {allowed}")
        return super().__new__(cls)

    def require(self, name: str, ok: bool, allowed: str) -> None:
        """Refuse a knob's value in one line."""
        if not ok:
            raise ValueError(f"{name}={_shown(getattr(self, name))}: allowed is {allowed}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The values of a configuration, in plain types: what `as_dict` gave, or some of it.

        Raises ValueError for a name that is no knob too, with the nearest that is.
        """
        known = knobs_of(cls)
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"{name}: unknown knob; allowed are {', '.join(known)}{hint}")
        return cls(**{name: known[name].read(value) for name, value in values.items()})

    def as_dict(self) -> dict[str, Any]:
        """Name → value, in plain types that JSON can hold."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
