"""Forgetting attention beside fla-core's formula, whose sums of gates are float32.

Its file alone, because the package needs an accelerator.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor

from variants.attention.forgetting import Forgetting, ForgettingConfig

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("tokens", [1, 40])
def test_equals_fla_core(tokens: int) -> None:
    package = importlib.util.find_spec("fla")
    if package is None or package.origin is None:
        pytest.skip("fla is not installed: `make test-peers` does it")
    path = Path(package.origin).parent / "ops/attn/naive.py"
    spec = importlib.util.spec_from_file_location("naive_attn", path)
    assert spec is not None
    assert spec.loader is not None
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    layer, x = make_layer(Forgetting, ForgettingConfig(), dims_for(tokens, 2)), numbers(2, tokens, 16)
    assert isinstance(layer, Forgetting)

    def theirs() -> Tensor:
        qkv = (x @ layer.projections.qkv.weight.T).unflatten(-1, (3, 2, -1))
        gates = torch.nn.functional.logsigmoid(layer.gate(x))
        y, _ = naive.naive_parallel_attn(*qkv.unbind(2), g=gates)
        return layer.projections.merge(y.transpose(1, 2))

    assert_same(lambda: feed(layer, x, causal=True), theirs, [x, *layer.parameters()], tolerance=3e-6)
