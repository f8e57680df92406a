"""StreamingLLM: a window, and the first tokens as attention sinks (Xiao 2023, arXiv:2309.17453, §3.2).

Shapes: B batch, T tokens, C channels, H heads, K heads of keys, D channels of a head, S sinks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.base import (
    Caps,
    Clock,
    Complexity,
    Context,
    Dims,
    Impl,
    Info,
    MixerOut,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.fused import backends
from variants.ops.patterns import masks
from variants.ops.patterns.first_and_last import FirstAndLast
from variants.ops.patterns.given_scores import attention_with_given
from variants.ops.patterns.masked_attention import FLEX, TILES, MaskedAttention
from variants.ops.patterns.masks import Rule, Window
from variants.ops.patterns.pair_counts import window_pairs
from variants.ops.patterns.part_kernels import missing_fused
from variants.ops.patterns.regions import Region
from variants.ops.patterns.strided_parts import piece_size
from variants.ops.projections import rotary, rotary_table_at, spread


@dataclass(frozen=True, kw_only=True)
class StreamingLLMConfig(VariantConfig):
    """Knobs of the window and the sinks."""

    impl: Literal["auto", "fused", "plain", "flex"] = "auto"
    """Implementation of the window. fused: tiles with allowed pairs, by torch's CPU attention kernel. plain:
    the same tiles by matrix products, on any device. flex: FlexAttention, compiled, on CUDA, for the
    positions of the text; untried. auto: fused on the CPU, plain elsewhere."""
    window: int = knob(256, least=1, unit="tokens")
    """The last tokens that a query reads, itself included."""
    sinks: int = knob(4, least=1, unit="tokens")
    """Tokens at the start of the sequence that all later tokens read."""
    positions: Literal["cache", "text"] = "cache"
    """Positions of a query and of the sinks that it reads. cache: those in the cache, as in the paper, in
    which no distance is larger than window + sinks − 1. text: those in the sequence. Positions of the tokens
    in the window differ by the same distances in both."""


@dataclass(frozen=True)
class FirstTokens(Rule):
    """The first n keys."""

    n: int

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """j < n."""
        return (j < self.n) & (i >= 0)


class _TurnedScores(torch.autograd.Function):
    """Scores (B, H, T, S) of queries (B, H, T, D), turned back by angles, with keys (B, H, S, D).

    Saves the queries, which attention saves anyway, and turns them again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, cos, sin)
        return _turned(q, cos, -sin) @ k.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, cos, sin = ctx.saved_tensors
        return _turned(d_scores @ k, cos, sin), d_scores.mT @ _turned(q, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D), of which channel i and i + D/2 are turned by the angles of (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def fused(layer: StreamingLLM, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> Tensor:
    """Tiles, by torch's CPU attention kernel. Raises ValueError for another device."""
    if reason := missing_fused(layer.device_type):
        raise ValueError(reason)
    return layer.window_and_sinks(q, k, v, positions, "fused")


def plain(layer: StreamingLLM, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> Tensor:
    """Tiles, by matrix products."""
    return layer.window_and_sinks(q, k, v, positions, "plain")


def flex(layer: StreamingLLM, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> Tensor:
    """FlexAttention with the rule. *Untried*: no device has run it yet."""
    return backends.flex(q, k, v, layer.mask(q.shape[2], causal=True))


class StreamingLLM(MaskedAttention):
    """Softmax attention to the last `window` tokens and to the first `sinks` tokens.

    The paper keeps these tokens of a model that was trained with dense attention, so that it can read endless
    text: without the first tokens, to which such a model gives much of its attention, it fails. Here the
    model is trained as it is used. Positions are those in the cache (§3.2): a query has distances of at most
    window + sinks − 1 to the tokens that it reads, also to the sinks. The paper rotates the keys of the cache
    again in every step. Here keys are kept rotated, and a query is turned back for the sinks.

    There is no bidirectional form: the paper's reason for these tokens is that all later tokens of a causal
    model have seen them. Bidirectional windows with tokens that all others read are `longformer` with
    `global_tokens`.
    """

    Config = StreamingLLMConfig
    config: StreamingLLMConfig
    info = Info(
        paper="Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453",
        family="fixed patterns",
        complexity=Complexity(time=1, memory=1, formula="T·(w + s)", source="Xiao 2023, Figure 1"),
        caps=Caps(causal=True, bidirectional=False),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "fused": Impl(
            run=fused,
            missing=lambda device, dtype, head_dim: missing_fused(device.type),
            flop_overhead_reason=TILES["fused"].flop_overhead_reason,
            auto_on=("cpu",),
        ),
        "plain": Impl(
            run=plain,
            flop_overhead_reason=TILES["plain"].flop_overhead_reason,
            auto_on=(Impl.OTHER_DEVICES,),
        ),
        "flex": replace(FLEX, run=flex, untried=True),
    }

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """A mask gives one query no second position."""
        assert isinstance(config, StreamingLLMConfig)
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        if config.impl == "flex" and config.positions == "cache":
            return "positions=cache: not supported by impl=flex, use positions=text or impl=auto"
        return None

    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """The window and the first tokens."""
        return Window(self.config.window) | FirstTokens(self.config.sinks)

    def regions(self, seq_len: int, *, causal: bool) -> tuple[Region, ...]:
        """The window. The scores with sinks that are no longer in it are computed apart."""
        return (Region(rule=Window(self.config.window) & masks.causal, heads=(0, self.dims.heads)),)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        return MixerOut(self.projections.merge(self.run_impl(self, q, k, v, ctx.positions)))

    def window_and_sinks(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, kernel: str
    ) -> Tensor:
        """One softmax over both: (B, H, T, D) → (B, H, T, D)."""
        tokens, sinks = q.shape[2], self.config.sinks
        scores = self._scores_of_sinks(q, k[:, :, :sinks], positions)
        parts = self.parts(tokens, causal=True, device=q.device)
        piece = piece_size(tokens, self.device_type)
        return attention_with_given(q, k, v, parts, kernel, piece, scores, v[:, :, :sinks])

    def _scores_of_sinks(self, q: Tensor, k: Tensor, positions: Tensor | None) -> Tensor:
        """Scores (B, H, T, S) with the sinks; −∞ for a sink in the window of the query."""
        query = torch.arange(q.shape[2], device=q.device)
        if self.config.positions == "text":
            products: Tensor = q @ k.mT
        else:
            text = query if positions is None else positions
            turns = text - text[self._in_cache(query)]
            table = rotary_table_at(turns, q.shape[-1], q, self.dims.rotary_base)
            products = _TurnedScores.apply(q, k, *table)  # type: ignore[no-untyped-call]
        scores: Tensor = products.to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        in_window = query[:, None] - query[: k.shape[2]] < self.config.window
        return scores.masked_fill(in_window, float("-inf"))

    def _in_cache(self, query: Tensor) -> Tensor:
        """The positions of queries in the cache, of their positions in the sequence."""
        return query.clamp(max=self.config.sinks + self.config.window - 1)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """All scores, masked. For the sinks, queries are rotated by their position in the cache."""
        self.require_objective(causal=ctx.causal)
        sizes, tokens = self.dims, x.shape[1]
        widths = sizes.inner_dim, sizes.key_dim, sizes.key_dim
        q, k, v = (
            F.linear(x, weight).unflatten(-1, (-1, sizes.head_dim))
            for weight in self.projections.qkv.weight.split(widths)
        )
        index = torch.arange(tokens, device=x.device)
        text = index if ctx.positions is None else ctx.positions
        most = self.config.sinks + self.config.window - 1  # the position of a query when the cache is full
        cache = text if self.config.positions == "text" else text[index.clamp(max=most)]
        near, for_sinks = (rotary(q, at, sizes.rotary_base).transpose(1, 2) for at in (text, cache))
        keys, values = (
            spread(t.transpose(1, 2), sizes.queries_per_key, dim=1)
            for t in (rotary(k, text, sizes.rotary_base), v)
        )
        scores = torch.where(index < self.config.sinks, for_sinks @ keys.mT, near @ keys.mT)
        scores = scores / math.sqrt(sizes.head_dim)
        scores = scores.masked_fill(~self.attention_mask(tokens, causal=True).to(x.device), float("-inf"))
        return self.projections.merge(scores.softmax(-1) @ values)

    def pairs(self, seq_len: int, *, causal: bool) -> int:
        """The pairs of windows among the tokens that are no sinks, and the pairs of all tokens with sinks."""
        sinks = min(self.config.sinks, seq_len)
        rest = seq_len - sinks
        window = window_pairs(rest, self.config.window, is_causal=True)
        return self.dims.heads * (window + sinks * (sinks + 1) // 2 + rest * sinks)

    def carried(self, seq_len: int) -> int:
        """The sinks, and the other tokens that are in a later window."""
        sinks = min(self.config.sinks, seq_len)
        return self.dims.key_heads * (sinks + min(seq_len - sinks, self.config.window - 1))

    def init_state(  # type: ignore[override]  # another cache
        self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype
    ) -> FirstAndLast:
        """The sinks, and a ring of the tokens of the window."""
        return FirstAndLast(
            (batch_size, self.dims.key_heads, self.dims.head_dim),
            self.config.sinks,
            self.config.window - 1,
            max_len,
            clock=clock,
            dtype=dtype,
            device=self.projections.qkv.weight.device,
        )

    def step(self, x: Tensor, state: FirstAndLast) -> Tensor:  # type: ignore[override]
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence."""
        q, k, v = self.projections.split_next(x, state.clock)
        if not state.clock.position and x.shape[1] > 1:
            state.write(k, v)
            k, v = self.projections.spread(k), self.projections.spread(v)
            return self.projections.merge(self.run_impl(self, q, k, v, None))
        for_sinks = None
        if self.config.positions == "cache":
            query = state.clock.positions(x.shape[1], q.device)
            cos, sin = state.clock.once(
                ("turns", x.shape[1], self.config, self.dims, q.dtype, q.device),
                lambda: rotary_table_at(query - self._in_cache(query), q.shape[-1], q, self.dims.rotary_base),
            )
            for_sinks = _turned(q, cos, -sin)
        return self.projections.merge(state.attend(q, k, v, for_first=for_sinks))

    def decoding_bytes(self, work: Workload) -> int:
        """What later queries may read: a state has no slot beside."""
        return self.state_bytes(work)
