"""The hash of the code that a cell's figures depend on.

The modules are found by following import statements, also those inside functions, from the module that runs a
cell and from the modules that the cell's configuration chooses: its variant, its feed-forward layer and its
depth schedule. A module that is moved or newly imported is therefore never missed.
The hash of a module is that of its syntax tree without docstrings, so comments and formatting do not matter.
Nothing is imported, so hashing needs no torch.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import variants

ROOT = "bench.run.isolate"
"""The module that runs a cell in its own process; everything that measures is imported from here on."""
FOUND_BY_NAME = ("bench.corpora", "bench.tasks")
"""Packages whose modules are chosen by name, so that no import statement names them: all of them count."""
NOT_FIGURES = (
    "bench.run.provenance",
    "bench.process.stderr_tail",
    "bench.records",
    "bench.trackers",
    "variants.safe_output",
)
"""Modules and packages that only store or describe measurements: their code is not hashed, and their imports
are not followed."""


@cache
def code_sha256(*names: str, modules: tuple[str, ...] = ()) -> str:
    """Return 16 hex digits: the hash of the code that measures a cell, including that of the named variants
    and of other modules that the cell's configuration chooses.

    For a variant from another package, the modules of that package that it imports are included. For a
    variant without source code, only its name is hashed. Raises variants.UnknownVariant.
    """
    chosen = [*(variants.module_of(name) for name in names), *modules]
    digest = hashlib.sha256("\n".join(chosen).encode())
    for name, sha256 in sorted(closure([ROOT, *_found_by_name(), *chosen]).items()):
        digest.update(f"\n{name}:{sha256}".encode())
    return digest.hexdigest()[:16]


def closure(roots: Iterable[str]) -> dict[str, str]:
    """Return the roots and all modules that they import, directly or indirectly, with their hashes.

    Only imports within the roots' top-level packages are followed. A module includes the packages that
    contain it, because Python runs their `__init__.py`. Names that are not modules, such as classes, are
    ignored.
    """
    todo = list(roots)
    packages = {root.partition(".")[0] for root in todo}
    hashes: dict[str, str] = {}
    while todo:
        module = todo.pop()
        if module in hashes or module.partition(".")[0] not in packages or _is_excluded(module):
            continue
        container = module.rpartition(".")[0]
        if file := _file_of(module):
            package = module if file.name == "__init__.py" else container
            imports, hashes[module] = _read(file.read_bytes(), package)
            todo += imports
        if container:
            todo.append(container)
    return hashes


def _is_excluded(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in NOT_FIGURES)


def _found_by_name() -> list[str]:
    """Return the modules of the packages `FOUND_BY_NAME`, except their `__init__` and `__main__`."""
    return [
        f"{package}.{file.stem}"
        for package in FOUND_BY_NAME
        if (start := _file_of(package))
        for file in start.parent.glob("*.py")
        if not file.stem.startswith("__")
    ]


@cache
def _file_of(module: str) -> Path | None:
    """Return the source file of a module or the `__init__.py` of a package; None if there is none."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top) if top else None
    if spec is None:
        return None
    if not rest:
        candidates = [Path(spec.origin)] if spec.origin else []  # a namespace package has no file
    else:
        folders = [Path(folder).joinpath(*rest[:-1]) for folder in spec.submodule_search_locations or ()]
        candidates = [folder / rest[-1] / "__init__.py" for folder in folders]
        candidates += [folder / f"{rest[-1]}.py" for folder in folders]
    return next((path for path in candidates if path.is_file()), None)


@cache
def _read(content: bytes, package: str) -> tuple[tuple[str, ...], str]:
    """Return the names in the import statements of a module, which may include names that are not modules,
    and the hash of its syntax tree without docstrings.

    A file that cannot be parsed, such as a variant with a syntax error, is hashed byte by byte.
    """
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return (), hashlib.sha256(content).hexdigest()
    parts: list[str] = []
    _write(tree, parts)
    text = "".join(parts).encode(errors="surrogatepass")
    return tuple(_named_below(tree, package)), hashlib.sha256(text).hexdigest()


def _named_below(node: ast.AST, package: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue  # no statement is in an expression
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            if base := _absolute(child, package):
                yield from (base, *(f"{base}.{alias.name}" for alias in child.names))
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _named_below(ast.Module(child.orelse, []), package)  # the rest is never run
        else:
            yield from _named_below(child, package)


def _absolute(statement: ast.ImportFrom, package: str) -> str | None:
    """Return the module of a `from … import`; None for an invalid import from above the top-level package."""
    try:
        return importlib.util.resolve_name("." * statement.level + (statement.module or ""), package)
    except ImportError:
        return None


def _write(value: Any, parts: list[str]) -> None:
    """Append a text of a syntax tree that is equal for two trees only if they differ at most in docstrings.

    `ast.dump` is not used because its output differs between Python versions, which add fields; empty fields
    are omitted here.
    """
    if isinstance(value, ast.AST):
        parts.append(f"{type(value).__name__}(")
        for name in value._fields:
            field = getattr(value, name, None)
            if isinstance(field, list):
                field = [item for item in field if not _is_docstring(item)]
            if field is not None and field != []:
                parts.append(f"{name}=")
                _write(field, parts)
        parts.append(")")
    elif isinstance(value, list):
        for item in value:
            _write(item, parts)
            parts.append(",")
    else:
        parts.append(repr(value))


def _is_docstring(item: Any) -> bool:
    """Return whether a statement is a string, which only documents the code."""
    value = item.value if isinstance(item, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
