"""Layers with the delta rule, written a second time: token by token, with explicit matrices.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.ops.recurrences.delta_mixer import DeltaMixer


def written_out(
    layer: DeltaMixer, x: Tensor, alpha: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """The outputs (B, T, C): S_t = (I − β k kᵀ) Diag(α) S_{t−1} + β k vᵀ, head by head.

    `alpha` (B, T, H, D) are decays, and `gate` (B, T, H·D) is what outputs are multiplied with; None: 1.
    """
    heads, d = layer.dims.heads, layer.dims.head_dim
    mixed = (x @ layer.projections.qkv.weight.T).mT
    if layer.taps is not None:
        width = layer.taps.shape[1]
        mixed = F.conv1d(F.pad(mixed, (width - 1, 0)), layer.taps[:, None], groups=mixed.shape[1])
    mixed = F.silu(mixed).mT
    beta = (x @ layer.strength.weight.T).sigmoid()
    one = torch.eye(d, dtype=x.dtype)
    outputs = []
    for row in range(len(x)):
        for head in range(heads):
            q, k, v = (mixed[row, :, (i * heads + head) * d :][:, :d] for i in range(3))
            q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
            state = torch.zeros_like(one)
            for t in range(x.shape[1]):
                strength, key = beta[row, t, head], k[t][:, None]
                kept = state if alpha is None else alpha[row, t, head].diag() @ state
                state = (one - strength * key @ key.T) @ kept + strength * key @ v[t][None]
                y = state.T @ q[t] / d**0.5
                outputs.append(layer.scale * y / (y.square().mean() + 1e-5).sqrt())
    found = torch.stack(outputs).view(len(x), heads, x.shape[1], d).transpose(1, 2).flatten(2)
    return (found if gate is None else found * gate) @ layer.projections.out.weight.T
