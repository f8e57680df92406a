"""Claims come to a verdict from records, and to another one from other records.

Most tests judge the cells that the preset itself would sweep, with figures of a world in which arithmetic is
right; then they bend that world. So a claim whose cells the preset does not have fails here too.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
from conftest import HANG_SECONDS
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra_plugins.longctx_bench import Composer, Preset, product
from test_report import failed, record, write

import bench.claims
from bench import CONFIGS
from bench.claims import base, cells, claim_10_reversible
from bench.claims.__main__ import main
from bench.claims.base import Finding, Judgement, Missing, Verdict
from bench.claims.cells import Spread
from bench.claims.page import page
from bench.claims.parts import above, below, every, some
from bench.config import parse
from bench.config.spec import CellSpec
from bench.records import Record
from bench.report.data.collect import collect

FLOAT = 4


# --- a world in which arithmetic is right ---------------------------------------------------------


def specs_of(preset: str, *arguments: str) -> list[CellSpec]:
    """Every cell of a preset, with these overrides."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", overrides=[f"experiment={preset}"], return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        jobs = [job for grid in Preset.of(composed, []).grids for job in product(loader, grid, [*arguments])]
        composer = Composer(loader, composed)
        return [parse.parse(composer([f"experiment={preset}", *job])).spec for job in jobs]


def figures(spec: CellSpec) -> dict[str, Any]:
    """What arithmetic says of a dense or sparse cell; others are taken for dense ones."""
    t, depth, width = spec.seq_len, spec.depth, spec.model.d_model
    fitting = {"keep": 2, "checkpoint": 12}.get(spec.activations, 1)
    batch = spec.batch_size or fitting
    hidden = batch * t * width * FLOAT
    impl = spec.variant_params.get("impl", "sdpa")
    pairs = t * (t + 1) / 2 if spec.causal else float(t * t)
    if spec.variant.startswith("sparse"):
        pairs = t * 1.5 * math.sqrt(t) / (1 if spec.variant_params["head_mode"] == "merged" else 2)
    attention = 4 * width * pairs * depth * batch
    linear = 24 * width**2 * t * depth * batch
    block = 12 * hidden
    if impl == "naive":
        block += batch * spec.model.heads * t * t * FLOAT
    stored = {
        "checkpoint": depth * hidden,
        "sqrt": math.sqrt(depth) * hidden,
        "reversible": 2 * hidden,
    }.get(spec.activations, depth * block)
    work = {"checkpoint": 1.0, "sqrt": math.sqrt(depth), "reversible": 1.0}.get(spec.activations, 0.0) * block
    again = spec.activations in ("checkpoint", "sqrt", "reversible")
    forward = (attention + linear) / 1e10
    start = 0.05  # seconds a step; replicates ran on a machine that drifts
    seconds = (forward * (3 + again) + start) * (1 + 0.5 * spec.replicate)
    drawn = zlib.crc32(repr((spec.activations, spec.variant, t, spec.replicate)).encode())  # in every process
    noise = 1 + 0.01 * math.sin(drawn)
    executed = (attention + linear) * (3 + again)
    found: dict[str, Any] = {
        "status": "ok",
        "impl": impl,
        "batch_size": batch,
        "flops_attention_step": int(3 * attention),
        "flops_algorithmic_step": int(3 * (attention + linear)),
        "flops_executed_step": int(executed),
        "cost_ratio": 2.0 if impl == "naive" and spec.causal else 1.0,
        "activation_bytes": int(stored + hidden),
        "peak_activation_bytes": int(stored),
        "peak_workspace_bytes": int(work),
        "peak_bytes": int(stored + work + hidden),
        "peak_phase": "backward",
        "peak_bytes_source": "live_storage" if spec.measure.execute else "predicted",
    }
    if spec.measure.execute:
        found |= {
            "step_seconds_median": seconds * noise,
            "forward_seconds_median": forward * (1 + 0.5 * spec.replicate),
            "tokens_per_second": batch * t / seconds / noise,
        }
        if spec.activations == "reversible":
            size = {"float32": 1e-7, "bfloat16": 1e-3}[spec.dtype]
            found["rebuild_error_by_level"] = [size * (depth - level) for level in range(depth)]
    elif t <= 1024:
        found["connected_share"] = 1.0 if depth > 1 or spec.variant == "dense" else 0.2
    if spec.measure.budget:
        found |= {"largest_batch_size": batch, "budget_bytes": spec.measure.budget}
    if spec.measure.train_amount:
        found["nll"] = 2.0 + 0.01 * (spec.replicate - 1) * (1 if spec.activations == "keep" else -1)
        found |= (
            {"accuracy": 1.0, "state_bytes": 64 * spec.variant_params.get("window", [t])[0]}
            if (spec.data.name == "mqar")
            else {"reference_max_abs": 1e-6, "softmax_error_initial": 0.1}
        )
        if spec.measure.history_targets:
            found |= {f"effective_context{end}": 64 for end in ("", "_low", "_high")} | {"reach": t - 1}
        if spec.measure.attention_windows:
            found |= {"sink_mass": 0.1, "sink_mass_uniform": 0.01}
        if spec.measure.longer:
            found |= {"longer_lengths": [t, 2 * t, 4 * t], "nll_longer": [2.0] * 3}
            if memory := spec.variant_params.get("mem_len"):
                found |= {"longer_memory_positions": [memory, 4 * memory], "nll_longer_memory": [2.0] * 2}
    return found


def measured(spec: CellSpec, number: int) -> Record:
    """The record of a cell of that world."""
    fields = asdict(spec)
    identity = {
        key: fields[key] for key in ("depth", "activations", "objective", "dtype", "device", "twin")
    } | {"d_model": spec.model.d_model, "heads": spec.model.heads, "ff_chunks": spec.model.ff_chunks}
    identity |= {"data": spec.data.name, "data_params": spec.data.params}
    identity |= {"variant_params": spec.variant_params, "measure": spec.measure.preset, "name": "claims"}
    blank = dict.fromkeys(("nll", "step_seconds_median", "forward_seconds_median", "tokens_per_second"))
    known = {**blank, "cell_id": f"cell-{number}", **identity, **figures(spec)}
    return record(spec.variant, spec.seq_len, replicate=spec.replicate, **known)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The frame of the presets of `make claims`."""
    folder = tmp_path_factory.mktemp("world") / "claims"
    specs = [*specs_of("claims", "data=stdlib"), *specs_of("claims_recall")]
    write(folder, [measured(spec, number) for number, spec in enumerate(specs)])
    found = collect(folder)
    assert not found.problems
    return found.frame


NUMBERED = dict(base.claims())
SHOWN, CONTRADICTED, OPEN = get_args(Verdict)


def judge(number: int, frame: pd.DataFrame) -> Finding:
    return base.judge(NUMBERED[number], frame)


def part(number: int, place: int, frame: pd.DataFrame) -> Judgement:
    return [*judge(number, frame).parts.values()][place]


def bent(frame: pd.DataFrame, where: Callable[[pd.DataFrame], Any], **changes: Any) -> pd.DataFrame:
    """The frame with other figures in some cells: a factor, or a function of the column."""
    frame = frame.copy()
    rows = frame.index[where(frame)]
    assert len(rows), "the test bends nothing"
    for name, change in changes.items():
        for row in rows:
            old = frame.at[row, name]
            frame.at[row, name] = change(old) if callable(change) else change
    return frame


def of(**keys: Any) -> Callable[[pd.DataFrame], Any]:
    """Where columns have values."""

    def where(frame: pd.DataFrame) -> Any:
        fits = np.ones(len(frame), dtype=bool)
        for name, value in keys.items():
            fits &= (frame[name] == value).to_numpy()
        return fits

    return where


def times(factor: float) -> Callable[[float], float]:
    return lambda old: old * factor


# --- verdicts -------------------------------------------------------------------------------------

ARITHMETIC: dict[int, list[Verdict]] = {
    1: [SHOWN],
    2: [SHOWN, SHOWN],
    4: [SHOWN, CONTRADICTED, SHOWN],
    5: [OPEN, SHOWN],
    6: [SHOWN, SHOWN],
    10: [SHOWN, OPEN, SHOWN],
    12: [SHOWN, CONTRADICTED],
}
"""The verdicts of each claim's parts where arithmetic is right and nothing else costs anything."""


@pytest.mark.parametrize("number", ARITHMETIC)
@pytest.mark.slow
def test_the_preset_has_the_cells_of_every_claim(number: int, world: pd.DataFrame) -> None:
    parts = judge(number, world).parts.values()
    assert [part.verdict for part in parts] == ARITHMETIC[number], parts
    assert not [part for part in parts if part.reason.startswith("needs")]


@pytest.mark.parametrize("number", NUMBERED)
def test_a_claim_says_which_cell_is_missing_and_why(number: int, world: pd.DataFrame) -> None:
    finding = judge(number, world.iloc[:0])
    assert finding.verdict == OPEN
    for judged in finding.parts.values():
        assert re.match(r"needs variant=\w+", judged.reason)
        assert "no such cell" in judged.reason
    failing = world.assign(status="timeout", reason="no result after 600 s")
    assert all(
        "timeout (no result after 600 s)" in one.reason for one in judge(number, failing).parts.values()
    )


NAIVE = {"impl": "naive", "measure": "plan"}
TIMED = {"variant": "dense", "measure": "quick", "depth": 4, "d_model": 256, "batch_size": 1}
STANDARD = {"activations": "reversible", "measure": "standard"}


def paid(frame: pd.DataFrame) -> Any:
    return frame["budget_bytes"].notna() & (frame["activations"] == "checkpoint")


def checkpointed(frame: pd.DataFrame, **keys: Any) -> Any:
    return of(**TIMED, activations="checkpoint", **keys)(frame) & frame["budget_bytes"].isna()


BENT: list[tuple[str, int, int, Verdict, Callable[[pd.DataFrame], Any], dict[str, Any]]] = [
    ("half of the scores", 1, 0, CONTRADICTED, of(**NAIVE, objective="mlm"), {"cost_ratio": 0.5}),
    ("stored in half", 2, 0, CONTRADICTED, of(impl="naive"), {"activation_bytes": times(0.5)}),
    ("all stored in half", 2, 1, CONTRADICTED, of(impl="naive"), {"activation_bytes": times(0.5)}),
    (
        "stored in half as run",
        2,
        0,
        CONTRADICTED,
        of(impl="naive", measure="quick"),
        {"activation_bytes": times(0.5)},
    ),
    (
        "saves nothing more in longer ones",
        4,
        0,
        CONTRADICTED,
        of(variant="sparse_strided", seq_len=8096, depth=2),
        {"flops_attention_step": times(1.5)},
    ),
    (
        "pairs without a way",
        4,
        2,
        CONTRADICTED,
        of(variant="sparse_fixed", depth=2),
        {"connected_share": times(0.99)},
    ),
    ("half a forward pass more", 5, 0, SHOWN, checkpointed, {"step_seconds_median": times(0.9)}),
    ("two forward passes more", 5, 0, CONTRADICTED, checkpointed, {"step_seconds_median": times(1.5)}),
    ("no batch pays", 5, 1, CONTRADICTED, paid, {"tokens_per_second": times(0.3)}),
    (
        "groups are not √L",
        6,
        1,
        CONTRADICTED,
        of(activations="sqrt", depth=64),
        {"peak_workspace_bytes": times(2.0)},
    ),
    (
        "inputs are not √L",
        6,
        0,
        CONTRADICTED,
        of(activations="sqrt", depth=64),
        {"activation_bytes": times(2.0)},
    ),
    (
        "held with depth",
        10,
        0,
        CONTRADICTED,
        of(activations="reversible", depth=64, measure="plan"),
        {"peak_workspace_bytes": times(1.5)},
    ),
    ("quality lost", 10, 1, CONTRADICTED, of(**STANDARD), {"nll": lambda old: old + 0.2}),
    ("quality gained", 10, 1, SHOWN, of(**STANDARD), {"nll": lambda old: old - 0.2}),
    (
        "exact",
        10,
        2,
        CONTRADICTED,
        of(activations="reversible", dtype="float32", depth=4),
        {"rebuild_error_by_level": lambda old: [0.0 for _ in old] if isinstance(old, list) else old},
    ),
    ("room", 12, 1, SHOWN, of(variant="reformer", d_model=512), {"peak_bytes": 15 * 10**9}),
    ("room in GiB only", 12, 1, CONTRADICTED, of(variant="reformer"), {"peak_bytes": 16 * 2**30}),
    (
        "half a tensor",
        12,
        0,
        CONTRADICTED,
        of(activations="checkpoint", d_model=512),
        {"activation_bytes": times(0.5)},
    ),
]


@pytest.mark.parametrize(
    ("number", "place", "want", "where", "changes"),
    [case[1:] for case in BENT],
    ids=[case[0] for case in BENT],
)
def test_other_figures_come_to_another_verdict(
    number: int,
    place: int,
    want: Verdict,
    where: Callable[[pd.DataFrame], Any],
    changes: dict[str, Any],
    world: pd.DataFrame,
) -> None:
    judged = part(number, place, bent(world, where, **changes))
    assert judged.verdict == want
    assert judged.reason or want == SHOWN


def saving_the_root(world: pd.DataFrame) -> pd.DataFrame:
    """The same world, in which every pattern and mode saves √T itself."""
    for mode, factor in {"merged": 1 / 3, "split": 2 / 3, "interleaved": 2 / 3}.items():

        def one(frame: pd.DataFrame, mode: str = mode) -> Any:
            sparse = frame["variant"].str.startswith("sparse")
            return sparse & frame["variant_params"].map(lambda own: own.get("head_mode") == mode)

        world = bent(world, one, flops_attention_step=times(factor))
    return world


def test_a_saving_of_the_root_itself_is_shown(world: pd.DataFrame) -> None:
    assert judge(4, saving_the_root(world)).verdict == SHOWN


def bend(number: int, place: int, verdict: Verdict, world: pd.DataFrame) -> pd.DataFrame:
    """Cells in which a part has the verdict; none for a figure without noise: it is decided if it exists."""
    if ARITHMETIC[number][place] == verdict:
        return world
    if (number, place, verdict) == (4, 1, SHOWN):
        return saving_the_root(world)
    for _, of_claim, of_part, want, where, changes in BENT:
        if (of_claim, of_part, want) == (number, place, verdict):
            return bent(world, where, **changes)
    assert verdict == OPEN, "no cells have this verdict"
    noisy = (number, place) in {(5, 1), (10, 1)}
    return world[world["replicate"] < 2] if noisy else world.iloc[:0]


@pytest.mark.parametrize("verdict", [SHOWN, CONTRADICTED, OPEN])
@pytest.mark.parametrize(
    ("number", "place"),
    [(number, place) for number in ARITHMETIC for place in range(len(ARITHMETIC[number]))],
)
def test_every_part_comes_to_every_verdict(
    number: int, place: int, verdict: Verdict, world: pd.DataFrame
) -> None:
    """Those of the other claims are in `test_claims_verdicts`."""
    judged = part(number, place, bend(number, place, verdict, world))
    assert judged.verdict == verdict, judged
    assert judged.reason or verdict == SHOWN


@pytest.mark.parametrize("number", range(14, max(NUMBERED) + 1))
def test_the_presets_have_the_cells_of_later_claims(number: int, world: pd.DataFrame) -> None:
    """Whatever their figures are; a cell that the variant refuses is said with its reason."""
    for judged in judge(number, world).parts.values():
        assert not judged.reason.startswith("needs") or "unsupported (causal takes 0)" in judged.reason, (
            judged
        )


def test_a_bound_that_breaks_at_one_length_is_contradicted(world: pd.DataFrame) -> None:
    slow = bent(world, lambda frame: checkpointed(frame, seq_len=128), step_seconds_median=times(1.5))
    judged = part(5, 0, slow)
    assert judged.verdict == CONTRADICTED
    assert judged.reason == "more than a forward pass, or 50 %, at 128 tokens"


def test_noise_alone_decides_nothing(world: pd.DataFrame) -> None:
    """One slow replicate of three: the interval contains the bound."""
    slow = bent(world, lambda frame: checkpointed(frame, replicate=1), step_seconds_median=times(1.6))
    worse = bent(world, of(**STANDARD, replicate=1), nll=lambda old: old + 0.1)
    paying = bent(world, lambda frame: paid(frame) & (frame["replicate"] == 1), tokens_per_second=times(0.1))
    for number, place, frame in ((5, 0, slow), (10, 1, worse), (5, 1, paying)):
        judged = part(number, place, frame)
        assert judged.verdict == OPEN
        assert "contains the limit" in judged.reason


@pytest.mark.parametrize(("number", "place"), [(5, 0), (5, 1), (10, 1)])
@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_replicates_decide_nothing(
    number: int, place: int, count: int, world: pd.DataFrame
) -> None:
    judged = part(number, place, world[world["replicate"] < count])
    assert judged.verdict == OPEN
    assert judged.reason == f"would need 3 replicates or more; there are {count}"


def test_what_disturbed_the_times_is_said(world: pd.DataFrame) -> None:
    timed = (world["variant"] == "sparse_strided") & (world["measure"] == "quick")
    judged = part(4, 1, bent(world, lambda _: timed, contaminated="no core 40% of the time"))
    assert f"({timed.sum()} of {2 * timed.sum()} cells were contaminated by" in judged.measured


def test_figures_in_the_table_follow_the_records(world: pd.DataFrame) -> None:
    """Nothing measured is typed."""
    before = part(2, 1, world).measured
    more = bent(world, of(impl="naive", seq_len=8192, depth=12), activation_bytes=times(1.01))
    assert "36.0 GiB" in before
    assert "36.0 GiB" not in part(2, 1, more).measured


# --- the framework --------------------------------------------------------------------------------


def test_claims_are_found_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """STATEMENT = 'A | b'
SOURCE = 'Nobody'
def broken(frame):
    raise LookupError('a bug')
PARTS = {'It works': broken}
"""
    (tmp_path / "claim_77_planted.py").write_text(text)
    monkeypatch.setattr(bench.claims, "__path__", [*bench.claims.__path__, str(tmp_path)])
    found = dict(base.claims())
    assert set(found) == {*NUMBERED, 77}
    with pytest.raises(LookupError, match="a bug"):
        base.judge(found[77], pd.DataFrame())
    (tmp_path / "claim_77_again.py").write_text(text)
    with pytest.raises(ValueError, match=r"claim 77 .*claim_77_again.py and claim_77_planted.py"):
        list(base.claims())


@pytest.mark.parametrize("number", NUMBERED)
def test_a_claim_says_what_and_who(number: int) -> None:
    assert NUMBERED[number].STATEMENT.endswith((".", ".)"))
    assert NUMBERED[number].SOURCE


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("predicted", SHOWN),
        ("measured", SHOWN),
        ("measured", CONTRADICTED),
        ("reason", CONTRADICTED),
        ("reason", OPEN),
    ],
)
def test_a_judgement_has_no_empty_text(name: str, verdict: Verdict) -> None:
    texts = {"predicted": "1", "measured": "1", "reason": "so"}
    with pytest.raises(ValueError, match=name):
        Judgement(**texts | {name: " "}, verdict=verdict)


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        ([SHOWN, SHOWN], SHOWN),
        ([SHOWN, CONTRADICTED, OPEN], CONTRADICTED),
        ([SHOWN, OPEN], OPEN),
        ([OPEN, OPEN], OPEN),
        ([CONTRADICTED], CONTRADICTED),
    ],
)
def test_a_verdict_is_of_all_parts(verdicts: list[Verdict], whole: Verdict) -> None:
    texts = {"predicted": "1", "measured": "1", "reason": "so"}
    parts = {str(place): Judgement(**texts, verdict=verdict) for place, verdict in enumerate(verdicts)}
    assert Finding(parts).verdict == whole


@pytest.mark.parametrize(
    ("spread", "verdict"),
    [
        (Spread(2.0, 1.5, 2.5, 3), SHOWN),
        (Spread(2.0, 0.5, 3.5, 3), OPEN),
        (Spread(2.0, 1.9, 2.1, 2), OPEN),
        (Spread(2.0, math.nan, math.nan, 1), OPEN),
        (Spread(0.5, 0.4, 2.0, 3), OPEN),
        (Spread(0.5, 0.4, 0.6, 3), CONTRADICTED),
    ],
)
def test_an_interval_decides(spread: Spread, verdict: str) -> None:
    assert above(spread, 1.0) == verdict
    opposite = {SHOWN: CONTRADICTED, CONTRADICTED: SHOWN, OPEN: OPEN}
    assert below(spread, 1.0) == opposite[verdict]


def test_all_and_some_cases() -> None:
    assert every([SHOWN, SHOWN]) == some([SHOWN, CONTRADICTED]) == SHOWN
    assert every([SHOWN, CONTRADICTED, OPEN]) == some([CONTRADICTED, CONTRADICTED]) == CONTRADICTED
    assert every([SHOWN, OPEN]) == some([CONTRADICTED, OPEN]) == OPEN


def test_cells_are_found_by_columns_and_knobs(tmp_path: Path) -> None:
    window = [record("longformer", variant_params={"window": size}) for size in (8, 16)]
    write(tmp_path, [*window, failed("oom", "needs 3 GiB", variant="dense", seq_len=64), record()])
    frame = collect(tmp_path).frame
    assert len(cells.finished(frame, variant="longformer")) == 2
    assert len(cells.finished(frame, variant="longformer", knobs={"window": 8})) == 1
    assert len(cells.finished(frame, variant=("dense", "longformer"), seq_len=512, budget_bytes=None)) == 3
    with pytest.raises(Missing, match=r"^variant=dense seq_len=64: oom \(needs 3 GiB\)$"):
        cells.finished(frame, variant="dense", seq_len=64)
    with pytest.raises(Missing, match=r"^variant=longformer window=9: no such cell$"):
        cells.finished(frame, variant="longformer", knobs={"window": 9})
    with pytest.raises(Missing, match=r"^variant=dense depth=9 seq_len=\[64, 128\]: no such cell$"):
        cells.finished(frame, variant="dense", depth=np.int64(9), seq_len=(64, np.int64(128)))
    with pytest.raises(Missing, match="accuracy"):
        cells.figure(frame, "accuracy")


def test_ratios_are_taken_within_a_replicate(tmp_path: Path) -> None:
    """Each round ran at another speed, and one replicate is there on one side alone."""
    for round_, (slow, factor) in enumerate([(1.0, 2.0), (5.0, 2.2), (25.0, 1.8)]):
        write(tmp_path, [record("dense", replicate=round_, step_seconds_median=slow)])
        write(tmp_path, [record("chunked", replicate=round_, step_seconds_median=slow * factor)])
    write(tmp_path, [record("dense", replicate=3, step_seconds_median=1e9)])
    frame = collect(tmp_path).frame
    own, dense = (cells.finished(frame, variant=name) for name in ("chunked", "dense"))
    found = cells.ratio(own, dense, "step_seconds_median")
    assert (found.middle, found.count) == (pytest.approx(2.0), 3)
    assert 1.4 < found.low < 1.8 < 2.2 < found.high < 2.8
    assert cells.difference(own, dense, "step_seconds_median").middle == pytest.approx(6.0)
    with pytest.raises(Missing, match="no replicate has both"):
        cells.ratio(own, dense[dense["replicate"] == 3], "step_seconds_median")


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_growth_sets_aside_what_does_not_grow(power: float) -> None:
    low, middle, high = (1e6 + 3 * size**power for size in (4, 16, 64))
    assert cells.growth((4, 16, 64), (low, middle, high)) == pytest.approx(power)
    assert math.isnan(cells.growth((4, 16, 64), (1.0, 1.0, 1.0)))


def test_the_page_has_a_row_and_a_section_a_claim(world: pd.DataFrame) -> None:
    text = page("claims", world[world["depth"] != 64])
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert [int(row.split("|")[1]) for row in rows] == sorted(NUMBERED)
    for row in rows:
        cells_ = row.replace("\\|", "").strip("| ").split(" | ")
        assert len(cells_) == 4
        assert all(cell.strip() for cell in cells_)
    sections = dict(re.findall(r"^## (\d+)\. (.*?)(?=^## |\Z)", text, re.M | re.S))
    assert [*map(int, sections)] == sorted(NUMBERED)
    for number, claim in NUMBERED.items():
        said = re.findall(r"^- .*\*\*(.+)\*\*", sections[str(number)], re.M)
        assert len(said) == len(claim.PARTS)
        assert {*said} <= {SHOWN, CONTRADICTED, OPEN}
    assert "needs variant=dense" in sections["6"]
    assert "depth=64: no such cell" in sections["6"]


def test_the_command_refuses_in_one_line_what_holds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, why in ((tmp_path, "no records"), (tmp_path / "none", "no such folder")):
        assert main([str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert why in line
    assert not (tmp_path / "claims.md").exists()


@pytest.mark.slow
def test_real_cells_come_to_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line to the page: the scores' work planned, and small reversible networks run."""
    run = ["-m", "data=stdlib", "name=claims", "measure.time_seconds=0", "measure.min_samples=1"]
    scores = ["variant=dense", "model=base", "depth=1", "seq_len=512,8192", "measure=plan"]
    drift = ["variant=dense", "activations=reversible", "dtype=float32,bfloat16", "depth=1,3", "seq_len=256"]
    for cells_ in (
        [*scores, "objective=mlm,clm", "variant.impl=naive"],
        [*scores, "objective=clm", "variant.impl=sdpa"],
        [*drift, "measure=quick"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "bench", *run, *cells_],
            cwd=tmp_path,
            env=os.environ.copy(),
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "results" / "claims"
    assert main([str(folder)]) == 0
    text = (folder / "claims.md").read_text()
    assert "1 shown" in text
    assert "201 million at 512 and 51.5 billion at 8,192" in text
    monkeypatch.setattr(claim_10_reversible, "DEPTHS", (1, 3))
    frame = collect(folder).frame
    # Streams are float32 in both: so shallow, bfloat16 differs only if an input lies where it rounds.
    for dtype, most in (("float32", 1e-5), ("bfloat16", 0.1)):
        errors = claim_10_reversible.drift(frame, dtype)
        assert errors.keys() == {1, 3}
        assert all(1e-9 < error < most for error in errors.values()), (dtype, errors)
