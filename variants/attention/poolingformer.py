"""Poolingformer: a window, then a larger one over pooled keys and values (Zhang 2021, arXiv:2105.04371).

Over 300 lines: both levels, their reference and decoding share the pools.

Shapes: B batch, T tokens, C channels, C' = H · D, H heads, D channels of a head, s tokens of a pool, n pools,
m pools of a window.
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
from variants.ops.key_cache import KeyCache, cache_bytes
from variants.ops.patterns import masks
from variants.ops.patterns.band_parts import Band, band_parts
from variants.ops.patterns.block_sparse import union_attention
from variants.ops.patterns.masked_attention import TILE_OVERHEAD, attention_or_zero
from variants.ops.patterns.part_kernels import missing_fused
from variants.ops.patterns.strided_parts import Part, piece_size
from variants.ops.projections import Projections, masked_attention, rotary, rotary_next
from variants.ops.segments.pooled_state import PooledState


@dataclass(frozen=True, kw_only=True)
class PoolingformerConfig(VariantConfig):
    """Knobs of both levels."""

    window: int = knob(128, least=1, unit="tokens")
    """First level: tokens that a query reads on each side, itself included."""
    pooled_window: int = knob(512, least=1, unit="tokens")
    """Second level: a query reads the pools of this many tokens on each side of its own pool. A multiple of
    `pool`."""
    pool: int = knob(4, least=1, unit="tokens")
    """Kernel and stride of pooling: tokens that become one key and one value."""
    pooling: Literal["mean", "max", "dynamic"] = "mean"
    """Pooling of keys and values. mean, max: of each channel. dynamic: a weighted mean; the weights are a
    softmax of a linear map of the middle token (LDConv in the paper)."""
    weights: Literal["shared", "own"] = "shared"
    """Projections of the second level. shared: those of the first level ("weight sharing" in the paper's
    ablation), so that the layer has as many parameters as dense attention. own: a second set, as in the
    paper's main model, with 3·C'² more parameters."""
    impl: Literal["auto", "fused", "plain"] = "auto"
    """Implementation of attention. fused: blocks, by torch's CPU attention kernel. plain: the same blocks by
    matrix products, on any device. auto: fused on the CPU, plain elsewhere."""

    def __post_init__(self) -> None:
        ok = self.pooled_window % self.pool == 0
        self.require("pooled_window", ok, f"a multiple of pool={self.pool}")

    @property
    def pools(self) -> int:
        """Pools that a query reads on each side of its own pool."""
        return self.pooled_window // self.pool


def _fused(layer: Poolingformer, q: Tensor, k: Tensor, v: Tensor, parts: list[Part]) -> Tensor:
    """Blocks, by torch's CPU attention kernel."""
    if reason := missing_fused(layer.device_type):
        raise ValueError(reason)
    return union_attention(q, k, v, parts, "fused", piece_size(q.shape[2], layer.device_type))


def _plain(layer: Poolingformer, q: Tensor, k: Tensor, v: Tensor, parts: list[Part]) -> Tensor:
    """The same blocks by matrix products."""
    return union_attention(q, k, v, parts, "plain", piece_size(q.shape[2], layer.device_type))


class Poolingformer(SequenceMixer):
    """W_o (y + z): y is attention in a window, z is attention of y to pooled keys and values of y.

    The queries, keys and values of z are projections of y, so that a pool holds what its tokens have read in
    their windows. Keys and values are pooled over s neighbouring tokens; pool j consists of the tokens
    js … js + s − 1.

    Causal: a token of pool i reads the pools i − m … i − 1, which are complete and lie in its past. Its own
    pool is not read, also not by the last token of it. The first s tokens read no pool, and z is 0 there.
    Bidirectional: it reads the pools i − m … i + m that exist. The last pool may be incomplete; it is pooled
    from the tokens that it has.

    The pools near the token cover tokens of its window a second time, as in the paper, where the larger
    window contains the smaller one.

    Deviations from the paper: positions are rotary; a pooled key has the position of the middle of its pool,
    applied after pooling. Pools begin at multiples of s, not at the first token of each window, so all
    queries share them. Kernel and stride are equal. The weights of dynamic pooling differ by head. The two
    levels have one output projection, after their sum. The paper uses this layer in some layers of a model;
    `variant=hybrid` can do so.
    """

    Config = PoolingformerConfig
    config: PoolingformerConfig
    position_scheme = "rotary"
    flop_overhead_reason = TILE_OVERHEAD
    info = Info(
        paper="Zhang et al. 2021, Poolingformer, arXiv:2105.04371",
        family="memory",
        complexity=Complexity(time=1, memory=1, formula="T·(w₁ + w₂/s)", source="Zhang 2021", survey=1),
        caps=Caps(causal=True, bidirectional=True),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "fused": Impl(
            run=_fused,
            missing=lambda device, dtype, head_dim: missing_fused(device.type),
            flop_overhead_reason=TILE_OVERHEAD,
            auto_on=("cpu",),
        ),
        "plain": Impl(run=_plain, flop_overhead_reason=TILE_OVERHEAD, auto_on=(Impl.OTHER_DEVICES,)),
    }

    def __init__(self, config: PoolingformerConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        if config.weights == "own":
            self.second = nn.Linear(dims.inner_dim, 3 * dims.inner_dim, bias=False)
        if config.pooling == "dynamic":  # logits of the tokens of a pool, of keys and of values: (2, H, s, D)
            taps = (
                torch.randn(2, dims.heads, config.pool, dims.head_dim, dtype=torch.float32)
                * dims.head_dim**-0.5
            )
            self.taps = nn.Parameter(taps.to(torch.get_default_dtype()))

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Shared projections read the inputs and the outputs of the heads, which must be equally wide."""
        assert isinstance(config, PoolingformerConfig)
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        if config.weights == "shared" and dims.inner_dim != dims.d_model:
            heads = f"the heads have {dims.inner_dim} channels, not {dims.d_model}"
            return f"weights=shared: {heads}; use weights=own"
        return None

    # --- pools ------------------------------------------------------------------------------------

    @property
    def _weight(self) -> Tensor:
        """The projections of the second level (3·C', C')."""
        return self.projections.qkv.weight if self.config.weights == "shared" else self.second.weight

    def _pooled(self, tokens: Tensor) -> Tensor:
        """Pools of equal length (B, n, s, C') → keys and values (2, B, n, H, D), without positions."""
        weight, heads = self._weight[self.dims.inner_dim :], self.dims.heads
        if self.config.pooling == "mean":  # a mean of products is the product of the mean
            kv: Tensor = F.linear(tokens.mean(2), weight).unflatten(-1, (2, heads, -1))
            return kv.permute(2, 0, 1, 3, 4)
        kv = F.linear(tokens, weight).unflatten(-1, (2, heads, -1))  # (B, n, s, 2, H, D)
        if self.config.pooling == "max":
            return kv.amax(2).permute(2, 0, 1, 3, 4)
        kv, length = kv.permute(3, 0, 1, 4, 2, 5), tokens.shape[2]  # (2, B, n, H, s, D)
        middle = kv[:, :, :, :, (length - 1) // 2]
        logits = torch.einsum("pbnhd,phsd->pbnhs", middle, self.taps[:, :, :length])
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights: Tensor = logits.to(wide).softmax(-1).to(kv.dtype)
        return (weights[..., None, :] @ kv)[..., 0, :]

    def _pools(self, y: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Keys with positions, and values (B, H, n, D), of the pools that some token (B, T, C') reads."""
        size, tokens = self.config.pool, y.shape[1]
        count = self.pools_read(tokens, causal=ctx.causal)
        whole = min(count, tokens // size)
        found = []
        if whole:
            found.append(self._pooled(y[:, : whole * size].unflatten(1, (whole, size))))
        if count > whole:
            found.append(self._pooled(y[:, None, whole * size :]))
        k, v = torch.cat(found, dim=2) if len(found) > 1 else found[0]
        first = torch.arange(count, device=y.device) * size
        last = (first + size - 1).clamp(max=tokens - 1)
        if ctx.positions is not None:
            first, last = ctx.positions[first], ctx.positions[last]
        k = rotary(k, (first + last).double() / 2, self.dims.rotary_base)
        return k.transpose(1, 2), v.transpose(1, 2)

    def pools_read(self, seq_len: int, *, causal: bool) -> int:
        """The number of pools that some token reads."""
        return (seq_len - 1) // self.config.pool if causal else -(-seq_len // self.config.pool)

    # --- forward ----------------------------------------------------------------------------------

    def _first_band(self, seq_len: int, *, causal: bool) -> Band:
        reach = self.config.window - 1
        return Band(seq_len=seq_len, keys=seq_len, back=reach, ahead=0 if causal else reach)

    def _second_band(self, seq_len: int, *, causal: bool) -> Band:
        most, pools = self.config.pools, self.pools_read(seq_len, causal=causal)
        ahead = -1 if causal else most
        return Band(seq_len=seq_len, keys=pools, back=most, ahead=ahead, unit=self.config.pool)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, band: Band) -> Tensor:
        """(B, H, T, D) → (B, T, C')."""
        y = self.run_impl(self, q, k, v, band_parts(band, self.dims.heads, q.device))
        return y.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        y = self._attend(q, k, v, self._first_band(x.shape[1], causal=ctx.causal))
        return MixerOut(self._out(self._both(y, ctx)))

    def _out(self, y: Tensor) -> Tensor:
        """The output projection: (B, T, C') → (B, T, C)."""
        out: Tensor = self.projections.out(y)
        return out

    def _both(self, y: Tensor, ctx: Context) -> Tensor:
        """The sum of the first level y (B, T, C') and of the second."""
        band = self._second_band(y.shape[1], causal=ctx.causal)
        if not band.keys:
            return y
        k, v = self._pools(y, ctx)
        q = rotary(self._queries(y), ctx.positions, self.dims.rotary_base).transpose(1, 2)
        return y + self._attend(q, k.to(q.dtype), v.to(q.dtype), band)

    def _queries(self, y: Tensor) -> Tensor:
        """(B, T, C') → queries of the second level (B, T, H, D), without positions."""
        q = F.linear(y, self._weight[: self.dims.inner_dim])
        by_head: Tensor = q.unflatten(-1, (self.dims.heads, -1))
        return by_head

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Two masked attentions; each pool is computed by itself."""
        self.require_objective(causal=ctx.causal)
        tokens, size, heads, base = x.shape[1], self.config.pool, self.dims.heads, self.dims.rotary_base
        positions = torch.arange(tokens, device=x.device) if ctx.positions is None else ctx.positions
        window = masks.matrix(self._window(ctx.causal), tokens)
        y = masked_attention(*self.projections.split(x, positions), window).transpose(1, 2).flatten(2)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in F.linear(y, self._weight).chunk(3, dim=-1))
        keys, values = [], []
        for a in range(0, tokens, size):
            b = min(a + size, tokens)
            middle = (positions[a : a + 1] + positions[b - 1 : b]).double() / 2
            keys.append(rotary(self._one_pool(k[:, a:b], 0), middle, base))
            values.append(self._one_pool(v[:, a:b], 1))
        distance = torch.arange(tokens)[:, None] // size - torch.arange(len(keys))
        read = (distance > 0) & (distance <= self.config.pools)
        if not ctx.causal:
            read = distance.abs() <= self.config.pools
        q = rotary(q, positions, base)
        q, k, v = (t.transpose(1, 2) for t in (q, torch.cat(keys, dim=1), torch.cat(values, dim=1)))
        z = attention_or_zero(q, k.to(q.dtype), v.to(q.dtype), read.expand(heads, -1, -1))
        return self._out(y + z.transpose(1, 2).flatten(2))

    def _one_pool(self, t: Tensor, which: int) -> Tensor:
        """Keys (which=0) or values (1) of the tokens of a pool (B, s, H, D) → (B, 1, H, D)."""
        if self.config.pooling == "mean":
            return t.mean(1, keepdim=True)
        if self.config.pooling == "max":
            return t.amax(1, keepdim=True)
        length = t.shape[1]
        logits = torch.einsum("bhd,hsd->bsh", t[:, (length - 1) // 2], self.taps[which, :, :length])
        wide = torch.promote_types(logits.dtype, torch.float32)
        return (logits.to(wide).softmax(1).to(t.dtype)[..., None] * t).sum(1, keepdim=True)

    def _window(self, causal: bool) -> masks.Rule:
        rule: masks.Rule = masks.Window(self.config.window)
        return rule & masks.causal if causal else rule

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor | None:
        """The tokens of the window, and those that a pool which is read depends on. None for pooling=max."""
        if self.config.pooling == "max":
            return None
        window = masks.matrix(self._window(causal), seq_len)
        distance = torch.arange(seq_len)[:, None] // self.config.pool
        distance = distance - torch.arange(seq_len) // self.config.pool
        pooled = distance.abs() <= self.config.pools
        if causal:
            pooled &= distance > 0
        reads = (pooled.float() @ window.float()) > 0  # each token of a pool has read its window
        return window | reads

    # --- cost -------------------------------------------------------------------------------------

    def cost(self, work: Workload) -> Cost:
        """Projections of both levels; means are pooled before their projection. Pairs of both levels: 4·D
        each. The logits and weighted sums of dynamic pooling."""
        causal, tokens, inner = work.causal, work.seq_len, work.inner_dim
        bands = (self._first_band(tokens, causal=causal), self._second_band(tokens, causal=causal))
        count = self.pools_read(tokens, causal=causal)
        in_pools = min(tokens, count * self.config.pool)
        projected = count if self.config.pooling == "mean" else in_pools
        queries = tokens if count else 0
        second = 2 * work.batch_size * inner**2 * (queries + 2 * projected)
        parts = {"projections": Projections.flops(work) + second}
        if self.config.pooling == "dynamic":
            parts["compression"] = 8 * work.batch_size * in_pools * inner
        pairs = sum(band.pairs() for band in bands if band.keys)
        return Cost({**parts, "attention": 4 * work.batch_size * inner * pairs})

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the keys and values of the last window − 1 tokens and m pools, and of an open pool."""
        first = min(work.seq_len, self.config.window - 1)
        return (
            work.batch_size * (2 * first * work.inner_dim + self._second_numbers(work)) * work.element_bytes
        )

    def _second_numbers(self, work: Workload) -> int:
        """Numbers of the pools and of the open pool of a sequence."""
        size, tokens = self.config.pool, work.seq_len
        return (2 * min(self.config.pools, tokens // size) + min(size, tokens)) * work.inner_dim

    # --- decoding ---------------------------------------------------------------------------------

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> PooledState:
        """Rings of both levels, and the open pool."""
        dims, config, device = self.dims, self.config, self.projections.out.weight.device
        shape = batch_size, dims.heads, dims.head_dim
        window = KeyCache(self._window(True), shape, max_len, clock=clock, dtype=dtype, device=device)
        ring = batch_size, dims.heads, min(config.pools, max_len // config.pool), dims.head_dim
        return PooledState(clock, max_len, window, ring, config.pool, dtype, device)

    def decoding_bytes(self, work: Workload) -> int:
        """Both rings and the open pool."""
        numbers = 2 * work.batch_size * work.head_dim * work.element_bytes
        first = cache_bytes(self._window(True), work.heads, work.seq_len, numbers)
        return first + work.batch_size * self._second_numbers(work) * work.element_bytes

    def step(self, x: Tensor, state: PooledState) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence, other tokens pool by pool."""
        clock, tokens = state.clock, x.shape[1]
        q, k, v = self.projections.split_next(x, clock)
        if clock.position == 0 and tokens > 1:
            state.window.write(k, v)
            ctx = Context(causal=True)
            y = self._attend(q, k, v, self._first_band(tokens, causal=True))
            self._keep_prompt(y, state)
            return self._out(self._both(y, ctx))
        y = state.window.attend(q, k, v).transpose(1, 2).flatten(2)
        q = rotary_next(self._queries(y), clock, self.dims.rotary_base).transpose(1, 2)
        size, outputs, at = self.config.pool, [], 0
        while at < tokens:  # tokens of one pool read the same pools
            position = clock.position + at
            some = slice(at, min(tokens, at + size - position % size))
            outputs.append(state.read(q[:, :, some], position // size))
            begin, at = position % size, some.stop
            state.open[:, begin : begin + some.stop - some.start] = y[:, some]
            if (clock.position + at) % size == 0:
                self._close(state.open[:, None].to(x.dtype), position // size, state)
        z = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
        return self._out(y + z)

    def _keep_prompt(self, y: Tensor, state: PooledState) -> None:
        """Keep the last pools of a prompt (B, T, C'), and its open pool."""
        size, tokens = self.config.pool, y.shape[1]
        whole = tokens // size
        first = max(0, whole - self.config.pools)
        if whole > first:
            pools = y[:, first * size : whole * size].unflatten(1, (whole - first, size))
            self._close(pools, first, state)
        state.open[:, : tokens - whole * size] = y[:, whole * size :]

    def _close(self, tokens: Tensor, first: int, state: PooledState) -> None:
        """Keep complete pools (B, n, s, C'), n ≤ m; `first` is the index of the first."""
        size, count = self.config.pool, tokens.shape[1]
        k, v = self._pooled(tokens)
        pool = torch.arange(first, first + count, device=tokens.device)
        k = rotary(k, pool * size + (size - 1) / 2, self.dims.rotary_base)
        state.keep(k.transpose(1, 2), v.transpose(1, 2), first)
