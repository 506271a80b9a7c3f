"""CLIP's files: every layout, faults, weights folders and the door. Hostile archives are in
test_restricted.py, names in test_clip_names.py.

`openai_script.pt` is torch.jit.save(torch.jit.script(m)), torch 2.13.0, where m is a tree of
modules whose forward returns its input; they carry the arrays of `scripted_state` as parameters
under their names, and m has an attribute input_resolution = 4 and buffers context_length and
vocab_size = 8.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import clip_kit
import numpy as np
import pytest
from clip_kit import close, plain, save_pt
from safetensors.numpy import load_file, save_file

import sis_jax
from sis_jax.checkpoints import convert, files, verify
from sis_jax.checkpoints.build import arrays_of
from sis_jax.checkpoints.containers import read_tree
from sis_jax.checkpoints.layouts import clip as layout
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "convert_weights.py"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    clip_kit.own_folders(tmp_path, monkeypatch)


@pytest.fixture
def folder():
    return clip_kit.GOLDENS


@pytest.fixture
def expected():
    return clip_kit.results


# Layouts


def scripted_state():
    rng = np.random.RandomState(7)
    state = {}

    def put(key, *shape, dtype=np.float16):
        state[key] = np.asarray(rng.standard_normal(shape) * 0.2).astype(dtype)

    single = np.float32
    put("positional_embedding", 8, 64, dtype=single)
    put("text_projection", 64, 4)
    put("logit_scale", dtype=single)
    put("visual.class_embedding", 64)
    put("visual.positional_embedding", 5, 64)
    put("visual.proj", 64, 4)
    put("visual.conv1.weight", 64, 3, 2, 2)
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        put(f"{norm}.weight", 64, dtype=single)
        put(f"{norm}.bias", 64, dtype=single)
    for block in ("visual.transformer.resblocks.0", "transformer.resblocks.0"):
        for name, shape in {"attn.in_proj_weight": (192, 64), "attn.in_proj_bias": (192,)}.items():
            put(f"{block}.{name}", *shape)
        put(f"{block}.attn.out_proj.weight", 64, 64)
        put(f"{block}.attn.out_proj.bias", 64)
        for norm in ("ln_1", "ln_2"):
            put(f"{block}.{norm}.weight", 64, dtype=single)
            put(f"{block}.{norm}.bias", 64, dtype=single)
        put(f"{block}.mlp.c_fc.weight", 4, 64)
        put(f"{block}.mlp.c_fc.bias", 4)
        put(f"{block}.mlp.c_proj.weight", 64, 4)
        put(f"{block}.mlp.c_proj.bias", 64)
    put("token_embedding.weight", 8, 64)
    return state


def test_torchscript_archive(folder, tmp_path):
    """The archive gives the network of the plain state dict, to the bit; its program is compressed
    and stays so.
    """
    path = folder / "openai_script.pt"
    assert any(
        info.compress_type and "/code/" in info.filename
        for info in zipfile.ZipFile(path).infolist()
    )
    ours, same = (
        sis_jax.load_clip(path),
        sis_jax.load_clip(save_pt(tmp_path / "plain.pt", scripted_state())),
    )
    a, b = arrays_of(ours.network), arrays_of(same.network)
    assert (
        ours.config == same.config
        and a.keys() == b.keys()
        and all(np.array_equal(a[key], b[key]) for key in a)
    )
    assert ours.config.vision.image_size == 4 and ours.config.text.context == 8
    assert np.isfinite(ours.encode_image(np.ones((1, 4, 4, 3), np.float32))).all()


def test_half_and_double_precision(folder, tmp_path, expected):
    arrays, want = plain(read_tree(folder / "openai_vit_tiny.pt")), expected("openai_vit_tiny")
    double = save_pt(
        tmp_path / "double.pt", {key: value.astype(np.float64) for key, value in arrays.items()}
    )
    close(sis_jax.load_clip(double).encode_image(want["pixel_values"]), want["image_embeds_raw"])
    half = save_pt(
        tmp_path / "half.pt", {key: value.astype(np.float16) for key, value in arrays.items()}
    )
    clip = sis_jax.load_clip(half)
    assert all(value.dtype == np.float32 for value in arrays_of(clip.network).values())
    close(clip.encode_image(want["pixel_values"]), want["image_embeds_raw"], 2e-3)


def test_pytorch_model_bin_and_a_file_inside_a_folder(folder, tmp_path, expected):
    want = expected("hf_tiny")
    copy = shutil.copytree(folder / "hf_tiny", tmp_path / "named")
    arrays = load_file(copy / "model.safetensors")
    close(sis_jax.load_clip(copy / "model.safetensors").encode_text(want["ids"]), want["text"])
    (copy / "model.safetensors").unlink()
    positions = {
        f"{t}_model.embeddings.position_ids": np.arange(n)[None]
        for t, n in (("text", 16), ("vision", 17))
    }
    save_pt(copy / "pytorch_model.bin", arrays | positions)
    clip = sis_jax.load_clip(copy)
    close(clip.encode_text(want["ids"]), want["text"])
    assert clip.info.name == "named" and clip.tokenizer.folder == str(copy)


def test_end_token_2_reads_the_largest_id(folder, tmp_path, expected):
    copy, want = shutil.copytree(folder / "hf_tiny", tmp_path / "copy"), expected("hf_tiny")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    config["text_config_dict"] = {"num_attention_heads": 3}
    config["text_config"]["num_attention_heads"] = 8
    (copy / "config.json").write_text(json.dumps(config))
    clip = sis_jax.load_clip(copy)
    assert clip.config.text.end is None and clip.config.text.transformer.heads == 3
    close(clip.encode_text(want["ids"]), want["text"])


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 300, "width": 64, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def open_clip(folder, tmp_path, **changes):
    place = tmp_path / "laion"
    place.mkdir(exist_ok=True)
    arrays = {
        k: np.ascontiguousarray(v)
        for k, v in plain(read_tree(folder / "openai_vit_tiny.pt")).items()
    }
    save_file(arrays, place / "open_clip_model.safetensors")
    config = json.loads(json.dumps(OPEN_CLIP))
    for where, value in changes.items():
        at = config["model_cfg"]
        *path, last = where.split("__")
        for part in path:
            at = at[part]
        at[last] = value
    (place / "open_clip_config.json").write_text(json.dumps(config))
    return place


def test_open_clip(folder, tmp_path, expected):
    want = expected("openai_vit_tiny")
    clip = sis_jax.load_clip(open_clip(folder, tmp_path))
    close(clip.encode_image(want["pixel_values"]), want["image_embeds_raw"])
    close(clip.encode_text(want["input_ids"]), want["text_embeds_raw"])
    assert (
        clip.preprocessing.mean == (0.5, 0.5, 0.5)
        and clip.info.layout == "open_clip"
        and clip.info.name == "laion"
    )
    clip = sis_jax.load_clip(
        open_clip(folder, tmp_path, quick_gelu=False, vision_cfg__head_width=32, text_cfg__heads=4)
    )
    assert clip.config.vision.transformer.heads == 2 and clip.config.text.transformer.heads == 4
    assert (
        clip.config.vision.transformer.activation
        == clip.config.text.transformer.activation
        == "gelu"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"vision_cfg__timm_model_name": "convnext"},
            "vision_cfg has timm_model_name = 'convnext'",
        ),
        ({"text_cfg__no_causal_mask": True}, "text_cfg has no_causal_mask = True"),
        ({"vision_cfg__width": "wide"}, "lacks the width or heads"),
        ({"text_cfg__heads": 7}, "64 wide, which 7 heads do not divide"),
    ],
)
def test_open_clip_of_other_networks(folder, tmp_path, changes, said):
    with pytest.raises(SisError, match=said):
        sis_jax.load_clip(open_clip(folder, tmp_path, **changes))


def test_open_clip_without_its_config(folder, tmp_path):
    place = open_clip(folder, tmp_path)
    (place / "open_clip_config.json").unlink()
    with pytest.raises(
        SisError,
        match=r"open_clip_config\.json is missing; it holds the number of heads and the "
        r"activation",
    ):
        sis_jax.load_clip(place)


# Faults


def broken(arrays):
    return {
        "unknown": arrays | {"visual.mystery": np.zeros(3, np.float32)},
        "missing": {k: v for k, v in arrays.items() if k not in ("visual.proj", "ln_final.bias")},
        "shape": arrays
        | {
            "visual.ln_pre.weight": np.ones(65, np.float32),
            "text_projection": np.zeros((64, 33), np.float32),
        },
        "numbers": arrays | {"ln_final.bias": np.full(64, np.nan, np.float32)},
        "type": arrays | {"ln_final.bias": np.zeros(64, np.int64)},
    }


@pytest.mark.parametrize("kind", ["unknown", "missing", "shape", "numbers", "type"])
def test_faults(folder, tmp_path, kind):
    arrays = plain(read_tree(folder / "openai_vit_tiny.pt"))
    with pytest.raises(SisError, match=rf"does not fit the network \(\d faults\): .*{kind}: "):
        sis_jax.load_clip(save_pt(tmp_path / "x.pt", broken(arrays)[kind]))


def test_all_faults_are_told_at_once(folder, tmp_path):
    arrays = plain(read_tree(folder / "openai_rn_tiny.pt"))
    arrays["visual.mystery"] = np.zeros(3, np.float32)
    del (
        arrays["visual.layer2.0.bn1.running_var"],
        arrays["visual.layer3.0.conv2.weight"],
        arrays["transformer.resblocks.0.ln_1.bias"],
    )
    arrays["visual.bn1.running_var"] = -np.ones(2, np.float32)
    arrays["transformer.resblocks.0.attn.in_proj_weight"] = np.zeros((190, 64), np.float32)
    with pytest.raises(SisError) as caught:
        sis_jax.load_clip(save_pt(tmp_path / "x.pt", arrays))
    for part in (
        "visual.mystery",
        "visual.layer2_0.conv1, var",
        "visual.layer3_0.conv2",
        "block0.ln_1.bias",
        "visual.conv1 holds no variance",
        "[190, 64]",
    ):
        assert part in str(caught.value), part


@pytest.mark.parametrize(
    "gone",
    [
        "token_embedding.weight",
        "visual.conv1.weight",
        "visual.positional_embedding",
        "transformer.resblocks.0.mlp.c_fc.bias",
    ],
)
def test_arrays_that_tell_the_shape(folder, tmp_path, gone):
    arrays = plain(read_tree(folder / "openai_vit_tiny.pt"))
    del arrays[gone]
    with pytest.raises(SisError, match="missing: "):
        sis_jax.load_clip(save_pt(tmp_path / "x.pt", arrays))


def test_half_a_clip(folder, tmp_path):
    copy = shutil.copytree(folder / "hf_tiny", tmp_path / "copy")
    vision = {
        k: v for k, v in load_file(copy / "model.safetensors").items() if k.startswith("vision")
    }
    save_file(vision, copy / "model.safetensors")
    with pytest.raises(SisError, match=r"missing: text.token_embedding"):
        sis_jax.load_clip(copy)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (
            "config.json",
            {"vision_config": {"num_attention_heads": 5, "hidden_act": "gelu"}},
            "32 wide, which 5 heads do not divide",
        ),
        (
            "config.json",
            {"vision_config": {"hidden_act": "swish", "num_attention_heads": 4}},
            "uses 'swish', known are quick_gelu, gelu",
        ),
        (
            "config.json",
            {"text_config": {"num_attention_heads": "many"}},
            "does not describe a CLIP",
        ),
        (
            "preprocessor_config.json",
            {"crop_size": 32, "size": 32},
            "cuts photos to 32 pixels, but the network reads 24",
        ),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "does not describe a preprocessing"),
    ],
)
def test_foreign_configs(folder, tmp_path, file, change, said):
    copy = shutil.copytree(folder / "hf_tiny", tmp_path / "copy")
    config = json.loads((copy / file).read_text()) | change
    (copy / file).write_text(json.dumps(config))
    with pytest.raises(SisError, match=said):
        sis_jax.load_clip(copy)


def test_a_folder_without_config(folder, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "hf_tiny" / "model.safetensors", tmp_path / "bare")
    with pytest.raises(SisError, match=r"config.json is missing; it holds the number of heads"):
        sis_jax.load_clip(tmp_path / "bare")


# Weights folders


@pytest.mark.parametrize("name", ["hf_tiny", "openai_rn_tiny.pt", "openai_script.pt"])
def test_converted_folder(folder, tmp_path, name):
    out = convert.convert(folder / name, tmp_path / "out", "clip", licence="MIT")
    before, after = sis_jax.load_clip(folder / name), sis_jax.load_clip(out)
    a, b = arrays_of(before.network), arrays_of(after.network)
    assert before.config == after.config and all(np.array_equal(a[key], b[key]) for key in a)
    assert after.preprocessing == before.preprocessing and after.info.licence == "MIT"
    assert (
        after.info.sha256 == files.sha256_of(out / files.MODEL)
        and before.info.source == after.info.source
    )
    given = folder / name if (folder / name).is_file() else folder / name / files.MODEL
    assert files.read_config(out).source["sha256"] == files.sha256_of(given)
    assert (
        "sis.load_clip(PATH)" in (out / files.CARD).read_text()
        and "Discriminator" not in (out / files.CARD).read_text()
    )
    if name == "hf_tiny":
        assert (out / "vocab.json").is_file() and np.array_equal(
            before.tokenize("a photo"), after.tokenize("a photo")
        )
        (out / "merges.txt").write_text("#version: 0.2\n")
        with pytest.raises(SisError, match=r"merges\.txt is not the file"):
            sis_jax.load_clip(out)


def test_half_size_folder_and_verify(folder, tmp_path, expected):
    want = expected("hf_tiny")
    out = convert.convert(folder / "hf_tiny", tmp_path / "out", dtype="float16")
    assert (out / files.MODEL).stat().st_size < 0.6 * (
        folder / "hf_tiny" / "model.safetensors"
    ).stat().st_size
    close(sis_jax.load_clip(out).encode_image(want["pixels"]), want["image"], 5e-3)
    assert verify.verify(out).startswith("stored") and "the same" in verify.verify(out)
    config = files.read_config(out)
    points = np.array(config.digests["points"])
    files.write_config(out, replace(config, digests={"points": (-points).tolist()}))
    with pytest.raises(SisError, match="gives other points"):
        verify.verify(out)


def test_wrong_kind(folder, tmp_path):
    with pytest.raises(UsageError, match="holds a CLIP, not a StyleGAN2 generator"):
        convert.convert(folder / "hf_tiny", tmp_path / "out", "stylegan2")
    with pytest.raises(UsageError, match="holds a StyleGAN2 generator, not a CLIP"):
        convert.convert(folder.parent / "gan" / "ada16.pkl", tmp_path / "out", "clip")
    with pytest.raises(
        UsageError,
        match=r"ada16\.pkl holds a StyleGAN2 generator, not a CLIP: use sis\.load_generator",
    ):
        sis_jax.load_clip(folder.parent / "gan" / "ada16.pkl")
    with pytest.raises(UsageError, match=r"faces64 holds a StyleGAN2 generator, not a CLIP"):
        sis_jax.load_clip("faces64")
    out = convert.convert(folder / "hf_tiny", tmp_path / "out")
    with pytest.raises(UsageError, match=r"holds a CLIP, not a generator: use sis\.load_clip"):
        sis_jax.load_generator(out)


@pytest.mark.parametrize(
    "change",
    [{"heads": 5}, {"layers": 10**9}, {"activation": "swish"}, {"epsilon": -1}, {"width": 2.5}],
)
def test_damaged_config(folder, tmp_path, change):
    out = convert.convert(folder / "hf_tiny", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["clip"]["network"]["text"]["transformer"] |= change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SisError, match=r"config\.json"):
        sis_jax.load_clip(out)


def test_script(folder, tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        str(folder / "hf_tiny"),
        "--kind",
        "clip",
        "--out",
        str(tmp_path / "out"),
        "--verify",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "out"), done.stderr
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--list"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert "clip-rn50x64" in done.stdout and "MIT (OpenAI CLIP)" in done.stdout


def test_open_clip_under_another_name(folder, tmp_path):
    """The config beside the weights tells the activation, whatever they are called."""
    place = open_clip(folder, tmp_path, quick_gelu=False)
    (place / "open_clip_model.safetensors").rename(place / "ViT-tiny.safetensors")
    clip = sis_jax.load_clip(place / "ViT-tiny.safetensors")
    assert clip.info.layout == "open_clip" and clip.config.vision.transformer.activation == "gelu"


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"height": 26, "width": 26}},
        {"crop_size": {"height": 24, "width": 20}},
        {"do_center_crop": False},
        {"do_normalize": False},
        {"resample": 2},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_preprocessing_that_is_not_done_here(folder, tmp_path, change):
    copy = shutil.copytree(folder / "hf_tiny", tmp_path / "copy")
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_factor": 1 / 255}))
    sis_jax.load_clip(copy)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SisError, match=rf"has {next(iter(change))} = .* not supported"):
        sis_jax.load_clip(copy)


@pytest.mark.parametrize(
    "change", [{"resize_mode": "squash"}, {"interpolation": "bilinear"}, {"size": [32, 24]}]
)
def test_open_clip_preprocessing_that_is_not_done_here(folder, tmp_path, change):
    place = open_clip(folder, tmp_path)
    config = json.loads((place / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= {"resize_mode": "shortest", "interpolation": "bicubic"} | change
    (place / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        SisError, match=r"not supported: the only value known|do not belong together"
    ):
        sis_jax.load_clip(place)


def test_config_that_was_edited(folder, tmp_path):
    out = convert.convert(folder / "hf_tiny", tmp_path / "out")
    original = (out / "config.json").read_text()
    for where, value, said in (
        (("network", "text", "end"), 10**6, r"end: token 1000000, but there are"),
        (("preprocessing", "size"), 20, "cuts photos to 20 pixels, but the network reads 24"),
        (
            ("preprocessing", "mean"),
            [float("nan")] * 3,
            "sizes or colours of the preprocessing are damaged",
        ),
        ((), None, r'has lost its "clip"'),
    ):
        config = json.loads(original)
        at = {"clip": config.pop("clip")} if not where else config["clip"]
        for part in where[:-1]:
            at = at[part]
        if where:
            at[where[-1]] = value
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(SisError, match=said):
            sis_jax.load_clip(out)


def test_a_network_is_never_held_twice(folder, monkeypatch):
    """RN50x64 is 2.5 GB: its arrays are let go one by one as the network takes them."""
    seen, real = [], layout.build_network

    def spied(config, arrays, *rest):
        network = real(config, arrays, *rest)
        seen.append(len(arrays))
        return network

    monkeypatch.setattr(layout, "build_network", spied)
    sis_jax.load_clip(folder / "openai_script.pt")
    assert seen == [0]
