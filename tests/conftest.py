"""What all tests share."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis  # noqa: F401
import pytest

# hypothesis is imported above, where no test runs: its plug-ins in other packages may warn, which would fail
# the test that happens to import it first.

# For the processes that tests start, too. No other sweep is waited for, nor that of another worker.
os.environ["LONGCTX_BENCH_LOCKS"] = f"tests-{os.getpid()}"
# Work this small is done before a second thread wakes; on busy cores waiting for one takes longer.
os.environ["OMP_NUM_THREADS"] = "1"

HANG_SECONDS = 3600.0
"""The limit of every wait: no test is about how fast a machine is, and only what hangs takes so long."""
LEFT_OUT = "left out: the time given by --minutes is over"


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait for an event, however long a busy machine needs for it; fails where it never comes."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.02)


# --- which tests run, and where -------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption("--touched", action="store_true", help="only tests about what the change touched")
    group.addoption("--minutes", type=float, help="start no test after so long; those left out are named")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("touched"):
        import touched

        items[:], others = touched.select(items)
        config.hook.pytest_deselected(items=others)
    skip_without_device([item for item in items if item.get_closest_marker("cuda")])
    items.sort(key=runs_cells_on_device)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported is no garbage. Each measurement of memory would visit all of it, for 0.2 seconds."""
    gc.freeze()


def runs_cells_on_device(item: pytest.Item) -> bool:
    """Tests on a device that start whole cells, which need a folder, come last: a time limit then leaves out
    the slowest ones."""
    return bool(item.get_closest_marker("cuda")) and "tmp_path" in getattr(item, "fixturenames", ())


def skip_without_device(cuda_items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped where there is no device; torch is asked only if one was collected."""
    if not cuda_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in cuda_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


# --- the time that they may take ------------------------------------------------------------------

STARTED = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("minutes")
    if minutes is not None and time.monotonic() > STARTED + 60 * minutes:
        pytest.skip(LEFT_OUT)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = [report for report in skipped if str(report.longrepr[2]).endswith(LEFT_OUT)]
    if left_out:
        terminalreporter.section(f"{len(left_out)} tests left out for want of time")
        for name, count in Counter(report.nodeid.partition("[")[0] for report in left_out).items():
            terminalreporter.line(f"{count:5} {name}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A change that touched no test of the tier is no failure."""
    gc.unfreeze()  # plug-ins that load for the summary look for the references between objects
    if session.config.getoption("touched") and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK
