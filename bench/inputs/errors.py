"""Invalid user input: the exception for a value that is not allowed, and the check of a choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A value is not allowed. The one-line message gives the value,
    the allowed values and the nearest match."""


def choose(knob: str, value: str, allowed: Iterable[str]) -> str:
    """Return the value if it is allowed. Raises ConfigError with the nearest match otherwise."""
    options = list(allowed)
    if value in options:
        return value
    near = difflib.get_close_matches(value, options, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{knob}={value}: unknown; allowed are {', '.join(options)}{hint}")
