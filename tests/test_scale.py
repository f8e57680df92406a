"""Thousands of records: they cost in proportion, and code versions among them are never averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from many_records import LOAD, REPORT, generate, seconds, write

from bench import records
from bench.report.data.collect import collect

FEW, MANY = 1_000, 4_000


@pytest.mark.slow
@pytest.mark.parametrize("code", [LOAD, REPORT.replace("sys.argv[1:]", "[*sys.argv[1:], '--no-plots']")])
def test_cost_grows_no_faster_than_the_records(code: str, tmp_path: Path) -> None:
    """Processor time, less what a start takes, as ratios: other work on the machine hardly enters."""
    for count in (12, FEW, MANY):
        write(tmp_path / str(count), count)
    start, few, many = (seconds(code, tmp_path / str(count)) for count in (12, FEW, MANY))
    assert (many - start) / (few - start) < 1.5 * MANY / FEW


def test_generated_records_are_records(tmp_path: Path) -> None:
    write(tmp_path / "many", 200)
    found, problems = records.read_all(tmp_path / "many")
    assert sorted(record.cell_id for record in found) == [record.cell_id for record in generate(200)]
    assert not problems


@pytest.mark.parametrize("key", ["code_sha256", "data_sha256"])
def test_a_cell_is_never_an_average_of_two_versions(key: str, tmp_path: Path) -> None:
    """Five replicates of old, two of new: the two alone count, in every replicate."""
    old = next(iter(generate(1)))
    for replicate in range(5):
        keys = vars(old) | {"cell_id": f"old{replicate}", "replicate": replicate, "started_at": "2026-01-01"}
        records.write(tmp_path, records.Record(**keys))
    for replicate in (0, 4):
        keys = vars(old) | {"cell_id": f"new{replicate}", "replicate": replicate, "started_at": "2026-01-02"}
        records.write(tmp_path, records.Record(**(keys | {key: "new"})))
    other = vars(old) | {"cell_id": "other", "seq_len": 1, "started_at": "2026-01-01"}
    records.write(tmp_path, records.Record(**other))
    found = collect(tmp_path)
    assert sorted(found.frame["cell_id"]) == ["new0", "new4", "other"]
    assert sorted(found.stale) == [f"old{replicate}" for replicate in range(5)]
    assert all("the newest of its configuration with" in why for why in found.stale.values())
    assert len(found.records) == 8, "they are kept"
