"""Any StyleGAN2 in any layout, written by the factory: odd architectures, the StyleGAN3 code,
flaxmodels, networks with labels, the largest network.
"""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import checkpoint_factory as factory
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import sis_jax
from sis_jax.checkpoints import convert, files
from sis_jax.checkpoints.build import arrays_of, build, shapes_of
from sis_jax.checkpoints.containers import read_tree
from sis_jax.checkpoints.layouts.stylegan2 import convert_discriminator
from sis_jax.checkpoints.sources import recognise
from sis_jax.models.discriminator import Discriminator, DiscriminatorConfig
from sis_jax.models.stylegan2 import GeneratorConfig, StyleGAN2, channel_table
from sis_jax.ops.convolution import upsample2d
from sis_jax.types import Info, SisError, UsageError

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]


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


def same_numbers(a, b):
    a, b = arrays_of(a), arrays_of(b)
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


SMALL = GeneratorConfig(32, (12, 10, 8, 6), 7, 9, 0, 3, 11)


def filled(make, seed=0):
    """A module with every array drawn, so that nothing is hidden by a zero; the mapping network's
    are large, since it learns at a rate of 0.01.
    """
    rng = np.random.RandomState(seed)
    arrays = {
        k: np.asarray((50 if "mapping.fc" in k else 0.5) * rng.randn(*v.shape), np.float32)
        for k, v in arrays_of(make()).items()
    }
    return build(make, arrays, "it", Info())


def written(layout, arrays, path):
    """The generator's arrays in a file of that layout; returns the file."""
    if layout == "tf":
        path.write_bytes(factory.pickled((factory.tf_generator(arrays),)))
    elif layout == "ada":
        path.write_bytes(
            factory.pickled(
                {
                    "G_ema": factory.persistent_module(
                        factory.ada_generator(arrays), {}, factory.torch_parameter
                    )
                }
            )
        )
    elif layout == "rosinality zip":
        path.write_bytes(factory.torch_zip({"g_ema": factory.rosinality_generator(arrays)}))
    elif layout == "rosinality legacy":
        path.write_bytes(factory.torch_legacy({"g_ema": factory.rosinality_generator(arrays)}))
    elif layout == "safetensors":
        save_file(factory.ada_generator(arrays), path)
    else:
        factory.hdf5(path, factory.flaxmodels_generator(arrays))
    return path


LAYOUTS = ("tf", "ada", "rosinality zip", "rosinality legacy", "safetensors", "flaxmodels")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        GeneratorConfig(8, (5, 4), 6, 6, 0, 8, 6),
        GeneratorConfig(64, (3, 9, 2, 7, 5), 4, 5, 0, 1, 5),
    ],
)
def test_any_architecture_in_any_layout(tmp_path, layout, config):
    """Odd widths, one to eight mapping layers: the architecture is read from the file, and every
    number arrives in its place.
    """
    gen = filled(lambda: StyleGAN2(config))
    other = sis_jax.load_generator(written(layout, arrays_of(gen), tmp_path / "network"))
    assert other.config == config
    a, b = arrays_of(gen), arrays_of(other)
    for key in a:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-6, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    "name, file",
    [("ada16", "ada16.pkl"), ("tf32", "tf32.pkl"), ("ros16_legacy", "ros16_legacy.pt")],
)
def test_rgb_of_every_block(goldens, name, file):
    """The picture as it grows from block to block (`b8.img`, ...): each block's RGB on top of the
    doubled picture below.
    """
    expected, gen = (
        np.load(goldens / "gan" / f"{name}.npz"),
        sis_jax.load_generator(goldens / "gan" / file),
    )
    w = jnp.asarray(expected["ws_psi0.7"][:1])
    _, features = gen.synthesize(w, taps=gen.taps)
    styles, picture = gen.synthesis.styles(w), None
    for r in (2**i for i in range(2, gen.resolution.bit_length())):
        rgb = getattr(gen.synthesis, f"b{r}").torgb(features[f"{r}x{r}"], styles[f"b{r}.torgb"])
        picture = rgb if picture is None else upsample2d(picture) + rgb
        np.testing.assert_allclose(picture, expected[f"feat_psi0.7/b{r}.img"], atol=5e-5)


def test_flaxmodels_discriminator(tmp_path):
    config = DiscriminatorConfig(16, (6, 5, 4), mapping_layers=0)
    disc, gen = (
        filled(lambda: Discriminator(config)),
        filled(lambda: StyleGAN2(GeneratorConfig(16, (6, 5, 4), 4, 4, 0, 2, 4))),
    )
    source = tmp_path / "d.h5"
    factory.hdf5(source, factory.flaxmodels_discriminator(arrays_of(disc)))
    found = recognise(read_tree(source), source.stat().st_size, "it")
    made = convert_discriminator(found.discriminator, found.layout, "it")
    assert made.config == asdict(config)
    assert all(np.array_equal(made.arrays[key], value) for key, value in arrays_of(disc).items())
    with pytest.raises(SisError, match="a discriminator but no generator"):
        convert.convert(source, tmp_path / "out")
    factory.hdf5(tmp_path / "g.h5", factory.flaxmodels_generator(arrays_of(gen)))
    assert any(
        "clamped" in note
        for note in files.read_config(convert.convert(tmp_path / "g.h5", tmp_path / "g")).notes
    )


@pytest.mark.parametrize(
    "how, told",
    [
        ({"compression": "gzip"}, "compressed"),
        ({"chunks": (1, 2)}, "stored in pieces"),
        ({"libver": "latest"}, "newer format"),
        ({"dtype": "S3"}, "something else than plain numbers"),
    ],
)
def test_hdf5_that_is_not_plain(tmp_path, how, told):
    """What libhdf5 would run filters for, or spread over the file, is refused with the cure."""
    h5py = pytest.importorskip("h5py")
    how = dict(how)
    with h5py.File(tmp_path / "x.h5", "w", libver=how.pop("libver", "earliest")) as file:
        data = np.zeros((3, 4)) if "dtype" not in how else np.full((3, 4), b"abc")
        file.create_dataset("synthesis_network/const", data=data, **how)
    with pytest.raises(SisError, match=told):
        convert.convert(tmp_path / "x.h5", tmp_path / "out")


def test_hdf5_links(tmp_path):
    """Links by name and to other files are not followed; groups that contain themselves end in an
    error.
    """
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret.h5").write_bytes(b"")
    for link in (h5py.SoftLink("/a"), h5py.ExternalLink("secret.h5", "/a"), None):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["a/b"] = np.zeros(3)
            file["a/c"] = file["a"] if link is None else link
        with pytest.raises(SisError, match=r"x\.h5 was not read"):
            convert.convert(tmp_path / "x.h5", tmp_path / "out")


def test_saved_by_the_stylegan3_code(goldens, tmp_path):
    """Same names; torch parameters, NumPy scalars and settings beside them, frozen layers as
    buffers, conv_clamp 256 unless told otherwise.
    """
    g, d = networks(goldens / "gan" / "ada16.pkl")
    scalar = factory.Call(
        factory.Global("numpy.core.multiarray", "scalar"),
        (factory.numpy_array(np.zeros(0)).state[2], b"\0" * 8),
    )
    modules = {key.rsplit(".", 1)[0] for key in g if key.endswith(".weight")}
    said = {
        name: {"conv_clamp": 256, "activation": "lrelu", "weight_gain": scalar}
        for name in modules
        if "fc" not in name
    }
    said |= {
        "": {
            "_init_args": (),
            "_init_kwargs": factory.Call(factory.Global("dnnlib.util", "EasyDict"), ()),
            "num_ws": 6,
        }
    }
    said |= {
        f"synthesis.b{r}": {
            "architecture": "skip",
            "use_fp16": True,
            "fused_modconv_default": "inference_only",
        }
        for r in (4, 8, 16)
    }
    frozen = {
        "b16": {"architecture": "resnet"},
        "b16.conv0": {"conv_clamp": 256},
        "b4.mbstd": {"group_size": 4, "num_channels": 1},
    }
    tree = {
        "G": None,
        "D": factory.persistent_module(d, frozen, factory.torch_parameter, "b16"),
        "G_ema": factory.persistent_module(g, said, factory.torch_parameter, "mapping.fc0"),
        "augment_pipe": factory.persistent_module(
            {"Hz_geom": np.ones(12, np.float32)}, {}, factory.torch_parameter
        ),
        "training_set_kwargs": {"class_name": "training.dataset.ImageFolderDataset"},
    }
    (tmp_path / "network-snapshot-000200.pkl").write_bytes(factory.pickled(tree))
    gen = sis_jax.load_generator(tmp_path / "network-snapshot-000200.pkl")
    disc = sis_jax.load_discriminator(tmp_path / "network-snapshot-000200.pkl")
    assert gen.config.conv_clamp == disc.config.conv_clamp == 256
    same_numbers(gen, sis_jax.load_generator(goldens / "gan" / "ada16.pkl"))
    same_numbers(disc, sis_jax.load_discriminator(goldens / "gan" / "ada16.pkl"))


# Conditional networks


def normalised(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-8)


def dense(x, weight, bias):
    """A mapping layer of ours by definition, in float64: learning rate multiplier 0.01, leaky ReLU,
    times sqrt(2).
    """
    y = x @ weight.astype(np.float64) * (0.01 / np.sqrt(len(weight))) + 0.01 * bias.astype(
        np.float64
    )
    return np.where(y >= 0, y, 0.2 * y) * np.sqrt(2)


def mapped(arrays, x, layers):
    for i in range(layers):
        x = dense(x, arrays[f"mapping.fc{i}.weight"], arrays[f"mapping.fc{i}.bias"])
    return x


@pytest.mark.parametrize("embed", [9, 4])
@pytest.mark.parametrize("layout", LAYOUTS[:2] + LAYOUTS[4:])
def test_conditional_generator(tmp_path, layout, embed):
    """Label networks are found by their arrays, whatever the width of the embedding; labels
    embedded and normalised on their own (ADA).
    """
    config = replace(SMALL, c_dim=5, embed_dim=embed)
    gen = filled(lambda: StyleGAN2(config))
    other = sis_jax.load_generator(written(layout, arrays_of(gen), tmp_path / "labels"))
    assert other.config == config and other.z_dim == 8
    z, c, a = np.random.RandomState(0).randn(4, 7), np.array([0, 3, 4, 3]), arrays_of(gen)
    y = np.eye(5)[c] @ a["mapping.embed.weight"] / np.sqrt(5) + a["mapping.embed.bias"]
    expected = mapped(a, np.concatenate([normalised(z), normalised(y)], 1), 3)
    np.testing.assert_allclose(
        other.map(z.astype(np.float32), labels=jnp.eye(5)[c])[:, 0], expected, atol=1e-5
    )


def test_first_tensorflow_code_with_labels(tmp_path):
    """LabelConcat: a bare matrix, normalised together with z; the discriminator has one score per
    class and no label network.
    """
    config = replace(SMALL, c_dim=5, embed_dim=7)
    a = arrays_of(filled(lambda: StyleGAN2(config)))
    matrix = a.pop("mapping.embed.weight")
    del a["mapping.embed.bias"]
    net = factory.tf_generator(a)
    net.state["components"]["mapping"].state["variables"].append(
        ("LabelConcat/weight", factory.numpy_array(matrix))
    )
    net.state["variables"].append(("lod", factory.numpy_array(np.float32([0]).reshape(()))))
    d = arrays_of(filled(lambda: Discriminator(DiscriminatorConfig(32, SMALL.channels))))
    rng = np.random.RandomState(5)
    d |= {
        "b4.out.weight": rng.randn(12, 5).astype(np.float32),
        "b4.out.bias": rng.randn(5).astype(np.float32),
    }
    (tmp_path / "labels.pkl").write_bytes(
        factory.pickled((net, factory.tf_network(tf_discriminator(d)), net))
    )
    gen, disc = (
        sis_jax.load_generator(tmp_path / "labels.pkl"),
        sis_jax.load_discriminator(tmp_path / "labels.pkl"),
    )
    assert gen.config == replace(config, label_concat=True) and (
        disc.config.c_dim,
        disc.config.cmap_dim,
    ) == (5, 0)
    z, c = np.random.RandomState(0).randn(4, 7), np.array([0, 3, 4, 3])
    expected = mapped(a, normalised(np.concatenate([z, matrix[c]], 1)), 3)
    np.testing.assert_allclose(
        gen.map(z.astype(np.float32), labels=jnp.eye(5)[c])[:, 0], expected, atol=1e-5
    )
    images = rng.randn(4, 32, 32, 3).astype(np.float32)
    scores = disc(images, jnp.eye(5)[c])
    for k in (0, 3):
        one = {
            **d,
            "b4.out.weight": d["b4.out.weight"][:, k : k + 1],
            "b4.out.bias": d["b4.out.bias"][k : k + 1],
        }
        plain = build(
            lambda: Discriminator(DiscriminatorConfig(32, SMALL.channels)), one, "it", Info()
        )
        np.testing.assert_allclose(
            np.asarray(scores)[c == k], np.asarray(plain(images))[c == k], rtol=1e-4, atol=1e-5
        )
    with pytest.raises(UsageError, match="one-hot rows of 5"):
        disc(images)


def tf_discriminator(ours):
    """Our arrays under TensorFlow's names; the rows of the first fully connected layer are in C, H,
    W order there.
    """
    out = {}
    for key, a in ours.items():
        if key == "b4.fc.weight":
            a = a.reshape(4, 4, -1, a.shape[1]).transpose(2, 0, 1, 3).reshape(a.shape)
        block, *rest = key.split(".")
        layer = {
            "conv0": "Conv0",
            "conv1": "Conv1_down",
            "skip": "Skip",
            "conv": "Conv",
            "fc": "Dense0",
        }.get(rest[0])
        if block == "fromrgb":
            out[f"32x32/FromRGB/{rest[0]}"] = a
        elif block == "mapping":
            out[f"{'LabelEmbed' if rest[0] == 'embed' else 'Mapping' + rest[0][2:]}/{rest[1]}"] = a
        else:
            out[
                f"Output/{rest[1]}"
                if layer is None
                else f"{block[1:]}x{block[1:]}/{layer}/{rest[1]}"
            ] = a
    return out


def test_conditional_discriminators_of_ada(tmp_path):
    """The image's vector times that of the label network over sqrt(width); TensorFlow's label
    network learns at 0.1 where the file does not say.
    """
    config = DiscriminatorConfig(32, SMALL.channels, 5, 6, 2)
    disc = filled(lambda: Discriminator(config))
    a = arrays_of(disc)
    network = (
        factory.tf_generator(arrays_of(filled(lambda: StyleGAN2(SMALL)))),
        factory.tf_network(tf_discriminator(a)),
    )
    (tmp_path / "tf.pkl").write_bytes(factory.pickled((network[0], network[1], network[0])))
    other = sis_jax.load_discriminator(tmp_path / "tf.pkl")
    assert other.config == config
    rng = np.random.RandomState(5)
    images, c = rng.randn(4, 32, 32, 3).astype(np.float32), np.array([0, 3, 4, 3])
    y = normalised(np.eye(5)[c] @ a["mapping.embed.weight"] / np.sqrt(5) + a["mapping.embed.bias"])
    for lr, found in ((0.01, disc), (0.1, other)):
        label = y
        for i in range(2):
            weight, bias = (a[f"mapping.fc{i}.{part}"] * (lr / 0.01) for part in ("weight", "bias"))
            label = dense(label, weight, bias)
        vectors = []
        for k in range(6):
            one = {key: value for key, value in a.items() if not key.startswith("mapping.")}
            one |= {
                "b4.out.weight": a["b4.out.weight"][:, k : k + 1],
                "b4.out.bias": a["b4.out.bias"][k : k + 1],
            }
            vectors.append(
                np.asarray(
                    build(
                        lambda: Discriminator(DiscriminatorConfig(32, SMALL.channels)),
                        one,
                        "it",
                        Info(),
                    )(images)
                )[:, 0]
            )
        expected = (np.stack(vectors, 1) * label).sum(1) / np.sqrt(6)
        np.testing.assert_allclose(
            np.asarray(found(images, jnp.eye(5)[c]))[:, 0], expected, rtol=1e-3, atol=1e-5
        )


def test_classes_from_seeds(tmp_path):
    """A seed stands for one picture of one class; classes can be narrowed when loading, when
    converting, and later.
    """
    config = replace(SMALL, c_dim=5)
    gen = filled(lambda: StyleGAN2(config))
    source = written("ada", arrays_of(gen), tmp_path / "labels.pkl")
    z = gen.latents(range(300))
    np.testing.assert_array_equal(
        z[:, :7],
        np.concatenate([np.random.RandomState(s).randn(1, 7) for s in range(300)]).astype(
            np.float32
        ),
    )
    candidates = np.stack(
        [
            np.asarray(gen.map(z[:, :7], labels=jnp.tile(jnp.eye(5)[c], (300, 1))))[:, 0]
            for c in range(5)
        ]
    )

    def drawn(g):
        distance = np.abs(np.asarray(g.map(z))[:, 0] - candidates).max(-1)
        assert distance.min(0).max() < 1e-5
        return distance.argmin(0)

    assert np.bincount(drawn(gen), minlength=5).min() > 35
    assert set(drawn(sis_jax.load_generator(source, classes=2))) == {2}
    narrowed = sis_jax.load_generator(convert.convert(source, tmp_path / "two", classes=[0, 4]))
    assert set(drawn(narrowed)) == {0, 4} and set(drawn(narrowed.with_classes(None))) == set(
        range(5)
    )
    samples = narrowed.sample([3, 8], truncation=0.7)
    np.testing.assert_allclose(
        narrowed.sample([8], truncation=0.7).images, samples.images[1:], atol=1e-5
    )
    for wrong, told in (
        (lambda: gen.with_classes(5), "there is no class 5: this generator has 5"),
        (lambda: sis_jax.load_generator(classes=1), "no classes to choose from"),
        (
            lambda: sis_jax.load_generator().map(jnp.zeros((1, 128)), labels=jnp.eye(1)),
            "no classes: leave labels out",
        ),
        (lambda: gen.map(z[:, :7]), r"z must be \[n, 8\].*the last number picks the class"),
        (
            lambda: gen.map(z, labels=jnp.zeros((300, 4))),
            r"one-hot rows of 5, \[300, 5\] here, got \[300, 4\]",
        ),
        (lambda: convert.convert(source, tmp_path / "three", classes=9), "there is no class 9"),
    ):
        with pytest.raises(UsageError, match=told):
            wrong()


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc"
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_largest_network(tmp_path, layout):
    """Config-F at 1024 pixels in a fresh process: 10 seconds, three times the file's size in
    memory, and loads in one second.
    """
    config = GeneratorConfig(1024, channel_table(1024, 32768, 512))
    rng = np.random.default_rng(0)
    shapes = shapes_of(lambda: StyleGAN2(config))
    arrays = {
        key: np.asarray(rng.standard_normal(shape, np.float32)) for key, shape in shapes.items()
    }
    source = written(layout, arrays, tmp_path / "big")
    code = (
        "import re, sys, time; from sis_jax.checkpoints import convert, load; start = "
        "time.perf_counter();"
        "folder = convert.convert(sys.argv[1], sys.argv[2]); peak = "
        "int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]);"
        "middle = time.perf_counter(); times = [(time.perf_counter(), "
        "load.load_generator(folder), time.perf_counter()) for _ in range(3)];"
        "print(middle - start, peak * 1024, min(end - begin for begin, _, end in times))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=True,
    )
    seconds, peak, load_seconds = map(float, done.stdout.split())
    assert seconds < 10 and peak < 3 * source.stat().st_size and load_seconds < 1, done.stdout
    gen = sis_jax.load_generator(tmp_path / "out")
    assert gen.config == config
