"""Which variants a figure draws if there are too many for one: dense and the best of each family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest

import pandas as pd

from bench.report.data.groups import BUDGET, GROUP, NUMBER, numbered
from bench.report.data.statistics import BASELINE, LEAK_LIMIT
from bench.report.figures import style

MOST = 14
"""Variants in a figure; the names of more lines cannot be read beside each other."""
FIGURES = {"nll": 1, "accuracy": -1, "step_seconds_median": 1, "decode_seconds_median": 1}
"""Figures of a record in which a variant may be the best of its family: 1 if less is better, −1 if more."""
QUALITY = ("nll", "accuracy")
"""Those of a trained model, which count only without a leak of later tokens."""
OPTION = "--all-variants"
"""Option of `python -m bench.report` that draws every variant."""


@dataclass(frozen=True)
class Selection:
    """The standing of each variant in an experiment: the smaller, the better it is among all in the best of
    its `FIGURES`. `limit` is the number of variants in a figure, None for all."""

    standing: Mapping[str, float]
    limit: int | None = MOST

    @classmethod
    def of(cls, frame: pd.DataFrame, limit: int | None = MOST) -> Selection:
        """The selection of an experiment's records."""
        ranks = [_ranks(frame, column, sign) for column, sign in FIGURES.items() if column in frame]
        known = pd.concat([pd.Series(dtype=float), *ranks])
        return cls(known.groupby(level=0).min().to_dict(), limit)

    def drawn(self, names: Iterable[str]) -> set[str]:
        """The variants to draw of those named: dense, the best of each family, the second best, and so on."""
        every = set(names)
        if self.limit is None or len(every) <= self.limit:
            return every
        families: dict[tuple[int, str], list[str]] = {}
        for name in sorted(every - {BASELINE}, key=lambda name: (self._standing(name), name)):
            families.setdefault(style.variant_rank(name)[:2], []).append(name)
        rounds = zip_longest(*(families[key] for key in sorted(families)))
        best = [name for together in rounds for name in together if name is not None]
        return {*(every & {BASELINE}), *best[: self.limit - len(every & {BASELINE})]}

    def _standing(self, name: str) -> float:
        return self.standing.get(name, 1.0)

    def part(self, cells: pd.DataFrame, always: Iterable[str] = ()) -> tuple[pd.DataFrame, str]:
        """The cells of the variants to draw, `always` among them, and how many are left out, in words for a
        footer."""
        if "variant" not in cells:
            return cells, ""
        names = set(cells["variant"])
        drawn = self.drawn(names) | (names & {*always})
        if drawn == names:
            return cells, ""
        return cells[cells["variant"].isin(drawn)], (
            f" · {len(drawn)} of {len(names)} variants: dense and the best of each family by loss, accuracy "
            f"or time; {OPTION} draws the other {len(names) - len(drawn)}"
        )


def _ranks(frame: pd.DataFrame, column: str, sign: int) -> pd.Series[float]:
    """Variant → its mean rank in one figure, as a share of those that it is compared with.

    Costs are compared at the longest length of a group, losses within one length and training.
    """
    done = frame[(frame["status"] == "ok") & frame[column].notna()]
    if column in QUALITY:
        done = done[~(done["leak_max_abs"] > LEAK_LIMIT)]
        done = done.assign(**{NUMBER: numbered(done, BUDGET)})
    else:
        done = done.assign(**{NUMBER: numbered(done, GROUP)})
        done = done[done["seq_len"] == done.groupby(NUMBER)["seq_len"].transform("max")]
    if done.empty:
        return pd.Series(dtype=float)
    values = done.assign(value=sign * done[column].astype(float))
    best = values.groupby([NUMBER, "variant"])["value"].min()
    return best.groupby(NUMBER).rank(pct=True).groupby("variant").mean()
