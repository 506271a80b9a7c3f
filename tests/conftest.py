"""What every test needs before jax is imported: eight virtual devices, a compilation cache, shape
checks on `sis_jax`. Then the tier of tests without a mark, and the small runs that tests share.
"""

import getpass
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

if "jax" in sys.modules:
    raise RuntimeError(
        "jax was imported before tests/conftest.py could set the number of virtual devices; run "
        "pytest from the repository's root"
    )

# Fewer threads than queued collectives deadlock virtual CPU devices on jax 0.10 and 0.11.
os.environ["NPROC"] = "32"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_terminate_timeout_seconds=60",
    ]
).strip()

# One cache for all processes that tests start, and for the next session.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/sis_jax_tests_{getpass.getuser()}"
)
# Without a bound in every process: an entry written without one has no access time, and a process
# with a bound fails on it.
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = "-1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# Shapes and types of every call into the library are checked, in tests only. An int passes for a
# float, as everywhere in Python; the hook takes its checker by module and name, hence the module.
_CHECKER = types.ModuleType("sis_jax_checker")
_CHECKER.__dict__["check"] = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[_CHECKER.__name__] = _CHECKER
_HOOK = install_import_hook("sis_jax", "sis_jax_checker.check")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of reference results, `tests/goldens`."""
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="module", autouse=True)
def _free_programs():
    """Every compiled program holds memory maps, of which a process may have some 65,000: the whole
    suite in one process would run out and crash.
    """
    yield
    jax.clear_caches()
    parallel = sys.modules.get("sis_jax.parallel")
    if parallel is not None:
        parallel._compiled.cache_clear()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """A test without the mark of another tier is a unit test."""
    for item in items:
        if not any(item.get_closest_marker(tier) for tier in ("integration", "slow")):
            item.add_marker(pytest.mark.unit)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """A weights folder called tiny with a StyleGAN2 of 16 pixels."""
    import fakes

    from sis_jax.checkpoints import save_generator

    return save_generator(fakes.tiny_stylegan2(16), tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="session")
def tiny_run(tiny_weights, tmp_path_factory) -> Path:
    """A finished `discover` of `tiny_weights` with three parts, to read; copy it to change it."""
    import fakes

    import sis_jax

    out = tmp_path_factory.mktemp("runs") / "faces"
    sis_jax.discover(tiny_weights, out=str(out), **fakes.TINY_PARTS)
    return out


@pytest.fixture(scope="session")
def tiny_data_run(tiny_run, tmp_path_factory) -> Path:
    """`tiny_run` with a dataset of 36 + 4 images, to read; copy it to change it."""
    import sis_jax

    out = shutil.copytree(tiny_run, tmp_path_factory.mktemp("data_runs") / "faces")
    sis_jax.synthesize(str(out), n=40, val=0.1)
    return out
