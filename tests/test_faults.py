"""Nothing is lost: every stage stopped at its file operations, by a kill, a full disk or a closed
one, and given again, leaves the same bytes as one that was not stopped.
"""

import errno
import gc
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
from filelock import FileLock

from sis_jax.types import SisError

pytestmark = [
    pytest.mark.integration,
    # a thread of Orbax that the kill caught, and what it had open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
QUICK = ("segmentation_in_style", "synthesize", "predict")


@pytest.fixture(scope="module", autouse=True)
def _collected():
    """What the killed left open is collected here, where its warnings count for nothing."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return faults.Toys(tmp_path_factory.mktemp("faults") / "toys")


@pytest.fixture(scope="module")
def stopper(toys):
    return faults.Faults(toys.place)


def operations(toys, stopper, stage):
    """How many file operations a stage has."""
    toys.after(stage)
    folder = fresh(toys, stage)
    with stopper.stopping():
        toys.work(stage)(folder)
    return len(stopper.names)


def fresh(toys, stage):
    """A copy of the folder before a stage."""
    folder = toys.place / "again" / "faces"
    shutil.rmtree(folder.parent, ignore_errors=True)
    return shutil.copytree(toys.before(stage), folder)


def same_bytes_after(toys, stage, folder):
    gc.collect()  # what the frames of the error still hold, a lock among it
    toys.work(stage)(folder)
    found, expected = faults.content(folder), faults.content(toys.after(stage))
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def killed(toys, stopper, stage, at):
    folder = fresh(toys, stage)
    with stopper.stopping(at), pytest.raises(faults.Killed):
        toys.work(stage)(folder)
    same_bytes_after(toys, stage, folder)


def refused(toys, stopper, stage, at, number, word):
    folder = fresh(toys, stage)
    with stopper.stopping(at, OSError(number, word)), pytest.raises(SisError) as caught:
        toys.work(stage)(folder)
    assert "\n" not in str(caught.value)
    same_bytes_after(toys, stage, folder)


@pytest.mark.parametrize("stage", QUICK)
def test_killed_and_given_again(toys, stopper, stage):
    count = operations(toys, stopper, stage)
    for at in (1, count // 3, 9 * count // 10):
        killed(toys, stopper, stage, at)


@pytest.mark.parametrize(("number", "word"), [(errno.ENOSPC, "full"), (errno.EACCES, "denied")])
@pytest.mark.parametrize("stage", ["segmentation_in_style", "predict"])
def test_a_disk_that_is_full_or_closed(toys, stopper, stage, number, word):
    for at in (0, operations(toys, stopper, stage) // 2):
        refused(toys, stopper, stage, at, number, word)


def test_moved_while_it_was_stopped(toys, stopper):
    folder = fresh(toys, "synthesize")
    with stopper.stopping(30), pytest.raises(faults.Killed):
        toys.work("synthesize")(folder)
    folder = folder.rename(folder.with_name("moved"))
    same_bytes_after(toys, "synthesize", folder)


def test_a_clock_that_goes_backwards(toys, monkeypatch):
    past = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(past)))
    same_bytes_after(toys, "segmentation_in_style", fresh(toys, "segmentation_in_style"))


def test_masks_of_two_processes_at_once(toys):
    folder = fresh(toys, "predict")
    (folder / "masks").mkdir()
    with FileLock(folder / "masks/.lock"), pytest.raises(SisError, match="in use by"):
        toys.work("predict")(folder)
    same_bytes_after(toys, "predict", folder)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stage", faults.STAGES)
def test_killed_everywhere(toys, stopper, stage):
    """Some 150 kills in all."""
    count = operations(toys, stopper, stage)
    for at in range(count % 7, 19 * count // 20, max(count // 10, 1)):  # threads vary the count
        killed(toys, stopper, stage, at)
        refused_or_done(toys, stopper, stage, at)


def refused_or_done(toys, stopper, stage, at):
    """A full disk from operation `at` on; what does not matter is done without."""
    folder = fresh(toys, stage)
    with stopper.stopping(at, OSError(errno.ENOSPC, "full")):
        try:
            toys.work(stage)(folder)
        except SisError as error:
            assert "\n" not in str(error)
    same_bytes_after(toys, stage, folder)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stage", faults.STAGES)
def test_killed_at_random_moments(toys, stage):
    """SIGKILL of a process, eight times."""
    folder, rng = fresh(toys, stage), random.Random(stage)
    for _ in range(8):
        killed_at_work(toys, stage, folder, rng)
    same_bytes_after(toys, stage, folder)


def killed_at_work(toys, stage, folder, rng):
    """SIGKILL once as many files are there as a random share of the work writes."""
    first, last = (len(files_in(made(stage))) for made in (toys.before, toys.after))
    goal = first + rng.uniform(0, 1) * (last - first)
    code = "import sys, faults, pathlib as p; a, b, c = sys.argv[1:]; "
    code += "faults.Toys(p.Path(a)).work(b)(p.Path(c))"
    command = [sys.executable, "-c", code, str(toys.place), stage, str(folder)]
    paths = os.pathsep.join([str(faults.ROOT), str(faults.ROOT / "tests")])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    before = files_in(folder)
    while process.poll() is None and (files_in(folder) == before or len(files_in(folder)) < goal):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    return process.wait()


def files_in(folder):
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]
