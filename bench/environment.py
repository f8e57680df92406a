"""Provenance: the versions, hardware, threads and code state behind a record.

`python -m bench.environment preset` prints which preset suits this machine: gpu or cpu.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import variants

HERE = Path(__file__).parent
_NOT_FIGURES = {
    "__main__.py",
    "cluster.py",
    "commandline.py",
    "complaints.py",
    "environment.py",
    "interrupts.py",
    "layers.py",
    "lines.py",
    "locks.py",
    "progress.py",
    "sweep.py",
}
"""Files of this package that cannot change a figure: what runs cells, not what a cell does."""


@cache
def code_sha256(variant: str) -> str:
    """Hash of the code that can change a figure of this variant: the harness and the variant's files."""
    packages = ("corpora", "tasks", "measure")
    harness = [*HERE.glob("*.py"), *(file for package in packages for file in HERE.glob(f"{package}/*.py"))]
    files = sorted(f for f in harness if f.name not in _NOT_FIGURES) + variants.source_files(variant)
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name}:{len(content)}:".encode() + content)
    return digest.hexdigest()[:16]


@cache
def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(HERE), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def _git_state() -> tuple[str | None, bool | None]:
    """Commit and whether the tree differs from it; (None, None) where this is not a checkout."""
    if _git("ls-files", "--error-unmatch", "environment.py") is None:
        return None, None  # installed, perhaps below some other project's checkout
    status = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "HEAD"), None if status is None else bool(status)


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


if __name__ == "__main__":
    if sys.argv[1:] != ["preset"]:
        sys.exit("usage: python -m bench.environment preset")
    print(preset())
