"""From a Python signature to command-line parameters, without importing what the annotations name.

Annotations are strings and may name types that exist only for type checkers (`Generator`,
`Float[Array, "n z"]`). Whatever a shell cannot spell is dropped from a union: `Generator | str |
None` is a string on the command line.
"""

from __future__ import annotations

import ast
import builtins
import collections.abc
import dataclasses
import importlib
import importlib.util
import inspect
import pathlib
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

REQUIRED = inspect.Parameter.empty
_SCALARS = (str, int, float, bool, pathlib.Path, type(None))
_SEQUENCES = (tuple, list, collections.abc.Sequence, collections.abc.Iterable)


@dataclass(frozen=True)
class Param:
    """One argument: its Python name, the type a shell can spell, the default (`REQUIRED` for none),
    the help text.
    """

    name: str
    type: Any
    default: Any
    help: str = ""
    positional: bool = False

    @property
    def shown(self) -> str:
        """As people see it: PHOTOS, or --position-weight."""
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")

    def flags(self) -> tuple[str, ...]:
        return (self.shown, "--no-" + self.shown[2:]) if self.type is bool else (self.shown,)

    def annotated(self, tyro: Any) -> Any:
        """The type with tyro's settings attached."""
        shown = (
            "(default: "
            + " ".join(
                map(str, self.default if isinstance(self.default, tuple) else [self.default])
            )
            + ")"
        )
        hint = (
            "(required)"
            if self.default is REQUIRED
            else ""
            if self.default is None or self.default == ()
            else shown
        )
        metavar = (
            None if self.type is bool else self.shown if self.positional else spelled(self.type)
        )
        kind = Annotated[
            self.type, tyro.conf.arg(help=self.help, metavar=metavar, help_behavior_hint=hint)
        ]
        return tyro.conf.Positional[kind] if self.positional else kind


class _PythonOnlyMeta(type):
    """Stands for any name that cannot be resolved: it can be subscripted, called up as an
    attribute, and joined with `|`.
    """

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, item: Any) -> Any:
        return cls


class _PythonOnly(metaclass=_PythonOnlyMeta):
    pass


class _Names(dict):
    """The names an annotation may use; unknown ones become `_PythonOnly`."""

    def __init__(self, scope: dict[str, Any]):
        super().__init__(
            {
                **vars(builtins),
                **{n: getattr(typing, n) for n in typing.__all__},
                "Path": pathlib.Path,
                "Sequence": collections.abc.Sequence,
                **scope,
            }
        )

    def __missing__(self, name: str) -> Any:
        return _PythonOnly


def shell_type(annotation: Any, scope: dict[str, Any] | None = None) -> Any:
    """The part of an annotation that a command line can spell, or None when nothing is left."""
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, {"__builtins__": {}}, _Names(scope or {}))
        except Exception:  # an annotation nobody can evaluate is no flag
            return None
    if annotation is None:
        return type(None)
    if annotation in _SCALARS if isinstance(annotation, type) else False:
        return annotation
    origin = get_origin(annotation)
    if origin is Literal:
        return annotation
    if origin is Annotated:
        return shell_type(get_args(annotation)[0], scope)
    if origin in (Union, types.UnionType):
        return _union([shell_type(member, scope) for member in get_args(annotation)])
    if origin in _SEQUENCES:
        members = [a for a in get_args(annotation) if a is not Ellipsis]
        return annotation if members and all(shell_type(m, scope) == m for m in members) else None
    return None


def _union(members: list[Any]) -> Any:
    members = [m for m in members if m is not None]
    if str in members and pathlib.Path in members:  # any text is a path: ask for one of the two
        members.remove(pathlib.Path)
    if not [m for m in members if m is not type(None)]:
        return None
    joined = members[0]
    for member in members[1:]:
        joined = Union[joined, member]  # noqa: UP007  (made at run time)
    return joined


def expected(kind: Any) -> str:
    """A type in words: "a whole number or 'auto'"."""
    words = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "nothing after it",
        pathlib.Path: "a path",
    }
    if kind in words:
        return words[kind]
    args = [a for a in get_args(kind) if a not in (type(None), Ellipsis)]
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, args))
    if get_origin(kind) in _SEQUENCES:
        return f"{expected(args[0])}, once or more, with spaces between"
    return " or ".join(expected(a) for a in args) or str(kind)


def spelled(kind: Any) -> str:
    """A type as `--help` shows it: INT|auto, PATH, INT INT ..."""
    args = [a for a in get_args(kind) if a not in (type(None), Ellipsis)]
    if get_origin(kind) is Literal:
        return "|".join(map(str, args))
    if get_origin(kind) in _SEQUENCES:
        return f"{spelled(args[0])} ..."
    return "|".join(map(spelled, args)) or kind.__name__.replace("str", "TEXT").upper()


def verb_params(verb: Callable[..., Any], docs: dict[str, str]) -> list[Param]:
    """The parameters of a function that a shell can give; those before `*` are positional.

    A parameter that only Python can give is left out, and so must have a default.
    """
    scope = getattr(inspect.unwrap(verb), "__globals__", {})
    found = []
    for p in inspect.signature(verb).parameters.values():
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            continue
        kind = shell_type(p.annotation, scope) if p.annotation is not p.empty else None
        if kind is None:
            if p.default is p.empty:
                raise TypeError(
                    f"{verb.__name__}: the command line cannot spell {p.name}: {p.annotation}, "
                    "and it has no default"
                )
            continue
        found.append(
            Param(
                p.name,
                kind,
                p.default,
                docs.get(p.name, ""),
                positional=p.kind is not p.KEYWORD_ONLY,
            )
        )
    return found


def method_params(home: str, taken: set[str], choice: str) -> list[Param]:
    """The constructor fields of the dataclass at "module:Class" that are not in `taken`, as flags.

    Read from the source, not by importing: methods import JAX, and `--help` must not. A class whose
    defaults are not plain values is imported.
    """
    module, _, name = home.partition(":")
    try:
        rows, docs = _read_fields(module, name)
    except (ValueError, SyntaxError, OSError, LookupError, AttributeError):
        rows, docs = _import_fields(module, name)
    found = []
    for field, annotation, default in rows:
        kind = shell_type(annotation)
        if field in taken or field.endswith("_") or field.startswith("_") or kind is None:
            continue
        found.append(
            Param(
                field, kind, default, " ".join(filter(None, [docs.get(field, ""), f"[{choice}]"]))
            )
        )
    return found


def _read_fields(module: str, name: str) -> tuple[list[tuple[str, str, Any]], dict[str, str]]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise LookupError(module)
    tree = ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8"))
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None or node.bases:  # inherited fields are not in this source
        raise LookupError(name)
    rows = []
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        annotation = ast.unparse(line.annotation)
        if "ClassVar" in annotation or line.target.id.endswith("_"):
            continue
        rows.append(
            (
                line.target.id,
                annotation,
                REQUIRED if line.value is None else ast.literal_eval(line.value),
            )
        )
    fields = {row[0] for row in rows}
    return rows, _doc_lines(ast.get_docstring(node) or "", fields)


def _import_fields(module: str, name: str) -> tuple[list[tuple[str, Any, Any]], dict[str, str]]:
    kind = getattr(importlib.import_module(module), name)
    rows = []
    for f in dataclasses.fields(kind):
        if not f.init:
            continue
        default = f.default
        if default is dataclasses.MISSING:
            default = REQUIRED if f.default_factory is dataclasses.MISSING else f.default_factory()
        rows.append((f.name, f.type, default))
    return rows, _doc_lines(inspect.getdoc(kind) or "", {row[0] for row in rows})


def parse_docs(verb: Callable[..., Any]) -> dict[str, str]:
    """The lines `name: text` or `name, other: text` of a docstring, {parameter: text}; a paragraph
    belongs to its first line.
    """
    return _doc_lines(inspect.getdoc(verb) or "", set(inspect.signature(verb).parameters))


def _doc_lines(text: str, names: set[str]) -> dict[str, str]:
    docs: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        found = _entry(line, names)
        if found:
            # Parameters that share a line share its text, and the lines that follow.
            current = [found[1]]
            docs.update(dict.fromkeys(found[0], current))
        elif not line.strip() or re.match(r"\s*(Returns|Raises|Yields|Args)\b", line):
            current = []
        else:
            current.append(line.strip())
    return {name: " ".join(lines) for name, lines in docs.items()}


def _entry(line: str, names: set[str]) -> tuple[list[str], str] | None:
    match = re.match(r"\s*(`?\w+`?(?:, `?\w+`?)*)(?: \([^)]*\))?: +(\S.*)$", line)
    found = [n.strip("` ") for n in match.group(1).split(",")] if match else []
    return (found, match.group(2)) if match and set(found) <= names else None


def describe(verb: Callable[..., Any]) -> str:
    """The docstring up to its first parameter: what `--help` opens with."""
    names, lines = set(inspect.signature(verb).parameters), []
    for line in (inspect.getdoc(verb) or "").splitlines():
        if _entry(line, names) or re.match(r"\s*Args:", line):
            break
        lines.append(line)
    return "\n".join(lines).strip()
