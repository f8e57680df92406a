"""Learnt sinks: a number for each head in the denominator of the softmax (gpt-oss, arXiv:2508.10925).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Caps, Clock, Complexity, Context, Dims, Impl, Info, VariantConfig
from variants.knobs import knob
from variants.ops.patterns import masks
from variants.ops.patterns.first_and_last import FirstAndLast
from variants.ops.patterns.given_scores import attention_with_given
from variants.ops.patterns.masked_attention import TILES, MaskedAttention
from variants.ops.patterns.masks import Rule, Window
from variants.ops.patterns.strided_parts import Part, piece_size

ADDED_CHANNELS = 8
"""Channels that impl=sdpa adds to a head: one for the sink; kernels want a multiple of 8."""


@dataclass(frozen=True, kw_only=True)
class LearntSinkConfig(VariantConfig):
    """Knobs of the keys."""

    impl: Literal["auto", "fused", "plain", "sdpa"] = "auto"
    """Implementation of attention. fused: torch's CPU attention kernel, which returns the logsumexp. plain:
    tiles by matrix products, on any device; only with a window. sdpa: scaled_dot_product_attention with a
    further key, on any device; only without a window. auto: fused on the CPU; elsewhere plain with a window
    and sdpa without."""
    window: int = knob(0, least=0, unit="tokens")
    """Tokens that a query reads on each side, itself included; 0: all tokens. Layers of gpt-oss alternate
    between 128 and 0, for example layers=["learnt_sink(window=128)","learnt_sink"] of `hybrid`."""


def sdpa(layer: LearntSink, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The sink is a first token: its key has a score of σ with every query, by a channel in which all queries
    are 1, and its value is 0. It needs a query, whose output is dropped, to be the first for a causal mask.
    """
    added = (0, ADDED_CHANNELS, 1, 0)
    queries, keys, values = (F.pad(t, added) for t in (q, k, v))
    queries.select(-1, q.shape[-1]).fill_(1)
    keys.select(2, 0).select(-1, q.shape[-1]).copy_(layer.sink * math.sqrt(q.shape[-1]))
    y = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal, scale=q.shape[-1] ** -0.5)
    return y[:, :, 1:, : q.shape[-1]]


class LearntSink(MaskedAttention):
    """Softmax attention whose weights are e^s_j / (e^σ + Σ e^s), with a learnt number σ for each head.

    A head can so read little of all tokens, for which other models use their first tokens (`streaming_llm`).
    The output is that of softmax attention times sigmoid(L − σ), L being the logsumexp of the scores.

    σ is 0 at first, so that the denominator is 1 + Σ e^s. Any kernel that returns L is made to compute this:
    the sink is one more part of the keys (`patterns.given_scores`), whose values are 0.

    Deviations from gpt-oss: rotary positions without YaRN; no biases of the projections. The bidirectional
    form is ours; the formula is the same.
    """

    Config = LearntSinkConfig
    config: LearntSinkConfig
    info = Info(
        paper="OpenAI 2025, gpt-oss-120b & gpt-oss-20b Model Card, arXiv:2508.10925",
        family="dense",
        complexity=Complexity(time=2, memory=2, formula="T²", source="as dense attention"),
        caps=Caps(causal=True, bidirectional=True),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "fused": TILES["fused"],
        "plain": replace(TILES["plain"], auto_on=()),
        "sdpa": Impl(
            run=sdpa,
            flop_overhead_reason=f"the sink adds a key, and {ADDED_CHANNELS} channels to each head",
            auto_on=(Impl.OTHER_DEVICES,),
        ),
    }

    def __init__(self, config: LearntSinkConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.sink = nn.Parameter(torch.zeros(dims.heads))

    @classmethod
    def info_for(cls, config: VariantConfig) -> Info:
        """A window makes the cost linear."""
        assert isinstance(config, LearntSinkConfig)
        if not config.window:
            return cls.info
        linear = Complexity(time=1, memory=1, formula="T·w", source="as a window")
        return replace(cls.info, family="fixed patterns", complexity=linear)

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """plain has no form without a window, which would store all scores, and sdpa none with one."""
        assert isinstance(config, LearntSinkConfig)
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        if config.impl == "plain" and not config.window:
            return "impl=plain: would store T × T scores with window=0; use auto, fused or sdpa"
        if config.impl == "sdpa" and config.window:
            return f"impl=sdpa: has no windows, and window={config.window}; use auto, fused or plain"
        return None

    @classmethod
    def resolve_impl(cls, config: VariantConfig, device_type: str) -> str | None:
        """On devices other than the CPU `auto` is plain if there is a window."""
        assert isinstance(config, LearntSinkConfig)
        if config.impl == "auto" and device_type != "cpu" and config.window:
            return "plain"
        return super().resolve_impl(config, device_type)

    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """All keys, or a window."""
        return Window(self.config.window) if self.config.window else masks.all_keys

    def attend(self, q: Tensor, k: Tensor, v: Tensor, parts: list[Part], kernel: str) -> Tensor:
        """One softmax over the keys of all parts and the sink: (B, H, T, D) → (B, H, T, D)."""
        sink = self.sink.to(torch.promote_types(q.dtype, torch.float32))
        scores = sink.view(-1, 1, 1).expand(*q.shape[:3], 1)
        piece = piece_size(q.shape[2], self.device_type)
        return attention_with_given(q, k, v, parts, kernel, piece, scores, None)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """A column of scores for the sink, which is dropped after the softmax."""
        q, k, v = self.projections.split(x, ctx.positions)
        allowed = self.allowed(x.shape[1], causal=ctx.causal).to(x.device)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, float("-inf"))
        sink = self.sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        return self.projections.merge(weights @ v)

    def init_state(  # type: ignore[override]  # another cache
        self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype
    ) -> FirstAndLast:
        """The keys and values of the window, or of all tokens."""
        first, last = (0, self.config.window - 1) if self.config.window else (max_len, 0)
        return FirstAndLast(
            (batch_size, self.dims.key_heads, self.dims.head_dim),
            first,
            last,
            max_len,
            clock=clock,
            dtype=dtype,
            device=self.sink.device,
        )

    def step(self, x: Tensor, state: FirstAndLast) -> Tensor:  # type: ignore[override]
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence."""
        q, k, v = self.projections.split_next(x, state.clock)
        if state.clock.position or x.shape[1] == 1:
            return self.projections.merge(state.attend(q, k, v, sink=self.sink))
        state.write(k, v)
        k, v = self.projections.spread(k), self.projections.spread(v)
        return self.projections.merge(self.run_impl(self, q, k, v, True))
