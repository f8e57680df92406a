"""Multi-head latent attention: keys and values from one vector a token (DeepSeek-V2, arXiv:2405.04434, §2.1).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, R rotary channels, r channels of a
latent vector, n tokens of a step.
"""

from __future__ import annotations

import math
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
from variants.ops.patterns import masks
from variants.ops.projections import masked_attention, rotary, rotary_next

EPSILON = 1e-6
"""Added to the mean square of a latent vector, as in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig(VariantConfig):
    """Knobs of the latent vectors."""

    rank: int = knob(0, least=0, unit="channels")
    """Width r of a latent vector; 0: half of d_model. With it, parameters are about those of dense attention.
    """
    rotary: int = knob(0, least=0, multiple=2, unit="channels")
    """Channels R with rotary positions, beside the others; 0: half of those of a head, as in the paper."""


class LatentAttention(SequenceMixer):
    """Softmax attention whose keys and values are linear maps of one normalised vector c of each token.

    Keys of a head are [W_uk c; one rotary key that all heads share], queries have as many rotary channels,
    and values are W_uv c. Decoding keeps c and the rotary key only, r + R numbers a token instead of 2·H·D,
    and reads them without computing keys or values: W_uk is absorbed by the query and W_uv by the output
    (§2.1.2). Training is not cheaper than that of dense attention: all keys and values are computed, and
    queries and keys are wider by R channels.

    Fused kernels want values as wide as keys, so values are padded with zeros.

    Deviations: queries are not compressed, as in the paper's Lite model; the paper compresses them to save
    memory in training. The widths follow from the model's, because the paper's r = 4·D is wider than small
    models.
    """

    Config = LatentAttentionConfig
    config: LatentAttentionConfig
    position_scheme = "rotary"
    no_shared_keys = "the keys and values of all heads come from one latent vector"
    flop_overhead_reason = "values are padded with zeros to the width of keys, which fused kernels want"
    info = Info(
        paper="DeepSeek-AI 2024, DeepSeek-V2, arXiv:2405.04434",
        family="dense",
        complexity=Complexity(time=2, memory=2, formula="T²", source="as dense attention"),
        caps=Caps(causal=True, bidirectional=True),
    )

    def __init__(self, config: LatentAttentionConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        rank, turned, heads = self.rank, self.turned, dims.heads
        self.queries = nn.Linear(dims.d_model, heads * (dims.head_dim + turned), bias=False)
        self.down = nn.Linear(dims.d_model, rank + turned, bias=False)
        self.scale = nn.Parameter(torch.ones(rank))
        self.up = nn.Linear(rank, 2 * dims.inner_dim, bias=False)
        self.out = nn.Linear(dims.inner_dim, dims.d_model, bias=False)

    @property
    def rank(self) -> int:
        """Channels of a latent vector (r)."""
        return self.config.rank or max(1, self.dims.d_model // 2)

    @property
    def turned(self) -> int:
        """Channels with rotary positions (R)."""
        return self.config.rotary or max(2, self.dims.head_dim // 4 * 2)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        latents, key = self.down(x).split([self.rank, self.turned], dim=-1)
        return MixerOut(
            self._attend(
                self._queries(x, ctx.positions),
                self._normalised(latents),
                rotary(key[:, :, None], ctx.positions, self.dims.rotary_base),
                ctx.causal,
            )
        )

    def _normalised(self, latents: Tensor) -> Tensor:
        """Latent vectors (B, T, r) of a mean square of 1, times the learnt scale."""
        return F.rms_norm(latents, (self.rank,), self.scale.to(latents.dtype), EPSILON)

    def _queries(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T, C) → the channels without positions (B, T, H, D), and the rotary ones (B, T, H, R)."""
        queries = self.queries(x).unflatten(-1, (self.dims.heads, -1))
        plain, turned = queries.split([self.dims.head_dim, self.turned], dim=-1)
        return plain, rotary(turned, positions, self.dims.rotary_base)

    def _attend(self, queries: tuple[Tensor, Tensor], latents: Tensor, key: Tensor, causal: bool) -> Tensor:
        """Queries, latent vectors (B, T, r) and the rotary key (B, T, 1, R) → (B, T, C)."""
        head_dim = self.dims.head_dim
        k, v = self.up(latents).unflatten(-1, (self.dims.heads, 2, head_dim)).unbind(-2)  # (B, T, H, D)
        k = torch.cat([k, key.expand(-1, -1, self.dims.heads, -1)], dim=-1)
        q, v = torch.cat(queries, dim=-1), F.pad(v, (0, self.turned))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)[..., :head_dim]
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Head by head, with the equations of the paper."""
        sizes, base = self.dims, self.dims.rotary_base
        c, shared = (x @ self.down.weight.T).split([self.rank, self.turned], dim=-1)
        c = c / (c.square().mean(-1, keepdim=True) + EPSILON).sqrt() * self.scale
        shared = rotary(shared[:, :, None], ctx.positions, base)[:, :, 0]
        allowed = masks.matrix(masks.causal if ctx.causal else masks.all_keys, x.shape[1])
        y = []
        for w_q, w_kv in zip(
            self.queries.weight.chunk(sizes.heads), self.up.weight.chunk(sizes.heads), strict=True
        ):
            plain, turned = (x @ w_q.T).split([sizes.head_dim, self.turned], dim=-1)
            q = torch.cat([plain, rotary(turned[:, :, None], ctx.positions, base)[:, :, 0]], dim=-1)
            k = torch.cat([c @ w_kv[: sizes.head_dim].T, shared], dim=-1)
            y.append(masked_attention(q, k, c @ w_kv[sizes.head_dim :].T, allowed))
        return torch.cat(y, dim=-1) @ self.out.weight.T

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All keys that the objective allows."""
        return masks.matrix(masks.causal if causal else masks.all_keys, seq_len)

    def cost(self, work: Workload) -> Cost:
        """Projections; scores of D + R channels and sums of D channels for each pair of each head."""
        tokens = work.batch_size * work.seq_len
        down = work.d_model * (work.heads * (work.head_dim + self.turned) + self.rank + self.turned)
        up = self.rank * 2 * work.inner_dim + work.inner_dim * work.d_model
        pairs = work.seq_len * (work.seq_len + 1) // 2 if work.causal else work.seq_len**2
        attention = 2 * (2 * work.head_dim + self.turned) * work.batch_size * work.heads * pairs
        return Cost({"projections": 2 * tokens * (down + up), "attention": attention})

    # --- decoding -------------------------------------------------------------------------------------

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the latent vector and the rotary key of each token."""
        return work.batch_size * work.seq_len * (self.rank + self.turned) * work.element_bytes

    def decoding_bytes(self, work: Workload) -> int:
        """Those of all tokens."""
        return self.state_bytes(work)

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> LatentCache:
        """The latent vectors and rotary keys."""
        shape = batch_size, max_len, self.rank + self.turned
        return LatentCache(clock, max_len, shape, dtype, self.down.weight.device)

    def step(self, x: Tensor, state: LatentCache) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence."""
        begin, tokens, base = state.clock.position, x.shape[1], self.dims.rotary_base
        plain, turned = (
            self.queries(x)
            .unflatten(-1, (self.dims.heads, -1))
            .split([self.dims.head_dim, self.turned], dim=-1)
        )
        turned = rotary_next(turned, state.clock, base)
        latents, key = self.down(x).split([self.rank, self.turned], dim=-1)
        latents, key = self._normalised(latents), rotary_next(key[:, :, None], state.clock, base)
        state.tokens[:, begin : begin + tokens] = torch.cat([latents, key[:, :, 0]], dim=-1)
        if not begin and tokens > 1:
            return self._attend((plain, turned), latents, key, True)
        w_k, w_v = self.up.weight.view(self.dims.heads, 2, self.dims.head_dim, -1).unbind(1)  # (H, D, r)
        q = torch.cat([torch.einsum("bnhd,hdr->bhnr", plain, w_k), turned.transpose(1, 2)], dim=-1)
        read = state.tokens[:, : begin + tokens].to(q.dtype)  # (B, S, r + R)
        scores = q.flatten(1, 2) @ read.mT / math.sqrt(self.dims.head_dim + self.turned)
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)).unflatten(1, (-1, tokens))
        if tokens > 1:
            index = torch.arange(begin + tokens, device=x.device)
            scores = scores.masked_fill(index > index[begin:, None], float("-inf"))
        summed = scores.softmax(-1).to(q.dtype).flatten(1, 2) @ read[..., : self.rank]  # (B, H·n, r)
        y = torch.einsum("bhnr,hdr->bnhd", summed.unflatten(1, (-1, tokens)), w_v)
        merged: Tensor = self.out(y.flatten(2))
        return merged


class LatentCache(DecodingState):
    """The latent vectors, after the norm, and the rotary keys of all tokens: (B, T, r + R)."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(clock, max_len)
        self.tokens = torch.zeros(shape, dtype=dtype, device=device)
