"""Checkpoints people have: half precision with scalars, wrappers, grey and RGBA networks, shards,
training files; the same numbers, or one true sentence.
"""

import json
from dataclasses import replace

import checkpoint_factory as factory
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import tiny_discriminator, tiny_stylegan2

import sis_jax
from sis_jax.checkpoints import clip_files, convert, shards
from sis_jax.checkpoints.arrays import Storage, Tensor, from_bfloat16
from sis_jax.checkpoints.build import arrays_of, build
from sis_jax.checkpoints.containers import read_tree
from sis_jax.checkpoints.layouts.stylegan2 import (
    Network,
    convert_discriminator,
    convert_generator,
    discriminator_config,
)
from sis_jax.checkpoints.sources import arrays_in, recognise
from sis_jax.data.files import CannotWrite
from sis_jax.models.discriminator import Discriminator
from sis_jax.types import Info, SisError

BIG = 1 << 26


@pytest.fixture(scope="module")
def ours():
    return arrays_of(tiny_stylegan2(8, channels=4, latent=4))


@pytest.fixture(scope="module")
def theirs(ours):
    named = factory.ada_generator(ours)
    return {k: v.reshape(()) if k.endswith("noise_strength") else v for k, v in named.items()}


def as_bf16(value):
    return np.asarray(np.asarray(value, np.float32).view(np.uint32) >> 16, np.uint16)


def save_safetensors(path, arrays, kind):
    """A file of one type; arrays of no axes are two or four bytes."""
    cast = {"BF16": as_bf16, "F16": lambda a: a.astype(np.float16), "F64": lambda a: a.astype("f8")}
    header, body = {}, b""
    for name, value in arrays.items():
        data = np.asarray(cast[kind](value)).tobytes()
        header[name] = {
            "dtype": kind, "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }  # fmt: skip
        body += data
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + body)
    return path


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
def test_half_precision_keeps_the_shape(shape):
    value = np.ones(shape, np.float32) * 0.15625
    found = from_bfloat16(as_bf16(value))
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, value, strict=True)
    storage = Storage("bfloat16", value.size, memoryview(as_bf16(value).tobytes()))
    strides = tuple(np.cumprod([1, *shape[:0:-1]])[::-1].tolist()) if shape else ()
    found = Tensor(storage, 0, shape, strides).array()
    np.testing.assert_array_equal(found, value, strict=True)


@pytest.mark.parametrize("kind", ["BF16", "F16", "F64"])
def test_scalars_of_every_type_survive(theirs, tmp_path, kind):
    """Without noise maps too, where lost strengths would pass for a network without noise."""
    kept = {k: v for k, v in theirs.items() if not k.endswith("noise_const")}
    tree = read_tree(save_safetensors(tmp_path / "g.safetensors", kept, kind))
    made = convert_generator(recognise(tree, BIG, "g").generator, "ada", "g")
    for key in (k for k in kept if k.endswith("noise_strength")):
        assert made.arrays[key] == pytest.approx(float(kept[key]), rel=1e-2)
    assert not any("without noise" in note for note in made.notes)


def test_noise_is_not_invented_where_the_file_has_some(theirs):
    odd = {k: v for k, v in theirs.items() if "noise" not in k} | {"noise.x": np.ones(1, "f4")}
    with pytest.raises(SisError, match="noise_strength"):
        convert_generator(Network(odd), "ada", "g")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a: {"state_dict": {f"module.{k}": v for k, v in a.items()}},
        lambda a: {"model": {"state_dict": {f"_orig_mod.module.{k}": v for k, v in a.items()}}},
        lambda a: {f"model.G_ema.module._orig_mod.{k}": v for k, v in a.items()},
        lambda a: {k.replace("synthesis.", "synthesis._orig_mod."): v for k, v in a.items()},
        lambda a: {"module": {"G_ema": {"state_dict": {f"model.{k}": v for k, v in a.items()}}}},
    ],
)
def test_wrappers_in_any_nesting(theirs, wrap):
    found = recognise(wrap(theirs), BIG, "g")
    assert found.layout == "ada"
    assert found.generator.arrays.keys() == theirs.keys()


def test_wrapped_names_that_become_one_are_refused(theirs):
    name = next(iter(theirs))
    with pytest.raises(SisError, match="two of its arrays"):
        recognise({**theirs, f"module.{name}": theirs[name]}, BIG, "g")
    assert list(arrays_in({"model": {"module.a.b": np.ones(1)}}, BIG, "x")) == ["a.b"]


def colours(arrays, count):
    """The same network with `count` channels: the first, and others that are no copies."""
    rng = np.random.default_rng(0)

    def cut(key, value):
        if ".torgb.weight" in key or ".torgb.bias" in key:
            extra = rng.normal(size=(4, *value.shape[1:])).astype(np.float32)
            return np.concatenate([value, extra])[:count]
        return value

    return {key: cut(key, value) for key, value in arrays.items()}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_grey_and_rgba_generators(theirs, count):
    source = colours(theirs, count)
    made = convert_generator(Network(source), "ada", "g")
    weight = made.arrays["synthesis.b8.torgb.weight"][0, 0]
    expected = source["synthesis.b8.torgb.weight"][..., 0, 0].T
    for i in range(3):
        np.testing.assert_array_equal(weight[:, i], expected[:, i if count == 4 else 0])
    assert ("grey" in made.notes[0], "alpha" in made.notes[0]) == (count < 3, count != 1)


def test_generators_of_other_colours_are_refused(theirs):
    with pytest.raises(SisError, match=r"torgb\.weight, file has"):
        convert_generator(Network(colours(theirs, 6)), "ada", "g")


@pytest.mark.parametrize("count", [1, 4])
def test_discriminators_of_other_colours_give_the_same_score(count):
    disc = tiny_discriminator(8, channels=4)
    base = arrays_of(disc)
    rng = np.random.default_rng(1)
    theirs = rng.normal(size=(1, 1, count, 4)).astype(np.float32)
    foreign = factory.flaxmodels_discriminator({**base, "fromrgb.weight": theirs})
    made = convert_discriminator(Network(foreign), "flaxmodels", "d")
    image = rng.uniform(-1, 1, (4, 8, 8, 1 if count == 1 else 3)).astype(np.float32)
    opaque = image if count == 1 else np.concatenate([image, np.ones((4, 8, 8, 1))], -1)
    first = opaque @ theirs[0, 0] / np.sqrt(count) + base["fromrgb.bias"]
    ours = np.broadcast_to(image, (4, 8, 8, 3)) @ made.arrays["fromrgb.weight"][0, 0] / np.sqrt(3)
    np.testing.assert_allclose(ours + made.arrays["fromrgb.bias"], first, atol=1e-5)
    config = replace(discriminator_config(made.config))
    built = build(lambda: Discriminator(config), made.arrays, "d", Info())
    assert built(jnp.zeros((4, 8, 8, 3))).shape == (4, 1)


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (("synthesis.input.weight", "synthesis.L0_36_512.weight"), "StyleGAN3"),
        (("G_ema.synthesis.L3_52_512.affine.weight",), "StyleGAN3"),
        (("generator.progression.0.conv1.conv.weight", "style.1.weight"), "StyleGAN1"),
        (("synthesis/4x4/Const/StyleMod/weight",), "StyleGAN1"),
    ],
)
def test_other_generators_are_named(names, word):
    with pytest.raises(SisError, match=f"{word}, only StyleGAN2") as caught:
        recognise({name: np.ones((2, 2), np.float32) for name in names}, BIG, "g.pt")
    assert "\n" not in str(caught.value)


def test_a_stylegan3_pickle_is_named(tmp_path):
    arrays = {"synthesis.input.weight": np.ones((2, 2), "f4"), "mapping.w_avg": np.ones(2, "f4")}
    module = factory.persistent_module(arrays, {})
    (tmp_path / "g.pkl").write_bytes(factory.pickled({"G_ema": module}))
    with pytest.raises(SisError, match="StyleGAN3"):
        recognise(read_tree(tmp_path / "g.pkl"), BIG, "g.pkl")


# Shards and variants


def write_shards(folder, arrays, variant="", kind="F16"):
    folder.mkdir()
    names, places, dot = sorted(arrays), {}, f".{variant}" if variant else ""
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model{dot}-0000{number}-of-00002.safetensors"
        save_safetensors(folder / file, {name: arrays[name] for name in part}, kind)
        places |= dict.fromkeys(part, file)
    index = folder / f"model.safetensors.index{dot}.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_are_one_table(theirs, tmp_path, variant):
    index = write_shards(tmp_path / "m", theirs, variant)
    assert clip_files.weights_file(tmp_path / "m") == index
    found = shards.read_tree(index)
    assert found.keys() == theirs.keys()
    digest = shards.sha256_of(index)
    shard = shards.parts_of(index)[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    assert shards.sha256_of(index) != digest
    with pytest.raises(SisError, match="one of 2 shards"):
        shards.read_tree(shard)
    shard.unlink()
    with pytest.raises(SisError, match="not beside it"):
        shards.read_tree(index)


@pytest.mark.parametrize("place", ["../out.safetensors", "/etc/x.safetensors", 3])
def test_an_index_leads_nowhere_else(tmp_path, place):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(SisError, match=r"refused|names no files"):
        shards.read_tree(index)


def test_variants_are_found_best_first(tmp_path):
    for name in ("pytorch_model.fp16.bin", "model.fp16.safetensors", "model.bf16.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    assert shards.find(tmp_path).name == "model.bf16.safetensors"
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert shards.find(tmp_path).name == "pytorch_model.bin"


# Training files of open_clip


@pytest.mark.parametrize(
    ("name", "activation"), [("ViT-B-32-run", "gelu"), ("m_ViT-B-32-quickgelu_lr", "quick_gelu")]
)
def test_open_clip_training_files_have_gelu(name, activation):
    state = {"module.ln_final.weight": np.ones(2, "f4"), "module.logit_scale": np.float32(2)}
    tree = {"epoch": 3, "name": name, "state_dict": state, "optimizer": {}}
    found = recognise(tree, BIG, "epoch_3.pt")
    assert (found.activation, found.layout) == (activation, "openai-clip")
    assert found.clip.arrays["logit_scale"] == 2
    assert recognise(state, BIG, "x.pt").activation == ""


# Nothing can be kept


def test_a_generator_is_loaded_where_nothing_can_be_written(theirs, tmp_path, monkeypatch):
    file = save_safetensors(tmp_path / "g.safetensors", theirs, "F64")
    monkeypatch.setenv("SIS_JAX_CONVERTED", str(tmp_path / "cache"))
    kept = sis_jax.load_generator(file)
    monkeypatch.setenv("SIS_JAX_CONVERTED", str(file / "no folder"))
    loose = sis_jax.load_generator(file)
    assert loose.info == kept.info
    a, b = arrays_of(kept), arrays_of(loose)
    assert all(np.array_equal(a[key], b[key]) for key in a)
    with pytest.raises(CannotWrite):
        convert.cached(file)
