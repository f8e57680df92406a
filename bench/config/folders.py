"""Folders with configs: that of the project, and those of the user.

A folder of the user contains folders of groups, as configs/ does: `experiment/mine.yaml` is a preset, and
`data/books.yaml` an entry of `data`. The same rules apply to all files (`bench.cli.presets`): they contain
plain values of knobs and cannot name code.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bench import CONFIGS
from bench.config.groups import GROUPS, entries
from bench.inputs.errors import ConfigError

VARIABLE = "LONGCTX_BENCH_CONFIGS"
"""Environment variable: folders with configs of the user, separated as in PATH."""


def group_names() -> frozenset[str]:
    """Return the declared groups and those with a folder in configs/, without Hydra's own."""
    return frozenset({folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} - {"hydra"} | {*GROUPS})


def folders() -> tuple[Path, ...]:
    """Return configs/ and the user's folders. Raises ConfigError for one that does not exist, that has no
    folder of a group, or that has an entry whose name is in use."""
    found = [CONFIGS]
    for folder in map(Path, _given()):
        groups = [name for name in sorted(group_names()) if (folder / name).is_dir()]
        if not groups:
            why = "has no folder of a group" if folder.is_dir() else "is not a folder"
            allowed = ", ".join(sorted(group_names()))
            raise ConfigError(f"{folder}: {why}; a folder with configs has folders named {allowed}")
        for group in groups:
            _check_names(folder, group, found)
        found.append(folder)
    return tuple(found)


def _check_names(folder: Path, group: str, others: Sequence[Path]) -> None:
    """Raise ConfigError for a file whose name another folder's file or a declared entry has."""
    for path in (folder / group).glob("*.yaml"):
        there = [other / group for other in others if (other / group / path.name).is_file()]
        if there or path.stem in entries(group):
            by = f"a file in {there[0]}" if there else f"an entry of {group}"
            raise ConfigError(f"{path}: {by} has this name; give the file another name")


def take(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without `--config-dir FOLDER`. The folders are added to `VARIABLE`, so that child
    processes and jobs have them too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", action="append", default=[])
    parser.error = _refuse  # type: ignore[method-assign]  # the original prints pages and exits
    given, rest = parser.parse_known_args([*arguments])
    if given.config_dir:
        os.environ[VARIABLE] = os.pathsep.join([*_given(), *given.config_dir])
        os.environ[VARIABLE] = os.pathsep.join(_given())
    return rest


def _given() -> list[str]:
    """Return the absolute paths of the user's folders, each once."""
    texts = [text for text in os.environ.get(VARIABLE, "").split(os.pathsep) if text]
    return list(dict.fromkeys(str(Path(text).expanduser().resolve()) for text in texts))


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)
