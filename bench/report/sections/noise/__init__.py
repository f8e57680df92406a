"""A machine's noise: the difference of two measurements of a cell, and the slowdowns that can be detected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.sections import Section
from bench.report.sections.noise.data import by_length, summary
from bench.report.sections.noise.tables import facts, lengths
from bench.report.text.tables import Table


@dataclass(frozen=True)
class MachineNoise:
    """The `summary` of each machine, and the same `by_length`."""

    machines: pd.DataFrame
    lengths: pd.DataFrame


class MachinesNoise(Section[MachineNoise]):
    """The floor in the head, and a table by length."""

    name = "noise"
    order = 155
    title = "Noise"
    needs = ("cost",)
    lead = (
        "A/A pairs are two measurements of one cell in one replicate. The floor is the difference that a new "
        "pair exceeds in one of twenty cases, *at most* its upper 95 % confidence bound. From at least 60 "
        "pairs both are percentiles of the pairs; from fewer they are those of normal errors of a model, log "
        "time = round + cell + error, fitted to all undisturbed measurements. Differences in the report are "
        "compared with the bound of all lengths together. *short of precision*: measurements whose sampling "
        "ended on its budget before the 95 % interval of the median step, within the process, was as narrow "
        "as `measure.precision`; *half-width*: of that interval, the median and the largest."
    )
    csv = ("noise", "noise_by_length")

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> MachineNoise:
        """One row a machine, and one a machine and length."""
        every = records.collected.every
        return MachineNoise(summary(records.noises, every, done["cost"]), by_length(records.noises, every))

    def facts(self, data: MachineNoise) -> dict[str, str]:
        """The noise floor and its consequences for comparisons."""
        return facts(data.machines)

    def tables(self, data: MachineNoise) -> list[Table]:
        """By length, where any cell was timed."""
        return [Table(lengths(data.lengths))] if len(data.lengths) else []

    def csv_tables(self, data: MachineNoise) -> dict[str, pd.DataFrame]:
        """Both tables, where they have rows."""
        named = {"noise": data.machines, "noise_by_length": data.lengths}
        return {name: table for name, table in named.items() if len(table)}


SECTIONS: Sequence[Section[Any]] = (MachinesNoise(),)
