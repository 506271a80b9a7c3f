"""`sis-jax VERB`; without a verb a report of what is installed, missing or wrong, with its cure."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import sis_jax
from sis_jax.runs import cli, machine
from sis_jax.runs.console import any_console
from sis_jax.types import unknown_name

_NEEDED = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "einops", "safetensors",
    "pillow", "scipy", "transformers",
)  # fmt: skip

# {verb: module}
_COMMANDS = {
    "run": "sis_jax.run",
    "export": "sis_jax.export",
    **{verb: f"sis_jax.{verb}" for verb in sis_jax._VERBS},
}


def main(argv: list[str] | None = None) -> int:
    """Run a verb, or print versions, devices, weights and problems; returns the exit code."""
    any_console()
    argv = sys.argv[1:] if argv is None else argv
    program = "sis-jax" if Path(sys.argv[0]).stem == "sis-jax" else "python -m sis_jax"
    if argv and argv[0] in _COMMANDS:
        machine.prepare()
        return cli.run(_command(argv[0]), argv[1:], prog=f"{program} {argv[0]}")
    if argv in (["-h"], ["--help"]):
        print(
            f"usage: {program} [VERB ...]\n\nWithout a verb: versions, devices, weights and their "
            "licences, and what is wrong with its cure.\n\nVerbs, each with --help of its own:"
        )
        _show_verbs([])
        return 0
    if argv:
        print(f"{program}: {unknown_name('verb', argv[0], _COMMANDS)}", file=sys.stderr)
        return 2
    machine.prepare()
    problems: list[str] = []
    print(f"sis_jax {sis_jax.__version__}, Python {sys.version.split()[0]}")
    for title, show in (
        ("Verbs", _show_verbs),
        ("Versions", _show_versions),
        ("Devices", _show_devices),
        ("Weights", _show_weights),
    ):
        print(f"\n{title}")
        show(problems)
    folder = machine.cache_folder()
    print(f"\nCompilation cache\n  {folder or 'off (SIS_JAX_CACHE)'}")
    print("\nProblems" if problems else "\nNothing is missing.")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def _command(verb: str) -> Callable:
    return getattr(importlib.import_module(_COMMANDS[verb]), verb)


def _show_verbs(problems: list[str]) -> None:
    for verb, module in _COMMANDS.items():
        print(f"  sis-jax {verb:<16} {_first_line(module)}")


def _first_line(module: str) -> str:
    """The first sentence or so of a module's docstring, read without importing it."""
    spec = importlib.util.find_spec(module)
    source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    return " ".join((ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split())


def _show_versions(problems: list[str]) -> None:
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if devices[0].platform == "cpu" and len(devices) == 1 and (cores or 1) > 1:
        problems.append(
            "JAX sees one CPU device and works on one core: import sis_jax before jax, or set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={cores}"
        )
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
