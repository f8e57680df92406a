"""Routing attention: tokens read the tokens of their cluster (Roy 2020, arXiv:2003.05997, §4).

Shapes: B batch, T tokens, C channels, H heads, D = C / H, K clusters a head.
"""

from __future__ import annotations

import math
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
from variants.ops import kmeans, kmeans_attention, masks
from variants.ops.projections import Projections, local_attention, masked_attention, rotary


@dataclass(frozen=True, kw_only=True)
class RoutingConfig(VariantConfig):
    """Knobs of routing attention."""

    n_clusters: int | None = knob(None, least=1, unit="clusters")
    """Clusters of each routed head; null: √T, rounded, for the longest sequence."""
    window: int = knob(128, least=1, unit="tokens")
    """Tokens a query of a local head reads on each side, itself included."""
    cluster_window: int | None = knob(None, least=1, unit="tokens")
    """Members of its cluster that a routed query reads on each side, itself included. For `nearest` alone;
    null: T / n_clusters, rounded up, for the longest sequence."""
    decay: float = knob(0.999, least=0, below=1)
    """Share of a centroid that stays in a training step (the paper's λ)."""
    selection: Literal["auto", "nearest", "topk"] = "auto"
    """How tokens and clusters choose each other. topk: the paper's. Each centroid takes the T / n_clusters
    tokens nearest to it, whichever they are: what a token may read depends on later tokens. nearest: each
    token joins the centroid nearest to it and reads the last `cluster_window` members. auto: nearest where
    causal, else topk."""


class Routing(SequenceMixer):
    """The lower half of the heads reads a local window; the upper half reads clusters.

    A routed head normalises queries and keys without scale or bias (§4.1, Algorithm 1), shares them
    where causal, and gives them rotary positions after clustering them. A token reads itself, as the
    algorithm's triangular mask has it. Centroids are unit vectors, drawn at random, and buffers: a
    forward pass in training mode notes each cluster's sum of members, and `after_step` moves the
    centroid towards its direction. A pass that runs twice notes the same sums twice. With several
    forward passes to a step, the last one counts.

    topk: a token in several clusters puts out the mean over them, as the authors' code has it (the
    paper says "scatter"), one in none puts out zeros. nearest shares queries and keys in both
    directions, since one order has to serve both.

    Deviations from the paper: rotary positions; centroids have unit length and move towards the mean
    direction of their members, where Algorithm 1 adds the sum of members unnormalised; a cluster
    without members stays. `nearest` is ours.
    The package routing-transformer clusters normalised tokens but attends with queries that are not, lets a
    causal token read a learnt key, or nothing, instead of itself, and does not renormalise its centroids.

    The key projection of a routed head is a parameter in every case and unused where keys are shared.
    """

    Config = RoutingConfig
    config: RoutingConfig
    info = Info(
        paper="Roy et al. 2020, Routing Transformer, arXiv:2003.05997",
        family="learned patterns",
        complexity=Complexity(
            time=1.5, memory=1.5, formula="T·√T", source="Roy 2020, abstract and §4.1", survey=1.5
        ),
        caps=Caps(causal=True, bidirectional=True),
    )
    flop_overhead_reason = (
        "a block of queries is given every key that any of them might read, and masks the rest; a cluster "
        "takes whole blocks"
    )
    centroids: Tensor
    sums: Tensor

    def __init__(self, config: RoutingConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims.d_model, dims.heads)
        self.routed = dims.heads // 2
        self.local = dims.heads - self.routed
        self.clusters = config.n_clusters or max(1, round(math.sqrt(dims.seq_len)))
        self.cluster_window = config.cluster_window or -(-dims.seq_len // self.clusters)
        centroids = torch.randn(self.routed, self.clusters, dims.head_dim, dtype=torch.float32)
        self.register_buffer("centroids", F.normalize(centroids, dim=-1))
        self.register_buffer("sums", torch.zeros_like(centroids), persistent=False)

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Half the heads have to be a whole number of them, and clusters are of tokens."""
        assert isinstance(config, RoutingConfig)
        if (config.n_clusters or 1) > dims.seq_len:
            return f"n_clusters={config.n_clusters}: more than tokens; allowed is 1 to {dims.seq_len}"
        if dims.heads % 2:
            return f"heads={dims.heads}: half are local and half routed, so it must be even"
        return super().unsupported(config, dims, causal=causal)

    @classmethod
    def leak(cls, config: VariantConfig) -> str | None:
        """Top-k membership sees the future."""
        assert isinstance(config, RoutingConfig)
        if config.selection != "topk":
            return None
        return "selection=topk: a later token can take an earlier one's place in a cluster"

    def _selection(self, causal: bool) -> str:
        if self.config.selection == "auto":
            return "nearest" if causal else "topk"
        return self.config.selection

    def _split(self, x: Tensor, shared: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(B, T, C) → local q, k and v, routed q, k and v, each (B, T, heads, D), without positions.

        The keys of routed heads come last among the rows of the weight, so that they can be left out.
        """
        head_dim = self.dims.head_dim
        local, routed = self.local * head_dim, self.routed * head_dim
        sizes = [2 * local, local, routed, routed, *([] if shared else [routed])]
        # a product each, because a view of one would keep all of it alive through every backward pass
        qk, *parts = (F.linear(x, w) for w in self.projections.qkv.weight[: sum(sizes)].split(sizes))
        parts = [part.unflatten(-1, (-1, head_dim)) for part in (*qk.split(local, dim=-1), *parts)]
        q, k, v, q_routed, v_routed, *rest = parts
        return q, k, v, q_routed, (rest[0] if rest else q_routed), v_routed

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        selection = self._selection(ctx.causal)
        shared = ctx.causal or selection == "nearest"
        q, k, v, q_routed, k_routed, v_routed = self._split(x, shared)
        q, k = rotary(q, ctx.positions), rotary(k, ctx.positions)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        local = local_attention(q, k, v, window=self.config.window, causal=ctx.causal).transpose(1, 2)
        if selection == "nearest":
            routed = self._by_nearest(q_routed, v_routed, ctx)
        else:
            routed = self._by_topk(q_routed, None if shared else k_routed, v_routed, ctx)
        y: Tensor = self.projections.out(torch.cat([local, routed], dim=2).flatten(2))
        return MixerOut(y)

    def _note(self, *sums: Tensor) -> None:
        """Keep this batch's sums for `after_step`: overwritten, since a pass may be computed again."""
        if self.training:
            self.sums.copy_(sum(sums[1:], start=sums[0]))

    def _by_nearest(self, x: Tensor, v: Tensor, ctx: Context) -> Tensor:
        cluster, sums = kmeans.nearest(x, self.centroids, self.device_type)
        self._note(sums)
        layout = kmeans_attention.lay_out(
            cluster,
            self.clusters,
            self.cluster_window,
            is_causal=ctx.causal,
            device_type=self.device_type,
        )
        rows = rotary(kmeans.unit(x), ctx.positions).to(v.dtype)
        y: Tensor = kmeans_attention.Windowed.apply(rows, v, layout)  # type: ignore[no-untyped-call]
        return y

    def _by_topk(self, x: Tensor, keys: Tensor | None, v: Tensor, ctx: Context) -> Tensor:
        """Queries x, keys (None: the queries), values (B, T, H, D) → (B, T, H, D)."""
        batch, seq_len, heads, _ = v.shape
        q = rotary(kmeans.unit(x), ctx.positions).to(v.dtype)
        k = q if keys is None else rotary(kmeans.unit(keys), ctx.positions).to(v.dtype)
        q_taken, sums = kmeans.members(  # (B, H, K, w)
            x, self.centroids, self._taken(seq_len), self.device_type
        )
        k_taken = q_taken
        if keys is None:
            self._note(sums)
        else:
            k_taken, key_sums = kmeans.members(keys, self.centroids, self._taken(seq_len), self.device_type)
            self._note(sums, key_sums)
        sequence = torch.arange(batch, device=x.device)[:, None, None, None]
        head = torch.arange(heads, device=x.device)[:, None, None]
        reads, puts = (sequence, k_taken, head), (sequence, q_taken, head)
        # in order of position, so the triangle is causal in the tokens too
        y = F.scaled_dot_product_attention(
            q[puts].flatten(0, 1), k[reads].flatten(0, 1), v[reads].flatten(0, 1), is_causal=ctx.causal
        )  # (BH, K, w, D)
        total = torch.zeros_like(v).index_put(puts, y.unflatten(0, (batch, heads)), accumulate=True)
        count = v.new_zeros(batch, seq_len, heads, 1).index_put(puts, v.new_ones(1), accumulate=True)
        return total / count.clamp(min=1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move each centroid towards the direction of the members it had in the last forward pass."""
        decay = self.config.decay
        moved = decay * self.centroids + (1 - decay) * F.normalize(self.sums, dim=-1)
        has_members = self.sums.abs().sum(dim=-1, keepdim=True) > 0
        self.centroids.copy_(torch.where(has_members, F.normalize(moved, dim=-1), self.centroids))
        self.sums.zero_()

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Every head by the oracle; clusters written out as (T, T) maps."""
        selection, seq_len = self._selection(ctx.causal), x.shape[1]
        shared = ctx.causal or selection == "nearest"
        q, k, v, q_routed, k_routed, v_routed = self._split(x, shared)
        rule = masks.Window(self.config.window)
        local = masks.matrix(rule & masks.causal if ctx.causal else rule, seq_len)

        def placed(t: Tensor) -> Tensor:
            return rotary(t, ctx.positions)

        q, k, v = (t.transpose(1, 2) for t in (placed(q), placed(k), v))
        lower = masked_attention(q, k, v, local)

        def normalised(t: Tensor) -> Tensor:
            centred = t - t.mean(dim=-1, keepdim=True)
            return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()

        def closeness(t: Tensor) -> Tensor:  # (B, H, T, K), in float32 as memberships are
            return normalised(t.float()).transpose(1, 2) @ self.centroids.float().transpose(1, 2)

        q, k = (placed(normalised(t)).transpose(1, 2) for t in (q_routed, k_routed))
        v = v_routed.transpose(1, 2)
        before = masks.matrix(masks.causal if ctx.causal else masks.anything, seq_len).to(x.device)
        if selection == "nearest":
            cluster = closeness(q_routed).argmax(dim=-1)  # (B, H, T)
            same = cluster[..., :, None] == cluster[..., None, :]
            index = (same & masks.matrix(masks.causal, seq_len).to(x.device)).sum(dim=-1)
            apart = (index[..., :, None] - index[..., None, :]).abs()  # members between two of a cluster
            upper = masked_attention(q, k, v, same & before & (apart < self.cluster_window))
        else:
            upper, memberships = torch.zeros_like(v), torch.zeros_like(v[..., :1])
            order_q, order_k = (
                closeness(t).argsort(dim=2, descending=True, stable=True)[:, :, : self._taken(seq_len)]
                for t in (q_routed, k_routed)
            )  # (B, H, w, K)
            for c in range(self.clusters):
                asks, answers = (
                    torch.zeros(v.shape[:3], dtype=torch.bool, device=x.device).scatter(
                        2, order[..., c], True
                    )
                    for order in (order_q, order_k)
                )
                # who does not ask reads itself, so that its softmax is defined, and is then left out
                allowed = asks[..., :, None] & answers[..., None, :] & before
                allowed |= ~asks[..., :, None] & torch.eye(seq_len, dtype=torch.bool, device=x.device)
                upper = upper + asks[..., None] * masked_attention(q, k, v, allowed)
                memberships += asks[..., None]
            upper = upper / memberships.clamp(min=1)
        return self.projections.merge(torch.cat([lower, upper], dim=1))

    def _taken(self, seq_len: int) -> int:
        """Tokens that a centroid takes in `topk`."""
        return -(-seq_len // self.clusters)

    def cost(self, work: Workload) -> Cost:
        """The local half by its window. The routed half: dot products with the centroids, and
        topk: all pairs within each cluster; nearest: as many pairs as its rule can allow, which it
        does where no cluster is smaller than the window."""
        t, selection = work.seq_len, self._selection(work.causal)
        shared = work.causal or selection == "nearest"
        projected = (3.5 if shared else 4) * work.d_model**2
        if selection == "nearest":
            pairs = masks.window_pairs(t, self.cluster_window, is_causal=work.causal)
        else:
            pairs = self.clusters * masks.window_pairs(self._taken(t), t, is_causal=work.causal)
        local = masks.window_pairs(t, self.config.window, is_causal=work.causal)
        routing = (1 if shared else 2) * t * self.clusters
        each = work.batch_size * work.head_dim
        return Cost(
            {
                "projections": int(2 * work.batch_size * t * projected),
                "clustering": 2 * each * self.routed * routing,
                "attention": 4 * each * (self.local * local + self.routed * pairs),
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """Keys and values that the next token may read beside its own: of a local head, the last window − 1
        tokens; of a routed head, as many members of each cluster. In topk a later token can bring back any
        earlier one, so all."""
        members = self.clusters * (self.cluster_window - 1)
        routed = work.seq_len if self.config.selection == "topk" else min(work.seq_len, members)
        tokens = self.local * min(work.seq_len, self.config.window - 1) + self.routed * routed
        return 2 * work.batch_size * tokens * work.head_dim * work.element_bytes
