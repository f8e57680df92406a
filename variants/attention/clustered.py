"""Clustered attention: attention once for each cluster of queries (Vyas 2020, arXiv:2007.04825).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, K clusters, k exact keys of a cluster, s
queries of a tile, n tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.base import (
    Caps,
    Complexity,
    Context,
    Cost,
    Dims,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.clustering import hamming
from variants.ops.projections import Projections, masked_attention, rotary


@dataclass(frozen=True, kw_only=True)
class ClusteredConfig(VariantConfig):
    """Knobs of clustered attention."""

    clusters: int = knob(100, least=1, unit="clusters")
    """Clusters of the queries of each head; a shorter sequence has one for each token."""
    form: Literal["improved", "plain"] = "improved"
    """Weights of a query. plain: those of the mean query of its cluster. improved: the same, but the keys
    with the largest of them have the query's own weights among themselves."""
    keys: int = knob(32, least=1, unit="keys")
    """Keys of each cluster for which form=improved computes own weights; else not used."""
    bits: int = knob(63, least=1, unit="bits")
    """Random projections whose signs are compared when queries are clustered."""
    steps: int = knob(10, least=1, unit="steps")
    """Steps of K-means in every forward pass."""


class Clustered(SequenceMixer):
    """Queries are clustered by K-means on the signs of random projections; clusters attend.

    plain: the mean query of each cluster attends to all keys, and all members get its result. improved: of
    the mean query's weights, those of its k largest keys are distributed again, in proportion to the exact
    weights of each member; their sum is kept.

    There is no causal form. A cluster has later queries in its mean, and they also decide its members. In a
    causal mask for each query, the largest keys and the sum of their weights would still follow from them.

    Deviations from the paper: positions are rotary. Queries are clustered before they are rotated, by
    content, and their means are taken of rotated queries. Centroids start from the bits of tokens at equal
    distances. Projections are fixed when the layer is built, not drawn anew.
    """

    Config = ClusteredConfig
    config: ClusteredConfig
    position_scheme = "rotary"
    info = Info(
        paper="Vyas et al. 2020, Fast Transformers with Clustered Attention, arXiv:2007.04825",
        family="learned patterns",
        complexity=Complexity(time=1, memory=1, formula="T·K", source="Vyas 2020, abstract"),
        caps=Caps(causal=False, bidirectional=True),
    )
    planes: Tensor

    def __init__(self, config: ClusteredConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        planes = torch.randn(dims.heads, dims.head_dim, config.bits, dtype=torch.float32)
        self.register_buffer("planes", planes)
        if config.form == "improved":
            self.flop_overhead_reason = "tiles of the queries of a cluster are padded to their size"

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """There is no causal form."""
        if causal:
            return "has no causal form: the mean query of a cluster has later queries in it"
        return super().no_form(config, causal=causal)

    def _split(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, T, C) → queries without positions, queries, keys and values (B, H, T, D)."""
        base = self.dims.rotary_base
        w_qk, w_v = self.projections.qkv.weight.split([2 * self.dims.inner_dim, self.dims.inner_dim])
        raw = F.linear(x, w_qk).unflatten(-1, (2, self.dims.heads, -1))
        q, k = rotary(raw, positions, base).unbind(2)
        v = F.linear(x, w_v).unflatten(-1, (self.dims.heads, -1))
        content, q, k, v = (t.transpose(1, 2) for t in (raw[:, :, 0], q, k, v))
        return content, q, k, v

    def _clusters(self, content: Tensor) -> Tensor:
        config = self.config
        return hamming.hamming_clusters(
            content.detach(), self.planes, config.clusters, config.steps, self.device_type
        )

    def _mean_queries(self, q: Tensor, cluster: Tensor) -> Tensor:
        """(B, H, T, D) → (B, H, K, D); 0 without members."""
        wide = torch.promote_types(q.dtype, torch.float32)
        clusters = min(self.config.clusters, q.shape[2])
        shape = (*q.shape[:2], clusters, q.shape[3])
        total = q.new_zeros(shape, dtype=wide).scatter_add(2, cluster[..., None].expand_as(q), q.to(wide))
        count = q.new_zeros(shape[:3], dtype=wide).scatter_add(
            2, cluster, q.new_ones(cluster.shape, dtype=wide)
        )
        return (total / count.clamp(min=1)[..., None]).to(q.dtype)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        content, q, k, v = self._split(x, ctx.positions)
        cluster = self._clusters(content)
        means = self._mean_queries(q, cluster)
        if self.config.form == "plain":
            y = F.scaled_dot_product_attention(means, k, v)
            return MixerOut(self.projections.merge(_of_cluster(y, cluster)))
        weights = ((means * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1)  # (B, H, K, T)
        top = weights.detach().topk(min(self.config.keys, x.shape[1]), dim=-1).indices  # (B, H, K, k)
        large = weights.gather(-1, top).to(v.dtype)
        top_k, top_v = (_rows(t, top.flatten(2)).unflatten(2, top.shape[2:]) for t in (k, v))
        rest = weights.to(v.dtype) @ v - (large[..., None, :] @ top_v).squeeze(-2)  # (B, H, K, D)
        tiles = _Tiles(cluster, means.shape[2])
        own = F.scaled_dot_product_attention(
            tiles.queries(q), tiles.of_cluster(top_k), tiles.of_cluster(top_v)
        )
        mass = large.sum(-1, keepdim=True)
        y = _of_cluster(rest, cluster) + _of_cluster(mass, cluster) * tiles.by_token(own)
        return MixerOut(self.projections.merge(y))

    def choices(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """The cluster of each query (B, H, T); improved: the exact keys of each cluster (B, H, K, k)."""
        content, q, k, _ = self._split(x, ctx.positions)
        cluster = self._clusters(content)
        scores = (self._mean_queries(q, cluster) * q.shape[-1] ** -0.5) @ k.mT
        return cluster, scores.softmax(dim=-1).topk(min(self.config.keys, x.shape[1]), dim=-1).indices

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The (T, T) weights of each query, from those of its cluster and its own."""
        self.require_objective(causal=ctx.causal)
        cluster, top = self.choices(x, ctx)
        q, k, v = self.projections.split(x, ctx.positions)
        number = min(self.config.clusters, x.shape[1])
        member = F.one_hot(cluster, number).to(q.dtype)  # (B, H, T, K)
        means = torch.einsum("bhtk,bhtd->bhkd", member, q) / member.sum(2).clamp(min=1)[..., None]
        scale = q.shape[-1] ** -0.5
        shared = (torch.einsum("bhkd,bhtd->bhkt", means, k) * scale).softmax(dim=-1)
        weights = torch.einsum("bhtk,bhkj->bhtj", member, shared)
        if self.config.form == "improved":
            is_large = torch.zeros_like(shared).scatter(-1, top, 1.0)
            is_large = torch.einsum("bhtk,bhkj->bhtj", member, is_large) > 0.5
            own = (torch.einsum("bhid,bhjd->bhij", q, k) * scale).masked_fill(~is_large, float("-inf"))
            mass = (weights * is_large).sum(dim=-1, keepdim=True)
            weights = torch.where(is_large, mass * own.softmax(dim=-1), weights)
        return self.projections.merge(torch.einsum("bhij,bhjd->bhid", weights, v))

    def softmax_target(self, x: Tensor, ctx: Context) -> Tensor:
        """Softmax attention of every query."""
        q, k, v = self.projections.split(x, ctx.positions)
        everything = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        return self.projections.merge(masked_attention(q, k, v, everything))

    def cost(self, work: Workload) -> Cost:
        """Projections; bits and distances; attention of K means to T keys; improved: the k largest of them
        are taken out, and each query reads k keys."""
        config, t = self.config, work.seq_len
        clusters, keys = min(config.clusters, t), min(config.keys, t)
        pairs = 2 * clusters * t
        if config.form == "improved":
            pairs += clusters * keys + 2 * t * keys
        each = work.batch_size, work.heads, t, work.head_dim
        return Cost(
            {
                "projections": Projections.flops(work),
                "clustering": hamming.flops(*each, config.bits, clusters, config.steps),
                "attention": 2 * work.batch_size * work.inner_dim * pairs,
            },
            gradients={"clustering": 0},
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the queries, keys and values of all tokens: a further token moves the clusters."""
        return 3 * work.batch_size * work.seq_len * work.inner_dim * work.element_bytes


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, H, N, …) by index (B, H, n) → (B, H, n, …)."""
    shape = index.view(*index.shape, *[1] * (x.dim() - 3)).expand(*index.shape, *x.shape[3:])
    return x.gather(2, shape)


def _of_cluster(x: Tensor, cluster: Tensor) -> Tensor:
    """What a cluster has (B, H, K, D), for each of its tokens: (B, H, T, D)."""
    return _rows(x, cluster)


class _Tiles:
    """Tiles of the queries of one cluster each: as many as suffice for clusters of any sizes."""

    def __init__(self, cluster: Tensor, clusters: int) -> None:
        batch, heads, seq_len = cluster.shape
        self.size = max(1, seq_len // (2 * clusters))
        count = (seq_len + clusters * (self.size - 1)) // self.size
        position = torch.arange(seq_len, device=cluster.device)
        by_cluster, order = cluster.sort(dim=-1, stable=True)
        members = cluster.new_zeros(batch, heads, clusters).scatter_add(-1, cluster, torch.ones_like(cluster))
        rank = position - (members.cumsum(-1) - members).gather(-1, by_cluster)
        needed = (members + self.size - 1) // self.size
        first = (needed.cumsum(-1) - needed) * self.size
        self.slot = torch.empty_like(cluster).scatter(-1, order, first.gather(-1, by_cluster) + rank)
        empty = cluster.new_zeros(batch, heads, count * self.size)  # empty slots hold the first token
        self.token = empty.scatter(-1, self.slot, position.expand_as(cluster))
        self.cluster = empty[..., :count].scatter(-1, self.slot // self.size, cluster)

    def queries(self, q: Tensor) -> Tensor:
        """(B, H, T, D) → (B·H, n, s, D)."""
        tiles: Tensor = _rows(q, self.token).unflatten(2, (-1, self.size)).flatten(0, 1)
        return tiles

    def of_cluster(self, x: Tensor) -> Tensor:
        """(B, H, K, k, D) → (B·H, n, k, D)."""
        return _rows(x, self.cluster).flatten(0, 1)

    def by_token(self, y: Tensor) -> Tensor:
        """(B·H, n, s, D) → (B, H, T, D)."""
        slots: Tensor = y.unflatten(0, self.slot.shape[:2]).flatten(2, 3)
        return _rows(slots, self.slot)
