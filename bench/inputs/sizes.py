"""Sizes in memory as users write them."""

from __future__ import annotations

import re
from typing import Any

from bench.inputs.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for unit, base in (("iB", 1024), ("B", 1000))
    for power, prefix in enumerate("KMGTP", 1)
}


LEAST_WITHOUT_UNIT = 2**20
"""A smaller number without a unit is refused: whoever writes 24 means 24GiB."""


def parse_bytes(knob: str, value: Any) -> int:
    """A size in bytes from 80GiB, 80 GB, 8e10 or a number. Raises ConfigError with examples."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", str(value))
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    try:
        size = float(match[1]) * units[match[2].lower()] if match else 0.0
    except (KeyError, ValueError):
        size = 0.0
    if not 1 <= size < 2**63:
        raise ConfigError(f"{knob}={value}: not a size in memory; write it like 80GiB, 80GB, 512MiB or 8e10")
    if match and not match[2] and size < LEAST_WITHOUT_UNIT:
        raise ConfigError(f"{knob}={value}: {value} bytes are too few; did you mean {value}GiB or {value}B?")
    return int(size)
