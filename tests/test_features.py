"""`ops/sampling.py`: any number of samples, any batch, any number of devices, one result."""

import fakes
import jax.numpy as jnp
import numpy as np
import pytest

from sis_jax.ops.sampling import map_samples, sample_seeds


def body(gen, z, truncation, *more, taps, factor=1.0):
    image, features = gen.synthesize(gen.map(z, truncation), "const", taps)
    out = {"image": image * factor, "class": jnp.argmax(features[taps[0]], -1).astype(jnp.uint8)}
    return out | {f"more{i}": m for i, m in enumerate(more)}


def gather(gen, seeds, **settings):
    batches = list(map_samples(gen, seeds, body, truncation=0.7, **settings))
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}, [
        len(b["image"]) for b in batches
    ]


@pytest.fixture(scope="module")
def gen():
    return fakes.tiny_stylegan2(8)


@pytest.fixture(scope="module")
def expected(gen):
    return gather(gen, list(range(21)), devices=1, batch=21, taps=("8x8",))[0]


@pytest.mark.parametrize(
    ("devices", "batch"), [(1, 4), (1, 100), (3, 2), (8, 1), (8, 4), (None, 16)]
)
def test_batches_and_devices_change_nothing(gen, expected, devices, batch):
    found, sizes = gather(gen, list(range(21)), devices=devices, batch=batch, taps=("8x8",))
    assert found["image"].shape == (21, 8, 8, 3) and sum(sizes) == 21 and min(sizes) > 0
    assert max(sizes) <= batch * (devices or 8)
    np.testing.assert_allclose(found["image"], expected["image"], atol=1e-5)
    assert np.array_equal(found["class"], expected["class"])
    assert isinstance(found["image"], np.ndarray) and len(np.unique(found["class"])) > 2


def test_fewer_samples_than_devices(gen, expected):
    found, sizes = gather(gen, [4, 2], devices=8, taps=("8x8",))
    assert sizes == [2]
    np.testing.assert_allclose(found["image"], expected["image"][[4, 2]], atol=1e-5)


def test_samples_are_those_of_the_generator(gen, expected):
    samples = gen.sample(range(21), truncation=0.7, taps=("8x8",))
    np.testing.assert_allclose(expected["image"], samples.images, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_generator_in_plain_python(devices):
    gen = fakes.Blocks(16)
    found, _ = gather(gen, list(range(11)), devices=devices, batch=1, taps=gen.taps, factor=2.0)
    truth = gen.truth(range(11), 0.7)
    assert (
        np.array_equal(found["image"][..., 0], np.where(truth, 2, -2))
        and not found["class"][truth].any()
    )


def test_a_generator_of_another_family():
    gen = fakes.tiny_dcgan()
    found, _ = gather(gen, list(range(5)), devices=3, batch=2, taps=("8x8",))
    np.testing.assert_allclose(
        found["image"], gen.sample(range(5), truncation=0.7).images, atol=1e-5
    )


@pytest.mark.parametrize(("devices", "batch"), [(1, 4), (8, 1), (8, 4)])
def test_arguments_per_sample_stay_with_their_sample(devices, batch):
    gen = fakes.Blocks(8)
    number, rows = (
        np.arange(21, dtype=np.int32),
        np.random.default_rng(0).standard_normal((21, 3)).astype(np.float32),
    )
    found, _ = gather(
        gen, list(range(21)), devices=devices, batch=batch, taps=gen.taps, per_sample=(number, rows)
    )
    assert np.array_equal(found["more0"], number) and np.array_equal(found["more1"], rows)


def shared_body(gen, z, truncation, scale):
    return scale["a"] * gen.synthesize(gen.map(z, truncation))[0].mean((1, 2, 3))


def test_shared_arguments():
    gen = fakes.Blocks(8)
    one, three = (
        np.concatenate(
            list(
                map_samples(
                    gen, range(5), shared_body, shared=({"a": np.float32(f)},), devices=2, batch=2
                )
            )
        )
        for f in (1, 3)
    )
    assert one.shape == (5,)
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_two_plain_generators_are_not_mixed_up():
    """They are told apart by identity: the second must not run the first one's compiled code."""
    small, large = fakes.Blocks(8), fakes.Blocks(8, mirrored=True)
    first, second = (gather(g, [0, 1], devices=1, taps=g.taps)[0]["image"] for g in (small, large))
    assert np.array_equal(first[..., 0] > 0, small.truth([0, 1], 0.7)) and np.array_equal(
        second[..., 0] > 0, large.truth([0, 1], 0.7)
    )


def test_new_weights_are_used_without_compiling_again(gen):
    other = fakes.tiny_stylegan2(8, seed=5)
    a, b = (gather(g, [0, 1], devices=1, taps=("8x8",))[0]["image"] for g in (gen, other))
    np.testing.assert_allclose(b, other.sample([0, 1], truncation=0.7).images, atol=1e-5)
    assert np.abs(a - b).max() > 0.1


def test_sample_seeds():
    assert sample_seeds(0, 3) == [0, 1, 2] and sample_seeds(7, 2) == [700_000, 700_001]
    assert not set(sample_seeds(1, 10_000)) & set(sample_seeds(2, 10_000))
    assert all(0 <= s < 2**32 for s in sample_seeds(10**9, 5)) and sample_seeds(3, 0) == []
