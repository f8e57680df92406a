"""Decoding: what a layer keeps while sequences are read token by token.

Shapes: B batch, n tokens of a step, C channels.

A layer that can be decoded has `init_state` and `step` (see `variants.base.mixer`). All tensors of a state
have their shapes from the start, for `max_len` tokens, so that a step allocates nothing that grows. The
position is an integer of the host and is common to all layers of a model: its `Clock`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class Clock:
    """The position of the next token of sequences that are decoded, common to all layers."""

    def __init__(self) -> None:
        self.position = 0
        self._known: dict[Hashable, Any] = {}

    def advance(self, tokens: int) -> None:
        """Go on, after all layers have read these tokens."""
        self.position += tokens
        self._known.clear()

    def restart(self) -> None:
        """Go back to the first token."""
        self.position = 0
        self._known.clear()

    def once(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """Return what layers need at this position; the first layer that asks for a key computes it."""
        if key not in self._known:
            self._known[key] = compute()
        found: Value = self._known[key]
        return found

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """The positions (n,) of the tokens of this step."""
        return self.once(
            ("positions", tokens, device),
            lambda: torch.arange(self.position, self.position + tokens, device=device),
        )


class DecodingState:
    """Base class of what a layer keeps: attributes that are tensors, or lists of them,
    and those of `parts`.

    Before the first token all tensors are 0, except those that a subclass names in `constants`: they do not
    depend on the tokens.
    """

    constants: tuple[str, ...] = ()

    def __init__(self, clock: Clock, max_len: int) -> None:
        self.clock, self.max_len = clock, max_len

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The attributes that are tensors, by name; those of states within this one too."""
        for name, value in vars(self).items():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, Tensor):
                    yield name, tensor
        for part in self.parts():
            yield from part.tensors()

    def counts(self) -> list[int]:
        """The attributes that are integers: with the clock they decide which part of the tensors is read."""
        own = [value for value in vars(self).values() if isinstance(value, int)]
        return own + [count for part in self.parts() for count in part.counts()]

    def parts(self) -> Sequence[DecodingState]:
        """The states within this one."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def reset(self) -> None:
        """Forget all tokens. The clock is restarted by its owner."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in self.constants:
                value.zero_()
        for part in self.parts():
            part.reset()

    def copy_from(self, other: DecodingState) -> None:
        """Take over the tokens of a state of one sequence, in every sequence."""
        for name, value in vars(other).items():
            if isinstance(value, Tensor):
                getattr(self, name).copy_(value)
            elif isinstance(value, int):
                setattr(self, name, value)
        for part, one in zip(self.parts(), other.parts(), strict=True):
            part.copy_from(one)

    def require_room(self, tokens: int) -> None:
        """Raise ValueError if a step of this many tokens would exceed `max_len`."""
        if self.clock.position + tokens > self.max_len:
            raise ValueError(
                f"{tokens} tokens after {self.clock.position}: the state was made for at most {self.max_len}"
            )
