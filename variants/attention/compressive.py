"""Compressive Transformer: memories too old for Transformer-XL, compressed (Rae 2019, arXiv:1911.05507).

Shapes: B batch, T tokens of a group of segments, S tokens of a segment, M positions of memory, M_c compressed
memories, F positions that fall out of the memory after a segment, N segments of a run, c compression rate,
C channels, H heads, D channels of a head.

Over 300 lines: the form for one segment, the form for a group of segments and the readable reference compute
the same and are read side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Caps, Clock, Complexity, Context, Cost, Dims, Info, MixerOut, Workload
from variants.knobs import knob
from variants.ops.projections import spread
from variants.ops.segments.compression import (
    COMPRESSIONS,
    Compressor,
    Group,
    MemoryRule,
    MostUsed,
    Stretch,
    group_of,
    stretches,
)
from variants.ops.segments.recurrent import Recurrent, RecurrentConfig, slide
from variants.ops.segments.recurrent_state import CompressiveState
from variants.ops.segments.segment_windows import SegmentRun


@dataclass(frozen=True, kw_only=True)
class CompressiveConfig(RecurrentConfig):
    """Knobs of compressed memory."""

    comp_len: int = knob(64, least=0, unit="memories")
    """Compressed memories that each layer keeps beyond those; 0 for none, which is Transformer-XL."""
    rate: int = knob(4, least=1, unit="memories")
    """Memories that are compressed into one."""
    compression: Literal["mean", "max", "conv", "dilated_conv", "most_used"] = "conv"
    """How memories are compressed. mean or max pooling, conv or dilated_conv (learnt), most_used (those that
    got most attention)."""

    @property
    def rule(self) -> MemoryRule:
        """The sizes of memory and compressed memory."""
        return MemoryRule(segment=self.segment, mem_len=self.mem_len, comp_len=self.comp_len, rate=self.rate)

    @property
    def memory_positions(self) -> int:
        """Of both memories; a compressed one is one position."""
        return self.mem_len + self.comp_len

    def with_memory(self, factor: int) -> Self:
        """Both memories are longer; the rate stays."""
        return replace(super().with_memory(factor), comp_len=factor * self.comp_len)


class State(NamedTuple):
    """What is carried from segment to segment, detached."""

    memory: Tensor
    """Hidden states (B, M, C)."""
    compressed: Tensor
    """Compressed memories (B, ≤ M_c, C)."""
    usage: Tensor | None
    """(B, M) sum over the queries so far of the attention to each memory, mean over heads; for most_used."""


class Compressive(Recurrent):
    """Transformer-XL with a second, compressed memory beyond the first (§3).

    Every query reads the compressed memories, the memory, and its segment up to itself, in this order.
    Relative positions count along it, so that a compressed memory is one position.

    After a segment, the positions that no longer fit in the memory are compressed in groups of `rate`, the
    oldest first. If their number is not a multiple of `rate`, the rest stays in the memory, readable, until
    its group is full; the memory then has up to rate − 1 positions more than mem_len.

    The attention-reconstruction loss (§3.1, algorithm 2) is the mean squared difference between content
    attention (q·k, no positions) to the positions that fell out and to their compression. Queries, the
    projections of keys and values, and memories are detached in it, so it trains only the compressor.
    Compressed memories are carried detached, so the task trains everything else. The loss is
    `MixerOut.aux_loss`, the sum over segments. It is computed only where gradients are: evaluation does not
    compute it, and `cost` does not count it (`flop_overhead_reason` says so, and `reconstruction_flops`
    counts it). Pooling and most_used learn nothing and have no loss.

    The default, conv, is the paper's best (§4.1), and has rate · C² parameters: at rate 4, as many as all
    projections of a dense layer. Pooling has none.

    Several segments at once: only inputs of the layer are compressed, so the compressed memories of all
    segments are known before the attention. most_used is the exception: its choice depends on the attention
    of earlier segments, so the layer computes segment after segment.

    Cost compared with `transformer_xl`, segment = mem_len = 512 and comp_len = 128 at T = 16,384: a third
    more FLOPs, for an eighth more keys, the convolution and the loss. Most of the loss is the attention to
    the positions that fell out; it has no positions, so it is not part of the layer's attention. Measured on
    two cores, median of three rounds: 0.39 of the time of dense attention (`transformer_xl` 0.28).

    Deviations from the paper: those of `transformer_xl`; the loss is a mean, not a sum, over tokens and
    channels, so that it does not grow with the batch; most_used ranks by the mean attention over all
    queries that could read a position, including those of its own segment. The package
    compressive-transformer-pytorch reconstructs the attention to the whole memory, whereas Algorithm 2 does
    so only for the positions that fall out.
    """

    Config = CompressiveConfig
    config: CompressiveConfig
    info = Info(
        paper="Rae et al. 2019, Compressive Transformers, arXiv:1911.05507",
        family="recurrence",
        complexity=Complexity(time=1, memory=0, formula="T·(S+M+M_c)", source="Rae 2019, §3", survey=2),
        caps=Caps(causal=True, bidirectional=False, stateful=True),
    )

    def __init__(self, config: CompressiveConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        # drawn last, and only where used, so that everything else is as in transformer_xl
        make = COMPRESSIONS[config.compression] if config.comp_len else Compressor
        self.compressor = make(dims.d_model, config.rate)
        self.counts = isinstance(self.compressor, MostUsed)
        self.learns = any(True for _ in self.compressor.parameters())
        if self.learns:
            self.flop_overhead_reason = (
                f"{type(self).flop_overhead_reason}; training also attends twice for the reconstruction loss"
            )

    @property
    def rule(self) -> MemoryRule:
        """The sizes of both memories."""
        return self.config.rule

    def auxiliary_parameters(self) -> Iterator[nn.Parameter]:
        """The compressor's: the task never reaches them."""
        return self.compressor.parameters()

    def group(self, seq_len: int, memory: int, compressed: int) -> Group:
        """The sizes of a group of segments that begins with memories of these sizes."""
        return group_of(self.rule, seq_len, memory, compressed)

    def runs(self, seq_len: int, memory: int, compressed: int) -> tuple[SegmentRun, ...]:
        """Both memories grow up to their lengths."""
        return self.group(seq_len, memory, compressed).runs

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> MixerOut:
        """(B, T, C) → MixerOut, for one segment or a group of them.

        Raises ValueError where not causal.
        """
        if state is None:
            state = self._blank(x)
        if x.shape[1] > self.config.segment:
            return self._forward_in_turn(x, ctx, state) if self.counts else self._forward_group(x, state)
        found = self.attend(x, torch.cat([state.compressed, state.memory], dim=1), count=self.counts)
        after, fallen, compressed = self._advance(x, state, found.usage)
        loss = None
        if compressed is not None and self.learns and torch.is_grad_enabled():
            keys = slice(state.compressed.shape[1], state.compressed.shape[1] + fallen)
            loss = self._reconstruction(found.q, found.kv, keys, compressed, self.kv.weight.detach())
        return MixerOut(found.y, after, loss)

    def _forward_in_turn(self, x: Tensor, ctx: Context, state: State) -> MixerOut:
        """The segments of a group one by one, for most_used."""
        outputs = []
        for segment in self.config.schedule.split(x.shape[1]):
            out = self.forward(x[:, segment], ctx, state)
            outputs.append(out.y)
            state = out.state
        return MixerOut(torch.cat(outputs, dim=1), state)

    def _forward_group(self, x: Tensor, state: State) -> MixerOut:
        group = self.group(x.shape[1], state.memory.shape[1], state.compressed.shape[1])
        held = slide(state.memory, x, 0) if state.memory.shape[1] else x.detach()
        made = self._compress_group(held, group)
        stream = torch.cat([state.compressed, *(self._kept(new) for new in made if new is not None)], dim=1)
        known = stream.shape[1] - self.rule.new(group.runs[-1].sizes.fallen)
        found = self.attend_group(x, state.memory, group.runs, (stream[:, :known], group.read))
        weight = self.kv.weight.detach().to(found.kv[0].dtype)  # once, not in each run
        losses = [
            run.segments
            * self._reconstruction(q, kv, slice(c, c + run.sizes.fallen), new.flatten(0, 1), weight)
            for run, q, kv, new in zip(group.runs, found.q, found.kv, made, strict=True)
            if new is not None and self.learns and torch.is_grad_enabled()
            for c in [run.sizes.compressed]
        ]
        memory = held[:, held.shape[1] - group.memory :].clone()
        queue = stream[:, stream.shape[1] - group.compressed :].clone()
        return MixerOut(found.y, State(memory, queue, None), sum(losses[1:], losses[0]) if losses else None)

    def _compress_group(self, held: Tensor, group: Group) -> list[Tensor | None]:
        """The compressed memories (B, N, F / c, C) of each run, from memory and tokens; None if there are
        none."""
        made: list[Tensor | None] = []
        begin = 0
        for run in group.runs:
            end = begin + run.segments * run.sizes.fallen
            fallen = held[:, begin:end].unflatten(1, (run.segments, -1)) if end > begin else None
            begin = end
            if fallen is None or not self.config.comp_len:
                made.append(None)
            else:
                compressed: Tensor = self.compressor(fallen.flatten(0, 1), None)
                made.append(compressed.unflatten(0, (-1, run.segments)))
        return made

    def _kept(self, made: Tensor) -> Tensor:
        """The compressed memories (B, P, C) of a run that enter the queue, detached."""
        return made[:, :, -self.config.comp_len :].flatten(1, 2).detach()

    def _blank(self, x: Tensor) -> State:
        nothing = x.new_empty(x.shape[0], 0, x.shape[2])  # not a view, which would keep x
        return State(nothing, nothing, nothing.new_zeros(x.shape[0], 0) if self.counts else None)

    def _advance(self, x: Tensor, state: State, received: Tensor | None) -> tuple[State, int, Tensor | None]:
        """The state after segment x, the number of positions that fell out, and their compression or None.

        The compression has the compressor's gradient; in the state, it is detached. The state consists of
        copies, so that the memory of the positions that fell out is freed.
        """
        tokens = x.shape[1]
        held = slide(state.memory, x, 0)
        fallen = self.rule.falls(state.memory.shape[1], tokens)
        usage = mean_usage = None
        if received is not None and state.usage is not None:
            held_tokens = held.shape[1]
            usage = F.pad(state.usage, (0, tokens)) + received[:, -held_tokens:]
            # each position was read by itself and by all after it
            readers = torch.arange(held_tokens, 0, -1, device=x.device, dtype=usage.dtype)
            mean_usage = (usage / readers)[:, :fallen]
            usage = usage[:, fallen:].clone()
        compressed = None
        queue = state.compressed
        if fallen and self.config.comp_len:
            compressed = self.compressor(held[:, :fallen], mean_usage)
            queue = torch.cat([queue, compressed.detach()], dim=1)[:, -self.config.comp_len :].clone()
        return State(held[:, fallen:].clone(), queue, usage), fallen, compressed

    def _reconstruction(
        self, q: Tensor, kv: Tensor, keys: slice, compressed: Tensor, weight: Tensor
    ) -> Tensor:
        """Algorithm 2, for segments with queries q (H, B, S, D), keys and values kv (2, H, B, J, D). `keys`
        are the positions that fell out, and `compressed` (B, F / c, C) their compression. `weight` is that of
        keys and values, detached."""
        q = q.detach().transpose(0, 1)
        k, v = kv.detach()[..., keys, :].transpose(1, 2)  # (B, H, F, D)
        shorter = self.spread(self.by_head(F.linear(compressed, weight)))
        k_short, v_short = shorter.transpose(1, 2)
        want = F.scaled_dot_product_attention(q, k, v)
        error = F.scaled_dot_product_attention(q, k_short, v_short) - want
        # `mse_loss` computes the same, but its result keeps a buffer as large as `error` alive on the CPU
        return error.to(torch.promote_types(error.dtype, torch.float32)).square().mean()

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Segment by segment, every score written out. Raises ValueError where not causal."""
        self.require_objective(causal=ctx.causal)
        return torch.cat([y for y, _ in self.reference_segments(x)], dim=1)

    def reference_segments(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Outputs and reconstruction loss of each segment, in readable form."""
        c = self.config
        compressed = old = memory = x[:, :0].detach()
        usage = readers = x.new_zeros(x.shape[0], 0)
        for segment in c.schedule.split(x.shape[1]):
            h = x[:, segment]
            found = self.plainly_attend(h, torch.cat([compressed, memory], dim=1))
            assert found.usage is not None
            tokens, seen = h.shape[1], memory.shape[1] + h.shape[1]
            usage = torch.cat([usage, h.new_zeros(len(h), tokens)], dim=1) + found.usage.detach()[:, -seen:]
            own = torch.arange(tokens, 0, -1).to(h).expand(len(h), -1)
            readers = torch.cat([readers + tokens, own], dim=1)
            memory = torch.cat([memory, h.detach()], dim=1)
            over = max(0, seen - c.mem_len)
            over = over // c.rate * c.rate if c.comp_len else over
            old, memory = memory[:, :over], memory[:, over:]
            loss = None
            if c.comp_len and over:
                new = self.compressor(old, (usage / readers)[:, :over])
                if self.learns:
                    q = self.q.weight.detach(), self.kv.weight.detach()
                    loss = (
                        (self._content(h.detach(), old, *q) - self._content(h.detach(), new, *q))
                        .square()
                        .mean()
                    )
                compressed = torch.cat([compressed, new.detach()], dim=1)[:, -c.comp_len :]
            usage, readers = usage[:, over:], readers[:, over:]
            yield found.y, loss

    def _content(self, h: Tensor, memory: Tensor, w_q: Tensor, w_kv: Tensor) -> Tensor:
        """Content attention of h (B, S, C) to a memory, with the weights given: (B, H, S, D)."""
        q, (k, v) = h @ w_q.T, (memory @ w_kv.T).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.dims.head_dim)).transpose(1, 2) for t in (q, k, v))
        k, v = (spread(t, self.dims.queries_per_key, dim=1) for t in (k, v))
        attended: Tensor = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v
        return attended

    def stretches(self, seq_len: int) -> tuple[Stretch, ...]:
        """The segments of a sequence."""
        return stretches(self.rule, self.compressor.reach, seq_len)

    def init_state(
        self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype
    ) -> CompressiveState:
        """Keys and values of both memories and a segment; hidden states, which are compressed later."""
        keys = self._most_keys(max_len)
        held, device = min(max_len, self._most_held()), self.u.device
        wide = torch.promote_types(dtype, torch.float32)
        return CompressiveState(
            self.make_state(batch_size, max_len, keys, clock, dtype),
            torch.zeros(batch_size, held, self.dims.d_model, dtype=dtype, device=device),
            torch.zeros(batch_size, held, dtype=wide, device=device) if self.counts else None,
        )

    def _most_held(self) -> int:
        """Positions of the memory, with those that wait for their group, and of a segment."""
        return self.config.mem_len + self.config.segment + (self.config.rate - 1) * bool(self.config.comp_len)

    def _most_keys(self, max_len: int) -> int:
        return min(max_len, self._most_held() + self.config.comp_len)

    def step(self, x: Tensor, state: CompressiveState) -> Tensor:
        """(B, n, C) → (B, n, C), segment by segment."""
        outputs = []
        while x.shape[1]:
            if state.keys.segment == self.config.segment:
                self._end_segment(state)
            tokens = x[:, : self.config.segment - state.keys.segment]
            y, received = self.decode(tokens, state.keys, count=self.counts)
            state.hold(tokens, received)
            outputs.append(y)
            x = x[:, tokens.shape[1] :]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _end_segment(self, state: CompressiveState) -> None:
        """Compress what leaves the memory."""
        keys, memory = state.keys, state.held - state.keys.segment
        old = keys.before - memory  # compressed memories
        fallen = self.rule.falls(memory, keys.segment)
        new = None
        if fallen and self.config.comp_len:
            mean_usage = None
            if state.usage is not None:
                readers = torch.arange(state.held, 0, -1, device=state.usage.device, dtype=state.usage.dtype)
                mean_usage = (state.usage[:, : state.held] / readers)[:, :fallen]
            new = self.compressor(state.hidden[:, :fallen], mean_usage)[:, -self.config.comp_len :]
        keys.forget(fallen, start=old)
        state.drop(fallen)
        if new is not None:
            keys.insert(self.by_head(self.kv(new)), at=old, limit=self.config.comp_len)

    def decoding_bytes(self, work: Workload) -> int:
        """Keys and values, hidden states of the memory and the segment, and for most_used their usage."""
        held = min(work.seq_len, self._most_held())
        hidden = work.batch_size * held * work.d_model * work.element_bytes
        usage = work.batch_size * held * max(4, work.element_bytes) if self.counts else 0
        return self.state_of_keys(work, self._most_keys(work.seq_len)) + hidden + usage

    def cost(self, work: Workload) -> Cost:
        """The groups of a sequence, each with the memories that exist by then, and the compression."""
        total, memory, compressed = Cost(), 0, 0
        schedule = self.config.schedule
        for part in (schedule.split if self.counts else schedule.segments)(work.seq_len):
            group = self.group(part.stop - part.start, memory, compressed)
            memory, compressed = group.memory, group.compressed
            fallen = sum(run.segments * run.sizes.fallen for run in group.runs)
            total += self.group_cost(work, group.runs, group.new)
            total += self.compressor.cost(work.batch_size * fallen)
        return total

    def reconstruction_flops(self, work: Workload) -> int:
        """Forward FLOPs of the auxiliary loss, where it is computed: two attentions without positions, to
        the positions that fell out and to their compression, and the keys and values of the latter."""
        if not self.learns:
            return 0
        total = 0
        for part in self.stretches(work.seq_len):
            tokens, fallen = part.sizes.tokens, part.sizes.fallen
            compressed = fallen // self.config.rate
            pairs = work.inner_dim * tokens * (fallen + compressed)
            total += 4 * (pairs + work.key_dim * compressed * work.d_model)
        return work.batch_size * total

    def state_bytes(self, work: Workload) -> int:
        """Hidden states, not keys and values: one for each memory, compressed memory and token of the open
        segment; with most_used, also one number for each memory.

        A segment is open while some of its tokens are still missing: these tokens read the memories before
        it, and its tokens so far. What its queries add to the usage is not kept, because its hidden states
        give it again at its end, when it is first needed.
        """
        sizes = self.stretches(work.seq_len)[-1].sizes
        memory, compressed, tokens = sizes.memory, sizes.compressed, sizes.tokens
        open_tokens = tokens % self.config.segment
        if not open_tokens:
            memory += tokens - sizes.fallen
            compressed = min(self.config.comp_len, compressed + sizes.fallen // self.config.rate)
        hidden: int = (memory + compressed + open_tokens) * work.d_model * work.element_bytes
        usage: int = memory * max(4, work.element_bytes) if self.counts else 0  # summed in float32 at least
        return work.batch_size * (hidden + usage)

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor | None:
        """The tokens that can be read in one layer, compressed or not; None for most_used, where content
        decides."""
        if self.counts:
            return None
        index = torch.arange(seq_len)
        first = torch.zeros(seq_len, dtype=torch.int64)
        for part in self.stretches(seq_len):
            first[part.segment] = part.first
        return (index <= index[:, None]) & (index >= first[:, None])
