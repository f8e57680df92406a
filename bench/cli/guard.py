"""What a command line may not do: have Hydra read files of configs from elsewhere, or run code that it names.

Hydra makes callbacks from `_target_`, logging handlers from the names of classes, and takes up a pickled job
with --experimental-rerun; and a folder of configs from elsewhere could say all of that too. None of it is a
knob of an experiment. What is refused is refused before Hydra sees it: options as Hydra's own parser of
arguments reads them, overrides as its own grammar does.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from bench.cli import overrides
from bench.inputs.errors import ConfigError

_READS = ("experimental_rerun", "config_dir", "config_path", "config_name")
"""Options that name something to read."""
_COMPLETION = re.compile(r"(install|uninstall|query)=(bash|fish|zsh)")


def checked(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra is to have them: text as it was typed, in quotes where Hydra would spell it in
    another way. Raises ConfigError for what is not allowed, and what Hydra raises for what cannot be read."""
    for argument in arguments:
        if not argument.isascii() and argument != argument.encode(errors="replace").decode():
            raise ConfigError(f"{argument!a}: not UTF-8")
    given = options(arguments)
    if given.shell_completion:
        return list(arguments)
    typed = {text: overrides.as_typed(text) for text in given.overrides}
    for override in OverridesParser.create().parse_overrides([*typed.values()]):
        overrides.check(override)
    return [typed.get(argument, argument) for argument in arguments]


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments as Hydra's own parser reads them. Raises ConfigError for options that are not allowed."""
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]  # which prints pages, and then exits
    options = parser.parse_args(arguments)
    for name in _READS:
        if getattr(options, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{option}: not allowed; what it reads could name code to run, as configs/ does not"
            )
    modes = ("run", "multirun", "cfg", "info", "shell_completion")
    if len(given := [mode for mode in modes if getattr(options, mode)]) > 1:
        both = " and ".join("--" + mode.replace("_", "-") for mode in given)
        raise ConfigError(f"{both}: allowed is one of them")
    if options.resolve and not (options.cfg or options.help):
        raise ConfigError("--resolve: allowed is with --cfg or --help")
    if options.shell_completion and not (
        len(options.overrides) == 1 and _COMPLETION.fullmatch(options.overrides[0])
    ):
        raise ConfigError("--shell-completion: say install=bash or uninstall=bash (or fish)")
    return options


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)
