"""Figures that README.md and docs/ state are those of the committed records, recomputed here."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import quality_table
import torch
from report_parts import sections_of
from test_model_options import spec_of

from bench import records
from bench.measure.predict import Prediction, build_model
from bench.report.data.experiment import read
from bench.report.sections import compute

ROOT = Path(__file__).resolve().parents[1]
README, CHOOSING = (ROOT / "README.md").read_text(), (ROOT / "docs" / "choosing.md").read_text()
CPU = {"depth": 2, "d_model": 256, "objective": "clm", "twin": 0}
"""The setting of the README's costs."""


@pytest.fixture(scope="module")
def cpu() -> pd.DataFrame:
    """The records of the reference run on a CPU."""
    return records.load(ROOT / "results" / "reference-cpu")


@pytest.fixture(scope="module")
def relative() -> pd.DataFrame:
    """Step times of the round on a GPU ÷ those of dense, a row a variant and a column a length."""
    frame = records.load(ROOT / "results" / "h100")
    seconds = frame.pivot_table(index="variant", columns="seq_len", values="step_seconds_median")
    return seconds / seconds.loc["dense"]


def cells(frame: pd.DataFrame, **keys: object) -> pd.DataFrame:
    for name, value in keys.items():
        frame = frame[frame[name] == value]
    return frame


@pytest.fixture(scope="module")
def summary() -> pd.DataFrame:
    """The report of the reference run: medians, and ratios to dense as its tables have them."""
    frame = pd.read_csv(ROOT / "results" / "reference-cpu" / "report" / "summary.csv")
    return cells(frame, **{key: CPU[key] for key in ("depth", "d_model", "objective")}, activations="keep")


def rows_between(begin: str, end: str) -> list[list[str]]:
    """The cells of the rows of a table of the README, without its head."""
    lines = README.partition(begin)[2].partition(end)[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]


def test_the_table_of_the_readme(summary: pd.DataFrame) -> None:
    at = cells(summary, seq_len=4096).set_index("variant")
    found = {name: row for name, *row in rows_between("reference:begin", "Which one, by length")}
    assert found.keys() == set(at.index)
    for name, stated in found.items():
        own = at.loc[name]
        assert [cell.strip("≈") for cell in stated] == [
            f"{1e3 * own['step_seconds_median']:.0f} ms",
            f"{own['compared_seconds_ratio']:.2f}×",
            f"{own['peak_bytes_median'] / 2**20:.0f} MiB",
            f"{own['peak_bytes_ratio']:.2f}×",
            f"{own['flops_executed_ratio']:.2f}×",
        ]


def test_the_table_of_decoding() -> None:
    frame = records.load(ROOT / "results" / "decode-cpu")
    frame = cells(frame[frame["kv_heads"].isna()], status="ok", twin=0)
    frame = frame.assign(rate=frame["decode_batch_size"] / frame["decode_batch_seconds_median"])
    figures = ["decode_seconds_median", "prefill_seconds_median", "decode_state_bytes"]
    figures += ["decode_largest_batch", "rate"]
    medians = frame.groupby(["seq_len", "variant"])[figures].median()
    found = {name.strip("`"): row for name, *row in rows_between("decode:begin", "decode:end")}
    assert found.keys() == set(frame["variant"])
    for name, stated in found.items():
        near, far = medians.loc[512, name], medians.loc[8192, name]
        prompt = far["prefill_seconds_median"]
        assert stated == [
            f"{1e3 * near['decode_seconds_median']:.1f} ms",
            f"{1e3 * far['decode_seconds_median']:.1f} ms",
            f"{prompt:.2f} s" if prompt >= 1 else f"{1e3 * prompt:.0f} ms",
            f"{far['decode_state_bytes'] / 2**20:.1f} MiB",
            f"{far['decode_largest_batch']:,.0f}",
            f"{far['rate']:,.0f}",
        ]


def test_tokens_of_sparse_layers() -> None:
    frame = records.load(ROOT / "results" / "decode-sparse-cpu")
    slots = ["d_model", "variant", "feed_forward"]
    seconds = frame.groupby(slots)["decode_seconds_median"].median()
    dense, sparse, both = (
        1e3 * seconds[1024, variant, layer]
        for variant, layer in (("dense", "mlp"), ("dense", "sparse"), ("sparse_qkv", "sparse"))
    )
    assert f"a token takes {dense:.1f} ms with dense layers, {sparse:.1f} ms with sparse" in README
    assert f"layers and {both:.1f} ms with sparse projections too, {dense / both:.1f} times as fast" in README
    narrow = seconds[512, "dense", "mlp"] / seconds[512, "sparse_qkv", "sparse"]
    assert f"at width 512 it is {narrow:.1f} times as fast" in README


def test_the_recall_of_mixtures() -> None:
    text = (ROOT / "docs" / "choosing.md").read_text()
    frame = records.load(ROOT / "results" / "hybrid-cpu")
    frame = frame[(frame["variant"] == "hybrid") & frame["accuracy"].notna()]
    layers = frame["variant_params"].map(lambda params: " ".join(map(str, params["layers"])))
    accuracy = 100 * frame.groupby(layers)["accuracy"].mean()
    assert set(frame.groupby(layers)["replicate"].nunique()) == {3}
    window = "longformer(window=4)"
    assert f"windows of 4 tokens recalled {accuracy[window]:.1f} % of the pairs" in text
    assert f"one dense layer of the four {accuracy[f'{window} {window} {window} dense']:.1f} %" in text
    assert f"the gated delta rule recalled {accuracy['gated_delta_net']:.1f} % without any" in text


def test_the_text_of_mixtures() -> None:
    text = (ROOT / "docs" / "choosing.md").read_text()
    frame = records.load(ROOT / "results" / "hybrid-cpu")
    frame = frame[frame["bits_per_byte"].notna()]
    assert set(frame["tokens_trained"]) == {524_288}
    assert set(frame["learning_rate"]) == {0.01}
    layers = frame["variant_params"].map(lambda params: " ".join(map(str, params.get("layers", ["dense"]))))
    assert set(frame.groupby(layers)["replicate"].nunique()) == {3}
    bits = frame.groupby(layers)["bits_per_byte"].mean().map("{:.2f}".format)
    window, rule = "longformer(window=64)", "gated_delta_net"
    alone = f"{bits['dense']} bits per byte, windows of 64 tokens {bits[window]}"
    assert f"dense attention had {alone} and the gated delta rule {bits[rule]}" in text
    mixed = [bits[f"{each} {each} {each} dense"] for each in (window, rule)]
    assert f"with one dense layer of the four, {mixed[0]} and {mixed[1]}." in text


def test_the_state_that_recall_needs() -> None:
    text = (ROOT / "docs" / "choosing.md").read_text()
    frame = records.load(ROOT / "results" / "recall-recurrent-cpu")
    assert len(frame) == 30
    cells = frame.groupby(["variant", "heads"]).agg(
        accuracy=("accuracy", "mean"), state=("state_bytes", "median"), batch=("batch_size", "median")
    )
    kib = cells["state"] / cells["batch"] / 1024
    accuracy = 100 * cells["accuracy"]
    smallest = kib.loc["delta_net"].idxmin()
    delta, dense = kib["delta_net", smallest], kib["dense", 2]
    assert 4.5 < dense / delta < 5.5
    assert f"recalled {accuracy['delta_net', smallest]:.1f} % with a fifth of the state of dense" in text
    assert f"({delta:.1f} KiB against {dense:.1f} KiB for each sequence)" in text
    assert f"no convolution, {accuracy['linear_transformer'].max():.1f} % at most" in text
    assert f"recalled {accuracy['hybrid'].min():.1f} % or more in every size" in text


def test_what_modifications_transfer() -> None:
    data = compute(read(ROOT / "results" / "modifications-cpu"), sections_of("modifications"))
    found = data.data["modifications"]
    assert set(found.cells["replicates"]) == {3}
    pairs = found.transfers[~found.transfers["seeds"]].set_index(["first", "second"])
    certain = pairs[(pairs["rho_low"] > 0) | (pairs["rho_high"] < 0)]
    assert set(certain.index) == {("stdlib, clm", "stdlib, mlm"), ("mqar", "listops")}
    assert len(pairs) == 6
    text, recall = certain.loc["stdlib, clm", "stdlib, mlm"], certain.loc["mqar", "listops"]
    assert f"rank correlation {text['rho']:.2f}, 95 % interval {_ends(text)}" in CHOOSING
    assert f"recall and ListOps ({recall['rho']:.2f}, {_ends(recall)})" in CHOOSING
    own = found.cells[found.cells["differs"].eq(True)]
    default = found.cells[found.cells["modification"] == "default"].set_index("task")
    better = own[own["score"].to_numpy() > default.loc[own["task"], "score"].to_numpy()]
    names = better.groupby("task")["modification"].agg(lambda of: " ".join(sorted(of)))
    assert dict(names) == {
        "stdlib, clm": "dynamic_conv norm_position=post product_keys",
        "stdlib, mlm": "dynamic_conv product_keys",
        "listops": "product_keys",
    }
    assert (found.cells["differs"].eq(True)).sum() < len(found.cells) / 3
    assert default.loc["mqar", "value"] > 0.9995
    cells = found.cells.set_index(["task", "modification"])
    assert cells.loc[("mqar", "dynamic_conv"), "guesses"]
    keys = cells.xs("product_keys", level="modification")
    size, speed = (keys[name] / default[name] for name in ("params", "steps_per_second"))
    stated = f"up to {size.max():.2f} times the parameters, and makes {speed.min():.2f} to {speed.max():.2f}"
    assert stated in CHOOSING


def _ends(row: pd.Series[float]) -> str:
    return f"{row['rho_low']:.2f} to {row['rho_high']:.2f}"


def test_the_recommendations_of_the_readme() -> None:
    """They are the rows of the report's answer."""
    text = (ROOT / "results" / "reference-cpu" / "report" / "summary.md").read_text()
    head = text.partition("<details>")[0].splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in head if line.startswith("| clm")
    ]
    of_size = [row for row in rows if "width 256" in row[0] and row[2] == "2"]
    stated = rows_between("Which one, by length", "Conclusions from this run")
    assert stated == [[f"{int(length):,}", *names] for _, length, _, *names in of_size]
    assert len(stated) == 4


def test_the_conclusions_of_the_readme(cpu: pd.DataFrame, summary: pd.DataFrame) -> None:
    by_length = summary.pivot_table(index="variant", columns="seq_len", values="compared_seconds_ratio")
    short, long = by_length[512], by_length[4096]
    assert short.idxmin() == "chunked"
    assert f"only `chunked` is certainly faster than `dense` ({short.min():.2f}×)" in README
    assert (short > 1).sum() > len(short) / 2
    assert f"cost {long['overlapping'] / long['chunked']:.1f} times as much as chunks" in README
    sizes = cells(cpu, d_model=256, depth=2).groupby("variant")["params"].median()
    assert f"{sizes['compressive'] / sizes['dense']:.2f} times the parameters of `dense`" in README


def test_the_quality_table_of_the_readme() -> None:
    frame = records.load(ROOT / "results" / "quality-cpu")
    assert rows_between("quality:begin", "quality:end") == quality_table.rows_of(frame)
    trained = frame[frame["bits_per_byte"].notna()]
    assert trained["replicate"].nunique() == 5
    assert set(trained["bits_per_byte_by_budget"].map(len)) == {3}
    budgets = np.array(trained["train_budgets"].iloc[0])
    for size in budgets / budgets[-1] * trained["ngram_train_bytes"].mean() / 1e6:
        assert f"after {size:.1f} million" in README
    ngram = np.array(trained["ngram_bits_per_byte"].tolist()).mean(axis=0)
    stated = (
        f"A table of 3-grams that learnt the same bytes reaches {ngram[2]:.2f}, "
        f"one of 5-grams {ngram[4]:.2f}, and `xz` {trained['xz_bits_per_byte'].mean():.2f}."
    )
    assert stated in README


def test_the_round_on_a_gpu(relative: pd.DataFrame) -> None:
    at, far = relative[4096].dropna(), relative[65536]
    assert at.idxmin() == "dense"
    stated = (
        f"`chunked` takes {at['chunked']:.2f} times its time, "
        f"`linformer` (masked only) {at['linformer']:.2f}, "
        f"`longformer` {at['longformer']:.2f}, `performer` {at['performer']:.2f} and "
        f"`compressive` {at['compressive']:.1f},"
    )
    assert stated in CHOOSING
    stated = (
        f"`chunked` takes {far['chunked']:.2f} times the time of `dense`, "
        f"`linformer` {far['linformer']:.2f}, "
        f"`longformer` {far['longformer']:.2f}, `routing` {far['routing']:.2f} and "
        f"`performer` {far['performer']:.2f}."
    )
    assert stated in CHOOSING
    frame = records.load(ROOT / "results" / "h100")
    seconds = cells(frame, seq_len=65536).set_index("variant")["step_seconds_median"]
    for name in ("chunked", "longformer", "routing", "sparse_strided", "reformer", "performer", "linformer"):
        assert re.search(rf"`{name}`[^`.;]*?\(?\b{1e3 * seconds[name]:.0f}\b", README), name


def test_the_crossovers_on_two_cores() -> None:
    table = pd.read_csv(ROOT / "results" / "reference-cpu" / "report" / "crossovers.csv")
    own = cells(table, figure="time", depth=2, d_model=256, objective="clm").set_index("variant")
    first, last = int(own["first"].iloc[0]), int(own["last"].iloc[0])
    sentences = CHOOSING.partition("is faster than that of `dense` from these lengths on: ")[2].split(". ")[
        :2
    ]
    stated = {
        name: int(length.replace(",", ""))
        for names, length in re.findall(r"((?:`\w+`(?:, | and )?)+) ([\d,]+)", sentences[0])
        for name in re.findall(r"\w+", names.replace(" and ", " "))
    }
    outcomes = own["outcome"].to_dict()
    expected = {name: first for name, outcome in outcomes.items() if outcome == "always"}
    expected |= {name: round(own["length"][name]) for name, outcome in outcomes.items() if outcome == "from"}
    assert stated == expected
    never = [name for name, outcome in outcomes.items() if outcome == "never"]
    if never:
        assert sentences[1] == f"`{never[0]}` is not faster up to {last:,}"
    else:
        assert sentences[1].startswith("Measure your device")
    assert len(never) + len(stated) == len(own)


@pytest.mark.slow
def test_a_million_tokens_need_the_memory_that_the_readme_states() -> None:
    """Predicted as `experiment=million` predicts it, at 12 layers."""
    options = ["model=small", "model.ff_chunks=64", "seq_len=1048576", "depth=12", "activations=reversible"]
    found = {}
    for name in ("reformer", "dense"):
        spec = spec_of(*options, f"variant={name}", "model.d_model=256", "batch_size=1")
        with torch.device("meta"):
            flops = build_model(spec).cost(spec.workload()).step
        found[name] = Prediction(spec).predict().peak_bytes / 2**30, flops
    stated = re.search(r"1,048,576 tokens in ([\d.]+) GiB.*?need ([\d.]+) GiB, at (\d+) times", README)
    assert stated
    assert float(stated[1]) == round(found["reformer"][0], 1)
    assert float(stated[2]) == round(found["dense"][0], 1)
    assert int(stated[3]) == round(found["dense"][1] / found["reformer"][1])
