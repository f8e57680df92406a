"""Provenance: the versions, hardware, threads and code state behind a record.

`python -m bench.run.provenance preset` prints the preset for this machine: gpu or cpu.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from variants.safe_output import run

HERE = Path(__file__).parent
_GIT_SECONDS = 10
"""Timeout of git, after which the state of the code is recorded as unknown."""
_GIT_ELSEWHERE = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY"}
"""Variables that git sets for its hooks. They refer to the hook's repository rather than to this code's."""


def _git(*arguments: str) -> bytes | None:
    """Return git's output as bytes; None if git is missing, fails, prompts or hangs."""
    own = {key: value for key, value in os.environ.items() if key not in _GIT_ELSEWHERE}
    try:
        return subprocess.run(
            ["git", "-C", str(HERE), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**own, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
            timeout=_GIT_SECONDS,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def _git_state() -> tuple[str | None, bool | None]:
    """Return the commit and whether the working tree differs from it; (None, None) outside a checkout."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None  # an installed package, perhaps inside another project's checkout
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return commit.decode("ascii").strip() if commit else None, None if status is None else bool(
        status.strip()
    )


@cache
def cpu_model() -> str | None:
    """Return the processor's name, or None if the system does not report it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or None


def now() -> str:
    """Return the current time in the format of a record."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def provenance() -> dict[str, Any]:
    """Return the provenance part of a record, except what only the cell's process knows."""
    commit, dirty = _git_state()
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "torch_version": version("torch"),
        "python_version": platform.python_version(),
        "cpu_model": cpu_model(),
        "started_at": now(),
        "load_average": os.getloadavg()[0],
    }


def preset() -> str:
    """Return the preset for this machine's device."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def main() -> int:
    """Print the preset for this machine; returns the exit status."""
    if sys.argv[1:] != ["preset"]:
        print("usage: python -m bench.run.provenance preset", file=sys.stderr)
        return 2
    print(preset())
    return 0


if __name__ == "__main__":
    run(main)
