"""What `recurrences.fla_products` expects of fla-core's kernels, by definition: sums over tokens in float32.

tests/peers/test_fla.py compares it with the kernels, which Triton's interpreter runs.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor


def _before(of_keys: Tensor, of_values: Tensor, start: Tensor, chunk: int) -> list[Tensor]:
    """start + Σ k vᵀ over the tokens before each multiple of `chunk`, and over all: each (B, H, m, V)."""
    return [
        start + torch.einsum("bthm,bthv->bhmv", of_keys[:, :end].float(), of_values[:, :end].float())
        for end in (*range(0, of_keys.shape[1], chunk), of_keys.shape[1])
    ]


def _allowed(seq_len: int, chunk: int) -> Tensor:
    """(T, T): pairs of a query and a key up to it in the same chunk."""
    token = torch.arange(seq_len)
    return (token[:, None] >= token) & (token[:, None] // chunk == token // chunk)


def _read(states: Tensor, chunk: int, like: Tensor) -> Tensor:
    """The state of each token's chunk (B, T, H, m, V)."""
    return states.float().repeat_interleave(chunk, 1)[:, : like.shape[1]]


def chunk_fwd_h(
    *, k: Tensor, v: Tensor, h0: Tensor, output_final_state: bool, chunk_size: int
) -> tuple[Tensor, Tensor]:
    assert output_final_state
    *before, end = _before(k, v, h0, chunk_size)
    return torch.stack(before, 1).to(k.dtype), end


def chunk_fwd_o(*, q: Tensor, k: Tensor, v: Tensor, h: Tensor, scale: float, chunk_size: int) -> Tensor:
    weights = torch.einsum("bthm,bshm->bhts", q.float(), k.float()) * _allowed(q.shape[1], chunk_size)
    y = torch.einsum("bhts,bshv->bthv", weights, v.float())
    y += torch.einsum("bthm,bthmv->bthv", q.float(), _read(h, chunk_size, q))
    return (scale * y).to(v.dtype).contiguous()


def chunk_bwd_dh(
    *, q: Tensor, k: Tensor, v: Tensor, do: Tensor, h0: Tensor, dht: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    seq_len = q.shape[1]
    later = [
        dht + scale * torch.einsum("bthm,bthv->bhmv", q[:, start:].float(), do[:, start:].float())
        for start in (*range(chunk_size, seq_len, chunk_size), seq_len)
    ]
    of_start = dht + scale * torch.einsum("bthm,bthv->bhmv", q.float(), do.float())
    assert h0.shape == of_start.shape
    assert k.shape == q.shape
    assert v.shape == do.shape
    return torch.stack(later, 1).to(k.dtype), of_start


def chunk_bwd_dqkwg(
    *, q: Tensor, k: Tensor, v: Tensor, do: Tensor, h: Tensor, dh: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor, None, None]:
    of_weights = torch.einsum("bthv,bshv->bhts", do.float(), v.float()) * _allowed(q.shape[1], chunk_size)
    g_q = torch.einsum("bhts,bshm->bthm", of_weights, k.float())
    g_q += torch.einsum("bthv,bthmv->bthm", do.float(), _read(h, chunk_size, q))
    g_k = scale * torch.einsum("bhts,bthm->bshm", of_weights, q.float())
    g_k += torch.einsum("bthv,bthmv->bthm", v.float(), _read(dh, chunk_size, q))
    return (scale * g_q).to(q.dtype).contiguous(), g_k.to(k.dtype).contiguous(), None, None


def chunk_bwd_dv(*, q: Tensor, k: Tensor, do: Tensor, dh: Tensor, scale: float, chunk_size: int) -> Tensor:
    weights = torch.einsum("bthm,bshm->bhts", q.float(), k.float()) * _allowed(q.shape[1], chunk_size)
    g_v = scale * torch.einsum("bhts,bthv->bshv", weights, do.float())
    g_v += torch.einsum("bthm,bthmv->bthv", k.float(), _read(dh, chunk_size, q))
    return g_v.to(do.dtype).contiguous()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have imports of fla-core's modules find these functions."""
    states, outputs = ModuleType("fla.ops.common.chunk_h"), ModuleType("fla.ops.common.chunk_o")
    for function in (chunk_fwd_h, chunk_bwd_dh):
        setattr(states, function.__name__, function)
    for function in (chunk_fwd_o, chunk_bwd_dqkwg, chunk_bwd_dv):
        setattr(outputs, function.__name__, function)
    for name in ("fla", "fla.ops", "fla.ops.common"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (states, outputs):
        monkeypatch.setitem(sys.modules, module.__name__, module)
