"""Whatever readable records hold, a report of them is drawn: figures at the ends of their bounds, lists that
are empty or of another length than their siblings, odd text, nothing but failures."""

from __future__ import annotations

import random
import tempfile
import typing
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_records import record_of

from bench import records
from bench.records import KEYS, STATUSES, Record
from bench.records.bounds import Bounds
from bench.records.reading import _BOUNDS, _LISTS, _TYPES
from bench.report import ReportError, build, compare

WORDS = [
    "keep",
    "clm",
    "",
    " ",
    "|",
    "$x_1$",
    "\\",
    "a\nb",
    "é\u202e",
    "<b>",
    "x" * 300,
    "unknown",
    "nan",
    "1e3",
    "None",
]
FEW: dict[str, list[Any]] = {
    "variant": ["dense", "chunked", "dense", "", "$"],
    "activations": ["keep", "keep", "checkpoint", "odd"],
    "objective": ["clm", "mlm", "mqar", ""],
    "data": ["plays", "mqar", "needle", "|"],
    "seq_len": [1, 2, 3, 512, 1024, 2**63 - 1],
    "depth": [1, 2, 4, 2**40],
    "batch_size": [0, 1, 4],
    "replicate": [0, 1, 2, 2**63 - 1],
    "twin": [0, 0, 0, 1],
    "status": ["ok", "ok", "ok", *STATUSES],
    "device_name": ["one", "one", None, ""],
    "measure": ["standard", None, "plan"],
    "started_at": ["2026-01-01T00:00:00+00:00", "2026-01-02", None, "never", "9999-12-31T23:59:59+14:00", ""],
    "variant_params": [{}, {"chunk": 4}, {"chunk": 4.0}, {"chunk": None}, {"a": [{"b": []}]}, {"": ""}],
    "feed_forward": ["mlp", "mlp", "glu", "|"],
    "feed_forward_params": [None, {}, {"mult": 4}, {"mult": 4.0}, {"": ""}],
    "stack": ["stack", "universal"],
    "stack_params": [None, {}],
    "data_params": [None, {}, {"n_pairs": 4}, {"n_pairs": "four"}, {"n_pairs": 1e100}, {"n_pairs": [1]}],
}
"""Values that records share, so that there are cells of several of them."""


def number(draw: random.Random, bounds: Bounds, kind: type) -> float:
    ends = [bounds.minimum, bounds.maximum, 0, 1, 2, 0.5, 1e-3, 1e6, 1e300, -1, 512, 3e9]
    fitting = [kind(value) for value in ends if bounds.hold(kind(value))]
    return draw.choice(fitting)


def odd_value(draw: random.Random, key: str) -> Any:
    allowed = _TYPES[key]
    if key in FEW:
        return draw.choice(FEW[key])
    kind = float if float in allowed else int
    if key in _LISTS:
        element = float if key != "distance_edges" else int
        length = draw.choice([0, 1, 2, 3, 7])
        return [draw.choice([None, number(draw, _BOUNDS[key], element)]) for _ in range(length)]
    if bool in allowed:
        return draw.choice([True, False])
    if key in _BOUNDS:
        return number(draw, _BOUNDS[key], kind)
    return draw.choice(WORDS)


def odd_records(seed: int, count: int) -> list[Record]:
    """Records that can be read, each key of which is null, or odd."""
    draw = random.Random(seed)
    share = draw.choice([0.1, 0.5, 0.95])  # of the keys that are not null
    shared = {key: odd_value(draw, key) for key in FEW}
    found = []
    for place in range(count):
        record = record_of(cell_id=f"c{place}")
        for key in KEYS:
            if key in ("cell_id", "schema_version"):
                continue
            needed = typing.cast(Any, Record.__dataclass_fields__[key]).default is not None
            if key in shared and draw.random() < 0.7:
                value = shared[key]
            elif needed or draw.random() < share:
                value = odd_value(draw, key)
            else:
                value = None
            setattr(record, key, value)
        found.append(records.parse(record.to_json()))
    return found


def report_of(found: list[Record]) -> None:
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|constrained_layout", UserWarning)  # as for any long label
        folder = Path(name) / "odd"
        for record in found:
            records.write(folder, record)
        try:
            report = build(folder)
        except ReportError:
            assert all(record.twin for record in found), "there is something to report on"
            return
        assert (report / "index.html").is_file()
        assert (report / "cells.parquet").is_file()
        with suppress(ReportError):  # of several machines
            compare(folder, folder)


@given(st.integers(0, 2**32), st.integers(1, 6))
@settings(deadline=None, max_examples=3)
@pytest.mark.slow
def test_whatever_readable_records_hold_a_report_is_drawn(seed: int, count: int) -> None:
    report_of(odd_records(seed, count))


@pytest.mark.slow
@given(st.integers(0, 2**32), st.integers(1, 12))
@settings(deadline=None, max_examples=150)
@example(3706550, 2)  # cells that start in the year 9999
@example(163, 2)  # a budget without its size
@example(11171, 2)  # longer memories, and no longer sequences
@example(10, 11)  # a memory of no positions
@example(226, 1)  # losses by position without the lengths of the sequences
def test_whatever_many_readable_records_hold_a_report_is_drawn(seed: int, count: int) -> None:
    report_of(odd_records(seed, count))
