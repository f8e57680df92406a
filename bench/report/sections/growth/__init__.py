"""Growth of cost with length and with depth, compared with the claims of papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import GROUP, SETTING
from bench.report.data.power_law import FEWEST, SPAN, TOLERANCE
from bench.report.sections import Section
from bench.report.sections.growth.data import exponents
from bench.report.sections.growth.tables import ABOVE, BELOW, UNLIKE, by_depth, by_length
from bench.report.text.phrases import headed
from bench.report.text.tables import Table, first_open


class Growth(Section[pd.DataFrame]):
    """Its data are the `exponents` of the cost cells."""

    name = "growth"
    order = 40
    title = "Growth"
    needs = ("cost",)
    lead = (
        "The exponent with which a cost grows, its 95 % interval, and beside it the one that the variant's "
        "paper claims for attention: the slope of log cost against log length (or depth) by least squares, "
        f"over the largest sizes, those within a factor of {SPAN} of the largest and at least "
        f"{FEWEST}. A step has more than attention: projections and feed-forward layers grow as T, "
        "parameters not at all. *attention FLOPs* are by formula and free of both. An exponent of times that "
        "were measured while something else ran is *disturbed* and contradicts no claim. *survey*: Tay et "
        "al., arXiv:2009.06732v3, Table 1."
    )
    marks = MappingProxyType(
        {
            ABOVE: f"grows faster than is claimed: the interval lies more than {TOLERANCE:g} above the claim",
            BELOW: f"grows more slowly than is claimed, by more than {TOLERANCE:g}: what "
            "grows less outweighs it at these sizes, or what the claim counts is not done, as where a fused "
            "kernel never holds the scores",
            UNLIKE: "not what the attention's FLOPs grow with",
        }
    )
    csv = ("exponents",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """One row a variant, setting, axis and figure."""
        return exponents(done["cost"])

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """First in the length, a table a setting and depth; then in the depth."""
        if data.empty:
            return []
        lengths, depths = data[data["axis"] == "seq_len"], data[data["axis"] == "depth"]
        tables = [
            Table(by_length(own), heading=f"In the length: {heading}", setting=keys)
            for heading, keys, own in (headed(lengths, GROUP) if len(lengths) else ())
        ]
        tables += [
            Table(by_depth(own), heading=f"In the depth: {heading}", setting=keys)
            for heading, keys, own in (headed(depths, (*SETTING, "seq_len")) if len(depths) else ())
        ]
        return first_open(tables)


SECTIONS: Sequence[Section[Any]] = (Growth(),)
