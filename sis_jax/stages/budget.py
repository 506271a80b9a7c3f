"""How large the stages of `python -m sis_jax run` are, so that all of them fit the time given.

`speeds.py` times a few steps of each training on this machine; what they take decides how many
there will be. The plan is made once and kept in run.json, so that a resumed run trains to the same
count. Once the parts are found, the later stages are planned again from the time that is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sis_jax.models.stylegan2 import channel_table
from sis_jax.runs.cli import byte_size, duration
from sis_jax.runs.configs.distill import RECIPES
from sis_jax.runs.configs.pipeline import RunConfig
from sis_jax.training.gan import multiply_adds
from sis_jax.types import UsageError

USED = 0.9  # of the time is planned; the rest is for a machine that slows down
LATER_SHARE = 0.4  # of the time, for dataset and student: their masks are as good as the generator
SYNTHESIZE_SHARE = 0.1  # of that, for the dataset
MEASURE_SHARE, MOST_SNAPSHOTS = 0.1, 20  # of a generator's training, for its quality curve
LEAST_BATCHES, LEAST_IMAGES, LEAST_SHARE = 32, 128, 0.05  # of a training, a dataset, a student
# The networks of a CPU, (resolution, channel_base), the best first; one is taken that is shown
# ENOUGH photos in the time, at so many multiply-adds of a forward pass a second on one core.
NETWORKS, ENOUGH, MULTIPLY_ADDS = ((64, 2048), (64, 1024), (32, 1024)), 150_000, 7e9
# The generator that a training on a CPU begins with, and its learning rate there. The averaged
# generator must forget the earlier images soon: half-life of this share of the training, at most.
START, START_SIZE = "faces64", 64
STARTED_RATE, AVERAGED_SHARE, MOST_AVERAGED = 0.001, 1 / 8, 10_000
# Seconds on two cores of stages whose time hardly depends on their size, and of one item of others:
# of runs on 2,098 photos within an hour, where `discover` took 64 to 74, and a round of adaptation,
# most of it GrabCut on its photos, 2 to 2.5 times as long as its steps. Where these are wrong, the
# student's stage ends by the clock.
DISCOVER, REPORT, PER_FILE, PER_JUDGED = 60.0, 10.0, 0.006, 0.15
COMPARED = 100.0  # the clusterings of a generator that was trained here
JUDGED = 256  # photos on which an adaptation is judged
ROUND_STEP = 2.0  # a step of adaptation with its share of the labels, in steps of the training
FORWARD = 0.35  # a student's forward pass, in passes of its training
BASE_BYTES = 1.1e9  # of a process with its libraries, data and compiled programs


@dataclass(frozen=True)
class Sizes:
    """The settings of the stages.

    resolution to discriminator: of the generator's training, as in `train_generator`. n: generated
        images with masks. steps, adapt_steps, rounds: of the student, as in `distill`.
    """

    resolution: int = 64
    channel_base: int = 2048
    channel_max: int = 128
    latent: int = 128
    mapping_layers: int = 4
    batch: int = 32
    images: int = 1_000_000
    snapshot: int = 50_000
    start_from: str | None = None
    discriminator: Literal["stylegan2", "projected"] = "stylegan2"
    n: int = 10_000
    steps: int = RECIPES["default"]["steps"]
    adapt_steps: int = RECIPES["default"]["adapt_steps"]
    rounds: int = RECIPES["default"]["rounds"]

    def training(self) -> dict[str, Any]:
        """The settings of `train_generator`."""
        later = ("n", "steps", "adapt_steps", "rounds")
        settings = {k: v for k, v in asdict(self).items() if k not in later}
        if self.start_from is None:
            return settings
        averaged = min(MOST_AVERAGED, AVERAGED_SHARE * self.images)
        return settings | {"learning_rate": STARTED_RATE, "ema_images": averaged}


@dataclass(frozen=True)
class Speeds:
    """As measured on this machine: seconds of a first step, with its compilation, and of each image
    later; bytes of a step with its state. sample, snapshot: seconds of a generated image and of a
    point of the quality curve. batch: of the student.
    """

    sample: float
    student_start: float
    student_image: float
    student_bytes: float
    batch: int = RECIPES["default"]["batch"]
    snapshot: float = 0.0
    gan_start: float = 0.0
    gan_image: float = 0.0
    gan_bytes: float = 0.0

    def at_pace(self, pace: float) -> Speeds:
        """These speeds on a machine that has become so many times as slow."""
        slower = {k: pace * getattr(self, k) for k in ("sample", "student_start", "student_image")}
        return replace(self, **slower)


# Of a machine that trains in no time: a budget that is too short even there needs no timing.
INSTANT = Speeds(sample=0.0, student_start=0.0, student_image=1e-9, student_bytes=0.0)


@dataclass(frozen=True)
class Row:
    """One stage of the plan."""

    stage: str
    asks: str
    seconds: float
    memory_bytes: float

    def __str__(self) -> str:
        took, memory = duration(self.seconds), byte_size(self.memory_bytes)
        return f"{self.stage:<16} {self.asks:<56} {took:>7} {memory:>9}"


def usual(platform: str, photos: int) -> Sizes:
    """The sizes for a platform ("cpu", "gpu", "tpu"). photos: to train a generator on, if any."""
    sizes = Sizes(start_from=START) if photos else Sizes()
    if platform != "cpu":
        sizes = replace(
            sizes, channel_base=16384, channel_max=512, latent=512, mapping_layers=8,
            images=5_000_000, start_from=None,
        )  # fmt: skip
    if photos:
        sizes = replace(sizes, batch=max(4, min(sizes.batch, photos // 8 * 4)))
    return sizes


def asked(sizes: Sizes, config: RunConfig) -> Sizes:
    """`sizes` with what the configuration names in place of what was chosen. A generator that
    begins with another one has a projected discriminator, which needs no stored one.
    """
    own = config.sizes
    given = {
        "resolution": own.resolution,
        "images": own.train_images,
        "n": own.n,
        "steps": own.steps,
    }
    sizes = replace(sizes, **{k: v for k, v in given.items() if v is not None})
    start = own.start_from or (sizes.start_from if sizes.resolution == START_SIZE else None)
    if start in (None, "none"):
        return replace(sizes, start_from=None, discriminator="stylegan2")
    return replace(sizes, start_from=start, discriminator="projected")


def candidate(sizes: Sizes, seconds: float, cores: int) -> Sizes:
    """On a CPU, the network to measure, in place of that of `sizes`: the first that is likely to be
    shown `ENOUGH` photos. `sizes` bound its resolution; a network to start from stays.
    """
    if sizes.start_from is not None:
        return sizes
    most = MULTIPLY_ADDS * cores * (USED - LATER_SHARE) * seconds / ENOUGH
    fitting = [pair for pair in NETWORKS if pair[0] <= sizes.resolution] or [NETWORKS[-1]]
    for resolution, base in fitting:
        sizes = replace(sizes, resolution=min(resolution, sizes.resolution), channel_base=base)
        table = channel_table(sizes.resolution, base, sizes.channel_max)
        if multiply_adds(table) <= most:
            break
    return sizes


def fitted(sizes: Sizes, speeds: Speeds, given: float, spent: float, photos: int) -> Sizes:
    """`sizes` with the counts with which all stages take `USED` of the seconds left. given, spent:
    seconds of the budget and of the timing. photos: that the student adapts to. Raises UsageError
    where the smallest counts take longer.
    """
    seconds, least = given - spent, smallest(sizes, speeds, given, spent, photos)
    if not speeds.gan_image:
        return again(sizes, speeds, seconds - DISCOVER / USED, photos)
    later = LATER_SHARE * seconds - _ends(least, speeds, photos)
    sizes = _later(sizes, speeds, later, photos)
    rest = total(rows(replace(sizes, images=0), speeds, photos))
    spent = USED * seconds - rest
    snapshots = min(max(int(MEASURE_SHARE * spent / speeds.snapshot), 1), MOST_SNAPSHOTS)
    images = int((spent - snapshots * speeds.snapshot) / speeds.gan_image)
    images = max(images // sizes.batch * sizes.batch, least.images)
    # Whole batches, or a few images would be left for one more snapshot.
    return replace(sizes, images=images, snapshot=_whole(images / snapshots, sizes.batch))


def smallest(sizes: Sizes, speeds: Speeds, given: float, spent: float, photos: int) -> Sizes:
    """`sizes` with the smallest counts. Raises UsageError where these take too long."""
    least = replace(_later(sizes, speeds, 0.0, photos), images=LEAST_BATCHES * sizes.batch)
    least = replace(least, snapshot=least.images)
    needed = total(rows(least, speeds, photos))
    if needed > USED * (given - spent):
        minutes = math.ceil((needed / USED + spent) / 60)
        raise UsageError(
            f"the budget is {duration(given)}, and the smallest run takes about {minutes} min on "
            f"this machine: give --budget {minutes}m or more"
        )
    return least


def _whole(images: float, batch: int) -> int:
    """Rounded up to whole batches."""
    return math.ceil(images / batch) * batch


def again(sizes: Sizes, speeds: Speeds, left: float, photos: int) -> Sizes:
    """`sizes` with the counts of dataset and student that fit the seconds left after `discover`."""
    return _later(sizes, speeds, USED * left - _ends(sizes, speeds, photos), photos)


def _ends(sizes: Sizes, speeds: Speeds, photos: int) -> float:
    """Seconds of the stages around dataset and student that no count changes."""
    return total(r for r in rows(sizes, speeds, photos) if r.stage in ("predict", "report"))


def _later(sizes: Sizes, speeds: Speeds, seconds: float, photos: int) -> Sizes:
    """The dataset and the student that take so many seconds: the usual ones, or a share of them."""
    least = _with_student(replace(sizes, n=LEAST_IMAGES), LEAST_SHARE)
    spare = max(seconds - _dataset_and_student(least, speeds, photos), 0.0)
    n = LEAST_IMAGES + int(SYNTHESIZE_SHARE * spare / (speeds.sample + PER_FILE))
    sizes = replace(sizes, n=min(n, Sizes().n))
    start, whole = (
        _dataset_and_student(_with_student(sizes, share), speeds, photos) for share in (0, 1)
    )
    return _with_student(sizes, min(max((seconds - start) / (whole - start), LEAST_SHARE), 1.0))


def _with_student(sizes: Sizes, share: float) -> Sizes:
    """`sizes` with a share of the usual student's steps, in fewer rounds where they are few."""
    usual = Sizes()
    rounds = usual.rounds if share > 0.5 else 2 if share > 0.2 else 1
    adapt_steps = math.ceil(share * usual.rounds * usual.adapt_steps / rounds)
    steps = math.ceil(share * usual.steps)
    return replace(sizes, steps=steps, adapt_steps=adapt_steps, rounds=rounds)


def _dataset_and_student(sizes: Sizes, speeds: Speeds, photos: int) -> float:
    return total(r for r in rows(sizes, speeds, photos) if r.stage in ("synthesize", "distill"))


def rows(sizes: Sizes, speeds: Speeds, photos: int) -> list[Row]:
    """The stages with their seconds and memory; photos: how many the student adapts to."""
    found = []
    if speeds.gan_image:
        took = speeds.gan_start + sizes.images * speeds.gan_image
        took += math.ceil(sizes.images / sizes.snapshot) * speeds.snapshot
        asks = f"{sizes.images:,} images, {sizes.resolution} pixels, {origin(sizes)}"
        found.append(Row("train_generator", asks, took, BASE_BYTES + speeds.gan_bytes))
    if speeds.gan_image:
        asks, took = "k and layer by what stands out in the photos", DISCOVER + COMPARED
    else:
        asks, took = "k and layer by a sweep", DISCOVER
    found.append(Row("discover", asks, took, BASE_BYTES))
    drawn = sizes.n * (speeds.sample + PER_FILE)
    found.append(Row("synthesize", f"{sizes.n:,} images with masks", drawn, BASE_BYTES))
    asks, step = f"{sizes.steps:,} steps", speeds.batch * speeds.student_image
    took = speeds.student_start + sizes.steps * step
    if photos:
        asks += f", {sizes.rounds} rounds of {sizes.adapt_steps:,} on photos"
        took += speeds.student_start + sizes.rounds * sizes.adapt_steps * ROUND_STEP * step
        took += judging(photos)
    found.append(Row("distill", asks, took, BASE_BYTES + speeds.student_bytes))
    if photos:
        seen = photos * (2 * FORWARD * speeds.student_image + PER_FILE)
        found.append(Row("predict", f"{photos:,} photos", seen, BASE_BYTES))
    return [*found, Row("report", "", REPORT, BASE_BYTES)]


def origin(sizes: Sizes) -> str:
    """What a generator trained here begins with, in words."""
    if sizes.start_from is not None:
        return f"from {sizes.start_from}"
    return f"{sizes.channel_base} / {sizes.channel_max} channels"


def judging(photos: int) -> float:
    """Seconds of the comparison at the end of an adaptation."""
    return 2 * min(photos // 4, JUDGED) * PER_JUDGED


def total(stages: Iterable[Row]) -> float:
    """Seconds of all these stages."""
    return sum(row.seconds for row in stages)
