"""The result of a visit, sums of auxiliary losses, the visits of a forward pass, and visits with a signal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from variants.base import Context, FFOut, MixerOut, Visit, VisitOut


class VisitResult(NamedTuple):
    """Outputs of a visit that are kept after the forward pass: state and auxiliary loss. The hidden states
    are not kept: with them the memory of the forward pass would grow with depth under every strategy."""

    state: Any
    aux_loss: Tensor | None


def summed(*losses: Tensor | None) -> Tensor | None:
    """Return the sum of the losses that are not None; None if all are."""
    present = [loss for loss in losses if loss is not None]
    return sum(present[1:], present[0]) if present else None


def weighted(losses: Sequence[Tensor | None], pieces: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the losses of pieces (B, n, C) of a sequence, each times its share of the tokens: their sum is a
    mean, as large as the loss of the whole sequence."""
    tokens = sum(piece.shape[1] for piece in pieces)
    return [
        None if loss is None else loss * (piece.shape[1] / tokens)
        for loss, piece in zip(losses, pieces, strict=True)
    ]


Run = Callable[..., tuple[Tensor, list[VisitResult]]]
"""A strategy for activations: (visits, x, states, ctx) → hidden states (B, T, C), result of each visit."""


class Pass:
    """The visits of one forward pass: a path runs them, in one piece or in several; see `RunVisits`."""

    def __init__(
        self,
        strategy: Run,
        visits: Sequence[Visit],
        states: Sequence[Any],
        ctx: Context,
        read_out: Callable[[Tensor], Tensor],
    ) -> None:
        """`states` are those of all visits before the pass."""
        self.strategy, self.visits, self.ctx, self.read_out = strategy, visits, ctx, read_out
        self.states = [*states]
        """The state of each visit; of a visit that was not run, the one before the pass."""
        self.aux_losses: list[Tensor] = []

    def __call__(self, places: Sequence[int], x: Tensor) -> Tensor:
        """Run the visits at these places: (B, T, C) → (B, T, C)."""
        visits, states = [self.visits[n] for n in places], [self.states[n] for n in places]
        x, results = self.strategy(visits, x, states, self.ctx)
        for place, result in zip(places, results, strict=True):
            self.states[place] = result.state
            if result.aux_loss is not None:
                self.aux_losses.append(result.aux_loss)
        return x

    def queries_keys(self, place: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `RunVisits`."""
        return self.visits[place].queries_keys(x, self.ctx)


class SignalledVisit:
    """A visit of a block to whose input a vector (C,) is added; see `Visit`."""

    def __init__(self, visit: Visit, signal: Tensor) -> None:
        self.visit, self.signal, self.ff_chunks = visit, signal, visit.ff_chunks

    def __call__(self, x: Tensor, state: Any, ctx: Context) -> VisitOut:
        """See `Visit`."""
        return self.visit(x + self.signal, state, ctx)

    def attend(self, x: Tensor, state: Any, ctx: Context) -> MixerOut:
        """The branch of the mixer and the signal: x + attend(x) is that of the block for x + signal."""
        out = self.visit.attend(x + self.signal, state, ctx)
        return out._replace(y=out.y + self.signal)

    def queries_keys(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """See `Visit`."""
        return self.visit.queries_keys(x + self.signal, ctx)

    def feed(self, x: Tensor) -> FFOut:
        """See `Visit`. x has the signal."""
        return self.visit.feed(x)

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `Visit`."""
        return self.visit.parameters()
