"""The parts of a model: its layers, its depth schedule and its input schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from bench.model.block import USUAL, BlockOptions
from variants.base import (
    DepthSchedule,
    Dims,
    FeedForward,
    Path,
    SequenceMixer,
    SlotSpec,
    UpdatesAfterStep,
    Variant,
    scheduled_dims,
)
from variants.input_schedule import InputSchedule, WholeSequence
from variants.slots import FEED_FORWARD, STACK, Slot

LONG = 2**20
"""Tokens of a sequence for which every depth schedule that changes the length does change it."""


def feed_forward(name: str = FEED_FORWARD.default, **knobs: Any) -> SlotSpec[FeedForward]:
    """Return a feed-forward layer with these knobs. Raises what `Slot.load` raises, and ValueError."""
    return _filled(FEED_FORWARD, name, knobs)


def depth_schedule(name: str = STACK.default, **knobs: Any) -> SlotSpec[DepthSchedule]:
    """Return a depth schedule with these knobs. Raises what `Slot.load` raises, and ValueError."""
    return _filled(STACK, name, knobs)


def _filled(slot: Slot[Any], name: str, knobs: Mapping[str, Any]) -> SlotSpec[Any]:
    layer = slot.load(name)
    return SlotSpec(name, layer, layer.Config.of(knobs))


@dataclass(frozen=True)
class LayerSpec:
    """The layers of one block."""

    mixer: SlotSpec[SequenceMixer]
    feed_forward: SlotSpec[FeedForward]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model without its sizes."""

    layers: tuple[LayerSpec, ...]
    """The layers of each block from the lowest one; a model with more blocks repeats them."""
    depth: SlotSpec[DepthSchedule]
    input: InputSchedule
    block: BlockOptions = USUAL

    @classmethod
    def of(
        cls,
        variant: type[Variant],
        config: Any,
        *,
        feed_forward: SlotSpec[FeedForward] | None = None,
        depth: SlotSpec[DepthSchedule] | None = None,
        block: BlockOptions = USUAL,
    ) -> ModelSpec:
        """Return the variant's mixers, each with the same feed-forward layer. None is the slot's default."""
        feed_forward = feed_forward or _filled(FEED_FORWARD, FEED_FORWARD.default, {})
        return cls(
            layers=tuple(LayerSpec(mixer, feed_forward) for mixer in variant.mixers(config)),
            depth=depth or depth_schedule(),
            input=variant.input_schedule(config),
            block=block,
        )

    def at(self, block: int) -> LayerSpec:
        """Return the layers of a block; 0 is the lowest."""
        return self.layers[block % len(self.layers)]

    def visits(self, depth: int) -> list[int]:
        """Return the block of each visit of a model of this depth."""
        return [*self.depth.layer(self.depth.config, depth).visits()]

    def has_own_path(self, depth: int, dims: Dims) -> bool:
        """Return whether the depth schedule computes something before, between or after the visits."""
        with torch.device("meta"):
            return type(self.depth.layer(self.depth.config, depth).path(dims)) is not Path

    def leaves_out(self, depth: int) -> bool:
        """Return whether a model of this depth leaves out visits in training."""
        return self.depth.layer(self.depth.config, depth).leaves_out

    def no_form(self, *, causal: bool) -> str | None:
        """Return why the depth schedule has no form for an objective, or None."""
        reason = self.depth.layer.no_form(self.depth.config, causal=causal)
        return f"stack={self.depth.name}: {reason}" if reason else None

    def require_objective(self, *, causal: bool) -> None:
        """Raise ValueError for an objective that the depth schedule has no form for."""
        if reason := self.no_form(causal=causal):
            raise ValueError(reason)

    def outputs(self, depth: int, seq_len: int) -> int:
        """Return the number of outputs for a sequence; see `DepthSchedule.outputs`."""
        return self.depth.layer(self.depth.config, depth).outputs(seq_len)

    def wrong_lengths(self, depth: int, dims: Dims, *, causal: bool) -> str | None:
        """Return why a layer cannot process what the depth schedule gives it, and how many tokens; None if
        all can."""
        schedule = self.depth.layer(self.depth.config, depth)
        stack = f"stack={self.depth.name}"
        if schedule.outputs(LONG) < LONG and self.input != WholeSequence():
            return f"{stack} has outputs for the last tokens of a sequence, and the variant divides sequences"
        for block in range(schedule.blocks):
            mixer = self.at(block).mixer
            if reason := schedule.refuses(self.depth.config, mixer.layer):
                return f"{mixer.name}: {stack} {reason}"
            fed = scheduled_dims(mixer.layer, self.input, dims)
            tokens = schedule.longest(block, fed.seq_len)
            if all(length == fed.seq_len for length in schedule.lengths(fed.seq_len)):
                continue
            if mixer.layer.info_for(mixer.config).caps.stateful:
                changes = f"{stack} changes the number of its tokens"
                return f"{mixer.name}: carries state from each segment to the next, and {changes}"
            if reason := mixer.layer.unsupported(mixer.config, replace(fed, seq_len=tokens), causal=causal):
                return f"{mixer.name} for the {tokens} tokens of {stack}: {reason}"
        return None

    def kinds(self, depth: int) -> dict[LayerSpec, int]:
        """Return the distinct layers of a model of this depth, in the order of visits, each with the number
        of its visits."""
        return dict(Counter(map(self.at, self.visits(depth))))

    def conflict(self, depth: int, activations: str) -> str | None:
        """Return the conflict between knobs because of which there is no such model, beginning with the knob;
        None if there is none."""
        if reason := self.depth.layer.impossible(self.depth.config, depth):
            return f"stack.{reason}"
        layers, blocks, stack = len(self.layers), len({*self.visits(depth)}), f"stack={self.depth.name}"
        if blocks < layers:
            makes = f"the variant has {layers} layers and {stack} makes {blocks}"
            return f"depth={depth}: {makes} block{'s' * (blocks > 1)}; allowed are {layers} blocks or more"
        if reason := self.depth.layer.unsupported(self.depth.config, depth=depth, activations=activations):
            return f"activations={activations} with {stack}: {reason}"
        reason = self.block.unsupported(activations)
        return f"activations={activations}: {reason}" if reason else None

    def representative_depth(self, depth: int, activations: str) -> int:
        """Return the depth of a small model for checks of a model of this depth: at least two visits, all
        kinds of layers, a block that is visited again if the model has one, and as many changes of the length
        as the model has, up to two."""

        def likeness(n: int) -> tuple[bool, int]:
            visits, lengths = self.visits(n), self.depth.layer(self.depth.config, n).lengths(LONG)
            return len(visits) > len({*visits}), min(2, sum(a != b for a, b in pairwise(lengths)))

        for fewer in range(min(depth, max(2, len(self.layers))), depth):
            if self.conflict(fewer, activations) is None and likeness(fewer) == likeness(depth):
                return fewer
        return depth

    def unsupported(self, depth: int, d_model: int, ff_chunks: int = 1) -> str | None:
        """Return why these layers cannot fill the slots of a model of these sizes; None if they can."""
        for layer in self.layers:
            slot = layer.feed_forward
            if reason := slot.layer.unsupported(slot.config, d_model):
                return f"{slot.name}: {reason}"
            if ff_chunks > 1 and (reason := slot.layer.reads_others(slot.config)):
                return f"{slot.name} {reason}, and ff_chunks={ff_chunks} divides it; allowed is 1"
        for block, times in Counter(self.visits(depth)).items():
            mixer = self.at(block).mixer
            # Such an update may read the last visit. If activations are computed again, that is another one.
            if times > 1 and issubclass(mixer.layer, UpdatesAfterStep):
                visits = f"stack={self.depth.name} visits a block {times} times in a step"
                return f"{mixer.name}: is updated after a step, and {visits}; allowed is once"
        if self.leaves_out(depth):
            for layer in self.layers:
                if reason := _needs_every_visit(layer.mixer):
                    name = layer.mixer.name
                    return f"{name}: {reason}, and stack={self.depth.name} leaves out visits in training"
        return None


def _needs_every_visit(mixer: SlotSpec[SequenceMixer]) -> str | None:
    """Return why a mixer must be visited in every pass, or None."""
    if mixer.layer.info_for(mixer.config).caps.stateful:
        return "carries state from each segment to the next"
    if issubclass(mixer.layer, UpdatesAfterStep):
        return "is updated after a step, from what the step computed"
    return None
