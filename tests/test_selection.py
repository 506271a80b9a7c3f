"""Judging clusterings and finding the background, against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_score

from sis_jax.ops import selection
from sis_jax.ops.cluster_labels import place_of


def labels(n, k, seed):
    return np.random.default_rng(seed).integers(0, k, n)


@pytest.mark.parametrize(("k", "flips"), [(2, 0), (2, 500), (5, 100), (9, 3), (9, 2000)])
def test_agreement_is_the_adjusted_rand_index(k, flips):
    a = labels(2000, k, 0)
    b = (a + 1) % k
    at = np.random.default_rng(1).permutation(2000)[:flips]
    b[at] = labels(flips, k, 2)
    np.testing.assert_allclose(selection.agreement(a, b, k), adjusted_rand_score(a, b), atol=1e-12)
    np.testing.assert_allclose(
        selection.agreement(b, a, k), selection.agreement(a, b, k), atol=1e-12
    )


def test_agreement_at_its_ends():
    a = labels(500, 4, 0)
    assert selection.agreement(a, (a * 3 + 1) % 4, 4) == 1
    assert abs(selection.agreement(a, labels(500, 4, 1), 4)) < 0.02
    assert selection.agreement(np.zeros(10, int), np.zeros(10, int), 3) == 1
    assert (
        selection.agreement(np.zeros(10, int), labels(10, 3, 0), 3)
        == adjusted_rand_score(np.zeros(10), labels(10, 3, 0))
        == 0
    )
    large = np.repeat(labels(4, 2, 0), 1_000_000)  # pair counts beyond 32 bits
    assert selection.agreement(large, large, 2) == 1


@pytest.mark.parametrize("spread", [0.2, 1.0, 4.0])
def test_silhouette(spread):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 300)
    x = (3 * rng.standard_normal((4, 6))[truth] + spread * rng.standard_normal((300, 6))).astype(
        np.float32
    )
    np.testing.assert_allclose(
        selection.silhouette(x, truth), silhouette_score(x, truth), atol=1e-4
    )


def test_silhouette_of_odd_clusterings():
    x = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    truth = np.where(np.arange(40) < 20, 2, 7)  # numbers with gaps
    truth[0] = 5  # a cluster of one
    np.testing.assert_allclose(
        selection.silhouette(x, truth), silhouette_score(x, truth), atol=1e-5
    )
    assert selection.silhouette(x, np.zeros(40, int)) == 0
    assert (
        abs(selection.silhouette(1000 + x, truth) - silhouette_score(x, truth)) < 0.02
    )  # far from the origin
    np.testing.assert_allclose(
        selection.silhouette(
            np.repeat([[0.0], [1.0]], 5, 0).astype(np.float32), np.repeat([0, 1], 5)
        ),
        1,
    )


def test_overlap_and_cluster_agreement():
    a = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    b = np.array([1, 1, 2, 2, 2, 0, 0, 0])
    assert selection.overlap(a, b, 3).tolist() == [[0, 2, 1], [0, 0, 2], [3, 0, 0]]
    np.testing.assert_allclose(selection.cluster_agreement(a, b, 3), [2 / 3, 2 / 3, 1])
    shuffled = np.array([3, 0, 1, 2])[labels(100, 4, 0)]
    np.testing.assert_allclose(selection.cluster_agreement(labels(100, 4, 0), shuffled, 4), 1)


def test_cluster_agreement_pairs_one_to_one():
    """Two clusters cannot both claim the partner that swallowed them."""
    a, b = np.array([0] * 60 + [1] * 40), np.zeros(100, int)
    np.testing.assert_allclose(selection.cluster_agreement(a, b, 2), [0.6, 0])


@pytest.mark.parametrize(
    ("height", "width", "edge"), [(64, 64, 3), (20, 40, (1, 2)), (4, 4, 1), (128, 128, 6)]
)
def test_frame(height, width, edge):
    rows, columns = edge if isinstance(edge, tuple) else (edge, edge)
    mask = selection.frame(height, width)
    assert mask.shape == (height, width) and mask.dtype == bool
    assert mask[:rows].all() and mask[:, :columns].all() and mask[:, -columns:].all()
    assert not mask[rows:, columns:-columns].any()  # not the bottom


def _background(share, edge, sides=None):
    return selection.background(*map(np.array, (share, edge, edge if sides is None else sides)))


def test_background_that_is_plain():
    chosen, sure, why = _background([0.5, 0.3, 0.2], [0.1, 0.75, 0.15])
    assert chosen.tolist() == [False, True, False] and sure
    assert "cluster 1" in why and "75%" in why and "30%" in why


def test_background_of_two_clusters():
    chosen, sure, why = _background([0.4, 0.2, 0.1, 0.3], [0.1, 0.5, 0.3, 0.1])
    assert chosen.tolist() == [False, True, True, False] and sure and "clusters 1, 2" in why


# Of generated street photos: a wall, the street in front of people, and them, in two clusters.
STREET = [0.45, 0.3, 0.22, 0.03], [0.667, 0.285, 0.044, 0.0], [0.52, 0.41, 0.06, 0.01]


def test_background_around_a_small_object():
    chosen, sure, why = _background(*STREET)
    assert chosen.tolist() == [True, True, False, False] and sure and "75% of the image" in why


def test_hair_that_reaches_the_sides_is_no_background():
    """As found on the default faces: what is clearly outside is enough."""
    chosen, sure, _ = _background([0.33, 0.24, 0.43], [0.36, 0.64, 0.0], [0.35, 0.65, 0.0])
    assert chosen.tolist() == [False, True, False] and sure


@pytest.mark.parametrize(
    ("share", "edge", "guess"),
    [
        ([0.5, 0.5], [0.5, 0.5], None),  # nothing prefers the frame
        ([0.5, 0.4, 0.1], [0.45, 0.4, 0.15], 2),  # prefers it, but holds too little of it
        ([0.5, 0.5], [0.4, 0.6], 1),  # prefers it, but not enough
    ],
)
def test_background_that_is_not_sure(share, edge, guess):
    chosen, sure, why = _background(share, edge)
    assert not sure and chosen.sum() == 1 and "closest" in why
    assert guess is None or chosen[guess]


def test_an_empty_cluster_is_no_background():
    chosen, sure, _ = _background([0.6, 0.4, 0.0], [0.2, 0.8, 0.0])
    assert chosen.tolist() == [False, True, False] and sure


@pytest.mark.parametrize("side", [16, 64, 128])
def test_facts_of_single_pixels_are_those_of_whole_masks(side):
    rng = np.random.default_rng(side)
    labels = rng.integers(0, 3, (2, side, side)).astype(np.uint8)
    labels[:, : side // 4] = 2
    confidence = rng.random(labels.shape, np.float32)
    places = np.broadcast_to(place_of(side), (2, side, side, 2)).reshape(-1, 2)
    whole, verdict = selection.describe([(None, labels, confidence)], 3)
    single, again = selection.describe_points(
        labels.ravel().astype(int), places, confidence.ravel(), 3
    )
    assert again == verdict
    for a, b in zip(whole, single, strict=True):
        assert a == pytest.approx(b)
