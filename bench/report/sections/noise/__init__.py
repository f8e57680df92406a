"""A machine's noise: the difference of two measurements of a cell, and the slowdowns that can be detected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.noise_floor import pairs
from bench.report.sections import Section
from bench.report.sections.noise.data import summary
from bench.report.sections.noise.tables import facts


class Noise(Section[pd.DataFrame]):
    """Its data are the `summary` of each machine's A/A pairs; shown in the head."""

    name = "noise"
    order = 180
    needs = ("cost",)
    csv = ("noise",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """One row a machine."""
        return summary(pairs(records.collected.every), done["cost"])

    def facts(self, data: pd.DataFrame) -> dict[str, str]:
        """The noise floor and its consequences for comparisons."""
        return facts(data)


SECTIONS: Sequence[Section[Any]] = (Noise(),)
