"""Registry of attention variants. Each module of `variants.attention` is a variant with the module's name.

`names()` lists the variants, and `load(name)` imports one. They implement the interface of `variants.base`.
Other packages add variants (plug-ins) by an entry point in the group `longctx_bench.variants`, whose value is
the class (`my_package.my_variant:MyMixer`). Importing this package imports neither a variant nor torch.
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
    """No variant has this name; the message lists the variants and suggests the most similar one."""


class BrokenVariant(ImportError):
    """The module of a variant cannot be imported; the message contains the module and the exception."""


class PluginClash(ValueError):
    """A plug-in has the name of another variant; the message contains both."""


class Outline(NamedTuple):
    """What is known of a variant without its module: all its layers are of its own class."""

    config: type[Knobs]
    """It checks all that the variant's `Config` checks."""
    causal: bool
    """The capability, the same for every configuration."""


def plugins() -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of other packages by variant name.

    Raises PluginClash if a plug-in has the name of another variant.
    """
    points: dict[str, importlib.metadata.EntryPoint] = {}
    for point in _entry_points():
        taken = point.name in _builtin() or points.get(point.name, point).value != point.value
        if taken:
            raise PluginClash(f"plug-in {point.value} takes the name {point.name!r}, which is taken")
        points[point.name] = point
    return points


@cache
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    """Cached, because searching all installed packages is slow."""
    return tuple(importlib.metadata.entry_points(group=ENTRY_POINTS))


def _builtin() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(attention.__path__)]


def names() -> list[str]:
    """The names of all variants, sorted. Imports none of them."""
    return sorted([*_builtin(), *plugins()])


def load(name: str) -> type[Variant]:
    """Import the class of a variant.

    Raises UnknownVariant for an unknown name, BrokenVariant if the import fails, and TypeError for a module
    that does not define exactly one variant, or an entry point that is not a variant.
    """
    from variants.base import Variant

    if name in _builtin():
        module = _import_or_raise(
            f"variants/attention/{name}.py", partial(importlib.import_module, f"{attention.__name__}.{name}")
        )
        defined = [
            value
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, Variant) and value.__module__ == module.__name__
        ]
        if len(defined) != 1:
            raise TypeError(
                f"variants/attention/{name}.py defines {len(defined)} variants; it must define one"
            )
        return defined[0]
    if point := plugins().get(name):
        loaded = _import_or_raise(f"plug-in {point.value}", point.load)
        if not (inspect.isclass(loaded) and issubclass(loaded, Variant)):
            raise TypeError(f"plug-in {point.value} is not a subclass of variants.base.Variant")
        return loaded
    raise _unknown(name)


def mixers() -> list[str]:
    """The names of the variants with one kind of layer (not mixtures), sorted. Raises as `load` does."""
    from variants.base import SequenceMixer

    return [name for name in names() if issubclass(load(name), SequenceMixer)]


def load_mixer(name: str) -> type[SequenceMixer]:
    """Import the class of a variant with one kind of layer.

    Raises as `load` does, and TypeError for a mixture.
    """
    from variants.base import SequenceMixer

    variant = load(name)
    if not issubclass(variant, SequenceMixer):
        raise TypeError(f"variant={name}: is a mixture of layers; there are {', '.join(mixers())}")
    return variant


def _import_or_raise(description: str, import_it: Callable[[], Any]) -> Any:
    """Call `import_it`. Raises BrokenVariant for any exception, because the import may run arbitrary code."""
    try:
        return import_it()
    except (Exception, SystemExit) as error:
        raise BrokenVariant(f"{description} cannot be imported: {type(error).__name__}: {error}") from error


def module_of(name: str) -> str:
    """The name of the module that defines a variant; for a plug-in, the module of its entry point.

    Imports nothing. Raises UnknownVariant.
    """
    if name in _builtin():
        return f"{attention.__name__}.{name}"
    if point := plugins().get(name):
        return point.module
    raise _unknown(name)


def source_of(name: str) -> tuple[str, str | None]:
    """The names of the module and, for an entry point that names one, of the class of a variant.

    Imports nothing. Raises UnknownVariant.
    """
    point = plugins().get(name)
    return module_of(name), (point.attr or None) if point else None


def declared(name: str) -> Declared:
    """The knobs of a variant, read from its source. If they are not literals there, the variant is imported.

    Raises UnknownVariant and, if the variant is imported, as `load` does.
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
    similar = difflib.get_close_matches(name, names(), n=1)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    return UnknownVariant(f"variant={name}: unknown; there are {', '.join(names())}{hint}")
