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
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

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
    """A folder of configs, each file of which holds plain values of knobs alone."""

    @staticmethod
    def scheme() -> str:
        """What the search path calls it."""
        return "longctx-bench"

    def load_config(self, config_path: str) -> ConfigResult:
        """Raises ConfigError for a file that holds more, or that lies outside of the folder."""
        from bench.cli import presets
        from bench.inputs.errors import ConfigError

        name = config_path.removesuffix(".yaml")
        path = Path(self.path, f"{name}.yaml")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"{name}: not allowed; a config is the name of a file under {self.path}")
        if not path.is_file():
            raise ConfigLoadError(f"Config not found : {path}")
        try:
            text = path.read_text(encoding="utf-8")
            header = self._get_header_dict(text)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name}.yaml: cannot be read: {error}") from None
        content = presets.load(name, header["package"], text)
        presets.check(name, header["package"], content)
        return ConfigResult(
            config=OmegaConf.create(content), path=self.full_path(), provider=self.provider, header=header
        )


class Composer:
    """A cell's config, without Hydra's own part, from its overrides.

    Hydra composes once for all cells that choose the same entries of the groups; what else a cell overrides
    is put into a copy. Composing each anew would take minutes for a thousand cells.
    """

    def __init__(self, loader: ConfigLoader, composed: DictConfig) -> None:
        self.loader, self.composed = loader, composed
        self.parser = OverridesParser.create(config_loader=loader)
        self.groups = {*loader.list_groups("")}
        self._known: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, job: Sequence[str]) -> DictConfig:
        """Raises what Hydra raises for overrides that cannot be."""
        choices: list[str] = []
        values: list[Override] = []
        for override, text in zip(self.parser.parse_overrides(list(job)), job, strict=True):
            plain = override.type == OverrideType.CHANGE and override.package is None
            if plain and "/" not in override.key_or_group and override.key_or_group not in self.groups:
                values.append(override)
            else:
                choices.append(text)
        copy = deepcopy(self._composed(tuple(choices)))
        try:
            for override in values:
                OmegaConf.update(copy, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return self._whole(job)  # raises what a mistake is explained by
        return copy

    def _composed(self, choices: tuple[str, ...]) -> DictConfig:
        if choices not in self._known:
            self._known[choices] = self._whole(choices)
        return self._known[choices]

    def _whole(self, job: Sequence[str]) -> DictConfig:
        parse = self.loader.load_sweep_config(self.composed, list(job))
        whole: DictConfig = OmegaConf.masked_copy(parse, [str(key) for key in parse if key != "hydra"])
        OmegaConf.set_struct(whole, True)  # as Hydra does: a knob that does not exist is refused
        return whole


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
