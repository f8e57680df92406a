"""The report of trained models on longer sequences: differences and their intervals, reasons, the picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report_parts import part_of
from scipy import stats
from test_report import record, table, write
from test_report_memory import frame_of, look

from bench.records import Record
from bench.report.data.experiment import read
from bench.report.sections.longer import SECTIONS
from bench.report.sections.longer.data import LENGTH, MEMORY, longer_cells, verdict
from bench.report.sections.longer.plots import TRAINED, by_position

T = 512
LN2 = math.log(2)
GROUPS = 16


def evaluated(variant: str, losses: list[float], replicate: int = 0, **other: Any) -> Record:
    """A record with losses at the trained length and its multiples, in bits per byte."""
    nats = [loss * LN2 for loss in losses]
    parts = 4 * 2 ** (len(losses) - 1)
    values: dict[str, Any] = {
        "cell_id": f"{variant}-{replicate}",
        "positions": "rotary",
        "longer_lengths": [T * 2**k for k in range(len(losses))],
        "nll_longer": nats,
        "bits_per_byte_longer": losses,
        "nll_longer_error": [0.0, *[0.01 * LN2] * (len(losses) - 1)],
        "nll_longer_by_position": [nats[0] + 0.01 * k for k in range(parts)],
        "tokens_evaluated_longer": GROUPS * T // 4,
    }
    return record(variant, replicate=replicate, seq_len=T, **{**values, **other})


def found() -> list[Record]:
    memory: dict[str, Any] = {
        "longer_memory_positions": [64, 128, 256],
        "nll_longer_memory": [2.0 * LN2, 1.9 * LN2, 1.8 * LN2],
        "nll_longer_memory_error": [0.0, 0.001, 0.001],
    }
    reason = "linformer has parameters for a fixed number of positions"
    none: dict[str, Any] = dict.fromkeys([key for key in vars(evaluated("dense", [1.0])) if "longer" in key])
    return [
        evaluated("dense", [2.0, 2.1, 2.4, 3.0]),
        evaluated("dense", [2.1, 2.21, 2.51, 3.12], 1),
        evaluated("longformer", [2.2, 2.19, 2.21, 2.2]),
        evaluated(
            "transformer_xl",
            [2.2, 2.1, 2.05, 2.0],
            positions="relative",
            **memory,
        ),
        evaluated("linformer", [1.0], **{**none, "objective": "mlm", "longer_reason": reason}),
    ]


def half(errors: list[float], differences: list[float]) -> float:
    """Of the interval over groups of text and replicates: both intervals, as the sides of a right angle; of
    two replicates their range, extended by the interval over groups."""
    over_text = stats.t.interval(0.95, GROUPS - 1, scale=np.sqrt(np.mean(np.square(errors))))[1]
    if len(differences) == 2:
        return float(over_text) + (max(differences) - min(differences)) / 2
    if len(differences) == 1:
        return float(over_text)
    low, high = stats.t.interval(
        0.95, len(differences) - 1, loc=np.mean(differences), scale=stats.sem(differences)
    )
    return math.hypot(over_text, (high - low) / 2)


def test_differences_to_the_trained_length_with_their_intervals(tmp_path: Path) -> None:
    part = part_of(tmp_path / "e", found(), "longer")
    text = part.text
    rows = {row["variant"]: row for row in table(text.split("## Longer than trained", 1)[1], "")}
    dense = rows["dense"]
    assert (dense["positions"], dense["trained at"], dense["replicates"]) == ("rotary", "512", "2")
    assert dense["at 1×"] == "2.050 ± 0.071"
    two = f"+0.105 ± {half([0.01, 0.01], [0.1, 0.11]):.3f}ʳ"
    eight = f"+1.010 ± {half([0.01, 0.01], [1.0, 1.02]):.3f}ʳ"
    assert (dense["at 2×"], dense["at 8×"]) == (f"2.155 ({two})", f"3.060 ({eight})")
    one = half([0.01], [0.0])
    assert rows["longformer"]["at 4×"] == f"2.210 (+0.010 ± {one:.3f})"
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "dense": "worse from 2×",
        "longformer": "not decided from 2×",
        "transformer_xl": "better",
        "linformer": "–",
    }
    assert rows["linformer"]["at 2×"] == "–"
    assert rows["linformer"]["why not"] == "linformer has parameters for a fixed number of positions"
    memory = table(text, "### Longer memory at test: data plays, width 64, 4 heads")
    assert [(row["variant"], row["memory in training"]) for row in memory] == [("transformer_xl", "64")]
    assert memory[0]["at 4×"].startswith("1.800 (-0.200 ± ")
    saved = part.files()["longer"]
    assert set(saved["kind"].dropna()) == {LENGTH, MEMORY}
    assert len(saved) == 3 * 4 + 3 + 1


def test_three_replicates_have_students_interval(tmp_path: Path) -> None:
    losses = ([2.0, 2.1], [2.1, 2.25], [2.0, 2.12])
    found = [evaluated("dense", [*pair], replicate) for replicate, pair in enumerate(losses)]
    second = longer_cells(frame_of(tmp_path / "e", found)).iloc[1]
    assert second["extra"] == pytest.approx(0.37 / 3)
    assert second["extra_half"] == pytest.approx(half([0.01] * 3, [b - a for a, b in losses]))


def test_without_such_cells_there_is_no_section(tmp_path: Path) -> None:
    (section,) = SECTIONS
    data = section.compute(read(write(tmp_path / "e", [record(cell_id="a")])), {})
    assert (section.tables(data), section.csv_tables(data), section.page_lists(data)) == ([], {}, [])
    (figure,) = section.figures(data)
    assert figure.cells.empty


def test_one_group_of_targets_has_no_interval(tmp_path: Path) -> None:
    one = evaluated("dense", [2.0, 2.5], nll_longer_error=None, tokens_evaluated_longer=T // 4)
    cells = longer_cells(frame_of(tmp_path / "e", [one]))
    assert cells["extra"].tolist() == pytest.approx([0.0, 0.5])
    assert cells["extra_half"].isna().all()
    assert verdict(cells) is None


@pytest.mark.parametrize(
    ("extra", "half", "said"),
    [
        ([0.0, 0.0, 0.0], [0.002, 0.002, 0.002], "no worse"),
        ([0.0, -0.02, -0.05], [0.002, 0.002, 0.002], "better"),
        ([-0.1, 0.1, 0.2], [0.02, 0.02, 0.02], "worse from 4×"),
        ([0.0, 0.0, 0.2], [0.02, 0.02, 0.02], "worse from 8×"),
        ([0.0, 0.1, 0.2], [0.002, 0.3, 0.3], "not decided from 4×"),
        ([0.0, math.nan, 0.2], [0.002, 0.3, 0.3], None),
    ],
)
def test_a_verdict_says_what_the_intervals_show(extra: list[float], half: list[float], said: str) -> None:
    own = pd.DataFrame({"factor": [1, 2, 4, 8], "extra": [0.0, *extra], "extra_half": [0.0, *half]})
    assert verdict(own.sample(frac=1, random_state=0)) == said


def test_intervals_contain_the_truth_as_often_as_they_say(tmp_path: Path) -> None:
    """Simulated cells: replicates share the chance of the text and have each their own chance of the seed."""
    (base,) = (row for _, row in frame_of(tmp_path / "e", [evaluated("dense", [2.0, 2.0])]).iterrows())
    source, truth, rows = np.random.default_rng(0), 0.05, []
    for cell in range(200):
        text = source.normal(0, 0.04, GROUPS)
        for replicate in range(3):
            groups = truth + text + source.normal(0, 0.01, GROUPS) + source.normal(0, 0.02)
            losses = [2.0, 2.0 + groups.mean()]
            rows.append(
                {
                    **base,
                    "label": f"cell {cell}",
                    "replicate": replicate,
                    "nll_longer": [loss * LN2 for loss in losses],
                    "bits_per_byte_longer": losses,
                    "nll_longer_error": [0.0, float(stats.sem(groups)) * LN2],
                }
            )
    cells = longer_cells(pd.DataFrame(rows))
    second = cells[cells["factor"] == 2]
    assert len(second) == 200
    covered = float((abs(second["extra"] - truth) <= second["extra_half"]).mean())
    assert 0.94 <= covered <= 0.995
    blind = float((abs(second["extra"] - truth) <= 0.5 * second["extra_half"]).mean())
    assert blind < 0.9, "the test can fail"


def test_the_picture_shows_positions_and_the_trained_length(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", found())
    frame = frame[frame["nll_longer_by_position"].notna()]
    figure = by_position(frame, look(frame))
    assert figure is not None
    (axis,) = figure.axes
    (mark,) = [line for line in axis.get_lines() if line.get_gid() == TRAINED]
    assert set(np.asarray(mark.get_xdata())) == {T}
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "512", "1k", "2k", "4k"]
    assert axis.get_xlim() == (0, 8 * T)
    style = look(frame).styles["transformer_xl"]
    (line,) = [one for one in axis.get_lines() if one.get_color() == style.colour]
    own = next(one for one in found() if one.variant == "transformer_xl")
    assert own.nll_longer_by_position
    assert own.bits_per_byte
    assert own.nll
    assert list(np.asarray(line.get_xdata())) == [T / 8 + T / 4 * k for k in range(32)]
    expected = [nats * own.bits_per_byte / own.nll for nats in own.nll_longer_by_position]
    assert list(np.asarray(line.get_ydata())) == pytest.approx(expected)
