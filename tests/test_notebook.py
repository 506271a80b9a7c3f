"""The notebooks as they lie in the repository: short, without results or secrets, and they leave
the reader's JAX alone.

They are run by `.ci/run` (pytest --nbmake).
"""

import ast
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
MOST_CELLS = 12
SECRET = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|://[^/\s\"']+:[^/\s\"']+@"
    r"|(?i:password|api_key|token)\s*=\s*[\"']"
)
TOUCHES_JAX = re.compile(
    r"pip.*install.*(-U|--upgrade|--force-reinstall|\bjax\[)|[!%]pip install.*\bjax\b"
)
BADGE = "https://colab.research.google.com/github/sis-jax/sis_jax/blob/main/notebooks/{}"


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def problems(notebook: dict[str, Any], name: str) -> list[str]:
    """What is wrong with a notebook that is to be committed as `name`."""
    cells, found = notebook["cells"], []
    if len(cells) > MOST_CELLS:
        found.append(f"{len(cells)} cells")
    if f"({BADGE.format(name)})" not in source(cells[0]):
        found.append("no Colab badge")
    if notebook["metadata"]["kernelspec"]["name"] != "python3":
        found.append("a kernel of its own")
    for i, cell in enumerate(cells):
        text = source(cell)
        if cell.get("outputs") or cell.get("execution_count"):
            found.append(f"cell {i} has results")
        if SECRET.search(text):
            found.append(f"cell {i} has a secret")
        if TOUCHES_JAX.search(text):
            found.append(f"cell {i} changes JAX")
        if re.search(r"/(home|Users|root)/", text):
            found.append(f"cell {i} names a folder of one machine")
    return found


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def notebook(path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_fit_to_commit(path, notebook):
    assert problems(notebook, path.name) == []


def test_ci_runs_all():
    assert "--nbmake" in CI and "notebooks/*.ipynb" in CI


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda n: n["cells"].extend(n["cells"][-1:] * MOST_CELLS), "cells"),
        (lambda n: n["cells"].pop(0), "badge"),
        (
            lambda n: n["cells"][0].update(
                source=[source(n["cells"][0]).replace("/notebooks/", "/notebooks/another_")]
            ),
            "badge",
        ),
        (lambda n: n["metadata"]["kernelspec"].update(name="mine"), "kernel"),
        (
            lambda n: n["cells"][1].update(
                outputs=[{"output_type": "stream", "name": "stdout", "text": "hello"}]
            ),
            "results",
        ),
        (lambda n: n["cells"][1].update(execution_count=3), "results"),
        (lambda n: n["cells"][1].update(source=["token = 'abc'"]), "secret"),
        (
            lambda n: n["cells"][1].update(source=["url = 'https://me:word@host.example/x'"]),
            "secret",
        ),
        (lambda n: n["cells"][1].update(source=["!pip install -U flax"]), "changes JAX"),
        (lambda n: n["cells"][1].update(source=["!pip install jax"]), "changes JAX"),
        (lambda n: n["cells"][1].update(source=["open('/home/me/x')"]), "folder"),
    ],
)
def test_each_fault_is_noticed(path, notebook, change, complaint):
    faulty = copy.deepcopy(notebook)
    change(faulty)
    assert any(complaint in p for p in problems(faulty, path.name))


def test_code_is_plain_python_and_public(notebook):
    """Every cell parses without notebook magic, and uses names that `sis_jax` really exports."""
    import sis_jax

    used = set()
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            for node in ast.walk(ast.parse(source(cell))):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "sis"
                ):
                    used.add(node.attr)
    assert {"load_generator", "discover"} <= used
    assert used <= set(sis_jax.__all__)


def test_readme_commands_are_those_that_ci_runs():
    """The two commands of the README, word for word, are what `.ci/run` runs."""
    blocks = re.findall(
        r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    commands = [
        line
        for block in blocks
        for line in block.splitlines()
        if line.startswith("python3 -m venv")
    ]
    assert len(commands) == 2
    assert "sis_jax.discover" in commands[0]
    assert "pytest" in commands[1]
    assert commands[1] in CI
