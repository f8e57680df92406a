"""The presets of modifications: 21 models on four tasks, each as large as the default or as costly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hydra_sweeps import swept

from bench.config.spec import CellSpec
from bench.measure import predict
from bench.run.prepare import order_in_rounds

PRESETS = ("modifications", pytest.param("modifications_gpu", marks=pytest.mark.slow))
EQUAL = 0.015
"""Relative difference of sizes that count as equal."""


def task_of(spec: CellSpec) -> tuple[str, str]:
    return spec.data.name, spec.objective


def sizes(spec: CellSpec) -> tuple[float, float, float]:
    """Parameters, those that compute a token, and FLOPs of a training step a token."""
    with torch.device("meta"):
        model = predict.build_model(spec)
    tokens = spec.batch_size * spec.seq_len
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, model.active_parameters(), model.cost(spec.workload()).step / tokens


@pytest.mark.parametrize("preset", PRESETS)
def test_every_model_is_as_large_or_as_costly_as_the_default(preset: str) -> None:
    by_task: dict[tuple[str, str], list[CellSpec]] = {}
    for cell in swept(f"experiment={preset}"):
        by_task.setdefault(task_of(cell.spec), []).append(cell.spec)
    assert len(by_task) == 4
    for specs in by_task.values():
        models = {repr(replace(spec, replicate=0)): spec for spec in specs}
        assert len(models) == 21
        assert len(specs) == 3 * 21
        default, *others = models.values()
        assert (default.variant, default.feed_forward.params["activation"]) == ("dense", "gelu")
        usual = sizes(default)
        for spec in others:
            ratios = [own / other for own, other in zip(sizes(spec), usual, strict=True)]
            assert min(abs(ratio - 1) for ratio in ratios) < EQUAL, (spec.label, ratios)


def test_the_first_cells_are_the_default_and_three_more_on_each_task() -> None:
    """So that the first table, after eight minutes, has rows of several tasks."""
    cells = order_in_rounds(swept("experiment=modifications"))
    assert [cell.spec.replicate for cell in cells] == [0] * 84 + [1] * 84 + [2] * 84
    first = [cell.spec for cell in cells[:16]]
    assert len({task_of(spec) for spec in first}) == 4
    assert {spec.feed_forward.params["activation"] for spec in first} == {
        "gelu",
        "relu",
        "silu",
        "squared_relu",
    }
    rounds = {cell.spec.measure.learning_rate for cell in cells}
    assert rounds == {"search"}
