"""Every Python and shell block of README.md, CONTRIBUTING.md and docs/ that runs offline is run.

Blocks of one page run in order in one working folder that holds a few photos. Sizes shrink (SMALL),
names and flags stay as written. A block that cannot run here says why, in the line above it:
`<!-- not run: REASON -->`.
"""

import os
import re
import runpy
import shlex
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sis_jax as sis
from sis_jax.data.exports import formats
from sis_jax.methods.base import METHODS
from sis_jax.methods.settings import SETTINGS
from sis_jax.models import students

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.S)
SET_UP = "python3 -m venv"  # `.ci/run` runs these

# Sizes that replace or join those written, so that a page takes a minute instead of an hour.
SMALL = {
    "discover": {"n": 12},
    "synthesize": {"n": 24},
    "distill": {"steps": 2, "batch": 4, "rows": 4, "adapt_steps": 1, "rounds": 1},
    "edit": {"n": 50, "steps": 2},
}

SMALL_SWEEP = {"k": 6, "layer": "16x16+32x32"}
SMALL_METHODS = {"datasetgan": {"members": 2, "steps": 20}}

REGISTRIES: list[dict] = [METHODS, SETTINGS, students.NETWORKS, formats.FORMATS]


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    why: str | None  # the reason not to run it


def blocks(page: Path) -> list[Block]:
    found = [Block(m["kind"], m["text"], m["why"]) for m in BLOCK.finditer(page.read_text("utf-8"))]
    return [b for b in found if not b.text.startswith(SET_UP)]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell block, comments left out."""
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    parts = [groupby(words, "&&".__eq__) for words in lines]
    return [list(words) for part in parts for joint, words in part if not joint]


def small_flags(verb: str, words: list[str]) -> dict[str, object]:
    """The sizes of a command. A rare part is found at full size only."""
    if verb != "discover":
        return SMALL.get(verb, {})
    if "--method" in words:
        return SMALL_METHODS[words[words.index("--method") + 1]]
    if "--rare" in words:
        return {}
    return SMALL[verb] | ({} if "--k" in words else SMALL_SWEEP)


def shrunk(module: str, words: list[str]) -> list[str]:
    """The words of a command with sizes for a test."""
    for name, value in small_flags(module.removeprefix("sis_jax."), words).items():
        flag = "--" + name.replace("_", "-")
        if flag in words:
            words[words.index(flag) + 1] = str(value)
        else:
            words = [*words, flag, str(value)]
    return words


def run_shell(text: str) -> None:
    for program, dash_m, module, *words in commands(text):
        assert (program, dash_m) == ("python", "-m")
        sys.argv = [module, *shrunk(module, words)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as stop:
                assert not stop.code, " ".join(sys.argv)


def resized(verb: Callable, sizes: dict) -> Callable:
    return lambda *args, **settings: verb(*args, **(settings | sizes))


def run_python(text: str, patch: pytest.MonkeyPatch) -> None:
    for verb, sizes in SMALL.items():
        patch.setattr(sis, verb, resized(getattr(sis, verb), sizes))
    block = types.ModuleType("block")
    patch.setitem(sys.modules, "block", block)
    before = [(registry, dict(registry)) for registry in REGISTRIES]
    exec(compile(text, "block", "exec"), block.__dict__)
    for registry, entries in before:  # what the block added goes with it
        registry.clear()
        registry.update(entries)


@pytest.fixture(scope="module")
def photos():
    """Six faces, uint8[6 64 64 3]."""
    return sis.load_generator().sample(range(100, 106), truncation=0.7).to_uint8()


@pytest.fixture
def folder(photos, tmp_path, monkeypatch) -> Path:
    """A working folder with the photos, masks and edits that the pages name."""
    inside = np.hypot(*np.mgrid[-1:1:64j, -1:1:64j]) < 0.7
    for name in ("my_photos", "photos", "truth"):
        (tmp_path / name).mkdir()
    for i, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / "my_photos" / f"{i}.png")
        Image.fromarray(photo).save(tmp_path / "photos" / f"{i}.png")
        Image.fromarray(inside.astype(np.uint8) * 255).save(tmp_path / "truth" / f"{i}.png")
    Image.fromarray(photos[0]).save(tmp_path / "me.jpg")
    (tmp_path / "edits.json").write_text('{"format": 1, "levels": {"0": {"1": "hair"}}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    return tmp_path


@pytest.mark.integration
@pytest.mark.timeout(1800)  # a page holds dozens of commands
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page, folder, monkeypatch):
    for block in blocks(page):
        if block.why is None and block.kind == "bash":
            run_shell(block.text)
        elif block.why is None:
            with monkeypatch.context() as patch:
                run_python(block.text, patch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_are_python_or_shell(page):
    """Only these kinds are known, so that no block escapes the test above by its kind."""
    assert {block.kind for block in blocks(page)} <= {"python", "bash"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Every file that a page links to, or shows, is in the repository."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_set_up_commands_are_two():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(re.findall(rf"^{SET_UP}", text, re.M)) == 2
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
