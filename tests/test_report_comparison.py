"""Two runs side by side: what is matched, what the ratios are, and what one cannot say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_report import cli, failed, record, write

from bench.records import Record
from bench.report import ReportError, compare
from bench.report.comparison.matching import compare as matched
from bench.report.comparison.matching import load

ELSEWHERE: dict[str, Any] = {"cpu_model": "Other CPU", "device_name": "Other CPU", "threads": 8}
SLOWER = {"dense": 1.30, "chunked": 1.0}


def run(elsewhere: bool, variants: tuple[str, ...] = ("dense", "chunked")) -> list[Record]:
    """Two lengths and three replicates; elsewhere slower by `SLOWER`, and 0.1 nats worse."""
    found = []
    for variant in variants:
        for seq_len in (512, 1024):
            for replicate in range(3):
                cell = record(variant, seq_len, replicate=replicate, cell_id=f"{variant}{seq_len}{replicate}")
                if elsewhere:
                    assert cell.step_seconds_median is not None
                    assert cell.nll is not None
                    cell.step_seconds_median *= SLOWER[variant] * (1 + 0.001 * replicate)
                    cell.nll += 0.1
                    for key, value in ELSEWHERE.items():
                        setattr(cell, key, value)
                found.append(cell)
    return found


def compared(tmp_path: Path, first: list[Record], second: list[Record]) -> pd.DataFrame:
    return matched(load(write(tmp_path / "a", first)), load(write(tmp_path / "b", second))).cells


def test_ratios_are_paired_by_replicate(tmp_path: Path) -> None:
    cells = compared(tmp_path, run(False), run(True)).set_index(["variant", "seq_len"])
    assert len(cells) == 4
    assert (cells["rounds"] == 3).all()
    for (variant, _), cell in cells.iterrows():
        expected = SLOWER[str(variant)] * 1.001
        assert cell["step_seconds_ratio"] == pytest.approx(expected)
        assert cell["step_seconds_ratio_low"] < expected < cell["step_seconds_ratio_high"]
        assert cell["peak_bytes_ratio"] == 1
        assert cell["flops_executed_ratio"] == 1
        assert cell["nll_change"] == pytest.approx(0.1)
        assert bool(cell["differs"]) == (variant == "dense")


def test_a_change_of_loss_is_not_told_where_the_data_differ(tmp_path: Path) -> None:
    other = run(True)
    for cell in other:
        cell.data_sha256 = "ef" * 32
    cells = compared(tmp_path, run(False), other)
    assert len(cells) == 4
    assert cells["nll_change"].isna().all()
    assert not cells["same_data"].any()
    assert cells["step_seconds_ratio"].notna().all()


def test_what_only_one_run_has_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", [*run(False), record("longformer", 512)])
    write(tmp_path / "b", [*run(True), record("overlapping", 2048, **ELSEWHERE)])
    folder = compare(tmp_path / "a", tmp_path / "b")
    text = (folder / "compare.md").read_text()
    only_a, only_b = (text.split(f"## Only in {name}\n")[1].split("\n## ")[0] for name in ("a", "b"))
    assert "longformer" in only_a
    assert "overlapping" not in only_a
    assert "overlapping" in only_b
    assert len(pd.read_csv(folder / "compare.csv")) == 4
    (picture,) = (folder / "plots").glob("*.png")
    assert f"](plots/{picture.stem}.png)" in text
    assert "Other CPU, 8 threads" in text


def test_a_cell_that_one_machine_cannot_hold(tmp_path: Path) -> None:
    lost = failed("oom", "too big", variant="dense", seq_len=2048)
    fits = record("dense", 2048, **ELSEWHERE)
    folder = compare(write(tmp_path / "a", [*run(False), lost]), write(tmp_path / "b", [*run(True), fits]))
    (row,) = [
        line
        for line in (folder / "compare.md").read_text().splitlines()
        if "| dense " in line and "2048" in line
    ]
    assert "oom → ok" in row
    cells = pd.read_csv(folder / "compare.csv")
    assert cells.loc[cells.seq_len == 2048, "step_seconds_ratio"].isna().all()


def test_one_replicate_tells_nothing_apart(tmp_path: Path) -> None:
    first = [cell for cell in run(False) if cell.replicate == 0]
    cells = compared(tmp_path, first, run(True))
    assert (cells["rounds"] == 1).all()
    assert cells["differs"].isna().all()
    assert np.isfinite(cells["step_seconds_ratio"]).all()


def test_an_older_run_without_todays_keys_is_matched(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", run(False))
    for path in (folder / "records").glob("*.json"):
        values = json.loads(path.read_text())
        for key in ("data_params", "train_budget", "train_amount", "learning_rate", "impl"):
            values.pop(key)
        path.write_text(json.dumps(values))
    second = run(True)
    for cell in second:
        cell.data_params, cell.learning_rate = {"split": 0.1}, 0.003
        cell.train_budget, cell.train_amount = "tokens", 262_144
    found = matched(load(folder), load(write(tmp_path / "b", second)))
    assert len(found.cells) == 4
    assert found.unmatched.empty


def test_a_run_of_several_machines_is_refused_by_name(tmp_path: Path) -> None:
    mixed = write(tmp_path / "a", [*run(False), record("longformer", **ELSEWHERE)])
    with pytest.raises(ReportError, match=r"several machines \(Example CPU @ 2.60GHz, Other CPU\)"):
        load(mixed)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    write(tmp_path / "a", run(False))
    write(tmp_path / "b", run(True))
    done = cli("a", "b", "--no-plots", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"comparison: {Path('b', 'report', 'against-a', 'compare.md')}"]
    missing = cli("a", "c", cwd=tmp_path)
    assert missing.returncode == 2
    assert re.fullmatch(r"bench.report: c: .*no .*\n", missing.stderr)
