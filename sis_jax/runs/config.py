"""The base of every door's configuration: a frozen dataclass, maybe with groups (`train`, `adapt`).


A group is a field whose default factory is a dataclass. Groups order the code and the help page;
the Python call, the flags and run.json name each field by itself.

    @dataclass(frozen=True)
    class ReportConfig(Config):
    verb: ClassVar[str] = "report"
    run: Annotated[str, Positional, spelled("RUN")]

    @door(ReportConfig, stage="sis_jax.runs.page")
    def report(config: ReportConfig) -> Path: ...

No JAX here: `--help` reads these classes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import shlex
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from tyro.conf import Fixed, FlagCreatePairsOff, Positional, Suppress, UseAppendAction, arg

from sis_jax.errors import unknown_name

C = TypeVar("C", bound="Config")
R = TypeVar("R")
T = TypeVar("T")
PythonOnly = Annotated[T, Suppress, Fixed]  # a field that no flag can spell
Switch = Annotated[bool, FlagCreatePairsOff]  # one that is off: --help shows no --no-x
RESOLVED = {"resolved": True}  # metadata of a field that recipes or stages fill in, not callers


def spelled(metavar: str, kind: Any = str, default: str = "") -> Any:
    """The shell's spelling of a field that also takes Python objects."""
    hint = f"(default: {default})" if default else ""
    return arg(metavar=metavar, constructor=kind | None, help_behavior_hint=hint)


@dataclass(frozen=True)
class Config:
    """Base of the configurations.

    `verb` names the door, `makes` its result, `unrecorded` the fields that run.json neither stores
    nor compares; `renamed` maps names in older records to today's or None, `later` gives what older
    records mean by a missing field. `choice` names the field whose value decides the `settings`;
    `elsewhere` has a sentence for flags that other verbs have.
    """

    verb: ClassVar[str]
    makes: ClassVar[str] = "this result"
    unrecorded: ClassVar[tuple[str, ...]] = ("out", "overwrite")
    renamed: ClassVar[Mapping[str, str | None]] = {}
    later: ClassVar[Mapping[str, Any]] = {}
    choice: ClassVar[str] = ""
    elsewhere: ClassVar[Mapping[str, str]] = {}

    def flat(self) -> dict[str, Any]:
        """Every field by its own name, groups opened."""
        return _flat(self)

    def record(self) -> dict[str, Any]:
        """The part of the configuration that run.json keeps and a later call is compared with."""
        return without(self.settled(), self.unrecorded)

    def settled(self) -> dict[str, Any]:
        """`flat`, without the fields that hold what older records mean by their absence."""
        flat = self.flat()
        return without(flat, {k for k, v in self.later.items() if flat[k] == v})

    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        usual = {name: default(f) for name, f in leaves(type(self)).items()}
        return {k: v for k, v in self.flat().items() if k in usual and not _same(v, usual[k])}

    def command(self) -> str:
        """The shell line that repeats the call, without defaults and `--overwrite`."""
        return shlex.join(["python", "-m", f"sis_jax.{self.verb}", *_words(self)])


def _flat(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        inner = getattr(value, f.name)
        found |= _flat(inner) if is_group(f) else {f.name: inner}
    return found


def without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    names = set(names)
    return {k: v for k, v in values.items() if k not in names}


def _same(value: Any, usual: Any) -> bool:
    return value is usual or (type(value) is type(usual) and value == usual)


def is_group(field: dataclasses.Field[Any]) -> bool:
    return isinstance(field.default_factory, type) and dataclasses.is_dataclass(
        field.default_factory
    )


def leaves(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a configuration by name, groups opened."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for f in dataclasses.fields(cls):
        inner = leaves(f.default_factory) if is_group(f) else {f.name: f}  # type: ignore[arg-type]
        assert not found.keys() & inner.keys(), f"{cls.__name__} names a field twice"
        found |= {} if RESOLVED.items() <= f.metadata.items() else inner
    return found


def default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, `inspect.Parameter.empty` where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def build(cls: type[C], values: Mapping[str, Any]) -> C:
    """A configuration from fields by name; the others take their defaults."""
    chosen: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if is_group(f):
            group = typing.cast(type, f.default_factory)
            chosen[f.name] = group(**{k: v for k, v in values.items() if k in leaves(group)})
        elif f.name in values:
            chosen[f.name] = values[f.name]
    return cls(**chosen)


def signature(cls: type[Config], returns: Any = inspect.Signature.empty) -> inspect.Signature:
    """The Python call of a configuration: its fields, those before `KW_ONLY` by position too."""
    kinds, types = inspect.Parameter, hints(cls)
    params = [
        inspect.Parameter(
            name,
            kinds.KEYWORD_ONLY if f.kw_only else kinds.POSITIONAL_OR_KEYWORD,
            default=default(f),
            annotation=types[name],
        )
        for name, f in leaves(cls).items()
        if name != "settings"
    ]
    if cls.choice:
        params.append(inspect.Parameter("settings", kinds.VAR_KEYWORD, annotation=Any))
    return inspect.Signature(sorted(params, key=lambda p: p.kind), return_annotation=returns)


def hints(cls: type, include_extras: bool = False) -> dict[str, Any]:
    """The types of the fields, groups opened; `include_extras` as in `typing.get_type_hints`."""
    own, found = typing.get_type_hints(cls, include_extras=include_extras), {}
    for f in dataclasses.fields(cls):
        group = typing.cast(type, f.default_factory)
        found |= hints(group, include_extras) if is_group(f) else {f.name: own[f.name]}
    return found


def markers(cls: type) -> dict[str, tuple[Any, ...]]:
    """{field: its metadata from `Annotated`}, groups opened."""
    return {k: getattr(t, "__metadata__", ()) for k, t in hints(cls, True).items()}


def _words(config: Config) -> list[str]:
    marks, front, back = markers(type(config)), [], []
    for name, value in config.changed().items():
        words = _spelled(value)
        if name == "overwrite" or not words or Suppress in marks[name]:
            continue
        flag = name.replace("_", "-")
        if Positional in marks[name]:
            front += words
        elif isinstance(value, bool):
            back.append(f"--{flag}" if value else f"--no-{flag}")
        elif UseAppendAction in marks[name]:
            back += [word for one in words for word in (f"--{flag}", one)]
        else:
            back += [f"--{flag}", *words]
    return front + back


def _spelled(value: Any) -> list[str]:
    """A value in the words of a shell; none for an object that only Python can give."""
    if isinstance(value, Mapping):
        return [json.dumps(value, ensure_ascii=False)]
    if isinstance(value, tuple | list):
        return [word for one in value for word in _spelled(one)]
    return [str(value)] if isinstance(value, str | int | float | os.PathLike) else []


@functools.cache
def variant(cls: type[C], settings: type) -> type[C]:
    """`cls` with the fields of `settings` as its group of that name."""
    first = Annotated[settings, arg(name=cls.choice)]  # titles its box of --help
    group = dataclasses.field(default_factory=settings, kw_only=True)
    return typing.cast(
        type[C],
        dataclasses.make_dataclass(
            cls.__name__, [("settings", first, group)], bases=(cls,), frozen=True
        ),
    )


@dataclass(frozen=True)
class Door:
    """How a verb is called. config: its configuration.

    stage: the module with optional hooks, `plan(config) -> dict`, `results(value, config) -> paths`
        for stdout, `summary(value, config) -> lines` for stderr, `problems(value) -> str`. needs:
        {field that only a shell must give: its value in words}. variants: {value of
        `config.choice`: dataclass of its settings}.
    """

    config: type[Config]
    stage: str
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    variants: Mapping[str, type] = dataclasses.field(default_factory=dict)

    def config_for(self, choice: str | None = None) -> type[Config]:
        """The configuration for a value of `config.choice`; UsageError for an unknown one."""
        if not self.config.choice:
            return self.config
        usual = default(leaves(self.config)[self.config.choice])
        name = usual if choice is None else choice
        if name not in self.variants:
            raise unknown_name(self.config.choice, str(name), self.variants)
        return variant(self.config, self.variants[name])

    def build(self, values: Mapping[str, Any], settings: Mapping[str, Any]) -> Config:
        """A configuration from fields by name. Raises UsageError for unknown settings."""
        cls = self.config_for(values.get(self.config.choice))
        known = leaves(cls)
        for name in settings:
            if name not in known:
                chosen = values.get(self.config.choice, default(known[self.config.choice]))
                raise unknown_name(f"setting of {chosen}", name, known)
        return build(cls, {**values, **settings})

    def completed(self, config: Config) -> Config:
        """`config` as its variant, where it was made as the class that all variants share."""
        values = config.flat()
        if "settings" not in values:
            return config
        settings = values.pop("settings")
        return self.build(values, {} if settings is None else vars(settings))


def door(
    config: type[C],
    *,
    stage: str = "",
    needs: Mapping[str, str] | None = None,
    variants: Mapping[str, type] | None = None,
) -> Callable[[Callable[[C], R]], Callable[..., R]]:
    """Make `verb(config)` callable with the configuration's fields as arguments, too.

    The signature and docstring list the fields. `stage` is `sis_jax.stages.<verb>` by default.
    """

    def wrap(work: Callable[[C], R]) -> Callable[..., R]:
        shown = signature(config, work.__annotations__.get("return", inspect.Signature.empty))
        itself = Door(
            config, stage or f"sis_jax.stages.{work.__name__}", needs or {}, variants or {}
        )

        @functools.wraps(work)
        def verb(*args: Any, **kwargs: Any) -> R:
            if len(args) == 1 and isinstance(args[0], config) and not kwargs:
                return work(typing.cast(C, itself.completed(args[0])))
            values = shown.bind(*args, **kwargs).arguments
            settings = values.pop("settings", {})
            return work(typing.cast(C, itself.build(values, settings)))

        verb.__doc__ = f"{inspect.getdoc(work)}\n\n{_arguments(config)}"
        vars(verb).update(__signature__=shown, door=itself)
        return verb

    return wrap


def _arguments(cls: type) -> str:
    """The paragraphs `Args:` of a configuration and its groups, one after the other."""
    groups = [typing.cast(type, f.default_factory) for f in dataclasses.fields(cls) if is_group(f)]
    docs = [inspect.getdoc(one) or "" for one in (cls, *groups)]
    return "\n".join(["Args:", *(doc.partition("Args:\n")[2].rstrip() for doc in docs)])
