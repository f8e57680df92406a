"""Optional protocols of sequence mixers. A layer implements a protocol by defining its methods.

Shapes: B batch, T tokens, C channels (d_model), H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from variants.base.mixer import SequenceMixer, VariantConfig
from variants.base.work import Context


@runtime_checkable
class HasMask(Protocol):
    """The keys that a query may read depend on positions only."""

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor | None:
        """(T, T) bool: the keys (columns) that a query (row) may read, in one window of the input schedule
        or, for a stateful layer, in a whole sequence. None if they depend on content in this configuration.
        """
        ...


@runtime_checkable
class ExposesScores(Protocol):
    """The attention weights are softmax(QKᵀ/√D) over all keys that the objective allows."""

    def queries_keys(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Return queries and keys (B, H, T, D) of one window x (B, T, C) of the input schedule."""
        ...


@runtime_checkable
class EstimatesSoftmax(Protocol):
    """The layer estimates full softmax attention."""

    def softmax_target(self, x: Tensor, ctx: Context) -> Tensor | None:
        """Compute the estimated attention exactly, with the projections of the layer, for one window of the
        input schedule: (B, T, C) → (B, T, C), O(T²). None if this configuration does not estimate softmax."""
        ...


@runtime_checkable
class MakesChoices(Protocol):
    """Content decides by comparison which keys a token reads, or which experts compute it: hash buckets,
    clusters, routers. A feed-forward layer may implement it too; its context says nothing.

    A rounding moves a token across the border of two buckets, and then its output has nothing in common with
    that of unrounded numbers. Two dtypes can therefore only be compared where both make the same choices.
    """

    def choices(self, x: Tensor, ctx: Context) -> Any:
        """Return the choices for one window x (B, T, C) of the input schedule that `forward` makes in the
        current dtype. `reference` takes its choices from this method."""
        ...


@runtime_checkable
class KnownLeak(Protocol):
    """In some configurations the causal form is known to depend on later tokens."""

    @classmethod
    def leak(cls, config: Any) -> str | None:
        """The way in which the causal form of this configuration depends on later tokens, or None.

        A known leak is measured, recorded and marked in reports. Any other leak fails the causality gate.
        """
        ...


@runtime_checkable
class UpdatesAfterStep(Protocol):
    """The layer is updated outside the optimiser: moving averages, new random features."""

    def after_step(self) -> None:
        """Called once after each optimiser step. A forward pass must not update the layer, because it may run
        twice in a step (recomputation)."""
        ...


@runtime_checkable
class TiesParameters(Protocol):
    """Layers of one network share parameters."""

    @classmethod
    def tie(cls, layers: Sequence[Any]) -> None:
        """Make layers share parameters. Called once for a new model, with all layers of this class that have
        the same knobs and sizes, lowest first."""
        ...


@runtime_checkable
class HasMemory(Protocol):
    """Queries read a memory of earlier tokens, and no parameter depends on its length."""

    @property
    def memory_positions(self) -> int:
        """Positions of memory that a query reads before its segment, at most."""
        ...

    def longer_memory(self, factor: int) -> AbstractContextManager[None]:
        """Inside the context, the memory is `factor` times as long; state does not cross its border."""
        ...


@runtime_checkable
class AuxiliaryLoss(Protocol):
    """`MixerOut.aux_loss` trains parameters that have no other gradient."""

    def auxiliary_parameters(self) -> Iterator[nn.Parameter]:
        """These parameters. Their gradients are clipped separately, so that the auxiliary loss does not
        change the update of the other parameters."""
        ...


def known_leak(mixer: type[SequenceMixer], config: VariantConfig) -> str | None:
    """The known leak of a configuration, or None (see `KnownLeak.leak`)."""
    return mixer.leak(config) if issubclass(mixer, KnownLeak) else None


def tie(layers: Iterable[SequenceMixer]) -> None:
    """Make layers of a new model with the same class, knobs and sizes share parameters; `layers`: lowest
    first. A depth schedule may give layers different lengths."""
    groups: dict[Any, list[SequenceMixer]] = {}
    for layer in layers:
        groups.setdefault((type(layer), layer.config, layer.dims), []).append(layer)
    for (mixer, *_), group in groups.items():
        if issubclass(mixer, TiesParameters):
            mixer.tie(group)
