"""The comparison of implementations: which ones `auto` should select, and which ones fail, as a page.

A case runs in a child process with a time limit, so that a kernel that fails or hangs costs one case.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bench import CONFIGS
from bench.inputs.printable import printable
from bench.process.limited import Outcome, run_limited
from bench.records import write_atomically
from bench.report.text import markdown, units
from bench.report.text.columns import Column
from bench.run.devices import Device
from bench.run.locks import on_device
from bench.tools.impls import figures
from bench.tools.impls.figures import Case, LayerFigures, Setting

CASE_SECONDS = 120.0
"""Time limit of a case."""
LEAST_SECONDS = 5.0
"""No case starts with less time than this."""
FASTER, SLOWER = 0.95, 1.05
"""Time ÷ that of auto's choice: at the longest length at most `FASTER`, at no length above `SLOWER`."""
ERROR_FACTOR = 2.0
"""Error ÷ that of auto's choice that rounding explains; both are relative to float32."""
ERROR_FLOOR = 2.0**-8
"""Relative error that one rounding to bfloat16 explains."""
COARSE = 0.05
"""Above this error of auto's choice, rounding has changed selections (hashes, clusters), and an error
against float32 says little; then the difference to auto's choice, which makes the same selections, must be
below it."""
NONE = "- none\n"
NOT_TRIED = "not tried: no time was left"


@dataclass
class Result:
    """What one case gave."""

    case: Case
    figures: list[LayerFigures] = field(default_factory=list)
    failure: str | None = None
    """Why lengths are missing, in one line; None if all were measured."""

    def at(self, seq_len: int) -> LayerFigures | None:
        """The figures at a length."""
        return next((each for each in self.figures if each.seq_len == seq_len), None)


def read_setting(device: str, dtype: str, path: Path = CONFIGS / "impls.yaml") -> Setting:
    """Return the sizes in a file for a device."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    lengths = tuple(content.pop("lengths"))
    return Setting(device=device, dtype=dtype, lengths=lengths, **content)


def collect(
    setting: Setting,
    cases: Sequence[Case],
    device: Device,
    *,
    left: Callable[[], float],
    keep: Callable[[list[Result]], None] = lambda results: None,
    measure: Callable[..., None] = figures.measure,
) -> list[Result]:
    """Measure the cases one after the other while `left()` seconds are left; `keep` is called with all
    results so far after each."""
    results: list[Result] = []
    for done, case in enumerate(cases, 1):
        if (seconds := min(CASE_SECONDS, left())) < LEAST_SECONDS:
            results.append(Result(case, failure=NOT_TRIED))
        else:
            try:
                with on_device(device, _waiting(left)):
                    outcome = run_limited(measure, setting, case, device, seconds=seconds)
            except _Busy:
                results.append(Result(case, failure=NOT_TRIED))
            else:
                results.append(Result(case, outcome.reported, _failure(outcome)))
        keep(results)
        print(f"[{done}/{len(cases)}] {describe(results[-1])}", file=sys.stderr, flush=True)
    return results


class _Busy(Exception):
    """Another run held the device until the time was over."""


def _waiting(left: Callable[[], float]) -> Callable[[str], None]:
    """Return what is called while another run holds the device: it says so once, and ends the wait with the
    time."""
    said: list[bool] = []

    def waiting(holder: str) -> None:
        if not said:
            print(f"waiting: {holder} measures on the device", file=sys.stderr, flush=True)
            said.append(True)
        if left() < LEAST_SECONDS:
            raise _Busy

    return waiting


def _failure(outcome: Outcome) -> str | None:
    if outcome.failure is None:
        return None
    kind = outcome.raised or "failed"
    return printable(f"{'unsupported' if kind == figures.Missing.__name__ else kind}: {outcome.failure}")


def describe(result: Result) -> str:
    """Describe a result in one line."""
    times = [f"T={f.seq_len} {units.seconds(f.seconds)}" for f in result.figures]
    return f"{result.case.label}: {', '.join([*times, *([result.failure] if result.failure else [])])}"


def verdict(result: Result, auto: Result) -> str:
    """Return `promote`, or why an implementation should not become auto's choice."""
    if result.case.is_auto:
        return "auto"
    if result.failure:
        return result.failure
    pairs = [(mine, auto.at(mine.seq_len)) for mine in result.figures]
    for mine, _ in pairs:
        if reason := _incorrect(mine):
            return f"{reason} at {units.length(mine.seq_len)}"
    ratios = {mine.seq_len: mine.seconds / base.seconds for mine, base in pairs if base}
    if len(ratios) < len(pairs) or not ratios:
        return "auto's choice has no time to compare with"
    worst = max(ratios, key=lambda seq_len: ratios[seq_len])
    if ratios[worst] > SLOWER:
        return f"slower: {ratios[worst]:.2f}× auto's time at {units.length(worst)}"
    longest = max(ratios)
    if ratios[longest] > FASTER:
        return f"not faster: {ratios[longest]:.2f}× auto's time at {units.length(longest)}"
    return "promote"


def _incorrect(mine: LayerFigures) -> str | None:
    if mine.not_compared:
        return f"not compared, {mine.not_compared},"
    kinds = (
        ("outputs", mine.output_error, mine.baseline_output_error),
        ("gradients", mine.gradient_error, mine.baseline_gradient_error),
    )
    for kind, error, baseline in kinds:
        if error is None or baseline is None:
            return f"{kind} not compared"
        if not error <= ERROR_FACTOR * baseline + ERROR_FLOOR:  # true for NaN
            return f"wrong: error of {kind} {error:.1e}, auto's {baseline:.1e},"
        if baseline > COARSE and not (mine.difference or 0.0) <= COARSE:
            return f"perhaps wrong: {kind} differ from auto's by {mine.difference:.1e},"
    return None


def verdicts(results: Sequence[Result]) -> dict[str, str]:
    """Return the verdict of each case by its label."""
    autos = {result.case.variant: result for result in results if result.case.is_auto}
    return {result.case.label: verdict(result, autos[result.case.variant]) for result in results}


def table(setting: Setting, results: Sequence[Result]) -> str:
    """Return a row for each implementation and length."""
    judged = verdicts(results)
    rows: list[dict[str, str]] = []
    autos = {result.case.variant: result for result in results if result.case.is_auto}
    for result in sorted(results, key=lambda r: (r.case.variant, not r.case.is_auto, r.case.impl or "")):
        case, auto = result.case, autos[result.case.variant]
        name = f"{case.impl or ''}{' (auto)' if case.is_auto else ' (untried)' if case.untried else ''}"
        for seq_len in setting.lengths if result.figures else (None,):
            length = units.MISSING if seq_len is None else units.length(seq_len)
            row = {"variant": case.variant, "impl": name.strip(), "length": length}
            row |= _cells(*(None if seq_len is None else of.at(seq_len) for of in (result, auto)))
            row["verdict"] = (
                judged[case.label] if result.failure is None or not case.is_auto else result.failure
            )
            rows.append(row)
    text = ("variant", "impl", "verdict")
    titles = list(rows[0])
    return markdown.table(
        [Column(t, [markdown.escape(row[t]) for row in rows], right=t not in text) for t in titles]
    )


def _cells(mine: LayerFigures | None, auto: LayerFigures | None) -> dict[str, str]:
    if mine is None:
        titles = ("device time", "wall time", "/ auto", "launches", "peak", "error", "error of gradients")
        return dict.fromkeys(titles, units.MISSING)
    return {
        "device time": units.MISSING if mine.device_seconds is None else units.seconds(mine.device_seconds),
        "wall time": units.seconds(mine.wall_seconds),
        "/ auto": f"{mine.seconds / auto.seconds:.2f}" if auto else units.MISSING,
        "launches": f"{mine.launches:,}",
        "peak": units.size(mine.peak_bytes),
        "error": _pair(mine.output_error, mine.baseline_output_error),
        "error of gradients": _pair(mine.gradient_error, mine.baseline_gradient_error),
    }


def _pair(error: float | None, baseline: float | None) -> str:
    if error is None:
        return units.MISSING
    return f"{error:.1e}" if baseline is None else f"{error:.1e} ({baseline:.1e})"


def page(setting: Setting, results: Sequence[Result], machine: str) -> str:
    """Return the page: the verdicts, and the table."""
    judged = verdicts(results)
    promoted = [label for label, each in judged.items() if each == "promote"]
    lines = "".join(f"- {label}\n" for label in promoted) or NONE
    failed = [f"- {r.case.label}: {r.failure}\n" for r in results if r.failure]
    return f"""# Implementations of a layer on {machine}

Forward and backward of one layer with its projections: batch 1, width {setting.d_model}, {setting.heads}
heads, {setting.dtype} with parameters in float32. Knobs that are not defaults: {_knobs(setting)}. One process
a row. *device time*: the time that the device is busy; *wall time* includes the host's launches. Errors are
relative to float32 (Frobenius norm); in parentheses those of the implementation that `auto` selects, in the
same number format.

May be promoted, because their errors are at most {ERROR_FACTOR:g} × auto's plus {ERROR_FLOOR:.1e} (where
auto's exceeds {COARSE:g}, the difference to auto is at most that), and their times at most {FASTER:g} ×
auto's at the longest length and {SLOWER:g} × at every length:

{lines}
Without a figure at some length:

{"".join(failed) or NONE}
{table(setting, results)}"""


def _knobs(setting: Setting) -> str:
    each = [
        f"{name} {', '.join(f'{key}={value}' for key, value in knobs.items())}"
        for name, knobs in setting.knobs.items()
    ]
    return ", ".join(each) or "none"


def write(folder: Path, setting: Setting, results: Sequence[Result], machine: str) -> None:
    """Write the page and the figures into a folder."""
    write_atomically(folder / "impls.md", page(setting, results, machine))
    content: list[dict[str, Any]] = [
        {
            **asdict(result.case),
            "failure": result.failure,
            "verdict": verdicts(results)[result.case.label],
            "figures": [asdict(each) for each in result.figures],
        }
        for result in results
    ]
    write_atomically(
        folder / "impls.json", json.dumps({"setting": asdict(setting), "cases": content}, indent=1)
    )
