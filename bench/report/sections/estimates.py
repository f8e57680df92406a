"""What a step launches and moves, and its estimated time on a card, for cells that were planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import GROUP
from bench.report.sections import Section
from bench.report.text import units
from bench.report.text.columns import each
from bench.report.text.phrases import headed
from bench.report.text.tables import Table

_FIGURES = ("launches_step", "bytes_moved_step", "flops_executed_step", "step_seconds_estimated")
_CELL = [*GROUP, "label", "seq_len"]


class Estimates(Section[pd.DataFrame]):
    """Its data: a row a planned cell and card, with counts, `launches_layer` and the estimate."""

    name = "estimates"
    order = 35
    title = "Launches, traffic and estimated time"
    lead = (
        "Of a training step that was planned and not run. *launches a layer*: launches ÷ depth, with those "
        "outside of the layers. *estimate*: the longer of the host's launches and the card's traffic and "
        "FLOPs, by constants fitted to one machine with an H100 (`bench/measure/estimate.py`), where single "
        "cells were off by −29 to +38 %. It is not a measurement, and other cards are assumed to reach the "
        "same shares of their data sheets."
    )
    csv = ("estimates",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """Planned cells whose launches are known; replicates have equal counts."""
        cells = records.kinds.plain
        planned = cells[(cells["flops_source"] == "predicted") & cells["launches_step"].notna()]
        planned = planned.assign(estimate_card=planned["estimate_card"].fillna(""))
        cards = planned.groupby([*_CELL, "estimate_card"], sort=False, dropna=False)
        rows = cards[[*_FIGURES]].first().reset_index()
        return rows.assign(launches_layer=rows["launches_step"] / rows["depth"])

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """A table a setting and depth."""
        return [
            Table(
                [
                    each(group, "variant", "label", str, right=False, optional=False),
                    each(group, "length", "seq_len", str, optional=False),
                    each(group, "launches", "launches_step", units.count),
                    each(group, "launches a layer", "launches_layer", units.count),
                    each(group, "bytes moved", "bytes_moved_step", units.size),
                    each(group, "executed FLOPs", "flops_executed_step", units.flops),
                    each(group, "estimate", "step_seconds_estimated", units.seconds),
                    each(group, "card", "estimate_card", lambda card: card or units.MISSING, right=False),
                ],
                heading=heading,
                setting=keys,
                caption=f"Launches and estimated time of a planned training step: {keys}",
            )
            for heading, keys, group in headed(data)
        ]


SECTIONS: Sequence[Section[Any]] = (Estimates(),)
