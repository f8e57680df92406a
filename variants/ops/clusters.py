"""Attention within clusters of tokens, for `variants.attention.routing` (arXiv:2003.05997, §4.1), by kernel.

Shapes: B batch, T tokens, H heads, D channels of a head, K clusters of a head, w members of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.ops import kmeans, kmeans_attention, kmeans_flash
from variants.ops.flash import flash_attention
from variants.ops.projections import rotary


class Members(NamedTuple):
    """The cluster of each token (B, H, T), and the members of it that a token reads."""

    cluster: Tensor
    clusters: int
    window: int
    is_causal: bool
    device_type: str


@dataclass(frozen=True)
class Kernels:
    """One way of computing attention within clusters."""

    windows: Callable[[Tensor, Tensor, Members, Tensor | None], Tensor]
    """Shared queries and keys x, which are not normalised yet, and values (B, T, H, D); members; positions of
    the tokens → (B, T, H, D). A token reads a window of the members of its cluster."""
    attend: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    """Queries, keys and values of clusters of equal size (BH, K, w, D); whether causal → (BH, K, w, D)."""


def of_equal_size(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_members: Tensor,
    k_members: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor, bool], Tensor],
    *,
    is_causal: bool,
) -> Tensor:
    """Attend within clusters, and average the outputs of a token over its clusters; 0 if it has none.

    q, k and v (B, T, H, D); positions of the members (B, H, K, w), in increasing order → (B, T, H, D).
    """
    batch, seq_len, heads, _ = v.shape
    sequence = torch.arange(batch, device=v.device)[:, None, None, None]
    head = torch.arange(heads, device=v.device)[:, None, None]
    keys_at, queries_at = (sequence, k_members, head), (sequence, q_members, head)
    # members are in order of position, so the triangle of the kernel is causal in the tokens
    y = attend(q[queries_at].flatten(0, 1), k[keys_at].flatten(0, 1), v[keys_at].flatten(0, 1), is_causal)
    total = torch.zeros_like(v).index_put(queries_at, y.unflatten(0, (batch, heads)), accumulate=True)
    count = v.new_zeros(batch, seq_len, heads, 1).index_put(queries_at, v.new_ones(1), accumulate=True)
    return total / count.clamp(min=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def _flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Each cluster is a sequence of one head."""
    sequences = (t.flatten(0, 1).unsqueeze(2) for t in (q, k, v))
    return flash_attention(*sequences, causal=is_causal).view_as(q)


def _tiled_windows(x: Tensor, v: Tensor, of: Members, positions: Tensor | None) -> Tensor:
    cluster, clusters, window, is_causal, device_type = of
    layout = kmeans_attention.lay_out(cluster, clusters, window, is_causal=is_causal, device_type=device_type)
    rows = rotary(kmeans.unit(x), positions).to(v.dtype)
    y: Tensor = kmeans_attention.Windowed.apply(rows, v, layout)  # type: ignore[no-untyped-call]
    return y


def _flash_windows(x: Tensor, v: Tensor, of: Members, positions: Tensor | None) -> Tensor:
    """Causal only: the kernel aligns the last query of a chunk with its last key."""
    rows = rotary(kmeans.rounded_unit(x), positions)
    return kmeans_flash.cluster_attention(rows, v, of.cluster, of.clusters, of.window)


TILES = Kernels(_tiled_windows, _sdpa)
FLASH = Kernels(_flash_windows, _flash)
"""*Untried* on a device."""
