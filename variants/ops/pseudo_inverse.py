"""The iterative Moore–Penrose pseudo-inverse of `variants.attention.nystrom` (arXiv:2102.03902, eq. 14)."""

from __future__ import annotations

import torch
from torch import Tensor

FLOPS_PER_STEP = 8
"""FLOPs of a step for m × m matrices, in multiples of m³: four products."""


def pseudo_inverse(a: Tensor, steps: int) -> Tensor:
    """Approximate the pseudo-inverse of matrices without negative entries: (…, m, m) → (…, m, m).

    The iteration of Razavi converges with order three: Z ← ¼ Z (13 I − AZ (15 I − AZ (7 I − AZ))). Each
    matrix starts from its own Aᵀ / (‖A‖₁‖A‖∞), for which ‖AA⁺ − AZ‖ < 1. float32 or wider.
    """
    norms = a.sum(dim=-2).amax(dim=-1) * a.sum(dim=-1).amax(dim=-1)  # ‖A‖₁‖A‖∞
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.mT / norms[..., None, None]
    for _ in range(steps):
        az = a @ z
        z = 0.25 * (z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))))
    return z
