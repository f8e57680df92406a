"""How often a cell that was predicted to run out of memory would have run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.sections import Section


class Audits(Section[pd.DataFrame]):
    """Its data are all current records, twins too."""

    name = "audits"
    order = 190

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """The records of both twins."""
        return records.collected.every

    def facts(self, data: pd.DataFrame) -> dict[str, str]:
        """See `audit`."""
        return audit(data)


def audit(frame: pd.DataFrame) -> dict[str, str]:
    """A line for the report's head; empty if no cell was predicted to run out of memory.

    Such a cell that was run to check the prediction counts if it showed whether it fits: it ran out of
    memory, or its step was measured.
    """
    predicted = frame[frame["audited"].notna()]
    if predicted.empty:
        return {}
    run = predicted[predicted["audited"].astype(bool)]
    fitted = int(run["peak_bytes"].notna().sum())
    judged = fitted + int((run["peak_bytes"].isna() & (run["status"] == "oom")).sum())
    words = f"{len(predicted)} cells were predicted to exceed their memory"
    if not judged:
        return {"predicted_oom": f"{words}; none of them was run to check (audit_oom)"}
    share = f"false-skip rate {fitted / judged:.0%}"
    return {
        "predicted_oom": f"{words}; of {judged} that ran all the same to check, {fitted} fitted ({share})"
    }


SECTIONS: Sequence[Section[Any]] = (Audits(),)
