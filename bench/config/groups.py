"""The groups of the configuration whose entries follow from declarations: their names and their defaults.

An entry of such a group needs no file. A file under configs/ with its name, or one beside the module of a
plug-in variant, states what differs from the declared defaults.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
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


@dataclass(frozen=True)
class Group:
    """A group whose entries are made from declarations."""

    names: Callable[[], Iterable[str]]
    """The entries that need no file."""
    config: type[Knobs] | None = None
    """The knobs of every entry; None where they depend on the entry."""
    label: str = "name"
    """The knob that holds the entry's name."""


GROUPS: dict[str, Group] = {
    "variant": Group(variants.names),
    "data": Group(lambda: [*corpora.SOURCES, *tasks.names()]),
    "model": Group(lambda: [ModelSizes().size], ModelSizes, "size"),
    "activations": Group(lambda: ACTIVATIONS, ActivationsSpec),
    "measure": Group(list, MeasureSpec, "preset"),
    "tracker": Group(trackers.names, TrackerSpec),
}
SECTIONS: dict[str, type[Knobs]] = {
    **{name: group.config for name, group in GROUPS.items() if group.config},
    "cluster": ClusterSpec,  # each of its files holds the knobs that its launcher reads
}
"""Sections of a cell's config whose knobs are the same for every entry."""


def entries(group: str) -> list[str]:
    """The entries of a group that need no file, sorted."""
    return sorted(GROUPS[group].names()) if group in GROUPS else []


def completed(group: str, entry: str, given: dict[str, Any]) -> dict[str, Any]:
    """The content of an entry: the declared defaults, its name, and what a file gives.

    The root of the configuration, "" with its entry "config", holds the knobs outside of any group.
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
    """The file beside the module of a plug-in variant that holds its defaults, if there is one."""
    point = variants.plugins().get(entry) if group == "variant" else None
    spec = importlib.util.find_spec(point.module) if point else None
    beside = Path(spec.origin).with_suffix(".yaml") if spec and spec.origin else None
    return beside if beside and beside.is_file() else None


def declared(section: str, name: str = "") -> Declared | None:
    """The knobs of a section, "" for those outside of any group; `name` is the entry of one whose knobs
    depend on it. None where that is not known."""
    if section in chosen.CHOSEN:
        return chosen.declared(section, name)
    config = Root if not section else SECTIONS.get(section)
    return of_class(config) if config else None


def knob_of(key: str) -> Knob | None:
    """The knob of a dotted name; None for one of a variant or task, which depends on the choice, or for
    none."""
    section, _, name = key.rpartition(".")
    config = Root if not section else SECTIONS.get(section)
    return knobs_of(config).get(name) if config else None
