"""Synthesizer: attention weights without products of tokens (Tay 2020, arXiv:2005.00743).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, L maximum length, k rank.
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
    DecodingState,
    Dims,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.learnt_weights import mixed
from variants.ops.patterns import masks


@dataclass(frozen=True, kw_only=True)
class SynthesizerConfig(VariantConfig):
    """Knobs of synthesised attention."""

    kind: Literal["dense", "random", "factorised"] = "dense"
    """Scores of a token with each position. dense: computed from the token alone, by two linear maps with a
    ReLU. random: learnt numbers, the same for all sequences. factorised: random, as a product of two matrices
    of rank `rank`."""
    rank: int = knob(8, least=1, unit="columns")
    """Columns of the two matrices of each head with kind=factorised; else not used."""


class Synthesizer(SequenceMixer):
    """softmax(R)V, where R is synthesised, by three of the paper's ways.

    dense: R_t = W₂ ReLU(W₁ x_t), L scores for a token. The hidden layer of a head has D channels. So R is
    attention of hidden vectors to learnt keys, the rows of W₂, and runs in attention kernels. random: R is
    a parameter of L² numbers for each head. factorised: R = R₁R₂ᵀ ("Factorized Random"). Weights of these
    two are the same for all sequences, and are computed once, in pieces of queries; both kinds are computed
    in the dtype of the parameters, also under autocast.

    A sequence of T < L tokens uses the first T positions; a longer one raises ValueError. Parameters grow
    with L. There are no position codes: the learnt scores know positions.

    Deviations from the paper: no biases, as in all projections of this project. Later keys are masked in the
    causal form. The initial scores have a standard deviation of 1. "Factorized Dense" and the mixtures with
    dot products are left out.
    """

    Config = SynthesizerConfig
    config: SynthesizerConfig
    position_scheme = "learnt"
    info = Info(
        paper="Tay et al. 2020, Synthesizer, arXiv:2005.00743",
        family="low rank",
        complexity=Complexity(time=2, memory=2, formula="T²", source="survey of Tay 2020, Table 1", survey=2),
        caps=Caps(causal=True, bidirectional=True, fixed_length=True),
    )

    def __init__(self, config: SynthesizerConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        inner, longest, heads = dims.inner_dim, dims.seq_len, dims.heads
        self.value = nn.Linear(dims.d_model, inner, bias=False)
        self.out = nn.Linear(inner, dims.d_model, bias=False)
        if config.kind == "dense":
            self.hidden = nn.Linear(dims.d_model, inner, bias=False)
            self.scores = self._draw(heads, longest, dims.head_dim, size=dims.head_dim**-0.5)  # W₂
        elif config.kind == "random":
            self.scores = self._draw(heads, longest, longest, size=1.0)
            self.flop_overhead_reason = "a piece of queries has scores with all keys up to its last query"
        else:
            size = config.rank**-0.25
            self.rows = self._draw(heads, longest, config.rank, size=size)  # R₁
            self.columns = self._draw(heads, longest, config.rank, size=size)  # R₂
            self.flop_overhead_reason = "a piece of queries has scores with all keys up to its last query"

    @staticmethod
    def _draw(*shape: int, size: float) -> nn.Parameter:
        weights = torch.randn(shape, dtype=torch.float32) * size
        return nn.Parameter(weights.to(torch.get_default_dtype()))

    def _require_length(self, seq_len: int) -> None:
        if seq_len > self.dims.seq_len:
            raise ValueError(
                f"{seq_len} tokens: the scores were built for at most {self.dims.seq_len}; "
                "build the layer with a longer dims.seq_len"
            )

    def _by_head(self, x: Tensor, weight: Tensor) -> Tensor:
        """(B, T, C) → (B, H, T, D)."""
        y: Tensor = F.linear(x, weight).unflatten(-1, (self.dims.heads, -1)).transpose(1, 2)
        return y

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state. Raises ValueError where T > L."""
        seq_len = x.shape[1]
        self._require_length(seq_len)
        if self.config.kind == "dense":
            v = self._by_head(x, self.value.weight)
            hidden = self._by_head(x, self.hidden.weight).relu()
            keys = self.scores[:, :seq_len].to(v.dtype).expand(len(x), -1, -1, -1)
            y = F.scaled_dot_product_attention(hidden, keys, v, is_causal=ctx.causal, scale=1.0)
        else:
            random = self.config.kind == "random"
            left, right = (self.scores, None) if random else (self.rows, self.columns)
            # a row of scores has the gradient of one token, in which no rounding averages out
            with torch.autocast(x.device.type, enabled=False):
                v = self._by_head(x.to(left.dtype), self.value.weight)
                y = mixed(v, left, right, is_causal=ctx.causal, device_type=self.device_type)
                return MixerOut(self.out(y.transpose(1, 2).flatten(2)))
        return MixerOut(self.out(y.transpose(1, 2).flatten(2)))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """All scores, masked."""
        self.require_objective(causal=ctx.causal)
        seq_len, heads = x.shape[1], self.dims.heads
        self._require_length(seq_len)
        if self.config.kind == "dense":
            hidden = torch.einsum("btc,dc->btd", x, self.hidden.weight).unflatten(-1, (heads, -1))
            hidden = hidden.transpose(1, 2) * self.choices(x, ctx)  # the ReLU
            scores = torch.einsum("bhid,hjd->bhij", hidden, self.scores[:, :seq_len])
        elif self.config.kind == "random":
            scores = self.scores[:, :seq_len, :seq_len]
        else:
            scores = torch.einsum("hik,hjk->hij", self.rows[:, :seq_len], self.columns[:, :seq_len])
        allowed = self.attention_mask(seq_len, causal=ctx.causal).to(x.device)
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
        v = torch.einsum("btc,dc->btd", x, self.value.weight).unflatten(-1, (heads, -1)).transpose(1, 2)
        y: Tensor = self.out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return y

    def choices(self, x: Tensor, ctx: Context) -> Tensor:
        """Which hidden units (B, H, T, D) are above 0: a rounding moves one across, and the gradient jumps.
        With the other kinds there are none, (B, H, T, 0)."""
        if self.config.kind != "dense":
            return x.new_zeros(len(x), self.dims.heads, x.shape[1], 0, dtype=torch.bool)
        return self._by_head(x, self.hidden.weight) > 0

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All keys, or those up to the query."""
        return masks.matrix(masks.causal if causal else masks.all_keys, seq_len)

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> Values:
        """The values of all tokens. Raises ValueError for more tokens than there are scores for."""
        self._require_length(max_len)
        shape = (batch_size, self.dims.heads, max_len, self.dims.head_dim)
        return Values(clock, max_len, torch.zeros(shape, dtype=dtype, device=self.value.weight.device))

    def step(self, x: Tensor, state: Values) -> Tensor:
        """(B, n, C) → (B, n, C)."""
        first, tokens = state.clock.position, x.shape[1]
        end = first + tokens
        state.values[:, :, first:end] = self._by_head(x, self.value.weight)
        if first == 0 and tokens > 1:
            return self.forward(x, Context(causal=True)).y
        if self.config.kind == "dense":
            hidden = self._by_head(x, self.hidden.weight).relu()
            scores = hidden @ self.scores[:, :end].to(hidden.dtype).mT
        elif self.config.kind == "random":
            scores = self.scores[:, first:end, :end]
        else:
            scores = self.rows[:, first:end] @ self.columns[:, :end].mT
        position = torch.arange(end, device=x.device)
        scores = scores.masked_fill(position > position[first:, None], float("-inf"))
        y = scores.softmax(dim=-1).to(x.dtype) @ state.values[:, :, :end].to(x.dtype)
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged

    def decoding_bytes(self, work: Workload) -> int:
        """The values of all tokens; there are no keys."""
        return self.state_bytes(work)

    def cost(self, work: Workload) -> Cost:
        """Values and outputs, the hidden layer; scores, which sequences of a batch share unless dense; the
        weighted sum."""
        t, kind = work.seq_len, self.config.kind
        pairs = t * (t + 1) // 2 if work.causal else t * t
        linear = 2 * work.batch_size * t * work.d_model * work.inner_dim
        weighted = 2 * work.batch_size * pairs * work.inner_dim
        scores = {"dense": weighted, "random": 0, "factorised": 2 * work.heads * pairs * self.config.rank}
        return Cost(
            {
                "projections": linear * (3 if kind == "dense" else 2),
                "attention": weighted,
                "scores": scores[kind],
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the values of all tokens; there are no keys."""
        return work.batch_size * work.seq_len * work.inner_dim * work.element_bytes


class Values(DecodingState):
    """The values (B, H, max_len, D) of the tokens so far."""

    def __init__(self, clock: Clock, max_len: int, values: Tensor) -> None:
        super().__init__(clock, max_len)
        self.values = values
