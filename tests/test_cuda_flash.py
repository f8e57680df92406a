"""The CUDA kernels of flash attention keep the contract that the oracle for the CPU states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from variants.ops.fused import flash
from variants.ops.fused.flash import DevicePacking, Packing, flash_backward, flash_forward

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
H = 3
QUERIES, KEYS = 194, 200
PACKED = Packing((130, 1, 0, 63), (131, 3, 3, 63))
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _card_that_has_the_kernels() -> None:
    if reason := flash.missing_flash(DEVICE, torch.bfloat16, 64):
        pytest.skip(reason)


def on_device(device: torch.device) -> DevicePacking:
    queries, keys = (
        torch.tensor([0, *lengths], device=device).cumsum(0).int()
        for lengths in (PACKED.queries, PACKED.keys)
    )
    return DevicePacking(queries=queries, keys=keys, most_queries=150, most_keys=140, pairs=1)


def inputs(
    *batch: int, head_dim: int, dtype: torch.dtype, queries: int = QUERIES, keys: int = KEYS
) -> list[Tensor]:
    """q, k, v and the gradient of the outputs, with numbers of `dtype`."""
    torch.manual_seed(0)
    tokens = (queries, keys, keys, queries)
    return [torch.randn(*batch, n, H, head_dim).to(dtype) for n in tokens]


def results(tensors: list[Tensor], **knobs: Any) -> list[Tensor]:
    """Outputs, logsumexp and gradients."""
    q, k, v, dy = tensors
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    y, lse = flash_forward(q, k, v, **knobs)
    return [y.detach(), lse, *torch.autograd.grad(y, (q, k, v), dy)]


def assert_near(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    """Relative to the norm of each tensor or to 1; infinite logsumexp in the same places."""
    for one, other in zip(got, want, strict=True):
        one = one.cpu().double()
        assert torch.equal(one.isinf(), other.isinf())
        one, other = (t.masked_fill(t.isinf(), 0) for t in (one, other))
        assert (one - other).norm() <= 4 * torch.finfo(dtype).eps * max(1.0, other.norm().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(None, None), (40, None), (None, 7), (40, 7), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", ["no", "host", "device"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_the_kernel_equals_the_oracle(
    head_dim: int, packed: str, causal: bool, window: flash.Window, dtype: torch.dtype
) -> None:
    tensors = inputs(*([2] if packed == "no" else []), head_dim=head_dim, dtype=dtype)
    found = []
    for device, wide in ((DEVICE, dtype), (torch.device("cpu"), torch.float64)):
        packing = {"no": None, "host": PACKED, "device": on_device(device)}[packed]
        moved = [t.to(device, wide) for t in tensors]
        found.append(results(moved, causal=causal, window=window, packing=packing))
    assert_near(*found, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(None, None), (40, None)])
def test_a_query_without_a_key_gives_zero(window: flash.Window, dtype: torch.dtype) -> None:
    """One that stands before the first key, and all of a sequence without keys."""
    packing = Packing((130, 70), (0, 60))
    for packed, batch in ((None, [2]), (packing, [])):
        tensors = inputs(*batch, head_dim=64, dtype=dtype, queries=200, keys=60)
        found = [
            results([t.to(device, wide) for t in tensors], causal=True, window=window, packing=packed)
            for device, wide in ((DEVICE, dtype), (torch.device("cpu"), torch.float64))
        ]
        assert found[1][1].isinf().any()
        assert_near(*found, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views_are_read_where_they_are(dtype: torch.dtype) -> None:
    tensors = inputs(2, head_dim=64, dtype=dtype)
    q, k, v, dy = (t.to(DEVICE) for t in tensors)
    wide = torch.stack([k, v], dim=2)  # (B, S, 2, H, D)
    got = results([q, *wide.unbind(2), dy], causal=True)
    want = results([t.double() for t in tensors], causal=True)
    assert_near(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_pass_accepts_the_softmax_of_all_parts(dtype: torch.dtype) -> None:
    """Keys in two parts, merged by logsumexp; the first queries have no key in the first part."""
    tensors = inputs(2, head_dim=64, dtype=dtype)
    q, k, v, dy = (t.to(DEVICE) for t in tensors)
    cuts = [(slice(0, 100), True), (slice(100, KEYS), False)]
    parts = [flash_forward(q, k[:, at], v[:, at], causal=causal) for at, causal in cuts]
    y, lse = flash.merge(parts)
    grads = [flash_backward(dy, q, k[:, at], v[:, at], y, lse, causal=causal) for at, causal in cuts]
    dq = sum(part[0] for part in grads)
    dk, dv = (torch.cat([part[i] for part in grads], dim=1) for i in (1, 2))

    q, k, v, dy = (t.double() for t in tensors)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 8
    position = torch.arange(QUERIES)[:, None] + 100 - QUERIES  # the last query beside the last key of a part
    key = torch.arange(KEYS)
    scores = scores.masked_fill((key < 100) & (key > position), -torch.inf)
    exact = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    want = torch.autograd.grad(exact, (q, k, v), dy)
    assert_near([y, dq, dk, dv], [exact.detach(), *want], dtype)
