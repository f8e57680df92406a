"""Infini-attention: local attention and a compressive memory (Munkhdalai 2024, arXiv:2404.07143).

Shapes: B batch, T tokens, C channels, H heads, K heads of keys, D channels of a head, s tokens of a segment,
n segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import (
    Caps,
    Clock,
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
from variants.ops.chosen.block_means import own_pairs
from variants.ops.projections import Projections, masked_attention, rotary, rotary_next
from variants.ops.segments import segment_memory
from variants.ops.segments.segment_memory_state import InfiniState

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class InfiniConfig(VariantConfig):
    """Knobs of the memory."""

    segment: int = knob(256, least=1, unit="tokens")
    """Tokens of a segment, which attends to itself and reads the memory of earlier segments. The paper has
    2,048."""
    update: Literal["linear", "delta"] = "linear"
    """What a segment adds to the memory. linear: its values. delta: what differs from the values that the
    memory already has for its keys."""


class Infini(SequenceMixer):
    """σ(β)·φ(q)M/φ(q)z + (1 − σ(β))·softmax(QKᵀ/√D)V within the segment, with φ(x) = elu(x) + 1.

    M = Σφ(k)ᵀv and z = Σφ(k) are sums over the keys of earlier segments (§2.1.2). A segment reads the memory
    before it is added, or its queries would read later tokens. β is one number for each head, and 0 at first.
    Gradients pass through the memory, as in the paper's training.

    The whole sequence is one call. With `linear`, memories are sums of segments, which are computed at once;
    with `delta`, they are a scan of D × D matrices.

    Positions are rotary, and are not applied to the queries and keys of the memory, as in the paper. Queries
    of the first segment have no memory, and read 0 there; the paper does not say.
    """

    Config = InfiniConfig
    config: InfiniConfig
    position_scheme = "rotary"
    no_shared_keys = None
    flop_overhead_reason = "queries compute the scores of all keys of their segment, and mask the later ones"
    info = Info(
        paper="Munkhdalai et al. 2024, Leave No Context Behind: Infini-attention, arXiv:2404.07143",
        family="memory",
        complexity=Complexity(time=1, memory=1, formula="T·(s + D)", source="Munkhdalai 2024, §2.1"),
        caps=Caps(causal=True, bidirectional=False),
    )

    def __init__(self, config: InfiniConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.mix = nn.Parameter(torch.zeros(dims.heads))
        """β."""

    # --- forward --------------------------------------------------------------------------------------

    def _split(self, x: Tensor) -> QKV:
        """(B, T, C) → queries (B, T, H, D), and keys and values (B, T, K, D), without positions."""
        heads, key_heads = self.dims.heads, self.dims.key_heads
        weights = self.projections.qkv.weight.split([self.dims.inner_dim, *[self.dims.key_dim] * 2])
        q, k, v = (F.linear(x, weight) for weight in weights)
        return (
            q.unflatten(-1, (heads, -1)),
            k.unflatten(-1, (key_heads, -1)),
            v.unflatten(-1, (key_heads, -1)),
        )

    def _segments(self, x: Tensor) -> list[Tensor]:
        """(B, T, H, D) → views (B, n, H, s, D) of full segments, and (B, 1, H, rest, D) of the tokens after
        them; empty ones are left out."""
        full, size = x.shape[1] // self.config.segment, self.config.segment
        parts = [x[:, : full * size].unflatten(1, (full, size))] if full else []
        if x.shape[1] > full * size:
            parts.append(x[:, None, full * size :])
        return [part.transpose(2, 3) for part in parts]

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state. Raises ValueError where not causal."""
        q, k, v = self._split(x)
        memory = self._memory(k, v)
        turned = (rotary(t, ctx.positions, self.dims.rotary_base) for t in (q, k))
        outputs, first = [], 0
        parts = zip(*map(self._segments, (q, *turned, v)), strict=True)
        for q_part, q_turned, k_turned, v_part in parts:
            local = self._attend(q_turned, k_turned, v_part)
            outputs.append(self._mixed(local, q_part, memory, first).transpose(2, 3).flatten(1, 2))
            first += local.shape[1]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return MixerOut(self.projections.out(y.flatten(2)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within segments (B, n, H, s, D); keys and values have K heads."""
        segments = q.shape[:2]
        q, k, v = (t.flatten(0, 1) for t in (q, self._spread(k), self._spread(v)))
        y: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True).unflatten(0, segments)
        return y

    def _spread(self, x: Tensor) -> Tensor:
        """(B, n, K, …) → (B, n, H, …)."""
        group = self.dims.queries_per_key
        return x if group == 1 else x.repeat_interleave(group, dim=2)

    def _memory(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...] | None:
        """The memory (B, n, K, D, D) and (B, n, K, D) that each segment but the first reads: all segments
        before it. None if there is one segment."""
        segments, size = (k.shape[1] - 1) // self.config.segment, self.config.segment
        if not segments:
            return None
        keys, values = (t[:, : segments * size].unflatten(1, (segments, size)) for t in (k, v))
        keys, values = (t.permute(0, 3, 1, 2, 4).flatten(0, 1) for t in (keys, values))  # (B·K, n, s, D)
        with torch.autocast(k.device.type, enabled=False):
            sums, norms = segment_memory.written(keys, values)
            total = norms.cumsum(1)
            if self.config.update == "linear":
                matrices = sums.cumsum(1)
            else:
                factors = segment_memory.transitions(keys[:, 1:], total[:, :-1])
                matrices = segment_memory.scanned(F.pad(factors, (0, 0, 0, 0, 1, 0)), sums)
        by_segment = (t.unflatten(0, (len(k), -1)).transpose(1, 2) for t in (matrices, total))
        return tuple(self._spread(t) for t in by_segment)

    def _mixed(self, local: Tensor, q: Tensor, memory: Any, first: int) -> Tensor:
        """The outputs of the segments from `first` on, which read the memory before them; (B, n, H, s, D)."""
        gate = self.mix.sigmoid().to(local.dtype)[:, None, None]
        from_start = int(first == 0)
        parts = []
        if from_start:  # the first segment has no memory
            parts.append(local[:, :1] * (1 - gate))
        if local.shape[1] > from_start:
            with torch.autocast(q.device.type, enabled=False):
                place = slice(first + from_start - 1, first + local.shape[1] - 1)
                found = segment_memory.read(q[:, from_start:], *(t[:, place] for t in memory))
            parts.append(torch.lerp(local[:, from_start:], found.to(local.dtype), gate))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Segment by segment; the memory is updated after each."""
        self.require_objective(causal=ctx.causal)
        q, k, v = self._split(x)
        turned = [rotary(t, ctx.positions, self.dims.rotary_base).transpose(1, 2) for t in (q, k)]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        gate, spread = self.mix.sigmoid()[:, None, None], self.projections.spread
        matrix = norm = None
        outputs = []
        for start in range(0, x.shape[1], self.config.segment):
            here = slice(start, start + self.config.segment)
            queries, keys = (F.elu(t[:, :, here]) + 1 for t in (q, k))
            values = v[:, :, here]
            tokens = values.shape[2]
            allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
            q_turned, k_turned = (t[:, :, here] for t in turned)
            y = (1 - gate) * masked_attention(q_turned, spread(k_turned), spread(values), allowed)
            if matrix is not None and norm is not None:
                y = y + gate * (queries @ spread(matrix)) / (queries @ spread(norm))
                if self.config.update == "delta":
                    values = values - (keys @ matrix) / (keys @ norm)
            outputs.append(y)
            new = keys.mT @ values, keys.sum(2)[..., None]
            matrix = new[0] if matrix is None else matrix + new[0]
            norm = new[1] if norm is None else norm + new[1]
        return self.projections.merge(torch.cat(outputs, dim=2))

    # --- cost -----------------------------------------------------------------------------------------

    def cost(self, work: Workload) -> Cost:
        """Attention within segments: 4·D for each allowed pair. Memory: 2·D² for each token that is written
        and each that reads it, and 2·D for its normaliser; with `delta` also the matrices of the scan."""
        d, size = work.head_dim, self.config.segment
        segments = (work.seq_len - 1) // size
        keys, queries = work.batch_size * work.key_heads, work.batch_size * work.heads
        parts = {
            "projections": Projections.flops(work),
            "attention": 4 * queries * d * own_pairs(work.seq_len, size),
            "writing": 2 * keys * d * d * segments * size,
            "reading": 2 * queries * d * (d + 1) * max(0, work.seq_len - size),
        }
        if self.config.update == "delta":
            later = max(0, segments - 1) * size
            parts["writing"] += 2 * keys * d * (d + 1) * later
            parts["scan"] = 2 * keys * d**3 * segment_memory.scan_products(segments)
        return Cost(parts)

    def _memory_numbers(self, work: Workload) -> int:
        """Numbers of one memory of all heads."""
        return work.batch_size * work.key_dim * (work.head_dim + 1)

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the memory, of what the open segment adds to it, and of its keys and values."""
        full, open_tokens = divmod(work.seq_len, self.config.segment)
        memories = self._memory_numbers(work) * (bool(full) + bool(open_tokens))
        kept = 2 * work.batch_size * work.key_dim * open_tokens
        return memories * max(4, work.element_bytes) + kept * work.element_bytes

    # --- decoding -------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> InfiniState:
        """The memory, what the open segment adds to it, and the keys and values of the segment."""
        shape = batch_size, self.dims.key_heads, self.dims.head_dim
        tokens = min(max_len, self.config.segment)
        return InfiniState(clock, max_len, shape, tokens, dtype, self.projections.out.weight.device)

    def decoding_bytes(self, work: Workload) -> int:
        """Both memories, and a whole segment."""
        tokens = min(work.seq_len, self.config.segment)
        kept = 2 * work.batch_size * work.key_dim * tokens * work.element_bytes
        return 2 * self._memory_numbers(work) * max(4, work.element_bytes) + kept

    def step(self, x: Tensor, state: InfiniState) -> Tensor:
        """(B, n, C) → (B, n, C), segment by segment."""
        position = state.clock.position
        q, k, v = self._split(x)
        turned = [rotary_next(t, state.clock, self.dims.rotary_base) for t in (q, k)]
        streams = [t.transpose(1, 2) for t in (q, k, *turned, v)]
        outputs, begin = [], 0
        while begin < x.shape[1]:
            end = min(x.shape[1], begin + self.config.segment - (position + begin) % self.config.segment)
            q, k, *parts, v = (t[:, :, begin:end] for t in streams)
            outputs.append(self._step((q, parts[0]), (k, parts[1]), v, state, position + begin))
            begin = end
        return self.projections.merge(torch.cat(outputs, dim=2))

    def _step(
        self,
        queries: tuple[Tensor, Tensor],
        keys: tuple[Tensor, Tensor],
        v: Tensor,
        state: InfiniState,
        position: int,
    ) -> Tensor:
        """Read tokens of one segment from `position` on, with queries and keys without and with positions:
        (B, H, n, D)."""
        (q, q_turned), (k, k_turned), spread = queries, keys, self.projections.spread
        filled = position % self.config.segment
        end = filled + v.shape[2]
        state.keys[:, :, filled:end], state.values[:, :, filled:end] = k_turned, v
        key = torch.arange(end, device=v.device)
        own, values = (spread(t[:, :, :end].to(v.dtype)) for t in (state.keys, state.values))
        y = F.scaled_dot_product_attention(q_turned, own, values, attn_mask=key <= key[filled:, None])
        gate = self.mix.sigmoid().to(y.dtype)[:, None, None]
        known = position >= self.config.segment
        if known:
            found = segment_memory.read(q, spread(state.matrix), spread(state.norm))
            y = torch.lerp(y, found.to(y.dtype), gate)
        else:
            y = y * (1 - gate)
        features = segment_memory.features(k)
        wide = v.to(features.dtype)
        if known and self.config.update == "delta":
            wide = wide - segment_memory.read(k.to(features.dtype), state.matrix, state.norm)
        state.add(features, wide)
        if end == self.config.segment:
            state.end_segment()
        return y
