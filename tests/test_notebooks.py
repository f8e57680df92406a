"""The notebooks run on a report, and what they make of the records is what the report says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_report import failed, record, write

from bench import records
from bench.records import Record
from bench.report import build

ROOT = Path(__file__).parents[1]
TEXTS = {"peak_phase", "claim_source"}
"""Of summary.csv, what is no figure, though a column that is empty reads like one."""


def experiment() -> list[Record]:
    """Three variants at two lengths, with two, five and seven replicates, twins, and a cell that failed."""
    found = []
    for seq_len, replicates in ((512, 2), (1024, 5), (2048, 7)):
        for replicate in range(replicates):
            for variant in ("dense", "chunked", "longformer"):
                where: dict[str, Any] = {"variant": variant, "seq_len": seq_len, "replicate": replicate}
                started = f"2026-03-01T1{replicate}:00:00+00:00"
                noise = random.Random(f"{variant}{seq_len}{replicate}")
                for twin in range(TWINS if variant == "dense" else 1):
                    time = (
                        1e-3 * seq_len * (1 + 0.05 * noise.random()) * (1.3 if variant == "longformer" else 1)
                    )
                    other: dict[str, Any] = {"step_seconds_median": time, "tokens_per_second": seq_len / time}
                    if twin:
                        other |= {"twin": twin, "cell_id": f"{seq_len}-{replicate}-{twin}"}
                    found.append(record(**where, **other, started_at=started))
    found.append(failed("oom", "too big", variant="dense", seq_len=4096))
    old = record("dense", seq_len=512, replicate=0, step_seconds_median=9.0, code_sha256="0" * 64)
    old.cell_id, old.started_at = "old", "2025-01-01T00:00:00+00:00"
    return [*found, old]


TWINS = 2 if "twin" in records.KEYS else 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An experiment's report, and the names that the notebook leaves behind."""
    folder = write(tmp_path_factory.mktemp("demo") / "demo", experiment())
    report = build(folder, plots=False)
    notebook = json.loads((ROOT / "notebooks" / "statistics.ipynb").read_text())
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESULTS", str(folder))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"<{cell['id']}>", "exec"), names)
    return report, names


def test_the_notebook_makes_every_figure_of_the_summary(run: tuple[Path, dict[str, Any]]) -> None:
    report, names = run
    theirs, mine = names["theirs"], names["mine"]
    figures = [name for name in theirs if pd.api.types.is_numeric_dtype(theirs[name])]
    assert not set(figures) - set(mine) - TEXTS
    assert len(theirs) == len(pd.read_csv(report / "summary.csv")) == 10
    for name in set(figures) - TEXTS:
        got, expected = (frame[name].astype(float).to_numpy() for frame in (mine, theirs))
        np.testing.assert_allclose(got, expected, rtol=1e-9, err_msg=name)
    assert names["difference"].max() < 1e-9


def test_the_notebook_tells_the_same_cells_apart(run: tuple[Path, dict[str, Any]]) -> None:
    _, names = run
    theirs, mine = names["theirs"]["differs"], names["mine"]["differs"]
    assert theirs.isna().tolist() == mine.isna().tolist()
    known = theirs.notna()
    assert theirs[known].astype(bool).tolist() == mine[known].astype(bool).tolist()
    assert {True, False} == set(theirs[known].astype(bool)) or TWINS == 1


def test_the_notebook_finds_the_noise_of_the_report(run: tuple[Path, dict[str, Any]]) -> None:
    report, names = run
    theirs, mine = pd.read_csv(report / "noise.csv").set_index("machine"), names["noise"]
    assert theirs["pairs"].sum() == len(names["aa"])
    for name in ("floor", "median", "found_suggested"):
        expected = theirs[name].dropna()
        assert mine[name].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-9)


def test_notebooks_are_kept_without_their_outputs() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs"), path.name
            assert cell.get("execution_count") is None, path.name
