"""Compiled cells in the report: beside the same cells without compilation, and never mixed with them."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from report_parts import part_of
from test_report import record, table
from test_report_memory import frame_of

from bench.records import Record
from bench.report.data.kinds import kinds
from bench.report.data.statistics import cost_cells
from bench.report.sections.compilation import compiled_cells
from bench.report.sections.memory.data import prediction_errors

COMPILED = {"off": 1.0, "block": 0.5, "model": 0.25}
"""compile → factor of the step time."""


def found() -> list[Record]:
    """Two variants, three replicates; the last is of a version before `compile`."""
    made = []
    for variant in ("dense", "chunked"):
        for replicate in range(3):
            for how, factor in COMPILED.items():
                one = record(variant, replicate=replicate, compile=how)
                one.cell_id += how
                assert one.step_seconds_median is not None
                one.step_seconds_median *= factor
                if how == "off":
                    one.compile = None if replicate == 2 else how
                else:
                    one.compile_seconds, one.graph_breaks, one.recompiles = 10.0 + replicate, 0, 3
                    one.peak_bytes_source = "cpu_allocator"
                made.append(one)
    return made


@pytest.mark.slow
def test_compiled_cells_stand_beside_those_without_compilation(tmp_path: Path) -> None:
    part = part_of(tmp_path / "e", found(), "compilation")
    rows = table(part.text.split("## Compilation", 1)[1], "### clm, depth 2")
    assert [(row["variant"], row["compile"]) for row in rows] == [
        ("dense", "block"),
        ("chunked", "block"),
        ("dense", "model"),
        ("chunked", "model"),
    ]
    cells = part.files()["compilation"].set_index(["variant", "compile"])
    for (_, how), cell in cells.iterrows():
        assert cell["step_seconds_ratio"] == pytest.approx(COMPILED[how])
        assert cell["compile_seconds"] == 11.0
        assert (cell["graph_breaks"], cell["recompiles"]) == (0, 3)


def test_tables_keep_compiled_cells_apart(tmp_path: Path) -> None:
    """An older record without the key belongs to the cells without compilation."""
    frame = frame_of(tmp_path, found())
    cells = cost_cells(kinds(frame).plain)
    assert set(zip(cells["compile"], cells["replicates"], strict=True)) == {
        ("off", 3),
        ("block", 3),
        ("model", 3),
    }
    for how, own in cells.groupby("compile"):
        for variant, cell in own.set_index("variant").iterrows():
            times = [
                one.step_seconds_median
                for one in found()
                if (one.variant, one.compile or "off") == (variant, how)
            ]
            assert cell["step_seconds_median"] == pytest.approx(statistics.median(times))


def test_predictions_are_compared_with_cells_without_compilation(tmp_path: Path) -> None:
    assert len(prediction_errors(frame_of(tmp_path, found()))) == 6


def test_without_compiled_cells_there_is_no_section(tmp_path: Path) -> None:
    plain = [one for one in found() if one.compile in (None, "off")]
    assert compiled_cells(frame_of(tmp_path, plain)).empty
    assert "## Compilation" not in part_of(tmp_path / "e", plain, "compilation").text
