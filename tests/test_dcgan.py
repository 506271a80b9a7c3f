"""DCGAN: the network against transposed convolution by definition, the conversion of PyTorch state
dicts, the generator protocol.
"""

from itertools import pairwise

import checkpoint_factory as factory
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import sis_jax
from sis_jax.checkpoints import convert, files
from sis_jax.models.dcgan import conv_transpose
from sis_jax.types import Generator, SisError, UsageError

WIDTHS = (6, 12, 8, 5, 3)  # z, three stages, RGB: 32 pixels


def scatter(x, weight, stride, padding):
    """Transposed convolution by definition: every input number adds its multiple of the kernel. x
    [n h w i], weight [i o k k], as torch has it.
    """
    n, h, w, _ = x.shape
    k = weight.shape[2]
    out = np.zeros((n, (h - 1) * stride + k, (w - 1) * stride + k, weight.shape[1]))
    for row in range(h):
        for column in range(w):
            stamp = np.einsum("ni,iokl->nklo", x[:, row, column], weight)
            out[:, row * stride : row * stride + k, column * stride : column * stride + k] += stamp
    return out[:, padding : out.shape[1] - padding, padding : out.shape[2] - padding]


def reference(state, z):
    """The whole network in float64, batch norm in inference mode; picture and the output of each
    stage.
    """
    x, stages = z[:, None, None, :].astype(np.float64), []
    for i in range(len(WIDTHS) - 1):
        x = scatter(
            x, state[f"main.{3 * i}.weight"].astype(np.float64), *((1, 0) if i == 0 else (2, 1))
        )
        if i == len(WIDTHS) - 2:
            return np.tanh(x), stages
        weight, bias, mean, var = (
            state[f"main.{3 * i + 1}.{p}"].astype(np.float64)
            for p in ("weight", "bias", "running_mean", "running_var")
        )
        x = np.maximum((x - mean) / np.sqrt(var + 1e-5) * weight + bias, 0)
        stages.append(x)
    raise AssertionError


@pytest.fixture
def state():
    rng = np.random.RandomState(0)
    made = {}
    for i, (n_in, n_out) in enumerate(pairwise(WIDTHS)):
        made[f"main.{3 * i}.weight"] = (0.3 * rng.randn(n_in, n_out, 4, 4)).astype(np.float32)
        if n_out != 3:
            for part, draw in (
                ("weight", rng.randn),
                ("bias", rng.randn),
                ("running_mean", rng.randn),
                ("running_var", rng.rand),
            ):
                made[f"main.{3 * i + 1}.{part}"] = draw(n_out).astype(np.float32)
            made[f"main.{3 * i + 1}.num_batches_tracked"] = np.array(7)
    return made


@pytest.fixture
def gen(state, tmp_path):
    save_file(state, tmp_path / "dcgan.safetensors")
    return sis_jax.load_generator(
        convert.convert(tmp_path / "dcgan.safetensors", tmp_path / "out", "dcgan", licence="MIT")
    )


def test_transposed_convolution():
    rng = np.random.RandomState(0)
    x, weight = rng.randn(2, 3, 5, 4), rng.randn(4, 7, 4, 4)
    ours = conv_transpose(
        jnp.asarray(x, jnp.float32), jnp.asarray(weight.transpose(2, 3, 0, 1), jnp.float32)
    )
    np.testing.assert_allclose(ours, scatter(x, weight, 2, 1), atol=1e-4)


def test_network(gen, state):
    z = gen.latents(range(3))
    expected, stages = reference(state, np.asarray(z))
    image, features = gen.synthesize(gen.map(z), taps=gen.taps)
    assert gen.taps == ("4x4", "8x8", "16x16") and gen.resolution == 32 and expected.std() > 0.1
    np.testing.assert_allclose(image, expected, atol=1e-5)
    for tap, stage in zip(gen.taps, stages, strict=True):
        np.testing.assert_allclose(features[tap], stage, atol=1e-4)
    half, _ = gen.synthesize(gen.map(z), dtype="bfloat16")
    assert 0 < np.abs(half - image).mean() < 0.02


def test_protocol(gen):
    assert isinstance(gen, Generator)
    assert gen.info.licence == "MIT" and gen.info.source == "dcgan.safetensors"
    samples = gen.sample([4, 9], truncation=0.5, taps=("8x8",))
    assert samples.w.shape == (2, 1, 6) and samples.features["8x8"].shape == (2, 8, 8, 8)
    np.testing.assert_allclose(samples.w[:, 0], 0.5 * samples.z)
    np.testing.assert_allclose(
        gen.sample([9], truncation=0.5).images, samples.images[1:], atol=1e-5
    )
    for wrong in (
        lambda: gen.map(jnp.zeros((2, 5))),
        lambda: gen.synthesize(jnp.zeros((2, 2, 6))),
        lambda: gen.synthesize(jnp.zeros((2, 6)), taps=("32x32",)),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_pytorch_file_gives_the_same(gen, state, tmp_path, monkeypatch):
    monkeypatch.setenv("SIS_JAX_CONVERTED", str(tmp_path / "cache"))
    (tmp_path / "dcgan.pt").write_bytes(factory.torch_zip(state))
    other = sis_jax.load_generator(tmp_path / "dcgan.pt")
    np.testing.assert_allclose(other.sample([0]).images, gen.sample([0]).images, atol=1e-6)


def test_faults(state, tmp_path):
    del state["main.4.running_mean"]
    state["main.7.bias"] = np.zeros(4, np.float32)
    state["fc.weight"] = np.zeros((2, 2), np.float32)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(SisError) as error:
        convert.convert(tmp_path / "bad.safetensors", tmp_path / "out")
    for told in (
        "missing: main.4.running_mean, model has [8]",
        "shape: main.7.bias, file has [4], model has [5]",
        "unknown: fc.weight, file has [2, 2]",
    ):
        assert told in str(error.value)


def test_damaged_config(gen, tmp_path):
    folder = files.read_config(tmp_path / "out")
    for channels in ([], [10**9], ["8"], 3, [8] * 50):
        files.write_config(
            tmp_path / "out",
            files.Folder(**{**vars(folder), "generator": {"z_dim": 6, "channels": channels}}),
        )
        with pytest.raises(SisError, match="describes no DCGAN"):
            sis_jax.load_generator(tmp_path / "out")
