"""Claims about what is read and learnt: every verdict can come out, from frames in which it must."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from claim_cells import TRAINED, Cells, cell, frame_of, replicated

from bench.claims import (
    base,
    claim_03_overlapping_chunks,
    claim_07_segment_memory,
    claim_08_compressed_memory,
    claim_09_hashing,
    claim_11_large_terms,
    claim_13_linear_estimates,
)
from bench.claims.base import Verdict

YES, NO, OPEN = get_args(Verdict)


def expect(claim: Any, cells: Cells, verdicts: list[Verdict], says: str, folder: Path) -> None:
    """Judge cells; `says` is a part of one of the reasons."""
    finding = base.judge(claim, frame_of(cells, folder))
    assert [part.verdict for part in finding.parts.values()] == verdicts, finding
    reasons = [part.reason for part in finding.parts.values() if part.verdict != YES]
    assert not says or any(says in reason for reason in reasons), reasons


# --- 3: overlapping chunks ------------------------------------------------------------------------


def by_place(edge: float, *, base: float = 2.0, period: int = 32) -> list[float]:
    """Loss by place: a chunk's first half is harder by `edge` on average, all of it at the first place."""
    first = base + edge * period / 2
    return [first, *([base] * int(math.log2(period)))]


def timed(cells: Cells, slower: float) -> Cells:
    """The same, with steps that take so many times as long, give or take a twentieth."""
    for place, one in enumerate(cells):
        one["step_seconds_median"] *= slower * (1 + 0.02 * (place - 1))
    return cells


def chunk_cells(*, edge: float, left: float, steps: float = 1.95, slower: float = 1.95) -> Cells:
    chunk = {"variant_params": {"chunk": 32}, "place_period": 32}
    planned = {"seq_len": 65_536, "flops_source": "predicted", "variant_params": {"chunk": 32}}
    planned |= {"flops_attention_step": 10**9, "flops_algorithmic_step": 10**10, "measure": "plan"}
    twice = {name: int(steps * planned[name]) for name in ("flops_attention_step", "flops_algorithmic_step")}
    return [
        *replicated("dense", 2.0, nll_by_place=by_place(0.01), place_period=32),
        *replicated("chunked", 2.1, nll_by_place=by_place(edge + 0.01), **chunk),
        *timed(replicated("overlapping", 2.05, nll_by_place=by_place(left + 0.01), **chunk), slower),
        cell("chunked", **planned),
        cell("overlapping", **{**planned, **twice}),
    ]


def jittered(cells: Cells, by: float = 0.002) -> Cells:
    """The same with losses by place that differ a little between replicates and variants."""
    for place, one in enumerate(cells):
        if "nll_by_place" in one:
            first, *rest = one["nll_by_place"]
            one["nll_by_place"] = [first + 16 * by * ((place * 7) % 5 - 2) / 2, *rest]
    return cells


@pytest.mark.parametrize(
    ("cells", "verdicts", "says"),
    [
        ({"edge": 0.2, "left": 0.0}, [YES, YES, YES, YES], ""),
        ({"edge": 0.2, "left": 0.06}, [YES, YES, YES, NO], "69 % of the loss at the edges is recovered"),
        ({"edge": 0.2, "left": 0.02}, [YES, YES, YES, OPEN], "contains the limit"),
        ({"edge": -0.1, "left": 0.0}, [YES, YES, NO, OPEN], "chunk edges do not increase the loss"),
        ({"edge": 0.2, "left": 0.0, "steps": 3.0}, [NO, YES, YES, YES], "attention costs 3.00×"),
        ({"edge": 0.2, "left": 0.0, "slower": 1.2}, [YES, NO, YES, YES], "a step takes 1.2"),
        ({"edge": 0.2, "left": 0.0, "slower": 2.15}, [YES, OPEN, YES, YES], "contains the limit"),
    ],
)
def test_overlapping_chunks(
    cells: dict[str, float], verdicts: list[Verdict], says: str, tmp_path: Path
) -> None:
    expect(claim_03_overlapping_chunks, jittered(chunk_cells(**cells)), verdicts, says, tmp_path)


def test_an_edge_within_the_spread_decides_nothing(tmp_path: Path) -> None:
    cells = jittered(chunk_cells(edge=0.01, left=0.0), by=0.05)
    expect(claim_03_overlapping_chunks, cells, [YES, YES, OPEN, OPEN], "a loss at the edges", tmp_path)


def test_halves_weigh_every_place_once() -> None:
    """Of a period of 8: places 0, 1, 2 and 3, then 4 to 7 together."""
    places = [3.0, 2.5, 2.2, 2.2, 2.0, 2.0, 2.0, 2.0]
    by = [places[0], places[1], places[2], places[4]]
    assert claim_03_overlapping_chunks.halves(by) == pytest.approx(sum(places[:4]) / 4 - 2.0)


# --- 7 and 8: memories ----------------------------------------------------------------------------


def reached(variant: str, adds: int, **params: Any) -> Cells:
    """Cells at depths 1 to 4 whose layers each add so much to the reach."""
    plan = {"seq_len": 2048, "measure": "plan", "variant_params": {"segment": 32, **params}}
    return [cell(variant, depth=depth, reach=31 + depth * adds, **plan) for depth in (1, 2, 3, 4)]


def segment_cells(*, without: float, chunked: float, adds: int = 32, spread: float = 0.001) -> Cells:
    kept, none = ({"segment": 32, "mem_len": n} for n in (32, 0))
    same: dict[str, Any] = {"spread": spread}
    return [
        *reached("transformer_xl", adds, mem_len=32),
        *replicated("transformer_xl", 2.0, variant_params=kept, nll_reset=2.01, **same),
        *replicated("transformer_xl", without, variant_params=none, nll_reset=without, **same),
        *replicated("chunked", chunked, variant_params={"chunk": 32}, **same),
        *replicated("dense", 2.0, **same),
    ]


@pytest.mark.parametrize(
    ("cells", "verdicts", "says"),
    [
        ({"without": 2.1, "chunked": 2.1}, [YES, YES, YES], ""),
        ({"without": 2.1, "chunked": 1.9}, [YES, YES, NO], "chunks of 32 are not worse than dense"),
        ({"without": 1.9, "chunked": 2.1}, [YES, NO, YES], "its memory gains nothing"),
        ({"without": 2.1, "chunked": 2.02, "spread": 0.05}, [YES, YES, OPEN], "contains the limit"),
        ({"without": 2.1, "chunked": 2.1, "adds": 0}, [NO, YES, YES], "the reach"),
    ],
)
def test_segment_memory(cells: dict[str, Any], verdicts: list[Verdict], says: str, tmp_path: Path) -> None:
    expect(claim_07_segment_memory, segment_cells(**cells), verdicts, says, tmp_path)


def test_reach_is_held_against_every_depth(tmp_path: Path) -> None:
    frame = frame_of(segment_cells(without=2.1, chunked=2.1), tmp_path)
    assert "63, 95, 127, 159 tokens at depth 1, 2, 3, 4" in claim_07_segment_memory.reach(frame).measured


def test_a_reach_that_the_sequence_ends_decides_nothing(tmp_path: Path) -> None:
    cells = segment_cells(without=2.1, chunked=2.1)
    for one in cells:
        if "reach" in one:
            one["reach"] = one["seq_len"] - 1
    says = "needs variant=transformer_xl: a reach within the sequence at two depths"
    expect(claim_07_segment_memory, cells, [OPEN, YES, YES], says, tmp_path)


def memory_cells(*, mean: float, largest: float, spread: float = 0.001, rate: int = 4) -> Cells:
    knobs: dict[str, Any] = {"segment": 32, "mem_len": 32, "comp_len": 32, "rate": 4}
    cells = reached("compressive", 32 + rate * 32, **{k: v for k, v in knobs.items() if k != "segment"})
    for times, (name, nll) in enumerate((("conv", 2.0), ("mean", mean), ("max", largest))):
        own = {**knobs, "compression": name}
        cells += replicated("compressive", nll, spread=spread * times, variant_params=own)
    return cells


@pytest.mark.parametrize(
    ("cells", "verdicts", "says"),
    [
        ({"mean": 2.05, "largest": 2.05}, [YES, YES, YES], ""),
        ({"mean": 2.05, "largest": 1.95}, [YES, YES, NO], "max pooling is better"),
        ({"mean": 2.0, "largest": 2.3, "spread": 0.02}, [YES, OPEN, YES], "contains the limit"),
        ({"mean": 2.05, "largest": 2.05, "rate": 3}, [NO, YES, YES], "the reach"),
        ({"mean": 1.9, "largest": 1.9, "rate": 3}, [NO, NO, NO], "mean pooling is better"),
    ],
)
def test_compressed_memory(cells: dict[str, Any], verdicts: list[Verdict], says: str, tmp_path: Path) -> None:
    expect(claim_08_compressed_memory, memory_cells(**cells), verdicts, says, tmp_path)


# --- 9: hashing -----------------------------------------------------------------------------------

LENGTHS = (16_384, 32_768, 65_536, 131_072)


def planned(variant: str, power: float, *, logs: int = 0, **figures: Any) -> Cells:
    plan = {"measure": "plan", "flops_source": "predicted", **figures}
    return [
        cell(variant, seq_len=n, flops_attention_step=int(n**power * math.log2(n) ** logs), **plan)
        for n in LENGTHS
    ]


def hash_cells(
    *,
    better: float = 0.012,
    sharing: float,
    errors: tuple[float, ...] = (0.8, 0.6, 0.4, 0.2),
    power: float = 1.0,
    logs: int = 1,
    jump: float = 0.0,
    spread: float = 0.001,
) -> Cells:
    full = {"n_buckets": 1, "chunk": 256, "n_hashes": 1}
    cells = [
        *replicated("dense", 2.0, params=100),
        *replicated(
            "reformer", 2.0 + sharing, spread=spread, params=94, variant_params=full, softmax_error=0.0
        ),
        *planned(
            "reformer", power, logs=logs, variant_params={"n_buckets": None, "chunk": 64, "n_hashes": 4}
        ),
    ]
    for n, error in zip((1, 2, 4, 8), errors, strict=True):
        knobs = {"n_buckets": None, "chunk": 16, "n_hashes": n}
        hashed = replicated("reformer", 2.1 - better * n, variant_params=knobs)
        cells += [{**one, "softmax_error": error + jump * one["replicate"] * (n == 8)} for one in hashed]
    return cells


@pytest.mark.parametrize(
    ("cells", "verdicts", "says"),
    [
        ({"sharing": 0.005}, [YES, YES, YES, YES], ""),
        ({"sharing": 0.1}, [NO, YES, NO, YES], "it costs 11 % of perplexity"),
        ({"sharing": 0.02, "spread": 0.02}, [OPEN, YES, OPEN, YES], "contains the limit"),
        ({"sharing": 0.005, "errors": (0.5, 0.6, 0.4, 0.2)}, [YES, NO, YES, YES], "do not always"),
        (
            {"sharing": 0.005, "errors": (0.5, 0.4, 0.3, 0.2), "jump": 0.15},
            [YES, OPEN, YES, YES],
            "contains the limit",
        ),
        ({"sharing": 0.005, "better": 0.1}, [YES, YES, NO, YES], "the distance goes from"),
        ({"sharing": 0.005, "power": 1.4}, [YES, YES, YES, NO], "FLOPs grow as T to the power 1."),
        ({"sharing": 0.005, "logs": 0}, [YES, YES, YES, NO], "FLOPs grow as T to the power 1.00"),
    ],
)
def test_hashing(cells: dict[str, Any], verdicts: list[Verdict], says: str, tmp_path: Path) -> None:
    expect(claim_09_hashing, hash_cells(**cells), verdicts, says, tmp_path)


# --- 11: large terms ------------------------------------------------------------------------------


def mass_cells(*, few: float, caught: float, count: int = 3, jitter: float = 0.01) -> Cells:
    mass = [few * (k + 1) / 6 for k in range(6)] + [0.9, 0.95]
    found = replicated("dense", 2.0, count=count, seq_len=512)
    for one in found:
        off = jitter * (one["replicate"] - 1)
        one["attention_mass"] = [value + off for value in mass]
        one["attention_mass_uniform"] = [2**k / 384 for k in range(8)]
        one |= {"cluster_mass": caught + off, "cluster_mass_uniform": 0.05, "cluster_mass_best": 0.7}
    return found


@pytest.mark.parametrize(
    ("cells", "verdicts", "says"),
    [
        ({"few": 0.7, "caught": 0.6}, [YES, YES], ""),
        ({"few": 0.7, "caught": 0.3}, [YES, NO], "clusters capture 30 % of a row's mass, 6.0 times"),
        ({"few": 0.3, "caught": 0.6}, [NO, YES], "the 32 largest terms have 30 %"),
        ({"few": 0.52, "caught": 0.7, "jitter": 0.05}, [OPEN, YES], "contains the limit"),
        ({"few": 0.7, "caught": 0.6, "count": 1, "jitter": 0}, [OPEN, OPEN], "3 replicates or more"),
    ],
)
def test_large_terms(cells: dict[str, Any], verdicts: list[Verdict], says: str, tmp_path: Path) -> None:
    expect(claim_11_large_terms, mass_cells(**cells), verdicts, says, tmp_path)


# --- 13: linear estimates -------------------------------------------------------------------------


def estimate_cells(
    *,
    features: tuple[float, ...] = (0.24, 0.12, 0.06),
    ranks: tuple[float, ...] = (0.4, 0.2, 0.05),
    before: tuple[float, ...] = (0.08, 0.04, 0.02),
    power: float = 1.0,
    perplexity: float = 8.0,
) -> Cells:
    cells = [*planned("linformer", 1.0, objective="mlm"), *planned("performer", power)]
    for (variant, size), errors in {("performer", "n_features"): features, ("linformer", "k"): ranks}.items():
        for n, error, first in zip((16, 64, 256), errors, before, strict=True):
            own = replicated(variant, 2.1, variant_params={size: n}, perplexity=perplexity)
            for one in own:
                off = 1 + 0.02 * one["replicate"]
                cells.append({**one, "softmax_error": error * off, "softmax_error_initial": first * off})
    return cells


@pytest.mark.parametrize(
    ("cells", "verdicts", "says"),
    [
        ({}, [YES, YES, YES, YES, YES], ""),
        ({"power": 1.2}, [NO, YES, YES, YES, YES], "do not grow linearly"),
        ({"before": (0.3, 0.28, 0.26)}, [YES, NO, YES, YES, YES], "changes as m to the power -0.05"),
        ({"before": (0.3, 0.4, 0.5)}, [YES, NO, NO, YES, YES], "does not decrease with every larger rank"),
        ({"features": (0.8, 0.4, 0.2)}, [YES, YES, YES, NO, YES], "the error of the largest is 20 %"),
        ({"ranks": (0.4, 0.2, 0.1)}, [YES, YES, YES, YES, OPEN], "contains the limit"),
        ({"ranks": (0.8, 0.6, 0.5)}, [YES, YES, YES, YES, NO], "the error of the largest is 5"),
        ({"perplexity": 26.0}, [YES, YES, YES, OPEN, OPEN], "these linformers hardly attend"),
    ],
)
def test_linear_estimates(cells: dict[str, Any], verdicts: list[Verdict], says: str, tmp_path: Path) -> None:
    expect(claim_13_linear_estimates, estimate_cells(**cells), verdicts, says, tmp_path)


def test_ranks_of_dense_weights_are_shown_beside(tmp_path: Path) -> None:
    masked = cell("dense", objective="mlm", attention_rank_error=[0.9, 0.7, 0.5, 0.2, 0.0], **TRAINED)
    found = claim_13_linear_estimates.ranks(frame_of([*estimate_cells(), masked], tmp_path))
    assert "90 % at rank 1, 50 % at rank 4, 0.0 % at rank 16" in found.predicted


# --- all ------------------------------------------------------------------------------------------

CLAIMS: dict[Any, Cells] = {
    claim_03_overlapping_chunks: chunk_cells(edge=0.2, left=0.0),
    claim_07_segment_memory: segment_cells(without=2.1, chunked=2.1),
    claim_08_compressed_memory: memory_cells(mean=2.05, largest=2.05),
    claim_09_hashing: hash_cells(sharing=0.005),
    claim_11_large_terms: mass_cells(few=0.7, caught=0.6),
    claim_13_linear_estimates: estimate_cells(),
}
every_claim = pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__.rpartition(".")[2])


@every_claim
def test_what_is_missing_is_said(claim: Any, tmp_path: Path) -> None:
    """Without any one variant there is a finding that names what it needs, never an error."""
    cells = CLAIMS[claim]
    for number, variant in enumerate({one["variant"] for one in cells}):
        rest = [one for one in cells if one["variant"] != variant]
        other = rest or [cell("longformer", **TRAINED)]
        finding = base.judge(claim, frame_of(other, tmp_path / str(number)))
        open_parts = [part for part in finding.parts.values() if part.verdict == OPEN]
        assert open_parts or claim is claim_13_linear_estimates
        assert all(re.match(r"needs variant=\w+|would need", part.reason) for part in open_parts)


@every_claim
def test_cells_of_other_settings_do_not_take_part(claim: Any, tmp_path: Path) -> None:
    """Another length, trained longer: with its own loss it would turn the verdict."""
    cells = CLAIMS[claim]
    before = base.judge(claim, frame_of(cells, tmp_path / "alone"))
    others = [
        {**one, "seq_len": 128, "tokens_trained": 1_000, "nll": 9.0 * (place + 1)}
        for place, one in enumerate(itertools.islice((c for c in cells if "nll" in c), 4))
        if "attention_mass" not in one or claim is claim_11_large_terms
    ]
    after = base.judge(claim, frame_of([*cells, *others], tmp_path / "mixed"))
    assert before.verdict == after.verdict == YES
