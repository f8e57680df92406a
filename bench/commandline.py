"""What a command line may not do: have Hydra run code that it names.

Hydra makes callbacks from `_target_`, logging handlers from the names of classes, and takes up a pickled job
with --experimental-rerun; and a folder of configs from elsewhere could say all of that too. None of it is a
knob of an experiment. What is refused is refused before Hydra sees it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.checks import ConfigError

_FLAGS = ("--experimental-rerun", "--config-dir", "--config-path", "-cd", "-cp")
_ALLOWED = (
    "hydra.mode",
    "hydra.verbose",
    "hydra.output_subdir",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.job.chdir",
    "hydra.job.name",
    "hydra.launcher.",
    "hydra.sweeper.params",
    "hydra.sweeper.grids",
)
"""Settings of Hydra itself; those that end with a dot with all that lies below."""


def check(arguments: Sequence[str]) -> None:
    """Raises ConfigError for an argument that names code, a setting of Hydra that could, or a folder of
    configs that might."""
    for argument in arguments:
        name, _, _ = argument.partition("=")
        if name.startswith("-"):
            _check_flag(name)
        elif re.search(r"_(target|partial|recursive|convert|args)_", argument):
            raise ConfigError(f"{argument}: a command line does not name code; _target_ is not taken from it")
        else:
            _check_key(name.lstrip("+~"))


def _check_flag(name: str) -> None:
    # Hydra takes a beginning for the whole, so --exp is --experimental-rerun.
    if any(flag == name or (len(name) > 2 and name[1] == "-" and flag.startswith(name)) for flag in _FLAGS):
        raise ConfigError(f"{name}: not allowed; what it reads could name code to run, as configs/ does not")


def _check_key(key: str) -> None:
    key = key.partition("@")[0]
    if key != "hydra" and not key.startswith("hydra."):
        return
    if not any(key == known or (known.endswith(".") and key.startswith(known)) for known in _ALLOWED):
        allowed = ", ".join(known + "*" if known.endswith(".") else known for known in _ALLOWED)
        raise ConfigError(f"{key}: not from a command line; of Hydra's own settings allowed are {allowed}")
