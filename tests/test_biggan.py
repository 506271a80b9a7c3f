"""BigGAN-deep: the published implementation's pictures and features, spectral norm, truncation
statistics, classes, and files that do not fit.

The golden network was made once with pytorch_pretrained_biggan 0.1.1 and torch 2.13:
`BigGAN(BigGANConfig.from_dict(json.load(biggan32-config.json)))` with every parameter and batch
norm statistic drawn by torch.manual_seed(0) (gamma 0.7), three forward passes in train mode so that
u and v are those of a few power iterations, then `torch.save(state_dict,
biggan32-pytorch_model.bin, _use_new_zipfile_serialization=False)`. biggan32.npz: z of
`truncated_noise_sample(1, 4, 1.0, seed)` for seeds 0 and 1, classes, pictures `image_T` of `model(T
z, one_hot(classes), T)`, and what modules of `generator.layers` gave for the first picture at T =
0.4.
"""

import json
import shutil

import checkpoint_factory as factory
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sis_jax
from sis_jax.checkpoints import convert, files, verify
from sis_jax.checkpoints.containers import read_tree
from sis_jax.checkpoints.layouts.biggan import published_settings
from sis_jax.checkpoints.load import save_generator
from sis_jax.checkpoints.sources import recognise
from sis_jax.models.biggan import interpolate, stats_position
from sis_jax.types import Generator, SisError, UsageError

CHECKPOINT = "biggan32-pytorch_model.bin"
TAPS = {
    "4x4": "layer0",
    "8x8": "layer3",
    "16x16": "layer4",
    "32x32": "layer5",
}  # layer2 is the attention


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIS_JAX_CONVERTED", str(tmp_path / "cache"))


@pytest.fixture
def state(goldens):
    path = goldens / "gan" / CHECKPOINT
    return dict(recognise(read_tree(path), path.stat().st_size, "it").generator.arrays)


@pytest.fixture(scope="module")
def gen(goldens, tmp_path_factory):
    return sis_jax.load_generator(
        convert.convert(
            goldens / "gan" / CHECKPOINT, tmp_path_factory.mktemp("biggan") / "out", "biggan"
        )
    )


@pytest.fixture(scope="module")
def expected(goldens):
    return dict(np.load(goldens / "gan" / "biggan32.npz"))


@pytest.mark.parametrize("truncation", [1.0, 0.4, 0.45])
def test_pictures_and_features(gen, expected, truncation):
    """0.4 is a row of the statistics, 0.45 lies between two."""
    w = gen.map(expected["z"], truncation, labels=jnp.eye(5)[expected["classes"]])
    image, features = gen.synthesize(w, taps=gen.taps)
    np.testing.assert_allclose(image, expected[f"image_{truncation}"], atol=1e-5)
    assert gen.resolution == 32 and gen.taps == tuple(TAPS)
    if truncation == 0.4:
        for tap, layer in TAPS.items():
            np.testing.assert_allclose(features[tap][:1], expected[f"feat_0.4/{layer}"], atol=1e-5)


def test_seeds_are_those_of_the_published_tools(gen, expected):
    np.testing.assert_allclose(gen.latents([0, 1])[:, :-1], expected["z"], atol=1e-6)
    assert float(jnp.abs(gen.latents(range(300))[:, :-1]).max()) <= 2
    with pytest.raises(UsageError, match="seed -1 is out of range"):
        gen.latents([-1])


def test_half_precision_is_close(gen):
    w = gen.map(gen.latents(range(2)), 0.4)
    whole, half = gen.synthesize(w)[0], gen.synthesize(w, dtype="bfloat16")[0]
    assert 0 < float(jnp.abs(whole - half).mean()) < 0.05


def test_protocol(gen):
    assert isinstance(gen, Generator) and gen.z_dim == 5 and gen.w_dim == 9 and gen.num_ws == 1
    samples = gen.sample([4, 9], truncation=0.6, taps=("8x8",))
    assert samples.w.shape == (2, 1, 9) and samples.features["8x8"].shape == (2, 8, 8, 16)
    np.testing.assert_allclose(samples.w[:, 0, :4], 0.6 * samples.z[:, :4], rtol=1e-6)
    np.testing.assert_allclose(
        gen.sample([9], truncation=0.6).images, samples.images[1:], atol=1e-5
    )
    traced = jax.jit(lambda gen, z, psi: gen.synthesize(gen.map(z, psi))[0])(
        gen, samples.z, jnp.float32(0.6)
    )
    np.testing.assert_allclose(traced, samples.images, atol=1e-5)
    for wrong in (
        lambda: gen.map(jnp.zeros((2, 4))),
        lambda: gen.map(jnp.zeros((2, 5)), labels=jnp.eye(4)[:2]),
        lambda: gen.synthesize(jnp.zeros((2, 2, 9))),
        lambda: gen.synthesize(jnp.zeros((2, 8))),
        lambda: gen.synthesize(jnp.zeros((2, 9)), taps=("64x64",)),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_statistics_between_two_truncations():
    assert [float(stats_position(t, 51)) for t in (0, 0.4, 0.7, 0.45, 1, 3)] == pytest.approx(
        [0, 20, 35, 22.5, 50, 50]
    )
    assert float(stats_position(0.404, 51)) == pytest.approx(
        20.8
    )  # the published weights: 0.2 of row 20, 0.8 of row 21
    table = jnp.arange(12.0).reshape(6, 2)
    np.testing.assert_allclose(
        interpolate(table, jnp.array([0, 2.25, 5, 9])), [[0, 1], [4.5, 5.5], [10, 11], [10, 11]]
    )
    np.testing.assert_allclose(interpolate(table[:1], jnp.array([0.0, 3])), [[0, 1], [0, 1]])


def test_classes(gen, goldens, tmp_path):
    """A seed stands for a class; the choice can be narrowed, at load time or when converting, and
    is kept by save and load.
    """

    def drawn(g, n=400):
        w = g.map(g.latents(range(n)))[:, 0, 4:8]
        return np.argmin(
            np.abs(np.asarray(w)[:, None] - np.asarray(gen.embedding[...])[None]).sum(-1), axis=1
        )

    assert np.bincount(drawn(gen), minlength=5).min() > 50
    assert set(drawn(gen.with_classes(3))) == {3} and set(drawn(gen.with_classes([1, 4]))) == {1, 4}
    assert set(drawn(gen)) == set(range(5))  # the original is as it was
    one = sis_jax.load_generator(goldens / "gan" / CHECKPOINT, classes=3)
    z = one.latents([7])
    np.testing.assert_allclose(one.map(z), gen.map(z, labels=jnp.eye(5)[3:4]), atol=1e-6)
    folder = convert.convert(goldens / "gan" / CHECKPOINT, tmp_path / "two", classes=[0, 2])
    assert set(drawn(sis_jax.load_generator(folder))) == {0, 2}
    save_generator(one, tmp_path / "saved")
    assert sis_jax.load_generator(tmp_path / "saved").config == one.config
    for classes, told in (
        (5, "there is no class 5: this generator has 5"),
        ([], "classes is empty"),
    ):
        with pytest.raises(UsageError, match=told):
            gen.with_classes(classes)


def test_published_folder(goldens, tmp_path):
    """config.json beside pytorch_model.bin, given as a folder; without it the layout of the
    published networks is taken, and said.
    """
    folder = tmp_path / "biggan-tiny"
    folder.mkdir()
    shutil.copy(goldens / "gan" / CHECKPOINT, folder / "pytorch_model.bin")
    shutil.copy(goldens / "gan" / "biggan32-config.json", folder / "config.json")
    gen = sis_jax.load_generator(folder)
    assert gen.resolution == 32 and gen.info.name == "biggan-tiny"
    before = (folder / "config.json").read_bytes()
    for place in (folder, folder / "inside", tmp_path):
        with pytest.raises(
            UsageError, match="is the folder of the checkpoint itself, or is inside it"
        ):
            convert.convert(folder, place, overwrite=True)
    assert (folder / "config.json").read_bytes() == before
    out = convert.convert(folder, tmp_path / "out")
    assert (
        files.read_config(out).name == "biggan-tiny"
        and "stored" in verify.verify(out)
        and "to the byte" in verify.verify(out)
    )
    (folder / "config.json").unlink()
    bare = convert.convert(folder / "pytorch_model.bin", tmp_path / "bare")
    assert any("every other block" in note for note in files.read_config(bare).notes)
    assert files.read_config(bare).generator["ups"] == [False, True, False, True, False]
    (folder / "config.json").write_text("{")
    with pytest.raises(
        SisError, match=r"config\.json, beside the BigGAN checkpoint, cannot be read"
    ):
        convert.convert(folder / "pytorch_model.bin", tmp_path / "torn")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [[False, 16, 16]]},
        {"layers": "all"},
        {"layers": [[False, 16, 16], [True, 16, 8], [False, 8, 4], [True, 4, 2], [True, 2, 3]]},
        {"output_dim": 64},
        {"eps": "small"},
        {"layers": [[False, 16, 16], [True, 16, 8], [False, 8, 4], [True, 4, 2], [1.5, 2, 1]]},
    ],
)
def test_settings_of_another_network(goldens, tmp_path, change):
    shutil.copy(goldens / "gan" / CHECKPOINT, tmp_path / "pytorch_model.bin")
    settings = published_settings(goldens / "gan" / CHECKPOINT)
    (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
    with pytest.raises(SisError, match="belongs to another BigGAN"):
        convert.convert(tmp_path / "pytorch_model.bin", tmp_path / "out")


def test_without_spectral_norm(gen, state, tmp_path):
    """Files in which it was removed, and torch's old ones that keep u only: there v is one power
    iteration from u.
    """
    plain = {}
    for key, value in state.items():
        if key.endswith("_orig"):
            stem = key.removesuffix("_orig")
            u, v = state[stem + "_u"], state[stem + "_v"]
            plain[stem] = value / np.float32(u @ value.reshape(len(value), -1) @ v)
        elif not key.endswith(("_u", "_v")):
            plain[key] = value
    old = {key: value for key, value in state.items() if not key.endswith("_v")}
    w = gen.map(gen.latents([3]), 0.4)
    for name, arrays, tolerance in (("plain", plain, 1e-5), ("old", old, 0.5)):
        (tmp_path / f"{name}-pytorch_model.bin").write_bytes(factory.torch_zip(arrays))
        (tmp_path / f"{name}-config.json").write_text(
            json.dumps({"layers": [[i in (1, 3, 4), a, b] for i, (a, b) in enumerate(WIDTHS)]})
        )
        other = sis_jax.load_generator(tmp_path / f"{name}-pytorch_model.bin")
        np.testing.assert_allclose(other.synthesize(w)[0], gen.synthesize(w)[0], atol=tolerance)


WIDTHS = ((16, 16), (16, 8), (8, 4), (4, 2), (2, 1))


def test_all_faults_at_once(state, tmp_path):
    state["surprise"] = np.zeros((2, 3), np.float32)
    del state["generator.layers.0.bn_1.running_means"]
    state["generator.layers.1.conv_1.weight_u"] = np.zeros(3, np.float32)
    state["generator.layers.4.conv_0.weight_u"] = np.zeros_like(
        state["generator.layers.4.conv_0.weight_u"]
    )
    state["generator.bn.bias"] = np.zeros(9, np.float32)
    (tmp_path / "bad.bin").write_bytes(factory.torch_zip(state))
    with pytest.raises(SisError) as error:
        convert.convert(tmp_path / "bad.bin", tmp_path / "out")
    told = str(error.value)
    assert (
        "spectral norm: generator.layers.1.conv_1.weight_u or generator.layers.1.conv_1.weight_v "
        "is missing or does not fit" in told
    )
    assert "spectral norm: that of generator.layers.4.conv_0.weight_orig is 0.0" in told


def test_missing_and_surplus(state, tmp_path):
    state["surprise"] = np.zeros((2, 3), np.float32)
    del state["generator.layers.0.bn_1.running_means"]
    state["generator.bn.bias"] = np.zeros(9, np.float32)
    (tmp_path / "bad.bin").write_bytes(factory.torch_zip(state))
    with pytest.raises(SisError) as error:
        convert.convert(tmp_path / "bad.bin", tmp_path / "out")
    for told in (
        "3 faults",
        "unknown: surprise, file has [2, 3]",
        "missing: block0.bn1.means, model has [6, 16]",
        "shape: bn.offset, file has [9], model has [4]",
    ):
        assert told in str(error.value)


def test_damaged_config(gen, tmp_path):
    save_generator(gen, tmp_path / "w")
    folder = files.read_config(tmp_path / "w")
    changes = (
        {"ups": [True]},
        {"channels": [10**9] * 6},
        {"attention": 77},
        {"eps": None},
        {"ups": [1] * 5},
        {"classes": [7]},
        {"more": 1},
        {"z_dim": "4"},
        {"channels": 3},
    )
    for change in changes:
        files.write_config(
            tmp_path / "w",
            files.Folder(**{**vars(folder), "generator": {**folder.generator, **change}}),
        )
        with pytest.raises(SisError, match="describes no BigGAN"):
            sis_jax.load_generator(tmp_path / "w")
