"""From a composed Hydra config to a checked cell, or one clear line that says no.

Nothing here runs Hydra or touches the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import variants
from bench import corpora, tasks, trackers
from bench.config.groups import GROUPS, RENAMED, SECTIONS
from bench.config.spec import (
    ActivationsSpec,
    Cell,
    CellSpec,
    ClusterSpec,
    DataSpec,
    MeasureSpec,
    ModelSizes,
    Root,
    SlotChoice,
)
from bench.inputs.errors import ConfigError, choose
from bench.inputs.paths import user_path
from bench.trackers import TrackerSpec
from variants.knobs import Knobs, knobs_of
from variants.slots import FEED_FORWARD, STACK, Slot

K = TypeVar("K", bound=Knobs)
_NOT_OF_A_CELL = ("hydra", "experiment")
_version = cache(version)  # each call reads the package's description


def parse(cfg: DictConfig | Mapping[str, Any]) -> Cell:
    """A checked cell from a composed config. Raises ConfigError."""
    given = _complete(plain(cfg) if isinstance(cfg, DictConfig) else cfg)
    root = _knobs("", Root, {knob: given[knob] for knob in knobs_of(Root)})
    measure = _section(given, "measure", MeasureSpec)
    _check_stride(measure, root)
    device = root.device if root.device != "auto" else "cuda" if measure.card else _device()
    _check_card(measure, device, root.dtype)
    name, params = _variant(_mapping(given, "variant"))
    data = _data(_mapping(given, "data"))
    stack = _slot(STACK, _mapping(given, STACK.group))
    _section(given, "cluster", ClusterSpec)
    spec = CellSpec(
        variant=name,
        variant_params=params,
        seq_len=root.seq_len,
        depth=root.depth,
        batch_size=_batch_size(root, measure),
        replicate=root.replicate,
        twin=root.twin,
        compile=root.compile,
        objective=_objective(root.objective, variant=name, params=params, data=data.name, stack=stack),
        device=device,
        dtype=root.dtype,
        activations=_section(given, "activations", ActivationsSpec).name,
        model=_section(given, "model", ModelSizes),
        data=data,
        measure=measure,
        feed_forward=_slot(FEED_FORWARD, _mapping(given, FEED_FORWARD.group)),
        stack=stack,
    )
    _check_model(spec)
    _check_vocabulary(spec)
    return Cell(
        spec=spec,
        folder=user_path("results_dir", root.results_dir) / _name(root.name),
        name=root.name,
        force=root.force,
        rerun=root.rerun,
        remeasure=root.remeasure,
        audit_oom=root.audit_oom,
        skip_after_oom=root.skip_after_oom,
        devices=root.devices,
        report_minutes=root.report_minutes,
        estimate=root.estimate,
        tracker=_tracker(_section(given, "tracker", TrackerSpec)),
    )


def parse_cluster(cfg: DictConfig) -> ClusterSpec:
    """Where the cells of a composed config run; it has been through `parse`."""
    return _section(plain(cfg), "cluster", ClusterSpec)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A cell's part of a composed config, in plain types. Raises ConfigError for a reference to nothing."""
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in _NOT_OF_A_CELL])
    try:
        return {str(key): value for key, value in OmegaConf.to_container(own, resolve=True).items()}  # type: ignore[union-attr]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error.msg or error).splitlines()[0]}") from None


def _complete(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The same, if it holds every knob outside of a group and every section, and nothing else."""
    known = sorted({*knobs_of(Root), *GROUPS, *SECTIONS})
    for key in cfg:
        choose("knob", key, known)
    for knob in known:  # a default would take its place
        if cfg.get(knob, "???") == "???":
            raise ConfigError(f"{knob}: has no value; give one")
    return dict(cfg)


def _mapping(given: dict[str, Any], section: str) -> dict[str, Any]:
    value = given[section]
    if not isinstance(value, dict):
        raise ConfigError(f"{section}={value}: allowed are knobs and their values")
    return dict(value)


def _section(given: dict[str, Any], section: str, config: type[K]) -> K:
    return _knobs(section, config, _mapping(given, section))


def _knobs(section: str, config: type[K], given: Mapping[str, Any]) -> K:
    """The complete knobs of a section, checked by their class."""
    for name in given:
        if new := RENAMED.get(key := f"{section}.{name}"):
            raise ConfigError(f"{key}: unknown knob; it is now {new}")
    try:
        return config.of(given)
    except ValueError as error:
        raise ConfigError(f"{section}.{error}" if section else str(error)) from None


def _check_stride(measure: MeasureSpec, root: Root) -> None:
    if measure.eval_stride is not None and measure.eval_stride > root.seq_len:
        allowed = f"1 to seq_len={root.seq_len}, or null for windows side by side"
        raise ConfigError(f"measure.eval_stride={measure.eval_stride}: allowed is {allowed}")


def _batch_size(root: Root, measure: MeasureSpec) -> int:
    """Sequences, or 0 for as many as fit."""
    if root.step_tokens is not None:
        return _sequences(root.step_tokens, root)
    if root.batch_size != "fit":
        return root.batch_size
    if measure.budget is None:
        raise ConfigError("batch_size=fit: needs measure.budget, such as measure.budget=8GiB")
    return 0


def _sequences(step_tokens: int, root: Root) -> int:
    """The number of sequences that have this many tokens together."""
    if root.batch_size != Root.batch_size:
        raise ConfigError(f"step_tokens={step_tokens}: takes the place of batch_size={root.batch_size}")
    sequences, rest = divmod(step_tokens, root.seq_len)
    if rest or not sequences:
        raise ConfigError(
            f"step_tokens={step_tokens}: allowed are multiples of seq_len={root.seq_len}, "
            "or null for batch_size sequences"
        )
    return sequences


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
    if spec.place is not None and spec.name == trackers.NONE:
        raise ConfigError(f"tracker.place={spec.place!r}: tracker=none keeps nothing; choose a tracker")
    if spec.place is None or "://" in spec.place:
        return spec
    return replace(spec, place=str(user_path("tracker.place", spec.place)))


def _variant(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The variant's name and its complete knobs, defaults filled in."""
    name = str(given.pop("name", ""))
    try:
        outline = _outline(name)  # without torch
        config = outline.config if outline else variants.load(name).Config
        return name, _knobs("variant", config, given).as_dict()
    except variants.UnknownVariant as error:
        raise ConfigError(str(error)) from None
    except variants.BrokenVariant:  # the cell's to say: others of the sweep can run
        return name, given


@cache
def _outline(name: str) -> variants.Outline | None:
    """Return the outline of a variant, which is read once for all cells of a sweep."""
    return variants.outline(name)


def _slot(slot: Slot[Any], given: dict[str, Any]) -> SlotChoice:
    """Return the entry of a slot and its complete knobs, defaults filled in."""
    name = choose(slot.group, str(given.pop("name", "")), slot.names())
    try:
        declared = slot.declared(name)
        config = declared.config if declared.complete else slot.load(name).Config
        return SlotChoice(name=name, params=_knobs(slot.group, config, given).as_dict())
    except variants.BrokenVariant:  # the cell reports it: others of the sweep can run
        return SlotChoice(name=name, params=given)


def _check_model(spec: CellSpec) -> None:
    """Raise ConfigError for a model that cannot be built."""
    # equal pre-norm blocks in a stack are allowed for every depth and strategy
    unusual = spec.model.widen_feed_forward or spec.model.norm_position != ModelSizes.norm_position
    if _outline(spec.variant) and spec.stack.name == STACK.default and not unusual:
        return
    try:
        model = spec.model_spec()
    except variants.BrokenVariant:  # reported by the cell
        return
    except ValueError as error:
        raise ConfigError(f"model.widen_feed_forward=true: {error}") from None
    if reason := model.conflict(spec.depth, spec.activations):
        raise ConfigError(reason)


def _check_vocabulary(spec: CellSpec) -> None:
    """Raise ConfigError for a vocabulary of the model in which the data does not fit."""
    if spec.model.vocab_size is None:
        return
    _, config, _ = spec.task()
    try:
        needed = config.vocabulary
    except corpora.CorpusError:  # reported by the cell
        return
    if spec.model.vocab_size < needed:
        allowed = f"null, or {needed:,} or more, for the tokens of data={spec.data.name} and the mask"
        raise ConfigError(f"model.vocab_size={spec.model.vocab_size}: allowed is {allowed}")


def _data(given: dict[str, Any]) -> DataSpec:
    """The name of a corpus or task and its complete knobs, defaults filled in."""
    name = choose("data", str(given.pop("name", "")), [*corpora.SOURCES, *tasks.names()])
    return DataSpec(name=name, params=_knobs("data", tasks.load(name).Config, given).as_dict())


def _objective(value: str, *, variant: str, params: dict[str, Any], data: str, stack: SlotChoice) -> str:
    """One of the task's own; auto is its causal one where the variant and the depth schedule can be causal,
    or cannot be asked."""
    objectives = tasks.load(data).objectives
    if value == "auto":
        with suppress(variants.BrokenVariant):
            schedule = STACK.load(stack.name) if stack.name != STACK.default else None
            if schedule and schedule.no_form(schedule.Config.of(stack.params), causal=True):
                return objectives[-1]
        if outline := _outline(variant):
            return objectives[0 if outline.causal else -1]
        with suppress(variants.BrokenVariant):
            loaded = variants.load(variant)
            caps = loaded.info_for(loaded.Config.of(params)).caps
            return objectives[0 if caps.causal else -1]
        return objectives[0]
    return choose(f"{data} objective", value, ["auto", *objectives])


def _check_card(measure: MeasureSpec, device: str, dtype: str) -> None:
    """An estimate needs the work as it is cut for the card, in the numbers of its data sheet."""
    if measure.card and device != "cuda":
        raise ConfigError(f"measure.card={measure.card}: needs device=cuda or auto, not {device}")
    if measure.card and dtype != "bfloat16":
        raise ConfigError(f"measure.card={measure.card}: needs dtype=bfloat16, not {dtype}")


def _device() -> str:
    if _version("torch").endswith("+cpu"):  # a build without CUDA: importing it would say the same
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
