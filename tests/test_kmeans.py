"""`ops/kmeans.py` against scikit-learn (stored and live), on one and eight devices, with weights,
empty clusters, batches and bad input.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans as Reference
from threadpoolctl import threadpool_limits

from sis_jax import parallel
from sis_jax.ops import kmeans_steps as steps
from sis_jax.ops.kmeans import KMeans, _contenders, _Data, assign, kmeans, predict, scores
from sis_jax.types import UsageError


def smooth_features(n, d, parts=9, seed=0, noise=0.3):
    """Rows like a generator's features: soft mixtures of a few part vectors, rectified, with noise,
    far from the origin.
    """
    g = np.random.default_rng(seed)
    mixture = np.exp(2.5 * g.standard_normal((n, parts)))
    mixture /= mixture.sum(1, keepdims=True)
    x = mixture @ g.standard_normal((parts, d))
    return (np.where(x > 0, x, 0.2 * x) + noise * g.standard_normal((n, d)) + 3).astype(np.float32)


def reference(x, k, **settings):
    with threadpool_limits(
        1
    ):  # its threads wait by spinning, which on a busy machine costs a hundred times the work
        return Reference(k, **settings).fit(x)


def inertia(x, centers):
    x, centers = x.astype(np.float64), np.asarray(centers, np.float64)
    return min_distances(x, centers).sum()


def min_distances(x, centers):
    return np.stack([((x - c) ** 2).sum(1) for c in centers], 1).min(1)


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("devices", [1, 8])
def test_same_as_reference_from_the_same_centres(goldens, case, devices):
    gold = {
        name[2:]: a
        for name, a in np.load(goldens / "misc/kmeans.npz").items()
        if name.startswith(case + "/")
    }
    fit = kmeans(gold["X"], 6, init=gold["init"], tol=0, devices=devices)
    clear = gold["margin"] > 1e-3
    np.testing.assert_array_equal(fit.labels[clear], gold["labels"][clear])
    np.testing.assert_allclose(fit.centers, gold["centers"], atol=1e-4)
    assert fit.inertia == pytest.approx(gold["inertia"], rel=1e-5)
    assert fit.n_iter == gold["n_iter"] and fit.converged


@pytest.mark.parametrize("case", ["a", "b"])
def test_every_step_is_the_reference_step(goldens, case):
    gold = np.load(goldens / "misc/kmeans.npz")
    path = gold[f"{case}/inertia_per_iteration"]
    for i in (1, 3, len(path) - 1):
        fit = kmeans(gold[f"{case}/X"], 6, init=gold[f"{case}/init"], tol=0, max_iter=i)
        assert fit.inertia == pytest.approx(path[i], rel=1e-5)
        assert fit.n_iter == i


def test_tolerance_stops_as_the_reference(goldens):
    gold = np.load(goldens / "misc/kmeans.npz")
    x, init = gold["b/X"], gold["b/init"]
    ref = reference(x, 6, n_init=1, init=init, tol=1e-2)
    fit = kmeans(x, 6, init=init, tol=1e-2)
    assert fit.n_iter == ref.n_iter_ < gold["b/n_iter"]
    np.testing.assert_allclose(fit.centers, ref.cluster_centers_, atol=1e-4)
    assert not kmeans(x, 6, init=init, max_iter=2).converged


@pytest.mark.parametrize("sample", [1_000, steps.SAMPLE])
def test_inertia_no_worse_than_reference(monkeypatch, sample):
    monkeypatch.setattr(steps, "SAMPLE", sample)
    monkeypatch.setattr(steps, "SAMPLE_PER_CENTRE", 100)
    x = smooth_features(3_000, 16)
    ours = [kmeans(x, 7, seed=s, devices=1) for s in range(5)]
    theirs = [reference(x, 7, n_init=10, random_state=s).inertia_ for s in range(5)]
    assert np.median([f.inertia for f in ours]) <= 1.005 * np.median(theirs)
    for fit in ours:
        assert fit.inertia == pytest.approx(inertia(x, fit.centers), rel=1e-5)
        assert fit.inertia <= fit.inertias.min() * (1 + 1e-5) and fit.inertias.shape == (10,)
        assert fit.labels.dtype == np.int32 and set(fit.labels) == set(range(7))


def test_seed_decides_and_restart_does_not_depend_on_their_number():
    x = smooth_features(500, 6)
    a, b, c = (
        kmeans(x, 5, seed=3, devices=1),
        kmeans(x, 5, seed=3, devices=1),
        kmeans(x, 5, seed=4, devices=1),
    )
    np.testing.assert_array_equal(a.centers, b.centers)
    assert not np.array_equal(a.centers, c.centers)
    few = kmeans(x, 5, seed=3, n_init=4, devices=1)
    np.testing.assert_allclose(few.inertias, a.inertias[:4], rtol=1e-5)


@pytest.mark.parametrize("n", [2_003, 2_000])
@pytest.mark.parametrize("sample", [400, steps.SAMPLE])
def test_eight_devices_find_what_one_finds(monkeypatch, n, sample):
    monkeypatch.setattr(steps, "SAMPLE", sample)
    monkeypatch.setattr(steps, "SAMPLE_PER_CENTRE", 1)
    monkeypatch.setattr(steps, "CHUNK", 128 if sample == 400 else steps.CHUNK)
    jax.clear_caches()
    parallel._compiled.cache_clear()
    x = smooth_features(n, 8, noise=0.1)
    one, many = kmeans(x, 6, devices=1, tol=0), kmeans(x, 6, devices=8, tol=0)
    parallel._compiled.cache_clear()
    np.testing.assert_allclose(one.centers, many.centers, atol=2e-5)
    assert one.inertia == pytest.approx(many.inertia, rel=1e-6)
    assert (one.labels == many.labels).mean() > 0.999 and many.labels.shape == (n,)


@pytest.mark.parametrize("rows", [1, 63, 64, 100, 129, 1_000])
def test_chunks_count_every_row_once(monkeypatch, rows):
    monkeypatch.setattr(steps, "CHUNK", 64)
    x = smooth_features(rows, 4)
    w = np.random.default_rng(1).random(rows).astype(np.float32)
    centers = x[None, :1] + np.arange(3, dtype=np.float32)[:, None]
    sums, counts = steps.cluster_sums(
        jnp.asarray(x), jnp.asarray(w), jnp.zeros(4), jnp.asarray(centers)
    )
    assert float(counts.sum()) == pytest.approx(w.sum(), rel=1e-5)
    np.testing.assert_allclose(sums.sum((0, 1)), w @ x, rtol=1e-4)
    labels, parts = steps.labels(
        jnp.asarray(x), jnp.asarray(w), jnp.zeros(4), jnp.asarray(centers[0])
    )
    np.testing.assert_array_equal(labels, ((x[:, None] - centers[0]) ** 2).sum(2).argmin(1))
    assert float(parts.sum()) == pytest.approx(float(w @ min_distances(x, centers[0])), rel=1e-5)


def test_integer_weights_are_repetitions():
    x = smooth_features(300, 5)
    w = np.random.default_rng(0).integers(0, 4, 300)
    weighted = kmeans(x, 4, init=x[:4], weights=w, tol=0)
    repeated = kmeans(np.repeat(x, w, axis=0), 4, init=x[:4], tol=0)
    np.testing.assert_allclose(weighted.centers, repeated.centers, atol=1e-5)
    assert weighted.inertia == pytest.approx(repeated.inertia, rel=1e-5)
    zero = np.where(np.arange(300) < 200, 1, 0)
    outlier = np.where(zero[:, None], x, 1e3).astype(np.float32)
    assert np.abs(kmeans(outlier, 4, weights=zero).centers).max() < 100


@pytest.mark.parametrize("devices", [1, 8])
def test_empty_cluster_moves_to_the_farthest_point_as_in_reference(devices):
    x = smooth_features(203, 3, noise=1.0)
    init = np.concatenate([x[:2], np.full((2, 3), 50), np.full((1, 3), 60)]).astype(np.float32)
    ref = reference(x, 5, n_init=1, init=init, tol=0)
    fit = kmeans(x, 5, init=init, tol=0, devices=devices)
    np.testing.assert_array_equal(
        np.bincount(fit.labels, minlength=5), np.bincount(ref.labels_, minlength=5)
    )
    np.testing.assert_allclose(np.sort(fit.centers, 0), np.sort(ref.cluster_centers_, 0), atol=1e-4)
    assert fit.n_iter == ref.n_iter_


def test_fewer_distinct_points_than_clusters_ends():
    x = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
    fit = kmeans(x, 5)
    assert fit.inertia == pytest.approx(0, abs=1e-6) and fit.converged and fit.n_iter < 10
    assert np.isfinite(fit.centers).all()


def test_far_from_the_origin():
    x = smooth_features(1_000, 4, noise=0.05) * 0.1
    near, far = kmeans(x, 5), kmeans(x + np.float32(500), 5)
    assert far.inertia == pytest.approx(near.inertia, rel=0.01)
    assert (
        assign(jnp.asarray(x + np.float32(500)), jnp.asarray(far.centers)) == far.labels
    ).mean() > 0.995


def test_contenders_drop_losers_and_twins():
    g = np.random.default_rng(0)
    centers = g.standard_normal((4, 5, 3)).astype(np.float32)
    centers[2] = centers[1][::-1] + 1e-3
    np.testing.assert_array_equal(_contenders(centers, np.array([1.005, 1.0, 1.001, 1.02])), [0, 1])


def test_assign_scores_predict():
    x = smooth_features(1_001, 6)
    fit = kmeans(x, 4)
    full = ((x[:, None].astype(np.float64) - fit.centers) ** 2).sum(2)
    np.testing.assert_allclose(
        scores(jnp.asarray(x), jnp.asarray(fit.centers)) + (x**2).sum(1)[:, None], full, atol=2e-3
    )
    np.testing.assert_array_equal(fit.predict(x, chunk=100), fit.labels)
    np.testing.assert_array_equal(
        jax.jit(assign)(x.reshape(7, 11, 13, 6), jnp.asarray(fit.centers)).reshape(-1), fit.labels
    )
    assert predict(x[:0], fit.centers).shape == (0,)
    np.testing.assert_array_equal(kmeans(jnp.asarray(x), 4).labels, fit.labels)


def test_result_is_a_pytree():
    fit = kmeans(smooth_features(50, 3), 3)
    again = jax.tree.map(lambda a: a, fit)
    assert isinstance(again, KMeans) and again.inertia == fit.inertia


def test_memory_no_padded_copy_on_one_device():
    x = smooth_features(1_000, 4)
    data = _Data.place(x, None, np.zeros(4, np.float32), parallel.local_devices(1))
    assert data.x.shape == (1, 1_000, 4) and data.w.shape == (1, 1_000)


X = smooth_features(20, 3)
BAD = X.copy()
BAD[[2, 5], 1] = [np.nan, np.inf]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kmeans(X, 1), "k is 1, expected"),
        (lambda: kmeans(X, 21), "number of points, 20"),
        (lambda: kmeans(X[:0], 2), "no data"),
        (lambda: kmeans(X[0], 2), "one row per point"),
        (lambda: kmeans(BAD, 2), "2 of 20 rows"),
        (lambda: kmeans(X * np.float32(1e30), 2), "too large"),
        (lambda: kmeans(X.astype(complex), 2), "real numbers"),
        (lambda: kmeans(X, 2, init=X[:3]), r"\(3, 3\), expected \(2, 3\)"),
        (lambda: kmeans(X, 2, init=BAD[1:3]), "1 of 2 rows"),
        (lambda: kmeans(X, 2, init="random"), "unknown init 'random'"),
        (lambda: kmeans(X, 2, n_init=0), "at least 1"),
        (lambda: kmeans(X, 2, weights=np.ones(19)), "weights must be 20"),
        (lambda: kmeans(X, 2, weights=-np.ones(20)), "none negative"),
        (lambda: kmeans(X, 2, devices=9), "has 8"),
        (lambda: predict(X[:, :2], X[:2]), r"shape \(n, 3\)"),
        (lambda: predict(BAD, X[:2]), "2 of 20"),
    ],
)
def test_errors_say_what_is_wrong(call, words):
    with pytest.raises(UsageError, match=words):
        call()
