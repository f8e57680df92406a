"""A small pre-norm transformer language model with slots for its layers.

Shapes: B batch, T tokens, C channels (d_model), V vocabulary.

All other parts are the same for every variant: pre-norm blocks (Xiong 2020, arXiv:2002.04745) and GPT-2's
initialisation (normal with standard deviation 0.02, divided by √(2·visits) for projections that write to the
residual stream; a stack visits each of its blocks once). GPT-2 has this deviation at a width of 768; at other
widths it is multiplied by √(768 / C), so that projections have the same variance at every width. With 0.02 at
a width of 64, attention scores are nearly equal at first and models learn more slowly. Frozen parameters keep
the values that their layer gives them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from bench.model.activations import STRATEGIES, Run
from bench.model.slots import ModelSpec
from bench.model.visits import summed, weighted
from variants.base import (
    Context,
    Cost,
    Dims,
    FeedForward,
    FFOut,
    MixerOut,
    SequenceMixer,
    SlotSpec,
    VisitOut,
    Workload,
    scheduled_cost,
    scheduled_dims,
    scheduled_state_bytes,
    tie,
)
from variants.input_schedule import NetworkOut, WholeSequence, require_tokens


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(
        self,
        mixer: SequenceMixer,
        feed_forward: FeedForward,
        d_model: int,
        *,
        ff_chunks: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.mixer_norm = nn.LayerNorm(d_model)
        self.mixer = mixer
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)
        self.ff_chunks = ff_chunks

    def attend(self, x: Tensor, state: Any, ctx: Context) -> MixerOut:
        """The mixer's branch: (B, T, C) → MixerOut."""
        out = self.mixer(self.mixer_norm(x), ctx, state)
        return out._replace(y=self.dropout(out.y))

    def feed(self, x: Tensor) -> FFOut:
        """The feed-forward branch: (B, T, C) → FFOut; tokens are independent."""
        fed: FFOut = self.feed_forward(self.feed_forward_norm(x))
        return fed._replace(y=self.dropout(fed.y))

    def _feed_in_chunks(self, x: Tensor) -> FFOut:
        """`feed` in chunks of the sequence. The backward pass recomputes each chunk; otherwise the hidden
        layers of all chunks would be stored."""
        chunks = x.chunk(self.ff_chunks, dim=1)
        fed = [recompute(self.feed, chunk, use_reentrant=False) for chunk in chunks]
        losses = weighted([out.aux_loss for out in fed], chunks)
        return FFOut(torch.cat([out.y for out in fed], dim=1), summed(*losses))

    def forward(self, x: Tensor, state: Any, ctx: Context) -> VisitOut:
        """(B, T, C) → VisitOut."""
        out = self.attend(x, state, ctx)
        x = x + out.y
        fed = self.feed(x) if self.ff_chunks == 1 else self._feed_in_chunks(x)
        return VisitOut(x + fed.y, out.state, summed(out.aux_loss, fed.aux_loss))


class Output(NamedTuple):
    """Logits (B, T, V), the state of each visit, and the auxiliary losses of the layers that have one."""

    logits: Tensor
    states: list[Any]
    aux_losses: list[Tensor]


GPT2_STD, GPT2_WIDTH = 0.02, 768
"""Standard deviation of GPT-2's initial weights, and the width of its smallest model."""


def initial_std(d_model: int) -> float:
    """Return the standard deviation of the initial weights of a model of this width."""
    return GPT2_STD * math.sqrt(GPT2_WIDTH / d_model)


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
        ff_chunks: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`tie_embeddings`: the output layer has the weights of the embedding (Press 2016, arXiv:1608.05859).
        `dtype` is the autocast dtype of matrix products; parameters and sums are float32."""
        super().__init__()
        self.spec, self.input_schedule = spec, spec.input
        self.depth_schedule = spec.depth.layer(spec.depth.config, depth)
        self.run_blocks = STRATEGIES[activations].run
        self.run_segment: RunSegment = run_segment
        self.vocabulary, self.dtype = vocabulary, dtype
        self.embedding = nn.Embedding(vocabulary, dims.d_model)
        lower_layers: Counter[SlotSpec[SequenceMixer]] = Counter()
        blocks = []
        for layer in map(spec.at, range(self.depth_schedule.blocks)):
            mixer, feed_forward = layer.mixer, layer.feed_forward
            fed = scheduled_dims(mixer.layer, spec.input, dims)
            blocks.append(
                Block(
                    mixer.layer(mixer.config, fed, lower_layers[mixer]),
                    feed_forward.layer(feed_forward.config, dims.d_model),
                    dims.d_model,
                    ff_chunks=ff_chunks,
                    dropout=dropout,
                )
            )
            lower_layers[mixer] += 1
        self.blocks = nn.ModuleList(blocks)
        tie(self.layers)
        self.norm = nn.LayerNorm(dims.d_model)
        self.head = nn.Linear(dims.d_model, vocabulary, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        std = initial_std(dims.d_model)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and module.weight.requires_grad:
                nn.init.normal_(module.weight, std=std)
        for name, parameter in self.named_parameters():
            if name.endswith("out.weight") and parameter.requires_grad:  # writes to the residual stream
                nn.init.normal_(parameter, std=std / (2 * len(self.visits)) ** 0.5)

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

    def active_parameters(self) -> int:
        """Number of the parameters that compute one token: all, without the experts that it does not choose
        and the like."""
        layers: list[FeedForward] = [block.feed_forward for block in self.blocks]  # type: ignore[misc]
        idle = sum(sum(p.numel() for p in each.parameters()) - each.active_parameters() for each in layers)
        return sum(p.numel() for p in self.parameters()) - idle

    def run_visits(self, x: Tensor, states: list[Any] | None, ctx: Context) -> NetworkOut:
        """Run all visits on one window (N, L, C); `states` are those that the previous segment returned."""
        visits = self.visits
        x, results = self.run_blocks(visits, x, states or [None] * len(visits), ctx)
        losses = tuple(out.aux_loss for out in results if out.aux_loss is not None)
        return NetworkOut(x, [out.state for out in results], losses)

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
        total = Cost({"output": 2 * work.batch_size * work.seq_len * work.d_model * self.vocabulary})
        windows = self.input_schedule.windows(work.seq_len, carried=True)
        for block in self.visits:
            total += scheduled_cost(block.mixer, self.input_schedule, work)
            for length, count in windows:
                total += block.feed_forward.cost(replace(work, seq_len=length)) * count
        return total

    def state_bytes(self, work: Workload) -> int:
        """Bytes of state after `work.seq_len` tokens that are necessary to process the next token."""
        return sum(scheduled_state_bytes(block.mixer, self.input_schedule, work) for block in self.visits)

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
        schemes = {scheme for _, scheme in named}
        text = named[0][1] if len(schemes) == 1 else _joined(named, "=", ", ")
        has_state = all(layer.info.caps.stateful for _, layer in layers)
        if text is None or has_state or self.input_schedule == WholeSequence():
            return text
        return f"{text}, restarting in {self.input_schedule}"

    @property
    def flop_overhead_reason(self) -> str | None:
        """Why a forward pass dispatches more FLOPs than `cost` counts; for a mixture the reason of each
        member."""
        layers = self.distinct_layers()
        return _joined([(name, layer.flop_overhead_reason) for name, layer in layers], ": ", "; ")

    @property
    def overhead_is_bounded(self) -> bool:
        """Whether the limit of this overhead applies, which it does if it applies to every layer."""
        return all(layer.overhead_is_bounded for layer in self.layers)


def run_segment(model: LanguageModel, tokens: Tensor, states: list[Any] | None, ctx: Context) -> Output:
    """The work of `LanguageModel.forward`: (B, T) → Output."""

    def network(window: Tensor, before: list[Any] | None) -> NetworkOut:
        return model.run_visits(model.embedding(window), before, ctx)

    with torch.autocast(tokens.device.type, model.dtype, enabled=model.dtype != torch.float32):
        x, after, losses = model.input_schedule.apply(network, tokens, states, causal=ctx.causal)
        x = model.norm(x)
        logits = model.head(x)
    return Output(logits.float(), after or [], list(losses))


def _joined(named: list[tuple[str, str | None]], equals: str, separator: str) -> str | None:
    """Return the text of a single layer; for several layers, name and text of those that have a text."""
    if len(named) == 1:
        return named[0][1]
    texts = dict.fromkeys(f"{name}{equals}{text}" for name, text in named if text is not None)
    return separator.join(texts) or None
