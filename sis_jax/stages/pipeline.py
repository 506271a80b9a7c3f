"""The work of `sis_jax.run`: the doors of all stages, one after the other."""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path
from typing import Any

import sis_jax as sis
from sis_jax import parallel
from sis_jax.data.photo_files import ARCHIVES
from sis_jax.ops.plan import give_back
from sis_jax.ops.progress import say
from sis_jax.runs.configs.pipeline import RunConfig
from sis_jax.stages import background, budget, foreground
from sis_jax.stages.clock import Clock
from sis_jax.stages.photo_samples import write_samples
from sis_jax.stages.planning import Planner
from sis_jax.types import UsageError


def run(config: RunConfig) -> Path:
    """As `sis_jax.run`, which explains the configuration."""
    if parallel.initialize()[1] > 1:
        raise UsageError(
            "run measures one machine and plans for it: start it in one process, or give the "
            "commands of its stages one after the other in all of them"
        )
    with Clock(Path(config.out), config.overwrite) as clock:
        return _stages(config, clock)


def _stages(config: RunConfig, clock: Clock) -> Path:
    gen, out, seed, overwrite = config.source, config.out, config.seed, config.overwrite
    trains = gen is not None and _is_photos(Path(gen))
    photos = config.photos or (gen if trains else None)
    planner = Planner(config, photos, trains, clock)
    first = planner.first()
    if trains:
        if not planner.past_training():
            _next("training a generator on the photos")
            sis.train_generator(
                gen, out=f"{out}/training", fit=first.fit, seed=seed, overwrite=overwrite,
                minutes=planner.minutes(first, "train_generator"), **first.sizes.training(),
            )  # fmt: skip
        gen = f"{out}/training/generator"
    _next("finding the parts")
    features = functools.cache(partial(foreground.features, str(config.source), first.fit))
    clustering = planner.clustering(str(gen), features)
    sis.discover(gen, out=out, seed=seed, overwrite=overwrite, **clustering)
    if trains and (names := background.missing_background(out, features())):
        sis.label(out, edits={"format": 1, "levels": {"0": names}})
    later = planner.later(first)
    sizes = later.sizes
    _next("writing images and masks")
    sis.synthesize(out, n=sizes.n, level=config.level, seed=seed + 1, overwrite=overwrite)
    _next("training the student")
    minutes = planner.minutes(later, "distill")
    # The rounds of the plan, and more of them while there is time.
    rounds = sizes.rounds if minutes is None else budget.Sizes().rounds
    sis.distill(
        out, photos=photos, fit=first.fit, steps=sizes.steps, adapt_steps=sizes.adapt_steps,
        rounds=rounds, alike=planner.alike(), minutes=minutes, seed=seed, overwrite=overwrite,
    )  # fmt: skip
    if photos is not None:
        _next("masks of the photos")
        sis.predict(out, photos, out=f"{out}/masks", overwrite=overwrite)
        write_samples(Path(out), photos, Path(out) / "masks")
    report = sis.report(out)
    planner.say_used()
    return report


def _next(stage: str) -> None:
    """Say what comes, with the memory that the stage before has freed."""
    give_back()
    say(stage)


def _is_photos(path: Path) -> bool:
    """A folder that holds no weights, or an archive."""
    if path.is_dir():
        return not (path / "config.json").is_file()
    return path.is_file() and path.name.lower().endswith(ARCHIVES)


def plan(config: RunConfig) -> dict[str, Any]:
    names = ["run.json", "parts/", "data/", "student/", "report.html"]
    if config.source is not None and _is_photos(Path(config.source)):
        names += ["training/", "masks/", "photos/"]
    elif config.photos is not None:
        names += ["masks/", "photos/"]
    files = {"files": [f"{config.out}/{name}" for name in names]}
    return files if config.budget is None else files | {"seconds": config.seconds()}


def results(report: Path, config: RunConfig) -> list[Path]:
    masks = report.parent / "masks"
    return [report, report.parent / "student", *([masks] if masks.is_dir() else [])]
