"""The command-line door, from outside: flags, exit codes, streams, and what is not imported."""

import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

import sis_jax
from sis_jax.ops.progress import progress, progress_shown, say, showing_progress
from sis_jax.runs import cli, flags
from sis_jax.types import SisError

pytestmark = pytest.mark.integration

VERB = '''
"""A verb for the tests."""
from __future__ import annotations
from typing import TYPE_CHECKING, Literal
from pathlib import Path
if TYPE_CHECKING:
    from somewhere import Generator

def discover(gen: Generator | str | None = None, *, k: int | Literal["auto"] = 6,
             seeds: tuple[int, ...] = (1, 2), method: str = "plain",
             recipe: dict[str, Array] | None = None, out: Path | None = None,
             deep: bool = False, fail: str = "", **fields) -> Path:
    """Find the parts of a generator.

    A second paragraph.

    gen: a name or a folder.
    k, seeds: how many clusters,
    and the seeds.
    """
    from sis_jax.ops.progress import progress
    from sis_jax.types import SisError, UsageError
    if fail:
        raise {"usage": UsageError("asked wrongly"), "work": SisError("went wrong"),
               "bug": RuntimeError("a bug"), "stop": KeyboardInterrupt()}[fail]
    for _ in progress(range(3), "working", "step"):
        pass
    with open(out, "w") as file:
        import json
        shown = {"gen": gen, "k": k, "seeds": seeds, "method": method, "deep": deep}
        json.dump({**shown, **fields}, file)
    return out

discover.plan = lambda config: {"files": [f"{config['out']}/parts.json"], "seconds": 130,
                                "memory_bytes": 3 * 2**30, "note": "small"}

if __name__ == "__main__":
    from sis_jax.runs import cli
    methods = {"plain": "test_methods_of_cli:Plain", "fancy": "test_methods_of_cli:Fancy"}
    cli.main(discover, variants={"method": methods})
'''

METHODS = '''
from dataclasses import dataclass
import json
if __name__ != "never":
    raise ImportError("a method was imported only to read its flags")

@dataclass(frozen=True)
class Plain:
    """The plain method.

    rounds: how often to go over the data.
    """
    k: int = 3
    rounds: int = 30
    labels_: "Array | None" = None

@dataclass(frozen=True)
class Fancy:
    """The fancy method.

    strength: from 0 to 1.
    """
    strength: float = 0.5
'''


@pytest.fixture
def shell(tmp_path):
    """Runs the test verb in a fresh interpreter."""
    (tmp_path / "verb.py").write_text(VERB)
    (tmp_path / "test_methods_of_cli.py").write_text(METHODS)

    def run(*args: str):
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(sis_jax.__file__).parents[1])]),
            "COLUMNS": "100",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        return subprocess.run(
            [sys.executable, "-W", "error", str(tmp_path / "verb.py"), *args],
            capture_output=True,
            text=True,
            env=env,
            cwd=tmp_path,
        )

    return run


def test_flags_reach_the_verb(shell, tmp_path):
    done = shell(
        "faces", "--k", "auto", "--seeds", "3", "4", "--deep", "--rounds=7", "--out", "r.json"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "r.json\n"
    assert re.search(r"working: 100%.*step", done.stderr)
    got = json.loads((tmp_path / "r.json").read_text())
    assert got == {
        "gen": "faces",
        "k": "auto",
        "seeds": [3, 4],
        "method": "plain",
        "deep": True,
        "rounds": 7,
    }


def test_a_method_brings_its_own_flags(shell, tmp_path):
    done = shell("--method", "fancy", "--strength", "0.9", "--out", "r.json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    got = json.loads((tmp_path / "r.json").read_text())
    assert (got["gen"], got["strength"]) == (None, 0.9)
    assert "rounds" not in got
    assert shell("--method", "fancy", "--rounds", "7", "--out", "r.json").returncode == 2


def test_help_shows_every_flag(shell):
    done = shell("--help")
    assert done.returncode == 0, done.stderr
    for part in (
        "Find the parts of a generator.",
        "GEN",
        "a name or a folder",
        "--k INT|auto",
        "--seeds INT ...",
        "--rounds INT",
        "--out PATH",
        "--dry-run",
    ):
        assert part in done.stdout, part
    assert "--recipe" not in done.stdout
    assert "how often to go over the data. [plain]" in " ".join(
        done.stdout.replace("│", " ").split()
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--sed", "1"], "unknown flag '--sed'; did you mean --seeds, "),
        (["--k", "ten"], "--k got 'ten', expected a whole number or 'auto'"),
        (["--seeds", "1", "x"], "--seeds got '1' 'x', expected a whole number, once or more"),
        (["--method", "fanzy"], "unknown method 'fanzy'; did you mean fancy, plain?"),
        (["a", "b"], "did not expect 'b'"),
        (["--fail", "usage"], "asked wrongly"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(shell, args, said):
    done = shell(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("python -m sis_jax.discover: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


@pytest.mark.parametrize(
    ("how", "code", "said", "lines"),
    [
        ("work", 1, "went wrong", 1),
        ("stop", 130, "interrupted", 1),
        ("bug", 1, "RuntimeError: a bug", None),
    ],
)
def test_exit_codes(shell, how, code, said, lines):
    done = shell("--fail", how)
    assert done.returncode == code
    assert said in done.stderr
    assert ("Traceback" in done.stderr) == (how == "bug")
    assert lines is None or done.stderr.count("\n") == lines


def test_dry_run_tells_and_does_nothing(shell, tmp_path):
    done = shell("--dry-run", "--out", "r.json")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "r.json").exists()
    for line in (
        "k       6",
        "rounds  30",
        "r.json/parts.json",
        "time    about 2 min",
        "memory  about 3.0 GiB",
        "note    small",
    ):
        assert line in done.stdout, line


def _verbs() -> list[str]:
    return [v for v in sis_jax._VERBS if importlib.util.find_spec(f"sis_jax.{v}")]


@pytest.mark.parametrize("verb", _verbs())
def test_help_of_a_real_verb_loads_nothing_heavy(verb):
    """Without these `--help` answers in a fraction of a second; seconds themselves depend on who
    else uses the machine.
    """
    heavy = "jax flax optax orbax scipy cv2 transformers tensorflow_datasets matplotlib jinja2"
    code = (
        "import sys, runpy\nsys.argv[1:] = ['--help']\n"
        f"try:\n    runpy.run_module('sis_jax.{verb}', run_name='__main__')\n"
        f"finally:\n    print([m for m in '{heavy}'.split() if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m sis_jax.{verb}")
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize("verb", _verbs())
def test_help_explains_every_flag_of_a_real_verb(verb):
    function = getattr(sis_jax, verb)
    docs = flags.parse_docs(function)
    assert [p.name for p in flags.verb_params(function, docs) if not p.help] == []


@pytest.mark.parametrize("verb", _verbs())
def test_a_real_verb_runs_as_a_module_without_a_warning(verb):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"sis_jax.{verb}", "--nonsense"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"python -m sis_jax.{verb}: unknown flag '--nonsense'")


def test_the_package_is_quick_and_silent():
    code = (
        "import sys, sis_jax\nprint(dir(sis_jax) == sorted(sis_jax.__all__), [m for m in ('jax', "
        "'numpy', 'flax') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("True []\n", "")


@pytest.mark.parametrize(
    "first",
    [
        "import sis_jax.report",
        "from sis_jax.report import report",
        "from sis_jax import report",
        "import importlib; importlib.import_module('sis_jax.report')",
        "pass",
    ],
)
def test_a_verb_stays_a_function(first):
    code = (
        f"{first}\nimport sis_jax as sis, sys, types\nassert isinstance(sis.report, "
        "types.FunctionType)\n"
        "assert isinstance(sys.modules['sis_jax.report'], types.ModuleType)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_public_names():
    assert sis_jax.SisError is SisError
    assert issubclass(sis_jax.UsageError, SisError)
    assert sis_jax.__version__
    with pytest.raises(AttributeError, match="discover"):
        _ = sis_jax.disco
    assert {"discover", "report", "Info"} <= set(dir(sis_jax))


def test_every_public_name_resolves_where_its_module_exists():
    for name, home in sis_jax._HOMES.items():
        if Path(sis_jax.__file__).parent.joinpath(*home.split(".")[1:]).with_suffix(".py").exists():
            assert getattr(sis_jax, name).__name__ == name


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        ("Generator | str | Path | None", str | None),
        ("int | Literal['auto']", int | Literal["auto"]),
        ("Sequence[int]", "Sequence[int]"),
        ("Path | None", Path | None),
        ("Mapping[str, str] | Path", Path),
        ("Float[Array, 'n c']", None),
        ("jax.Array | None", None),
        ("list[Generator]", None),
    ],
)
def test_only_what_a_shell_can_spell_becomes_a_flag(annotation, kind):
    got = flags.shell_type(annotation)
    assert (str(got).endswith(kind)) if isinstance(kind, str) else got == kind


def test_a_verb_with_an_argument_nobody_can_give_is_a_bug():
    def verb(gen: "Generator"): ...

    with pytest.raises(TypeError, match="cannot spell gen"):
        flags.verb_params(verb, {})


def test_the_command_is_repeated_as_it_was_typed():
    config = {
        "gen": "my faces",
        "k": 10,
        "seeds": (1, 2),
        "out": Path("r"),
        "recipe": None,
        "deep": True,
        "overwrite": True,
    }
    assert (
        cli.command("discover", config)
        == "python -m sis_jax.discover 'my faces' --k 10 --seeds 1 2 --out r --deep"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.02, "0.02 s"), (40, "40 s"), (700, "12 min"), (12600, "3.5 h")]
)
def test_durations(seconds, text):
    assert cli.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (640 * 2**20, "640 MiB"), (1.25 * 2**30, "1.2 GiB"), (3 * 2**40, "3.0 TiB")],
)
def test_byte_sizes(count, text):
    assert cli.byte_size(count) == text


def test_progress_is_quiet_until_asked(capsys):
    assert list(progress([1, 2], "x", "u")) == [1, 2]
    assert capsys.readouterr().err == ""
    with showing_progress(), progress(4, "counting", "thing") as bar:
        bar.update(4)
    assert re.search(r"counting: 100%.*4/4.*thing", capsys.readouterr().err)


def test_notes_follow_the_progress_switch(capsys):
    say("hidden")
    with showing_progress():
        assert progress_shown()
        say("seen")
    assert capsys.readouterr().err == "seen\n"


@pytest.mark.parametrize("given", ["", "--xla_force_host_platform_device_count=3"])
def test_cpu_cores_become_devices(given):
    env = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")} | {
        "XLA_FLAGS": given,
        "JAX_PLATFORMS": "cpu",
    }
    code = (
        "import os\nos.sched_getaffinity = lambda _: range(6)\nfrom sis_jax.runs import "
        "cli\ncli.use_cpu_cores()\nimport jax\nprint(len(jax.devices()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == ("3\n" if given else "4\n"), done.stderr


def test_compiled_programs_are_kept_between_processes(tmp_path):
    code = (
        "import sys\nfrom sis_jax.runs import cli\nfolder = "
        "cli.enable_compilation_cache()\nassert 'jax' not in sys.modules\nprint(folder)\n"
        "import jax\njax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env["XDG_CACHE_HOME"] = str(tmp_path)
    on = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert on.stdout.strip() == str(tmp_path / "sis_jax" / "xla"), on.stderr
    assert list((tmp_path / "sis_jax" / "xla").glob("*-cache"))
    env["XDG_CACHE_HOME"] = str(tmp_path / "other")
    off = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**env, "SIS_JAX_CACHE": "off"},
    )
    assert off.stdout == "None\n", off.stderr
    assert not (tmp_path / "other").exists()


def test_the_doctor_lists_what_is_here():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sis_jax"], capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    for part in ("python -m sis_jax.report", "jax 0.", "Devices", "Weights"):
        assert part in done.stdout
    assert (done.returncode == 1) == ("Problems" in done.stdout)
    wrong = subprocess.run(
        [sys.executable, "-m", "sis_jax", "discover"], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "takes no arguments" in wrong.stderr


def test_verb_and_flags_have_one_signature():
    for verb in _verbs():
        function = getattr(sis_jax, verb)
        names = [
            p.name
            for p in inspect.signature(function).parameters.values()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        shown = [p.name for p in flags.verb_params(function, {})]
        assert [n for n in names if n in shown] == shown
