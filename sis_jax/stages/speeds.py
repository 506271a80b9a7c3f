"""How fast this machine is: a few steps of a training, on random images."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from sis_jax import parallel
from sis_jax.checkpoints import load_generator
from sis_jax.checkpoints.backbones import load_backbone
from sis_jax.data.photos import Photos
from sis_jax.models.students import LEAST_SIDE, StudentConfig, build, usual_block
from sis_jax.ops import plan
from sis_jax.ops.student_augment import ALIGNED
from sis_jax.runs.configs.distill import RECIPES
from sis_jax.runs.configs.train_generator import Network
from sis_jax.stages.budget import BASE_BYTES, FORWARD, Sizes, Speeds
from sis_jax.stages.train_generator import networks
from sis_jax.training import gan
from sis_jax.training import student as training
from sis_jax.training.generator_loop import SWD_IMAGES, GeneratorTraining, Job
from sis_jax.training.loop import Checkpoints, on_devices

SAMPLES = 10  # images that a generator draws in the time that it learns from one
COPIES = 3  # of the state: before and after a step, and the best one
CLASSES = 6
# A training on a CPU holds this many times what two of its steps did, one after the other: a step
# more is in flight, snapshots are drawn, and the adaptation is a program of its own with a teacher.
# Measured in a run on 599 photos: 4.5 GB for the generator and 5.2 to 5.5 for the student, where
# this gives 4.1 and 4.6.
GENERATOR_HOLDS, STUDENT_HOLDS = 2, 3


def measured(sizes: Sizes, gen: str | None, trains: bool, seed: int) -> Speeds:
    """Time the training of a student, and that of a generator of these sizes or, unless `trains`,
    the images of the generator `gen`.
    """
    if trains:
        start, image, needed = _of_generator(sizes, seed)
        found, sample, resolution = (start, image, needed), image / SAMPLES, sizes.resolution
    else:
        found, (sample, resolution) = (0.0, 0.0, 0.0), _of_samples(gen)
    start, image, needed = _of_student(resolution)
    snapshot = SWD_IMAGES * (sample + FORWARD * image)
    batch = RECIPES["default"]["batch"]
    plan.give_back()
    if jax.default_backend() == "cpu":
        needed, found = STUDENT_HOLDS * needed, (*found[:2], GENERATOR_HOLDS * found[2])
    return Speeds(sample, start, image, needed, batch, snapshot, *found)


def _of_samples(name: str | None) -> tuple[float, int]:
    """(seconds of an image, pixels) of a generator."""
    gen = load_generator(name)
    seeds = range(2 * parallel.device_count())
    _seconds(lambda: gen.sample(seeds).images)
    return _seconds(lambda: gen.sample(seeds).images) / len(seeds), gen.resolution


def _of_generator(sizes: Sizes, seed: int) -> tuple[float, float, float]:
    """(seconds of the first step, seconds of an image later, bytes with the state)."""
    network = Network(
        resolution=sizes.resolution, channel_base=sizes.channel_base, latent=sizes.latent,
        channel_max=sizes.channel_max, mapping_layers=sizes.mapping_layers,
        start_from=sizes.start_from, discriminator=sizes.discriminator,
    )  # fmt: skip
    backbone = load_backbone()
    gen, disc = networks(network, seed, backbone)
    real = _noise(sizes.batch, sizes.resolution)
    photos = Photos(real, tuple(map(str, range(len(real)))))
    dtype = "bfloat16" if parallel.fast_in_bfloat16(jax.devices()[0]) else "float32"
    gamma = gan.r1_gamma_for(sizes.resolution, sizes.batch)
    recipe = gan.Recipe(r1_gamma=gamma, dtype=dtype)
    ada = sizes.discriminator == "stylegan2"
    job = Job(gen, disc, photos, photos, recipe, sizes.batch, 1, 1, None, 0, ada, seed, backbone)
    trainer = GeneratorTraining(job, Checkpoints(None, {}))
    start, step, needed = trainer.measured(real)
    return start, step / sizes.batch, _held(needed + COPIES * plan.size_of(trainer.run.state))


def _of_student(resolution: int) -> tuple[float, float, float]:
    """As `_of_generator`, of the usual student of images of `resolution` pixels."""
    usual, side = RECIPES["default"], max(LEAST_SIDE, resolution)
    recipe = training.Recipe(
        usual["steps"], usual["batch"], side, ema=usual["ema"], augmentation=ALIGNED
    )
    config = StudentConfig(usual["student"], CLASSES, block=usual_block(side))
    return of_student(config, recipe, resolution)


def of_student(
    config: StudentConfig, recipe: training.Recipe, resolution: int
) -> tuple[float, float, float]:
    """(seconds of the first step, seconds of an image later, bytes with the state) of a student
    that learns images of `resolution` pixels.
    """
    graph, state = training.new_state(build(config, np.random.default_rng(0)), recipe)
    devices = parallel.devices_for(recipe.batch)
    body = partial(training.train_step, graph=graph, recipe=recipe)
    run = parallel.map_devices(
        training.train_step, (None, None, 0, 0, 0), None, devices=devices, graph=graph,
        recipe=recipe,
    )  # fmt: skip
    images = _noise(recipe.batch, resolution)
    batch = (images, images[..., 0] % config.classes, images[..., 0])
    blocks, held = [parallel.shard(a, devices)[0] for a in batch], on_devices(state, devices)
    start, step = (_seconds(lambda: run(held, jax.random.key(0), *blocks)) for _ in range(2))
    needed = plan.bytes_of(body, state, jax.random.key(0), *batch)
    return start, step / recipe.batch, _held(needed + COPIES * plan.size_of(state))


def _held(counted: float) -> float:
    """Bytes beside `BASE_BYTES`: on a CPU at least what this process held for the steps, since it
    also compiles there, and keeps freed memory.
    """
    if jax.default_backend() != "cpu":
        return counted
    return max(counted, plan.memory_held() - BASE_BYTES)


def _noise(n: int, resolution: int) -> UInt8[np.ndarray, "n r r 3"]:
    shape = (n, resolution, resolution, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began
