"""Hydra plug-in: the sweeper of the multirun mode.

All cells are composed and checked before the first cell runs.

Hydra finds plug-ins only in the namespace package `hydra_plugins`, and imports them at every start. Therefore
these classes are here, and their functions import other modules only when they run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from copy import deepcopy
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

    Hydra composes each chosen entry of a group only once; the other overrides of a cell are set in a copy of
    the result. If Hydra composed each cell, a thousand cells would take minutes.
    """

    def __init__(self, loader: ConfigLoader, composed: DictConfig) -> None:
        self.loader, self.composed = loader, composed
        self.parser = OverridesParser.create(config_loader=loader)
        self.groups = {*loader.list_groups("")}
        self._by_choices: dict[tuple[str, ...], dict[str, Any]] = {}
        self._values: dict[str, Override | None] = {}

    def __call__(self, job: Sequence[str]) -> dict[str, Any]:
        """Return the config of one cell. Raises Hydra's exception for invalid overrides."""
        values = [self._value(text) for text in job]
        choices = tuple(text for text, value in zip(job, values, strict=True) if value is None)
        config = deepcopy(self._composed(choices))
        for value in values:
            if value is not None and not _set_value(config, value.key_or_group, value.value()):
                return self._compose(job)  # a reference, or a mistake that Hydra's exception explains
        return config

    def _value(self, text: str) -> Override | None:
        """Return the override if it sets a plain value of one knob; None if it chooses an entry or adds a
        key."""
        if text not in self._values:
            (override,) = self.parser.parse_overrides([text])
            key = override.key_or_group
            is_plain = override.type == OverrideType.CHANGE and override.package is None
            self._values[text] = override if is_plain and "/" not in key and key not in self.groups else None
        return self._values[text]

    def _composed(self, choices: tuple[str, ...]) -> dict[str, Any]:
        if choices not in self._by_choices:
            self._by_choices[choices] = self._merged(choices) or self._compose(choices)
        return self._by_choices[choices]

    def _merged(self, choices: tuple[str, ...]) -> dict[str, Any] | None:
        """Merge the sections of several groups, each of which is composed separately. None if an entry
        changes more than the section of its group, or if a choice is not an entry of a group."""
        from bench.config.groups import GROUPS

        if len(choices) < 2:
            return None
        default = self._composed(())
        merged = dict(default)
        for choice in choices:
            group, single = choice.partition("=")[0], self._composed((choice,))
            if group not in GROUPS or single | {group: None} != default | {group: None}:
                return None
            merged[group] = single[group]
        return merged

    def _compose(self, job: Sequence[str]) -> dict[str, Any]:
        from bench.config import parse

        return parse.plain(self.loader.load_sweep_config(self.composed, list(job)))


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
    from bench.cli import variant_knobs
    from bench.cli.interleave import KEY, Interleave
    from bench.config import parse
    from bench.inputs.errors import ConfigError

    composer = Composer(loader, preset.composed)

    def compose(line: list[str]) -> Cell:
        return parse.parse(composer(line))

    parts: list[tuple[Interleave | None, list[tuple[Cell, list[str]]]]] = []
    default, used = str(preset.composed.variant.name), set[str]()
    for grid in preset.grids:
        lines = variant_knobs.applied(product(loader, grid, preset.arguments), default, used)
        own = [(compose(line), line) for line in lines]
        rule = Interleave.of(grid.get(KEY))
        if rule and len(product(loader, OmegaConf.create({**rule.cell}), [])) > 1:
            raise ConfigError(f"{KEY}.cell={rule.cell}: allowed is one value for each knob, without commas")
        same = next((part for known, part in parts if rule and known == rule), None)
        if same is None:
            parts.append((rule, own))
        else:  # one setting may be in several grids
            same += own
    if mistake := variant_knobs.unused(preset.arguments, used):
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
