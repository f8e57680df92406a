"""Memory-compressed attention: a convolution shortens keys and values (Liu 2018, arXiv:1801.10198, §4.2.4).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head; s rate, n pools of s tokens.
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
from variants.ops.projections import Projections, masked_attention, rotary


@dataclass(frozen=True, kw_only=True)
class MemoryCompressedConfig(VariantConfig):
    """Knobs of the convolution."""

    rate: int = knob(3, least=1, unit="tokens")
    """Kernel and stride of the convolution: tokens that become one key and one value."""
    sharing: Literal["kv", "none"] = "kv"
    """Sharing of the convolution. kv: one convolution for keys and for values. none: one for each."""


class MemoryCompressed(SequenceMixer):
    """softmax(QK̄ᵀ/√D)V̄, where a pool of s neighbouring keys becomes one key of K̄, and values alike.

    The convolution acts after the projections and has kernel and stride s, so pools do not overlap. Pool j
    consists of the tokens js … js + s − 1. In a causal model, the query at position t reads it from
    t = (j + 1)s on, when it is complete and does not contain the query. Every query also reads a null key
    with the score 0 and a learnt value, which is 0 at first. The first s tokens read nothing else.

    Bidirectional models read all pools. The last pool may be incomplete; its missing tokens count as zeros.
    In causal models no token reads an incomplete pool.

    Deviations from the paper: positions are rotary; a pooled key has the position of its first token, applied
    after the convolution. A head has its own convolution, over its own channels, as in the public package of
    lucidrains; the paper does not say. A convolution over all channels would add s·C² parameters. The null
    key is that of the package, not of the paper. Here it has no weights: a learnt key would compare with
    absolute positions, because queries are rotated. The paper alternates this layer with local attention in
    blocks of 256 tokens; use `variant=hybrid` to alternate it with a local variant.
    """

    Config = MemoryCompressedConfig
    config: MemoryCompressedConfig
    position_scheme = "rotary"
    info = Info(
        paper="Liu et al. 2018, Generating Wikipedia by Summarizing Long Sequences, arXiv:1801.10198",
        family="memory",
        complexity=Complexity(time=2, memory=2, formula="T²/s", source="Liu 2018, §4.2.4", survey=2),
        caps=Caps(causal=True, bidirectional=True),
    )

    def __init__(self, config: MemoryCompressedConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        heads, head_dim, taps = dims.heads, dims.head_dim, config.rate * dims.head_dim
        # of keys and of values, or of both: (1 or 2, H, s·D, D); the variance of keys and values is kept
        kernels = torch.randn(1 if config.sharing == "kv" else 2, heads, taps, head_dim, dtype=torch.float32)
        self.kernels = nn.Parameter((kernels * taps**-0.5).to(torch.get_default_dtype()))
        self.null_value = nn.Parameter(torch.zeros(heads, head_dim))

    # --- pools ----------------------------------------------------------------------------------------

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) → queries (B, T, H, D), and keys and values (2, B, T, H, D), without positions."""
        inner = self.dims.inner_dim
        w_q, w_kv = self.projections.qkv.weight.split([inner, 2 * inner])
        kv = torch.stack([F.linear(x, weight) for weight in w_kv.chunk(2)])
        return F.linear(x, w_q).unflatten(-1, (self.dims.heads, -1)), kv.unflatten(-1, (self.dims.heads, -1))

    def _turned(self, x: Tensor, positions: Tensor | None) -> Tensor:
        return rotary(x, positions, self.dims.rotary_base)

    def _pools(self, kv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (2, B, n·s, H, D) → pooled ones (B, H, n, D) each; positions (n,) of their keys."""
        _, batch, tokens, heads, head_dim = kv.shape
        rate = self.config.rate
        groups = kv.unflatten(2, (tokens // rate, rate)).permute(0, 4, 1, 2, 3, 5)  # (2, H, B, n, s, D)
        rows = groups.reshape(2, heads, batch * (tokens // rate), rate * head_dim)
        # one product for each head; a convolution with groups would copy to channels first
        pooled = rows @ self.kernels.expand(2, -1, -1, -1)
        k, v = pooled.unflatten(2, (batch, tokens // rate)).permute(0, 2, 3, 1, 4)  # (B, n, H, D) each
        return self._turned(k, positions).transpose(1, 2), v.transpose(1, 2)

    def _slots(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled keys and values (B, H, n, D) after the null key and its value: (B, H, 1 + n, D).

        A causal query at position t reads the slots 0 … ⌊t/s⌋, so a query never reads its own pool.
        """
        null = self.null_value[:, None].expand(len(v), -1, 1, -1).to(v.dtype)
        return torch.cat([torch.zeros_like(null), k], dim=2), torch.cat([null, v], dim=2)

    def _pool_positions(self, count: int, ctx: Context, device: torch.device) -> Tensor:
        """The position (n,) of the first token of each pool."""
        positions = ctx.positions
        if positions is None:
            return torch.arange(count, device=device) * self.config.rate
        return positions[:: self.config.rate][:count]

    # --- forward --------------------------------------------------------------------------------------

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, kv = self._split(x)
        tokens, rate = x.shape[1], self.config.rate
        pools = self._readable(tokens, causal=ctx.causal)
        missing = pools * rate - tokens
        # a pool that no query reads is not computed
        kv = F.pad(kv, (0, 0, 0, 0, 0, missing)) if missing > 0 else kv[:, :, : pools * rate]
        k, v = self._slots(*self._pools(kv, self._pool_positions(pools, ctx, x.device)))
        q = self._turned(q, ctx.positions)
        if not ctx.causal:
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v)
            return MixerOut(self.projections.merge(y))
        return MixerOut(self.projections.out(self._attend_causal(q, k, v).flatten(2)))

    def _readable(self, tokens: int, *, causal: bool) -> int:
        """The number of pools that some query reads."""
        return (tokens - 1) // self.config.rate if causal else -(-tokens // self.config.rate)

    def _attend_causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (B, T, H, D) and slots (B, H, S, D) → (B, T, H, D).

        Among the queries of one residue t mod s, the i-th reads the slots up to the i-th: a triangle. The
        residues are a batch, so torch's kernel computes the allowed pairs only. Tokens after the last
        complete pool read all slots, in a second call.
        """
        batch, tokens = q.shape[:2]
        rate = self.config.rate
        rows = tokens // rate
        outputs = []
        if rows:
            queries = q[:, : rows * rate].unflatten(1, (rows, rate)).permute(0, 2, 3, 1, 4).flatten(0, 1)
            keys, values = (t[:, None, :, :rows].expand(-1, rate, -1, -1, -1).flatten(0, 1) for t in (k, v))
            y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)  # (B·s, H, rows, D)
            outputs.append(y.unflatten(0, (batch, rate)).permute(0, 3, 1, 2, 4).flatten(1, 2))
        if tokens % rate:
            y = F.scaled_dot_product_attention(q[:, rows * rate :].transpose(1, 2), k, v)
            outputs.append(y.transpose(1, 2))
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Masked attention to the pools, each of which is a sum over the taps of the convolution."""
        self.require_objective(causal=ctx.causal)
        q, kv = self._split(x)
        tokens, rate = x.shape[1], self.config.rate
        pools = -(-tokens // rate)
        taps = self.kernels.unflatten(2, (rate, -1)).expand(2, -1, -1, -1, -1)  # (2, H, s, D, D)
        pooled = []
        for first in range(0, tokens, rate):
            pool = kv[:, :, first : first + rate]  # the last may be shorter
            pooled.append(torch.einsum("pbrhd,phrde->pbhe", pool, taps[:, :, : pool.shape[2]]))
        k, v = torch.stack(pooled, dim=3)  # (B, H, n, D) each
        k = self._turned(k.transpose(1, 2), self._pool_positions(pools, ctx, x.device)).transpose(1, 2)
        null = self.null_value[None, :, None].expand(len(v), -1, 1, -1)
        k, v = F.pad(k, (0, 0, 1, 0)), torch.cat([null, v], dim=2)
        token = torch.arange(tokens)[:, None]
        complete = (torch.arange(pools) + 1) * rate <= token
        allowed = complete if ctx.causal else torch.ones_like(complete)
        q = self._turned(q, ctx.positions).transpose(1, 2)
        return self.projections.merge(masked_attention(q, k, v, F.pad(allowed, (1, 0), value=True)))

    # --- cost -----------------------------------------------------------------------------------------

    def cost(self, work: Workload) -> Cost:
        """The convolution of the pools that are read: 2·D² for each token and head, of keys and of values.
        Attention: 4·D for each allowed pair, the null key included. An incomplete pool counts in full."""
        tokens, rate = work.seq_len, self.config.rate
        pools = self._readable(tokens, causal=work.causal)
        pairs = tokens * (pools + 1)
        if work.causal:  # query t reads 1 + ⌊t/s⌋ slots
            rows, rest = divmod(tokens, rate)
            pairs = rate * rows * (rows + 1) // 2 + rest * (rows + 1)
        each = work.batch_size * work.inner_dim
        return Cost(
            {
                "projections": Projections.flops(work),
                "compression": 4 * each * work.head_dim * pools * rate,
                "attention": 4 * each * pairs,
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the pooled keys and values, and of the sums of an open pool."""
        pools = -(-work.seq_len // self.config.rate)
        return 2 * work.batch_size * pools * work.inner_dim * work.element_bytes

    # --- decoding -------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> PoolState:
        """The complete pools, and the sums of the open pool."""
        shape = batch_size, self.dims.heads, max_len // self.config.rate, self.dims.head_dim
        return PoolState(clock, max_len, shape, dtype, self.null_value.device)

    def decoding_bytes(self, work: Workload) -> int:
        """All complete pools, and the open one."""
        pools = work.seq_len // self.config.rate + 1
        return 2 * work.batch_size * pools * work.inner_dim * work.element_bytes

    def step(self, x: Tensor, state: PoolState) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence."""
        q, kv = self._split(x)
        begin, tokens, rate = state.clock.position, x.shape[1], self.config.rate
        self._write(kv, state)
        if not begin and tokens > 1:
            return self.forward(x, Context(causal=True)).y
        q = self._turned(q, state.clock.positions(tokens, x.device)).transpose(1, 2)
        visible = (begin + tokens - 1) // rate
        k, v = self._slots(*(held[:, :, :visible].to(q.dtype) for held in (state.keys, state.values)))
        last = state.clock.positions(tokens, x.device)[:, None] // rate
        allowed = torch.arange(visible + 1, device=x.device) <= last
        return self.projections.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))

    def _write(self, kv: Tensor, state: PoolState) -> None:
        """Add the keys and values (2, B, n, H, D) of the next tokens to the pools."""
        begin, rate = state.clock.position, self.config.rate
        end, tap = begin + kv.shape[2], begin % rate
        first = min(-tap % rate, end - begin)  # tokens that belong to the open pool
        if first:
            self._add(kv[:, :, :first], tap, state)
            if tap + first == rate:
                pool = begin // rate
                k = self._turned(
                    state.open[0][:, None], torch.arange(begin - tap, begin - tap + 1, device=kv.device)
                )
                state.keys[:, :, pool], state.values[:, :, pool] = k[:, 0], state.open[1]
                state.open.zero_()
        if whole := (end - begin - first) // rate:
            pools = slice((begin + first) // rate, (begin + first) // rate + whole)
            positions = torch.arange(pools.start, pools.stop, device=kv.device) * rate
            k, v = self._pools(kv[:, :, first : first + whole * rate], positions)
            state.keys[:, :, pools], state.values[:, :, pools] = k, v
        if first + whole * rate < end - begin:
            self._add(kv[:, :, first + whole * rate :], 0, state)

    def _add(self, kv: Tensor, tap: int, state: PoolState) -> None:
        """Add keys and values (2, B, n, H, D), which are multiplied by the taps from `tap` on."""
        taps = self.kernels.unflatten(2, (self.config.rate, -1))[:, :, tap : tap + kv.shape[2]]
        state.open += torch.einsum("pbrhd,phrde->pbhe", kv, taps.expand(2, -1, -1, -1, -1))


class PoolState(DecodingState):
    """Pooled keys and values (B, H, n, D), and the sums over the tokens of the open pool (2, B, H, D)."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(clock, max_len)
        batch, heads, _, head_dim = shape
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.open = torch.zeros(2, batch, heads, head_dim, dtype=dtype, device=device)
