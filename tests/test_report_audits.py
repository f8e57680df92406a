"""How often what was predicted not to fit would have run, as the report's head says it."""

from __future__ import annotations

import pandas as pd

from bench.report.sections.audits import audit


def frame_of(*rows: tuple[str, bool | None, float | None]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["status", "audited", "peak_bytes"])


def test_nothing_predicted_nothing_said() -> None:
    assert audit(frame_of(("ok", None, 5.0), ("oom", None, None), ("predicted_oom", None, None))) == {}


def test_the_false_skip_rate_is_that_of_the_cells_which_showed_whether_they_fit() -> None:
    skipped = [("predicted_oom", False, None)] * 96
    checked = [("oom", True, None)] * 2 + [("ok", True, 5.0), ("diverged", True, 5.0)]
    unclear = [("error", True, None), ("timeout", True, None)]
    said = audit(frame_of(("ok", None, 5.0), *skipped, *checked, *unclear))
    assert said == {
        "predicted_oom": "102 cells were predicted to exceed their memory; "
        "of 4 that ran all the same to check, 2 fitted (false-skip rate 50%)"
    }
    assert "none of them was run to check (audit_oom)" in audit(frame_of(*skipped))["predicted_oom"]
