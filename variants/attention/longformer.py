"""Longformer's sliding window and global tokens (Beltagy 2020, arXiv:2004.05150, §3.1).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, n global tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Caps, Complexity, Context, Cost, Dims, Impl, Info, MixerOut, VariantConfig, Workload
from variants.knobs import knob
from variants.ops.fused.flash import missing_flash
from variants.ops.fused.flash_windows import window_attention
from variants.ops.patterns import masks
from variants.ops.patterns.masked_attention import TILES, MaskedAttention
from variants.ops.patterns.masks import ByHead, Rule, Window
from variants.ops.patterns.pair_counts import carried_keys
from variants.ops.patterns.regions import Region
from variants.ops.patterns.strided_parts import Part, StridedTokens, piece_size
from variants.ops.projections import local_attention, masked_attention, rotary


@dataclass(frozen=True, kw_only=True)
class LongformerConfig(VariantConfig):
    """Knobs of the sliding window."""

    impl: Literal["auto", "fused", "plain", "blocks", "dense", "flex", "flash"] = "auto"
    """Implementation of the window. fused: tiles with allowed pairs, by torch's CPU attention kernel. plain:
    the same tiles by matrix products, on any device. blocks: blocks of queries with all keys of their
    windows, by scaled_dot_product_attention, on any device. dense: all scores, masked. flex: FlexAttention,
    compiled, on CUDA. flash: flash attention, on CUDA in half precision; untried. blocks, flex and flash do
    not support global tokens. auto: fused on the CPU; elsewhere blocks, or plain with global tokens."""
    window: tuple[int, ...] = knob((256,), least=1, entries=1, unit="tokens")
    """Tokens that a query reads on each side, itself included. One entry for each layer from the lowest on;
    all higher layers use the last entry. The paper's two-sided w is 2·window − 1 here."""
    dilation: tuple[int, ...] = knob((1,), least=1, entries=1, unit="steps")
    """Steps between neighbours in the window. One entry for each head; fewer entries are repeated."""
    global_tokens: int = knob(0, least=0, unit="tokens")
    """Tokens at the start of the sequence that read all tokens and are read by all tokens. Only for
    bidirectional objectives. In the paper their place depends on the task: the first token for
    classification, the tokens of the question for question answering."""


@dataclass(frozen=True)
class WithGlobals(Rule):
    """The first n tokens read all tokens and are read by all tokens."""

    n: int

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """True if the query or the key is global."""
        return (i < self.n) | (j < self.n)


def blocks(layer: Longformer, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Blocks of queries with all keys of their windows, by scaled_dot_product_attention."""
    dilations = sorted(set(layer.dilations))
    if len(dilations) == 1:
        return dilated(q, k, v, layer.window, dilations[0], causal)
    y = torch.empty_like(q)
    for dilation in dilations:
        heads = [h for h, d in enumerate(layer.dilations) if d == dilation]
        y[:, heads] = dilated(q[:, heads], k[:, heads], v[:, heads], layer.window, dilation, causal)
    return y


def flash(layer: Longformer, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Flash attention with a window, one launch for each dilation. *Untried*: no device has run it yet."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = window_attention(q, k, v, window=layer.window, dilations=layer.dilations, causal=causal)
    return y.transpose(1, 2)


def dilated(q: Tensor, k: Tensor, v: Tensor, window: int, dilation: int, causal: bool) -> Tensor:
    """Attention in a dilated window: an undilated window on each of `dilation` interleaved subsequences."""
    if dilation == 1:
        return local_attention(q, k, v, window=window, causal=causal)
    y = torch.empty_like(q)
    for r in range(min(dilation, q.shape[2])):
        q_r, k_r, v_r = (t[:, :, r::dilation] for t in (q, k, v))
        y[:, :, r::dilation] = local_attention(q_r, k_r, v_r, window=window, causal=causal)
    return y


class Longformer(MaskedAttention):
    """Softmax attention within a sliding window (one-sided if causal), and attention of global tokens.

    The window can differ by layer, and the dilation by head (§3.1, §4.1). Global attention has its own
    projections of queries, keys and values, by which the query of a global token reads all tokens (§3.1,
    "Linear Projections for Global Attention"). Any other query reads its window and the global tokens in one
    softmax, with the common projections, as in the authors' code.

    Deviations: positions are rotary, as in every variant of this project, for both sets of projections. The
    paper's language models use the positions of Transformer-XL, its document models learned embeddings. The
    global projections are initialised at random. In the paper they are copies of the common projections,
    because training continues from a model without them; here all weights are trained from the start.
    """

    Config = LongformerConfig
    config: LongformerConfig
    info = Info(
        paper="Beltagy et al. 2020, Longformer, arXiv:2004.05150",
        family="fixed patterns",
        complexity=Complexity(time=1, memory=1, formula="T·w", source="Beltagy 2020, §3.1", survey=1),
        caps=Caps(causal=True, bidirectional=True),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        **TILES,
        "blocks": Impl(
            run=blocks,
            flop_overhead_reason=(
                "a block of queries computes scores with all keys that any of its queries reads, some masked"
            ),
        ),
        "flash": Impl(run=flash, missing=missing_flash, has_shape_functions=True, untried=True),
    }

    def __init__(self, config: LongformerConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.window = config.window[min(layer, len(config.window) - 1)]
        self.dilations = tuple(config.dilation[h % len(config.dilation)] for h in range(dims.heads))
        if config.global_tokens:
            self.global_qkv = nn.Linear(dims.d_model, 3 * dims.inner_dim, bias=False)

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """Global tokens read later tokens, so a causal form has none."""
        assert isinstance(config, LongformerConfig)
        if causal and config.global_tokens:
            return f"global_tokens={config.global_tokens}: a global token reads later tokens; causal takes 0"
        return super().no_form(config, causal=causal)

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Three implementations do not support global tokens; each head has one dilation."""
        assert isinstance(config, LongformerConfig)
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        if config.impl in ("blocks", "flex", "flash") and config.global_tokens:
            n = config.global_tokens
            return f"global_tokens={n}: not supported by impl={config.impl}, use impl=auto"
        if config.global_tokens and dims.queries_per_key > 1:
            reason = "the projections of global tokens have keys for every head"
            return f"kv_heads={dims.kv_heads}: {reason}; with global tokens allowed is {dims.heads}"
        if len(config.dilation) > dims.heads:
            entries = f"dilation={config.dilation}: {len(config.dilation)} entries"
            return f"{entries} for {dims.heads} heads; allowed are 1 to {dims.heads}"
        return None

    @classmethod
    def resolve_impl(cls, config: VariantConfig, device_type: str) -> str | None:
        """On devices other than the CPU `auto` is blocks, unless there are global tokens."""
        assert isinstance(config, LongformerConfig)
        if config.impl == "auto" and device_type != "cpu" and not config.global_tokens:
            return "blocks"
        return super().resolve_impl(config, device_type)

    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """The window of each head, and the global tokens."""
        windows = tuple(Window(self.window, dilation) for dilation in self.config.dilation)
        rule = windows[0] if len({*windows}) == 1 else ByHead(windows)
        return rule | WithGlobals(self.config.global_tokens) if self.config.global_tokens else rule

    def regions(self, seq_len: int, *, causal: bool) -> tuple[Region, ...]:
        """The windows of the tokens that are not global, by dilation."""
        regions, n = [], self.config.global_tokens
        for dilation, run in groupby(range(self.dims.heads), key=lambda head: self.dilations[head]):
            heads = list(run)
            rule: Rule = Window(self.window, dilation)
            rule = rule & masks.causal if causal else rule
            regions.append(Region(rule=rule, step=dilation, first=n, heads=(heads[0], heads[-1] + 1)))
        return tuple(regions)

    def parts(self, seq_len: int, *, causal: bool, device: torch.device) -> list[Part]:
        """The windows of tokens [n, T), and the n global keys for these tokens."""
        n, size = self.config.global_tokens, piece_size(seq_len, self.device_type)
        parts = super().parts(seq_len, causal=causal, device=device)
        for start in range(n, seq_len, size) if n else ():
            queries = StridedTokens(start=start, run=min(size, seq_len - start))
            parts.append(
                Part(heads=(0, self.dims.heads), queries=queries, keys=StridedTokens(start=0, run=n))
            )
        return parts

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        if not self.config.global_tokens:
            return super().forward(x, ctx, state)
        q, k, v = self.projections.split(x, ctx.positions)
        n = min(self.config.global_tokens, x.shape[1])
        local = self.run_impl(self, q, k, v, ctx.causal)
        y = F.scaled_dot_product_attention(*self._global_split(x, n, ctx.positions))
        both = torch.cat([y.transpose(1, 2), local[:, :, n:].transpose(1, 2)], dim=1)  # (B, T, H, D)
        return MixerOut(self.projections.merge(both.transpose(1, 2)))

    def _global_split(self, x: Tensor, n: int, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) → queries (B, H, n, D) of the global tokens, keys and values (B, H, T, D) for them."""
        weights = zip((x[:, :n], x, x), self.global_qkv.weight.chunk(3), strict=True)
        q, k, v = (F.linear(part, w).unflatten(-1, (self.dims.heads, -1)) for part, w in weights)
        base = self.dims.rotary_base
        q, k = rotary(q, None if positions is None else positions[:n], base), rotary(k, positions, base)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Masked attention with the window of each head; global queries have their own projections."""
        seq_len, n = x.shape[1], min(self.config.global_tokens, x.shape[1])
        y = masked_attention(
            *self.projections.split(x, ctx.positions), self.allowed(seq_len, causal=ctx.causal)
        )
        if n:
            all_keys = torch.ones(n, seq_len, dtype=torch.bool)
            global_rows = masked_attention(*self._global_split(x, n, ctx.positions), all_keys)
            y = torch.cat([global_rows, y[:, :, n:]], dim=2)
        return self.projections.merge(y)

    def pairs(self, seq_len: int, *, causal: bool) -> int:
        """The pairs of the windows and of the global tokens: n tokens read all, all others read n."""
        n = min(self.config.global_tokens, seq_len)
        return super().pairs(seq_len, causal=causal) + self.dims.heads * n * (2 * seq_len - n)

    def cost(self, work: Workload) -> Cost:
        """The cost of the mask, and the projections of the global queries and of their keys and values."""
        n = min(self.config.global_tokens, work.seq_len)
        tokens = 2 * work.seq_len + n if n else 0
        queries_keys_values = 2 * work.batch_size * tokens * work.d_model * work.inner_dim
        return super().cost(work) + Cost({"projections": queries_keys_values})

    def carried(self, seq_len: int) -> int:
        """The keys of the global tokens, and the other keys that are in a later window.

        As for every variant, keys of later tokens are not counted, although global queries read them.
        """
        if self.dims.queries_per_key > 1:  # without global tokens
            return super().carried(seq_len)
        n = min(self.config.global_tokens, seq_len)
        windows = ByHead(tuple(Window(self.window, dilation) for dilation in self.dilations))
        return n * self.dims.heads + carried_keys(windows, seq_len - n, self.dims.heads)
