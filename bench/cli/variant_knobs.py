"""Knobs of one variant in a sweep over several: `longformer.window=64,256` applies to cells of longformer.

`variant.window` would have to be a knob of every variant of the sweep. The name of a variant in the place of
`variant` says whose knob it is; in the cells of other variants the override is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.override_parser.types import Override

from bench.cli.overrides import options
from bench.inputs.errors import ConfigError

GROUP = "variant"
_OWN = re.compile(r"(\w+)\.([\w.]+)=(.*)", re.DOTALL)


def applied(jobs: Sequence[Sequence[str]], default: str, used: set[str]) -> list[list[str]]:
    """Return the overrides of each cell with the knobs of its own variant only, as `variant.…`. Cells that
    differ in a knob of another variant become one.

    `default` is the variant of cells that choose none. The names of the overrides that a cell took are added
    to `used`. Raises ConfigError if a knob is given for the variant and for all variants.
    """
    found, without = list[list[str]](), set[tuple[str, ...]]()
    variants = options(GROUP)
    for job in jobs:
        own = _of_cell(job, default, variants, used)
        if len(own) == len(job) or tuple(own) not in without:
            found.append(own)
        if len(own) < len(job):
            without.add(tuple(own))
    return found


def as_axis(line: str, override: Override) -> str:
    """Return the override of one variant's knob as an axis of the sweep, also if it has one value, because
    the config of the sweep itself has no such knob. Others are returned unchanged."""
    if _owner(line, options(GROUP)) is None or override.is_sweep_override():
        return line
    name, _, value = line.partition("=")
    return f"{name}=choice({value})"


def unused(lines: Sequence[str], used: set[str]) -> str | None:
    """Return a message about an override of a variant that is not in the sweep; None if there is none."""
    variants = options(GROUP)
    for line in lines:
        name = line.partition("=")[0]
        if (owner := _owner(line, variants)) and name not in used:
            return f"{line}: no cell of the sweep has variant={owner}"
    return None


def _of_cell(job: Sequence[str], default: str, variants: Sequence[str], used: set[str]) -> list[str]:
    chosen = [line.partition("=")[2] for line in job if line.startswith(f"{GROUP}=")]
    variant = chosen[-1] if chosen else default
    found = []
    for line in job:
        owner = _owner(line, variants)
        if owner is None:
            found.append(line)
        elif owner == variant:
            name, _, value = line.partition("=")
            knob = f"{GROUP}.{name.partition('.')[2]}"
            if any(other.startswith(f"{knob}=") for other in job):
                raise ConfigError(f"{line}: {knob} is given too; give one of them")
            used.add(name)
            found.append(f"{knob}={value}")
    return found


def _owner(line: str, variants: Sequence[str]) -> str | None:
    """The one of the variants whose knob an override sets by the variant's name."""
    match = _OWN.fullmatch(line)
    return match[1] if match and match[1] in variants else None
