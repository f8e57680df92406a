"""From a composed Hydra config to a checked cell, or one clear line that says no.

A `Cell` is everything that decides a record's figures, plus where the record goes. Nothing here
runs Hydra or touches the disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import variants
from bench import corpora, tasks, trackers
from bench.checks import (
    ACTIVATIONS,
    DEVICES,
    DTYPES,
    RERUNS,
    TRAIN_BUDGETS,
    ConfigError,
    batch_size,
    check_bounds,
    choose,
    parse_bytes,
)
from bench.trackers import TrackerSpec

if TYPE_CHECKING:
    from bench.tasks.base import Setting, Task, TaskConfig
    from variants.base import Attention, Dims, Knobs, VariantConfig


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
class _Named:
    name: str = ""


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
class Root:
    """The types of the composed config; the values come from configs/."""

    seq_len: int = 1
    depth: int = 1
    batch_size: Any = 1
    replicate: int = 0
    twin: int = 0
    objective: str = "auto"
    device: str = "auto"
    dtype: str = "float32"
    results_dir: str = "results"
    name: str = "adhoc"
    force: bool = False
    rerun: str = "none"
    audit_oom: float = 0.05
    skip_after_oom: bool = True
    variant: dict[str, Any] = field(default_factory=dict)
    model: ModelSpec = field(default_factory=ModelSpec)
    activations: _Named = field(default_factory=_Named)
    data: dict[str, Any] = field(default_factory=dict)
    measure: MeasureSpec = field(default_factory=MeasureSpec)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    tracker: TrackerSpec = field(default_factory=TrackerSpec)


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


def parse(cfg: DictConfig) -> Cell:
    """A checked cell from a composed config. Raises ConfigError."""
    try:
        merged = OmegaConf.merge(_schema(Root), OmegaConf.masked_copy(cfg, _keys(cfg)))
        root = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _translated(error, cfg) from None
    assert isinstance(root, Root)
    check_bounds(root)
    choose("device", root.device, DEVICES)
    choose("dtype", root.dtype, DTYPES)
    choose("activations", root.activations.name, ACTIVATIONS)
    choose("rerun", root.rerun, RERUNS)
    measure = root.measure
    if measure.budget is not None:
        measure = replace(measure, budget=parse_bytes("measure.budget", measure.budget))
    if measure.limit_bytes is not None:
        measure = replace(measure, limit_bytes=parse_bytes("measure.limit_bytes", measure.limit_bytes))
    name, params = _variant(dict(root.variant))
    data = _data(dict(root.data))
    spec = CellSpec(
        variant=name,
        variant_params=params,
        seq_len=root.seq_len,
        depth=root.depth,
        batch_size=batch_size(root),
        replicate=root.replicate,
        twin=root.twin,
        objective=_objective(root.objective, variant=name, data=data.name),
        device=root.device if root.device != "auto" else _device(),
        dtype=root.dtype,
        activations=root.activations.name,
        model=root.model,
        data=data,
        measure=measure,
    )
    return Cell(
        spec=spec,
        folder=Path(root.results_dir) / root.name,
        name=root.name,
        force=root.force,
        rerun=root.rerun,
        audit_oom=root.audit_oom,
        skip_after_oom=root.skip_after_oom,
        tracker=_tracker(root.tracker),
    )


def _tracker(spec: TrackerSpec) -> TrackerSpec:
    """The tracker, if it is one and what it needs is installed."""
    choose("tracker", spec.name, trackers.names())
    if needs := trackers.missing(spec.name):
        raise ConfigError(
            f"tracker={spec.name}: needs the package {needs}; pip install 'longctx-bench[trackers]'"
        )
    return spec


def parse_cluster(cfg: DictConfig) -> ClusterSpec:
    """Where the cells of a composed config run; it has been through `parse`."""
    spec = OmegaConf.to_object(OmegaConf.merge(_schema(ClusterSpec), cfg.cluster))
    assert isinstance(spec, ClusterSpec)
    return spec


@cache
def _schema(dataclass_type: type[Any]) -> DictConfig:
    """The types of a frozen dataclass, open to be filled in; a merge works on a copy of it."""
    schema: DictConfig = OmegaConf.structured(dataclass_type)
    for node in [schema, *(schema._get_node(key) for key in schema)]:
        if isinstance(node, DictConfig):
            OmegaConf.set_readonly(node, None)
    return schema


def _keys(cfg: DictConfig) -> list[str]:
    known = {f.name for f in dataclasses.fields(Root)}
    unknown = [str(key) for key in cfg if key not in known and key not in {"hydra", "experiment"}]
    if unknown:
        choose("knob", unknown[0], sorted(known))
    return [str(key) for key in cfg if key in known]


def _translated(error: OmegaConfBaseException, cfg: DictConfig) -> ConfigError:
    key = error.full_key or str(error.key or "")
    value = OmegaConf.select(cfg, key, default=None) if key else None
    expected = getattr(error.ref_type, "__name__", None) or "another type"
    why = str(error.msg or error).splitlines()[0]
    if "not in" in why or "No such" in why or "unknown key" in why.lower():
        return ConfigError(f"{key}: {why}")
    return ConfigError(f"{key}={value!r}: expected {_noun(expected, why)}")


def _noun(expected: str, why: str) -> str:
    for word, noun in (("Integer", "a whole number"), ("Float", "a number"), ("bool", "true or false")):
        if word in why:
            return noun
    return {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(expected, why)


def _variant(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The variant's name and its complete knobs, defaults filled in."""
    name = str(given.pop("name", ""))
    try:
        config_class = variants.load(name).Config
    except variants.UnknownVariant as error:
        raise ConfigError(str(error)) from None
    except variants.BrokenVariant:  # the cell's to say: others of the sweep can run
        return name, given
    return name, _knobs("variant", name, config_class, given)


def _data(given: dict[str, Any]) -> DataSpec:
    """The name of a corpus or task and its complete knobs, defaults filled in."""
    name = choose("data", str(given.pop("name", "")), [*corpora.SOURCES, *tasks.names()])
    return DataSpec(name=name, params=_knobs("data", name, tasks.load(name).Config, given))


def _objective(value: str, *, variant: str, data: str) -> str:
    """One of the task's own; auto is its causal one where the variant can be causal, or cannot be asked."""
    objectives = tasks.load(data).objectives
    if value == "auto":
        with suppress(variants.BrokenVariant):
            return objectives[0 if variants.load(variant).caps.causal else -1]
        return objectives[0]
    return choose(f"{data} objective", value, ["auto", *objectives])


def _knobs(group: str, name: str, config_class: type[Knobs], given: dict[str, Any]) -> dict[str, Any]:
    """The complete knobs of the group's entry `name`, checked by its config."""
    defaults = {f.name: f.default for f in dataclasses.fields(config_class)}
    for knob, value in given.items():
        choose(f"{name} knob", knob, defaults)
        if isinstance(defaults[knob], tuple) and not isinstance(value, list):
            given[knob] = [value]
    try:
        schema = _schema(config_class)  # type: ignore[arg-type]  # takes its instances' hash for its own
        typed = OmegaConf.to_object(OmegaConf.merge(schema, given))
    except OmegaConfBaseException as error:
        translated = _translated(error, OmegaConf.create(given))
        raise ConfigError(f"{group}.{translated}") from None
    except ValueError as error:  # the config's own checks
        raise ConfigError(f"{group}.{error}") from None
    assert isinstance(typed, config_class)
    return typed.as_dict()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
