"""The page that sets the variants, their claims and measured exponents beside the rows of the survey."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import variants
from bench.report.text import markdown, units
from bench.report.text.columns import Column
from bench.survey.rows import CLASSES, ROWS, SOURCE, Row
from variants.base import Info

FIGURES = {"attention": "attention FLOPs", "memory": "peak memory", "time": "step time"}
"""Names of `growth.data.FIGURES` → titles of columns."""
YES, NO, MISSING = "✓", "✗", "–"
NOT_YET = "not here yet"
WIDTH = 110

Measured = Mapping[tuple[str, str], str]
"""(variant, name of a figure) → the exponent and its lengths in words."""


@dataclass(frozen=True)
class Here:
    """A variant with its default knobs."""

    name: str
    info: Info
    no_decoding: str | None

    @classmethod
    def of(cls, name: str) -> Here:
        """Import the variant."""
        mixer = variants.load_mixer(name)
        config = mixer.Config()
        return cls(name, mixer.info_for(config), mixer.no_decoding(config))


def installed() -> list[Here]:
    """All variants with one kind of layer, sorted by name."""
    return [Here.of(name) for name in variants.mixers()]


def belonging(row: Row, every: Sequence[Here]) -> list[Here]:
    """The variants whose paper is that of the row."""
    return [one for one in every if f"arXiv:{row.arxiv}" in one.info.paper]


def measured(folder: Path) -> dict[tuple[str, str], str]:
    """The exponents of an experiment's records, by variant and figure: of several settings and depths that
    with the longest sequence, then that with the most lengths. Raises ReportError as `experiment.read`.
    """
    from bench.report.data.experiment import read
    from bench.report.sections import compute, discover

    fits: pd.DataFrame = compute(read(folder), discover()).data["growth"]
    if fits.empty:
        return {}
    fits = fits[(fits["axis"] == "seq_len") & fits["figure"].isin(FIGURES)]
    fits = fits.sort_values(["last", "points"], ascending=False, kind="stable")
    best = fits.drop_duplicates(["variant", "figure"])
    return {
        (str(fit["variant"]), str(fit["figure"])): (
            f"{fit['exponent']:.2f} ({units.length(fit['first'])}–{units.length(fit['last'])})"
        )
        for _, fit in best.iterrows()
    }


def page(every: Sequence[Here], found: Measured, origin: str) -> str:
    """The page as Markdown; `origin` says in words where the exponents come from."""
    listed = [(row, one) for row in ROWS for one in (belonging(row, every) or (None,))]
    rows = [row for row, _ in listed]
    of_survey = [
        *_of_survey(rows),
        Column("variant", [_variant(row, one) for row, one in listed], right=False),
        *_of_variants([one for _, one in listed], found),
    ]
    known = {one.name for _, one in listed if one is not None}
    others = [one for one in every if one.name not in known]
    beyond = [Column("variant", [one.name for one in others], right=False), *_of_variants(others, found)]
    count = sum(bool(belonging(row, every)) for row in ROWS)
    classes = ", ".join(f"{short} {words}" for short, words in CLASSES.items())
    lead = (
        f"The rows are those of {SOURCE}; *model* to *decodes* are its columns, with N for the length. "
        f"Classes: {classes}. *decodes* says whether the survey counts the model as able to generate text. "
        f"Everything else is about the variants here: {count} of {len(ROWS)} rows have one. *claim*: the "
        "exponents of T in time and in memory that the paper claims for the default knobs, and its formula. "
        "*causal*: has a form in which no output depends on a later token. *generates*: is decoded token by "
        "token with its default knobs. A measured exponent is the slope of log cost against log length; the "
        "lengths are in brackets. *attention FLOPs* are by formula, without projections and feed-forward "
        f"layers. {origin}"
    )
    end = (
        "Mixtures have the claims of their members and are not listed. `python -m bench.survey --out "
        "docs/survey.md` writes this page. `python -m bench.survey results/reference-cpu` prints it with the "
        "exponents of an experiment's records."
    )
    parts = [
        "# The survey's table, with the variants here",
        _wrapped(lead),
        markdown.table(of_survey).rstrip(),
        _differences(listed),
        "## Variants that the table does not list",
        markdown.table(beyond).rstrip(),
        _wrapped(end),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def _of_survey(rows: Sequence[Row]) -> list[Column]:
    """The survey's own columns; a row with several variants names its model once."""
    first = [place == 0 or rows[place - 1] != row for place, row in enumerate(rows)]
    texts = {
        "model": [f"{row.model} ({row.cited}, arXiv:{row.arxiv})" for row in rows],
        "class": [row.classes for row in rows],
        "complexity": [row.complexity for row in rows],
        "decodes": [YES if row.decodes else NO for row in rows],
    }
    return [
        Column(title, [cell if new else "" for cell, new in zip(cells, first, strict=True)], right=False)
        for title, cells in texts.items()
    ]


def _variant(row: Row, one: Here | None) -> str:
    return one.name if one is not None else f"none: {row.why_none or NOT_YET}"


def _of_variants(every: Sequence[Here | None], found: Measured) -> list[Column]:
    """Claim, measured exponents and capabilities of variants."""
    measured_columns = [
        Column(
            title,
            [MISSING if one is None else found.get((one.name, name), MISSING) for one in every],
            optional=False,
        )
        for name, title in FIGURES.items()
    ]
    causal = [MISSING if one is None else _mark(one.info.caps.causal) for one in every]
    generates = [MISSING if one is None else _mark(one.no_decoding is None) for one in every]
    return [
        Column("claim", [MISSING if one is None else _claim(one.info) for one in every], right=False),
        *measured_columns,
        Column("causal", causal, right=False),
        Column("generates", generates, right=False),
    ]


def _claim(info: Info) -> str:
    claim = info.complexity
    return f"T^{claim.time:g}, T^{claim.memory:g}: {claim.formula} ({claim.source})"


def _mark(value: bool) -> str:
    return YES if value else NO


def _differences(listed: Sequence[tuple[Row, Here | None]]) -> str:
    """Why a variant does not generate, and where the survey does not agree."""
    lines = []
    for row, one in listed:
        if one is not None and one.no_decoding:
            also = "; the survey lists it as a decoder" if row.decodes else ""
            lines.append(f"- {one.name} does not generate: {one.no_decoding}{also}.")
        elif one is not None and not row.decodes:
            lines.append(f"- {one.name} generates; the survey does not list it as a decoder.")
    return "\n".join(lines)


def without_records() -> str:
    """Words for a page without measured exponents."""
    return "No records were given, so the measured exponents are blank."


def of_records(folder: Path, found: Measured, every: Sequence[Here]) -> str:
    """Words for a page with the exponents of an experiment."""
    count = len({name for name, _ in found} & {one.name for one in every})
    return f"Measured exponents are those of the records of `{folder.name}`, of {count} variants."
