"""Hydra's multirun mode for this harness: every cell is composed and checked before the first one runs.

Hydra finds plug-ins in the namespace package `hydra_plugins`, scans them at every start, and
instantiates them only from there; so the class lives here and imports what it needs when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class CellSweeper(Sweeper):
    """Hydra's grid sweep with one addition, `grids`: a list of parameter dictionaries whose products are
    run one after the other in each round of replicates, so that a preset can hold more than one question.

    `params` is the same with one grid. An override on the command line beats both.
    """

    def __init__(self, params: DictConfig | None = None, grids: Sequence[DictConfig] | None = None) -> None:
        self.grids: Sequence[DictConfig] = grids or [params or OmegaConf.create({})]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `sweep` needs."""
        self.loader, self.composed = hydra_context.config_loader, config

    def sweep(self, arguments: list[str]) -> Any:
        """Compose and check the cells of every grid, then run them; returns their records."""
        from bench import config, sweep

        jobs = [job for grid in self.grids for job in self._product(grid, arguments)]
        return sweep.run([config.parse(self.loader.load_sweep_config(self.composed, job)) for job in jobs])

    def _product(self, grid: DictConfig, arguments: list[str]) -> list[list[str]]:
        """The overrides of each cell of a grid."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        lines = [f"{key!s}={value}" for key, value in grid.items()] + arguments
        parser = OverridesParser.create(config_loader=self.loader)
        (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(lines), max_batch_size=None)
        return jobs
