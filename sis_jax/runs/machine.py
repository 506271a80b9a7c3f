"""Settings before JAX is first used: CPU cores as devices, memory that stays, compiled programs
that are kept.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

# glibc's mallopt: (parameter, value). Large buffers come from the heap, which keeps freed memory:
# XLA otherwise returns every buffer to the system and faults it in again, a tenth to a third of the
# time on CPUs. Few arenas keep that memory in one place.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_MALLOC = (
    (_M_MMAP_MAX, 0),
    (_M_TRIM_THRESHOLD, 2**31 - 1),
    (_M_TOP_PAD, 64 << 20),
    (_M_ARENA_MAX, 1),
)
KEEP_MEMORY = "SIS_JAX_KEEP_MEMORY"
_CACHE_BYTES = 2 * 1024**3


def prepare() -> None:
    """Set the process up. JAX may be imported, but the cores count only before its first use."""
    use_cpu_cores()
    keep_memory()


def use_cpu_cores() -> None:
    """Let JAX see the CPU as one device per core, up to a power of two."""
    flags = os.environ.get("XLA_FLAGS", "")
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    if "xla_force_host_platform_device_count" in flags or cores < 2:
        return
    count = 1 << (cores.bit_length() - 1)  # batches are powers of two, and are divided evenly
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    # With fewer threads than queued collectives, virtual devices of jax 0.10 and 0.11 wait for each
    # other for ever; with 16 per device a step of training takes half as long again.
    os.environ.setdefault("NPROC", str(max(8, 4 * count)))


def keep_memory() -> bool:
    """Let glibc keep freed memory for the next buffer; returns whether it does.

    SIS_JAX_KEEP_MEMORY=off leaves the allocator alone, and so do a user's own MALLOC_ settings.
    """
    off = os.environ.get(KEEP_MEMORY, "on").lower() in ("off", "0", "no", "false")
    if off or sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in _MALLOC)


def cache_folder() -> Path | None:
    """Where compiled programs are kept, None when SIS_JAX_CACHE=off or the user has no home."""
    if os.environ.get("SIS_JAX_CACHE", "on").lower() in ("off", "0", "no", "false"):
        return None
    if chosen := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if home.startswith("~") else Path(home) / "sis_jax" / "xla"


def enable_compilation_cache() -> Path | None:
    """Keep compiled programs in XDG_CACHE_HOME (or ~/.cache)/sis_jax/xla; returns the folder, None
    when off.

    SIS_JAX_CACHE=off turns it off, JAX_COMPILATION_CACHE_DIR wins, and so does a program's own
    setting. Call it before JAX compiles.
    """
    folder, ours = cache_folder(), not os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None or _chosen_by_program() not in (None, str(folder)):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    if ours and _has_filelock():  # a cache of other programs too has entries without access times
        settings["jax_compilation_cache_max_size"] = _CACHE_BYTES
    # A bounded cache cannot read entries that an unbounded one wrote: in our own folder, one rule.
    ruled = {"jax_compilation_cache_dir", "jax_compilation_cache_max_size"}
    for name, value in settings.items():
        if name.upper() not in os.environ or name in ruled:
            os.environ[name.upper()] = str(value)
            if "jax" in sys.modules:  # it read the environment when it was imported
                sys.modules["jax"].config.update(name, value)
    return folder


def _chosen_by_program() -> str | None:
    """The folder of a program that imported JAX and set its cache itself."""
    return sys.modules["jax"].config.jax_compilation_cache_dir if "jax" in sys.modules else None


def _has_filelock() -> bool:
    """JAX bounds the cache's size only with the package filelock, and fails without it."""
    return importlib.util.find_spec("filelock") is not None
