"""What a cell is: everything that decides a record's figures, plus where the record goes.

Each knob is declared here once (`variants.knobs`): the configuration's defaults, checks, help and the hash of
a cell follow from the declaration. Knobs of a variant or a task are declared beside it. The file has over
300 lines because every other declaration is here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import variants
from bench import tasks
from bench.config import chosen
from bench.inputs.sizes import parse_bytes
from bench.trackers import TrackerSpec
from variants.head_size import unusable_heads
from variants.knobs import Knobs, decisive, knob, knobs_of

if TYPE_CHECKING:
    from bench.model.slots import ModelSpec
    from bench.tasks.base import Setting, Task, TaskConfig
    from variants.base import Dims, Variant, VariantConfig, Workload

Strategy = Literal["keep", "checkpoint", "sqrt", "selective", "reversible", "offload"]
ACTIVATIONS: tuple[str, ...] = get_args(Strategy)
"""Ways of saving activation memory."""
TrainBudget = Literal["tokens", "flops", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Spec(Knobs):
    """Knobs of the harness itself. A number knob holds a float however it is written, so that 1 and 1.0 are
    one cell."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """As of every class of knobs."""
        known = knobs_of(cls)
        floats = [name for name in values if name in known and known[name].hint is float]
        read = {name: known[name].read(values[name]) for name in floats}
        exact = {name: float(value) for name, value in read.items() if type(value) is int}
        return super().of({**values, **exact})


@dataclass(frozen=True, kw_only=True)
class Root(Spec):
    """The knobs outside of any group."""

    seq_len: int = knob(1024, least=1, unit="tokens")
    """Length of a sequence."""
    depth: int = knob(2, least=1, unit="blocks")
    """Blocks of the model."""
    batch_size: int | Literal["fit"] = knob(1, least=1, unit="sequences")
    """Sequences in a step; fit is as many as fit into measure.budget."""
    replicate: int = knob(0, least=0)
    """The seed; spread comes from sweeping it."""
    twin: int = knob(0, least=0, younger=True)
    """1, 2, … measure the same cell again. By how much the measurements differ is the noise."""
    objective: str = "auto"
    """clm, mlm, a task's own, or auto: clm where the variant can be causal."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the cell runs; auto is cuda where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of parameters and activations."""
    results_dir: str = knob("results", decides=False)
    """Folder of all experiments."""
    name: str = knob("adhoc", decides=False)
    """The experiment's folder under results_dir."""
    force: bool = knob(False, decides=False)
    """Measure cells again that are finished."""
    rerun: Literal["none", "contaminated", "oom"] = knob("none", decides=False)
    """Finished cells to measure again. contaminated: those whose samples are not to be trusted. oom: those
    that ran out of memory."""
    audit_oom: float = knob(0.05, least=0, most=1, decides=False)
    """Share of the cells predicted to exceed their memory that run all the same. It checks the prediction."""
    skip_after_oom: bool = knob(True, decides=False)
    """Skip a cell if a shorter one, alike in all else, ran out of memory."""
    devices: int | Literal["all"] = knob("all", least=1, unit="devices", decides=False)
    """How many accelerators of this machine a sweep uses at the same time, one cell on each."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes(Spec):
    """The transformer around the attention."""

    size: str = "tiny"
    """Name of the group's entry, for people."""
    d_model: int = knob(64, least=2, unit="channels")
    """Width of the model."""
    heads: int = knob(2, least=1, unit="heads")
    """Attention heads of a layer; they divide d_model."""
    ff_mult: int = knob(4, least=1)
    """Width of the feed-forward layer as a multiple of d_model."""
    ff_chunks: int = knob(1, least=1, unit="pieces")
    """Pieces of the sequence that go through the feed-forward layer one at a time."""
    dropout: float = knob(0.0, least=0, below=1)
    """Probability that an activation is dropped in training."""

    def __post_init__(self) -> None:
        if reason := unusable_heads(self.d_model, self.heads):
            raise ValueError(reason)


@dataclass(frozen=True, kw_only=True)
class ActivationsSpec(Spec):
    """How activations are kept for the backward pass."""

    name: Strategy = "keep"
    """How activations are kept for the backward pass."""


@dataclass(frozen=True, kw_only=True)
class MeasureSpec(Spec):
    """Which figures are taken, and with what budget."""

    preset: str = "standard"
    """Name of the group's entry, for people."""
    execute: bool = True
    """Run the cell; false predicts FLOPs and peak memory under fake tensors and runs nothing."""
    time_seconds: float = knob(1.0, least=0, unit="seconds")
    """Wall-clock budget of the step samples, and again of the forward samples."""
    min_samples: int = knob(3, least=1, unit="samples")
    """Fewest samples of each, whatever they take."""
    precision: float = knob(0.03, least=0, younger=True)
    """Half-width of the median's 95 % interval at which sampling ends before its budget. It is relative to
    the median; 0 always spends the budget."""
    train_budget: TrainBudget = "tokens"
    """Which of the next three training may spend; the other two are not looked at. Of tokens and FLOPs whole
    steps are bought, rounded up, and the same cell repeats to the bit on a CPU. Seconds buy what the machine
    makes of them, so such a cell does not repeat."""
    train_tokens: int = knob(0, least=0, unit="tokens")
    """Tokens of training before quality is evaluated; 0 takes no quality figures."""
    train_flops: float = knob(0.0, least=0, unit="FLOPs")
    """The same in algorithmic FLOPs of the variant's own steps."""
    train_seconds: float = knob(0.0, least=0, unit="seconds")
    """The same in seconds of wall clock, checkpoints not counted."""
    eval_split: Literal["test", "validation"] = "test"
    """The documents that are scored: test or, to choose knobs by, validation."""
    eval_tokens: int = knob(0, least=0, unit="tokens")
    """Most held-out tokens to score."""
    eval_stride: int | None = knob(None, least=1, unit="tokens")
    """Tokens from one evaluated window to the next; null is seq_len, so that they lie side by side. Masked
    models read both sides and take no other."""
    history_targets: int = knob(0, least=0, unit="tokens")
    """Tokens predicted after histories of 1, 2, 4, … seq_len tokens; 0 for none. They are held out; for
    causal models alone."""
    place_period: int = knob(0, least=0, unit="tokens", younger=True)
    """Tokens of the parts of a window by the place in which the loss is also taken; 0 for none."""
    attention_windows: int = knob(0, least=0, unit="windows", younger=True)
    """Held-out windows in which attention itself is looked at after training; 0 for none. It says how its
    weights are spread and how far the layer is from what it estimates."""
    reach: bool = knob(False, younger=True)
    """Work out how far back the layers' patterns let the model look. Tasks that have answers at a distance
    always do."""
    learning_rate: float = knob(3e-3, above=0)
    """The highest, after warm-up."""
    checkpoint_seconds: float = knob(30.0, least=0, unit="seconds", decides=False)
    """Wall clock of training between checkpoints, at least. It is what a cell that is killed loses at
    most."""
    budget: int | None = knob(None, least=1, unit="bytes")
    """Memory that a training step may take, such as 80GiB. What fits into it is found by prediction."""
    limit_bytes: int | None = knob(None, least=1, unit="bytes", decides=False)
    """Memory that the cell may take on its device, such as 8GiB; null is what the device has free. A cell
    that asks for more is out of memory."""
    limit_seconds: float = knob(600.0, above=0, unit="seconds", decides=False)
    """Wall-clock limit of the cell. Past it the cell is stopped and its status is timeout."""

    def __post_init__(self) -> None:
        finite = "a finite number: training has to end"
        self.require("train_flops", self.train_flops < math.inf, finite)
        self.require("train_seconds", self.train_seconds < math.inf, finite)
        several = "0 for none, or 2 or more: one has no spread"
        self.require("history_targets", self.history_targets != 1, several)
        if given := [name for name, spent in self._amounts().items() if spent]:
            unspent = f"train_budget={self.train_budget} has nothing to spend"
            allowed = f"more than 0: {unspent}; give it, or take train_budget={given[0]}"
            self.require(f"train_{self.train_budget}", bool(self.train_amount), allowed)
        if self.train_amount:
            self.require("eval_tokens", self.eval_tokens >= 1, "1 or more tokens after training")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """As of every class of knobs; memory is written in units too."""
        memory = [name for name in ("budget", "limit_bytes") if values.get(name) is not None]
        return super().of({**values, **{name: parse_bytes(name, values[name]) for name in memory}})

    def _amounts(self) -> dict[str, float]:
        return {"tokens": self.train_tokens, "flops": self.train_flops, "seconds": self.train_seconds}

    @property
    def train_amount(self) -> float:
        """The training budget, in its own unit; 0 takes no quality figures."""
        return self._amounts()[self.train_budget]

    def decisive(self) -> dict[str, Any]:
        """The knobs that can change a figure: not budgets of training that are not spent."""
        unspent = {f"train_{name}" for name in self._amounts() if name != self.train_budget}
        values = {name: value for name, value in self.as_dict().items() if name not in unspent}
        return decisive(MeasureSpec, values)


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What is modelled: a corpus, or a task that makes its own data."""

    name: str = "plays"
    params: dict[str, Any] = field(default_factory=dict)
    """Every knob of its task."""


@dataclass(frozen=True, kw_only=True)
class ClusterSpec(Spec):
    """Where cells run, and what a job of them is given there. Decides no figure; null leaves it open."""

    name: str = knob("local", decides=False)
    """Name of the group's entry, for people."""
    cells_per_job: int = knob(1, least=1, unit="cells", decides=False)
    """Cells that a job measures, one after the other. The larger, the less its start costs."""
    parallel: int | None = knob(None, least=1, unit="jobs", decides=False)
    """Jobs that run at the same time, at most."""
    partition: str | None = knob(None, decides=False)
    """Partition of SLURM; null is its default."""
    address: str | None = knob(None, decides=False)
    """Address of a running Ray cluster; auto finds it from one of its machines, null starts Ray here."""
    gpus: int | None = knob(None, least=0, unit="devices", decides=False)
    """Accelerators of a job; null is 1, or 0 for cells on the CPU."""
    cpus: int | None = knob(None, least=1, unit="cores", decides=False)
    """Cores of a job; null leaves it open."""
    memory_gib: int | None = knob(None, least=1, unit="GiB", decides=False)
    """Memory of a job on its host."""
    minutes: int | None = knob(None, least=1, unit="minutes", decides=False)
    """Time limit of a job; null is what its cells may take by measure.limit_seconds."""


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
    model: ModelSizes
    data: DataSpec
    measure: MeasureSpec
    twin: int = 0
    """Above 0: the very cell again, to see by how much two measurements of the same differ."""

    @property
    def causal(self) -> bool:
        """Whether no output may read a later token: the objective's to say, or else wherever it can be."""
        if self.objective in ("clm", "mlm"):
            return self.objective == "clm"
        variant, config, _ = self.attention()
        return variant.info_for(config).caps.causal

    @property
    def label(self) -> str:
        """The cell in a few words, for people."""
        words = f"{self.variant} T={self.seq_len} depth={self.depth} {self.activations} #{self.replicate}"
        return f"{words} twin {self.twin}" if self.twin else words

    def attention(self) -> tuple[type[Variant], VariantConfig, Dims]:
        """The variant's class, its config and the sizes of its layers (imports torch)."""
        from variants.base import Dims

        variant = variants.load(self.variant)
        dims = Dims(
            seq_len=self.seq_len,
            d_model=self.model.d_model,
            heads=self.model.heads,
            device_type=self.device.partition(":")[0],
        )
        return variant, variant.Config.of(self.variant_params), dims

    def variants(self) -> list[str]:
        """The variants whose code decides the figures: the cell's own and, of a mixture, its members
        (imports torch)."""
        try:
            variant, config, _ = self.attention()
        except variants.BrokenVariant:
            return [self.variant]
        return [self.variant, *variant.members(config)]

    def model_spec(self) -> ModelSpec:
        """What the model is made of (imports torch)."""
        from bench.model.slots import ModelSpec

        variant, config, _ = self.attention()
        return ModelSpec.of(variant, config, ff_mult=self.model.ff_mult)

    def workload(self) -> Workload:
        """The work of one forward pass of a step (imports torch)."""
        from variants.base import Workload

        return Workload(
            batch_size=max(1, self.batch_size),
            seq_len=self.seq_len,
            d_model=self.model.d_model,
            heads=self.model.heads,
            causal=self.causal,
        )

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
        values = dataclasses.asdict(self)
        values["variant_params"] = _decisive_params("variant", self.variant, self.variant_params)
        values["data"]["params"] = _decisive_params("data", self.data.name, self.data.params)
        values["model"] = decisive(ModelSizes, values["model"])
        values["measure"] = self.measure.decisive()
        return digest([decisive(Root, values), data_sha256, code_sha256])


def _decisive_params(group: str, name: str, params: dict[str, Any]) -> dict[str, Any]:
    found = chosen.declared(group, name)
    return decisive(found.config, params) if found else params


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell and where its record goes."""

    spec: CellSpec
    folder: Path
    name: str
    force: bool
    """Measure it though its record is final."""
    rerun: str = "none"
    """Which final records do not stand: a value of `Root.rerun`."""
    audit_oom: float = 0.0
    """Share of the cells that are predicted to exceed their memory which run all the same."""
    skip_after_oom: bool = True
    """Leave it where a shorter cell, alike in all else, ran out of memory."""
    devices: int | Literal["all"] = "all"
    """How many devices the sweep may use at the same time."""
    tracker: TrackerSpec = field(default_factory=TrackerSpec)
    """Who is told of its record."""


def digest(value: Any) -> str:
    """16 hex digits of the sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
