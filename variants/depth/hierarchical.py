"""Hierarchical encoding: segments are encoded separately, a recurrent layer reads one vector of each, and
returns what it has read to the tokens (RoBERT of Pappagari 2019, Hierarchical Transformers for Long Document
Classification, arXiv:1910.10781).

Shapes: B batch, T tokens, C channels, S tokens of a segment, n = ⌈T / S⌉ segments, of which the last may be
shorter.

    x    ← the first half of the visits, rounded up, on each segment
    v[j] = the mean of the hidden states of segment j
    h    = LSTM(norm(v)), in both directions          n vectors
    x    ← x[t] + W h[⌊t / S⌋], then the other visits on each segment

Attention costs T · S pairs and not T², and all that crosses a border of segments passes through one vector of
each. The recurrent layer reads the segments from both sides, so there is no causal form.

Deviations: the paper reads one direction and classifies the document from the last state alone. Here every
token has an output, because masked tokens are predicted anywhere, and a task may ask at any position. A
segment's vector is a mean; the paper takes BERT's output for its first token. Segments do not overlap; the
paper's windows do. All parts are trained together. Rotary positions begin anew with each
segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from variants.base import Context, Cost, DepthConfig, Dims, Path, PathOut, RunVisits, Workload
from variants.base.lengths import ChangesLength
from variants.knobs import knob
from variants.ops.recurrences.lstm import BidirectionalLSTM


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig(DepthConfig):
    """The length of what is encoded alone."""

    segment: int = knob(256, least=1, unit="tokens")
    """Tokens of a segment."""


class HierarchicalPath(Path):
    """See the top of the file."""

    def __init__(self, dims: Dims, segment: int, depth: int) -> None:
        super().__init__()
        self.segment, self.first = segment, (depth + 1) // 2
        self.state = (dims.d_model + 1) // 2
        self.norm = nn.LayerNorm(dims.d_model)
        self.lstm = BidirectionalLSTM(dims.d_model, self.state)
        self.out = nn.Linear(2 * self.state, dims.d_model, bias=False)  # writes to the residual stream

    def forward(self, x: Tensor, places: Sequence[int], run: RunVisits, ctx: Context) -> PathOut:
        """(B, T, C) → PathOut."""
        windows = self.encode(self.split(x), [place for place in places if place < self.first], run)
        vectors = torch.cat([window.mean(2) for window in windows], dim=1)
        read = self.out(self.lstm(self.norm(vectors))).unsqueeze(2)  # (B, n, 1, C)
        told = zip(windows, read.split([window.shape[1] for window in windows], dim=1), strict=True)
        windows = [window + each for window, each in told]
        windows = self.encode(windows, [place for place in places if place >= self.first], run)
        return PathOut(torch.cat([window.flatten(1, 2) for window in windows], dim=1))

    def split(self, x: Tensor) -> list[Tensor]:
        """(B, T, C) → the full segments (B, ⌊T / S⌋, S, C) and the shorter last one (B, 1, r, C), those of
        them that exist."""
        full = x.shape[1] // self.segment * self.segment
        segments = [x[:, :full].unflatten(1, (-1, self.segment))] if full else []
        if full < x.shape[1]:
            segments.append(x[:, None, full:])
        return segments

    def encode(self, windows: list[Tensor], places: Sequence[int], run: RunVisits) -> list[Tensor]:
        """Run visits on each segment alone."""
        if not places:
            return windows
        return [run(places, each.flatten(0, 1)).view_as(each) for each in windows]

    def cost(self, work: Workload) -> Cost:
        """The recurrent layer and its output."""
        vectors, state = work.batch_size * -(-work.seq_len // self.segment), self.state
        read, recurrence = BidirectionalLSTM.flops(vectors, work.d_model, state)
        return Cost({"projections": read + 2 * vectors * 2 * state * work.d_model, "recurrence": recurrence})


class Hierarchical(ChangesLength):
    """Blocks 0, 1, …, depth − 1, each on all segments of a sequence separately."""

    Config = HierarchicalConfig
    config: HierarchicalConfig
    paper = (
        "Pappagari et al. 2019, Hierarchical Transformers for Long Document Classification, arXiv:1910.10781"
    )

    @classmethod
    def no_form(cls, config: Any, *, causal: bool) -> str | None:
        """The recurrent layer reads later segments."""
        if causal:
            return "has no causal form: its recurrent layer reads the segments in both directions"
        return None

    def path(self, dims: Dims) -> Path:
        """A recurrent layer and its output."""
        return HierarchicalPath(dims, self.config.segment, self.depth)

    def lengths(self, seq_len: int) -> Sequence[int]:
        """Those of a segment."""
        return [min(seq_len, self.config.segment)] * self.depth

    def windows(self, seq_len: int) -> Sequence[Sequence[tuple[int, int]]]:
        """Full segments, and a shorter last one."""
        full, rest = divmod(seq_len, self.config.segment)
        windows = [(self.config.segment, full), (rest, 1)]
        return [[(length, count) for length, count in windows if length and count]] * self.depth

    @classmethod
    def no_decoding(cls, config: Any) -> str | None:
        """A decoder is causal."""
        return "has no causal form"
