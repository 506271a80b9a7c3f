"""The configuration of `sis_jax.train_generator`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional

from sis_jax.runs.config import Config, Switch, spelled


@dataclass(frozen=True, kw_only=True)
class Network:
    """The generator and its discriminator.

    Args:
        resolution: pixels of the images, a power of two from 8 on.
        start_from: a generator with its discriminator to go on from (a name, a folder, a checkpoint
            file) instead of random weights.
        channel_base: channels at resolution r are channel_base / r, at most channel_max.
        channel_max: see channel_base.
        latent: size of z and w.
        mapping_layers: depth of the mapping network.
        dtype: of the convolutions; auto is bfloat16 on accelerators that have it, else float32.
        discriminator: "stylegan2", or "projected" (Sauer et al. 2021): on the features of the
            backbone that ships, better where photos or hours are few. It has no gradient penalty,
            path length or adaptive augmentation, its own learning rate, and is not stored.
        foreground: a FurryGAN (Bae et al. 2022): a foreground, a background of a third of its
            widths, and the mask between them, which `discover` takes. The foreground is the
            generator of `start_from`. There is no path length; up to 128 pixels.
    """

    resolution: int = 64
    start_from: str | None = None
    channel_base: int = 16384
    channel_max: int = 512
    latent: int = 512
    mapping_layers: int = 8
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    discriminator: Literal["stylegan2", "projected"] = "stylegan2"
    foreground: Switch = False


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """The training and its losses.

    Args:
        images: photos shown to the discriminator in all (25 million is the papers' figure, 1
            million gives a first idea at 64 pixels).
        batch: images per step over all devices, a multiple of 4.
        learning_rate: of Adam, before the correction for lazy regularisation.
        r1_gamma: weight of the gradient penalty; by default 0.0002 resolution^2 / batch.
        path_length: weight of path length regularisation, 0 switches it off.
        ema_images: half-life, in images, of the averaged generator.
        snapshot: images between two checkpoints, sample grids and entries of the curve.
        minutes: stop after this time, whatever `images` asks for, and save.
        patience: stop after so many snapshots without a better one (by the Fréchet distance to the
            photos in a backbone's features); 0 goes on. The best snapshot is kept, the last of
            those within 5 % of it.
        foreground_area: share of an image that is foreground at least, with `foreground`.
        seed: of weights, latents and order.
    """

    images: int = 5_000_000
    batch: int = 32
    learning_rate: float = 0.0025
    r1_gamma: float | None = None
    path_length: float = 2.0
    ema_images: float = 10_000.0
    snapshot: int = 50_000
    minutes: float | None = None
    patience: int = 10
    foreground_area: float = 0.35
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Photos:
    """How the photos are used.

    Args:
        augment: "ada" augments the discriminator's inputs as soon as it overfits, "none" never.
        mirror: also show every photo flipped.
        rows: use only the first so many photos, in the order of their names.
        holdout: photos held out to measure quality on.
        fit: photos that are not square: "crop" cuts the largest centred square, "pad" repeats
            their border up to a square, "stretch" squeezes them into one.
    """

    augment: Literal["ada", "none"] = "ada"
    mirror: bool = True
    rows: int | None = None
    holdout: int = 500
    fit: Literal["crop", "pad", "stretch"] = "crop"


@dataclass(frozen=True)
class TrainGeneratorConfig(Config):
    """Photos in, a generator out.

    Args:
        photos: a folder, a .zip, .tar or .npz of photos.
        out: folder for everything that is made.
        licence: terms of the weights; they follow from the photos.
        overwrite: discard the results of another configuration in `out`.
    """

    verb: ClassVar[str] = "train_generator"
    unrecorded: ClassVar[tuple[str, ...]] = ("images", "minutes", "patience", "out", "overwrite")
    later: ClassVar[Mapping[str, Any]] = {
        "fit": "crop", "discriminator": "stylegan2", "foreground": False, "foreground_area": 0.35,
    }  # fmt: skip

    photos: Annotated[str, Positional, spelled("PHOTOS")]
    _: KW_ONLY
    out: str
    licence: str = "as the photos it was trained on"
    overwrite: Switch = False
    network: Network = field(default_factory=Network)
    train: Optimisation = field(default_factory=Optimisation)
    data: Photos = field(default_factory=Photos)
