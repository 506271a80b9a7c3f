"""Real photos as latents of a generator: `sis.project(gen, "photos/")`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from safetensors.numpy import save

from sis_jax import parallel
from sis_jax.checkpoints import load_discriminator, load_lpips
from sis_jax.data import draw
from sis_jax.data.files import write_atomic
from sis_jax.data.photos import Photos
from sis_jax.methods.base import small_image
from sis_jax.ops import plan
from sis_jax.ops.compositing import psnr
from sis_jax.ops.progress import progress, say
from sis_jax.ops.sampling import collect, sample_seeds
from sis_jax.training import projection as nn
from sis_jax.types import Generator, SisError, UsageError, to_uint8

if TYPE_CHECKING:
    from sis_jax.models.discriminator import Discriminator
    from sis_jax.models.lpips import LPIPS

BLOCK = 25  # steps between two updates of the progress bar
STATISTICS = 2000  # samples for the mean and spread of w
STARTS_SEED = 123
_AXES = (None, None, None, 0, 0, 0, 0, None)  # of `steps_body`


@dataclass(frozen=True)
class Projection:
    """Photos and the latents that draw them again.

    w: one per W+ layer. photos, images: as matched, and generated. noise: layer -> maps, where
        optimised (`training.projection.with_noise`). distance: the final loss. skipped: (name,
        reason).
    """

    names: tuple[str, ...]
    w: Float[np.ndarray, "n s w"]
    photos: UInt8[np.ndarray, "n r r 3"]
    images: UInt8[np.ndarray, "n r r 3"]
    distance: Float[np.ndarray, "n"]
    noise: dict[str, Float[np.ndarray, "n _ _"]] = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def psnr(self) -> Float[np.ndarray, "n"]:
        """Peak signal-to-noise ratio of each image against its photo, in dB: 20 is a likeness."""
        return np.array([psnr(a, b) for a, b in zip(self.photos, self.images)])

    def show(self, count: int = 8) -> Image.Image:
        """Photos over the generated images, as one image."""
        n = min(count, len(self))
        cells = draw.cells(np.concatenate([self.photos[:n], self.images[:n]]))
        return Image.fromarray(
            draw.grid(cells, n, labels=[*self.names[:n], *(f"{x:.1f} dB" for x in self.psnr[:n])])
        )

    def save(self, folder: str | Path) -> Path:
        """Write projection.safetensors (w, noise maps) and one image of all; returns the folder."""
        arrays = {"w": np.ascontiguousarray(self.w)} | {
            f"noise/{k}": np.ascontiguousarray(v) for k, v in self.noise.items()
        }
        write_atomic(Path(folder) / "projection.safetensors", save(arrays))
        write_atomic(Path(folder) / "projection.png", draw.png(self.show(len(self))))
        return Path(folder)


def project(
    gen: Generator,
    photos: str | Path | UInt8[np.ndarray, "n r r 3"] | Sequence[str | Path],
    *,
    space: Literal["w", "w+"] = "w+",
    steps: int = 200,
    rate: float = 0.2,
    pyramid: float = 1.0,
    features: float = 0.3,
    pull: float = 0.0,
    noise: bool = False,
    starts: int = 256,
    known: Bool[np.ndarray, "n _ _"] | None = None,
    discriminator: Discriminator | None = None,
    lpips: str | tuple[str, ...] | LPIPS | None = None,
    batch: int = 16,
    seed: int = 0,
) -> Projection:
    """Find the latents of which `gen` draws real photos (appendix D of StyleGAN2; see
    `training/projection.py`).

    gen: any generator; noise maps need a StyleGAN2. photos: a photo, a folder, an archive, a list,
        or uint8[n r r 3]; files are cut to their centred square. space: "w+" has one w per layer,
        "w" one for all. steps: of Adam; 200 is quick, 1000 the paper's. rate: Adam's peak, in
        spreads of w. pyramid, features: weights of the Laplacian pyramid's L1, and of the
        discriminator's features or LPIPS. pull: keeps the W+ layers together. noise: also optimise
        the noise maps. starts: samples of which the nearest is the start; 0 begins at the mean.
        known: Bool[n r r], where the photos shall be matched. discriminator: by default the one
        beside the generator's weights. lpips: files of its weights, in place of the discriminator's
        features. batch: photos per device at once. seed: of the exploration.
    Raises UsageError for photos that are not there or of another size, SisError where none can be
    read.
    """
    recipe = nn.Recipe(space, rate, pyramid, features, pull, noise)
    _check(recipe, gen, steps, starts, batch)
    images, names, skipped = _read(photos, gen.resolution)
    mask = None if known is None else _known(known, images)
    net = _comparer(gen, discriminator, lpips) if features else None
    if net is None and not pyramid:
        raise UsageError(
            "nothing is left to compare: without a discriminator, pyramid must be above 0"
        )
    mean, length = _statistics(gen)
    start = (
        _nearest(gen, images, mask, starts)
        if starts
        else np.broadcast_to(mean, (len(images), *mean.shape))
    )
    stored = nn.noise_maps(gen) if noise else {}  # type: ignore[arg-type]
    maps = {name: np.asarray(value) for name, value in stored.items()}
    work = _Work(gen, net, length, maps, recipe, steps)
    step, devices = _planned(work, images, mask, start, batch)
    found = []
    for at in range(0, len(images), step):
        mine = slice(at, at + step)
        known = None if mask is None else mask[mine]
        found.append(_block(work, images[mine], known, start[mine], seed + at, devices))
    blocks_w, blocks_images, blocks_distance, blocks_noise = zip(*found)
    w = np.concatenate(blocks_w)
    if not np.isfinite(w).all():
        raise SisError(
            "the projection gave NaN or infinite latents: lower rate, or look whether the "
            "generator's weights are damaged"
        )
    kept = {name: np.concatenate([b[name] for b in blocks_noise]) for name in maps}
    return Projection(
        names,
        w,
        images,
        to_uint8(np.concatenate(blocks_images)),
        np.concatenate(blocks_distance),
        kept,
        skipped,
    )


def _check(recipe: Any, gen: Generator, steps: int, starts: int, batch: int) -> None:
    for name, value, least in (("steps", steps, 1), ("starts", starts, 0), ("batch", batch, 1)):
        if value < least:
            raise UsageError(f"{name} is {value}, expected at least {least}")
    if recipe.space not in ("w", "w+"):
        raise UsageError(f'space is {recipe.space!r}, expected "w" or "w+"')
    if recipe.rate <= 0:
        raise UsageError(f"rate is {recipe.rate}, expected more than 0 (0.2 is usual)")
    if (
        min(recipe.pyramid, recipe.features, recipe.pull) < 0
        or recipe.pyramid + recipe.features == 0
    ):
        raise UsageError(
            "pyramid, features and pull are weights from 0 up, and one of the first two must be "
            "above 0"
        )
    if recipe.noise and not hasattr(getattr(gen, "synthesis", None), "layers"):
        raise UsageError(
            f"{gen.info.name} has no noise maps: they need a StyleGAN2; leave noise off"
        )


def _read(
    photos: Any, size: int
) -> tuple[np.ndarray, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """(photos of `size` x `size` pixels, names, those skipped with the reason)."""
    if isinstance(photos, np.ndarray):
        photos = photos[None] if photos.ndim == 3 else photos
        if photos.dtype != np.uint8 or photos.shape[1:] != (size, size, 3) or not len(photos):
            raise UsageError(
                f"photos are {photos.dtype}{list(photos.shape)}, expected uint8[n {size} {size} "
                "3], the generator's size"
            )
        return photos, tuple(f"photo {i}" for i in range(len(photos))), ()

    found = Photos.open(photos, size, min_size=1)
    for name, reason in found.skipped:
        say(f"skipped {name}: {reason}")
    return np.asarray(found.images), tuple(found.names), tuple(found.skipped)


def _known(known: np.ndarray, photos: np.ndarray) -> Float[np.ndarray, "n _ _ 1"]:
    if known.shape != photos.shape[:3]:
        raise UsageError(
            f"known is {list(known.shape)}, expected {list(photos.shape[:3])}: one number per "
            "pixel of every photo"
        )
    return known[..., None].astype(np.float32)


def _comparer(gen: Generator, discriminator: Any, lpips: Any) -> Any:
    """The network of the feature distance: LPIPS, a discriminator, or None."""
    if lpips is None:
        return _discriminator(gen, discriminator)
    if gen.resolution < 16:
        raise UsageError(
            f"LPIPS needs images of at least 16 pixels, the generator draws {gen.resolution}"
        )
    if not isinstance(lpips, str | tuple | list):
        return lpips

    return load_lpips(*([lpips] if isinstance(lpips, str) else lpips))


def _discriminator(gen: Generator, given: Any) -> Any:
    """The one given, or of this size beside the generator's own weights, or None."""
    if given is None:
        try:
            given = load_discriminator(gen.info.name)
        except SisError:
            say(
                f"no discriminator is found for {gen.info.name}: photos are matched by the "
                "Laplacian pyramid alone"
            )
            return None
    if given.config.resolution != gen.resolution:
        raise UsageError(
            f"the discriminator sees {given.config.resolution} pixels and the generator draws "
            f"{gen.resolution}"
        )
    return given


def _statistics(gen: Generator) -> tuple[Float[np.ndarray, "s w"], np.float32]:
    """(mean of w in every W+ layer, root mean squared distance of w from it)."""
    w = collect(gen, sample_seeds(STARTS_SEED, STATISTICS), nn.map_body, batch=256)
    layers = np.asarray(gen.map(gen.latents([0]))).shape[1]
    mean = w.mean(0)
    return np.tile(mean, (layers, 1)), np.float32(np.sqrt(np.square(w - mean).sum(1).mean()))


def _nearest(
    gen: Generator, photos: np.ndarray, known: np.ndarray | None, n: int
) -> Float[np.ndarray, "n s w"]:
    """w of the sample that looks most like each photo at 16 pixels."""
    w, small = collect(
        gen, sample_seeds(STARTS_SEED, n), nn.sample_body, truncation=0.7,
        shown="samples to begin with", small=small_image(gen),
    )  # fmt: skip
    known = np.ones((*photos.shape[:3], 1), np.float32) if known is None else known
    wanted, weight = (np.asarray(nn.thumbnails(a)) for a in (photos / np.float32(127.5) - 1, known))
    return np.stack(
        [
            w[np.argmin((weight[i] * np.square(small - wanted[i])).sum(axis=(1, 2, 3)))]
            for i in range(len(photos))
        ]
    )


@dataclass(frozen=True)
class _Work:
    """What all photos share. net: of the feature distance, or None. length: |w|. maps: the stored
    noise maps, empty where they stay.
    """

    gen: Any
    net: Any
    length: np.float32
    maps: dict[str, np.ndarray]
    recipe: nn.Recipe
    steps: int


def _planned(
    work: _Work, photos: np.ndarray, known: np.ndarray | None, start: np.ndarray, batch: int
) -> tuple[int, Sequence[Any]]:
    """(photos at once, at most `batch` per device; the devices). SisError for too little memory."""
    data = np.empty((1, *photos.shape[1:]), np.float32), known, np.zeros(1, np.int32)
    first = nn.begin(start[:1], work.maps, work.recipe)
    given = (work.gen, work.net, np.float32(0), first, *data, np.zeros(3, int))
    devices = parallel.local_devices()
    rows, needed = plan.rows_at_once(
        nn.steps_body, _AXES, given, devices[0].platform, batch, recipe=work.recipe
    )
    devices = plan.devices_at_once(needed, devices)
    plan.check_room(needed, devices, f"projecting {rows} photos of {photos.shape[1]} pixels")
    return rows * len(devices), devices


def _block(
    work: _Work, photos: np.ndarray, known: np.ndarray | None, start: np.ndarray, seed: int,
    devices: Sequence[Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:  # fmt: skip
    """(w, images, distances, noise maps) of as many photos as fit the devices at once."""
    devices = devices[: len(photos)]
    n, rows = len(photos), -(-len(photos) // len(devices))
    seeds = np.arange(seed, seed + n, dtype=np.int32)

    def cut(tree: Any) -> Any:
        return jax.tree.map(lambda a: parallel.shard(a, len(devices), rows)[0], tree)

    data = cut((photos.astype(np.float32) / np.float32(127.5) - 1, known, seeds))
    state, each = cut(nn.begin(start, work.maps, work.recipe)), np.zeros(0)
    everywhere = parallel.replicate((work.gen, work.net, work.length), devices)
    run = parallel.map_devices(
        nn.steps_body, _AXES, 0, devices=devices, donate=(3,), recipe=work.recipe
    )
    with progress(work.steps, f"projection of {n} photos", "step") as bar:
        for first in range(0, work.steps, BLOCK):
            span = np.array([first, min(first + BLOCK, work.steps), work.steps], np.int32)
            state, each = run(*everywhere, state, *data, span)
            each.block_until_ready()  # so that the bar counts finished work
            bar.update(span[1] - first)
    values, distance = jax.tree.map(lambda a: parallel.unshard(np.asarray(a), n), (state[0], each))
    w = np.broadcast_to(values["w"], start.shape)
    return np.array(w), np.asarray(nn.draw(work.gen, w, values["noise"])), distance, values["noise"]
