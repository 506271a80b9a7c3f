"""`ops/plan.py`: how many samples go through a network at a time."""

import subprocess
import sys
import time
from functools import partial

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sis_jax.ops import plan
from sis_jax.ops.sampling import collect, map_samples, probe, quantised
from sis_jax.types import SisError, to_uint8


def draw(gen, z, truncation, *, taps=()):
    image, features = gen.synthesize(gen.map(z, truncation), "const", taps)
    return features[taps[0]] if taps else image


def arguments(gen, rows=1):
    return gen, np.zeros((rows, gen.z_dim), np.float32), np.float32(1)


def planned(gen, **settings):
    settings = {"platform": "cpu"} | settings
    return plan.rows_at_once(draw, (None, 0, None), arguments(gen), **settings)


@pytest.fixture(scope="module")
def gen():
    return fakes.tiny_stylegan2(32)


def test_a_small_network_takes_what_the_platform_is_used_to(gen):
    assert planned(gen)[0] == 16
    assert planned(gen, platform="gpu")[0] == 256
    assert planned(gen, most=5)[0] == 5


def test_fewer_rows_where_memory_is_short(gen, monkeypatch):
    needed = planned(gen)[1]
    monkeypatch.setattr(plan, "CPU_BYTES", needed // 3)
    fewer, bytes_then = planned(gen)
    assert fewer == 4 and bytes_then <= needed // 3
    monkeypatch.setattr(plan, "CPU_BYTES", 1)
    assert planned(gen)[0] == 1


def test_the_number_depends_on_shapes_alone(gen):
    one, many = (
        plan.rows_at_once(draw, (None, 0, None), arguments(gen, n), "cpu") for n in (1, 500)
    )
    assert one == many


@pytest.mark.parametrize("taps", [(), ("8x8",), ("32x32",)])
def test_bytes_agree_with_those_of_xla(gen, taps):
    body, given = partial(draw, taps=taps), arguments(gen, 16)
    facts = jax.jit(body).lower(*given).compile().memory_analysis()
    measured = facts.temp_size_in_bytes + facts.output_size_in_bytes
    assert 0.5 < plan.bytes_of(body, *given) / measured < 2


def test_what_nothing_depends_on_is_not_counted(gen):
    """Layers above the tap are not run, so they need no memory."""
    coarse, fine = (
        plan.bytes_of(partial(draw, taps=(t,)), *arguments(gen)) for t in ("8x8", "32x32")
    )
    assert coarse < fine / 4


def test_loops_count_one_round():
    def body(x):
        return jax.lax.map(lambda row: jnp.outer(row, row).sum(0), x)

    x = np.zeros((100, 64), np.float32)
    assert 64 * 64 * 4 <= plan.bytes_of(body, x) < 5 * 64 * 64 * 4 + 2 * x.nbytes


def test_refusal_says_what_is_needed_and_there(gen, monkeypatch):
    monkeypatch.setattr(plan, "memory_there", lambda device: 1000)
    with pytest.raises(SisError, match=r"needs about .* GB .* free"):
        next(map_samples(gen, [0], draw))


def test_collect_is_what_map_samples_gives(gen, monkeypatch):
    whole = collect(gen, list(range(21)), draw, batch=4, devices=2)
    parts = list(map_samples(gen, list(range(21)), draw, batch=4, devices=2))
    assert len(parts) == 3 and np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_seed_has_the_same_bits_in_any_company(gen, devices):
    alone = collect(gen, [7], draw, devices=1)
    among = collect(gen, list(range(19)), draw, devices=devices)
    assert np.array_equal(alone[0], among[7])


def test_images_are_quantised_on_the_device_to_the_bit():
    """Also where a compiler could join the product and the sum: just below and above each step."""
    step = ((np.arange(-20, 280) - 128) / 127.5).astype(np.float32)
    near = [step, np.nextafter(step, np.float32(9)), np.nextafter(step, np.float32(-9))]
    images = np.concatenate([*near, np.random.default_rng(0).normal(size=4200)], dtype=np.float32)
    images = images.reshape(-1, 1, 1, 3)
    assert np.array_equal(jax.jit(quantised)(images), to_uint8(images))


def test_what_is_collected_is_not_copied_to_a_cpu(gen):
    found = collect(gen, list(range(3)), draw)
    assert jax.device_put(found).unsafe_buffer_pointer() == found.ctypes.data


def test_a_trial_counts_the_samples_after_the_first_batch():
    def stream():
        time.sleep(0.2)  # as compiling takes
        while True:
            yield np.zeros((4, 2)), np.zeros(4)
            time.sleep(0.02)

    tried = probe(stream(), seconds=0.3)
    assert tried.first >= 0.2 and 0.005 <= tried.each < 0.1
    assert tried.memory > 2**24


def test_fewer_devices_of_a_cpu_where_one_sample_is_large():
    cpus = jax.devices()[:2]
    assert len(plan.devices_at_once(plan.CPU_BYTES, cpus)) == 2
    assert len(plan.devices_at_once(plan.CPU_BYTES + 1, cpus)) == 1


def test_a_large_pass_finds_no_holes_and_leaves_none(gen, monkeypatch):
    happened = []
    monkeypatch.setattr(plan, "give_back", lambda: happened.append("trimmed"))
    for most, expected in ((1, ["trimmed", "drawn", "trimmed"]), (2**40, ["drawn"])):
        monkeypatch.setattr("sis_jax.ops.sampling.LARGE", most)
        happened.clear()
        happened.extend("drawn" for _ in map_samples(gen, [0], draw))
        assert happened == expected


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_given_back():
    code = """
import numpy as np
from sis_jax.runs import machine
kept = machine.keep_memory()
from sis_jax.ops import plan

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

blocks = [np.ones(2**22) for _ in range(8)]
del blocks[:-1]  # the last one is above the others in the heap
before = held()
plan.give_back()
print(int(kept), before - held())
"""
    run = [sys.executable, "-c", code]
    kept, back = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert kept == "0" or int(back) > 5 * 2**25
