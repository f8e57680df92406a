"""Clusters of tokens by the signs of random projections, with K-means in Hamming space, for
`variants.attention.clustered` (arXiv:2007.04825).

Shapes: B batch, T tokens, H heads, D channels of a head, b bits, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

PIECE = Sizes(cpu=2**21, accelerator=2**27)
"""Distances computed at a time. On a CPU 8 MiB."""
MOST_PIECES = 16
"""Maximum number of pieces of a sequence, which bounds the number of operations."""


def signs(x: Tensor, planes: Tensor) -> Tensor:
    """Bits of tokens as +1 and −1: (B, H, T, D) and (H, D, b) → (B, H, T, b) float32."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.where(x.float() @ planes.float() >= 0, 1.0, -1.0)


@torch.no_grad()
@repeatable
def hamming_clusters(x: Tensor, planes: Tensor, clusters: int, steps: int, device_type: str) -> Tensor:
    """Assign tokens (B, H, T, D) to at most min(K, T) clusters: (B, H, T) int64.

    Centroids begin as the bits of tokens at equal distances. In each step tokens join the centroid with the
    fewest different bits, of equal ones the first, and a bit of a centroid becomes that of most members; +1
    of equally many. A centroid without members stays. Sums of bits are exact, so no order of them matters.
    """
    bits = signs(x, planes)
    batch, heads, seq_len, width = bits.shape
    clusters = min(clusters, seq_len)
    first = torch.arange(clusters, device=x.device) * seq_len // clusters
    centroids = bits[:, :, first]
    length = PIECE.on(device_type) // (batch * heads * clusters)
    length = max(1, length, -(-seq_len // MOST_PIECES))

    def assign() -> Tensor:
        # the dot product of bits is b − 2 · their distance
        found = [(piece @ centroids.mT).max(dim=-1).indices for piece in bits.split(length, dim=2)]
        return torch.cat(found, dim=2)

    with torch.autocast(x.device.type, enabled=False):
        for _ in range(steps):
            index = assign()[..., None].expand(batch, heads, seq_len, width)
            sums = torch.zeros_like(centroids).scatter_add_(2, index, bits)
            count = torch.zeros_like(centroids[..., :1]).scatter_add_(
                2, index[..., :1], torch.ones_like(bits[..., :1])
            )
            centroids = torch.where(count > 0, torch.where(sums >= 0, 1.0, -1.0), centroids)
        return assign()


def flops(batch: int, heads: int, seq_len: int, head_dim: int, bits: int, clusters: int, steps: int) -> int:
    """FLOPs of the bits, and of the distances in all steps and the last assignment."""
    distances = (steps + 1) * min(clusters, seq_len)
    return 2 * batch * heads * seq_len * bits * (head_dim + distances)
