"""How far the order of the models can be relied on: between replicates, between budgets, and beyond them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.sections import Section
from bench.report.sections.stability import tables
from bench.report.sections.stability.data import curves, orders, with_budgets
from bench.report.text.listing import PageList, listed_columns
from bench.report.text.tables import Table


@dataclass(frozen=True)
class Stable:
    """`data.orders` and `data.curves`."""

    orders: pd.DataFrame
    curves: pd.DataFrame


class Stability(Section[Stable]):
    """Kendall's τ, and loss curves over the budgets of a run."""

    name = "stability"
    order = 105
    title = "Stability of the order"
    needs = ("quality",)
    lead = (
        "*τ* (Kendall's τ_b) compares two orders of the models by their loss: 1 is the same order, 0 is no "
        "relation, −1 is the reverse. *Between replicates* is its mean over the pairs of replicates, *to the "
        "largest budget* that between the order after so many tokens and the final one, of means over "
        "replicates. Undertrained models take part, models that see the future do not. With few models τ has "
        "few values: of n models one exchange of neighbours is worth 4 / (n (n − 1))."
    )
    figures_alone = False
    csv = ("loss_curves",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Stable:
        """From the records and the models of quality."""
        every = with_budgets(records.kinds.plain)
        found = orders(every, done["quality"].cells), curves(every)
        return Stable(
            *(one.sort_values(["depth", "seq_len"], kind="stable") if len(one) else one for one in found)
        )

    def tables(self, data: Stable) -> list[Table]:
        """A table of orders, and one of curves if a run has several budgets."""
        found = [Table(tables.orders(data.orders))] if len(data.orders) else []
        if len(data.curves):
            lead = (
                "Losses in bits per byte (of masked text in nats per token), means over replicates. L = E "
                "+ A · (D / the smallest budget)^−α is fitted without the largest budget D; *predicted* "
                "is what it gives there, and *came* what was measured (± the standard deviation over "
                "replicates). The form goes through any three points, so with four budgets only the "
                "prediction tests it, and with fewer nothing does. *at a bound*: the points do not bend "
                "as the form does, and α or E ended at a bound of its search."
            )
            found.append(Table(tables.curves(data.curves), heading="Loss curves over budgets", lead=lead))
        return found

    def csv_tables(self, data: Stable) -> dict[str, pd.DataFrame]:
        """The curves."""
        return {"loss_curves": data.curves} if len(data.curves) else {}

    def page_lists(self, data: Stable) -> list[PageList]:
        """The table of orders."""
        if data.orders.empty:
            return []
        table = listed_columns(tables.orders(data.orders))
        lead = "Kendall's τ between two orders of the models by their loss: 1 is the same order."
        return [PageList("stability", self.title, "Stability of the order", table, lead)]


SECTIONS: Sequence[Section[Any]] = (Stability(),)
