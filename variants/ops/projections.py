"""Projections with rotary positions, masked attention as a reference, and local attention.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head; (B, H, T, D) for queries, keys, values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Clock, Dims, Workload
from variants.head_size import ROTARY_BASE

TABLE_BLOCK = 128
"""Positions of a block of `rotary_table`."""


def rotary_table(
    seq_len: int, head_dim: int, like: Tensor, base: float = ROTARY_BASE
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, D/2) of the rotary angles of positions 0 … T−1; dtype and device of `like`.

    They are computed in float64 and rounded once; in float32 an angle of 2²⁰ radians would have an error of
    up to 0.03. The addition theorems replace most cosines and sines by products.
    """
    rate = _rates(head_dim, like, base)
    fine = torch.arange(TABLE_BLOCK, device=like.device, dtype=torch.float64)[:, None] * rate
    block = torch.arange(-(-seq_len // TABLE_BLOCK), device=like.device, dtype=torch.float64)
    coarse = (block * TABLE_BLOCK)[:, None, None] * rate
    cos_fine, sin_fine, cos_coarse, sin_coarse = fine.cos(), fine.sin(), coarse.cos(), coarse.sin()
    cos = (cos_coarse * cos_fine).addcmul_(sin_coarse, sin_fine, value=-1).to(like.dtype)
    sin = (sin_coarse * cos_fine).addcmul_(cos_coarse, sin_fine).to(like.dtype)
    return cos.flatten(0, 1)[:seq_len], sin.flatten(0, 1)[:seq_len]


def rotary_table_at(
    positions: Tensor, head_dim: int, like: Tensor, base: float = ROTARY_BASE
) -> tuple[Tensor, Tensor]:
    """`rotary_table` for arbitrary positions (T,): cosines and sines (T, D/2), rounded once."""
    angle = positions.to(like.device, torch.float64)[:, None] * _rates(head_dim, like, base)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rates(head_dim: int, like: Tensor, base: float) -> Tensor:
    """Angle for each position, in radians (D/2,), float64."""
    half = head_dim // 2
    channel = torch.arange(half, device=like.device, dtype=torch.float64)
    return torch.exp(channel * (-math.log(base) / half))


def rotary(x: Tensor, positions: Tensor | None = None, base: float = ROTARY_BASE) -> Tensor:
    """Apply rotary positions to x (B, T, …, D), D even (Su 2021, arXiv:2104.09864).

    `positions` are (T,); None: 0 … T−1. Channel i is paired with channel i + D/2, as in most current code.
    The paper pairs neighbouring channels, which is the same map after a permutation of channels.
    """
    seq_len, head_dim = x.shape[1], x.shape[-1]
    shape = (seq_len, *[1] * (x.dim() - 3), head_dim // 2)
    if positions is None:
        tables = rotary_table(seq_len, head_dim, x, base)
    else:
        tables = rotary_table_at(positions, head_dim, x, base)
    cos, sin = (table.view(shape) for table in tables)
    rotated: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


def rotary_next(x: Tensor, clock: Clock, base: float) -> Tensor:
    """`rotary` for the next tokens of sequences that are decoded; all layers share the angles."""
    tokens, head_dim = x.shape[1], x.shape[-1]
    cos, sin = clock.once(
        ("rotary", tokens, head_dim, base, x.dtype, x.device),
        lambda: rotary_table_at(clock.positions(tokens, x.device), head_dim, x, base),
    )
    shape = (tokens, *[1] * (x.dim() - 3), head_dim // 2)
    return _rotated(x, cos.view(shape), sin.view(shape))


class _Rotation(torch.autograd.Function):
    """Rotate pairs of channels. Backward rotates by the negative angles, so x is not saved.

    The result is written to one new tensor without temporaries, because allocation dominates the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    a, b = x.split(cos.shape[-1], dim=-1)
    y_a, y_b = y.split(cos.shape[-1], dim=-1)
    y_a.copy_(a).mul_(cos).addcmul_(b, sin, value=-1)
    y_b.copy_(b).mul_(cos).addcmul_(a, sin)
    return y


class Projections(nn.Module):
    """The four projections of multi-head attention, without biases.

    With G query heads for each head of keys and values, K = H / G.
    """

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.heads, self.key_heads, self.rotary_base = dims.heads, dims.key_heads, dims.rotary_base
        self.inner, self.key_dim = dims.inner_dim, dims.key_dim
        self.qkv = nn.Linear(dims.d_model, self.inner + 2 * self.key_dim, bias=False)
        self.out = nn.Linear(self.inner, dims.d_model, bias=False)

    def split_next(self, x: Tensor, clock: Clock) -> tuple[Tensor, Tensor, Tensor]:
        """`split_shared` of the next tokens of sequences that are decoded."""
        heads = F.linear(x, self.qkv.weight).unflatten(-1, (self.heads + 2 * self.key_heads, -1))
        qk, v = heads.split([self.heads + self.key_heads, self.key_heads], dim=2)
        q, k = rotary_next(qk, clock, self.rotary_base).split([self.heads, self.key_heads], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def split(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) → queries and keys with rotary positions, and values: each (B, H, T, D).

        Shared keys and values are repeated for every query head that reads them. `positions` (T,) are the
        positions of the tokens; None: 0 … T−1.
        """
        q, k, v = self.split_shared(x, positions)
        return q, self.spread(k), self.spread(v)

    def split_shared(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`split` with one head for all query heads that share it: keys and values are (B, K, T, D)."""
        # two products: if v were a view of one product, it would keep the unrotated q and k in memory
        w_qk, w_v = self.qkv.weight.split([self.inner + self.key_dim, self.key_dim])
        q, k = self._queries_keys(x, w_qk, positions)
        v = F.linear(x, w_v).unflatten(-1, (self.key_heads, -1))
        return q, k, v.transpose(1, 2)

    def queries_keys(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The queries and keys of `split_shared`, without its values."""
        return self._queries_keys(x, self.qkv.weight[: self.inner + self.key_dim], positions)

    def _queries_keys(self, x: Tensor, w_qk: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        qk = F.linear(x, w_qk).unflatten(-1, (self.heads + self.key_heads, -1))  # (B, T, H + K, D)
        qk = rotary(qk, positions, self.rotary_base)
        q, k = qk.split([self.heads, self.key_heads], dim=2)
        return q.transpose(1, 2), k.transpose(1, 2)

    def spread(self, x: Tensor) -> Tensor:
        """Shared keys or values (B, K, T, D), repeated for every query head: (B, H, T, D)."""
        return spread(x, self.heads // self.key_heads, dim=1)

    def merge(self, y: Tensor) -> Tensor:
        """(B, H, T, D) → (B, T, C), by the output projection."""
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged

    @staticmethod
    def flops(work: Workload, tokens: int | None = None) -> int:
        """Forward FLOPs of the four projections of `tokens` tokens; None: of all."""
        count = work.batch_size * (work.seq_len if tokens is None else tokens)
        return 4 * count * work.d_model * (work.inner_dim + work.key_dim)


def spread(x: Tensor, queries_per_key: int, *, dim: int) -> Tensor:
    """Repeat each head of keys or values for the query heads that share it; `dim` is that of the heads."""
    return x if queries_per_key == 1 else x.repeat_interleave(queries_per_key, dim=dim)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """The reference of all masked attention: softmax(QKᵀ/√D)V over the pairs in `allowed` (…, T, T) bool.

    O(T²) by intention. A query without an allowed key gives NaN.
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~allowed.to(q.device), float("-inf"))
    return scores.softmax(dim=-1) @ v


def local_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int, causal: bool) -> Tensor:
    """Softmax attention to keys at a distance of less than `window` tokens: (B, H, T, D) → (B, H, T, D).

    Queries are divided into blocks of `window`. One call of `scaled_dot_product_attention` computes all
    blocks whose keys lie inside the sequence, on overlapping *views* of keys and values, so nothing is
    gathered or padded. The blocks at the ends of the sequence are separate calls. Scores are computed with at
    most 2·window − 1 keys for each query (3·window − 2 if not causal), of which it may read about half (two
    thirds).
    """
    seq_len = q.shape[2]
    if window >= seq_len:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    block, reach = window, window - 1
    ahead = 0 if causal else reach
    # inner blocks: block·i − reach ≥ 0 and block·(i + 1) + ahead ≤ T
    first = -(-reach // block)
    count = max(0, (seq_len - ahead) // block - first)
    start, stop = first * block, (first + count) * block

    pieces = [_end_block(q, k, v, 0, min(start, seq_len), window, causal)]
    if count:
        keys = block + reach + ahead
        lo, hi = start - reach, stop + ahead
        q_blocks = q[:, :, start:stop].flatten(0, 1).unflatten(1, (count, block))  # (BH, n, b, D)
        k_blocks = k[:, :, lo:hi].flatten(0, 1).unfold(1, keys, block).transpose(-1, -2)  # (BH, n, keys, D)
        v_blocks = v[:, :, lo:hi].flatten(0, 1).unfold(1, keys, block).transpose(-1, -2)
        allowed = _window_mask(block, keys, reach, window, causal, q.device)
        y = F.scaled_dot_product_attention(q_blocks, k_blocks, v_blocks, attn_mask=allowed)
        pieces.append(y.flatten(1, 2).unflatten(0, q.shape[:2]))
    # the end of the sequence, block by block, so that no query has more keys than in an inner block
    ends = range(stop, seq_len, block)
    pieces += [_end_block(q, k, v, begin, min(begin + block, seq_len), window, causal) for begin in ends]
    pieces = [piece for piece in pieces if piece.shape[2]]
    return torch.cat(pieces, dim=2)


def _window_mask(
    queries: int, keys: int, offset: int, window: int, causal: bool, device: torch.device
) -> Tensor:
    """(queries, keys) bool: may query a, which has the position `offset` + a among the keys, read key b."""
    distance = torch.arange(queries, device=device)[:, None] + offset - torch.arange(keys, device=device)
    allowed = distance < window
    return allowed & (distance >= 0) if causal else allowed & (distance > -window)


def _end_block(q: Tensor, k: Tensor, v: Tensor, begin: int, end: int, window: int, causal: bool) -> Tensor:
    """Attention of queries [begin, end) to the existing keys in their windows."""
    lo, hi = max(0, begin - window + 1), end if causal else min(q.shape[2], end + window - 1)
    q, k, v = q[:, :, begin:end], k[:, :, lo:hi], v[:, :, lo:hi]
    if causal and lo == begin:  # at most `window` queries from the start: the window forbids nothing
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    allowed = _window_mask(end - begin, hi - lo, begin - lo, window, causal, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
