"""Hydra's multirun mode for this harness: every cell is composed and checked before the first one runs.

Hydra finds plug-ins in the namespace package `hydra_plugins`, scans them at every start, and
instantiates them only from there; so the class lives here and imports what it needs when it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

IN_THIS_PROCESS = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
"""Hydra's own launcher; the cells go to any other one as jobs."""


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
        config = self.loader.load_sweep_config(self.composed, list(job))
        whole: DictConfig = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        OmegaConf.set_struct(whole, True)  # as Hydra does: a knob that does not exist is refused
        return whole


class CellSweeper(Sweeper):
    """Hydra's grid sweep with two additions. `grids` is a list of parameter dictionaries whose products are
    run one after the other in each round of replicates, so that a preset can hold more than one question;
    `params` is the same with one grid, and an override on the command line beats both. And cells that are
    finished are not handed to the launcher, where one is chosen.
    """

    def __init__(self, params: DictConfig | None = None, grids: Sequence[DictConfig] | None = None) -> None:
        self.grids: Sequence[DictConfig] = grids or [params or OmegaConf.create({})]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `sweep` needs."""
        self.context, self.composed = hydra_context, config

    def sweep(self, arguments: list[str]) -> Any:
        """Compose and check the cells of every grid, then run them; returns their records."""
        from bench import cluster, config, sweep
        from bench.spec import ClusterSpec

        loader = self.context.config_loader
        compose = Composer(loader, self.composed)
        overrides = [line for grid in self.grids for line in product(loader, grid, arguments)]
        cells = [config.parse(compose(line)) for line in overrides]
        if self.composed.hydra.launcher._target_ == IN_THIS_PROCESS:
            return sweep.run(cells)

        def launch(knobs: ClusterSpec, jobs: list[list[str]]) -> list[list[str] | Exception]:
            task = cluster.CellsOfJob(self.context.config_loader, self.composed, Path.cwd())
            return self._launch(task, knobs, jobs)

        return cluster.run(cells, overrides, config.parse_cluster(self.composed), launch)

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


def product(loader: ConfigLoader, grid: DictConfig, arguments: list[str]) -> list[list[str]]:
    """The overrides of each cell of a grid."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    lines = [f"{key!s}={value}" for key, value in grid.items()] + arguments
    parser = OverridesParser.create(config_loader=loader)
    (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(lines), max_batch_size=None)
    return jobs


def _failure(job: Any) -> Exception:
    """What a job failed of; Hydra's JobReturn keeps the exception as what it returned."""
    return job._return_value if isinstance(job._return_value, Exception) else RuntimeError(str(job.status))
