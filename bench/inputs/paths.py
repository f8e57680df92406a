"""Paths that users give in a knob, on the command line or in an environment variable."""

from __future__ import annotations

import os
from pathlib import Path

from bench.inputs.errors import ConfigError

LONGEST_NAME = 255
"""Maximum length of a file name, in bytes, on common file systems."""


def user_path(setting: str, text: str) -> Path:
    """Return the path with a leading `~` or `~user` expanded; the disk is not read.

    `setting` is the knob, argument or variable, for the error message. Raises ConfigError for an invalid
    path: empty, with a NUL character, with a name that is too long, or with an unknown home folder.
    """
    if not text:
        raise ConfigError(f"{setting}='': allowed is the path of a file or a folder")
    if "\0" in text:
        raise ConfigError(f"{setting}={text!r}: a path must not contain a NUL character")
    expanded = os.path.expanduser(text)  # noqa: PTH111  # Path would treat ./~ as ~
    if expanded.startswith("~"):
        home, _, _ = text.partition("/")
        raise ConfigError(f"{setting}={text}: the home folder {home} is not known; give the full path")
    path = Path(expanded)
    for name in path.parts:
        if len(os.fsencode(name)) > LONGEST_NAME:
            raise ConfigError(f"{setting}={name[:20]}…: a file name has at most {LONGEST_NAME} bytes")
    return path
