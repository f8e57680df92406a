"""Attention variants: one module each in `variants.attention`, behind the interface of `variants.base`.

`names()` lists them and `load(name)` imports one. Every module of `variants.attention` is a variant of its
name; other packages add theirs with an entry point in the group `longctx_bench.variants` whose value is the
class (`my_package.my_variant:MyMixer`). Importing this package imports no variant and no torch.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from variants import attention

if TYPE_CHECKING:
    from variants.base import SequenceMixer, Variant
    from variants.declarations import Declared
    from variants.knobs import Knobs

ENTRY_POINTS = "longctx_bench.variants"
_MIXER = ("variants.base.mixer", "SequenceMixer")
_BY_CONFIG = {"info_for", "mixers", "members"}
"""Methods of `SequenceMixer` whose results are the same for every configuration if they are inherited."""


class UnknownVariant(ValueError):
    """No variant has this name; the message says which there are and which is nearest."""


class BrokenVariant(ImportError):
    """A variant's module raises as it is imported; the message names it and what it raised."""


class PluginClash(ValueError):
    """A plug-in takes a name that is taken; the message names both."""


class Outline(NamedTuple):
    """What is known of a variant without its module: all its layers are of its own class."""

    config: type[Knobs]
    """It checks all that the variant's `Config` checks."""
    causal: bool
    """The capability, the same for every configuration."""


def plugins() -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of other packages by variant name.

    Raises PluginClash where a plug-in takes a name that is taken.
    """
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in _entry_points():
        taken = point.name in _builtin() or found.get(point.name, point).value != point.value
        if taken:
            raise PluginClash(f"plug-in {point.value} takes the name {point.name!r}, which is taken")
        found[point.name] = point
    return found


@cache
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    """Kept, because looking through all installed packages takes long."""
    return tuple(importlib.metadata.entry_points(group=ENTRY_POINTS))


def _builtin() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(attention.__path__)]


def names() -> list[str]:
    """Every variant's name, sorted; imports none of them."""
    return sorted([*_builtin(), *plugins()])


def load(name: str) -> type[Variant]:
    """The variant's class.

    Raises UnknownVariant for a name that is none, BrokenVariant for one that cannot be imported, TypeError
    for a module that does not define exactly one variant or an entry point that is not one.
    """
    from variants.base import Variant

    if name in _builtin():
        module = _imported_or_broken(
            f"variants/attention/{name}.py", partial(importlib.import_module, f"{attention.__name__}.{name}")
        )
        found = [
            thing
            for thing in vars(module).values()
            if inspect.isclass(thing) and issubclass(thing, Variant) and thing.__module__ == module.__name__
        ]
        if len(found) != 1:
            raise TypeError(f"variants/attention/{name}.py defines {len(found)} variants; it must define one")
        return found[0]
    if point := plugins().get(name):
        loaded = _imported_or_broken(f"plug-in {point.value}", point.load)
        if not (inspect.isclass(loaded) and issubclass(loaded, Variant)):
            raise TypeError(f"plug-in {point.value} is not a subclass of variants.base.Variant")
        return loaded
    raise _unknown(name)


def mixers() -> list[str]:
    """The names of the variants that are one kind of layer, sorted. Raises what `load` raises."""
    from variants.base import SequenceMixer

    return [name for name in names() if issubclass(load(name), SequenceMixer)]


def load_mixer(name: str) -> type[SequenceMixer]:
    """The class of a variant that is one kind of layer.

    Raises what `load` raises, and TypeError for a mixture.
    """
    from variants.base import SequenceMixer

    variant = load(name)
    if not issubclass(variant, SequenceMixer):
        raise TypeError(f"variant={name}: is a mixture of layers; there are {', '.join(mixers())}")
    return variant


def _imported_or_broken(what: str, imported: Callable[[], Any]) -> Any:
    try:
        return imported()
    except (Exception, SystemExit) as error:  # a module may do anything
        raise BrokenVariant(f"{what} cannot be imported: {type(error).__name__}: {error}") from error


def module_of(name: str) -> str:
    """The module that defines the variant or, of a plug-in, the one that its entry point names.

    Imports nothing. Raises UnknownVariant.
    """
    if name in _builtin():
        return f"{attention.__name__}.{name}"
    if point := plugins().get(name):
        return point.module
    raise _unknown(name)


def source_of(name: str) -> tuple[str, str | None]:
    """The module that defines the variant, and the class if an entry point names one. Imports nothing.

    Raises UnknownVariant.
    """
    point = plugins().get(name)
    return module_of(name), (point.attr or None) if point else None


def declared(name: str) -> Declared:
    """The knobs of the variant, read from its source; what is not written in literals there is imported.

    Raises UnknownVariant and, where it is imported, what `load` raises.
    """
    from variants import declarations

    try:
        return declarations.declared(*source_of(name))
    except declarations.Unreadable:
        return declarations.of_class(load(name).Config)


def outline(name: str) -> Outline | None:
    """The outline of the variant, read from its source. None if its module must be imported: because it is a
    mixture, its `Config` has checks of its own, or its declarations are not literals.

    Raises UnknownVariant.
    """
    from variants import declarations

    source = source_of(name)
    try:
        found = declarations.declared(*source)
        if not found.complete or declarations.overrides(*source, _MIXER, _BY_CONFIG):
            return None
        return Outline(found.config, bool(declarations.attribute(*source, "info")["caps"]["causal"]))
    except (declarations.Unreadable, KeyError, TypeError):  # the last two: `info` is not written as usual
        return None


def _unknown(name: str) -> UnknownVariant:
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return UnknownVariant(f"variant={name}: unknown; there are {', '.join(names())}{hint}")
