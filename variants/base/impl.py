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
    auto_on: tuple[str, ...] = ()
    """Types of device on which `impl=auto` selects this implementation. `OTHER_DEVICES`: all types that no
    other Impl names."""
