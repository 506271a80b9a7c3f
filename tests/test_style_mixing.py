"""Style mixing: known parts in a network with known pixels, per image and over images, w by hand,
and the verbs after it.
"""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sis_jax
from sis_jax.methods import style_mixing as sm
from sis_jax.methods.base import Fitted
from sis_jax.methods.style_mixing import StyleMixing
from sis_jax.ops import pixel_clusters as pc
from sis_jax.types import Info, Samples, UsageError, latents_from_seeds

pytestmark = pytest.mark.integration

SIDE = 24
QUICK = {"variants": 6, "clusters": 4, "k": 2, "n": 16, "n_init": 2, "slots": 2}


class Painted:
    """A generator whose slots 0 and 1 place a disc and whose slots 2 and 3 color disc and ground:
    what style mixing assumes, to the letter.

    Half of the ground is drawn a little lighter, so that colors alone tell more than two groups
    apart.
    """

    info, resolution, z_dim, num_ws, taps = Info(name="painted"), SIDE, 6, 4, ("12x12",)

    def latents(self, seeds):
        return latents_from_seeds(seeds, self.z_dim)

    def map(self, z, truncation=1.0):
        return jnp.broadcast_to((truncation * jnp.asarray(z))[:, None], (z.shape[0], 4, 6))

    def disc(self, w):
        at = jnp.arange(SIDE) + 0.5 - SIDE / 2
        x = at[None, None] - jnp.tanh(w[:, 0, 0, None, None])
        return x**2 + at[None, :, None] ** 2 < (0.42 * SIDE) ** 2

    def stem(self, w, slots):
        return self.disc(w).astype(jnp.float32)[..., None], w[:, :2]

    def skips_from(self, slots):
        return ()

    def synthesize_from(self, stem, w, slots, noise="const", taps=()):
        disc, right = (
            stem[0],
            (jnp.arange(SIDE) >= SIDE // 2).astype(jnp.float32)[None, None, :, None],
        )
        one, two = jnp.tanh(w[:, 2, None, None, :3]), jnp.tanh(w[:, 3, None, None, 3:])
        return jnp.clip(disc * one + (1 - disc) * (0.9 * two + 0.05 * right), -1, 1), {}

    def synthesize(self, w, noise="const", taps=()):
        disc = self.disc(w).astype(jnp.float32)[..., None]
        features = disc.reshape(-1, 12, 2, 12, 2, 1).mean((2, 4))
        found = {
            "12x12": jnp.concatenate(
                [features, 1 - features, 0 * features + w[:, :1, None, :1]], -1
            )
        }
        return self.synthesize_from((disc, None), w, 2)[0], {t: found[t] for t in taps}

    def sample(self, seeds, truncation=1.0, taps=()):
        z = self.latents(seeds)
        w = self.map(z, truncation)
        return Samples(tuple(seeds), z, w, *self.synthesize(w, taps=taps))

    def truth(self, seeds, truncation=0.7):
        return np.asarray(self.disc(self.map(self.latents(seeds), truncation)))


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.fixture(scope="module")
def fitted():
    return StyleMixing(**QUICK).fit(Painted(), seed=0)


@pytest.mark.parametrize("labels", ["parts", "ground"])
@pytest.mark.parametrize("mode", ["raw", "correlation"])
def test_the_parts_are_those_known(labels, mode):
    method = StyleMixing(**QUICK | {"labels": labels, "mode": mode}).fit(Painted(), seed=0)
    seeds = list(range(900, 932))
    images, parts, sure = (np.concatenate(x) for x in zip(*method.label_seeds(Painted(), seeds)))
    assert (
        images.dtype == parts.dtype == np.uint8
        and sure.min() >= 0
        and sure.max() <= 1
        and len(method.clusters) == 2
    )
    (ground,) = (c["id"] for c in method.clusters if c["background"])
    assert method.background["found"] and iou(parts != ground, Painted().truth(seeds)) > 0.97
    assert all(c["agreement"] > 0.9 for c in method.clusters)


def test_correlation_sees_what_changes_together():
    """Two halves of one object with different colors, which change together, are one group; raw
    colors tell them apart.
    """
    rng = np.random.default_rng(0)
    one, two = rng.standard_normal((2, 8, 3))
    tensor = np.stack([one, one + 3, two, two - 3])[:, None]  # [4 pixels, 1, variants, 3]
    v = np.asarray(pc.vectors(jnp.asarray(tensor, jnp.float32), "correlation"))
    assert np.allclose(v[0], v[1], atol=1e-5) and np.allclose((v**2).sum(1), 1, atol=1e-5)
    centered = tensor.reshape(4, 8, 3) - tensor.reshape(4, 8, 3).mean(1, keepdims=True)
    expected = np.corrcoef(centered[0].ravel(), centered[2].ravel())[0, 1]
    assert ((v[0] - v[2]) ** 2).sum() == pytest.approx(2 * (1 - expected), abs=1e-2)
    raw = np.asarray(pc.vectors(jnp.asarray(tensor, jnp.float32), "raw"))
    assert ((raw[0] - raw[1]) ** 2).sum() == pytest.approx(9 * 24, rel=1e-4)


def test_the_summary_is_the_variants(monkeypatch):
    """Each slice is the picture with the donor's fine styles, whatever the size of a pass."""
    gen = fakes.tiny_stylegan2(16)
    w, donors = gen.map(gen.latents(range(3)), 0.7), gen.map(gen.latents([7, 8]), 0.7)[:, -1]
    whole = sm.summary(gen, w, donors, 3, 16, "rgb")
    for d in range(2):
        mixed = jnp.concatenate(
            [w[:, :3], jnp.broadcast_to(donors[d], (3, gen.num_ws - 3, donors.shape[1]))], axis=1
        )
        assert np.allclose(whole[:, :, :, d], jnp.clip(gen.synthesize(mixed)[0], -1, 1), atol=1e-5)
    monkeypatch.setattr(sm, "PIXELS", 4 * 256)  # passes of four, with one repeated to fill the last
    assert np.allclose(sm.summary(gen, w, donors, 3, 16, "rgb"), whole, atol=1e-5)
    halves = np.asarray(whole).reshape(3, 8, 2, 8, 2, 2, 3).mean((2, 4))
    assert np.allclose(sm.summary(gen, w, donors, 3, 8, "rgb"), halves, atol=1e-5)


def test_colors():
    """White, grey, red and blue in L*a*b* over 50, from the definition; luma and differences of
    grey are its value and 0.
    """
    rgb = jnp.array([[1, 1, 1], [0, 0, 0], [1, -1, -1], [-1, -1, 1]], jnp.float32)
    lab = np.asarray(pc.converted(rgb, "lab")) * 50
    assert np.allclose(
        lab, [[100, 0, 0], [53.39, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]], atol=0.3
    )
    assert np.allclose(pc.converted(rgb, "ycc")[:2], [[1, 0, 0], [0, 0, 0]], atol=1e-6)
    assert np.isfinite(jax.grad(lambda v: pc.converted(v, "lab").sum())(rgb - 1)).all()


def test_kmeans_of_a_picture():
    rng = np.random.default_rng(1)
    middle = np.array([[0, 0], [5, 0], [0, 5]])
    x = (middle[rng.integers(3, size=300)] + 0.1 * rng.standard_normal((300, 2))).astype(np.float32)
    found = np.asarray(pc.cluster(jnp.asarray(x), 3, 3))
    assert (
        sorted(np.round(found).astype(int).tolist()) == sorted(middle.tolist())
        and np.abs(found - np.round(found)).max() < 0.1
    )


def test_the_same_seed_is_the_same_bytes(fitted):
    again = StyleMixing(**QUICK).fit(Painted(), seed=0)
    assert (
        all(again.arrays[k].tobytes() == v.tobytes() for k, v in fitted.arrays.items())
        and again.clusters == fitted.clusters
    )
    few = next(iter(fitted.label_seeds(Painted(), [*range(7, 11), *[10] * 12])))
    many = [np.concatenate(x) for x in zip(*fitted.label_seeds(Painted(), range(40)))]
    assert all(a[:4].tobytes() == b[7:11].tobytes() for a, b in zip(few, many))


def test_w_by_hand(fitted):
    """The same masks from w, as a projection of photos gives it, and through `predict` and a
    restored method.
    """
    gen, seeds = Painted(), list(range(20))
    expected = np.concatenate([label for _, label, _ in fitted.label_seeds(gen, seeds)])
    images, labels, sure = fitted.method.segment(
        fitted.arrays, gen, gen.map(gen.latents(seeds), 0.7)
    )
    assert (
        images.shape == (20, SIDE, SIDE, 3)
        and (labels != expected).mean() < 1e-3
        and sure.shape == labels.shape
    )
    back = Fitted(StyleMixing(**QUICK | {"layer": "12x12", "grid": SIDE}), fitted.arrays)
    assert (back.predict(gen.sample(seeds, 0.7), gen) != expected).mean() < 1e-3


def test_specks_go_to_their_neighbour():
    label = np.zeros((10, 10), np.uint8)
    label[:, 6:], label[4, 3], label[8, 8] = 1, 2, 0
    cleaned = sm.without_specks(label, 0.02)
    assert cleaned[4, 3] == 0 and cleaned[8, 8] == 1 and (cleaned != label).sum() == 2
    assert np.array_equal(sm.without_specks(label, 0.001), label)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"variants": 1}, "variants is 1"), ({"slots": 4}, "slots is 4, expected 1 to 3"),
        ({"grid": 7}, "grid is 7"), ({"layer": "5x5"}, "no tap '5x5'"), ({"k": 1}, "k is 1"),
    ],
)  # fmt: skip
def test_wrong_settings(wrong, said):
    with pytest.raises(UsageError, match=said):
        StyleMixing(**QUICK | wrong).fit(Painted())


def test_a_dcgan_has_no_styles():
    with pytest.raises(UsageError, match="use a StyleGAN2, or --method latent_direction"):
        StyleMixing().fit(fakes.tiny_dcgan())


def test_discover_and_what_follows(tiny_weights, tmp_path):
    """A StyleGAN2 through discover, synthesize and, by hand, its own w."""
    from sis_jax.checkpoints import load_generator

    parts = sis_jax.discover(
        tiny_weights,
        out=str(tmp_path / "run"),
        method="style_mixing",
        variants=4,
        clusters=3,
        k=3,
        n=8,
    )
    assert (
        parts.settings["slots"] == 2
        and parts.settings["layer"] == "16x16"
        and parts.settings["grid"] == 16
        and len(parts.clusters) == 3
    )
    sis_jax.synthesize(run=str(tmp_path / "run"), n=4)
    assert len(list((tmp_path / "run" / "data").rglob("masks/*.png"))) == 4
    gen = load_generator(tiny_weights)
    method = StyleMixing(**parts.settings)
    labels = method.segment(parts.arrays, gen, gen.map(gen.latents(list(parts.seeds)), 0.7))[1]
    assert (labels != parts.masks).mean() < 0.02
