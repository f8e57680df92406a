"""A small transformer language model with slots for its layers.

Shapes: B batch, T tokens, C channels (d_model), V vocabulary, E channels of a factorised embedding.

All other parts are the same for every variant: the blocks (`bench.model.block`) and the initial weights
(`bench.model.initial_weights`).

A factorised embedding (Lan 2019, ALBERT, arXiv:1909.11942, §3.1) is a table of E < C channels and a matrix
to C channels. The output layer is factorised too, by a matrix to E channels, so that both tables can be tied.
Deviation: the output has no other layer between its factors, as ALBERT's has. The tables have the deviation
of a model of width E, and the matrices 1 / √C: embedding and logits have the variance of those without
factors.

Over 300 lines: the model is one class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.model.activations import STRATEGIES
from bench.model.block import Block
from bench.model.initial_weights import draw, draw_factors, initial_std
from bench.model.slots import ModelSpec
from bench.model.visits import Pass, Run, SignalledVisit
from variants.base import (
    Context,
    Cost,
    Dims,
    FeedForward,
    PathOut,
    SequenceMixer,
    SlotSpec,
    Visit,
    Workload,
    scheduled_cost,
    scheduled_dims,
    scheduled_state_bytes,
    tie,
)
from variants.input_schedule import NetworkOut, WholeSequence, require_tokens


class Output(NamedTuple):
    """Logits (B, T, V), or of the last tokens (`DepthSchedule.outputs`), the state of each visit, and the
    auxiliary losses of the layers that have one."""

    logits: Tensor
    states: list[Any]
    aux_losses: list[Tensor]
    exits: tuple[Tensor, ...] = ()
    """In training, the hidden states (B, T, C) at the exits of the depth schedule."""


RunSegment = Callable[["LanguageModel", Tensor, "list[Any] | None", Context], Output]
"""(model, tokens, states, ctx) → Output of one segment of the input schedule."""


class LanguageModel(nn.Module):
    """Token ids (B, T) → logits (B, T, V); the input schedule feeds the blocks."""

    def __init__(
        self,
        spec: ModelSpec,
        dims: Dims,
        *,
        depth: int,
        dropout: float,
        vocabulary: int,
        activations: str,
        tie_embeddings: bool = False,
        embedding_size: int | None = None,
        ff_chunks: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`tie_embeddings`: the output layer has the weights of the embedding (Press 2016, arXiv:1608.05859).
        `embedding_size`: E of a factorised embedding; None for one without factors.
        `dtype` is the autocast dtype of matrix products; parameters and sums are float32."""
        super().__init__()
        self.spec, self.input_schedule = spec, spec.input
        self.depth_schedule = spec.depth.layer(spec.depth.config, depth)
        self.run_blocks = STRATEGIES[activations].run
        self.run_segment: RunSegment = run_segment
        self.makes_all_visits = False
        """Make all visits in training too, where the depth schedule would leave out some: for figures of the
        cost of a step, which are then the highest possible."""
        self.places: Sequence[int] = range(len(self.depth_schedule.visits()))
        """The visits that passes make, unless the depth schedule leaves out some in training; a model that is
        pruned after training makes fewer."""
        self.vocabulary, self.dtype = vocabulary, dtype
        rows = embedding_size or dims.d_model
        self.embedding = nn.Embedding(vocabulary, rows)
        lower_layers: Counter[SlotSpec[SequenceMixer]] = Counter()
        blocks = []
        for index in range(self.depth_schedule.blocks):
            layer = spec.at(index)
            mixer, feed_forward = layer.mixer, layer.feed_forward
            fed = scheduled_dims(mixer.layer, spec.input, dims)
            fed = replace(fed, seq_len=self.depth_schedule.longest(index, fed.seq_len))
            blocks.append(
                Block(
                    mixer.layer(mixer.config, fed, lower_layers[mixer]),
                    feed_forward.layer(feed_forward.config, dims.d_model),
                    dims.d_model,
                    ff_chunks=ff_chunks,
                    dropout=dropout,
                    options=spec.block,
                )
            )
            lower_layers[mixer] += 1
        self.blocks = nn.ModuleList(blocks)
        tie(self.layers)
        self.path = self.depth_schedule.path(dims)
        signals = self.depth_schedule.signals(dims.d_model)
        scaled = None if signals is None else signals * initial_std(dims.d_model)
        self.signals: Tensor | None
        self.register_buffer("signals", scaled, persistent=False)
        self.norm = spec.block.last_norm(dims.d_model)
        self.head = nn.Linear(rows, vocabulary, bias=False)
        factorised = embedding_size is not None
        self.embedding_map = nn.Linear(rows, dims.d_model, bias=False) if factorised else None
        self.head_map = nn.Linear(dims.d_model, rows, bias=False) if factorised else None
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        draw(self, d_model=dims.d_model, visits=len(self.visits))
        if self.embedding_map and self.head_map:
            factors = (self.embedding, self.head), (self.embedding_map, self.head_map)
            draw_factors(*factors, d_model=dims.d_model)

    @property
    def layers(self) -> list[SequenceMixer]:
        """The mixers of the blocks, from the lowest."""
        return [block.mixer for block in self.blocks]  # type: ignore[misc]

    @property
    def visits(self) -> list[Block]:
        """The block of each visit, in order."""
        return [self.blocks[index] for index in self.depth_schedule.visits()]  # type: ignore[misc]

    @contextmanager
    def running(self, run_blocks: Run, run_segment: RunSegment | None = None) -> Iterator[None]:
        """Use another strategy for activations inside the context, and another function for segments."""
        before = self.run_blocks, self.run_segment
        self.run_blocks, self.run_segment = run_blocks, run_segment or self.run_segment
        try:
            yield
        finally:
            self.run_blocks, self.run_segment = before

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) → hidden states (B, T, C) before the first block."""
        x: Tensor = self.embedding(tokens)
        return x if self.embedding_map is None else self.embedding_map(x).to(x.dtype)

    def read_out(self, x: Tensor) -> Tensor:
        """Hidden states (B, T, C) after the last block → logits (B, T, V)."""
        x = self.norm(x)
        logits: Tensor = self.head(x if self.head_map is None else self.head_map(x))
        return logits

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (B, T, C) → float32 logits (B, T, V), with the model's autocast."""
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.read_out(x).float()

    def open_branches(self) -> None:
        """Set the scales of the branches to 1, for gates: with the initial 0, blocks compute nothing."""
        for block in self.blocks:
            if block.branch_scale is not None:
                nn.init.ones_(block.branch_scale)  # type: ignore[arg-type]

    def active_parameters(self) -> int:
        """Number of the parameters that compute one token: without the experts that it does not choose."""
        layers: list[FeedForward] = [block.feed_forward for block in self.blocks]  # type: ignore[misc]
        idle = sum(sum(p.numel() for p in each.parameters()) - each.active_parameters() for each in layers)
        return sum(p.numel() for p in self.parameters()) - idle

    def run_visits(self, x: Tensor, states: list[Any] | None, ctx: Context) -> NetworkOut:
        """Run the visits on one window (N, L, C): all, unless the depth schedule leaves out some in training.
        `states` are those of the segment before. Raises ValueError for an objective without a form."""
        self.spec.require_objective(causal=ctx.causal)
        visits: list[Visit] = [*self.visits]
        if self.signals is not None:
            visits = [SignalledVisit(*each) for each in zip(visits, self.signals, strict=True)]
        done = Pass(self.run_blocks, visits, states or [None] * len(visits), ctx, self.read_out)
        # before the strategy runs, so that a recomputation makes the same visits
        draws = self.training and self.depth_schedule.leaves_out and not self.makes_all_visits
        places = self.depth_schedule.draw() if draws else self.places
        out: PathOut = self.path(x, places, done, ctx)
        return NetworkOut(out.x, done.states, (*done.aux_losses, *out.aux_losses), out.exits)

    def forward(self, tokens: Tensor, *, causal: bool, states: list[Any] | None = None) -> Output:
        """Run one segment of the input schedule, (B, T) → Output; `states` are those that the previous
        segment returned.

        In a causal model the logits at t depend only on tokens up to t. Logits are float32. Raises ValueError
        for an input without a token.
        """
        require_tokens(tokens)
        return self.run_segment(self, tokens, states, Context(causal=causal))

    def stream(self, tokens: Tensor, *, causal: bool) -> Iterator[tuple[slice, Output]]:
        """Run a whole sequence (B, T) by segments, with carried states; yields (slice of T, Output) for each.

        Raises ValueError for an input without a token.
        """
        require_tokens(tokens)
        states: list[Any] | None = None
        for segment in self.input_schedule.segments(tokens.shape[1]):
            out = self(tokens[:, segment], causal=causal, states=states)
            states = out.states
            yield segment, out

    def cost(self, work: Workload) -> Cost:
        """Algorithmic FLOPs of a forward pass on (B, T) tokens: all visits on all windows of the schedule."""
        windows = self.input_schedule.windows(work.seq_len, carried=True)
        total = self.cost_of_tables(work, sum(length * count for length, count in windows))
        total = sum((self.cost_of_visit(place, work) for place in range(len(self.visits))), total)
        return sum((self.path.cost(replace(work, seq_len=length)) * n for length, n in windows), total)

    def cost_of_visit(self, place: int, work: Workload) -> Cost:
        """The part of `cost` that the visit at a place has."""
        block, windows_of = self.visits[place], partial(self._windows, place)
        total: Cost = scheduled_cost(block.mixer, self.input_schedule, work, windows_of)
        for window, windows in self.input_schedule.windows(work.seq_len, carried=True):
            for length, count in windows_of(window):
                total += block.feed_forward.cost(replace(work, seq_len=length)) * (windows * count)
        return total

    def _windows(self, place: int, tokens: int) -> Sequence[tuple[int, int]]:
        """What the visit at a place processes of a window; see `DepthSchedule.windows`."""
        return self.depth_schedule.windows(tokens)[place]

    def _length(self, place: int, tokens: int) -> int:
        """How many tokens of a window the visit at a place processes at once, at most."""
        return self.depth_schedule.lengths(tokens)[place]

    def cost_of_tables(self, work: Workload, embedded: int) -> Cost:
        """FLOPs of the output layer, at the exits too, and of the factors of a factorised embedding for
        `embedded` tokens."""
        rows, exits = self.embedding.embedding_dim, len(self.depth_schedule.exit_weights())
        outputs = (1 + exits) * self.depth_schedule.outputs(work.seq_len)
        products = {"output": outputs * rows * self.vocabulary}
        if self.embedding_map is not None:
            products["output"] += outputs * rows * work.d_model
            products["embedding"] = embedded * rows * work.d_model
        return Cost({name: 2 * work.batch_size * each for name, each in products.items()})

    def state_bytes(self, work: Workload) -> int:
        """Bytes of state after `work.seq_len` tokens that are necessary to process the next token."""
        windows = [length for length in self.input_schedule.open_windows(work.seq_len) if length]
        own = sum(self.path.state_bytes(replace(work, seq_len=length)) for length in windows)
        return own + sum(
            scheduled_state_bytes(block.mixer, self.input_schedule, work, partial(self._length, place))
            for place, block in enumerate(self.visits)
        )

    def distinct_layers(self) -> list[tuple[str, SequenceMixer]]:
        """The lowest layer of each distinct mixer, with the mixer's name."""
        lowest: dict[SlotSpec[SequenceMixer], SequenceMixer] = {}
        for block, layer in enumerate(self.layers):
            lowest.setdefault(self.spec.at(block).mixer, layer)
        return [(slot.name, layer) for slot, layer in lowest.items()]

    @property
    def impl(self) -> str | None:
        """The implementation that runs; for a mixture, of each member: "longformer=blocks, dense=sdpa"."""
        return _joined([(name, layer.impl) for name, layer in self.distinct_layers()], "=", ", ")

    @property
    def position_scheme(self) -> str | None:
        """How positions are encoded, as the layers declare it: "rotary"; for a mixture with several schemes,
        "dense=rotary, transformer_xl=relative". With the input schedule, if positions restart in its windows.
        None if no layer declares it."""
        layers = self.distinct_layers()
        named: list[tuple[str, str | None]] = [(name, layer.position_scheme) for name, layer in layers]
        text = named[0][1] if len({scheme for _, scheme in named}) == 1 else _joined(named, "=", ", ")
        has_state = all(layer.info.caps.stateful for _, layer in layers)
        if text is None or has_state or self.input_schedule == WholeSequence():
            return text
        return f"{text}, restarting in {self.input_schedule}"

    @property
    def flop_overhead_reason(self) -> str | None:
        """Why a forward pass dispatches more FLOPs than `cost` counts; of several layers and a path each."""
        reasons = [(name, layer.flop_overhead_reason) for name, layer in self.distinct_layers()]
        if own := self.path.flop_overhead_reason:
            reasons.append((f"stack={self.spec.depth.name}", own))
        return _joined(reasons, ": ", "; ")

    @property
    def overhead_is_bounded(self) -> bool:
        """Whether the limit of this overhead applies, which it does if it applies to every layer."""
        return all(layer.overhead_is_bounded for layer in self.layers)


def run_segment(model: LanguageModel, tokens: Tensor, states: list[Any] | None, ctx: Context) -> Output:
    """The work of `LanguageModel.forward`: (B, T) → Output."""

    def network(window: Tensor, before: list[Any] | None) -> NetworkOut:
        return model.run_visits(model.embed(window), before, ctx)

    with torch.autocast(tokens.device.type, model.dtype, enabled=model.dtype != torch.float32):
        out = model.input_schedule.apply(network, tokens, states, causal=ctx.causal)
        logits = model.read_out(out.y)
    return Output(logits.float(), out.state or [], list(out.aux_losses), out.exits)


def _joined(named: list[tuple[str, str | None]], equals: str, separator: str) -> str | None:
    """Return the text of a single layer; for several layers, name and text of those that have a text."""
    if len(named) == 1:
        return named[0][1]
    texts = dict.fromkeys(f"{name}{equals}{text}" for name, text in named if text is not None)
    return separator.join(texts) or None
