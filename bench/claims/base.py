"""The interface of a claim, and its verdict.

A claim is a module of this package named `claim_NN_words`, with

- `STATEMENT`: the claim, as a sentence in plain text;
- `SOURCE`: its source, as a citation in plain text;
- `judge(frame) -> Finding`: the prediction by arithmetic, the measurement and the verdict. `frame` is
  `bench.report.data.collect.Collected.frame`: one row per cell, without twins. It raises `Missing` if the
  cells that it needs do not exist or did not finish.

Figures in a finding are never literals: each comes from a record, or from a formula over a record's sizes.
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
    """The records are not sufficient. The message names the missing cells, or why they did not finish."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of judging a claim, as plain text of any number of lines."""

    predicted: str
    """The prediction by arithmetic."""
    measured: str
    """The measurement in the records."""
    verdict: Verdict
    condition: str = ""
    """The condition under which the claim holds, or why it was not measured;
    optional for the other verdicts."""

    def __post_init__(self) -> None:
        """Raises ValueError if a required text is missing."""
        texts = {"predicted": self.predicted, "measured": self.measured}
        if self.verdict in ("holds with a condition", "not measured"):
            texts["condition"] = self.condition
        if empty := [name for name, text in texts.items() if not text.strip()]:
            raise ValueError(f"verdict {self.verdict!r}: needs {' and '.join(empty)}")


class Claim(Protocol):
    """The interface of a claim's module."""

    STATEMENT: str
    SOURCE: str

    def judge(self, frame: pd.DataFrame, /) -> Finding:
        """Raises Missing."""


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


def judged(claim: Claim, frame: pd.DataFrame) -> Finding:
    """Return the claim's finding; if its cells are missing, a finding that names them."""
    try:
        return claim.judge(frame)
    except Missing as error:
        return Finding(predicted="–", measured="–", verdict="not measured", condition=str(error))
