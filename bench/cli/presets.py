"""Checks of the files in configs/, done while Hydra loads them.

The file of a group contains plain values of knobs. A preset may also choose entries of other groups by name
and define a sweep; the file of a cluster sets the launcher's options. No file may name code or a file outside
of configs/. The root config.yaml and the folder hydra/ are not checked, because they are part of the program.
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
"""A reference to another knob of the same config. A reference with a colon would call a resolver."""
_TAG = "tag:yaml.org,2002:"
_SWEPT = ("hydra.sweeper.params.", "hydra.sweeper.grids.")
_CHOSEN_SECTIONS = tuple(f"{group}." for group in CHOSEN)
_PACKAGES = (None, "_global_")
_PRESETS = "experiment"
"""The group whose entries choose those of others; its files are of package _global_."""

_loader = cache(get_yaml_loader)
"""Returns the class with which OmegaConf reads YAML."""


def read(name: str, path: Path) -> str:
    """Return the text of a config file. Raises ConfigError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}.yaml: cannot be read: {error}") from None


@cache
def load(name: str, package: str | None, text: str) -> Any:
    """Parse the text of a config file; `name` is for example `variant/dense`, `package` that of its header.

    A sweep composes each file many times, so the result is shared, and no caller changes it.
    Values of knobs that may hold text are kept as they are written. Raises ConfigError for invalid YAML.
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
    """Change the type of numbers and truth values to text if they are values of a text knob or lines of a
    sweep.

    `prefix` is the dotted name of the node, with a dot at its end.
    """
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _keep_text(one, prefix)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _keep_text(value, prefix if key.tag == f"{_TAG}merge" else f"{prefix}{key.value}.")
    elif isinstance(node, yaml.ScalarNode) and node.style is None and _must_stay_text(node, prefix):
        node.tag = f"{_TAG}str"


def _must_stay_text(node: yaml.ScalarNode, prefix: str) -> bool:
    """Return whether YAML would wrongly convert an unquoted scalar."""
    if prefix.startswith(_SWEPT):
        return prefix not in _SWEPT
    kind = node.tag.removeprefix(_TAG)
    if kind not in ("int", "float", "bool") or not overrides.is_text(prefix.removesuffix(".")):
        return False
    if not prefix.startswith(_CHOSEN_SECTIONS):
        return True
    try:  # the type of the knob is not known yet: a number that Python prints in the same form is a number
        return kind != "bool" and str((int if kind == "int" else float)(node.value)) != str(node.value)
    except ValueError:  # a form that only YAML has, such as 0x10 or 1:30
        return True


def check(name: str, package: str | None, content: Any) -> None:
    """Raise ConfigError if the file of a group has content that is not allowed; `package` is that of its
    header."""
    group, _, entry = name.rpartition("/")
    if not group or group.split("/")[0] == "hydra":
        return
    where = f"{group}={entry}"
    if package not in _PACKAGES:
        raise ConfigError(f"{where}: @package {package}: not allowed; use @package _global_ or none")
    if group == _PRESETS and package != "_global_":
        raise ConfigError(f"{where}: the first line must be # @package _global_; without it, nothing is read")
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: a config must be a mapping of knobs to values")
    content = dict(content)
    _check_defaults(where, content.pop("defaults", []))
    hydra = dict(content.pop("hydra", None) or {})
    _check_sweep(where, hydra)
    overrides.check_plain(where, _without_references(hydra.pop("launcher", {})))
    if hydra:
        raise ConfigError(
            f"{where}: hydra.{next(iter(hydra))}: not allowed; a preset sets hydra.mode, .sweeper, .launcher"
        )
    overrides.check_plain(where, content)


def _check_defaults(where: str, defaults: Any) -> None:
    """Raise ConfigError unless the defaults choose entries of groups by name."""
    for line in defaults if isinstance(defaults, list) else [defaults]:
        ((key, value),) = line.items() if isinstance(line, dict) and len(line) == 1 else [("", line)]
        group = str(key).removeprefix("override ").removeprefix("/")
        known = not key or group == overrides.LAUNCHER or group in overrides.groups()
        if not known or not isinstance(value, str) or not overrides.NAME.fullmatch(value):
            raise ConfigError(
                f"{where}: defaults: {line}: not allowed; choose an entry of a group by its name"
            )


def _check_sweep(where: str, hydra: dict[Any, Any]) -> None:
    """Remove the mode and the sweep from `hydra` and check the sweep. Each line of it is checked again when
    the sweep is run (`overrides.check_swept`)."""
    hydra.pop("mode", None)
    sweeper = hydra.pop("sweeper", None) or {}
    if unknown := sweeper.keys() - {"params", "grids"}:
        raise ConfigError(
            f"{where}: hydra.sweeper.{unknown.pop()}: not allowed in a preset; allowed are params, grids"
        )
    overrides.check_plain(where, sweeper)


def _without_references(value: Any) -> Any:
    """Return the value without its references to knobs."""
    if isinstance(value, dict):
        return {key: _without_references(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_references(one) for one in value]
    return _REFERENCE.sub("", value) if isinstance(value, str) else value
