"""Segmentation scores against stored exact answers; sliced Wasserstein distance against its
definition.
"""

import time

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.ndimage import correlate1d

from sis_jax.ops import metrics, wasserstein
from sis_jax.types import UsageError


@pytest.fixture(scope="module")
def golden(goldens):
    with np.load(goldens / "misc" / "metrics.npz", allow_pickle=False) as file:
        return dict(file)


def _multi(golden):
    return sum(
        metrics.confusion(golden[f"multi/{i}/gt"], golden[f"multi/{i}/pred"], 5) for i in range(4)
    )


def test_confusion_matches_exactly(golden):
    np.testing.assert_array_equal(_multi(golden), golden["multi/confusion_gt_rows"])


def test_class_scores(golden):
    counts = _multi(golden)
    np.testing.assert_allclose(metrics.iou(counts), golden["multi/iou"], rtol=1e-12)
    assert metrics.mean_iou(counts) == pytest.approx(float(golden["multi/miou_present"]), rel=1e-12)


@pytest.mark.parametrize("radius", [1.5, 3.0])
def test_boundary_band_and_its_scores(golden, radius):
    total = np.zeros((2, 2), np.int64)
    for i in range(4):
        gt, pred = golden[f"bin/{i}/gt"], golden[f"bin/{i}/pred"]
        band = metrics.boundary_band(gt, radius)
        np.testing.assert_array_equal(band, golden[f"bin/{i}/band_r{radius}"].astype(bool))
        counts = metrics.confusion(gt[band], pred[band], 2)
        inter, union = np.diagonal(counts), counts.sum(0) + counts.sum(1) - np.diagonal(counts)
        np.testing.assert_array_equal(
            [inter[1], union[1], inter[0], union[0]], golden[f"bin/{i}/inter_union_fg_bg_r{radius}"]
        )
        total += counts
    score = metrics.iou(total)
    np.testing.assert_allclose(
        [score[1], score[0], metrics.mean_iou(total)],
        golden[f"bin/total/iou_fg_bg_mean_r{radius}"],
        rtol=1e-12,
    )


def test_whole_mask_scores(golden):
    total = sum(
        metrics.confusion(golden[f"bin/{i}/gt"], golden[f"bin/{i}/pred"], 2) for i in range(4)
    )
    score = metrics.iou(total)
    np.testing.assert_allclose(
        [score[1], score[0], metrics.mean_iou(total)],
        golden["bin/total/iou_fg_bg_mean_rall"],
        rtol=1e-12,
    )


def test_confusion_counts_by_truth_row_and_leaves_ignored_pixels_out():
    gt, pred = np.array([[0, 1, 255]], np.uint8), np.array([[1, 1, 7]], np.uint8)
    np.testing.assert_array_equal(metrics.confusion(gt, pred, 2), [[0, 1], [0, 1]])
    np.testing.assert_array_equal(
        metrics.confusion(gt == 1, pred == 1, 2), [[1, 1], [0, 1]]
    )  # as bool nothing is ignored


def test_confusion_refuses_foreign_ids_and_shapes():
    with pytest.raises(UsageError, match=r"prediction holds class id 7, expected 0 to 1"):
        metrics.confusion(np.zeros((1, 3), np.uint8), np.array([[1, 1, 7]], np.uint8), 2)
    with pytest.raises(UsageError, match="differ in shape"):
        metrics.confusion(np.zeros((1, 3), np.uint8), np.zeros((3, 1), np.uint8), 2)


def test_a_class_only_predicted_counts_as_zero_and_an_absent_one_not_at_all():
    counts = metrics.confusion(np.zeros((1, 4), np.uint8), np.array([[0, 0, 1, 1]], np.uint8), 3)
    assert metrics.iou(counts)[:2].tolist() == [0.5, 0.0]
    assert np.isnan(metrics.iou(counts)[2])
    assert metrics.mean_iou(counts) == 0.25
    assert np.isnan(metrics.mean_iou(np.zeros((2, 2), np.int64)))


def test_boundary_band_of_many_classes_by_brute_force():
    rng = np.random.default_rng(0)
    mask = np.kron(
        rng.choice(np.array([0, 1, 2, 255], np.uint8), (4, 5)), np.ones((4, 4), np.uint8)
    )
    expected = np.zeros(mask.shape, bool)
    points = np.argwhere(mask != 255)
    for y, x in points:
        near = ((points - [y, x]) ** 2).sum(1) <= 2.0**2
        expected[y, x] = (mask[tuple(points[near].T)] != mask[y, x]).any()
    np.testing.assert_array_equal(metrics.boundary_band(mask, 2.0), expected)
    assert not metrics.boundary_band(np.ones((5, 5), np.uint8), 3.0).any()


# ------------------------------------------------------------------------------- sliced Wasserstein


def _exactly(n, covariance, mean, seed):
    """n rows whose sample covariance and mean are exactly these."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_in_closed_form():
    """Commuting covariances: |mu|^2 + sum (s - t)^2 of their deviations; others by the root."""
    one, two = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.25])
    a = _exactly(50, np.diag(one), np.zeros(3), 0)
    b = _exactly(70, np.diag(two), np.array([1.0, 2.0, 2.0]), 1)
    expected = 9 + np.square(np.sqrt(one) - np.sqrt(two)).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    turned = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    other = turned @ np.diag(two) @ turned.T
    c = _exactly(70, other, np.zeros(3), 3)
    trace = 14 + two.sum() - 2 * np.trace(sqrtm(np.diag(one) @ other).real)
    assert metrics.frechet_distance(a, c) == pytest.approx(trace, rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_few_samples_has_the_known_bias():
    """Two samples of N(0, I): d (d + 5) / 4 (1 / n + 1 / m). Few rows are no fault."""
    rng = np.random.default_rng(0)
    found = [metrics.frechet_distance(*rng.normal(size=(2, 500, 64))) for _ in range(4)]
    assert np.mean(found) == pytest.approx(64 * 69 / 4 * (2 / 500), rel=0.05)
    assert np.isfinite(metrics.frechet_distance(*rng.normal(size=(2, 10, 64))))


def test_kernel_distance_equals_its_definition_and_has_no_bias():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(1, 2, size=(4, 3))

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    def inside(x):
        n = len(x)
        return sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    between = np.mean([[kernel(x, y) for y in b] for x in a])
    expected = inside(a) + inside(b) - 2 * between
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    null = [metrics.kernel_distance(*rng.normal(size=(2, 40, 8))) for _ in range(300)]
    assert abs(np.mean(null)) < 4 * np.std(null) / np.sqrt(300)


def test_manifold_overlap_by_brute_force():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(30, 2)), rng.normal(1.5, 0.5, size=(20, 2))

    def covered(point, of):
        reach = [sorted(np.linalg.norm(of - x, axis=1))[3] for x in of]
        return any(np.linalg.norm(point - x) <= r for x, r in zip(of, reach))

    precision = np.mean([covered(x, real) for x in fake])
    recall = np.mean([covered(x, fake) for x in real])
    assert metrics.manifold_overlap(real, fake) == (precision, recall) and recall < precision < 1


def test_sets_of_features_that_are_too_small():
    for compare in (metrics.frechet_distance, metrics.kernel_distance, metrics.manifold_overlap):
        with pytest.raises(UsageError, match=r"sets of 9 and 1 .*at least"):
            compare(np.zeros((9, 3)), np.zeros((1, 3)))


def _pictures(n: int, seed: int, side: int = 32) -> np.ndarray:
    """Smooth random pictures: every set of them has one distribution."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, side // 4, side // 4, 3)).astype(np.float32)
    fine = coarse.repeat(4, 1).repeat(4, 2) * 0.8 + rng.normal(25, 8, (n, side, side, 3))
    return np.clip(fine, 0, 255).astype(np.uint8)


def _swd(a, b, seed=0, **numbers):
    return wasserstein.SwdReference(a, seed, **numbers).distance(b)


def test_swd_levels_zero_and_determinism():
    a, b = _pictures(60, 0), _pictures(60, 1)
    same = _swd(a, a, descriptors=2000)
    assert same == {"32": 0.0, "16": 0.0, "average": 0.0}
    first = _swd(a, b, seed=3, descriptors=2000)
    assert first == _swd(a, b, seed=3, descriptors=2000)
    assert first != _swd(a, b, seed=4, descriptors=2000)
    assert first["average"] == pytest.approx((first["32"] + first["16"]) / 2)
    assert first["average"] > 0


def test_swd_sees_blur_at_the_fine_level_and_grows_with_it():
    a, b = _pictures(150, 0), _pictures(150, 1)
    reference = wasserstein.SwdReference(a, 0)
    blurred = [b] + [
        correlate1d(correlate1d(b.astype(float), k, 1), k, 2).round().astype(np.uint8)
        for k in ([0.1, 0.8, 0.1], [0.25, 0.5, 0.25])
    ]
    floor, little, much = [reference.distance(images)["32"] for images in blurred]
    assert floor < 0.8 * little
    assert little < 0.7 * much


def test_swd_of_a_known_pair():
    """One level, one value per set of pictures: normalisation leaves nothing, so flat sets agree
    whatever their colour.
    """
    a, b = np.full((4, 8, 8, 3), 10, np.uint8), np.full((4, 8, 8, 3), 200, np.uint8)
    assert _swd(a, b) == {"8": 0.0, "average": 0.0}


def test_swd_equals_its_definition():
    """7x7 pictures have one descriptor position and one level: the whole distance can be written
    out.
    """
    rng = np.random.default_rng(0)
    a, b = (
        rng.integers(0, 256, (40, 7, 7, 3)).astype(np.uint8),
        (rng.integers(0, 256, (40, 7, 7, 3)) ** 2 / 256).astype(np.uint8),
    )
    unit = [
        (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))
        for x in (a.astype(np.float64), b.astype(np.float64))
    ]
    directions = np.random.default_rng(7).standard_normal((4000, 147))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows = [np.sort(directions @ x.reshape(40, 147).T, axis=1) for x in unit]
    expected = 1e3 * np.abs(rows[0] - rows[1]).mean()
    found = _swd(a, b, projections=4000, descriptors=40)["7"]
    assert found == pytest.approx(
        expected, rel=0.02
    )  # other directions: the mean over 4,000 of them agrees to about 0.5 %


def test_swd_of_sets_of_different_size():
    reference = wasserstein.SwdReference(_pictures(150, 0), descriptors=4000)
    floor = reference.distance(_pictures(150, 1))["average"]
    assert reference.distance(_pictures(90, 1))["average"] < 2 * floor
    assert reference.distance(np.repeat(_pictures(150, 0), 2, 0))["average"] < 2 * floor


def test_more_pictures_than_descriptors():
    assert _swd(_pictures(40, 0), _pictures(40, 1), descriptors=10)["average"] > 0


def test_pyramid_filters_against_scipy():
    x = np.random.default_rng(0).normal(size=(1, 16, 12, 3)).astype(np.float32)
    taps = np.array([1, 4, 6, 4, 1]) / 16
    blurred = correlate1d(correlate1d(x, taps, 1, mode="mirror"), taps, 2, mode="mirror")
    import jax.numpy as jnp

    np.testing.assert_allclose(
        wasserstein.binomial_down(jnp.asarray(x)), blurred[:, ::2, ::2], atol=1e-6
    )
    wide = np.zeros((1, 32, 24, 3), np.float32)
    wide[:, ::2, ::2] = x
    expected = correlate1d(
        correlate1d(wide, taps * 2, 1, mode="mirror"), taps * 2, 2, mode="mirror"
    )
    np.testing.assert_allclose(wasserstein.binomial_up(jnp.asarray(x)), expected, atol=1e-6)


def test_the_accelerator_path_sorts_like_the_host():
    rng = np.random.default_rng(0)
    directions, patches = (
        rng.normal(size=(5, 147)).astype(np.float32),
        rng.normal(size=(300, 147)).astype(np.float32),
    )
    np.testing.assert_array_equal(
        np.asarray(wasserstein._sorter(False)(directions, patches)),
        wasserstein._project_and_sort(directions, patches),
    )


def test_swd_refuses_what_it_cannot_compare():
    pictures = _pictures(4, 0)
    with pytest.raises(UsageError, match=r"16x16 cannot be compared with a reference of 32x32"):
        wasserstein.SwdReference(pictures).distance(pictures[:, ::2, ::2])
    with pytest.raises(UsageError, match="at least 7x7"):
        wasserstein.SwdReference(pictures[:, :6, :6])
    with pytest.raises(UsageError, match="descriptors"):
        wasserstein.SwdReference(pictures, descriptors=0)


@pytest.mark.slow
def test_swd_speed():
    a, b = _pictures(2000, 0, 64), _pictures(2000, 1, 64)
    _swd(a, b)
    start = time.process_time()
    _swd(a, b)
    assert time.process_time() - start < 12  # of all threads together; 2 seconds on two idle cores
