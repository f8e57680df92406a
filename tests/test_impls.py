"""The comparison of implementations: on the CPU, which are wrong, which may be promoted, which fail."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiers import slow

import variants
from bench.measure.layer import outcome, relative_errors
from bench.run.devices import CPU, Device
from bench.run.locks import on_device
from bench.tools.impls import __main__ as command
from bench.tools.impls import figures, table
from bench.tools.impls.figures import Case, LayerFigures, Setting
from bench.tools.impls.table import Result, collect, read_setting, verdict
from variants.base import Dims

SETTING = Setting(device="cpu", dtype="bfloat16", d_model=64, heads=2, lengths=(64, 300), knobs={})
AUTO = Case(variant="dense", impl="sdpa", is_auto=True)
OTHER = Case(variant="dense", impl="other", is_auto=False, untried=True)


def of(seconds: float, seq_len: int = 64, error: float = 1e-3, **changed: object) -> LayerFigures:
    return replace(
        LayerFigures(
            seq_len=seq_len,
            wall_seconds=100.0,
            device_seconds=seconds,
            launches=1,
            peak_bytes=1,
            output_error=error,
            gradient_error=error,
            baseline_output_error=1e-3,
            baseline_gradient_error=1e-3,
        ),
        **changed,  # type: ignore[arg-type]
    )


COARSE = {"baseline_output_error": 0.3, "baseline_gradient_error": 0.3}
BASE = Result(AUTO, [of(1.0), of(10.0, 300)])


@pytest.mark.parametrize(
    ("mine", "says"),
    [
        ([of(0.9), of(8.0, 300)], "promote"),
        ([of(1.04), of(8.0, 300)], "promote"),
        ([of(1.2), of(8.0, 300)], "slower: 1.20× auto's time at 64"),
        ([of(0.5), of(9.7, 300)], "not faster: 0.97× auto's time at 300"),
        ([of(0.5), of(8.0, 300, error=0.1)], "wrong: error of outputs 1.0e-01"),
        ([of(0.5), of(8.0, 300, gradient_error=0.1)], "wrong: error of gradients 1.0e-01"),
        ([of(0.5, error=float("nan")), of(8.0, 300)], "wrong: error of outputs nan"),
        ([of(0.5, error=2 * 1e-3 + 2**-8), of(8.0, 300)], "promote"),
        ([of(0.5), of(8.0, 300, 0.3, **COARSE, difference=0.01)], "promote"),
        ([of(0.5), of(8.0, 300, 0.3, **COARSE, difference=0.3)], "perhaps wrong: outputs differ from auto"),
        ([of(0.5), of(8.0, 300, 0.3, **COARSE, difference=float("nan"))], "perhaps wrong"),
        ([of(0.5), of(8.0, 300, not_compared="float32 runs out of memory")], "not compared, float32"),
        ([of(0.5), of(8.0, 300, output_error=None)], "outputs not compared"),
        ([of(0.5), of(8.0, 300, baseline_output_error=None)], "outputs not compared"),
    ],
)
def test_what_is_correct_and_faster_may_be_promoted(mine: list[LayerFigures], says: str) -> None:
    assert verdict(Result(OTHER, mine), BASE).startswith(says)


def test_a_failure_at_one_length_is_no_promotion() -> None:
    assert (
        verdict(Result(OTHER, [of(0.1)], "unsupported: no such kernel"), BASE)
        == "unsupported: no such kernel"
    )
    assert verdict(Result(OTHER, [of(0.1), of(0.1, 300)]), Result(AUTO, [of(1.0)])).startswith(
        "auto's choice"
    )


def test_the_device_s_time_decides_where_it_is_known() -> None:
    assert of(1.0).seconds == 1.0
    assert of(1.0, device_seconds=None).seconds == 100.0


def test_untried_implementations_come_first_after_auto_s(monkeypatch: pytest.MonkeyPatch) -> None:
    impls = variants.load_mixer("longformer").IMPLS
    last = [*impls][-1]
    marked = {**impls, last: replace(impls[last], untried=True, auto_on=())}
    monkeypatch.setattr(variants.load_mixer("longformer"), "IMPLS", marked)
    found = figures.cases(SETTING, ["dense", "longformer"])
    assert [case.is_auto for case in found[:2]] == [True, True]
    untried = [case for case in found if case.untried]
    assert found[2 : 2 + len(untried)] == untried
    assert ("longformer", last) in [(case.variant, case.impl) for case in untried]
    assert len(found) == len(impls) + len(variants.load_mixer("dense").IMPLS)


@pytest.mark.parametrize("name", variants.mixers())
def test_the_sizes_for_a_device_are_possible(name: str) -> None:
    setting = read_setting("cuda", "bfloat16")
    layer = variants.load_mixer(name)
    config = layer.Config.of(setting.knobs.get(name, {}))
    for seq_len in setting.lengths:
        dims = Dims(seq_len=seq_len, d_model=setting.d_model, heads=setting.heads, device_type="cuda")
        assert layer.unsupported(config, dims, causal=layer.info.caps.causal) is None


def crashes(report: Callable[[LayerFigures], None], setting: Setting, case: Case, device: Device) -> None:
    """A stand-in for a kernel that takes its process with it at the second length."""
    report(of(1.0))
    if case.untried:
        os.abort()
    report(of(2.0, 300))


def test_a_kernel_that_aborts_loses_only_its_own_case(tmp_path: Path) -> None:
    third = replace(OTHER, variant="dense", impl="third", untried=False)
    kept: list[int] = []
    results = collect(
        SETTING,
        [AUTO, OTHER, third],
        CPU,
        left=lambda: 3600.0,
        keep=lambda results: kept.append(len(results)),
        measure=crashes,
    )
    assert kept == [1, 2, 3]
    assert [len(result.figures) for result in results] == [2, 1, 2]
    assert [result.failure is None for result in results] == [True, False, True]
    assert str(results[1].failure).startswith("failed: killed by SIGABRT")
    table.write(tmp_path, SETTING, results, "a machine")
    page = (tmp_path / "impls.md").read_text()
    assert "- dense impl=other: failed: killed by SIGABRT" in page
    assert "other (untried)" in page
    cases = json.loads((tmp_path / "impls.json").read_text())["cases"]
    assert [case["verdict"].split(":")[0] for case in cases] == ["auto", "failed", "not faster"]


def test_no_case_starts_when_the_time_is_over() -> None:
    left = iter([3600.0, 1.0, 1.0])
    results = collect(SETTING, [AUTO, OTHER], CPU, left=lambda: next(left), measure=crashes)
    assert results[0].figures
    assert (results[1].figures, results[1].failure) == ([], table.NOT_TRIED)


def test_a_device_that_another_run_holds_is_waited_for_until_the_time_is_over(
    capfd: pytest.CaptureFixture[str],
) -> None:
    left = iter([3600.0, 3600.0, 1.0])
    with on_device(CPU):
        (result,) = collect(SETTING, [AUTO], CPU, left=lambda: next(left), measure=crashes)
    assert (result.figures, result.failure) == ([], table.NOT_TRIED)
    assert capfd.readouterr().err.count(f"waiting: process {os.getpid()} (") == 1


@pytest.mark.parametrize("name", ["dense", *slow(*(n for n in variants.mixers() if n != "dense"))])
def test_implementations_on_the_cpu_agree(name: str) -> None:
    """In this process; those that need another device say so."""
    for case in figures.cases(replace(SETTING, lengths=(300,)), [name]):
        found: list[LayerFigures] = []
        try:
            figures.measure(found.append, replace(SETTING, lengths=(300,)), case, CPU)
        except figures.Missing:
            continue
        (only,) = found
        assert only.device_seconds is None
        assert only.launches > 10
        assert only.peak_bytes > 300 * 64 * 4
        assert table._incorrect(only) is None
        assert only.output_error is not None
        assert 0 < only.output_error < 0.5


def test_a_wrong_gradient_shows() -> None:
    layer = variants.load_mixer("dense")
    made = layer(layer.Config(), Dims(seq_len=32, d_model=16, heads=2))
    x, direction = torch.randn(1, 32, 16), torch.randn(1, 32, 16)
    want = outcome(made, x, direction, causal=True, dtype=torch.float32)
    assert relative_errors(want, want) == (0.0, 0.0)
    for place in range(1, len(want)):
        got = [t * 1.5 if i == place else t for i, t in enumerate(want)]
        output, gradient = relative_errors(got, want)
        assert output == 0.0
        assert gradient > 0.1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--device cpu --only longfromer", "did you mean longformer?"),
        ("--device cpu --dtype float16", "--dtype=float16: unknown; allowed are"),
        *slow(("--device tpu", "--device=tpu: unknown; allowed are")),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    arguments: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["impls", *arguments.split()])
    assert command.main() == 2
    assert says in capsys.readouterr().err


def test_one_variant_s_implementations_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"impls --device cpu --only linformer --lengths 256 --out {tmp_path}"
    monkeypatch.setattr("sys.argv", line.split())
    assert command.main() == 0
    assert "| linformer " in capsys.readouterr().out
    (case,) = json.loads((tmp_path / "impls.json").read_text())["cases"]
    assert [each["seq_len"] for each in case["figures"]] == [256]
