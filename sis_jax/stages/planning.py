"""The plan of a run in its run.json, and the time that is left of its budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sis_jax.checkpoints import load_generator
from sis_jax.data.decode import Fit
from sis_jax.data.files import read_run
from sis_jax.data.photo_files import list_source, nothing_found
from sis_jax.data.photos import own_aspect
from sis_jax.data.threads import cores
from sis_jax.ops.progress import say
from sis_jax.runs.cli import duration
from sis_jax.runs.configs.pipeline import RunConfig
from sis_jax.runs.run import RunFolder
from sis_jax.stages import budget, foreground, speeds
from sis_jax.stages.budget import Row, Sizes, Speeds
from sis_jax.stages.clock import Clock
from sis_jax.training.photo_labels import PhotoLabels
from sis_jax.types import UsageError

AGAIN = "run, planned again"  # the stage of run.json with the later plan
CLUSTERING = "run, the clustering"  # the stage with the settings of `discover`
PACES = 0.5, 4.0  # bounds of how slow the machine became since it was timed
LEAST_PHOTOS = 8  # two of the smallest batches
SQUARE = 1.2  # longer to shorter edge: photos up to here are cropped


@dataclass(frozen=True)
class Plan:
    """A plan in run.json. fit: of the photos. speeds, stages: None and empty without a budget."""

    sizes: Sizes
    fit: Fit
    speeds: Speeds | None = None
    stages: tuple[Row, ...] = ()

    @classmethod
    def read(cls, record: dict[str, Any]) -> Plan:
        measured = record.get("speeds")
        stages = tuple(Row(**row) for row in record["stages"])
        found = Speeds(**measured) if measured else None
        return cls(Sizes(**record["sizes"]), record["fit"], found, stages)


class Planner:
    """The plans of one call of `run`. photos: that the student adapts to; trains: whether they also
    train a generator. clock: of the run. Raises UsageError for fewer photos than `LEAST_PHOTOS`.
    """

    def __init__(self, config: RunConfig, photos: str | None, trains: bool, clock: Clock):
        self.config, self.photos, self.trains = config, photos, trains
        self.budget = config.seconds()
        self.count = 0 if photos is None else _count(photos)
        self.shown = _count(str(config.source)) if trains else 0  # to the generator
        if trains and self.shown < LEAST_PHOTOS:
            raise UsageError(
                f"{config.source} holds {self.shown} photos, and a generator learns from at least "
                f"{LEAST_PHOTOS}, better from hundreds: add photos of the same kind, or give a "
                "generator of such images and --photos"
            )
        self.out, self.clock = Path(config.out), clock

    def first(self) -> Plan:
        """The plan of all stages, made once. Raises UsageError for a budget that is too short."""
        return self._kept(self.config.verb, self._first)

    def later(self, plan: Plan) -> Plan:
        """The plan of the stages after `discover`, made once."""
        return self._kept(AGAIN, lambda: self._again(plan))

    def past_training(self) -> bool:
        """Whether an earlier call finished the generator's training."""
        if self.config.overwrite:
            return False
        training = _record(self.out / "training", "train_generator")
        return training.get("state") == "done" or AGAIN in read_run(self.out)["stages"]

    def alike(self) -> bool:
        """Whether the student's photos are framed like the generated images; a student that an
        earlier version began goes on as it began.
        """
        begun = {} if self.config.overwrite else _record(self.out, "distill")
        if begun:
            return begun.get("config", {}).get("alike", False)
        return self.trains and self.photos == self.config.source

    def clustering(
        self, generator: str, features: Callable[[], PhotoLabels]
    ) -> dict[str, int | str]:
        """Settings of `discover` for a generator trained here, chosen once: none where the sweep
        chooses, since only it has two levels, or an earlier version began.
        """
        begun = {} if self.config.overwrite else _record(self.out, "discover")
        known = not self.config.overwrite and _record(self.out, CLUSTERING)
        if not self.trains or self.config.level or (begun and not known):
            return {}
        with (
            RunFolder.open(self.out, self.config.overwrite) as folder,
            folder.stage(self.config, name=CLUSTERING) as stage,
        ):
            if not stage.done:
                seed = self.config.seed
                stage.record["settings"] = foreground.clustering(generator, seed, features())
            return dict(stage.record["settings"])

    def minutes(self, plan: Plan, stage: str) -> float | None:
        """After which a stage that is slower than planned must stop for those behind it, which then
        keep their share of the reserve.
        """
        if self.budget is None or plan.speeds is None:
            return None
        past = [row.stage for row in plan.stages].index(stage) + 1
        behind = budget.total(plan.stages[past:])
        behind += budget.judging(self.count) if stage == "distill" else 0.0
        behind /= budget.USED
        return max(self.budget - behind - self.clock.seconds, 0.0) / 60

    def say_used(self) -> None:
        """State how much of the budget was used, and by which stage."""
        if self.budget is None:
            return
        took = f"took {duration(self.clock.seconds)} of {duration(self.budget)}"
        names = {self.config.verb: "the plan", CLUSTERING: "k and layer"}
        found = [f"{names.get(k, k)} {duration(v)}" for k, v in self._seconds().items()]
        say(f"{took}: {', '.join(found)}")

    def _seconds(self) -> dict[str, float]:
        """{stage: seconds} of the finished ones, those of all calls where a stage counts them."""
        places = [f for f in (self.out / "training", self.out) if (f / "run.json").is_file()]
        records = [item for place in places for item in read_run(place)["stages"].items()]
        return {
            name: max(record["seconds"], record.get("training_seconds", 0.0))
            for name, record in sorted(records, key=lambda item: item[1]["started"])
            if record.get("seconds", 0.0) >= 1
        }

    def _kept(self, name: str, make: Callable[[], Plan]) -> Plan:
        """The plan of that name in run.json, made where it is not there."""
        with (
            RunFolder.open(self.out, self.config.overwrite) as folder,
            folder.stage(self.config, name=name) as stage,
        ):
            if not stage.done:
                stage.record |= asdict(make())
            return Plan.read(stage.record)

    def _fit(self) -> Fit:
        """Nearly square photos lose little to a crop; of others the whole is kept."""
        if self.config.fit is not None or self.photos is None:
            return self.config.fit or "crop"
        aspect = own_aspect(self.photos)
        if aspect <= SQUARE:
            return "crop"
        say(
            f"the photos' longer edge is {aspect:.2f} times the shorter one: the whole of them is "
            "squeezed into a square; --fit pad or --fit crop do otherwise"
        )
        return "stretch"

    def _first(self) -> Plan:
        config, platform = self.config, jax.default_backend()
        sizes = budget.asked(budget.usual(platform, self.shown), config)
        start = config.sizes.start_from
        if self.trains and start not in (None, "none") and config.sizes.resolution is None:
            sizes = replace(sizes, resolution=load_generator(start).resolution)
        if self.budget is None:
            if self.trains:
                say(
                    f"no --budget, so sizes for a {platform}: {sizes.images:,} images of "
                    f"{sizes.resolution} pixels, {budget.origin(sizes)}"
                )
                _say_terms(sizes)
            return Plan(sizes, self._fit())
        if self.trains and platform == "cpu":
            sizes = budget.candidate(sizes, self.budget, cores())
        instant = replace(budget.INSTANT, gan_image=1e-9 * self.trains)
        budget.smallest(sizes, instant, self.budget, self.clock.seconds, self.count)
        say("timing a few steps of each training (compiling them takes minutes the first time)")
        found = speeds.measured(sizes, config.source, self.trains, config.seed)
        sizes = budget.fitted(sizes, found, self.budget, self.clock.seconds, self.count)
        _say_terms(sizes)
        plan = Plan(sizes, self._fit(), found)
        return self._shown(f"the plan for {duration(self.budget)}:", plan, 0)

    def _again(self, plan: Plan) -> Plan:
        if self.budget is None or plan.speeds is None:
            return plan
        left = max(self.budget - self.clock.seconds, 1.0)
        now = plan.speeds.at_pace(self._pace(plan))
        sizes = budget.again(plan.sizes, now, left, self.count)
        past = [row.stage for row in plan.stages].index("discover") + 1
        return self._shown(
            f"the plan for the {duration(left)} left:", replace(plan, sizes=sizes, speeds=now), past
        )

    def _pace(self, plan: Plan) -> float:
        """How many times as long the generator's training took as it should have: the later stages
        then run on the same machine.
        """
        record = _record(self.out / "training", "train_generator") if self.trains else {}
        if "training_seconds" not in record or plan.speeds is None:
            return 1.0
        sizes = replace(plan.sizes, images=record["images"])
        expected = budget.rows(sizes, plan.speeds, self.count)[0].seconds
        return float(np.clip(record["training_seconds"] / expected, *PACES))

    def _shown(self, title: str, plan: Plan, past: int) -> Plan:
        """The plan with its stages from number `past` on, printed."""
        assert plan.speeds is not None
        sizes = budget.asked(plan.sizes, self.config)
        stages = tuple(budget.rows(sizes, plan.speeds, self.count)[past:])
        say("\n  ".join([title, *map(str, stages)]))
        return replace(plan, sizes=sizes, stages=stages)


def _say_terms(sizes: Sizes) -> None:
    """State whose terms the weights of a generator trained here share."""
    if sizes.start_from is not None:
        say(
            f"the generator's training starts from {sizes.start_from}, and its weights share the "
            "terms of that one; --start-from none begins with random weights, and needs more time"
        )


def _record(run: Path, stage: str) -> dict[str, Any]:
    """Of a stage in a run.json, empty where there is none."""
    return read_run(run)["stages"].get(stage, {}) if (run / "run.json").is_file() else {}


def _count(photos: str) -> int:
    """How many photos there are. Raises UsageError where there are none."""
    listing = list_source(Path(photos))
    if not listing.names:
        raise UsageError(nothing_found(photos, [listing]))
    return len(listing.names)
