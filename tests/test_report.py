"""The report says what the records say, and says what it leaves out."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import HANG_SECONDS
from matplotlib.image import imread
from report_parts import part_of, write

from bench import records
from bench.records import Record
from bench.report import ReportError, build
from bench.report.__main__ import main
from bench.report.data.collect import collect
from bench.report.text import units

ROOT = Path(__file__).parents[1]
WINDOW = {"chunked": 128, "overlapping": 256, "longformer": 192}
UNIGRAM = 21.5


def record(
    variant: str = "dense", seq_len: int = 512, depth: int = 2, replicate: int = 0, **other: Any
) -> Record:
    """A finished cell with figures such as a small model has; `other` overrides any key."""
    params = other.pop("variant_params", {"window": WINDOW[variant]} if variant in WINDOW else {})
    noise = random.Random(f"{variant}{params}{seq_len}{depth}{replicate}")
    width, batch = 64, 4
    tokens = batch * seq_len
    pairs = min(seq_len, WINDOW.get(variant, seq_len)) * seq_len / 2
    attention = int(3 * 4 * width * pairs * depth * batch)
    flops = attention + 6 * 12 * width * width * depth * tokens
    seconds = flops / 2e10 * (1 + 0.1 * noise.random()) + 0.004
    forward = seconds / 3.1
    peak = int(4e6 * depth + tokens * width * 4 * 14 * depth + 1e5 * noise.random())
    nll = (
        1.5
        + 0.2 * (variant != "dense")
        + 0.04 * noise.random()
        - 0.02 * math.log2(seq_len / 512)
        - 0.05 * min(depth, 16)
    )
    if other.get("nll") is not None:  # the figures that follow from it agree with it
        nll = other["nll"]
    values: dict[str, Any] = {
        "cell_id": f"{variant}-{len(params)}-{noise.getrandbits(64):x}",
        "name": "demo",
        "variant": variant,
        "variant_params": params,
        "impl": "sdpa",
        "seq_len": seq_len,
        "depth": depth,
        "d_model": width,
        "heads": 4,
        "batch_size": batch,
        "activations": "keep",
        "objective": "clm",
        "data": "plays",
        "data_sha256": "ab" * 32,
        "dtype": "float32",
        "device": "cpu",
        "device_name": "Example CPU @ 2.60GHz",
        "replicate": replicate,
        "measure": "standard",
        "status": "ok",
        "seconds_total": 12.0,
        "leak_max_abs": 1.2e-7,
        "reference_max_abs": 3.4e-6,
        "cost_ratio": 1.0 if variant == "dense" else 1.31,
        "cost_ratio_reason": None if variant == "dense" else "masked pairs inside a block",
        "params": 49_152 * depth + 16_384,
        "flops_algorithmic_step": flops,
        "flops_executed_step": int(flops * (1.08 if variant == "dense" else 1.3)),
        "flops_attention_step": attention,
        "flops_source": "counted",
        "peak_bytes": peak,
        "peak_bytes_source": "live_storage",
        "peak_bytes_predicted": peak,
        "step_seconds_median": seconds,
        "step_seconds_samples": [seconds, seconds * 1.02],
        "forward_seconds_median": forward,
        "tokens_per_second": tokens / seconds,
        "forward_tokens_per_second": tokens / forward,
        "nll": nll,
        "perplexity": math.exp(min(nll, 700)),
        "bits_per_byte": nll / math.log(2),
        "word_perplexity": math.exp(min(nll * 5.6, 700)),
        "unigram_perplexity": UNIGRAM,
        "nll_by_position": [
            3.1 * math.exp(-0.25 * k) + nll - 0.2 for k in range(int(math.log2(seq_len)) + 1)
        ],
        "tokens_trained": 262_144,
        "tokens_evaluated": 65_536,
        "state_policy": "none",
        "code_sha256": "cd" * 32,
        "torch_version": "2.13.0+cpu",
        "python_version": "3.11.9",
        "cpu_model": "Example CPU @ 2.60GHz",
        "threads": 2,
        "started_at": f"2026-03-0{1 + replicate}T10:00:00+00:00",
    }
    return Record(**{**values, **other})


def failed(status: str, reason: str | None, **other: Any) -> Record:
    """A cell that did not finish: identity and reason, every figure null."""
    whole = record(**other)
    figures = [k for k in records.KEYS if k.startswith(("step_", "forward_", "peak_", "nll", "tokens_"))]
    figures += ["perplexity", "bits_per_byte", "word_perplexity", "unigram_perplexity", "state_policy"]
    figures += ["device_name", "impl", "leak_max_abs"]
    for key in figures:
        setattr(whole, key, None)
    whole.status = status  # type: ignore[assignment]
    whole.reason = reason
    return whole


def sweep(lengths: Iterable[int] = (512, 1024, 2048, 4096), depths: Iterable[int] = (2, 4)) -> list[Record]:
    """Four variants, three replicates, and a few cells that did not finish."""
    found = []
    for replicate in range(3):
        for depth in depths:
            for seq_len in lengths:
                for variant in ("dense", "chunked", "overlapping", "longformer"):
                    where = {"variant": variant, "seq_len": seq_len, "depth": depth, "replicate": replicate}
                    if seq_len == 4096 and depth == 4 and variant == "dense":
                        found.append(failed("oom", "needs 3.1 GiB, limit 2 GiB", **where))
                    elif seq_len == 4096 and depth == 4 and variant == "overlapping":
                        found.append(failed("timeout", "no result after 600 s", **where))
                    elif seq_len == 2048 and variant == "longformer" and replicate == 2:
                        found.append(failed("error", "gate | reference: 0.2\nis above 1e-5", **where))
                    else:
                        found.append(record(**where))
    return found


def cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "bench.report", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole experiment with its report, built once by the command."""
    home = tmp_path_factory.mktemp("demo")
    folder = write(home / "results" / "demo", sweep())
    (folder / "records" / "torn.json").write_text('{"schema_version": 1, "cell')
    run = cli("results/demo", cwd=home)
    assert run.returncode == 0, run.stderr
    (home / "stdout").write_text(run.stdout)
    (home / "stderr").write_text(run.stderr)
    return folder


def raw(folder: Path) -> pd.DataFrame:
    """The record files as they lie there, read without the code under test."""
    loaded = []
    for path in (folder / "records").glob("*.json"):
        try:
            loaded.append(json.loads(path.read_text()))
        except ValueError:
            continue
    return pd.DataFrame(loaded)


def table(text: str, heading: str) -> list[dict[str, str]]:
    """The first pipe table below a heading, as rows by column title."""
    lines = iter(text.split(f"{heading}\n", 1)[1].splitlines())
    body = []
    for line in lines:
        if line.startswith("|"):
            body.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif body:
            break
    return [dict(zip(body[0], row, strict=True)) for row in body[2:]]


UNITS = {"s": 1, "ms": 1e-3, "µs": 1e-6, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
UNITS |= {"FLOP": 1, "MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12, "": 1, "k": 1e3, "M": 1e6, "tokens/s": 1}


def number(cell: str) -> float:
    """A cell of summary.md back in base units; NaN for a dash."""
    if cell == "–":
        return math.nan
    match = re.fullmatch(r"([\d.,]+)×?[†‡≈?ʳ§ᵖ]*\s*([A-Za-zµ]*)(?: tokens/s)?", cell)
    assert match, cell
    return float(match[1].replace(",", "")) * UNITS[match[2]]


@pytest.mark.slow
def test_the_command_says_where_the_report_is(demo: Path) -> None:
    said = (demo.parents[1] / "stdout").read_text().splitlines()
    assert said[0] == "report: results/demo/report/summary.md"
    assert said[1].startswith("page:   results/demo/report/index.html ")
    assert len(said) == 3
    assert "13 plots" in said[2]


def test_csv_holds_the_medians_of_the_record_files(demo: Path) -> None:
    summary = pd.read_csv(demo / "report" / "summary.csv")
    ok = raw(demo).query("status == 'ok'")
    figures = {
        "step_seconds": "step_seconds_median",
        "tokens_per_second": "tokens_per_second",
        "peak_bytes": "peak_bytes",
    }
    assert len(summary) == 4 * 4 * 2
    for _, row in summary.iterrows():
        same = ok[(ok.variant == row.variant) & (ok.seq_len == row.seq_len) & (ok.depth == row.depth)]
        assert row.finished == len(same)
        for name, key in figures.items():
            if len(same):
                expected = (same[key].median(), same[key].min(), same[key].max())
                got = (row[f"{name}_median"], row[f"{name}_min"], row[f"{name}_max"])
                assert got == pytest.approx(expected, rel=1e-12)
            else:
                assert math.isnan(row[f"{name}_median"])
        if len(same):
            assert row.perplexity_mean == pytest.approx(same.perplexity.mean(), rel=1e-12)
            assert row.perplexity_std == pytest.approx(same.perplexity.std(), rel=1e-9)
            dense = ok[(ok.variant == "dense") & (ok.seq_len == row.seq_len) & (ok.depth == row.depth)]
            ratios = (
                same.set_index("replicate").step_seconds_median
                / dense.set_index("replicate").step_seconds_median
            )
            assert row.step_seconds_ratio == pytest.approx(ratios.median(), rel=1e-12, nan_ok=True)


def test_markdown_says_the_numbers_of_the_csv(demo: Path) -> None:
    text = (demo / "report" / "summary.md").read_text()
    summary = pd.read_csv(demo / "report" / "summary.csv").set_index(["depth", "variant", "seq_len"])
    columns = {
        "step time": "step_seconds_median",
        "time / dense": "step_seconds_ratio",
        "throughput": "tokens_per_second_median",
        "peak memory": "peak_bytes_median",
        "memory / dense": "peak_bytes_ratio",
        "algorithmic FLOPs": "flops_algorithmic_step",
        "executed FLOPs": "flops_executed_step",
        "attention FLOPs": "flops_attention_step",
    }
    seen = 0
    for depth in (2, 4):
        for row in table(text, f"### clm, depth {depth}"):
            expected = summary.loc[(depth, row["variant"], int(row["length"]))]
            for title, column in columns.items():
                assert number(row[title]) == pytest.approx(expected[column], rel=6e-3, nan_ok=True), title
            assert row["status"] == expected["status"]
            seen += 1
    assert seen == len(summary)
    for row in table(text, "### clm, data plays"):
        expected = summary.loc[(int(row["depth"]), row["variant"], int(row["length"]))]
        mean, _, deviation = row["perplexity"].partition(" ± ")
        assert float(mean) == pytest.approx(expected["perplexity_mean"], abs=6e-4)
        assert float(deviation) == pytest.approx(expected["perplexity_std"], abs=6e-4)
        assert row["rank"] == units.places(expected["rank_low"], expected["rank_high"])
        assert row["rank"] == ("1" if row["variant"] == "dense" else row["rank"])


def test_what_did_not_finish_is_listed_with_its_reason(demo: Path) -> None:
    text = (demo / "report" / "summary.md").read_text()
    failures = table(text, "## Did not finish")
    listed = {
        (f["variant"], f["length"], f["depth"], f["replicates"], f["status"], f["reason"]) for f in failures
    }
    gate = "gate \\| reference: 0.2 is above 1e-5"
    assert listed == {
        ("dense", "4096", "4", "0, 1, 2", "oom", "needs 3.1 GiB, limit 2 GiB"),
        ("overlapping", "4096", "4", "0, 1, 2", "timeout", "no result after 600 s"),
        ("longformer", "2048", "2", "2", "error", gate),
        ("longformer", "2048", "4", "2", "error", gate),
    }
    assert "- statuses: 88 ok, 3 oom, 3 timeout, 2 error" in text


def test_an_unreadable_file_is_named_and_skipped(demo: Path) -> None:
    assert "torn.json" in (demo.parents[1] / "stderr").read_text()
    assert "torn.json" in (demo / "report" / "summary.md").read_text()


def test_a_value_of_the_wrong_type_is_named_and_skipped(tmp_path: Path) -> None:
    folder = write(tmp_path / "e", [record()])
    wrong = json.loads(record(replicate=1).to_json()) | {"cell_id": "wrong", "seq_len": "long"}
    (folder / "records" / "wrong.json").write_text(json.dumps(wrong))
    text = part_of(folder, []).text
    assert "wrong.json: wrong type in seq_len" in text
    assert "- records: 1," in text


def test_plots_decode_and_are_linked(demo: Path) -> None:
    plots = demo / "report" / "plots"
    stems = {"step_time", "forward_time", "peak_memory", "flops", "held_out_loss", "nll_by_position"}
    stems |= {"crossover", "pareto-depth_2", "pareto-depth_4"}
    linked_alone = {f"{cost}_by_depth" for cost in ("step_time", "forward_time", "peak_memory", "flops")}
    stems |= linked_alone
    assert {p.stem for p in plots.glob("*.png")} == {p.stem for p in plots.glob("*.svg")} == stems
    for path in plots.glob("*.png"):
        pixels = imread(path)
        assert pixels.shape[0] > 200
        assert pixels.std() > 0.01, f"{path.name} is blank"
    linked = set(re.findall(r"\]\(([^)]+)\)", (demo / "report" / "summary.md").read_text()))
    assert linked == {
        f"plots/{stem}.{kind}"
        for stem in stems
        for kind in (("png",) if stem in linked_alone else ("png", "svg"))
    }


def test_parquet_has_every_record_and_key(demo: Path) -> None:
    cells = pd.read_parquet(demo / "report" / "cells.parquet")
    assert list(cells.columns) == [*records.KEYS, "stale"]
    expected = raw(demo).set_index("cell_id")
    assert set(cells.cell_id) == set(expected.index)
    assert (cells.set_index("cell_id").seq_len == expected.seq_len.reindex(cells.cell_id)).all()


@pytest.mark.slow
def test_equal_records_give_equal_files(tmp_path: Path) -> None:
    figures = {"nll_by_position": None, "peak_bytes": None, "tokens_per_second": None}
    found = [record(seq_len=n, replicate=r, **figures) for n in (512, 1024) for r in (0, 1)]
    reports = [build(write(tmp_path / name, found)) for name in ("a", "b")]
    for name in ("summary.csv", "summary.md", "plots/step_time.svg", "plots/held_out_loss.svg"):
        assert (reports[0] / name).read_bytes() == (reports[1] / name).read_bytes(), name


def test_a_leak_is_marked_and_comes_last(tmp_path: Path) -> None:
    found = [record(replicate=r) for r in (0, 1)]
    found += [record("routing", leak_max_abs=0.7, perplexity=1.5, replicate=r) for r in (0, 1)]
    found += [record("chunked", seq_len=1024, depth=4)]
    text = part_of(tmp_path / "e", found, "quality", "gates").text
    rows = table(text, "### clm, data plays")
    assert [(r["rank"], r["variant"]) for r in rows] == [("1", "dense"), ("1", "chunked"), ("†", "routing†")]
    assert text.count("- † ") >= 1
    assert (
        next(r for r in table(text, "## Gates") if r["variant"] == "routing†")["leak (max abs)"] == "7.0e-01"
    )
    clean = (build(write(tmp_path / "clean", [record()]), plots=False) / "summary.md").read_text()
    assert "†" not in clean


@pytest.mark.slow
def test_strides_are_told_apart_and_said(tmp_path: Path) -> None:
    """A perplexity over windows that overlap is no better for being lower than one over windows side by
    side."""
    found = []
    for stride, replicate in product((128, 512), range(2)):
        of = {"replicate": replicate, "measure": f"by{stride}", "eval_stride": stride}
        back = {
            "effective_context": 64,
            "effective_context_low": 8 << replicate,
            "effective_context_high": 512,
        }
        memory = {"nll": 1.0, "nll_reset": math.log(3), "state_policy": "carried"}
        names = {"eval_min_context": 513 - stride, "cell_id": f"{stride}-{replicate}"}
        found.append(record("dense", **of, **back, **names))
        names["cell_id"] += "-memory"
        found.append(record("chunked", **of, **memory, **names))
    text = part_of(tmp_path / "e", found, "quality").text
    rows = table(text.split("## Quality", 1)[1], "### clm, data plays")
    assert sorted((r["variant"], r["stride"], r["context ≥"], r["rank"], r["replicates"]) for r in rows) == [
        ("chunked", "128", "385", "1", "2"),
        ("chunked", "512", "1", "1", "2"),
        ("dense", "128", "385", "2", "2"),
        ("dense", "512", "1", "2", "2"),
    ]
    assert {r["looks back"] for r in rows if r["variant"] == "dense"} == {"64 (8–512)"}
    assert {r["reset"] for r in rows if r["variant"] == "chunked"} == {"1.585 ± 0.000"}
    assert {r["reset"] for r in rows if r["variant"] == "dense"} == {"–"}


@pytest.mark.slow
def test_context_that_hurts_is_said(tmp_path: Path) -> None:
    """Only where every replicate's lower bound is beyond the tolerance."""
    found = []
    for variant, bounds in {"dense": (0.2, 0.3), "longformer": (0.2, 0.0), "chunked": (None, None)}.items():
        for replicate, low in enumerate(bounds):
            harm = (
                {"best_history": 32, "context_harm": 0.4, "context_harm_low": low} if low is not None else {}
            )
            back = {f"effective_context{end}": 4 for end in ("", "_low", "_high")}
            names = {"replicate": replicate, "cell_id": f"{variant}-{replicate}"}
            found.append(record(variant, **back, **harm, **names))
    text = part_of(tmp_path / "e", found, "quality").text
    rows = table(text.split("## Quality", 1)[1], "### clm, data plays")
    assert {row["variant"]: row["looks back"] for row in rows} == {
        "dense": "4 (4–4); hurt by more than 32: +0.40 nats",
        "longformer": "4 (4–4)",
        "chunked": "4 (4–4)",
    }


def test_objectives_are_never_mixed(tmp_path: Path) -> None:
    figures = {"nll_by_position": None, "step_seconds_median": None, "tokens_per_second": None}
    found = [record(cell_id="a", perplexity=4.0, **figures)]
    found.append(record(cell_id="b", perplexity=9.0, bits_per_byte=None, objective="mlm", **figures))
    part = part_of(tmp_path / "e", found, "cells")
    summary = part.files()["summary"].set_index("objective")
    assert summary.perplexity_mean.to_dict() == {"clm": 4.0, "mlm": 9.0}
    assert summary["rank_low"].tolist() == summary["rank_high"].tolist() == [1, 1]
    for objective, value in (("clm", "4.000"), ("mlm", "9.000")):
        rows = table(part.text, f"### {objective}, data plays")
        assert [row["perplexity"] for row in rows] == [value]
    paths = [one.path for one in part.drawn("quality")["quality"]]
    assert [path for path in paths if "held_out_loss" in path] == [
        "plots/held_out_loss-clm",
        "plots/held_out_loss-mlm",
    ]


@pytest.mark.slow
def test_labels_show_only_the_parameters_that_differ(tmp_path: Path) -> None:
    found = [
        record(
            "longformer", variant_params={"window": w, "dilation": 1}, cell_id=f"w{w}", step_seconds_median=s
        )
        for w, s in ((64, 0.1), (128, 0.3))
    ]
    found.append(record("chunked", variant_params={"window": 32}))
    summary = part_of(tmp_path / "e", found, "cells").files()["summary"]
    times = summary.set_index("label").step_seconds_median.to_dict()
    assert set(times) == {"chunked", "longformer (window=64)", "longformer (window=128)"}
    assert times["longformer (window=64)"] == 0.1
    assert times["longformer (window=128)"] == 0.3


@pytest.mark.slow
def test_parameter_drift_is_flagged(tmp_path: Path) -> None:
    found = [record(params=1000), record("chunked", params=1099), record("longformer", params=1101)]
    text = part_of(tmp_path / "e", found, "parameters").text
    marked = {row["variant"]: "‡" in row["/ dense"] for row in table(text, "## Parameters")}
    assert marked == {"dense": False, "chunked": False, "longformer": True}


@pytest.mark.slow
def test_parameters_that_compute_a_token_have_a_column_where_they_are_a_part(tmp_path: Path) -> None:
    found = [
        record(params=1000, params_active=1000),
        record(params=5000, params_active=1500, feed_forward="switch", cell_id="experts"),
        record("longformer", params=1000),
    ]
    text = part_of(tmp_path / "some", found, "parameters").text
    rows = table(text, "## Parameters")
    active = {(row["variant"], row["feed-forward"]): row["active"] for row in rows}
    assert active == {("dense", "mlp"): "1,000", ("dense", "switch"): "1,500", ("longformer", "mlp"): "–"}
    text = part_of(tmp_path / "none", found[::2], "parameters").text
    assert all("active" not in row for row in table(text, "## Parameters"))


def test_ratios_whose_interval_holds_1_are_not_told_apart(tmp_path: Path) -> None:
    times = {"dense": (1.0, 1.2, 1.1), "chunked": (1.1, 1.1, 1.2), "longformer": (1.4, 1.6, 1.5)}
    found = [
        record(variant, replicate=r, step_seconds_median=value)
        for variant, own in times.items()
        for r, value in enumerate(own)
    ]
    text = part_of(tmp_path / "e", found, "cost").text
    marked = {row["variant"]: row["time / dense"] for row in table(text, "### clm, depth 2")}
    assert marked == {"dense": "1.00×", "chunked": "1.09×≈", "longformer": "1.36×"}
    assert "- ≈ not called different from dense" in text
    assert "- ? " not in text


@pytest.mark.slow
def test_only_cells_of_the_same_modules_are_versions_of_one_code(tmp_path: Path) -> None:
    """Mixtures with other members, and other feed-forward layers, are other code and not another version."""
    found = [
        record("hybrid", variant_params={"layers": ["longformer", "dense"]}, code_sha256="1" * 16),
        record("hybrid", variant_params={"layers": ["moba", "dense"]}, code_sha256="2" * 16),
        record("dense", feed_forward="mlp", code_sha256="3" * 16),
        record("dense", feed_forward="glu", code_sha256="4" * 16),
        record("longformer", seq_len=512, code_sha256="5" * 16),
        record("longformer", seq_len=1024, code_sha256="6" * 16),
    ]
    text = (build(write(tmp_path / "e", found), plots=False) / "summary.md").read_text()
    assert "- **measured by several versions of the code: longformer**" in text


def test_newer_code_supersedes_a_measurement(tmp_path: Path) -> None:
    old = record(cell_id="old", code_sha256="0" * 64, step_seconds_median=9.0)
    new = record(cell_id="new", started_at="2026-04-01T00:00:00+00:00", step_seconds_median=1.0)
    part = part_of(tmp_path / "e", [old, new], "cells")
    summary = part.files()["summary"]
    assert summary.step_seconds_median.tolist() == [1.0]
    assert summary.records.tolist() == [1]
    assert "1 older records left out" in part.text


@pytest.mark.slow
def test_twins_are_collected_and_kept_out_of_the_tables(tmp_path: Path) -> None:
    """They measure the same cell again: no replicates, no doubles, and not superseded by one another."""
    cells = [record(replicate=r) for r in range(2)]
    twins = [record(replicate=r, twin=1, step_seconds_median=1e3, cell_id=f"twin-{r}") for r in range(2)]
    found = collect(write(tmp_path / "both", [*cells, *twins]))
    assert (found.stale, found.alike) == ({}, 0)
    assert [*found.frame["twin"]] == [0, 0]
    assert sorted(found.every["twin"]) == [0, 0, 1, 1]
    assert [*found.every.columns] == [*found.frame.columns]
    build(write(tmp_path / "without", cells), plots=False)
    build(tmp_path / "both", plots=False)
    tables = [pd.read_csv(tmp_path / name / "report" / "summary.csv") for name in ("both", "without")]
    assert tables[0]["noise_floor"].notna().all()
    assert tables[1]["noise_floor"].isna().all()
    pd.testing.assert_frame_equal(*(each.drop(columns="noise_floor") for each in tables))
    assert len(pd.read_parquet(tmp_path / "both/report/cells.parquet")) == 4
    with pytest.raises(ReportError, match="only twins"):
        build(write(tmp_path / "alone", twins), plots=False)


def test_a_prediction_is_marked_as_one(tmp_path: Path) -> None:
    whole = failed("predicted_oom", "predicted 8 GiB, limit 2 GiB")
    whole.peak_bytes_predicted = 2**33
    part = part_of(tmp_path / "e", [whole], "cells")
    row = table(part.text, "### clm, depth 2")[0]
    assert row["peak memory"] == "8.00 GiBᵖ"
    assert part.files()["summary"].peak_bytes_median.isna().all()
    assert "plots/peak_memory" in [one.path for one in part.drawn("cost")["cost"]]


def test_learning_rates_budgets_and_splits_are_kept_apart(tmp_path: Path) -> None:
    """Each is averaged over its own replicates; a model is ranked at its best rate, in each budget and
    split."""
    asked: dict[str, Any] = {"train_budget": "tokens", "train_amount": 250_000.0, "eval_split": "validation"}
    ways: list[dict[str, Any]] = [
        asked | {"learning_rate": 0.001},
        asked | {"learning_rate": 0.004},
        asked | {"learning_rate": 0.004, "eval_split": "test"},
        asked | {"learning_rate": 0.004, "train_budget": "seconds", "train_amount": 60.0},
    ]
    found = []
    for number, way in enumerate(ways):
        for replicate in range(2):
            perplexity = 10.0 + number + replicate / 10
            trained = {"tokens_trained": 250_000 + 512 * replicate * (way["train_budget"] == "seconds")}
            names = {"cell_id": f"c{number}{replicate}", "started_at": f"2026-03-01T10:0{number}:00+00:00"}
            trained["nll"] = math.log(perplexity)
            found.append(record(replicate=replicate, **way, **trained, **names))
    late = {"cell_id": "late", "learning_rate": 0.016, "code_sha256": "cd" * 32}
    found.append(failed("diverged", "the loss became nan at training step 7 of 9", **asked, **late))
    text = part_of(tmp_path / "e", found, "quality", "failures").text
    assert "records left out" not in text
    assert "share every key" not in text
    rows = table(text, "### clm, data plays")
    seen = [(r["budget"], r["learning rate"], r["split"], r["perplexity"], r["rank"]) for r in rows]
    assert set(seen) == {
        ("250 k tokens", "0.001", "validation", "10.05 ± 0.07", "1"),
        ("250 k tokens", "0.004", "validation", "11.05 ± 0.07", "–"),
        ("250 k tokens", "0.004", "test", "12.05 ± 0.07", "1"),
        ("60.0 s", "0.004", "validation", "13.05 ± 0.07", "1"),
    }
    assert {r["replicates"] for r in rows} == {"2"}
    (failure,) = table(text, "## Did not finish")
    assert (failure["learning rate"], failure["status"]) == ("0.016", "diverged")


@pytest.mark.slow
def test_a_record_of_before_these_keys_is_superseded_by_its_cell_measured_again(tmp_path: Path) -> None:
    old = record(code_sha256="01" * 32, started_at="2026-02-01T10:00:00+00:00", cell_id="old")
    new = record(train_budget="tokens", train_amount=250_000.0, learning_rate=0.003, eval_split="test")
    text = (build(write(tmp_path / "e", [old, new]), plots=False) / "summary.md").read_text()
    assert "1 older records left out" in text
    alone = (build(write(tmp_path / "alone", [old]), plots=False) / "summary.md").read_text()
    (row,) = table(alone, "### clm, data plays")
    assert "learning rate" not in row


def test_an_experiment_in_which_all_failed(tmp_path: Path) -> None:
    bare = {key: None for key in records.KEYS if key.startswith("flops_")}
    found = [failed("oom", "too big", **bare), failed("error", None, variant="chunked", **bare)]
    report = build(write(tmp_path / "e", found))
    text = (report / "summary.md").read_text()
    assert [row["reason"] for row in table(text, "## Did not finish")] == ["no reason recorded", "too big"]
    assert "## Quality" not in text
    assert not list((report / "plots").glob("*"))


@pytest.mark.slow
def test_a_single_cell_and_no_plot_outlives_its_data(tmp_path: Path) -> None:
    folder = write(tmp_path / "e", [record()])
    report = build(folder)
    assert len(list((report / "plots").glob("*.png"))) == 6
    records.write(folder, record(nll_by_position=None, perplexity=None))
    build(folder)
    assert {p.stem for p in (report / "plots").glob("*.png")} == {
        "step_time",
        "forward_time",
        "peak_memory",
        "flops",
    }


@pytest.mark.parametrize("kind", ["missing", "empty", "unreadable"])
def test_nothing_to_report_is_one_line_and_status_2(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "e"
    if kind != "missing":
        (folder / "records").mkdir(parents=True)
    if kind == "unreadable":
        (folder / "records" / "x.json").write_text("nonsense")
    assert main([str(folder)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert str(folder) in said.err
    with pytest.raises(ReportError, match=re.escape(str(folder))):
        build(folder)


def test_the_command_exits_with_2_without_a_traceback(tmp_path: Path) -> None:
    run = cli("nowhere", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "bench.report: nowhere: no such folder\n"


def test_imports_are_cheap_and_torch_never_comes(tmp_path: Path) -> None:
    folder = write(tmp_path / "e", [record()])
    code = (
        "import sys; import bench.report; heavy = {'pandas', 'matplotlib', 'torch'} & set(sys.modules);"
        f"assert not heavy, heavy; bench.report.build(__import__('pathlib').Path({str(folder)!r}));"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_key_is_documented_and_nothing_else_is() -> None:
    text = (ROOT / "results" / "README.md").read_text()
    schema = text.split("## A record", 1)[1].split("## Statuses", 1)[0]
    documented = re.findall(r"^\| `(\w+)` \|", schema, flags=re.MULTILINE)
    assert documented == list(records.KEYS)
    statuses = re.findall(r"^\| `(\w+)` \|", text.split("## Statuses", 1)[1], flags=re.MULTILINE)
    assert statuses == list(records.STATUSES)
