"""How often a cell that was predicted to run out of memory would have run."""

from __future__ import annotations

import pandas as pd


def facts(frame: pd.DataFrame) -> dict[str, str]:
    """A line for the report's head; nothing where no cell was predicted not to fit.

    A cell that was run all the same, to check, counts where it showed whether it fits: it ran out of memory,
    or its step was measured.
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
