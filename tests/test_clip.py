"""CLIP: parity with published code, inside JAX, and what goes in.

`hf_tiny` and its results were made with transformers 5.23.0 (CLIPModel of random weights, with
other heads, epsilons and activations than usual; torch 2.13.0), `openai_*_tiny` with open_clip
3.3.0.
"""

import json
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import clip_kit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_kit import close
from PIL import Image

import sis_jax
from sis_jax.checkpoints import clip as clip_model
from sis_jax.checkpoints import clip_inputs, clip_names, convert, files, verify
from sis_jax.checkpoints.clip_inputs import Preprocessing, Tokenizer
from sis_jax.models import clip as nets
from sis_jax.types import SisError, UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    clip_kit.own_folders(tmp_path, monkeypatch)


@pytest.fixture
def folder():
    return clip_kit.GOLDENS


@pytest.fixture
def expected():
    return clip_kit.results


# Parity


@pytest.mark.parametrize("name", ["openai_vit_tiny", "openai_rn_tiny"])
def test_openai_parity(folder, expected, name):
    clip, want = sis_jax.load_clip(folder / f"{name}.pt"), expected(name)
    close(clip.encode_image(want["pixel_values"]), want["image_embeds_raw"])
    close(clip.encode_text(want["input_ids"]), want["text_embeds_raw"])
    close(clip.logit_scale, want["logit_scale_exp"])
    dense = clip.dense_features(want["pixel_values"])
    close(np.reshape(dense, want["dense_value_features"].shape), want["dense_value_features"])
    assert dense.shape[1] == dense.shape[2] == {"openai_vit_tiny": 4, "openai_rn_tiny": 3}[name]
    assert clip.info.layout == "openai-clip" and clip.info.sha256 == files.sha256_of(
        convert.cached(folder / f"{name}.pt", "clip") / files.MODEL
    )


def test_vit_hidden_state(folder, expected):
    clip, want = sis_jax.load_clip(folder / "openai_vit_tiny.pt"), expected("openai_vit_tiny")
    close(
        clip.network.visual.hidden(jnp.asarray(want["pixel_values"]))[-1],
        want["vision_last_hidden_state"],
    )


def test_resnet_stages(folder, expected):
    clip, want = sis_jax.load_clip(folder / "openai_rn_tiny.pt"), expected("openai_rn_tiny")
    stages = clip.network.visual.stages(jnp.asarray(want["pixel_values"]))
    for stage in ("stem", "layer1", "layer2", "layer3", "layer4"):
        close(stages[stage], want[stage])


def test_transformers_parity(folder, expected):
    clip, want = sis_jax.load_clip(folder / "hf_tiny"), expected("hf_tiny")
    close(clip.encode_image(want["pixels"]), want["image"])
    close(clip.encode_text(want["ids"]), want["text"])
    close(np.reshape(clip.dense_features(want["pixels"]), want["dense"].shape), want["dense"])
    close(clip.network.visual.hidden(jnp.asarray(want["pixels"]))[-1], want["hidden"])
    image, text = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (clip.encode_image(want["pixels"]), clip.encode_text(want["ids"]))
    )
    close(clip.logit_scale * image @ text.T, want["logits"])
    prompts = json.loads(want["prompts"].tobytes())
    with pytest.warns(
        UserWarning, match="'the background, far too long .* is longer than CLIP's 16 tokens"
    ):
        assert np.array_equal(clip.tokenize(prompts), want["ids"])
    assert clip.cut(prompts) == (prompts[2],)
    assert clip.preprocessing == Preprocessing(24, 26, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    assert clip.info.name == "hf_tiny" and clip.info.licence.startswith("unknown")
    assert clip.config.vision.transformer == nets.TransformerConfig(32, 2, 4, 48, "gelu", 1e-3)
    assert clip.config.text.transformer == nets.TransformerConfig(24, 2, 3, 40, "quick_gelu", 1e-4)


def test_positions_are_resized_as_transformers_does(folder, expected):
    clip, want = sis_jax.load_clip(folder / "hf_tiny"), expected("hf_tiny")
    close(clip.network.visual(jnp.asarray(want["big"])), want["image_big"])
    assert clip.dense_features(want["big"]).shape == (1, 6, 5, 20)


def test_dense_features_of_other_sizes(folder):
    """A ResNet's map does not know where it is: a shifted picture gives the shifted map, away from
    the padding.
    """
    clip = sis_jax.load_clip(folder / "openai_rn_tiny.pt")
    wide = np.random.RandomState(0).randn(1, 320, 352, 3).astype(np.float32)
    a, b = np.asarray(clip.dense_features(wide)), np.asarray(clip.dense_features(wide[:, :, 32:]))
    assert a.shape == (1, 10, 11, 24)
    close(a[:, 4:6, 5:7], b[:, 4:6, 4:6])


# Inside JAX


def test_works_inside_jit_and_vmap_and_takes_chunks(folder, expected):
    clip, want = sis_jax.load_clip(folder / "openai_vit_tiny.pt"), expected("openai_vit_tiny")
    pixels, ids = want["pixel_values"], want["input_ids"]
    close(jax.jit(lambda c, x: c.encode_image(x))(clip, pixels), want["image_embeds_raw"])
    close(jax.vmap(lambda x: clip.encode_image(x[None])[0])(pixels), want["image_embeds_raw"])
    close(jax.jit(clip.encode_text)(ids), want["text_embeds_raw"])
    seven = np.concatenate([pixels] * 4)[:7]
    close(clip.encode_image(seven, batch=3), np.concatenate([want["image_embeds_raw"]] * 4)[:7])
    close(clip.encode_text(ids, batch=4), want["text_embeds_raw"])
    assert clip.dense_features(seven, batch=2).shape == (7, 4, 4, 32) and clip.encode_image(
        seven[:0]
    ).shape == (0, 32)
    gradient = jax.grad(lambda x: clip.encode_image(x).sum())(jnp.asarray(pixels))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_one_compilation_per_shape(folder):
    clip = sis_jax.load_clip(folder / "openai_vit_tiny.pt")
    pixels = np.zeros((11, 32, 32, 3), np.float32)
    clip_model._encode_image.clear_cache()
    for n in (5, 9, 10, 11):
        clip.encode_image(pixels[:n], batch=5)
    assert clip_model._encode_image._cache_size() == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda c: c.encode_image(np.zeros((1, 24, 32, 3), np.float32)),
            r"images of 32x32 pixels, got 24x32: use clip.preprocess",
        ),
        (lambda c: c.encode_image(np.zeros((1, 40, 40, 3), np.float32)), "got 40x40"),
        (
            lambda c: c.dense_features(np.zeros((1, 30, 32, 3), np.float32)),
            "multiples of 8 pixels, got 30x32; native is 32x32",
        ),
        (lambda c: c.encode_text(np.full((1, 77), 300, np.int32)), "from 0 to 299"),
        (lambda c: c.encode_text(np.zeros((1, 78), np.int32)), r"\[b, 77\], got int32\[1, 78\]"),
        (
            lambda c: c.encode_text("hair"),
            "knows 300 tokens and came without vocab.json and merges.txt",
        ),
        (lambda c: clip_model._texts(3), "a string or a list of strings, got int"),
        (lambda c: clip_model._texts(["hair", 3]), "a string or a list of strings, got list"),
        (
            lambda c: c.encode_image(np.zeros((1, 32, 32, 3), np.float32), batch=0),
            "batch must be an integer of at least 1, got 0",
        ),
        (
            lambda c: c.preprocess(np.zeros((9, 9, 3), np.float32)),
            r"uint8\[h, w, 3\].*got float32\[9, 9, 3\]",
        ),
        (lambda c: c.preprocess(np.zeros((9, 9), np.uint8)), r"got uint8\[9, 9\]"),
    ],
)
def test_wrong_arguments(folder, call, said):
    with pytest.raises(UsageError, match=said):
        call(sis_jax.load_clip(folder / "openai_vit_tiny.pt"))


# What goes in


def test_preprocess(folder, expected):
    want, prepare = expected("clip_preprocess"), Preprocessing(32, 32)
    photos = [want[f"image{i}"] for i in range(3)]
    pixels = np.stack([want[f"pixel{i}"] for i in range(3)])
    close(prepare(photos), pixels)
    close(prepare(photos[0]), pixels[:1])
    close(prepare(np.stack([photos[1]] * 2)), pixels[[1, 1]])
    close(prepare([Image.fromarray(photos[2]), photos[0]]), pixels[[2, 0]])
    rgba = Image.fromarray(photos[2]).convert("RGBA")
    close(prepare(rgba), pixels[2:])
    assert prepare([]).shape == (0, 32, 32, 3)


def test_tokens(folder, expected):
    want = expected("clip_tokens")
    prompts = json.loads(want["prompts_utf8"].tobytes())
    ids, cut = Tokenizer(77, 49408)(prompts)
    assert ids.dtype == np.int32 and np.array_equal(ids, want["ids_openai"])
    assert (
        len(cut) == 1
        and cut[0].startswith("word word")
        and want["n_tokens"][prompts.index(cut[0])] == 77
    )
    assert not want["references_agree"].all()


def test_tokens_as_transformers(tmp_path, expected):
    """The shipped vocabulary, written out as a Hugging Face folder has it."""
    vocabulary, merges = clip_inputs.shipped_vocabulary()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n", "utf-8"
    )
    want = expected("clip_tokens")
    prompts = json.loads(want["prompts_utf8"].tobytes())
    ids, _ = Tokenizer(77, 49408, str(tmp_path), openai=False)(prompts)
    assert np.array_equal(ids, want["ids_hf"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": 1}'),
        ("vocab.json", "{"),
        ("merges.txt", "#version: 0.2\na b c\n"),
        ("merges.txt", "unheard of\n"),
    ],
)
def test_damaged_vocabulary(folder, tmp_path, name, content):
    copy = shutil.copytree(folder / "hf_tiny", tmp_path / "copy")
    (copy / name).write_text(content)
    with pytest.raises(SisError, match=r"vocab"):
        sis_jax.load_clip(copy).tokenize("hair")


def test_no_vocabulary(folder, tmp_path):
    copy = shutil.copytree(folder / "hf_tiny", tmp_path / "copy")
    (copy / "merges.txt").unlink()
    with pytest.raises(UsageError, match=r"came without vocab\.json and merges\.txt"):
        sis_jax.load_clip(copy).tokenize("hair")


def test_vocabulary_of_another_network(folder, tmp_path):
    clip = sis_jax.load_clip(folder / "hf_tiny")
    with pytest.raises(SisError, match="knows 700 tokens: they do not belong together"):
        Tokenizer(16, 700, clip.tokenizer.folder, False)(["hair"])


def test_text_needs_no_torch_and_importing_needs_no_transformers(folder):
    code = (
        "import sys, sis_jax\n"
        f"c = sis_jax.load_clip({str(folder / 'hf_tiny')!r})\n"
        "assert 'transformers' not in sys.modules\n"
        "print(c.tokenize('a photo of hair').shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout.strip() == "(1, 16)" and done.stderr == ""


def test_pickles_stay_possible(folder):
    """A CLIP can be sent to another process, and is a pytree."""
    clip = sis_jax.load_clip(folder / "hf_tiny")
    leaves, tree = jax.tree.flatten(clip)
    assert leaves and jax.tree.unflatten(tree, leaves).info == clip.info
    assert pickle.loads(pickle.dumps(clip.tokenizer)) == clip.tokenizer


def test_nothing_warns(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sis_jax.load_clip(folder / "hf_tiny").tokenize("hair").shape == (1, 16)
        assert clip_names.find(folder / "hf_tiny") == folder / "hf_tiny"


WRONG_TYPES = """
import sys, jax, numpy as np, sis_jax
from sis_jax.types import UsageError
vit, resnet = (sis_jax.load_clip(path) for path in sys.argv[1:3])
def refused(said, run):
    try:
        run()
    except UsageError as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)
for clip in (vit, resnet):
    side = clip.config.vision.image_size
    bytes_ = np.ones((1, side, side, 3), np.uint8)
    whole = "got uint8: use clip.preprocess(photos)"
    refused(whole, lambda: clip.encode_image(bytes_))
    refused(whole, lambda: jax.jit(clip.encode_image)(bytes_))
    refused(whole, lambda: clip.dense_features(bytes_))
    refused(whole, lambda: jax.jit(clip.dense_features)(bytes_))
    refused(whole, lambda: clip.network.visual(jax.numpy.asarray(bytes_)))
    pixels = bytes_.astype(np.float32)
    assert np.array_equal(clip.encode_image(list(pixels)), clip.encode_image(pixels))
    refused("got images of several sizes", lambda: clip.encode_image([pixels[0], pixels[0, 1:]]))
    refused("batch must be an integer", lambda: clip.encode_image(pixels, batch=1.5))
    refused("surrogate", lambda: clip.encode_text([chr(0xD800)]))
for load, wrong in (
    (sis_jax.load_clip, None), (sis_jax.load_clip, b"x"),
    (sis_jax.load_generator, 3), (sis_jax.load_generator, b"x"),
):
    refused("expected a name or a path, got " + repr(wrong), lambda: load(wrong))
"""


def test_wrong_types(folder):
    """In a process of its own: here the shape checks of the tests would come first."""
    files = [str(folder / f"openai_{name}_tiny.pt") for name in ("vit", "rn")]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WRONG_TYPES, *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_damaged_vocabulary_is_not_converted(folder, tmp_path):
    copy = shutil.copytree(folder / "hf_tiny", tmp_path / "copy")
    (copy / "merges.txt").write_text("#version: 0.2\nno pair at all\n")
    with pytest.raises(SisError, match=r"the vocabulary in .* cannot be read"):
        convert.convert(copy, tmp_path / "out")
    (copy / "merges.txt").unlink()
    out = convert.convert(copy, tmp_path / "out")
    assert any(
        "token ids only" in note for note in files.read_config(out).notes
    ) and "no vocabulary" in verify.verify(out)
