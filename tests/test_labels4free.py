"""Labels4Free: the paper's equations against NumPy, and a training of a few steps on a tiny
generator.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import tiny_dcgan, tiny_discriminator, tiny_stylegan2

from sis_jax import methods, parallel
from sis_jax.methods.base import Fitted, Inputs
from sis_jax.methods.labels4free import RECIPES, Labels4Free
from sis_jax.models import alpha as nets
from sis_jax.ops.resize import cubic_matrix
from sis_jax.training import labels4free as training
from sis_jax.training import labels4free_checks as checks
from sis_jax.training.loop import Checkpoints
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration

SHORT = Labels4Free(steps=2, batch=8, check=1, start=0.0, stage="4x4", r1_interval=2, tries=1)


@pytest.fixture(scope="module")
def gen():
    return tiny_stylegan2(channels=4)


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def fitted(gen, photos):
    return SHORT.fit(gen, 3, inputs=Inputs(photos=photos))


# the paper's equations


def test_composite_mixes_the_two_pictures():
    a, front, back = (
        np.full((1, 2, 2, 1), 0.25),
        np.full((1, 2, 2, 3), 4.0),
        np.full((1, 2, 2, 3), 8.0),
    )
    assert np.allclose(nets.composite(jnp.asarray(a), jnp.asarray(front), jnp.asarray(back)), 7.0)


@pytest.mark.parametrize("coverage", ["image", "batch"])
def test_alpha_loss_is_the_papers(coverage):
    rng = np.random.default_rng(1)
    alpha, scores = (
        rng.random((3, 4, 4, 1)).astype(np.float32)
        * np.float32([0.2, 1, 1.0])[:, None, None, None],
        np.float32([0.3, -1, 2]),
    )
    settings = {
        "adversarial": 0.5,
        "binary": 3.0,
        "least_foreground": 0.4,
        "background": 6.0,
        "least_background": 0.6,
        "coverage": coverage,
    }
    recipe = training.Recipe(**settings)
    share = alpha.mean() if coverage == "batch" else alpha.mean((1, 2, 3))
    binary, front, back = (
        np.minimum(alpha, 1 - alpha).mean(),
        np.maximum(0.4 - share, 0).mean(),
        np.maximum(0.6 - (1 - share), 0).mean(),
    )
    expected = 0.5 * np.log1p(np.exp(-scores)).mean() + 3 * (binary + front) + 6 * back
    assert np.isclose(
        training.alpha_loss(jnp.asarray(alpha), jnp.asarray(scores), recipe)[0], expected, rtol=1e-5
    )
    # ours on top: the frame of 4 x 4 pixels is the first row and the outer columns, 10 pixels
    at_frame = np.concatenate(
        [alpha[:, 0, :, 0], alpha[:, 1:, 0, 0], alpha[:, 1:, 3, 0]], axis=1
    ).mean(1)
    at_frame = at_frame.mean() if coverage == "batch" else at_frame
    asked = training.Recipe(**settings, least_frame=0.7)
    more = training.alpha_loss(jnp.asarray(alpha), jnp.asarray(scores), asked)[0] - expected
    assert at_frame.max() > 0.3 and np.isclose(
        more, 6 * np.maximum(at_frame - 0.3, 0).mean(), rtol=1e-4
    )


def test_bicubic_doubling_keeps_corners_and_straight_lines():
    matrix = cubic_matrix(8, 16, aligned=True)
    assert np.allclose(matrix.sum(1), 1) and np.allclose(matrix[[0, -1]], np.eye(8)[[0, -1]])
    # PyTorch's kernel at u = 7 / 15, taps 0 .. 2 with the one before clamped onto 0: a = -0.75
    t = 7 / 15
    weights = [-0.75 * (x**3 - 5 * x**2 + 8 * x - 4) for x in (1 + t, 2 - t)]
    near = [1.25 * x**3 - 2.25 * x**2 + 1 for x in (t, 1 - t)]
    assert np.allclose(matrix[1, :3], [near[0] + weights[0], near[1], weights[1]])


def test_alpha_network_by_hand(gen):
    params = nets.init_alpha(gen, 0)
    rng = np.random.default_rng(2)
    features = [rng.standard_normal((2, r, r, 4)).astype(np.float32) for r in (8, 8, 16, 16)]
    p = [
        f @ np.asarray(params[f"level{k // 2}/{k % 2}/weight"])
        + np.asarray(params[f"level{k // 2}/{k % 2}/bias"])
        for k, f in enumerate(features)
    ]
    m = cubic_matrix(8, 16, aligned=True)
    h = np.einsum("ih,nhwc,jw->nijc", m, np.concatenate(p[:2], -1), m)
    expected = (np.concatenate(p[2:], -1) + h) @ np.asarray(params["out/weight"]) + np.asarray(
        params["out/bias"]
    )
    assert np.allclose(
        nets.alpha_logits(params, tuple(map(jnp.asarray, features))), expected, atol=1e-4
    )


def test_published_sizes():
    assert [t[0] for t in nets.alpha_taps(1024)] == [
        f"{r}x{r}/conv0" for r in (32, 64, 128, 256, 512, 1024)
    ]
    assert [t[1] for t in nets.alpha_taps(64)] == [f"{r}x{r}/conv1" for r in (8, 16, 32, 64)]


def test_standardised_weights_do_the_same_on_raw_features(gen):
    params = nets.init_alpha(gen, 0)
    rng = np.random.default_rng(3)
    features = [jnp.asarray(rng.standard_normal((1, r, r, 4)) * 5 + 2) for r in (8, 8, 16, 16)]
    scaling = tuple(jnp.stack([f.mean((0, 1, 2)), f.std((0, 1, 2))]) for f in features)
    scaled = tuple((f - m) / d for f, (m, d) in zip(features, scaling))
    assert np.allclose(
        nets.alpha_logits(nets.standardised(params, scaling), tuple(features)),
        nets.alpha_logits(params, scaled),
        atol=1e-4,
    )


@pytest.mark.parametrize("stage", ["const", "4x4", "8x8/conv0", "8x8"])
def test_background_generator_zeroes_one_stage_and_leaves_the_generator(gen, stage):
    before = jax.tree.map(np.array, gen)
    ground = nets.background_generator(gen, stage)
    w = gen.map(gen.latents([0, 1]))
    tap = "4x4" if stage == "const" else stage
    image, features = ground.synthesize(w, taps=(tap,))
    assert stage == "const" or not np.any(features[tap])
    assert np.abs(np.asarray(image) - np.asarray(gen.synthesize(w)[0])).max() > 1e-3
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(gen)))


# training


def _one_step(gen, devices, batch=8):
    recipe = training.Recipe()
    graph, state = training.new_state(
        nets.init_alpha(gen, 0), tiny_discriminator(channels=4), recipe
    )
    ones = tuple(jnp.stack([jnp.zeros(4), jnp.ones(4)]) for _ in nets.flat_taps(16))
    frozen = (gen, nets.background_generator(gen, "4x4"), ones)
    run = parallel.map_devices(
        training.step, (None, None, None, 0, 0), None, devices=devices, graph=graph, recipe=recipe
    )
    slots = training.order(batch, devices)
    real = np.random.default_rng(0).integers(0, 256, (batch, 16, 16, 3), dtype=np.uint8)[slots]
    return run(state, frozen, jax.random.key(0), slots, real)[1]


def test_any_number_of_devices_gives_the_same_numbers(gen):
    one, two = _one_step(gen, 1), _one_step(gen, 2)
    for name in one:
        assert np.isclose(one[name], two[name], rtol=1e-3, atol=1e-4), name


def test_fit_moves_and_labels(gen, fitted):
    rows = fitted.files["labels4free.csv"].decode().splitlines()
    assert (
        len(rows) == 3
        and rows[0].startswith("step,")
        and "separation,boxed,on_frame,score" in rows[0]
    )
    assert [c["name"] for c in fitted.clusters] == [
        "background",
        "foreground",
    ] and fitted.background["found"]
    start = nets.init_alpha(gen, 3)
    assert any(np.abs(fitted.arrays[k] - np.asarray(start[k])).max() > 1e-4 for k in start)
    alpha = np.concatenate([a for _, a in fitted.method.alpha_seeds(fitted.arrays, gen, range(5))])
    low = Fitted(replace(SHORT, threshold=0.2), fitted.arrays)
    images, labels, sure = (np.concatenate(x) for x in zip(*low.label_seeds(gen, range(5))))
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    assert sure.dtype == np.float32 and sure.min() >= 0 and sure.max() <= 1
    assert np.array_equal(labels, alpha > 0.2) and np.allclose(
        np.where(labels == 1, 0.2 + 0.8 * sure, 0.2 - 0.2 * sure), alpha, atol=1e-5
    )


def test_restored_and_predict_give_the_same_masks(gen, fitted):
    again = Fitted(replace(SHORT), fitted.arrays)
    labels = [
        np.concatenate([b for _, b, _ in m.label_seeds(gen, range(4))]) for m in (fitted, again)
    ]
    assert np.array_equal(*labels)
    assert (
        again.predict(gen.sample(range(4), truncation=0.7, taps=again.taps)) == labels[0]
    ).mean() > 0.99
    with pytest.raises(UsageError, match="taps="):
        again.predict(gen.sample([0]))


def test_an_interrupted_training_goes_on_to_the_same_bits(
    gen, photos, fitted, tmp_path, monkeypatch
):
    save = Checkpoints.save

    def stopped(self, step, *rest):
        save(self, step, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            SHORT.fit(gen, 3, inputs=Inputs(photos=photos, folder=tmp_path))
    again = SHORT.fit(gen, 3, inputs=Inputs(photos=photos, folder=tmp_path))
    assert again.files == fitted.files
    assert all(np.array_equal(again.arrays[k], fitted.arrays[k]) for k in fitted.arrays)


def test_a_collapsed_mask_stops_with_the_cure(gen, photos, monkeypatch):
    monkeypatch.setattr(checks, "COLLAPSED", 0.6)  # then every mask counts as collapsed
    with pytest.raises(SisError, match=r"collapsed.*give --"):
        SHORT.fit(gen, 3, inputs=Inputs(photos=photos))


def test_what_cannot_work_is_said(gen):
    assert methods.get("labels4free") is Labels4Free
    with pytest.raises(UsageError, match=r"StyleGAN2.*segmentation_in_style"):
        SHORT.fit(tiny_dcgan())
    for settings, said in (
        ({"stage": "3x3"}, "expected auto"), ({"batch": 6}, "multiple of 4"),
        ({"threshold": 2.0}, "from 0 to 1"), ({"steps": 0}, "at least 1"),
        ({"least_foreground": 0.7, "least_background": 0.7}, "over 1 together"),
        ({"d_width": 0.0}, "above 0"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            replace(SHORT, **settings).fit(gen)
    with pytest.raises(UsageError, match="scratch"):
        replace(SHORT, discriminator="own").fit(
            gen, inputs=Inputs(photos=np.zeros((4, 16, 16, 3), np.uint8))
        )


def test_recipes_are_settings():
    for name, settings in RECIPES.items():
        assert Labels4Free(**settings).quirk, name
        assert Labels4Free(**settings).least_frame == 0, name


def _judged(gen, monkeypatch, inside):
    """What `judge` says of masks that are `inside` [16 16]; the features are 1 within a box of
    their own, a bit of noise elsewhere.
    """
    rng = np.random.default_rng(5)
    truth = np.zeros((16, 16), np.float32)
    truth[4:, 4:12] = 1

    def fake(gen, seeds, body, **_):
        n = len(seeds)
        images = jnp.zeros((n, 16, 16, 3))
        x = jnp.asarray(
            truth[None, :, :, None] + 0.2 * rng.standard_normal((n, 16, 16, 2)), jnp.float32
        )

        class Still:
            def map(self, z, psi):
                return z

            def synthesize(self, w, noise, taps):
                return images, dict.fromkeys(taps, x)

        alpha = jnp.broadcast_to(jnp.asarray(inside, jnp.float32), (n, 16, 16))
        with monkeypatch.context() as patch:
            patch.setattr(checks, "mask", lambda *_: alpha)
            if body is checks.separated:
                yield checks.separated(
                    Still(), jnp.zeros((n, 4)), jnp.float32(0.7), {}, taps=("16x16",)
                )
            else:
                yield alpha, alpha

    monkeypatch.setattr(checks, "collect", lambda *given, **named: next(fake(*given, **named)))
    return checks.judge(gen, {}, list(range(4)), 0.7)


def test_masks_that_tell_less_than_a_box_are_wrong(gen, monkeypatch):
    box = np.zeros((16, 16))
    box[4:, 4:12] = 1
    right = _judged(gen, monkeypatch, box)
    assert right["separation"] > right["boxed"] and right["on_frame"] > 1.5
    assert np.isclose(right["score"], right["separation"] * right["stability"])
    elsewhere = np.ones((16, 16))
    elsewhere[:3, :] = 0  # a ground at the frame, which misses what the features show
    wrong = _judged(gen, monkeypatch, elsewhere)
    assert wrong["on_frame"] > 1.5 and wrong["separation"] < wrong["boxed"]
    assert np.isclose(wrong["score"], wrong["separation"] * wrong["stability"] - checks.WRONG_SIDE)
    inside_out = _judged(gen, monkeypatch, 1 - box)
    assert (
        np.isclose(inside_out["separation"], right["separation"], rtol=0.05)
        and inside_out["score"] < 0
    )


def test_a_ground_that_is_always_dark_does_not_concord():
    a = np.random.default_rng(0).normal(0, 0.5, (500, 3))
    assert np.isclose(checks.concordance(a, a), 1)
    assert np.isclose(
        checks.concordance(a, 0.2 * a), 2 * 0.2 / (1 + 0.2**2), atol=0.02
    )  # where a correlation would be 1
    assert checks.concordance(a, a - 1) < 0.5


def test_stage_is_found(gen):
    assert checks.find_stage(gen, 0.7, n=8) in nets.stages(16)
