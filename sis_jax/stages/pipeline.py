"""Every stage, one after the other: `python -m sis_jax run [GEN | PHOTOS] --out RUN`. Each stage
resumes, so the command can be stopped and given again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sis_jax as sis
from sis_jax.ops.progress import say
from sis_jax.runs.run import RunFolder

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".npz")


def run(
    source: str | None = None,
    *,
    out: str,
    photos: str | None = None,
    resolution: int = 64,
    train_images: int = 5_000_000,
    n: int = 10_000,
    steps: int = 2000,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """From a generator, or a folder of photos, to a segmenter: train (photos only), discover,
    synthesize, distill, report.

    source: a generator (name, weights folder, checkpoint file), or photos to train one on (a folder
        or archive); the default generator without it.
    out: run folder of all stages; a generator is trained in its sub-folder `training`.
    photos: real photos for the student to adapt to; by default those the generator was trained on
        here.
    resolution: side of the pictures a generator trained here draws.
    train_images: photos shown to its discriminator in all.
    n: generated pictures with masks.
    steps: of the student's training.
    seed: of every stage.
    overwrite: throw away what other settings left in `out`.

    Returns the path of the report.
    """
    gen = source
    if source is not None and _is_photos(Path(source)):
        say("1 of 5: training a generator on the photos")
        RunFolder.open(out).close()  # a run before anything lies in it
        training = Path(out) / "training"
        sis.train_generator(
            source,
            out=str(training),
            resolution=resolution,
            images=train_images,
            seed=seed,
            overwrite=overwrite,
        )
        gen, photos = str(training / "generator"), photos or source
    say("2 of 5: finding the parts")
    sis.discover(gen, out=out, seed=seed, overwrite=overwrite)
    say("3 of 5: writing pictures and masks")
    sis.synthesize(out, n=n, seed=seed + 1, overwrite=overwrite)
    say("4 of 5: training the student")
    sis.distill(out, steps=steps, photos=photos, seed=seed, overwrite=overwrite)
    say("5 of 5: the report")
    return sis.report(out)


def _is_photos(path: Path) -> bool:
    """A folder that holds no weights, or an archive."""
    if path.is_dir():
        return not (path / "config.json").is_file()
    return path.is_file() and path.name.lower().endswith(_ARCHIVES)


def _plan(config: dict[str, Any]) -> dict[str, Any]:
    out = config["out"]
    return {
        "files": [
            f"{out}/{name}" for name in ("run.json", "parts/", "data/", "student/", "report.html")
        ]
    }


def _results(report: Path, config: dict[str, Any]) -> list[Path]:
    return [report, report.parent / "student"]


run.plan = _plan  # type: ignore[attr-defined]
run.results = _results  # type: ignore[attr-defined]
