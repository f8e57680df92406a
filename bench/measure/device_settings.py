"""Settings of torch on an accelerator that decide which kernels run and how fast, by record key."""

from __future__ import annotations

import os
from typing import Any

import torch

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables of the caching allocator's settings; torch reads them in this order."""


def device_settings(device: torch.device) -> dict[str, Any]:
    """Return the settings; empty on a CPU, where these keys of a record are null."""
    if device.type == "cpu":
        return {}
    return {
        "cudnn_version": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "tf32": _tf32() if device.type == "cuda" else None,
        "device_allocator": _allocator(device),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _tf32() -> str:
    """The operations of float32 tensors that may round to TF32."""
    allowed = {
        "matrix products": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "convolutions": torch.backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore[attr-defined]
    }
    return ", ".join(name for name, on in allowed.items() if on) or "none"


def _allocator(device: torch.device) -> str:
    """The caching allocator's backend and its settings in the environment."""
    backend = torch.cuda.get_allocator_backend() if device.type == "cuda" else "native"
    settings = [f"{name}={os.environ[name]}" for name in ALLOCATOR_VARIABLES if os.environ.get(name)]
    return "; ".join([backend, *settings])
