"""The interface of a claim, and its verdict.

A claim is a module of this package named `claim_NN_words`, with

- `STATEMENT`: the claim, as a sentence in plain text;
- `SOURCE`: its source, as a citation in plain text;
- `PARTS`: what it says, each part in words → a function that judges the part.

A part is judged from `bench.report.data.collect.Collected.frame`: one row per cell, without twins. The
function returns a `Judgement`, or raises `Missing` if the cells that it needs do not exist or did not finish.
Figures in a judgement are never literals: each comes from a record, or from a formula over a record's sizes.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import pandas as pd

import bench.claims

Verdict = Literal["shown", "contradicted", "not decided here"]

_NAME = re.compile(r"claim_(\d\d)_\w+")


class Missing(LookupError):
    """The records are not sufficient. The message names the missing cells, or why they did not finish."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The result of judging a part of a claim, as plain text."""

    predicted: str = ""
    """The prediction by arithmetic; optional if nothing is decided."""
    measured: str = ""
    """The measurement in the records; optional if nothing is decided."""
    verdict: Verdict
    reason: str = ""
    """The result that the cells show instead of the claim, or what would decide it; required unless the part
    is shown."""

    def __post_init__(self) -> None:
        """Raises ValueError if a required text is missing."""
        texts = {} if self.verdict == "shown" else {"reason": self.reason}
        if self.verdict != "not decided here":
            texts |= {"predicted": self.predicted, "measured": self.measured}
        if empty := [name for name, text in texts.items() if not text.strip()]:
            raise ValueError(f"verdict {self.verdict!r}: needs {' and '.join(empty)}")


Judge = Callable[[pd.DataFrame], Judgement]


class Claim(Protocol):
    """The interface of a claim's module."""

    STATEMENT: str
    SOURCE: str
    PARTS: Mapping[str, Judge]


@dataclass(frozen=True)
class Finding:
    """The judgements of all parts of a claim, by what each part says."""

    parts: Mapping[str, Judgement]

    @property
    def verdict(self) -> Verdict:
        """Contradicted if one part is; else not decided if one part is not; else shown."""
        verdicts = [part.verdict for part in self.parts.values()]
        for verdict in ("contradicted", "not decided here"):
            if verdict in verdicts:
                return verdict
        return "shown"


def claims() -> Iterator[tuple[int, Claim]]:
    """Yield every claim with its number, in order. Raises ValueError if two claims have the same number."""
    by_number: dict[int, str] = {}
    for module in sorted(pkgutil.iter_modules(bench.claims.__path__), key=lambda module: module.name):
        if match := _NAME.fullmatch(module.name):
            other = by_number.setdefault(number := int(match[1]), module.name)
            if other != module.name:
                raise ValueError(f"claim {number} is in two files: {other}.py and {module.name}.py")
    for number, name in sorted(by_number.items()):
        yield number, importlib.import_module(f"{bench.claims.__name__}.{name}")


def judge(claim: Claim, frame: pd.DataFrame) -> Finding:
    """Judge every part of a claim. A part whose cells are missing is not decided; its reason names them."""
    return Finding({says: _judged(part, frame) for says, part in claim.PARTS.items()})


def _judged(part: Judge, frame: pd.DataFrame) -> Judgement:
    try:
        return part(frame)
    except Missing as error:
        return Judgement(verdict="not decided here", reason=f"needs {error}")
