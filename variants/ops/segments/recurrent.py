"""A layer that attends to a memory of its own earlier inputs: what such variants share.

Shapes: B batch, T tokens of a group of segments, S tokens of a segment, M positions of memory before it,
J = M + S keys, N segments of a run, C channels, H heads, K heads of keys, D channels of a head. Heads come
first, (H, B, S, D), because all sequences of a batch share the positions of a head. Positions have H heads,
also if query heads share keys.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Clock, Cost, Dims, Info, SequenceMixer, VariantConfig, Workload
from variants.input_schedule import Segments
from variants.knobs import knob
from variants.ops.projections import Projections, spread
from variants.ops.segments.recurrent_state import RecurrentState
from variants.ops.segments.relative_attention import BLOCK, plain_attention, relative_attention, sinusoids
from variants.ops.segments.segment_windows import SegmentRun, Span, fold, known_product, unfold, windows_of


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(VariantConfig):
    """Knobs of segment-level recurrence."""

    segment: int = knob(256, least=1, unit="tokens")
    """Tokens of a segment, which reads the memory and itself, and is trained on by itself."""
    mem_len: int = knob(256, least=0, unit="tokens")
    """Positions before the segment whose hidden states each layer keeps as they are; 0 for none."""
    segments_at_once: int | Literal["all"] = knob(1, least=1, unit="segments", younger=True)
    """Segments that go through the model together, or all of a sequence; results do not depend on it.
    With 1, the activations of one segment are in memory at a time, whatever the length of the sequence. With
    more, an accelerator has fewer and larger launches, and memory grows with the number. Use all on an
    accelerator if the sequence fits, else as many as fit. On a CPU, where launches cost little, more than 1
    saves a tenth of the time of a step."""

    @property
    def schedule(self) -> Segments:
        """How the model is fed: segments in order, the last with the remaining tokens."""
        at_once = self.segments_at_once
        return Segments(self.segment, None if at_once == "all" else at_once)

    @property
    def memory_positions(self) -> int:
        """Positions of memory that a query reads before its segment, at most."""
        return self.mem_len

    def with_memory(self, factor: int) -> Self:
        """The same knobs with a memory that is `factor` times as long."""
        return replace(self, mem_len=factor * self.mem_len)


class Attended(NamedTuple):
    """Outputs of a segment (B, S, C), and intermediate results for later use."""

    y: Tensor
    q: Tensor
    """Queries without biases (H, B, S, D)."""
    kv: Tensor
    """Keys and values of memory and segment (2, H, B, J, D)."""
    usage: Tensor | None
    """(B, J) attention that each position received from the segment, mean over heads; None if not asked."""


class AttendedGroup(NamedTuple):
    """Outputs of a group of segments (B, T, C), and intermediate results of each run for later use."""

    y: Tensor
    q: list[Tensor]
    """Queries without biases (H, B·N, S, D)."""
    kv: tuple[Tensor, ...]
    """Keys and values of memory and segment (2, H, B·N, J, D)."""


class Recurrent(SequenceMixer):
    """A layer that attends to a memory of its own earlier inputs and to its segment up to the query.

    The memory is detached: only weights have gradients through it. In each layer, it consists of the layer's
    inputs, which do not depend on outputs of the same layer. So all segments of a group are computed at once:
    segments of equal sizes become sequences of one batch.
    """

    config: RecurrentConfig
    position_scheme = "relative"
    no_shared_keys: ClassVar[str | None] = None
    flop_overhead_reason = "blocks of queries on the diagonal compute scores of keys after the query"

    def __init__(self, config: RecurrentConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        channels, inner, self.heads = dims.d_model, dims.inner_dim, dims.heads
        self.q = nn.Linear(channels, inner, bias=False)
        self.kv = nn.Linear(channels, 2 * dims.key_dim, bias=False)
        self.r = nn.Linear(channels, inner, bias=False)
        self.u = nn.Parameter(0.02 * torch.randn(dims.heads, dims.head_dim, dtype=torch.float32))
        self.v = nn.Parameter(0.02 * torch.randn(dims.heads, dims.head_dim, dtype=torch.float32))
        self.out = nn.Linear(inner, channels, bias=False)

    @classmethod
    def input_schedule(cls, config: VariantConfig) -> Segments:
        """Segments in order, one or several at once."""
        assert isinstance(config, RecurrentConfig)
        return config.schedule

    @classmethod
    def info_for(cls, config: VariantConfig) -> Info:
        """With all segments at once, memory grows with the length of the sequence."""
        assert isinstance(config, RecurrentConfig)
        if config.segments_at_once != "all":
            return cls.info
        return replace(cls.info, complexity=replace(cls.info.complexity, memory=1))

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """The memory contains only the past, and each sinusoid needs two channels."""
        if dims.d_model % 2:
            return f"d_model={dims.d_model}: sinusoidal positions need an even number of channels"
        return super().unsupported(config, dims, causal=causal)

    @property
    def memory_positions(self) -> int:
        """As the knobs say."""
        return self.config.memory_positions

    @contextmanager
    def longer_memory(self, factor: int) -> Iterator[None]:
        """Inside the context, the memory is `factor` times as long, as in the evaluation of Dai 2019 (§4).

        Parameters stay as they are: the relative positions of larger distances are projected by the same
        weights.
        """
        before = self.config
        self.config = before.with_memory(factor)
        try:
            yield
        finally:
            self.config = before

    @abstractmethod
    def runs(self, seq_len: int, memory: int, compressed: int) -> tuple[SegmentRun, ...]:
        """Return the runs of a group of `seq_len` tokens that begins with memories of these sizes."""

    def project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (H, B, S, D) of x (B, S, C), keys and values (2, H, B, J, D), positions (H, D, J + 1)."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3)
        # two products, so that backward does not compute the gradient of the memory, which is not used
        parts = [self.kv(memory), self.kv(x)] if memory.shape[1] else [self.kv(x)]
        kv = self.spread(torch.cat([self.by_head(p) for p in parts], dim=3))
        return q, kv, self.positions(kv.shape[3], x)

    def by_head(self, kv: Tensor) -> Tensor:
        """Projected keys and values (B, J, 2·K·D) → (2, K, B, J, D)."""
        heads: Tensor = kv.unflatten(-1, (2, self.dims.key_heads, -1)).permute(2, 3, 0, 1, 4)
        return heads

    def spread(self, kv: Tensor) -> Tensor:
        """Repeat shared keys and values for every query head: (2, K, B, J, D) → (2, H, B, J, D)."""
        return spread(kv, self.dims.queries_per_key, dim=1)

    def positions(self, keys: int, like: Tensor) -> Tensor:
        """Positions (H, D, J + 1) of the distances J, …, 1, 0."""
        r = F.linear(self.r.weight, sinusoids(keys, like.shape[-1], like))
        positions: Tensor = r.unflatten(0, (self.heads, -1))
        return positions

    def attend(self, x: Tensor, memory: Tensor, *, count: bool = False) -> Attended:
        """x (B, S, C) reads all of memory (B, M, C) and itself up to the query; `count` asks for `usage`."""
        q, kv, r = self.project(x, memory)
        u, v = self.u.to(q.dtype), self.v.to(q.dtype)  # under autocast, projections are narrower
        block = BLOCK.on(self.device_type)
        y, usage = relative_attention(q, kv, r, u, v, count=count, block=block)
        return Attended(self.out(y.permute(1, 2, 0, 3).flatten(2)), q, kv, usage)

    def attend_group(
        self,
        x: Tensor,
        memory: Tensor,
        runs: Sequence[SegmentRun],
        compressed: tuple[Tensor, list[Span]] | None = None,
    ) -> AttendedGroup:
        """`attend` of all segments of x (B, T, C), where segments read earlier tokens of x as memory.

        `memory` (B, M, C) comes before x. `compressed` are compressed memories (B, P, C), detached, with the
        spans of them that each run reads before its memory.
        """
        kv, carried = self.kv(x), memory.shape[1]
        streams = [(kv, [Span(run.start, run.sizes.tokens, run.sizes.tokens) for run in runs])]
        past = [self.kv(memory)] if carried else []
        if read := x.shape[1] - runs[-1].sizes.tokens:  # tokens before the last segment
            past.append(known_product(kv[:, :read], x[:, :read], self.kv.weight))
        if past:
            spans = [
                Span(carried + run.start - run.sizes.memory, run.sizes.memory, run.sizes.tokens)
                for run in runs
            ]
            streams.insert(0, (torch.cat(past, dim=1) if len(past) > 1 else past[0], spans))
        if compressed is not None and compressed[0].shape[1]:
            streams.insert(0, (self.kv(compressed[0]), compressed[1]))
        windows = tuple(map(self.spread, windows_of(runs, streams, self.dims.key_heads)))
        longest = max(run.keys for run in runs)
        r = self.positions(longest, x)
        u, v = self.u.to(kv.dtype), self.v.to(kv.dtype)  # once, not in each run
        block = BLOCK.on(self.device_type)
        queries, outputs = [], []
        for run, part, keys in zip(runs, self.q(x).split([r.length for r in runs], 1), windows, strict=True):
            queries.append(fold(part, run, self.heads))
            y, _ = relative_attention(
                queries[-1],
                keys,
                r[:, :, longest - run.keys :],
                u,
                v,
                count=False,
                block=block,
            )
            outputs.append(unfold(y, run))
        y = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        return AttendedGroup(self.out(y), queries, windows)

    def decode(
        self, x: Tensor, state: RecurrentState, *, count: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The next tokens (B, n, C) of a segment → outputs (B, n, C), and with `count` the usage (B, J)."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).permute(2, 0, 1, 3)
        kv, r = state.append(self.by_head(self.kv(x)))
        u, v = self.u.to(q.dtype), self.v.to(q.dtype)
        block = BLOCK.on(self.device_type)
        kv = self.spread(kv.to(q.dtype))
        y, usage = relative_attention(q, kv, r.to(q.dtype), u, v, count=count, block=block)
        return self.out(y.permute(1, 2, 0, 3).flatten(2)), usage

    def make_state(
        self, batch_size: int, max_len: int, keys: int, clock: Clock, dtype: torch.dtype
    ) -> RecurrentState:
        """A state for at most `keys` keys at a time."""
        like = self.r.weight.new_empty(1, self.dims.d_model)
        shape = self.dims.key_heads, batch_size, keys, self.dims.head_dim
        return RecurrentState(clock, max_len, shape, self.positions(keys, like).detach().to(dtype), dtype)

    def state_of_keys(self, work: Workload, keys: int) -> int:
        """Bytes of such a state: keys and values of each sequence, and the positions of all."""
        kept, positions = 2 * work.batch_size * keys * work.key_dim, (keys + 1) * work.inner_dim
        return work.element_bytes * (kept + positions)

    def plainly_attend(self, x: Tensor, memory: Tensor) -> Attended:
        """The readable form of `attend`."""
        q, kv, r = self.project(x, memory)
        y, weights = plain_attention(q, kv, r, self.u, self.v)
        return Attended(self.out(y.permute(1, 2, 0, 3).flatten(2)), q, kv, weights.sum(dim=2).mean(dim=0))

    def group_cost(self, work: Workload, runs: Sequence[SegmentRun], new_memories: int = 0) -> Cost:
        """Forward FLOPs of a group of segments: content, position and weighted sum are 2·H·D for each pair.

        Keys and values are computed for the memories that exist before the group, and for `new_memories` of
        its own that its segments read; those of its tokens are part of the projections. Positions are
        projected once. Memories are detached and positions constant, so both have gradients of weights only.
        """
        channels, inner = work.d_model, work.inner_dim
        tokens = sum(run.length for run in runs)
        pairs = sum(run.length * (2 * run.keys - run.sizes.tokens + 1) // 2 for run in runs)
        carried = runs[0].sizes.memory + runs[0].sizes.compressed
        return Cost(
            {
                "projections": Projections.flops(work, tokens),
                "attention": 6 * work.batch_size * inner * pairs,
                "memory": 4 * work.batch_size * (carried + new_memories) * channels * work.key_dim,
                "positions": 2 * max(run.keys for run in runs) * channels * inner,
            },
            gradients={"memory": 1, "positions": 1},
        )


def slide(memory: Tensor, x: Tensor, drop: int) -> Tensor:
    """The last of memory (B, M, C) and x (B, S, C) without the oldest `drop` positions, detached."""
    kept = memory[:, drop:], x[:, max(0, drop - memory.shape[1]) :]
    return torch.cat(kept, dim=1).detach()
