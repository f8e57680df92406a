"""Tasks: language modelling on the text of a corpus, synthetic tasks that require the context, and dialogues.

Each module of this package defines one task. `names()` lists the tasks that are no corpora, and `load(name)`
returns the task for `data=name`. There is no list to extend: a new file is a new task. A name that is not a
module here is the name of a corpus (`bench.corpora`), and its task is `text`. Importing this package imports
neither a task nor torch.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING

from variants import declarations
from variants.declarations import Declared

if TYPE_CHECKING:
    from bench.tasks.base import Task

TEXT = "text"
"""The module of the task that is used with every corpus."""
_SHARED = {"base", TEXT, "text_config", "windows"}


def names() -> list[str]:
    """Return the sorted names of the tasks that need no corpus of `bench.corpora`, without importing them."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(name for name in found - _SHARED if not name.startswith("_"))


def declared(name: str) -> Declared:
    """The knobs of the task behind `data=name`, read from its source; imports nothing.

    Raises declarations.Unreadable for a task whose knobs are not written in literals.
    """
    return declarations.declared(_module_of(name))


def _module_of(name: str) -> str:
    return f"{__name__}.{name if name in names() else TEXT}"


def load(name: str) -> type[Task]:
    """Return the task for `data=name`: the one in the module of this name, or else text.

    Raises TypeError if the module does not define exactly one task.
    """
    from bench.tasks.base import Task

    module = importlib.import_module(_module_of(name))
    found = [
        thing
        for thing in vars(module).values()
        if inspect.isclass(thing) and issubclass(thing, Task) and thing.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} defines {len(found)} tasks; it must define one")
    return found[0]
