"""Settings before JAX is first used: CPU cores as devices, memory that stays."""

from __future__ import annotations

import ctypes
import os
import sys

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
    # other for ever.
    os.environ.setdefault("NPROC", str(max(32, 4 * count)))


def keep_memory() -> bool:
    """Let glibc keep freed memory for the next buffer; returns whether it does.

    SIS_JAX_KEEP_MEMORY=off leaves the allocator alone, and so do a user's own MALLOC_ settings.
    """
    off = os.environ.get(KEEP_MEMORY, "on").lower() in ("off", "0", "no", "false")
    if off or sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in _MALLOC)
