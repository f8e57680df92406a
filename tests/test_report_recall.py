"""Tasks that ask for answers: what the report's tables and pictures of accuracy say."""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from report_parts import part_of
from test_report import raw, record, table
from test_report_memory import frame_of, look, text_of

from bench.records import Record
from bench.report.data.collect import collect
from bench.report.data.files import parquet
from bench.report.data.groups import natural
from bench.report.data.statistics import quality_cells
from bench.report.sections.rates.data import rate_cells
from bench.report.sections.recall import plots as recall_plots
from bench.report.sections.recall.data import axes_of, recall_cells
from bench.report.sections.recall.state import by_state, state_needed

STATE = {"dense": 65_536, "longformer": 15_000, "performer": 131_072}
REACH = {"dense": 63, "longformer": 30, "performer": None}
PAIRS = (4, 16, 8)


def answers(variant: str, n_pairs: int, replicate: int = 0, **other: Any) -> Record:
    """A finished cell of associative recall; text's figures are null. `state_bytes` is of one sequence."""
    accuracy = 0.99 if variant == "dense" else 0.9 - 0.04 * n_pairs + 0.01 * replicate
    text = ("perplexity", "bits_per_byte", "word_perplexity", "unigram_perplexity", "nll_by_position")
    values: dict[str, Any] = {
        **dict.fromkeys(text),
        "seq_len": 64,
        "cell_id": f"{variant}-{n_pairs}-{replicate}-{len(other)}",
        "objective": "recall",
        "data": "mqar",
        "data_params": {"n_pairs": n_pairs, "n_symbols": 64},
        "data_sha256": f"{n_pairs:064d}",
        "accuracy": accuracy,
        "guess_accuracy": 1 / n_pairs,
        "state_bytes": STATE[variant],
        "reach": REACH[variant],
        "distance_edges": [1, 2, 4, 8, 16, 32],
        "accuracy_by_distance": [None, *(accuracy - 0.01 * k for k in range(5))],
    }
    values = {"batch_size": 4, **values, **other}
    values["state_bytes"] *= values["batch_size"]  # a record has the state of the whole batch
    return record(variant, replicate=replicate, **values)


def recalled() -> list[Record]:
    return [answers(v, n, r) for v, n, r in itertools.product(STATE, PAIRS, (0, 1, 2))]


def share(values: Sequence[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f} %"


def test_accuracy_stands_beside_guessing_a_column_a_setting_of_the_knobs(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    part = part_of(folder, recalled(), "recall")
    rows = {row["variant"]: row for row in table(part.text, "### recall, data mqar, width 64, 4 heads")}
    assert list(rows) == ["guessing", "dense", "longformer", "performer"]
    assert [title for title in rows["dense"] if "=" in title] == ["n_pairs=4", "n_pairs=8", "n_pairs=16"]
    cells = raw(folder)
    for variant, n in itertools.product(STATE, PAIRS):
        own = cells[(cells.variant == variant) & (cells.guess_accuracy == 1 / n)]
        assert len(own) == 3
        assert rows[variant][f"n_pairs={n}"] == share(list(own.accuracy))
    assert [rows["guessing"][f"n_pairs={n}"] for n in (4, 8, 16)] == ["25.0 %", "12.5 %", "6.2 %"]
    assert {v: (row["state"], row["reaches"]) for v, row in rows.items()} == {
        "guessing": ("–", "–"),
        "dense": ("64.0 KiB", "all"),
        "longformer": ("14.6 KiB", "30"),
        "performer": ("128 KiB", "–"),
    }
    for absent in ("perplexity", "bits per byte", "stride", "unigram"):
        assert absent not in rows["dense"]
    assert "## Quality" not in part.text
    figures = part.files()["recall"]
    assert len(figures) == len(STATE) * len(PAIRS)
    assert set(figures.knobs) == {f"n_pairs={n}" for n in PAIRS}


def test_data_is_told_apart_by_the_knobs_that_differ_and_by_its_hash_where_none_does(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "knobs", [answers("dense", n) for n in (4, 16)])
    assert set(frame["corpus"]) == {"mqar (n_pairs=4)", "mqar (n_pairs=16)"}
    alone = frame_of(tmp_path / "alone", [answers("dense", 4), answers("longformer", 4)])
    assert set(alone["corpus"]) == {"mqar"}
    changed = [
        record(variant, cell_id=sha, data_sha256=sha * 64, data_params={})
        for variant, sha in (("dense", "a"), ("chunked", "b"))  # of one variant the older would be stale
    ]
    assert set(frame_of(tmp_path / "sha", changed)["corpus"]) == {"plays@aaaaaaaa", "plays@bbbbbbbb"}
    # A record of before there were parameters is of the same data if its hash is.
    before = [answers("dense", 4, 1, data_params=None), answers("dense", 4), answers("dense", 8)]
    assert sorted(frame_of(tmp_path / "old", before)["knobs"]) == ["n_pairs=4", "n_pairs=4", "n_pairs=8"]


def test_a_length_has_a_guess_of_its_own(tmp_path: Path) -> None:
    found = [
        answers("dense", 4, seq_len=n, cell_id=str(n), guess_accuracy=g) for n, g in ((64, 0.25), (128, 0.2))
    ]
    rows = table(part_of(tmp_path / "e", found, "recall").text, "### recall, data mqar, width 64, 4 heads")
    assert [(r["variant"], r["length"], r["accuracy"]) for r in rows] == [
        ("guessing", "64", "25.0 %"),
        ("dense", "64", "99.0 %"),
        ("guessing", "128", "20.0 %"),
        ("dense", "128", "99.0 %"),
    ]


def test_text_and_tasks_have_a_section_each(tmp_path: Path) -> None:
    found = [record(), record("chunked"), answers("dense", 4)]
    part = part_of(tmp_path / "e", found, "recall", "cells")
    assert [r["variant"] for r in table(part.text, "### clm, data plays")] == ["dense", "chunked"]
    assert len(table(part.text, "### recall, data mqar, width 64, 4 heads")) == 2
    summary = part.files()["summary"].set_index("corpus")
    assert summary.loc["mqar", "guess_accuracy"] == 0.25


def lines(axis: Axes, style: str = "-") -> dict[str, list[tuple[float, float]]]:
    """Colour → points of the lines drawn in that style."""
    return {
        str(line.get_color()): [
            (float(x), float(y))
            for x, y in zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True)
        ]
        for line in axis.get_lines()
        if line.get_linestyle() == style
    }


def test_lines_over_the_number_of_pairs(tmp_path: Path) -> None:
    found = recalled()
    frame = frame_of(tmp_path / "e", found)
    figure = recall_plots.against("n_pairs")(recall_cells(frame, pd.DataFrame()), look(frame))
    assert figure is not None
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["4", "8", "16"]
    drawn = lines(axis)
    for variant in STATE:
        expected = [
            (
                n,
                statistics.mean(
                    float(r.accuracy or 0)
                    for r in found
                    if (r.variant, r.cell_id.split("-")[1]) == (variant, str(n))
                ),
            )
            for n in sorted(PAIRS)
        ]
        got = drawn[look(frame).styles[variant].colour]
        assert [x for x, _ in got] == [n for n, _ in expected]
        assert [y for _, y in got] == pytest.approx([y for _, y in expected])
    (guess,) = lines(axis, "--").values()
    assert guess == [(4, 0.25), (8, 0.125), (16, 0.0625)]
    low, high = axis.get_ylim()
    assert low < 0
    assert high > 1


def test_accuracy_against_state_has_a_panel_a_number_of_pairs(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", recalled())
    figure = by_state(recall_cells(frame, pd.DataFrame()), look(frame))
    assert figure is not None
    assert [axis.get_title().split(",")[0] for axis in figure.axes] == [
        "n_pairs=4",
        "n_pairs=8",
        "n_pairs=16",
    ]
    for axis, n in zip(figure.axes, (4, 8, 16), strict=True):
        assert axis.get_xscale() == "log"
        points = [line for line in axis.get_lines() if len(np.asarray(line.get_xdata())) == 1]
        assert {float(np.asarray(p.get_xdata())[0]) for p in points} == set(STATE.values())
        (guess,) = lines(axis, "--").values()
        assert {y for _, y in guess} == {1 / n}
    same = recall_cells(frame, pd.DataFrame()).assign(sequence_state_bytes=1.0)
    assert by_state(same, look(frame)) is None


def test_a_variant_that_carries_nothing_has_its_place_beside_the_others(tmp_path: Path) -> None:
    """Chunks do, where one has just ended."""
    frame = frame_of(tmp_path / "e", recalled())
    cells = recall_cells(frame, pd.DataFrame())
    cells.loc[cells["sequence_state_bytes"] == min(STATE.values()), "sequence_state_bytes"] = 0
    figure = by_state(cells, look(frame))
    assert figure is not None
    for axis in figure.axes:
        low, high = axis.get_xlim()
        points = [line for line in axis.get_lines() if len(np.asarray(line.get_xdata())) == 1]
        drawn = {float(np.asarray(p.get_xdata())[0]) for p in points}
        assert drawn == {0.0, *set(STATE.values()) - {min(STATE.values())}}
        assert low < 0 < max(drawn) < high
        assert axis.get_xticks()[0] == 0
    figure.savefig(tmp_path / "state.png")


WINDOWS = {4: 0.2, 16: 0.91, 32: 0.95}
FEATURES = {8: 0.3, 64: 0.45, 128: 0.4}


def sweep_of_states() -> list[Record]:
    """Windows that need 16 tokens for nine tenths of dense's 99 %, and features that never are enough."""
    found = [answers("dense", 8, r) for r in (0, 1)]
    for variant, knob, sizes in (("longformer", "window", WINDOWS), ("performer", "n_features", FEATURES)):
        for (size, accuracy), r in itertools.product(sizes.items(), (0, 1)):
            of: dict[str, Any] = {"variant_params": {knob: size}, "state_bytes": 1024 * size}
            of |= {"accuracy": accuracy + 0.02 * r - 0.01, "cell_id": f"{variant}-{size}-{r}"}
            found.append(answers(variant, 8, r, **of))
    return found


def test_heads_that_set_the_state_are_points_of_one_line(tmp_path: Path) -> None:
    """In one figure and one table, unlike all else that differs in heads."""
    found = [answers("dense", 8, 0)]
    for heads, accuracy in {1: 1.0, 4: 0.95, 16: 0.5}.items():
        for variant, own in (("longformer", accuracy), ("performer", 0.125)):
            of: dict[str, Any] = {"variant_params": {}, "state_bytes": 4096 // heads, "heads": heads}
            found.append(answers(variant, 8, **of, accuracy=own, cell_id=f"{variant}-{heads}"))
    part = part_of(tmp_path / "e", found, "recall")
    paths = [one.path for one in part.drawn("recall")["recall"]]
    assert [path for path in paths if "accuracy_by_state" in path] == ["plots/accuracy_by_state"]
    (heading,) = [line for line in part.text.splitlines() if re.fullmatch(r"#.*: state", line)]
    rows = {row["variant"]: row for row in table(part.text, heading)}
    row = rows["longformer"]
    assert (row["state needed"], row["as"]) == ("1.00 KiB", "longformer, heads=4")
    assert (row["at"], row["of"]) == ("4.00 KiB", "longformer, heads=1")
    assert rows["performer"]["as"] == "–"


def test_a_sweep_over_states_is_a_line_a_variant_below_dense(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", sweep_of_states())
    figure = by_state(recall_cells(frame, pd.DataFrame()), look(frame))
    assert figure is not None
    (axis,) = figure.axes
    connected = [points for points in lines(axis).values() if len(points) > 1]
    expected = [[(1024 * n, a) for n, a in sizes.items()] for sizes in (WINDOWS, FEATURES)]
    assert [[x for x, _ in points] for points in connected] == [[x for x, _ in one] for one in expected]
    for points, one in zip(connected, expected, strict=True):
        assert [y for _, y in points] == pytest.approx([y for _, y in one])
    (limit,) = lines(axis, ":").values()
    assert [y for _, y in limit] == pytest.approx([0.99, 0.99])
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["dense", "longformer", "performer", "dense, the limit", "guessing"]


def test_the_table_says_how_much_state_is_needed(tmp_path: Path) -> None:
    text = part_of(tmp_path / "e", sweep_of_states(), "recall").text
    rows = {row["variant"]: row for row in table(text, "### recall, data mqar, width 64: state")}
    assert list(rows) == ["longformer", "performer"]
    assert rows["longformer"]["states measured"] == "4.00–32.0 KiB"
    assert (rows["longformer"]["state needed"], rows["longformer"]["/ dense"]) == ("16.0 KiB", "25.0 %")
    assert rows["longformer"]["as"] == "longformer (window=16)"
    assert rows["performer"]["state needed"] == "–"
    best = [rows["performer"][title] for title in ("best accuracy", "at", "of", "dense")]
    assert best == ["45.0 %", "64.0 KiB", "performer (n_features=64)", "99.0 %"]
    batch = [answers("dense", 4, batch_size=8), answers("longformer", 4, batch_size=8)]
    cells = recall_cells(frame_of(tmp_path / "batch", batch), pd.DataFrame())
    assert list(cells["sequence_state_bytes"]) == [STATE["dense"], STATE["longformer"]]
    frame = frame_of(tmp_path / "one", recalled())
    assert state_needed(recall_cells(frame, pd.DataFrame())).empty, "each has one size"


@pytest.mark.parametrize(
    ("edges", "scale"), [([1, 2, 4, 8, 16, 32], "log"), ([1, 13, 25, 38, 50, 62], "linear")]
)
def test_accuracy_by_distance_marks_the_reach(tmp_path: Path, edges: list[int], scale: str) -> None:
    found = [answers(v, 4, r, distance_edges=edges) for v in STATE for r in (0, 1)]
    frame = frame_of(tmp_path / "e", found)
    figure = recall_plots.by_distance(recall_cells(frame, pd.DataFrame()), look(frame))
    assert figure is not None
    (axis,) = figure.axes
    assert axis.get_xscale() == scale
    drawn = lines(axis)
    for variant in STATE:
        points = drawn[look(frame).styles[variant].colour]
        assert [x for x, _ in points] == edges[1:], "nothing fell into the first bucket"
        own = [r.accuracy_by_distance or [] for r in found if r.variant == variant]
        assert [y for _, y in points] == pytest.approx(
            [statistics.mean(ys) for ys in zip(*own, strict=True) if None not in ys]
        )
    # dense reaches everything, and of performer's nothing is known.
    assert lines(axis, ":") == {look(frame).styles["longformer"].colour: [(30, 0), (30, 1)]}


def test_the_map_has_the_same_accuracies_and_ends_where_the_reach_does(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", [answers(v, 4) for v in STATE])
    cells = recall_cells(frame, pd.DataFrame())
    figure = recall_plots.distance_map(cells, look(frame))
    assert figure is not None
    axis, _ = figure.axes
    (image,) = axis.get_images()
    expected = np.array(list(cells["accuracy_by_distance"]), dtype=float)
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), expected)
    assert [label.get_text() for label in axis.get_yticklabels()] == list(cells["label"])
    said = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axis.texts}
    assert said == {
        (row, column): f"{100 * share:.0f}"
        for row, shares in enumerate(expected)
        for column, share in enumerate(shares)
        if np.isfinite(share)
    }
    row = list(cells["label"]).index("longformer")
    (bar,) = axis.get_lines()  # it reaches 30 tokens: more than 16, the fifth column, less than 32
    assert [tuple(map(float, point)) for point in bar.get_xydata()] == [(4.5, row - 0.5), (4.5, row + 0.5)]


def test_no_distances_no_picture(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", [answers("dense", 4, distance_edges=None, accuracy_by_distance=None)])
    cells = recall_cells(frame, pd.DataFrame())
    assert recall_plots.by_distance(cells, look(frame)) is None
    assert recall_plots.distance_map(cells, look(frame)) is None


def test_the_pictures_of_recall_are_linked_and_cost_is_no_flood(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    text = text_of(folder, recalled(), plots=True)
    plots = folder / "report" / "plots"
    stems = {"accuracy_by_n_pairs", "accuracy_by_state", "accuracy_by_distance", "accuracy_map"}
    assert {path.stem for path in plots.glob("*.png")} == stems
    for stem in stems:
        assert imread(plots / f"{stem}.png").std() > 0.01
        assert f"](plots/{stem}.png)](plots/{stem}.svg)" in text
    assert text.count("<details><summary>recall") == len(PAIRS) - 1
    assert table(text, "### recall, data mqar (n_pairs=4), depth 2")


def test_a_record_without_parameters_and_one_without_any_can_stand_in_one_table() -> None:
    found = [record(data_params={}), record("chunked", data_params=None)]
    params = pd.read_parquet(io.BytesIO(parquet(found, {}))).set_index("variant")["data_params"]
    assert params["dense"] == "{}"
    assert params["chunked"] is None or math.isnan(params["chunked"])


def test_numbers_within_words_sort_as_numbers() -> None:
    names = ["mqar (n_pairs=16)", "mqar (n_pairs=4)", "mqar", "mqar (n_pairs=4, power_a=0.5)"]
    names += ["mqar (n_pairs=4, power_a=0.25)"]
    assert sorted(names, key=natural) == [
        "mqar",
        "mqar (n_pairs=4)",
        "mqar (n_pairs=4, power_a=0.25)",
        "mqar (n_pairs=4, power_a=0.5)",
        "mqar (n_pairs=16)",
    ]
    assert sorted([None, 4.0, math.nan, 2], key=natural)[:2] == [2, 4.0]


def test_lengths_and_budgets_that_follow_the_pairs_and_a_search_over_rates(tmp_path: Path) -> None:
    """As at the paper's sizes: longer sequences and more training for more pairs, each at its best rate."""
    found = []
    for n, rate, variant in itertools.product((4, 16), (0.001, 0.002), ("dense", "longformer")):
        best = rate == (0.002 if n == 4 else 0.001)
        of: dict[str, Any] = {"seq_len": 16 * n, "train_budget": "tokens", "train_amount": 1000.0 * n}
        of |= {"learning_rate": rate, "nll": 0.1 if best else 0.9, "accuracy": 0.9 if best else 0.2}
        of |= {"state_bytes": 1024 * n, "reach": 16 * n - 1, "cell_id": f"{variant}{n}{rate}"}
        found.append(answers(variant, n, **of))
    folder = tmp_path / "e"
    part = part_of(folder, found, "recall")
    rows = table(part.text.split("## Recall", 1)[1], "### recall, data mqar, width 64, 4 heads")
    assert [row["variant"] for row in rows] == ["guessing", "dense", "longformer"]
    assert rows[0]["n_pairs=16, length 256"] == "6.2 %"
    for row in rows[1:]:
        assert (row["n_pairs=4, length 64"], row["n_pairs=16, length 256"]) == ("90.0 %", "90.0 %")
        assert (row["learning rate"], row["state"], row["reaches"]) == ("0.001–0.002", "4.00–16.0 KiB", "all")
    assert len(part.files()["recall"]) == len(found)
    frame = collect(folder).frame
    cells = recall_cells(frame, rate_cells(frame, quality_cells(frame)))
    cells = cells[cells["best"]]
    assert axes_of(cells) == ["n_pairs"]
    figure = recall_plots.against("n_pairs")(cells, look(frame))
    assert figure is not None
    (axis,) = figure.axes
    assert lines(axis)[look(frame).styles["dense"].colour] == [(4, 0.9), (16, 0.9)]
