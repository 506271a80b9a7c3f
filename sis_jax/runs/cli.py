"""The command-line door: one function signature becomes the flags, the Python call and the
configuration on record.

A verb's module ends with

    if __name__ == "__main__":
        cli.main(discover, variants={"method": METHODS})

Parameters before the `*` of the signature are positional, the rest are flags; help texts are the
lines `name: text` of the docstring. `variants` maps a parameter to a registry {choice:
"module:DataclassName"}: the fields of the chosen dataclass become flags too and reach the verb as
keyword arguments. Two optional attributes of the verb are hooks: `verb.plan(config) -> dict` for
`--dry-run` (keys "files", "seconds", "memory_bytes" and free ones) and `verb.results(value, config)
-> paths` for the lines on stdout.

Nothing here imports JAX: `--help` answers in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sis_jax.ops.progress import showing_progress
from sis_jax.runs.console import any_console
from sis_jax.runs.flags import (
    REQUIRED,
    Param,
    describe,
    expected,
    method_params,
    parse_docs,
    verb_params,
)
from sis_jax.types import SisError

_CACHE_BYTES = 2 * 1024**3


class _Asked(Exception):
    """The command line itself is wrong; the message is what to print, the exit code is 2."""


def main(
    verb: Callable[..., Any],
    variants: Mapping[str, Mapping[str, str]] | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Run `verb` from the command line and exit: 0 done, 1 failed, 2 asked wrongly, 130
    interrupted.

    verb: the function; its name is the program's. variants: {parameter: {choice: "module:Class"}}.
        argv: default `sys.argv[1:]`.
    """
    sys.exit(run(verb, variants, argv))


def run(
    verb: Callable[..., Any],
    variants: Mapping[str, Mapping[str, str]] | None = None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> int:
    """`main` without leaving the process: returns the exit code. An unexpected exception prints its
    traceback and gives 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = prog or f"python -m sis_jax.{verb.__name__}"
    try:
        config, dry_run, quiet = parse(verb, variants, argv)
        for name in getattr(
            verb, "needed", ()
        ):  # what Python can do without: there the result is returned
            if config[name] is None:
                raise _Asked(f"--{name.replace('_', '-')} is missing; --help lists what to type")
        if dry_run:
            print_plan(verb, config)
            return 0
        enable_compilation_cache()
        with showing_progress(not quiet):
            value = verb(**config)
        any_console()
        for path in result_paths(verb, value, config):
            print(path)
        sys.stdout.flush()
        left_out = verb.problems(value) if hasattr(verb, "problems") else ""
        if left_out:  # done as far as it could be
            return _fail(f"{prog}: {left_out}", 1)
    except _Asked as error:
        return _fail(f"{prog}: {error}", 2)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt:
        return _fail(
            f"{prog}: interrupted; the same command resumes where the run folder allows it", 130
        )
    except BrokenPipeError:
        # The reader of stdout left (`| head`); pointing stdout elsewhere keeps the interpreter's
        # last flush silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _report_exception(prog, error)
    return 0


def _report_exception(prog: str, error: Exception) -> int:
    """One sentence for a mistake of the user, the traceback for a mistake of ours."""
    if isinstance(error, SisError):
        return _fail(f"{prog}: {error}", error.exit_code)
    traceback.print_exception(error)
    return 1


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def parse(
    verb: Callable[..., Any],
    variants: Mapping[str, Mapping[str, str]] | None = None,
    argv: Sequence[str] = (),
) -> tuple[dict[str, Any], bool, bool]:
    """The arguments `verb` is called with, and whether `--dry-run` and `--quiet` were given."""
    docs = parse_docs(verb)
    params = verb_params(verb, docs)
    for name, registry in (variants or {}).items():
        choice = _choice(argv, name, next(p.default for p in params if p.name == name), registry)
        if choice is not None:
            params += method_params(registry[choice], taken={p.name for p in params}, choice=choice)
    door = [
        Param(
            "dry_run",
            bool,
            False,
            "print the resolved configuration, the planned files and an estimate, and stop",
        ),
        Param("quiet", bool, False, "no progress bars"),
    ]
    door = [p for p in door if p.name not in {q.name for q in params}]
    config = _parse_with_tyro(verb.__name__, describe(verb), params + door, list(argv))
    flags = {p.name: config.pop(p.name) for p in door}
    return config, flags.get("dry_run", False), flags.get("quiet", False)


def _choice(
    argv: Sequence[str], name: str, default: Any, registry: Mapping[str, str]
) -> str | None:
    """Which variant the command line asks for, before the flags can be known."""
    flag, chosen = "--" + name.replace("_", "-"), default
    for i, token in enumerate(argv):
        token = token.replace(
            "_", "-", token.count("_") if token.startswith("--") and "=" not in token else 0
        )
        if token == flag and i + 1 < len(argv):
            chosen = argv[i + 1]
        elif token.startswith(flag + "="):
            chosen = token.partition("=")[2]
    if isinstance(chosen, str) and chosen not in registry:
        raise _Asked(f"unknown {name} {chosen!r}; {_nearest(chosen, registry)}")
    return chosen if isinstance(chosen, str) else None


def _parse_with_tyro(
    name: str, description: str, params: list[Param], argv: list[str]
) -> dict[str, Any]:
    import tyro  # late: only the command line needs it

    _check_flags(params, argv)
    fields = []
    for p in params:
        default = (
            dataclasses.field() if p.default is REQUIRED else dataclasses.field(default=p.default)
        )
        fields.append((p.name, p.annotated(tyro), default))
    record = dataclasses.make_dataclass(name, fields, kw_only=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                record, prog=f"python -m sis_jax.{name}", description=description, args=argv
            )
    except SystemExit as stop:
        if stop.code:
            raise _Asked(_explain(said.getvalue(), params, argv)) from None
        raise
    return {p.name: getattr(parsed, p.name) for p in params}


def _check_flags(params: list[Param], argv: list[str]) -> None:
    known = {flag: p for p in params if not p.positional for flag in p.flags()}
    for token in argv:
        flag = token.partition("=")[0].replace("_", "-")
        if token.startswith("--") and len(token) > 2 and flag not in known and flag != "--help":
            raise _Asked(f"unknown flag {flag!r}; {_nearest(flag, known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.0)
    return "did you mean " + ", ".join(nearest) + "?" if nearest else "there are none"


def _explain(said: str, params: list[Param], argv: list[str]) -> str:
    """One sentence for what tyro refused: what was got, what was expected, what to type."""
    text = " ".join(re.sub(r"[╭╮╰╯│─]+", " ", said).split())
    required = [p for p in params if p.default is REQUIRED]
    missing = [
        p.shown for p in required if re.search(rf"(?<![\w-]){re.escape(p.shown)}(?![\w-])", text)
    ]
    if missing and re.search(r"missing from|required", text, re.IGNORECASE):
        return f"{', '.join(missing)} is missing; --help lists what to type"
    for p in params:
        if re.search(rf"{re.escape(p.shown)}(?![\w-])", text):
            got = _values_of(p, argv)
            return f"{p.shown} got {got or 'nothing'}, expected {expected(p.type)}"
    stray = re.search(r"[Uu]nrecognized (?:options|arguments)[^:]*: *(\S+)", text)
    if stray:
        return f"did not expect {stray.group(1)!r}; --help lists what can be given"
    return text or "the arguments could not be read; --help lists them"


def _values_of(param: Param, argv: list[str]) -> str:
    for i, token in enumerate(argv):
        flag, equals, value = token.partition("=")
        if flag.replace("_", "-") in param.flags():
            rest = [value] if equals else list(_until_flag(argv[i + 1 :]))
            return " ".join(map(repr, rest))
    return ""


def _until_flag(tokens: Sequence[str]) -> Iterator[str]:
    for token in tokens:
        if token.startswith("--"):
            return
        yield token


def print_plan(verb: Callable[..., Any], config: dict[str, Any]) -> None:
    """What `--dry-run` shows: the configuration as it would be used, the files, the time and the
    memory.
    """
    print(f"would run {verb.__name__} with")
    width = max((len(name) for name in config), default=0)
    for name, value in config.items():
        print(f"  {name:<{width}}  {_plain(value)}")
    plan = verb.plan(config) if hasattr(verb, "plan") else {}
    plan = dict(plan or {})
    files = plan.pop("files", [])
    if files:
        print("would write")
        for file in files:
            print(f"  {file}")
    seconds, memory = plan.pop("seconds", None), plan.pop("memory_bytes", None)
    print(f"time    {'not estimated' if seconds is None else 'about ' + duration(seconds)}")
    print(f"memory  {'not estimated' if memory is None else 'about ' + byte_size(memory)}")
    for name, value in plan.items():
        for line in value if isinstance(value, (list, tuple)) else [value]:
            print(f"{name:<7} {_plain(line)}")


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "(none)"
    return "(not set)" if value is None else str(value)


def result_paths(verb: Callable[..., Any], value: Any, config: Mapping[str, Any]) -> list[str]:
    """The paths a verb made: what its `results` hook says, or the paths it returned, or the folder
    it was given.
    """
    if hasattr(verb, "results"):
        value = verb.results(value, config)
    if isinstance(value, (str, os.PathLike)):
        return [os.fspath(value)]
    if (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(v, (str, os.PathLike)) for v in value)
    ):
        return [os.fspath(v) for v in value]
    out = config.get("out")
    return [os.fspath(out)] if out else []


def command(
    verb_name: str, config: Mapping[str, Any], positional: Sequence[str] = ("gen", "photos", "run")
) -> str:
    """The shell line that repeats a call, `python -m sis_jax.discover --k 10 --out runs/faces`: for
    reports and messages.
    """
    words = ["python", "-m", f"sis_jax.{verb_name}"]
    words += [str(config[name]) for name in positional if config.get(name) is not None]
    for name, value in config.items():
        if name in (*positional, "overwrite") or value is None or value == ():
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [
                f"--{flag}",
                *map(str, value if isinstance(value, (list, tuple)) else [value]),
            ]
    return shlex.join(words)


def duration(seconds: float | int) -> str:
    """Seconds as people say them: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def byte_size(count: float | int) -> str:
    """Bytes as people say them: "640 MiB", "1.2 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit != "GiB" else f"{count:.1f} GiB"
        count /= 1024
    return f"{count:.1f} TiB"


def use_cpu_cores() -> None:
    """Let JAX see the CPU as several devices, one per core up to the largest power of two; call it
    before JAX is imported.

    An accelerator is not affected, and a device count the user put into XLA_FLAGS stands.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if "jax" in sys.modules or "xla_force_host_platform_device_count" in flags or cores < 2:
        return
    count = 1 << (cores.bit_length() - 1)  # batches are powers of two, and are divided evenly
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    # With fewer threads than queued collectives, virtual devices of jax 0.10 and 0.11 wait for each
    # other for ever.
    os.environ.setdefault("NPROC", str(max(32, 4 * count)))


def cache_folder() -> Path | None:
    """Where compiled programs are kept, None when SIS_JAX_CACHE=off."""
    if os.environ.get("SIS_JAX_CACHE", "on").lower() in ("off", "0", "no", "false"):
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or home / "sis_jax" / "xla")


def enable_compilation_cache() -> Path | None:
    """Keep compiled programs between runs, under XDG_CACHE_HOME (or ~/.cache)/sis_jax/xla; returns
    the folder, None when off.

    SIS_JAX_CACHE=off turns it off, and JAX_COMPILATION_CACHE_DIR wins over the folder. The
    thresholds are lowered because most programs here are small. Call it before JAX compiles
    anything; it does not import JAX.
    """
    folder = cache_folder()
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    if _has_filelock():
        settings["jax_compilation_cache_max_size"] = _CACHE_BYTES
    for name, value in settings.items():
        if name.upper() not in os.environ or name == "jax_compilation_cache_dir":
            os.environ[name.upper()] = str(value)
            if "jax" in sys.modules:  # it read the environment when it was imported
                sys.modules["jax"].config.update(name, value)
    return folder


def _has_filelock() -> bool:
    """JAX can bound the cache's size only where the filelock package is installed, and fails where
    it is not.
    """
    return importlib.util.find_spec("filelock") is not None


def hooks(stage: str, *names: str, needed: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Give a door the hooks of its stage, which is imported when one of them is called: `--help`
    needs none.

    stage: the module. names: of its functions, "plan", "results", "problems". needed: parameters
        that the command line insists on.
    """

    def late(name: str) -> Callable[..., Any]:
        return lambda *arguments: getattr(importlib.import_module(stage), name)(*arguments)

    def attach(verb: Callable) -> Callable:
        for name in names:
            setattr(verb, name, late(name))
        if needed:
            verb.needed = needed  # type: ignore[attr-defined]
        return verb

    return attach


def with_flag(verb: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`verb` for the command line, where one of its positional parameters is a flag."""

    @functools.wraps(verb)
    def door(**arguments: Any) -> Any:
        return verb(**arguments)

    signature = inspect.signature(verb)
    kinds = [
        p.replace(kind=p.KEYWORD_ONLY) if p.name == name else p
        for p in signature.parameters.values()
    ]
    door.__signature__ = signature.replace(parameters=kinds)  # type: ignore[attr-defined]
    return door


def gathered(argv: Sequence[str], flag: str) -> list[str]:
    """`--prompt A --prompt B` as `--prompt A B`: both are natural to type, and of the first only
    the last would count.
    """
    rest: list[str] = []
    values: list[str] = []
    taking = False
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            taking = name == flag
            if taking:
                values += [value] if equals else []
                continue
        (values if taking else rest).append(token)
    return [*rest, *([flag, *values] if values else [])]
