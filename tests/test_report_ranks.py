"""Ranks with doubt: simulated pools with a known truth, and orderings that must appear before any rank."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_parts import part_of
from scipy import stats
from test_report import record, table, write
from test_report_page import Page, page_of, results_of

from bench.records import Record
from bench.records.configurations import table as frame_of_records
from bench.report import summary
from bench.report.data.collect import relabelled
from bench.report.data.orderings import SHOWN, UNDECIDED, VIOLATED, expected, verdict
from bench.report.data.paired import Differences, Prior, Sides, Text, holm
from bench.report.data.ranking import MOST_COMPARISONS, OF_BOTH, OF_REPLICATES, Ranking
from bench.report.data.statistics import quality
from bench.report.page import html

Floats = npt.NDArray[np.float64]
BLOCKS = 24
TARGETS = 100
"""Of each block."""


def trained(variant: str, replicate: int, blocks: Floats, pool: int = 0, **other: Any) -> Record:
    """A record whose loss is the mean of those of its blocks; `pool` is its training budget."""
    nll = float(blocks.mean())
    values: dict[str, Any] = {
        "cell_id": f"{variant}-{replicate}-{pool}-{sorted(other.items())}",
        "variant_params": {},
        "nll": nll,
        "nll_by_block": blocks.tolist(),
        "block_targets": [TARGETS] * len(blocks),
        "block_documents": [0] * len(blocks),
        "tokens_evaluated": TARGETS * len(blocks),
        "train_budget": "tokens",
        "train_amount": 1000.0 + pool,
        "learning_rate": 0.003,
        "eval_split": "test",
        "measure": f"m{pool}",
    }
    return record(variant, replicate=replicate, **{**values, **other})


def losses(
    source: np.random.Generator,
    models: int,
    replicates: int,
    *,
    of_replicates: float,
    of_text: float,
    shifts: tuple[float, ...] = (),
) -> Floats:
    """(n, S, K) losses: shared by all are the text's difficulty and the replicate's luck; a model's own are
    its luck in each replicate and its taste of each block."""
    shape = (models, replicates, BLOCKS)
    values = (
        2 + 0.5 * source.standard_normal((1, 1, BLOCKS)) + 0.1 * source.standard_normal((1, replicates, 1))
    )
    values = values + of_replicates * source.standard_normal((models, replicates, 1))
    values = values + of_text * source.standard_normal((models, 1, BLOCKS))
    values = values + 0.01 * source.standard_normal(shape)
    for model, shift in enumerate(shifts):
        values[model] += shift
    return values


def judged(pools: list[Floats], **other: Any) -> Ranking:
    """The models of all pools, v0, v1, … in each, through the report's own code."""
    found = [
        trained(f"v{model}", replicate, blocks, pool, **other)
        for pool, values in enumerate(pools)
        for model, own in enumerate(values)
        for replicate, blocks in enumerate(own)
    ]
    return quality(relabelled(frame_of_records(found)))


def ranges(cells: pd.DataFrame) -> dict[str, tuple[float, float]]:
    return dict(zip(cells["label"], zip(cells["rank_low"], cells["rank_high"], strict=True), strict=True))


# --- simulated pools ------------------------------------------------------------------------------


@pytest.mark.parametrize(("of_replicates", "of_text"), [(0.02, 0.005), (0.005, 0.05), (0.02, 0.05)])
def test_equal_models_are_told_apart_in_at_most_5_percent_of_runs(
    of_replicates: float, of_text: float
) -> None:
    """Any of the 10 pairs of a pool counts, whether replicates or text make the doubt."""
    source, runs = np.random.default_rng(7), 80
    pools = [losses(source, 5, 3, of_replicates=of_replicates, of_text=of_text) for _ in range(runs)]
    cells = judged(pools).cells
    assert set(cells["comparisons"]) == {10}
    told_apart = cells[(cells["rank_low"] > 1) | (cells["rank_high"] < 5)]
    assert told_apart["train_amount"].nunique() <= 0.05 * runs


def test_a_difference_that_is_there_is_found_and_equal_models_are_tied() -> None:
    source, runs = np.random.default_rng(8), 20
    pools = [
        losses(source, 4, 3, of_replicates=0.01, of_text=0.02, shifts=(0, 0, 0.1, 0.1)) for _ in range(runs)
    ]
    every = judged(pools).cells
    right = [
        ranges(own) == {"v0": (1, 2), "v1": (1, 2), "v2": (3, 4), "v3": (3, 4)}
        for _, own in every.groupby("train_amount")
    ]
    assert np.mean(right) >= 0.9


def test_text_alone_can_leave_a_doubt() -> None:
    """Replicates agree to the last digit; only one block in 24 tells the models apart."""
    values = np.full((2, 3, BLOCKS), 2.0)
    values[1, :, 5] += 1.0
    values += 0.001 * np.random.default_rng(0).standard_normal((2, 3, 1))
    assert ranges(judged([values]).cells) == {"v0": (1, 2), "v1": (1, 2)}
    without = judged([values], nll_by_block=None).cells
    assert ranges(without) == {"v0": (1, 1), "v1": (2, 2)}
    assert set(without["doubt"]) == {OF_REPLICATES}


# --- against other computations -------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.0001, 1), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(values: list[float]) -> None:
    """A hypothesis falls where every set of hypotheses that holds it falls by Bonferroni."""
    p = np.array(values)
    sets = [s for k in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), k)]
    want = [max(min(1.0, len(s) * p[list(s)].min()) for s in sets if k in s) for k in range(len(p))]
    assert holm(p) == pytest.approx(want)


def test_two_models_without_blocks_are_compared_by_students_paired_test() -> None:
    first, second = np.random.default_rng(1).normal(2, 0.1, (2, 1, 5))
    sides = [Sides(one, np.zeros((1, 5, 0))) for one in (first, second)]
    differences = Differences.of(sides[0], sides[1], None)
    found = differences.judged(differences.prior(4))
    want = stats.ttest_rel(first[0], second[0])
    assert found.p[0] == pytest.approx(want.pvalue, rel=1e-5)
    ends = want.confidence_interval(0.95)
    assert [float(end[0]) for end in found.interval] == pytest.approx([ends.low, ends.high])


@pytest.mark.parametrize("documents", [1, 40])
def test_the_doubt_over_text_is_that_of_a_bootstrap(documents: int) -> None:
    """Of documents, each with all its blocks, where there are enough; of blocks else. Blocks differ in
    size."""
    source = np.random.default_rng(2)
    sizes = source.integers(20, 60, 80)
    owner = np.arange(80) * documents // 80
    own = source.normal(0, 1, 80) + (source.normal(0, 1, 40)[owner] if documents > 1 else 0)
    variance, freedom = Text.of(sizes, owner).variance(own[None])
    units = [np.flatnonzero(owner == unit) for unit in range(documents)] if documents > 1 else [*range(80)]
    means = []
    for _ in range(3000):
        drawn = np.concatenate([np.atleast_1d(units[k]) for k in source.integers(0, len(units), len(units))])
        means.append(np.average(own[drawn], weights=sizes[drawn]))
    assert freedom == len(units) - 1
    assert math.sqrt(variance[0]) == pytest.approx(np.std(means), rel=0.08)


def test_variances_that_agree_are_pooled_and_one_that_stands_out_is_kept() -> None:
    source = np.random.default_rng(3)
    alike = 0.01**2 * source.chisquare(2, 45) / 2
    freedom = np.full(45, 2.0)
    prior = Prior.of(alike, freedom, 18)
    drawn, counted, alone = prior.drawn(alike, freedom)
    assert counted.min() > 2
    kept = drawn == alike
    assert 0 < kept.sum() < 45
    assert set(alone[kept]) == {2.0}
    assert (alone[~kept] == counted[~kept]).all()
    assert np.ptp(np.log(drawn)) < np.ptp(np.log(alike))
    assert (drawn >= alike).all()
    alike[0] = 1.0
    assert Prior.of(alike, freedom, 18).drawn(alike, freedom)[0][0] == 1.0


def test_the_interval_of_a_model_whose_seeds_vary_more_covers_95_percent() -> None:
    """With the degrees of freedom of the pool it would be 91.5 %."""
    source = np.random.default_rng(5)
    first, second = np.triu_indices(8, 1)
    pair = int(np.flatnonzero((first == 0) & (second == 1))[0])
    deviations = np.array([1.0, 5.0, *[1.0] * 6])[:, None]
    runs, covered = 800, 0
    for _ in range(runs):
        means = deviations * source.standard_normal((8, 5))
        sides = Sides(means, np.zeros((8, 5, 0)))
        differences = Differences.of(sides.take(first), sides.take(second), None)
        judged = differences.judged(differences.prior(28))
        low, high = (end[pair] for end in judged.interval)
        covered += low < 0 < high
        family = np.ones(len(first), dtype=bool)
        certain = judged.corrected(family) < 0.05
        assert not (certain & (judged.interval[0] < 0) & (judged.interval[1] > 0)).any()
    assert covered / runs > 0.94


# --- families -------------------------------------------------------------------------------------


def test_a_large_pool_is_compared_with_dense_alone() -> None:
    source = np.random.default_rng(4)
    values = losses(
        source, 14, 3, of_replicates=0.001, of_text=0.001, shifts=tuple(0.1 * k for k in range(14))
    )
    names = ["v0", "v1", "dense", *(f"v{k}" for k in range(3, 14))]
    found = [
        trained(name, replicate, blocks)
        for name, own in zip(names, values, strict=True)
        for replicate, blocks in enumerate(own)
    ]
    assert math.comb(14, 2) > MOST_COMPARISONS
    cells = quality(relabelled(frame_of_records(found))).cells
    assert set(cells["comparisons"]) == {13}
    ranks = ranges(cells)
    assert ranks["v0"] == ranks["v1"] == (1, 2)
    assert ranks["dense"] == (3, 3)
    assert ranks["v5"] == ranks["v13"] == (4, 14)
    no_dense = [one for one in found if one.variant != "dense"]
    one_more = [trained("v14", replicate, blocks) for replicate, blocks in enumerate(values[2])]
    assert quality(relabelled(frame_of_records(no_dense + one_more))).cells["rank_low"].isna().all()


def test_models_that_score_different_targets_are_not_compared() -> None:
    values = losses(np.random.default_rng(5), 2, 3, of_replicates=0.001, of_text=0.001, shifts=(0, 1))
    found = [
        trained(f"v{model}", replicate, blocks, **({} if model else {"tokens_evaluated": 7}))
        for model, own in enumerate(values)
        for replicate, blocks in enumerate(own)
    ]
    assert ranges(quality(relabelled(frame_of_records(found))).cells) == {"v0": (1, 2), "v1": (1, 2)}


def test_one_replicate_decides_nothing() -> None:
    values = losses(np.random.default_rng(6), 3, 1, of_replicates=0.001, of_text=0.001, shifts=(0, 1, 2))
    assert {*ranges(judged([values]).cells).values()} == {(1, 3)}


# --- orderings ------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "longformer-256": {"variant_params": {"window": [256], "dilation": [1]}},
    "longformer-64": {"variant_params": {"window": [64], "dilation": [1]}},
    "transformer_xl": {"state_bytes": 1000, "state_policy": "carried"},
    "compressive": {"state_bytes": 1010, "state_policy": "carried"},
    "hybrid": {"variant_params": {"layers": ["longformer", "longformer(window=32)", "longformer", "dense"]}},
}
SOUND = {"longformer-256": 0.02, "longformer-64": 0.1, "compressive": 0.001, "hybrid": 0.01}


def models(shifts: dict[str, float], *, replicates: int = 4, memory: float = 0.05) -> list[Record]:
    """Models of those shifts in loss, each with a little luck; `memory` is what carried state is worth."""
    source = np.random.default_rng(9)
    text = 2 + 0.5 * source.standard_normal(BLOCKS)
    found = []
    for name, of_case in CASES.items():
        for replicate in range(replicates):
            blocks = (
                text
                + shifts.get(name, 0.0)
                + 0.002 * source.standard_normal()
                + 0.002 * source.standard_normal(BLOCKS)
            )
            values = {**of_case}
            if "state_policy" in of_case:
                values |= {
                    "nll_reset": float(blocks.mean() + memory),
                    "nll_reset_by_block": (blocks + memory).tolist(),
                }
            values |= {"depth": 4, "cell_id": f"{name}-{replicate}"}
            found.append(trained(name.partition("-")[0], replicate, blocks, **values))
    return found


def verdicts(found: list[Record]) -> dict[str, str]:
    seen = quality(relabelled(frame_of_records(found))).orderings
    return dict(zip(seen["expected"], seen["verdict"], strict=True))


BETTER = "dense better than a window of 64 tokens"
WINDOWS = "a window of 256 tokens not worse than a window of 64 by more than 1 %"
LONGEST = "dense not worse than a window of 256 by more than 1 %"
MEMORY = "transformer_xl better with its memory than with a fresh one in every window"
COMPRESSED = "compressive not worse than transformer_xl by more than 1 %"
MIXED = "hybrid not worse than dense by more than 2 %"


def test_every_ordering_of_a_sound_pool_is_shown() -> None:
    seen = verdicts(models(SOUND))
    assert seen == dict.fromkeys((MEMORY, COMPRESSED, BETTER, LONGEST, WINDOWS, MIXED), SHOWN)


@pytest.mark.parametrize(
    ("bent", "broken"),
    [
        ({"longformer-64": -0.2}, {BETTER, WINDOWS}),
        ({"longformer-256": -0.2}, {LONGEST}),
        ({"compressive": 0.2}, {COMPRESSED}),
        ({"hybrid": 0.2}, {MIXED}),
        ({"memory": -0.1}, {MEMORY}),
    ],
)
def test_an_ordering_the_other_way_round_is_violated_and_nothing_is_ranked(
    bent: dict[str, float], broken: set[str]
) -> None:
    memory = bent.get("memory", 0.05)
    found = models({**SOUND, **bent}, memory=memory)
    assert {words for words, said in verdicts(found).items() if said == VIOLATED} == broken
    cells = quality(relabelled(frame_of_records(found))).cells
    assert cells["rank_low"].isna().all()
    assert cells["unsettled"].all()
    assert not any(cells["beats"])


def test_an_ordering_within_the_noise_is_not_decided_and_blocks() -> None:
    found = models({**SOUND, "longformer-64": 0.0, "longformer-256": 0.0})
    assert verdicts(found)[BETTER] == UNDECIDED
    assert quality(relabelled(frame_of_records(found))).cells["rank_low"].isna().all()


def test_an_ordering_whose_cells_are_absent_does_not_block() -> None:
    found = [one for one in models(SOUND) if one.variant in ("dense", "compressive", "hybrid")]
    assert verdicts(found) == {MIXED: SHOWN}
    assert quality(relabelled(frame_of_records(found))).cells["rank_low"].notna().all()


def cell(variant: str, **params: Any) -> dict[str, Any]:
    own = {"number": params.pop("number", 0), "variant": variant, "label": variant, "seq_len": 256}
    other = {"state_bytes": params.pop("state_bytes", math.nan), "has_reset": params.pop("has_reset", False)}
    return {**own, **other, "depth": 4, "variant_params": params}


@pytest.mark.parametrize(
    ("cells", "count"),
    [
        ([cell("dense"), cell("longformer", window=[64])], 1),
        ([cell("dense"), cell("longformer", window=64)], 1),
        ([cell("dense"), cell("longformer", window=[64, 128])], 0),
        ([cell("dense"), cell("longformer", window=[64], dilation=[2])], 0),
        ([cell("dense"), cell("longformer", window=[256])], 0),
        ([cell("dense"), cell("longformer", window=[64], global_tokens=1)], 0),
        ([cell("dense"), cell("hybrid", layers=["longformer", "dense"])], 0),
        ([cell("dense"), cell("hybrid", layers=["dense", "longformer", "chunked", "longformer"])], 1),
        ([cell("compressive", state_bytes=100.0), cell("transformer_xl", state_bytes=120.0)], 0),
        ([cell("compressive", state_bytes=100.0), cell("transformer_xl", state_bytes=104.0)], 1),
        ([cell("compressive"), cell("transformer_xl")], 0),
        ([cell("transformer_xl", has_reset=True)], 1),
        ([cell("compressive", has_reset=True)], 0),
        # a mixture whose layers are all equal is a model of that layer's variant
        ([cell("dense"), cell("hybrid", layers=["longformer(window=64)"])], 1),
        ([cell("dense"), cell("hybrid", layers=["longformer(window=[64],impl=plain)"] * 3)], 1),
        ([cell("dense"), cell("hybrid", layers=["longformer(window=64)"] * 4 + ["dense"])], 1),
        ([cell("dense"), cell("hybrid", layers=["longformer(window=64,dilation=2)"])], 0),
        ([cell("dense"), cell("hybrid", layers=["longformer(window=64)", "longformer(window=32)"])], 0),
        ([cell("dense"), cell("hybrid", layers=["longformer(window=64)"]), cell("longformer", window=64)], 1),
        ([cell("hybrid", layers=["transformer_xl(mem_len=64)"], has_reset=True)], 1),
        ([cell("dense"), cell("hybrid", layers=["unknown_here(window=64)"])], 0),
    ],
)
def test_orderings_find_cells_by_what_they_declare(cells: list[dict[str, Any]], count: int) -> None:
    assert len(expected(cells)) == count


def test_the_window_of_a_mixture_may_be_the_default_of_its_layers() -> None:
    cells = [cell("dense"), cell("hybrid", layers=["longformer"])]
    ((_, pair),) = expected([{**own, "seq_len": 1024} for own in cells])
    assert pair.words == "dense better than a window of 256 tokens"


def test_a_mixture_of_windows_that_beats_dense_is_not_ranked() -> None:
    found = [one for one in models({**SOUND, "hybrid": -0.1}) if one.variant in ("dense", "hybrid")]
    for one in found:
        if one.variant == "hybrid":
            one.variant_params = {"layers": ["longformer(window=64)"]}
    assert verdicts(found) == {BETTER: VIOLATED}
    assert quality(relabelled(frame_of_records(found))).cells["rank_low"].isna().all()


def test_a_verdict_needs_the_whole_interval() -> None:
    assert verdict(-0.2, -0.1, 0.0) == SHOWN
    assert verdict(-0.2, 0.1, 0.0) == UNDECIDED
    assert verdict(-0.2, 0.1, 0.15) == SHOWN
    assert verdict(0.1, 0.2, 0.15) == UNDECIDED
    assert verdict(0.16, 0.2, 0.15) == VIOLATED
    assert verdict(math.nan, math.nan, 0.15) == UNDECIDED


# --- the report -----------------------------------------------------------------------------------


def test_the_report_ranks_after_the_orderings(tmp_path: Path) -> None:
    part = part_of(tmp_path / "e", models(SOUND), "sanity", "pareto", "quality")
    text = part.text
    assert "no ranking" not in text
    assert "- orderings before ranking: 6 of 6 shown" in text
    assert text.index("## Before ranking") < text.index("## Pareto fronts") < text.index("## Quality")
    rows = {row["variant"]: row for row in table(text.split("## Quality", 1)[1], "### clm, data plays")}
    assert rows["longformer (window=\\[64\\])"]["rank"] == "6"
    assert rows["dense"]["rank"] == "1–3"
    assert rows["dense"]["− dense"] == "–"
    low, high = rows["longformer (window=\\[64\\])"]["− dense"].partition("(")[2].rstrip(")").split(" to ")
    assert float(low) < 0.1 / math.log(2) < float(high)
    assert (
        "Ranks are corrected for 15 comparisons in all. Ranks and the intervals of − dense are over repl"
        in text
    )
    pairs = part.files()["differences"]
    assert len(pairs) == 15
    assert set(pairs["doubt"]) == {OF_BOTH}


def test_a_report_whose_orderings_do_not_appear_ranks_nowhere(tmp_path: Path) -> None:
    folder = write(tmp_path / "e", models({**SOUND, "longformer-64": -0.2}))
    results = results_of(folder)
    page, text = Page(html(results)), summary.text(results, {})
    head = text.partition("\n## ")[0]
    assert f"undertrained: no ranking ({BETTER}: violated; {WINDOWS}: violated)" in head
    rows = table(text.split("## Quality", 1)[1], "### clm, data plays")
    assert {row["rank"] for row in rows} == {"–"}
    fronts = table(text.split("## Pareto fronts", 1)[1], "### clm, data plays, length 512, depth 4")
    assert {row["on the front of"] for row in fronts} == {"–"}
    assert all(page.data["unranked"])
    assert not any(page.data["beats"])


def test_the_page_knows_which_model_is_certainly_better(tmp_path: Path) -> None:
    page = page_of(write(tmp_path / "e", models(SOUND)))
    labels = page.data["label"]
    worse = {labels[k]: {labels[other] for other in own} for k, own in enumerate(page.data["beats"])}
    assert worse["longformer (window=[64])"] == set()
    assert "longformer (window=[64])" in worse["dense"]
    assert "dense" not in worse["transformer_xl"]
