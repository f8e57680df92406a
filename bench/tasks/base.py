"""The interface of a task: batches to train on, batches to test on, and what a scored target asks for.

Shapes: B batch, T tokens.

A task is one module in this package that defines one subclass of `Task` with its `Config`. It draws from
numpy generators that it seeds itself, so that whatever else a process draws changes no batch.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from variants.knobs import Knobs

IGNORED = -100
"""A target that is not scored."""


class Batch(NamedTuple):
    """inputs (B, T) and targets (B, T), int64; a target that is `IGNORED` is not scored.

    distances (B, T), int64, where the task knows it: how many tokens before a scored target lies what it
    asks for. Elsewhere the numbers mean nothing.
    """

    inputs: Tensor
    targets: Tensor
    distances: Tensor | None = None

    def for_training(self, device: torch.device) -> Batch:
        """What a training step reads, on a device: no distances, so that none take memory there."""
        return Batch(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Knobs, ABC):
    """Base of every task's `Config`: its knobs and nothing else, checked when it is made.

    Raises ValueError naming the knob, its value and what is allowed. What depends on the cell, such as its
    length, is for `Task.unsupported` to refuse.
    """

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many tokens there are: inputs and scored targets lie in [0, vocabulary)."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a cell asks of its task."""

    data: str
    """The name after `data=`."""
    objective: str
    """One of the task's `objectives`."""
    seq_len: int
    batch_size: int
    replicate: int
    test_tokens: int
    """Most tokens of the test batches; 0 where nothing will be tested."""
    test_split: str = "test"
    """The documents that test batches are made of, where there are documents: test or validation."""


class Task(ABC):
    """Batches for one cell. Nothing but (replicate, step, done) decides a training batch."""

    Config: ClassVar[type[TaskConfig]]
    objectives: ClassVar[tuple[str, ...]]
    """What a record's `objective` may say; of two, the first is for causal models, the second for others."""
    distance_edges: tuple[int, ...] = ()
    """Lower edges of the buckets of `accuracy_by_distance`, ascending; () where batches have no distances."""
    guess_accuracy: float | None = None
    """Accuracy of guessing: among the values in the context, or always the most frequent class."""

    def __init__(self, config: TaskConfig, setting: Setting) -> None:
        """Builds nothing that a setting which `unsupported` refuses would break."""
        self.config, self.setting = config, setting
        self.vocabulary = config.vocabulary

    @property
    def objective(self) -> str:
        """The record's `objective`."""
        return self.setting.objective

    @classmethod
    def sha256(cls, config: TaskConfig, data: str) -> str:
        """Hash of all the data there is: for a task that makes its own, of its name and knobs."""
        return hashlib.sha256(json.dumps([data, config.as_dict()], sort_keys=True).encode()).hexdigest()

    def unsupported(self) -> str | None:
        """Why there are no batches for this setting, or None. It becomes the row's reason."""
        return None

    @abstractmethod
    def train_batch(self, step: int, done: float) -> Batch:
        """The batch of one training step, on the CPU: a pure function of replicate, step and `done`, the
        share in [0, 1) of the training budget that is used, for tasks that grow harder."""

    @abstractmethod
    def test_batches(self) -> Iterator[Batch]:
        """The same batches for every variant and replicate, up to `test_tokens` tokens but at least one
        sequence; the last may be smaller."""

    def train_generator(self, step: int) -> np.random.Generator:
        """What a training batch is drawn from."""
        return np.random.default_rng([self.setting.replicate, step])

    @staticmethod
    def test_generator(index: int) -> np.random.Generator:
        """What a test batch, or a test sequence, is drawn from: never a training batch's generator."""
        return np.random.default_rng([0, index, 1])
