"""From a composed Hydra config to a checked cell, or one clear line that says no.

Nothing here runs Hydra or touches the disk.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import variants
from bench import corpora, tasks, trackers
from bench.config.spec import Cell, CellSpec, ClusterSpec, DataSpec, MeasureSpec, ModelSpec
from bench.config.validate import ACTIVATIONS, DEVICES, DTYPES, RERUNS, batch_size, check_bounds, parse_bytes
from bench.inputs.errors import ConfigError, choose
from bench.inputs.paths import user_path
from bench.trackers import TrackerSpec

if TYPE_CHECKING:
    from variants.knobs import Knobs


@dataclass(frozen=True, kw_only=True)
class _Named:
    name: str = ""


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
        folder=user_path("results_dir", root.results_dir) / _name(root.name),
        name=root.name,
        force=root.force,
        rerun=root.rerun,
        audit_oom=root.audit_oom,
        skip_after_oom=root.skip_after_oom,
        tracker=_tracker(root.tracker),
    )


def _name(text: str) -> Path:
    """The experiment's folder under results_dir."""
    if not text or text.startswith(("~", "/")) or ".." in Path(text).parts:
        raise ConfigError(f"name={text!r}: allowed is a folder name under results_dir")
    return user_path("name", text)


def _tracker(spec: TrackerSpec) -> TrackerSpec:
    """The tracker, if it is one and what it needs is installed."""
    choose("tracker", spec.name, trackers.names())
    if needs := trackers.missing(spec.name):
        raise ConfigError(
            f"tracker={spec.name}: needs the package {needs}; pip install 'longctx-bench[trackers]'"
        )
    if spec.place is None or "://" in spec.place:
        return spec
    return replace(spec, place=str(user_path("tracker.place", spec.place)))


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
    for knob in sorted(known):  # a default of Root's would take its place
        if knob not in cfg or OmegaConf.is_missing(cfg, knob):
            raise ConfigError(f"{knob}: has no value; give one")
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
    words = {"Integer": "a whole number", "'int'": "a whole number", "Float": "a number"}
    words |= {"'float'": "a number", "bool": "true or false", "'str'": "text"}
    for word, noun in words.items():
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
    kinds = get_type_hints(config_class)
    for knob, value in given.items():
        choose(f"{name} knob", knob, defaults)
        if isinstance(defaults[knob], tuple) and not isinstance(value, list):
            given[knob] = [value]
        is_text = kinds[knob] in (str, str | None)
        if is_text and type(value) in (int, float):  # text that reads as a number
            given[knob] = str(value)
        elif not is_text and isinstance(value, str):  # a number that was kept as it was typed
            given[knob] = _number(value)
    try:
        return config_class.of(given).as_dict()
    except ValueError as error:  # the config's own checks
        raise ConfigError(f"{group}.{error}") from None


def _number(text: str) -> int | float | str:
    """The number that a text spells, or the text."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
