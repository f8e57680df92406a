"""What a layer is built for, fed and told, and what it costs.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from variants.head_size import unusable_heads


@dataclass(frozen=True, kw_only=True)
class Dims:
    """The sizes that a layer is built for."""

    seq_len: int
    """Tokens of the longest sequence that it will be fed."""
    d_model: int
    heads: int
    device_type: str | None = None
    """Type of the device that the layer's work is cut for; None: that of its parameters. A plan for a GPU is
    made on fake tensors of the CPU, and is cut for the GPU."""

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.d_model // self.heads

    def unusable(self) -> str | None:
        """Why no layer can have these sizes, or None: heads that do not divide the channels, or odd ones."""
        return unusable_heads(self.d_model, self.heads)


@dataclass(frozen=True, kw_only=True)
class Workload(Dims):
    """The work of one forward pass, of which cost and state are asked.

    `seq_len` is the number of tokens that the layer is fed, after the input schedule has cut the sequence.
    """

    batch_size: int
    causal: bool
    """No output reads a later token."""
    element_bytes: int = 4
    """Size of one number of the state."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a forward pass is told about its tokens."""

    causal: bool
    """No output may read a later token."""
    positions: Tensor | None = None
    """(T,) integers, the positions of the tokens, which are consecutive; None: 0 … T−1. A layer that encodes
    distances between tokens does not depend on where they begin."""


TOKENWISE = ("projections", "feed_forward", "output")
"""Parts of a cost that every implementation computes alike: products of single tokens with weights."""


@dataclass(frozen=True)
class Cost:
    """Algorithmic forward FLOPs by named part: 2 per multiply-accumulate, allowed pairs only.

    Costs add up part by part, and are multiplied by a number of times.
    """

    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())

    @property
    def tokenwise(self) -> int:
        """The sum of the parts named in `TOKENWISE`."""
        return sum(flops for part, flops in self.parts.items() if part in TOKENWISE)

    @property
    def mixing(self) -> int:
        """The sum of all other parts: scores, weighted sums and whatever else exchanges information between
        tokens."""
        return self.total - self.tokenwise

    def __add__(self, other: object) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        names = [*self.parts, *(name for name in other.parts if name not in self.parts)]
        return Cost({name: self.parts.get(name, 0) + other.parts.get(name, 0) for name in names})

    def __mul__(self, times: object) -> Cost:
        if not isinstance(times, int):
            return NotImplemented
        return Cost({name: flops * times for name, flops in self.parts.items()})
