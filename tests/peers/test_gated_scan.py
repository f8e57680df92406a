"""The chunked scan beside the references of fla-core: linear attention, and simple GLA with decays."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from oracles import assert_same, difference
from torch import Tensor

from variants.ops.recurrences.gated_scan import gated_scan
from variants.ops.recurrences.scan_features import Identity

pytestmark = pytest.mark.peers
FLOAT32 = 1e-5
"""Their references compute in float32."""


def naive(family: str) -> ModuleType:
    """The file of references, without its package, which needs Triton."""
    package = importlib.util.find_spec("fla")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("fla is not installed: `make test-peers` does it")
    path = Path(package.submodule_search_locations[0], "ops", family, "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{family}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, *, normalise: bool) -> Tensor:
    """Layout (B, T, H, D)."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    logs = None if g is None else g.transpose(1, 2)[..., None]
    options = {"features": Identity(), "normalise": normalise, "chunk": 32, "device_type": "cpu"}
    return gated_scan(*heads_first, logs, **options).transpose(1, 2)  # type: ignore[arg-type]


def drawn(tokens: int) -> list[Tensor]:
    torch.manual_seed(tokens)
    return [torch.rand(2, tokens, 3, width, requires_grad=True) for width in (8, 8, 5)]


@pytest.mark.parametrize("tokens", [1, 64, 100])
@pytest.mark.parametrize("normalise", [True, False])
def test_without_decays_it_is_linear_attention(tokens: int, normalise: bool) -> None:
    """Without a scale. Their normaliser has 1e-10 added."""
    recurrent = naive("linear_attn").naive_recurrent_linear_attn
    q, k, v = drawn(tokens)
    v = v.repeat(1, 1, 1, 2)[..., :8]  # their values are as wide as their keys
    theirs = recurrent(q, k, v, scale=1.0, normalize=normalise)[0]
    assert difference(ours(q, k, v, None, normalise=normalise), theirs) <= FLOAT32


@pytest.mark.parametrize("tokens", [1, 64, 100])
def test_with_decays_it_is_simple_gla(tokens: int) -> None:
    """Outputs and gradients, those of the decays too."""
    chunked = naive("simple_gla").naive_chunk_simple_gla
    q, k, v = drawn(tokens)
    g = torch.randn(2, tokens, 3).sigmoid().log().requires_grad_()
    assert_same(
        lambda: ours(q, k, v, g, normalise=False),
        lambda: chunked(q, k, v, g, scale=1.0)[0],
        [q, k, v, g],
        tolerance=FLOAT32,
    )
