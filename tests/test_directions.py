"""`stages/directions.py`: scores, learning and strength, on a generator and a CLIP whose answers
are known.
"""

import json

import fakes
import jax
import naming_kit
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from sis_jax.models.moved import moved
from sis_jax.stages import directions
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def clip():
    return naming_kit.two_words()


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


def test_moving_moves(lamp, clip):
    there = directions.scores(lamp, clip, "white", "black", range(6), move=5 * lamp.axis)[0]
    back = directions.scores(lamp, clip, "white", "black", range(6), move=-5 * lamp.axis)[0]
    assert there.min() > 1 and back.max() < -1


def test_layers_finer_than_the_text_model_sees_do_not_run(clip, monkeypatch):
    asked, real = [], directions.collect
    monkeypatch.setattr(directions, "collect", lambda *a, **k: asked.append(k) or real(*a, **k))
    gen = fakes.tiny_stylegan2(256, channels=2, latent=4)
    score, _ = directions.scores(gen, clip, "white", "black", [0])
    assert asked[0]["small"] == "128x128/rgb" and np.isfinite(score).all()


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
    with safe_open(tmp_path / "light.safetensors", framework="np") as file:
        facts = json.loads(file.metadata()["direction"])
    old = {"direction": json.dumps(facts | {"published": False})}  # as 0.1.0 wrote it
    (tmp_path / "old.safetensors").write_bytes(save({"unit": light.unit}, old))
    assert directions.Direction.load(tmp_path / "old.safetensors").prompt == light.prompt
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
        ({"quantile": 1 - 1e-9}, "40 of 40 samples have a score"),
    ],
)
def test_refused(lamp, clip, settings, said):
    with pytest.raises(UsageError, match=said):
        directions.learn(lamp, clip, "a dog", "black", **{"n": 40} | settings)


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
