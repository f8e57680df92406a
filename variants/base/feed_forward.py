"""Interface of feed-forward layers, which process each token separately.

Shapes: B batch, T tokens, C channels (d_model).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from variants.base.work import Cost, Workload
from variants.knobs import Knobs


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig(Knobs):
    """Base class of the `Config` of every feed-forward layer: its knobs only."""


class FFOut(NamedTuple):
    """Result of a feed-forward layer: outputs (B, T, C), and an auxiliary loss or None.

    The loss is a mean over the tokens: of a sequence in pieces, the mean of the pieces' losses counts.
    """

    y: Tensor
    aux_loss: Tensor | None = None


class ExpertLoad(NamedTuple):
    """Number of assignments of tokens to the experts of a layer, in one call."""

    assigned: Tensor
    """(E,) int: to each expert, before any is dropped."""
    dropped: Tensor | None
    """() int: those over the capacity of their expert; None if experts take all."""


@runtime_checkable
class HasExperts(Protocol):
    """A router assigns every token to some of the experts of the feed-forward layer."""

    def load(self, x: Tensor) -> ExpertLoad:
        """Count the assignments that `forward` makes of x (B, T, C)."""
        ...


class FeedForward(nn.Module, ABC):
    """One feed-forward layer: (B, T, C) → (B, T, C)."""

    Config: ClassVar[type[FeedForwardConfig]]
    paper: ClassVar[str]
    """Authors, year, short title and arXiv number."""

    def __init__(self, config: FeedForwardConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model

    @classmethod
    def unsupported(cls, config: Any, d_model: int) -> str | None:
        """The reason why no layer with these knobs and this width exists, or None."""
        return None

    @classmethod
    def widened(cls, config: Any, d_model: int, parameters: int) -> Any:
        """The knobs of a layer with about this many parameters more, which its hidden channels have.

        Raises ValueError for a layer without such a knob.
        """
        raise ValueError(f"{cls.__name__} has no knob for its hidden channels, so it cannot be widened")

    @classmethod
    def reads_others(cls, config: Any) -> str | None:
        """The way in which a token's output depends on earlier tokens of the same call, after the name of the
        layer; None: it does not. Such a layer is not decoded, and not applied in chunks."""
        return None

    def active_parameters(self) -> int:
        """Number of the parameters that compute one token; all, unless a token chooses some of them."""
        return sum(parameter.numel() for parameter in self.parameters())

    @abstractmethod
    def forward(self, x: Tensor) -> FFOut:
        """(B, T, C) → FFOut."""

    @abstractmethod
    def reference(self, x: Tensor) -> Tensor:
        """A readable implementation of the same mathematics: (B, T, C) → (B, T, C)."""

    @abstractmethod
    def cost(self, work: Workload) -> Cost:
        """Algorithmic FLOPs of the forward pass."""
