"""Every row of the page's tables says of which model, and in which setting, its figures are."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from report_parts import sections_of, write
from test_report import failed
from test_report_budgets import fits
from test_report_decoding import cell
from test_report_longer import evaluated

from bench.records import Record
from bench.report.data.experiment import read
from bench.report.sections import Results, Section, compute, discover
from bench.report.text.listing import PageList

SETTINGS: list[dict[str, Any]] = [
    {},
    {"kv_heads": 1},
    {"d_model": 128},
    {"d_model": 128, "heads": 8},
    {"batch_size": 8},
    {"feed_forward_params": {"mult": 8}},
    {"feed_forward": "gated_mlp"},
    {"depth": 4},
    {"dtype": "bfloat16"},
    {"device": "cuda", "device_name": "Example GPU"},
    {"activations": "sqrt"},
]
"""Each differs from the first, or one before it, in one thing."""
WITH_LISTS = [s.name for s in discover() if type(s).page_lists is not Section.page_lists]


def found(seed: int) -> list[Record]:
    """Records of the same cells with other figures for each seed: trained, decoded, planned and failed."""
    chance, made = random.Random(seed), []
    for variant, own in itertools.product(("dense", "chunked"), SETTINGS):
        where = {"feed_forward_params": {"mult": 4}, **own}
        losses = [2.0 + chance.random() for _ in range(3)]
        times = {"nll": losses[0], "step_seconds_median": chance.random(), "contaminated": "load 3"}
        made.append(evaluated(variant, losses, **times, **where))
        made += [cell(variant, length, 0, chance.random(), **where) for length in (512, 2048)]
        made.append(failed("oom", "too much", variant=variant, seq_len=4096, **where))
        for way, depth in itertools.product(("keep", "sqrt"), (4, 12)):
            sizes = {
                "longest_seq_len": chance.randrange(2**20),
                "largest_batch_size": chance.randrange(99),
            }
            if not {"activations", "depth"} & {*own}:
                made.append(fits(variant, way, depth, **sizes, **where))
    for number, one in enumerate(made):
        one.cell_id = f"{number:016x}"
    return made


def lists_of(folder: Path, records: list[Record]) -> dict[str, PageList]:
    results: Results = compute(read(write(folder, records)), sections_of(*WITH_LISTS))
    named = [s for s in results.sections if s.name in WITH_LISTS]
    return {one.anchor: one for s in named for one in s.page_lists(results.data[s.name]) if one.table.rows}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[PageList, PageList]]:
    """The lists of two experiments with the same cells."""
    home = tmp_path_factory.mktemp("lists")
    first, second = (lists_of(home / str(seed), found(seed)) for seed in (1, 2))
    assert first.keys() == second.keys()
    return [(first[anchor], second[anchor]) for anchor in first]


def test_no_two_rows_have_the_same_names(pairs: list[tuple[PageList, PageList]]) -> None:
    """A column is one of names if other figures do not change it."""
    twice = {}
    for one, other in pairs:
        columns, others = (list(zip(*of.table.rows, strict=True)) for of in (one, other))
        assert one.table.titles == other.table.titles, one.anchor
        names = [own for own, again in zip(columns, others, strict=True) if sorted(own) == sorted(again)]
        counts = Counter(zip(*names, strict=True))
        if more := [row for row, count in counts.items() if count > 1]:
            twice[one.anchor] = more
    assert not twice
    assert len(pairs) > len(SETTINGS)


def test_lists_of_one_title_have_headings_of_their_own(pairs: list[tuple[PageList, PageList]]) -> None:
    counts = Counter((one.title, one.setting, tuple(one.table.titles)) for one, _ in pairs)
    assert max(counts.values()) == 1
