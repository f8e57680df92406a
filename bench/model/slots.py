"""What a model is made of: its layers, the way through its blocks, and how it is fed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from variants.base import DepthSchedule, FeedForward, SequenceMixer, SlotSpec, Variant
from variants.depth.stack import Stack, StackConfig
from variants.feed_forward.mlp import MLP, MLPConfig
from variants.input_schedule import InputSchedule


@dataclass(frozen=True)
class LayerSpec:
    """One block's layers."""

    mixer: SlotSpec[SequenceMixer]
    feed_forward: SlotSpec[FeedForward]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model but for its sizes."""

    layers: tuple[LayerSpec, ...]
    """From the lowest block on; a deeper model begins again with the first."""
    depth: SlotSpec[DepthSchedule]
    input: InputSchedule

    @classmethod
    def of(cls, variant: type[Variant], config: Any, *, ff_mult: int = 4) -> ModelSpec:
        """The variant's mixers, each with a feed-forward layer of this multiple of the width, in a stack."""
        feed_forward = SlotSpec[FeedForward]("mlp", MLP, MLPConfig(mult=ff_mult))
        return cls(
            layers=tuple(LayerSpec(mixer, feed_forward) for mixer in variant.mixers(config)),
            depth=SlotSpec[DepthSchedule]("stack", Stack, StackConfig()),
            input=variant.input_schedule(config),
        )

    def at(self, block: int) -> LayerSpec:
        """The layers of a block; 0 is the lowest."""
        return self.layers[block % len(self.layers)]

    def kinds(self, depth: int) -> dict[LayerSpec, int]:
        """The distinct layers of a model of this depth, lowest first, and how many blocks have each."""
        found: dict[LayerSpec, int] = {}
        for block in range(depth):
            found[self.at(block)] = found.get(self.at(block), 0) + 1
        return found
