"""DatasetGAN: hypercolumns at pixels, the ensemble and its normalisation, uncertainty, whole
pictures, what is learned, what is refused.
"""

import dataclasses
import itertools
import json

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sis_jax.methods.base import Fitted, Inputs, get
from sis_jax.methods.datasetgan import DatasetGAN, choose_pixels
from sis_jax.ops import plan
from sis_jax.ops.resize import resize_bilinear
from sis_jax.training import pixel_classifiers as pixels
from sis_jax.types import UsageError

pytestmark = pytest.mark.integration

SIDE = 16
NAMES = {0: "background", 3: "disc"}


def maps(*shapes, n=3, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((n, r, r, c)), jnp.float32) for r, c in shapes)


def whole(features, side=SIDE):
    """Hypercolumns by the definition: all maps enlarged, then concatenated."""
    return np.concatenate([resize_bilinear(x, (side, side), antialias=False) for x in features], -1)


def layers(d, members=4, classes=3, hidden=(8, 5), seed=1):
    rng = np.random.default_rng(seed)
    sizes = (d, *hidden, classes)
    return [
        (
            jnp.asarray(rng.standard_normal((members, i, o)), jnp.float32),
            jnp.asarray(rng.standard_normal((members, o)), jnp.float32),
        )
        for i, o in itertools.pairwise(sizes)
    ]


def probabilities(own, x):
    """float64[members, ..., classes]: linear, ReLU, ..., linear, softmax, one member after the
    other.
    """
    found = []
    for e in range(own[0][0].shape[0]):
        y = np.asarray(x, np.float64)
        for i, (w, b) in enumerate(own):
            y = np.maximum(y, 0) if i else y
            y = y @ np.asarray(w[e], np.float64) + np.asarray(b[e], np.float64)
        y = np.exp(y - y.max(-1, keepdims=True))
        found.append(y / y.sum(-1, keepdims=True))
    return np.stack(found)


SHAPES = ((4, 3), (8, 2), (8, 4), (16, 5))


@pytest.mark.parametrize("shapes", [SHAPES, ((4, 3),), ((16, 5),)], ids=str)
def test_hypercolumns_of_pixels_are_those_of_enlarged_maps(shapes):
    features = maps(*shapes)
    at = np.stack(
        [np.random.default_rng(i).permutation(SIDE * SIDE)[:40] for i in range(3)]
    ).astype(np.int32)
    at[:, :4] = [0, SIDE - 1, SIDE * (SIDE - 1), SIDE * SIDE - 1]  # the corners, where edges repeat
    found = pixels.hypercolumns(features, jnp.asarray(at), SIDE)
    expected = np.take_along_axis(whole(features).reshape(3, SIDE * SIDE, -1), at[..., None], 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("hidden", [(8, 5), ()], ids=["mlp", "linear"])
@pytest.mark.parametrize("majority", [False, True])
@pytest.mark.parametrize("shapes", [SHAPES, ((4, 3), (8, 6)), ((16, 5),)], ids=str)
def test_whole_pictures_are_labelled_as_their_hypercolumns(shapes, majority, hidden):
    features = maps(*shapes)
    own = layers(sum(c for _, c in shapes), hidden=hidden)
    label, sure = pixels.label_maps(own, features, SIDE, majority)
    p = probabilities(own, whole(features))
    mean = p.mean(0)
    js = -(mean * np.log(mean)).sum(-1) + (p * np.log(np.maximum(p, 1e-300))).sum(-1).mean(0)
    votes = sum(np.eye(3)[q.argmax(-1)] for q in p)
    score = votes + 0.5 * mean if majority else mean
    clear = np.sort(score, -1)[..., -1] - np.sort(score, -1)[..., -2] > 1e-4
    assert (
        label.dtype == jnp.uint8
        and label.shape == (3, SIDE, SIDE)
        and clear.mean() > 0.95
        and len(np.unique(label)) >= 2
    )
    assert np.array_equal(np.asarray(label)[clear], score.argmax(-1)[clear])
    np.testing.assert_allclose(sure, 1 - js / np.log(3), atol=2e-5)
    assert (
        mean.argmax(-1) != votes.argmax(-1)
    ).any()  # the two ways to vote are not the same thing


@pytest.mark.parametrize("shapes", [SHAPES, ((4, 3),), ((16, 5),)], ids=str)
def test_large_images_are_labelled_in_strips(shapes, monkeypatch):
    """The same labels, in a part of the memory."""

    def body(features):
        return pixels.label_maps(own, features, SIDE, True)

    features, own = maps(*shapes), layers(sum(c for _, c in shapes), hidden=(32, 16))
    whole, needed = body(features), plan.bytes_of(body, features)
    monkeypatch.setattr(pixels, "STRIP", SIDE * SIDE // 8)
    assert plan.bytes_of(lambda x: body(x), features) < 0.9 * needed
    for strips, once in zip(body(features), whole):
        np.testing.assert_allclose(strips, once, atol=1e-5)


def test_members_that_agree_are_sure_and_members_that_contradict_each_other_are_not():
    """Two members, two classes, equal and opposite certainty: the divergence is all it can be,
    although each member is sure of itself.
    """
    x = (jnp.ones((1, SIDE, SIDE, 1)),)
    strong = jnp.asarray([[[50.0, -50.0]], [[-50.0, 50.0]]])
    for weight, expected in ((strong, 0.0), (strong[:1].repeat(2, 0), 1.0), (0 * strong, 1.0)):
        sure = pixels.label_maps([(weight, jnp.zeros((2, 2)))], x, SIDE)[1]
        np.testing.assert_allclose(sure, expected, atol=1e-6)


def points(n=400, d=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)).astype(np.float32)
    return x, ((x[:, 0] * x[:, 1] > 0) + 2 * (x[:, 2] > 1)).astype(
        np.int32
    )  # no linear classifier knows the first


def trained(x, y, seen, steps=150, hidden=(32, 16), weight=None, **more):
    weight = np.ones(len(x), np.float32) if weight is None else weight
    recipe = pixels.Recipe(hidden, steps, batch=64, learning_rate=1e-2)
    return pixels.train(x, y, weight, seen, int(y.max()) + 1, recipe, **more)


def test_networks_learn_what_a_linear_read_out_cannot():
    x, y = points()
    seen = np.ones((3, len(x)), np.float32)
    said = []
    found = trained(x, y, seen, tick=lambda steps, loss: said.append((steps, loss)))
    right = {"mlp": np.asarray(pixels.logits(found, x)).argmax(-1) == y, "linear": None}
    right["linear"] = np.asarray(pixels.logits(trained(x, y, seen, hidden=()), x)).argmax(-1) == y
    assert right["mlp"].mean(-1).min() > 0.9 and right["linear"].mean(-1).max() < 0.75
    assert sum(s for s, _ in said) == 150 and said[-1][1] < said[0][1]
    assert not np.allclose(found[0][0][0], found[0][0][1])  # members begin elsewhere


def test_folded_layers_equal_layers_with_batch_normalisation():
    """What prediction uses, against linear, ReLU, normalisation by the moments over all points a
    member was shown.
    """
    x, _ = points(60)
    seen = np.stack([np.ones(60), np.arange(60) % 3]).astype(np.float32)
    own = layers(6, members=2, classes=3)
    folded = pixels._folded(own, x, jnp.asarray(seen))
    for e in range(2):
        y = x.astype(np.float64)
        for i, (w, b) in enumerate(own):
            y = y @ np.asarray(w[e], np.float64) + np.asarray(b[e])
            if i < 2:
                y = np.maximum(y, 0)
                mean = np.average(y, axis=0, weights=seen[e])
                y = (y - mean) / np.sqrt(
                    np.average((y - mean) ** 2, axis=0, weights=seen[e]) + pixels.EPSILON
                )
        np.testing.assert_allclose(
            pixels.logits(folded, jnp.asarray(x))[e], y, rtol=2e-3, atol=2e-3
        )


def test_a_member_learns_only_from_what_it_is_shown():
    x, y = points()
    half = (np.arange(len(x)) % 2).astype(np.float32)
    seen = np.stack([half, 1 - half, np.ones_like(half)])
    other = np.where(half > 0, y, 2 - y).astype(np.int32)  # the second half has other labels
    a, b = trained(x, y, seen, steps=20), trained(x, other, seen, steps=20)
    same = [np.array_equal(a[0][0][e], b[0][0][e]) for e in range(3)]
    assert same == [True, False, False]


def test_hidden_widths_are_the_papers():
    assert pixels.hidden_widths(31) == (128, 32) and pixels.hidden_widths(32) == (256, 128)


# which pixels


def test_small_classes_are_chosen_first_and_weights_undo_it():
    annotated = np.full((2, 20, 20), 255, np.uint8)
    annotated[0] = 0
    annotated[0, :2, :3] = 7
    annotated[1, 5:, :] = 1
    at, label, weight = choose_pixels(annotated, most=100, seed=3)
    assert at.shape == (2, 50) and (weight > 0).all()
    assert np.array_equal(annotated.reshape(2, -1)[[[0], [1]], at], label)
    assert (label[0] == 7).sum() == 6  # all of them
    total = weight / weight[0][label[0] == 7][0]  # annotated pixels each point stands for
    assert [total[0][label[0] == c].sum() for c in (0, 7)] == pytest.approx([394, 6]) and total[
        1
    ].sum() == pytest.approx(300)
    assert weight.mean() == pytest.approx(1)
    everything = choose_pixels(annotated, most=10**6)
    assert everything[0].shape == (2, 400) and [(w > 0).sum() for w in everything[2]] == [400, 300]
    assert all(
        len(np.unique(a[w > 0])) == (w > 0).sum() for a, w in zip(everything[0], everything[2])
    )


# a generator whose parts are known


@pytest.fixture(scope="module")
def blocks():
    return fakes.Blocks(SIDE)


def painted_blocks(gen, seeds, rub_out=0.3):
    masks = np.where(gen.truth(seeds, 0.7), 3, 0).astype(np.uint8)
    masks[np.random.default_rng(0).random(masks.shape) < rub_out] = 255
    return Inputs(annotated=masks, annotated_seeds=tuple(seeds), annotated_names=NAMES)


SMALL = {"members": 3, "steps": 60, "batch": 64, "max_points": 600}


@pytest.fixture(scope="module", params=["mlp", "linear"])
def fitted(request, blocks):
    return DatasetGAN(classifier=request.param, **SMALL).fit(
        blocks, 0, painted_blocks(blocks, range(5))
    )


def test_finds_what_was_painted(blocks, fitted):
    seeds = range(50, 56)
    labels = fitted.predict(blocks.sample(seeds, truncation=0.7, taps=fitted.taps))
    assert labels.dtype == np.uint8 and np.array_equal(labels == 1, blocks.truth(seeds, 0.7))
    ground, disc = fitted.clusters
    assert (ground["id"], ground["name"], ground["background"]) == (0, "background", True)
    assert (disc["id"], disc["name"], disc["background"]) == (1, "disc", False)
    assert ground["share"] + disc["share"] == pytest.approx(1) and 0.3 < disc["share"] < 0.45
    assert (
        min(ground["agreement"], disc["agreement"]) == pytest.approx(1, abs=0.02)
        and disc["confidence"] > 0.9
    )
    assert (
        fitted.background == {"found": True, "why": "annotated as class 0"}
        and fitted.warnings == ()
    )
    facts = json.loads(fitted.files["painted.json"])
    assert facts["seeds"] == [0, 1, 2, 3, 4] and [c["name"] for c in facts["classes"]] == [
        "background",
        "disc",
    ]


def test_streaming_labels_are_those_of_predict(blocks, fitted):
    seeds = list(range(50, 59))
    images, labels, sure = (np.concatenate(x) for x in zip(*fitted.label_seeds(blocks, seeds)))
    samples = blocks.sample(seeds, truncation=0.7, taps=fitted.taps)
    assert np.array_equal(images, samples.to_uint8()) and np.array_equal(
        labels, fitted.predict(samples)
    )
    assert sure.shape == labels.shape and sure.min() >= 0 and sure.max() <= 1


def test_restored_from_its_arrays(blocks, fitted):
    again = Fitted(fitted.method, fitted.arrays)
    samples = blocks.sample(range(4), taps=again.taps)
    assert fitted.method.layer == "16x16" and np.array_equal(
        again.predict(samples), fitted.predict(samples)
    )


def test_fit_leaves_the_method_alone_and_repeats_itself(blocks, fitted):
    method = DatasetGAN(classifier=fitted.method.classifier, **SMALL)
    again = method.fit(blocks, 0, painted_blocks(blocks, range(5)))
    assert method == DatasetGAN(classifier=fitted.method.classifier, **SMALL)
    assert (
        all(np.array_equal(fitted.arrays[k], again.arrays[k]) for k in fitted.arrays)
        and again.clusters == fitted.clusters
    )
    other = method.fit(blocks, 1, painted_blocks(blocks, range(5)))
    assert not np.array_equal(other.arrays["weight0"], fitted.arrays["weight0"])


def test_a_stylegan2_a_dcgan_and_many_devices():
    for gen, taps in ((fakes.tiny_stylegan2(), 5), (fakes.tiny_dcgan(), 2)):
        samples = gen.sample(range(3), truncation=0.7, taps=gen.taps)
        bright = samples.images.mean(-1) > np.median(samples.images.mean(-1))
        inputs = Inputs(
            annotated=np.asarray(bright, np.uint8), annotated_seeds=(0, 1, 2), annotated_names={}
        )
        fit = DatasetGAN(**SMALL | {"steps": 80}).fit(gen, 0, inputs)
        assert len(fit.taps) >= taps - 1 and fit.clusters[1]["name"] == "class 1"
        assert (
            fit.predict(samples) == inputs.annotated
        ).mean() > 0.6  # of random weights; half is chance
        seeds = list(range(16))
        one = np.concatenate([label for _, label, _ in fit.label_seeds(gen, seeds)])
        many = np.concatenate(
            [label for _, label, _ in fit.label_seeds(gen, seeds * 4)]
        )  # on four of the devices
        assert np.array_equal(np.concatenate([one] * 4), many)
    assert jax.device_count() == 8


def test_one_sample_is_enough_and_a_class_never_seen_twice_is_told(blocks):
    inputs = painted_blocks(blocks, range(4))
    masks = inputs.annotated.copy()
    masks[0, 3, :5] = 9  # drawn like the ground: cannot be learned
    odd = dataclasses.replace(inputs, annotated=masks, annotated_names={9: "scratch"})
    fit = DatasetGAN(classifier="linear", **SMALL).fit(blocks, 0, odd)
    assert (
        "The class scratch (5 pixels) is not yet learned" in " ".join(fit.warnings)
        and fit.clusters[1]["name"] == "class 3"
    )
    single = dataclasses.replace(inputs, annotated=inputs.annotated[:1], annotated_seeds=(0,))
    assert DatasetGAN(**SMALL).fit(blocks, 0, single).clusters[1]["agreement"] > 0.9


def test_bootstrapped_members_doubt_and_others_need_not(blocks):
    """One of two samples is annotated the wrong way round: members that drew one of them twice
    contradict each other.
    """
    inputs = painted_blocks(blocks, range(2), rub_out=0)
    masks = inputs.annotated.copy()
    masks[0] = 3 - masks[0]
    wrong = dataclasses.replace(inputs, annotated=masks)
    sure = [
        DatasetGAN(
            classifier="linear", bootstrap=b, **SMALL | {"members": 8, "learning_rate": 0.05}
        )
        .fit(blocks, 0, wrong)
        .clusters[1]["confidence"]
        for b in (True, False)
    ]
    assert sure[0] < 0.9 and sure[1] > 0.99, sure


def test_no_background_painted(blocks):
    inputs = painted_blocks(blocks, range(3))
    masks = np.where(inputs.annotated == 0, 1, inputs.annotated).astype(np.uint8)
    fit = DatasetGAN(classifier="linear", **SMALL).fit(
        blocks, 0, dataclasses.replace(inputs, annotated=masks)
    )
    assert fit.background["found"] is False and not any(c["background"] for c in fit.clusters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotated": None}, "datasetgan learns from annotated samples and got none"),
        ({"annotated_seeds": (0, 1)}, "3 annotated masks and 2 seeds"),
        ({"annotated": np.zeros((3, 8, 8), np.uint8)}, "are 8x8, expected the generator's 16x16"),
        ({"annotated": np.full((3, 16, 16), 255, np.uint8)}, "no pixel of the masks is annotated"),
        ({"annotated": np.zeros((3, 16, 16), np.uint8)}, "only one class, 0, is annotated"),
    ],
)
def test_masks_that_cannot_be_learned(blocks, change, message):
    with pytest.raises(UsageError, match=message):
        DatasetGAN(**SMALL).fit(
            blocks, 0, dataclasses.replace(painted_blocks(blocks, range(3)), **change)
        )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"classifier": "forest"}, "expected \"mlp\" or \"linear\""),
        ({"vote": "veto"}, "expected \"mean\" or \"majority\""),
        ({"members": 0}, "members is 0, expected at least 1"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"layer": "5x5"}, "has no tap '5x5'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(blocks, setting, message):
    method = DatasetGAN()
    for name, value in setting.items():
        object.__setattr__(
            method, name, value
        )  # past the type checks of the tests, which a user does not have
    with pytest.raises(UsageError, match=message):
        method.fit(blocks, 0, painted_blocks(blocks, range(3)))


def test_it_is_registered_and_says_what_it_wants():
    assert get("datasetgan") is DatasetGAN and DatasetGAN.wants == ("annotated",)
    assert set(DatasetGAN().estimate(fakes.tiny_stylegan2())) == {"seconds", "memory_bytes"}
