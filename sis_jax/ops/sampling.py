"""Run a function of generated samples over any number of seeds, in flat memory.

A *body* sees one device's batch: `body(gen, z, truncation, *per_sample, **static)` -> pytree of
per-sample arrays [b, ...].
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sis_jax import parallel
from sis_jax.ops import plan
from sis_jax.ops.progress import progress
from sis_jax.types import Generator

LARGE = 2**29  # bytes of a pass, from which freed memory is given back before and after it


def is_plain(gen: Any) -> bool:
    """Whether a generator is no pytree, and so cannot be an argument of a compiled function."""
    return jax.tree.structure(gen) == jax.tree.structure(0)


@dataclass(frozen=True)
class _Plain:
    """A generator that is no pytree: fixed at compile time, compared by identity."""

    gen: Any

    def __hash__(self) -> int:
        return id(self.gen)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Plain) and self.gen is other.gen


def map_samples(
    gen: Generator,
    seeds: Sequence[int],
    body: Callable[..., Any],
    *,
    truncation: float = 1.0,
    per_sample: tuple[np.ndarray, ...] = (),
    shared: tuple[Any, ...] = (),
    batch: int | None = None,
    shown: str = "",
    devices: parallel.Devices = None,
    **static: Any,
) -> Iterator[Any]:
    """Yield body's results, as NumPy arrays [m, ...], for one batch of seeds after another.

    per_sample: arrays [n, ...]. shared: further arguments, the same everywhere. batch: samples per
        device at a time, at most; None leaves it to `ops/plan.py`. shown: name of the work in a
        progress bar. static: keyword arguments fixed at compile time.
    Every block has the same number of rows, the last one padded: one compilation, and the same bits
    for a seed in any company. Raises SisError where the memory cannot hold one block.
    """
    here, plain = parallel.local_devices(devices), is_plain(gen)
    function = _call_plain if plain else body
    if plain:
        static = static | {"inner": body, "held": _Plain(gen)}
    in_axes = (None, 0, None) + (0,) * len(per_sample) + (None,) * len(shared)
    psi, first = np.float32(truncation), [gen.latents(seeds[:1]), *per_sample]
    rows, needed = plan.rows_at_once(
        function, in_axes, (0 if plain else gen, first[0], psi, *first[1:], *shared),
        here[0].platform, batch, **static,
    )  # fmt: skip
    here = plan.devices_at_once(needed, here[: max(1, -(-len(seeds) // rows))])
    used = len(here)
    plan.check_room(needed, here, f"drawing {rows} samples of {gen.resolution} pixels")
    large = needed * used > LARGE
    if large:  # what came before left holes that these blocks do not fit into
        plan.give_back()
    everywhere = 0 if plain else parallel.replicate(gen, here)
    shared = parallel.replicate(shared, here)
    mapped = parallel.map_devices(function, in_axes, 0, devices=here, **static)

    def started() -> Iterator[tuple[int, Any]]:
        for start in range(0, len(seeds), rows * used):
            chunk = list(seeds[start : start + rows * used])
            n = len(chunk)
            blocks = [
                parallel.shard(np.asarray(a), used, rows)[0]
                for a in (gen.latents(chunk), *(p[start : start + n] for p in per_sample))
            ]
            yield n, mapped(everywhere, blocks[0], psi, *blocks[1:], *shared)

    with progress(len(seeds), shown, "sample", hidden=not shown) as bar:
        for n, out in one_ahead(started()):
            # The function is used before the next round.
            yield jax.tree.map(lambda a: parallel.unshard(np.asarray(a), n), out)  # noqa: B023
            bar.update(n)
    if large:
        plan.give_back()


def collect(gen: Generator, seeds: Sequence[int], body: Callable[..., Any], **settings: Any) -> Any:
    """Body's results for all seeds at once, arrays [n, ...]; settings as in `map_samples`.

    One array from the start: joining batches takes twice the memory. A CPU reads it in place.
    """
    whole, at = None, 0
    for batch in map_samples(gen, seeds, body, **settings):
        if whole is None:
            whole = jax.tree.map(lambda a: _aligned((len(seeds), *a.shape[1:]), a.dtype), batch)
        n = len(jax.tree.leaves(batch)[0])
        for target, a in zip(jax.tree.leaves(whole), jax.tree.leaves(batch), strict=True):
            target[at : at + n] = a
        at += n
    return whole


def quantised(images: Float[Array, "*n h w 3"]) -> UInt8[Array, "*n h w 3"]:
    """`types.to_uint8` inside a compiled function, to the bit: a quarter of the bytes leave the
    device. 127.5 x is 128 x - x / 2 here, of two exact products: a compiler that joins a product
    and a sum rounds 127.5 x + 128 once, NumPy twice.
    """
    return jnp.clip(128 * images - 0.5 * images + 128, 0, 255).astype(jnp.uint8)


def image_of(gen: Generator, w: Array, small: str | None = None) -> Float[Array, "b h w 3"]:
    """The image of latents, or the smaller one on the way to it that has this name."""
    image, features = gen.synthesize(w, "const", (small,) if small else ())
    return features[small] if small else image


def image_only(gen: Generator, z: Array, truncation: Array) -> UInt8[Array, "b h w 3"]:
    """The images alone: a body."""
    return quantised(gen.synthesize(gen.map(z, truncation), "const", ())[0])


@dataclass(frozen=True)
class Probe:
    """What the first batches of a stream took. first: seconds until the first one, compilation
    included. each: seconds per sample from there on. memory: bytes that the process then held.
    read: samples of all these batches.
    """

    first: float
    each: float
    memory: int
    read: int


def probe(stream: Iterator[Any], seconds: float = 1.0) -> Probe:
    """Read a stream of batches for so long after its first one: what the whole will take, tried."""
    began, n = time.perf_counter(), 0
    before = _samples(next(stream))
    first = time.perf_counter()
    for batch in stream:
        n += _samples(batch)
        if time.perf_counter() - first >= seconds:
            break
    each = (time.perf_counter() - first) / max(n, 1)
    return Probe(first - began, each, plan.memory_held(), before + n)


def _samples(batch: Any) -> int:
    return len(jax.tree.leaves(batch)[0])


def one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each after the next one was begun: devices work while the host does."""
    begun: deque[Any] = deque()
    for item in items:
        begun.append(item)
        if len(begun) > 1:
            yield begun.popleft()
    yield from begun


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which JAX takes over on a CPU without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _call_plain(_: Any, *args: Any, inner: Callable[..., Any], held: _Plain, **static: Any) -> Any:
    return inner(held.gen, *args, **static)


def sample_seeds(seed: int, n: int) -> list[int]:
    """The n sample seeds of a stage's seed: seed * 100000, + 1, ...; stages share no sample."""
    return [(seed * 100_000 + i) % 2**32 for i in range(n)]
