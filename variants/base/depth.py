"""Interface of depth schedules: the order in which the blocks of a model are run.

Shapes: B batch, T tokens, C channels (d_model).

A *visit* is one run of a block in a forward pass. An activation strategy stores or recomputes the activations
of a visit, so it works with every schedule.
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
    """Result of a visit: hidden states (B, T, C), the new state of the mixer, the sum of auxiliary losses."""

    x: Tensor
    state: Any
    aux_loss: Tensor | None


class Visit(Protocol):
    """A residual block: x + attend(x), then x + feed(x), or the norm of each sum."""

    ff_chunks: int
    """Number of pieces of the sequence for which `feed` may be called separately."""

    def __call__(self, x: Tensor, state: Any, ctx: Context) -> VisitOut:
        """Run the block: (B, T, C) → VisitOut."""
        ...

    def attend(self, x: Tensor, state: Any, ctx: Context) -> MixerOut:
        """The branch of the mixer, without the addition of x."""
        ...

    def feed(self, x: Tensor) -> FFOut:
        """The feed-forward branch, without the addition of x; it processes each token separately."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of both branches."""
        ...


@dataclass(frozen=True, kw_only=True)
class DepthConfig(Knobs):
    """Base class of the `Config` of every depth schedule: its knobs only."""


class DepthSchedule(ABC):
    """Base class of depth schedules."""

    Config: ClassVar[type[DepthConfig]]
    paper: ClassVar[str]
    """Authors, year, short title and arXiv number."""

    def __init__(self, config: DepthConfig, depth: int) -> None:
        """A schedule for the knob `depth`, which most schedules take as the number of visits."""
        self.config = config
        self.depth = depth

    @classmethod
    def impossible(cls, config: Any, depth: int) -> str | None:
        """Why there is no such schedule of this depth, or None. The sentence begins with the knob:
        "groups=3: must divide depth=4". Other methods are only called for depths that are possible."""
        return None

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
    def leaves_out(self) -> bool:
        """Whether passes in training leave out visits, which `draw` draws."""
        return False

    def draw(self) -> Sequence[int]:
        """Draw the visits that one pass in training makes, from torch's generator of the CPU: their places in
        `visits`, in ascending order. A pass is one segment of the input schedule."""
        return range(len(self.visits()))

    def signals(self, d_model: int) -> Tensor | None:
        """The vectors (visits, C) that are added to the hidden states before each visit, in units of the
        initial standard deviation of an embedding; None adds none."""
        return None

    @property
    def blocks(self) -> int:
        """How many blocks the model has: those that are visited."""
        return len({*self.visits()})
