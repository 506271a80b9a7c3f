"""Labels that follow the picture: the random field against its definition, what is usual at a
place, and a cluster that joins later.
"""

import dataclasses

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sis_jax.methods.base import Fitted
from sis_jax.methods.segmentation_in_style import SegmentationInStyle
from sis_jax.ops import cluster_labels, crf
from sis_jax.ops.resize import resize_bilinear
from sis_jax.types import UsageError


def literally(evidence, image):
    """Mean field as the formula says, pixel by pixel and neighbour by neighbour."""

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    h, w, _ = evidence.shape
    q = softmax(evidence)
    for _ in range(crf.STEPS):
        message = np.zeros_like(q)
        for y in range(h):
            for x in range(w):
                total = 0.0
                for dy in range(-crf.RADIUS, crf.RADIUS + 1):
                    for dx in range(-crf.RADIUS, crf.RADIUS + 1):
                        r, c, far = y + dy, x + dx, dy * dy + dx * dx
                        if 0 < far <= crf.RADIUS**2 and 0 <= r < h and 0 <= c < w:
                            unlike = ((image[r, c] - image[y, x]) ** 2).sum()
                            k = np.exp(-unlike / (2 * crf.COLOUR**2) - far / (2 * crf.PLACE**2))
                            message[y, x] += k * q[r, c]
                            total += k
                message[y, x] *= crf.WEIGHT / max(total, 1e-6)
        q = softmax(evidence + message)
    return q


@pytest.mark.parametrize(("height", "width", "classes"), [(12, 12, 3), (9, 14, 5), (3, 127, 2)])
def test_mean_field_is_its_definition(height, width, classes):
    rng = np.random.default_rng(0)
    evidence = rng.normal(size=(2, height, width, classes)).astype(np.float32) * 2
    image = np.clip(rng.normal(size=(2, height, width, 3)).astype(np.float32) * 0.3, -1, 1)
    labels, odds = crf.best(jnp.asarray(evidence), jnp.asarray(image))
    for e, i, label, odd in zip(evidence, image, labels, odds):
        expected = literally(e.astype(np.float64), i.astype(np.float64))
        np.testing.assert_allclose(
            jax.nn.softmax(crf.posterior(jnp.asarray(e), jnp.asarray(i))), expected, atol=2e-5
        )
        first, second = np.sort(expected, -1)[..., :-3:-1].T
        np.testing.assert_allclose(odd.T, np.log(first / second), atol=1e-3)
        assert np.array_equal(label, expected.argmax(-1))


def test_a_picture_and_its_enlargement_are_treated_alike():
    rng = np.random.default_rng(2)
    coarse = rng.normal(size=(1, 8, 8, 3 + 3))
    small = np.array(resize_bilinear(jnp.asarray(coarse, jnp.float32), (64, 64)))
    small += 0.3 * rng.normal(size=small.shape).astype(np.float32)  # specks
    large = small.repeat(4, 1).repeat(4, 2)
    labels, again = (
        np.asarray(crf.best(jnp.asarray(x[..., :3]) * 2, jnp.asarray(x[..., 3:]) * 0.5)[0])
        for x in (small, large)
    )
    nearest = small[..., :3].argmax(-1)
    assert (labels != nearest).mean() > 0.05 and (
        again != labels.repeat(4, 1).repeat(4, 2)
    ).mean() < 0.06


def test_labels_follow_the_edge_of_a_colour():
    """Evidence that ends two pixels beside the edge, with specks: the labels end at the edge and
    the specks go.
    """
    side = 32
    image = np.where(np.arange(side)[None, :, None] < 16, -0.5, 0.5) * np.ones(
        (side, side, 3), np.float32
    )
    left = np.broadcast_to(np.arange(side) < 16, (side, side))
    says_left = np.broadcast_to(np.arange(side) < 18, (side, side)).copy()
    says_left[5, 5], says_left[20, 27] = False, True
    strength = np.where(abs(np.arange(side) - 16.5) < 1, 0.1, 1.5)  # unsure beside the edge
    evidence = np.where(says_left, 1, -1)[..., None] * np.array([1, -1]) * strength[None, :, None]
    labels, odds = crf.best(
        jnp.asarray(evidence, jnp.float32)[None], jnp.asarray(image, jnp.float32)[None]
    )
    assert np.array_equal(np.asarray(labels)[0] == 0, left) and odds.min() > 0


def test_a_damaged_pixel_spoils_no_other():
    evidence = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32) * 3
    image = jnp.zeros((1, 16, 16, 3))
    whole = np.asarray(crf.best(jnp.asarray(evidence), image)[0])
    evidence[0, 4, 4] = np.nan
    damaged = np.asarray(crf.best(jnp.asarray(evidence), image)[0])
    assert (whole != damaged).sum() <= 5


def test_many_pictures_are_taken_in_turns(monkeypatch):
    rng = np.random.default_rng(1)
    evidence, image = (
        jnp.asarray(rng.normal(size=(6, 16, 16, 3)), jnp.float32),
        jnp.zeros((6, 16, 16, 3)),
    )
    labels, odds = crf.best(evidence, image)
    monkeypatch.setattr(crf, "_VALUES", 4 * 16 * 16 * 37)  # four at a time at most, so three
    again, others = crf.best(evidence, image)
    assert np.array_equal(labels, again)
    np.testing.assert_allclose(others, odds, atol=1e-5)


def test_what_is_usual_at_a_place():
    """Three clusters on 8 x 8 places of 30 samples: shares by Laplace's rule, rows and columns as
    in a picture.
    """
    rng = np.random.default_rng(0)
    places = np.tile(cluster_labels.place_of(8).reshape(-1, 2), (30, 1))
    labels = rng.integers(0, 2, len(places))
    labels[(places[:, 1] < -0.7)] = 2  # the top row
    centers = np.float32([[0, 0], [3, 0], [0, 8]])
    x = centers[labels]
    learned = cluster_labels.learn_refinement(x, centers, labels, places, 8)
    prior = np.exp(learned["log_prior"])
    np.testing.assert_allclose(prior.sum(-1), 1, rtol=1e-5)
    assert prior.shape == (
        8,
        8,
        3,
    )  # no finer than the places there are: cells between them would know nothing
    np.testing.assert_allclose(prior[0, :, 2], 31 / 33, rtol=1e-5)
    np.testing.assert_allclose(prior[1:, :, 2], 1 / 33, rtol=1e-5)
    assert prior[1:, :, :2].min() > 0.15
    gaps = np.where(labels == 2, 64, 9)
    np.testing.assert_allclose(learned["gap"], [gaps.mean()], rtol=1e-5)


def test_few_points_tell_few_places_apart():
    places = np.random.default_rng(0).uniform(-1, 1, (9, 2)).astype(np.float32)
    learned = cluster_labels.learn_refinement(
        np.eye(9, dtype=np.float32), np.eye(9, dtype=np.float32), np.arange(9), places, 16
    )
    np.testing.assert_allclose(learned["log_prior"], np.full((1, 1, 9), np.log(1 / 9)), rtol=1e-5)


def _one_tap(noise):
    """Evidence for a disc, features with noise, and a picture that shows the disc."""
    side, rng = 32, np.random.default_rng(0)
    at = cluster_labels.place_of(side)
    disc = (at**2).sum(-1) < 0.4
    x = np.where(disc, 1.0, -1.0)[None, ..., None] + noise * rng.normal(size=(1, side, side, 1))
    arrays = {"centers": [[-1, 0, 0], [1, 0, 0]], "mean": [0, 0, 0], "scale": [1, 0, 0]}
    image = np.where(disc, 0.4, -0.4)[None, ..., None] * np.ones((1, side, side, 3))
    return (
        disc,
        jnp.asarray(x, jnp.float32),
        jnp.asarray(image, jnp.float32),
        {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()},
    )


def test_refined_labels_are_nearer_to_what_is_there():
    disc, x, image, arrays = _one_tap(noise=0.8)
    plain, _ = cluster_labels.label_maps((x,), image, arrays, False)
    more = arrays | {"gap": jnp.full(1, 4.0), "log_prior": jnp.full((4, 4, 2), jnp.log(0.5))}
    refined, sure = cluster_labels.label_maps((x,), image, more, False)
    wrong = [float((np.asarray(found)[0] != disc).mean()) for found in (plain, refined)]
    assert wrong[0] > 0.08 and wrong[1] < 0.02
    turned = np.asarray(plain != refined)
    assert (
        turned.any()
        and np.asarray(sure)[turned].mean() > 0.2
        and 0 <= np.min(sure) <= np.max(sure) <= 1
    )  # a student must not pass over them


def test_confidence_is_that_of_the_distances_where_nothing_else_speaks(monkeypatch):
    monkeypatch.setattr(crf, "WEIGHT", 0.0)
    _, x, image, arrays = _one_tap(noise=0.8)
    more = arrays | {"gap": jnp.full(1, 4.0), "log_prior": jnp.full((4, 4, 2), jnp.log(0.5))}
    for plain, refined in zip(
        *(cluster_labels.label_maps((x,), image, a, False) for a in (arrays, more))
    ):
        np.testing.assert_allclose(plain, refined, atol=1e-4)


def test_the_place_decides_where_features_do_not():
    _, x, image, arrays = _one_tap(noise=0)
    prior = np.log(np.float32([0.05, 0.95])) * np.ones((2, 2, 2), np.float32)
    prior[:, 0] = prior[:, 0, ::-1]  # the left half is usually ground
    more = arrays | {"gap": jnp.ones(1), "log_prior": jnp.asarray(prior)}
    labels = np.asarray(
        cluster_labels.label_maps((jnp.zeros_like(x),), jnp.zeros_like(image), more, False)[0]
    )[0]
    assert not labels[:, :12].any() and labels[:, -12:].all()


def test_a_cluster_that_joins_later():
    arrays = {
        "centers": np.float32([[5, 0, 0, 0], [1, 2, 0, 0], [0, 0, 0, 9]]),
        "gap": np.ones(1, np.float32),
        "log_prior": np.log(np.float32([0.2, 0.7, 0.1])) * np.ones((2, 2, 1), np.float32),
    }
    more = cluster_labels.with_centre(arrays, np.ones(4, np.float32))
    assert (
        more["centers"].shape == (4, 4)
        and more["log_prior"].shape == (2, 2, 4)
        and more["log_prior"].dtype == np.float32
    )
    np.testing.assert_allclose(np.exp(more["log_prior"][..., -1]), 0.7, rtol=1e-6)
    assert set(
        cluster_labels.with_centre({"centers": arrays["centers"]}, np.ones(4, np.float32))
    ) == {"centers"}


def test_the_method_learns_what_it_needs_and_older_parts_stay_as_they_were():
    gen = fakes.Blocks(16)
    method = SegmentationInStyle(k=2, layer="16x16", n=8, n_init=2)
    fit, plain = method.fit(gen), dataclasses.replace(method, refine="none").fit(gen)
    assert (
        set(fit.arrays) - set(plain.arrays) == {"gap", "log_prior"}
        and "log_prior" not in plain.arrays
    )
    assert all(np.array_equal(fit.arrays[key], plain.arrays[key]) for key in plain.arrays)
    samples = gen.sample(range(4), taps=fit.taps)
    old = Fitted(
        SegmentationInStyle(k=2, layer="16x16"), plain.arrays
    )  # as saved before there was `refine`
    assert np.array_equal(old.predict(samples), plain.predict(samples))


def test_a_refinement_that_does_not_exist():
    method = SegmentationInStyle(k=3, layer="16x16", n=4)
    object.__setattr__(
        method, "refine", "densecrf"
    )  # past the type checks of the tests, which a user does not have
    with pytest.raises(UsageError, match='refine is \'densecrf\', expected "crf" or "none"'):
        method.fit(fakes.Blocks(16))
