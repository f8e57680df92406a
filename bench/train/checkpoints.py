"""What is kept of a training while it runs, so that a cell that is killed goes on: checkpoint and curve.

A checkpoint is one file, the bytes of `torch.save` and then their sha256. It is taken up only where the
training would have gone the same way to the last bit: same cell, code, torch, threads and device. Torch
is imported where it is needed: whoever starts cells removes checkpoints and does without.
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
MOST_SHARE = 0.05
"""Most of a training's wall clock that writing checkpoints may take; a slow disk gets them more rarely."""
_DIGEST_BYTES = hashlib.sha256().digest_size


def path_of(folder: Path, cell_id: str) -> Path:
    """Where a cell's checkpoint lies in the experiment's folder."""
    return folder / CHECKPOINTS_DIR / f"{cell_id}.pt"


def remove(folder: Path, cell_id: str) -> None:
    """Remove a cell's checkpoint, and what was left of one by a process that died as it wrote."""
    path = path_of(folder, cell_id)
    for file in (path, *records.unfinished(path)):
        file.unlink(missing_ok=True)


def generators(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the random number generators that training draws from, by type of device."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """The inverse of `generators`."""
    import torch

    torch.set_rng_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)


class _Unusable(Exception):
    """A checkpoint that cannot be taken up; the message says why."""


@dataclass(kw_only=True)
class Kept:
    """One cell's checkpoint and curve in the experiment's folder."""

    folder: Path
    cell_id: str
    code_sha256: str
    device_name: str | None
    every_seconds: float
    """Wall clock between two checkpoints, at least."""

    def __post_init__(self) -> None:
        self._next = time.monotonic() + self.every_seconds

    @property
    def path(self) -> Path:
        """The checkpoint's."""
        return path_of(self.folder, self.cell_id)

    def _origin(self) -> dict[str, Any]:
        """What must be the same where the checkpoint is taken up."""
        import torch

        return {
            "cell_id": self.cell_id,
            "code_sha256": self.code_sha256,
            "torch_version": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "device_name": self.device_name,
        }

    def due(self) -> bool:
        """Whether it is time for another checkpoint."""
        return time.monotonic() >= self._next

    def write(self, state: dict[str, Any], curve: Curve, step_tokens: int) -> None:
        """Keep the state of the training and its curve, each in place of the one before."""
        import torch

        begun = time.monotonic()
        self.write_curve(curve, step_tokens)
        with records.replacing(self.path) as file:
            torch.save({"origin": self._origin(), "state": state}, file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").digest()
            file.write(digest)
        now = time.monotonic()
        self._next = now + max(self.every_seconds, (now - begun) / MOST_SHARE)

    def write_curve(self, curve: Curve, step_tokens: int) -> None:
        """Keep the curve alone."""
        path = records.curve_path_of(self.folder, self.cell_id)
        records.write_atomically(path, curve.csv(step_tokens))

    def read(self) -> dict[str, Any] | None:
        """The state that was kept last; None, and a line that says why, where there is none to take up."""
        try:
            return self._state()
        except FileNotFoundError:
            return None
        except (OSError, _Unusable) as problem:
            print(f"{self.path}: checkpoint ignored, {problem}; training starts over", file=sys.stderr)
            return None

    def _state(self) -> dict[str, Any]:
        import torch

        content = self.path.read_bytes()
        body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            raise _Unusable("it is truncated or damaged")
        try:
            kept = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
            origin, state = kept["origin"], kept["state"]
        except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise _Unusable(f"it cannot be read ({type(error).__name__}: {reason})") from None
        for key, ours in self._origin().items():
            if origin.get(key) != ours:
                raise _Unusable(f"its {key} is {origin.get(key)} and this run's {ours}")
        found: dict[str, Any] = state
        return found
