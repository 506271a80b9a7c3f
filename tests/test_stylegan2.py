"""StyleGAN2 against the reference implementations: every block, truncation, noise, discriminator,
regularisers; and what the protocol promises.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sis_jax
from sis_jax.checkpoints.layouts.tables import TABLES, translate
from sis_jax.types import Generator, UsageError

FILES = {
    "ada16": "ada16.pkl",
    "tf32": "tf32.pkl",
    "ros16_legacy": "ros16_legacy.pt",
    "ros32_zip": "ros32_zip.pt",
}
TOLERANCE = 5e-5


def arrays(path):
    return {key: jnp.asarray(value) for key, value in np.load(path).items()}


@pytest.fixture(scope="module")
def networks(goldens, tmp_path_factory):
    """name -> (generator, discriminator or None, expected arrays), each straight from the foreign
    file.
    """
    old = os.environ.get("SIS_JAX_CONVERTED")
    os.environ["SIS_JAX_CONVERTED"] = str(tmp_path_factory.mktemp("cache"))
    made = {}
    for name, file in FILES.items():
        path = goldens / "gan" / file
        disc = None if name == "ros32_zip" else sis_jax.load_discriminator(path)
        made[name] = (sis_jax.load_generator(path), disc, arrays(goldens / "gan" / f"{name}.npz"))
    made["ros32_zip"][2].update({k: v for k, v in made["tf32"][2].items() if k.startswith("feat")})
    os.environ.pop("SIS_JAX_CONVERTED")
    if old is not None:
        os.environ["SIS_JAX_CONVERTED"] = old
    return made


def close(ours, expected, tolerance=TOLERANCE):
    expected = np.asarray(expected)
    assert ours.shape == expected.shape
    worst = np.abs(np.asarray(ours, np.float32) - expected).max()
    assert worst <= tolerance * max(1, np.abs(expected).max()), f"largest error {worst}"


@pytest.mark.parametrize("name", FILES)
def test_mapping_and_truncation(networks, name):
    gen, _, z = networks[name]
    close(gen.map(z["z"]), z["ws"])
    close(gen.map(z["z"], 0.7), z["ws_psi0.7"])
    if "truncation_cutoff" in z:
        close(gen.map(z["z"], 0.7, int(z["truncation_cutoff"])), z["ws_psi0.7_cutoff"])
        assert not np.allclose(gen.map(z["z"], 0.7), z["ws_psi0.7_cutoff"], atol=1e-3)
    assert gen.config.mapping_layers == int(z["num_mapping_layers"])


@pytest.mark.parametrize("name", FILES)
def test_every_block(networks, name):
    gen, _, z = networks[name]
    image, features = gen.synthesize(z["ws_psi0.7"], taps=gen.taps)
    close(image, z["image_psi0.7"])
    checked = 0
    for key, expected in z.items():
        if key.startswith("feat_psi0.7/") and not key.endswith(".img"):
            block, layer = key.split("/")[1].split(".")
            close(features[f"{block[1:]}x{block[1:]}/{layer}"][:1], expected)
            checked += 1
    assert checked == gen.num_ws - 1
    for r in (4, 8, gen.resolution):
        assert np.array_equal(features[f"{r}x{r}"], features[f"{r}x{r}/conv1"])


@pytest.mark.parametrize("name", FILES)
def test_image(networks, name):
    gen, _, z = networks[name]
    image, _ = gen.synthesize(z["ws"])
    close(image, z["image"])
    if "image_no_noise" in z:
        silent, _ = gen.synthesize(z["ws"][:1], noise="none")
        close(silent, z["image_no_noise"])
    if "image_psi0.7_cutoff" in z:
        cut, _ = gen.synthesize(z["ws_psi0.7_cutoff"][:1])
        close(cut, z["image_psi0.7_cutoff"])


def test_kinds_of_noise(networks):
    gen, _, z = networks["ada16"]
    image, _ = gen.synthesize(z["ws"])
    silent, _ = gen.synthesize(z["ws"], noise="none")
    random, _ = gen.synthesize(z["ws"], noise="random", key=jax.random.key(1))
    again, _ = gen.synthesize(z["ws"], noise="random", key=jax.random.key(1))
    assert np.array_equal(random, again)
    assert np.abs(random - image).max() > 1e-2 < np.abs(silent - image).max()


@pytest.mark.parametrize("name", [n for n in FILES if n != "ros32_zip"])
def test_discriminator(networks, name):
    _, disc, z = networks[name]
    close(disc(z["d_input"]), z["d_scores_batch4"])
    close(jnp.concatenate([disc(z["d_input"][i : i + 1]) for i in range(4)]), z["d_scores_single"])
    if "d_scores_image_psi0.7" in z:
        close(disc(z["image_psi0.7"]), z["d_scores_image_psi0.7"])


def test_two_code_bases_agree(networks):
    """The same network, saved by NVIDIA's TensorFlow code and by rosinality's."""
    (tf, _, z), (ros, _, _) = networks["tf32"], networks["ros32_zip"]
    a, _ = tf.synthesize(tf.map(z["z"]))
    b, _ = ros.synthesize(ros.map(z["z"]))
    close(a, b)


def test_latent_spaces_agree(networks):
    """w per image and w per layer draw the same image."""
    gen, _, z = networks["tf32"]
    w = z["ws"]
    image, _ = gen.synthesize(w)
    single, _ = gen.synthesize(w[:, 0])
    close(single, image, 1e-6)


def test_bfloat16_is_near_float32(networks):
    gen, _, z = networks["tf32"]
    image, full = gen.synthesize(z["ws"], taps=("32x32",))
    half, features = gen.synthesize(z["ws"], taps=("32x32",), dtype="bfloat16")
    assert (
        features["32x32"].dtype == jnp.bfloat16
        and half.dtype == jnp.float32
        and full["32x32"].dtype == jnp.float32
    )
    error = np.abs(np.asarray(half - image))
    assert (
        0 < error.mean() < 0.02 * np.abs(image).mean() and error.max() < 0.1 * np.abs(image).max()
    )


def test_compiled_equals_eager(networks):
    gen, disc, z = networks["ada16"]
    image, features = gen.synthesize(z["ws"], taps=("8x8",))
    score = disc(z["d_input"])
    with jax.disable_jit():
        eager, eager_features = gen.synthesize(z["ws"], taps=("8x8",))
        eager_score = disc(z["d_input"])
    close(image, eager, 1e-5)
    close(features["8x8"], eager_features["8x8"], 1e-5)
    close(score, eager_score, 1e-5)


def test_protocol(networks):
    gen, _, _ = networks["ada16"]
    assert isinstance(gen, Generator)
    samples = gen.sample([3, 5], truncation=0.7, taps=("8x8",))
    assert (
        samples.images.shape == (2, 16, 16, 3)
        and samples.w.shape == (2, gen.num_ws, 16)
        and list(samples.features) == ["8x8"]
    )
    alone = gen.sample([5], truncation=0.7)
    close(samples.images[1:], alone.images, 1e-5)
    for wrong in (
        lambda: gen.synthesize(jnp.zeros((1, 3, 16))),
        lambda: gen.map(jnp.zeros((1, 7))),
        lambda: gen.synthesize(jnp.zeros((1, 16)), taps=("32x32",)),
        lambda: gen.synthesize(jnp.zeros((1, 16)), noise="random"),
    ):
        with pytest.raises(UsageError):
            wrong()


# Regularisers: first and second order through D and G


@pytest.fixture(scope="module")
def grads(goldens):
    return arrays(goldens / "gan" / "ada16_grads.npz")


def near(ours, expected):
    """1e-5 absolute plus 1e-4 relative, as measured between the references."""
    np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), rtol=1e-4, atol=1e-5)


def parameter_gradients(state, expected, prefix, network):
    """Our gradients against those in the file, which keep other names and orientation; parameters
    that are not there must have none.
    """
    theirs, wrong = translate(
        {
            k.removeprefix(prefix): np.asarray(v)
            for k, v in expected.items()
            if k.startswith(prefix)
        },
        TABLES["ada", network],
    )
    assert not wrong
    ours = {
        ".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)
    }
    assert len(theirs) > 10 and set(theirs) <= set(ours)
    for key, value in ours.items():
        near(value, theirs.get(key, np.zeros_like(value)))


def test_r1(networks, grads):
    _, disc, _ = networks["ada16"]
    graph, params = nnx.split(disc)
    gamma = float(grads["r1/gamma"])

    def input_gradient(params, x):
        return jax.grad(lambda x: nnx.merge(graph, params).score(x).sum())(x)

    def loss(params):
        penalty = jnp.sum(jnp.square(input_gradient(params, grads["r1/real"])), axis=(1, 2, 3))
        return jnp.mean(gamma / 2 * penalty), penalty

    near(jax.jit(input_gradient)(params, grads["r1/real"]), grads["r1/grad_x"])
    (value, penalty), second = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    near(penalty, grads["r1/penalty_per_image"])
    near(penalty.mean(), grads["r1/penalty_mean"])
    near(value, grads["r1/loss_half_gamma_mean"])
    parameter_gradients(second, grads, "r1/dloss_dparam/", "discriminator")


def test_path_length(networks, grads):
    gen, _, _ = networks["ada16"]
    graph, params, rest = nnx.split(gen, nnx.Param, ...)
    y = grads["pl/y_unit_normal"] / gen.resolution

    def jacobian(params, ws):
        def projected(ws):
            net = nnx.merge(graph, params, rest).synthesis
            return jnp.sum(net(net.styles(ws))[0] * y)

        return jax.grad(projected)(ws)

    def loss(params):
        lengths = jnp.sqrt(
            jnp.sum(jnp.square(jacobian(params, grads["pl/ws"])), axis=2).mean(axis=1)
        )
        a = grads["pl/a_before"]
        a = a + 0.01 * (lengths.mean() - a)
        penalty = jnp.square(lengths - a)
        return jnp.mean(2 * penalty), (lengths, a, penalty)

    near(jax.jit(jacobian)(params, grads["pl/ws"]), grads["pl/J"])
    (value, (lengths, a, penalty)), second = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    near(lengths, grads["pl/lengths"])
    near(a, grads["pl/a_after"])
    near(penalty, grads["pl/penalty_per_image"])
    near(value, grads["pl/loss_weight2_mean"])
    parameter_gradients(second, grads, "pl/dloss_dparam/", "generator")


def test_a_picture_in_two_runs(networks):
    """To a slot and from it on is the whole network; other styles after the slot leave the first
    part as it is; random noise of one key too.
    """
    gen, _, z = networks["tf32"]
    w, other = jnp.asarray(z["ws"]), jnp.asarray(z["ws"])[::-1]
    image, features = gen.synthesize(w, taps=gen.taps)
    for first in range(1, gen.num_ws):
        stem = gen.stem(w, first)
        again, found = gen.synthesize_from(stem, w, first, taps=gen.taps_from(first))
        close(again, image, 1e-6)
        assert all(np.allclose(found[tap], features[tap], atol=1e-5) for tap in found)
        mixed, _ = gen.synthesize_from(stem, other, first)
        swapped, _ = gen.synthesize(jnp.concatenate([w[:, :first], other[:, first:]], axis=1))
        close(mixed, swapped, 1e-6)
    assert gen.taps_from(gen.num_ws - 1) == () and gen.taps_from(gen.num_ws - 2) == (
        "32x32",
        "32x32/conv1",
    )
    styles, key = gen.synthesis.styles(w), jax.random.key(3)
    stem, _ = gen.synthesis.advance(gen.synthesis.begin(len(w)), styles, "random", key, stop=4)
    (_, joined), _ = gen.synthesis.advance(stem, styles, "random", key, first=4)
    close(joined, gen.synthesize(w, noise="random", key=key)[0], 1e-6)
    for wrong in (0, gen.num_ws):
        with pytest.raises(UsageError, match=f"first is {wrong}, expected 1 to {gen.num_ws - 1}"):
            gen.stem(w, wrong)
    with pytest.raises(UsageError, match="w must be"):
        gen.stem(w[:, :3], 2)
    with pytest.raises(UsageError, match="has no tap '4x4'"):
        gen.synthesize_from(gen.stem(w, 4), w, 4, taps=("4x4",))
