"""The feed-forward layers: every token by itself.

Shapes: B batch, T tokens, C channels (d_model).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from variants.base.work import Cost, Workload
from variants.knobs import Knobs


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig(Knobs):
    """Base of every feed-forward layer's `Config`: its knobs and nothing else."""


class FFOut(NamedTuple):
    """What a feed-forward layer returns: outputs (B, T, C), and an auxiliary loss or None."""

    y: Tensor
    aux_loss: Tensor | None = None


class FeedForward(nn.Module, ABC):
    """One feed-forward layer: (B, T, C) → (B, T, C)."""

    Config: ClassVar[type[FeedForwardConfig]]
    paper: ClassVar[str]
    """Authors, year, title's short form and arXiv number."""

    def __init__(self, config: FeedForwardConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model

    @classmethod
    def unsupported(cls, config: Any, d_model: int) -> str | None:
        """Why no layer can have these knobs at this width, or None."""
        return None

    @abstractmethod
    def forward(self, x: Tensor) -> FFOut:
        """(B, T, C) → FFOut."""

    @abstractmethod
    def reference(self, x: Tensor) -> Tensor:
        """The same mathematics for reading: (B, T, C) → (B, T, C)."""

    @abstractmethod
    def cost(self, work: Workload) -> Cost:
        """Algorithmic forward FLOPs."""
