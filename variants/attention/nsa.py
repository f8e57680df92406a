"""Native sparse attention: compressed, selected and neighbouring keys (Yuan 2025, arXiv:2502.11089, §3).

Over 300 lines: the three branches, their reference and decoding share the selection.

Shapes: B batch, T tokens, C channels, H heads, K heads of keys, D channels of a head; l tokens of a
compressed key, d tokens between two of them, m compressed keys, b tokens of a block, J groups of heads.
"""

from __future__ import annotations

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
from variants.ops.chosen.block_layout import Plan
from variants.ops.chosen.block_means import BlockMeans, own_pairs
from variants.ops.chosen.compressed_blocks import (
    FORCED,
    Compression,
    choose,
    compressed_attention,
    selectable,
)
from variants.ops.chosen.routed_blocks import routed_attention
from variants.ops.patterns import masks
from variants.ops.patterns.block_sparse import union_attention
from variants.ops.patterns.pair_counts import window_pairs
from variants.ops.patterns.part_kernels import missing_fused
from variants.ops.patterns.rectangles import Rectangle, to_parts
from variants.ops.patterns.regions import Region
from variants.ops.patterns.strided_parts import piece_size
from variants.ops.patterns.tiles import rectangles
from variants.ops.projections import Projections, masked_attention, spread

OVERHEAD = (
    "blocks of queries compute scores with some keys that not all of them may read, and the last tile of a "
    "selected block has empty slots"
)
BRANCHES = 3
"""Compressed, selected and neighbouring keys."""


@dataclass(frozen=True, kw_only=True)
class NSAConfig(VariantConfig):
    """Knobs of the three branches."""

    impl: Literal["auto", "fused", "plain"] = "auto"
    """Implementation of selected blocks and window. fused: gathered blocks and tiles, by torch's CPU
    attention kernel. plain: the same by matrix products, on any device. auto: fused on the CPU, plain
    elsewhere."""
    compress: int = knob(32, least=1, unit="tokens")
    """Tokens of a compressed key (the paper's l); a multiple of `stride`, at most `block`."""
    stride: int = knob(16, least=1, unit="tokens")
    """Tokens between the starts of two compressed keys (the paper's d); a divisor of `block`."""
    block: int = knob(64, least=1, unit="tokens")
    """Tokens of a selected block (the paper's l′)."""
    blocks: int = knob(8, least=3, unit="blocks")
    """Blocks of the selected branch (the paper's n): the first, the last two, and those selected. The paper
    has 16."""
    window: int = knob(256, least=1, unit="tokens")
    """Tokens of the sliding window, the query included. The paper has 512."""
    group: int = knob(1, least=1, unit="heads")
    """Query heads that share keys and select together. The paper has all heads that share keys."""

    def __post_init__(self) -> None:
        self.require("compress", self.compress % self.stride == 0, f"a multiple of stride={self.stride}")
        self.require("compress", self.compress <= self.block, f"up to block={self.block}")
        self.require("block", self.block % self.stride == 0, f"a multiple of stride={self.stride}")


def fused(layer: NSA, q: Tensor, k: Tensor, v: Tensor, picks: Tensor) -> Tensor:
    """Gathered blocks, by torch's CPU attention kernel. Raises ValueError for another device."""
    if reason := missing_fused(layer.device_type):
        raise ValueError(reason)
    return layer.attend_selected(q, k, v, picks, "fused")


def plain(layer: NSA, q: Tensor, k: Tensor, v: Tensor, picks: Tensor) -> Tensor:
    """Gathered blocks, by matrix products."""
    return layer.attend_selected(q, k, v, picks, "plain")


class NSA(SequenceMixer):
    """Σ of three softmax attentions, each times σ of a linear map of the query's token (equation 5).

    Compressed: a key is m + mW for a weighted mean m of l tokens; values likewise. A query reads a compressed
    key when it is complete. Selected: the first block, the query's own block up to the query, the
    block before it, and those of the others with the largest compressed weights (equations 8 to 10). A group
    of query heads that share keys may select together. Window: the last w tokens.

    A branch without a key gives 0. No gradient passes through the selection.

    Deviations from the paper: φ is linear, with one weight for each token and channel and one matrix, the
    same for all heads, in place of an MLP over the block; the gate is linear too. All branches read the same
    keys and values, as in the layer of flash-linear-attention; the paper has other projections for each
    branch, which would triple the parameters of keys and values. Keys are compressed after rotation.
    """

    Config = NSAConfig
    config: NSAConfig
    position_scheme = "rotary"
    no_shared_keys = None
    info = Info(
        paper="Yuan et al. 2025, Native Sparse Attention, arXiv:2502.11089",
        family="learned patterns",
        complexity=Complexity(time=2, memory=1, formula="T²/d + T·(n·b + w)", source="Yuan 2025, §3.3"),
        caps=Caps(causal=True, bidirectional=False),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "fused": Impl(
            run=fused,
            missing=lambda device, dtype, head_dim: missing_fused(device.type),
            flop_overhead_reason=OVERHEAD,
            auto_on=("cpu",),
        ),
        "plain": Impl(run=plain, flop_overhead_reason=OVERHEAD, auto_on=(Impl.OTHER_DEVICES,)),
    }

    def __init__(self, config: NSAConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.gate = nn.Linear(dims.d_model, BRANCHES * dims.heads, bias=False)
        # of keys and of values; at first a compressed key is the mean
        self.taps = nn.Parameter(torch.full((2, config.compress, dims.head_dim), 1 / config.compress))
        self.maps = nn.Parameter(torch.zeros(2, dims.head_dim, dims.head_dim))

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Heads that select together share their keys."""
        assert isinstance(config, NSAConfig)
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        if dims.queries_per_key % config.group:
            return f"group={config.group}: must divide {dims.queries_per_key}, the heads that share keys"
        return None

    # --- the branches ---------------------------------------------------------------------------------

    def _sizes(self, seq_len: int) -> Compression:
        """The sizes of the compressed keys, and the number of selected blocks of the last query."""
        config = self.config
        count = min(config.blocks - FORCED, selectable((seq_len - 1) // config.block))
        return Compression(config.compress, config.stride, config.block, count, self.device_type)

    def _starts(self, seq_len: int, count: int) -> tuple[int, ...]:
        """The first token whose query has each pick: the block before its own, the first, those selected."""
        block = self.config.block
        starts = (block, 2 * block, *((FORCED + j) * block for j in range(count)))
        return tuple(start for start in starts if start < seq_len)

    def _compressed(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, T, D) → compressed ones (B, K, m, D), of all complete groups of l tokens."""
        length, stride = self.config.compress, self.config.stride
        strides = k.shape[2] // stride
        number = max(0, strides - length // stride + 1)
        pooled = []
        for t, weights, maps in zip((k, v), self.taps, self.maps, strict=True):
            chunks = t[:, :, : strides * stride].unflatten(2, (strides, stride))
            parts = weights.unflatten(0, (-1, stride)).to(t.dtype)  # (l/d, d, D)
            means = [
                (chunks[:, :, j : j + number] * parts[j]).sum(3)
                for j in range(length // stride if number else 0)
            ]
            total = sum(means[1:], means[0]) if means else t[:, :, :0]
            pooled.append(total + total @ maps)
        return pooled[0], pooled[1]

    def _by_group(self, x: Tensor) -> Tensor:
        """Keys or values (B, K, …), repeated for each group of query heads: (B, J, …)."""
        return spread(x, self.dims.queries_per_key // self.config.group, dim=1)

    def _by_head(self, x: Tensor) -> Tensor:
        """What each group has (B, J, …), repeated for its query heads: (B, H, …)."""
        return spread(x, self.config.group, dim=1)

    def _blocks(self, query: Tensor, selected: Tensor) -> Tensor:
        """All blocks before the own one (B, J, n, picks) of the queries (n,): the one before it, the first
        and those selected. A query without one of them has another number in its place."""
        before = (query // self.config.block - 1).expand(selected.shape[:3])
        return torch.cat([before[..., None], torch.zeros_like(before)[..., None], selected], dim=-1)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state. Raises ValueError where not causal."""
        q, k, v = self.projections.split_shared(x, ctx.positions)
        return MixerOut(self._mix(x, q, k, v))

    def _mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A whole sequence: queries (B, H, T, D), keys and values (B, K, T, D) → (B, T, C)."""
        compressed, picks = self._read_all(q, k, v)
        selected = self.run_impl(self, q, self._by_group(k), self._by_group(v), picks)
        near = self._near(q, self.projections.spread(k), self.projections.spread(v))
        return self._gated(x, [compressed, selected, near])

    def _read_all(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, H, T, D) of the compressed branch, and the blocks (B, J, T, count) that it selects."""
        keys, values = (self._by_group(t) for t in self._compressed(k, v))
        return compressed_attention(q, keys, values, self._sizes(q.shape[2]))

    def _near(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention to the window: (B, H, T, D)."""
        seq_len = q.shape[2]
        cover = [Rectangle.of(numbers) for numbers in self._rectangles(seq_len)]
        parts = to_parts(self._region(), cover, q.device)
        return union_attention(q, k, v, parts, self.impl or "plain", piece_size(seq_len, self.device_type))

    def _region(self) -> Region:
        return Region(rule=masks.Window(self.config.window) & masks.causal, heads=(0, self.dims.heads))

    def _rectangles(self, seq_len: int) -> list[tuple[int, ...]]:
        """The numbers of the rectangles that cover the window; torch.compile uses them as constants."""
        return [cover.numbers for cover in rectangles(self._region(), seq_len, self.device_type)]

    _rectangles._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see MaskedAttention._rectangles

    def _gated(self, x: Tensor, branches: list[Tensor]) -> Tensor:
        """The branches (B, H, T, D), times their gates, after the output projection: (B, T, C)."""
        gates = self.gate(x).sigmoid().unflatten(-1, (BRANCHES, -1)).movedim(1, 3)  # (B, 3, H, T)
        y = branches[0] * gates[:, 0, ..., None]
        for i in range(1, BRANCHES):
            y = torch.addcmul(y, branches[i], gates[:, i, ..., None])
        return self.projections.merge(y)

    def attend_selected(self, q: Tensor, k: Tensor, v: Tensor, picks: Tensor, kernel: str) -> Tensor:
        """Queries (B, H, T, D), keys and values (B, J, T, D), selected blocks (B, J, T, count) →
        (B, H, T, D)."""
        seq_len = q.shape[2]
        starts = self._starts(seq_len, picks.shape[-1])
        blocks = self._blocks(torch.arange(seq_len, device=q.device), picks)[..., : len(starts)]
        plan = Plan(self.config.block, starts, kernel, self.device_type)
        return routed_attention(q, k, v, blocks, plan)

    def choices(self, x: Tensor, ctx: Context) -> Tensor:
        """The blocks that are selected beside the forced ones: (B, J, T, count)."""
        return self._read_all(*self.projections.split_shared(x, ctx.positions))[1]

    # --- reference ------------------------------------------------------------------------------------

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Three masked attentions; compressed keys one by one."""
        self.require_objective(causal=ctx.causal)
        q, k, v = self.projections.split(x, ctx.positions)
        seq_len, length, config = x.shape[1], self.config.compress, self.config
        token = torch.arange(seq_len, device=x.device)
        ends = token[length - 1 :: config.stride]
        pooled = []
        for t, weights, maps in zip((k, v), self.taps, self.maps, strict=True):
            windows = (
                t.unfold(2, length, config.stride) if len(ends) else t.new_zeros(*t.shape[:2], 0, 1, length)
            )
            mean = torch.einsum("bhmdi,id->bhmd", windows.expand(-1, -1, -1, t.shape[3], -1), weights)
            pooled.append(mean + mean @ maps)
        # the first tokens have no compressed key, and read nothing
        complete = ends <= token[length - 1 :, None]
        later = masked_attention(q[:, :, length - 1 :], pooled[0], pooled[1], complete)
        compressed = torch.cat([torch.zeros_like(q[:, :, : length - 1]), later], dim=2)
        own = of_key = token // config.block
        forced = (of_key == 0) | (of_key >= own[:, None] - 1)
        picks = self._by_head(self.choices(x, ctx))  # (B, H, T, count)
        listed = (picks[..., None] == of_key).any(3)
        causal = token <= token[:, None]
        by_block = masked_attention(q, k, v, (listed | forced) & causal)
        near = masked_attention(q, k, v, causal & (token > token[:, None] - config.window))
        return self._gated(x, [compressed, by_block, near])

    # --- cost -----------------------------------------------------------------------------------------

    def cost(self, work: Workload) -> Cost:
        """Projections and gates; the map of compressed keys and values, 2·D² for each; three attentions, 4·D
        for each allowed pair."""
        seq_len, config = work.seq_len, self.config
        sizes = self._sizes(seq_len)
        picks = sum(seq_len - start for start in self._starts(seq_len, sizes.selected))
        each = 4 * work.batch_size * work.inner_dim
        gates = 2 * work.batch_size * seq_len * work.d_model * BRANCHES * work.heads
        return Cost(
            {
                "projections": Projections.flops(work),
                "gates": gates,
                "compression": each // work.heads * work.key_heads * work.head_dim * sizes.readable(seq_len),
                "compressed": each * sizes.pairs(seq_len),
                "selected": each * (own_pairs(seq_len, config.block) + picks * config.block),
                "window": each * window_pairs(seq_len, config.window, is_causal=True),
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of all keys and values, compressed ones included."""
        rows = work.seq_len + self._sizes(work.seq_len).readable(work.seq_len)
        return 2 * work.batch_size * work.key_dim * rows * work.element_bytes

    # --- decoding -------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> NSAState:
        """All keys and values, compressed ones included."""
        shape = batch_size, self.dims.key_heads, self.dims.head_dim
        number = self._sizes(max_len).readable(max_len)
        device = self.projections.out.weight.device
        return NSAState(shape, max_len, self.config.block, number, clock=clock, dtype=dtype, device=device)

    def decoding_bytes(self, work: Workload) -> int:
        """The state after the last token."""
        return self.state_bytes(work)

    def step(self, x: Tensor, state: NSAState) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence; one token gathers its blocks."""
        begin, tokens = state.clock.position, x.shape[1]
        q, k, v = self.projections.split_next(x, state.clock)
        state.write(k, v)
        self._compress_next(begin + tokens, state)
        if not begin and tokens > 1:
            return self._mix(x, q, k, v)
        query, end = state.clock.positions(tokens, x.device), begin + tokens
        compressed, selected = self._read_compressed(q, query, state)
        blocks = self._blocks(query, selected)
        first = max(0, begin - self.config.window + 1)
        keys, values = (
            self.projections.spread(t[:, :, :end].to(q.dtype)) for t in (state.keys, state.values)
        )
        near = keys[:, :, first:], values[:, :, first:]
        if tokens == 1:
            starts = self._starts(begin + 1, selected.shape[-1])
            picked = self._by_head(blocks[:, :, 0, : len(starts)])
            keys, values = (t.to(q.dtype) for t in state.of_blocks(picked))
            by_block = F.scaled_dot_product_attention(q, keys, values)
            return self._gated(x, [compressed, by_block, F.scaled_dot_product_attention(q, *near)])
        key = torch.arange(begin + tokens, device=x.device)
        own, causal = (query // self.config.block)[:, None], key <= query[:, None]
        of_key = key // self.config.block
        listed = self._by_head((blocks[..., None, :] == of_key[:, None]).any(-1))
        by_block = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=(listed | (of_key == own)) & causal
        )
        window = (causal & (key > query[:, None] - self.config.window))[:, first:]
        return self._gated(
            x, [compressed, by_block, F.scaled_dot_product_attention(q, *near, attn_mask=window)]
        )

    def _compress_next(self, end: int, state: NSAState) -> None:
        """Compress the groups that end with the last tokens."""
        begin, sizes = state.clock.position, self._sizes(end)
        first, last = sizes.readable(begin), sizes.readable(end)
        if first < last:
            tokens = slice(first * sizes.stride, (last - 1) * sizes.stride + sizes.length)
            pooled = self._compressed(state.keys[:, :, tokens], state.values[:, :, tokens])
            for kept, new in zip((state.compressed_keys, state.compressed_values), pooled, strict=True):
                kept[:, :, first:last] = new

    def _read_compressed(self, q: Tensor, query: Tensor, state: NSAState) -> tuple[Tensor, Tensor]:
        """Outputs (B, H, n, D) of the compressed branch, and the selected blocks (B, J, n, count)."""
        batch, _, tokens, _ = q.shape
        end = state.clock.position + tokens
        sizes, groups = self._sizes(end), self.dims.heads // self.config.group
        visible = sizes.readable(end)
        k, v = (t[:, :, :visible].to(q.dtype) for t in (state.compressed_keys, state.compressed_values))
        if not visible:
            return torch.zeros_like(q), query.new_empty(batch, groups, tokens, 0)
        scores = q @ self.projections.spread(k).mT * q.shape[-1] ** -0.5
        ends = torch.arange(visible, device=q.device) * sizes.stride + sizes.length - 1
        scores = scores.masked_fill(ends > query[:, None], float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0.0)  # 0 without a complete key
        summed = weights.unflatten(1, (groups, -1)).sum(2).flatten(0, 1)
        selected = choose(summed, query, end - 1, end // sizes.block, sizes)
        return weights @ self.projections.spread(v), selected.unflatten(0, (batch, groups))


class NSAState(BlockMeans):
    """All keys and values (B, K, max_len, D), and compressed ones (B, K, m, D)."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        max_len: int,
        block: int,
        number: int,
        *,
        clock: Clock,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (B, K, D); `number` is the largest m."""
        super().__init__(shape, max_len, 0, block, clock=clock, dtype=dtype, device=device)
        batch, heads, channels = shape
        self.compressed_keys, self.compressed_values = (
            torch.zeros(batch, heads, number, channels, dtype=dtype, device=device) for _ in range(2)
        )
