"""Knobs: settings of a user, each declared once as a field of a frozen dataclass.

    window: int = knob(512, unit="tokens", least=1)
    \"\"\"Tokens that a query reads on each side, itself included.\"\"\"

The annotation is the type; `Literal` is a choice of words. `knob` states the default, the bounds, the unit
and the role of the knob in the hash of a cell. The first sentence of the string below it is its meaning.
Validation, error messages, help and the defaults of the configuration are derived from the declaration (see
`variants.declarations`).

Does not import torch.
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
    """The arguments of `knob` for a field. The bounds of a list apply to each of its entries."""

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
    """Minimum number of entries of a list."""
    unit: str = ""
    """The unit of a number, in the plural."""
    decides: bool = True
    """Whether the knob can change a figure. If not, it is not part of the hash of a cell."""
    younger: bool = False
    """Whether the knob is newer than some hashed cells. If so, its default is not part of the hash."""

    def allows(self, number: float) -> bool:
        """Whether a number is within the bounds. NaN is not."""
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
"""The declaration of a field without `knob`."""


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
    """A field of a subclass of `Knobs`, with its default; see `Declaration` for the other arguments."""
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

    def reject(self, value: Any) -> str | None:
        """The description of the allowed values, or None if `value` is allowed."""
        if not _is_a(value, self.hint):
            similar = difflib.get_close_matches(value, self.words, n=1) if isinstance(value, str) else []
            return self.allowed() + (f"; did you mean {similar[0]}?" if similar else "")
        numbers = value if isinstance(value, tuple) else (value,)
        inside = all(self.declaration.allows(n) for n in numbers if type(n) in (int, float))
        if isinstance(value, tuple) and len(value) < self.declaration.entries:
            inside = False
        if inside:
            return None
        return self.allowed() if self.is_list else self._with_null(self.declaration.bounds())

    def allowed(self) -> str:
        """The allowed values in words, such as "null or an integer, 1 or more tokens"."""
        bounds, entries = self.declaration.bounds(), self.declaration.entries
        types_in_words = [
            f"a list of {f'{entries} or more ' if entries else ''}{_SEVERAL[get_args(one)[0]]}"
            if get_origin(one) is tuple
            else _ONE[one]
            for one in self._types()
            if get_origin(one) is not Literal
        ]
        if types_in_words and bounds:
            types_in_words[-1] += f", each {bounds}" if self.is_list else f", {bounds}"
        alternatives = [*types_in_words, *self.words]
        words = " or ".join(filter(None, [", ".join(alternatives[:-1]), alternatives[-1]]))
        return self._with_null(words)

    @property
    def words(self) -> list[str]:
        """The words of its `Literal`."""
        return [str(word) for one in self._types() if get_origin(one) is Literal for word in get_args(one)]

    @property
    def is_list(self) -> bool:
        """Whether its values are tuples."""
        return any(get_origin(one) is tuple for one in self._types())

    @property
    def number(self) -> type[int] | type[float] | None:
        """The type of its numbers, or of the entries of a list; None if it takes no numbers."""
        taken = [get_args(one)[0] if get_origin(one) is tuple else one for one in self._types()]
        return float if float in taken else int if int in taken else None

    @property
    def is_text(self) -> bool:
        """Whether all its values are text, so that a number in a configuration is text too."""
        return all(one is str or get_origin(one) is Literal for one in self._types())

    def read(self, value: Any) -> Any:
        """Convert a value of a configuration to the type of the field; other values are returned unchanged.

        A list, or the only entry of a list, becomes a tuple. For a knob of text, numbers become text. For any
        other knob, a number written as text becomes a number.
        """
        if self.is_list and value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            (tuple_type,) = (one for one in self._types() if get_origin(one) is tuple)
            entry = Knob(self.name, get_args(tuple_type)[0], None, PLAIN)
            return tuple(entry.read(value) for value in values)
        if self.is_text:
            return str(value) if type(value) in (int, float) else value
        if isinstance(value, str) and not _is_a(value, self.hint):
            for one in self._types():
                if one is bool and value.lower() in ("true", "false"):
                    return value.lower() == "true"
                if one in (int, float):
                    return _number(value)
        return value

    def _types(self) -> list[Any]:
        """The types in the union of its annotation, without None."""
        is_union = get_origin(self.hint) in (Union, types.UnionType)
        return [one for one in (get_args(self.hint) if is_union else [self.hint]) if one is not type(None)]

    def _with_null(self, words: str) -> str:
        return f"null or {words}" if _is_a(None, self.hint) else words


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation. True and False are not integers."""
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
    """The number that is written in a text, or the text if it is not a number."""
    for number_type in (int, float):
        try:
            return number_type(text)
        except ValueError:
            continue
    return text


def as_text(value: Any) -> str:
    """A value in the syntax of a configuration: a tuple as a list, null for None."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(list(value) if isinstance(value, tuple) else value)


def knobs_of(owner: type[Knobs]) -> dict[str, Knob]:
    """The knobs of a subclass of `Knobs` by name, in the order of its fields."""
    return _knobs_of(owner)  # type: ignore[arg-type]  # mypy does not see that a class is hashable


@cache
def _knobs_of(owner: Any) -> dict[str, Knob]:
    hints = get_type_hints(owner)
    return {
        f.name: Knob(f.name, hints[f.name], f.default, f.metadata.get("knob", PLAIN)) for f in fields(owner)
    }


def decisive(owner: type[Knobs], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are part of the hash of a cell. Names that are not knobs of the class are included."""
    known = knobs_of(owner)
    hashed = {}
    for name, value in values.items():
        declaration = known[name].declaration if name in known else PLAIN
        is_default = declaration.younger and known[name].read(value) == known[name].default
        if declaration.decides and not is_default:
            hashed[name] = value
    return hashed


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """Base class of settings of a user, which are validated at construction.

    This class validates the type and the bounds of each value. A subclass validates relations between knobs
    in `__post_init__`, with `require`. The type of a field is bool, int, float, str or a Literal of words; or
    a union of these, or with None; or a tuple of one of the first four (`tuple[int, ...]`). A float field
    also accepts an integer.

    Raises ValueError with the knob, its value and the allowed values.
    """

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Validate each value, before `__post_init__` compares values with each other."""
        known = knobs_of(cls)
        for name, value in values.items():
            if name in known and (allowed := known[name].reject(value)):  # __init__ rejects other names
                raise ValueError(f"{name}={as_text(value)}: allowed is {allowed}")
        return super().__new__(cls)

    def require(self, name: str, ok: bool, allowed: str) -> None:
        """Raise ValueError with the value of a knob and the `allowed` values, unless `ok`."""
        if not ok:
            raise ValueError(f"{name}={as_text(getattr(self, name))}: allowed is {allowed}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Create an instance from the values of a configuration, in plain types (see `as_dict`).

        Raises ValueError also for an unknown name, with the most similar knob.
        """
        known = knobs_of(cls)
        for name in values:
            if name not in known:
                similar = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean {similar[0]}?" if similar else ""
                raise ValueError(f"{name}: unknown knob; allowed are {', '.join(known)}{hint}")
        return cls(**{name: known[name].read(value) for name, value in values.items()})

    def as_dict(self) -> dict[str, Any]:
        """The values by name, in plain types that can be stored as JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
