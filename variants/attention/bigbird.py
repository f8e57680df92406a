"""BigBird: window, global and random blocks of keys (Zaheer 2020, arXiv:2007.14062, §2 and app. D).

Shapes: B batch, T tokens, H heads, D channels of a head; a row is a block of queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.base import Caps, Clock, Complexity, Impl, Info, VariantConfig
from variants.knobs import knob
from variants.ops.patterns.block_cache import BlockCache
from variants.ops.patterns.gathered_blocks import Plan, Rows, gathered_attention, piece_size
from variants.ops.patterns.masked_attention import TILES, MaskedAttention
from variants.ops.patterns.part_kernels import missing_fused
from variants.ops.patterns.random_blocks import BlockRule, RowGroup, groups_of_rows

OVERHEAD = "a causal row computes scores with all keys of its own block, and masks the later ones"


@dataclass(frozen=True, kw_only=True)
class BigBirdConfig(VariantConfig):
    """Knobs of the three kinds of blocks."""

    impl: Literal["auto", "fused", "plain", "dense", "flex"] = "auto"
    """Implementation of the mask. fused: gathered blocks, by torch's CPU attention kernel. plain: the same by
    matrix products, on any device. dense: every score, masked. flex: FlexAttention, compiled, on CUDA. auto:
    fused on the CPU, plain elsewhere."""
    block: int = knob(64, least=1, unit="tokens")
    """Tokens of a block."""
    window_blocks: int = knob(3, least=1, unit="blocks")
    """Blocks of the sliding window: the own one, and as many before as after it. A causal model reads those
    up to the own one."""
    global_blocks: int = knob(2, least=0, unit="blocks")
    """Blocks that all tokens read. Causal: the first ones, which read no later token. Bidirectional: half of
    them at the start and half at the end of the sequence, as in the authors' code, and they read all."""
    random_blocks: int = knob(3, least=0, unit="blocks")
    """Random blocks that a block of queries reads, other ones for each layer and head. They are neither
    global nor in the window. Causal: among earlier blocks only, so the first blocks have fewer."""
    seed: int = knob(0, least=0)
    """Seed of the random blocks, which are a function of it, the layer, the head and the block of queries."""

    def __post_init__(self) -> None:
        self.require("window_blocks", self.window_blocks % 2 == 1, "odd")


def fused(layer: BigBird, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Gathered blocks, by torch's CPU attention kernel. Raises ValueError for another device."""
    if reason := missing_fused(layer.device_type):
        raise ValueError(reason)
    return layer.gathered(q, k, v, causal, "fused")


def plain(layer: BigBird, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Gathered blocks, by matrix products."""
    return layer.gathered(q, k, v, causal, "plain")


class BigBird(MaskedAttention):
    """Softmax attention of blocks of queries to global blocks, their neighbours and random blocks.

    This is the paper's BigBird-ITC, in which global tokens are tokens of the sequence. The paper has encoders
    only. The causal form is ours: random blocks lie in the past, and global blocks are read by later tokens
    but are themselves causal, because a global token that reads ahead would pass later tokens on.

    Deviations: positions are rotary, as in every variant of this project. The random blocks of the authors'
    code are drawn once from a generator; here each is a hash of its place, so that no table depends on the
    length, and a prefix of a causal sequence is read in the same way as the complete sequence. A shorter last
    block is never a random one.
    """

    Config = BigBirdConfig
    config: BigBirdConfig
    no_shared_keys = "every head reads its own random blocks"
    info = Info(
        paper="Zaheer et al. 2020, Big Bird, arXiv:2007.14062",
        family="fixed patterns",
        complexity=Complexity(
            time=1, memory=1, formula="T·b·(g + w + r)", source="Zaheer 2020, abstract and app. D", survey=1
        ),
        caps=Caps(causal=True, bidirectional=True),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        **TILES,
        "fused": Impl(
            run=fused,
            missing=lambda device, dtype, head_dim: missing_fused(device.type),
            flop_overhead_reason=OVERHEAD,
            auto_on=("cpu",),
        ),
        "plain": Impl(run=plain, flop_overhead_reason=OVERHEAD, auto_on=(Impl.OTHER_DEVICES,)),
    }

    def rule(self, seq_len: int, *, causal: bool) -> BlockRule:
        """The blocks that each block of queries reads."""
        config, blocks = self.config, -(-seq_len // self.config.block)
        first = config.global_blocks if causal else min(blocks, (config.global_blocks + 1) // 2)
        return BlockRule(
            block=config.block,
            neighbours=config.window_blocks // 2,
            globals_first=first,
            globals_last=0 if causal else min(blocks - first, config.global_blocks // 2),
            random=config.random_blocks,
            seed=config.seed,
            layer=self.layer,
            seq_len=None if causal else seq_len,
        )

    def gathered(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, kernel: str) -> Tensor:
        """Rows with gathered keys; in bidirectional models, also global rows with all keys."""
        seq_len, block = q.shape[2], self.config.block
        rule = self.rule(seq_len, causal=causal)
        groups = [RowGroup(*numbers) for numbers in self._groups(seq_len, causal)]
        rows = [
            Rows(
                start=group.first * block,
                n=group.n,
                queries=group.queries,
                tail_length=group.short,
                causal=causal,
            )
            for group in groups
        ]
        tables = [rule.table(group, q.shape[1], q.device) for group in groups]
        if causal:
            rows.append(Rows(0, 1, min(seq_len, rule.dense_rows(seq_len) * block), causal=True, alone=True))
            tables.append(torch.empty(0, dtype=torch.int64, device=q.device))
        plan = Plan(tuple(rows), block, kernel, piece_size(seq_len, self.device_type))
        y = gathered_attention(q, k, v, plan, tables)
        if causal or not self.config.global_blocks:
            return y
        first, last = rule.globals_first * block, (rule.rows - rule.globals_last) * block
        ends = [t for t in (q[:, :, :first], q[:, :, max(first, last) :]) if t.shape[2]]
        of_ends = [F.scaled_dot_product_attention(end, k, v) for end in ends]
        return torch.cat([of_ends[0], y[:, :, first:last], *of_ends[1:]], dim=2)

    def _groups(self, seq_len: int, causal: bool) -> list[tuple[int, ...]]:
        """The numbers of the groups of rows; torch.compile uses them as constants."""
        rule = self.rule(seq_len, causal=causal)
        return [(*group,) for group in groups_of_rows(rule, rule.dense_rows(seq_len), seq_len)]

    _groups._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see MaskedAttention._rectangles

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> BlockCache:
        """All keys and values."""
        shape = batch_size, self.dims.heads, self.dims.head_dim
        device = self.projections.qkv.weight.device
        rule = self.rule(max_len, causal=True)
        return BlockCache(rule, shape, max_len, clock=clock, dtype=dtype, device=device)

    def pairs(self, seq_len: int, *, causal: bool) -> int:
        """By groups of rows, because the rule has no period; the same for all heads."""
        return self.dims.heads * self.rule(seq_len, causal=causal).pairs(seq_len)

    def carried(self, seq_len: int) -> int:
        """All keys, because any of them may be a random one later; without random blocks, the global keys and
        those of the window."""
        keys, config = seq_len, self.config
        if not config.random_blocks:
            row = seq_len // config.block
            window = max(config.global_blocks, row - config.window_blocks // 2) * config.block
            keys = min(seq_len, config.global_blocks * config.block) + max(0, seq_len - window)
        return self.dims.heads * keys
