"""The command-line door, from outside: flags, exit codes, streams, and what is not imported."""

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
from tyro.conf import Positional, UseAppendAction

import sis_jax
from sis_jax import methods
from sis_jax.__main__ import main as program
from sis_jax.export import export
from sis_jax.methods.base import METHODS
from sis_jax.methods.settings import SETTINGS
from sis_jax.ops.progress import progress, say, showing_progress
from sis_jax.run import run
from sis_jax.runs import cli, config
from sis_jax.runs.configs.discover import DiscoverConfig
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration

VERB = '''
from __future__ import annotations
import json
import os
import signal
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from pathlib import Path
from tyro.conf import Positional
from sis_jax.ops.progress import progress
from sis_jax.runs import cli
from sis_jax.runs.config import Config, PythonOnly, door, spelled
from sis_jax.types import SisError, UsageError
if TYPE_CHECKING:
    from somewhere import Generator
else:
    Generator = Any


@dataclass(frozen=True)
class Plain:
    """The plain method.

    Args:
        rounds: how often to go over the data.
    """
    rounds: int = 30


@dataclass(frozen=True)
class Fancy:
    """The fancy method.

    Args:
        strength: from 0 to 1.
    """
    strength: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Group:
    """What belongs together.

    Args:
        deep: go deeper.
        fail: how to fail.
    """
    deep: bool = False
    fail: str = ""


@dataclass(frozen=True)
class VerbConfig(Config):
    """What the verb takes.

    Args:
        gen: a name or a folder.
        k: how many clusters,
            or "auto".
        seeds: the seeds.
        method: how.
        inpainter: in Python.
        out: where.
    """
    verb: ClassVar[str] = "discover"
    choice: ClassVar[str] = "method"
    gen: Annotated[Generator | str | None, Positional, spelled("[GEN]")] = None
    _: KW_ONLY
    k: int | Literal["auto"] = 6
    seeds: tuple[int, ...] = (1, 2)
    method: str = "plain"
    inpainter: PythonOnly[Any] = None
    out: str | None = None
    group: Group = field(default_factory=Group)
    settings: Any = None


@door(VerbConfig, stage=__name__, needs={"out": "FILE, for the numbers"},
      variants={"plain": Plain, "fancy": Fancy})
def discover(config: VerbConfig) -> Path:
    """Find the parts of a generator.

    A second paragraph.
    """
    if config.group.fail == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if config.group.fail:
        raise {"usage": UsageError("asked wrongly"), "work": SisError("went wrong"),
               "bug": RuntimeError("a bug"), "stop": KeyboardInterrupt()}[config.group.fail]
    for _ in progress(3, "working", "step", range(3)):
        pass
    with open(config.out, "w") as file:
        json.dump(config.flat(), file)
    return Path(config.out)


def plan(config):
    return {"files": [f"{config.out}/parts.json"], "seconds": 130,
            "memory_bytes": 3 * 2**30, "note": "small"}


if __name__ == "__main__":
    cli.main(discover)
'''


@pytest.fixture
def shell(tmp_path):
    """Runs the test verb in a fresh interpreter."""
    (tmp_path / "verb.py").write_text(VERB)

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
        "inpainter": None,
        "out": "r.json",
        "deep": True,
        "fail": "",
        "rounds": 7,
    }


def test_a_method_brings_its_own_flags(shell, tmp_path):
    done = shell("--method", "fancy", "--strength", "0.9", "--out", "r.json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    got = json.loads((tmp_path / "r.json").read_text())
    assert (got["gen"], got["strength"]) == (None, 0.9)
    assert "rounds" not in got
    assert shell("--method=fancy", "--rounds", "7", "--out", "r.json").returncode == 2


def test_help_shows_every_flag_in_its_group(shell):
    done = shell("--help")
    assert done.returncode == 0, done.stderr
    for part in (
        "Find the parts of a generator.",
        "[GEN]",
        "a name or a folder",
        "--k INT|{auto}",
        "--seeds",
        "group options",
        "--deep",
        "--rounds INT",
        "how often to go over the data.",
        "--out",
        "--dry-run",
    ):
        assert part in done.stdout, part
    assert "--inpainter" not in done.stdout
    assert "--strength" in shell("--method", "fancy", "--help").stdout


@pytest.mark.parametrize(
    ("args", "keyword"),
    [
        (["--sed", "1"], "--seeds"),
        (["--k", "ten"], "'ten'"),
        (["--seeds", "1", "x"], "--seeds"),
        (["--method", "fanzy"], "'fancy'"),
        (["a", "b"], "b"),
        (["--fail", "usage", "--out", "r"], "asked wrongly"),
        ([], "give --out FILE"),
    ],
)
def test_a_mistake_is_named_and_exit_2(shell, args, keyword):
    done = shell(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert keyword in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("how", "code", "said", "lines"),
    [
        ("work", 1, "went wrong", 1),
        ("stop", 130, "interrupted", 1),
        ("term", 143, "terminated; the same command resumes", 1),
        ("bug", 1, "RuntimeError: a bug", None),
    ],
)
def test_exit_codes(shell, how, code, said, lines):
    done = shell("--fail", how, "--out", "r")
    assert done.returncode == code
    assert said in done.stderr
    assert ("Traceback" in done.stderr) == (how == "bug")
    assert lines is None or done.stderr.count("\n") == lines


def test_dry_run_plans_and_does_nothing(shell, tmp_path):
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
    heavy = "numpy jaxtyping jax flax optax orbax scipy cv2 transformers tensorflow_datasets"
    heavy += " matplotlib jinja2"
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


def _configurations() -> list[type]:
    doors = [vars(getattr(sis_jax, verb))["door"] for verb in _verbs()]
    doors += [vars(function)["door"] for function in (export, run)]
    variants = [variant for door in doors for variant in door.variants.values()]
    return [door.config for door in doors] + variants


@pytest.mark.parametrize("cls", _configurations(), ids=lambda c: c.__name__)
def test_every_field_of_a_configuration_is_explained(cls):
    assert set(re.findall(r"^    (\w+): ", config._arguments(cls), re.M)) >= set(config.leaves(cls))


def test_the_settings_of_a_method_are_those_of_its_class():
    assert SETTINGS.keys() == METHODS.keys()
    for name, settings in SETTINGS.items():
        assert issubclass(methods.get(name), settings)


@pytest.mark.parametrize("verb", _verbs())
def test_a_real_verb_runs_as_a_module_without_a_warning(verb):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"sis_jax.{verb}", "--nonsense"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("╭─ ") and "Warning" not in done.stderr


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


@dataclass(frozen=True)
class _Group:
    deep: bool = True
    sizes: dict | None = None


@dataclass(frozen=True)
class _Config(config.Config):
    verb: ClassVar[str] = "discover"
    gen: Annotated[str | None, Positional] = None
    k: int = 6
    seeds: tuple[int, ...] = (0,)
    prompt: UseAppendAction[tuple[str, ...]] = ()
    out: Path | None = None
    overwrite: bool = False
    group: _Group = field(default_factory=_Group)


def test_the_command_repeats_what_is_not_the_default():
    asked = _Config(
        "my faces", 10, (1, 2), ("a=b", "c"), Path("r"), True, _Group(False, {"a": "b c"})
    )
    assert asked.command() == (
        "python -m sis_jax.discover 'my faces' --k 10 --seeds 1 2 --prompt a=b --prompt c --out r "
        """--no-deep --sizes '{"a": "b c"}'"""
    )
    assert _Config().command() == "python -m sis_jax.discover"
    unfit: Any = object()
    assert _Config(seeds=unfit).command() == "python -m sis_jax.discover"


def test_a_door_takes_fields_or_the_configuration():
    @config.door(_Config)
    def verb(asked: _Config) -> _Config:
        """Does it."""
        return asked

    asked = verb("g", k=3, deep=False)
    assert asked == _Config("g", 3, group=_Group(False)) and verb(asked) is asked
    names = ["gen", "k", "seeds", "prompt", "out", "overwrite", "deep", "sizes"]
    assert list(inspect.signature(verb).parameters) == names
    with pytest.raises(TypeError, match="kk"):
        verb(kk=3)


def test_a_shared_configuration_gets_the_settings_of_its_method():
    door = vars(sis_jax.discover)["door"]
    for settings in (None, SETTINGS["style_mixing"](k=4)):
        asked = door.completed(DiscoverConfig("g", method="style_mixing", settings=settings))
        assert asked.settings == SETTINGS["style_mixing"](k=4 if settings else 8)
        assert "settings" not in asked.flat() and door.completed(asked) is asked


def test_an_unknown_setting_or_method_names_the_nearest():
    with pytest.raises(UsageError, match="position_weight"):
        sis_jax.discover(positions=1)
    with pytest.raises(UsageError, match="style_mixing"):
        sis_jax.discover(method="style_mix")


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
    assert list(progress(2, "x", "u", [1, 2])) == [1, 2]
    assert capsys.readouterr().err == ""
    with showing_progress(), progress(4, "counting", "thing") as bar:
        bar.update(4)
    assert re.search(r"counting: 100%.*4/4.*thing", capsys.readouterr().err)


def test_notes_follow_the_progress_switch(capsys):
    say("hidden")
    with showing_progress():
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
        "machine\nmachine.prepare()\nimport jax\nprint(len(jax.devices()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == ("3\n" if given else "4\n"), done.stderr


@pytest.mark.parametrize(
    ("setting", "keeps"),
    [({}, True), ({"SIS_JAX_KEEP_MEMORY": "off"}, False), ({"MALLOC_ARENA_MAX": "2"}, False)],
)
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept_unless_somebody_says_otherwise(setting, keeps):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | setting
    code = "from sis_jax.runs import machine\nprint(machine.keep_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == f"{keeps}\n", done.stderr


@pytest.mark.parametrize("before", ["", "import jax\n"])
def test_python_sets_the_machine_up_at_first_use(before, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")}
    env["JAX_PLATFORMS"] = "cpu"
    env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path)
    code = (
        f"{before}import os\nos.sched_getaffinity = lambda _: range(2)\nimport sis_jax as sis\n"
        "sis.load_generator\nimport jax\nprint(len(jax.devices()))\n"
        "jax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, env=env, check=False)
    assert done.stdout == "2\n", done.stderr
    assert list(tmp_path.glob("*-cache"))  # as the command line keeps what it compiles


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


def test_our_own_compilation_cache_is_always_bounded(tmp_path):
    code = (
        "from sis_jax.runs import cli\ncli.enable_compilation_cache()\n"
        "import jax\nprint(jax.config.jax_compilation_cache_max_size > 0)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_MAX_SIZE": "-1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "True\n", done.stderr


def test_a_compilation_cache_of_the_users_own_is_not_bounded(tmp_path):
    """A bounded cache cannot read entries that other programs wrote without access times."""
    (tmp_path / "jit_f-0-cache").write_bytes(b"written by another program")
    code = (
        "from sis_jax.runs import cli\ncli.enable_compilation_cache()\n"
        "import jax\nprint(jax.config.jax_compilation_cache_max_size)\n"
        "jax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=env
    )
    assert done.stdout == "-1\n", done.stderr
    assert len(list(tmp_path.glob("*-cache"))) > 1


def test_the_doctor_lists_what_is_here():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sis_jax"], capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    for part in ("python -m sis_jax.report", "jax 0.", "Devices", "Weights"):
        assert part in done.stdout
    assert (done.returncode == 1) == ("Problems" in done.stdout)


@pytest.mark.parametrize(
    ("words", "code", "keyword"),
    [(["discovr"], 2, "'discover'"), (["report", "--help"], 0, "RUN"), (["--help"], 0, "distill")],
)
def test_one_program_has_every_verb(words, code, keyword, capsys):
    assert program(words) == code
    assert keyword in "".join(capsys.readouterr())
