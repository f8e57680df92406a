"""Block-Recurrent Transformer: a window, and state vectors between blocks (Hutchins 2022, arXiv:2203.07852).

Shapes: B batch, T tokens, C channels, H heads, K heads of keys, D channels of a head, W tokens of a block,
S state vectors, n blocks.
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
    Dims,
    Info,
    MixerOut,
    Workload,
)
from variants.knobs import knob
from variants.ops.patterns import masks
from variants.ops.patterns.masked_attention import MaskedAttention, MaskedConfig
from variants.ops.patterns.masks import Rule, Window
from variants.ops.projections import masked_attention, rotary, rotary_next, spread
from variants.ops.segments import state_scan
from variants.ops.segments.state_cell import EPS
from variants.ops.segments.state_cell_state import BlockRecurrentState
from variants.ops.segments.state_weights import StateCell


@dataclass(frozen=True, kw_only=True)
class BlockRecurrentConfig(MaskedConfig):
    """Knobs of the recurrence."""

    window: int = knob(256, least=1, unit="tokens")
    """Tokens that a query reads, itself included, and tokens of a block, after which the state is updated.
    The paper has 512."""
    states: int = knob(32, least=1, unit="vectors")
    """Vectors of the state, each with the channels of a token. The paper has 512."""
    gate: Literal["fixed", "lstm"] = "fixed"
    """Update of the state. fixed: a learnt mean of old and new for each channel. lstm: input and forget gates
    that depend on what was read."""
    weights: Literal["shared", "separate"] = "shared"
    """Matrices of the state, and of the tokens' attention to it. shared: those of the attention between
    tokens, so that a layer has about as many parameters as one of dense attention. separate: their own, as in
    the paper."""


class BlockRecurrent(MaskedAttention):
    """Attention to the last W tokens, and to S state vectors that have read the blocks before.

    Tokens also read the state before their block. At the end of a block the state vectors read each other
    and the tokens of the block, and a gate updates them (`segments.state_cell`). Blocks follow each
    other; the tokens of a block are computed at once. Both results of a token are projected together: their
    concatenation, or their sum if the weights are shared.

    This is the paper's configuration "skip": the state has one gate after attention and no feed-forward
    layer. Gates, initial values, and keys without positions between tokens and state follow the authors'
    code.

    Deviations: shared weights by default. Every layer is recurrent; use `variant=hybrid` for one recurrent
    layer, as in the paper. Scores are divided by √D; the authors normalise queries and keys. Positions within
    the window are rotary, and a query reads itself. The state reads the tokens of its block; in the authors'
    code also those of the block before. Gradients pass through all blocks of a sequence.
    """

    Config = BlockRecurrentConfig
    config: BlockRecurrentConfig
    info = Info(
        paper="Hutchins et al. 2022, Block-Recurrent Transformers, arXiv:2203.07852",
        family="recurrence",
        complexity=Complexity(time=1, memory=1, formula="T·(W + S)", source="Hutchins 2022, abstract"),
        caps=Caps(causal=True, bidirectional=False),
    )

    def __init__(self, config: BlockRecurrentConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        shared = config.weights == "shared"
        self.cell = StateCell(dims, config.states, config.gate, tied=shared)
        self.reading = None if shared else nn.Linear(dims.d_model, dims.inner_dim, bias=False)
        self.read_out = None if shared else nn.Linear(dims.inner_dim, dims.d_model, bias=False)

    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """The window."""
        return Window(self.config.window)

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """The window, and all earlier blocks, which the state has read."""
        block = self.config.window
        return masks.matrix(
            lambda head, i, j: (j <= i) & ((i - j < block) | (j // block < i // block)), seq_len
        )

    # --- forward --------------------------------------------------------------------------------------

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) → queries (B, T, H, D), and keys and values (B, T, K, D), without positions."""
        weights = self.projections.qkv.weight.split([self.dims.inner_dim, *[self.dims.key_dim] * 2])
        q, k, v = (F.linear(x, weight).unflatten(-1, (-1, self.dims.head_dim)) for weight in weights)
        return q, k, v

    def _asking(self, x: Tensor, q: Tensor) -> Tensor:
        """The queries (B, T, H·D) with which tokens read the state; `q` are those of the window."""
        asking: Tensor = q.flatten(2) if self.reading is None else self.reading(x)
        return asking

    def _merge(self, local: Tensor, read: Tensor) -> Tensor:
        """The window (B, H, T, D) and the state (B, T, H·D), projected together: (B, T, C)."""
        near, out = local.transpose(1, 2).flatten(2), self.projections.out
        merged: Tensor = out(near + read) if self.read_out is None else out(near) + self.read_out(read)
        return merged

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state. Raises ValueError where not causal."""
        q, k, v = self._split(x)
        block = self.config.window
        tokens = (x.shape[1] - 1) // block * block
        with torch.autocast(x.device.type, enabled=False):
            first, weights = self.cell.start(k.dtype), self.cell.weights(self.projections, k.dtype)
            k_blocks, v_blocks = (t.transpose(1, 2)[:, :, :tokens] for t in (k, v))
            found = state_scan.scan(first, k_blocks, v_blocks, weights, block)
        read = self._read(self._asking(x, q), *found)
        return MixerOut(self._merge(self._local(q, k, v, ctx.positions), read))

    def _local(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> Tensor:
        """Attention within the window: (B, H, T, D)."""
        base, group = self.dims.rotary_base, self.dims.queries_per_key
        q, k = rotary(q, positions, base), rotary(k, positions, base)
        q, k, v = (t.transpose(1, 2) for t in (q, spread(k, group, dim=2), spread(v, group, dim=2)))
        return self.run_impl(self, q, k, v, True)

    def _read(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Tokens from the start of a block on read the state before their block: queries (B, T, H·D), keys
        and values (B, n, K, S, D) → (B, T, H·D)."""
        block = self.config.window
        full = q.shape[1] // block
        outputs = []
        if full:
            folded = q[:, : full * block].unflatten(1, (full, block))
            outputs.append(self._read_states(folded, keys[:, :full], values[:, :full]))
        if full * block < q.shape[1]:
            rest = q[:, None, full * block :]
            outputs.append(self._read_states(rest, keys[:, full : full + 1], values[:, full : full + 1]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _read_states(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries (B, n, W, H·D), each block with its own state (B, n, K, S, D) → (B, n·W, H·D)."""
        blocks, tokens, heads = q.shape[:2], q.shape[2], self.dims.key_heads
        by_head = q.unflatten(-1, (heads, -1, self.dims.head_dim)).permute(0, 1, 3, 4, 2, 5)
        rows = by_head.flatten(3, 4).flatten(0, 1)  # (B·n, K, G·W, D)
        y = F.scaled_dot_product_attention(rows, keys.flatten(0, 1), values.flatten(0, 1))
        by_token = y.unflatten(0, blocks).unflatten(3, (-1, tokens)).permute(0, 1, 4, 2, 3, 5)
        read: Tensor = by_token.flatten(3).flatten(1, 2)
        return read

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Masked attention, and the recurrence block by block."""
        self.require_objective(causal=ctx.causal)
        dims, cell, block, group = self.dims, self.cell, self.config.window, self.dims.queries_per_key
        q, k, v = self._split(x)
        turned = [rotary(t, ctx.positions, dims.rotary_base).transpose(1, 2) for t in (q, k)]
        k, v = (self.projections.spread(t.transpose(1, 2)) for t in (k, v))
        allowed = self.allowed(x.shape[1], causal=ctx.causal)
        local = masked_attention(turned[0], self.projections.spread(turned[1]), v, allowed)

        def heads(rows: Tensor) -> Tensor:
            split: Tensor = rows.unflatten(-1, (-1, dims.head_dim)).transpose(1, 2)
            return split

        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scores = heads(query) @ key.mT / dims.head_dim**0.5
            found: Tensor = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
            return found

        project, update = cell.matrices(self.projections)
        sizes = [dims.inner_dim] * (1 if cell.is_tied else 2) + [dims.key_dim] * 2
        state, reads = cell.initial.expand(len(x), -1, -1), []
        for start in range(0, x.shape[1], block):
            tokens = slice(start, start + block)
            mean_square = state.square().mean(-1, keepdim=True) + EPS
            hidden = state / mean_square.sqrt() * cell.scale + cell.identity
            found = F.linear(hidden, project).split(sizes, dim=-1)
            own, of_block, pair = found[0], found[-3], found[-2:]
            key, value = (heads(t).repeat_interleave(group, dim=1) for t in pair)
            reads.append(attention(self._asking(x[:, tokens], q[:, tokens]), key, value))
            of_tokens = k[:, :, tokens], v[:, :, tokens]
            both = attention(own, key, value), attention(of_block, *of_tokens)
            y = both[0] + both[1] if cell.is_tied else torch.cat(both, dim=-1)
            if self.config.gate == "fixed":
                keep = cell.gate.sigmoid()
                take = 1 - keep
            else:
                forget, new = cell.gates(y).chunk(2, dim=-1)
                keep, take = (forget + 1).sigmoid(), (new - 1).sigmoid()
            state = keep * state + take * (F.linear(y, update) + cell.bias)
        return self._merge(local, torch.cat(reads, dim=1))

    # --- cost -----------------------------------------------------------------------------------------

    def cost(self, work: Workload) -> Cost:
        """The window: 4·D for each allowed pair; 4·H·D·S for each token that reads the state. For each block
        after the first: products of the state vectors with weights, and 4·H·D·S·(S + W) of their attention;
        keys and values of the first state."""
        batch, width, inner, size = work.batch_size, work.d_model, work.inner_dim, self.config.states
        updates = (work.seq_len - 1) // self.config.window
        kinds = 1 if self.config.weights == "shared" else 2
        queries, gates = kinds * inner, 2 * (self.config.gate == "lstm")
        keys_values = (updates + 1) * 2 * work.key_dim
        return super().cost(work) + Cost(
            {
                "projections": 4 * batch * work.seq_len * width * inner * (kinds - 1),
                "reading": 4 * batch * inner * work.seq_len * size,
                "memory": 2 * batch * size * width * (keys_values + updates * queries * (2 + gates)),
                "states": 4 * batch * inner * updates * size * (size + self.config.window),
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the window's keys and values, of the state vectors after the first block, and of the keys
        without positions of the open block, whose values are those of the window."""
        full, open_tokens = divmod(work.seq_len, self.config.window)
        return (
            super().state_bytes(work)
            + bool(full) * self._vector_bytes(work)
            + work.batch_size * open_tokens * work.key_dim * work.element_bytes
        )

    def _vector_bytes(self, work: Workload) -> int:
        return work.batch_size * self.config.states * work.d_model * max(4, work.element_bytes)

    # --- decoding -------------------------------------------------------------------------------------

    def init_state(  # type: ignore[override]
        self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype
    ) -> BlockRecurrentState:
        """The window, the state vectors and the open block."""
        window = super().init_state(batch_size, max_len, clock=clock, dtype=dtype)
        like = batch_size, self.dims.key_heads, self.dims.head_dim
        keys = torch.empty((), dtype=dtype, device=self.projections.out.weight.device)
        rows = min(max_len, self.config.window - 1)
        return BlockRecurrentState(window, rows, like, self.config.states, self.dims.d_model, keys)

    def decoding_bytes(self, work: Workload) -> int:
        """The window, the state vectors, their keys and values, and keys and values of a block."""
        rows = self.config.states + min(work.seq_len, self.config.window - 1)
        kept = 2 * work.batch_size * rows * work.key_dim * work.element_bytes
        return super().decoding_bytes(work) + self._vector_bytes(work) + kept

    def step(self, x: Tensor, state: BlockRecurrentState) -> Tensor:  # type: ignore[override]
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence."""
        q, k, v = self._split(x)
        base, position = self.dims.rotary_base, state.clock.position
        q_turned, k_turned = (rotary_next(t, state.clock, base).transpose(1, 2) for t in (q, k))
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        read = self._step_states(self._asking(x, q), k, v, state)
        if position or x.shape[1] == 1:
            return self._merge(state.window.attend(q_turned, k_turned, v), read)
        state.window.write(k_turned, v)
        k, v = self.projections.spread(k_turned), self.projections.spread(v)
        return self._merge(self.run_impl(self, q_turned, k, v, True), read)

    def _step_states(self, q: Tensor, k: Tensor, v: Tensor, state: BlockRecurrentState) -> Tensor:
        """What new tokens read from the state, (B, n, H·D); the state reads the blocks that they end."""
        position, block = state.clock.position, self.config.window
        filled = position % block
        k = torch.cat([state.open_keys[:, :, :filled].to(k.dtype), k], dim=2)
        v = torch.cat([state.open_values[:, :, :filled].to(v.dtype), v], dim=2)
        ended, rest = k.shape[2] // block * block, k.shape[2] % block
        keys, values = (t[:, None].to(k.dtype) for t in (state.keys, state.values))
        if ended or not position:
            wide = state.vectors.dtype
            before = state.vectors if position >= block else self.cell.start(wide).expand_as(state.vectors)
            weights = self.cell.weights(self.projections, k.dtype)
            vectors, keys, values = state_scan.states_of(
                before, k[:, :, :ended], v[:, :, :ended], weights, block
            )
            state.keys.copy_(keys[:, -1])
            state.values.copy_(values[:, -1])
            if ended:
                state.vectors.copy_(vectors[-1])
        state.open_keys[:, :, :rest], state.open_values[:, :, :rest] = k[:, :, ended:], v[:, :, ended:]
        first = min(q.shape[1], block - filled) if filled else 0
        outputs = [self._read_states(q[:, None, :first], keys[:, :1], values[:, :1])] if first else []
        if first < q.shape[1]:
            done = int(bool(filled))
            outputs.append(self._read(q[:, first:], keys[:, done:], values[:, done:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
