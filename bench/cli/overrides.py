"""Checks of an override: `key=value` on a command line or in the grid of a preset.

Overrides are parsed with Hydra's own parser. The value of a group must be the name of one of its entries. All
other values must be plain: not a reference to another knob, not a resolver, not the name of code. Therefore
an override can only make Hydra read files of the search path and use the classes that they name.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep

from bench.config.chosen import CHOSEN
from bench.config.folders import folders, group_names
from bench.config.groups import RENAMED, entries, knob_of
from bench.inputs.errors import ConfigError

LAUNCHER = "hydra/launcher"
HYDRA_SETTINGS = (
    "hydra.mode",
    "hydra.verbose",
    "hydra.output_subdir",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.job.name",
    "hydra.launcher.",
    "hydra.sweeper.params",
    "hydra.sweeper.grids",
)
"""Settings of Hydra that may be overridden. One that ends with a dot includes all settings below it."""
NAME = re.compile(r"\w[\w-]*")
"""Valid names of a group's entries; a path is not one."""


groups = cache(group_names)


def options(group: str) -> list[str]:
    """Return the names of a group's entries, including plug-ins and the user's files; empty if only Hydra
    knows the group."""
    if group not in groups():
        return []
    files = {path.stem for folder in folders() for path in (folder / group).glob("*.yaml")}
    return sorted(files | {*entries(group)})


def check(override: Override) -> None:
    """Raise ConfigError for an override that deletes a key, that moves a group to another package, that
    chooses an entry by anything but a name, or whose value is not plain."""
    key, text = override.key_or_group, str(override.input_line)
    if override.is_delete():
        raise ConfigError(f"{text}: a knob cannot be removed; give it a value")
    if override.package is not None:
        raise ConfigError(f"{text}: not allowed; the package of a group is fixed, remove @{override.package}")
    if any(part.startswith("_") for part in re.split(r"[./]", key)):
        raise ConfigError(f"{text}: a command line must not name code; {key} is not a knob")
    if (key == "hydra" or key.startswith(("hydra.", "hydra/"))) and not _is_allowed(key):
        allowed = ", ".join(
            known + "*" if known.endswith(".") else known for known in (LAUNCHER, *HYDRA_SETTINGS)
        )
        raise ConfigError(f"{key}: not allowed; Hydra's settings that may be overridden are {allowed}")
    if key in RENAMED:
        raise ConfigError(f"{text}: unknown knob; it is now {RENAMED[key]}")
    for value in _values(override):
        check_plain(text, value)
    value = override.value()
    if isinstance(value, RangeSweep) and value.step == 0:
        raise ConfigError(f"{text}: the step of a range must not be 0")
    if key in groups() or "/" in key:
        _check_choice(override)
    if key.partition(".")[0] == "cluster" and override.is_sweep_override():
        raise ConfigError(f"{text}: all cells of a command run on the same cluster; give one value")


def check_swept(override: Override) -> None:
    """Raise ConfigError for a line of a grid that cannot differ between cells."""
    key = override.key_or_group
    if key == "experiment" or key.partition(".")[0] == "cluster" or key.startswith("hydra"):
        raise ConfigError(f"{override.input_line}: not allowed in a grid; it applies to the whole command")


def check_plain(where: str, value: Any) -> None:
    """Raise ConfigError for a value that contains a reference, the name of code, or `???`; `where` begins the
    message."""
    if isinstance(value, dict):
        for key in value:
            if str(key).startswith("_"):
                raise ConfigError(f"{where}: a config must not name code; {key} is not a knob")
            check_plain(where, key)
            check_plain(where, value[key])
    elif isinstance(value, list):
        for one in value:
            check_plain(where, one)
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"{where}: a value must be plain; ${{…}} is not allowed")
    elif value == "???":
        raise ConfigError(f"{where}: ??? is not a value; give one")


def _is_allowed(key: str) -> bool:
    return key == LAUNCHER or any(
        key == known or key.startswith(known if known.endswith(".") else f"{known}.")
        for known in HYDRA_SETTINGS
    )


def _values(override: Override) -> list[Any]:
    """Return the values of an override: each choice of a sweep; a range of numbers is one value."""
    value: Any = override.value()
    if isinstance(value, ChoiceSweep):
        return [Override._convert_value(choice) for choice in value.list]
    if isinstance(value, Glob):
        return [*value.include, *value.exclude]
    return [value]


def _check_choice(override: Override) -> None:
    """Raise ConfigError for an unknown group, or if the value of a group is not a name but a list, empty, a
    path or a range of numbers."""
    key, text = override.key_or_group, str(override.input_line)
    if key not in groups() and key != LAUNCHER:
        known = ", ".join(sorted({*groups(), LAUNCHER}))
        raise ConfigError(f"{text}: unknown group; allowed are {known}")
    if isinstance(override.value(), Glob):  # a pattern can only match existing names
        return
    for value in _values(override):
        name = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
        if not NAME.fullmatch(name):
            names = options(key)
            allowed = f"one of {', '.join(names)}" if names else "the name of an installed launcher"
            several = f"; to run several, use -m {key}=… with commas" if isinstance(value, list) else ""
            if several and key == "variant":
                several += f"; a mixture by layers is variant=hybrid variant.layers={text.partition('=')[2]}"
            near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{text}: allowed is {allowed}{several}{hint}")


# --- text -----------------------------------------------------------------------------------------


@cache
def is_text(key: str) -> bool:
    """Return whether the knob with this dotted name may hold text. This is also the case for groups, whose
    values are names, and for knobs of variants and tasks, whose types depend on the chosen entry."""
    section, _, knob = key.partition(".")
    if not knob and (section in groups() or key == LAUNCHER):
        return True
    declared = knob_of(key)
    return declared.is_text if declared else bool(knob) and section in CHOSEN


_PIECES = re.compile(r"""('[^']*'|"[^"]*"|[\[\](),])""")
_UNQUOTED = re.compile(r"[\w/+.$%*@?|: \t-]*", re.ASCII)
"""Text that Hydra's grammar accepts without quotes."""
_FUNCTIONS = ["bool", "choice", "float", "glob", "int", "interval", "range", "shuffle", "sort", "str", "tag"]
"""Functions of that grammar. Any other name with brackets is text, such as the layer
longformer(window=512)."""
_CALL = re.compile(rf"""(?<![\w'"(=])(?!(?:{"|".join(_FUNCTIONS)})\()\w+\([^()'"]*\)""")
_TEXT_FUNCTIONS = {"choice", "shuffle", "tag"}
"""Functions of that grammar that return their arguments unchanged; the others compute with numbers."""


def quote_text(line: str) -> str:
    """Return the override with quotes around text that Hydra would reject or change, if its knob may hold
    text.

    Hydra rejects characters beyond ASCII, for example in a path, and changes numbers and truth values that
    are not in their usual form: 1e3 becomes 1000.0. In lists and sweeps each entry is quoted by itself;
    existing quotes are kept.
    """
    key, equals, value = line.partition("=")
    if not equals or not is_text(key.lstrip("+")) or set(value) & set("\\{}"):
        return line
    value = _CALL.sub(lambda call: f"'{call[0]}'", value)
    pieces = _PIECES.split(value)
    texts, marks = pieces[::2], [*pieces[1::2], ""]
    called = {text.strip() for text, mark in zip(texts, marks, strict=True) if mark == "("}
    if not called <= {*_TEXT_FUNCTIONS, ""}:
        return line
    pieces[::2] = [_quoted(text) if mark != "(" else text for text, mark in zip(texts, marks, strict=True)]
    return f"{key}={''.join(pieces)}"


def _quoted(text: str) -> str:
    word = text.strip()
    if set(word) & set("'\"") or (_UNQUOTED.fullmatch(word) and not _would_change(word)):
        return text
    return text.replace(word, f"'{word}'")


def _would_change(word: str) -> bool:
    """Return whether the word is a number or truth value in a form that Python would not print."""
    if word.lower() in ("true", "false"):
        return True
    try:
        return word != str(int(word) if re.fullmatch(r"[+-]?[0-9_]+", word) else float(word))
    except ValueError:
        return False
