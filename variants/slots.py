"""Feed-forward layers and depth schedules by name: the slots of a model beside its variant.

Each module of `variants.feed_forward` is a feed-forward layer, and each module of `variants.depth` is a depth
schedule; the name is the file's. A new file is a new entry, and no list has to be extended. Importing this
module imports none of them and no torch.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from variants import BrokenVariant, declarations, depth, feed_forward
from variants.declarations import Declared

if TYPE_CHECKING:
    from variants.base import DepthSchedule, FeedForward

Layer = TypeVar("Layer")


class UnknownEntry(ValueError):
    """No module of the slot's package has this name; the message lists the names and the nearest one."""


@dataclass(frozen=True)
class Slot(Generic[Layer]):
    """One slot of a model: the package whose modules can fill it."""

    group: str
    """The group on the command line."""
    package: ModuleType
    default: str
    """The entry that fills the slot if none is chosen."""

    def names(self) -> list[str]:
        """Return the sorted names of the entries, without importing them."""
        return sorted(module.name for module in pkgutil.iter_modules(self.package.__path__))

    def module_of(self, name: str) -> str:
        """Return the module that defines the entry, without importing it. Raises UnknownEntry."""
        if name in (known := self.names()):
            return f"{self.package.__name__}.{name}"
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UnknownEntry(f"{self.group}={name}: unknown; there are {', '.join(known)}{hint}")

    def load(self, name: str) -> type[Layer]:
        """Return the entry's class: the only class of its module that has a `Config` (imports torch).

        Raises UnknownEntry, variants.BrokenVariant if the module cannot be imported, and TypeError if it
        does not define exactly one such class.
        """
        path = self.module_of(name)
        try:
            module = importlib.import_module(path)
        except (Exception, SystemExit) as error:  # a module may do anything
            raise BrokenVariant(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
        found = [
            thing
            for thing in vars(module).values()
            if inspect.isclass(thing) and thing.__module__ == path and hasattr(thing, "Config")
        ]
        if len(found) != 1:
            raise TypeError(f"{path} defines {len(found)} classes with a Config; it must define one")
        layer: Any = found[0]
        return layer  # type: ignore[no-any-return]

    def declared(self, name: str) -> Declared:
        """Return the entry's knobs, read from its source; if they are not literals, its module is imported.

        Raises UnknownEntry and, if the module is imported, what `load` raises.
        """
        try:
            return declarations.declared(self.module_of(name))
        except declarations.Unreadable:
            config: Any = self.load(name)
            return declarations.of_class(config.Config)


FEED_FORWARD: Slot[FeedForward] = Slot("feed_forward", feed_forward, "mlp")
STACK: Slot[DepthSchedule] = Slot("stack", depth, "stack")
SLOTS: dict[str, Slot[Any]] = {slot.group: slot for slot in (FEED_FORWARD, STACK)}
