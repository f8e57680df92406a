"""Baselines in reports: rows and lines among the models, and no rank for a model that is worse than the table
of order three."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_report import record, table, write
from test_report_memory import frame_of, look
from test_report_page import page_of

from bench.records import Record
from bench.report import build
from bench.report.data.statistics import cost_cells, quality_cells, summary
from bench.report.figures.lines import GREY
from bench.report.sections.pareto.data import pareto_cells
from bench.report.sections.pareto.plots import pareto
from bench.report.sections.quality.by_position import by_position
from bench.report.sections.quality.plots import losses

ORDERS = [4.5, 3.5, 3.0, 2.6, 2.4]
KNOWN: dict[str, Any] = {
    "ngram_bits_per_byte": ORDERS,
    "ngram_train_bytes": 250_000,
    "gzip_bits_per_byte": 3.2,
    "xz_bits_per_byte": 3.05,
}
BITS = {"dense": 2.5, "chunked": 2.9, "overlapping": 3.001, "longformer": 3.4}
"""Two are better than the table of order 3, which needs 3.0 bits per byte."""


def models(replicates: int = 2, **other: Any) -> list[Record]:
    """The longer the model's loss, the cheaper it is; so each would be on a front."""
    return [
        record(
            name,
            replicate=replicate,
            nll=bits * math.log(2),
            step_seconds_median=1 / bits,
            peak_bytes=int(1e6 / bits),
            flops_executed_step=int(1e9 / bits),
            **{**KNOWN, **other},
        )
        for name, bits in BITS.items()
        for replicate in range(replicates)
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(write(tmp_path_factory.mktemp("e"), models()), plots=False)


def test_baselines_are_rows_among_the_models(report: Path) -> None:
    text = (report / "summary.md").read_text()
    rows = table(text.split("## Quality", 1)[1], "### clm, data plays")
    assert [(row["rank"], row["variant"], row["bits per byte"]) for row in rows] == [
        ("baseline", "5-gram table", "2.400"),
        ("1", "dense", "2.500 ± 0.000"),
        ("baseline", "4-gram table", "2.600"),
        ("2", "chunked", "2.900 ± 0.000"),
        ("baseline", "3-gram table", "3.000"),
        ("–", "overlappingᵘ", "3.001 ± 0.000"),
        ("baseline", "xz -9e", "3.050"),
        ("baseline", "gzip -9", "3.200"),
        ("–", "longformerᵘ", "3.400 ± 0.000"),
        ("baseline", "2-gram table", "3.500"),
        ("baseline", "1-gram table", "4.500"),
    ]
    tables = {row["variant"]: (row["tokens trained"], row["perplexity"]) for row in rows}
    assert tables["3-gram table"] == ("250 k bytes", "8.000")
    assert tables["gzip -9"][0] == "–"
    assert "- ᵘ undertrained" in text.split("## Quality", 1)[1]
    tex = (report / "summary.tex").read_text()
    assert r"overlapping\textsuperscript{u}" in tex
    assert "3{-}gram table" in tex


def test_what_is_undertrained_is_on_no_front_and_keeps_nobody_off(report: Path) -> None:
    """longformer is the cheapest of all."""
    rows = table((report / "summary.md").read_text(), "### clm, data plays, length 512, depth 2")
    fronts = {row["variant"]: row["on the front of"] for row in rows}
    both = "time, memory, FLOPs"
    assert fronts == {"dense": both, "chunked": both, "overlappingᵘ": "–", "longformerᵘ": "–"}


@pytest.mark.slow
def test_the_page_ranks_nothing_that_is_undertrained(tmp_path: Path) -> None:
    page = page_of(write(tmp_path / "e", models()))
    by_label = dict(zip(page.data["label"], page.data["unranked"], strict=True))
    assert by_label == {"dense": False, "chunked": False, "overlapping": True, "longformer": True}
    texts = dict(zip(page.data["label"], page.data["score_text"], strict=True))
    assert texts["overlapping"].endswith("ᵘ")
    assert not texts["chunked"].endswith("ᵘ")
    assert {one["name"]: one["value"] for one in page.data["baselines"][0]}["3-gram table"] == 3
    (pool,) = page.data["pareto"]
    assert dict(zip(pool["label"], pool["undertrained"], strict=True)) == by_label
    assert [one["value"] for one in pool["baselines"]] == [3, 2.4, 3.2]
    assert "ᵘ" in page.within("dt")


def test_the_csv_has_the_baselines_and_what_is_undertrained(report: Path) -> None:
    cells = pd.read_csv(report / "summary.csv").set_index("label")
    found = cells[[f"ngram_{order}_bits_per_byte" for order in range(1, 6)]].to_numpy()
    assert found.tolist() == [ORDERS] * 4
    assert cells["zstd_bits_per_byte"].isna().all()
    assert cells["undertrained"].to_dict() == {name: bits > 3 for name, bits in BITS.items()}
    for end in ("rank_low", "rank_high"):
        assert cells[end].dropna().to_dict() == {"dense": 1, "chunked": 2}


@pytest.mark.parametrize("known", [{}, {"ngram_bits_per_byte": [4.5, 3.5]}])
@pytest.mark.slow
def test_without_a_table_of_order_three_everything_is_ranked(tmp_path: Path, known: dict[str, Any]) -> None:
    """Records of earlier versions have no baselines."""
    found = models(**{**dict.fromkeys(KNOWN), **known})
    text = (build(write(tmp_path / "e", found), plots=False) / "summary.md").read_text()
    rows = table(text.split("## Quality", 1)[1], "### clm, data plays")
    assert [row["rank"] for row in rows if row["rank"] != "baseline"] == ["1", "2", "3", "4"]
    assert len(rows) == 4 + 2 * bool(known)
    assert "ᵘ" not in text


@pytest.mark.slow
def test_models_of_ids_whose_bytes_are_unknown_have_no_rank(tmp_path: Path) -> None:
    """Nothing says whether they are trained; masked models never had baselines and keep their ranks."""
    unknown = [record(name, bits_per_byte=None, word_perplexity=None) for name in ("dense", "chunked")]
    masked = [record(name, objective="mlm", bits_per_byte=None) for name in ("dense", "chunked")]
    cells = quality_cells(frame_of(tmp_path / "cells", [*unknown, *masked])).set_index(["objective", "label"])
    assert cells["no_baseline"].to_dict() == {key: key[0] == "clm" for key in cells.index}
    assert cells["rank_low"].isna().to_dict() == {key: key[0] == "clm" for key in cells.index}
    text = (build(write(tmp_path / "e", unknown), plots=False) / "summary.md").read_text()
    rows = table(text.split("## Quality", 1)[1], "### clm, data plays")
    assert {(row["rank"], row["variant"]) for row in rows} == {("–", "chunkedⁿ"), ("–", "denseⁿ")}
    assert "- ⁿ no baseline: the bytes of its token ids are not known" in text
    both = summary(
        cost_cells(frame_of(tmp_path / "e", unknown)), quality_cells(frame_of(tmp_path / "e", unknown))
    )
    fronts = pareto_cells(both)
    assert len(fronts) == 2
    assert not fronts.filter(like="_front").eq("front").any(axis=None)


def test_a_replicate_alone_decides_nothing(tmp_path: Path) -> None:
    """The mean over replicates is compared with the mean of their tables."""
    found = [
        record(replicate=replicate, nll=bits * math.log(2), **{**KNOWN, "ngram_bits_per_byte": [5, 4, third]})
        for replicate, (bits, third) in enumerate(((3.1, 3.0), (2.8, 3.0), (3.0, 3.0)))
    ]
    assert not quality_cells(frame_of(tmp_path / "e", found))["undertrained"].any()


@pytest.mark.slow
def test_baselines_of_different_texts_are_a_range(tmp_path: Path) -> None:
    """Equal FLOPs train a cheaper variant on more text."""
    found = [
        record("dense", **KNOWN),
        record("chunked", **{**KNOWN, "ngram_bits_per_byte": [4.5, 3.5, 2.9, 2.6, 2.4]}),
    ]
    text = (build(write(tmp_path / "e", found), plots=False) / "summary.md").read_text()
    rows = table(text.split("## Quality", 1)[1], "### clm, data plays")
    bits = {row["variant"]: row["bits per byte"] for row in rows if row["rank"] == "baseline"}
    assert (bits["3-gram table"], bits["2-gram table"]) == ("2.900–3.000", "3.500")


def test_every_quality_figure_has_lines_of_baselines(tmp_path: Path) -> None:
    frame = frame_of(tmp_path / "e", models())
    cells = quality_cells(frame)
    drawn = {
        "y": (
            by_position(frame, look(frame)),
            pareto(pareto_cells(summary(cost_cells(frame), cells)), look(frame)),
        ),
        "x": (losses(cells, look(frame)),),
    }
    for side, figures in drawn.items():
        for figure in figures:
            assert figure is not None
            lines = [line for line in figure.axes[0].get_lines() if line.get_color() == GREY]
            places = [np.unique(np.asarray(getattr(line, f"get_{side}data")())) for line in lines]
            assert {float(place[0]) for place in places if len(place) == 1} >= {3.0, 2.4, 3.2}
            names = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
            assert {"3-gram table", "5-gram table", "gzip -9"} <= set(names)


def test_a_knob_of_the_data_that_older_records_lack_is_null(tmp_path: Path) -> None:
    old = {"path": None, "max_bytes": None}
    new = {**old, "bpe": None, "tokenizer": None}
    frames = [
        frame_of(
            tmp_path / name,
            [record(replicate=0, data_params=old), record(replicate=1, data_params=new), *more],
        )
        for name, more in (
            ("two", []),
            ("three", [record("chunked", data_params={**new, "bpe": 2048}, data_sha256="ef" * 32)]),
        )
    ]
    assert [sorted(frame["corpus"].unique()) for frame in frames] == [
        ["plays"],
        ["plays", "plays (bpe=2048)"],
    ]


def test_the_sentence_beneath_a_table_says_what_compares(report: Path) -> None:
    text = (report / "summary.md").read_text()
    assert (
        "with an equal context: here 65,536 targets, windows of 512 tokens, after training on 262 k" in text
    )
