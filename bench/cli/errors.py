"""Error messages for invalid command lines, in one line: the value, the allowed values, the nearest match."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import variants
from bench.cli import entry_knobs, overrides
from bench.corpora import CorpusError
from bench.inputs.errors import ConfigError
from variants import PluginClash
from variants.knobs import knobs_of
from variants.slots import SLOTS

KINDS: tuple[type[Exception], ...] = (
    ConfigError,
    CorpusError,
    PluginClash,
    HydraException,
    OmegaConfBaseException,
)
"""Exceptions that invalid user input raises."""


def explain(error: Exception, arguments: list[str], configs: Path) -> str:
    """Return one line for an exception of `KINDS`; `arguments` is the command line and `configs` the config
    folder."""
    if isinstance(error, ConfigError | CorpusError | PluginClash):
        return str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(error)
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read ({text.splitlines()[0]})"
    if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{ambiguous[1]}: several values; add -m (or --multirun) to sweep over them"
    if axis := re.search(r"Sweep parameters '(([\w.]+)=.*)' requires --multirun", text):
        return _axis(axis[1], axis[2])
    if unknown := re.search(r"Could not (?:override|append to config|delete).*?'([^']+)'", text):
        return _unknown_knob(unknown[1], arguments, configs)
    return " ".join(text.split())


def _axis(line: str, name: str) -> str:
    """About an axis of a sweep in the command of a single cell."""
    knob = entry_knobs.of_group(name)
    single = re.sub(r"=choice\((.*)\)$", r"=\1", line)  # as it was typed
    own = f"; for a single cell, write {knob}={single.partition('=')[2]}" if knob else ""
    return f"{single if knob else line}: only for a sweep; add -m (or --multirun){own}"


def _near(value: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(value, allowed, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _unknown_option(error: MissingConfigException) -> str:
    group, _, value = str(error.missing_cfg_file).rpartition("/")
    allowed = sorted(str(option) for option in error.options or [])
    extra = "; launchers for clusters require the extra `cluster`" if group == "hydra/launcher" else ""
    return f"{group}={value}: unknown; allowed are {', '.join(allowed)}{_near(value, allowed)}{extra}"


def _unknown_knob(knob: str, arguments: list[str], configs: Path) -> str:
    knobs = sorted(_knobs(arguments, configs))
    section, _, _ = knob.rpartition(".")
    of_section = [known for known in knobs if known.rpartition(".")[0] == section] or knobs
    others = _of_others(knob, arguments)
    hint = others or _near(knob, knobs)
    return f"{knob}: unknown knob; allowed are {', '.join(of_section)}{hint}"


def _of_others(knob: str, arguments: list[str]) -> str:
    """How to use a knob that other entries of a group have. The example is one of the command line, if any
    is."""
    section, _, name = knob.rpartition(".")
    declared, entries = {
        "variant": (variants.declared, variants.names()),
        **{group: (slot.declared, slot.names()) for group, slot in SLOTS.items()},
    }.get(section, (None, []))
    having = []
    for entry in entries:
        with suppress(variants.BrokenVariant):  # of another package
            if declared and name in knobs_of(declared(entry).config):
                having.append(entry)
    if not having:
        return ""
    chosen = " ".join(a.partition("=")[2] for a in arguments if a.startswith(f"{section}="))
    example = next((entry for entry in re.findall(r"\w+", chosen) if entry in having), having[0])
    use = f"choose one, such as {section}={example}, or in a sweep over several write {example}.{name}=…"
    return f"; {', '.join(having)} {'have' if len(having) > 1 else 'has'} it: {use}"


def _knobs(arguments: list[str], configs: Path) -> set[str]:
    """Return the dotted names of all knobs, with the groups' entries that the command line chooses."""
    groups = overrides.groups()
    chosen = [a for a in arguments if a.partition("=")[0] in groups and re.fullmatch(r"\w+=\w+", a)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs), version_base="1.3"):
        config = compose("config", overrides=chosen)
    return set(_leaves(config)) | groups


def _leaves(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, config):
        if OmegaConf.is_dict(config) and isinstance(config._get_node(key), DictConfig):
            yield from _leaves(config[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
