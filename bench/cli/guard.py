"""Rejects command lines that make Hydra read other config files or run code that they name.

Hydra creates callbacks from `_target_` and logging handlers from class names, and loads a pickled job for
--experimental-rerun. A config folder from another place could contain all of these. An experiment needs none
of them, so they are rejected before Hydra runs. Options and overrides are parsed with Hydra's own parser and
grammar, so that this check and Hydra read them in the same way.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from bench.cli import entry_knobs, overrides
from bench.inputs.errors import ConfigError

_READS = ("experimental_rerun", "config_path", "config_name")
"""Options that make Hydra read a file or a folder without checks. The option --config-dir is not among the
arguments here, unless it is abbreviated: `bench.config.folders` takes it."""
_COMPLETION = re.compile(r"(install|uninstall|query)=(bash|fish|zsh)")


def checked(arguments: Sequence[str]) -> list[str]:
    """Return the arguments for Hydra. A value that Hydra would change, such as 1e3, is put in quotes if its
    knob holds text.

    Raises ConfigError for an argument that is not allowed, and Hydra's exception for one that cannot be
    parsed.
    """
    for argument in arguments:
        if not argument.isascii() and argument != argument.encode(errors="replace").decode():
            raise ConfigError(f"{argument!a}: not UTF-8")
    parsed = options(arguments)
    if parsed.shell_completion:
        return list(arguments)
    quoted = {text: overrides.quote_text(text) for text in parsed.overrides}
    parsed_lines = OverridesParser.create().parse_overrides([*quoted.values()])
    for text, override in zip(quoted, parsed_lines, strict=True):
        overrides.check(override)
        quoted[text] = entry_knobs.as_axis(quoted[text], override)
    before = list(arguments)  # Hydra takes options in front of the overrides only
    for text in parsed.overrides:
        before.remove(text)
    return [*before, *(quoted[text] for text in parsed.overrides)]


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments with Hydra's own parser. Raises ConfigError for options that are not allowed."""
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]  # the original prints pages and exits
    options = parser.parse_intermixed_args(arguments)
    if options.config_dir is not None:
        raise ConfigError("--config-dir: not allowed in this form; write --config-dir FOLDER")
    for name in _READS:
        if getattr(options, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{option}: not allowed, because it reads a file that could name code to run; "
                "for configs of your own, use --config-dir FOLDER"
            )
    modes = ("run", "multirun", "cfg", "info", "shell_completion")
    if len(chosen := [mode for mode in modes if getattr(options, mode)]) > 1:
        both = " and ".join("--" + mode.replace("_", "-") for mode in chosen)
        raise ConfigError(f"{both}: only one of them is allowed")
    if options.resolve and not (options.cfg or options.help):
        raise ConfigError("--resolve: allowed only with --cfg or --help")
    if options.shell_completion and not (
        len(options.overrides) == 1 and _COMPLETION.fullmatch(options.overrides[0])
    ):
        raise ConfigError("--shell-completion: use install=bash or uninstall=bash (or fish)")
    return options


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)
