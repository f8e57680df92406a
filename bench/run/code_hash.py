"""The hash of the code that a cell's figures depend on.

The modules are found by following import statements, also those inside functions, from the module that runs a
cell and from the variant's own module. A module that is moved or newly imported is therefore never missed.
What is hashed of a module is its syntax tree without docstrings; comments and formatting are not part of one.
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
"""Modules, and packages with everything in them, that only store or describe what was measured: their code is
not hashed, and their imports are not followed."""


@cache
def code_sha256(variant: str) -> str:
    """16 hex digits: the hash of the harness's code that measures, and of the variant's.

    Of a variant from another package, the modules of that package which its module imports count too; of a
    variant whose source cannot be found, only its name. Raises variants.UnknownVariant.
    """
    module = variants.module_of(variant)
    digest = hashlib.sha256(module.encode())
    for name, sha256 in sorted(closure([ROOT, *_found_by_name(), module]).items()):
        digest.update(f"\n{name}:{sha256}".encode())
    return digest.hexdigest()[:16]


def closure(roots: Iterable[str]) -> dict[str, str]:
    """The modules that the roots import, directly or not, and the roots themselves, with their hashes.

    Followed are imports within the roots' own top-level packages. A module brings the packages that contain
    it, because Python runs their `__init__.py`. A name that is no module, such as a class, is passed over.
    """
    todo = list(roots)
    packages = {root.partition(".")[0] for root in todo}
    found: dict[str, str] = {}
    while todo:
        module = todo.pop()
        if module in found or module.partition(".")[0] not in packages or _is_excluded(module):
            continue
        container = module.rpartition(".")[0]
        if file := _file_of(module):
            package = module if file.name == "__init__.py" else container
            imports, found[module] = _read(file.read_bytes(), package)
            todo += imports
        if container:
            todo.append(container)
    return found


def _is_excluded(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in NOT_FIGURES)


def _found_by_name() -> list[str]:
    """The modules of the packages `FOUND_BY_NAME`, but for their commands."""
    return [
        f"{package}.{file.stem}"
        for package in FOUND_BY_NAME
        if (start := _file_of(package))
        for file in start.parent.glob("*.py")
        if not file.stem.startswith("__")
    ]


@cache
def _file_of(module: str) -> Path | None:
    """The source file of a module or the `__init__.py` of a package; None where there is none."""
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
    """What the import statements of a module of the package name, which need not all be modules; and the hash
    of its syntax tree without docstrings.

    A file that has no syntax tree, such as a variant with a mistake in it, is hashed as it is.
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
    """The module that `from … import` names; None where it leaves the top-level package, which fails."""
    try:
        return importlib.util.resolve_name("." * statement.level + (statement.module or ""), package)
    except ImportError:
        return None


def _write(value: Any, parts: list[str]) -> None:
    """Append a text of a syntax tree: the same for trees that differ in docstrings alone, and for no others.

    `ast.dump` would do, but its text differs between versions of Python, which add fields; fields that are
    empty are left out here.
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
    """A string as a statement: it documents what surrounds it or stands before it, and does nothing."""
    value = item.value if isinstance(item, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
