"""Run a function of generated samples over any number of seeds: batches, devices and padding in one
place, memory flat in the number of samples.

A *body* sees one device's batch: `body(gen, z, truncation, *per_sample, **static)` -> pytree of
per-sample arrays [b, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sis_jax import parallel
from sis_jax.types import Generator

BATCH = 16  # samples per device at a time


@dataclass(frozen=True)
class _Plain:
    """A generator that is no pytree (any object with the protocol): fixed at compile time, compared
    by identity.
    """

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
    batch: int = BATCH,
    devices: parallel.Devices = None,
    **static: Any,
) -> Iterator[Any]:
    """Yield body's results, as NumPy arrays [m, ...], for one batch of seeds after another, in
    order.

    per_sample: arrays [n, ...], one row per seed. shared: further arguments, the same everywhere
        (`body(gen, z, truncation, *per_sample, *shared)`).
    static: keyword arguments fixed at compile time. One compilation: the last batch is padded, and
        cut afterwards.
    """
    here = parallel.local_devices(devices)
    if len(seeds) < batch:  # too few to fill one block: spread them
        rows = max(1, -(-len(seeds) // len(here)))
    else:  # blocks of one shape whatever the number of samples and devices, hence the same bits
        rows, here = batch, here[: -(-len(seeds) // batch)]
    used = len(here)
    plain = jax.tree.structure(gen) == jax.tree.structure(0)
    function = _call_plain if plain else body
    if plain:
        static = static | {"inner": body, "held": _Plain(gen)}
    in_axes = (None, 0, None) + (0,) * len(per_sample) + (None,) * len(shared)
    mapped = parallel.map_devices(function, in_axes, 0, devices=here, **static)
    for start in range(0, len(seeds), rows * used):
        chunk = list(seeds[start : start + rows * used])
        blocks = [
            parallel.shard(np.asarray(a), used, rows)[0]
            for a in (gen.latents(chunk), *(p[start : start + len(chunk)] for p in per_sample))
        ]
        out = mapped(0 if plain else gen, blocks[0], np.float32(truncation), *blocks[1:], *shared)
        n = len(chunk)
        yield jax.tree.map(lambda a: parallel.unshard(np.asarray(a), n), out)  # noqa: B023  (used before the next round)


def _call_plain(_: Any, *args: Any, inner: Callable[..., Any], held: _Plain, **static: Any) -> Any:
    return inner(held.gen, *args, **static)


def sample_seeds(seed: int, n: int) -> list[int]:
    """The n sample seeds that belong to the seed of a stage: seed * 100000, + 1, + 2, ... so that
    stages with different seeds share no sample.
    """
    return [(seed * 100_000 + i) % 2**32 for i in range(n)]
