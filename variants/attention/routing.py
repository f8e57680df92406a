"""Routing attention: tokens read the tokens of their cluster (Roy 2020, arXiv:2003.05997, §4).

Over 300 lines: four ways of selecting clusters share their projections, state and cost.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, K clusters of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.base import (
    Caps,
    Clock,
    Complexity,
    Context,
    Cost,
    DecodingState,
    Dims,
    Impl,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.clustering import clusters, kmeans
from variants.ops.clustering.bucket_cache import BucketCache, bucket_cache_bytes
from variants.ops.clustering.clusters import Kernels
from variants.ops.fused.flash import missing_flash
from variants.ops.fused.flash_windows import window_attention
from variants.ops.key_cache import KeyCache, cache_bytes
from variants.ops.patterns import masks
from variants.ops.patterns.pair_counts import window_pairs
from variants.ops.projections import Projections, local_attention, masked_attention, rotary, rotary_next


@dataclass(frozen=True, kw_only=True)
class RoutingConfig(VariantConfig):
    """Knobs of routing attention."""

    n_clusters: int | None = knob(None, least=1, unit="clusters")
    """Clusters of each routed head; null: √T, rounded, for the maximum sequence length T."""
    window: int = knob(128, least=1, unit="tokens")
    """Tokens that a query of a local head reads on each side, itself included."""
    cluster_window: int | None = knob(None, least=1, unit="tokens")
    """Members of its cluster that a routed query reads on each side, itself included. Not used by
    `topk`; null: T / n_clusters, rounded up, for the maximum sequence length T."""
    decay: float = knob(0.999, least=0, below=1)
    """Weight of the old centroid in the moving average after a training step (the paper's λ)."""
    selection: Literal["auto", "nearest", "topk", "random"] = "auto"
    """Assignment of tokens to clusters. topk: as in the paper, each centroid selects the T / n_clusters
    tokens nearest to it, so the keys of a token depend on later tokens. nearest: each token joins the
    centroid nearest to it, and reads the last `cluster_window` members. random: as nearest, but the cluster
    of a token is drawn from its position; the baseline of routing by content. auto: nearest if causal, else
    topk."""
    impl: Literal["auto", "tiles", "flash"] = knob("auto", younger=True)
    """Implementation of attention. tiles: windows and clusters in tiles by torch's operations, on any device.
    flash: flash attention, on CUDA in half precision; untried. auto: tiles."""


QKV = tuple[Tensor, Tensor, Tensor]  # (B, T, heads, D) each


def tiles(layer: Routing, local: QKV, routed: QKV, ctx: Context) -> Tensor:
    """Blocks of queries with all keys of their windows, and clusters in tiles or side by side."""
    q, k, v = (t.transpose(1, 2) for t in local)
    lower = local_attention(q, k, v, window=layer.config.window, causal=ctx.causal).transpose(1, 2)
    return torch.cat([lower, layer.in_clusters(*routed, ctx, clusters.TILES)], dim=2)


def flash(layer: Routing, local: QKV, routed: QKV, ctx: Context) -> Tensor:
    """Flash attention in windows and in clusters. *Untried*: no device has run it yet."""
    lower = window_attention(*local, window=layer.config.window, dilations=[1], causal=ctx.causal)
    return torch.cat([lower, layer.in_clusters(*routed, ctx, clusters.FLASH)], dim=2)


class Routing(SequenceMixer):
    """The lower half of the heads reads a local window; the upper half reads clusters.

    A routed head normalises queries and keys without scale or bias (§4.1, Algorithm 1), shares them if
    causal, and applies rotary positions after clustering. A token reads itself, as in the triangular mask of
    the algorithm. Centroids are unit vectors, initialised at random, and buffers. A forward pass in training
    mode stores the sum of the members of each cluster, and `after_step` moves the centroid towards the
    direction of this sum. A pass that is recomputed stores the same sums again. If a step has several forward
    passes, the last one is used.

    topk: the output of a token in several clusters is the mean over them, as in the authors' code (the paper
    says "scatter"). The output of a token in no cluster is 0. nearest: queries and keys are shared also in
    bidirectional models, because they need one common order.

    random: the paper's Random Transformer has random heads instead of routed ones (Table 1). Here the cluster
    of a position is fixed for each layer and head, and read as in `nearest`; centroids are not used.

    Deviations from the paper: positions are rotary. Centroids have unit length and move towards the mean
    direction of their members; Algorithm 1 adds the unnormalised sum of the members. A cluster without
    members does not move. `nearest` is not in the paper. The package routing-transformer clusters normalised
    tokens, but computes attention with queries that are not normalised. In causal models its tokens read a
    learned key, or nothing, instead of themselves. It does not normalise centroids again.

    The key projection of a routed head is not used if keys are shared.
    """

    Config = RoutingConfig
    config: RoutingConfig
    position_scheme = "rotary"
    info = Info(
        paper="Roy et al. 2020, Routing Transformer, arXiv:2003.05997",
        family="learned patterns",
        complexity=Complexity(
            time=1.5, memory=1.5, formula="T·√T", source="Roy 2020, abstract and §4.1", survey=1.5
        ),
        caps=Caps(causal=True, bidirectional=True),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "tiles": Impl(
            run=tiles,
            flop_overhead_reason=(
                "a block of queries computes scores with all keys that any of its queries may read, some "
                "masked; a cluster is padded to whole blocks"
            ),
            auto_on=("cpu", Impl.OTHER_DEVICES),
        ),
        "flash": Impl(run=flash, missing=missing_flash, has_shape_functions=True, untried=True),
    }
    centroids: Tensor
    sums: Tensor

    def __init__(self, config: RoutingConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.routed = dims.heads // 2
        self.local = dims.heads - self.routed
        self.clusters = config.n_clusters or max(1, round(math.sqrt(dims.seq_len)))
        self.cluster_window = config.cluster_window or -(-dims.seq_len // self.clusters)
        centroids = torch.randn(self.routed, self.clusters, dims.head_dim, dtype=torch.float32)
        self.register_buffer("centroids", F.normalize(centroids, dim=-1))
        self.register_buffer("sums", torch.zeros_like(centroids), persistent=False)

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """The number of heads must be even, and there cannot be more clusters than tokens."""
        assert isinstance(config, RoutingConfig)
        if (config.n_clusters or 1) > dims.seq_len:
            return f"n_clusters={config.n_clusters}: larger than seq_len; allowed is 1 to {dims.seq_len}"
        if dims.heads % 2:
            return f"heads={dims.heads}: half are local and half routed, so it must be even"
        if config.impl == "flash" and config.selection in ("nearest", "random") and not causal:
            return f"impl=flash: selection={config.selection} is causal; use selection=topk or impl=auto"
        return super().unsupported(config, dims, causal=causal)

    @classmethod
    def leak(cls, config: VariantConfig) -> str | None:
        """The membership of `topk` depends on later tokens."""
        assert isinstance(config, RoutingConfig)
        if config.selection != "topk":
            return None
        return "selection=topk: a later token can replace an earlier token in a cluster"

    def _selection(self, causal: bool) -> str:
        if self.config.selection == "auto":
            return "nearest" if causal else "topk"
        return self.config.selection

    def _shares_keys(self, causal: bool) -> bool:
        """Whether the keys of routed heads are their queries."""
        return causal or self._selection(causal) != "topk"

    def _split(self, x: Tensor, shared: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(B, T, C) → q, k and v of local heads, and q, k and v of routed heads; each (B, T, heads, D).

        Positions are not applied yet. The keys of routed heads are the last rows of the weight, so that they
        can be left out if keys are shared.
        """
        head_dim = self.dims.head_dim
        local, routed = self.local * head_dim, self.routed * head_dim
        sizes = [2 * local, local, routed, routed, *([] if shared else [routed])]
        # separate products: views of one product would keep all of it in memory until the backward pass
        qk, *parts = (F.linear(x, w) for w in self.projections.qkv.weight[: sum(sizes)].split(sizes))
        parts = [part.unflatten(-1, (-1, head_dim)) for part in (*qk.split(local, dim=-1), *parts)]
        q, k, v, q_routed, v_routed, *k_routed = parts
        return q, k, v, q_routed, (k_routed[0] if k_routed else q_routed), v_routed

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v, q_routed, k_routed, v_routed = self._split(x, self._shares_keys(ctx.causal))
        q, k = (self._turned(part, ctx) for part in (q, k))
        y = self.run_impl(self, (q, k, v), (q_routed, k_routed, v_routed), ctx)
        return MixerOut(self.projections.out(y.flatten(2)))

    def _turned(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, T, …, D) with rotary positions."""
        return rotary(x, ctx.positions, self.dims.rotary_base)

    def in_clusters(self, x: Tensor, keys: Tensor, v: Tensor, ctx: Context, kernels: Kernels) -> Tensor:
        """Queries x, keys (the same tensor if they are shared) and values (B, T, H, D) → (B, T, H, D).

        Stores the sums of this batch for `after_step`; they are not added up, because a pass may run twice.
        """
        selection = self._selection(ctx.causal)
        size = self._cluster_size(x.shape[1]) if selection == "topk" else self.cluster_window
        rule = clusters.Rule(
            self.centroids,
            size,
            ctx.causal,
            ctx.positions,
            self.dims.rotary_base,
            self.device_type,
            self.layer,
        )
        y, sums = clusters.ASSIGNMENTS[selection](x, keys, v, rule, kernels)
        if self.training:
            self.sums.copy_(sums)
        return y

    @torch.no_grad()
    def after_step(self) -> None:
        """Move each centroid towards the direction of the members it had in the last forward pass."""
        self.centroids.copy_(kmeans.moved(self.centroids, self.sums, self.config.decay))
        self.sums.zero_()

    def choices(self, x: Tensor, ctx: Context) -> tuple[Tensor, ...]:
        """topk: queries and keys that each centroid selects (B, H, w, K). Else: clusters (B, H, T)."""
        selection, (batch, seq_len, _) = self._selection(ctx.causal), x.shape
        if selection == "random":
            drawn = clusters.random_clusters(seq_len, self.routed, self.clusters, self.layer, x.device)
            return (drawn.expand(batch, -1, -1),)
        *_, q, k, _ = self._split(x, self._shares_keys(ctx.causal))

        def similarity(t: Tensor) -> Tensor:  # (B, H, T, K), float32, because it decides membership
            with torch.autocast(t.device.type, enabled=False):
                return _normalised(t.float()).transpose(1, 2) @ self.centroids.float().transpose(1, 2)

        if selection == "nearest":
            return (similarity(q).argmax(dim=-1),)
        orders = (similarity(t).argsort(dim=2, descending=True, stable=True) for t in (q, k))
        return tuple(order[:, :, : self._cluster_size(seq_len)] for order in orders)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Masked attention for every head, with clusters as (T, T) masks."""
        selection, seq_len = self._selection(ctx.causal), x.shape[1]
        q, k, v, q_routed, k_routed, v_routed = self._split(x, self._shares_keys(ctx.causal))
        rule = masks.Window(self.config.window)
        local = masks.matrix(rule & masks.causal if ctx.causal else rule, seq_len)
        q, k, v = (t.transpose(1, 2) for t in (self._turned(q, ctx), self._turned(k, ctx), v))
        lower = masked_attention(q, k, v, local)
        q, k = (self._turned(_normalised(t), ctx).transpose(1, 2) for t in (q_routed, k_routed))
        v = v_routed.transpose(1, 2)
        before = masks.matrix(masks.causal if ctx.causal else masks.all_keys, seq_len).to(x.device)
        if selection != "topk":
            (cluster,) = self.choices(x, ctx)  # (B, H, T)
            same = cluster[..., :, None] == cluster[..., None, :]
            index = (same & masks.matrix(masks.causal, seq_len).to(x.device)).sum(dim=-1)
            distance = (index[..., :, None] - index[..., None, :]).abs()  # in members of the cluster
            upper = masked_attention(q, k, v, same & before & (distance < self.cluster_window))
        else:
            upper, memberships = torch.zeros_like(v), torch.zeros_like(v[..., :1])
            orders = self.choices(x, ctx)  # of queries and of keys (B, H, w, K)
            nobody = torch.zeros(v.shape[:3], dtype=torch.bool, device=x.device)
            for c in range(self.clusters):
                is_query, is_key = (nobody.scatter(2, order[..., c], True) for order in orders)
                # a token that is no query of this cluster reads itself, which is multiplied by 0 below
                allowed = is_query[..., :, None] & is_key[..., None, :] & before
                allowed |= ~is_query[..., :, None] & torch.eye(seq_len, dtype=torch.bool, device=x.device)
                upper = upper + is_query[..., None] * masked_attention(q, k, v, allowed)
                memberships += is_query[..., None]
            upper = upper / memberships.clamp(min=1)
        return self.projections.merge(torch.cat([lower, upper], dim=1))

    @classmethod
    def no_decoding(cls, config: VariantConfig) -> str | None:
        """A member must stay one when later tokens come."""
        if reason := super().no_decoding(config):
            return reason
        return f"has no form for decoding: {leak}" if (leak := cls.leak(config)) else None

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> RoutingState:
        """The windows of local heads, and the tokens of routed heads with their clusters."""
        device, head_dim = self.centroids.device, self.dims.head_dim
        local = (batch_size, self.local, head_dim)
        routed = (1, batch_size, self.routed, head_dim)
        return RoutingState(
            KeyCache(self._local_rule, local, max_len, clock=clock, dtype=dtype, device=device),
            BucketCache(routed, max_len, clock=clock, dtype=dtype, device=device),
        )

    @property
    def _local_rule(self) -> masks.Rule:
        return masks.Window(self.config.window) & masks.causal

    def step(self, x: Tensor, state: RoutingState) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence, other tokens one by one."""
        clock, tokens = state.clock, x.shape[1]
        q, k, v, raw, _, v_routed = self._split(x, True)
        q, k = (rotary_next(part, clock, self.dims.rotary_base) for part in (q, k))
        keys = rotary_next(kmeans.unit(raw), clock, self.dims.rotary_base).to(v.dtype)
        if self._selection(True) == "random":
            drawn = clusters.random_clusters(
                clock.position + tokens, self.routed, self.clusters, self.layer, x.device
            )
            cluster = drawn[:, clock.position :].expand(x.shape[0], -1, -1)
        else:
            cluster = kmeans.nearest(raw, self.centroids, self.device_type)[0]  # (B, H, n)
        local = [t.transpose(1, 2) for t in (q, k, v)]
        rows, values = keys.transpose(1, 2), v_routed.transpose(1, 2)
        if clock.position == 0 and tokens > 1:
            ctx = Context(causal=True)
            y = self.run_impl(self, (q, k, v), (raw, raw, v_routed), ctx)
            state.local.write(*local[1:])
            state.routed.write(rows, values, cluster[None])
        else:
            state.routed.write(rows, values, cluster[None])
            upper = [
                state.routed.attend(
                    rows[:, :, t],
                    cluster[None, ..., t],
                    self.cluster_window - 1,
                    t,
                    (rows[:, :, t], values[:, :, t]),
                    itself=True,
                )
                for t in range(tokens)
            ]
            lower = state.local.attend(*local).transpose(1, 2)
            y = torch.cat([lower, torch.stack(upper, dim=1)], dim=2)
        merged: Tensor = self.projections.out(y.flatten(2))
        return merged

    def decoding_bytes(self, work: Workload) -> int:
        """Windows of local heads; all tokens of routed heads, because any of them may be read."""
        numbers = 2 * work.batch_size * work.head_dim * work.element_bytes
        routed = (1, work.batch_size, self.routed, work.head_dim)
        return cache_bytes(self._local_rule, self.local, work.seq_len, numbers) + bucket_cache_bytes(
            routed, work.seq_len, work.element_bytes
        )

    def _cluster_size(self, seq_len: int) -> int:
        """Number of tokens that a centroid selects in `topk`."""
        return -(-seq_len // self.clusters)

    def cost(self, work: Workload) -> Cost:
        """Projections, windows of local heads, dot products with centroids (none if random), and pairs within
        clusters: all for topk, else a maximum, which is exact if no cluster is smaller than the window."""
        t, selection = work.seq_len, self._selection(work.causal)
        shared = self._shares_keys(work.causal)
        pairs = window_pairs(t, self.cluster_window, is_causal=work.causal)
        if selection == "topk":
            pairs = self.clusters * window_pairs(self._cluster_size(t), t, is_causal=work.causal)
        local = window_pairs(t, self.config.window, is_causal=work.causal)
        routing = 0 if selection == "random" else (1 if shared else 2) * t * self.clusters
        each = work.batch_size * work.head_dim
        return Cost(
            {
                "projections": int(
                    2 * work.batch_size * t * (3.5 if shared else 4) * work.d_model * work.inner_dim
                ),
                "clustering": 2 * each * self.routed * routing,
                "attention": 4 * each * (self.local * local + self.routed * pairs),
            },
            gradients={"clustering": 0},
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the keys and values that the next token may read beside its own. Local heads: window − 1
        tokens. Routed heads: cluster_window − 1 members of each cluster; for topk all tokens, because a later
        token can move any earlier token into a cluster."""
        members = self.clusters * (self.cluster_window - 1)
        routed = work.seq_len if self.config.selection == "topk" else min(work.seq_len, members)
        tokens = self.local * min(work.seq_len, self.config.window - 1) + self.routed * routed
        return 2 * work.batch_size * tokens * work.head_dim * work.element_bytes


class RoutingState(DecodingState):
    """The windows of local heads, and the tokens of routed heads."""

    def __init__(self, local: KeyCache, routed: BucketCache) -> None:
        super().__init__(local.clock, local.max_len)
        self.local, self.routed = local, routed

    def parts(self) -> tuple[DecodingState, ...]:
        """Both."""
        return self.local, self.routed


def _normalised(t: Tensor) -> Tensor:
    """Normalise the last dimension to mean 0 and variance 1: readable, for the reference."""
    centred = t - t.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
