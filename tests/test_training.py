"""One training step (`training/gan.py`): losses by hand, one and several devices, moving averages,
precision.

Gradients of R1 and path length against the reference are in `test_stylegan2.py`.
"""

from functools import partial

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sis_jax import parallel
from sis_jax.models.discriminator import Discriminator, DiscriminatorConfig
from sis_jax.models.stylegan2 import GeneratorConfig, StyleGAN2, channel_table
from sis_jax.ops import plan
from sis_jax.training import gan as training
from sis_jax.training import generator_loop

pytestmark = pytest.mark.integration

RECIPE = training.Recipe(r1_gamma=0.5)
BATCH, SIDE = 8, 8
PHASES = ("g_main", "g_regularise", "d_main", "d_regularise")


@pytest.fixture(scope="module")
def networks():
    return fakes.tiny_stylegan2(SIDE, channels=4, latent=4), fakes.tiny_discriminator(
        SIDE, channels=4
    )


@pytest.fixture(scope="module")
def start(networks):
    return training.new_state(*networks, RECIPE)


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def step(start, photos):
    """run(phase, ...) -> (new state, measured), compiled once per phase, number of devices and
    augmentation.
    """
    g_graph, d_graph, state = start

    def run(
        phase,
        devices=1,
        augmented=False,
        seed=0,
        recipe=RECIPE,
        state=state,
        photos=photos,
        at_once=None,
    ):
        static = {} if phase == "g_regularise" else {"augmented": augmented}
        body = getattr(training, phase)
        mapped = parallel.map_devices(
            body,
            (None, None, 0),
            None,
            devices=devices,
            graphs=(g_graph, d_graph),
            recipe=recipe,
            at_once=at_once,
            **static,
        )
        return jax.tree.map(
            np.asarray, mapped(state, jax.random.key(seed), parallel.shard(photos, devices)[0])
        )

    return run


def changed(a, b):
    """Top-level keys under which something differs."""
    return {
        key
        for key in a
        if any(
            not np.array_equal(x, y)
            for x, y in zip(jax.tree.leaves(a[key]), jax.tree.leaves(b[key]))
        )
    }


EXPECTED = {
    "g_main": ({"g", "opt_g", "buffers"}, {"loss_g"}),
    "g_regularise": ({"g", "opt_g", "path_mean"}, {"path_length"}),
    "d_main": ({"d", "opt_d", "buffers"}, {"loss_d", "score_fake", "score_real", "sign_real"}),
    "d_regularise": ({"d", "opt_d"}, {"r1"}),
}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_phases(start, step, phase, devices):
    """Each phase moves its own network, the generator's or the discriminator's, and nothing else;
    everything stays finite.
    """
    before = jax.tree.map(np.asarray, start[2])
    after, measured = step(phase, devices)
    touched, names = EXPECTED[phase]
    assert changed(before, after) == touched and set(measured) == names
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, measured)))
    assert jax.tree.structure(before) == jax.tree.structure(after)


def test_with_augmentation(step, start):
    state = start[2] | {"augment": jnp.float32(1.0)}
    plain, augmented = (step("d_main", state=state, augmented=a)[1] for a in (False, True))
    assert all(np.isfinite(v) for v in augmented.values()) and plain != augmented


def test_path_length_does_not_depend_on_devices_much(step):
    """No discriminator and no batch statistics in it; only the noise of each device's share is
    drawn by device.
    """
    one, two = (float(step("g_regularise", devices)[1]["path_length"]) for devices in (1, 2))
    assert one == pytest.approx(two, rel=0.5) and one > 0


def test_r1_does_not_depend_on_devices(step, photos):
    """With every photo the same, batch statistics are equal on any device, and so is the
    penalty.
    """
    same = np.repeat(photos[:1], BATCH, 0)
    one, two = (float(step("d_regularise", devices, photos=same)[1]["r1"]) for devices in (1, 2))
    assert one == pytest.approx(two, rel=1e-4)


def test_losses_by_hand(networks, start, step, photos):
    """The discriminator's loss on photos, and R1, from the network itself."""
    _, disc = networks
    real = jnp.asarray(photos, jnp.float32) / 127.5 - 1
    scores = np.asarray(disc(real))[:, 0]
    measured = step("d_main")[1]
    np.testing.assert_allclose(measured["score_real"], scores.mean(), rtol=1e-4)
    np.testing.assert_allclose(measured["sign_real"], np.sign(scores).mean())
    slope = np.asarray(jax.grad(lambda x: disc.score(x).sum())(real))
    expected = (slope.astype(np.float64) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(training.r1_penalty(disc, real), expected, rtol=1e-4)
    np.testing.assert_allclose(step("d_regularise")[1]["r1"], expected.mean(), rtol=1e-4)


def test_r1_by_finite_differences(networks, photos):
    """|grad|^2 is the squared slope along the gradient."""
    _, disc = networks
    real = jnp.asarray(photos[:1], jnp.float32) / 127.5 - 1
    penalty = float(training.r1_penalty(disc, real)[0])
    slope = jax.grad(lambda x: disc.score(x).sum())(real)
    way = slope / jnp.linalg.norm(slope.ravel())
    steep = (disc.score(real + 1e-2 * way) - disc.score(real - 1e-2 * way)) / 2e-2
    assert float(steep[0, 0]) ** 2 == pytest.approx(penalty, rel=0.02)


def test_path_lengths_by_hand(networks):
    """J^T y by moving every coordinate of every slot of w a little."""
    gen, _ = networks
    ws = gen.map(gen.latents([0, 1]))
    y = (
        jnp.asarray(np.random.default_rng(0).standard_normal((2, SIDE, SIDE, 3)), jnp.float32)
        / SIDE
    )
    lengths = training.path_lengths(gen, ws, y)
    _, slots, width = ws.shape
    moves = 1e-2 * jnp.eye(slots * width).reshape(-1, slots, width)
    images = np.asarray(gen.synthesize(ws[1] + jnp.concatenate([moves, -moves]))[0], np.float64)
    forward, backward = np.split((images * np.asarray(y[1])).sum((1, 2, 3)), 2)
    product = ((forward - backward) / 2e-2).reshape(slots, width)
    np.testing.assert_allclose(lengths[1], np.sqrt((product**2).sum(1).mean()), rtol=5e-3)


def test_the_generator_learns_to_please(start, step):
    """Many G steps against a fixed discriminator lower its loss; many D steps lower that of D."""
    state = start[2]
    losses = []
    for seed in range(25):
        state, measured = step("g_main", seed=seed, state=state)
        losses.append(float(measured["loss_g"]))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    state, losses = start[2], []
    for seed in range(25):
        state, measured = step("d_main", seed=seed, state=state)
        losses.append(float(measured["loss_d"]))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_average_w_follows_the_mapping(networks, start, step):
    gen, _ = networks
    before = np.asarray(start[2]["buffers"]["mapping"]["w_avg"])
    after = step("d_main")[0]["buffers"]["mapping"]["w_avg"]
    moved = (after - before) / (1 - training.W_AVG_DECAY) + before  # the mean w of the batch
    typical = np.asarray(gen.mapping(gen.latents(range(500))))
    assert np.abs(moved - typical.mean(0)).max() < 6 * typical.std(0).max() / np.sqrt(BATCH)
    assert np.abs(after - before).max() > 0


def test_samples_of_a_step_differ_and_repeat(step):
    a, b, c = (step("d_main", seed=s)[1]["score_fake"] for s in (0, 0, 1))
    assert a == b != c


def test_half_precision(step):
    """Convolutions in bfloat16, second derivatives included; weights and their averages stay in
    float32.
    """
    after, measured = step("d_regularise", recipe=training.Recipe(r1_gamma=0.5, dtype="bfloat16"))
    full = step("d_regularise")[1]["r1"]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(after["d"]))
    assert measured["r1"] != full and measured["r1"] == pytest.approx(full, rel=0.1)


def test_ema_decay():
    recipe = training.Recipe(ema_images=1000.0, ema_rampup=0.05)
    assert training.ema_decay(recipe, 32, 10**9) == pytest.approx(0.5 ** (32 / 1000))
    assert training.ema_decay(recipe, 32, 6400) == pytest.approx(
        0.5 ** (32 / 320)
    )  # a young run: half-life 5 % of what was seen
    assert training.ema_decay(recipe, 32, 0) == 0
    late = training.Recipe(ema_images=1000.0, ema_rampup=None)
    assert training.ema_decay(late, 1000, 10) == pytest.approx(0.5)
    halved = training.average(
        {"a": np.ones(2)}, {"a": np.zeros(2)}, jnp.float32(training.ema_decay(late, 1000, 10))
    )
    np.testing.assert_allclose(halved["a"], 0.5)
    np.testing.assert_allclose(
        training.average({"a": np.ones(2)}, {"a": np.full(2, 3.0)}, jnp.float32(0))["a"], 3
    )


def test_lazy_regularisation_corrects_adam():
    """c = k / (k + 1) on the learning rate and the exponent of beta2 (section 3.1 of StyleGAN2)."""
    grads, params = {"w": jnp.asarray([1.0, -2.0])}, {"w": jnp.zeros(2)}
    for interval, c in ((None, 1.0), (16, 16 / 17), (4, 0.8)):
        adam = training.optimizer(RECIPE, interval)
        state = adam.init(params)
        first, state = adam.update(grads, state)
        np.testing.assert_allclose(first["w"], -0.0025 * c * np.sign(grads["w"]), rtol=1e-5)
        second, _ = adam.update({"w": jnp.asarray([3.0, 0.0])}, state)
        b2 = 0.99**c
        v = (b2 * (1 - b2) * 1 + (1 - b2) * 9) / (1 - b2**2)
        np.testing.assert_allclose(second["w"], [-0.0025 * c * 3 / np.sqrt(v), 0], rtol=1e-4)


def test_no_correction_where_nothing_is_lazy():
    off = training.optimizers(training.Recipe(path_length=0.0))[0]
    on = training.optimizers(training.Recipe(path_length=2.0))[0]
    grads, params = {"w": jnp.ones(1)}, {"w": jnp.zeros(1)}
    steps = [float(o.update(grads, o.init(params))[0]["w"][0]) for o in (off, on)]
    assert steps[0] == pytest.approx(-0.0025, rel=1e-4) and steps[1] == pytest.approx(
        -0.002, rel=1e-4
    )


def test_gamma_rule():
    assert training.r1_gamma_for(64, 32) == pytest.approx(0.0002 * 4096 / 32)


def test_split_and_join(networks):
    gen, disc = networks
    images = gen.sample([3, 4, 5, 6]).images
    (graph, params, rest), (d_graph, d_params, d_rest) = training.split(gen), training.split(disc)
    assert (
        training.count(params) > 500 < training.count(d_params)
        and d_rest == {}
        and "w_avg" in rest["mapping"]
    )
    assert np.array_equal(training.join(graph, params, rest).sample([3, 4, 5, 6]).images, images)
    assert np.array_equal(training.join(d_graph, d_params, d_rest)(images), disc(images))


def test_nan_gradients_do_not_enter_the_weights(start, step):
    """A single bad batch (infinite scores) is replaced by zeros and large finite numbers, as in the
    published code.
    """
    d = jax.tree.map(lambda a: a, start[2]["d"])
    d["b4"]["out"]["bias"] = jnp.full_like(d["b4"]["out"]["bias"], jnp.nan)
    after, measured = step("g_main", state=start[2] | {"d": d})
    assert np.isnan(measured["loss_g"]) and all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves(after["g"])
    )


def test_large_layers_one_image_after_another_change_nothing(monkeypatch):
    """Images, scores and the gradients through both are those of all images together."""
    gen, disc = fakes.tiny_stylegan2(16, 4, 4), fakes.tiny_discriminator(16, 4)
    ws = gen.map(gen.latents(range(4)))
    g_graph, g, rest = training.split(gen)

    def score(params, ws):
        images = training.rendered(training.join(g_graph, params, rest), ws)
        return disc.score(images).sum() + jnp.square(images).mean()

    together = jax.jit(jax.value_and_grad(score, (0, 1)))(g, ws)
    for module in ("training.gan", "models.discriminator"):
        monkeypatch.setattr(f"sis_jax.{module}.ONE_BY_ONE", 8)
    jax.clear_caches()
    apart = jax.jit(jax.value_and_grad(score, (0, 1)))(g, ws)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max()) + 1e-7)
    noisy = training.rendered(gen, ws, "random", jax.random.key(0))
    assert noisy.shape == (4, 16, 16, 3) and len(np.unique(noisy[:, 0, 0, 0])) == 4


def test_a_step_at_1024_pixels_fits_into_a_laptop():
    """Counted on shapes alone: four images, config-F."""
    channels = channel_table(1024, 32768, 512)
    shape = GeneratorConfig(1024, channels)
    gen, disc = (
        nnx.eval_shape(lambda: StyleGAN2(shape)),
        nnx.eval_shape(lambda: Discriminator(DiscriminatorConfig(1024, channels))),
    )
    g_graph, g, rest = training.split(gen)
    d_graph, d, _ = training.split(disc)

    def loss(both, rest, ws):
        images = training.rendered(training.join(g_graph, both[0], rest), ws)
        return training.join(d_graph, both[1], {}).score(images).sum()

    ws = jax.ShapeDtypeStruct((4, 18, 512), jnp.float32)
    assert plan.bytes_of(jax.grad(loss), (g, d), rest, ws) < 4e9


def test_a_gradient_in_groups_is_that_of_the_batch():
    """Also where the discriminator compares images: groups are those that it compares."""
    disc = fakes.tiny_discriminator(16, 4)
    graph, params, _ = training.split(disc)
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))

    def loss(params, rows):
        some = images if rows is None else images[rows]
        scores = training.join(graph, params, {}).score(some)
        return jax.nn.softplus(scores).mean(), scores.mean()

    whole, apart = (training._gradient(loss, params, 8, at_once) for at_once in (None, 4))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("phase", PHASES)
def test_memory_of_large_images_does_not_grow_with_the_batch(networks, phase):
    """Counted on shapes alone."""
    gen, disc = networks
    g_graph, d_graph, state = training.new_state(gen, disc, training.Recipe())
    static = {} if phase == "g_regularise" else {"augmented": False}

    def needed(n, at_once):
        body = partial(
            getattr(training, phase), graphs=(g_graph, d_graph), recipe=training.Recipe(),
            at_once=at_once, **static,
        )  # fmt: skip
        images = np.zeros((n, gen.resolution, gen.resolution, 3), np.uint8)
        return plan.bytes_of(body, state, jax.random.key(0), images)

    assert needed(32, 4) < 1.5 * needed(4, 4) < needed(32, None)
    assert training.images_at_once(gen, "cpu") is None


@pytest.mark.parametrize("devices", [1, 2])
def test_the_discriminator_learns_the_same_in_groups(step, photos, devices):
    """R1 and its gradient draw nothing: those of the whole batch, on any number of devices."""
    twice = np.concatenate([photos, photos[::-1]] * devices)
    whole, apart = (
        step("d_regularise", devices, photos=twice, at_once=at_once) for at_once in (None, 4)
    )
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a device's memory is another one")
def test_memory_is_given_back_between_the_phases_of_large_images(networks, start, monkeypatch):
    given = []
    monkeypatch.setattr(plan, "give_back", lambda: given.append(1))
    generator_loop.settle(start[2], networks[0])
    assert not given
    monkeypatch.setattr(generator_loop, "ONE_BY_ONE", SIDE)
    generator_loop.settle(start[2], networks[0])
    assert given == [1]
