"""Other projects' implementations of these families: the same weights give the same outputs and gradients.

A package, so that its files may have the names of those in `tests/variants`. Each comparison says what
it takes away before the two can be equal.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import pytest

from variants.base import Dims


def peer(module: str) -> Any:
    """A module of another project; skips where that is not installed, and only there."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: `make test-peers` does it")
    return importlib.import_module(module)


def sizes(dims: Dims) -> dict[str, int]:
    """A layer's sizes by the names that transformers' configurations give them."""
    return {"hidden_size": dims.d_model, "num_attention_heads": dims.heads}
