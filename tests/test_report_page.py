"""index.html as text: whole, closed, escaped, and of one mind with summary.md."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_report import failed, record, sweep, table, write

import variants
from bench.report import build
from bench.report.data import statistics
from bench.report.data.experiment import read
from bench.report.figures import chart_data as figures
from bench.report.figures.style import Style, looks_of
from bench.report.page import html
from bench.report.page.symbols import DARK, contrast, on_dark, symbols
from bench.report.sections import Results, compute, discover
from bench.report.sections.cells.data import Cells, best_trained
from bench.report.sections.cells.page import COLUMNS

LIMIT = 5 * 2**20


class Page(HTMLParser):
    """What a browser would make of the file: elements with attributes, texts of elements, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], text))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def within(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        kinds = [attributes.get("type") for attributes in self.all("script")]
        found: dict[str, Any] = json.loads(self.within("script")[kinds.index("application/json")])
        return found


def results_of(folder: Path) -> Results:
    return compute(read(folder), discover())


def page_of(folder: Path) -> Page:
    """The page of a report, without its other files."""
    return Page(html(results_of(folder)))


def page_file(folder: Path) -> Path:
    """The same, as a file."""
    path = folder / "index.html"
    path.write_text(html(results_of(folder)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("demo"), sweep())
    build(folder, plots=False)
    return folder


@pytest.fixture(scope="module")
def page(demo: Path) -> Page:
    return Page((demo / "report" / "index.html").read_text(encoding="utf-8"))


def test_every_cell_reads_as_in_summary_md(demo: Path, page: Page) -> None:
    """For each cell of the page's table its row in summary.md, figure by figure."""
    written = (demo / "report" / "summary.md").read_text()
    rows = {depth: table(written, f"### clm, depth {depth}") for depth in ("2", "4")}
    columns = {column["title"]: column["text"] for column in page.data["table"]}
    shared = ["step time", "95 % interval", "time / dense", "throughput", "peak memory", "memory / dense"]
    shared += ["executed FLOPs", "attention FLOPs", "replicates", "status"]
    count = len(columns["variant"])
    assert count == sum(map(len, rows.values())) == 32
    for place in range(count):
        (same,) = [
            row
            for row in rows[columns["depth"][place]]
            if (row["variant"], row["length"]) == (columns["variant"][place], columns["length"][place])
        ]
        assert {title: columns[title][place] for title in shared} == {title: same[title] for title in shared}
    trained = table(written, "### clm, data plays")
    quality = {(row["variant"], row["length"], row["depth"]): row for row in trained}
    for place in range(count):
        key = (columns["variant"][place], columns["length"][place], columns["depth"][place])
        if key in quality:
            assert columns["perplexity"][place] == quality[key]["perplexity"]
        else:
            assert columns["perplexity"][place] == "–"


def test_nothing_outside_the_file_is_named(page: Page) -> None:
    """No element loads anything: links lead to what lies beside the page or stand within it."""
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "action", "data", "poster"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    links = {attributes["href"] for attributes in page.all("a")}
    beside = {link for link in links if link and not link.startswith("#")}
    assert beside == {"summary.csv", "cells.parquet", "summary.md"}
    identifiers = {attributes.get("id") for _, attributes in page.elements}
    assert {link[1:] for link in links - beside if link} <= identifiers
    (icon,) = page.all("link")
    assert icon["href"] == "data:,"


def test_the_policy_names_exactly_the_scripts_in_the_page(page: Page) -> None:
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    runs = [text for text in page.within("script") if not text.startswith("{")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in runs]
    assert len(hashes) == 2
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "'unsafe-inline'" not in policy.split("script-src")[1]


HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>&amp;\u2028 {{7*7}}"


def test_texts_of_records_are_texts(tmp_path: Path) -> None:
    """As names, knobs, machines and reasons: the page has no more elements than with harmless ones."""

    def experiment(folder: Path, text: str) -> Page:
        found = [record(n) for n in ("dense", text)]
        found += [record("chunked", variant_params={"window": text}), record("chunked")]
        found += [failed("error", text, variant="longformer")]
        found += [failed("oom", text, variant=text, seq_len=1024)]
        for one in found:
            one.cell_id = f"{found.index(one)}"
            one.name, one.cpu_model, one.device_name, one.contaminated = text, text, text, text
        return page_of(write(folder, found))

    hostile, harmless = experiment(tmp_path / "a", HOSTILE), experiment(tmp_path / "b", "harmless")
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in harmless.elements]
    begins = HOSTILE[:40]  # of names that are too long the beginning is shown
    assert any(label.startswith(begins) for label in hostile.data["label"])
    assert any(begins in text for text in hostile.within("h1"))
    assert any(begins in text for text in hostile.within("td"))


def test_failures_and_their_reasons_are_in_the_page_without_its_script(page: Page) -> None:
    texts = page.within("td")
    reasons = {"needs 3.1 GiB, limit 2 GiB", "no result after 600 s", "gate | reference: 0.2 is above 1e-5"}
    assert reasons <= set(texts)


def test_a_cell_has_the_quality_of_its_longest_training_at_its_best_rate(tmp_path: Path) -> None:
    def trained(tokens: int, rate: float, nll: float, split: str) -> Any:
        one = record(tokens_trained=tokens, learning_rate=rate, nll=nll, perplexity=2.0**nll)
        one.train_budget, one.train_amount, one.eval_split = "tokens", float(tokens), split
        one.cell_id = f"{tokens}-{rate}-{split}"
        return one

    found = [trained(1000, 0.01, 0.5, "test"), trained(9000, 0.1, 1.0, "validation")]
    found += [trained(9000, 0.01, 3.0, "test"), trained(9000, 0.1, 2.0, "test")]
    page = page_of(write(tmp_path, found))
    assert page.data["score"] == [pytest.approx(2 / math.log(2), rel=1e-5)]
    assert page.data["score_name"] == ["bits per byte"]
    assert page.data["trained"] == ["9.00 k tokens, test"]


def test_marks_are_explained_where_they_occur_and_only_there(page: Page, tmp_path: Path) -> None:
    assert {"?", "ʳ"} <= set(page.within("dt"))
    assert "†" not in page.within("dt")
    leaking = page_of(write(tmp_path, [record(leak_max_abs=0.5)]))
    assert "†" in leaking.within("dt")
    assert leaking.data["table"][0]["text"] == ["dense†"]


def test_ticks_are_round_in_their_unit_and_the_finest_level_is_fine(page: Page) -> None:
    """However narrow a choice is, a factor of 1.35 holds two ticks of the finest level."""
    for figure in page.data["figures"]:
        values = [v for curve in figure["curves"] for v in curve["value"] if v is not None]
        for level in figure["ticks"]:
            places = [at for at, _ in level]
            assert places == sorted(places)
            assert len({label for _, label in level}) == len(level)
        finest = [at for at, _ in figure["ticks"][0]]
        assert finest[0] <= min(values)
        assert finest[-1] >= max(values)
        assert all(b / a <= 1.35 for a, b in pairwise(finest))
        labels = [label for level in figure["ticks"] for _, label in level]
        assert not [label for label in labels if re.search(r"\d\.\d{2}|e[+-]", label)], labels


def test_predictions_are_marked_and_drawn_hollow(tmp_path: Path) -> None:
    planned = record(seq_len=4096, peak_bytes_source="predicted", step_seconds_median=None)
    page = page_of(write(tmp_path, [record(), planned]))
    assert page.data["predicted"] == [False, True]
    assert page.data["memory_text"][1].endswith("ᵖ")
    (figure,) = [f for f in page.data["figures"] if f["stem"] == "peak_memory"]
    measured, predicted = figure["curves"]
    assert measured["value"][1] is None
    assert predicted["hollow"]
    assert predicted["value"] == [None, page.data["memory"][1]]


@pytest.mark.parametrize("kind", ["fits", "payoff"])
def test_experiments_about_budgets_are_shown_without_a_chooser(tmp_path: Path, kind: str) -> None:
    batch = 0 if kind == "payoff" else 4
    one = record(budget_bytes=2**34, largest_batch_size=12, batch_size=batch or 12, measure=kind)
    if kind == "fits":
        one.longest_seq_len, one.peak_bytes = 8192, None
    page = page_of(write(tmp_path, [one]))
    assert not page.all("script")
    assert kind in {attributes.get("id") for attributes in page.all("section")}
    assert {"16 GiB", "12"} <= set(page.within("td"))


def test_markers_are_those_of_the_plots() -> None:
    """A square is a square: corners at ±1; a half-filled one has two paths."""
    square, half = Style("#123456", "s", "full"), Style("#123456", "o", "left")
    found = symbols({"square": square, "half": half})
    assert found["square"]["outline"] == "M-1,1L1,1L1,-1L-1,-1Z"
    assert found["square"]["half"] is None
    assert found["half"]["half"] != found["half"]["outline"]


def test_colours_are_those_of_the_plots_and_stand_out_in_the_dark() -> None:
    names = [*variants.names(), *(f"from_elsewhere_{number}" for number in range(20))]
    known = [colour for colour, _ in looks_of(names).values()]
    assert all(contrast(on_dark(colour), DARK) >= 3 for colour in known)
    assert on_dark("#E69F00").upper() == "#E69F00", "one that stands out is left alone"
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_numbers_keep_six_digits_and_nulls() -> None:
    values = pd.Series([1.23456789, None, 2.0**40, float("inf")])
    assert figures.numbers(values) == [1.23457, None, 1099510000000, None]


def two_thousand_cells(folder: Path) -> str:
    """The page of 2,000 cells: some of each kind, measured, at ten times as many depths as were recorded."""
    names = ("dense", "chunked", "longformer", "overlapping", "reformer", "routing", "performer", "linformer")
    (folder / "records").mkdir()
    for name, exponent, way in product(names, range(8, 18), ("keep", "sqrt")):
        where = {"variant": name, "seq_len": 2**exponent, "activations": way}
        lost = name == "dense" and exponent > 15
        one = failed("oom", "needs 81.4 GiB, limit 80 GiB", **where) if lost else record(**where)
        one.cell_id = f"{name}{exponent}{way}"
        (folder / "records" / f"{name}{exponent}{way}.json").write_text(one.to_json())
    results = compute(read(folder), discover())
    cost, quality = results.data["cost"], results.data["quality"].cells
    depths = range(1, 14)
    cost = pd.concat([cost.assign(depth=depth) for depth in depths]).iloc[:2000].reset_index(drop=True)
    quality = pd.concat([quality.assign(depth=depth) for depth in depths])
    many = Cells(statistics.summary(cost, quality), best_trained(cost, quality))
    return html(Results(results.records, results.sections, {**results.data, "cells": many}))


def test_two_thousand_cells_stay_below_five_mebibytes(tmp_path: Path) -> None:
    """With failures and their reasons, intervals and both ways of training."""
    text = two_thousand_cells(tmp_path)
    assert len(Page(text).data["label"]) == 2000
    assert len(text.encode()) <= LIMIT


def test_columns_say_what_they_are() -> None:
    assert all(column.about for column in COLUMNS)
