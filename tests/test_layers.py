"""The import law: who may import whom, read from the source of every file, late imports too."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sis_jax

ROOT = Path(sis_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
DOORS = {*sis_jax._VERBS, "export", "run"}
SINGLE = {
    "errors",
    "parallel",
    "types",
}  # the only files at the top beside the doors and the package's own
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
OUTSIDE = {
    "os", "pathlib", "io", "socket", "urllib", "http", "requests", "huggingface_hub", "shutil",
    "tempfile", "safetensors",
}  # fmt: skip

BOTTOM = {"errors", "types"}
BELOW_MODELS = {"ops", "parallel", *BOTTOM}
# layer: the layers it may import. A layer may import itself, but methods and doors may not.
LAW = {
    "errors": set(),
    "types": {"errors"},
    "parallel": BOTTOM,
    "ops": {"parallel", *BOTTOM},
    "models": BELOW_MODELS,
    "data": BELOW_MODELS,
    "training": {"models", "data", *BELOW_MODELS},
    "methods": {"training", "models", *BELOW_MODELS},
    "checkpoints": {"models", "data", *BELOW_MODELS},
    "runs": {"data", *BELOW_MODELS},
    "stages": {"methods", "training", "checkpoints", "runs", "models", "data", *BELOW_MODELS},
}
LAW["door"] = {"stages", *LAW["stages"]}
LAW["package"] = {"door", *LAW["door"]}


def _module(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def _imports(source: str, module: str, package: bool) -> set[tuple[str, str]]:
    """(module, name) of all that is imported at run time; TYPE_CHECKING blocks do not count."""
    found, todo = set(), list(ast.parse(source).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + package] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {(name, alias.name) for alias in node.names}
        else:
            todo += list(ast.iter_child_nodes(node))
    return found


def _is_module(name: str) -> bool:
    place = ROOT.parent.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").exists()


def _targets(source: str, module: str, package: bool) -> set[str]:
    """Full names of the modules imported; `from a import b` is a.b where that is a module."""
    pairs = _imports(source, module, package)
    return {
        f"{base}.{name}"
        if name and base.startswith("sis_jax") and _is_module(f"{base}.{name}")
        else base
        for base, name in pairs
    }


def _layer(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__main__":
        return "package"
    return "door" if parts[1] in DOORS else parts[1]


def broken(module: str, source: str, package: bool = False) -> set[str]:
    """The imports of `module` that the law forbids."""
    layer, bad = _layer(module), set()
    for name in _targets(source, module, package):
        top = name.split(".")[0]
        if top != "sis_jax":
            if (layer in ("data", "runs") and top in JAX) or (layer == "models" and top in OUTSIDE):
                bad.add(name)
            continue
        target = _layer(name)
        if layer == "methods" and target == "methods":
            shared = {"sis_jax.methods.base", "sis_jax.methods.settings"}
            allowed = module == "sis_jax.methods" or name in {module, *shared}
        elif module == "sis_jax.stages.pipeline" and target in ("door", "package"):
            allowed = True  # the one that composes the doors
        else:
            allowed = target in LAW[layer] or (target == layer and layer != "door")
        if not allowed:
            bad.add(name)
    return bad


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_downwards(file):
    module = _module(file)
    bad = broken(module, file.read_text(encoding="utf-8"), file.name == "__init__.py")
    assert not bad, f"{module} must not import {', '.join(sorted(bad))}"


def test_the_top_of_the_package_holds_nothing_else():
    files = {f.stem for f in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert files == DOORS | SINGLE
    folders = {f.name for f in ROOT.iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert folders == set(LAW) - SINGLE - {"door", "package"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sis_jax.ops.x", "from sis_jax.models import stylegan2"),
        ("sis_jax.models.x", "import os"),
        ("sis_jax.models.x", "def f():\n    from sis_jax.checkpoints import load"),
        ("sis_jax.models.x", "def f():\n    import sis_jax"),
        ("sis_jax.data.x", "def f():\n    import jax.numpy as jnp"),
        ("sis_jax.data.x", "from sis_jax.runs import cli"),
        ("sis_jax.runs.run", "from ..models import dcgan"),
        ("sis_jax.methods.x", "from sis_jax import report"),
        ("sis_jax.methods.x", "from sis_jax.data.parts import Parts"),
        ("sis_jax.methods.style_mixing", "from sis_jax.methods import labels4free"),
        ("sis_jax.training.x", "from sis_jax.stages.distill import distill"),
        ("sis_jax.stages.x", "from sis_jax.discover import discover"),
        ("sis_jax.discover", "from sis_jax.report import report"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert broken(module, source)


def test_allowed_imports_pass():
    source = (
        "import numpy\nfrom sis_jax.data import draw\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import jax"
    )
    assert broken("sis_jax.runs.run", source) == set()


def test_data_and_runs_bring_no_jax_with_them():
    """Not through a third file either: `--help` and the readers of files stay quick."""
    names = [_module(f) for layer in ("data", "runs") for f in sorted((ROOT / layer).rglob("*.py"))]
    code = f"import {', '.join(names)}, sys\nassert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What may be imported inside a function: slow to import, optional, or of one platform. Doors
# import their stages there.
LATE = {"cv2", "fcntl", "google_crc32c", "huggingface_hub", "jax2onnx", "orbax"}
LATE |= {"scipy.optimize", "scipy.stats", "tensorflow_datasets", "transformers"}


@pytest.mark.parametrize(
    "file",
    [f for f in FILES if f.stem in SINGLE or f.parent != ROOT],
    ids=lambda f: str(f.relative_to(ROOT)),
)
def test_imports_stand_at_the_top(file):
    tree, late = ast.parse(file.read_text(encoding="utf-8")), set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    late |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    late.add(node.module or "")
    assert {name for name in late if name not in LATE and name.split(".")[0] not in LATE} == set()


def test_a_door_and_its_stage_take_the_same():
    """One configuration; the work of `report` is runs/page.write_page."""
    for verb in sorted(DOORS - {"report"}):
        door = getattr(importlib.import_module(f"sis_jax.{verb}"), verb)
        module = "pipeline" if verb == "run" else verb
        stage = getattr(importlib.import_module(f"sis_jax.stages.{module}"), verb)
        (param,) = inspect.signature(stage, eval_str=True).parameters.values()
        assert param.annotation is vars(door)["door"].config


@pytest.mark.parametrize("door", sorted(DOORS))
def test_a_door_is_a_signature_a_docstring_and_one_call(door):
    tree = ast.parse((ROOT / f"{door}.py").read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    docstring, late, call = function.body
    assert isinstance(late, ast.ImportFrom) and isinstance(call, ast.Return)
    assert isinstance(call.value, ast.Call) and isinstance(docstring, ast.Expr)
