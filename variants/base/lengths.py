"""Depth schedules that change the number of tokens between their visits.

A block whose visits process fewer tokens is built for that number, and its rotary positions are the indices
of what it processes: 0, 1, … of pooled vectors or latents.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from variants.base.depth import DepthSchedule


class ChangesLength(DepthSchedule):
    """Blocks 0, 1, …, depth − 1, each once, on numbers of tokens that `lengths` says."""

    @classmethod
    def unsupported(cls, config: Any, *, depth: int, activations: str) -> str | None:
        """A reversible network has two streams from its first to its last visit."""
        if activations == "reversible":
            return (
                "its two streams would be joined wherever the depth schedule changes the length; "
                "allowed are the other strategies"
            )
        return None

    def visits(self) -> Sequence[int]:
        """Each once."""
        return range(self.depth)

    @abstractmethod
    def lengths(self, seq_len: int) -> Sequence[int]:
        """See `DepthSchedule`."""

    @classmethod
    @abstractmethod
    def no_decoding(cls, config: Any) -> str | None:
        """See `DepthSchedule`."""
