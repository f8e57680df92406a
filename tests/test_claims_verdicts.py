"""Every part of every claim can come to each verdict, from cells with figures in which it must.

Each case bends a claim's cells: what it says is so, is not so, and cannot be told. Three replicates differ a
little, as those of a machine do; a verdict that came from noise would change with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pandas as pd
import pytest
import test_claims
import test_claims_quality as quality
from claim_cells import Cells, cell, frame_of, replicated

from bench.claims import base
from bench.claims.base import Verdict

YES, NO, OPEN = get_args(Verdict)
NUMBERED = dict(base.claims())
Bend = Callable[[], Cells]

# --- builders of the cells of claims 14 to 23 ------------------------------------------------------


def lost(variant: str, nll: float, *, jitter: float = 0.001, **figures: Any) -> Cells:
    """Trained replicates; with `jitter`, their losses are so far apart in one order or the other."""
    cells = replicated(variant, nll, **figures)
    for one, shift in zip(cells, (-jitter, jitter, 0.0), strict=True):
        one["nll"] += shift
    return cells


def fused_cells(
    *, gap: float = 0.0, faster: float = 1.5, flops: float = 1.1, jitter: float = 0.0001, noise: float = 0.01
) -> Cells:
    cells: Cells = []
    for impl, off in (("naive", 0.0), ("sdpa", gap)):
        own = {"variant_params": {"impl": impl}, "impl": impl}
        trained = lost("dense", 2.0 + off, jitter=jitter * (impl == "sdpa"), reference_max_abs=1e-6, **own)
        cells += [{**one, "seq_len": 128} for one in trained]
        for seq_len in (512, 2048):
            for r, drift in enumerate((1.0, 1.3, 0.9)):
                slower = (faster if impl == "naive" else 1.0) * (1 + noise * (r - 1) * (impl == "naive"))
                timed = {"objective": "mlm", "measure": "quick", "depth": 1, "d_model": 256, "batch_size": 1}
                timed |= {"seq_len": seq_len, "step_seconds_median": 0.1 * drift * slower}
                timed |= {"flops_executed_step": int(1e9 * (flops if impl == "sdpa" else 1.0))}
                cells.append(cell("dense", r, **timed, **own))
    return cells


def recall_cells(
    *,
    attention: float = 1.0,
    few: float = 0.98,
    many: float = 0.4,
    wide: float = 0.9,
    jitter: float = 0.01,
) -> Cells:
    def recalled(variant: str, pairs: int, accuracy: float, window: int, **figures: Any) -> Cells:
        sign = -1 if window == 16 else 1
        params = {"variant_params": {"window": [window]}} if variant != "dense" else {}
        task = {
            "data": "mqar",
            "data_params": {"n_pairs": pairs},
            "objective": "recall",
            "seq_len": 4 * pairs,
        }
        return [
            {**one, **task, **params, "accuracy": min(1.0, accuracy + sign * jitter * (r - 1)), **figures}
            for r, one in enumerate(replicated(variant, 0.5))
        ]

    return [
        *recalled("dense", 8, attention, 0, state_bytes=8192),
        *recalled("longformer", 2, few, 8, state_bytes=1024),
        *recalled("longformer", 8, many, 8, state_bytes=1024),
        *recalled("longformer", 8, wide, 16, state_bytes=2048),
    ]


def memory_cells(*, gain: float = 0.02, jitter: float = 0.001) -> Cells:
    cells = [
        *replicated("transformer_xl", 2.0, variant_params={"segment": 32, "mem_len": 32}),
        *replicated("compressive", 2.0, variant_params={"segment": 32, "mem_len": 32, "comp_len": 32}),
    ]
    for one in cells:
        own = gain + jitter * (one["replicate"] - 1)
        one |= {
            "longer_memory_positions": [32, 64, 128],
            "nll_longer_memory": [2.0, 2.0 - own / 2, 2.0 - own],
        }
    return cells


def context_cells(*, used: tuple[int, int, int] = (32, 64, 64), field: int = 512) -> Cells:
    low, middle, high = used
    figures = {
        "effective_context_low": low,
        "effective_context": middle,
        "effective_context_high": high,
        "reach": field - 1,
        "seq_len": 1024,
    }
    return [
        *replicated("dense", 2.0, **figures),
        *replicated("longformer", 2.0, variant_params={"window": [64]}, **figures),
    ]


def window_cells(
    *, grows: float = -0.02, shrinks: float = 0.02, dilates: float = -0.02, **jitter: float
) -> Cells:
    layers = ["longformer(window=8)", "longformer(window=16,dilation=[1,2])"]
    return [
        *lost("longformer", 2.0, variant_params={"window": [12]}, jitter=0.0),
        *lost("longformer", 2.0 + grows, variant_params={"window": [8, 16]}, **jitter),
        *lost("longformer", 2.0 + shrinks, variant_params={"window": [16, 8]}, jitter=0.0),
        *lost("hybrid", 2.0 + grows + dilates, variant_params={"layers": layers}, jitter=0.0),
    ]


def layer_cells(*, mixture: float = 0.005, windows: float = 0.1, **jitter: float) -> Cells:
    window = "longformer(window=16)"
    return [
        *lost("dense", 2.0, jitter=0.0),
        *lost(
            "hybrid", 2.0 + mixture, variant_params={"layers": [window, window, window, "dense"]}, **jitter
        ),
        *lost("longformer", 2.0 + windows, variant_params={"window": [16]}, jitter=0.0),
    ]


def sink_cells(
    *, times: float = 10.0, kept: float = 0.005, alone: float = 0.2, jitter: float = 0.001
) -> Cells:
    dense = lost("dense", 2.0, jitter=0.0)
    for one in dense:
        off = 1 + 100 * jitter * (one["replicate"] - 1)
        one |= {"sink_mass": 0.01 * times * off, "sink_mass_uniform": 0.01}
    return [
        *dense,
        *lost("streaming_llm", 2.0 + kept, variant_params={"window": 32, "sinks": 4}, jitter=jitter),
        *lost("longformer", 2.0 + alone, variant_params={"window": [32], "global_tokens": 0}, jitter=0.0),
    ]


def longer_cells(*, rotary: float = 0.3, relative: float = 0.0, jitter: float = 0.001) -> Cells:
    cells: Cells = []
    for variant, rise in (("dense", rotary), ("transformer_xl", relative)):
        for one in replicated(variant, 2.0):
            off = rise + jitter * (one["replicate"] - 1)
            one |= {"longer_lengths": [256, 512, 1024], "nll_longer": [2.0, 2.0 + off, 2.0 + 2 * off]}
            cells.append(one)
    return cells


def feature_cells(
    *, independent: float = 1.4, redraw: float = -0.02, relu: float = -0.02, jitter: float = 0.001
) -> Cells:
    usual = {"features": "softmax", "orthogonal": True, "redraw": 0, "n_features": 64}
    cells: Cells = []
    for changed, nll, error in (
        ({}, 2.0, 1.0),
        ({"orthogonal": False}, 2.0, independent),
        ({"redraw": 100}, 2.0 + redraw, 1.0),
        ({"features": "relu"}, 2.0 + relu, None),
    ):
        for one in lost("performer", nll, variant_params={**usual, **changed}, jitter=jitter * bool(changed)):
            noise = 1 + min(50 * jitter, 0.2) * (one["replicate"] - 1) * bool(changed)
            cells.append({**one, "softmax_error_initial": error and 0.05 * error * noise})
    return cells


def routing_cells(
    *, random: float = 0.02, windows: float = 0.02, flops: float = 1.0, jitter: float = 0.001
) -> Cells:
    own = {"window": 16, "selection": "nearest"}
    return [
        *lost("routing", 2.0, variant_params=own, jitter=0.0),
        *lost(
            "routing",
            2.0 + random,
            variant_params={**own, "selection": "random"},
            flops_algorithmic_step=int(1e9 / flops),
            jitter=jitter,
        ),
        *lost(
            "longformer",
            2.0 + windows,
            variant_params={"window": [16]},
            flops_algorithmic_step=int(1e9 / flops),
            jitter=jitter,
        ),
    ]


# --- each part, each verdict -----------------------------------------------------------------------

SHOWN: dict[int, Bend] = {
    3: lambda: quality.jittered(quality.chunk_cells(edge=0.2, left=0.0)),
    7: lambda: quality.segment_cells(without=2.1, chunked=2.1),
    8: lambda: quality.memory_cells(mean=2.05, largest=2.05),
    9: lambda: quality.hash_cells(sharing=0.005),
    11: lambda: quality.mass_cells(few=0.7, caught=0.6),
    13: quality.estimate_cells,
    14: fused_cells,
    15: recall_cells,
    16: memory_cells,
    17: context_cells,
    18: window_cells,
    19: layer_cells,
    20: sink_cells,
    21: longer_cells,
    22: feature_cells,
    23: routing_cells,
}
"""Claim → cells in which each of its parts is shown."""

BENT: dict[int, list[tuple[Bend, Bend]]] = {
    14: [
        (lambda: fused_cells(gap=0.01), lambda: fused_cells(jitter=0.01)),
        (lambda: fused_cells(flops=1.0), lambda: without(fused_cells(), "flops_executed_step")),
        (lambda: fused_cells(faster=1.0), lambda: fused_cells(faster=1.05, noise=0.1)),
    ],
    15: [
        (lambda: recall_cells(attention=0.5), lambda: recall_cells(attention=0.9, jitter=0.05)),
        (lambda: recall_cells(many=0.99), lambda: recall_cells(few=0.5)),
        (lambda: recall_cells(wide=0.4), lambda: recall_cells(wide=0.5, jitter=0.1)),
    ],
    16: [(lambda: memory_cells(gain=-0.02), lambda: memory_cells(gain=0.002, jitter=0.01))] * 2,
    17: [
        (lambda: context_cells(used=(512, 512, 512)), lambda: context_cells(used=(64, 256, 512))),
        (
            lambda: context_cells(used=(64, 64, 64), field=100),
            lambda: context_cells(used=(32, 64, 64), field=100),
        ),
    ],
    18: [
        (lambda: window_cells(shrinks=-0.05), lambda: window_cells(jitter=0.1)),
        (lambda: window_cells(grows=0.02), lambda: window_cells(jitter=0.1)),
        (lambda: window_cells(dilates=0.02), lambda: window_cells(jitter=0.1)),
    ],
    19: [
        (lambda: layer_cells(mixture=0.08), lambda: layer_cells(windows=0.01)),
        (lambda: layer_cells(mixture=0.2), lambda: layer_cells(jitter=0.3)),
    ],
    20: [
        (lambda: sink_cells(times=1.0), lambda: sink_cells(times=4.0, jitter=0.004)),
        (lambda: sink_cells(kept=0.15), lambda: sink_cells(alone=0.01)),
    ],
    21: [
        (lambda: longer_cells(rotary=0.0), lambda: longer_cells(rotary=0.02, jitter=0.02)),
        (lambda: longer_cells(relative=0.3), lambda: longer_cells(relative=0.02, jitter=0.02)),
    ],
    22: [
        (lambda: feature_cells(independent=0.8), lambda: feature_cells(independent=1.05, jitter=0.005)),
        (lambda: feature_cells(redraw=0.02), lambda: feature_cells(jitter=0.1)),
        (lambda: feature_cells(relu=0.02), lambda: feature_cells(jitter=0.1)),
    ],
    23: [
        (lambda: routing_cells(random=-0.02), lambda: routing_cells(jitter=0.1)),
        (lambda: routing_cells(windows=-0.02), lambda: routing_cells(flops=2.0)),
    ],
}
"""Claim → for each part, cells in which it is contradicted, and cells that do not decide it."""


def without(cells: Cells, name: str) -> Cells:
    """The same without a figure."""
    return [{key: value for key, value in one.items() if key != name} for one in cells]


QUALITY: dict[int, tuple[Any, Any]] = {
    3: (quality.test_overlapping_chunks, lambda **own: quality.jittered(quality.chunk_cells(**own))),
    7: (quality.test_segment_memory, quality.segment_cells),
    8: (quality.test_compressed_memory, quality.memory_cells),
    9: (quality.test_hashing, quality.hash_cells),
    11: (quality.test_large_terms, quality.mass_cells),
    13: (quality.test_linear_estimates, quality.estimate_cells),
}
"""Claim → the test whose cases are (arguments, verdicts of the parts, a reason), and the builder of cells."""
CASES: dict[int, list[tuple[Bend, list[Verdict]]]] = {
    number: [(partial(build, **own), verdicts) for own, verdicts, _ in test.pytestmark[0].args[1]]
    for number, (test, build) in QUALITY.items()
}


def bend(number: int, place: int, verdict: Verdict) -> Bend | None:
    """Cells in which a part has the verdict; None for a figure without noise: it is decided if it exists."""
    if number in BENT:
        no, unknown = BENT[number][place]
        return {YES: SHOWN[number], NO: no, OPEN: unknown}[verdict]
    fits = [build for build, verdicts in CASES[number] if verdicts[place] == verdict]
    assert fits or verdict == OPEN, "no cells have this verdict"
    return fits[0] if fits else None


@cache
def built(cells: Bend) -> pd.DataFrame:
    with TemporaryDirectory() as folder:
        return frame_of(cells(), Path(folder))


def test_every_claim_is_bent() -> None:
    assert {*BENT, *QUALITY, *test_claims.ARITHMETIC} == {*NUMBERED}
    assert all(len(parts) == len(NUMBERED[number].PARTS) for number, parts in BENT.items())


@pytest.mark.parametrize("verdict", [YES, NO, OPEN])
@pytest.mark.parametrize(
    ("number", "place"),
    [(number, place) for number in (*QUALITY, *BENT) for place in range(len(NUMBERED[number].PARTS))],
)
def test_every_part_comes_to_every_verdict(number: int, place: int, verdict: Verdict) -> None:
    """Those of the other claims are in `test_claims`."""
    cells = bend(number, place, verdict)
    frame = built(SHOWN[number]).iloc[:0] if cells is None else built(cells)
    part = [*base.judge(NUMBERED[number], frame).parts.values()][place]
    assert part.verdict == verdict, part
    if verdict == OPEN:
        assert re.search("needs |would need|would decide", part.reason), part.reason
    else:
        assert bool(part.reason) or verdict == YES


@pytest.mark.parametrize("number", SHOWN)
def test_a_claim_whose_parts_are_all_shown_is_shown(number: int) -> None:
    finding = base.judge(NUMBERED[number], built(SHOWN[number]))
    assert finding.verdict == YES, finding


@pytest.mark.parametrize("number", [number for number in BENT if number != 14])
def test_two_replicates_show_nothing(number: int) -> None:
    """All figures of these claims vary between replicates."""
    frame = built(SHOWN[number])
    finding = base.judge(NUMBERED[number], frame[frame["replicate"] < 2])
    assert {part.verdict for part in finding.parts.values()} == {OPEN}


def test_what_was_not_measured_on_longer_sequences_is_not_decided(tmp_path: Path) -> None:
    """The records of cells without `measure.longer` have no such figures."""
    cells = [
        {k: v for k, v in one.items() if "longer" not in k} for one in [*memory_cells(), *longer_cells()]
    ]
    frame = frame_of(cells, tmp_path)
    for number in (16, 21):
        for part in base.judge(NUMBERED[number], frame).parts.values():
            assert part.verdict == OPEN
            assert re.match(
                r"needs variant=\w+: longer_(memory_positions and nll_longer_memory|lengths and nll_longer)",
                part.reason,
            )


def test_a_window_that_keeps_another_number_of_tokens_decides_nothing(tmp_path: Path) -> None:
    dense, others = sink_cells()[:3], lost("streaming_llm", 2.0, variant_params={"window": 32, "sinks": 8})
    finding = base.judge(NUMBERED[20], frame_of([*dense, *others], tmp_path))
    part = [*finding.parts.values()][1]
    assert part.verdict == OPEN
    assert "needs variant=streaming_llm sinks=4, trained" in part.reason
