"""DeepSeek sparse attention: an indexer chooses the tokens that a query reads (arXiv:2512.02556).

Shapes: B batch, T tokens, C channels, H heads, K heads of keys, D channels of a head, h heads and d channels
of the indexer, c keys of a query, n queries, S keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
from variants.ops.chosen.chosen_keys import best_keys, choose, chosen_attention, index_scores
from variants.ops.projections import Projections, masked_attention, rotary

Index = tuple[Tensor, Tensor, Tensor]
"""Queries (B, n, h, d), keys (B, n, d) and weights (B, n, h) of the indexer."""


@dataclass(frozen=True, kw_only=True)
class DSAConfig(VariantConfig):
    """Knobs of the indexer."""

    top_k: int = knob(128, least=1, unit="tokens")
    """Tokens that a query reads, itself included if it is chosen. The paper has 2,048, of up to 131,072."""
    index_heads: int = knob(4, least=1, unit="heads")
    """Query heads of the indexer, which share one head of keys. The released model has 64."""
    index_dim: int = knob(32, least=2, multiple=2, unit="channels")
    """Channels of a head of the indexer. The released model has 128."""


class DSA(SequenceMixer):
    """softmax(QKᵀ/√D)V over the k tokens with the largest I_ts = Σ_j w_tj · ReLU(q_tj · k_s), s ≤ t.

    The lightning indexer has a few small heads, with rotary positions. All heads of a query read the tokens
    that it chooses. Later tokens are masked before the choice. A query with at most k tokens reads all.

    The choice has no gradient. The indexer learns from an auxiliary loss alone: the divergence KL(p ‖ softmax
    of I) over the chosen tokens, where p is the mean of the attention weights of all heads. p and the inputs
    of the indexer are detached: the loss trains nothing else, and the task does not train the indexer.

    The scores of the indexer grow with T². They are computed for some queries at a time, and no T × T numbers
    are stored.

    Deviations from the paper: it builds on latent attention, whose compressed queries also feed the indexer;
    here attention has heads of its own, or shared ones, and the indexer reads the layer's input. The paper
    first trains the indexer beside dense attention, with all other parameters frozen; here it is trained with
    the model from the start, on the chosen tokens. The released model rotates half of the indexer's channels,
    normalises its keys and has 8-bit numbers; here all channels are rotated and keys are not normalised.
    """

    Config = DSAConfig
    config: DSAConfig
    position_scheme = "rotary"
    no_shared_keys = None
    flop_overhead_reason = (
        "the first queries gather places of tokens that do not exist, a piece of queries computes the "
        "indexer's scores of some later keys, and training computes those of chosen keys again for the loss"
    )
    info = Info(
        paper="DeepSeek-AI 2025, DeepSeek-V3.2, arXiv:2512.02556",
        family="learned patterns",
        complexity=Complexity(time=2, memory=1, formula="T·k + T²·h·d/(H·D)", source="DeepSeek-V3.2, §2.1"),
        caps=Caps(causal=True, bidirectional=False),
    )

    def __init__(self, config: DSAConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.index_q = nn.Linear(dims.d_model, config.index_heads * config.index_dim, bias=False)
        self.index_k = nn.Linear(dims.d_model, config.index_dim, bias=False)
        self.index_w = nn.Linear(dims.d_model, config.index_heads, bias=False)

    def auxiliary_parameters(self) -> Iterator[nn.Parameter]:
        """The indexer's: the task never reaches them."""
        for module in (self.index_q, self.index_k, self.index_w):
            yield from module.parameters()

    def _index(self, x: Tensor, positions: Tensor | None) -> Index:
        """Queries, keys and weights of the indexer, from the detached tokens."""
        x, base = x.detach(), self.dims.rotary_base
        q = rotary(self.index_q(x).unflatten(-1, (self.config.index_heads, -1)), positions, base)
        k = rotary(self.index_k(x)[:, :, None], positions, base)[:, :, 0]
        w = self.index_w(x) * (self.config.index_heads * self.config.index_dim) ** -0.5
        return q, k, w.to(q.dtype)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut with the indexer's loss; carries no state. Raises ValueError where not
        causal."""
        y, loss = self._mix(*self.projections.split_shared(x, ctx.positions), self._index(x, ctx.positions))
        return MixerOut(y, aux_loss=loss)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, index: Index) -> tuple[Tensor, Tensor | None]:
        picks = choose(*index, self.config.top_k, self.device_type)
        y, loss = chosen_attention(q, k, v, index, picks, device_type=self.device_type)
        return self.projections.merge(y), loss

    def choices(self, x: Tensor, ctx: Context) -> Tensor:
        """The tokens that each query reads (B, T, c); of query t < c, only those up to t exist."""
        return choose(*self._index(x, ctx.positions), self.config.top_k, self.device_type)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Masked attention; the mask is that of the chosen tokens."""
        self.require_objective(causal=ctx.causal)
        q, k, v = self.projections.split(x, ctx.positions)
        token = torch.arange(x.shape[1], device=x.device)
        chosen = torch.zeros(len(x), len(token), len(token), dtype=torch.bool, device=x.device)
        chosen = chosen.scatter(2, self.choices(x, ctx), value=True) & (token <= token[:, None])
        return self.projections.merge(masked_attention(q, k, v, chosen[:, None]))

    # --- cost -----------------------------------------------------------------------------------------

    def cost(self, work: Workload) -> Cost:
        """Projections, also of the indexer. Indexer: 2·(h·d + h) for each causal pair of a query with more
        than k tokens; no gradient passes through it. Attention: 4·D for each query and chosen key. The
        auxiliary loss, which evaluation does not compute, is not counted."""
        tokens, config = work.seq_len, self.config
        heads, width = config.index_heads, config.index_heads * config.index_dim
        count = min(config.top_k, tokens)
        pairs = tokens * (tokens + 1) // 2 - count * (count + 1) // 2
        chosen = count * (count + 1) // 2 + (tokens - count) * count
        learnt = 2 * work.batch_size * tokens * work.d_model * (width + config.index_dim + heads)
        parts = {
            "projections": Projections.flops(work),
            "index_projections": learnt,
            "indexer": 2 * work.batch_size * (width + heads) * pairs,
            "attention": 4 * work.batch_size * work.inner_dim * chosen,
        }
        return Cost(parts, {"index_projections": 1, "indexer": 0})  # the indexer's inputs are detached

    def state_bytes(self, work: Workload) -> int:
        """Bytes of all keys and values, and of the keys of the indexer."""
        numbers = 2 * work.key_dim + self.config.index_dim
        return work.batch_size * work.seq_len * numbers * work.element_bytes

    # --- decoding -------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> DSAState:
        """All keys and values, and the keys of the indexer."""
        shape = batch_size, self.dims.key_heads, max_len, self.dims.head_dim
        device = self.index_k.weight.device
        return DSAState(clock, shape, self.config.index_dim, dtype, device)

    def decoding_bytes(self, work: Workload) -> int:
        """The state after the last token."""
        return self.state_bytes(work)

    def step(self, x: Tensor, state: DSAState) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence; one token gathers its keys."""
        begin, tokens = state.clock.position, x.shape[1]
        end = begin + tokens
        q, k, v = self.projections.split_next(x, state.clock)
        query = state.clock.positions(tokens, x.device)
        index = self._index(x, query)
        state.keys[:, :, begin:end], state.values[:, :, begin:end], state.index[:, begin:end] = k, v, index[1]
        if not begin and tokens > 1:
            return self._mix(q, k, v, index)[0]
        scores = index_scores(index[0], state.index[:, :end].to(q.dtype), index[2])
        best = best_keys(scores, query, min(self.config.top_k, end))  # (B, n, c)
        if tokens == 1:
            places = best.expand(-1, k.shape[1], -1)[..., None].expand(-1, -1, -1, k.shape[3])
            keys, values = (t.gather(2, places).to(q.dtype) for t in (state.keys, state.values))
            mask = None
        else:
            keys, values = (t[:, :, :end].to(q.dtype) for t in (state.keys, state.values))
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(2, best, value=True)
            mask = (chosen & (torch.arange(end, device=x.device) <= query[:, None]))[:, None]
        spread = self.projections.spread
        y = F.scaled_dot_product_attention(q, spread(keys), spread(values), attn_mask=mask)
        return self.projections.merge(y)


class DSAState(DecodingState):
    """Keys and values (B, K, max_len, D), and the keys (B, max_len, d) of the indexer."""

    def __init__(
        self,
        clock: Clock,
        shape: tuple[int, int, int, int],
        index_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (B, K, max_len, D)."""
        super().__init__(clock, shape[2])
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.index = torch.zeros(shape[0], shape[2], index_dim, dtype=dtype, device=device)
