"""Adaptive attention span: each head learns how far back it reads (Sukhbaatar 2019, arXiv:1905.07799, §2.2).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head; W kept tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from variants.base import (
    Caps,
    Clock,
    Complexity,
    Context,
    Cost,
    DecodingState,
    Dims,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.patterns import masks
from variants.ops.patterns.soft_window import block_size, keys_before, soft_window
from variants.ops.projections import Projections

LEAST = 1e-3
"""Tokens. Keys that are nearer to the end of the ramp have the weight 0, because z is a rounded product."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveSpanConfig(VariantConfig):
    """Knobs of the span."""

    max_span: int = knob(1024, least=1, unit="tokens")
    """Largest span that a head can learn (the paper's S)."""
    ramp: int = knob(32, least=1, unit="tokens")
    """Tokens over which the weight falls from 1 to 0 after the span (the paper's R)."""
    initial_span: int = knob(0, least=0, unit="tokens")
    """Span of every head before training; at most `max_span`."""
    penalty: float = knob(2e-6, least=0)
    """Factor of the mean span, in tokens, in the auxiliary loss (the paper's λ)."""

    def __post_init__(self) -> None:
        self.require("initial_span", self.initial_span <= self.max_span, f"at most max_span={self.max_span}")


class AdaptiveSpan(SequenceMixer):
    """Softmax attention whose weights at distance x are multiplied by min(1, max(0, (R + z − x)/R)) and
    normalised again. Each head learns its span z, from 0 to `max_span`.

    The auxiliary loss is `penalty` times the mean of z. It is kept apart from the loss of the task, and z is
    trained by both: so it belongs to no list of parameters that only the auxiliary loss trains. z is kept
    within its bounds after each step. The parameter is z / max_span, as in the authors' code, so that the
    steps of an optimiser have a suitable size.

    Shapes must not depend on numbers on a device. The number of keys that is computed is therefore a number
    of the host, which is set before training, when weights are loaded and after each step. On an accelerator,
    this is a copy of H numbers in a step. It is rounded up to a quarter of the ramp. On fake tensors, which
    have no numbers, spans keep the size they had. `spans` are the learnt spans; `cost` and `state_bytes` are
    those of the current spans.

    Deviations from the paper: positions are rotary; the paper has learnt vectors for distances. A token also
    reads itself; in the paper its span ends with the token before it. Scores are divided by √D, which eq. 1
    does not do. There is no dynamic span (§2.2,
    "Dynamic attention span").
    """

    Config = AdaptiveSpanConfig
    config: AdaptiveSpanConfig
    position_scheme = "rotary"
    info = Info(
        paper="Sukhbaatar et al. 2019, Adaptive Attention Span in Transformers, arXiv:1905.07799",
        family="learned patterns",
        complexity=Complexity(time=1, memory=1, formula="T·(z + R)", source="Sukhbaatar 2019, §2.2"),
        caps=Caps(causal=True, bidirectional=False),
    )
    flop_overhead_reason = "a block of queries computes all keys that any of its queries may read"

    def __init__(self, config: AdaptiveSpanConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.span = nn.Parameter(torch.full((dims.heads,), config.initial_span / config.max_span))
        self.spans = (float(config.initial_span),) * dims.heads
        self.register_load_state_dict_post_hook(_note_loaded)  # type: ignore[no-untyped-call]

    # --- spans ----------------------------------------------------------------------------------------

    def note_spans(self) -> None:
        """Read the spans from the parameter, on which the sizes of the computation depend."""
        if self.span.is_meta or isinstance(self.span.detach(), FakeTensor):
            return
        self.spans = tuple(self.config.max_span * fraction for fraction in self.span.detach().tolist())

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the spans within their bounds."""
        self.span.clamp_(0, 1)
        self.note_spans()

    @property
    def reaches(self) -> tuple[int, ...]:
        """For each head, the number of keys with a weight above 0, the token itself included."""
        return tuple(math.ceil(span + self.config.ramp - LEAST) for span in self.spans)

    def _fading(self, distance: Tensor, heads: slice) -> Tensor:
        """The factor of the weights (H', …) at each distance (…)."""
        ramp = self.config.ramp
        z = (self.span[heads] * self.config.max_span).to(torch.promote_types(self.span.dtype, torch.float32))
        z = z.view(-1, *[1] * distance.dim())
        left = ramp + z - distance
        return (left / ramp).clamp(0, 1) * ((left > LEAST) & (distance >= 0))

    def _groups(self, tokens: int) -> list[tuple[slice, int]]:
        """Neighbouring heads with the same number of keys, at most `tokens`."""
        unit = max(1, self.config.ramp // 4)
        extents = [min(tokens, -(-reach // unit) * unit) for reach in self.reaches]
        groups, first = [], 0
        for extent, some in groupby(extents):
            count = len(list(some))
            groups.append((slice(first, first + count), extent))
            first += count
        return groups

    # --- forward --------------------------------------------------------------------------------------

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut with the auxiliary loss; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        outputs = []
        for heads, extent in self._groups(x.shape[1]):
            block = block_size(extent, x.shape[1])
            before = keys_before(extent, block)
            query = torch.arange(block, device=x.device)[:, None] + before
            fading = self._fading(query - torch.arange(before + block, device=x.device), heads)
            own_q, own_k, own_v = (t[:, heads] for t in (q, k, v))
            y = soft_window(own_q, own_k, own_v, _log(fading), device_type=self.device_type)
            outputs.append(y)
        y = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        loss = self.config.penalty * self.config.max_span * self.span.mean()
        return MixerOut(self.projections.merge(y), aux_loss=loss)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """All weights, multiplied by the factor of their distance and divided by their sum."""
        self.require_objective(causal=ctx.causal)
        q, k, v = self.projections.split(x, ctx.positions)
        position = torch.arange(x.shape[1], device=x.device)
        scores = (q @ k.mT).float() if q.dtype == torch.bfloat16 else q @ k.mT
        scores = scores / math.sqrt(q.shape[-1])
        fading = self._fading(position[:, None] - position, slice(None)).to(scores.dtype)
        scores = scores.masked_fill(fading == 0, float("-inf"))
        weights = scores.softmax(-1) * fading
        weights = weights / weights.sum(-1, keepdim=True)
        return self.projections.merge(weights.to(v.dtype) @ v)

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """The keys that at least one head reads with the current spans."""
        return masks.matrix(masks.Window(max(self.reaches)) & masks.causal, seq_len)

    # --- cost and decoding ----------------------------------------------------------------------------

    def cost(self, work: Workload) -> Cost:
        """Scores and weighted sum: 4·D for each pair within the current spans and their ramps."""
        tokens = work.seq_len
        reaches = [min(reach, tokens) for reach in self.reaches]
        pairs = sum(reach * tokens - reach * (reach - 1) // 2 for reach in reaches)
        attention = 4 * work.batch_size * work.head_dim * pairs
        return Cost({"projections": Projections.flops(work), "attention": attention})

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the keys and values within the current spans and their ramps, counted for each head."""
        kept = sum(min(work.seq_len, reach - 1) for reach in self.reaches)
        return 2 * work.batch_size * kept * work.head_dim * work.element_bytes

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> LastKeys:
        """The last keys and values, as many as the head with the longest span reads."""
        shape = batch_size, self.dims.heads, min(max_len, max(self.reaches) - 1), self.dims.head_dim
        return LastKeys(clock, max_len, shape, dtype, self.span.device)

    def decoding_bytes(self, work: Workload) -> int:
        """Those of the longest span, in every head."""
        kept = min(work.seq_len, max(self.reaches) - 1)
        return 2 * work.batch_size * kept * work.inner_dim * work.element_bytes

    def step(self, x: Tensor, state: LastKeys) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence."""
        q, k, v = self.projections.split_next(x, state.clock)
        begin, tokens, kept = state.clock.position, x.shape[1], state.keys.shape[2]
        k, v = (
            torch.cat([held.to(q.dtype), new], dim=2) for held, new in ((state.keys, k), (state.values, v))
        )
        for held, new in ((state.keys, k), (state.values, v)):
            held.copy_(new[:, :, tokens:])
        if not begin and tokens > 1:
            return self.forward(x, Context(causal=True)).y
        key = torch.arange(kept + tokens, device=x.device) - kept
        bias = _log(self._fading(torch.arange(tokens, device=x.device)[:, None] - key, slice(None)))
        bias = bias.masked_fill(key < -begin, float("-inf"))  # slots that no token has filled yet
        scores = (q @ k.mT).to(bias.dtype) * q.shape[-1] ** -0.5 + bias
        return self.projections.merge(scores.softmax(-1).to(v.dtype) @ v)


class LastKeys(DecodingState):
    """The last keys and values (B, H, W, D); the slots of the newest tokens are the last ones."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(clock, max_len)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))


def _note_loaded(layer: AdaptiveSpan, _: Any) -> None:
    """A hook of `load_state_dict`."""
    layer.note_spans()


def _log(fading: Tensor) -> Tensor:
    """The logarithm of factors; −∞, without a gradient, where they are 0."""
    some = fading > 0
    return torch.where(some, torch.where(some, fading, 1).log(), float("-inf"))
