"""Sparse Sinkhorn attention: a block reads itself and a mixture of blocks (Tay 2020, arXiv:2002.11296).

Over 300 lines: a causal and a bidirectional sort, and decoding, share their summaries and their attention.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head; n blocks of b tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
from variants.ops.clustering.block_sorting import SortState, balanced, mix_past, past_only
from variants.ops.projections import Projections, masked_attention, rotary


@dataclass(frozen=True, kw_only=True)
class SinkhornConfig(VariantConfig):
    """Knobs of the sort."""

    block: int = knob(128, least=1, unit="tokens")
    """Tokens of a block. The last block may be shorter."""
    iterations: int = knob(5, least=1)
    """Sinkhorn iterations of a bidirectional model. A causal model normalises rows once."""
    temperature: float = knob(0.75, above=0)
    """Divisor of the scores between blocks (the paper's τ). Smaller values mix fewer blocks."""
    gumbel: bool = False
    """Whether Gumbel noise is added to the scores between blocks in training."""


class Sinkhorn(SequenceMixer):
    """Softmax attention of the queries of block i to its own keys and to a sorted block of keys.

    The sorted block is Σ_j R_ij K_j, offset by offset, and the values are sorted in the same way. R is made
    of the scores between blocks, divided by `temperature`. The summary of a block is the sum of its queries
    or keys over the square root of their number, and a score is their product over √D.

    Causal models: R_ij > 0 only for j < i, so a sorted block consists of complete past blocks. The query
    summary of block i sums up all queries up to the first one of the block. The first block reads only
    itself.

    Deviations from the paper: the paper normalises the columns of a causal R too. A column is a sum over
    blocks that read block j, which are later ones, so this would leak; here rows are normalised over the past
    only. The paper computes scores by a network with an output for each block, which fixes the number of
    blocks; here they are products of summaries, without parameters, as in the public package of lucidrains.
    Summaries are sums over a square root, so that scores do not grow with the block. Iterations end with the
    rows, so that the weights of a sorted key sum up to 1. Positions are rotary: a sorted block has the
    positions of the block before the queries, wherever its content comes from.

    The last block may be shorter. In bidirectional models, offsets that it lacks are mixed without it, with
    its weight divided among the other blocks.
    """

    Config = SinkhornConfig
    config: SinkhornConfig
    position_scheme = "rotary"
    info = Info(
        paper="Tay et al. 2020, Sparse Sinkhorn Attention, arXiv:2002.11296",
        family="learned patterns",
        complexity=Complexity(time=2, memory=2, formula="T·b + T²/b", source="Tay 2020, with fixed b"),
        caps=Caps(causal=True, bidirectional=True),
    )
    flop_overhead_reason = (
        "all keys of a block are computed, also those after the query; the sort computes several rows at a "
        "time, each with the past blocks of the last of them"
    )

    def __init__(self, config: SinkhornConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)

    @classmethod
    def info_for(cls, config: VariantConfig) -> Info:
        """With Gumbel noise, outputs in training are random."""
        assert isinstance(config, SinkhornConfig)
        return replace(cls.info, caps=replace(cls.info.caps, stochastic=config.gumbel))

    # --- the sort -------------------------------------------------------------------------------------

    def _split(self, x: Tensor) -> list[Tensor]:
        """(B, T, C) → queries, keys and values (B, T, H, D), without positions."""
        weights = self.projections.qkv.weight.chunk(3)
        return [F.linear(x, weight).unflatten(-1, (self.dims.heads, -1)) for weight in weights]

    def _turned(self, x: Tensor, positions: Tensor | None) -> Tensor:
        return rotary(x, positions, self.dims.rotary_base)

    def _sums(self, x: Tensor) -> Tensor:
        """Sums over each block: (B, T, H, D) → (B, H, n, D), float32 or wider."""
        wide, block = torch.promote_types(x.dtype, torch.float32), self.config.block
        whole = x.shape[1] // block * block
        sums: Tensor = x[:, :whole].unflatten(1, (whole // block, block)).sum(2, dtype=wide)
        if whole < x.shape[1]:
            sums = torch.cat([sums, x[:, whole:].sum(1, keepdim=True, dtype=wide)], dim=1)
        return sums.transpose(1, 2)

    def _query_summaries(self, q: Tensor) -> Tensor:
        """Causal, of the blocks after the first: (B, T, H, D) → (B, H, n − 1, D)."""
        block = self.config.block
        sums, first = self._sums(q)[:, :, :-1], q[:, block::block].transpose(1, 2)
        tokens = torch.arange(1, sums.shape[2] + 1, device=q.device)[:, None] * block + 1
        return (sums.cumsum(2) + first) * tokens.to(sums.dtype).rsqrt()

    def _scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Summaries (B, H, n, D) → the scores of each block with each, divided by the temperature."""
        with torch.autocast(queries.device.type, enabled=False):
            scores: Tensor = queries @ keys.mT * self.dims.head_dim**-0.5
        return (scores + self._noise(scores)) / self.config.temperature

    def _noise(self, like: Tensor) -> Tensor | float:
        """Gumbel noise in training."""
        if not (self.config.gumbel and self.training):
            return 0.0
        return -torch.empty_like(like, requires_grad=False).exponential_().log()

    def _sorted_past(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Sorted keys with positions, and sorted values, of the blocks after the first: (B, H, n − 1, b, D)
        each. Block i + 1 has the positions of block i."""
        block, count = self.config.block, (k.shape[1] - 1) // self.config.block
        past_k, past_v = k[:, : count * block], v[:, : count * block]
        scores = self._scores(self._query_summaries(q), self._sums(past_k) * block**-0.5)
        weights = past_only(scores).to(v.dtype)

        def mixed(past: Tensor) -> Tensor:  # → (B, H, (n − 1)·b, D)
            rows = past.unflatten(1, (count, block)).permute(0, 3, 1, 2, 4).flatten(3)
            sorted_rows: Tensor = mix_past(weights, rows).unflatten(-1, (block, -1))
            return sorted_rows.flatten(2, 3)

        positions = None if ctx.positions is None else ctx.positions[: count * block]
        sorted_k = self._turned(mixed(past_k).flatten(0, 1), positions).unflatten(0, (len(k), -1))
        return sorted_k.unflatten(2, (count, block)), mixed(past_v).unflatten(2, (count, block))

    def _sorted_all(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Bidirectional: the same for all blocks (B, H, n, b, D). A single short block is sorted as it is."""
        block, tokens = self.config.block, k.shape[1]
        whole, rest = divmod(tokens, block)
        first = torch.arange(0, tokens, block, device=k.device)
        queries, keys = self._sums(q), self._sums(k)
        scale = (tokens - first).clamp(max=block)[:, None].to(keys.dtype).rsqrt()
        scores = self._scores(queries * scale, keys * scale)
        logs = balanced(scores, self.config.iterations)

        def mixed(x: Tensor) -> Tensor:  # → (B, H, n, b, D)
            by_block, parts = x[:, : whole * block].unflatten(1, (whole, block)), []
            if rest:
                last = x[:, None, whole * block :]
                parts.append(_mix(logs.exp(), torch.cat([by_block[:, :, :rest], last], dim=1)))
            if whole:  # the offsets that a short last block lacks
                weights = logs[..., :whole].softmax(-1) if rest else logs.exp()
                parts.append(_mix(weights, by_block[:, :, rest:]))
            return torch.cat(parts, dim=3)

        sorted_k, sorted_v = mixed(k), mixed(v)
        begin = -block if ctx.positions is None else ctx.positions[:1] - block
        positions = begin + (first[:, None] + torch.arange(sorted_k.shape[3], device=k.device)).flatten()
        turned = self._turned(sorted_k.flatten(2, 3).flatten(0, 1), positions)
        return turned.view(sorted_k.shape), sorted_v

    # --- attention ------------------------------------------------------------------------------------

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self._split(x)
        block, tokens = self.config.block, x.shape[1]
        whole, alone = tokens // block * block, min(block, tokens) if ctx.causal else 0
        turned = [self._turned(t, ctx.positions) for t in (q, k)]
        outputs = []
        if alone:  # the first block
            q_own, k_own, v_own = (t[:, :alone].transpose(1, 2) for t in (*turned, v))
            y = F.scaled_dot_product_attention(q_own, k_own, v_own, is_causal=True)
            outputs.append(y.transpose(1, 2))
        if alone < tokens:
            sort = self._sorted_past if ctx.causal else self._sorted_all
            sorted_k, sorted_v = sort(q, k, v, ctx)
            pieces = [(alone, whole, block), (whole, tokens, tokens - whole)]
            for first, last, size in pieces:  # whole blocks, and a shorter one
                if first < last:
                    count, at = (last - first) // size, (first - alone) // block
                    own = (t[:, first:last].unflatten(1, (count, size)) for t in (*turned, v))
                    some = (t[:, :, at : at + count] for t in (sorted_k, sorted_v))
                    outputs.append(self._attend(*own, *some, causal=ctx.causal))
        y = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        return MixerOut(self.projections.out(y.flatten(2)))

    @staticmethod
    def _attend(
        q: Tensor, k: Tensor, v: Tensor, sorted_k: Tensor, sorted_v: Tensor, *, causal: bool
    ) -> Tensor:
        """Blocks (B, n, o, H, D), and sorted blocks (B, H, n, b, D) → (B, n·o, H, D)."""
        batch, count, size = q.shape[:3]
        keys, values = (
            torch.cat([others.transpose(1, 2), own.transpose(2, 3)], dim=3).flatten(
                0, 1
            )  # (B·n, H, b + o, D)
            for others, own in ((sorted_k, k), (sorted_v, v))
        )
        allowed = None
        if causal:
            key = torch.arange(keys.shape[2], device=q.device) - sorted_k.shape[3]
            allowed = key <= torch.arange(size, device=q.device)[:, None]
        queries = q.transpose(2, 3).flatten(0, 1)
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
        return y.transpose(1, 2).reshape(batch, count * size, *y.shape[1::2])

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Block by block: summaries, normalised exponentials, sorted blocks, masked attention."""
        q, k, v = self._split(x)
        block = self.config.block
        blocks = [slice(a, min(a + block, x.shape[1])) for a in range(0, x.shape[1], block)]
        of_keys = torch.stack([k[:, s].sum(1) / k[:, s].shape[1] ** 0.5 for s in blocks], dim=2)
        seen = [slice(0, s.start + 1) if ctx.causal else s for s in blocks]
        of_queries = torch.stack([q[:, s].sum(1) / q[:, s].shape[1] ** 0.5 for s in seen], dim=2)
        if ctx.causal:  # the first block reads none, and the last is read by none
            of_queries, of_keys = of_queries[:, :, 1:], of_keys[:, :, :-1]
        scores = self._scores(of_queries.float() if q.dtype == torch.bfloat16 else of_queries, of_keys)
        rows = (scores - scores.detach().amax((2, 3), keepdim=True)).exp() if scores.numel() else scores
        if ctx.causal:
            rows = F.pad(rows.tril(), (0, 1, 1, 0))
            rows = rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        for _ in range(0 if ctx.causal else self.config.iterations):
            rows = rows / rows.sum(-2, keepdim=True)
            rows = rows / rows.sum(-1, keepdim=True)
        start = torch.zeros(1, dtype=torch.int64) if ctx.positions is None else ctx.positions[:1].cpu()
        outputs = []
        for i, own in enumerate(blocks):
            width = 0 if ctx.causal and i == 0 else min(block, x.shape[1])
            sorted_k, sorted_v = k[:, :0], v[:, :0]
            for offset in range(width):
                having = [j for j, s in enumerate(blocks) if s.start + offset < s.stop]
                having = [j for j in having if j < i or not ctx.causal]
                weights = rows[:, :, i, having]
                weights = (weights / weights.sum(-1, keepdim=True)).to(k.dtype)
                at = [j * block + offset for j in having]
                new = (torch.einsum("bhj,bjhd->bhd", weights, t[:, at])[:, None] for t in (k, v))
                sorted_k, sorted_v = (torch.cat(t, 1) for t in zip((sorted_k, sorted_v), new, strict=True))
            place = (start + own.start + torch.arange(own.stop - own.start)).to(x.device)
            before = (start + own.start - block + torch.arange(width)).to(x.device)
            keys = torch.cat([self._turned(sorted_k, before), self._turned(k[:, own], place)], dim=1)
            values = torch.cat([sorted_v, v[:, own]], dim=1)
            size = own.stop - own.start
            allowed = torch.ones(size, width + size, dtype=torch.bool)
            allowed = allowed.tril(width) if ctx.causal else allowed
            queries = self._turned(q[:, own], place)
            queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, values))
            outputs.append(masked_attention(queries, keys, values, allowed))
        return self.projections.merge(torch.cat(outputs, dim=2))

    # --- cost -----------------------------------------------------------------------------------------

    def cost(self, work: Workload) -> Cost:
        """Scores between blocks that may be read: 2·D. Sort: 4·b·D for each of them. Attention: 4·D for each
        allowed pair of a query and a key of its own or its sorted block."""
        block, tokens = self.config.block, work.seq_len
        whole, rest = divmod(tokens, block)
        heads = work.batch_size * work.heads
        if work.causal:
            later = (tokens - 1) // block  # blocks after the first
            read = later * (later + 1) // 2
            sort = 4 * block * read
            pairs = (
                whole * block * (block + 1) // 2
                + rest * (rest + 1) // 2
                + (tokens - min(block, tokens)) * block
            )
        else:
            count = -(-tokens // block)
            read = count * count
            sort = 4 * (rest * read + (block - rest) * count * whole)
            pairs = whole * block**2 + rest**2 + tokens * min(block, tokens)
        return Cost(
            {
                "projections": Projections.flops(work),
                "sort": heads * work.head_dim * (2 * read + sort),
                "attention": 4 * heads * work.head_dim * pairs,
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of all keys and values, the sum of the queries, and the sorted block of an open block."""
        tokens, block = work.seq_len, self.config.block
        rows = 2 * tokens + (2 * block if tokens > block and tokens % block else 0)
        each = work.batch_size * work.inner_dim
        return each * (rows * work.element_bytes + max(4, work.element_bytes))

    # --- decoding -------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> SortState:
        """All keys and values, because any later block may be sorted from them."""
        shape = batch_size, self.dims.heads, self.config.block, self.dims.head_dim
        return SortState(clock, max_len, shape, dtype, self.projections.qkv.weight.device)

    def decoding_bytes(self, work: Workload) -> int:
        """Keys and values, also those of one sorted block, and the sums of each block and of the queries."""
        block, each = self.config.block, work.batch_size * work.inner_dim
        rows = 2 * work.seq_len + (2 * block if work.seq_len > block else 0)
        sums = 1 + -(-work.seq_len // block)
        return each * (rows * work.element_bytes + sums * max(4, work.element_bytes))

    def step(self, x: Tensor, state: SortState) -> Tensor:
        """(B, n, C) → (B, n, C), block by block. A prompt is computed like a whole sequence."""
        q, k, v = self._split(x)
        begin, tokens, block = state.clock.position, x.shape[1], self.config.block
        state.keys[:, begin : begin + tokens], state.values[:, begin : begin + tokens] = k, v
        is_prompt = not begin and tokens > 1
        outputs = []
        for first in range(begin // block * block, begin + tokens, block):
            here = slice(max(first, begin) - begin, min(first + block, begin + tokens) - begin)
            if begin <= first and first:
                self._open(q[:, here.start], first // block, state)
            if not is_prompt:
                outputs.append(self._read(q[:, here], begin + here.start, state))
            state.query_sum += q[:, here].sum(1, dtype=state.query_sum.dtype)
            state.key_sums[:, :, first // block] += k[:, here].sum(1, dtype=state.key_sums.dtype)
        if is_prompt:
            return self.forward(x, Context(causal=True)).y
        y: Tensor = self.projections.out(torch.cat(outputs, dim=1).flatten(2))
        return y

    def _open(self, query: Tensor, number: int, state: SortState) -> None:
        """Sort for the block with this number, which begins with `query` (B, H, D)."""
        block, tokens = self.config.block, number * self.config.block
        summary = (state.query_sum + query) * (tokens + 1) ** -0.5
        scores = self._scores(summary[:, :, None], state.key_sums[:, :, :number] * block**-0.5)
        weights = scores.softmax(-1).squeeze(2).to(state.keys.dtype)
        sorted_k, sorted_v = (
            torch.einsum("bhj,bjohd->bohd", weights, held[:, :tokens].unflatten(1, (number, block)))
            for held in (state.keys, state.values)
        )
        place = torch.arange(tokens - block, tokens, device=query.device)
        state.sorted_keys.copy_(self._turned(sorted_k, place).transpose(1, 2))
        state.sorted_values.copy_(sorted_v.transpose(1, 2))

    def _read(self, q: Tensor, begin: int, state: SortState) -> Tensor:
        """Queries (B, n, H, D) of one block, from position `begin` on → (B, n, H, D)."""
        block, end = self.config.block, begin + q.shape[1]
        first = begin // block * block
        place = torch.arange(first, end, device=q.device)
        k = self._turned(state.keys[:, first:end].to(q.dtype), place).transpose(1, 2)
        v = state.values[:, first:end].to(q.dtype).transpose(1, 2)
        if first:
            k = torch.cat([state.sorted_keys.to(q.dtype), k], dim=2)
            v = torch.cat([state.sorted_values.to(q.dtype), v], dim=2)
        allowed = torch.ones(q.shape[1], k.shape[2], dtype=torch.bool, device=q.device)
        allowed = allowed.tril(k.shape[2] - q.shape[1])
        q = self._turned(q, place[begin - first :]).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)


def _mix(weights: Tensor, blocks: Tensor) -> Tensor:
    """Weights (B, H, m, n) and blocks (B, n, o, H, D) → (B, H, m, o, D)."""
    rows = blocks.permute(0, 3, 1, 2, 4).flatten(3)
    mixed: Tensor = (weights.to(rows.dtype) @ rows).unflatten(-1, (blocks.shape[2], -1))
    return mixed
