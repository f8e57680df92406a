"""The groups of the configuration whose entries follow from declarations: their entries and defaults.

An entry of such a group needs no file. A file under configs/ with the entry's name, or one next to the module
of a plug-in variant, contains only the values that differ from the declared defaults.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import variants
from bench import corpora, tasks, trackers
from bench.config import chosen
from bench.config.spec import ACTIVATIONS, ActivationsSpec, ClusterSpec, MeasureSpec, ModelSizes, Root
from bench.trackers import TrackerSpec
from variants.declarations import Declared, of_class
from variants.knobs import Knob, Knobs, knobs_of
from variants.slots import SLOTS


@dataclass(frozen=True)
class Group:
    """A group whose entries follow from declarations."""

    names: Callable[[], Iterable[str]]
    """Returns the entries that need no file."""
    config: type[Knobs] | None = None
    """The knobs of every entry; None if each entry has its own knobs."""
    label: str = "name"
    """The knob that contains the entry's name."""


GROUPS: dict[str, Group] = {
    "variant": Group(variants.names),
    **{group: Group(slot.names) for group, slot in SLOTS.items()},
    "data": Group(lambda: [*corpora.SOURCES, *tasks.names()]),
    "model": Group(lambda: [ModelSizes().size], ModelSizes, "size"),
    "activations": Group(lambda: ACTIVATIONS, ActivationsSpec),
    "measure": Group(list, MeasureSpec, "preset"),
    "tracker": Group(trackers.names, TrackerSpec),
}
SECTIONS: dict[str, type[Knobs]] = {
    **{name: group.config for name, group in GROUPS.items() if group.config},
    "cluster": ClusterSpec,  # each of its files contains only the knobs that its launcher reads
}
"""Sections of the configuration whose knobs are the same for every entry."""
RENAMED: Mapping[str, str] = {"model.ff_mult": "feed_forward.mult"}
"""Old name of a knob → its new name. The old name is an error that states the new one."""


def entries(group: str) -> list[str]:
    """Return the sorted entries of a group that need no file."""
    return sorted(GROUPS[group].names()) if group in GROUPS else []


def completed(group: str, entry: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the content of an entry: the declared defaults and the name, updated by the values of its file.

    The root of the configuration, group "" and entry "config", contains the knobs outside of all groups.
    """
    if not group and entry == "config":
        return {**Root().as_dict(), **given}
    if group not in GROUPS:
        return given
    kind = GROUPS[group]
    own = declared(group, str(given.get(kind.label, entry)))
    defaults = own.config().as_dict() if own else {}
    known = knobs_of(own.config) if own else {}
    read = {name: known[name].read(value) if name in known else value for name, value in given.items()}
    return {kind.label: entry, **{k: v for k, v in defaults.items() if k != kind.label}, **read}


def file_beside(group: str, entry: str) -> Path | None:
    """Return the file next to the module of a plug-in variant that contains its defaults; None if there is
    none."""
    point = variants.plugins().get(entry) if group == "variant" else None
    spec = importlib.util.find_spec(point.module) if point else None
    beside = Path(spec.origin).with_suffix(".yaml") if spec and spec.origin else None
    return beside if beside and beside.is_file() else None


def declared(section: str, name: str = "") -> Declared | None:
    """Return the knobs of a section; None if they are not known.

    "" is the section of the knobs outside of all groups. `name` is the entry, for a group in which each entry
    has its own knobs.
    """
    if section in chosen.CHOSEN:
        return chosen.declared(section, name)
    config = Root if not section else SECTIONS.get(section)
    return of_class(config) if config else None


def knob_of(key: str) -> Knob | None:
    """Return the knob with this dotted name; None if there is none, or if it depends on the chosen entry."""
    section, _, name = key.rpartition(".")
    config = Root if not section else SECTIONS.get(section)
    return knobs_of(config).get(name) if config else None
