"""Spherical k-means over the tokens of each head, for `variants.attention.routing` (arXiv:2003.05997, §4).

`variants.attention.cluster_former` has one "head" of all channels.

Shapes: B batch, T tokens, H heads, D channels of a head, K clusters of a head, w members of a cluster.

Scores that decide membership are float32 for any dtype of the model. They are computed in pieces, because
T × K scores would take 8 GiB at a million tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

PIECE = Sizes(cpu=2**21, accelerator=2**27)
"""Scores computed at a time. On a CPU 8 MiB, so that a piece stays in cache."""
MOST_PIECES = 16
"""Maximum number of pieces of a sequence. Longer sequences have larger pieces, to bound the operations."""
EPSILON = 1e-5
"""ε of the layer normalisation, torch's default."""


def unit(x: Tensor) -> Tensor:
    """Layer normalisation without scale or bias: vectors (…, D) of length √D, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), x.shape[-1:], eps=EPSILON)


def rounded_unit(x: Tensor) -> Tensor:
    """`unit` in the dtype of x, also under autocast; the sums inside are float32 or wider."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


@torch.no_grad()
@repeatable
def nearest(x: Tensor, centroids: Tensor, device_type: str | None = None) -> tuple[Tensor, Tensor]:
    """Assign each token to its nearest cluster.

    Tokens x (B, T, H, D) and centroids (H, K, D) → cluster of each token (B, H, T) int64, and the sum of the
    normalised members of each cluster (H, K, D). The nearest centroid has the largest dot product with the
    normalised token; of equal ones, the lowest index. `device_type` decides the size of the pieces; None: the
    device of x.
    """
    batch, seq_len, heads, head_dim = x.shape
    clusters = centroids.shape[1]
    sums = torch.zeros(heads, clusters, head_dim, device=x.device)
    head = torch.arange(heads, device=x.device)[:, None]
    length = PIECE.on(device_type or x.device.type) // (batch * heads * clusters)
    length = max(1, length, -(-seq_len // MOST_PIECES))
    assigned = []
    with torch.autocast(x.device.type, enabled=False):  # half precision would change memberships
        for piece in x.split(length, dim=1):
            content = unit(piece.float()).transpose(1, 2)  # (B, H, p, D)
            cluster = (content @ centroids.float().transpose(1, 2)).max(dim=-1).indices
            assigned.append(cluster)
            # index_put_ is deterministic on every device; index_add_ on a GPU is not
            sums.index_put_((head, cluster), content, accumulate=True)
    return (assigned[0] if len(assigned) == 1 else torch.cat(assigned, dim=2)), sums


@torch.no_grad()
@repeatable
def members(
    x: Tensor, centroids: Tensor, count: int, device_type: str | None = None
) -> tuple[Tensor, Tensor]:
    """Select the `count` tokens with the largest dot product with each centroid.

    Tokens x (B, T, H, D) and centroids (H, K, D) → positions of the selected tokens in increasing order
    (B, H, K, w) int64, and the sums that `nearest` returns (H, K, D). Of equal tokens the earliest are taken.
    """
    batch, seq_len, heads, _ = x.shape
    position = torch.arange(seq_len, device=x.device)
    selected = []
    best = torch.full((batch, heads, seq_len), -math.inf, device=x.device)
    cluster = torch.zeros_like(best, dtype=torch.int64)
    first_cluster = 0
    with torch.autocast(x.device.type, enabled=False):
        content = unit(x.float()).transpose(1, 2)  # (B, H, T, D)
        length = PIECE.on(device_type or x.device.type) // (batch * heads * seq_len)
        length = max(1, length, -(-centroids.shape[1] // MOST_PIECES))
        for piece in centroids.float().split(length, dim=1):
            scores = piece @ content.transpose(2, 3)  # (B, H, k, T)
            least = scores.topk(count, dim=-1).values[..., -1:]
            above, equal = scores > least, scores == least
            missing = count - above.sum(dim=-1, keepdim=True)
            chosen = above | (equal & (equal.cumsum(dim=-1) <= missing))
            # the i-th chosen token goes to slot i, all other tokens to one more slot, which is dropped
            slot = torch.where(chosen, chosen.cumsum(dim=-1) - 1, count)
            slots = slot.new_zeros(*slot.shape[:-1], count + 1)
            selected.append(slots.scatter_(-1, slot, position.expand_as(slot))[..., :count])
            nearest_here = scores.max(dim=2)
            nearer = nearest_here.values > best
            best = torch.where(nearer, nearest_here.values, best)
            cluster = torch.where(nearer, nearest_here.indices + first_cluster, cluster)
            first_cluster += piece.shape[1]
    sums = torch.zeros_like(centroids, dtype=torch.float32)
    sums.index_put_((torch.arange(heads, device=x.device)[:, None], cluster), content, accumulate=True)
    return torch.cat(selected, dim=2), sums


@torch.no_grad()
def moved(centroids: Tensor, sums: Tensor, decay: float) -> Tensor:
    """Move each centroid (…, K, D) towards the direction of the sum of its members (…, K, D); both have
    length 1.

    `decay` is the weight of the old centroid. A cluster without members does not move.
    """
    average = decay * centroids + (1 - decay) * F.normalize(sums, dim=-1)
    has_members = sums.abs().sum(dim=-1, keepdim=True) > 0
    return torch.where(has_members, F.normalize(average, dim=-1), centroids)
