"""Segmentation in Style: labels from class scores, position, normalisation, recipe, sweep, and what
it refuses.
"""

import dataclasses

import fakes
import jax.numpy as jnp
import numpy as np
import pytest

from sis_jax.discover import discover
from sis_jax.methods.base import Fitted
from sis_jax.methods.segmentation_in_style import (
    RECIPES,
    SWEEP_KS,
    SegmentationInStyle,
    _standardise,
    candidate_layers,
)
from sis_jax.ops import kmeans, selection, sweep
from sis_jax.ops.cluster_labels import label_maps
from sis_jax.ops.resize import resize_bilinear
from sis_jax.stages.discover import resolve
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration

K = 5


def features(*shapes, n=2):
    """Smooth random maps, one per (side, channels): noise at a quarter of the size, enlarged."""
    rng = np.random.default_rng(0)
    made = {}
    for side, channels in shapes:
        coarse = jnp.asarray(
            rng.standard_normal((n, max(2, side // 4), max(2, side // 4), channels)), jnp.float32
        )
        made[f"{side}x{side}"] = resize_bilinear(coarse, (side, side))
    return made


def learned(channels, position_weight=0.0, seed=1):
    rng = np.random.default_rng(seed)
    d = channels + 2
    scale = np.ones(d, np.float32) * rng.uniform(0.5, 2, d).astype(np.float32)
    scale[-2:] = position_weight
    centers = rng.standard_normal((K, d)).astype(np.float32)
    centers[:, -2:] *= position_weight
    mean = rng.standard_normal(d).astype(np.float32) * 0.3
    mean[-2:] = 0
    return {"centers": jnp.asarray(centers), "mean": jnp.asarray(mean), "scale": jnp.asarray(scale)}


def literally(maps, arrays, side, align_corners):
    """The definition: enlarge all features, standardise, add the place, nearest centre; [n s s]
    labels, squared distances [n s s k].
    """
    large = [
        resize_bilinear(x, (side, side), align_corners=align_corners, antialias=False)
        for x in maps.values()
    ]
    at = (np.arange(side) + 0.5) / side * 2 - 1
    place = np.broadcast_to(np.stack(np.meshgrid(at, at), -1), (*large[0].shape[:3], 2))
    x = np.concatenate([*map(np.asarray, large), place], -1).astype(np.float64)
    x = (x - np.asarray(arrays["mean"])) * np.asarray(arrays["scale"])
    distances = ((x[..., None, :] - np.asarray(arrays["centers"], np.float64)) ** 2).sum(-1)
    return distances.argmin(-1), distances


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("position_weight", [0.0, 0.8])
@pytest.mark.parametrize(
    "shapes", [[(16, 6)], [(32, 6)], [(8, 4), (16, 6)], [(4, 3), (8, 4), (32, 5)]], ids=str
)
def test_labels_from_scores_are_labels_of_enlarged_features(shapes, position_weight, align_corners):
    side = 32
    maps, arrays = features(*shapes), learned(sum(c for _, c in shapes), position_weight)
    labels, sure = label_maps(
        tuple(maps.values()), jnp.zeros((2, side, side, 3)), arrays, align_corners
    )
    expected, distances = literally(maps, arrays, side, align_corners)
    nearest = np.sort(distances, -1)
    clear = nearest[..., 1] - nearest[..., 0] > 1e-3
    assert labels.shape == (2, side, side) and labels.dtype == jnp.uint8
    assert clear.mean() > 0.98 and len(np.unique(expected)) >= 3
    assert np.array_equal(np.asarray(labels)[clear], expected[clear])
    assert sure.min() >= 0 and sure.max() <= 1
    if shapes == [(32, 6)]:  # nothing is enlarged: |x|^2 is exact, and so is the confidence
        np.testing.assert_allclose(sure, 1 - nearest[..., 0] / nearest[..., 1], atol=1e-4)


def test_half_precision_features_are_compared_in_full():
    maps, arrays = features((16, 6)), learned(6)
    half = {t: x.astype(jnp.bfloat16) for t, x in maps.items()}
    again = {t: x.astype(jnp.float32) for t, x in half.items()}
    for a, b in zip(
        *(
            label_maps(tuple(m.values()), jnp.zeros((2, 16, 16, 3)), arrays, False)
            for m in (half, again)
        )
    ):
        assert np.array_equal(a, b)


# A generator whose parts are known


@pytest.fixture(scope="module")
def blocks():
    return fakes.Blocks(16)


@pytest.fixture(scope="module")
def fitted(blocks):
    return SegmentationInStyle(k=2, layer="16x16", n=8, n_init=2).fit(blocks, seed=0)


def test_finds_parts_that_are_there(blocks, fitted):
    seeds = range(50, 56)
    labels = fitted.predict(blocks.sample(seeds, truncation=0.7, taps=fitted.taps))
    truth = blocks.truth(seeds, 0.7)
    assert labels.shape == (6, 16, 16) and labels.dtype == np.uint8
    assert np.array_equal(labels == labels[0, 8, 8], truth)
    ground, disc = (fitted.clusters[i] for i in (labels[0, 0, 0], labels[0, 8, 8]))
    assert (
        ground["id"] == 0
        and ground["background"]
        and not disc["background"]
        and fitted.background["found"]
    )
    assert ground["share"] + disc["share"] == pytest.approx(1) and 0.3 < disc["share"] < 0.45
    assert (
        ground["border_share"] == pytest.approx(1)
        and ground["agreement"] == pytest.approx(1)
        and ground["confidence"] > 0.9
    )


def test_streaming_labels_are_those_of_predict(blocks, fitted):
    seeds = list(range(50, 59))
    images, labels, sure = (np.concatenate(x) for x in zip(*fitted.label_seeds(blocks, seeds)))
    samples = blocks.sample(seeds, truncation=0.7, taps=fitted.taps)
    assert images.dtype == np.uint8 and np.array_equal(images, samples.to_uint8())
    assert np.array_equal(labels, fitted.predict(samples)) and sure.shape == labels.shape
    (_, other, _) = next(iter(fitted.label_seeds(blocks, [50], truncation=0.0)))
    assert np.array_equal(other[0] == other[0, 8, 8], blocks.truth([50], 0.0)[0])


def test_fit_leaves_the_method_alone_and_repeats_itself(blocks, fitted):
    method = SegmentationInStyle(k=2, layer="16x16", n=8, n_init=2)
    again = method.fit(blocks, seed=0)
    assert method == SegmentationInStyle(k=2, layer="16x16", n=8, n_init=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fitted.arrays = {}
    assert all(np.array_equal(fitted.arrays[key], again.arrays[key]) for key in fitted.arrays)
    assert (
        again.clusters == fitted.clusters
        and again.background == fitted.background
        and again.sweep is None
    )


def test_another_seed_gives_other_samples(blocks, fitted):
    other = fitted.method.fit(blocks, seed=1)
    assert not np.array_equal(other.arrays["centers"], fitted.arrays["centers"])


def test_restored(blocks, fitted):
    copy = Fitted(SegmentationInStyle(k=2, layer="16x16"), fitted.arrays)
    samples = blocks.sample(range(4), taps=copy.taps)
    assert np.array_equal(copy.predict(samples), fitted.predict(samples))


def test_clusters_are_numbered_by_size(blocks):
    gen = fakes.tiny_stylegan2(16)
    fit = SegmentationInStyle(k=4, layer="8x8+16x16", n=6, n_init=2).fit(gen)
    assert fit.taps == ("8x8", "16x16") and [c["id"] for c in fit.clusters] == [0, 1, 2, 3]
    assert fit.arrays["centers"].shape == (4, 8 + 8 + 2) and sum(
        c["share"] for c in fit.clusters
    ) == pytest.approx(1)
    taps = gen.sample(range(6), truncation=0.7, taps=fit.taps).features
    counts = np.bincount(
        literally({t: taps[t] for t in fit.taps}, fit.arrays, 16, False)[0].ravel(), minlength=4
    )
    assert (np.diff(counts) <= 0.02 * counts.sum()).all()
    samples = gen.sample(
        range(2), truncation=0.7, taps=("16x16", "8x8")
    )  # in another order than the method's
    assert np.array_equal(
        fit.predict(samples), fit.predict(gen.sample(range(2), truncation=0.7, taps=fit.taps))
    )


def test_position_weight_splits_left_from_right():
    """Two bands with equal features, mirrored: without a place they are one part, with one they are
    two.
    """
    gen = fakes.Blocks(16, mirrored=True)
    samples = gen.sample(range(20, 23), truncation=0.0, taps=gen.taps)
    truth = gen.truth([20], 0.0)[0]
    left, right = truth & (np.arange(16) < 8), truth & (np.arange(16) >= 8)

    def parts_of(k, weight):
        fit = SegmentationInStyle(
            k=k, layer="16x16", n=8, n_init=2, truncation=0.0, position_weight=weight
        ).fit(gen)
        labels = fit.predict(samples)[0]
        return [set(labels[where].tolist()) for where in (left, right, ~truth)]

    a, b, ground = parts_of(2, 0.0)
    assert a == b and len(a) == 1 and not a & ground
    a, b, ground = parts_of(3, 0.6)
    assert len(a) == len(b) == len(ground) == 1 == len(a ^ b) - 1 and not (a | b) & ground


def test_normalisation():
    """A loud channel that says nothing decides raw distances, and does not decide standardised
    ones.
    """
    gen = fakes.Blocks(16)
    original = gen.synthesize

    def loud(w, noise="const", taps=()):
        image, found = original(w, noise, taps)
        stripes = jnp.broadcast_to(
            (jnp.arange(16) % 2 * 100.0)[None, :, None, None], (*image.shape[:3], 1)
        )
        # the disc in three channels, so that standardised it outweighs the stripes
        return image, {
            t: jnp.concatenate([x[..., :1], 0.5 * x[..., :1], 2 * x[..., :1], stripes], -1)
            for t, x in found.items()
        }

    gen.synthesize = loud
    truth, samples = gen.truth(range(3)), gen.sample(range(3), taps=gen.taps)
    found = {}
    for normalize in ("none", "channel", "tap"):
        labels = (
            SegmentationInStyle(k=2, layer="16x16", n=8, n_init=2, normalize=normalize)
            .fit(gen)
            .predict(samples)
        )
        found[normalize] = np.array_equal(labels == labels[0, 8, 8], truth)
    assert found == {"none": False, "channel": True, "tap": True}


def test_taps_count_the_same_however_wide_they_are(blocks):
    points = np.random.default_rng(0).normal(size=(4, 50, 8)).astype(np.float32) * np.float32(
        [1, 9, 1, 1, 1, 1, 1, 1]
    )
    variance = {}
    for normalize in ("channel", "tap"):
        method = SegmentationInStyle(k=2, layer="8x8+16x16", normalize=normalize)
        mean, scale, position = _standardise(points, method, [1, 5])
        spread = ((points - mean) * (scale * position)).reshape(-1, 8).var(0)
        variance[normalize] = [spread[:1].sum(), spread[1:6].sum()]
    np.testing.assert_allclose(variance["channel"], [1, 5], rtol=1e-3)
    np.testing.assert_allclose(variance["tap"], [3, 3], rtol=1e-3)
    one = [
        _standardise(points, SegmentationInStyle(k=2, layer="8x8", normalize=n), [6])[1]
        for n in ("channel", "tap")
    ]
    np.testing.assert_array_equal(*one)


def test_raw_features_are_raw(blocks):
    arrays = (
        SegmentationInStyle(k=2, layer="16x16", n=8, n_init=2, normalize="none").fit(blocks).arrays
    )
    assert (
        not arrays["mean"][:-2].any()
        and (arrays["scale"][:-2] == 1).all()
        and not arrays["scale"][-2:].any()
    )
    points = np.concatenate(
        [x.reshape(-1, 4) for x in blocks.sample(range(8), 0.7, blocks.taps).features.values()]
    )
    centers = kmeans.kmeans(points, 2, n_init=2).centers
    got = arrays["centers"][np.argsort(arrays["centers"][:, 0]), :-2]
    np.testing.assert_allclose(got, np.asarray(centers)[np.argsort(centers[:, 0])], atol=1e-4)


def test_points_are_bounded_and_belong_to_their_sample(blocks):
    method = SegmentationInStyle(k=2, layer="16x16", n=10, max_points=400)
    points = method._points(blocks, list(range(10)), ("16x16",))
    assert points.shape == (10, 40, 4 + 2)
    truth = blocks.truth(range(10), 0.7)
    for own, mask in zip(points, truth):
        column, row = ((own[:, -2:].T + 1) * 8).astype(int)
        assert len(set(zip(row, column))) == 40  # every pixel once
        assert np.array_equal(own[:, 0] > 2, mask[row, column])


def test_a_grid_of_its_own(blocks):
    points = SegmentationInStyle(layer="16x16", grid=8)._points(blocks, [0, 1], ("16x16",))
    assert points.shape == (2, 64, 6)


def test_the_published_recipe():
    asked = vars(discover)["door"].build({"recipe": "paper"}, {})
    method = resolve(asked)
    published = {
        "k": 9,
        "layer": "64x64",
        "n": 50,
        "truncation": 0.7,
        "grid": 128,
        "n_init": 10,
        "normalize": "none",
        "align_corners": True,
        "refine": "none",
    }
    assert {key: getattr(method, key) for key in published} == published and "paper" in RECIPES
    assert method.max_points >= 50 * 128 * 128 and method.position_weight == 0
    assert (
        resolve(dataclasses.replace(asked, settings=dataclasses.replace(asked.settings, k=12))).k
        == 12
    )


def test_auto_chooses_and_shows_its_table():
    gen = fakes.tiny_stylegan2(16)
    fit = SegmentationInStyle(n=6, n_init=1, max_points=1500).fit(gen, seed=0)
    rows = fit.sweep["rows"]
    chosen = [row for row in rows if row["chosen"]]
    assert (
        len(chosen) == 1
        and (fit.method.k, fit.method.layer) == (chosen[0]["k"], chosen[0]["layer"])
        and fit.sweep["criterion"]
    )
    assert (
        {row["layer"] for row in rows}
        == set(candidate_layers(gen))
        == {"8x8", "16x16", "8x8+16x16"}
    )
    assert len({(row["layer"], row["k"]) for row in rows}) == len(rows) > len(candidate_layers(gen))
    assert fit.taps == tuple(fit.method.layer.split("+"))
    assert len(fit.clusters) == fit.method.k == len(fit.arrays["centers"])
    assert all(np.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


def test_a_given_k_changes_no_other_row(blocks):
    points = np.random.default_rng(0).normal(size=(6, 40, 5)).astype(np.float32)
    columns = {"8x8": points[..., :2], "16x16": points[..., :4], "32x32": points[..., 3:]}
    plain, more = sweep.sweep(columns, (3, 4, 8)), sweep.sweep(columns, (3, 4, 8), given=2)
    assert [r for r in more if r["k"] != 2] == plain and {
        r["layer"] for r in more if r["k"] == 2
    } == set(columns)
    assert sweep.consensus_of_layers(more, (3, 4, 8)) == sweep.consensus_of_layers(plain, (3, 4, 8))


def test_k_rises_until_the_background_is_found(monkeypatch):
    """The table then states why another k than that of the highest score was taken."""
    gen, asked, usual = fakes.tiny_stylegan2(16), {"n": 6, "n_init": 1}, selection.background
    least = [256]

    def background(share, *others):
        return usual(share, *others)[0], len(share) >= least[0], "asked for"

    monkeypatch.setattr(selection, "background", background)
    first = SegmentationInStyle(**asked, max_points=1500).fit(gen, seed=0)
    assert not first.background["found"] and "no background" not in first.sweep["criterion"]
    least[0] = first.method.k + 1
    fitted = SegmentationInStyle(**asked, max_points=1500).fit(gen, seed=0)
    k = next(k for k in SWEEP_KS if k > first.method.k)
    assert fitted.background["found"] and fitted.method.k == k == len(fitted.clusters)
    chosen = [(r["layer"], r["k"]) for r in fitted.sweep["rows"] if r["chosen"]]
    assert chosen == [(first.method.layer, k)]
    words = f"With k {first.method.k} no background was found; {k} is the next"
    assert words in fitted.sweep["criterion"]
    given = dataclasses.replace(first.method, layer="auto").fit(gen, seed=0)
    assert given.method.k == first.method.k and not given.background["found"]


@pytest.mark.parametrize(
    ("layer", "k", "said"), [("auto", None, 2), ("auto", 4, 1), ("8x8", None, 1), ("8x8", 4, 0)]
)
def test_the_criterion_says_what_was_left_to_it(layer, k, said):
    text = sweep.criterion(layer, k)
    assert (
        text.count("highest") == said
        and ("layer was given" in text) == (layer != "auto")
        and ("k was given" in text) == (k is not None)
    )


def test_the_place_weighs_the_same_against_every_layer(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        sweep, "sweep", lambda columns, *rest: seen.update(columns) or _rows(columns)
    )
    SegmentationInStyle(n=6, n_init=1, max_points=1500, position_weight=0.3).fit(
        fakes.tiny_stylegan2(16)
    )
    assert set(seen) == {"8x8", "16x16", "8x8+16x16"}
    for x in seen.values():
        variance = x.reshape(-1, x.shape[-1]).var(0)
        np.testing.assert_allclose(variance[-2:].sum() / variance[:-2].sum(), 0.3**2, rtol=1e-2)


def _rows(columns):
    return [
        {"layer": layer, "k": 3, "agreement": 1.0, "consensus": 1.0, "score": 1.0, "chosen": False}
        for layer in columns
    ]


def test_the_layer_is_chosen_by_consensus_at_few_clusters_and_then_k_by_score():
    def rows():
        table = {
            "8x8": [(3, 0.9, 0.3), (5, 0.5, 0.3), (10, 0.9, 0.9)],
            "16x16": [(3, 0.4, 0.5), (5, 0.6, 0.4), (10, 0.1, 0.1)],
        }
        return [
            {
                "layer": layer,
                "k": k,
                "agreement": a,
                "consensus": c,
                "score": a * c,
                "chosen": False,
            }
            for layer, found in table.items()
            for k, a, c in found
        ]

    assert (
        max(rows(), key=lambda r: r["score"])["layer"] == "8x8"
    )  # at ten clusters, which say little about a layer
    for (layer, k), expected in {
        ("auto", None): ("16x16", 5),
        ("auto", 10): ("16x16", 10),
        ("8x8", None): ("8x8", 10),
        ("8x8", 3): ("8x8", 3),
    }.items():
        table = rows()
        chosen = sweep.choose(table, sweep.consensus_of_layers(table, (3, 5, 10)), layer, k)
        assert (chosen["layer"], chosen["k"]) == expected and [r for r in table if r["chosen"]] == [
            chosen
        ]


@pytest.mark.parametrize(("given", "fixed"), [({"k": 3}, "k"), ({"layer": "8x8"}, "layer")])
def test_auto_keeps_what_was_given(given, fixed):
    fit = SegmentationInStyle(n=6, n_init=1, max_points=1500, **given).fit(fakes.tiny_stylegan2(16))
    (chosen,) = [row for row in fit.sweep["rows"] if row["chosen"]]
    assert (
        getattr(fit.method, fixed) == chosen[fixed] == given[fixed]
        and chosen["k"] == fit.method.k
        and chosen["layer"] == fit.method.layer
    )


@pytest.mark.parametrize("layer", ["auto", "4x4"])
def test_auto_with_a_generator_too_small_for_it(layer):
    """Nothing from 8 to 64 pixels to try, or too few points for any k: a choice or a sentence, no
    traceback.
    """
    gen = fakes.tiny_stylegan2(4)
    try:
        fit = SegmentationInStyle(n=2, layer=layer, n_init=1).fit(gen)
    except SisError as error:
        assert len(str(error)) > 20
    else:
        assert fit.taps == ("4x4",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"k": 1}, "k is 1, expected at least 2"),
        ({"k": 256}, "at most 255"),
        ({"layer": "64x64"}, "no tap '64x64'; it has 16x16"),
        ({"layer": "16x16+9x9"}, "no tap '9x9'; it has 16x16"),
        ({"layer": ""}, "no tap ''"),
        ({"n": 1}, "n is 1, expected at least 2"),
        ({"n": 0}, "n is 0"),
        ({"position_weight": -0.5}, "position_weight is -0.5"),
        ({"n_init": 0}, "n_init is 0"),
        ({"max_points": 3}, "max_points is 3"),
        ({"grid": -1}, "grid is -1"),
        ({"k": 200, "n": 2, "max_points": 100}, "k is 200 but there are only 100 points"),
    ],
)
def test_settings_that_cannot_work(blocks, settings, said):
    with pytest.raises(UsageError) as error:
        SegmentationInStyle(**{"k": 3, "layer": "16x16", "n": 4} | settings).fit(blocks)
    assert said in str(error.value)


def test_a_normalisation_that_does_not_exist(blocks):
    method = SegmentationInStyle(k=3, layer="16x16", n=4)
    object.__setattr__(
        method, "normalize", "pixel"
    )  # past the type checks of the tests, which a user does not have
    with pytest.raises(UsageError, match="normalize is 'pixel', expected"):
        method.fit(blocks)


def test_samples_without_the_features(blocks, fitted):
    with pytest.raises(UsageError, match="no 16x16 features: make them with"):
        fitted.predict(blocks.sample([0]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights(value):
    from flax import nnx

    gen = fakes.tiny_stylegan2(16)
    graph, state = nnx.split(gen)
    state["synthesis"]["b8"]["conv1"]["bias"] = state["synthesis"]["b8"]["conv1"]["bias"].replace(
        jnp.full(8, value)
    )
    with pytest.raises(SisError, match="NaN or infinite"):
        SegmentationInStyle(k=3, layer="16x16", n=4, n_init=1).fit(nnx.merge(graph, state))


def test_any_family():
    gen = fakes.tiny_dcgan((16, 4))
    fit = SegmentationInStyle(k=2, layer="8x8", n=32, n_init=2).fit(gen)
    labels = fit.predict(gen.sample([1, 2], taps=("8x8",)))
    assert labels.shape == (2, 16, 16) and len(np.unique(labels)) == 2


def test_an_estimate_follows_the_settings(blocks):
    """Of one generator: more points need more memory and time, whatever the machine does."""
    few = SegmentationInStyle(k=3, layer="16x16", n=4, refine="none").estimate(blocks)
    many = SegmentationInStyle(k=3, layer="16x16", n=40_000, refine="none", max_points=4_000_000)
    more = many.estimate(blocks)
    assert more["seconds"] > few["seconds"] > 0
    assert more["memory_bytes"] > few["memory_bytes"] + 4 * 4_000_000
