"""Directions that lighten the object: the terms of the loss, masks of generators with known
objects, every seed the same bytes, the verbs after it.
"""

from dataclasses import replace
from functools import partial

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import sis_jax
from sis_jax.methods import latent_direction as ld
from sis_jax.methods.base import Fitted
from sis_jax.methods.latent_direction import LatentDirection
from sis_jax.types import Info, Samples, UsageError, latents_from_seeds

pytestmark = pytest.mark.integration

QUICK = {
    "mode": "both",
    "space": "z",
    "steps": 40,
    "batch": 8,
    "learning_rate": 0.05,
    "prior": "center",
    "shift": 2.0,
}
SIDE = 24


def lamp(w):
    """A GAN that is a plain function: z[0] moves a disc, z[1] lights it and darkens the ground, the
    others change nothing that helps.
    """
    at = jnp.arange(SIDE) + 0.5 - SIDE / 2
    x, y = at[None, None] - 2 * jnp.tanh(w[:, 0, None, None]), at[None, :, None]
    inside = jax.nn.sigmoid(2 * (0.38 * SIDE - jnp.sqrt(x**2 + y**2 + 1e-6)))
    light = jnp.tanh(0.3 * w[:, 1, None, None]) * (2 * inside - 1) + 0.1 * jnp.tanh(
        w[:, 2, None, None]
    )
    return jnp.repeat(light[..., None], 3, -1)


class Mine:
    """The ten lines of the module's docstring."""

    info, resolution, z_dim, taps = Info(name="mine"), SIDE, 4, ()

    def latents(self, seeds):
        return latents_from_seeds(seeds, self.z_dim)

    def map(self, z, truncation=1.0):
        return (truncation * z)[:, None]

    def synthesize(self, w, noise="const", taps=()):
        return lamp(w[:, 0]), {}

    def sample(self, seeds, truncation=1.0, taps=()):
        z = self.latents(seeds)
        w = self.map(z, truncation)
        return Samples(tuple(seeds), z, w, self.synthesize(w)[0])


def truth(seeds, truncation):
    at = np.arange(SIDE) + 0.5 - SIDE / 2
    shift = 2 * np.tanh(truncation * latents_from_seeds(seeds, 4)[:, 0])
    return (at[None, None] - shift[:, None, None]) ** 2 + at[None, :, None] ** 2 < (
        0.38 * SIDE
    ) ** 2


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.fixture(scope="module")
def fitted():
    return LatentDirection(**QUICK).fit(Mine(), seed=1)


def test_the_direction_and_the_masks_are_those_known(fitted):
    v = fitted.arrays["directions"]
    assert np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-6)
    assert v[0, 1] > 0.9 and v[1, 1] < -0.9 and np.argmax(np.abs(v), axis=1).tolist() == [1, 1]
    seeds = list(range(500, 532))
    images, masks, sure = (np.concatenate(x) for x in zip(*fitted.label_seeds(Mine(), seeds)))
    assert (
        images.dtype == masks.dtype == np.uint8
        and sure.dtype == np.float32
        and sure.min() >= 0
        and sure.max() <= 1
    )
    assert iou(masks == 1, truth(seeds, 0.7)) > 0.9
    edge = ndimage.binary_dilation(truth(seeds, 0.7), np.ones((1, 3, 3))) ^ ndimage.binary_erosion(
        truth(seeds, 0.7), np.ones((1, 3, 3))
    )
    assert sure[edge].mean() < sure[~edge].mean() - 0.1  # the outline is what it is least sure of
    assert fitted.background["found"] and [c["background"] for c in fitted.clusters] == [
        True,
        False,
    ]
    assert all(c["agreement"] > 0.8 for c in fitted.clusters) and not fitted.warnings
    header, *rows = fitted.files["direction.csv"].decode().splitlines()
    assert (
        header == "step,brightness_light,brightness_dark,structure_light,structure_dark"
        and len(rows) == 40
    )
    curve = np.array([[float(v) for v in row.split(",")] for row in rows])
    assert curve[-1, 1] > curve[0, 1] + 0.05 and curve[-1, 2] < curve[0, 2] - 0.05


def test_facts_label_no_sample_twice(fitted, monkeypatch):
    method, arrays, seeds = fitted.method, fitted.arrays, list(range(ld.DESCRIBED))
    masks = [
        np.concatenate([m for _, m, _ in how.label_seeds(arrays, Mine(), seeds[:64], 0.7)]) == 1
        for how in (replace(method, shift=method.shift * f) for f in (1.0, 0.7, 1.4))
    ]
    expected = np.mean([iou(masks[0], masks[1]), iou(masks[0], masks[2]), 1.0])
    asked, plain = [], LatentDirection._labels
    monkeypatch.setattr(
        LatentDirection, "_labels", lambda *a, **how: (asked.append(len(a[3])), plain(*a, **how))[1]
    )
    facts, _ = method._described(arrays, Mine(), seeds, arrays["directions"])
    assert asked == [128, 64, 64, 64] and facts[1]["agreement"] == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_one_direction_is_enough_here(mode):
    method = LatentDirection(**QUICK | {"mode": mode, "shift": 4.0}).fit(Mine(), seed=1)
    v = method.arrays["directions"]
    assert v.shape == (1, 4) and v[0, 1] * {"light": 1, "dark": -1}[mode] > 0.9
    masks = np.concatenate([m for _, m, _ in method.label_seeds(Mine(), range(500, 532))])
    assert iou(masks == 1, truth(range(500, 532), 0.7)) > 0.85


def test_the_same_seed_is_the_same_bytes(fitted):
    again = LatentDirection(**QUICK).fit(Mine(), seed=1)
    assert (
        all(again.arrays[k].tobytes() == v.tobytes() for k, v in fitted.arrays.items())
        and again.files == fitted.files
    )
    other = LatentDirection(**QUICK).fit(Mine(), seed=2)
    assert other.arrays["directions"].tobytes() != fitted.arrays["directions"].tobytes()
    few = next(iter(fitted.label_seeds(Mine(), [*range(7, 11), *[10] * 12])))
    many = [np.concatenate(x) for x in zip(*fitted.label_seeds(Mine(), range(40)))]
    assert all(a[:4].tobytes() == b[7:11].tobytes() for a, b in zip(few, many))


def test_two_directions_without_the_image_do_not_draw_it():
    gen, how = fakes.tiny_stylegan2(), {"space": "z", "shift": 1.0, "signs": (1.0, -1.0)}
    arrays = {"directions": np.eye(2, 8, dtype=np.float32), "scale": np.ones(1, np.float32)}
    given = gen, np.asarray(gen.latents([3, 4])), np.float32(1), arrays
    with_image, without = (
        jax.jit(partial(ld._difference_body, drawn=drawn, **how)).lower(*given).compile()
        for drawn in (True, False)
    )
    for a, b in zip(with_image(*given)[1:], without(*given), strict=True):
        np.testing.assert_array_equal(a, b)
    assert without.cost_analysis()["flops"] < 0.75 * with_image.cost_analysis()["flops"]


def test_restored_and_predict(fitted):
    back = Fitted(LatentDirection(**QUICK), fitted.arrays)
    gen, seeds = Mine(), list(range(16))
    expected = next(iter(fitted.label_seeds(gen, seeds)))[1]
    assert np.array_equal(next(iter(back.label_seeds(gen, seeds)))[1], expected)
    assert (back.predict(gen.sample(seeds, 0.7), gen) != expected).mean() < 1e-3


def test_number_of_devices_changes_nothing(fitted, monkeypatch):
    from sis_jax import parallel

    real = parallel.local_devices
    monkeypatch.setattr(
        parallel, "local_devices", lambda devices=None: real(3 if devices is None else devices)
    )
    other = LatentDirection(**QUICK).fit(Mine(), seed=1)
    assert all(other.arrays[k].tobytes() == v.tobytes() for k, v in fitted.arrays.items())


@pytest.mark.parametrize("space", ["z", "w", "w+"])
def test_spaces_of_a_stylegan2_and_a_dcgan(space):
    for gen in (fakes.tiny_stylegan2(16), fakes.tiny_dcgan((16, 8))):
        method = LatentDirection(space=space, steps=2, batch=2).fit(gen)
        width = {
            "z": gen.z_dim,
            "w": gen.map(gen.latents([0])).shape[-1],
            "w+": gen.num_ws * gen.map(gen.latents([0])).shape[-1],
        }[space]
        assert method.arrays["directions"].shape == (2, width)
        images, masks, _ = next(iter(method.label_seeds(gen, range(3))))
        assert images.shape == (3, 16, 16, 3) and set(np.unique(masks)) <= {0, 1}


def test_a_step_in_w_is_measured_in_its_own_spread():
    """Twice as large w: the scale doubles, so the same shift means the same for every network; w+
    has sqrt(slots) of it in all.
    """
    gen = fakes.tiny_stylegan2(16)
    w = np.asarray(gen.map(gen.latents(range(256)), 0.7))[:, 0]
    expected = np.sqrt(((w - w.mean(0)) ** 2).mean())
    assert LatentDirection(space="w", steps=1, batch=1).fit(gen).arrays["scale"][
        0
    ] == pytest.approx(expected, rel=1e-4)
    assert LatentDirection(space="w+", steps=1, batch=1).fit(gen).arrays["scale"][
        0
    ] == pytest.approx(expected * gen.num_ws**0.5, rel=1e-4)


# The terms, by hand


def test_edge_strength_is_sobel():
    x = np.random.default_rng(0).standard_normal((2, 9, 11)).astype(np.float32)
    gx, gy = (np.stack([ndimage.sobel(a, axis, mode="nearest") for a in x]) / 8 for axis in (1, 0))
    assert np.allclose(ld.edge_strength(jnp.asarray(x)), np.sqrt(gx**2 + gy**2 + 1e-6), atol=1e-5)
    flat = jax.grad(lambda v: ld.edge_strength(v).sum())(jnp.ones((1, 4, 4)))
    assert np.isfinite(flat).all()


def test_prior_maps():
    side = 33
    center, linear, portrait = (
        ld.prior_map(side, kind) for kind in ("center", "linear", "portrait")
    )
    assert linear[16, 16] == 3 and linear[0, 0] == pytest.approx(
        -3, abs=1e-5
    )  # r = 1 in the centre, -1 in the corner; three channels
    assert abs(center.mean()) < 1e-5 and center[16, 16] - center[16, 32] == pytest.approx(
        4, abs=1e-5
    )
    assert (
        np.array_equal(portrait[20], portrait[32])
        and portrait[32, 16] > 0 > portrait[0, 16]
        and np.allclose(center, center[::-1])
    )


def test_the_gradient_is_that_of_the_loss():
    """Against a finite difference of the formula, written out once more."""
    gen, z = Mine(), Mine().latents([3])
    length, v = np.full((1, 4), 2.0, np.float32), np.array([[0.5, 0.5, 0.5, 0.5]], np.float32)
    gray, prior = (
        (lambda i: i @ jnp.array([0.299, 0.587, 0.114])),
        jnp.asarray(ld.prior_map(SIDE, "center")),
    )

    def formula(v):
        x, y = gray(lamp(z)), gray(lamp(z + length * v))
        return float(
            -2 * (y * prior).mean() + 10 * ((ld.edge_strength(y) - ld.edge_strength(x)) ** 2).mean()
        )

    kind = {"signs": (1.0,), "space": "z", "prior": "center", "weights": (2.0, 10.0), "small": None}
    gradient, *_ = ld._gradient_body(
        gen,
        jnp.asarray(z),
        jnp.float32(1),
        jnp.asarray(length),
        jnp.asarray(v),
        jnp.ones(1),
        **kind,
    )
    for i in range(4):
        step = np.eye(4, dtype=np.float32)[i] * 1e-2
        assert float(gradient[0, 0, i]) == pytest.approx(
            (formula(v + step) - formula(v - step)) / 0.02, rel=0.05, abs=2e-3
        )


def test_otsu_separates_two_modes():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(-1, 0.1, 900), rng.normal(0.5, 0.2, 300)]).reshape(
        3, 20, 20
    )
    assert -0.7 < ld.otsu(values) < 0.1


def test_filters():
    method = LatentDirection(threshold="zero", min_component=0.2, max_area=0.5, min_peaks=2)
    difference = np.full((3, 10, 10), -1, np.float32)
    difference[0, :5, :5], difference[0, 9, 9] = 1, 1  # a square and a speck
    difference[1, :8] = 1  # more than half
    difference[2, :3, :3] = 1  # one peak only
    mask, sure = method._masks(difference, np.ones(3, np.float32), np.array([2, 2, 1], np.float32))
    assert mask[0].sum() == 25 and sure[0, 9, 9] == 0 and sure[0, 0, 0] == 1
    assert sure[1].max() == 0 and sure[2].max() == 0 and mask[1].sum() == 80


def test_histogram_peaks():
    levels = np.full((1, 4, 10, 10), -0.95, np.float32)
    levels[0, 1, :5] = 0.95  # ends count
    levels[0, 2] = np.linspace(-1, 1, 100).reshape(10, 10)
    levels[0, 3] = np.clip(np.random.default_rng(0).normal(0, 0.4, (10, 10)), -1, 1)
    found = np.asarray(ld.histogram_peaks(jnp.asarray(levels)))[0]
    assert found[1] >= 2 and found[2] >= 2


# Asked wrongly


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps is 0"), ({"shift": 0}, "shift is 0"),
        ({"min_component": -1}, "min_component is -1"), ({"steps": 10_000}, "160000 samples"),
    ],
)  # fmt: skip
def test_wrong_settings(wrong, said):
    with pytest.raises(UsageError, match=said):
        LatentDirection(**wrong).fit(Mine())


def test_a_direction_that_does_nothing_is_said():
    class Still(Mine):
        def synthesize(self, w, noise="const", taps=()):
            return lamp(jnp.zeros_like(w[:, 0])) + 0 * w[:, :1, :1, None], {}

    method = LatentDirection(steps=12, batch=2, prior="center").fit(Still())
    assert any("raise steps or fit_shift" in w for w in method.warnings)


def test_discover_and_what_follows(tmp_path):
    """In Python and as a run folder: discover, synthesize."""
    gen = fakes.tiny_stylegan2(16)
    from sis_jax.checkpoints import save_generator

    folder = save_generator(gen, tmp_path / "tiny")
    parts = sis_jax.discover(
        folder, out=str(tmp_path / "run"), method="latent_direction", steps=2, batch=2
    )
    assert (
        parts.method == "latent_direction"
        and (tmp_path / "run" / "parts" / "direction.csv").exists()
        and len(parts.clusters) == 2
    )
    data = sis_jax.synthesize(run=str(tmp_path / "run"), n=4)
    assert data is not None and len(list((tmp_path / "run" / "data").rglob("masks/*.png"))) == 4


def test_recipes_are_settings():
    for recipe in ld.RECIPES.values():
        LatentDirection(**recipe)._check()
