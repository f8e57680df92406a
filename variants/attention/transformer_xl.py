"""Transformer-XL: segments that read the hidden states of earlier ones (Dai 2019, arXiv:1901.02860).

Shapes: B batch, T tokens, S tokens of a segment, M positions of memory, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from variants.base import Caps, Complexity, Context, Cost, Info, MixerOut, VariantConfig, Workload
from variants.input_schedule import Segments
from variants.knobs import knob
from variants.ops import masks
from variants.ops.relative_attention import Recurrent, slide


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(VariantConfig):
    """Knobs of segment-level recurrence."""

    segment: int = knob(256, least=1, unit="tokens")
    """Tokens that are processed, and trained on, at a time."""
    mem_len: int = knob(256, least=0, unit="tokens")
    """Positions before the segment whose hidden states each layer keeps; 0 for none."""


class TransformerXL(Recurrent):
    """Softmax attention to the segment up to the query and to the cached inputs of the layer before it.

    Every query of a segment reads all of the memory, as in the paper's training (the authors' code can
    also cut each query's reach to the same length, which is not done here): the first query of a segment
    reads exactly mem_len positions back, the last segment − 1 more. The cached states are detached
    (§3.2), so a layer adds mem_len to what a segment can know, and nothing to what it can be trained on.
    Positions are relative, by the four-term score (§3.3), instead of rotary.

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

    @classmethod
    def input_schedule(cls, config: VariantConfig) -> Segments:
        """Segments in order, the last as long as what is left."""
        assert isinstance(config, TransformerXLConfig)
        return Segments(config.segment)

    def forward(self, x: Tensor, ctx: Context, state: Tensor | None = None) -> MixerOut:
        """(B, S, C) → MixerOut; the state is the memory (B, ≤ mem_len, C).

        Raises ValueError where not causal.
        """
        memory = x[:, :0] if state is None else state
        return MixerOut(self.attend(x, memory).y, self.remember(memory, x))

    def remember(self, memory: Tensor, x: Tensor) -> Tensor:
        """The last mem_len positions of memory and segment."""
        return slide(memory, x, max(0, memory.shape[1] + x.shape[1] - self.config.mem_len))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Segment by segment, every score written out. Raises ValueError where not causal."""
        self.require_objective(causal=ctx.causal)
        memory, outputs = x[:, :0], []
        for segment in self.input_schedule(self.config).segments(x.shape[1]):
            outputs.append(self.plainly_attend(x[:, segment], memory).y)
            memory = x[:, max(0, segment.stop - self.config.mem_len) : segment.stop].detach()
        return torch.cat(outputs, dim=1)

    def cost(self, work: Workload) -> Cost:
        """The segments of a sequence, each with the memory that exists by then."""
        total = Cost()
        for segment in self.input_schedule(self.config).segments(work.seq_len):
            memory = min(segment.start, self.config.mem_len)
            total += self.segment_cost(work, segment.stop - segment.start, memory)
        return total

    def state_bytes(self, work: Workload) -> int:
        """Hidden states, not keys and values: one a position of the memory and of the open segment.

        A segment of which some tokens are still to come is open: those tokens read the memory from before
        it, and its tokens so far. At its end, the memory is the last mem_len positions.
        """
        open_tokens = work.seq_len % self.config.segment
        memory = min(work.seq_len - open_tokens, self.config.mem_len)
        return work.batch_size * (memory + open_tokens) * work.d_model * work.element_bytes

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """The query's segment up to the query, and mem_len positions before the segment."""
        length, mem_len = self.config.segment, self.config.mem_len
        return masks.matrix(lambda head, i, j: (j <= i) & (j >= i // length * length - mem_len), seq_len)
