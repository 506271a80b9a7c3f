"""`stages/directions.py`: scores, learning, strength, latent optimisation and style space, on a
generator and a CLIP whose answers are known.
"""

import clip_kit
import fakes
import jax
import jax.numpy as jnp
import naming_kit
import numpy as np
import pytest

import sis_jax
from sis_jax.models import clip_directions as bodies
from sis_jax.models.moved import moved
from sis_jax.stages import directions
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def clip():
    return naming_kit.two_words()


@pytest.fixture(scope="module")
def vit():
    return sis_jax.load_clip(clip_kit.GOLDENS / "hf_tiny")


@pytest.fixture(scope="module")
def lamp():
    return naming_kit.Lamp()


@pytest.fixture(scope="module")
def light(lamp, clip):
    return directions.learn(lamp, clip, "white", "black", n=400, quantile=0.3, truncation=1.0)


# Scores


def test_scores_are_those_of_encode_image(lamp, clip):
    score, w = directions.scores(lamp, clip, "white", "black", range(5), truncation=0.7)
    points = np.asarray(clip.encode_image(clip.preprocess(lamp.sample(range(5), 0.7).to_uint8())))
    texts = np.asarray(clip.encode_text(["white", "black"]))
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    cosine = unit @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    np.testing.assert_allclose(score, cosine[:, 0] - cosine[:, 1], atol=1e-3)
    np.testing.assert_allclose(w, 0.7 * lamp.latents(range(5)), rtol=1e-5)


def test_the_published_way_to_feed_pictures():
    """Seven times larger by repetition, then averaged over windows: done in full on a small
    picture.
    """
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    large = images.repeat(7, 1).repeat(7, 2)
    window = 7 * 64 // 224
    want = large.reshape(2, 224, window, 224, window, 3).mean((2, 4))
    np.testing.assert_allclose(bodies.published_pixels(jnp.asarray(images), 224), want, atol=1e-5)


def test_moving_moves(lamp, clip):
    there = directions.scores(lamp, clip, "white", "black", range(6), move=5 * lamp.axis)[0]
    back = directions.scores(lamp, clip, "white", "black", range(6), move=-5 * lamp.axis)[0]
    assert there.min() > 1 and back.max() < -1


# Learning


def test_the_direction_is_found(lamp, light):
    assert light.unit @ lamp.axis > 0.95 and np.linalg.norm(light.unit) == pytest.approx(
        1, abs=1e-5
    )
    assert (
        light.facts["auc"] > 0.97
        and 0.05 < light.facts["positives"] / 400 < 0.4
        and light.spread == pytest.approx(1, abs=0.15)
    )


def test_the_direction_goes_where_samples_vary(clip):
    """What the text sees depends on one number of w that varies much and, more steeply, on one that
    hardly does: going along the second needs w that the generator never draws."""

    class Skewed(naming_kit.Lamp):
        axis = np.array([1.0, 15.0, 0, 0, 0], np.float32)

        def map(self, z, truncation=1.0):
            return super().map(z, truncation) * np.array([1, 0.05, 1, 1, 1], np.float32)

    found = directions.learn(Skewed(), clip, "white", "black", n=400, quantile=0.3, truncation=1.0)
    score, w = directions.scores(Skewed(), clip, "white", "black", directions.sample_seeds(0, 400))
    weak = directions.logistic_regression(w, score > found.threshold, c=100.0).normal
    assert found.unit[0] > 0.95 and weak[1] > weak[0]


def test_extremes(lamp, clip, light):
    found = directions.learn_extremes(lamp, clip, "white", "black", n=400, share=0.1)
    assert (
        found.unit @ lamp.axis > 0.9
        and found.facts["validation"] > 0.9
        and found.facts["each"] == 40
    )
    rest = directions.learn_extremes(lamp, clip, "white", "black", n=400, share=0.1, keep=(light,))
    assert abs(rest.unit @ light.unit) < 1e-4


def test_strength_is_the_smallest_that_passes(lamp, clip, light):
    found = directions.with_strength(lamp, clip, light, truncation=0.7)
    seeds = directions.sample_seeds(7, 64)
    share = {
        k: (
            directions.scores(
                lamp, clip, "white", "black", seeds, truncation=0.7, move=k * found.move
            )[0]
            > light.threshold
        ).mean()
        for k in (1.0, 1 - 1 / (found.facts["deviations"] * 2))
    }
    assert share[1.0] >= 0.9 > share[1 - 1 / (found.facts["deviations"] * 2)] and found.facts[
        "passing"
    ] == pytest.approx(share[1.0])
    np.testing.assert_allclose(found.move, found.displacement * found.unit)


def test_round_trip(light, tmp_path):
    loaded = directions.Direction.load(light.save(tmp_path / "light.safetensors"))
    assert np.array_equal(loaded.unit, light.unit)
    assert {k: v for k, v in vars(loaded).items() if k != "unit"} == {
        k: v for k, v in vars(light).items() if k != "unit"
    }
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="holds no direction"):
        directions.Direction.load(tmp_path / "x")


def test_a_direction_that_nobody_passes(lamp, clip, light):
    """Asked for black with the direction to white: told with the scores."""
    from dataclasses import replace

    with pytest.raises(
        SisError,
        match=r"'black' was not reached: at the largest displacement 0 % of 64 samples "
        r"pass.*scores: -\d",
    ):
        directions.with_strength(lamp, clip, replace(light, prompt="black", neutral="white"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n": 3}, "n is 3"),
        ({"quantile": 1.5}, "share of samples is 1.5"),
        ({"published": True}, "of 40 samples have a score"),
    ],
)
def test_refused(lamp, clip, settings, said):
    with pytest.raises(UsageError, match=said):
        directions.learn(lamp, clip, "a dog", "black", **{"n": 40} | settings)


# Latent optimisation


def test_optimisation(vit):
    gen = fakes.tiny_stylegan2(16)
    w, losses = directions.optimise(
        gen, vit, "a photo", seeds=range(3), steps=12, rate=0.2, pull=0.0
    )
    assert w.shape == (3, gen.num_ws, 8) and losses.shape == (3, 12)
    assert (losses[:, -1] < losses[:, 0]).all()
    alone, _ = directions.optimise(gen, vit, "a photo", seeds=[2], steps=12, rate=0.2, pull=0.0)
    np.testing.assert_allclose(alone[0], w[2], atol=2e-2)
    held, _ = directions.optimise(
        gen, vit, "a photo", seeds=range(3), steps=12, rate=0.2, pull=100.0
    )
    start = np.asarray(gen.map(gen.latents(range(3)), 0.7))
    assert np.abs(held - start).max() < np.abs(w - start).max()


# Style space


@pytest.fixture(scope="module")
def table(vit, tmp_path_factory):
    gen, folder = fakes.tiny_stylegan2(16), tmp_path_factory.mktemp("relevance")
    return (
        gen,
        folder,
        directions.Relevance.measure(gen, vit, folder, n=3, statistics=40, chunk=5, limit=8),
    )


def test_relevance_is_what_one_channel_does(table, vit):
    gen, _, found = table
    assert [name for name, _ in found.layers] == [
        "b4.conv1",
        "b8.conv0",
        "b8.conv1",
    ] and found.rows.shape[0] == 24
    styles = gen.styles(gen.map(gen.latents(range(500_000, 500_040)), 0.7))
    every = np.concatenate([np.asarray(styles[name]) for name, _ in found.layers], axis=1)
    np.testing.assert_allclose(found.mean, every.mean(0), rtol=1e-3, atol=1e-4)
    channel = 8 + 6  # of b8.conv0, in its second chunk
    base = gen.styles(gen.map(gen.latents(range(600_000, 600_003)), 0.7))
    seen = []
    for sign in (-1, 1):
        changed = (
            base["b8.conv0"].at[:, 6].set(found.mean[channel] + sign * 5 * found.deviation[channel])
        )
        image = gen.synthesize(base | {"b8.conv0": changed})[0]
        seen.append(
            bodies.embed(vit.network, image, (vit.preprocessing.mean, vit.preprocessing.std))
        )
    want = bodies.unit(seen[1] - seen[0]).mean(0)
    np.testing.assert_allclose(
        found.rows[channel], want / np.linalg.norm(want), atol=1e-2
    )  # of pictures that hardly differ


def test_a_table_is_resumed(table, vit, monkeypatch):
    gen, folder, found = table
    missing = next(p for p in folder.glob("b8.conv0-*.safetensors"))
    missing.unlink()
    calls, measured = [], directions._relevance
    monkeypatch.setattr(directions, "_relevance", lambda *a: calls.append(a[2][0]) or measured(*a))
    again = directions.Relevance.measure(gen, vit, folder, n=3, statistics=40, chunk=5, limit=8)
    assert calls == ["b8.conv0"]
    np.testing.assert_allclose(again.rows, found.rows, atol=1e-6)
    with pytest.raises(UsageError, match="another generator, text model or setting"):
        directions.Relevance.measure(gen, vit, folder, n=4, statistics=40, chunk=5, limit=8)


def test_global_edits(table, vit):
    gen, _, found = table
    change, count = found.edit(vit, "a cat", "a photo", threshold=0.0, strength=2.0)
    assert count == 24 and {k: v.shape for k, v in change.items()} == {
        name: (8,) for name, _ in found.layers
    }
    every, few = (
        np.concatenate(list(change.values())),
        found.edit(vit, "a cat", "a photo", threshold=0.1),
    )
    assert np.abs(every / found.deviation).max() == pytest.approx(2, rel=1e-4) and 0 < few[1] < 24
    styles = gen.styles(gen.map(gen.latents([1]), 0.7))
    edited = gen.synthesize({k: v + change.get(k, 0) for k, v in styles.items()})[0]
    assert np.abs(edited - gen.synthesize(styles)[0]).max() > 1e-4
    with pytest.raises(
        UsageError, match=r"no style channel has a relevance of 2 .*the largest is 0\.\d+: lower it"
    ):
        found.edit(vit, "a cat", "a photo", threshold=2)


def test_global_directions_need_a_style_space(lamp, vit, tmp_path):
    with pytest.raises(UsageError, match="lamp has no style space"):
        directions.Relevance.measure(lamp, vit, tmp_path)


# Moved generators


def test_moved():
    gen = fakes.tiny_stylegan2(16)
    move = np.arange(8, dtype=np.float32)
    some, all_ = moved(gen, move, 0.25), moved(gen, move)
    z = gen.latents(range(400))
    chosen = np.asarray(some.chosen(z))
    assert 0.15 < chosen.mean() < 0.35 and set(chosen.tolist()) == {0.0, 1.0}
    np.testing.assert_allclose(
        some.map(z, 0.7), gen.map(z, 0.7) + chosen[:, None, None] * move, atol=1e-5
    )
    assert np.asarray(all_.chosen(z)).all() and np.array_equal(some.chosen(z[7:9]), chosen[7:9])
    samples = some.sample(range(3), 0.7, taps=("8x8",))
    assert (
        samples.features["8x8"].shape == (3, 8, 8, 8)
        and some.info is gen.info
        and some.taps == gen.taps
    )
    leaves = jax.tree.leaves(some)
    assert len(leaves) == len(jax.tree.leaves(gen)) + 1
