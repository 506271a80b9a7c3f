"""Several processes of one job: the same files as from one, a finished job given again, and a
process that dies.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import faults
import pytest

pytestmark = pytest.mark.integration

CODE = """
import sys
from pathlib import Path
from sis_jax import parallel
parallel.initialize()
import faults
place, folder, *stages = sys.argv[1:]
for stage in stages:
    faults.Toys(Path(place)).work(stage)(Path(folder))
print("done", *stages)
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return faults.Toys(tmp_path_factory.mktemp("processes") / "toys")


def started(toys, folder, stages, count):
    """The processes of a job, running."""
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{faults.free_port()}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(faults.ROOT), str(faults.ROOT / "tests")]),
    }
    command = [sys.executable, "-c", CODE, str(toys.place), str(folder), *stages]
    return [
        subprocess.Popen(
            command,
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def ended(processes):
    """(exit codes, all that was printed)."""
    try:
        printed = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], printed


def folder_before(toys, stage, tmp_path):
    return shutil.copytree(toys.before(stage), tmp_path / "job" / "faces")


def same_as_one_process(toys, stage, tmp_path, count):
    toys.after(stage)
    folder = folder_before(toys, stage, tmp_path)
    codes, printed = ended(started(toys, folder, [stage, stage], count))  # the second finds it done
    assert codes == [0] * count, printed
    found, expected = faults.content(folder), faults.content(toys.after(stage))
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_two_processes_predict(toys, tmp_path):
    same_as_one_process(toys, "predict", tmp_path, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "stage",
    [
        "segmentation_in_style", "labels4free", "label", "synthesize", "distill", "evaluate",
        "edit", "export", "train_generator",
    ],
)  # fmt: skip
def test_the_same_files_as_from_one(toys, tmp_path, stage, count):
    same_as_one_process(toys, stage, tmp_path, count)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("number", "dies", "said"),
    [
        (signal.SIGKILL, 0, ""),  # JAX ends the others at once
        (signal.SIGKILL, 1, "another process of this job is gone"),
        (signal.SIGINT, 0, "process 0 of this job stopped: it was interrupted"),
        (signal.SIGINT, 1, "process 1 of this job stopped: it was interrupted"),
    ],
)
def test_a_process_that_dies_ends_the_others(toys, tmp_path, number, dies, said):
    toys.after("predict")
    folder = folder_before(toys, "predict", tmp_path)
    processes = started(toys, folder, ["predict"], 2)
    while not (folder / "masks").exists() and processes[dies].poll() is None:
        time.sleep(0.01)
    processes[dies].send_signal(number)
    codes, printed = ended(processes)
    assert 0 not in codes
    assert said in printed[1 - dies][1]
    codes, printed = ended(started(toys, folder, ["predict"], 2))
    assert codes == [0, 0], printed
    assert faults.content(folder) == faults.content(toys.after("predict"))
