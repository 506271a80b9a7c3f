"""`python -m sis_jax`: what is here, and what is missing or wrong with its cure."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import sis_jax
from sis_jax.runs import cli

_NEEDED = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "einops",
    "safetensors",
    "pillow",
    "scipy",
    "transformers",
)

# Sub-commands, "module:function"; the stages are modules of their own.
_COMMANDS = {"run": "sis_jax.stages.pipeline:run", "export": "sis_jax.export:export"}


def main(argv: list[str] | None = None) -> int:
    """Print stages, versions, devices, weights and their licences, then every problem found. Exit 0
    when there is none, 1 otherwise.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in _COMMANDS:
        cli.use_cpu_cores()
        return cli.run(_command(argv[0]), argv=argv[1:], prog=f"python -m sis_jax {argv[0]}")
    if argv in (["-h"], ["--help"]):
        print(
            "usage: python -m sis_jax [COMMAND ...]\n\nWhat is here: stages, versions, devices, "
            "weights and their licences, and what is wrong with its cure."
        )
        print("\nCommands:")
        print("\n".join(f"  python -m sis_jax {name} --help" for name in _COMMANDS))
        print("\nA stage has its own help:")
        print("\n".join(f"  python -m sis_jax.{verb} --help" for verb in _stages()))
        return 0
    if argv:
        known = ", ".join(_COMMANDS)
        print(
            f"python -m sis_jax takes no arguments but a command ({known}), got {argv[0]!r}; the "
            f"stages are {_commands()}",
            file=sys.stderr,
        )
        return 2
    problems: list[str] = []
    print(f"sis_jax {sis_jax.__version__}, Python {sys.version.split()[0]}")
    for title, show in (
        ("Stages", _show_stages),
        ("Versions", _show_versions),
        ("Devices", _show_devices),
        ("Weights", _show_weights),
    ):
        print(f"\n{title}")
        show(problems)
    folder = cli.cache_folder()
    print(f"\nCompilation cache\n  {folder or 'off (SIS_JAX_CACHE)'}")
    print("\nProblems" if problems else "\nNothing is missing.")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def _command(name: str) -> Callable:
    import importlib

    module, _, function = _COMMANDS[name].partition(":")
    return getattr(importlib.import_module(module), function)


def _stages() -> list[str]:
    return [verb for verb in sis_jax._VERBS if importlib.util.find_spec(f"sis_jax.{verb}")]


def _commands() -> str:
    return ", ".join(f"python -m sis_jax.{verb}" for verb in _stages())


def _show_stages(problems: list[str]) -> None:
    for verb in _stages():
        print(f"  python -m sis_jax.{verb:<16} {_first_line(f'sis_jax.{verb}')}")


def _first_line(module: str) -> str:
    """The first sentence or so of a module's docstring, read without importing it."""
    import ast

    spec = importlib.util.find_spec(module)
    source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    return " ".join((ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split())


def _show_versions(problems: list[str]) -> None:
    from importlib import metadata

    found = []
    for name in _NEEDED:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed: pip install {name}")
    for i in range(0, len(found), 6):
        print("  " + ", ".join(found[i : i + 6]))


def _show_devices(problems: list[str]) -> None:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # a broken driver shows in many ways
        problems.append(
            f"JAX finds no device ({str(error).splitlines()[0]}): set JAX_PLATFORMS=cpu, or "
            "repair the driver"
        )
        return
    print(
        f"  {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {os.cpu_count()} "
        "processor cores"
    )
    if devices[0].platform == "cpu" and any(Path("/dev").glob("nvidia[0-9]*")):
        problems.append("there is a GPU, but this JAX cannot use it: pip install -e '.[cuda]'")


def _show_weights(problems: list[str]) -> None:
    entries = _guarded(_shipped, problems)
    for info in entries or []:
        print(f"  {info.name:<28} licence {info.licence}")
    if entries == []:
        print("  none")
        problems.append(
            "no weights are in ported_weights: python scripts/convert_weights.py SRC, or python "
            "-m sis_jax.train_generator PHOTOS --out DIR"
        )


def _shipped() -> list:
    from sis_jax.checkpoints import catalogue

    return list(catalogue.shipped())


def _guarded(look: Callable[[], list], problems: list[str]) -> list | None:
    """A doctor goes on when one organ fails."""
    try:
        return look()
    except Exception as error:
        problems.append(
            f"the weights cannot be listed ({type(error).__name__}: {error}): install sis_jax "
            "again, or remove the folder named"
        )
        return None


if __name__ == "__main__":
    sys.exit(main())
