"""Train a StyleGAN2 on a folder of photos: `python -m sis_jax.train_generator PHOTOS --out DIR`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sis_jax.runs import cli

if TYPE_CHECKING:
    from sis_jax.models.stylegan2 import StyleGAN2


@cli.hooks("sis_jax.stages.train_generator", "plan", "results")
def train_generator(
    photos: str,
    *,
    out: str,
    resolution: int = 64,
    images: int = 5_000_000,
    start_from: str | None = None,
    batch: int = 32,
    channel_base: int = 16384,
    channel_max: int = 512,
    latent: int = 512,
    mapping_layers: int = 8,
    learning_rate: float = 0.0025,
    r1_gamma: float | None = None,
    path_length: float = 2.0,
    augment: Literal["ada", "none"] = "ada",
    mirror: bool = True,
    rows: int | None = None,
    holdout: int = 500,
    ema_images: float = 10_000.0,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    snapshot: int = 50_000,
    minutes: float | None = None,
    licence: str = "as the photos it was trained on",
    seed: int = 0,
    overwrite: bool = False,
) -> StyleGAN2:
    """Train a StyleGAN2 on photos; stop it any time, the same command goes on where it stopped.

    photos: a folder, a .zip, .tar or .npz of pictures; each is cut to its largest centred square.
    out: folder for everything that is made.
    resolution: side of the pictures the generator draws, a power of two.
    images: photos shown to the discriminator in all (25 million is the papers' figure, 1 million
        gives a first idea at 64 pixels).
    start_from: a generator with its discriminator to go on from (a name, a folder, a checkpoint
        file) instead of random weights.
    batch: images per step over all devices, a multiple of 4.
    channel_base: channels at resolution r are channel_base / r, at most channel_max.
    channel_max: see channel_base.
    latent: size of z and w.
    mapping_layers: depth of the mapping network.
    learning_rate: of Adam, before the correction for lazy regularisation.
    r1_gamma: weight of the gradient penalty; by default 0.0002 resolution^2 / batch.
    path_length: weight of path length regularisation, 0 switches it off.
    augment: "ada" augments what the discriminator sees as soon as it overfits, "none" never.
    mirror: also show every photo flipped.
    rows: use only the first so many photos, in the order of their names.
    holdout: photos kept apart to measure quality on.
    ema_images: half-life, in images, of the averaged generator.
    dtype: of the convolutions; auto is bfloat16 on an accelerator, float32 on a CPU.
    snapshot: images between two checkpoints, sample grids and points of the curve.
    minutes: stop after so long, whatever `images` says, and save.
    licence: terms of the weights; they follow from the photos.
    seed: of weights, latents and order.
    overwrite: throw away what another configuration left in `out`.

    Returns the averaged generator.
    """
    from sis_jax.stages.train_generator import train_generator as work

    return work(
        photos,
        out=out,
        resolution=resolution,
        images=images,
        start_from=start_from,
        batch=batch,
        channel_base=channel_base,
        channel_max=channel_max,
        latent=latent,
        mapping_layers=mapping_layers,
        learning_rate=learning_rate,
        r1_gamma=r1_gamma,
        path_length=path_length,
        augment=augment,
        mirror=mirror,
        rows=rows,
        holdout=holdout,
        ema_images=ema_images,
        dtype=dtype,
        snapshot=snapshot,
        minutes=minutes,
        licence=licence,
        seed=seed,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    cli.use_cpu_cores()
    cli.main(train_generator)
