"""Interface of depth schedules: the order in which the blocks of a model are run.

Shapes: B batch, T tokens, C channels (d_model).

A *visit* is one run of a block in a forward pass. A *path* is what a schedule does with the hidden states
before, between and after the visits; that of most schedules does nothing. An activation strategy stores or
recomputes the activations of visits, not those of the path, so it works with every schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from variants.base.feed_forward import FFOut
from variants.base.mixer import MixerOut, SequenceMixer
from variants.base.work import Context, Cost, Dims, Workload
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

    def queries_keys(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, H, T, D) of a mixer with `ExposesScores`."""
        ...

    def feed(self, x: Tensor) -> FFOut:
        """The feed-forward branch, without the addition of x; it processes each token separately."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of both branches."""
        ...


class RunVisits(Protocol):
    """What a path calls: the visits of one forward pass, by their places in `DepthSchedule.visits`."""

    def __call__(self, places: Sequence[int], x: Tensor) -> Tensor:
        """Run visits one after the other with the strategy for activations: (B, T, C) → (B, T, C). In one
        forward pass, a place is run once for each of its windows of another length."""
        ...

    def read_out(self, x: Tensor) -> Tensor:
        """Hidden states (B, T, C) → logits (B, T, V), by the model's last norm and its output layer."""
        ...

    def queries_keys(self, place: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, H, T, D) of a visit with this input, of a mixer with `ExposesScores`."""
        ...


class PathOut(NamedTuple):
    """Result of a path: hidden states (B, T, C), and the auxiliary losses of the path itself."""

    x: Tensor
    aux_losses: tuple[Tensor, ...] = ()
    exits: tuple[Tensor, ...] = ()
    """In training, the hidden states (B, T, C) at the exits before the last visit: see
    `DepthSchedule.exit_weights`."""
    visits: Tensor | None = None
    """(B, T) the visits that each token needs, from the first on, in a path that decides this for each token.
    The others are made too, but do not change the token."""


class Path(nn.Module):
    """The way of the hidden states through the visits; this one has no parameters and does nothing between
    them."""

    flop_overhead_reason: str | None = None
    """Why the path dispatches more FLOPs than `cost` counts; None if it does not."""

    def forward(self, x: Tensor, places: Sequence[int], run: RunVisits, ctx: Context) -> PathOut:
        """Run the visits at these places: (B, T, C) → PathOut.

        T is the number of tokens of a window of the input schedule, or that are decoded at once. A path that
        calls `run` for each visit stores the hidden states in between under every strategy.
        """
        return PathOut(run(places, x))

    def cost(self, work: Workload) -> Cost:
        """Algorithmic FLOPs of the path for a window of `work.seq_len` tokens, without the visits and without
        the calls of `RunVisits.read_out`."""
        return Cost()

    def state_bytes(self, work: Workload) -> int:
        """Bytes that the path needs of `work.seq_len` tokens to process the next one, without the visits."""
        return 0


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

    @classmethod
    def no_form(cls, config: Any, *, causal: bool) -> str | None:
        """Why this schedule has no form for an objective, at any size, or None; stored in the record."""
        return None

    @classmethod
    def refuses(cls, config: Any, mixer: type[SequenceMixer]) -> str | None:
        """Why the path of this schedule cannot work with layers of a class, or None. It is stored in the
        record."""
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

    def path(self, dims: Dims) -> Path:
        """The path of a model with these sizes, with new parameters if it has some."""
        return Path()

    def exit_weights(self) -> Sequence[float]:
        """The weights of the losses in training at the exits before the last visit, in order; the loss of the
        output has the rest of 1. There is one for each of `PathOut.exits`, and outside of training the path
        reads out as often."""
        return ()

    def lengths(self, seq_len: int) -> Sequence[int]:
        """The number of tokens that each visit processes of a window of `seq_len` tokens, or the most that it
        processes at once. If they differ from it, the path changes the length, and `no_decoding` says why
        there is no decoding."""
        return [seq_len] * len(self.visits())

    def windows(self, seq_len: int) -> Sequence[Sequence[tuple[int, int]]]:
        """(length, number) of what each visit processes separately of a window of `seq_len` tokens."""
        return [[(length, 1)] for length in self.lengths(seq_len)]

    def outputs(self, seq_len: int) -> int:
        """The number of outputs for a sequence: those of its last tokens. If it is less than `seq_len`, a
        model is trained on these, and evaluated on as many sequences as have the outputs of all tokens."""
        return seq_len

    def longest(self, block: int, seq_len: int) -> int:
        """The largest number of tokens that a visit of a block processes of a window of `seq_len` tokens."""
        visits = zip(self.visits(), self.lengths(seq_len), strict=True)
        return max(length for visited, length in visits if visited == block)

    @classmethod
    def no_decoding(cls, config: Any) -> str | None:
        """Why a model with this schedule cannot decode, after the name of the schedule; None: it can. A path
        that decodes computes each token from its own hidden states."""
        return None

    @property
    def blocks(self) -> int:
        """How many blocks the model has: those that are visited."""
        return len({*self.visits()})
