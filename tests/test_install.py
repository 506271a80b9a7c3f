"""Weights are found wherever the package is installed, for users with and without a home."""

import os
import pwd
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sis_jax.checkpoints import catalogue, convert
from sis_jax.runs import machine
from sis_jax.types import UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """The package as if installed in a folder of its own, used from another working folder."""
    package = tmp_path / "site-packages" / "sis_jax"
    package.mkdir(parents=True)
    monkeypatch.setattr(catalogue, "_PACKAGE", package)
    monkeypatch.delenv(catalogue.SEARCH_PATH, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return package


@pytest.mark.parametrize("place", [".", ".."], ids=["a wheel", "a checkout"])
def test_default_weights(elsewhere, place):
    """A wheel carries the weights inside the package, a checkout beside it."""
    weights = (elsewhere / place).resolve() / "ported_weights"
    weights.symlink_to(ROOT / "ported_weights")
    assert catalogue.find(None) == weights / "faces64"
    assert catalogue.students()["faces-student"] == weights / "faces-student"


def test_default_weights_missing(elsewhere):
    with pytest.raises(UsageError, match="missing from this installation"):
        catalogue.find(None)


def test_the_wheel_takes_the_weights_from_the_top():
    """`.ci/run` builds the wheel and runs it; here only that every folder of weights is in it."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"][
        "targets"
    ]["wheel"]
    assert "ported_weights" in wheel["only-include"]
    assert wheel["sources"] == {"ported_weights": "sis_jax/ported_weights"}


def test_the_main_job(tmp_path):
    """The command of the README, small, on the default weights; warnings are errors."""
    sizes = ["--k", "3", "--layer", "16x16", "--n", "6", "--n-init", "1", "--max-points", "1500"]
    command = [sys.executable, "-W", "error", "-m", "sis_jax.discover", "--ontology", "faces"]
    done = subprocess.run(
        [*command, *sizes, "--quiet", "--out", "run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_no_home(monkeypatch):
    """A user without a home keeps no compiled programs, and converts into the temporary folder."""

    def no_entry(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR", "SIS_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert machine.cache_folder() is None
    assert Path(convert._cache_home()).is_dir()
