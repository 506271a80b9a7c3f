"""Projection of photos: the distances, the noise penalty, that latents of the generator's own
pictures are found, and what is refused.
"""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sis_jax
from sis_jax import parallel
from sis_jax.stages import project
from sis_jax.training import projection as nn
from sis_jax.types import SisError, UsageError, to_uint8

pytestmark = pytest.mark.integration

QUICK = {"steps": 60, "starts": 0, "features": 0.0, "rate": 0.2}


seen = jax.jit(nn.seen, static_argnums=2)
devices = parallel.local_devices


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Few samples, and one device: photos share a batch, and every test with three of them shares
    one program.
    """
    monkeypatch.setattr(project, "STATISTICS", 64)
    monkeypatch.setattr(parallel, "local_devices", lambda chosen=None: devices(chosen)[:1])


@pytest.fixture(scope="module")
def gen():
    """A fake whose pictures differ from seed to seed, and whose colours stay within the range that
    pictures have: a saturated one tells nothing of w.
    """
    other = fakes.tiny_stylegan2(16)
    for i in range(2):
        layer = getattr(other.mapping, f"fc{i}")
        layer.weight[...] = 100 * layer.weight[...]
    for name, _ in other.synthesis.layers():
        if name.endswith("torgb"):
            layer = other.synthesis.layer(name)
            layer.weight[...] = 0.3 * layer.weight[...]
    return other


@pytest.fixture(scope="module")
def photos(gen):
    return gen.sample(range(3), truncation=0.7).to_uint8()


def test_bands_add_up_to_the_picture():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32))
    *bands, rest = nn.laplacian(x)
    assert [b.shape[1] for b in bands] == [16, 8] and rest.shape[1] == 4
    from sis_jax.ops import convolution

    for band in reversed(bands):
        rest = band + convolution.upsample2d(rest)
    np.testing.assert_allclose(rest, x, atol=1e-5)


def test_distances_of_equal_and_of_other_pictures():
    disc, recipe = fakes.tiny_discriminator(16), nn.Recipe()
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)) for _ in range(2))
    a, b = seen(disc, x, recipe), seen(disc, y, recipe)
    np.testing.assert_allclose(nn.distance(a, a, recipe), 0, atol=1e-6)
    assert len(a[1]) == 3 and (np.asarray(nn.distance(a, b, recipe)) > 0.1).all()
    shifted = seen(disc, x.at[0].add(0.25), nn.Recipe(features=0.0))
    # A constant is in the coarsest band and, because the filter sees zeros outside the picture, at
    # the edges of the others.
    assert float(nn.distance(seen(disc, x, nn.Recipe(features=0.0)), shifted, recipe)[0]) > 0.2
    each = np.asarray(nn.feature_distance(a[1], b[1]))
    by_hand = np.zeros(2)
    for p, q in zip(a[1], b[1]):
        p, q = (np.asarray(v) / np.linalg.norm(v, axis=-1, keepdims=True) for v in (p, q))
        by_hand += np.square(p - q).sum(-1).mean((1, 2)) / 3
    np.testing.assert_allclose(each, by_hand, rtol=1e-3)


def test_noise_that_draws_is_penalised():
    white = np.random.default_rng(2).standard_normal((2, 32, 32)).astype(np.float32)
    smooth = np.repeat(np.repeat(white[:, ::4, ::4], 4, 1), 4, 2)
    low, high = (np.asarray(nn.noise_penalty({"a": jnp.asarray(x)})) for x in (white, smooth))
    assert low.shape == (2,) and (high > 20 * low).all()


def test_the_rate_rises_and_falls():
    at = [float(nn.rate_at(jnp.asarray(t))) for t in (0.0, 0.025, 0.05, 0.5, 0.75, 0.875, 1.0)]
    np.testing.assert_allclose(at, [0, 0.5, 1, 1, 1, 0.5, 0], atol=1e-6)


def test_each_picture_has_its_own_noise(gen):
    w = gen.map(gen.latents([1, 2]))
    rng = np.random.default_rng(3)
    noise = {
        name: rng.standard_normal((2, *m.shape)).astype(np.float32)
        for name, m in nn.noise_maps(gen).items()
    }
    both = np.asarray(nn.draw(gen, w, noise))
    for i in range(2):
        alone = nn.draw(nn.with_noise(gen, {name: m[i] for name, m in noise.items()}), w, {})
        np.testing.assert_allclose(both[i], np.asarray(alone)[i], atol=2e-4)
    assert np.abs(both - np.asarray(nn.draw(gen, w, {}))).max() > 1e-3


@pytest.mark.parametrize("space", ["w", "w+"])
def test_own_pictures_are_found_again(gen, photos, space):
    before = sis_jax.project(gen, photos, space=space, **QUICK | {"steps": 1})
    found = sis_jax.project(gen, photos, space=space, **QUICK)
    assert (found.psnr > before.psnr + 6).all() and found.psnr.mean() > 25
    np.testing.assert_array_equal(to_uint8(nn.draw(gen, found.w, {})), found.images)
    spread = np.ptp(found.w, axis=1).max()
    assert (spread == 0) == (space == "w")


def test_a_nearer_start(gen, photos):
    first = {
        starts: sis_jax.project(gen, photos, **QUICK | {"steps": 1, "starts": starts}).psnr.mean()
        for starts in (0, 64)
    }
    assert first[64] > first[0]


def test_a_photo_does_not_see_the_others(gen, photos, monkeypatch):
    together, reordered = (
        sis_jax.project(gen, p, **QUICK | {"steps": 4}) for p in (photos, photos[[0, 2, 1]])
    )
    np.testing.assert_allclose(reordered.w[0], together.w[0], atol=1e-5)
    assert (
        np.abs(together.w[1] - together.w[0]).max() > 0.05
        and np.abs(together.w[1] - reordered.w[1]).max() > 0.05
    )
    monkeypatch.setattr(parallel, "local_devices", devices)
    apart = sis_jax.project(gen, photos, **QUICK | {"steps": 4})
    np.testing.assert_allclose(apart.w, together.w, atol=2e-3)


def test_unknown_pixels_do_not_count(gen, photos):
    known = np.ones(photos.shape[:3], bool)
    known[:, :, 8:] = False
    other = photos.copy()
    other[:, :, 8:] = 255 - other[:, :, 8:]
    settings = QUICK | {
        "steps": 5,
        "known": known,
        "features": 1.0,
        "discriminator": fakes.tiny_discriminator(16),
    }
    a, b = (sis_jax.project(gen, p, **settings) for p in (photos, other))
    np.testing.assert_array_equal(a.w, b.w)


def test_noise_maps_stay_noise(gen, photos):
    found = sis_jax.project(gen, photos, noise=True, **QUICK | {"steps": 10})
    assert set(found.noise) == set(nn.noise_maps(gen))
    for maps in found.noise.values():
        np.testing.assert_allclose(maps.mean((1, 2)), 0, atol=1e-4)
        np.testing.assert_allclose(maps.std((1, 2)), 1, atol=1e-3)
    np.testing.assert_array_equal(to_uint8(nn.draw(gen, found.w, found.noise)), found.images)


def test_pull_keeps_slots_together(gen, photos):
    apart, together = (
        np.ptp(sis_jax.project(gen, photos, **QUICK | {"steps": 20, "pull": p}).w, axis=1).mean()
        for p in (0.0, 10.0)
    )
    assert together < 0.5 * apart


def test_a_generator_without_slots_or_discriminator():
    gen = fakes.tiny_dcgan()
    photos = gen.sample([5]).to_uint8()
    found = sis_jax.project(
        gen, photos, **QUICK | {"features": 1.0}
    )  # the features are left out: there is no discriminator of that name
    assert (
        found.w.shape == (1, 1, 6)
        and found.psnr[0]
        > sis_jax.project(gen, photos, **QUICK | {"features": 1.0, "steps": 1}).psnr[0] + 3
    )


def test_files(gen, photos, tmp_path):
    for i, photo in enumerate(
        photos
    ):  # as many as elsewhere: another number would be another program to compile
        Image.fromarray(photo).resize((40, 32)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = sis_jax.project(gen, str(tmp_path), **QUICK | {"steps": 1})
    assert (
        found.names == ("0.png", "1.png", "2.png")
        and found.photos.shape == (3, 16, 16, 3)
        and found.skipped[0][0] == "broken.png"
    )
    out = found.save(tmp_path / "out")
    from safetensors.numpy import load_file

    np.testing.assert_array_equal(load_file(out / "projection.safetensors")["w"], found.w)
    with Image.open(out / "projection.png") as picture:
        assert picture.width > 2 * 128


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"batch": 0}, "batch is 0"),
        ({"starts": -1}, "starts is -1"),
        ({"rate": 0.0}, "rate is 0"),
        ({"pyramid": 0.0, "features": 0.0}, "one of the first two"),
        ({"known": np.ones((3, 8, 8), bool)}, "known is"),
        ({"features": 1.0, "discriminator": fakes.tiny_discriminator(32)}, "sees 32 pixels"),
    ],
)
def test_refused(gen, photos, settings, said):
    with pytest.raises(UsageError, match=said):
        sis_jax.project(gen, photos, **QUICK | settings)


def test_refused_photos(gen, tmp_path):
    with pytest.raises(
        UsageError, match=r"photos are uint8\[1, 8, 8, 3\], expected uint8\[n 16 16 3\]"
    ):
        sis_jax.project(gen, np.zeros((1, 8, 8, 3), np.uint8), **QUICK)
    with pytest.raises(UsageError, match="there is no file or folder"):
        sis_jax.project(gen, str(tmp_path / "none.png"), **QUICK)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(SisError, match="none of the 1 photos"):
        sis_jax.project(gen, str(tmp_path / "broken.png"), **QUICK)
    with pytest.raises(UsageError, match="no noise maps"):
        sis_jax.project(fakes.tiny_dcgan(), np.zeros((1, 16, 16, 3), np.uint8), noise=True, **QUICK)
