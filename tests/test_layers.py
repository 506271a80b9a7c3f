"""The layering: who may import whom, read from the source, at the top of files and inside functions alike."""

import ast
from pathlib import Path

import pytest

import sis_jax

ROOT = Path(sis_jax.__file__).parent
VERBS = {f.stem for f in ROOT.glob("*.py") if not f.stem.startswith("_")} | set(sis_jax._VERBS)
FILES = sorted(ROOT.rglob("*.py"))
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
OUTSIDE = {
    "os",
    "pathlib",
    "io",
    "socket",
    "urllib",
    "http",
    "requests",
    "huggingface_hub",
    "shutil",
    "tempfile",
    "safetensors",
}


def _module(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def _imports(source: str, module: str, package: bool) -> set[str]:
    """Absolute names of everything imported at run time; a block under TYPE_CHECKING does not count."""
    found, todo = set(), list(ast.parse(source).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                module.split(".")[
                    : None if package and node.level == 1 else -(node.level - package) or None
                ]
                if node.level
                else []
            )
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
        else:
            todo += list(ast.iter_child_nodes(node))
    return found


def _layer(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1:
        return "package"
    if (ROOT / parts[1]).is_dir():
        return parts[1]
    return "main" if parts[1] == "__main__" else "verb" if parts[1] in VERBS else "package"


def broken(module: str, imports: set[str]) -> list[str]:
    """The imports of `module` that the layering forbids."""
    layer, bad = _layer(module), []
    for name in sorted(imports):
        top, target = name.split(".")[0], _layer(name) if name.split(".")[0] == "sis_jax" else ""
        forbidden = {
            "core": target not in ("", "core") and name != "sis_jax",
            "nn": (target not in ("", "core", "nn") and name != "sis_jax") or top in OUTSIDE,
            "weights": target in ("methods", "verb", "data", "main"),
            "data": target in ("methods", "verb", "weights", "nn", "main") or top in JAX,
            "methods": target in ("weights", "data", "verb", "main") or _other_method(module, name),
            "verb": target in ("verb", "main") and not f"{name}.".startswith(f"{module}."),
        }.get(layer, False)
        if forbidden:
            bad.append(name)
    return bad


def _other_method(module: str, name: str) -> bool:
    """Methods share nothing but the package's __init__ (the registry and the protocol)."""
    parts = name.split(".")
    if (
        parts[:2] != ["sis_jax", "methods"]
        or len(parts) < 3
        or module == "sis_jax.methods"
        or parts[2] == module.split(".")[-1]
    ):
        return False
    return (ROOT / "methods" / f"{parts[2]}.py").exists()


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_keep_the_layers(file):
    module = _module(file)
    bad = broken(
        module, _imports(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")
    )
    assert not bad, f"{module} must not import {', '.join(bad)}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sis_jax.core.x", "from sis_jax.nn import stylegan2"),
        ("sis_jax.nn.x", "import os"),
        ("sis_jax.nn.x", "def f():\n    from sis_jax.weights import load"),
        ("sis_jax.data.x", "def f():\n    import jax.numpy as jnp"),
        ("sis_jax.runs.run", "from ..nn import dcgan"),
        ("sis_jax.methods.x", "from sis_jax import report"),
        ("sis_jax.methods.x", "from sis_jax.runs.run import RunFolder"),
        ("sis_jax.discover", "from sis_jax.report import report"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert broken(module, _imports(source, module, False))


def test_allowed_imports_pass():
    source = "import numpy\nfrom sis_jax.core import draw\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax"
    assert broken("sis_jax.runs.run", _imports(source, "sis_jax.runs.run", False)) == []
