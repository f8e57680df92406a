"""Sizes of a layer, workload and context of a forward pass, and its cost.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from variants.head_size import ROTARY_BASE, unusable_heads


@dataclass(frozen=True, kw_only=True)
class Dims:
    """The sizes with which a layer is built."""

    seq_len: int
    """Maximum sequence length, in tokens."""
    d_model: int
    heads: int
    device_type: str | None = None
    """Type of the device for which piece sizes are chosen; None: the device of the parameters. A plan for a
    GPU runs on fake tensors of the CPU with the piece sizes of the GPU."""
    rotary_base: float = ROTARY_BASE
    """Base of the angles of rotary positions; layers with another position scheme do not use it."""
    head_size: int | None = None
    """Number of channels of one head; None: d_model / heads."""
    kv_heads: int | None = None
    """Number of heads of keys and values; None: `heads`. Query head h reads key head ⌊h · kv_heads / heads⌋
    (multi-query: Shazeer 2019, arXiv:1911.02150; grouped-query: Ainslie 2023, arXiv:2305.13245)."""

    @property
    def head_dim(self) -> int:
        """Number of channels of one head."""
        return self.head_size or self.d_model // self.heads

    @property
    def inner_dim(self) -> int:
        """Number of channels of all heads: d_model, unless `head_size` says otherwise."""
        return self.heads * self.head_dim

    @property
    def key_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def queries_per_key(self) -> int:
        """Number of query heads that read the same keys."""
        return self.heads // self.key_heads

    @property
    def key_dim(self) -> int:
        """Number of channels of all heads of keys, and of all heads of values."""
        return self.key_heads * self.head_dim

    @property
    def shared_parameters(self) -> int:
        """Parameters that a layer saves because query heads share keys and values."""
        return 2 * self.d_model * (self.inner_dim - self.key_dim)

    def unusable(self) -> str | None:
        """The reason why these sizes are impossible, or None. Heads must have an even number of channels."""
        return unusable_heads(self.d_model, self.heads, self.head_size, self.kv_heads)


@dataclass(frozen=True, kw_only=True)
class Workload(Dims):
    """The work of one forward pass, for which `cost` and `state_bytes` are computed.

    `seq_len` is the number of tokens of the input of the layer: of one window of the input schedule.
    """

    batch_size: int
    causal: bool
    """No output depends on a later token."""
    element_bytes: int = 4
    """Bytes of one number of the state."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Context of a forward pass."""

    causal: bool
    """No output may depend on a later token."""
    positions: Tensor | None = None
    """(T,) consecutive integers: the positions of the tokens; None: 0 … T−1. The output of a layer that
    encodes distances does not depend on the first position."""


TOKENWISE = (
    "projections",
    "index_projections",
    "memory",
    "positions",
    "feed_forward",
    "embedding",
    "output",
    "halting",
)
"""Parts of a cost that are products of single tokens, or of single positions, with weights."""


@dataclass(frozen=True)
class Cost:
    """Algorithmic FLOPs by named part: 2 per multiply-accumulate, allowed pairs only.

    `cost + cost` adds the parts with the same name; `cost * times` multiplies all parts.
    """

    parts: Mapping[str, int] = field(default_factory=dict)
    """Of the forward pass."""
    gradients: Mapping[str, int] = field(default_factory=dict)
    """Number of gradients that the backward pass computes for a product of a part, each with the FLOPs of the
    product. 2, of both factors, for a part that is not named here; 1 if a factor is constant or detached; 0
    if only a selection depends on the product."""

    @property
    def total(self) -> int:
        """FLOPs of the forward pass."""
        return sum(self.parts.values())

    @property
    def tokenwise(self) -> int:
        """FLOPs of the forward pass of the parts named in `TOKENWISE`."""
        return sum(flops for part, flops in self.parts.items() if part in TOKENWISE)

    @property
    def mixing(self) -> int:
        """FLOPs of the forward pass of all other parts: scores, weighted sums and all other exchange between
        tokens."""
        return self.total - self.tokenwise

    @property
    def step(self) -> int:
        """FLOPs of the forward and backward pass."""
        return sum(self._step(part) for part in self.parts)

    @property
    def mixing_step(self) -> int:
        """FLOPs of `mixing` in the forward and backward pass."""
        return sum(self._step(part) for part in self.parts if part not in TOKENWISE)

    def _step(self, part: str) -> int:
        return self.parts[part] * (1 + self.gradients.get(part, 2))

    def __add__(self, other: object) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        shared = self.parts.keys() & other.parts.keys()
        assert all(self.gradients.get(part, 2) == other.gradients.get(part, 2) for part in shared)
        names = [*self.parts, *(name for name in other.parts if name not in self.parts)]
        parts = {name: self.parts.get(name, 0) + other.parts.get(name, 0) for name in names}
        return Cost(parts, {**self.gradients, **other.gradients})

    def __mul__(self, times: object) -> Cost:
        if not isinstance(times, int):
            return NotImplemented
        return Cost({name: flops * times for name, flops in self.parts.items()}, self.gradients)
