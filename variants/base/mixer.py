"""The layers that mix tokens, hidden states in and hidden states out, and the variants that name them.

Shapes: B batch, T tokens, C channels (d_model), H heads, D = C / H.

A variant is one module in `variants.attention` (or a plug-in: see `variants.load`) that defines one
subclass of `Variant`, most often a `SequenceMixer`. It imports `variants.base`, `variants.ops`,
`variants.input_schedule` and torch, and knows nothing of the harness that measures it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from variants.base.impl import Impl
from variants.base.info import Info
from variants.base.work import Context, Cost, Dims, Workload
from variants.input_schedule import InputSchedule, Whole, require_tokens
from variants.knobs import Knobs

Layer = TypeVar("Layer", covariant=True)


class MixerOut(NamedTuple):
    """What a layer returns, always: outputs (B, T, C), detached state or None, auxiliary loss or None."""

    y: Tensor
    state: Any = None
    aux_loss: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class VariantConfig(Knobs):
    """Base of every variant's `Config`: its knobs and nothing else."""


@dataclass(frozen=True)
class SlotSpec(Generic[Layer]):
    """What fills a slot of a model: a class and the knobs of its layers."""

    name: str
    layer: type[Layer]
    config: Any
    """Of the class's `Config`."""

    @property
    def params(self) -> dict[str, Any]:
        """The knobs in plain types."""
        params: dict[str, Any] = self.config.as_dict()
        return params


class Variant(ABC):
    """What `variant=name` stands for: the mixers of a model's layers, and how the model is fed."""

    Config: ClassVar[type[VariantConfig]]

    @classmethod
    @abstractmethod
    def mixers(cls, config: Any) -> tuple[SlotSpec[SequenceMixer], ...]:
        """The mixers from the lowest layer on; a deeper model begins again with the first."""

    @classmethod
    def members(cls, config: Any) -> tuple[str, ...]:
        """The names of other variants that this configuration is made of."""
        return ()

    @classmethod
    @abstractmethod
    def info_for(cls, config: Any) -> Info:
        """What is known of this configuration."""

    @classmethod
    @abstractmethod
    def input_schedule(cls, config: Any) -> InputSchedule:
        """How the model feeds sequences to its layers."""

    @classmethod
    @abstractmethod
    def no_form(cls, config: Any, *, causal: bool) -> str | None:
        """Why this configuration has no form for an objective, at any size, or None."""

    @classmethod
    @abstractmethod
    def unsupported(cls, config: Any, dims: Dims, *, causal: bool) -> str | None:
        """Why a cell of these dims cannot run on any machine, or None. It becomes the record's reason."""

    @classmethod
    @abstractmethod
    def missing(cls, config: Any, dims: Dims, *, device: torch.device, dtype: torch.dtype) -> str | None:
        """What this configuration needs and a machine lacks, or None. It becomes the record's reason too.

        It says whether the kernel that `impl` names is installed and runs on this device, with numbers of
        this type. A plan with fake tensors asks for the CPU, where those are.
        """


class SequenceMixer(nn.Module, Variant):
    """One layer that mixes tokens, with its projections: (B, T, C) → (B, T, C).

    As a variant, it is a model all of whose layers are of this class.
    """

    info: ClassVar[Info]
    IMPLS: ClassVar[Mapping[str, Impl]] = {}
    """The words of the knob `impl`, but "auto", with what each stands for; empty for a variant without it."""
    flop_overhead_reason: str | None = None
    """Why a forward pass dispatches more FLOPs than `cost` counts, or None where it does not."""
    overhead_is_bounded: bool = True
    """Whether the harness's limit on that overhead holds. Not where `impl` names a general kernel: what its
    tiles cost on this mask is the finding then, not a defect."""

    def __init__(self, config: VariantConfig, dims: Dims, layer: int = 0) -> None:
        """A layer for sequences up to dims.seq_len; `layer` is its index among the layers of its
        slot, from the bottom.

        Raises ValueError for sizes that no layer can have.
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
        """`forward`, for inputs and objectives that the layer has a form for.

        Raises ValueError for an input without a token, and what `require_objective` raises.
        """
        require_tokens(x)
        self.require_objective(causal=ctx.causal)
        out: MixerOut = super().__call__(x, ctx, state)
        return out

    def require_objective(self, *, causal: bool) -> None:
        """Raise ValueError, in one line, for an objective that the layer has no form for."""
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
        return Whole()

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """By the capabilities."""
        if causal and not cls.info.caps.causal:
            return "has no causal form"
        if not causal and not cls.info.caps.bidirectional:
            return "has no bidirectional form"
        return None

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Sizes that no layer can have, and objectives without a form.

        An override returns this one's reason where it has none of its own.
        """
        return dims.unusable() or cls.no_form(config, causal=causal)

    @classmethod
    def missing(
        cls, config: VariantConfig, dims: Dims, *, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """What the implementation that runs there lacks."""
        impl = cls.IMPLS.get(cls.resolve_impl(config, device.type) or "")
        return impl.missing(device, dtype, dims.head_dim) if impl else None

    @classmethod
    def resolve_impl(cls, config: VariantConfig, device_type: str) -> str | None:
        """The name of the implementation that runs on a type of device; None for a variant with only one."""
        word: str | None = getattr(config, "impl", None)
        if word != "auto":
            return word
        for wanted in (device_type, Impl.OTHER_DEVICES):
            for name, impl in cls.IMPLS.items():
                if wanted in impl.auto_on:
                    return name
        raise ValueError(f"impl=auto: {cls.__name__} has no implementation for {device_type}")

    @property
    def device_type(self) -> str:
        """Type of the device that the layer's work is cut for."""
        return self.dims.device_type or next(self.parameters()).device.type

    @property
    def impl(self) -> str | None:
        """Which implementation of the mathematics runs, for variants that have more than one."""
        return self.resolve_impl(self.config, self.device_type)

    def run_impl(self, *args: Any) -> Tensor:
        """Call the implementation that runs."""
        return self.IMPLS[self.impl or ""].run(*args)

    @abstractmethod
    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut. `state` is what the layer returned for the previous segment, or None."""

    @abstractmethod
    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The same mathematics for reading: (B, T, C) → (B, T, C), O(T²) if need be.

        `x` is what the layer is fed at a time; of a layer that carries state, the whole sequence.
        """

    @abstractmethod
    def cost(self, work: Workload) -> Cost:
        """Algorithmic forward FLOPs, of allowed pairs only, on what the layer is fed at a time.

        A layer that carries state is asked for the whole sequence.
        """

    @abstractmethod
    def state_bytes(self, work: Workload) -> int:
        """Bytes to carry after work.seq_len tokens in order to process the next one."""
