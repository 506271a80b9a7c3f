"""Every stage, one after the other: `python -m sis_jax run [GEN | PHOTOS] --out RUN`. Each stage
resumes, so the command can be stopped and given again.
"""

from __future__ import annotations

from pathlib import Path

import sis_jax as sis
from sis_jax.ops.progress import say
from sis_jax.runs.config import door
from sis_jax.runs.configs.pipeline import RunConfig
from sis_jax.runs.run import RunFolder

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".npz")


@door(RunConfig, stage=__name__)
def run(config: RunConfig) -> Path:
    """From a generator, or a folder of photos, to a segmenter: train (photos only), discover,
    synthesize, distill, report.

    Returns the path of the report. Raises UsageError for inputs that a stage cannot work with.
    """
    gen, photos, overwrite, seed = config.source, config.photos, config.overwrite, config.seed
    if gen is not None and _is_photos(Path(gen)):
        say("1 of 5: training a generator on the photos")
        RunFolder.open(config.out).close()  # a run before anything else is in the folder
        training = Path(config.out) / "training"
        sis.train_generator(
            gen,
            out=str(training),
            resolution=config.resolution,
            images=config.train_images,
            seed=seed,
            overwrite=overwrite,
        )
        gen, photos = str(training / "generator"), photos or gen
    say("2 of 5: finding the parts")
    sis.discover(gen, out=config.out, seed=seed, overwrite=overwrite)
    say("3 of 5: writing images and masks")
    sis.synthesize(config.out, n=config.n, seed=seed + 1, overwrite=overwrite)
    say("4 of 5: training the student")
    sis.distill(config.out, steps=config.steps, photos=photos, seed=seed, overwrite=overwrite)
    say("5 of 5: the report")
    return sis.report(config.out)


def _is_photos(path: Path) -> bool:
    """A folder that holds no weights, or an archive."""
    if path.is_dir():
        return not (path / "config.json").is_file()
    return path.is_file() and path.name.lower().endswith(_ARCHIVES)


def plan(config: RunConfig) -> dict[str, list[str]]:
    names = ("run.json", "parts/", "data/", "student/", "report.html")
    return {"files": [f"{config.out}/{name}" for name in names]}


def results(report: Path, config: RunConfig) -> list[Path]:
    return [report, report.parent / "student"]
