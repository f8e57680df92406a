"""What only some mixers can do. A layer implements a protocol by having its methods.

Shapes: B batch, T tokens, C channels (d_model), H heads, D = C / H.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from variants.base.mixer import SequenceMixer, VariantConfig
from variants.base.work import Context


@runtime_checkable
class HasMask(Protocol):
    """Which keys a query may read follows from their positions alone."""

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor | None:
        """(T, T) bool: which keys (columns) a query (row) may read, of what the layer is fed at a time or,
        where it carries state, of the whole sequence. None where, with this configuration, content
        decides."""
        ...


@runtime_checkable
class ExposesScores(Protocol):
    """The layer's weights are softmax(QKᵀ/√D) over every key that the objective allows."""

    def queries_keys(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, H, T, D) of one window x (B, T, C) of the input schedule."""
        ...


@runtime_checkable
class EstimatesSoftmax(Protocol):
    """The layer estimates full softmax attention."""

    def softmax_target(self, x: Tensor, ctx: Context) -> Tensor | None:
        """The attention that is estimated, with the layer's own projections, for one window of the input
        schedule: (B, T, C) → (B, T, C), O(T²). None where this configuration estimates none."""
        ...


@runtime_checkable
class KnownLeak(Protocol):
    """Some configuration's causal form is known to see the future."""

    @classmethod
    def leak(cls, config: Any) -> str | None:
        """How this configuration's causal form sees the future, or None where it does not.

        A leak that is stated here is measured, recorded and marked; any other fails the causality gate.
        """
        ...


@runtime_checkable
class UpdatesAfterStep(Protocol):
    """The layer learns something outside the optimiser: moving averages, redraws."""

    def after_step(self) -> None:
        """Called once after each optimiser step. A forward pass may run twice in a step (recomputation), so
        it must not do this itself."""
        ...


@runtime_checkable
class TiesParameters(Protocol):
    """Layers of one network share parameters."""

    @classmethod
    def tie(cls, layers: Sequence[Any]) -> None:
        """Called once with all layers of this class and the same knobs in a new model, lowest first, to let
        them share parameters."""
        ...


@runtime_checkable
class AuxiliaryLoss(Protocol):
    """`MixerOut.aux_loss` trains parameters that no other gradient reaches."""

    def auxiliary_parameters(self) -> Iterator[nn.Parameter]:
        """Those parameters. The norm of their gradients is limited by itself, so that how well the auxiliary
        loss does changes nothing in the step that the task takes."""
        ...


def known_leak(mixer: type[SequenceMixer], config: VariantConfig) -> str | None:
    """How a configuration's causal form is known to see the future, or None."""
    return mixer.leak(config) if issubclass(mixer, KnownLeak) else None


def tie(layers: Iterable[SequenceMixer]) -> None:
    """Let the layers of a new model, lowest first, share parameters: those of equal class and knobs."""
    alike: dict[Any, list[SequenceMixer]] = {}
    for layer in layers:
        alike.setdefault((type(layer), layer.config), []).append(layer)
    for (mixer, _), members in alike.items():
        if issubclass(mixer, TiesParameters):
            mixer.tie(members)
