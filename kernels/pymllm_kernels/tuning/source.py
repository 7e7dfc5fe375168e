"""A hash of the source of a kernel: the same in every process, on every machine, without a GPU."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

_PACKAGE = "pymllm_kernels"
_ROOT = Path(__file__).parents[1]

Place = tuple[str, str]


@functools.cache
def source_hash(roots: tuple[str, ...]) -> str:
    """16 hexadecimal digits over :func:`source_of`.

    Raises:
        ValueError: a root is not there.
    """
    found = source_of(roots)
    digest = hashlib.sha256()
    for place in sorted(found):
        digest.update("\0".join((*place, found[place], "")).encode())
    return digest.hexdigest()[:16]


def source_of(roots: tuple[str, ...]) -> dict[Place, str]:
    """The text of all functions and constants that some functions are built of, by module and name.

    Follows names through the modules of this package. Comments on lines of their own, blank lines
    and docstrings are left out; so are functions of other packages, which the version of Triton
    stands for.

    Args:
        roots: ``"package.module:function"`` each.

    Raises:
        ValueError: a root is not there.
    """
    found: dict[Place, str] = {}
    todo = []
    for root in roots:
        module, _, name = root.partition(":")
        todo.append((module, name))
        if name not in _definitions(module):
            raise ValueError(f"sources: found {root!r}, but there is no such definition")
    while todo:
        module, name = place = todo.pop()
        if place in found:
            continue
        definitions, imports = _definitions(module), _imports(module)
        if name in definitions:
            node, text = definitions[name]
            found[place] = text
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            todo += [(module, used) for used in sorted(names - {name})]
        elif name in imports:
            todo.append(imports[name])
    return found


@functools.cache
def _read(module: str) -> tuple[ast.Module, list[str]]:
    path = _ROOT.parent.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    return ast.parse(text), text.splitlines()


@functools.cache
def _definitions(module: str) -> dict[str, tuple[ast.stmt, str]]:
    """Top-level functions, classes and assigned names, with their text."""
    tree, lines = _read(module)
    found: dict[str, tuple[ast.stmt, str]] = {}
    for node in tree.body:
        names = []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        for name in names:
            found[name] = (node, _text(node, lines))
    return found


@functools.cache
def _imports(module: str) -> dict[str, Place]:
    """Names that a module takes from others of this package, and where they come from."""
    tree, _ = _read(module)
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_PACKAGE)
        for alias in node.names
        if node.module
    }


def _text(node: ast.stmt, lines: list[str]) -> str:
    """The lines of a definition, without docstrings, blank lines and comments."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    left_out: set[int] = set()
    for inner in ast.walk(node):
        if (
            isinstance(inner, (ast.FunctionDef, ast.ClassDef))
            and ast.get_docstring(inner) is not None
        ):
            docstring = inner.body[0]
            left_out.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    kept = []
    for number in range(first, (node.end_lineno or first) + 1):
        line = lines[number - 1].rstrip()
        if number not in left_out and line and not line.lstrip().startswith("#"):
            kept.append(line)
    return "\n".join(kept)
