"""Provenance: the versions, hardware, threads and code state behind a record.

`python -m bench.run.provenance preset` prints which preset suits this machine: gpu or cpu.
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
"""After that, git is taken to hang, and the state of the code is not known."""
_GIT_ELSEWHERE = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY"}
"""Variables that git sets for its hooks: they name the repository of the hook, not the one of the code."""


def _git(*arguments: str) -> bytes | None:
    """What git prints; None where it is missing, fails, asks or hangs. Bytes, as names of files are."""
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
    """Commit and whether the tree differs from it; (None, None) where this is not a checkout."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None  # installed, perhaps below some other project's checkout
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return commit.decode("ascii").strip() if commit else None, None if status is None else bool(
        status.strip()
    )


@cache
def cpu_model() -> str | None:
    """The processor's name, or None where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or None


def now() -> str:
    """The time, for a record."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def provenance() -> dict[str, Any]:
    """The part of a record that says where it came from; what only the cell's process knows is not in it."""
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
    """The preset for the device that this machine has."""
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
