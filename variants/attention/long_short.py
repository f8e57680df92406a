"""Long-short attention: a window, and dynamic projections of segments (Zhu 2021, arXiv:2107.02192).

Over 300 lines: the whole sequence, its reference and decoding share the rows of segments.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, l tokens of a segment, r rows of a
segment, n segments, R = n·r rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
    Impl,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.patterns import masks
from variants.ops.patterns.block_sparse import union_attention
from variants.ops.patterns.masked_attention import TILE_OVERHEAD
from variants.ops.patterns.pair_counts import window_pairs
from variants.ops.patterns.part_kernels import missing_fused
from variants.ops.patterns.rectangles import Rectangle, to_parts
from variants.ops.patterns.regions import Region
from variants.ops.patterns.segment_rows import all_rows, earlier_rows, row_pairs
from variants.ops.patterns.strided_parts import Part, piece_size
from variants.ops.patterns.tiles import rectangles
from variants.ops.projections import Projections, masked_attention, rotary, rotary_next
from variants.ops.segments.long_short_state import LongShortState


@dataclass(frozen=True, kw_only=True)
class LongShortConfig(VariantConfig):
    """Knobs of long-short attention."""

    window: int = knob(128, least=1, unit="tokens")
    """Tokens that a query reads on each side, itself included."""
    rank: int = knob(8, least=1, unit="rows")
    """Keys and values into which a segment is projected."""
    segment: int | None = knob(None, least=1, unit="tokens")
    """Tokens of a segment. null: the whole sequence if bidirectional, as in the paper; √T, rounded, for the
    maximum sequence length T, if causal."""
    impl: Literal["auto", "fused", "plain"] = "auto"
    """Implementation of attention. fused: tiles, by torch's CPU attention kernel. plain: the same tiles by
    matrix products, on any device. auto: fused on the CPU, plain elsewhere."""


def _fused(layer: LongShort, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Tiles of the window and of the rows, by torch's CPU attention kernel."""
    if reason := missing_fused(layer.device_type):
        raise ValueError(reason)
    return union_attention(q, k, v, layer.parts(q, k, causal), "fused", layer.piece(q.shape[2]))


def _plain(layer: LongShort, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The same tiles by matrix products."""
    return union_attention(q, k, v, layer.parts(q, k, causal), "plain", layer.piece(q.shape[2]))


class LongShort(SequenceMixer):
    """One softmax over the keys of a window, and over r rows of each segment.

    A row is a weighted mean of the keys (and one of the values) of its segment. The weights are a softmax
    over the tokens of x W_p, with r columns for each head ("dynamic projection"). Keys and values of the
    window, and those of the rows, are normalised by two layer normalisations over all heads ("DualLN").

    Causal: a token reads the rows of the segments before its own. A segment that is not complete, or has
    later tokens, is never read; its tokens are read by the window if that is long enough. With segments of √T
    tokens, that is r·√T/2 rows for a mean token. Bidirectional: every token reads all rows, also those of the
    last segment, which may be shorter.

    Deviations from the paper: positions are rotary and are applied after the normalisation; a row has the
    position of the middle of its segment. The normalisations have no biases. Without a causal
    order the window is centred on the token; the paper's consists of its block and its neighbours. The
    paper's language model has segments of a fixed length.
    """

    Config = LongShortConfig
    config: LongShortConfig
    position_scheme = "rotary"
    flop_overhead_reason = TILE_OVERHEAD
    info = Info(
        paper="Zhu et al. 2021, Long-Short Transformer, arXiv:2107.02192",
        family="low rank",
        complexity=Complexity(time=1, memory=1, formula="T·(w + r)", source="Zhu 2021, abstract", survey=1),
        caps=Caps(causal=True, bidirectional=True),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "fused": Impl(
            run=_fused,
            missing=lambda device, dtype, head_dim: missing_fused(device.type),
            flop_overhead_reason=TILE_OVERHEAD,
            auto_on=("cpu",),
        ),
        "plain": Impl(run=_plain, flop_overhead_reason=TILE_OVERHEAD, auto_on=(Impl.OTHER_DEVICES,)),
    }

    def __init__(self, config: LongShortConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.dynamic = nn.Linear(dims.d_model, dims.heads * config.rank, bias=False)
        self.window_norm, self.row_norm = (nn.LayerNorm(dims.inner_dim, bias=False) for _ in range(2))

    def segment(self, seq_len: int, *, causal: bool) -> int:
        """Tokens of a segment."""
        if self.config.segment is not None:
            return self.config.segment
        return max(1, round(math.sqrt(self.dims.seq_len))) if causal else seq_len

    # --- projections ------------------------------------------------------------------------------

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) → queries, keys and values (B, T, C'), without positions and normalisation."""
        q, k, v = (F.linear(x, w) for w in self.projections.qkv.weight.chunk(3))
        return q, k, v

    def _normalised(self, norm: nn.LayerNorm, t: Tensor) -> Tensor:
        """Normalise over all heads, in float32 or wider: (B, n, C') → (B, n, H, D).

        The result is rounded after it is rotated. In bfloat16, each further rounding would be seen in the
        gradient of the weight, a sum over all tokens whose terms cancel.
        """
        wide = torch.promote_types(t.dtype, torch.float32)
        with torch.autocast(t.device.type, enabled=False):
            normal = F.layer_norm(t.to(wide), norm.normalized_shape, norm.weight.to(wide), eps=norm.eps)
        by_head: Tensor = normal.unflatten(-1, (self.dims.heads, -1))
        return by_head

    def _rows(self, logits: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of segments of equal length: (B, n, l, H·r) and (B, n, l, C') → (B, n·r, H, D) each."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights = logits.to(wide).softmax(dim=2).to(k.dtype).unflatten(-1, (self.dims.heads, -1))
        weights = weights.permute(0, 1, 3, 4, 2)  # (B, n, H, r, l)
        found = []
        for t in (k, v):
            rows = weights @ t.unflatten(-1, (self.dims.heads, -1)).transpose(2, 3)  # (B, n, H, r, D)
            found.append(self._normalised(self.row_norm, rows.transpose(2, 3).flatten(3).flatten(1, 2)))
        return found[0], found[1]

    def _rows_of(
        self, x: Tensor, raw_k: Tensor, raw_v: Tensor, ctx: Context
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values (B, R, H, D) of the rows that some token may read, in one or two parts each."""
        seq_len = x.shape[1]
        length = self.segment(seq_len, causal=ctx.causal)
        full, rest = divmod(seq_len, length)
        spans = [(0, full, length)] if full else []
        if rest and not ctx.causal:
            spans.append((full * length, 1, rest))
        keys, values = [], []
        for start, count, size in spans:
            part = slice(start, start + count * size)
            inputs = (self.dynamic(x[:, part]), raw_k[:, part], raw_v[:, part])
            row_k, row_v = self._rows(*(t.unflatten(1, (count, size)) for t in inputs))
            at = self._middles(start, count, size, ctx.positions, x.device)
            keys.append(rotary(row_k, at.repeat_interleave(self.config.rank), self.dims.rotary_base))
            values.append(row_v)
        return keys, values

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        base = self.dims.rotary_base
        q, raw_k, raw_v = self._project(x)
        row_keys, row_values = self._rows_of(x, raw_k, raw_v, ctx)
        keys = [rotary(self._normalised(self.window_norm, raw_k), ctx.positions, base), *row_keys]
        values = [self._normalised(self.window_norm, raw_v), *row_values]
        q = rotary(q.unflatten(-1, (self.dims.heads, -1)), ctx.positions, base)
        k, v = (torch.cat(some, dim=1).to(q.dtype).transpose(1, 2) for some in (keys, values))
        return MixerOut(self.projections.merge(self.run_impl(self, q.transpose(1, 2), k, v, ctx.causal)))

    @staticmethod
    def _middles(start: int, count: int, size: int, positions: Tensor | None, device: torch.device) -> Tensor:
        """Positions (n,) float64 of the middles of segments."""
        first = start + torch.arange(count, device=device) * size
        last = first + size - 1
        if positions is not None:
            first, last = positions[first], positions[last]
        return (first + last).double() / 2

    # --- attention --------------------------------------------------------------------------------

    def piece(self, seq_len: int) -> int:
        """Queries computed at a time."""
        return piece_size(seq_len, self.device_type)

    def parts(self, q: Tensor, k: Tensor, causal: bool) -> list[Part]:
        """The parts of the window, then those of the rows, which follow the keys of the tokens."""
        seq_len, rows = q.shape[2], k.shape[2] - q.shape[2]
        numbers = self._window_rectangles(seq_len, causal)
        parts = to_parts(self._region(causal), [Rectangle.of(each) for each in numbers], q.device)
        return [*parts, *(self.row_parts(seq_len, rows, causal, q.device) if rows else [])]

    def row_parts(self, seq_len: int, rows: int, causal: bool, device: torch.device) -> list[Part]:
        """The rows that tokens read."""
        heads, kind = self.dims.heads, self.device_type
        if not causal:
            return all_rows(seq_len, rows, heads, kind)
        length = self.segment(seq_len, causal=True)
        return earlier_rows(seq_len, length, self.config.rank, heads, device, kind)

    def _region(self, causal: bool) -> Region:
        rule: masks.Rule = masks.Window(self.config.window)
        return Region(rule=rule & masks.causal if causal else rule, heads=(0, self.dims.heads))

    def _window_rectangles(self, seq_len: int, causal: bool) -> list[tuple[int, ...]]:
        """The numbers of each rectangle; torch.compile uses them as constants."""
        return [each.numbers for each in rectangles(self._region(causal), seq_len, self.device_type)]

    _window_rectangles._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _reads_rows(self, seq_len: int, causal: bool) -> tuple[list[tuple[int, int]], Tensor]:
        """Segments as (first token, end), and whether a token reads each of them: (T, n) bool."""
        length = self.segment(seq_len, causal=causal)
        spans = [(a, min(a + length, seq_len)) for a in range(0, seq_len, length)]
        own = torch.arange(seq_len)[:, None] // length
        before = torch.arange(len(spans)) < own
        return spans, before if causal else torch.ones_like(before)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Segment by segment, then masked attention to T + R keys."""
        seq_len, heads, base = x.shape[1], self.dims.heads, self.dims.rotary_base
        positions = torch.arange(seq_len) if ctx.positions is None else ctx.positions
        q, k, v = self._project(x)
        keys, values = [rotary(self._normalised(self.window_norm, k), positions, base)], []
        values.append(self._normalised(self.window_norm, v))
        spans, reads = self._reads_rows(seq_len, ctx.causal)
        for a, b in spans:
            logits = self.dynamic(x[:, a:b]).unflatten(-1, (heads, -1))  # (B, l, H, r)
            weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
            rows = [
                torch.einsum("blhr,blhd->brhd", weights.to(k.dtype), t[:, a:b].unflatten(-1, (heads, -1)))
                for t in (k, v)
            ]
            row_k, row_v = (self._normalised(self.row_norm, t.flatten(2)) for t in rows)
            middle = (positions[a] + positions[b - 1]).double() / 2
            keys.append(rotary(row_k, middle.expand(self.config.rank), base))
            values.append(row_v)
        window = masks.matrix(self._region(ctx.causal).rule, seq_len)
        allowed = torch.cat([window, reads.repeat_interleave(self.config.rank, dim=1)], dim=1)
        q = rotary(q.unflatten(-1, (heads, -1)), positions, base)
        k, v = (torch.cat(some, dim=1).to(q.dtype) for some in (keys, values))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.projections.merge(masked_attention(q, k, v, allowed))

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """The window, and the tokens of all segments whose rows are read."""
        spans, reads = self._reads_rows(seq_len, causal)
        sizes = torch.tensor([b - a for a, b in spans])
        return masks.matrix(self._region(causal).rule, seq_len) | reads.repeat_interleave(sizes, dim=1)

    # --- decoding ---------------------------------------------------------------------------------

    def init_state(
        self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype
    ) -> LongShortState:
        """The window, the rows of complete segments, and the tokens of the open segment."""
        length = self.segment(max_len, causal=True)
        device = self.dynamic.weight.device
        sizes = (self.config.window, self.config.rank, length)
        return LongShortState(self.dims, batch_size, max_len, sizes, clock, dtype, device)

    def step(self, x: Tensor, state: LongShortState) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence, other tokens one by one."""
        clock, tokens, base = state.clock, x.shape[1], self.dims.rotary_base
        q, raw_k, raw_v = self._project(x)
        logits = self.dynamic(x)
        k = rotary_next(self._normalised(self.window_norm, raw_k), clock, base).transpose(1, 2)
        v = self._normalised(self.window_norm, raw_v).transpose(1, 2)
        q = rotary_next(q.unflatten(-1, (self.dims.heads, -1)), clock, base).transpose(1, 2)
        if clock.position == 0 and tokens > 1:
            ctx = Context(causal=True)
            rows = self._rows_of(x, raw_k, raw_v, ctx)
            state.write_prompt(k, v, raw_k, raw_v, logits, *(torch.cat(some, dim=1) for some in rows if some))
            return self.forward(x, ctx).y
        outputs = []
        for position in range(clock.position, clock.position + tokens):
            one = slice(position - clock.position, position - clock.position + 1)
            state.write(position, k[:, :, one], v[:, :, one], raw_k[:, one], raw_v[:, one], logits[:, one])
            outputs.append(F.scaled_dot_product_attention(q[:, :, one], *state.read(position, q.dtype)))
            if (position + 1) % state.length == 0:
                row_k, row_v = self._rows(*state.open_segment())
                at = self._middles(position + 1 - state.length, 1, state.length, None, x.device)
                state.close(position, rotary(row_k, at.expand(self.config.rank), base), row_v)
        return self.projections.merge(torch.cat(outputs, dim=2))

    def decoding_bytes(self, work: Workload) -> int:
        """Keys and values of the window and of the rows; keys, values and logits of a segment."""
        length = self.segment(work.seq_len, causal=True)
        window = min(self.config.window, work.seq_len)
        kept = window + work.seq_len // length * self.config.rank + min(length, work.seq_len)
        logits = min(length, work.seq_len) * work.heads * self.config.rank
        return work.batch_size * (2 * kept * work.inner_dim + logits) * work.element_bytes

    # --- cost -------------------------------------------------------------------------------------

    def cost(self, work: Workload) -> Cost:
        """Projections and logits of the tokens of segments that are projected; their rows; pairs of the
        window and of the rows."""
        t, causal = work.seq_len, work.causal
        length = self.segment(t, causal=causal)
        tokens = t // length * length if causal else t
        pairs = window_pairs(t, self.config.window, is_causal=causal)
        pairs += row_pairs(t, length, self.config.rank, causal=causal)
        logits = 2 * work.batch_size * tokens * work.d_model * work.heads * self.config.rank
        return Cost(
            {
                "projections": Projections.flops(work) + logits,
                "compression": 4 * work.batch_size * tokens * self.config.rank * work.inner_dim,
                "attention": 4 * work.batch_size * work.inner_dim * pairs,
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the keys and values of the last window − 1 tokens, of the rows of complete segments, and
        of the tokens of the open segment with their logits."""
        length = self.segment(work.seq_len, causal=True)
        full, rest = divmod(work.seq_len, length)
        kept = min(work.seq_len, self.config.window - 1) + full * self.config.rank + rest
        logits = rest * work.heads * self.config.rank
        return work.batch_size * (2 * kept * work.inner_dim + logits) * work.element_bytes
