"""Base class of attention whose rule is a mask: a variant states which pairs are allowed.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head; (B, H, T, D) for queries, keys, values.

A variant defines `rule` and, if it makes attention faster, `order`. The reference, the attention mask, the
numbers of pairs, the state and the implementations are derived from them. See docs/adding-a-variant.md.

Comparison with the earlier implementations (a window as blocks of queries with all their keys; strided parts
without tiles): forward and backward of a layer with its projections, width 256, 4 heads, window or stride
128, float32, one thread, CPU seconds, medians of alternating pairs of processes on a busy machine:

| layer at 16,384 tokens | before | by tiles |
|---|---|---|
| longformer, causal | 0.65 | 0.56 |
| longformer, bidirectional | 0.79 | 0.65 |
| sparse_strided, causal | 0.70 | 0.67 |
| sparse_strided, bidirectional | 0.79 | 0.78 |

In the cells of tests/data/expected_figures.json, tiles reduce the peak memory of longformer by 4 to 7 %, and
its executed FLOPs by up to 4 %.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from variants.base import Clock, Context, Cost, Dims, Impl, MixerOut, SequenceMixer, VariantConfig, Workload
from variants.ops.fused import backends
from variants.ops.key_cache import KeyCache, cache_bytes
from variants.ops.patterns import masks
from variants.ops.patterns.block_sparse import union_attention
from variants.ops.patterns.masks import Rule
from variants.ops.patterns.pair_counts import carried_keys, count_pairs
from variants.ops.patterns.part_kernels import missing_fused
from variants.ops.patterns.rectangles import Rectangle, to_parts
from variants.ops.patterns.regions import Region
from variants.ops.patterns.strided_parts import Part, piece_size
from variants.ops.patterns.tiles import rectangles
from variants.ops.projections import Projections, masked_attention

TILE_OVERHEAD = "all pairs of a tile are computed, also if the mask allows only some of them"


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(VariantConfig):
    """Knobs of every variant whose rule is a mask."""

    impl: Literal["auto", "fused", "plain", "dense", "flex"] = "auto"
    """Implementation of the mask. fused: tiles with allowed pairs, by torch's CPU attention kernel. plain:
    the same tiles by matrix products, on any device. dense: every score, masked. flex: FlexAttention,
    compiled, on CUDA. auto: fused on the CPU, plain elsewhere."""


class MaskedAttention(SequenceMixer):
    """Softmax attention over the pairs that a rule allows; a query without an allowed key gives 0."""

    Config: ClassVar[type[VariantConfig]] = MaskedConfig
    position_scheme = "rotary"
    no_shared_keys: ClassVar[str | None] = None

    def __init__(self, config: VariantConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)

    # --- defined by a variant ---------------------------------------------------------------------

    @abstractmethod
    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """The allowed pairs of a window of `seq_len` tokens. Causality is added to it by `mask`."""

    def order(self) -> int:
        """A step s: attention is computed with the tokens r, r + s, r + 2s, … of each residue r side by side.

        Larger than 1 only if tokens of different residues never read each other.
        """
        return 1

    def regions(self, seq_len: int, *, causal: bool) -> tuple[Region, ...]:
        """The rule, divided into disjoint regions, each with its own order of the tokens."""
        rule = self.mask(seq_len, causal=causal)
        return (Region(rule=rule, step=self.order(), heads=(0, self.dims.heads)),)

    # --- derived ----------------------------------------------------------------------------------

    def mask(self, seq_len: int, *, causal: bool) -> Rule:
        """The rule, with causality."""
        rule = self.rule(seq_len, causal=causal)
        return rule & masks.causal if causal else rule

    def key_mask(self, seq_len: int) -> Rule:
        """The causal rule of the heads of keys: pairs that any query head of the same keys may read."""
        rule, size = self.mask(seq_len, causal=True), self.dims.queries_per_key
        return rule if size == 1 else masks.AnyOfGroup(rule, size)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        return MixerOut(self.projections.merge(self.run_impl(self, q, k, v, ctx.causal)))

    def parts(self, seq_len: int, *, causal: bool, device: torch.device) -> list[Part]:
        """The parts of the mask; each allowed pair is in exactly one of them."""
        regions = self.regions(seq_len, causal=causal)
        all_rectangles = self._rectangles(seq_len, causal)
        return [
            part
            for index, region in enumerate(regions)
            for part in to_parts(
                region, [Rectangle.of(numbers) for of, *numbers in all_rectangles if of == index], device
            )
        ]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, parts: list[Part], kernel: str) -> Tensor:
        """One softmax over the keys of all parts, computed in pieces: (B, H, T, D) → (B, H, T, D)."""
        return union_attention(q, k, v, parts, kernel, piece_size(q.shape[2], self.device_type))

    def _rectangles(self, seq_len: int, causal: bool) -> list[tuple[int, ...]]:
        """The index of the region and the numbers of each rectangle; torch.compile uses them as constants."""
        return [
            (index, *rectangle.numbers)
            for index, region in enumerate(self.regions(seq_len, causal=causal))
            for rectangle in rectangles(region, seq_len, self.device_type)
        ]

    _rectangles._dynamo_marked_constant = True  # type: ignore[attr-defined]
    # torch.compiler.assume_constant_result sets this too, but imports the compiler, which takes a second

    def allowed(self, seq_len: int, *, causal: bool) -> Tensor:
        """(H, T, T) bool: the keys (columns) that a query (row) of each head may read."""
        allowed = masks.by_head(self.mask(seq_len, causal=causal), seq_len, self.dims.heads)
        return allowed.expand(self.dims.heads, seq_len, seq_len)

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """(T, T) bool: the keys (columns) that a query (row) of at least one head may read."""
        return self.allowed(seq_len, causal=causal).any(dim=0)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Masked attention with the mask of each head."""
        q, k, v = self.projections.split(x, ctx.positions)
        allowed = self.allowed(x.shape[1], causal=ctx.causal)
        return self.projections.merge(attention_or_zero(q, k, v, allowed))

    def pairs(self, seq_len: int, *, causal: bool) -> int:
        """The number of allowed pairs of one window, summed over the heads."""
        return sum(count_pairs(region, seq_len) for region in self.regions(seq_len, causal=causal))

    def carried(self, seq_len: int) -> int:
        """The number of pairs (head of keys, key) that queries after seq_len tokens of a causal model may
        read."""
        return carried_keys(self.key_mask(seq_len), seq_len, self.dims.key_heads)

    def cost(self, work: Workload) -> Cost:
        """Projections; scores and weighted sum: 4·D for each allowed pair of each head."""
        pairs = self.pairs(work.seq_len, causal=work.causal)
        return Cost(
            {
                "projections": Projections.flops(work),
                "attention": 4 * work.batch_size * work.head_dim * pairs,
            }
        )

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> KeyCache:
        """The keys and values that later queries may read."""
        if reason := self.no_decoding(self.config):
            raise NotImplementedError(f"{type(self).__name__} {reason}")
        shape = batch_size, self.dims.key_heads, self.dims.head_dim
        device = self.projections.qkv.weight.device
        return KeyCache(self.key_mask(max_len), shape, max_len, clock=clock, dtype=dtype, device=device)

    def step(self, x: Tensor, state: KeyCache) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence."""
        q, k, v = self.projections.split_next(x, state.clock)
        if state.clock.position or x.shape[1] == 1:
            return self.projections.merge(state.attend(q, k, v))
        state.write(k, v)
        k, v = self.projections.spread(k), self.projections.spread(v)
        return self.projections.merge(self.run_impl(self, q, k, v, True))

    def decoding_bytes(self, work: Workload) -> int:
        """The keys and values of rings and summaries."""
        numbers = 2 * work.batch_size * work.head_dim * work.element_bytes
        return cache_bytes(self.key_mask(work.seq_len), self.dims.key_heads, work.seq_len, numbers)

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the keys and values that later queries may read, counted for each head of keys."""
        return 2 * work.batch_size * self.carried(work.seq_len) * work.head_dim * work.element_bytes


def attention_or_zero(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """`masked_attention` over allowed (H, T, T); a query without an allowed key gives 0 instead of NaN."""
    allowed = allowed.to(q.device)
    has_key = allowed.any(-1, keepdim=True)
    return masked_attention(q, k, v, allowed | ~has_key) * has_key


# --- implementations: (layer, q, k, v, causal) → (B, H, T, D) ---------------------------------------------


def fused(layer: MaskedAttention, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Parts, by torch's CPU attention kernel. Raises ValueError for another device."""
    if reason := missing_fused(layer.device_type):
        raise ValueError(reason)
    return layer.attend(q, k, v, layer.parts(q.shape[2], causal=causal, device=q.device), "fused")


def plain(layer: MaskedAttention, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Parts, by matrix products."""
    return layer.attend(q, k, v, layer.parts(q.shape[2], causal=causal, device=q.device), "plain")


def dense(layer: MaskedAttention, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """All scores, masked."""
    allowed = masks.by_head(layer.mask(q.shape[2], causal=causal), q.shape[2], layer.dims.heads)
    return attention_or_zero(q, k, v, allowed)


def flex(layer: MaskedAttention, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """FlexAttention with the rule."""
    return backends.flex(q, k, v, layer.mask(q.shape[2], causal=causal))


FLEX = Impl(
    run=flex,
    missing=lambda device, dtype, head_dim: backends.missing_flex(device, head_dim),
    flop_overhead_reason=backends.FLEX_OVERHEAD,
    overhead_is_bounded=False,
)
TILES: Mapping[str, Impl] = {
    "fused": Impl(
        run=fused,
        missing=lambda device, dtype, head_dim: missing_fused(device.type),
        flop_overhead_reason=TILE_OVERHEAD,
        auto_on=("cpu",),
    ),
    "plain": Impl(run=plain, flop_overhead_reason=TILE_OVERHEAD, auto_on=(Impl.OTHER_DEVICES,)),
    "dense": Impl(
        run=dense,
        flop_overhead_reason="dense computes all scores and masks those that are not allowed",
        overhead_is_bounded=False,
    ),
    "flex": FLEX,
}
MaskedAttention.IMPLS = TILES
