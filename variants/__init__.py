"""Attention variants: one module each behind the interface of `variants.base`.

`names()` lists them and `load(name)` imports one. A module of this package that is not shared
code is a variant; other packages add theirs with an entry point in the group
`longctx_bench.variants` whose value is the class (`my_package.my_variant:MyAttention`).
Importing this package imports no variant and no torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from variants.base import Attention

ENTRY_POINTS = "longctx_bench.variants"
_SHARED = {"base", "layers", "patterns"}


class UnknownVariant(ValueError):
    """No variant has this name; the message says which there are and which is nearest."""


class BrokenVariant(ImportError):
    """A variant's module raises as it is imported; the message names it and what it raised."""


class PluginClash(ValueError):
    """A plug-in takes a name that is taken; the message names both."""


def plugins() -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of other packages by variant name.

    Raises PluginClash where a plug-in takes a name that is taken.
    """
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        taken = point.name in _builtin() or found.get(point.name, point).value != point.value
        if taken:
            raise PluginClash(f"plug-in {point.value} takes the name {point.name!r}, which is taken")
        found[point.name] = point
    return found


def _builtin() -> list[str]:
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in modules if not name.startswith("_") and name not in _SHARED]


def names() -> list[str]:
    """Every variant's name, sorted; imports none of them."""
    return sorted([*_builtin(), *plugins()])


def load(name: str) -> type[Attention]:
    """The variant's class.

    Raises UnknownVariant for a name that is none, BrokenVariant for one that cannot be imported, TypeError
    for a module that does not define exactly one variant or an entry point that is not one.
    """
    from variants.base import Attention

    if name in _builtin():
        module = _imported_or_broken(
            f"variants/{name}.py", partial(importlib.import_module, f"variants.{name}")
        )
        found = [
            thing
            for thing in vars(module).values()
            if inspect.isclass(thing) and issubclass(thing, Attention) and thing.__module__ == module.__name__
        ]
        if len(found) != 1:
            raise TypeError(f"variants/{name}.py defines {len(found)} variants; it must define one")
        return found[0]
    if point := plugins().get(name):
        loaded = _imported_or_broken(f"plug-in {point.value}", point.load)
        if not (inspect.isclass(loaded) and issubclass(loaded, Attention)):
            raise TypeError(f"plug-in {point.value} is not a subclass of variants.base.Attention")
        return loaded
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UnknownVariant(f"variant={name}: unknown; there are {', '.join(names())}{hint}")


def _imported_or_broken(what: str, imported: Callable[[], Any]) -> Any:
    try:
        return imported()
    except (Exception, SystemExit) as error:  # a module may do anything
        raise BrokenVariant(f"{what} cannot be imported: {type(error).__name__}: {error}") from error


def source_files(name: str) -> list[Path]:
    """The Python files whose text decides a variant's figures: its own and those of this package that
    it imports, directly or not."""
    found: dict[Path, None] = {}
    todo = [_source_file(name)]
    while todo:
        file = todo.pop()
        if file not in found:
            found[file] = None
            todo += _imported(file)
    return sorted(found)


def _source_file(name: str) -> Path:
    """The file that defines the variant, or that ought to where it cannot be imported."""
    try:
        return Path(inspect.getfile(load(name)))
    except BrokenVariant:
        module = f"{__name__}.{name}" if name in _builtin() else plugins()[name].module
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise
        return Path(spec.origin)


def _imported(file: Path) -> list[Path]:
    """The modules of this package that a file imports."""
    modules = set()
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # of a variant that cannot be imported, for one
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == __name__:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.startswith(f"{__name__}.")}
    candidates = [Path(__file__).parent / f"{module.rpartition('.')[2]}.py" for module in modules]
    return [path for path in candidates if path.is_file()]
