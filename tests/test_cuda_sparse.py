"""Sparse patterns by flash attention, on a CUDA device: `make test-cuda` there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import variants
from variants.base import Context, Workload

pytestmark = pytest.mark.cuda

SPARSE_FLASH: list[tuple[str, dict[str, Any]]] = [
    (name, {"stride": stride, "head_mode": mode, **knobs})
    for name, stride, knobs in (
        ("sparse_strided", 30, {}),
        ("sparse_strided", 1, {}),
        ("sparse_fixed", 30, {"c": 4}),
        ("sparse_fixed", 7, {"c": 7, "subblocks": "shared"}),
    )
    for mode in ("merged", "split", "interleaved")
]


@pytest.mark.parametrize(("name", "knobs"), SPARSE_FLASH)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 100, 777])
def test_sparse_patterns_by_flash_attention_are_near_the_reference(
    name: str, knobs: dict[str, Any], causal: bool, tokens: int
) -> None:
    """bfloat16 against float32 with the same numbers, in outputs and gradients."""
    device, variant = torch.device("cuda"), variants.load(name)
    dims = Workload(causal=True, batch_size=2, seq_len=tokens, d_model=256, heads=4)
    config = variant.Config(impl="flash", **knobs)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := variant.missing(config, dims, device=device, dtype=torch.bfloat16):
        pytest.skip(reason)
    for index in range(2):
        torch.manual_seed(index)
        layer = variant(config, dims, index).to(device, torch.bfloat16)
        x, dy = (torch.randn(2, tokens, 256, device=device, dtype=torch.bfloat16) for _ in range(2))
        found = []
        for dtype in (torch.bfloat16, torch.float32):
            made, given = layer.to(dtype), x.to(dtype).requires_grad_()
            run = made if dtype == torch.bfloat16 else made.reference
            out = run(given, Context(causal=causal))
            y = out if isinstance(out, torch.Tensor) else out.y
            grads = torch.autograd.grad(y, [given, *made.parameters()], dy.to(dtype))
            found.append([t.detach().float().clone() for t in (y, *grads)])
        for got, want in zip(*found, strict=True):
            assert got.isfinite().all()
            assert (got - want).norm() <= 0.02 * want.norm() + 1e-3
