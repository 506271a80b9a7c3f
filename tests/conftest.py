"""What every test needs before jax is imported: eight virtual devices, a compilation cache, shape
checks on `sis_jax`.
"""

import getpass
import os
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

import jax
import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

_CACHE = Path(tempfile.gettempdir()) / f"sis_jax_tests_{getpass.getuser()}"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

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
