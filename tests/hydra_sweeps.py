"""The cells that a sweep would run."""

from __future__ import annotations

from functools import cache

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from hydra_plugins.longctx_bench import cells_of, presets_of

from bench import CONFIGS
from bench.config.spec import Cell


@cache
def swept(*arguments: str) -> tuple[Cell, ...]:
    """The cells of a sweep with these overrides, in the order of its grids. They are composed once in a
    process: Hydra takes a tenth of a second for each of a preset's settings."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        composed = loader.load_configuration("config", ["hydra.mode=MULTIRUN", *arguments], RunMode.MULTIRUN)
        presets = presets_of(loader, composed, list(composed.hydra.overrides.task))
        return tuple(cell for preset in presets for cell, _ in cells_of(loader, preset))
