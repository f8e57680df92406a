"""The interface of a task: training batches, test batches, and the distances that scored targets require.

Shapes: B batch, T tokens.

A task is one module of this package that defines one subclass of `Task` with its `Config`. It uses NumPy
generators that it seeds itself, so that other random numbers drawn in the process do not change the batches.
Importing a task imports no torch, because the process that checks a configuration reads the task's knobs.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from variants.knobs import Knobs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORED = -100
"""The value of targets that are not scored."""


class Batch(NamedTuple):
    """inputs (B, T) and targets (B, T), int64; targets equal to `IGNORED` are not scored.

    distances (B, T), int64, or None if the task does not define them: the number of tokens from a scored
    target back to the token that holds the answer. At positions without a scored target the values are
    undefined.
    """

    inputs: Tensor
    targets: Tensor
    distances: Tensor | None = None

    @classmethod
    def of(
        cls,
        inputs: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int64],
        distances: npt.NDArray[np.int64] | None = None,
    ) -> Batch:
        """Make a batch of arrays (B, T); its tensors share their memory."""
        from torch import from_numpy

        known = None if distances is None else from_numpy(distances)
        return cls(from_numpy(inputs), from_numpy(targets), known)

    def for_training(self, device: torch.device) -> Batch:
        """Move inputs and targets to a device for a training step,
        without the distances, which would use memory."""
        return Batch(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Knobs, ABC):
    """Base class of every task's `Config`, which holds the task's knobs and validates them on construction.

    Raises ValueError with the knob, its value and the allowed values. Conditions that depend on the cell,
    such as its length, are checked by `Task.unsupported`.
    """

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Vocabulary size: inputs and scored targets are in [0, vocabulary)."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The properties of a cell that its task depends on."""

    data: str
    """The value of `data`."""
    objective: str
    """One of the task's `objectives`."""
    seq_len: int
    batch_size: int
    replicate: int
    test_tokens: int
    """Maximum number of test tokens; 0 if there is no test."""
    test_split: str = "test"
    """The split of the corpus that is used as the test: test or validation."""
    is_continuous: bool = False
    """Whether each row of a training batch continues the text of that row in the previous batch."""


class Task(ABC):
    """Batches for one cell. A training batch is determined by (replicate, step, done)."""

    Config: ClassVar[type[TaskConfig]]
    objectives: ClassVar[tuple[str, ...]]
    """Possible values of a record's `objective`. If there are two, the first is for causal models and the
    second for the others."""
    distance_edges: tuple[int, ...] = ()
    """Ascending lower edges of the buckets of `accuracy_by_distance`; () if batches have no distances."""
    guess_accuracy: float | None = None
    """Accuracy of guessing: a random value of those in the context, or always the most frequent class."""

    def __init__(self, config: TaskConfig, setting: Setting) -> None:
        """The constructor must also succeed for settings that `unsupported` rejects."""
        self.config, self.setting = config, setting
        self.vocabulary = config.vocabulary

    @property
    def objective(self) -> str:
        """The record's `objective`."""
        return self.setting.objective

    @classmethod
    def sha256(cls, config: TaskConfig, data: str) -> str:
        """Return the hash of the task's data; for a task that generates its data, of its name and knobs."""
        return hashlib.sha256(json.dumps([data, config.as_dict()], sort_keys=True).encode()).hexdigest()

    @classmethod
    def prepare(cls, config: TaskConfig, data: str) -> int | None:
        """Compute what is slow and cached, once before the cells of a sweep, so that it does not count
        against the time of a cell; returns the number of tokens to train on, None if there is no limit."""
        return None

    @classmethod
    def data_figures(cls, config: TaskConfig, data: str) -> dict[str, Any]:
        """Return how much data was read, by record key; empty for a task that generates its data."""
        return {}

    @classmethod
    def describe(cls, config: TaskConfig, data: str) -> str | None:
        """Return what was read, in a line; None for a task that generates its data."""
        return None

    def unsupported(self) -> str | None:
        """Return why this setting has no batches, which becomes the record's reason, or None."""
        return None

    @abstractmethod
    def train_batch(self, step: int, done: float) -> Batch:
        """Return the batch of one training step, on the CPU. It is a pure function of the replicate, `step`
        and `done`, the used share of the training budget in [0, 1), which tasks with a curriculum need."""

    @abstractmethod
    def test_batches(self) -> Iterator[Batch]:
        """Yield the test batches, the same for every variant and replicate: at least one sequence and
        otherwise at most `test_tokens` tokens. The last batch may be smaller."""

    def train_generator(self, step: int) -> np.random.Generator:
        """Return the generator of one training batch."""
        return np.random.default_rng([self.setting.replicate, step])

    @staticmethod
    def test_generator(index: int) -> np.random.Generator:
        """Return the generator of a test batch or test sequence; it differs from every training generator."""
        return np.random.default_rng([0, index, 1])


class GeneratedTask(Task):
    """A task whose sequences are drawn independently of each other."""

    @abstractmethod
    def draw(self, generator: np.random.Generator, batch: int) -> tuple[npt.NDArray[np.int64], ...]:
        """Draw inputs, targets and, if the task defines them, distances (B, T) of so many sequences."""

    def train_batch(self, step: int, done: float) -> Batch:
        """The sequences of one training step."""
        return Batch.of(*self.draw(self.train_generator(step), self.setting.batch_size))

    def test_batches(self) -> Iterator[Batch]:
        """Sequences that do not depend on the batch size."""
        count, size = max(1, self.setting.test_tokens // self.setting.seq_len), self.setting.batch_size
        for start in range(0, count, size):
            rows = range(start, min(start + size, count))
            drawn = [self.draw(self.test_generator(index), 1) for index in rows]
            yield Batch.of(*(np.concatenate(parts) for parts in zip(*drawn, strict=True)))
