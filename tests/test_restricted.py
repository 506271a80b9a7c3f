"""Hostile and broken files: nothing is ever run, every file ends in a result or in one clear error,
in bounded time and memory.
"""

import io
import os
import pickle
import random
import resource
import struct
import sys
import time
import zipfile

import checkpoint_factory as factory
import numpy as np
import pytest
from attacks import Attack, attacks
from checkpoint_factory import Call, Global, Raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

import sis_jax
from sis_jax.checkpoints.containers import read_tree
from sis_jax.checkpoints.layouts import biggan, dcgan
from sis_jax.checkpoints.layouts.stylegan2 import convert_discriminator, convert_generator
from sis_jax.checkpoints.sources import recognise
from sis_jax.types import SisError

PICKLES = ("ada16.pkl", "tf32.pkl", "ros16_legacy.pt", "ros32_zip.pt")
FILES = (*PICKLES, "biggan32-pytorch_model.bin", "ada16.safetensors", "ada16.h5", "dcgan.pt")


@pytest.fixture
def tripwire(tmp_path, monkeypatch):
    """A file that appears if anything is run; the text inside the golden pickles writes it, and so
    do the attacks below.
    """
    wire = tmp_path / "tripwire"
    monkeypatch.setenv("SIS_TRIPWIRE", str(wire))
    monkeypatch.setenv("SIS_JAX_CONVERTED", str(tmp_path / "cache"))
    yield wire
    assert not wire.exists()


class Files(dict):
    """Hypothesis shows arguments; these would be megabytes."""

    def __repr__(self):
        return "the files"


@pytest.fixture(scope="module")
def contents(goldens):
    """Name -> bytes of a real file in every container; those without a golden are written here from
    the arrays of one that has.
    """
    found = {
        name: (goldens / "gan" / name).read_bytes()
        for name in (*PICKLES, "biggan32-pytorch_model.bin")
    }
    network = recognise(read_tree(goldens / "gan" / "ada16.pkl"), 1 << 20, "it").generator
    arrays = {key: np.ascontiguousarray(value) for key, value in network.arrays.items()}
    ours = convert_generator(network, "ada", "it").arrays
    buffer = io.BytesIO()
    factory.hdf5(buffer, factory.flaxmodels_generator(ours))
    return Files(
        found
        | {
            "ada16.safetensors": save(arrays),
            "ada16.h5": buffer.getvalue(),
            "dcgan.pt": factory.torch_zip(dcgan_state()),
        }
    )


def dcgan_state():
    """A DCGAN's state dict, 8 pixels."""
    rng = np.random.RandomState(0)
    state = {
        "main.0.weight": rng.randn(6, 5, 4, 4),
        "main.0.bias": rng.randn(5),
        "main.3.weight": rng.randn(5, 3, 4, 4),
    }
    state |= {
        f"main.1.{part}": rng.rand(5) for part in ("weight", "bias", "running_mean", "running_var")
    }
    return {key: value.astype(np.float32) for key, value in state.items()}


def convert(path):
    """A file as far as arrays of a network."""
    what = str(path)
    source = recognise(read_tree(path), os.path.getsize(path), what)
    if source.layout == "biggan":
        biggan.convert_generator(source.generator.arrays, None, what)
    elif source.layout == "dcgan":
        dcgan.convert_generator(source.generator.arrays, what)
    elif source.generator:
        convert_generator(source.generator, source.layout, what)
    if source.discriminator:
        convert_discriminator(source.discriminator, source.layout, what)


@pytest.mark.parametrize("file", PICKLES)
def test_embedded_source_is_never_run(goldens, tripwire, file):
    content = (goldens / "gan" / file).read_bytes()
    assert file.endswith(".pt") or b"SIS_TRIPWIRE" in content
    sis_jax.load_generator(goldens / "gan" / file)


def test_attacks(tmp_path, tripwire):
    names = set()
    for name, content in attacks(tripwire):
        path = tmp_path / "attack.pt"
        path.write_bytes(content)
        before = set(sys.modules)
        with pytest.raises(SisError) as error:
            convert(path)
        assert (
            "attack.pt" in str(error.value)
            and len(str(error.value)) < 400
            and "\n" not in str(error.value)
        ), name
        assert not tripwire.exists(), name
        assert not set(sys.modules) - before, name
        names.add(name)
    assert len(names) > 100


def test_attacks_are_real(tmp_path):
    """The same bytes do run under Python's own unpickler: the tripwire works."""
    wire = tmp_path / "wire"
    pickle.loads(dict(attacks(wire))["eval"])
    assert wire.exists()


def test_refusal_names_what_was_asked(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Attack(os.system, ("true",)), 2))
    with pytest.raises(
        SisError, match=r"a\.pkl was not read: it asks for 'posix\.system'.*nothing was run"
    ):
        read_tree(tmp_path / "a.pkl")


def numbers(shape, strides=None, numel=None, offset=0, data=24):
    """A torch zip with one tensor over `data` bytes."""
    strides = factory.strides_of(shape) if strides is None else strides
    tensor = factory.tensor("0", shape, strides, 6 if numel is None else numel, offset=offset)
    return factory.torch_zip(
        {"synthesis.b4.const": Raw(factory.assemble(tensor))}, extra={"archive/data/0": bytes(data)}
    )


@pytest.mark.parametrize(
    "content",
    [
        numbers((2, 4)),
        numbers((2, 3), offset=1),
        numbers((2, 3), strides=(4, 1)),
        numbers((2, 3), strides=(-3, 1)),
        numbers((2, 3), strides=(3,)),
        numbers((2, -3)),
        numbers((2, 3), offset=-1),
        numbers((1 << 30, 1 << 30, 1 << 30), strides=(0, 0, 0)),
        numbers((7,), strides=(0,)),
        numbers((2, 3), numel=7),
        numbers((2, 3), data=23),
        numbers((2, 3), data=0),
        numbers((1,) * 40),
        numbers((True, 3)),
        numbers((2.0, 3)),
    ],
)
def test_sizes_are_checked_against_the_bytes(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(SisError, match=r"x\.pt was not read|it was not read"):
        convert(tmp_path / "x.pt")


def test_strides_are_honoured(tmp_path):
    data = np.arange(6, dtype=np.float32)
    tensor = factory.tensor("0", (3, 2), (1, 3), 6)
    (tmp_path / "x.pt").write_bytes(
        factory.torch_zip(
            {"a": Raw(factory.assemble(tensor))}, extra={"archive/data/0": data.tobytes()}
        )
    )
    assert np.array_equal(read_tree(tmp_path / "x.pt")["a"].array(), data.reshape(2, 3).T)


def bombs():
    big = b"\x80\x04]q\x00(" + b"N" * 100_000 + b"e"
    yield (
        "list copied a million times",
        big + b"0" + (b"cbuiltins\nset\nh\x00\x85R" * 30_000) + b".",
    )
    yield (
        "text copied a million times",
        b"\x80\x04"
        + factory.assemble("a" * 1_000_000)
        + b"q\x000"
        + (b"c_codecs\nencode\nh\x00\x85R" * 20_000)
        + b".",
    )
    yield "a million sets", b"\x80\x04(" + b"\x8f" * 8_000_000 + b"t."
    yield "tuple in itself as a key", b"\x80\x04}" + b")" + b"2\x86" * 60 + b"K\x01s."
    colliding = b"".join(
        b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(50_000)
    )
    yield "keys that collide", b"\x80\x04}(" + colliding + b"u."
    yield "huge number", b"\x80\x04\x8b\x00\x00\x00\x40" + b"\x01" * 100_000 + b"."
    yield "huge decimal", b"\x80\x02L" + b"9" * 4000 + b"L\n."
    yield "announced text", b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x."
    yield "announced bytes", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x."
    yield "memo far away", b"\x80\x04Nr\xff\xff\xff\x7f."
    yield (
        "zip bomb",
        factory.torch_zip({"a": np.zeros(3_000_000, np.float32)}, zipfile.ZIP_DEFLATED),
    )
    yield "deep nesting", b"\x80\x04" + b"]" * 400_000 + b"a" * 399_999 + b"."
    storage = factory.assemble(factory.tensor("0", (250_000,), (1,), 250_000))
    tree = (
        b"\x80\x04}("
        + b"".join(factory.assemble(f"synthesis.b4.const.{i}") + storage for i in range(2000))
        + b"u."
    )
    yield (
        "many tensors on the same bytes",
        factory.zip_of({"archive/data.pkl": tree, "archive/data/0": bytes(1_000_000)}),
    )
    header = (
        b'{"a":{"dtype":"F32","shape":[' + b"1099511627776," * 20 + b'0],"data_offsets":[0,0]}}'
    )
    yield "safetensors of nothing", struct.pack("<Q", len(header)) + header
    yield "safetensors header", struct.pack("<Q", 1 << 40) + b"{" + b" " * 100
    nested = b"{" + b'"a":{' * 100_000
    yield "safetensors nesting", struct.pack("<Q", len(nested)) + nested


def test_bombs(tmp_path):
    for name, content in bombs():
        path = tmp_path / "bomb.pt"
        path.write_bytes(content)
        memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(SisError):
            convert(path)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
        # No measurement of speed: what explodes would take hours; the deepest of these takes 5
        # seconds, 12 where two cores do three things.
        assert time.process_time() - start < 60 and grown < 400e6 + 3 * len(content), (
            f"{name}: {grown / 1e6} MB"
        )


def test_circles(tmp_path):
    """Modules that contain each other, a list in itself."""
    hook = factory.assemble(Global("torch_utils.persistence", "_reconstruct_persistent_obj"))
    meta = (
        b"}q\x01(" + factory.assemble("state") + b"}(" + factory.assemble("_modules") + b"}q\x03uu"
    )
    circle = (
        hook
        + meta
        + b"\x85Rq\x04"
        + b"0h\x03"
        + factory.assemble("again")
        + b"h\x04s0"
        + b"}"
        + factory.assemble("G_ema")
        + b"h\x04s"
    )
    for content in (
        b"\x80\x04" + circle + b".",
        b"\x80\x04]q\x00h\x00a.",
        b"\x80\x04}q\x00" + factory.assemble("g_ema") + b"h\x00s.",
    ):
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(SisError):
            convert(tmp_path / "x.pkl")


@pytest.mark.parametrize("file", FILES)
def test_truncated_anywhere(contents, tmp_path, file):
    content = contents[file]
    path = tmp_path / file
    for end in sorted(
        {
            *range(40),
            *(len(content) * i // 25 for i in range(25)),
            *range(len(content) - 8, len(content)),
        }
    ):
        path.write_bytes(content[:end])
        with pytest.raises(SisError):
            convert(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"\x89HDF\r\n\x1a\n" + bytes(99),
        b"<!DOCTYPE html>",
        b"\x80",
        bytes(1000),
        b"GIF89a",
    ],
)
def test_other_files(tmp_path, content):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(SisError, match=r"x\.pkl was not read"):
        convert(tmp_path / "x.pkl")


# CLIP's archives


def archive(tmp_path, root, extra=None):
    """A TorchScript archive whose data.pkl is `root`."""
    members = {
        "m/data.pkl": factory.pickled(root),
        "m/constants.pkl": factory.pickled(()),
        "m/version": b"3\n",
        **(extra or {}),
    }
    path = tmp_path / "archive.pt"
    with zipfile.ZipFile(path, "w") as made:
        for name, data in members.items():
            made.writestr(
                name, data, zipfile.ZIP_DEFLATED if "/code/" in name else zipfile.ZIP_STORED
            )
    return path


def test_hostile_archives(tmp_path, tripwire):
    wire = tripwire
    touch = f"touch {wire}"
    module = Global("__torch__.clip", "Model")
    program = {"m/code/__torch__/clip.py": f"import os\nos.system({touch!r})\n".encode() * 50}
    attacks = {
        "a call": Call(Global("os", "system"), (touch,)),
        "a call inside a module": Call(
            module, (), {"visual": Call(Global("posix", "system"), (touch,))}
        ),
        "a name that looks like the program's": Call(
            Global("__torch__.os import system;", "x y"), (touch,)
        ),
        "another torch name": Call(Global("torch.jit._pickle", "exec"), (touch,)),
        "state setting": Call(
            module,
            (),
            {
                "__class__": Global("os", "system"),
                "__reduce__": Call(Global("builtins", "eval"), (touch,)),
            },
        ),
        "no network": Call(module, (touch,), {"training": True, "__setstate__": touch}),
        "no state": Call(module, ()),
    }
    for name, root in attacks.items():
        with pytest.raises(SisError) as caught:
            sis_jax.load_clip(archive(tmp_path, root, program))
        assert not wire.exists() and "archive.pt" in str(caught.value), name
    with pytest.raises(SisError, match=r"asks for 'os.system'.*nothing was run"):
        sis_jax.load_clip(archive(tmp_path, attacks["a call"]))
    with pytest.raises(
        SisError, match=r"asks for '__torch__.clip.Model'"
    ):  # outside an archive there is no program
        (tmp_path / "x.pkl").write_bytes(factory.pickled(Call(module, ())))
        sis_jax.load_clip(tmp_path / "x.pkl")


def test_damaged_archives(goldens, tmp_path, tripwire):
    """Cut off anywhere, or with random bytes in it: a network or one clear error."""
    content, path, rng = (
        (goldens / "clip" / "openai_script.pt").read_bytes(),
        tmp_path / "x.pt",
        random.Random(0),
    )
    for end in (*range(0, len(content), len(content) // 20), len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(SisError):
            sis_jax.load_clip(path)
    start = content.index(b"data.pkl")
    for _ in range(60):
        data = bytearray(content)
        for _ in range(rng.choice((1, 3, 20))):
            data[
                rng.randrange(
                    *rng.choice(
                        ((0, len(data)), (start, start + 4000), (len(data) - 6000, len(data)))
                    )
                )
            ] = rng.randrange(256)
        path.write_bytes(data)
        try:
            sis_jax.load_clip(path)
        except SisError as error:
            assert str(error)


def test_archives_in_circles_and_bombs(tmp_path, tripwire):
    made = factory.assemble(Global("__torch__.a", "B")) + b")\x81q\x00"
    circle = made + b"}" + factory.assemble("me") + b"h\x00s" + b"b"
    deep = (
        made
        + b"}"
        + factory.assemble("a" * 300)
        + b"h\x00s"
        + factory.assemble("b" * 300)
        + b"h\x00s"
        + b"b"
    )
    for root in (circle, deep):
        with pytest.raises(SisError, match="in a circle"):
            sis_jax.load_clip(archive(tmp_path, factory.Raw(root)))
    path = tmp_path / "z.pt"
    with zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED
    ) as z:  # a compressed data.pkl is none of torch's
        z.writestr("m/data.pkl", bytes(10_000_000))
        z.writestr("m/constants.pkl", b"")
    with pytest.raises(SisError, match="compressed"):
        sis_jax.load_clip(path)


# Mutations of real files


def mutate(content: bytes, seed: int) -> bytes:
    """`content` with a few random edits; most hit the pickle, where they matter, not the
    numbers.
    """
    rng = random.Random(seed)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        at = rng.randrange(min(len(data), rng.choice((300, 20_000, len(data)))) or 1)
        if rng.random() < 0.3:
            at = len(data) - 1 - at  # the zip directory and the old format's tail
        kind = rng.randrange(7)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + rng.choice((1, 4, 100))]
        elif kind == 3:
            data[at:at] = bytes(
                rng.choice(b"(.0123)RbcghjqtuQ\x81\x85\x93\x94\x82\x8e\x8d")
                for _ in range(rng.choice((1, 3)))
            )
        elif kind == 4:
            data[at : at + 4] = struct.pack(
                "<I", rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, len(data)))
            )
        elif kind == 5:
            other = rng.randrange(len(data))
            data[at:at] = data[other : other + rng.choice((2, 30, 500))]
        else:
            data[at:at] = rng.choice(
                (
                    b"cos\nsystem\n(S'exit 1'\ntR",
                    b"c__builtin__\neval\n(S'exit()'\ntR",
                    b"\x8c\x02os\x8c\x06system\x93",
                )
            )
        if not data:
            break
    return bytes(data)


def survives(path, content):
    """A network or one clear error, nothing else; and no module is imported for it."""
    path.write_bytes(content)
    before = set(sys.modules)
    try:
        convert(path)
    except SisError as error:
        assert str(error)
    imported = set(sys.modules) - before
    assert not imported


_SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@given(file=st.sampled_from(FILES), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=300, **_SETTINGS)
def test_mutations(contents, tmp_path, file, seed):
    survives(tmp_path / file, mutate(contents[file], seed))


@pytest.mark.slow
@given(file=st.sampled_from(FILES), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10_000, **_SETTINGS)
def test_ten_thousand_mutations(contents, tmp_path, file, seed):
    survives(tmp_path / file, mutate(contents[file], seed))


@given(content=st.binary(max_size=300), protocol=st.booleans())
@settings(max_examples=300, **_SETTINGS)
def test_random_bytes(tmp_path, content, protocol):
    survives(tmp_path / "x.pkl", (b"\x80\x04" if protocol else b"") + content)
