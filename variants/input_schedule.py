"""How a model feeds a sequence to its layers: whole, in segments or in chunks.

Shapes: B batch, T tokens, N independent windows, L tokens of one.

An input schedule belongs to the model, not to a layer: it is applied once, around all layers. State goes in
and comes out: what segments carry is returned, and a chunk never sees the state of another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


def require_tokens(x: Tensor) -> None:
    """Raise ValueError, in one line, for an input (B, T, …) that holds no sequence or no token."""
    if x.shape[0] < 1 or x.shape[1] < 1:
        raise ValueError(
            f"input of shape {tuple(x.shape)}: allowed is 1 or more sequences of 1 or more tokens"
        )


class Fed(NamedTuple):
    """What a network returns for a window, and an input schedule for a segment."""

    y: Tensor
    """(N, L, …)."""
    state: Any = None
    """What the next segment begins with."""
    aux_losses: tuple[Tensor, ...] = ()


Network = Callable[[Tensor, Any], Fed]
"""A map (window (N, L, …), state) → Fed that keeps N and L."""


class InputSchedule(ABC):
    """How the model feeds a sequence to the network: applied once, outside the layers."""

    @abstractmethod
    def windows(self, seq_len: int, *, carried: bool) -> list[tuple[int, int]]:
        """(length, number) of the windows of a sequence that a layer is fed one by one.

        `carried`: the layer carries state between segments, which make one window of it.
        """

    def segments(self, seq_len: int) -> list[slice]:
        """The parts of a sequence that are fed one after the other, state carried from each to the next."""
        return [slice(0, seq_len)]

    @abstractmethod
    def apply(self, network: Network, x: Tensor, state: Any = None, *, causal: bool) -> Fed:
        """Run the network over one segment x (B, T, …), with the state that the segment before returned."""

    def stream(self, network: Network, x: Tensor, *, causal: bool) -> Tensor:
        """Run the network over a whole sequence x (B, T, …), state carried along.

        Raises ValueError for an input without a token.
        """
        require_tokens(x)
        outputs, state = [], None
        for segment in self.segments(x.shape[1]):
            fed = self.apply(network, x[:, segment], state, causal=causal)
            outputs.append(fed.y)
            state = fed.state
        return torch.cat(outputs, dim=1)

    def mask(self, mask_of: Callable[[int], Tensor | None], seq_len: int, *, carried: bool) -> Tensor | None:
        """(T, T) bool: what tokens of one segment sequence read in one layer, whose own mask of n tokens is
        `mask_of(n)`; None where content decides.

        Of chunks, T is the length of one.
        """
        return mask_of(seq_len)

    def open_windows(self, seq_len: int) -> list[int]:
        """The tokens so far of each window that token T will be part of, or that has to be kept for it."""
        return [seq_len]

    def stateless_unsupported(self) -> str | None:
        """Return why a layer that carries no state cannot be fed in this way, or None."""
        return None


@dataclass(frozen=True)
class Whole(InputSchedule):
    """The network sees the whole sequence at once."""

    def windows(self, seq_len: int, *, carried: bool) -> list[tuple[int, int]]:
        """One window."""
        return [(seq_len, 1)]

    def apply(self, network: Network, x: Tensor, state: Any = None, *, causal: bool) -> Fed:
        """One call."""
        return network(x, state)


@dataclass(frozen=True)
class Segments(Whole):
    """The network sees segments of `length` tokens in order; what it remembers is carried between them.

    Each segment is trained on by itself: state is detached, so backward never leaves a segment. A layer that
    carries no state reads its segment alone, and its positions restart there.

    `at_once` segments, or all segments of a sequence if it is None, are given to the network together, as one
    window. A layer that carries state divides this window into segments itself, with the result that it has
    segment by segment.
    """

    length: int
    at_once: int | None = 1

    def __str__(self) -> str:
        together = "" if self.at_once == 1 else f", {self.at_once or 'all'} at once"
        return f"segments of {self.length} tokens{together}"

    def segments(self, seq_len: int) -> list[slice]:
        """Return groups of `at_once` segments, then the rest."""
        return _slices(seq_len, seq_len if self.at_once is None else self.at_once * self.length)

    def split(self, seq_len: int) -> list[slice]:
        """Return the single segments of a sequence or a group: full ones, then the rest."""
        return _slices(seq_len, self.length)

    def windows(self, seq_len: int, *, carried: bool) -> list[tuple[int, int]]:
        """The whole sequence of a layer that carries state; else the full segments and the last."""
        if carried:
            return [(seq_len, 1)]
        full, rest = divmod(seq_len, self.length)
        return [(length, count) for length, count in ((self.length, full), (rest, 1)) if length and count]

    def mask(self, mask_of: Callable[[int], Tensor | None], seq_len: int, *, carried: bool) -> Tensor | None:
        """The layer's own where it carries state; else that of each segment by itself."""
        if carried:
            return mask_of(seq_len)
        masks = [mask_of(segment.stop - segment.start) for segment in self.split(seq_len)]
        known = [mask for mask in masks if mask is not None]
        return torch.block_diag(*known).bool() if len(known) == len(masks) else None

    def open_windows(self, seq_len: int) -> list[int]:
        """The segment that has begun and not ended."""
        return [seq_len % self.length]

    def stateless_unsupported(self) -> str | None:
        """Such a layer is called once for each window, which must be one segment."""
        if self.at_once == 1:
            return None
        return "reads one segment alone, because it carries no state; allowed is one segment at once"


def _slices(seq_len: int, length: int) -> list[slice]:
    return [slice(i, min(i + length, seq_len)) for i in range(0, seq_len, length)]


@dataclass(frozen=True)
class Chunks(InputSchedule):
    """The whole network runs on independent windows of `length` tokens that start every `stride` tokens.

    Each token's output is taken from exactly one window. Where windows overlap, a causal model keeps
    the end of each window, where the most history is, and a bidirectional one the middle; the first
    window also keeps its beginning and the last its end. No window is padded: what is left over at
    the end of a sequence runs as one shorter window.
    """

    length: int
    stride: int

    def __str__(self) -> str:
        return f"chunks of {self.length} tokens every {self.stride}"

    def _full(self, seq_len: int) -> int:
        return 0 if seq_len < self.length else (seq_len - self.length) // self.stride + 1

    def _rest(self, seq_len: int) -> int:
        """Length of the shorter last window; 0 where full windows reach the end."""
        full = self._full(seq_len)
        covered = (full - 1) * self.stride + self.length if full else 0
        return seq_len - full * self.stride if covered < seq_len else 0

    def windows(self, seq_len: int, *, carried: bool) -> list[tuple[int, int]]:
        """The full windows and the shorter last one, where there are any."""
        windows = [(self.length, self._full(seq_len)), (self._rest(seq_len), 1)]
        return [(length, count) for length, count in windows if length and count]

    def kept(self, *, causal: bool) -> tuple[int, int]:
        """The part [lo, hi) of an inner window whose outputs are kept; hi − lo is the stride."""
        hi = self.length if causal else (self.length + self.stride) // 2
        return hi - self.stride, hi

    def apply(self, network: Network, x: Tensor, state: Any = None, *, causal: bool) -> Fed:
        """Full windows as one batch, then the rest, stitched back to (B, T, …). Every window begins without
        state and leaves none."""
        batch, seq_len = x.shape[:2]
        full, rest = self._full(seq_len), self._rest(seq_len)
        lo, hi = self.kept(causal=causal)
        pieces = []
        losses: tuple[Tensor, ...] = ()
        if full:
            end = (full - 1) * self.stride + self.length
            windows = x[:, :end].unfold(1, self.length, self.stride).movedim(-1, 2)  # (B, n, L, …)
            y, _, aux_losses = network(windows.flatten(0, 1), None)
            losses += aux_losses
            y = y.unflatten(0, (batch, full))
            pieces += [y[:, 0, :lo], y[:, :, lo:hi].flatten(1, 2)]
            if not rest:
                pieces.append(y[:, -1, hi:])
        if rest:
            y, _, aux_losses = network(x[:, full * self.stride :], None)
            losses += aux_losses
            pieces.append(y[:, lo:] if full else y)
        pieces = [piece for piece in pieces if piece.shape[1]]
        return Fed(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), None, losses)

    def open_windows(self, seq_len: int) -> list[int]:
        """The chunks that have begun and not ended: each keeps its own, because positions restart in a chunk,
        and hidden states differ from chunk to chunk."""
        first = -(-max(0, seq_len - self.length + 1) // self.stride) * self.stride
        return [seq_len - start for start in range(first, seq_len, self.stride)]
