"""Trained models that cells keep (`measure.keep_model=true`), with the configuration of the cell."""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import records
from bench.config.spec import CellSpec

MODELS_DIR = "models"
"""Folder of an experiment that holds the models."""

_UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError)


class ModelError(Exception):
    """A model cannot be read; the message is the reason, in one line."""


@dataclass(frozen=True, kw_only=True)
class KeptModel:
    """The configuration of a cell, the code that trained its model, and the weights."""

    spec: CellSpec
    code_sha256: str
    weights: dict[str, Any]


def path_of(folder: Path, cell_id: str) -> Path:
    """Return the path of a cell's model in the experiment's folder."""
    return folder / MODELS_DIR / f"{cell_id}.pt"


def save(folder: Path, cell_id: str, spec: CellSpec, code_sha256: str, model: nn.Module) -> None:
    """Write the model of a cell; it replaces an earlier one."""
    kept = {"spec": asdict(spec), "code_sha256": code_sha256, "weights": model.state_dict()}
    with records.atomic_writer(path_of(folder, cell_id)) as file:
        torch.save(kept, file)


def find(folder: Path, cell: str) -> Path:
    """Return the path of the only model whose cell id begins with `cell`. Raises ModelError."""
    known = sorted(path.stem for path in (folder / MODELS_DIR).glob("*.pt"))
    if not known:
        raise ModelError(f"{folder}: keeps no model; train its cells with measure.keep_model=true")
    found = [name for name in known if name.startswith(cell)]
    if len(found) != 1:
        which = "several models" if found else "no model"
        raise ModelError(f"{cell}: {which} of {folder}; allowed are {', '.join(found or known)}")
    return path_of(folder, found[0])


def load(path: Path) -> KeptModel:
    """Read a model. Raises ModelError."""
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        return KeptModel(
            spec=CellSpec.from_values(kept["spec"]), code_sha256=kept["code_sha256"], weights=kept["weights"]
        )
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{path}: cannot be read ({type(error).__name__}: {reason})") from None
