"""What a cell is: everything that decides a record's figures, plus where the record goes.

Plain values. `bench.config` makes them from what Hydra composed and checks them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import variants
from bench import tasks
from bench.config.validate import TRAIN_BUDGETS
from bench.trackers import TrackerSpec

if TYPE_CHECKING:
    from bench.tasks.base import Setting, Task, TaskConfig
    from variants.base import Attention, Dims, VariantConfig


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The transformer around the attention."""

    size: str = "tiny"
    """Name of the group's entry, for people."""
    d_model: int = 64
    heads: int = 2
    ff_mult: int = 4
    """Width of the feed-forward layer as a multiple of d_model."""
    ff_chunks: int = 1
    """Pieces of the sequence that go through the feed-forward layer one at a time."""
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MeasureSpec:
    """Which figures are taken, and with what budget."""

    preset: str = "standard"
    """Name of the group's entry, for people."""
    execute: bool = True
    """False predicts FLOPs and peak memory under fake tensors and runs nothing."""
    time_seconds: float = 1.0
    """Wall-clock budget of the step samples, and again of the forward samples."""
    min_samples: int = 3
    """Fewest samples of each, whatever they take."""
    precision: float = 0.03
    """Sampling ends before its budget where the 95 % interval of the median is narrower than this on either
    side, relative to the median; 0 always spends the budget."""
    train_budget: str = "tokens"
    """Which of the next three is what training may spend; the other two are not looked at. Of tokens and
    FLOPs whole steps are bought, rounded up, and the same cell repeats to the bit on a CPU. Seconds buy
    what the machine makes of them, so such a cell does not repeat."""
    train_tokens: int = 0
    """Tokens of training before quality is evaluated; 0 takes no quality figures."""
    train_flops: float = 0
    """The same in algorithmic FLOPs of the variant's own steps."""
    train_seconds: float = 0
    """The same in seconds of wall clock, checkpoints not counted."""
    eval_split: str = "test"
    """The documents that are scored: test or, to choose knobs by, validation."""
    eval_tokens: int = 0
    """Most held-out tokens to score."""
    eval_stride: int | None = None
    """Tokens by which each window of a held-out document starts after the one before it; null is seq_len, so
    that they lie side by side. Masked models read both sides and take no other."""
    history_targets: int = 0
    """Held-out tokens that causal models predict after histories of 1, 2, 4, … seq_len tokens; 0 for none."""
    place_period: int = 0
    """Tokens of the parts of a window by the place in which the loss is also taken; 0 for none."""
    attention_windows: int = 0
    """Held-out windows in which attention itself is looked at after training: how its weights are spread and
    how far the layer is from what it estimates; 0 for none."""
    reach: bool = False
    """Whether it is worked out how far back the layers' patterns let the model look. Tasks that have answers
    at a distance always do."""
    learning_rate: float = 3e-3
    """The highest, after warm-up."""
    checkpoint_seconds: float = 30.0
    """Wall clock of training between checkpoints, at least; what a cell that is killed loses at most."""
    budget: Any = None
    """Memory that a training step may take, such as 80GiB: what fits into it is found by prediction."""
    limit_bytes: Any = None
    """Memory that the cell may take on its device, such as 8GiB; what asks for more is out of memory. null is
    what the device has free."""
    limit_seconds: float = 600.0
    """Wall-clock limit of the cell; past it the cell is stopped and its status is timeout."""

    @property
    def train_amount(self) -> float:
        """The training budget, in its own unit; 0 takes no quality figures."""
        amounts = dict(
            zip(TRAIN_BUDGETS, (self.train_tokens, self.train_flops, self.train_seconds), strict=True)
        )
        return amounts[self.train_budget]

    def decisive(self) -> dict[str, Any]:
        """The knobs that can change a figure: not how long it may take, nor budgets that are not spent."""
        unspent = [f"train_{name}" for name in TRAIN_BUDGETS if name != self.train_budget]
        skipped = {"limit_bytes", "limit_seconds", "checkpoint_seconds", *unspent}
        younger = ("precision", "place_period", "attention_windows", "reach")  # than cells without them
        skipped.update(name for name in younger if getattr(self, name) == getattr(MeasureSpec, name))
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in skipped}


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What is modelled: a corpus, or a task that makes its own data."""

    name: str = "plays"
    params: dict[str, Any] = field(default_factory=dict)
    """Every knob of its task."""


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Where cells run, and what a job of them is given there. Decides no figure; None leaves it open."""

    name: str = "local"
    """Name of the group's entry, for people."""
    cells_per_job: int = 1
    """Cells that a job measures, one after the other; the larger, the less its start costs."""
    parallel: int | None = None
    """Jobs that run at the same time, at most."""
    partition: str | None = None
    """SLURM's."""
    address: str | None = None
    """Of a running Ray cluster."""
    gpus: int | None = None
    """Accelerators of a job: one, for one cell after the other."""
    cpus: int | None = None
    """Cores of a job."""
    memory_gib: int | None = None
    """Memory of a job on its host."""
    minutes: int | None = None
    """Time limit of a job."""


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """What decides a cell's figures. Hashed into its id, field by field."""

    variant: str
    variant_params: dict[str, Any]
    seq_len: int
    depth: int
    batch_size: int
    """Sequences in a step; 0 is as many as fit into measure.budget."""
    replicate: int
    objective: str
    device: str
    dtype: str
    activations: str
    model: ModelSpec
    data: DataSpec
    measure: MeasureSpec
    twin: int = 0
    """Above 0: the very cell again, to see by how much two measurements of the same differ."""

    @property
    def causal(self) -> bool:
        """Whether no output may read a later token: the objective's to say, or else wherever it can be."""
        if self.objective in ("clm", "mlm"):
            return self.objective == "clm"
        return variants.load(self.variant).caps.causal

    @property
    def label(self) -> str:
        """The cell in a few words, for people."""
        words = f"{self.variant} T={self.seq_len} depth={self.depth} {self.activations} #{self.replicate}"
        return f"{words} twin {self.twin}" if self.twin else words

    def attention(self) -> tuple[type[Attention], VariantConfig, Dims]:
        """The variant's class, its config and the sizes of its layers (imports torch)."""
        from variants.base import Dims

        variant = variants.load(self.variant)
        dims = Dims(
            batch_size=max(1, self.batch_size),
            seq_len=self.seq_len,
            d_model=self.model.d_model,
            heads=self.model.heads,
        )
        return variant, variant.Config.of(self.variant_params), dims

    def task(self) -> tuple[type[Task], TaskConfig, Setting]:
        """The task's class, its config and what the cell asks of it (imports torch)."""
        from bench.tasks.base import Setting

        task = tasks.load(self.data.name)
        setting = Setting(
            data=self.data.name,
            objective=self.objective,
            seq_len=self.seq_len,
            batch_size=max(1, self.batch_size),
            replicate=self.replicate,
            test_tokens=self.measure.eval_tokens if self.measure.train_amount else 0,
            test_split=self.measure.eval_split,
        )
        return task, task.Config.of(self.data.params), setting

    def cell_id(self, data_sha256: str, code_sha256: str) -> str:
        """Hash of everything that decides the figures."""
        decisive = dataclasses.asdict(self) | {"measure": self.measure.decisive()}
        if not self.twin:
            del decisive["twin"]  # younger than cells that were hashed without it
        return digest([decisive, data_sha256, code_sha256])


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell and where its record goes."""

    spec: CellSpec
    folder: Path
    name: str
    force: bool
    """Measure it though its record is final."""
    rerun: str = "none"
    """Which final records do not stand, of `RERUNS`."""
    audit_oom: float = 0.0
    """Share of the cells that are predicted to exceed their memory which run all the same."""
    skip_after_oom: bool = True
    """Leave it where a shorter cell, alike in all else, ran out of memory."""
    tracker: TrackerSpec = field(default_factory=TrackerSpec)
    """Who is told of its record."""


def digest(value: Any) -> str:
    """16 hex digits of the sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
