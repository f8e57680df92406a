"""What one override may say, `key=value` on a command line or in the grid of a preset.

It is looked at as Hydra's own parser reads it. The value of a group is the name of one of its entries, and
any other value is plain: no reference to another knob, no resolver, no name of code. So an override leads
Hydra to no file but those of the search path, and to no class but those named there.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Glob, Override

from bench import CONFIGS
from bench.config.chosen import CHOSEN
from bench.config.groups import GROUPS, RENAMED, entries, knob_of
from bench.inputs.errors import ConfigError

LAUNCHER = "hydra/launcher"
OF_HYDRA = (
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
"""Settings of Hydra itself that may be set; those that end with a dot with all that lies below."""
NAME = re.compile(r"\w[\w-]*")
"""Names of entries of a group; a path is none of them."""


@cache
def groups() -> frozenset[str]:
    """The groups that are declared and those of configs/, but for Hydra's own."""
    return frozenset({folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} - {"hydra"} | {*GROUPS})


def options(group: str) -> list[str]:
    """The names of a group's entries, those of plug-ins too; none where only Hydra knows them."""
    files = {path.stem for path in (CONFIGS / group).glob("*.yaml")} if group in groups() else set()
    return sorted(files | {*entries(group)})


def check(override: Override) -> None:
    """Raises ConfigError for an override that takes something away, that puts a group elsewhere, whose group
    has no such name, or that refers to anything else than plain values."""
    key, text = override.key_or_group, str(override.input_line)
    if override.is_delete():
        raise ConfigError(f"{text}: a knob cannot be taken away; give it a value")
    if override.package is not None:
        raise ConfigError(f"{text}: not allowed; a group has one place, leave @{override.package} out")
    if any(part.startswith("_") for part in re.split(r"[./]", key)):
        raise ConfigError(f"{text}: a command line does not name code; {key} is no knob")
    if (key == "hydra" or key.startswith(("hydra.", "hydra/"))) and not _may_be_set(key):
        allowed = ", ".join(known + "*" if known.endswith(".") else known for known in (LAUNCHER, *OF_HYDRA))
        raise ConfigError(f"{key}: not from a command line; of Hydra's own settings allowed are {allowed}")
    if key in RENAMED:
        raise ConfigError(f"{text}: unknown knob; it is now {RENAMED[key]}")
    for value in _values(override):
        check_plain(text, value)
    if key in groups() or "/" in key:
        _check_choice(override)
    if key.partition(".")[0] == "cluster" and override.is_sweep_override():
        raise ConfigError(f"{text}: all cells of a command run in one place; give it one value")


def check_swept(override: Override) -> None:
    """Raises ConfigError for a line of a grid that no cell can have for itself."""
    key = override.key_or_group
    if key == "experiment" or key.partition(".")[0] == "cluster" or key.startswith("hydra"):
        raise ConfigError(f"{override.input_line}: not in a grid; it is of the whole command")


def check_plain(where: str, value: Any) -> None:
    """Raises ConfigError for a value that refers to something else, or leaves open what it is."""
    if isinstance(value, dict):
        for key in value:
            if str(key).startswith("_"):
                raise ConfigError(f"{where}: a config does not name code; {key} is no knob")
            check_plain(where, key)
            check_plain(where, value[key])
    elif isinstance(value, list):
        for one in value:
            check_plain(where, one)
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"{where}: a value is plain; ${{…}} is not allowed in it")
    elif value == "???":
        raise ConfigError(f"{where}: ??? is no value; give one")


def _may_be_set(key: str) -> bool:
    return key == LAUNCHER or any(
        key == known or key.startswith(known if known.endswith(".") else f"{known}.") for known in OF_HYDRA
    )


def _values(override: Override) -> list[Any]:
    """The values of an override, each choice of a sweep one; a range of numbers stays as it is."""
    value: Any = override.value()
    if isinstance(value, ChoiceSweep):
        return [Override._convert_value(choice) for choice in value.list]
    if isinstance(value, Glob):
        return [*value.include, *value.exclude]
    return [value]


def _check_choice(override: Override) -> None:
    """Raises ConfigError for a group's value that is no name: a list, nothing, a path, a range of numbers."""
    key, text = override.key_or_group, str(override.input_line)
    if key not in groups() and key != LAUNCHER:
        known = ", ".join(sorted({*groups(), LAUNCHER}))
        raise ConfigError(f"{text}: no such group; there are {known}")
    if isinstance(override.value(), Glob):  # it only chooses among the names
        return
    for value in _values(override):
        name = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
        if not NAME.fullmatch(name):
            names = options(key)
            allowed = f"one of {', '.join(names)}" if names else "the name of an installed one"
            several = f"; -m {key}=… with commas in between runs several" if isinstance(value, list) else ""
            near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{text}: allowed is {allowed}{several}{hint}")


# --- text -----------------------------------------------------------------------------------------


@cache
def is_text(key: str) -> bool:
    """Whether the knob of this dotted name may hold text: by its type, or where its type is known only when
    the variant or task is. Groups hold names."""
    section, _, knob = key.partition(".")
    if not knob and (section in groups() or key == LAUNCHER):
        return True
    declared = knob_of(key)
    return declared.is_text if declared else bool(knob) and section in CHOSEN


_PIECES = re.compile(r"""('[^']*'|"[^"]*"|[\[\](),])""")
_UNQUOTED = re.compile(r"[\w/+.$%*@?|: \t-]*", re.ASCII)
"""What Hydra's grammar takes outside of quotes."""
_FUNCTIONS = ["bool", "choice", "float", "glob", "int", "interval", "range", "shuffle", "sort", "str", "tag"]
"""What that grammar calls; any other name with brackets is text, such as the layer longformer(window=512)."""
_CALL = re.compile(rf"""(?<![\w'"(=])(?!(?:{"|".join(_FUNCTIONS)})\()\w+\([^()'"]*\)""")
_OF_TEXT = {"choice", "shuffle", "tag"}
"""Functions of that grammar that hand on what they are given; others compute with numbers."""


def as_typed(line: str) -> str:
    """The override with quotes around text that Hydra would not take, such as a path with a letter beyond
    ASCII, or would take for a number or truth value that it spells in another way: 1e3 as 1000.0.

    Only where the knob may hold text. Lists, sweeps and what is in quotes already stay as they are.
    """
    key, equals, value = line.partition("=")
    if not equals or not is_text(key.lstrip("+")) or set(value) & set("\\{}"):
        return line
    value = _CALL.sub(lambda call: f"'{call[0]}'", value)
    pieces = _PIECES.split(value)
    texts, marks = pieces[::2], [*pieces[1::2], ""]
    called = {text.strip() for text, mark in zip(texts, marks, strict=True) if mark == "("}
    if not called <= {*_OF_TEXT, ""}:
        return line
    pieces[::2] = [_quoted(text) if mark != "(" else text for text, mark in zip(texts, marks, strict=True)]
    return f"{key}={''.join(pieces)}"


def _quoted(text: str) -> str:
    word = text.strip()
    if set(word) & set("'\"") or (_UNQUOTED.fullmatch(word) and not _respelt(word)):
        return text
    return text.replace(word, f"'{word}'")


def _respelt(word: str) -> bool:
    """Whether it reads as a number or truth value, and Python spells that in another way."""
    if word.lower() in ("true", "false"):
        return True
    try:
        return word != str(int(word) if re.fullmatch(r"[+-]?[0-9_]+", word) else float(word))
    except ValueError:
        return False
