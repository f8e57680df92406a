"""How the blocks of a model are visited.

Shapes: B batch, T tokens, C channels (d_model).

A *visit* of a block is one run of it in a forward pass. A strategy for activations stores or computes again
what belongs to a visit, so it holds for every schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from variants.base.feed_forward import FFOut
from variants.base.mixer import MixerOut
from variants.base.work import Context
from variants.knobs import Knobs


class VisitOut(NamedTuple):
    """What a visit returns: hidden states (B, T, C), the mixer's new state, the sum of auxiliary losses."""

    x: Tensor
    state: Any
    aux_loss: Tensor | None


class Visit(Protocol):
    """A residual block: x + attend(x), then x + feed(x). Both branches norm their input themselves."""

    ff_chunks: int
    """Pieces of the sequence that `feed` may be given one at a time."""

    def __call__(self, x: Tensor, state: Any, ctx: Context) -> VisitOut:
        """The whole block."""
        ...

    def attend(self, x: Tensor, state: Any, ctx: Context) -> MixerOut:
        """The mixer's branch, without x added."""
        ...

    def feed(self, x: Tensor) -> FFOut:
        """The feed-forward branch, without x added; every token by itself."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of both branches."""
        ...


@dataclass(frozen=True, kw_only=True)
class DepthConfig(Knobs):
    """Base of every depth schedule's `Config`: its knobs and nothing else."""


class DepthSchedule(ABC):
    """Which block is visited when."""

    Config: ClassVar[type[DepthConfig]]
    paper: ClassVar[str]
    """Authors, year, title's short form and arXiv number."""

    def __init__(self, config: DepthConfig, depth: int) -> None:
        """A schedule for the knob `depth`, which most schedules take as the number of visits."""
        self.config = config
        self.depth = depth

    @classmethod
    def unsupported(cls, config: Any, *, depth: int, activations: str) -> str | None:
        """Why a model of this depth cannot run with this strategy for activations, or None."""
        return None

    @abstractmethod
    def visits(self) -> Sequence[int]:
        """The index of the block of each visit, in order.

        Indices begin at 0, the lowest block, and leave none out: a model has no block without a visit.
        """

    @property
    def blocks(self) -> int:
        """How many blocks the model has: those that are visited."""
        return len({*self.visits()})
