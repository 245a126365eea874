"""Places in a Python file, found by its syntax tree: a line number to insert before, and how far to indent there."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a line goes.

    Attributes:
        before: number of the line that it precedes, from 1.
        indent: spaces.
    """

    before: int
    indent: int


Anchor = Callable[[ast.Module], Place]


class NoSuchPlaceError(Exception):
    """The file does not hold what a hook stands beside."""


def parse(source: str) -> ast.Module:
    """The tree of a file; what upstream's code is warned about is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def after_imports(tree: ast.Module) -> Place:
    """Past the last import at the top level."""
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    if not imports:
        raise NoSuchPlaceError("imports")
    return Place(imports[-1].end_lineno + 1, 0)


def after_definition(name: str) -> Anchor:
    """Past a class or function."""
    return lambda tree: Place(_definition(tree, name).end_lineno + 1, 0)


def start_of(function: str) -> Anchor:
    """Before a function's first statement, past its docstring. `Class.method` names a method."""

    def find(tree: ast.Module) -> Place:
        definition = _definition(tree, function)
        body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
        if not body:
            raise NoSuchPlaceError(f"statements in {function}")
        return _before(body[0])

    return find


def before_return(function: str) -> Anchor:
    """Before the last statement of a function, a return."""

    def find(tree: ast.Module) -> Place:
        last = _definition(tree, function).body[-1]
        if not isinstance(last, ast.Return):
            raise NoSuchPlaceError(f"a return at the end of {function}")
        return _before(last)

    return find


def before_condition(function: str, name: str) -> Anchor:
    """Before the first `if` of a function whose condition names `name`."""
    return _before_first(function, name, lambda node: node.test if isinstance(node, ast.If) else None)


def before_assignment(function: str, name: str) -> Anchor:
    """Before the first assignment of a function in which `name` occurs."""
    return _before_first(function, name, lambda node: node if isinstance(node, ast.Assign) else None)


def either(first: Anchor, second: Anchor) -> Anchor:
    """The first place, or, in a file that lacks it, the second."""

    def find(tree: ast.Module) -> Place:
        try:
            return first(tree)
        except NoSuchPlaceError:
            return second(tree)

    return find


def holds(tree: ast.Module, name: str) -> bool:
    """Whether a class, function or method is there."""
    try:
        return bool(_definition(tree, name))
    except NoSuchPlaceError:
        return False


def _before_first(function: str, name: str, part: Callable[[ast.stmt], ast.AST | None]) -> Anchor:
    def find(tree: ast.Module) -> Place:
        for statement in _definition(tree, function).body:
            seen = part(statement)
            if seen is not None and name in _names(seen):
                return _before(statement)
        raise NoSuchPlaceError(f"a statement about {name} in {function}")

    return find


def _names(node: ast.AST) -> set[str]:
    found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return found | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def _before(statement: ast.stmt) -> Place:
    decorators = getattr(statement, "decorator_list", [])
    return Place(min([statement.lineno, *(each.lineno for each in decorators)]), statement.col_offset)


def _definition(tree: ast.Module, name: str) -> ast.FunctionDef | ast.ClassDef:
    found: ast.AST = tree
    for part in name.split("."):
        inner = [node for node in found.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
        if not inner:
            raise NoSuchPlaceError(name)
        found = inner[-1]
    return found
