"""Hydra plug-in: the sweeper of the multirun mode.

All cells are composed and checked before the first cell runs.

Hydra finds plug-ins only in the namespace package `hydra_plugins`, and imports them at every start. Therefore
these classes are here, and their functions import other modules only when they run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

if TYPE_CHECKING:
    from bench.config.spec import Cell

IN_THIS_PROCESS = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
"""Hydra's default launcher. With it, cells run in this process; to any other launcher they are given as
jobs."""


class Composer:
    """Composes the config of a cell from its overrides, in plain types and without Hydra's own settings.

    Hydra composes the preset, once as it is and once without each group of which cells choose entries. These
    entries and the other values of a cell are put into a copy of the result. If Hydra composed each cell, a
    thousand cells would take minutes.
    """

    def __init__(self, loader: ConfigLoader, composed: DictConfig) -> None:
        from bench.config.groups import GROUPS

        self.loader, self.composed = loader, composed
        self.parser = OverridesParser.create(config_loader=loader)
        self.groups, self.replaceable = {*loader.list_groups("")}, {*GROUPS}
        self.parse, self.compose = cache(self._parse), cache(self._compose)
        self.entry, self.section = cache(self._entry), cache(self._section)

    def __call__(self, job: Sequence[str]) -> dict[str, Any]:
        """Return the config of one cell. Raises Hydra's exception for invalid overrides."""
        entries, values, others = dict[str, str](), list[Override](), list[str]()
        for text in job:
            override = self.parse(text)
            if override is None:
                others.append(text)
            elif override.key_or_group in self.replaceable:
                entries[override.key_or_group] = str(override.value())
            else:
                values.append(override)
        sections = {group: self.section(tuple(others), group, name) for group, name in entries.items()}
        config = deepcopy(self.compose(*others).config | sections)
        is_set = all(_set_value(config, override.key_or_group, override.value()) for override in values)
        # what is neither an entry nor a value is a reference, or a mistake that Hydra's exception explains
        return config if is_set and None not in sections.values() else self.compose(*job).config

    def _parse(self, text: str) -> Override | None:
        """Return the override if it chooses an entry of a group in `GROUPS`, or sets a plain value of one
        knob; None if only Hydra knows what it does."""
        (override,) = self.parser.parse_overrides([text])
        key = override.key_or_group
        if override.type != OverrideType.CHANGE or override.package is not None or "/" in key:
            return None
        if key in self.groups:
            return override if key in self.replaceable and isinstance(override.value(), str) else None
        return override

    def _section(self, others: tuple[str, ...], group: str, name: str) -> dict[str, Any] | None:
        """Return the section of a group with the entry of this name. None if Hydra must compose it: there is
        no such entry, or an entry that is chosen changes more than the section of its group."""
        base = self.compose(*others)
        chosen = {key: self.entry(key, base.choices[key]) for key in self.replaceable}
        own, default = self.entry(group, name), chosen[group]
        if own is None or default is None or None in chosen.values():
            return None
        changes = self.compose(*others, f"~{group}").config.get(group, {})
        return own | changes if default | changes == base.config[group] else None

    def _entry(self, group: str, name: str) -> dict[str, Any] | None:
        """Return the content of a group's entry. None if there is no such entry, or if it may change more
        than the section of its group."""
        path = f"{group}/{name}"
        source = next((source for source in self.loader.get_sources() if source.is_config(path)), None)
        found = source.load_config(f"{path}.yaml") if source else None
        if found is None or found.header["package"] is not None or "defaults" in found.config:
            return None
        content = OmegaConf.to_container(found.config)
        assert isinstance(content, dict)  # see presets.check
        return {str(key): value for key, value in content.items()}

    def _compose(self, *job: str) -> _Composed:
        from bench.config import parse

        config = self.loader.load_sweep_config(self.composed, [*job])
        return _Composed(parse.plain(config), dict(config.hydra.runtime.choices))


class _Composed(NamedTuple):
    """A config that Hydra composed."""

    config: dict[str, Any]
    """In plain types, without Hydra's own settings."""
    choices: Mapping[str, str]
    """The entry of each group."""


def _set_value(config: dict[str, Any], key: str, value: Any) -> bool:
    """Set the value of an existing knob. Returns False if Hydra must do it: the knob does not exist or is a
    section, or the value is a mapping or contains a reference."""
    *sections, name = key.split(".")
    section: Any = config
    for part in sections:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict) or name not in section:
        return False
    if isinstance(section[name], dict) or isinstance(value, dict) or "${" in str(value):
        return False
    section[name] = value
    return True


class CellSweeper(Sweeper):
    """Hydra's grid sweep with three additions.

    - `grids` is a list of parameter dictionaries. Their products run one after the other in each round of
      replicates, so that a preset can contain several questions. `params` is a single grid. Overrides on the
      command line have priority over both. With the key `interleave` of a grid, a baseline is measured
      between its cells (`bench.cli.interleave`).
    - A sweep over presets runs all grids of each preset.
    - Finished cells are not given to the launcher.
    """

    def __init__(self, params: DictConfig | None = None, grids: Sequence[DictConfig] | None = None) -> None:
        """The arguments are read from the config of each preset (`Preset.of`)."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the arguments for `sweep`."""
        self.context, self.composed = hydra_context, config

    def sweep(self, arguments: list[str]) -> Any:
        """Compose and check the cells of every grid, then run them; returns their records."""
        from bench.config import parse
        from bench.config.spec import ClusterSpec
        from bench.run import cluster, sweep

        loader = self.context.config_loader
        presets = presets_of(loader, self.composed, arguments)
        placed = [pair for preset in presets for pair in cells_of(loader, preset)]
        cells, overrides = [cell for cell, _ in placed], [line for _, line in placed]
        is_estimated = bool(cells and cells[0].estimate)
        if is_estimated or self.composed.hydra.launcher._target_ == IN_THIS_PROCESS:
            return sweep.run(cells)

        def launch(knobs: ClusterSpec, jobs: list[list[str]]) -> list[list[str] | Exception]:
            task = cluster.CellsOfJob(self.context.config_loader, self.composed, Path.cwd())
            return self._launch(task, knobs, jobs)

        return cluster.run(cells, overrides, parse.parse_cluster(self.composed), launch)

    def _launch(self, task: TaskFunction, knobs: Any, jobs: list[list[str]]) -> list[list[str] | Exception]:
        """Call the task for each job through the chosen launcher, whose options refer to the knobs."""
        from hydra.core.plugins import Plugins
        from hydra.core.utils import JobStatus

        chosen = self.composed.copy()
        with read_write(chosen), open_dict(chosen):
            chosen.cluster = dataclasses.asdict(knobs)
        launcher = Plugins.instance().instantiate_launcher(self.context, task, chosen)
        ended = launcher.launch(jobs, initial_job_idx=0)
        return [job._return_value if job.status is JobStatus.COMPLETED else _failure(job) for job in ended]


class Preset(NamedTuple):
    """The part of a sweep that one preset defines."""

    composed: DictConfig
    """The config of the sweep."""
    grids: Sequence[DictConfig]
    arguments: Sequence[str]
    """The overrides of the command line."""

    @classmethod
    def of(cls, composed: DictConfig, arguments: Sequence[str]) -> Preset:
        """Return a preset with the grids of its config."""
        sweeper = composed.hydra.sweeper
        return cls(composed, sweeper.grids or [sweeper.params or OmegaConf.create({})], arguments)


def presets_of(loader: ConfigLoader, composed: DictConfig, arguments: Sequence[str]) -> Iterator[Preset]:
    """Yield the config of a sweep with these overrides, or for a sweep over presets that of each, with their
    grids."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*arguments])
    swept = {o.key_or_group: o for o in parsed if o.is_sweep_override()}.get("experiment")
    if swept is None:
        yield Preset.of(composed, arguments)
        return
    others = [text for override, text in zip(parsed, arguments, strict=True) if override is not swept]
    for choice in swept.sweep_string_iterator():
        chosen = [f"experiment={choice}", *others]
        settings = [*composed.hydra.overrides.hydra, *chosen]
        name = composed.hydra.job.config_name
        yield Preset.of(loader.load_configuration(name, settings, RunMode.MULTIRUN), chosen)


def cells_of(loader: ConfigLoader, preset: Preset) -> list[tuple[Cell, list[str]]]:
    """Return the cells of all grids of a preset, in order, each with its overrides. Raises ConfigError."""
    from bench.cli import entry_knobs
    from bench.cli.interleave import KEY, Interleave
    from bench.config import parse
    from bench.inputs.errors import ConfigError

    composer = Composer(loader, preset.composed)

    @cache
    def parsed(*line: str) -> Cell:
        return parse.parse(composer(line))

    def compose(line: Sequence[str]) -> Cell:
        return parsed(*line)

    parts: list[tuple[Interleave | None, list[tuple[Cell, list[str]]]]] = []
    defaults = {group: str(preset.composed[group].name) for group in entry_knobs.GROUPS}
    used = set[str]()
    for grid in preset.grids:
        lines = entry_knobs.applied(product(loader, grid, preset.arguments), defaults, used)
        own = [(compose(line), line) for line in lines]
        rule = Interleave.of(grid.get(KEY))
        if rule and len(product(loader, OmegaConf.create({**rule.cell}), [])) > 1:
            raise ConfigError(f"{KEY}.cell={rule.cell}: allowed is one value for each knob, without commas")
        same = next((part for known, part in parts if rule and known == rule), None)
        if same is None:
            parts.append((rule, own))
        else:  # one setting may be in several grids
            same += own
    if mistake := entry_knobs.unused(preset.arguments, used):
        raise ConfigError(mistake)
    return [pair for rule, part in parts for pair in (rule.apply(part, compose) if rule else part)]


def product(loader: ConfigLoader, grid: DictConfig, arguments: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each cell of a grid, without those that it interleaves. Raises ConfigError for
    a line that is not allowed."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    from bench.cli import interleave, overrides

    parser = OverridesParser.create(config_loader=loader)
    values = OmegaConf.to_container(grid, resolve=False)
    assert isinstance(values, dict)
    lines = [overrides.quote_text(f"{k!s}={v}") for k, v in values.items() if k != interleave.KEY]
    swept = parser.parse_overrides(lines)
    for override in swept:
        overrides.check(override)
        overrides.check_swept(override)
    fixed = parser.parse_overrides([*arguments])
    (jobs,) = BasicSweeper.split_arguments([*swept, *fixed], max_batch_size=None)
    return jobs


def _failure(job: Any) -> Exception:
    """Return the exception of a failed job, which Hydra's JobReturn stores as the return value."""
    return job._return_value if isinstance(job._return_value, Exception) else RuntimeError(str(job.status))
