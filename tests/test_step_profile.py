"""`measure=profile`: a trace of a training step, and its costliest operations."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from commands import bench

from bench.measure import step_profile


def rows_of(table: str) -> list[tuple[str, int, float]]:
    """The operation, its calls and its milliseconds, of each row."""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:-1]]
    return [(name.strip("`"), int(calls), float(ms)) for name, calls, ms, _ in cells]


def test_the_costliest_operation_comes_first(tmp_path: Path) -> None:
    """Seven large products beside three small sums, whose times differ by orders of magnitude."""
    large, small = torch.randn(512, 512), torch.randn(8)

    def work() -> None:
        for _ in range(7):
            large @ large
        for _ in range(3):
            small + small

    step_profile.write(work, torch.device("cpu"), tmp_path, "cell")
    table = (tmp_path / "profiles/cell.md").read_text()
    rows = rows_of(table)
    assert rows[0][:2] == ("aten::mm", 7)
    assert [ms for _, _, ms in rows] == sorted((ms for _, _, ms in rows), reverse=True)
    assert len(rows) <= step_profile.MOST
    total = float(table.splitlines()[-1].split("|")[3])
    assert sum(ms for _, _, ms in rows) <= total * 1.001
    trace = json.loads(gzip.decompress((tmp_path / "profiles/cell.json.gz").read_bytes()))
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == 7


def test_the_command_prints_the_table(tmp_path: Path) -> None:
    command = ["measure=profile", "variant=dense", "seq_len=64", "depth=1", "device=cpu"]
    done = bench(*command, "measure.time_seconds=0", "measure.min_samples=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (table,) = (tmp_path / "results/adhoc/profiles").glob("*.md")
    assert done.stdout.endswith(table.read_text())
    names = [name for name, _, _ in rows_of(table.read_text())]
    assert any("mm" in name for name in names), names
    assert str(table.with_suffix(".json.gz").relative_to(tmp_path)) in done.stdout
