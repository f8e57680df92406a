"""Declarations of a module, read from its syntax tree: the knobs of a class and its plain attributes.

Modules of variants and tasks import torch. Their knobs are needed where nobody wants to wait for it: in help,
in lists, where a configuration is composed. So the source is read instead of run. It follows base classes
through imports within the module's own top-level package and within this project; what is not written in
literals cannot be read (`Unreadable`), and whoever asks may then import the module.

Imports no torch, and none of the modules that it reads.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Set
from dataclasses import make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from variants.knobs import Knob, Knobs, knob

_KINDS = {"int": int, "float": float, "str": str, "bool": bool, "tuple": tuple, "Literal": Literal}
_WRAPPERS = (ast.Expression, ast.Subscript, ast.Tuple, ast.BinOp, ast.BitOr)
_TYPE_NODES = (*_WRAPPERS, ast.Name, ast.Load, ast.Constant)
"""What the annotation of a knob is made of."""
_OURS = ("variants", "bench")
_ROOTS = {"Knobs", "ABC", "object", "Protocol"}
"""Base classes without knobs of their own."""
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Unreadable(ValueError):
    """A declaration is not written in literals, or its source cannot be found; the message names it."""


class _Class(NamedTuple):
    module: str
    node: ast.ClassDef


class Declared(NamedTuple):
    """The knobs of a class."""

    config: type[Knobs]
    """A class with the same fields, or the class itself. One that was read checks types and bounds, but
    not what relates two knobs."""
    meanings: dict[str, str]
    """Knob → the string below it."""
    complete: bool
    """Whether `config` checks all that the class itself checks."""


@cache
def declared(module: str, owner: str | None = None) -> Declared:
    """The knobs of the class that `Config` of a class names.

    `owner` is the class; None is the only class of the module that has a `Config`. Raises Unreadable.
    """
    holder = _owner(module, owner)
    value = _attribute(holder, "Config")
    if value is None or not isinstance(value[1], ast.Name):
        raise Unreadable(f"{module}: {holder.node.name}.Config is not the name of a class")
    config = _class(value[0], value[1].id)
    fields, meanings = _fields(config), meanings_of(config.module, config.node.name)
    made = make_dataclass(
        config.node.name,
        [(name, *field) for name, field in fields.items()],
        bases=(Knobs,),
        frozen=True,
        kw_only=True,
    )
    return Declared(made, meanings, complete=not _has_checks(config))


def of_class(config: type[Knobs]) -> Declared:
    """The knobs of a class itself; their meanings as far as its source can be read."""
    try:
        meanings = meanings_of(config.__module__, config.__qualname__)
    except Unreadable:
        meanings = {}
    return Declared(config, meanings, complete=True)


@cache
def meanings_of(module: str, name: str) -> dict[str, str]:
    """Field → the string below it, for a class and its bases. Raises Unreadable."""
    found = _class(module, name)
    meanings: dict[str, str] = {}
    for base in _bases(found):
        meanings |= meanings_of(base.module, base.node.name)
    body = found.node.body
    for statement, below in zip(body, [*body[1:], None], strict=True):
        field = _field(statement)
        if field and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            meanings[field] = " ".join(str(below.value.value).split())
    return meanings


def attribute(module: str, owner: str | None, name: str) -> Any:
    """The value of a class's attribute, its own or of a base: a literal, or the keywords of a call, which may
    be calls too.

    None where it has none. Raises Unreadable.
    """
    value = _attribute(_owner(module, owner), name)
    return _keywords(*value) if value else None


def overrides(module: str, owner: str | None, base: tuple[str, str], names: Set[str]) -> bool:
    """Whether the class, or one between it and a base (module, class), sets one of the attributes.

    Raises Unreadable, also if it does not inherit from the base.
    """
    todo, reached = [_owner(module, owner)], False
    while todo:
        found = todo.pop()
        if (found.module, found.node.name) == base:
            reached = True
        elif names & _names(found):
            return True
        else:
            todo += _bases(found)
    if not reached:
        raise Unreadable(f"{module}: its class does not inherit from {'.'.join(base)}")
    return False


def line_of(one: Knob, meaning: str) -> str:
    """A knob for people: its meaning and what is allowed, in one line."""
    return f"{first_sentence(meaning)} ({one.allowed()})" if meaning else one.allowed()


def first_sentence(meaning: str) -> str:
    """The first sentence of a meaning, which may go on, without the full stop at its end."""
    for end in (". ", ".\n"):
        meaning = meaning.partition(end)[0]
    return meaning.rstrip(".")


# --- finding classes ------------------------------------------------------------------------------


@cache
def _tree(module: str) -> ast.Module:
    """The syntax tree of a module. Only the top-level package's place is asked of Python, without import."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    folders = [Path(folder).joinpath(*rest) for folder in (spec and spec.submodule_search_locations) or ()]
    candidates = [file for folder in folders for file in (folder.with_suffix(".py"), folder / "__init__.py")]
    if spec and spec.origin and not rest:
        candidates = [Path(spec.origin)]
    for file in candidates:
        try:
            return ast.parse(file.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, SyntaxError, ValueError) as error:
            raise Unreadable(f"{module}: cannot be read: {error}") from None
    raise Unreadable(f"{module}: its source is not found")


def _owner(module: str, owner: str | None) -> _Class:
    if owner is not None:
        return _class(module, owner)
    classes = (_Class(module, node) for node in _tree(module).body if isinstance(node, ast.ClassDef))
    found = [one for one in classes if _attribute(one, "Config")]
    if len(found) != 1:
        raise Unreadable(f"{module}: {len(found)} of its classes have a Config")
    return found[0]


def _class(module: str, name: str) -> _Class:
    """The class of this name in a module, which may import it. Raises Unreadable."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _Class(module, node)
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name and _is_followed(str(node.module), module):
                    return _class(str(node.module), alias.name)
    raise Unreadable(f"{module}: no class {name} that can be read")


def _is_followed(target: str, module: str) -> bool:
    return target.partition(".")[0] in (*_OURS, module.partition(".")[0])


def _bases(found: _Class) -> Iterator[_Class]:
    """The bases of a class of knobs. Raises Unreadable for one that cannot be found."""
    for base in found.node.bases:
        if not isinstance(base, ast.Name):
            raise Unreadable(f"{found.module}: the base {ast.unparse(base)} of {found.node.name}")
        if base.id not in _ROOTS:
            yield _class(found.module, base.id)


def _names(found: _Class) -> set[str]:
    """The attributes that the body of a class sets."""
    names = set()
    for statement in found.node.body:
        inside = [statement] if isinstance(statement, _NAMED) else [*ast.walk(statement)]
        names |= {node.name for node in inside if isinstance(node, _NAMED)}
        names |= {
            node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
    return names


def _has_checks(found: _Class) -> bool:
    """Whether a class of knobs, or a base, has methods that run when its instances are made."""
    own = any(name.startswith("__") or hasattr(Knobs, name) for name in _names(found))
    return own or any(map(_has_checks, _bases(found)))


def _attribute(found: _Class, name: str) -> tuple[str, ast.expr] | None:
    """The expression that a class or its first base with such an attribute assigns, and its module."""
    for node in found.node.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                return found.module, value
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if target == name:
                return found.module, value
    for base in found.node.bases:
        try:
            inherited = isinstance(base, ast.Name) and _attribute(_class(found.module, base.id), name)
        except Unreadable:  # of another package: torch's own classes have no such attributes
            continue
        if inherited:
            return inherited
    return None


# --- reading values -------------------------------------------------------------------------------


def _fields(found: _Class) -> dict[str, tuple[Any, Any]]:
    """Name → (type, `knob`) of the fields of a class of knobs and its bases, in the order of a dataclass."""
    fields: dict[str, tuple[Any, Any]] = {}
    for base in _bases(found):
        fields |= _fields(base)
    for node in found.node.body:
        if isinstance(node, ast.AnnAssign) and (name := _field(node)):
            if node.value is None:
                raise Unreadable(f"{found.module}: {found.node.name}.{name} has no default")
            fields[name] = (_type(found, node.annotation), _default(found.module, node.value))
    return fields


def _field(node: ast.stmt) -> str | None:
    """The name of the field of a dataclass that a statement declares, or None."""
    if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
        return None
    return None if "ClassVar" in ast.unparse(node.annotation) else node.target.id


def _type(found: _Class, annotation: ast.expr) -> Any:
    expression = ast.Expression(annotation)
    nodes = list(ast.walk(expression))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    if not all(isinstance(node, _TYPE_NODES) for node in nodes) or not names <= {*_KINDS}:
        raise Unreadable(f"{found.module}: the type {ast.unparse(annotation)} in {found.node.name}")
    return eval(compile(expression, found.module, "eval"), {"__builtins__": {}}, dict(_KINDS))


def _default(module: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == knob.__name__:
        positional = [_literal(module, one) for one in node.args]
        words = {str(word.arg): _literal(module, word.value) for word in node.keywords}
        try:
            return knob(*positional, **words)
        except TypeError as error:
            raise Unreadable(f"{module}: {ast.unparse(node)}: {error}") from None
    return _literal(module, node)


def _keywords(module: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and node.keywords and not node.args:
        return {str(word.arg): _keywords(module, word.value) for word in node.keywords}
    return _literal(module, node)


def _literal(module: str, node: ast.expr) -> Any:
    """The value of a literal, or of a constant of the module that is one."""
    if isinstance(node, ast.Name):
        for statement in _tree(module).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == node.id:
                return _literal(module, statement.value)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise Unreadable(f"{module}: {ast.unparse(node)} is not a literal") from None
