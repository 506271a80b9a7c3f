"""What `discover --dry-run` states of the methods that try real work for it, at two sizes."""

import fakes
import pytest

from sis_jax.methods.datasetgan import DatasetGAN
from sis_jax.methods.labels4free import Labels4Free
from sis_jax.methods.latent_direction import LatentDirection
from sis_jax.methods.style_mixing import StyleMixing

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=(16, 32))
def generator(request):
    return fakes.tiny_stylegan2(request.param)


def test_a_direction_takes_longer_the_more_steps_it_has(generator):
    few, many = (LatentDirection(steps=n, batch=4).estimate(generator) for n in (2, 25_000))
    assert many["seconds"] > few["seconds"] + 25 > 25  # a millisecond a step at the very least
    assert min(few["memory_bytes"], many["memory_bytes"]) > 10**8  # what Python with JAX holds


@pytest.mark.parametrize("labels", ["parts", "ground"])
def test_style_mixing_takes_longer_the_more_samples_it_matches(generator, labels):
    few, many = (
        StyleMixing(labels=labels, variants=4, clusters=2, k=2, n=n, n_init=1).estimate(generator)
        for n in (4, 100_000)
    )
    assert few["seconds"] > 0 and few["memory_bytes"] > 10**8
    assert labels == "ground" or many["seconds"] > few["seconds"] + 10


def test_an_alpha_network_of_many_steps_takes_long(generator):
    method = Labels4Free(steps=25_000, batch=4, check=50, stage="4x4")
    found = method.estimate(generator)
    assert found["seconds"] > 25  # a millisecond a step at the very least
    assert found["memory_bytes"] > 10**8


def test_pixel_classifiers_take_longer_the_more_steps_they_have(generator):
    few, many = (
        DatasetGAN(members=2, max_points=256, batch=16, steps=n).estimate(generator)
        for n in (50, 500_000)
    )
    assert many["seconds"] > few["seconds"] + 50 > 50
    assert min(few["memory_bytes"], many["memory_bytes"]) > 10**8


def test_a_trial_of_pixel_classifiers_holds_few_points(monkeypatch):
    """The published recipe asks for all of them, which a large generator has too many of."""
    seen = []
    usual = DatasetGAN._features
    monkeypatch.setattr(
        DatasetGAN,
        "_features",
        lambda self, gen, seeds, taps, at: (
            seen.append(at.shape) or usual(self, gen, seeds, taps, at)
        ),
    )
    method = DatasetGAN(members=1, max_points=2**31 - 1, batch=16, steps=1)
    needed = method.estimate(fakes.tiny_stylegan2(32))["memory_bytes"]
    assert seen == [(16, 256)] and needed > 10**8
