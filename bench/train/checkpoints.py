"""Checkpoints and training curves, so that a cell that is killed in training can be resumed.

A checkpoint is one file: the bytes of `torch.save`, followed by their sha256. It is loaded only if the
resumed training is bit-identical to an uninterrupted one: same cell, code, torch version, threads and device.
Torch is imported lazily, because the process that starts cells only removes checkpoints.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import records

if TYPE_CHECKING:
    import torch

    from bench.train.loss_curve import Curve

CHECKPOINTS_DIR = "checkpoints"
MAX_TIME_SHARE = 0.05
"""Maximum share of the training's wall-clock time spent on checkpoints;
on a slow disk they are written less often."""
_DIGEST_BYTES = hashlib.sha256().digest_size


def path_of(folder: Path, cell_id: str) -> Path:
    """Return the path of a cell's checkpoint in the experiment's folder."""
    return folder / CHECKPOINTS_DIR / f"{cell_id}.pt"


def remove(folder: Path, cell_id: str) -> None:
    """Remove a cell's checkpoint, and the temporary files of processes that died while writing one."""
    path = path_of(folder, cell_id)
    for file in (path, *records.temporary_files_of(path)):
        file.unlink(missing_ok=True)


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the random number generators that training uses, by device type."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def restore_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the states that `generator_states` returned."""
    import torch

    torch.set_rng_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)


class _CheckpointError(Exception):
    """A checkpoint cannot be loaded; the message is the reason."""


@dataclass(kw_only=True)
class CheckpointStore:
    """The checkpoint and the training curve of one cell in the experiment's folder."""

    folder: Path
    cell_id: str
    code_sha256: str
    device_name: str | None
    every_seconds: float
    """Minimum wall-clock time between two checkpoints."""

    def __post_init__(self) -> None:
        self._next = time.monotonic() + self.every_seconds

    @property
    def path(self) -> Path:
        """The path of the checkpoint."""
        return path_of(self.folder, self.cell_id)

    def _requirements(self) -> dict[str, Any]:
        """The values that must be equal when the checkpoint is written and loaded."""
        import torch

        return {
            "cell_id": self.cell_id,
            "code_sha256": self.code_sha256,
            "torch_version": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "device_name": self.device_name,
        }

    def is_due(self) -> bool:
        """Return whether it is time for the next checkpoint."""
        return time.monotonic() >= self._next

    def write(self, state: dict[str, Any], curve: Curve, step_tokens: int) -> None:
        """Write the state of the training and its curve; each replaces the previous one."""
        import torch

        begun = time.monotonic()
        self.write_curve(curve, step_tokens)
        with records.atomic_writer(self.path) as file:
            torch.save({"origin": self._requirements(), "state": state}, file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").digest()
            file.write(digest)
        now = time.monotonic()
        self._next = now + max(self.every_seconds, (now - begun) / MAX_TIME_SHARE)

    def write_curve(self, curve: Curve, step_tokens: int) -> None:
        """Write only the curve."""
        path = records.curve_path_of(self.folder, self.cell_id)
        records.write_atomically(path, curve.csv(step_tokens))

    def read(self) -> dict[str, Any] | None:
        """Return the last state, or None if there is none that can be loaded,
        with a message that gives the reason."""
        try:
            return self._state()
        except FileNotFoundError:
            return None
        except (OSError, _CheckpointError) as problem:
            print(f"{self.path}: checkpoint ignored, {problem}; training restarts", file=sys.stderr)
            return None

    def _state(self) -> dict[str, Any]:
        import torch

        content = self.path.read_bytes()
        body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            raise _CheckpointError("it is truncated or damaged")
        try:
            loaded = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
            origin, state = loaded["origin"], loaded["state"]
        except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise _CheckpointError(f"it cannot be read ({type(error).__name__}: {reason})") from None
        for key, expected in self._requirements().items():
            if origin.get(key) != expected:
                raise _CheckpointError(f"its {key} is {origin.get(key)}, that of this run {expected}")
        result: dict[str, Any] = state
        return result
