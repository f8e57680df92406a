"""What all tests share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

# For the processes that tests start, too. No other sweep is waited for, nor that of another worker.
os.environ["LONGCTX_BENCH_LOCKS"] = f"tests-{os.getpid()}"
# Work this small is done before a second thread wakes; on busy cores waiting for one takes longer.
os.environ["OMP_NUM_THREADS"] = "1"

HANG_SECONDS = 3600.0
"""The limit of every wait: no test is about how fast a machine is, and only what hangs takes so long."""


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait for an event, however long a busy machine needs for it; fails where it never comes."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.02)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped where there is no device; torch is asked only if one was collected."""
    cuda_items = [item for item in items if item.get_closest_marker("cuda")]
    if not cuda_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in cuda_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
