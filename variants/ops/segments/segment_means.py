"""Means of segments of a sequence whose lengths differ by at most one token.

Shapes: B batch, H heads, T tokens, D channels of a head, m segments.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def segment_bounds(seq_len: int, segments: int) -> list[tuple[int, int]]:
    """First token and end of each of min(m, T) segments. The first T mod m are one token longer."""
    segments = min(segments, seq_len)
    size, longer = divmod(seq_len, segments)
    starts = [i * size + min(i, longer) for i in range(segments + 1)]
    return list(pairwise(starts))


def segment_means(x: Tensor, segments: int) -> Tensor:
    """Return the mean of each of the segments of `segment_bounds`: (B, H, T, D) → (B, H, m, D).

    Two reductions of views, because there are two lengths. The sums are float32 or wider.
    """
    seq_len = x.shape[2]
    segments = min(segments, seq_len)
    size, longer = divmod(seq_len, segments)
    border = longer * (size + 1)
    parts = []
    if longer:
        parts.append(x[:, :, :border].unflatten(2, (longer, size + 1)).mean(dim=3))
    parts.append(x[:, :, border:].unflatten(2, (segments - longer, size)).mean(dim=3))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
