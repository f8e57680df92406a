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

from variants.ops.clustering import kmeans, kmeans_attention, kmeans_flash
from variants.ops.fused.flash import flash_attention
from variants.ops.projections import rotary


class Rule(NamedTuple):
    """Which tokens a token reads."""

    centroids: Tensor
    """(H, K, D)"""
    size: int
    """Members of its cluster that a token reads on each side, itself included; for `by_topk` all, w."""
    is_causal: bool
    positions: Tensor | None
    """(T,); None: 0 … T − 1."""
    rotary_base: float
    device_type: str
    layer: int = 0
    """Number of the layer, which decides what `by_position` draws."""


@dataclass(frozen=True)
class Kernels:
    """One way of computing attention within clusters."""

    windows: Callable[[Tensor, Tensor, Tensor, Rule], Tensor]
    """Shared queries and keys, which are not normalised yet, and values (B, T, H, D); the cluster of each
    token (B, H, T) → (B, T, H, D). A token reads a window of the members of its cluster."""
    attend: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    """Queries, keys and values of clusters of equal size (BH, K, w, D); whether causal → (BH, K, w, D)."""


def by_nearest(x: Tensor, _: Tensor, v: Tensor, rule: Rule, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Each token joins the nearest centroid. Shared queries and keys x, and values (B, T, H, D) → outputs,
    and the sum of the normalised members of each cluster (H, K, D)."""
    cluster, sums = kmeans.nearest(x, rule.centroids, rule.device_type)
    return kernels.windows(x, v, cluster, rule), sums


def by_position(x: Tensor, _: Tensor, v: Tensor, rule: Rule, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Each token joins a cluster that is drawn from its position. Arguments and outputs as `by_nearest`; the
    sums are 0, so that no centroid moves."""
    batch, seq_len, heads = x.shape[:3]
    drawn = random_clusters(seq_len, heads, rule.centroids.shape[1], rule.layer, x.device)
    cluster = drawn.expand(batch, -1, -1).contiguous()
    return kernels.windows(x, v, cluster, rule), torch.zeros_like(rule.centroids)


WORD = 2**32 - 1


def random_clusters(seq_len: int, heads: int, clusters: int, layer: int, device: torch.device) -> Tensor:
    """(H, T) int64 in [0, K): a pseudo-random number of each head and position of a layer.

    It is a hash, the finaliser of MurmurHash3, rather than a generator: it needs no state, so a recomputed
    layer, a prefix and a longer sequence have the same clusters.
    """
    position = torch.arange(seq_len, device=device)
    head = torch.arange(heads, device=device)[:, None]
    key = torch.bitwise_and(position * 0x9E3779B1 + head * 0x85EBCA77 + (layer + 1) * 0xC2B2AE3D, WORD)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        key = torch.bitwise_and(torch.bitwise_xor(key, key >> shift) * factor, WORD)
    key = torch.bitwise_xor(key, key >> 16)
    return key * clusters >> 32


def by_topk(x: Tensor, keys: Tensor, v: Tensor, rule: Rule, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Each centroid selects w tokens. Queries x, keys (the same tensor if they are shared) and values
    (B, T, H, D) → outputs and sums as `by_nearest`.

    The output of a token is the mean over its clusters; 0 if it has none.
    """
    (batch, seq_len, heads, _), device = v.shape, v.device
    q = rotary(kmeans.unit(x), rule.positions, rule.rotary_base).to(v.dtype)
    k = q if keys is x else rotary(kmeans.unit(keys), rule.positions, rule.rotary_base).to(v.dtype)
    q_members, sums = kmeans.members(x, rule.centroids, rule.size, rule.device_type)  # (B, H, K, w)
    k_members = q_members
    if keys is not x:
        k_members, key_sums = kmeans.members(keys, rule.centroids, rule.size, rule.device_type)
        sums = sums + key_sums
    sequence = torch.arange(batch, device=device)[:, None, None, None]
    head = torch.arange(heads, device=device)[:, None, None]
    keys_at, queries_at = (sequence, k_members, head), (sequence, q_members, head)
    # members are in order of position, so the triangle of the kernel is causal in the tokens
    y = kernels.attend(
        q[queries_at].flatten(0, 1), k[keys_at].flatten(0, 1), v[keys_at].flatten(0, 1), rule.is_causal
    )  # (BH, K, w, D)
    total = torch.zeros_like(v).index_put(queries_at, y.unflatten(0, (batch, heads)), accumulate=True)
    count = v.new_zeros(batch, seq_len, heads, 1).index_put(queries_at, v.new_ones(1), accumulate=True)
    return total / count.clamp(min=1), sums


ASSIGNMENTS = {"nearest": by_nearest, "topk": by_topk, "random": by_position}
"""Selection → the function that assigns tokens to clusters, and attends."""


def _sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def _flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Each cluster is a sequence of one head."""
    sequences = (t.flatten(0, 1).unsqueeze(2) for t in (q, k, v))
    return flash_attention(*sequences, causal=is_causal).view_as(q)


def _tiled_windows(x: Tensor, v: Tensor, cluster: Tensor, rule: Rule) -> Tensor:
    centroids, size, is_causal, positions, base, device_type, _ = rule
    layout = kmeans_attention.lay_out(
        cluster, centroids.shape[1], size, is_causal=is_causal, device_type=device_type
    )
    rows = rotary(kmeans.unit(x), positions, base).to(v.dtype)
    y: Tensor = kmeans_attention.Windowed.apply(rows, v, layout)  # type: ignore[no-untyped-call]
    return y


def _flash_windows(x: Tensor, v: Tensor, cluster: Tensor, rule: Rule) -> Tensor:
    """Causal only: the kernel aligns the last query of a chunk with its last key."""
    rows = rotary(kmeans.rounded_unit(x), rule.positions, rule.rotary_base)
    return kmeans_flash.cluster_attention(rows, v, cluster, rule.centroids.shape[1], rule.size)


TILES = Kernels(_tiled_windows, _sdpa)
FLASH = Kernels(_flash_windows, _flash)
"""*Untried* on a device."""
