"""Longformer's sliding window and global tokens (Beltagy 2020, arXiv:2004.05150, §3.1).

Shapes: B batch, T tokens, C channels, H heads, D = C / H, n global tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from variants.ops import backends, masks
from variants.ops.block_sparse import union_attention, union_impl
from variants.ops.projections import Projections, local_attention, masked_attention, rotary
from variants.ops.strided_parts import Cut, Part, piece_size


@dataclass(frozen=True, kw_only=True)
class LongformerConfig(VariantConfig):
    """Knobs of the sliding window."""

    impl: Literal["blocks", "flex"] = "blocks"
    """Implementation of the window. blocks: blocks of queries with the keys near them, by torch's fused
    kernel. flex: FlexAttention, compiled, on CUDA; takes no global tokens."""
    window: tuple[int, ...] = knob((256,), least=1, entries=1, unit="tokens")
    """Tokens that a query reads on each side, itself included. One entry for each layer from the lowest;
    layers above the last entry use it again. The paper's two-sided w is 2·window − 1 here."""
    dilation: tuple[int, ...] = knob((1,), least=1, entries=1, unit="steps")
    """Steps between neighbours in the window, one entry a head, repeated to the number of heads."""
    global_tokens: int = knob(0, least=0, unit="tokens")
    """Tokens at the start of the sequence that read every token and are read by every token. For
    bidirectional objectives alone. The paper places them by task: classification's first token, a
    question's."""


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Each head's window as one rule (head, query index, key index) → bool; head h has dilation h mod n."""

    window: int
    dilations: tuple[int, ...]
    causal: bool

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Broadcast over all three."""
        dilation: int | Tensor = self.dilations[0]
        for n, other in enumerate(self.dilations[1:], 1):
            dilation = torch.where(head % len(self.dilations) == n, other, dilation)
        allowed = masks.window(self.window, dilation)(i, j)
        return allowed & masks.causal(i, j) if self.causal else allowed


class Longformer(SequenceMixer):
    """Softmax attention within a sliding window, one-sided where causal, and of global tokens.

    Windows may grow by layer and be dilated by head (§3.1, §4.1). A global token's query reads every
    token through projections of its own, of all tokens (§3.1, "Linear Projections for Global
    Attention"); any other query reads the global tokens beside its window in one softmax, through the
    common projections, as in the authors' code.

    Deviations: positions are rotary, as for every variant here and under both sets of projections; the
    paper's language models use Transformer-XL's, its document models learned ones. The global
    projections are drawn like any other, where the paper's start as copies of the common ones: those
    continue from a model that was trained without them, and here all weights start together.
    """

    Config = LongformerConfig
    config: LongformerConfig
    info = Info(
        paper="Beltagy et al. 2020, Longformer, arXiv:2004.05150",
        family="fixed patterns",
        complexity=Complexity(time=1, memory=1, formula="T·w", source="Beltagy 2020, §3.1", survey=1),
        caps=Caps(causal=True, bidirectional=True),
    )
    flop_overhead_reason = "a block of queries is given every key that any of them reads, and masks the rest"

    def __init__(self, config: LongformerConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims.d_model, dims.heads)
        self.window = config.window[min(layer, len(config.window) - 1)]
        self.dilations = tuple(config.dilation[h % len(config.dilation)] for h in range(dims.heads))
        if config.global_tokens:
            self.global_qkv = nn.Linear(dims.d_model, 3 * dims.d_model, bias=False)
        if config.impl == "flex":
            self.flop_overhead_reason, self.overhead_is_bounded = backends.FLEX_PADDING, False

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """Global tokens read the future."""
        assert isinstance(config, LongformerConfig)
        if causal and config.global_tokens:
            return f"global_tokens={config.global_tokens}: a global token reads later tokens; causal takes 0"
        return super().no_form(config, causal=causal)

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """FlexAttention has no queries of their own for global tokens; a head has one dilation."""
        assert isinstance(config, LongformerConfig)
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        if config.impl == "flex" and config.global_tokens:
            return f"global_tokens={config.global_tokens}: impl=flex has none, use impl=blocks"
        if len(config.dilation) > dims.heads:
            entries = f"dilation={config.dilation}: {len(config.dilation)} entries"
            return f"{entries} for {dims.heads} heads; allowed are 1 to {dims.heads}"
        return None

    @classmethod
    def missing(
        cls, config: VariantConfig, dims: Dims, *, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """FlexAttention, where it has no backward pass."""
        assert isinstance(config, LongformerConfig)
        return backends.missing_flex(device, dims.head_dim) if config.impl == "flex" else None

    @property
    def impl(self) -> str:
        """With global tokens, how the window and they are put together (see `UnionConfig.impl`)."""
        if not self.config.global_tokens:
            return self.config.impl
        return union_impl(self.projections.qkv.weight.device)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        if self.config.global_tokens:
            return MixerOut(self._with_globals(x, q, k, v, ctx.positions))
        if self.config.impl == "flex":
            alike = len(set(self.dilations)) == 1
            return MixerOut(
                self.projections.merge(backends.flex(q, k, v, self.rule(causal=ctx.causal), alike=alike))
            )
        kinds = sorted(set(self.dilations))
        if len(kinds) == 1:
            return MixerOut(self.projections.merge(self._dilated(q, k, v, kinds[0], ctx.causal)))
        y = torch.empty_like(q)
        for dilation in kinds:
            heads = [h for h, d in enumerate(self.dilations) if d == dilation]
            y[:, heads] = self._dilated(q[:, heads], k[:, heads], v[:, heads], dilation, ctx.causal)
        return MixerOut(self.projections.merge(y))

    def rule(self, *, causal: bool) -> backends.HeadRule:
        """The windows of all heads, without global tokens."""
        return _Windows(window=self.window, dilations=self.config.dilation, causal=causal)

    def _dilated(self, q: Tensor, k: Tensor, v: Tensor, dilation: int, causal: bool) -> Tensor:
        """A window with dilation d is a plain window on each of the d interleaved subsequences."""
        if dilation == 1:
            return local_attention(q, k, v, window=self.window, causal=causal)
        y = torch.empty_like(q)
        for r in range(min(dilation, q.shape[2])):
            q_r, k_r, v_r = (t[:, :, r::dilation] for t in (q, k, v))
            y[:, :, r::dilation] = local_attention(q_r, k_r, v_r, window=self.window, causal=causal)
        return y

    def _with_globals(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> Tensor:
        """Global queries over everything; the rest over the window and the global keys at once."""
        n = min(self.config.global_tokens, x.shape[1])
        local = union_attention(q, k, v, list(self._parts(x.shape[1], n, x.device)), self.impl)
        y = F.scaled_dot_product_attention(*self._global_split(x, n, positions))
        both = torch.cat([y.transpose(1, 2), local[:, :, n:].transpose(1, 2)], dim=1)  # (B, T, H, D)
        return self.projections.merge(both.transpose(1, 2))

    def _global_split(self, x: Tensor, n: int, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) → queries (B, H, n, D) of the global tokens, keys and values (B, H, T, D) for them."""
        weights = zip((x[:, :n], x, x), self.global_qkv.weight.chunk(3), strict=True)
        q, k, v = (F.linear(part, w).unflatten(-1, (self.dims.heads, -1)) for part, w in weights)
        q = rotary(q, None if positions is None else positions[:n])
        return q.transpose(1, 2), rotary(k, positions).transpose(1, 2), v.transpose(1, 2)

    def _parts(self, seq_len: int, n: int, device: torch.device) -> Iterator[Part]:
        """What queries [n, T) read: the n global keys, and their windows among the tokens [n, T)."""
        heads = (0, self.dims.heads)
        size = piece_size(seq_len, device)
        for lo in range(n, seq_len, size):
            queries = Cut(start=lo, run=min(size, seq_len - lo))
            yield Part(heads=heads, queries=queries, keys=Cut(start=0, run=n))
        for dilation, run in groupby(range(self.dims.heads), key=lambda head: self.dilations[head]):
            members = list(run)
            for start in range(n, min(n + dilation, seq_len)):
                yield from self._window_parts((members[0], members[-1] + 1), start, seq_len, dilation, device)

    def _window_parts(
        self, heads: tuple[int, int], start: int, stop: int, step: int, device: torch.device
    ) -> Iterator[Part]:
        """The window among tokens start, start + step, … < stop, as rows of window − 1 tokens.

        A query reads all of its own row, the row above from its own column on and the row below up to
        it; the last row may be short.
        """
        width = max(1, self.window - 1)
        rows, rest = divmod(-(-(stop - start) // step), width)

        def cut(row: int, count: int, tokens: int) -> Cut:
            """The first `tokens` tokens of each of `count` rows."""
            begin, length = start + row * width * step, width * step
            if step == 1:
                return Cut(start=begin, groups=count, group_step=length, run=tokens)
            return Cut(start=begin, groups=count, group_step=length, rows=tokens, row_step=step)

        index = torch.arange(width, device=device)
        below = index[None, :] <= index[:, None]  # (queries, keys)
        neighbours = ((0, None), (-1, below.T), (1, below)) if self.window > 1 else ((0, None),)
        for offset, mask in neighbours:
            if rows > abs(offset):
                first, count = max(0, -offset), rows - abs(offset)
                queries, keys = cut(first, count, width), cut(first + offset, count, width)
                yield Part(heads=heads, queries=queries, keys=keys, mask=mask)
            query = rows - max(0, offset)  # where the query's row or the key's is the short one
            if rest and min(query, query + offset) >= 0:
                n_queries, n_keys = (rest if row == rows else width for row in (query, query + offset))
                yield Part(
                    heads=heads,
                    queries=cut(query, 1, n_queries),
                    keys=cut(query + offset, 1, n_keys),
                    mask=None if mask is None else mask[:n_queries, :n_keys],
                )

    def _allowed(self, seq_len: int, causal: bool) -> Tensor:
        """(H, T, T) bool."""
        n = self.config.global_tokens
        rules = [masks.window(self.window, dilation) for dilation in self.dilations]
        if causal:
            rules = [masks.both(rule, masks.causal) for rule in rules]
        if n:
            rules = [masks.either(rule, lambda i, j: (i < n) | (j < n)) for rule in rules]
        return torch.stack([masks.matrix(rule, seq_len) for rule in rules])

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The oracle on each head's window and the globals, whose rows have projections of their own."""
        seq_len, n = x.shape[1], min(self.config.global_tokens, x.shape[1])
        y = masked_attention(*self.projections.split(x, ctx.positions), self._allowed(seq_len, ctx.causal))
        if n:
            everything = torch.ones(n, seq_len, dtype=torch.bool)
            of_globals = masked_attention(*self._global_split(x, n, ctx.positions), everything)
            y = torch.cat([of_globals, y[:, :, n:]], dim=2)
        return self.projections.merge(y)

    def cost(self, work: Workload) -> Cost:
        """Scores and weighted sum: 4·D for each head's pairs.

        Global tokens take keys and values of all tokens, and queries of their own, in projections.
        """
        t, n = work.seq_len, min(self.config.global_tokens, work.seq_len)
        rest = t - n  # tokens whose windows are left when the global keys are taken out
        pairs = work.heads * n * (t + rest)
        for d in self.dilations:
            lengths = [(rest - r + d - 1) // d for r in range(min(d, rest))]
            pairs += sum(masks.window_pairs(m, self.window, is_causal=work.causal) for m in lengths)
        projections = Projections.flops(work.batch_size, t, work.d_model)
        if n:
            projections += 2 * work.batch_size * (2 * t + n) * work.d_model**2
        attention = 4 * work.batch_size * work.head_dim * pairs
        return Cost({"projections": projections, "attention": attention})

    def state_bytes(self, work: Workload) -> int:
        """The keys and values that a later query with a window can still read, head by head.

        Those are the global tokens' and the last of the others'; what global queries read of the
        tokens to come is, as everywhere, not counted.
        """
        t, n = work.seq_len, min(self.config.global_tokens, work.seq_len)
        tokens = sum(n + min(t - n, (self.window - 1) * d) for d in self.dilations)
        return 2 * work.batch_size * tokens * work.head_dim * work.element_bytes

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """What any head may read."""
        return self._allowed(seq_len, causal).any(dim=0)
