"""Declaration of the implementations of a variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Impl:
    """One implementation of a variant's mathematics."""

    OTHER_DEVICES: ClassVar[str] = "other"

    run: Callable[..., Tensor]
    """The implementation. The variant defines its arguments."""
    missing: Callable[[torch.device, torch.dtype, int], str | None] = lambda device, dtype, head_dim: None
    """(device, dtype, channels of a head) → the requirement that this machine does not meet, or None."""
    flop_overhead_reason: str | None = None
    """See `SequenceMixer.flop_overhead_reason`."""
    overhead_is_bounded: bool = True
    """See `SequenceMixer.overhead_is_bounded`."""
    has_shape_functions: bool = False
    """Whether every kernel is an operator with a shape function, so that fake tensors suffice to plan it on a
    machine without the kernel."""
    selects: tuple[str, ...] = ()
    """Other implementations of which a library selects one at run time, so that this one runs the same
    operations as the selected one."""
    untried: bool = False
    """Whether no device has run it yet. Its outputs and gradients are tested with stand-ins on the CPU only,
    so `auto` does not select it."""
    auto_on: tuple[str, ...] = ()
    """Types of device on which `impl=auto` selects this implementation. `OTHER_DEVICES`: all types that no
    other Impl names."""

    def __post_init__(self) -> None:
        assert not (self.untried and self.auto_on), "auto selects only what a device has run"
