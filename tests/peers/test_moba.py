"""MoBA beside flash-linear-attention's, whose packing, gate, selection and merging are compared.

Its kernels are those of flash-attn, for CUDA; in their place stands the oracle of `fused.flash`. It
merges in float32. With one block for each query it is dense attention, where ours reads the own block alone,
so each query selects two or more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import assert_same, feed, make_layer, numbers
from torch import Tensor

from peers import peer
from variants.attention.moba import MoBA, MoBAConfig
from variants.base import Dims
from variants.ops.fused.flash import Packing, flash_backward, flash_forward

pytestmark = pytest.mark.peers
FLOAT32 = 2e-5


def packing(q_ends: Tensor, k_ends: Tensor) -> Packing:
    return Packing(*(tuple(ends.diff().tolist()) for ends in (q_ends, k_ends)))


def forward(
    *, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, **_: Any
) -> tuple[Tensor, Tensor, None, None]:
    """The signature of flash-attn."""
    return *flash_forward(q, k, v, causal=causal, packing=packing(cu_seqlens_q, cu_seqlens_k)), None, None


def backward(
    *,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    **_: Any,
) -> None:
    """The signature of flash-attn: gradients are written to dq, dk and dv."""
    packed = packing(cu_seqlens_q, cu_seqlens_k)
    found = flash_backward(dout, q, k, v, out, softmax_lse, causal=causal, packing=packed)
    for given, gradient in zip((dq, dk, dv), found, strict=True):
        given.copy_(gradient)


@pytest.mark.filterwarnings("ignore::ImportWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, as it is imported
@pytest.mark.filterwarnings("ignore:Triton is not supported on current platform:UserWarning")
@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")  # a beta of torch, which theirs uses
@pytest.mark.parametrize(("tokens", "block", "top_k"), [(60, 8, 3), (61, 8, 2), (30, 7, 5), (90, 9, 4)])
def test_equals_flash_linear_attention(
    tokens: int, block: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = peer("fla.ops.moba.parallel")
    monkeypatch.setattr(package, "flash_attn_varlen_func", forward)
    monkeypatch.setattr(package, "_flash_attn_varlen_forward", forward)
    monkeypatch.setattr(package, "_flash_attn_varlen_backward", backward)
    config = MoBAConfig(block=block, top_k=top_k)
    layer = make_layer(MoBA, config, Dims(seq_len=tokens, d_model=32, heads=4)).float()
    assert isinstance(layer, MoBA)
    x = numbers(2, tokens, 32).detach().float().requires_grad_()
    ends = torch.arange(3, dtype=torch.int32) * tokens

    def theirs() -> Tensor:
        q, k, v = (t.transpose(1, 2).flatten(0, 1)[None] for t in layer.projections.split(x))
        y = package.parallel_moba(q, k, v, ends, tokens, block, top_k)
        return layer.projections.merge(y[0].unflatten(0, (2, tokens)).transpose(1, 2))

    trained = [x, *layer.projections.parameters()]
    assert_same(lambda: feed(layer, x, causal=True), theirs, trained, tolerance=FLOAT32)
