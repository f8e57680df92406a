"""The compilers that torch.compile needs, and the folder of its files. Does not import torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variable → the folder below the temporary one that it names."""


def missing(device: str) -> str | None:
    """Return the requirement for compiling on this type of device that this machine does not meet, or None.

    These are the programs for which torch's default compiler, inductor, looks: a C++ compiler on the CPU,
    Triton on other devices, and the headers of Python for both.
    """
    if device == "cpu":
        cxx = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(cxx) is None:
            return f"needs a C++ compiler; there is no {cxx} on the PATH (CXX names another one)"
    elif importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"needs the headers of Python; there is no {header}"
    return None


@contextmanager
def cache_folder(*, needed: bool) -> Iterator[Path | None]:
    """A new temporary folder for the compiler's files, removed at the end; None if it is not needed."""
    if not needed:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="longctx-bench-compile-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def use_cache_folder(folder: Path) -> None:
    """Let this process's compiler keep its files in this folder."""
    os.environ.update({name: str(folder / below) for name, below in FOLDERS.items()})
