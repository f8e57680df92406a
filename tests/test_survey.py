"""The survey's table beside the variants: every row, its variants by their paper, and measured exponents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_report import record, write

import variants
from bench.survey import page as pages
from bench.survey.__main__ import main
from bench.survey.page import Here, belonging, installed, page
from bench.survey.rows import CLASSES, ROWS

ROOT = Path(__file__).parents[1]
WITHOUT_LENGTH = ("B²",)
"""Complexities that do not contain the length: blocks of B tokens."""
EXPONENTS = {"N": 1, "k·N": 1, "N·m": 1, "N·(k+m)": 1, "N·log N": 1, "N·√N": 1.5, "N²": 2}
"""Complexity as the survey prints it → its exponent; the others have several lengths."""


@pytest.fixture(scope="module")
def every() -> list[Here]:
    return installed()


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    main([str(ROOT / "results" / "zoo-cpu"), "--out", str(tmp_path / "survey.md")])
    assert (ROOT / "docs" / "survey.md").read_text() == (tmp_path / "survey.md").read_text(), (
        "run python -m bench.survey results/zoo-cpu --out docs/survey.md"
    )


def test_each_row_of_the_survey_is_there_once() -> None:
    assert len(ROWS) == 26 + 7, "efficient attention, and sparse models"
    assert len({row.arxiv for row in ROWS}) == len({row.model for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert re.fullmatch(r"\d{4}\.\d{5}", row.arxiv)
        assert set(row.classes.split("+")) <= set(CLASSES)


def test_a_row_has_a_variant_or_a_reason_but_not_both(every: list[Here]) -> None:
    for row in ROWS:
        assert not (row.why_none and belonging(row, every)), row.model


def test_the_exponents_that_variants_take_from_the_survey_are_its_own(every: list[Here]) -> None:
    found = {(row.complexity, one.info.complexity.survey) for row in ROWS for one in belonging(row, every)}
    for complexity, survey in found:
        assert (survey is None) == (complexity in WITHOUT_LENGTH), complexity
        assert survey == EXPONENTS.get(complexity, survey)
    listed = {one.name for row in ROWS for one in belonging(row, every)}
    assert not [
        one.name for one in every if one.info.complexity.survey is not None and one.name not in listed
    ]


def test_every_variant_is_on_the_page(every: list[Here]) -> None:
    assert {one.name for one in every} == set(variants.mixers())
    cells = {cell for row in rows_of(page(every, {}, "")) for cell in row}
    assert {one.name for one in every} <= cells


def rows_of(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_two_variants_of_a_row_name_its_model_once_and_differences_are_said(every: list[Here]) -> None:
    by_name = {one.name: one for one in every}
    linear, sparse = by_name["linformer"], by_name["sparse_fixed"]
    text = page(
        [replace(linear, no_decoding=None), replace(sparse, no_decoding="cannot"), by_name["sparse_strided"]],
        {},
        "",
    )
    assert "- linformer generates; the survey does not list it as a decoder." in text
    assert "- sparse_fixed does not generate: cannot; the survey lists it as a decoder." in text
    models = [row[0] for row in rows_of(text) if row[4:5] == ["sparse_strided"]]
    assert models == [""]


def test_exponents_of_records_stand_beside_the_claims(
    tmp_path: Path, every: list[Here], capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        record(
            name,
            length,
            depth=2,
            step_seconds_median=1e-6 * length**power,
            flops_attention_step=length**power,
        )
        for name, power in (("dense", 2), ("longformer", 1))
        for length in (512, 1024, 2048, 4096)
    ]
    folder = write(tmp_path / "scaling", records)
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "records of `scaling`, of 2 variants" in printed
    found = {row[4]: row for row in rows_of(printed) if len(row) > 9} | {
        row[0]: row for row in rows_of(printed)
    }
    assert "1.00 (1k–4k)" in found["longformer"] or "1.00 (512–4k)" in found["longformer"]
    assert [cell for cell in found["dense"] if cell.startswith("2.00 (")]
    assert pages.MISSING in found["reformer"]


def test_a_folder_without_records_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("bench.survey: ")
