"""What a model is trained on and asked: text of a corpus, and made-up tasks that need the context.

A module of this package is a task; `names()` lists those that bring their own data and `load(name)` gives
the task behind `data=name`. There is no list to extend: a new file is a new task. A name that is no file
here is that of a corpus (`bench.corpora`), and the task is then text. Importing this package imports no
task and no torch.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.tasks.base import Task

TEXT = "text"
"""The module of the task that is behind every corpus."""
_SHARED = {"base", TEXT, "windows"}


def names() -> list[str]:
    """The tasks that bring their own data, sorted; imports none of them."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(name for name in found - _SHARED if not name.startswith("_"))


def load(name: str) -> type[Task]:
    """The task behind `data=name`: the one in the module of this name, or else text.

    Raises TypeError for a module that does not define exactly one task.
    """
    from bench.tasks.base import Task

    module = importlib.import_module(f"{__name__}.{name if name in names() else TEXT}")
    found = [
        thing
        for thing in vars(module).values()
        if inspect.isclass(thing) and issubclass(thing, Task) and thing.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} defines {len(found)} tasks; it must define one")
    return found[0]
