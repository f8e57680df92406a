"""Cluster-Former: layers of windows alternate with layers of clusters (Wang 2020, arXiv:2009.06097).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, K clusters, m tokens of a
chunk, n chunks.
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
from variants.ops.clustering import kmeans
from variants.ops.patterns import masks
from variants.ops.patterns.pair_counts import window_pairs
from variants.ops.projections import Projections, local_attention, masked_attention


@dataclass(frozen=True, kw_only=True)
class ClusterFormerConfig(VariantConfig):
    """Knobs of Cluster-Former."""

    window: int = knob(128, least=1, unit="tokens")
    """Tokens that a query of a window layer reads on each side, itself included."""
    n_clusters: int = knob(64, least=1, unit="clusters")
    """Clusters of the hidden states of a cluster layer."""
    chunk: int = knob(256, least=1, unit="tokens")
    """Tokens of a chunk of the sorted sequence; the last chunk has the rest."""
    decay: float = knob(0.999, least=0, below=1)
    """Weight of the old centroid in the moving average after a training step."""
    cluster_layers: Literal["odd", "all"] = "odd"
    """Layers that read clusters; the others read windows. Layers are counted from 0, the lowest."""


class ClusterFormer(SequenceMixer):
    """Even layers read a window; odd layers read chunks of the tokens, sorted by cluster.

    A cluster layer compares the hidden state of each token, before projections, with K centroids by cosine,
    and sorts the tokens by the index of the nearest centroid; within a cluster, by position. The sorted
    sequence is cut into chunks of m tokens, and each token reads its chunk. A large cluster therefore fills
    several chunks, and small ones share a chunk. All heads have the same chunks.

    There is no causal form: a later token moves the borders of the chunks of earlier ones. `routing` has
    causal attention within clusters.

    Centroids are unit vectors, initialised at random, and buffers. A forward pass in training mode stores the
    sum of the members of each cluster, and `after_step` moves the centroid towards the direction of this sum.
    A pass that is recomputed stores the same sums again. If a step has several forward passes, the last one
    is used.

    Deviations from the paper: it keeps hidden states in a memory bank, and now and then runs K-means on them,
    where centroids here follow a moving average of the batches. Hidden states are centred and compared by
    cosine, where the paper has inner products. Two of its 24 layers read clusters; here every other one does.
    Window layers have a window around each token, where the paper has overlapping windows at a stride, with
    the question of a reader in front of each. The last chunk is shorter instead of padded.
    Positions are rotary, those of the original sequence.
    """

    Config = ClusterFormerConfig
    config: ClusterFormerConfig
    position_scheme = "rotary"
    no_shared_keys = None
    info = Info(
        paper="Wang et al. 2020, Cluster-Former, arXiv:2009.06097",
        family="learned patterns",
        complexity=Complexity(
            time=1, memory=1, formula="T·(m + log T)", source="survey of Tay 2020, Table 1, N·log N", survey=1
        ),
        caps=Caps(causal=False, bidirectional=True),
    )
    centroids: Tensor
    sums: Tensor

    def __init__(self, config: ClusterFormerConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.reads_clusters = config.cluster_layers == "all" or layer % 2 == 1
        if self.reads_clusters:
            centroids = torch.randn(1, config.n_clusters, dims.d_model, dtype=torch.float32)
            self.register_buffer("centroids", F.normalize(centroids, dim=-1))
            self.register_buffer("sums", torch.zeros_like(centroids), persistent=False)
        else:
            self.flop_overhead_reason = (
                "a block of queries computes scores with all keys of its windows, some of them masked"
            )

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """There is no causal form."""
        if causal:
            return "has no causal form: a later token moves earlier tokens to other chunks"
        return super().no_form(config, causal=causal)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        if self.reads_clusters:
            return MixerOut(self._in_chunks(x, ctx.positions))
        q, k, v = self.projections.split(x, ctx.positions)
        return MixerOut(
            self.projections.merge(local_attention(q, k, v, window=self.config.window, causal=False))
        )

    def _in_chunks(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Attention within chunks of the sorted tokens. Tokens are sorted before they are projected, so that
        one tensor is reordered instead of three."""
        (batch, seq_len, _), chunk = x.shape, self.config.chunk
        cluster, sums = self._nearest(x)
        if self.training:
            self.sums.copy_(sums)
        token = cluster.argsort(dim=-1, stable=True)  # (B, T)
        whole = seq_len // chunk * chunk
        first = torch.arange(batch, device=x.device)[:, None] * seq_len
        # rows of all sequences: first all whole chunks, then the last chunks
        order = _joined(first + token, whole)
        inverse = order.argsort()
        at = _joined(token, whole)
        rows = _reordered(x.flatten(0, 1), order, inverse)
        q, k, v = self.projections.split(rows[None], at if positions is None else positions[at])
        parts = [(0, batch * whole, chunk), (batch * whole, batch * seq_len, seq_len - whole)]
        y = [
            F.scaled_dot_product_attention(
                # (1, H, n·m, D) → (n, H, m, D)
                *(t[0, :, start:stop].unflatten(1, (-1, size)).transpose(0, 1) for t in (q, k, v))
            )
            .transpose(1, 2)
            .flatten(0, 1)
            for start, stop, size in parts
            if stop > start
        ]  # (n·m, H, D)
        merged = self.projections.out(torch.cat(y).flatten(1))
        return _reordered(merged, inverse, order).view(x.shape)

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The cluster of each token (B, T), and the sums of the normalised members (1, K, C)."""
        cluster, sums = kmeans.nearest(x.detach()[:, :, None], self.centroids, self.device_type)
        return cluster[:, 0], sums

    @torch.no_grad()
    def after_step(self) -> None:
        """Move each centroid towards the direction of the members it had in the last forward pass."""
        if self.reads_clusters:
            self.centroids.copy_(kmeans.moved(self.centroids, self.sums, self.config.decay))
            self.sums.zero_()

    def choices(self, x: Tensor, ctx: Context) -> Tensor | None:
        """The cluster of each token (B, T); None in a window layer."""
        return self._nearest(x)[0] if self.reads_clusters else None

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Masked attention; chunks follow from the rank of each token, which counts the tokens before it."""
        self.require_objective(causal=ctx.causal)
        q, k, v = self.projections.split(x, ctx.positions)
        cluster, seq_len = self.choices(x, ctx), x.shape[1]
        if cluster is None:
            allowed = masks.matrix(masks.Window(self.config.window), seq_len)
        else:
            other, position = cluster[:, None, :], torch.arange(seq_len, device=x.device)
            equal_before = (other == cluster[..., None]) & (position < position[:, None])
            rank = ((other < cluster[..., None]) | equal_before).sum(dim=-1)  # (B, T)
            chunk = rank // self.config.chunk
            allowed = (chunk[:, :, None] == chunk[:, None, :])[:, None]
        return self.projections.merge(masked_attention(q, k, v, allowed))

    def cost(self, work: Workload) -> Cost:
        """Projections, and pairs of windows; or dot products with centroids, and pairs of chunks."""
        config, t = self.config, work.seq_len
        last = t % config.chunk
        pairs = (t - last) * config.chunk + last * last
        if not self.reads_clusters:
            pairs = window_pairs(t, config.window, is_causal=False)
        parts = {
            "projections": Projections.flops(work),
            "attention": 4 * work.batch_size * work.inner_dim * pairs,
        }
        if self.reads_clusters:
            parts["clustering"] = 2 * work.batch_size * t * config.n_clusters * work.d_model
        return Cost(parts, gradients={"clustering": 0})

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the keys and values that a further token may read: those of a window, or of all tokens,
        because it can join any cluster."""
        tokens = work.seq_len if self.reads_clusters else min(work.seq_len, self.config.window - 1)
        return 2 * work.batch_size * tokens * work.key_dim * work.element_bytes


def _joined(x: Tensor, whole: int) -> Tensor:
    """(B, T) → (B·T,): the first `whole` entries of each sequence, then the others."""
    return torch.cat([x[:, :whole].flatten(), x[:, whole:].flatten()])


def _reordered(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """The rows of x (N, C) in another order, a permutation."""
    rows: Tensor = _Reorder.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return rows


class _Reorder(torch.autograd.Function):
    """Backward takes rows by the inverse permutation: on a GPU, adding rows has no fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None
