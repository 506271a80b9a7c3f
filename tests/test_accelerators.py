"""What holds on GPUs and TPUs, by programs that are lowered for them and never run."""

import gc
import runpy
import weakref
from functools import partial
from pathlib import Path

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import sis_jax
from sis_jax import parallel
from sis_jax.models import layers, lpips, students
from sis_jax.ops import convolution, crf
from sis_jax.ops.sampling import image_only, map_samples
from sis_jax.training import gan

pytestmark = pytest.mark.integration


def lowered(function, *arguments, platform="cuda"):
    """The program of a platform that need not be here."""
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def images(*shape):
    return jax.ShapeDtypeStruct((*shape, 3), np.float32)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


# gradients: in a fixed order, and not one pixel after another


def gradient_of(network, x):
    graph, state = nnx.split(network)
    return lowered(jax.grad(lambda s, x: nnx.merge(graph, s)(x, {})[0].sum()), state, x)


@pytest.mark.parametrize("arch", ["unet-small", "unet", "unet-resnet18", "deeplabv3-resnet18"])
def test_gradients_of_students_scatter_nothing(arch):
    network = jax.eval_shape(lambda: students.build(students.StudentConfig(arch, 3)))
    assert "scatter" not in gradient_of(network, images(2, 64, 64))


def test_the_gradient_of_lpips_scatters_nothing():
    widths = [(i, o) for first, *rest in lpips.BLOCKS for i, o in zip((first, *rest), rest)]

    def shape(*s):
        return jax.ShapeDtypeStruct(s, np.float32)

    net = lpips.LPIPS(
        tuple(shape(3, 3, i, o) for i, o in widths),
        tuple(shape(o) for _, o in widths),
        tuple(shape(block[-1]) for block in lpips.BLOCKS),
    )
    loss = jax.grad(lambda x, net: sum(m.sum() for m in lpips.lpips_maps(net, x)))
    assert "scatter" not in lowered(loss, images(1, 512, 512), net)


@pytest.mark.parametrize("phase", [gan.g_main, gan.g_regularise, gan.d_main, gan.d_regularise])
def test_steps_of_a_generator_scatter_in_its_augmentation_only(phase):
    recipe = gan.Recipe()
    gen, disc = fakes.tiny_stylegan2(8), fakes.tiny_discriminator(8)
    g_graph, d_graph, state = gan.new_state(gen, disc, recipe)
    fixed = {"graphs": (g_graph, d_graph), "recipe": recipe}
    fixed |= {} if phase is gan.g_regularise else {"augmented": False}
    real = jax.ShapeDtypeStruct((4, 8, 8, 3), np.uint8)
    assert "scatter" not in lowered(partial(phase, **fixed), state, jax.random.key(0), real)


@pytest.mark.parametrize("size, pad", [(2, 0), (3, 1), (3, 0)])
@pytest.mark.parametrize("side", [8, 9])
def test_the_largest_of_windows(size, pad, side):
    x = normal(2, side, side, 5)

    def textbook(x):
        around = ((0, 0), (pad, pad), (pad, pad), (0, 0))
        window = (1, size, size, 1), (1, 2, 2, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, *window, around)

    expected, back = jax.vjp(textbook, x)
    found, ours = jax.vjp(partial(layers.max_pool, size=size, pad=pad), x)
    g = normal(*expected.shape, seed=1)
    assert np.array_equal(found, expected)
    np.testing.assert_allclose(ours(g)[0], back(g)[0], atol=1e-6)


# precision: products of float32 that decide what a seed draws


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_styles_and_demodulation_are_float32(platform):
    gen = fakes.tiny_stylegan2(8)

    def styles(gen, z):
        return gen.synthesis.styles(gen.mapping(z)[:, None].repeat(gen.num_ws, 1))

    text = lowered(styles, gen, jnp.zeros((2, 8)), platform=platform)
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2 + 5 and all("HIGHEST" in line for line in products)
    conv = partial(convolution.modulated_conv, up=True)
    given = normal(2, 4, 4, 8), normal(3, 3, 8, 6), normal(2, 8)
    text = lowered(conv, *given, platform=platform)
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("HIGHEST" in line for line in products)


# the up-convolution: one dense convolution where it is bound by memory


def up(form, x, kernel, g):
    y, back = jax.vjp(form, x, kernel)
    return y, *back(g)


def test_the_folded_convolution_is_the_one_by_phase():
    x, kernel, g = normal(2, 6, 7, 5), normal(3, 3, 5, 4, seed=1), normal(2, 12, 14, 4, seed=2)

    def second(form):
        return jax.grad(lambda x, k: sum(jnp.square(a).sum() for a in up(form, x, k, g)), (0, 1))

    def all_of(form):
        return up(form, x, kernel, g) + second(form)(x, kernel)

    folded = jax.jit(lambda: all_of(convolution.conv_up_folded))()
    for found, expected in zip(folded, jax.jit(lambda: all_of(convolution.conv_up_by_phase))()):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * jnp.abs(expected).max())


@pytest.mark.parametrize("channels, platform, count", [
    (64, "cuda", 1), (64, "tpu", 1), (64, "cpu", 4), (512, "cuda", 4),
])  # fmt: skip
def test_each_platform_has_its_form(channels, platform, count):
    x = jax.ShapeDtypeStruct((1, 8, 8, channels), np.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, channels, 8), np.float32)
    text = lowered(convolution.conv_up, x, kernel, platform=platform)
    assert text.count("stablehlo.convolution") == count


def test_folding_saves_memory():
    x, kernel = jnp.zeros((1, 64, 64, 16)), jnp.zeros((3, 3, 16, 8))
    by_phase, folded = (
        jax.jit(form).lower(x, kernel).compile().memory_analysis().temp_size_in_bytes
        for form in (convolution.conv_up_by_phase, convolution.conv_up_folded)
    )
    assert folded < 0.8 * by_phase


# what crosses the border of a device


def test_images_leave_the_device_as_uint8_and_weights_are_sent_once(monkeypatch):
    gen, seen, usual = fakes.tiny_stylegan2(8), [], parallel.map_devices

    def watched(*args, **kwargs):
        run = usual(*args, **kwargs)

        def call(everywhere, *rest):
            out = run(everywhere, *rest)
            seen.append((everywhere, rest[2:], out))
            return out

        return call

    monkeypatch.setattr(parallel, "map_devices", watched)
    shared = (np.ones(3, np.float32),)
    list(map_samples(gen, range(12), shown_with, batch=2, devices=2, shared=shared))
    assert len(seen) == 3
    for weights, rest, out in seen:
        leaves = jax.tree.leaves((weights, rest))
        assert all(a.sharding.is_fully_replicated and len(a.devices()) == 2 for a in leaves)
        assert out.dtype == np.uint8
    first, last = (jax.tree.leaves(weights)[0] for weights, *_ in (seen[0], seen[-1]))
    assert first is last


def shown_with(gen, z, truncation, one):
    return image_only(gen, z, truncation * one[0])


def test_a_text_model_reads_on_every_device_to_the_same_bits(monkeypatch):
    clip, here, used = sis_jax.load_clip("faces-clip"), parallel.local_devices, []
    side, mapped = clip.config.vision.image_size, parallel.map_devices

    def watched(*args, devices, **kwargs):
        used.append(len(devices))
        return mapped(*args, devices=devices, **kwargs)

    monkeypatch.setattr(parallel, "map_devices", watched)
    pixels = np.asarray(normal(19, side, side, 3))
    many = clip.encode_image(pixels, batch=4)
    monkeypatch.setattr(parallel, "local_devices", lambda devices=None: here(devices or 1))
    assert np.array_equal(clip.encode_image(pixels, batch=4), many) and used == [5, 1]


def test_no_cache_keeps_a_generator():
    gen = fakes.tiny_stylegan2(8)
    kept = [weakref.ref(a) for a in jax.tree.leaves(gen)]
    list(map_samples(gen, range(2), image_only, devices=1))
    del gen
    gc.collect()
    assert not [a for a in kept if a() is not None]


def test_the_two_largest_are_found_without_a_sort():
    x = jnp.concatenate([normal(4, 5, 6), jnp.ones((4, 1, 6))], 1)
    two = lax.top_k(x, 2)[0]
    for first, second in (crf._masked_two(x, x.argmax(-1)), crf.largest_two(x)[1:]):
        assert np.array_equal(first, two[..., 0]) and np.array_equal(second, two[..., 1])
    small = (jax.ShapeDtypeStruct((2, 64, 64, 5), np.float32), images(2, 64, 64))
    text = lowered(crf.best, *small)
    assert "stablehlo.sort" not in text and "top_k" not in text


@pytest.mark.slow
def test_the_page_has_the_table_that_the_script_prints(capsys):
    root = Path(__file__).parents[1]
    runpy.run_path(str(root / "scripts/plan_table.py"), run_name="__main__")
    assert capsys.readouterr().out in (root / "docs/accelerators.md").read_text("utf-8")
