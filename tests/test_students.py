"""The students' networks and their training step: shapes, receptive field rules, statistics,
devices, augmentation with its mask.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sis_jax import parallel
from sis_jax.models import backbone_unet, students
from sis_jax.models.backbones import ResNet
from sis_jax.models.layers import GroupNorm
from sis_jax.ops import student_augment as augment
from sis_jax.training import student as training
from sis_jax.types import UsageError

pytestmark = pytest.mark.integration

SMALL = training.Recipe(steps=20, batch=8, side=16, learning_rate=3e-3)


def network(arch, classes=3, seed=0, width=8, block=2):
    return students.build(
        students.StudentConfig(arch, classes, width, block), np.random.default_rng(seed)
    )


@pytest.mark.parametrize("arch", list(students.NETWORKS))
def test_every_student_keeps_the_size_of_the_picture(arch):
    shape = jax.eval_shape(lambda: network(arch)(jnp.zeros((2, 40, 24, 3))))
    assert shape.shape == (2, 40, 24, 3)


def test_parameter_counts():
    """ResNet-18 without its classifier has 11,176,512 parameters; the 1 x 1 head adds 513 per
    class. ResNet-50: 23,508,032.
    """

    def count(net):
        return sum(np.prod(a.shape) for a in jax.tree.leaves(nnx.split(net, nnx.Param, ...)[1]))

    shapes = {
        arch: nnx.eval_shape(lambda arch=arch: students.build(students.StudentConfig(arch, 2)))
        for arch in students.NETWORKS
    }
    assert count(shapes["resnet18"]) == 11_176_512 + 2 * 513
    assert count(shapes["deeplabv3-resnet50"].trunk) == 23_508_032
    assert count(shapes["unet-small"]) < 3e6


def test_output_stride_is_eight_and_dilations_follow_each_papers_rule():
    trunk = nnx.eval_shape(lambda: ResNet(18, dilated=True))
    features = jax.eval_shape(lambda net, x: net(x), trunk, jnp.zeros((1, 64, 64, 3)))
    assert features[-1].shape == (1, 8, 8, 512)
    assert [[c.dilation for c in b.convs] for b in trunk.blocks] == [[1, 1]] * 4 + [[2, 2]] * 2 + [
        [4, 4]
    ] * 2
    fifty = nnx.eval_shape(lambda: ResNet(50, dilated=True, whole=False))
    assert [b.convs[1].dilation for b in fifty.blocks] == [1] * 7 + [1] + [2] * 5 + [2] + [4] * 2


def test_group_norm_against_numpy():
    x = np.random.default_rng(0).normal(2, 3, (2, 5, 6, 16)).astype(np.float32)
    groups = x.reshape(2, 30, 2, 8)
    want = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(
        groups.var((1, 3), keepdims=True) + 1e-5
    )
    np.testing.assert_allclose(GroupNorm(16)(jnp.asarray(x)), want.reshape(x.shape), atol=2e-5)


@pytest.mark.parametrize("block", [2, 4])
def test_blocks_of_pixels_and_back(block):
    x = jnp.arange(2 * 4 * 8 * 3.0).reshape(2, 4, 8, 3)
    packed = students.space_to_depth(x, block)
    np.testing.assert_array_equal(packed[0, 0, 1], x[0, :block, block : 2 * block].reshape(-1))
    np.testing.assert_array_equal(students.depth_to_space(packed, block), x)


def test_a_student_of_larger_blocks_keeps_any_size_and_costs_a_quarter():
    fine, coarse = network("unet-small", width=32), network("unet-small", width=32, block=4)
    assert jax.eval_shape(lambda: coarse(jnp.zeros((2, 40, 24, 3)))).shape == (2, 40, 24, 3)
    flops = [
        jax.jit(net.__call__).lower(jnp.zeros((1, 128, 128, 3))).cost_analysis()["flops"]
        for net in (fine, coarse)
    ]
    assert 0.2 < flops[1] / flops[0] < 0.3


def test_batch_statistics_reach_the_right_place_and_are_used():
    net = network("resnet18")
    graph, state = training.new_state(net, SMALL)
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3)) + 2
    tape = {}
    net(x, tape)
    assert set(tape) == {n for n in tape if n.startswith("trunk.")} and len(tape) == 20
    moved = training._with_statistics(state["statistics"], tape, momentum=1.0)
    mean = x_mean = np.asarray(tape["trunk.norm"][0])
    np.testing.assert_allclose(moved["trunk"]["norm"]["mean"], mean)
    assert np.abs(x_mean).max() > 0.01
    # With the batch's own statistics stored, use gives what training gave.
    np.testing.assert_allclose(
        training.join(graph, state["params"], moved)(x), net(x, {}), atol=1e-4
    )


def _toy(n=8, side=16, seed=0):
    """Pictures of a bright disc on dark ground, with its mask."""
    rng = np.random.default_rng(seed)
    at = np.arange(side)
    images, masks = np.zeros((n, side, side, 3), np.uint8), np.zeros((n, side, side), np.uint8)
    for i in range(n):
        cx, cy = rng.uniform(5, side - 5, 2)
        masks[i] = (at[None] - cx) ** 2 + (at[:, None] - cy) ** 2 < 16
        images[i] = np.where(masks[i][..., None], 200, 40) + rng.integers(0, 20, (side, side, 3))
    return images, masks, np.full_like(masks, 255)


@pytest.mark.parametrize("arch", ["unet-small", "resnet18"])
def test_training_learns_a_toy(arch):
    recipe = replace(SMALL, learning_rate=1e-2 if arch == "unet-small" else 3e-3, steps=30)
    graph, state = training.new_state(network(arch, 2), recipe)
    run = parallel.map_devices(
        training.train_step, (None, None, 0, 0, 0), None, devices=2, graph=graph, recipe=recipe
    )
    losses = []
    for step in range(30):
        blocks = [parallel.shard(a, 2)[0] for a in _toy(seed=step)]
        state, facts = run(state, jax.random.key(step), *blocks)
        losses.append(float(facts["loss"]))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_a_step_does_not_depend_on_the_number_of_devices():
    """Without random variation the same batch gives the same weights on 1, 2 and 4 devices, batch
    statistics and uneven ignore included.
    """
    images, masks, sure = _toy()
    masks[0, :8] = 255
    states = {}
    for devices in (1, 2, 4):
        graph, state = training.new_state(network("resnet18", 2), SMALL)
        run = parallel.map_devices(
            training.train_step,
            (None, None, 0, 0, 0),
            None,
            devices=devices,
            graph=graph,
            recipe=SMALL,
        )
        state, facts = run(
            state,
            jax.random.key(0),
            *(parallel.shard(a, devices)[0] for a in (images, masks, sure)),
        )
        states[devices] = (state["statistics"], facts)
    for devices in (2, 4):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            states[1],
            states[devices],
        )


def test_ignored_pixels_do_not_count_and_certainty_weighs():
    logits = jnp.zeros((1, 2, 2, 2)).at[..., 1].set(2.0)
    masks = jnp.array([[[1, 0], [255, 255]]], jnp.uint8)
    sure = jnp.array([[[1.0, 0.25], [1.0, 1.0]]])
    right, wrong = np.log1p(np.exp(-2)), np.log1p(np.exp(2))
    total, weight = training.cross_entropy(logits, masks, sure, replace(SMALL, weighting=0.0))
    np.testing.assert_allclose([total, weight], [right + wrong, 2], rtol=1e-6)
    total, weight = training.cross_entropy(logits, masks, sure, replace(SMALL, weighting=0.5))
    np.testing.assert_allclose([total, weight], [right + 0.5 * wrong, 1.5], rtol=1e-6)
    total, _ = training.cross_entropy(logits, masks, sure, replace(SMALL, weighting=0.0, soft=True))
    np.testing.assert_allclose(total, right + 0.25 * wrong + 0.75 * (right + wrong) / 2, rtol=1e-6)


def test_paper_schedule_and_coupled_decay():
    """Adam with L2 in the gradient and lr (1 - t / T)^0.9: after the first step of a zero gradient,
    weights move by lr * sign(w).
    """
    recipe = training.Recipe(
        steps=1000, learning_rate=1e-4, weight_decay=1e-4, optimizer="adam", schedule="poly"
    )
    chain = training.optimizer(recipe)
    params = {"w": jnp.array([3.0, -2.0])}
    updates, _ = chain.update({"w": jnp.zeros(2)}, chain.init(params), params)
    np.testing.assert_allclose(updates["w"], [-1e-4, 1e-4], rtol=1e-3)


def test_the_mask_follows_its_picture_through_every_map():
    images, masks, sure = (jnp.asarray(a) for a in _toy(8, 32))
    maps, mirrored = augment.geometry(jax.random.key(3), 8, augment.Augmentation())
    x, y, _ = augment.warp(students.to_float(images), masks, sure / 255.0, maps, mirrored, 32)
    inside = np.asarray(x.mean(-1) > 0)
    assert (inside == (np.asarray(y) == 1)).mean() > 0.97
    assert np.asarray(mirrored).min() == 0 and np.asarray(mirrored).max() == 1


def test_mirroring_swaps_left_and_right_classes():
    mask = jnp.asarray(np.tile(np.array([1, 1, 2, 2], np.uint8), (1, 4, 1)))
    blank = jnp.zeros((1, 4, 4))
    flip = jnp.array([[[-1.0, 0, 0], [0, 1, 0]]])
    got = augment.warp(blank[..., None], mask, blank, flip, jnp.ones(1), 4, swap=(0, 2, 1))[1]
    np.testing.assert_array_equal(got, mask)


def test_another_background_leaves_the_foreground_alone():
    images, masks, _ = _toy(16, 32)
    x, front = students.to_float(jnp.asarray(images)), jnp.asarray(masks, jnp.float32)
    y = augment.other_backgrounds(jax.random.key(0), x, front, 1.0)
    np.testing.assert_allclose(np.asarray(y)[masks == 1], np.asarray(x)[masks == 1], atol=1e-6)
    changed = np.abs(np.asarray(y - x)).mean((1, 2, 3))
    assert (changed > 0.02).mean() > 0.8
    np.testing.assert_array_equal(augment.other_backgrounds(jax.random.key(0), x, front, 0.0), x)


def test_no_augmentation_changes_nothing_but_the_size():
    images, masks, sure = (jnp.asarray(a) for a in _toy(4, 16))
    maps, mirrored = augment.geometry(jax.random.key(0), 4, augment.NONE)
    x, y, _ = augment.warp(students.to_float(images), masks, sure / 255.0, maps, mirrored, 16)
    np.testing.assert_allclose(x, students.to_float(images), atol=1e-5)
    np.testing.assert_array_equal(y, masks)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"arch": "unnet"}, "unet"),
        ({"classes": 1}, "2 to 255 classes"),
        ({"width": 12}, "multiple of 8"),
        ({"block": 3}, "block is 3"),
    ],
)
def test_impossible_students_are_told(fields, said):
    with pytest.raises(UsageError, match=said):
        students.StudentConfig(**fields)


def test_a_new_student_expects_the_shares_of_the_classes():
    """Every pixel of every network, also of those that predict whole blocks."""
    shares = np.array([0.9, 0.1, 0.0])
    for kind in ("unet-small", "unet-efficientnet-lite0"):
        network = students.build(students.StudentConfig(kind, 3), np.random.default_rng(0))
        network.head.weight[...] = network.head.weight[...] * 0
        students.begin_with(network, shares)
        found = jax.nn.softmax(network(jnp.zeros((1, 64, 64, 3))))
        np.testing.assert_allclose(found[..., 1], 0.1, atol=2e-3)
        assert 0 < float(found[..., 2].max()) < 2e-3


def test_large_images_go_through_the_backbone_a_few_at_a_time(monkeypatch):
    """With the same features and gradients, in a fraction of the memory."""
    config = students.StudentConfig("unet-efficientnet-lite0", 3, block=4)
    network = students.build(config, np.random.default_rng(0))
    graph, params, statistics = training.split(network)
    x = jnp.asarray(np.random.default_rng(1).normal(0, 0.3, (4, 64, 64, 3)), jnp.float32)

    def trained():
        def loss(params):
            logits, _ = training.forward(graph, params, statistics, x, training.Recipe())
            return (logits**2).mean()

        run = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return run(params), run.memory_analysis().temp_size_in_bytes

    (value, grads), bytes_ = trained()
    monkeypatch.setattr(backbone_unet, "AT_ONCE", 64 * 64)
    (few_value, few_grads), few_bytes = trained()
    np.testing.assert_allclose(few_value, value, rtol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    for one, other in zip(jax.tree.leaves(few_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * largest)
    assert few_bytes < 0.7 * bytes_
