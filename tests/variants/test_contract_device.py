"""A plan made on a CPU for an accelerator follows the operations that the accelerator would run.

The accelerator is torch's `meta` device: not a CPU, and its tensors have shapes and no numbers. All that a
layer chooses by device is then chosen as for an accelerator. Two things are torch's own and taken out: the
kernel that scaled_dot_product_attention picks, and autocast, which `meta` does not have.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from oracles import feed
from test_contract_cost import NAMES, Mode, modes, words
from tiers import representative, slow
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import variants
from bench.config.parse import parse
from bench.scenarios.plan import Plan
from variants.base import Context, Workload

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
META = torch.device("meta")
DIMS = Workload(causal=True, batch_size=2, seq_len=1000, d_model=32, heads=2)
Operations = list[tuple[str, list[torch.Size]]]


class Trace(TorchDispatchMode):
    """Each operation with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Operations = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [arg.shape for arg in args if isinstance(arg, Tensor)]
        self.operations.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _no_choices_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return q + k.sum() + v.sum()

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def traced(mode: Mode, device: str) -> tuple[str | None, Operations]:
    """The implementation that a layer says it has, and what its forward and backward pass run; on a CPU, of a
    layer that is planned for the accelerator."""
    with torch.device(device):
        dims = DIMS if device == "meta" else replace(DIMS, device_type="meta")
        layer = mode.variant(mode.config, dims)
        x = torch.zeros(2, DIMS.seq_len, DIMS.d_model, requires_grad=True)
        with Trace() as found:
            feed(layer, x, causal=mode.causal).sum().backward()
    return layer.impl, found.operations


@pytest.mark.usefixtures("_no_choices_of_torch")
@modes(True, False)
def test_a_plan_runs_what_an_accelerator_would(mode: Mode) -> None:
    mode.need(DIMS)
    if reason := mode.variant.missing(mode.config, DIMS, device=META, dtype=torch.float32):
        pytest.skip(reason)
    assert traced(mode, "cpu") == traced(mode, "meta")


@pytest.mark.parametrize("name", [name for name in NAMES if "fused" in words(name).get("impl", [])])
def test_a_plan_refuses_what_an_accelerator_would(name: str) -> None:
    variant = variants.load(name)
    config = variant.Config.of({"impl": "fused"})
    layer = variant(config, replace(DIMS, device_type="meta"))
    x = torch.zeros(2, DIMS.seq_len, DIMS.d_model)
    assert variant.missing(config, DIMS, device=META, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^impl=fused: .* on meta"):
        layer(x, Context(causal=variant.info.caps.causal))


@pytest.mark.parametrize("device", ["cuda", *slow("cpu")])
@pytest.mark.parametrize("name", representative(NAMES))
def test_a_planned_record_names_the_implementation(name: str, device: str, tmp_path: Path) -> None:
    """The one of a layer whose parameters are on that device."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        given = [f"variant={name}", "seq_len=300", "depth=1", "measure=plan", "device=cpu", "data=stdlib"]
        cell = parse(compose("config", overrides=[*given, f"results_dir={tmp_path}"]))
    cell = replace(cell, spec=replace(cell.spec, device=device))
    told: dict[str, Any] = {}
    Plan(cell.spec, told.update).run()
    variant, config, dims = cell.spec.attention()
    there = variant(config, replace(dims, device_type=None)).to("cpu" if device == "cpu" else "meta")
    assert told["impl"] == there.impl
