"""The projected discriminator: its parts, a step against it, and a training that resumes."""

from dataclasses import replace

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sis_jax as sis
from sis_jax.checkpoints import save_generator
from sis_jax.models import projected as models
from sis_jax.models import stylegan2
from sis_jax.models.projected import Head, NormedConv, ProjectedConfig, ProjectedDiscriminator
from sis_jax.ops.diff_augment import CUTOUT, diff_augment
from sis_jax.parallel import map_devices
from sis_jax.stages import train_generator as stage
from sis_jax.training import projected
from sis_jax.training.gan import Recipe
from sis_jax.training.trees import split
from sis_jax.types import Info

SIZE, CHANNELS = 32, (4, 4, 8, 8)


class Pooled(nnx.Module):
    """In place of a backbone: means at strides 2 to 32, by a fixed mixing of the colours."""

    channels, info = (4, *CHANNELS), Info("pooled")

    def __init__(self):
        rng = np.random.default_rng(0)
        self.mixing = nnx.List(
            [nnx.Param(jnp.asarray(rng.normal(size=(3, c)), jnp.float32)) for c in self.channels]
        )

    def __call__(self, x):
        found = []
        for level, mixing in enumerate(self.mixing):
            s = 2 ** (level + 1)
            means = x.reshape(len(x), x.shape[1] // s, s, x.shape[2] // s, s, 3).mean((2, 4))
            found.append(jnp.tanh(means @ mixing[...]))
        return tuple(found)


def judge() -> ProjectedDiscriminator:
    return ProjectedDiscriminator(
        ProjectedConfig("pooled", CHANNELS, SIZE), np.random.default_rng(1)
    )


def test_a_kernel_is_divided_by_its_largest_singular_value():
    conv = NormedConv(6, 5, np.random.default_rng(0), size=4, stride=2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 6)), jnp.float32)
    for _ in range(30):
        found = conv(x)
    largest = np.linalg.svd(np.asarray(conv.weight[...]).reshape(-1, 5), compute_uv=False)[0]
    conv.weight[...] = conv.weight[...] * 7  # its size no longer matters
    np.testing.assert_allclose(conv(x), found, rtol=1e-4, atol=1e-5)
    left = conv.weight[...].reshape(-1, 5) @ conv.vector[...]
    np.testing.assert_allclose(np.linalg.norm(left), 7 * largest, rtol=1e-4)
    assert found.shape == (2, 4, 4, 5)


@pytest.mark.parametrize(("size", "places"), [(4, 16), (16, 16), (7, 49), (56, 49)])
def test_a_head_scores_the_places_of_its_last_features(size, places):
    head = Head(4, size, np.random.default_rng(0))
    assert head(jnp.ones((2, size, size, 4))).shape == (2, places)


def test_features_mix_scales_from_coarse_to_fine():
    """A change far away reaches a place of the finest features through the coarser ones only."""
    disc, backbone = judge(), Pooled()
    images = np.zeros((1, SIZE, SIZE, 3), np.float32)
    other = images.copy()
    other[:, :4, :4] = 1
    a, b = (disc.features(backbone, jnp.asarray(x)) for x in (images, other))
    assert [f.shape[1] for f in a] == [8, 4, 2, 1]
    far = np.abs(np.asarray(a[0] - b[0]))[0, -1, -1].max()
    near = np.abs(np.asarray(a[0] - b[0]))[0, 0, 0].max()
    assert 0 < far < near


def test_images_are_augmented_by_their_own_number():
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)), jnp.float32)
    whole = diff_augment(jax.random.key(3), images)
    part = diff_augment(jax.random.key(3), images[2:], first=2)
    np.testing.assert_allclose(whole[2:], part, atol=1e-6)
    black = np.asarray(whole == 0).all(-1).mean((1, 2))  # the hole, and what a shift left open
    assert (black > 0.8 * CUTOUT**2 / 4).all() and (black < 0.6).all()
    gradient = jax.grad(lambda x: diff_augment(jax.random.key(3), x).sum())(images)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_a_step_trains_both_networks_and_nothing_else():
    rng = np.random.default_rng(0)
    shape = stylegan2.GeneratorConfig(8, (8, 8), 4, 4, mapping_layers=1, mapping_width=4)
    recipe = Recipe(learning_rate=0.01, path_length=0.0)
    graphs, state = projected.new_state(stylegan2.StyleGAN2(shape, rng), judge(), Pooled(), recipe)
    real = np.zeros((1, 8, 8, 8, 3), np.uint8)
    real[..., :4, :] = 255
    run = map_devices(
        projected.step, (None, None, 0), None, devices=1, graphs=graphs, recipe=recipe
    )
    losses, now = [], state
    for i in range(12):
        now, facts = run(now, jax.random.key(i), real)
        losses.append(float(facts["loss_d"]))
    assert losses[-1] < losses[0]
    assert facts["score_real"] > facts["score_fake"]
    for name in ("g", "d", "d_rest", "backbone"):
        moved = [
            bool(np.any(np.asarray(a) != np.asarray(b)))
            for a, b in zip(jax.tree.leaves(state[name]), jax.tree.leaves(now[name]))
        ]
        if name == "backbone":
            assert not any(moved)
        else:
            assert any(moved)
    fixed = [np.asarray(a[...]) for a in judge().across]
    assert all(any(np.array_equal(a, b) for b in jax.tree.leaves(now["d_rest"])) for a in fixed)
    assert set(split(judge())[1]) == {"heads"}


@pytest.mark.integration
def test_trains_resumes_and_keeps_the_terms_of_its_start(tmp_path, monkeypatch):
    """Two steps, and one with another after it, end at the same weights; no discriminator is
    stored, and the licence names the terms of the generator that the training began with.
    """
    monkeypatch.setattr(stage, "load_backbone", Pooled)
    monkeypatch.setattr(models, "SIZES", (SIZE, SIZE))
    gen = fakes.tiny_stylegan2(8)
    gen.info = replace(gen.info, licence="for the curious only")
    start = save_generator(gen, tmp_path / "start")
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    photos = str(tmp_path / "photos.npz")
    np.savez(photos, images=images)
    settings = {
        "start_from": str(start), "discriminator": "projected", "resolution": 8, "batch": 8,
        "snapshot": 8, "holdout": 8,
    }  # fmt: skip
    found = [
        sis.train_generator(photos, out=str(tmp_path / out), images=n, **settings)
        for out, n in (("once", 16), ("twice", 8), ("twice", 16))
    ]
    for a, b in zip(*(jax.tree.leaves(split(gen)[1]) for gen in (found[0], found[2]))):
        np.testing.assert_array_equal(a, b)
    folder = tmp_path / "once" / "generator"
    assert sis.load_generator(folder).info.licence.endswith("; for the curious only")
    with pytest.raises(sis.UsageError, match="has no discriminator"):
        sis.load_discriminator(folder)
