"""Backbones: every network's features against PyTorch, batch statistics frozen and trained, and the
depthwise convolution with its own derivatives. Files and names are in test_backbone_weights.py.
"""

from functools import partial

import backbone_kit as kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import sis_jax
from sis_jax import parallel
from sis_jax.checkpoints.build import build
from sis_jax.checkpoints.layouts import dinov2, efficientnet, resnet
from sis_jax.models import backbones, layers
from sis_jax.models.dinov2 import DINOv2
from sis_jax.ops.depthwise import depthwise_conv
from sis_jax.types import Info, UsageError


@pytest.fixture(scope="module")
def reference(goldens):
    """PyTorch's features, see goldens/backbones/recipe.py."""
    with np.load(goldens / "backbones" / "features.npz") as file:
        return dict(file)


def lite(size):
    arch, arrays = efficientnet.convert(kit.draw(kit.lite(size)), "efficientnet-lite", "drawn")
    assert arch == f"efficientnet-lite{size}"
    return build(lambda: backbones.build(arch), arrays, "drawn", Info())


def residual(depth):
    arch, arrays = resnet.convert(kit.draw(kit.resnet(depth)), "drawn")
    assert arch == f"resnet{depth}"
    return build(lambda: backbones.build(arch), arrays, "drawn", Info())


def transformer(registers):
    config, arrays = dinov2.convert(kit.draw(kit.dinov2(registers=registers)), "drawn")
    return build(lambda: DINOv2(config), arrays, "drawn", Info())


def large(*case):
    """Compiles for several seconds."""
    return pytest.param(*case, marks=pytest.mark.integration)


@pytest.mark.parametrize(
    "make, name, size",
    [
        (sis_jax.load_backbone, "shipped", kit.SIZE),
        (sis_jax.load_backbone, "shipped-even", (96, 64)),
        (partial(residual, 18), "resnet18", kit.SIZE),
        *(large(partial(lite, n), f"efficientnet-lite{n}", kit.SIZE) for n in range(5)),
        *(large(partial(residual, n), f"resnet{n}", kit.SIZE) for n in (34, 50)),
        *((partial(transformer, n), f"dinov2-{n}", kit.SIZE) for n in (0, 4)),
        *((partial(transformer, n), f"dinov2-{n}-native", (70, 70)) for n in (0, 4)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_are_those_of_pytorch(make, name, size, reference):
    """Within 1e-4 of the range at every stride; odd sizes, so that SAME padding is on both sides at
    some layers and on one at others.
    """
    net = make()
    found = jax.jit(lambda net, x: net(x))(net, kit.image(size))
    assert len(found) == len(net.strides) == len(net.channels)
    for i, feature in enumerate(found):
        got = kit.sampled(feature)
        want = {part: reference[f"{name}.{i}.{part}"] for part in got}
        assert tuple(want["shape"]) == got["shape"] and got["shape"][-1] == net.channels[i]
        assert np.abs(got["values"] - want["values"]).max() <= 1e-4 * want["range"]


def test_strides_of_a_dilated_resnet_stay_at_eight():
    net = nnx.eval_shape(lambda: backbones.ResNet(50, dilated=True, whole=False))
    assert net.strides == (2, 4, 8, 8, 8)
    assert _shapes(net, (64, 32)) == [
        (1, 64 // s, 32 // s, c) for s, c in zip(net.strides, net.channels)
    ]


def _shapes(net, size):
    x = jnp.zeros((1, *size, 3))
    return [f.shape for f in jax.eval_shape(lambda net, x: net(x), net, x)]


def test_dinov2_shapes():
    """ViT-S/14 and B/14 as published: their parameters, without the mask token, and with layer
    scale folded in.
    """
    for width, published in ((384, 22_056_576), (768, 86_580_480)):
        config = dinov2.DINOv2Config(width=width, hidden=4 * width)
        net = nnx.eval_shape(lambda config=config: DINOv2(config))
        stored = sum(np.prod(a.shape) for a in jax.tree.leaves(nnx.state(net)))
        assert stored == published - width - 12 * 2 * width
        assert _shapes(net, (99, 70)) == [(1, 7, 5, width)]
    with pytest.raises(UsageError, match="an image of 13x70 pixels has no patch of 14"):
        net(jnp.zeros((1, 13, 70, 3)))


def test_unknown_architecture():
    with pytest.raises(UsageError, match=r"unknown backbone 'resnet19'; did you mean 'resnet1?"):
        backbones.build("resnet19")


# Batch statistics


@pytest.mark.parametrize("arch", ["efficientnet-lite0", "resnet18"])
def test_every_norm_has_its_own_place_on_the_tape(arch):
    """The names are the paths of the norms, so that what the batch gave can be stored there."""
    net, tape = nnx.eval_shape(lambda: backbones.build(arch, path="backbone")), {}
    jax.eval_shape(lambda net, x: net(x, tape), net, jnp.zeros((1, 32, 32, 3)))
    state = nnx.to_flat_state(nnx.state(net, layers.Statistic))
    paths = {".".join(map(str, path[:-1])) for path, _ in state}
    assert set(tape) == {f"backbone.{path}" for path in paths} and len(tape) == len(state) // 2


def test_frozen_and_trained_statistics_over_two_devices():
    net = backbones.InvertedResidual(
        8, 8, np.random.default_rng(0), "block", size=3, stride=1, expansion=2
    )
    graph, state = nnx.split(net)
    x = jnp.asarray(np.random.default_rng(1).normal(1, 2, (4, 6, 6, 8)), jnp.float32)

    def trained(state, x, *, graph):
        tape = {}
        return nnx.merge(graph, state)(x, tape), tape

    run = parallel.map_devices(trained, (None, 0), (0, None), devices=2, graph=graph)
    out, tape = run(state, parallel.shard(x, 2)[0])
    single, alone = trained(state, x, graph=graph)
    np.testing.assert_allclose(np.concatenate(out), single, atol=1e-5)
    for name, pair in tape.items():
        np.testing.assert_allclose(pair[0], alone[name][0], atol=1e-5)
        np.testing.assert_allclose(pair[1], alone[name][1], rtol=1e-5)
    # Frozen, the stored statistics rule: another result, until those of the batch are stored.
    assert np.abs(np.asarray(net(x, None)) - single).max() > 0.1
    for name in ("expand_norm", "depthwise_norm", "project_norm"):
        norm = getattr(net, name)
        norm.mean[...], norm.var[...] = tape[f"block.{name}"]
    np.testing.assert_allclose(net(x, None), single, atol=1e-5)


# Layers


def native_depthwise(x, kernel, stride):
    k, _, c = kernel.shape
    return lax.conv_general_dilated(
        x, kernel.reshape(k, k, 1, c), (stride, stride), "SAME", feature_group_count=c,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


@pytest.mark.parametrize("size", [(7, 10), (19, 6)])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolution_and_its_derivatives_are_xlas(size, k, stride):
    """More rows than are unrolled, and fewer."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 3), dtype=np.float32)
    kernel = rng.standard_normal((k, k, 3), dtype=np.float32)

    @jax.jit
    def both(x, kernel):
        ours, back = jax.vjp(lambda x, kernel: depthwise_conv(x, kernel, stride), x, kernel)
        theirs, native = jax.vjp(lambda x, kernel: native_depthwise(x, kernel, stride), x, kernel)
        weights = jnp.cos(jnp.arange(ours.size, dtype=jnp.float32)).reshape(ours.shape)
        return (ours, *back(weights)), (theirs, *native(weights))

    for got, want in zip(*both(x, kernel)):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_convolutions_are_xlas():
    """The 1 x 1 as a matrix product; SAME padding, which differs from the symmetric one on even
    sizes.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 8, 7, 4)), jnp.float32)
    for settings, padding in (
        ({"size": 1}, "SAME"),
        ({"size": 3, "stride": 2, "padding": "SAME"}, "SAME"),
        ({"size": 3, "stride": 2}, [(1, 1), (1, 1)]),
    ):
        conv = layers.Conv(4, 6, rng, **settings)
        want = lax.conv_general_dilated(
            x, conv.weight[...], (settings.get("stride", 1),) * 2, padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        np.testing.assert_allclose(conv(x), want, atol=1e-5)


def test_affine_has_the_derivatives_of_its_formula():
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.standard_normal((2, 3, 5, 4)), jnp.float32) for _ in "xw")
    scale, shift = (jnp.asarray(rng.standard_normal(4), jnp.float32) for _ in "ab")
    ours = jax.grad(lambda *a: (layers.affine(*a) * weights).sum(), (0, 1, 2))(x, scale, shift)
    plain = jax.grad(lambda x, a, b: ((x * a + b) * weights).sum(), (0, 1, 2))(x, scale, shift)
    for got, want in zip(ours, plain):
        np.testing.assert_allclose(got, want, rtol=1e-5)
