"""The plan of a run with a budget: what is asked of each stage, from speeds that were measured."""

from dataclasses import replace

import numpy as np
import pytest

from sis_jax.runs.config import build
from sis_jax.runs.configs.distill import RECIPES
from sis_jax.runs.configs.pipeline import RunConfig
from sis_jax.stages import budget, speeds
from sis_jax.stages.budget import Sizes, Speeds
from sis_jax.types import UsageError

# Like two cores: 60 images a second through the generator's training, 25 through the student's.
TWO_CORES = Speeds(
    sample=0.004, student_start=60.0, student_image=0.04, student_bytes=1e9, snapshot=30.0,
    gan_start=90.0, gan_image=1 / 60, gan_bytes=5e8,
)  # fmt: skip
GIVEN = replace(TWO_CORES, snapshot=0.0, gan_start=0.0, gan_image=0.0, gan_bytes=0.0)
PHOTOS = 2000


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("30m", 1800), ("1h30m", 5400), ("90s", 90), ("5400", 5400), ("0.5h", 1800),
     ("45min", 2700)],
)  # fmt: skip
def test_a_budget_in_words(text, seconds):
    assert RunConfig(out="r", budget=text).seconds() == seconds


@pytest.mark.parametrize("text", ["", "2 days", "h", "-5", "0", "nan", "30m2h"])
def test_a_budget_that_is_no_time(text):
    with pytest.raises(UsageError, match="expected a time: 2h, 30m"):
        RunConfig(out="r", budget=text).seconds()


@pytest.mark.parametrize("speed", [TWO_CORES, GIVEN], ids=["trained", "given"])
@pytest.mark.parametrize("seconds", [1200, 1800, 7200, 40_000])
def test_all_stages_fit_the_budget(speed, seconds):
    """And use it: what is left over is the margin, or more than the student can use."""
    sizes = budget.fitted(Sizes(), speed, seconds, 0, PHOTOS)
    planned = budget.total(budget.rows(sizes, speed, PHOTOS))
    assert planned <= 0.92 * seconds
    usual = Sizes()
    full = (sizes.n, sizes.steps, sizes.rounds) == (usual.n, usual.steps, usual.rounds)
    assert planned > 0.8 * seconds or (full and not speed.gan_image)
    assert sizes.images % sizes.batch == 0 or not speed.gan_image
    # Else the few images left over would be measured once more.
    assert sizes.snapshot % sizes.batch == 0 or not speed.gan_image


def test_more_time_asks_for_more():
    small, large = (budget.fitted(Sizes(), TWO_CORES, t, 0, PHOTOS) for t in (1200, 7200))
    assert large.images > 5 * small.images and large.n >= small.n
    assert large.steps * large.rounds > small.steps * small.rounds
    assert large.snapshot < large.images  # the curve has more than its end


@pytest.mark.parametrize("spent", [0, 150])
def test_a_budget_that_is_too_short_states_one_that_is_not(spent):
    """The time of the probe included."""
    with pytest.raises(UsageError, match=r"the budget is 2 min, .* --budget \d+m or") as error:
        budget.fitted(Sizes(), TWO_CORES, 120, spent, PHOTOS)
    minutes = int(str(error.value).split("--budget ")[1].split("m")[0])
    sizes = budget.fitted(Sizes(), TWO_CORES, 60 * minutes, spent, PHOTOS)
    assert budget.total(budget.rows(sizes, TWO_CORES, PHOTOS)) <= 0.92 * (60 * minutes - spent)
    with pytest.raises(UsageError):
        budget.fitted(Sizes(), TWO_CORES, 60 * (minutes - 1), spent, PHOTOS)


def test_planned_again_from_the_time_left():
    """A training that took longer leaves a smaller student, one that took less a larger one; there
    is a least one, and the generator's settings stay.
    """
    first = budget.fitted(Sizes(), TWO_CORES, 7200, 0, PHOTOS)
    found = [budget.again(first, TWO_CORES, left, PHOTOS) for left in (1, 900, 1800, 100_000)]
    work = [s.steps + s.rounds * s.adapt_steps for s in found]
    assert work == sorted(work) and work[0] >= 20 and found[0].n >= 128
    usual = Sizes()
    assert (found[3].n, found[3].steps, found[3].rounds) == (usual.n, usual.steps, usual.rounds)
    assert all(s.training() == first.training() for s in found)
    for sizes, left in zip(found[1:3], (900, 1800)):
        assert budget.total(budget.rows(sizes, GIVEN, PHOTOS)) - budget.DISCOVER < 0.95 * left


@pytest.mark.parametrize(
    ("hours", "network"), [(0.3, (32, 1024)), (2, (64, 1024)), (12, (64, 2048))]
)
def test_the_network_follows_the_time(hours, network):
    sizes = budget.candidate(Sizes(), 3600 * hours, cores=2)
    assert (sizes.resolution, sizes.channel_base) == network


def test_the_network_is_no_finer_than_asked():
    sizes = budget.asked(Sizes(), build(RunConfig, {"out": "r", "resolution": 16}))
    assert budget.candidate(sizes, 1e5, cores=2).resolution == 16


def test_what_is_asked_for_stands():
    given = {"resolution": 32, "train_images": 96, "n": 50, "steps": 7}
    config = build(RunConfig, {"out": "r", **given})
    sizes = budget.asked(Sizes(), config)
    assert (sizes.resolution, sizes.images, sizes.n, sizes.steps) == (32, 96, 50, 7)


def test_platforms_and_few_photos():
    assert budget.usual("gpu", 0).channel_base > budget.usual("cpu", 0).channel_base
    assert budget.usual("cpu", 100_000).batch == 32
    assert [budget.usual("cpu", n).batch for n in (63, 24, 5)] == [28, 12, 4]


@pytest.mark.integration
def test_measured_here(monkeypatch):
    """A small network and student: every speed is there, and a step costs less than the first."""
    monkeypatch.setitem(RECIPES["default"], "student", "unet-small")
    monkeypatch.setattr(speeds, "LEAST_SIDE", 16)
    sizes = Sizes(8, 64, 8, 8, 1, batch=8)
    found = speeds.measured(sizes, None, trains=True, seed=0)
    assert 0 < 8 * found.gan_image < found.gan_start and 0 < found.sample < found.gan_image
    assert 0 < found.batch * found.student_image < found.student_start
    images = 8 * 8 * 8 * 3 * np.dtype(np.float32).itemsize
    assert found.gan_bytes > images and found.student_bytes > images and found.snapshot > 0


@pytest.mark.parametrize(
    ("given", "start", "judge"),
    [({}, "faces64", "projected"), ({"resolution": 32}, None, "stylegan2"),
     ({"start_from": "none"}, None, "stylegan2"), ({"start_from": "mine"}, "mine", "projected"),
     ({"start_from": "mine", "resolution": 32}, "mine", "projected")],
)  # fmt: skip
def test_where_a_generator_begins(given, start, judge):
    """On a CPU with the faces, of their size only; a network to start from is taken as it is."""
    sizes = budget.asked(budget.usual("cpu", PHOTOS), build(RunConfig, {"out": "r", **given}))
    assert (sizes.start_from, sizes.discriminator) == (start, judge)
    assert (budget.candidate(sizes, 600, cores=2) == sizes) == (start is not None)
    assert budget.asked(budget.usual("gpu", PHOTOS), RunConfig(out="r")).start_from is None
    settings = replace(sizes, images=16_000).training()
    assert settings.get("ema_images", 10_000) == (2000 if start else 10_000)
    assert settings["discriminator"] == judge
