"""Paths as users write them, in a knob, on a command line or in a variable of the environment."""

from __future__ import annotations

import os
from pathlib import Path

from bench.inputs.errors import ConfigError

LONGEST_NAME = 255
"""Bytes of the name of a file, at most, on every file system in use."""


def user_path(asked_by: str, text: str) -> Path:
    """The path that a user wrote, with `~` and `~user` at its start expanded; the disk is not read.

    `asked_by` is the knob, argument or variable, which the message names. Raises ConfigError for a text that
    is no path: empty, with a NUL character, with a name that is too long, or with a home that is not known.
    """
    if not text:
        raise ConfigError(f"{asked_by}='': allowed is the path of a file or a folder")
    if "\0" in text:
        raise ConfigError(f"{asked_by}={text!r}: a path holds no NUL character")
    expanded = os.path.expanduser(text)  # noqa: PTH111  # Path would take ./~ for ~
    if expanded.startswith("~"):
        home, _, _ = text.partition("/")
        raise ConfigError(f"{asked_by}={text}: the home folder {home} is not known; write it out")
    path = Path(expanded)
    for name in path.parts:
        if len(os.fsencode(name)) > LONGEST_NAME:
            raise ConfigError(f"{asked_by}={name[:20]}…: a name is {LONGEST_NAME} bytes long at most")
    return path
