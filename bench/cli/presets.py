"""What a file under configs/ may hold, checked as Hydra loads it.

The files of a group hold plain values of knobs. A preset may also choose entries of other groups by name and
set what is swept; a cluster's file sets the launcher's knobs. None names code, or a file from elsewhere. The
root, config.yaml, and the folder hydra/ are parts of the program.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from bench.cli import overrides
from bench.config.chosen import CHOSEN
from bench.inputs.errors import ConfigError

_REFERENCE = re.compile(r"\$\{[a-z_]+(\.[a-z_]+)*\}")
"""Another knob of the same config; what has a colon in it calls a resolver."""
_TAG = "tag:yaml.org,2002:"
_SWEPT = ("hydra.sweeper.params.", "hydra.sweeper.grids.")
_OF_ENTRIES = tuple(f"{group}." for group in CHOSEN)
_PACKAGES = (None, "_global_")

_loader = cache(get_yaml_loader)
"""OmegaConf's own reader of YAML, a class."""


def read(name: str, path: Path) -> str:
    """The text of a file of a config folder. Raises ConfigError for what is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}.yaml: cannot be read: {error}") from None


def load(name: str, package: str | None, text: str) -> Any:
    """The content of a file of a config folder: `name` is `variant/dense`, `package` its header's.

    What may hold text keeps it as it was written. Raises ConfigError for what is not YAML.
    """
    loader = _loader()(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return {}
        group = name.rpartition("/")[0]
        _keep_text(root, f"{group}." if group and package is None else "")
        return loader.construct_document(root)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}.yaml: cannot be read: {error}") from None
    finally:
        loader.dispose()


def _keep_text(node: yaml.Node, prefix: str) -> None:
    """Make text of the numbers and truth values that text knobs, and the lines of a sweep, are given.

    `prefix` is the dotted name of the node, with a dot at its end.
    """
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _keep_text(one, prefix)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _keep_text(value, prefix if key.tag == f"{_TAG}merge" else f"{prefix}{key.value}.")
    elif isinstance(node, yaml.ScalarNode) and node.style is None and _respelt(node, prefix):
        node.tag = f"{_TAG}str"


def _respelt(node: yaml.ScalarNode, prefix: str) -> bool:
    """Whether YAML makes something of an unquoted scalar that is not to be made of it."""
    if prefix.startswith(_SWEPT):
        return prefix not in _SWEPT
    kind = node.tag.removeprefix(_TAG)
    if kind not in ("int", "float", "bool") or not overrides.is_text(prefix.removesuffix(".")):
        return False
    if not prefix.startswith(_OF_ENTRIES):
        return True
    try:  # where the type is not known yet, a number that Python spells in the same way stays one
        return kind != "bool" and str((int if kind == "int" else float)(node.value)) != str(node.value)
    except ValueError:  # YAML's own, such as 0x10 or 1:30
        return True


def check(name: str, package: str | None, content: Any) -> None:
    """Raises ConfigError for a file of a group that holds more than it may; `package` is its header's."""
    group, _, entry = name.rpartition("/")
    if not group or group.split("/")[0] == "hydra":
        return
    where = f"{group}={entry}"
    if package not in _PACKAGES:
        raise ConfigError(f"{where}: not allowed; @package {package} is no place for knobs")
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: a config holds knobs and their values")
    content = dict(content)
    _check_defaults(where, content.pop("defaults", []))
    hydra = dict(content.pop("hydra", None) or {})
    _check_sweep(where, hydra)
    overrides.check_plain(where, _without_references(hydra.pop("launcher", {})))
    if hydra:
        raise ConfigError(
            f"{where}: hydra.{next(iter(hydra))}: not from a preset; it sets hydra.mode, .sweeper, .launcher"
        )
    overrides.check_plain(where, content)


def _check_defaults(where: str, defaults: Any) -> None:
    """Entries of groups, each by its name."""
    for line in defaults if isinstance(defaults, list) else [defaults]:
        ((key, value),) = line.items() if isinstance(line, dict) and len(line) == 1 else [("", line)]
        group = str(key).removeprefix("override ").removeprefix("/")
        known = not key or group == overrides.LAUNCHER or group in overrides.groups()
        if not known or not isinstance(value, str) or not overrides.NAME.fullmatch(value):
            raise ConfigError(
                f"{where}: defaults: {line}: not allowed; a group is given the name of an entry"
            )


def _check_sweep(where: str, hydra: dict[Any, Any]) -> None:
    """The mode and what is swept; each line of a sweep is checked again where the sweep takes it up."""
    hydra.pop("mode", None)
    sweeper = hydra.pop("sweeper", None) or {}
    if unknown := sweeper.keys() - {"params", "grids"}:
        raise ConfigError(
            f"{where}: hydra.sweeper.{unknown.pop()}: not from a preset; allowed are params, grids"
        )
    overrides.check_plain(where, sweeper)


def _without_references(value: Any) -> Any:
    """The same with each reference to a knob left out."""
    if isinstance(value, dict):
        return {key: _without_references(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_references(one) for one in value]
    return _REFERENCE.sub("", value) if isinstance(value, str) else value
