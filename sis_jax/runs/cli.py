"""The command line of a door: its configuration through `tyro.cli`, exit codes, the dry run.

A verb's module ends with `if __name__ == "__main__": cli.main(discover)`. Nothing here imports JAX.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Generic, NoReturn, TypeVar

import tyro
from tyro.conf import DisallowNone, OmitArgPrefixes, Suppress, arg

from sis_jax.errors import SisError, UsageError
from sis_jax.ops.progress import showing_progress
from sis_jax.runs import machine
from sis_jax.runs.config import Config, Door, Switch, markers
from sis_jax.runs.console import any_console
from sis_jax.runs.machine import enable_compilation_cache

C = TypeVar("C")


@dataclass(frozen=True)
class CommandLine(Generic[C]):
    """A configuration, and the shell's own options.

    Args:
        dry_run: print the configuration, the planned files and an estimate, and stop.
        quiet: no progress bars.
    """

    config: Annotated[C, arg(name="")]
    dry_run: Switch = False
    quiet: Switch = False


def main(verb: Callable[..., Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `verb`, a door, and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C), 143
    terminated (SIGTERM, as schedulers send it).
    """
    machine.prepare()
    sys.exit(run(verb, argv))


def run(
    verb: Callable[..., Any], argv: Sequence[str] | None = None, prog: str | None = None
) -> int:
    """`main` that returns the exit code; an unexpected exception prints its traceback."""
    any_console()
    # Pillow's warning of large photos; `data/decode.py` refuses those that are too large.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = prog or f"python -m sis_jax.{verb.__name__}"
    try:
        asked = parse(verb, argv, prog)
        enable_compilation_cache()
        if asked.dry_run:
            print_plan(verb, asked.config)
            return 0
        with showing_progress(not asked.quiet), _ended_by_sigterm():
            value = verb(asked.config)
        for path in result_paths(verb, value, asked.config):
            print(path)
        sys.stdout.flush()
        _summarise(verb, value, asked)
        problems = _hook(verb, "problems")
        left_out = problems(value) if problems else ""
        return _fail(f"{prog}: {left_out}", 1) if left_out else 0  # done as far as it could be
    except SystemExit as stop:  # by tyro: 0 after --help, 2 after its own message
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt as stop:
        word, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        return _fail(
            f"{prog}: {word}; the same command resumes where the run folder allows it", code
        )
    except BrokenPipeError:
        # The reader of stdout left (`| head`); pointing stdout elsewhere keeps the interpreter's
        # last flush silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SisError as error:  # one sentence for a mistake of the user
        return _fail(f"{prog}: {error}", error.exit_code)
    except Exception as error:  # the traceback for a mistake of ours
        traceback.print_exception(error)
        return 1


class Terminated(KeyboardInterrupt):
    """SIGTERM: a scheduler wants the machine back."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, unless the program has a handler of its own."""
    usual = signal.getsignal(signal.SIGTERM)
    if usual != signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def _summarise(verb: Callable[..., Any], value: Any, asked: CommandLine[Any]) -> None:
    """What was found, how reliable it is, and the next command, on stderr."""
    summary = None if asked.quiet else _hook(verb, "summary")
    for line in summary(value, asked.config) if summary else ():
        print(line, file=sys.stderr)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def parse(verb: Callable[..., Any], argv: Sequence[str], prog: str = "") -> CommandLine[Any]:
    """The command line as values; UsageError or tyro's SystemExit for what it refuses."""
    door: Door = vars(verb)["door"]
    for name, sentence in door.config.elsewhere.items():
        if _choice(name, argv) is not None:
            raise UsageError(sentence)
    config = door.config_for(_choice(door.config.choice, argv))
    parsed = tyro.cli(
        CommandLine[config],
        prog=prog,
        description=(verb.__doc__ or "").partition("\nReturns")[0].strip(),
        args=argv,
        config=(OmitArgPrefixes, DisallowNone),
    )
    for name, value in door.needs.items():  # Python does without: there the result is returned
        if parsed.config.flat()[name] is None:
            raise UsageError(f"give --{name} {value}")
    return parsed


def _choice(name: str, argv: Sequence[str]) -> str | None:
    """The value of the flag `--name`, before the other flags can be known."""
    found = None
    for token, following in zip(argv, [*argv[1:], ""]):
        flag, equals, value = token.partition("=")
        if name and flag == f"--{name}":
            found = value if equals else following
    return found


def print_plan(verb: Callable[..., Any], config: Config) -> None:
    """The output of `--dry-run`: the configuration, the files, the time and the memory."""
    print(f"would run {verb.__name__} with")
    marks = markers(type(config))
    shown = {k: v for k, v in config.flat().items() if Suppress not in marks[k]}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        print(f"  {name:<{width}}  {_plain(value)}")
    hook = _hook(verb, "plan")
    plan = dict(hook(config)) if hook else {}
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


def _hook(verb: Callable[..., Any], name: str) -> Callable[..., Any] | None:
    """A hook of the door's stage, which is imported only here: `--help` needs none."""
    return getattr(importlib.import_module(vars(verb)["door"].stage), name, None)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "(none)"
    return "(not set)" if value is None else str(value)


def result_paths(verb: Callable[..., Any], value: Any, config: Config) -> list[str]:
    """The paths a verb made: those of its hook `results`, or the path it returned."""
    hook = _hook(verb, "results")
    paths = hook(value, config) if hook else [value]
    return [os.fspath(path) for path in paths if isinstance(path, (str, os.PathLike))]


def duration(seconds: float | int) -> str:
    """Seconds for people: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def byte_size(count: float | int) -> str:
    """Bytes for people: "640 MiB", "1.2 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit != "GiB" else f"{count:.1f} GiB"
        count /= 1024
    return f"{count:.1f} TiB"
