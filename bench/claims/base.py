"""What a claim is, and how it comes to a verdict.

A claim is a module of this package named `claim_NN_words`, with

- `STATEMENT`: what is said, as a sentence in plain text;
- `SOURCE`: who says it, as a citation in plain text;
- `judge(frame) -> Finding`: what arithmetic predicts, what the records show, and what follows. `frame` is
  `bench.report.data.collect.Collected.frame`: one row a cell, without twins. It raises `Missing` where the
  cells that it needs are not there or did not finish.

No figure that a finding shows is typed: it comes from a record, or from a formula over a record's sizes.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import pandas as pd

import bench.claims

Verdict = Literal["holds", "holds with a condition", "does not hold here", "not measured"]

_NAME = re.compile(r"claim_(\d\d)_\w+")


class Missing(LookupError):
    """The records do not say; the message is which cells are missing, or why they did not finish."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of a claim. All of it is plain text, on as many lines as it likes."""

    predicted: str
    """What arithmetic says."""
    measured: str
    """What the records say."""
    verdict: Verdict
    condition: str = ""
    """Under which condition it holds, or why it was not measured. May say more of any other verdict."""

    def __post_init__(self) -> None:
        """Raises ValueError for a text that is missing."""
        texts = {"predicted": self.predicted, "measured": self.measured}
        if self.verdict in ("holds with a condition", "not measured"):
            texts["condition"] = self.condition
        if empty := [name for name, text in texts.items() if not text.strip()]:
            raise ValueError(f"verdict {self.verdict!r}: needs {' and '.join(empty)}")


class Claim(Protocol):
    """A claim's module."""

    STATEMENT: str
    SOURCE: str

    def judge(self, frame: pd.DataFrame, /) -> Finding:
        """Raises Missing."""


def claims() -> Iterator[tuple[int, Claim]]:
    """Every claim by its number, in order. Raises ValueError where two have one number."""
    found: dict[int, str] = {}
    for module in sorted(pkgutil.iter_modules(bench.claims.__path__), key=lambda module: module.name):
        if match := _NAME.fullmatch(module.name):
            other = found.setdefault(number := int(match[1]), module.name)
            if other != module.name:
                raise ValueError(f"claim {number} is in two files: {other}.py and {module.name}.py")
    for number, name in sorted(found.items()):
        yield number, importlib.import_module(f"{bench.claims.__name__}.{name}")


def judged(claim: Claim, frame: pd.DataFrame) -> Finding:
    """The claim's finding; where its cells are missing, one that says which."""
    try:
        return claim.judge(frame)
    except Missing as error:
        return Finding(predicted="–", measured="–", verdict="not measured", condition=str(error))
