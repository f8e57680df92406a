"""Knobs of one entry in a sweep over several: `longformer.window=64,256` applies to cells of longformer.

`variant.window` would have to be a knob of every variant of the sweep. The name of an entry in the place of
its group says whose knob it is; in the cells of other entries the override is left out. This holds for
variants, feed-forward layers and depth schedules.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.types import Override

from bench.cli.overrides import groups, options
from bench.config.groups import declared, entries
from bench.inputs.errors import ConfigError
from variants import BrokenVariant
from variants.knobs import knobs_of
from variants.slots import SLOTS

GROUPS = ("variant", *SLOTS)
"""The groups whose entries have knobs of their own. An entry with the name of a group, or of an entry of an
earlier one, is set by its group alone."""
_OWN = re.compile(r"(\w+)\.([\w.]+)=(.*)", re.DOTALL)


def applied(jobs: Sequence[Sequence[str]], defaults: Mapping[str, str], used: set[str]) -> list[list[str]]:
    """Return the overrides of each cell with the knobs of its own entries only, as `variant.…`. Cells that
    differ in a knob of another entry become one.

    `defaults` has the entry of each of `GROUPS` in cells that choose none. The names of the overrides that a
    cell took are added to `used`. Raises ConfigError if an entry has no such knob, or if it is given for the
    entry and for all of its group.
    """
    found, without = list[list[str]](), set[tuple[str, ...]]()
    owners = _owners()
    for job in jobs:
        own = _of_cell(job, defaults, owners, used)
        if len(own) == len(job) or tuple(own) not in without:
            found.append(own)
        if len(own) < len(job):
            without.add(tuple(own))
    return found


def as_axis(line: str, override: Override) -> str:
    """Return the override of one entry's knob as an axis of the sweep, also if it has one value, because the
    config of the sweep itself has no such knob. Others are returned unchanged."""
    if _owner(line, _owners()) is None or override.is_sweep_override():
        return line
    name, _, value = line.partition("=")
    return f"{name}=choice({value})"


def unused(lines: Sequence[str], used: set[str]) -> str | None:
    """Return a message about an override of an entry that is not in the sweep; None if there is none."""
    owners = _owners()
    for line in lines:
        name = line.partition("=")[0]
        if (owner := _owner(line, owners)) and name not in used:
            return f"{line}: no cell of the sweep has {owners[owner]}={owner}"
    return None


def of_group(name: str) -> str | None:
    """Return the name of an entry's knob with that of its group, as it is set in a single cell; None if no
    entry begins it."""
    entry, _, knob = name.partition(".")
    group = _owners().get(entry)
    return f"{group}.{knob}" if group else None


def _of_cell(
    job: Sequence[str], defaults: Mapping[str, str], owners: Mapping[str, str], used: set[str]
) -> list[str]:
    chosen = dict(defaults)
    for line in job:
        group, _, value = line.partition("=")
        if group in GROUPS:
            chosen[group] = value
    found = []
    for line in job:
        owner = _owner(line, owners)
        if owner is None:
            found.append(line)
        elif owner == chosen[owners[owner]]:
            name, _, value = line.partition("=")
            knob = f"{owners[owner]}.{name.partition('.')[2]}"
            if any(other.startswith(f"{knob}=") for other in job):
                raise ConfigError(f"{line}: {knob} is given too; give one of them")
            _require_known(name, owner, owners[owner])
            used.add(name)
            found.append(f"{knob}={value}")
    return found


def _require_known(name: str, entry: str, group: str) -> None:
    """Raise ConfigError unless the entry has such a knob. A file of the user's is checked when it is read."""
    if entry not in entries(group):
        return
    try:
        own = declared(group, entry)
    except BrokenVariant:  # of another package; the cell says so
        return
    known = [f"{entry}.{knob}" for knob in knobs_of(own.config)] if own else []
    if f"{entry}.{name.split('.')[1]}" not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        allowed = f"allowed are {', '.join(known)}" if known else f"{group}={entry} has none"
        raise ConfigError(f"{name}: unknown knob; {allowed}{hint}")


def _owners() -> dict[str, str]:
    """The group of each entry whose name can take the group's place."""
    found: dict[str, str] = {}
    for group in GROUPS:
        for entry in options(group):
            if entry not in groups():
                found.setdefault(entry, group)
    return found


def _owner(line: str, owners: Mapping[str, str]) -> str | None:
    """The entry whose knob an override sets by the entry's name."""
    match = _OWN.fullmatch(line)
    return match[1] if match and match[1] in owners else None
