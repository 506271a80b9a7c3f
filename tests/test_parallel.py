"""`parallel.py`: cutting, padding, one and many devices, two processes."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import faults
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sis_jax import parallel
from sis_jax.training.self_training import VIEWS, view
from sis_jax.training.student import Recipe, _shown
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration


def mean_body(state, x, w, power=1):
    """A replicated state in and out, a per-device result beside it, a scan whose carry starts from
    zeros.
    """

    def add(carry, row):
        return carry + row[0] ** power * row[1], None

    total = jax.lax.scan(add, jnp.zeros(x.shape[1]), (x, w))[0]
    total, count = parallel.psum((total, w.sum()))
    return {"mean": state["mean"] + total / count}, x - total / count


def train_body(params, x, y, w):
    def loss(p):
        return jnp.sum(w * (x @ p - y) ** 2)

    value, grad = jax.value_and_grad(loss)(params)
    return params - 0.01 * parallel.pmean(grad), parallel.psum(value)


def rows(n, d=5):
    return np.random.default_rng(n).standard_normal((n, d)).astype(np.float32)


@pytest.mark.parametrize("n", [1, 7, 8, 61, 64])
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_shard_and_back(n, devices):
    x = rows(n)
    blocks, weights = parallel.shard(x, devices)
    assert blocks.shape == (devices, -(-n // devices), 5) and weights.shape == blocks.shape[:2]
    assert weights.sum() == n and np.array_equal(
        np.unique(weights), [0, 1] if blocks[..., 0].size > n else [1]
    )
    assert not blocks[weights == 0].any()
    np.testing.assert_array_equal(parallel.unshard(blocks, n), x)
    np.testing.assert_array_equal(
        parallel.unshard(parallel.shard(jnp.asarray(x), devices)[0], n), x
    )


def test_shard_copies_nothing_where_rows_divide():
    x = rows(64)
    assert np.shares_memory(parallel.shard(x, 8)[0], x)


@pytest.mark.parametrize("n", [61, 64])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_any_number_of_devices_gives_the_same(n, devices):
    x, state = rows(n), {"mean": np.ones(5, np.float32)}
    blocks, weights = parallel.shard(x, devices)
    run = parallel.map_devices(mean_body, (None, 0, 0), (None, 0), devices=devices, power=2)
    found, rest = run(state, blocks, weights)
    mean = (x.astype(np.float64) ** 2).mean(0)
    np.testing.assert_allclose(found["mean"], 1 + mean, rtol=1e-6)
    np.testing.assert_allclose(parallel.unshard(rest, n), x - mean, rtol=1e-5, atol=1e-6)
    alone = mean_body(state, x, np.ones(n, np.float32), power=2)[0]  # unmapped
    np.testing.assert_allclose(alone["mean"], 1 + mean, rtol=1e-6)


def test_a_training_step_on_eight_devices():
    x, truth = rows(61), np.arange(5, dtype=np.float32)
    y = x @ truth
    (xb, w), (yb, _) = parallel.shard(x, 8), parallel.shard(y, 8)
    step = parallel.map_devices(train_body, (None, 0, 0, 0), None, devices=8)
    params, by_hand, x1 = np.zeros(5, np.float32), np.zeros(5), x.astype(np.float64)
    for _ in range(3):
        params, _ = step(params, xb, yb, w)
        # pmean divides the summed gradient by the number of devices
        by_hand = by_hand - 0.01 / 8 * 2 * x1.T @ (x1 @ by_hand - y)
    np.testing.assert_allclose(params, by_hand, rtol=1e-5)


def test_compiled_once():
    traces = []

    def body(x):
        traces.append(x.shape)
        return parallel.psum(x.sum())

    for _ in range(3):
        out = parallel.map_devices(body, (0,), None, devices=8)(np.ones((8, 4), np.float32))
    assert len(traces) == 1 and float(out) == 32
    assert parallel.map_devices(body, (0,), None, devices=8) is parallel.map_devices(
        body, (0,), None, devices=8
    )


def test_replicated_result_can_go_back_in():
    blocks, weights = parallel.shard(rows(64), 8)
    step = parallel.map_devices(mean_body, (None, 0, 0), (None, 0), devices=8)
    state = parallel.replicate({"mean": np.zeros(5, np.float32)}, 8)
    blocks, weights = parallel.place((blocks, weights), 8)
    once = step(state, blocks, weights)[0]
    twice = step(once, blocks, weights)[0]
    assert once["mean"].is_fully_replicated and len(once["mean"].devices()) == 8
    np.testing.assert_allclose(twice["mean"], 2 * once["mean"], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parallel.local_devices(9), "this process has 8"),
        (lambda: parallel.local_devices([]), "empty"),
        (lambda: parallel.map_devices(mean_body, (None,)), "in_axes 0"),
        (
            lambda: parallel.map_devices(mean_body, (None, 0, 0), (None, 0), devices=8)(
                {"mean": 0.0}, rows(4), rows(4)
            ),
            "8 devices",
        ),
        (lambda: parallel.shard(rows(9), 2, rows=4), "at least 5"),
        (lambda: parallel.unshard(rows(9)[None], 10), "cannot take 10"),
        (lambda: parallel.initialize("localhost:1", 2, None), "JAX_PROCESS_ID"),
        (lambda: parallel.initialize("localhost:1", 2, 2), "from 0 to 1"),
    ],
)
def test_errors_say_what_is_wrong(call, words):
    with pytest.raises(UsageError, match=words):
        call()


def test_initialize_alone_does_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert parallel.initialize() == (0, 1)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UsageError, match="integer"):
        parallel.initialize()


def varied(key, images, masks, certainty, target, pasted, edge):
    """What a student sees of generated images, and of photos."""
    key = parallel.step_key(key)
    recipe = Recipe(side=16, augmentation=replace(VIEWS, background=0.5))
    seen = _shown(key, images, masks, certainty, recipe)
    return *seen, *view(key, images, target, images, pasted, edge, recipe)


def test_random_draws_do_not_depend_on_the_number_of_devices():
    rng = np.random.default_rng(0)
    shapes = ((8, 16, 16, 3), (8, 16, 16), (8, 16, 16), (8, 16, 16, 2), (8,), (8, 3))
    data = [rng.integers(0, 255, shape, dtype=np.uint8) for shape in shapes]
    data[1], data[4] = data[1] % 2, (data[4] % 2).astype(np.float32)

    def seen(devices):
        blocks = (parallel.shard(rows, devices)[0] for rows in data)
        axes = (None, *(0,) * len(data))
        found = parallel.map_devices(varied, axes, devices=devices)(jax.random.key(3), *blocks)
        return [parallel.unshard(np.asarray(rows), 8) for rows in found]

    one, four = seen(1), seen(4)
    for a, b in zip(one, four, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_cluster_that_jax_knows(monkeypatch):
    """JAX itself reads the variable, in which "auto" would be a host."""
    joined = []
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "auto")
    monkeypatch.setattr(jax.distributed, "initialize", lambda: joined.append(dict(os.environ)))
    assert parallel.initialize() == (0, 1)
    assert len(joined) == 1 and "JAX_COORDINATOR_ADDRESS" not in joined[0]


def test_a_machine_that_is_no_cluster(monkeypatch):
    def refuse():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(SisError, match=r"could not join .*should be defined"):
        parallel.initialize("auto")


PROCESS = textwrap.dedent(
    """
    import jax
    import numpy as np
    from sis_jax import parallel
    me, count = parallel.initialize()
    assert count == 2

    def body(x, w):
        total, n = parallel.psum((w @ x, w.sum()))
        return total / n

    x = np.arange(7 * 3, dtype=np.float32).reshape(7, 3)
    mine = x[:4] if me == 0 else x[4:]
    blocks, weights = parallel.shard(mine, parallel.device_count(), rows=2)
    everywhere = parallel.map_devices(body, (0, 0), None, devices=jax.devices())
    mean = everywhere(blocks, weights)
    print("MEAN", np.round(np.asarray(mean), 4).tolist())
    """
)


@pytest.mark.slow
def test_two_processes():
    env = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"localhost:{faults.free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PLATFORMS": "cpu",
    }
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    args = [sys.executable, "-c", PROCESS]
    running = [
        subprocess.Popen(
            args, env={**env, "JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=120)[0] for p in running]
    finally:
        for p in running:
            p.kill()
    assert [p.returncode for p in running] == [0, 0]
    for out in outputs:
        assert "MEAN [9.0, 10.0, 11.0]" in out


@pytest.mark.parametrize(
    "platform, capability, fast",
    [
        ("cpu", None, False),
        ("tpu", None, True),
        ("gpu", "7.5", False),
        ("gpu", "8.0", True),
        ("gpu", "12.1", True),
        ("gpu", "gfx90a", True),
    ],
)
def test_bfloat16_where_the_device_has_it(platform, capability, fast):
    device = SimpleNamespace(platform=platform)
    if capability is not None:
        device.compute_capability = capability
    assert parallel.fast_in_bfloat16(device) == fast
