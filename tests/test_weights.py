"""Weights folders, names, conversion of every layout, and one clear error for everything that does
not fit.
"""

import hashlib
import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checkpoint_factory as factory
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sis_jax
from sis_jax.checkpoints import catalogue, convert, files, verify
from sis_jax.checkpoints.build import arrays_of
from sis_jax.checkpoints.containers import read_tree
from sis_jax.checkpoints.load import save_generator
from sis_jax.checkpoints.sources import recognise
from sis_jax.models.discriminator import Discriminator, DiscriminatorConfig
from sis_jax.models.stylegan2 import GeneratorConfig, StyleGAN2
from sis_jax.types import Generator, Info, SisError, UsageError

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "convert_weights.py"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIS_JAX_CONVERTED", str(tmp_path / "cache"))


def networks(path):
    """The generator's and the discriminator's arrays of a checkpoint, under the file's own
    names.
    """
    source = recognise(read_tree(path), path.stat().st_size, str(path))
    return (
        dict(source.generator.arrays),
        dict(source.discriminator.arrays) if source.discriminator else None,
    )


def picture(gen):
    return np.asarray(gen.sample([0, 1], truncation=0.7).images)


def same_numbers(a, b):
    a, b = arrays_of(a), arrays_of(b)
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_default_ships_and_loads():
    gen = sis_jax.load_generator()
    assert isinstance(gen, Generator) and gen.resolution == 64
    assert gen.info.name == "faces64" and "non-commercial" in gen.info.licence
    assert gen.info.sha256 == files.sha256_of(ROOT / "ported_weights" / "faces64" / files.MODEL)
    assert all(value.dtype == np.float32 for value in arrays_of(gen).values())
    images = picture(gen)
    assert (
        np.isfinite(images).all()
        and 0.1 < images.std() < 1
        and np.abs(images[0] - images[1]).mean() > 0.05
    )


def test_default_discriminator_tells_noise_from_faces():
    gen, disc = sis_jax.load_generator(), sis_jax.load_discriminator()
    faces = disc(gen.sample(range(8), truncation=0.8).images)
    noise = disc(
        jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (8, 64, 64, 3)).astype(np.float32))
    )
    assert float(faces.mean()) > float(noise.mean()) + 1


def test_shipped_and_names(tmp_path, monkeypatch):
    assert "faces64" in [info.name for info in catalogue.shipped()]
    with pytest.raises(UsageError, match=r"'facs64'.*did you mean 'faces64'"):
        sis_jax.load_generator("facs64")
    with pytest.raises(UsageError, match=r"looked for config.json"):
        sis_jax.load_generator(tmp_path)
    with pytest.raises(UsageError, match=r"download https://.*put it at"):
        sis_jax.load_generator("ffhq-1024")
    assert {
        "ffhq-256",
        "ffhq-512",
        "afhq-cat",
        "afhq-dog",
        "afhq-wild",
        "lsun-horse",
        "lsun-cat",
        "lsun-car",
        "lsun-church",
    } <= set(catalogue.PUBLIC)
    save_generator(sis_jax.load_generator(), tmp_path / "mine")
    monkeypatch.setenv("SIS_JAX_WEIGHTS", str(tmp_path))
    assert sis_jax.load_generator("mine").info.name == "faces64"
    assert sis_jax.load_generator(tmp_path / "mine" / "model.safetensors").resolution == 64


def test_public_checkpoints(goldens, tmp_path, monkeypatch):
    """Fields are of a kind that can be checked; a file under a published name with another digest
    is refused.
    """
    for name, public in catalogue.PUBLIC.items():
        assert name == public.name and public.source.startswith("https://") and public.licence
        assert re.fullmatch(
            r"[\w.-]+\.(pkl|pt|bin|h5|safetensors)", public.file
        ) and public.resolution in (32, 64, 128, 256, 512, 1024)
        assert public.size >= 0 and re.fullmatch(r"([0-9a-f]{64})?", public.sha256)
    assert len({p.file for p in catalogue.PUBLIC.values()}) == len(catalogue.PUBLIC)
    content = (goldens / "gan" / "ada16.pkl").read_bytes()
    (tmp_path / "afhqcat.pkl").write_bytes(content)
    assert (
        files.read_config(convert.convert(tmp_path / "afhqcat.pkl", tmp_path / "a")).name
        == "afhq-cat"
    )
    for digest, fits in ((hashlib.sha256(content).hexdigest(), True), ("0" * 64, False)):
        monkeypatch.setitem(
            catalogue.PUBLIC, "afhq-cat", replace(catalogue.PUBLIC["afhq-cat"], sha256=digest)
        )
        if fits:
            convert.convert(tmp_path / "afhqcat.pkl", tmp_path / "b")
        else:
            with pytest.raises(SisError, match=r"is not the published afhqcat\.pkl"):
                convert.convert(tmp_path / "afhqcat.pkl", tmp_path / "c")


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0), ("float16", 0.05)])
def test_save_and_load(tmp_path, dtype, tolerance):
    config = GeneratorConfig(16, (8, 8, 8), 12, 10, 0, 3, 11, 256.0)
    rng = np.random.default_rng(0)
    gen = StyleGAN2(config, rng, Info("mine", "CC0", "here"))
    disc = Discriminator(DiscriminatorConfig(16, (8, 8, 8), conv_clamp=256.0), rng)
    save_generator(gen, tmp_path / "w", disc, dtype=dtype)
    assert {p.name for p in (tmp_path / "w").iterdir()} == {
        "config.json",
        "model.safetensors",
        "discriminator.safetensors",
        "README.md",
    }
    back = sis_jax.load_generator(tmp_path / "w")
    assert back.config == config and back.info.name == "mine" and back.info.licence == "CC0"
    assert sis_jax.load_discriminator(tmp_path / "w").config == disc.config
    assert np.abs(picture(back) - picture(gen)).max() <= tolerance * np.abs(picture(gen)).max()


def test_damaged_folders(tmp_path):
    gen = sis_jax.load_generator()
    folder = tmp_path / "w"
    save_generator(gen, folder)
    arrays = load_file(folder / files.MODEL)
    arrays["synthesis.b8.conv1.weight"][0, 0, 0, 0] = np.nan
    save_file(arrays, folder / files.MODEL)
    with pytest.raises(SisError, match=r"is not the file that config.json describes"):
        sis_jax.load_generator(folder)
    config = json.loads((folder / files.CONFIG).read_text())
    config["sha256"] = {}
    (folder / files.CONFIG).write_text(json.dumps(config))
    with pytest.raises(SisError, match=r"synthesis\.b8\.conv1\.weight holds 1 NaN"):
        sis_jax.load_generator(folder)
    del arrays["mapping.w_avg"]
    arrays["synthesis.b8.conv1.weight"] = np.zeros((3, 3, 4, 5), np.float32)
    arrays["extra"] = np.zeros(3, np.float32)
    save_file(arrays, folder / files.MODEL)
    with pytest.raises(SisError) as error:
        sis_jax.load_generator(folder)
    for told in (
        "3 faults",
        "missing: mapping.w_avg, model has [128]",
        "surplus: extra, file has [3]",
        "file has [3, 3, 4, 5], model has [3, 3, 128, 128]",
    ):
        assert told in str(error.value)
    for text in (
        "{",
        "[]",
        '{"format": "sis_jax weights", "version": 99}',
        '{"format": "sis_jax weights", "version": 1, "kind": 3}',
    ):
        (folder / files.CONFIG).write_text(text)
        with pytest.raises(SisError):
            sis_jax.load_generator(folder)
    bad = {**config["generator"], "resolution": 10**9}
    (folder / files.CONFIG).write_text(json.dumps({**config, "generator": bad}))
    with pytest.raises(SisError, match="describes no StyleGAN2"):
        sis_jax.load_generator(folder)


def test_saving_refuses_nan(tmp_path):
    gen = sis_jax.load_generator()
    gen.mapping.w_avg[...] = gen.mapping.w_avg[...].at[3].set(jnp.nan)
    with pytest.raises(SisError, match=r"mapping\.w_avg holds NaN"):
        save_generator(gen, tmp_path / "w")
    assert not (tmp_path / "w" / files.CONFIG).exists()


# Layouts


def test_state_dicts_of_both_namings(goldens, tmp_path):
    """The same network as a pickle, as .safetensors with prefixes, as a bare .pt and as a .pt saved
    by DataParallel.
    """
    original = goldens / "gan" / "ada16.pkl"
    g, d = networks(original)
    both = {f"G_ema.{k}": np.ascontiguousarray(v) for k, v in g.items()} | {
        f"D.{k}": np.ascontiguousarray(v) for k, v in d.items()
    }
    save_file(both, tmp_path / "both.safetensors")
    (tmp_path / "bare.pt").write_bytes(factory.torch_zip(g))
    (tmp_path / "parallel.pth").write_bytes(
        factory.torch_zip({f"module.{k}": v for k, v in g.items()})
    )
    for file in ("both.safetensors", "bare.pt", "parallel.pth"):
        same_numbers(sis_jax.load_generator(tmp_path / file), sis_jax.load_generator(original))
    same_numbers(
        sis_jax.load_discriminator(tmp_path / "both.safetensors"),
        sis_jax.load_discriminator(original),
    )
    with pytest.raises(UsageError, match=r"bare.pt has no discriminator"):
        sis_jax.load_discriminator(tmp_path / "bare.pt")


def test_training_checkpoint_without_average(goldens, tmp_path):
    """rosinality's training checkpoints lack latent_avg: it is estimated, which the config says;
    the averaged generator is taken.
    """
    g, d = networks(goldens / "gan" / "ros16_legacy.pt")
    average = g.pop("latent_avg")
    args = factory.Call(factory.Global("argparse", "Namespace"), (), {"size": 16})
    other = {k: np.zeros_like(v) for k, v in g.items()}
    tree = {
        "g": other,
        "d": d,
        "g_ema": g,
        "g_optim": {"state": {0: {"step": 3, "exp_avg": np.zeros(4, np.float32)}}},
        "args": args,
        "ada_aug_p": 0.5,
    }
    (tmp_path / "550000.pt").write_bytes(factory.torch_zip(tree))
    folder = convert.convert(tmp_path / "550000.pt", tmp_path / "out")
    assert any("average w was missing" in note for note in files.read_config(folder).notes)
    gen, original = (
        sis_jax.load_generator(folder),
        sis_jax.load_generator(goldens / "gan" / "ros16_legacy.pt"),
    )
    z = gen.latents(range(4))
    np.testing.assert_allclose(gen.map(z), original.map(z), atol=1e-6)
    mean = np.asarray(original.map(original.latents(range(2000))))[:, 0].mean(0)
    assert np.abs(np.asarray(gen.mapping.w_avg[...]) - mean).max() < 0.1 < np.abs(average).max()
    sis_jax.load_discriminator(folder)


def test_stripped_files(goldens, tmp_path):
    """Filters are rebuilt, noise maps drawn; a filter that is not the one built in is refused."""
    g, _ = networks(goldens / "gan" / "ros16_legacy.pt")
    stripped = {
        k: v for k, v in g.items() if not k.endswith("kernel") and not k.startswith("noises.")
    }
    (tmp_path / "old.pt").write_bytes(factory.torch_zip(stripped))
    folder = convert.convert(tmp_path / "old.pt", tmp_path / "out")
    assert any("noise maps were missing" in note for note in files.read_config(folder).notes)
    silent, _ = sis_jax.load_generator(folder).synthesize(jnp.ones((1, 32)), noise="none")
    expected, _ = sis_jax.load_generator(goldens / "gan" / "ros16_legacy.pt").synthesize(
        jnp.ones((1, 32)), noise="none"
    )
    np.testing.assert_allclose(silent, expected, atol=1e-5)
    name = next(k for k in g if k.endswith("blur.kernel"))
    (tmp_path / "other.pt").write_bytes(factory.torch_zip({**g, name: np.eye(4, dtype=np.float32)}))
    with pytest.raises(SisError, match=r"blur\.kernel.*not the filter \[1, 3, 3, 1\]"):
        convert.convert(tmp_path / "other.pt", tmp_path / "out2")


def test_all_faults_at_once(goldens, tmp_path):
    g, _ = networks(goldens / "gan" / "ada16.pkl")
    g["surprise"] = np.zeros((2, 3), np.float32)
    del g["synthesis.b8.conv1.bias"]
    g["synthesis.b16.torgb.weight"] = np.zeros((3, 99, 1, 1), np.float32)
    g["synthesis.b8.conv0.weight"] = np.full_like(g["synthesis.b8.conv0.weight"], np.inf)
    (tmp_path / "bad.pt").write_bytes(factory.torch_zip(g))
    with pytest.raises(SisError) as error:
        convert.convert(tmp_path / "bad.pt", tmp_path / "out")
    told = str(error.value)
    assert (
        "4 faults" in told
        and "unknown: surprise, file has [2, 3]" in told
        and "missing: synthesis.b8.conv1.bias, model has [16]" in told
    )
    assert (
        "synthesis.b16.torgb.weight, file has [1, 1, 99, 3], model has [1, 1, 16, 3]" in told
        and "synthesis.b8.conv0.weight holds" in told
    )
    assert not (tmp_path / "out").exists()


def test_facts_beside_the_arrays(goldens, tmp_path):
    """conv_clamp, stddev group and learning rate multiplier come from the modules' attributes;
    other architectures are refused.
    """
    g, d = networks(goldens / "gan" / "ada16.pkl")
    layers = {
        f"synthesis.b{r}.conv{i}": {"conv_clamp": 0.5, "activation": "lrelu"}
        for r in (4, 8, 16)
        for i in (0, 1)
    }
    said = {**layers, "synthesis.b8": {"architecture": "skip"}, "mapping.fc0": {"bias_gain": 0.02}}
    disc = {"b4.mbstd": {"group_size": 2}, "b8.conv0": {"conv_clamp": 0.5}}
    d = {
        **d,
        "b4.mbstd.resample_filter": np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.float32) / 64,
    }
    tree = {
        "G": None,
        "D": factory.persistent_module(d, disc),
        "G_ema": factory.persistent_module(g, said),
        "augment_pipe": None,
    }
    (tmp_path / "clamped.pkl").write_bytes(factory.pickled(tree))
    gen, disc = (
        sis_jax.load_generator(tmp_path / "clamped.pkl"),
        sis_jax.load_discriminator(tmp_path / "clamped.pkl"),
    )
    plain = sis_jax.load_generator(goldens / "gan" / "ada16.pkl")
    assert (
        gen.config.conv_clamp == 0.5
        and disc.config.conv_clamp == 0.5
        and disc.config.mbstd_group == 2
        and plain.config.conv_clamp is None
    )
    np.testing.assert_allclose(
        gen.mapping.fc0.weight[...], 2 * plain.mapping.fc0.weight[...], rtol=1e-6
    )
    _, features = gen.synthesize(jnp.ones((1, 16)), taps=("16x16",))
    assert float(jnp.abs(features["16x16"]).max()) <= 0.5
    said["synthesis.b8"] = {"architecture": "resnet"}
    (tmp_path / "resnet.pkl").write_bytes(
        factory.pickled({"G_ema": factory.persistent_module(g, said)})
    )
    with pytest.raises(SisError, match='architecture "resnet"'):
        sis_jax.load_generator(tmp_path / "resnet.pkl")


# The door


def test_convert_then_verify(goldens, tmp_path):
    folder = convert.convert(goldens / "gan" / "tf32.pkl", tmp_path / "tf")
    config = files.read_config(folder)
    assert config.source == {
        "file": "tf32.pkl",
        "sha256": files.sha256_of(goldens / "gan" / "tf32.pkl"),
        "layout": "tf",
    }
    assert "stored" in verify.verify(folder) and "to the byte" in verify.verify(folder)
    gen = sis_jax.load_generator(folder)
    gen.synthesis.b4.const[...] = gen.synthesis.b4.const[...] + 1
    save_generator(gen, tmp_path / "changed")
    changed = json.loads((tmp_path / "changed" / files.CONFIG).read_text())
    changed["digests"] = json.loads((folder / files.CONFIG).read_text())["digests"]
    (tmp_path / "changed" / files.CONFIG).write_text(json.dumps(changed))
    with pytest.raises(SisError, match="draws other images"):
        verify.verify(tmp_path / "changed")


def test_foreign_files_are_cached(goldens, tmp_path):
    path = goldens / "gan" / "ros16_legacy.pt"
    sis_jax.load_generator(path)
    (folder,) = (tmp_path / "cache" / "weights").iterdir()
    stamp = (folder / files.MODEL).stat().st_mtime_ns
    assert sis_jax.load_generator(path).info.source == "ros16_legacy.pt"
    assert (folder / files.MODEL).stat().st_mtime_ns == stamp


def test_script(goldens, tmp_path, capfd):
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(*args):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    code, out, err = run(goldens / "gan" / "ros32_zip.pt", "--out", tmp_path / "out", "--verify")
    assert code == 0 and out.strip() == str(tmp_path / "out") and "stored the digests" in err
    (tmp_path / "torn.pt").write_bytes((goldens / "gan" / "ros32_zip.pt").read_bytes()[:5000])
    for expected, *args in (
        (2, tmp_path / "none.pt"),
        (2, goldens / "gan" / "ros32_zip.pt", "--kind", "dcgan", "--out", tmp_path / "x"),
        (2, goldens / "gan" / "ros32_zip.pt", "--kind", "vae"),
        (2, tmp_path / "out"),
        (2,),
        (1, tmp_path / "torn.pt", "--out", tmp_path / "x"),
    ):
        code, out, err = run(*args)
        assert code == expected and "error:" in err and out == "" and not (tmp_path / "x").exists()
    code, out, _ = run("--list")
    assert code == 0 and "faces64" in out and "afhq-wild" in out


def test_script_from_the_shell(tmp_path):
    """Exit code and one sentence, no traceback."""
    (tmp_path / "page.pkl").write_bytes(b"<!DOCTYPE html>")
    command = [sys.executable, SCRIPT, tmp_path / "page.pkl", "--out", tmp_path / "x"]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (
        failed.returncode == 1
        and failed.stderr.startswith("error: ")
        and len(failed.stderr.splitlines()) == 1
    )


@pytest.mark.parametrize(
    "config", ['{"my": "project"}', '{"model_type": "x", "format": "mine"}', "{", "[]"]
)
def test_folders_of_others_are_left_alone(goldens, tmp_path, config):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, content in (("config.json", config), ("discriminator.safetensors", "theirs")):
        (theirs / name).write_text(content)
    with pytest.raises(UsageError, match="is not empty and no weights folder"):
        convert.convert(goldens / "gan" / "ada16.pkl", theirs, overwrite=True)
    with pytest.raises(UsageError, match="is not one of sis_jax"):
        save_generator(sis_jax.load_generator(), theirs)
    assert (theirs / "config.json").read_text() == config and (
        theirs / "discriminator.safetensors"
    ).read_text() == "theirs"


def test_another_network_needs_overwrite(goldens, tmp_path, monkeypatch):
    first, second, out = (
        goldens / "gan" / "ada16.pkl",
        goldens / "gan" / "ros16_legacy.pt",
        tmp_path / "out",
    )
    convert.convert(first, out)
    (out / "mine.txt").write_text("kept")
    assert verify.verify(out).startswith("stored")
    convert.convert(first, out)
    assert "to the byte" in verify.verify(out)  # the digests outlive a conversion of the same file
    with pytest.raises(UsageError, match=r"holds ada16, made of another file.*--overwrite"):
        convert.convert(second, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_config", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert.convert(second, out, overwrite=True)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()} and [
        p.name for p in tmp_path.iterdir()
    ] == ["out"]
    convert.convert(second, out, overwrite=True)
    assert (
        files.read_config(out).source["file"] == "ros16_legacy.pt"
        and (out / "mine.txt").read_text() == "kept"
    )
    assert verify.verify(out).startswith("stored") and [p.name for p in tmp_path.iterdir()] == [
        "out"
    ]


def test_one_bad_folder_does_not_hide_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIS_JAX_WEIGHTS", str(tmp_path))
    save_generator(sis_jax.load_generator(), tmp_path / "half")
    (tmp_path / "half" / files.MODEL).unlink()
    for name, config in (
        ("future", '{"format": "sis_jax weights", "version": 99}'),
        ("foreign", '{"my": "project"}'),
        ("torn", '{"form'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / files.MODEL).write_bytes(b"x")
    assert {info.name for info in catalogue.shipped()} == {
        "efficientnet-lite0",
        "faces-clip",
        "faces64",
        "faces-student",
        "faces-student-small",
    }
    assert "foreign" not in catalogue.folders()
    assert runpy.run_path(str(SCRIPT))["main"](["--list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"half +damaged: .*holds no model.safetensors", out) and re.search(
        r"future +damaged: .*version 99", out
    )
    assert (
        re.search(r"torn +damaged: .*cannot be read", out)
        and "foreign" not in out
        and "faces64  " in out
    )
