"""Cross-attention with projections of its own: some vectors read others.

Shapes: B batch, L vectors that read, T vectors that are read, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Cost, Dims, Workload
from variants.ops.projections import rotary


class CrossAttention(nn.Module):
    """The branch out(softmax(QKᵀ/√D)V) without its residual connection: Q of norm(x), K and V of norm(z).

    Both norms are layer norms, whatever the blocks have. All heads have their own keys and values.
    """

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.head_dim, self.rotary_base = dims.head_dim, dims.rotary_base
        self.norm, self.read_norm = nn.LayerNorm(dims.d_model), nn.LayerNorm(dims.d_model)
        self.q = nn.Linear(dims.d_model, dims.inner_dim, bias=False)
        self.kv = nn.Linear(dims.d_model, 2 * dims.inner_dim, bias=False)
        self.out = nn.Linear(dims.inner_dim, dims.d_model, bias=False)

    def forward(
        self, x: Tensor, z: Tensor, *, add_x: Tensor | None = None, add_z: Tensor | None = None
    ) -> Tensor:
        """x (B, L, C) reads all of z (B, T, C) → (B, L, C).

        `add_x` (L, C) and `add_z` (T, C) are positions that are added after the norms.
        """
        x, z = self.norm(x), self.read_norm(z)
        q = self._split(self.q(x if add_x is None else x + add_x))
        k, v = self._split(self.kv(z if add_z is None else z + add_z)).chunk(2, dim=2)
        return self._attend(q, k, v)

    def read_back(self, x: Tensor, z: Tensor) -> Tensor:
        """The last L of T vectors read z (B, T, C), causally: x (B, L, C) → (B, L, C).

        Vector i of x has position T − L + i, and reads those of z up to there. Positions are rotary.
        """
        count, total = x.shape[1], z.shape[1]
        position = torch.arange(total, device=x.device)
        own = position[total - count :]
        k, v = self._split(self.kv(self.read_norm(z))).chunk(2, dim=2)
        q = rotary(self._split(self.q(self.norm(x))), own, self.rotary_base)
        k = rotary(k, base=self.rotary_base)
        if count == total:
            return self._attend(q, k, v, is_causal=True)
        return self._attend(q, k, v, None if count == 1 else position <= own[:, None])

    def _split(self, projected: Tensor) -> Tensor:
        """(B, T, n · D) → (B, T, n, D)."""
        split: Tensor = projected.unflatten(-1, (-1, self.head_dim))
        return split

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, *, is_causal: bool = False
    ) -> Tensor:
        """(B, L, H, D) and twice (B, T, H, D) → (B, L, C)."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=is_causal)
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged

    @staticmethod
    def cost(work: Workload, queries: int, keys: int, pairs: int | None = None) -> Cost:
        """FLOPs for L = `queries` and T = `keys`; `pairs` of them are allowed, None: all."""
        projected = 2 * (queries + keys) * work.d_model * work.inner_dim  # q and out of L, k and v of T
        allowed = queries * keys if pairs is None else pairs
        parts = {"projections": 2 * projected, "attention": 4 * allowed * work.inner_dim}
        return Cost({name: work.batch_size * each for name, each in parts.items()})
