"""One function per device, many devices: the only file that maps functions over devices.

A *body* is a plain function of one device's block that talks to the others through `psum` and
`pmean` over the axis `AXIS`. `map_devices` turns it into a function of all blocks: a mapped
argument carries a leading axis with one block per device, the body sees it without.

    def step(state, x, w):  # x: Float[m d], w: Float[m], one device's rows
        total, count = psum((w @ x, w.sum()))
        return state + total / count

    blocks, weights = shard(x, device_count())  # [D m d], [D m]; padding rows have weight 0
    new = map_devices(step, in_axes=(None, 0, 0), out_axes=None)(state, blocks, weights)

The engine is `jax.pmap`, which since jax 0.10 is `jit(shard_map(...))` underneath, without
replication checking.

Several processes. Each calls `initialize` before any other JAX call, then runs the same program on
its own devices, which is all that `map_devices` uses: no result depends on the number of processes.
They share the work by what each of them writes (`together`), or the first one does it (`by_turns`).

On virtual CPU devices NPROC in the environment must be at least four times their number before JAX
is first used (`runs/machine.py` sets it): with fewer threads than queued collectives, jax 0.10 and
0.11 can deadlock.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as futures_wait
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree, Shaped

from sis_jax.types import SisError, UsageError

AXIS = "d"
R = TypeVar("R")
Axes = int | None | tuple[int | None, ...]
# A number of devices, a list of `jax.Device`, or None for all.
Devices = Sequence[Any] | int | None


def is_mapped() -> bool:
    """True while a body is being traced under `map_devices`."""
    try:
        lax.axis_index(AXIS)
    except NameError:
        return False
    return True


def psum(tree: PyTree) -> PyTree:
    """Sum over devices; the identity outside `map_devices`."""
    return lax.psum(tree, AXIS) if is_mapped() else tree


def pmean(tree: PyTree) -> PyTree:
    """Mean over devices; the identity outside `map_devices`."""
    return lax.pmean(tree, AXIS) if is_mapped() else tree


# On one device the functions below leave the program as it was before there were several, so that
# no byte of what it computes changes.


def _several() -> bool:
    return is_mapped() and lax.axis_size(AXIS) > 1


def step_key(key: Array) -> Array:
    """The random key of a step, the same on all devices."""
    if not is_mapped():
        return key
    return jax.random.fold_in(key, 0 if _several() else lax.axis_index(AXIS))


def image_numbers(n: int) -> Int[Array, "n"]:
    """The numbers of this device's `n` images in the whole batch: what is drawn from (key, number)
    does not depend on the number of devices.
    """
    return jnp.arange(n) + lax.axis_index(AXIS) * n if _several() else jnp.arange(n)


def batch_size(n: int) -> int:
    """Images of all devices where each has `n`."""
    return n * lax.axis_size(AXIS) if _several() else n


def own_images(whole: Shaped[Array, "..."], n: int, axis: int = 0) -> Shaped[Array, "..."]:
    """This device's `n` entries of what was drawn for the whole batch along `axis`."""
    return jnp.take(whole, image_numbers(n), axis) if _several() else whole


def before_each(images: Shaped[Array, "n *rest"]) -> Shaped[Array, "n *rest"]:
    """For each image the one before it in the whole batch, for the first the last."""
    if not _several():
        return jnp.roll(images, 1, axis=0)
    devices = lax.axis_size(AXIS)
    last = lax.ppermute(images[-1:], AXIS, [(i, (i + 1) % devices) for i in range(devices)])
    return jnp.concatenate([last, images[:-1]])


def local_devices(devices: Devices = None) -> tuple[Any, ...]:
    """The devices to run on: those given, the first so many, or (None) all of this process."""
    if devices is None:
        return tuple(jax.local_devices())
    if isinstance(devices, int):
        here = jax.local_devices()
        if not 1 <= devices <= len(here):
            raise UsageError(
                f"asked for {devices} devices, but this process has {len(here)}: give a number "
                f"from 1 to {len(here)}"
            )
        return tuple(here[:devices])
    if not devices:
        raise UsageError("the list of devices is empty: give at least one, or None for all")
    return tuple(devices)


def device_count() -> int:
    """How many blocks `shard` must cut for `map_devices`: the devices of this process."""
    return len(local_devices())


def devices_for(batch: int, group: int = 1) -> int:
    """How many devices share a batch evenly, each in whole groups; 1 where no number does."""
    counts = range(1, device_count() + 1)
    return max((d for d in counts if batch % (group * d) == 0), default=1)


def fast_in_bfloat16(device: Any) -> bool:
    """Whether convolutions gain from bfloat16 there: on TPUs and on GPUs that have it, NVIDIA's
    from compute capability 8 on (a T4 or V100 emulates it).
    """
    number = str(getattr(device, "compute_capability", "")).split(".")[0]
    return device.platform != "cpu" and (not number.isdigit() or int(number) >= 8)


def shard(
    x: Shaped[np.ndarray, "n *rest"] | Shaped[Array, "n *rest"],
    n_devices: int,
    rows: int | None = None,
) -> tuple[Shaped[np.ndarray, "d m *rest"] | Shaped[Array, "d m *rest"], Float[np.ndarray, "d m"]]:
    """Cut [n ...] into blocks [d, m, ...] of m = ceil(n / d) rows (or `rows`), the last ones filled
    up with zero rows.

    Returns the blocks and weights Float32[d m], 1 for real rows and 0 for filling: multiply every
    statistic by them. NumPy in, NumPy out, and nothing is copied where n divides evenly.
    """
    n = x.shape[0]
    if n_devices < 1:
        raise UsageError(f"cannot cut {n} rows into {n_devices} blocks: give at least one device")
    m = max(-(-n // n_devices), 1) if rows is None else rows
    if m * n_devices < n:
        raise UsageError(
            f"{n} rows do not fit into {n_devices} blocks of {m}: rows must be at least "
            f"{-(-n // n_devices)}"
        )
    missing = m * n_devices - n
    if missing:
        lib = jnp if isinstance(x, jax.Array) else np
        x = lib.concatenate([x, lib.zeros((missing, *x.shape[1:]), x.dtype)])
    weights = (np.arange(m * n_devices) < n).astype(np.float32).reshape(n_devices, m)
    return x.reshape(n_devices, m, *x.shape[1:]), weights


def unshard(
    blocks: Shaped[np.ndarray, "d m *rest"] | Shaped[Array, "d m *rest"], n: int
) -> np.ndarray | Array:
    """The first `n` rows of blocks [d m ...] as [n ...]: the inverse of `shard`."""
    d, m = blocks.shape[:2]
    if not 0 <= n <= d * m:
        raise UsageError(f"cannot take {n} rows out of {d} blocks of {m}")
    return blocks.reshape(d * m, *blocks.shape[2:])[:n]


def place(tree: PyTree, devices: Devices = None) -> PyTree:
    """Blocks [d ...] laid out once, one on each device, for a loop of calls."""
    return jax.device_put(
        tree, NamedSharding(Mesh(np.array(local_devices(devices)), (AXIS,)), P(AXIS))
    )


def replicate(tree: PyTree, devices: Devices = None) -> PyTree:
    """The same arrays on each device, for large arguments with `in_axes=None`."""
    return jax.device_put(tree, NamedSharding(Mesh(np.array(local_devices(devices)), (AXIS,)), P()))


def map_devices(
    body: Callable[..., Any],
    in_axes: tuple[int | None, ...],
    out_axes: Axes = 0,
    *,
    devices: Devices = None,
    donate: tuple[int, ...] = (),
    **static: Hashable,
) -> Callable[..., Any]:
    """`body`, run on every device at once.

    in_axes: per positional argument (each may be a pytree), 0 = one block per device along a
        leading axis, None = the same on all; at least one 0.
    out_axes: one entry for all results or one per result, 0 = stack the devices' results [d ...],
        None = equal on all devices, return one.
    donate: positions of arguments whose memory may be reused. static: keyword arguments of the body
        fixed at compile time (hashable).

    The compiled function is kept: asking again with the same body (a module-level function, not a
    fresh lambda) compiles nothing.
    """
    if 0 not in in_axes:
        raise UsageError(
            "map_devices needs at least one argument with in_axes 0: no argument differs "
            "between devices"
        )
    chosen, fixed = local_devices(devices), tuple(sorted(static.items()))
    return _compiled(body, tuple(in_axes), out_axes, chosen, tuple(donate), fixed)


@lru_cache(maxsize=256)
def _compiled(body, in_axes, out_axes, devices, donate, static) -> Callable[..., Any]:
    fixed = partial(body, **dict(static)) if static else body
    mapped = jax.pmap(
        fixed, AXIS, in_axes=in_axes, out_axes=out_axes, devices=devices, donate_argnums=donate
    )
    here = sum(d.process_index == jax.process_index() for d in devices)

    def call(*args):
        if len(args) != len(in_axes):
            raise TypeError(
                f"{getattr(body, '__name__', 'body')} takes {len(in_axes)} mapped arguments, got "
                f"{len(args)}"
            )
        for i, (arg, axis) in enumerate(zip(args, in_axes, strict=True)):
            sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(arg)} if axis == 0 else set()
            if sizes - {(here,)}:
                raise UsageError(
                    f"argument {i} must have one block for each of {here} devices along its first "
                    "axis: use parallel.shard"
                )
        return mapped(*args)

    return call


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> tuple[int, int]:
    """Join the processes of one job; returns (this process, number of processes), (0, 1) where
    there is only one.

    coordinator: "host:port" of process 0, or "auto" on a cluster that JAX knows (Slurm, TPU pods,
        ...). Values that are not given are read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
        JAX_PROCESS_ID; with none of them set, nothing happens. Call it before any other JAX call;
        a second call only returns. Raises UsageError for values that are missing or wrong, SisError
        where the others are not found.
    """
    if jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None and num_processes is None and process_id is None:
        return 0, 1
    if coordinator == "auto":
        os.environ.pop("JAX_COORDINATOR_ADDRESS", None)  # JAX would take the word for an address
        return _joined()
    num_processes = _whole("JAX_NUM_PROCESSES", num_processes)
    process_id = _whole("JAX_PROCESS_ID", process_id)
    if coordinator is None or num_processes is None or process_id is None:
        raise UsageError(
            "joining processes takes a coordinator (host:port), the number of processes and this "
            "one's number: set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    if not 0 <= process_id < num_processes:
        raise UsageError(
            f"process {process_id} of {num_processes} does not exist: number them from 0 to "
            f"{num_processes - 1}"
        )
    return _joined(coordinator, num_processes, process_id)


def _joined(*where: Any) -> tuple[int, int]:
    # JAX would take SIGTERM for a wish to save at some later step, and the process would go on.
    jax.config.update("jax_enable_preemption_service", False)
    atexit.register(_end_waiting)  # before JAX registers its own end, and so after that
    try:
        jax.distributed.initialize(*where)
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise SisError(
            f"this process could not join the others of its job ({why}): start all of them with "
            "one coordinator, and join them before anything else of JAX"
        ) from error
    return jax.process_index(), jax.process_count()


def _whole(variable: str, given: int | None) -> int | None:
    text = os.environ.get(variable)
    if given is not None or text is None:
        return given
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{variable} is {text!r}, expected an integer") from None


@contextlib.contextmanager
def together(processes: int) -> Iterator[None]:
    """A block that all processes of a job enter, each for its own part, and none leaves before the
    others.

    Raises SisError where another process failed in it, with its message.
    """
    if processes == 1:
        yield
        return
    from orbax.checkpoint import multihost  # late: takes a second to import

    client, key = multihost.get_jax_distributed_client(), f"sis_jax/{next(_blocks)}"
    failure = None

    def tell(message: str) -> None:
        client.key_value_set(f"{key}/{jax.process_index()}", message, allow_overwrite=True)

    try:
        try:
            yield
        except Exception as error:
            failure = error
            tell(str(error) or type(error).__name__)
        _meet(client, key, multihost.get_barrier_sync_fn())
    except (KeyboardInterrupt, SystemExit):
        tell(_INTERRUPTED)  # the others hear of it where they wait
        raise
    if failure is not None:
        raise failure
    _check_others(client, key)


def _meet(client: Any, key: str, barrier: Callable[..., Any]) -> None:
    """Wait for the other processes, in a thread: this one can be interrupted meanwhile."""
    waiting = Future[None]()

    def wait() -> None:
        try:
            waiting.set_result(barrier(key=key, timeout_ms=_PATIENCE))
        except jax.errors.JaxRuntimeError as error:
            waiting.set_exception(error)

    _waiting[:] = [threading.Thread(target=wait, daemon=True)]
    _waiting[0].start()
    while not waiting.done():
        futures_wait([waiting], timeout=1)
        _check_others(client, key, _INTERRUPTED)
    try:
        waiting.result()
    except jax.errors.JaxRuntimeError as error:  # JAX ends this process, too, with a longer text
        raise SisError(
            "another process of this job is gone: give the same command again in all of them, it "
            "resumes"
        ) from error


def _end_waiting() -> None:
    """A thread that JAX has just let go comes back before the interpreter is gone."""
    for thread in _waiting:
        thread.join(timeout=10)


def _check_others(client: Any, key: str, only: str = "") -> None:
    """SisError where another process failed, with its message."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # one that is gone says nothing
        for name, message in client.key_value_dir_get(f"{key}/"):
            if only in message:
                number = name.rpartition("/")[2]
                raise SisError(f"process {number} of this job stopped: {message}")


_blocks = itertools.count()
_waiting: list[threading.Thread] = []
_INTERRUPTED = "it was interrupted"
_PATIENCE = 30 * 24 * 3600 * 1000  # milliseconds: the first process may train for days


def by_turns(work: Callable[[Any], R], config: Any, stored: bool = True) -> R:
    """`work(config)`. stored: its result is a folder, so the first process of a job does the work,
    then one after the other finds it done and reads it.

    config: a dataclass; its field `overwrite` counts in the first process only.
    """
    process, processes = initialize()
    if not stored:
        return work(config)
    result: Any = None
    for turn in range(processes):
        with together(processes):
            if turn == process:
                result = work(replace(config, overwrite=False) if turn else config)
    return result
