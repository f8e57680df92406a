"""The report's section on modifications: their figures by task, and rank correlations between tasks."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from report_parts import sections_of
from scipy import stats
from test_report import failed, record, table, write
from test_report_memory import look, text_of
from test_report_recall import answers

from bench.records import Record
from bench.report.data.experiment import read
from bench.report.figures import canvas
from bench.report.sections import compute
from bench.report.sections.modifications import SECTIONS, Modified
from bench.report.sections.modifications.data import BITS
from bench.report.sections.modifications.names import DEFAULT
from bench.report.sections.modifications.plots import draw
from bench.report.sections.modifications.transfer import interval, spearman
from bench.report.text.columns import shown
from bench.report.text.marks import ALIKE, BY_CHANCE, GUESSES, LEAK, UNDERTRAINED, UNTOLD
from bench.report.text.tables import Table

MLP = {"activation": "gelu", "mult": 4, "width": None}
MODELS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "activation=relu": {"feed_forward_params": {**MLP, "activation": "relu"}},
    "activation=silu": {"feed_forward_params": {**MLP, "activation": "silu"}},
    "glu (activation=gelu)": {
        "feed_forward": "glu",
        "feed_forward_params": {"activation": "gelu", "mult": 4},
    },
    "glu (activation=silu)": {
        "feed_forward": "glu",
        "feed_forward_params": {"activation": "silu", "mult": 4},
    },
    "switch": {"feed_forward": "switch", "feed_forward_params": {"n_experts": 4}, "params_active": 90_000},
    "norm=rms": {"norm": "rms"},
    "norm=none, residual=rezero": {"norm": "none", "residual": "rezero"},
    "tie_embeddings": {"tie_embeddings": True},
    "kv_heads=1": {"kv_heads": 1, "widen_feed_forward": True},
    "universal": {"stack": "universal", "stack_params": {"signal": True}},
    "gated_attention": {"variant": "gated_attention", "feed_forward_params": {**MLP, "width": 224}},
    "performer": {"variant": "performer"},
}
"""Name → what differs from the default. `gated_attention` is narrower, so that it is as large."""
TASKS = ("plays, clm", "plays, mlm", "mqar", "listops")
SEEDS = (0, 1, 2)
MQAR = "mqar: accuracy, guessing 12.5 %"


def goodness(name: str, task: str) -> float:
    """How much better than the default a model is on a task; nothing for `tie_embeddings`."""
    if name in (DEFAULT, "tie_embeddings"):
        return 0.0
    common, own = random.Random(name), random.Random(name + task)
    return 0.06 * (common.random() - 0.5) + 0.02 * (own.random() - 0.5)


def made(name: str, task: str, seed: int, **other: Any) -> Record:
    """One finished cell. A seed shifts all models alike, and each by a little."""
    better = goodness(name, task) + 2e-4 * random.Random(f"{name}{task}{seed}").random() + 0.002 * seed
    knobs = {"feed_forward": "mlp", "feed_forward_params": MLP, "stack": "stack", "stack_params": {}}
    values = {**knobs, **MODELS[name], "cell_id": f"{name}-{task}-{seed}", **other}
    variant = values.pop("variant", "dense")
    order = list(MODELS).index(name)
    values = {
        "train_budget": "tokens",
        "train_amount": 65_536.0,
        "learning_rate": 0.003,
        "params": 100_000 + order,
        "started_at": f"2026-03-0{1 + seed}T10:{order:02}:0{TASKS.index(task)}+00:00",
        **values,
    }
    if task in ("mqar", "listops"):
        of = {"data": task, "accuracy": 0.8 + better, "nll": 0.7 - better, **values}
        found = answers("dense", 8, seed, **of)
        found.variant = variant
        return found
    nll = 1.5 - better
    text = {"nll": nll, "train_budgets": [16_384, 65_536], "nll_by_budget": [nll + 1.0, nll]}
    if task == "plays, mlm":
        text |= {"objective": "mlm", "bits_per_byte": None}
    return record(variant, replicate=seed, **{**text, **values})


def run(tasks: Sequence[str] = TASKS, seeds: Sequence[int] = SEEDS, **other: Any) -> list[Record]:
    """Every model on these tasks."""
    return [made(name, task, seed, **other) for seed in seeds for name in MODELS for task in tasks]


def computed(folder: Path, found: Sequence[Record]) -> Modified:
    """The section's data, with those of the sections that it needs alone."""
    sections = sections_of("modifications")
    result: Modified = compute(read(write(folder, found)), sections).data["modifications"]
    return result


def rows_of(of: Table) -> dict[str, dict[str, str]]:
    """Name in the first column → its row by title."""
    columns = shown(of.columns)
    rows = (
        dict(zip([c.title for c in columns], row, strict=True))
        for row in zip(*(c.cells for c in columns), strict=True)
    )
    return {row[columns[0].title]: row for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("modifications") / "x", run())


@pytest.fixture(scope="module")
def data(folder: Path) -> Modified:
    return computed(folder, [])


def mean(name: str, task: str, figure: Callable[[Record], float | None]) -> float:
    return statistics.mean(float(figure(made(name, task, seed)) or 0) for seed in SEEDS)


def test_models_are_named_by_what_they_change(data: Modified) -> None:
    """Without the width that makes one of them as large."""
    assert list(data.cells["task"].unique()) == [*TASKS]
    for _, own in data.cells.groupby("task"):
        assert set(own["modification"]) == set(MODELS)
        assert own["modification"].iloc[0] == DEFAULT
    parts = data.cells.drop_duplicates("modification").set_index("modification")["part"]
    assert parts["gated_attention"] == parts["performer"] == "attention"
    assert parts["switch"] == parts["activation=relu"] == "feed-forward"
    assert parts["universal"] == "depth schedule"
    assert parts["kv_heads=1"] == parts["norm=rms"] == "norms, heads, embeddings"


def test_widths_are_named_where_nothing_else_tells_apart(tmp_path: Path) -> None:
    def wide(width: int, **other: Any) -> Record:
        knobs = {**MLP, "width": width, **other}
        return record(cell_id=f"{width}{other}", feed_forward="mlp", feed_forward_params=knobs)

    found = [record(feed_forward="mlp", feed_forward_params=MLP), wide(512), wide(128, activation="relu")]
    names = computed(tmp_path / "a", found).cells["modification"]
    assert set(names) == {DEFAULT, "width=512", "activation=relu"}
    names = computed(tmp_path / "b", [*found, wide(64, activation="relu")]).cells["modification"]
    assert set(names) == {
        DEFAULT,
        "width=512",
        "activation=relu, width=128",
        "activation=relu, width=64",
    }


def test_the_default_is_what_the_others_change_in_one_place(tmp_path: Path) -> None:
    """Here all have gated layers, and RMSNorm was measured first."""
    glu = {"feed_forward": "glu", "feed_forward_params": {"activation": "silu"}}
    found = [
        record(cell_id=name, started_at=f"2026-03-01T{hour}:00+00:00", **glu, **own)
        for hour, (name, own) in enumerate(
            {"a": {"norm": "rms"}, "b": {}, "c": {"tie_embeddings": True}}.items(), 10
        )
    ]
    assert set(computed(tmp_path / "x", found).cells["modification"]) == {
        DEFAULT,
        "norm=rms",
        "tie_embeddings",
    }


def test_the_tables_have_the_figures_of_the_records(data: Modified) -> None:
    overview, _, *each = SECTIONS[0].tables(data)
    assert [one.heading for one in each] == [f"Modifications on {task}" for task in TASKS]
    rows = rows_of(overview)
    assert set(rows) == set(MODELS)
    assert next(iter(rows)) == DEFAULT
    ranks = [float(row["mean rank"]) for row in list(rows.values())[1:]]
    assert ranks == sorted(ranks)
    best = {
        task: stats.rankdata([-goodness(name, task) for name in MODELS])[list(MODELS).index("norm=rms")]
        for task in TASKS
    }
    assert float(rows["norm=rms"]["mean rank"]) == pytest.approx(statistics.mean(best.values()), abs=0.06)
    assert rows["switch"]["active"].startswith("0.9")
    assert rows["norm=rms"]["active"] == "1.00×"
    relu = rows["activation=relu"]
    assert relu["plays, mlm: nats per token"].startswith(
        f"{mean('activation=relu', TASKS[1], lambda r: r.nll):.3f} ± 0.00"
    )
    share = 100 * mean("activation=relu", "mqar", lambda r: r.accuracy)
    assert relu[MQAR].startswith(f"{share:.1f} ± 0.2 %")
    assert relu["parameters"] == "1.00×"

    text = rows_of(each[0])
    bits = mean("activation=relu", TASKS[0], lambda r: r.bits_per_byte)
    gap = bits - mean(DEFAULT, TASKS[0], lambda r: r.bits_per_byte)
    assert text["activation=relu"]["bits per byte"].startswith(f"{bits:.3f} ± 0.00")
    assert text["activation=relu"]["− default"].startswith(f"{gap:+.3f} (".replace("-", "−"))
    early = (mean("activation=relu", TASKS[0], lambda r: r.nll) + 1) / math.log(2)
    assert text["activation=relu"]["loss after 25.0 %, bits per byte"] == f"{early:.3f}"
    one = made("activation=relu", TASKS[0], 0)
    speed = [1 / float(made("activation=relu", TASKS[0], seed).step_seconds_median or 0) for seed in SEEDS]
    assert float(text["activation=relu"]["steps a second"]) == pytest.approx(
        statistics.median(speed), rel=0.01
    )
    flops = float(one.flops_algorithmic_step or 0) / (one.batch_size * one.seq_len)
    assert text["activation=relu"]["FLOPs a token"] == f"{flops:,.0f} FLOP"
    assert text["switch"]["active"] == "90,000"
    recall = rows_of(each[2])
    points = 100 * (
        mean("switch", "mqar", lambda r: r.accuracy) - mean(DEFAULT, "mqar", lambda r: r.accuracy)
    )
    assert recall["switch"]["− default"].startswith(f"{points:+.1f} (".replace("-", "−"))


def test_what_cannot_be_told_from_the_default_is_marked(data: Modified) -> None:
    """Twelve comparisons a task; differences of 10 % are certain, and none is none."""
    for task, own in data.cells.groupby("task"):
        by_name = own.set_index("modification")
        assert (own["comparisons"] == len(MODELS) - 1).all()
        assert not by_name.loc["tie_embeddings", "differs"]
        far = [name for name in MODELS if abs(goodness(name, str(task))) > 0.005]
        assert len(far) > 6
        assert by_name.loc[far, "differs"].all()
    overview, _, text, *_ = SECTIONS[0].tables(data)
    cell = rows_of(overview)["tie_embeddings"][MQAR]
    assert cell.endswith(ALIKE)
    assert not rows_of(overview)[DEFAULT][MQAR].endswith(ALIKE)
    assert text.note == "Marks are corrected for 12 comparisons with the default."


def test_correlations_are_those_of_scipy(data: Modified) -> None:
    pairs = data.transfers[~data.transfers["seeds"]]
    assert len(pairs) == 6
    others = [name for name in MODELS if name != DEFAULT]
    for _, pair in pairs.iterrows():
        signs = [1 if task in ("mqar", "listops") else -1 for task in (pair["first"], pair["second"])]
        figures = [
            [
                sign * round(mean(name, task, lambda r: r.accuracy or r.nll), 3 if sign > 0 else 9)
                for name in others
            ]
            for task, sign in zip((pair["first"], pair["second"]), signs, strict=True)
        ]
        expected = stats.spearmanr(*figures)
        assert pair["rho"] == pytest.approx(expected.statistic)
        assert pair["modifications"] == 12
        ends = pair["rho_low"], pair["rho_high"]
        assert ends == interval(expected.statistic, 12)
        assert ends[0] < pair["rho"] < ends[1]
    seeds = data.transfers[data.transfers["seeds"]]
    assert list(seeds["first"]) == [*TASKS]
    assert (seeds["rho"] > 0.95).all(), "replicates are shifted alike"
    rows = shown(SECTIONS[0].tables(data)[1].columns)
    assert rows[1].cells[-1] == "itself, another replicate"


@pytest.mark.parametrize(("rho", "count"), [(0.0, 20), (0.5, 12), (-0.8, 8), (1.0, 10), (-1.0, 6)])
def test_the_interval_contains_its_correlation_and_narrows(rho: float, count: int) -> None:
    """By its formula for another number of pairs, and mirrored for another sign."""
    low, high = interval(rho, count)
    assert -1 < low < high < 1
    assert low <= rho <= high or abs(rho) == 1
    assert interval(-rho, count) == pytest.approx((-high, -low))
    wider = interval(rho, count - 1)
    assert count == 6 or wider[1] - wider[0] > high - low
    inner = min(abs(rho), 1 - 12 / (count**3 - count)) * math.copysign(1, rho)
    reach = stats.norm.ppf(0.975) * np.sqrt((1 + inner**2 / 2) / (count - 3))
    assert (low, high) == pytest.approx(tuple(np.tanh(np.arctanh(inner) + np.array([-reach, reach]))))


def test_few_or_equal_values_have_no_correlation() -> None:
    def values(*of: float) -> pd.Series[float]:
        return pd.Series(of, index=[*"abcdefg"[: len(of)]])

    assert math.isnan(spearman(values(1, 2), values(2, 1))[0])
    assert math.isnan(spearman(values(1, 1, 1), values(1, 2, 3))[0])
    assert spearman(values(1, 2, 3, math.nan), values(1, 3, 2, 4)) == (pytest.approx(0.5), 3)
    assert np.isnan(interval(0.5, 5)).all()


def test_a_rate_that_chance_chose_is_marked(tmp_path: Path) -> None:
    """The next best rate of one search is worse by 10 nats, of the other by less than seeds differ."""
    text = TASKS[0]
    found = []
    for name, second in ((DEFAULT, 12.0), ("norm=rms", 2.000001)):
        for seed in SEEDS:
            cell = made(name, text, seed)
            cell.learning_rates_tried, cell.learning_rate_nlls = [0.003, 0.01], [2.0, second]
            found.append(cell)
    table = SECTIONS[0].tables(computed(tmp_path / "x", found))[-1]
    rates = {name: row["learning rate"] for name, row in rows_of(table).items()}
    assert rates == {DEFAULT: "0.003", "norm=rms": f"0.003{BY_CHANCE}"}


def test_what_is_undertrained_has_no_rank(tmp_path: Path) -> None:
    """Two models need more bits per byte than a table of 3-grams, which learnt the same bytes."""
    found = run(TASKS[:2])
    for cell in found:
        if cell.bits_per_byte is not None:
            worse = cell.variant == "performer" or cell.norm == "rms"
            cell.ngram_bits_per_byte = [5.0, 4.0, cell.bits_per_byte + (-0.1 if worse else 0.1)]
    data = computed(tmp_path / "x", found)
    text = data.cells[data.cells["figure"] == BITS].set_index("modification")
    assert set(text.index[text["rank"].isna()]) == {"performer", "norm=rms"}
    assert text["rank"].max() == len(MODELS) - 2
    row = rows_of(SECTIONS[0].tables(data)[0])["performer"]
    assert UNDERTRAINED in row["plays, clm: bits per byte"]
    assert UNDERTRAINED not in row["plays, mlm: nats per token"]
    assert set(data.transfers["modifications"]) == {len(MODELS) - 3, len(MODELS) - 1}


def test_all_that_guess_share_a_rank(tmp_path: Path) -> None:
    """Their order is chance. 8,192 questions with 8 answers: 95 % of guesses have at most 13.2 %."""
    found = run(TASKS[2:])
    lost = {"performer": 0.124, "norm=rms": 0.13, "switch": 0.14}
    for cell in found:
        name = "performer" if cell.variant == "performer" else cell.feed_forward
        name = "norm=rms" if cell.norm == "rms" else name
        if cell.data == "mqar" and name in lost:
            cell.accuracy, cell.tokens_evaluated = lost[name] + 1e-4 * cell.replicate, 8192
    data = computed(tmp_path / "x", found)
    recall = data.cells[data.cells["task"] == "mqar"].set_index("modification")
    assert set(recall.index[recall["guesses"]]) == {"performer", "norm=rms"}
    assert recall.loc["performer", "rank"] == recall.loc["norm=rms", "rank"] == len(MODELS) - 0.5
    assert recall.loc["switch", "rank"] == len(MODELS) - 2
    overview = rows_of(SECTIONS[0].tables(data)[0])
    assert {name for name, row in overview.items() if GUESSES in row[MQAR]} == {"performer", "norm=rms"}


def test_accuracies_are_ranked_as_they_are_shown(tmp_path: Path) -> None:
    """One answer in thousands decides no rank: all that recall everything are equal."""
    found = run(TASKS[2:])
    for cell in found:
        if cell.data == "mqar":
            cell.accuracy = 1.0 if cell.norm == "rms" or cell.replicate else 0.9999
    recall = computed(tmp_path / "x", found).cells
    assert set(recall.loc[recall["task"] == "mqar", "rank"]) == {(len(MODELS) + 1) / 2}


def test_a_task_may_be_missing(tmp_path: Path) -> None:
    """One task has no correlation, and a model that was not measured on a task has a dash there."""
    alone = computed(tmp_path / "one", run(TASKS[:1]))
    assert set(alone.cells["modification"]) == set(MODELS)
    assert set(alone.transfers["first"]) == {TASKS[0]}
    assert draw(alone.cells, look(read(tmp_path / "one").collected.frame)) is None
    found = [one for one in run(TASKS[:2]) if not (one.variant == "performer" and one.objective == "mlm")]
    data = computed(tmp_path / "two", found)
    row = rows_of(SECTIONS[0].tables(data)[0])["performer"]
    assert row["plays, mlm: nats per token"] == "–"
    assert row["plays, clm: bits per byte"] != "–"
    assert list(data.transfers["modifications"]) == [11, 12, 11]


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    data = computed(tmp_path / "x", run(TASKS[:3], SEEDS[:1]))
    assert data.cells.loc[data.cells["modification"] != DEFAULT, "differs"].isna().all()
    overview, correlations, text, *_ = SECTIONS[0].tables(data)
    rows = rows_of(overview)
    assert all(row[MQAR].endswith(f"%{UNTOLD}") for name, row in rows.items() if name != DEFAULT)
    assert "±" not in rows["switch"][MQAR]
    assert "(" not in rows_of(text)["switch"]["− default"]
    assert not text.note
    assert len(correlations.columns[0].cells) == 3, "three pairs of tasks, and no pair of replicates"


def test_what_did_not_finish_is_shown_with_its_reason(tmp_path: Path) -> None:
    """One of three replicates diverged; another model diverged in all of them, and takes no part."""
    found = []
    for one in run(TASKS[:2]):
        is_lost = one.variant == "performer" or (one.norm == "rms" and one.replicate == 1)
        if one.objective == "clm" and is_lost:
            reason = "the loss is nan after 12 steps"
            keys = (
                "train_budget",
                "train_amount",
                "learning_rate",
                "cell_id",
                "norm",
                "feed_forward",
                "feed_forward_params",
                "stack",
                "stack_params",
            )
            lost = failed("diverged", reason, variant=one.variant, replicate=one.replicate)
            for key in (*keys, "started_at"):
                setattr(lost, key, getattr(one, key))
            one = lost
        found.append(one)
    data = computed(tmp_path / "x", found)
    overview, _, text, masked = SECTIONS[0].tables(data)
    assert rows_of(overview)["performer"]["plays, clm: bits per byte"] == "diverged"
    rows = rows_of(text)
    assert rows["performer"]["did not finish"] == "diverged: the loss is nan after 12 steps"
    assert rows["norm=rms"]["did not finish"] == "diverged, 1 of 3: the loss is nan after 12 steps"
    assert rows["norm=rms"]["replicates"] == "2"
    assert rows["performer"]["− default"] == "–"
    assert "did not finish" not in rows_of(masked)["performer"]
    assert list(data.transfers["modifications"]) == [11, 10, 12]


def test_a_rate_at_which_a_replicate_diverged_is_not_the_best(tmp_path: Path) -> None:
    """Every model at two rates; of the default one replicate of the better one diverged."""
    found = []
    for rate in (0.001, 0.003):
        for one in run(TASKS[:1]):
            one.learning_rate, one.cell_id = rate, f"{one.cell_id}-{rate}"
            one.train_budget, one.train_amount = "tokens", 65_536.0
            one.nll = (one.nll or 0) - (0.1 if rate == 0.003 else 0)
            if rate == 0.003 and one.norm == "rms" and one.replicate == 0:
                one.status, one.reason, one.nll = "diverged", "nan", None
            found.append(one)
    cells = computed(tmp_path / "x", found).cells.set_index("modification")
    assert cells.loc["norm=rms", ["learning_rate", "replicates", "unfinished"]].tolist() == [0.001, 3, ""]
    assert (cells.drop(index="norm=rms")["learning_rate"] == 0.003).all()


def test_what_sees_the_future_has_no_rank(tmp_path: Path) -> None:
    found = run(TASKS[:2])
    for one in found:
        if one.variant == "performer":
            one.leak_max_abs = 0.5
    data = computed(tmp_path / "x", found)
    row = rows_of(SECTIONS[0].tables(data)[0])["performer"]
    assert LEAK in row["plays, clm: bits per byte"]
    assert row["mean rank"] == "–"
    assert (data.transfers["modifications"] == 11).all()


def test_variants_alone_make_no_section(tmp_path: Path) -> None:
    found = [
        record(variant, replicate=seed) for variant in ("dense", "chunked", "longformer") for seed in SEEDS
    ]
    assert computed(tmp_path / "x", found).cells.empty
    assert not SECTIONS[0].tables(Modified(pd.DataFrame(), pd.DataFrame()))


def test_a_panel_for_each_pair_of_tasks(data: Modified, folder: Path, tmp_path: Path) -> None:
    figure = draw(data.cells, look(read(folder).collected.frame))
    assert figure is not None
    pairs = data.transfers[~data.transfers["seeds"]]
    assert len(figure.axes) == len(pairs) == 6
    for axis, (_, pair) in zip(figure.axes, pairs.iterrows(), strict=True):
        assert axis.get_title().startswith(f"ρ = {pair['rho']:.2f} (".replace("-", "−"))
        assert axis.get_xlabel() == f"rank on {pair['first']}"
        points = [line for line in axis.get_lines() if line.get_marker() == "o"]
        places = np.array([line.get_xydata()[0] for line in points])
        assert len(places) == 12
        assert (places.sum(axis=0) == sum(range(1, 13))).all(), "ranks, of which equals share theirs"
        assert stats.spearmanr(places[:, 0], places[:, 1]).statistic == pytest.approx(pair["rho"])
        low, high = axis.get_xlim()
        assert low > high, "the best is at the right"
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words[0] == "attention"
    assert "12  tie_embeddings" in words or any(word.endswith("  tie_embeddings") for word in words)
    with canvas.look():
        canvas.save(figure, tmp_path, "transfer")
    assert imread(tmp_path / "transfer.png").std() > 0.01


@pytest.mark.slow
def test_a_report_has_tables_figure_and_files(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    text = text_of(folder, run(), plots=True)
    assert len(table(text, "### Modifications by task")) == len(MODELS)
    assert len(table(text, "### From task to task")) == 10
    assert "](plots/transfer.png)](plots/transfer.svg)" in text
    report = folder / "report"
    assert "plots are not drawn: with more than 2,000 records or 24 settings" in text
    assert len([*(report / "plots").glob("held_out_loss*.png")]) == 1, "one of 24 settings"
    assert len(pd.read_csv(report / "modifications.csv")) == len(MODELS) * len(TASKS)
    assert len(pd.read_csv(report / "transfer.csv")) == 10
    assert "Modifications by task" in (report / "summary.tex").read_text()
    assert "modifications-1" in (report / "index.html").read_text()
