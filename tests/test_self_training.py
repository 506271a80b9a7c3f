"""Steps of self-training: what is pasted, what is masked, what the network is asked for."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sis_jax import parallel
from sis_jax.models import students
from sis_jax.ops.student_augment import NONE, Augmentation
from sis_jax.training import self_training
from sis_jax.training.student import Recipe, join, new_state

SIZE = 32
RECIPE = Recipe(steps=30, batch=8, side=SIZE, learning_rate=3e-3, ema=0.5, augmentation=NONE)


def half():
    """(photos, target): red on the left is class 1, blue on the right is background."""
    photos = np.zeros((8, SIZE, SIZE, 3), np.uint8)
    photos[:, :, : SIZE // 2, 0] = photos[:, :, SIZE // 2 :, 2] = 220
    target = np.zeros((8, SIZE, SIZE, 3), np.uint8)
    target[:, :, : SIZE // 2, 1] = target[:, :, SIZE // 2 :, 0] = 255
    return photos, target


def test_a_pasted_photo_keeps_its_foreground_and_its_classes():
    photos, target = half()
    x = photos / np.float32(255)
    behind = np.full_like(x, 0.5)
    on = jnp.asarray([1.0] + [0.0] * 7)
    arrays = (jnp.asarray(a) for a in (x, target / np.float32(255), behind))
    mixed, labels = self_training.composite(*arrays, on)
    np.testing.assert_allclose(mixed[0, :, : SIZE // 2], x[0, :, : SIZE // 2], atol=1e-6)
    np.testing.assert_allclose(mixed[0, :, SIZE // 2 :], 0.5, atol=1e-6)
    np.testing.assert_allclose(mixed[1:], x[1:], atol=1e-6)
    np.testing.assert_allclose(labels, target / np.float32(255), atol=1e-6)


def test_labels_of_a_pasted_photo_are_what_is_seen_of_it():
    target = jnp.asarray([0.4, 0.45, 0.15])[None, None, None]
    white, black = jnp.ones((1, 1, 1, 3)), jnp.zeros((1, 1, 1, 3))
    mixed, labels = self_training.composite(white, target, black, jnp.ones(1))
    assert float(labels.sum()) == pytest.approx(1)
    # alpha = 2.5 (0.6 - 0.5) + 0.3 = 0.55, three quarters of it of the second class
    np.testing.assert_allclose(mixed[0, 0, 0], 0.55, atol=1e-6)
    np.testing.assert_allclose(labels[0, 0, 0], [0.45, 0.4125, 0.1375], atol=1e-6)


def test_some_backgrounds_come_near_to_the_colour_of_the_edge_and_some_are_dark():
    backgrounds = jax.random.uniform(jax.random.key(1), (600, 8, 8, 3), minval=-0.5, maxval=0.5)
    edge = jnp.broadcast_to(jnp.asarray([0.8, -0.7, 0.1]), (600, 3))
    found = self_training.hard_backgrounds(jax.random.key(0), backgrounds, edge)
    mean = np.asarray(found.mean((1, 2)))
    near = (np.abs(mean - [0.8, -0.7, 0.1]) < 0.35).all(-1)
    assert near.mean() == pytest.approx(self_training.RECOLOURED, abs=0.08)
    dark = (mean < -0.4).all(-1)
    assert dark.mean() == pytest.approx(self_training.DARKENED, abs=0.06)


def test_the_mirror_swaps_left_and_right_classes():
    photos, target = half()
    recipe = replace(RECIPE, augmentation=replace(NONE, flip=1.0, swap=(0, 2, 1)))
    photos, target = jnp.asarray(photos), jnp.asarray(target)
    x, q = self_training.view(
        jax.random.key(0),
        photos,
        target,
        photos,
        jnp.zeros(8),
        jnp.zeros((8, 3), jnp.uint8),
        recipe,
    )
    assert float(x[0, 0, -1, 0]) > 0.5  # red is on the right now
    np.testing.assert_allclose(q[0, 4, -4], [0, 0, 1], atol=1e-5)
    np.testing.assert_allclose(q[0, 4, 4], [1, 0, 0], atol=1e-5)


def learned(devices):
    """The parameters after some steps, and the losses."""
    photos, target = half()
    photos = (photos + np.random.default_rng(0).integers(0, 30, photos.shape)).astype(np.uint8)
    config = students.StudentConfig("unet-small", 3, 8)
    graph, state = new_state(students.build(config, np.random.default_rng(0)), RECIPE)
    run = parallel.map_devices(
        self_training.self_training_step, (None, None, 0, 0, 0, 0, 0), None,
        devices=devices, graph=graph, recipe=RECIPE,
    )  # fmt: skip
    rows = [
        parallel.shard(a, devices)[0]
        for a in (photos, target, photos, np.zeros(8, np.float32), np.zeros((8, 3), np.uint8))
    ]
    losses = []
    for step in range(RECIPE.steps):
        state, facts = run(state, jax.random.fold_in(jax.random.key(0), step), *rows)
        losses.append(float(facts["loss"]))
    return join(graph, state["ema"], state["statistics"]), losses, photos


def test_a_student_learns_what_its_teacher_says():
    network, losses, photos = learned(1)
    assert losses[-1] < 0.3 * losses[0]
    found = np.asarray(network(students.to_float(jnp.asarray(photos))).argmax(-1))
    truth = np.where(np.arange(SIZE) < SIZE // 2, 1, 0)
    assert (found == truth).mean() > 0.95


def test_small_changes_are_likelier_where_they_are_peaked():
    from sis_jax.ops.student_augment import geometry

    def spread(peaked):
        a = Augmentation(scale=0.5, turn=0.0, flip=0.0, peaked=peaked)
        maps, _ = geometry(jax.random.key(0), 2000, a)
        return np.abs(np.log2(np.asarray(maps[:, 1, 1])))

    assert spread(True).max() > 0.45
    assert np.median(spread(True)) < 0.6 * np.median(spread(False))
