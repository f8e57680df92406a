"""Exceptions that mean that memory ran out."""

from __future__ import annotations

import errno

NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "STATUS_ALLOC_FAILED")
"""Messages that mean that memory ran out, in a plain RuntimeError or from a library that aborts the process:
torch's CPU allocator, the system's, C++'s, and CUDA's libraries."""


def out_of_memory(failure: Exception) -> bool:
    """Return whether an exception means that memory ran out; on the CPU torch raises a plain RuntimeError."""
    import torch

    if isinstance(failure, OSError):
        return failure.errno == errno.ENOMEM
    if isinstance(failure, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(failure, RuntimeError) and any(sign in str(failure) for sign in NO_MEMORY)
