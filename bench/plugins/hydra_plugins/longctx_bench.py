"""Hydra's multirun mode for this harness: every cell is composed and checked before the first one runs.

Hydra finds plug-ins in the namespace package `hydra_plugins`, scans them at every start, and
instantiates them only from there; so the class lives here and imports what it needs when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


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

        compose = Composer(self.loader, self.composed)
        jobs = [job for grid in self.grids for job in self._product(grid, arguments)]
        return sweep.run([config.parse(compose(job)) for job in jobs])

    def _product(self, grid: DictConfig, arguments: list[str]) -> list[list[str]]:
        """The overrides of each cell of a grid."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        lines = [f"{key!s}={value}" for key, value in grid.items()] + arguments
        parser = OverridesParser.create(config_loader=self.loader)
        (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(lines), max_batch_size=None)
        return jobs
