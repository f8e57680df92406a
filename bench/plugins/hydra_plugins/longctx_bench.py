"""Hydra's parts of this harness: where its configs are read, and its multirun mode.

Every file of configs/ is checked as Hydra loads it, and every cell is composed and checked before the first
one runs.

Hydra finds plug-ins in the namespace package `hydra_plugins`, scans them at every start, and
instantiates them only from there; so the class lives here and imports what it needs when it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

IN_THIS_PROCESS = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
"""Hydra's own launcher; the cells go to any other one as jobs."""


class CheckedConfigs(SearchPathPlugin):
    """Has the files of configs/, and of no other folder, read by `CheckedSource`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Change the way in which the folder is read, not the order of the search path."""
        from bench import CONFIGS

        for element in search_path.get_path():
            if element.provider == "main" and element.path.removeprefix("file://") == str(CONFIGS):
                element.path = f"{CheckedSource.scheme()}://{CONFIGS}"


class CheckedSource(FileConfigSource):
    """A folder of configs, each file of which holds plain values of knobs alone, and the entries of groups
    that follow from declarations (`bench.config.groups`)."""

    @staticmethod
    def scheme() -> str:
        """What the search path calls it."""
        return "longctx-bench"

    def load_config(self, config_path: str) -> ConfigResult:
        """Raises ConfigError for a file that holds more, or that lies outside of the folder."""
        from bench.cli import presets
        from bench.config import groups

        name = config_path.removesuffix(".yaml")
        group, _, entry = name.rpartition("/")
        path = self._file(name)
        text = presets.read(name, path) if path else ""
        if path is None and entry not in groups.entries(group):
            raise ConfigLoadError(f"Config not found : {Path(self.path, name)}.yaml")
        header = self._get_header_dict(text)
        content = presets.load(name, header["package"], text)
        presets.check(name, header["package"], content)
        if header["package"] is None:
            content = groups.completed(group, entry, content)
        return ConfigResult(
            config=OmegaConf.create(content), path=self.full_path(), provider=self.provider, header=header
        )

    def is_group(self, config_path: str) -> bool:
        """Whether there is a folder or a declared group of this name."""
        from bench.config.groups import GROUPS

        return config_path in GROUPS or super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        """Whether there is a file or a declared entry of this name."""
        from bench.config import groups

        group, _, entry = config_path.removesuffix(".yaml").rpartition("/")
        return entry in groups.entries(group) or super().is_config(config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The names of files, folders and declared entries in a folder, sorted."""
        from bench.config import groups

        is_folder = super().is_group(config_path)
        found = {*super().list(config_path, results_filter)} if is_folder else set()
        if results_filter in (None, ObjectType.CONFIG):
            found |= {*groups.entries(config_path)}
        if results_filter in (None, ObjectType.GROUP) and not config_path:
            found |= {*groups.GROUPS}
        return sorted(found)

    def _file(self, name: str) -> Path | None:
        """The file of a config, if it has one. Raises ConfigError for one outside of the folder."""
        from bench.config.groups import file_beside
        from bench.inputs.errors import ConfigError

        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"{name}: not allowed; a config is the name of a file under {self.path}")
        path = Path(self.path, f"{name}.yaml")
        group, _, entry = name.rpartition("/")
        return path if path.is_file() else file_beside(group, entry)


class Composer:
    """A cell's config in plain types, without Hydra's own part, from its overrides.

    Hydra composes once for each entry that cells choose of a group; what else a cell overrides is put into a
    copy. Composing each cell anew would take minutes for a thousand of them.
    """

    def __init__(self, loader: ConfigLoader, composed: DictConfig) -> None:
        self.loader, self.composed = loader, composed
        self.parser = OverridesParser.create(config_loader=loader)
        self.groups = {*loader.list_groups("")}
        self._known: dict[tuple[str, ...], dict[str, Any]] = {}
        self._values: dict[str, Override | None] = {}

    def __call__(self, job: Sequence[str]) -> dict[str, Any]:
        """Raises what Hydra raises for overrides that cannot be."""
        values = [self._value(text) for text in job]
        choices = tuple(text for text, value in zip(job, values, strict=True) if value is None)
        made = deepcopy(self._composed(choices))
        for value in values:
            if value is not None and not _put(made, value.key_or_group, value.value()):
                return self._whole(job)  # a reference or a mistake, which Hydra explains
        return made

    def _value(self, text: str) -> Override | None:
        """The override, if it gives one knob a plain value; None if it chooses or adds something."""
        if text not in self._values:
            (override,) = self.parser.parse_overrides([text])
            key = override.key_or_group
            is_plain = override.type == OverrideType.CHANGE and override.package is None
            self._values[text] = override if is_plain and "/" not in key and key not in self.groups else None
        return self._values[text]

    def _composed(self, choices: tuple[str, ...]) -> dict[str, Any]:
        if choices not in self._known:
            self._known[choices] = self._joined(choices) or self._whole(choices)
        return self._known[choices]

    def _joined(self, choices: tuple[str, ...]) -> dict[str, Any] | None:
        """The sections of several groups put together, each composed alone; None where an entry changes more
        than the section of its group, or something else than entries is chosen."""
        from bench.config.groups import GROUPS

        if len(choices) < 2:
            return None
        without = self._composed(())
        joined = dict(without)
        for choice in choices:
            group, alone = choice.partition("=")[0], self._composed((choice,))
            if group not in GROUPS or alone | {group: None} != without | {group: None}:
                return None
            joined[group] = alone[group]
        return joined

    def _whole(self, job: Sequence[str]) -> dict[str, Any]:
        from bench.config import parse

        return parse.plain(self.loader.load_sweep_config(self.composed, list(job)))


def _put(config: dict[str, Any], key: str, value: Any) -> bool:
    """Give a knob that is there another value; False where Hydra has to see to it: the knob is not there,
    holds other knobs, or the value refers to something."""
    *sections, name = key.split(".")
    holder: Any = config
    for section in sections:
        holder = holder.get(section) if isinstance(holder, dict) else None
    if not isinstance(holder, dict) or name not in holder:
        return False
    if isinstance(holder[name], dict) or isinstance(value, dict) or "${" in str(value):
        return False
    holder[name] = value
    return True


class CellSweeper(Sweeper):
    """Hydra's grid sweep with three additions. `grids` is a list of parameter dictionaries whose products are
    run one after the other in each round of replicates, so that a preset can hold more than one question;
    `params` is the same with one grid, and an override on the command line beats both. A sweep over presets
    runs the whole of each. And cells that are finished are not handed to the launcher, where one is chosen.
    """

    def __init__(self, params: DictConfig | None = None, grids: Sequence[DictConfig] | None = None) -> None:
        self.grids = grids_of(params, grids)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `sweep` needs."""
        self.context, self.composed = hydra_context, config

    def sweep(self, arguments: list[str]) -> Any:
        """Compose and check the cells of every grid, then run them; returns their records."""
        from bench.config import parse
        from bench.config.spec import ClusterSpec
        from bench.run import cluster, sweep

        loader = self.context.config_loader
        cells, overrides = [], []
        for preset in self._presets(arguments):
            compose = Composer(loader, preset.composed)
            lines = [line for grid in preset.grids for line in product(loader, grid, preset.arguments)]
            cells += [parse.parse(compose(line)) for line in lines]
            overrides += lines
        if self.composed.hydra.launcher._target_ == IN_THIS_PROCESS:
            return sweep.run(cells)

        def launch(knobs: ClusterSpec, jobs: list[list[str]]) -> list[list[str] | Exception]:
            task = cluster.CellsOfJob(self.context.config_loader, self.composed, Path.cwd())
            return self._launch(task, knobs, jobs)

        return cluster.run(cells, overrides, parse.parse_cluster(self.composed), launch)

    def _presets(self, arguments: list[str]) -> Iterator[Preset]:
        """What is swept: one preset, or none, or each of those that the sweep is over with its own grids."""
        loader = self.context.config_loader
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
        swept = {o.key_or_group: o for o in parsed if o.is_sweep_override()}.get("experiment")
        if swept is None:
            yield Preset(self.composed, self.grids, arguments)
            return
        others = [text for override, text in zip(parsed, arguments, strict=True) if override is not swept]
        for choice in swept.sweep_string_iterator():
            chosen = [f"experiment={choice}", *others]
            settings = [*self.composed.hydra.overrides.hydra, *chosen]
            name = self.composed.hydra.job.config_name
            composed = loader.load_configuration(name, settings, RunMode.MULTIRUN)
            sweeper = composed.hydra.sweeper
            yield Preset(composed, grids_of(sweeper.params, sweeper.grids), chosen)

    def _launch(self, task: TaskFunction, knobs: Any, jobs: list[list[str]]) -> list[list[str] | Exception]:
        """Have the chosen launcher, to which the knobs are known, call the task for each job."""
        from hydra.core.plugins import Plugins
        from hydra.core.utils import JobStatus

        chosen = self.composed.copy()
        with read_write(chosen), open_dict(chosen):
            chosen.cluster = dataclasses.asdict(knobs)
        launcher = Plugins.instance().instantiate_launcher(self.context, task, chosen)
        ended = launcher.launch(jobs, initial_job_idx=0)
        return [job._return_value if job.status is JobStatus.COMPLETED else _failure(job) for job in ended]


class Preset(NamedTuple):
    """What a sweep runs of one preset."""

    composed: DictConfig
    """The config of the sweep."""
    grids: Sequence[DictConfig]
    arguments: list[str]
    """The overrides of the command line."""


def grids_of(params: DictConfig | None, grids: Sequence[DictConfig] | None) -> Sequence[DictConfig]:
    """The grids that a sweeper's settings ask for."""
    return grids or [params or OmegaConf.create({})]


def product(loader: ConfigLoader, grid: DictConfig, arguments: list[str]) -> list[list[str]]:
    """The overrides of each cell of a grid. Raises ConfigError for a line of the grid that is not allowed."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    from bench.cli import overrides

    parser = OverridesParser.create(config_loader=loader)
    as_given = OmegaConf.to_container(grid, resolve=False)
    assert isinstance(as_given, dict)
    lines = [overrides.as_typed(f"{key!s}={value}") for key, value in as_given.items()]
    swept = parser.parse_overrides(lines)
    for override in swept:
        overrides.check(override)
        overrides.check_swept(override)
    given = parser.parse_overrides(arguments)
    (jobs,) = BasicSweeper.split_arguments([*swept, *given], max_batch_size=None)
    return jobs


def _failure(job: Any) -> Exception:
    """What a job failed of; Hydra's JobReturn keeps the exception as what it returned."""
    return job._return_value if isinstance(job._return_value, Exception) else RuntimeError(str(job.status))
