"""`discover` at published size: the parts of a config-F network are those of the network in it."""

from dataclasses import replace
from functools import partial

import checkpoint_factory as factory
import config_f
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.optimize import linear_sum_assignment

import sis_jax
from sis_jax.checkpoints.build import arrays_of
from sis_jax.methods import latent_direction
from sis_jax.methods.base import OUTLINE, small_image
from sis_jax.methods.labels4free import Labels4Free
from sis_jax.methods.segmentation_in_style import SegmentationInStyle
from sis_jax.methods.style_mixing import StyleMixing
from sis_jax.ops import plan
from sis_jax.ops.sampling import collect
from sis_jax.ops.selection import overlap

METHOD = SegmentationInStyle(k=4, layer="32x32", n=4, n_init=3)


@pytest.fixture(scope="module")
def small():
    return sis_jax.load_generator()


@pytest.fixture(scope="module")
def expected(small):
    return labels_of(METHOD.fit(small), small)


def labels_of(fitted, gen):
    return np.concatenate([labels for _, labels, _ in fitted.label_seeds(gen, range(100, 104))])


def shrunk(labels, resolution, k):
    """The commonest cluster of each block of pixels."""
    n, factor = len(labels), labels.shape[1] // resolution
    blocks = labels.reshape(n, resolution, factor, resolution, factor)
    return np.eye(k)[blocks].sum((2, 4)).argmax(-1)


def same_pixels(a, b, k):
    """Share of pixels with the same cluster, clusters paired one to one."""
    table = overlap(a.ravel().astype(int), b.ravel().astype(int), k)
    return table[linear_sum_assignment(-table)].sum() / a.size


def written(layout, gen, path):
    arrays = arrays_of(gen)
    if layout == "rosinality":
        path.write_bytes(factory.torch_zip({"g_ema": factory.rosinality_generator(arrays)}))
    else:
        save_file(factory.ada_generator(arrays), path)
    return path


def loaded(layout, resolution, small, folder, monkeypatch):
    monkeypatch.setenv("SIS_JAX_CONVERTED", str(folder / "cache"))
    gen = config_f.embedded(resolution, small)
    return sis_jax.load_generator(written(layout, gen, folder / "network"))


@pytest.mark.parametrize(
    "layout, resolution",
    [
        ("rosinality", 128),
        ("ada", 256),
        pytest.param("rosinality", 1024, marks=pytest.mark.slow),
        pytest.param("ada", 1024, marks=pytest.mark.slow),
    ],
)
def test_same_parts(small, expected, tmp_path, monkeypatch, layout, resolution):
    gen = loaded(layout, resolution, small, tmp_path, monkeypatch)
    assert gen.resolution == resolution and gen.config.channels[:4] == (512,) * 4
    labels = labels_of(METHOD.fit(gen), gen)
    assert labels.shape == (4, resolution, resolution)
    assert same_pixels(shrunk(labels, 64, METHOD.k), expected, METHOD.k) >= 0.98


def test_it_draws_the_same_faces(small):
    gen = config_f.embedded(128, small)
    images = gen.sample(range(2)).images.reshape(2, 64, 2, 64, 2, 3).mean((2, 4))
    ours = small.sample(range(2)).images
    inner = np.abs(np.asarray(images) - np.asarray(ours))[:, 2:-2, 2:-2]
    assert inner.mean() < 0.03  # enlarging blurs, nothing else differs


def test_labels_need_no_layer_above_the_tap(small):
    """Parts of 1024 pixels are learned with the memory of the layers up to 64 pixels, and labelled
    at 128 with the image of that size.
    """
    gen, rows = config_f.embedded(1024, small), 1
    z, psi = np.zeros((rows, gen.z_dim), np.float32), 1.0

    def needed(*taps):
        return plan.bytes_of(lambda z: gen.synthesize(gen.map(z, psi), "const", taps)[1], z)

    def whole(z):
        return gen.synthesize(gen.map(z, psi))[0]

    assert needed("64x64") < plan.bytes_of(whole, z) / 8
    assert needed(f"{OUTLINE}x{OUTLINE}/rgb") < plan.bytes_of(whole, z) / 4


def test_the_image_at_a_resolution(small):
    """ "RxR/rgb" is the image as it is after the layers up to R pixels."""

    def body(gen, z, truncation):
        image, features = gen.synthesize(gen.map(z, truncation), "const", ("64x64/rgb",))
        return image, features["64x64/rgb"]

    image, own = collect(small, [0, 1], body)
    assert np.array_equal(image, own)
    gen = config_f.embedded(128, small)
    np.testing.assert_allclose(collect(gen, [0, 1], body)[1], image, atol=2e-4)


def test_the_layers_up_to_a_resolution_are_a_generator(small):
    """Its image is the one at that resolution; what is learned from it counts for the whole."""
    half, w = small.up_to(32), small.map(small.latents([3]))
    image, features = half.synthesize(w[:, : half.num_ws], taps=("16x16",))
    whole = small.synthesize(w, taps=("16x16", "32x32/rgb"))[1]
    assert half.resolution == 32 and small.up_to(64) is small
    np.testing.assert_allclose(image, whole["32x32/rgb"], atol=1e-5)
    np.testing.assert_allclose(features["16x16"], whole["16x16"], atol=1e-5)


def test_methods_learn_from_images_of_an_outline(small):
    """Counted on shapes: a search in 1024 pixels needs the memory of the layers it looks at."""
    gen, z, psi = config_f.embedded(1024, small), np.zeros((1, small.z_dim), np.float32), 1.0
    v = np.zeros((1, gen.z_dim), np.float32)
    static = {"signs": (1.0,), "space": "z", "prior": "center", "weights": (1.0, 1.0)}
    needed = [
        plan.rows_at_once(
            latent_direction._gradient_body,
            (None, 0, None, 0, None, None),
            (gen, z, psi, v, v, np.ones(1, np.float32)),
            "cpu",
            **static,
            small=name,
        )
        for name in (None, small_image(gen))
    ]
    assert needed[1][1] < needed[0][1] / 4
    drawn = jax.eval_shape(
        partial(
            latent_direction._difference_body, space="z", shift=1.0, signs=(1.0,),
            small=small_image(gen),
        ),
        gen, z, psi, {"directions": v, "scale": np.ones(1, np.float32)},
    )  # fmt: skip
    assert [a.shape for a in drawn[:2]] == [(1, 128, 128, 3), (1, 128, 128)]
    mixing = StyleMixing()._checked(gen)
    assert mixing._cut(gen).resolution == 256
    assert replace(mixing, slots=17)._cut(gen) is gen
    assert Labels4Free().trains_at(gen) == 128
    assert Labels4Free(discriminator="own").trains_at(gen) == 1024
