"""A plan for a device that this machine does not have does not bear the name of its processor."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from test_report import record

from bench import CONFIGS
from bench.config.parse import parse
from bench.records.configurations import PLANNED, UNKNOWN, filled_in, table
from bench.run.cell import CellRun

CHIP = "Example CPU @ 2.60GHz"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize(("device", "is_named"), [("cuda", False), ("cpu", True)])
def test_a_plan_names_only_a_device_that_is_here(device: str, is_named: bool) -> None:
    knobs = [f"device={device}", "measure=plan", "seq_len=64", "depth=1", "model.d_model=16"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cell = parse(compose("config", overrides=knobs))
    figures: dict[str, object] = {}
    CellRun(cell, "c0", "code", figures.update).run()
    assert figures["flops_source"] == "predicted"
    assert (figures["device_name"] is not None) == is_named


def machines(**changed: object) -> list[str]:
    made = replace(record(), **{"cpu_model": CHIP, **changed})  # type: ignore[arg-type]
    frame: pd.DataFrame = filled_in(table([made]))
    return list(frame["machine"])


def test_the_machine_of_such_a_plan_is_not_its_processor() -> None:
    assert machines(device="cuda", device_name=None, flops_source="predicted") == [PLANNED]
    assert machines(device="cuda", device_name="Card", flops_source="predicted") == ["Card"]
    assert machines(device="cuda", device_name=None, flops_source=None, status="error") == [UNKNOWN]
    assert machines(device="cpu", device_name=None) == [CHIP]
