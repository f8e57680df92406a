"""Interfaces of variants, and of sequence mixers: layers that map hidden states to hidden states.

Shapes: B batch, T tokens, C channels (d_model), H heads, D channels of a head.

A variant is one module in `variants.attention` (or a plug-in: see `variants.load`) that defines one subclass
of `Variant`, usually a `SequenceMixer`. It imports `variants.base`, `variants.ops`, `variants.input_schedule`
and torch. It does not depend on the harness that measures it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from variants.base.decoding import Clock, DecodingState
from variants.base.impl import Impl
from variants.base.info import Info, PositionScheme
from variants.base.work import Context, Cost, Dims, Workload
from variants.input_schedule import InputSchedule, WholeSequence, require_tokens
from variants.knobs import Knobs

Layer = TypeVar("Layer", covariant=True)


class MixerOut(NamedTuple):
    """Result of a layer: outputs (B, T, C), detached state or None, auxiliary loss or None."""

    y: Tensor
    state: Any = None
    aux_loss: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class VariantConfig(Knobs):
    """Base class of the `Config` of every variant: its knobs only."""


@dataclass(frozen=True)
class SlotSpec(Generic[Layer]):
    """Content of a slot of a model: a class of layers, and their knobs."""

    name: str
    layer: type[Layer]
    config: Any
    """An instance of `layer.Config`."""

    @property
    def params(self) -> dict[str, Any]:
        """The knobs in plain types."""
        params: dict[str, Any] = self.config.as_dict()
        return params


class Variant(ABC):
    """Interface of `variant=name`: the mixers of the layers of a model, and the input schedule."""

    Config: ClassVar[type[VariantConfig]]

    @classmethod
    @abstractmethod
    def mixers(cls, config: Any) -> tuple[SlotSpec[SequenceMixer], ...]:
        """The mixers, from the lowest layer on; a deeper model repeats them."""

    @classmethod
    def members(cls, config: Any) -> tuple[str, ...]:
        """The names of other variants that this configuration contains."""
        return ()

    @classmethod
    @abstractmethod
    def info_for(cls, config: Any) -> Info:
        """The metadata of this configuration."""

    @classmethod
    @abstractmethod
    def input_schedule(cls, config: Any) -> InputSchedule:
        """The division of a sequence into the inputs of the layers."""

    @classmethod
    @abstractmethod
    def no_form(cls, config: Any, *, causal: bool) -> str | None:
        """The reason why this configuration has no form for an objective, at any size, or None."""

    @classmethod
    @abstractmethod
    def unsupported(cls, config: Any, dims: Dims, *, causal: bool) -> str | None:
        """The reason why no machine can run a cell of these sizes, or None. It is stored in the record."""

    @classmethod
    @abstractmethod
    def missing(cls, config: Any, dims: Dims, *, device: torch.device, dtype: torch.dtype) -> str | None:
        """The requirement that this machine does not meet, or None. It is stored in the record.

        Tests whether the kernel of `impl` is installed, and runs on this device with this dtype. A plan with
        fake tensors calls this with the CPU as the device.
        """

    @classmethod
    def longer_unsupported(cls, config: Any) -> str | None:
        """The reason why a model that was built for one length cannot read longer sequences, or None.

        Layers with parameters for each position cannot, unless the input schedule divides every sequence into
        windows of one length.
        """
        restarts = cls.input_schedule(config) != WholeSequence()
        for slot in cls.mixers(config):
            caps = slot.layer.info.caps
            if caps.fixed_length and (caps.stateful or not restarts):
                return f"{slot.name} has parameters for a fixed number of positions"
        return None


class SequenceMixer(nn.Module, Variant):
    """One layer that mixes tokens, with its projections: (B, T, C) → (B, T, C).

    As a variant, it stands for a model in which all layers are of this class.
    """

    info: ClassVar[Info]
    position_scheme: ClassVar[PositionScheme | None] = None
    """How the layer encodes positions; None if the variant does not say."""
    no_shared_keys: ClassVar[str | None] = "its heads cannot share keys and values"
    """The reason why query heads cannot share keys and values (`Dims.kv_heads`); None if they can."""
    IMPLS: ClassVar[Mapping[str, Impl]] = {}
    """The values of the knob `impl`, except "auto", with their implementations; empty without this knob."""
    flop_overhead_reason: str | None = None
    """The reason why a forward pass dispatches more FLOPs than `cost` counts; None if it does not."""
    overhead_is_bounded: bool = True
    """Whether the harness limits this overhead. False for general kernels: the overhead of their tiles is a
    result of the measurement, not a defect."""

    def __init__(self, config: VariantConfig, dims: Dims, layer: int = 0) -> None:
        """A layer for sequences of at most dims.seq_len tokens.

        `layer` is its index among the layers of its slot; 0 is the lowest. Raises ValueError for impossible
        sizes.
        """
        super().__init__()
        if reason := dims.unusable():
            raise ValueError(reason)
        self.config = config
        self.dims = dims
        self.layer = layer
        if impl := self.IMPLS.get(self.resolve_impl(config, dims.device_type or "cpu") or ""):
            self.flop_overhead_reason = impl.flop_overhead_reason
            self.overhead_is_bounded = impl.overhead_is_bounded

    def __call__(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """Check the input and the objective, then call `forward`, or `step` with a state for decoding.

        Raises ValueError for an input without tokens, or an objective that the layer has no form for.
        """
        require_tokens(x)
        self.require_objective(causal=ctx.causal)
        if isinstance(state, DecodingState):
            state.require_room(x.shape[1])
            return MixerOut(self.step(x, state), state)
        out: MixerOut = super().__call__(x, ctx, state)
        return out

    def require_objective(self, *, causal: bool) -> None:
        """Raise ValueError for an objective that the layer has no form for."""
        if reason := self.no_form(self.config, causal=causal):
            raise ValueError(f"{type(self).__name__} with causal={causal}: {reason}")

    @classmethod
    def mixers(cls, config: VariantConfig) -> tuple[SlotSpec[SequenceMixer], ...]:
        """This class in every layer."""
        return (SlotSpec(cls.__module__.rpartition(".")[2], cls, config),)

    @classmethod
    def info_for(cls, config: VariantConfig) -> Info:
        """The same for every configuration."""
        return cls.info

    @classmethod
    def input_schedule(cls, config: VariantConfig) -> InputSchedule:
        """Whole sequences."""
        return WholeSequence()

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """The reason follows from the capabilities."""
        if causal and not cls.info.caps.causal:
            return "has no causal form"
        if not causal and not cls.info.caps.bidirectional:
            return "has no bidirectional form"
        return None

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Impossible sizes, and objectives without a form.

        An override must also return the reason of this method.
        """
        if reason := dims.unusable():
            return reason
        if cls.no_shared_keys and dims.queries_per_key > 1:
            most = f"allowed is {dims.heads}, the number of heads"
            return f"kv_heads={dims.kv_heads}: {cls.no_shared_keys}; {most}"
        return cls.no_form(config, causal=causal)

    @classmethod
    def missing(
        cls, config: VariantConfig, dims: Dims, *, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """The requirement of the selected implementation that this machine does not meet."""
        planned_for = dims.device_type or device.type
        impl = cls.IMPLS.get(cls.resolve_impl(config, planned_for) or "")
        if impl is None or (planned_for != device.type and impl.has_shape_functions):
            return None
        return impl.missing(device, dtype, dims.head_dim)

    @classmethod
    def resolve_impl(cls, config: VariantConfig, device_type: str) -> str | None:
        """The name of the implementation for a type of device; None for a variant with only one."""
        name: str | None = getattr(config, "impl", None)
        if name != "auto":
            return name
        for key in (device_type, Impl.OTHER_DEVICES):
            for candidate, impl in cls.IMPLS.items():
                if key in impl.auto_on:
                    return candidate
        raise ValueError(f"impl=auto: {cls.__name__} has no implementation for {device_type}")

    @property
    def device_type(self) -> str:
        """Type of the device for which piece sizes are chosen."""
        return self.dims.device_type or next(self.parameters()).device.type

    @property
    def impl(self) -> str | None:
        """The name of the implementation that runs; None for a variant with only one."""
        return self.resolve_impl(self.config, self.device_type)

    def run_impl(self, *args: Any) -> Tensor:
        """Call the selected implementation."""
        return self.IMPLS[self.impl or ""].run(*args)

    @abstractmethod
    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut. `state` is the state that the previous segment returned, or None."""

    @classmethod
    def no_decoding(cls, config: VariantConfig) -> str | None:
        """The reason why sequences cannot be decoded token by token, or None.

        An override must also return the reason of this method.
        """
        if reason := cls.no_form(config, causal=True):
            return reason
        if cls.init_state is SequenceMixer.init_state:
            return "has no form for decoding: the layer defines no init_state"
        return None

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> DecodingState:
        """The state before the first token of `batch_size` sequences of at most `max_len` tokens.

        `dtype` is that of keys and values. Raises NotImplementedError if there is no form for decoding.
        """
        raise NotImplementedError(f"{type(self).__name__} {self.no_decoding(self.config)}")

    def step(self, x: Tensor, state: Any) -> Tensor:
        """Read the next n tokens: (B, n, C) → (B, n, C), and change the state in place.

        The outputs equal those of `forward` for the whole sequence so far. The position is that of the clock
        of the state, which the caller advances after all layers. The first step may be a long prompt.
        """
        raise NotImplementedError(f"{type(self).__name__} {self.no_decoding(self.config)}")

    def decoding_bytes(self, work: Workload) -> int:
        """Bytes that `init_state` allocates for work.batch_size sequences of at most work.seq_len tokens.

        At least the largest `state_bytes` of any length up to there, which is what is needed.
        """
        raise NotImplementedError(f"{type(self).__name__} {self.no_decoding(self.config)}")

    @abstractmethod
    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """A readable implementation of the same mathematics: (B, T, C) → (B, T, C); may be O(T²).

        `x` is one window of the input schedule or, for a stateful layer, a whole sequence.
        """

    @abstractmethod
    def cost(self, work: Workload) -> Cost:
        """Algorithmic FLOPs of the forward pass on one window of the input schedule; allowed pairs only.

        For a stateful layer, on a whole sequence.
        """

    @abstractmethod
    def state_bytes(self, work: Workload) -> int:
        """Bytes of state after work.seq_len tokens that are needed to process the next token."""
