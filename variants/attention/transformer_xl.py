"""Transformer-XL: segments that read the hidden states of earlier ones (Dai 2019, arXiv:1901.02860).

Shapes: B batch, T tokens, S tokens of a segment, M positions of memory, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from variants.base import Caps, Clock, Complexity, Context, Cost, Info, MixerOut, Workload
from variants.ops.patterns import masks
from variants.ops.segments.recurrent import Recurrent, RecurrentConfig, slide
from variants.ops.segments.recurrent_state import RecurrentState
from variants.ops.segments.segment_windows import SegmentRun, SegmentSizes, runs_of


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(RecurrentConfig):
    """Knobs of segment-level recurrence."""


class TransformerXL(Recurrent):
    """Softmax attention to the segment up to the query and to the cached inputs of the layer before it.

    Every query of a segment reads the whole memory, as in the paper's training (the authors' code can also
    limit each query to the same number of keys, which this layer does not do): the first query of a segment
    reads exactly mem_len positions back, the last one segment − 1 more. The cached states are detached
    (§3.2), so each layer adds mem_len to the context of a segment, and nothing to the tokens that it is
    trained on. Positions are relative, by the four-term score (§3.3), instead of rotary.

    Deviations from the paper: u and v belong to each layer, and the memory holds the layer's normalised
    inputs, because the network is pre-norm.
    """

    Config = TransformerXLConfig
    config: TransformerXLConfig
    info = Info(
        paper="Dai et al. 2019, Transformer-XL, arXiv:1901.02860",
        family="recurrence",
        complexity=Complexity(time=1, memory=0, formula="T·(S+M)", source="Dai 2019, §3.2", survey=2),
        caps=Caps(causal=True, bidirectional=False, stateful=True),
    )

    def runs(self, seq_len: int, memory: int, compressed: int = 0) -> tuple[SegmentRun, ...]:
        """The memory grows up to mem_len."""
        parts = self.config.schedule.split(seq_len)
        reads = [min(memory + part.start, self.config.mem_len) for part in parts]
        return runs_of(
            [SegmentSizes(part.stop - part.start, read) for part, read in zip(parts, reads, strict=True)]
        )

    def forward(self, x: Tensor, ctx: Context, state: Tensor | None = None) -> MixerOut:
        """(B, T, C) → MixerOut, for one segment or a group; the state is the memory (B, ≤ mem_len, C).

        Raises ValueError where not causal.
        """
        memory = x[:, :0] if state is None else state
        if x.shape[1] <= self.config.segment:
            y = self.attend(x, memory).y
        else:
            y = self.attend_group(x, memory, self.runs(x.shape[1], memory.shape[1])).y
        return MixerOut(y, self.remember(memory, x))

    def remember(self, memory: Tensor, x: Tensor) -> Tensor:
        """The last mem_len positions of memory and segments."""
        return slide(memory, x, max(0, memory.shape[1] + x.shape[1] - self.config.mem_len))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Segment by segment, every score written out. Raises ValueError where not causal."""
        self.require_objective(causal=ctx.causal)
        memory, outputs = x[:, :0], []
        for segment in self.config.schedule.split(x.shape[1]):
            outputs.append(self.plainly_attend(x[:, segment], memory).y)
            memory = x[:, max(0, segment.stop - self.config.mem_len) : segment.stop].detach()
        return torch.cat(outputs, dim=1)

    def init_state(
        self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype
    ) -> RecurrentState:
        """The keys and values of the memory and of a segment."""
        return self.make_state(batch_size, max_len, self._most_keys(max_len), clock, dtype)

    def step(self, x: Tensor, state: RecurrentState) -> Tensor:
        """(B, n, C) → (B, n, C), segment by segment."""
        outputs = []
        while x.shape[1]:
            if state.segment == self.config.segment:
                state.forget(max(0, state.keys - self.config.mem_len))
            tokens = self.config.segment - state.segment
            outputs.append(self.decode(x[:, :tokens], state)[0])
            x = x[:, tokens:]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _most_keys(self, max_len: int) -> int:
        return min(max_len, self.config.mem_len + self.config.segment)

    def decoding_bytes(self, work: Workload) -> int:
        """Keys and values, which have twice the size of hidden states."""
        return self.state_of_keys(work, self._most_keys(work.seq_len))

    def cost(self, work: Workload) -> Cost:
        """The groups of a sequence, each with the memory that exists by then."""
        total = Cost()
        for group in self.config.schedule.segments(work.seq_len):
            memory = min(group.start, self.config.mem_len)
            total += self.group_cost(work, self.runs(group.stop - group.start, memory))
        return total

    def state_bytes(self, work: Workload) -> int:
        """Hidden states, not keys and values: one for each position of the memory and of the open segment.

        A segment is open while some of its tokens are still missing: these tokens read the memory before it,
        and its tokens so far. At its end, the memory is the last mem_len positions.
        """
        open_tokens = work.seq_len % self.config.segment
        memory = min(work.seq_len - open_tokens, self.config.mem_len)
        return work.batch_size * (memory + open_tokens) * work.d_model * work.element_bytes

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """The query's segment up to the query, and mem_len positions before the segment."""
        length, mem_len = self.config.segment, self.config.mem_len
        return masks.matrix(lambda head, i, j: (j <= i) & (j >= i // length * length - mem_len), seq_len)
