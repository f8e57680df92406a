"""Input schedules: a model processes a whole sequence at once, in segments, or in chunks.

Shapes: B batch, T tokens, N independent windows, L tokens of a window.

An input schedule belongs to the model, not to a layer: it is applied once, around all layers. State is an
argument and a return value. Segments pass their state to the next segment; chunks have no state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


def require_tokens(x: Tensor) -> None:
    """Raise ValueError for an input (B, T, …) without sequences or without tokens."""
    if x.shape[0] < 1 or x.shape[1] < 1:
        raise ValueError(
            f"input of shape {tuple(x.shape)}: allowed is 1 or more sequences of 1 or more tokens"
        )


class NetworkOut(NamedTuple):
    """Result of a network for a window, and of an input schedule for a segment."""

    y: Tensor
    """Outputs (N, L, …)."""
    state: Any = None
    """The state for the next segment."""
    aux_losses: tuple[Tensor, ...] = ()
    exits: tuple[Tensor, ...] = ()
    """Further outputs (N, L, …), for the same tokens as y."""


Network = Callable[[Tensor, Any], NetworkOut]
"""A map (window (N, L, …), state) → Fed that keeps N and L."""


class InputSchedule(ABC):
    """Base class of input schedules: the division of a sequence into inputs of the network."""

    @abstractmethod
    def windows(self, seq_len: int, *, carried: bool) -> list[tuple[int, int]]:
        """(length, number) of the windows of a sequence that a layer processes separately.

        `carried`: the layer carries state between segments, so all segments together are one window.
        """

    def segments(self, seq_len: int) -> list[slice]:
        """The parts of a sequence that are processed in order; each passes its state to the next."""
        return [slice(0, seq_len)]

    @abstractmethod
    def apply(self, network: Network, x: Tensor, state: Any = None, *, causal: bool) -> NetworkOut:
        """Run the network on one segment x (B, T, …), with the state that the previous segment returned."""

    def stream(self, network: Network, x: Tensor, *, causal: bool) -> Tensor:
        """Run the network on a whole sequence x (B, T, …), segment by segment, with state.

        Raises ValueError for an input without tokens.
        """
        require_tokens(x)
        outputs, state = [], None
        for segment in self.segments(x.shape[1]):
            out = self.apply(network, x[:, segment], state, causal=causal)
            outputs.append(out.y)
            state = out.state
        return torch.cat(outputs, dim=1)

    def mask(self, mask_of: Callable[[int], Tensor | None], seq_len: int, *, carried: bool) -> Tensor | None:
        """(T, T) bool: the keys (columns) that a query (row) reads in one layer, where T = seq_len is the
        length of a sequence or, for chunks, of a chunk. None if they depend on content.

        `mask_of(n)` is the mask of the layer for n tokens.
        """
        return mask_of(seq_len)

    def open_windows(self, seq_len: int) -> list[int]:
        """The numbers of tokens so far of all windows that the next token, T, belongs to or needs."""
        return [seq_len]

    @property
    def separate(self) -> tuple[int, int] | None:
        """(length, stride) of windows that the network processes separately, also in decoding; or None."""
        return None

    @property
    def restart(self) -> int | None:
        """Number of tokens after which a layer without state begins anew; None: never."""
        return None

    def stateless_unsupported(self) -> str | None:
        """Return why a layer that carries no state cannot be fed in this way, or None."""
        return None


@dataclass(frozen=True)
class WholeSequence(InputSchedule):
    """The network processes the whole sequence at once."""

    def windows(self, seq_len: int, *, carried: bool) -> list[tuple[int, int]]:
        """One window."""
        return [(seq_len, 1)]

    def apply(self, network: Network, x: Tensor, state: Any = None, *, causal: bool) -> NetworkOut:
        """One call."""
        return network(x, state)


@dataclass(frozen=True)
class Segments(WholeSequence):
    """The network processes segments of `length` tokens in order, and passes state from one to the next.

    State is detached, so gradients do not cross the border of a segment. A layer without state reads only the
    current segment, and its positions restart in each segment.

    `at_once` segments, or all segments of a sequence if it is None, are given to the network together, as one
    window. A layer with state divides this window into segments itself, with the same result as segment by
    segment.
    """

    length: int
    at_once: int | None = 1

    def __str__(self) -> str:
        together = "" if self.at_once == 1 else f", {self.at_once or 'all'} at once"
        return f"segments of {self.length} tokens{together}"

    def segments(self, seq_len: int) -> list[slice]:
        """Groups of `at_once` full segments, then a shorter last one."""
        return _slices(seq_len, seq_len if self.at_once is None else self.at_once * self.length)

    def split(self, seq_len: int) -> list[slice]:
        """The single segments of a sequence or a group: full ones, then a shorter last one."""
        return _slices(seq_len, self.length)

    def windows(self, seq_len: int, *, carried: bool) -> list[tuple[int, int]]:
        """The whole sequence for a layer with state; else the full segments and a shorter last one."""
        if carried:
            return [(seq_len, 1)]
        full, last = divmod(seq_len, self.length)
        return [(length, count) for length, count in ((self.length, full), (last, 1)) if length and count]

    def mask(self, mask_of: Callable[[int], Tensor | None], seq_len: int, *, carried: bool) -> Tensor | None:
        """The mask of the whole sequence for a layer with state; else one block for each segment."""
        if carried:
            return mask_of(seq_len)
        masks = [mask_of(segment.stop - segment.start) for segment in self.split(seq_len)]
        known = [mask for mask in masks if mask is not None]
        return torch.block_diag(*known).bool() if len(known) == len(masks) else None

    @property
    def restart(self) -> int:
        """The length of a segment."""
        return self.length

    def open_windows(self, seq_len: int) -> list[int]:
        """The current segment."""
        return [seq_len % self.length]

    def stateless_unsupported(self) -> str | None:
        """Such a layer is called once for each window, which must be one segment."""
        if self.at_once == 1:
            return None
        return "reads one segment alone, because it has no state; allowed is one segment at once"


def _slices(seq_len: int, length: int) -> list[slice]:
    return [slice(i, min(i + length, seq_len)) for i in range(0, seq_len, length)]


@dataclass(frozen=True)
class Chunks(InputSchedule):
    """The network runs on independent windows of `length` tokens, of which one starts every `stride` tokens.

    The output of each token is taken from exactly one window. If windows overlap, a causal model uses the
    end of each window, which has the most earlier tokens, and a bidirectional model uses the middle. The
    first window also gives its beginning, and the last window its end. Windows are not padded: tokens that
    remain at the end of a sequence form one shorter window.
    """

    length: int
    stride: int

    def __str__(self) -> str:
        return f"chunks of {self.length} tokens every {self.stride}"

    def _full(self, seq_len: int) -> int:
        return 0 if seq_len < self.length else (seq_len - self.length) // self.stride + 1

    def _last_length(self, seq_len: int) -> int:
        """Length of the shorter last window; 0 if full windows cover the sequence."""
        full = self._full(seq_len)
        covered = (full - 1) * self.stride + self.length if full else 0
        return seq_len - full * self.stride if covered < seq_len else 0

    def windows(self, seq_len: int, *, carried: bool) -> list[tuple[int, int]]:
        """The full windows and the shorter last window, if they exist."""
        windows = [(self.length, self._full(seq_len)), (self._last_length(seq_len), 1)]
        return [(length, count) for length, count in windows if length and count]

    def used_range(self, *, causal: bool) -> tuple[int, int]:
        """The range [lo, hi) of a window, neither the first nor the last, whose outputs are used.

        hi − lo is the stride.
        """
        hi = self.length if causal else (self.length + self.stride) // 2
        return hi - self.stride, hi

    def apply(self, network: Network, x: Tensor, state: Any = None, *, causal: bool) -> NetworkOut:
        """Run all full windows as one batch, then the shorter last window; join the outputs to (B, T, …).

        Windows have no state.
        """
        batch, seq_len = x.shape[:2]
        full, last = self._full(seq_len), self._last_length(seq_len)
        lo, hi = self.used_range(causal=causal)
        outputs = []
        if full:
            end = (full - 1) * self.stride + self.length
            windows = x[:, :end].unfold(1, self.length, self.stride).movedim(-1, 2)  # (B, n, L, …)
            outputs.append(network(windows.flatten(0, 1), None))
        if last:
            outputs.append(network(x[:, full * self.stride :], None))

        def joined(*parts: Tensor) -> Tensor:
            """The outputs of the full windows and of the last one, whichever exist."""
            pieces = []
            if full:
                y = parts[0].unflatten(0, (batch, full))
                pieces += [y[:, 0, :lo], y[:, :, lo:hi].flatten(1, 2)]
                if not last:
                    pieces.append(y[:, -1, hi:])
            if last:
                pieces.append(parts[-1][:, lo:] if full else parts[-1])
            pieces = [piece for piece in pieces if piece.shape[1]]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

        return NetworkOut(
            joined(*(out.y for out in outputs)),
            None,
            tuple(loss for out in outputs for loss in out.aux_losses),
            tuple(joined(*parts) for parts in zip(*(out.exits for out in outputs), strict=True)),
        )

    @property
    def separate(self) -> tuple[int, int]:
        """The chunks."""
        return self.length, self.stride

    def open_windows(self, seq_len: int) -> list[int]:
        """All current chunks. Each has its own state, because positions restart in a chunk, and hidden states
        differ between chunks."""
        first = -(-max(0, seq_len - self.length + 1) // self.stride) * self.stride
        return [seq_len - start for start in range(first, seq_len, self.stride)]
