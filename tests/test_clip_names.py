"""CLIP by name: OpenAI's names and digests, unknown names, and the hub's client, which a stand-in
replaces; nothing is downloaded.
"""

import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import clip_kit
import pytest
from clip_kit import close, save_pt
from safetensors.numpy import load_file

import sis_jax
from sis_jax.checkpoints import catalogue, convert, files
from sis_jax.ops.progress import showing_progress
from sis_jax.types import SisError, UsageError


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    clip_kit.own_folders(tmp_path, monkeypatch)


@pytest.fixture
def folder():
    return clip_kit.GOLDENS


@pytest.fixture
def expected():
    return clip_kit.results


def test_names_of_openai(folder, tmp_path, monkeypatch):
    here = tmp_path / "weights"
    here.mkdir()
    with pytest.raises(
        UsageError,
        match=r"clip-vit-b32 is not here: download https://openaipublic\S+/ViT-B-32.pt and put it "
        r"at \S+weights/ViT-B-32.pt",
    ):
        sis_jax.load_clip("ViT-B/32")
    shutil.copy(folder / "openai_script.pt", here / "ViT-L-14-336px.pt")
    for name in ("ViT-L/14@336px", "clip-vit-l14-336px"):
        with pytest.raises(
            SisError,
            match=r"not the published ViT-L-14-336px\.pt of clip-vit-l14-336px \(sha256 .*expected "
            r"3035c92b3509",
        ):
            sis_jax.load_clip(name)
    by_path = sis_jax.load_clip(
        here / "ViT-L-14-336px.pt"
    )  # by its path it is whatever it is, and nobody's licence
    assert by_path.info.licence.startswith("unknown") and by_path.info.name == "ViT-L-14-336px"
    digest = files.sha256_of(here / "ViT-L-14-336px.pt")
    monkeypatch.setitem(
        catalogue.CLIPS,
        "clip-vit-l14-336px",
        replace(catalogue.CLIPS["clip-vit-l14-336px"], sha256=digest),
    )
    clip = sis_jax.load_clip("ViT-L/14@336px")
    assert clip.info.name == "clip-vit-l14-336px" and clip.info.licence == "MIT (OpenAI CLIP)"


def test_catalogue():
    assert {
        "clip-vit-b32",
        "clip-vit-b16",
        "clip-vit-l14",
        "clip-rn50",
        "clip-rn50x4",
        "clip-rn50x16",
        "clip-rn50x64",
    } <= catalogue.CLIPS.keys()
    for public in catalogue.CLIPS.values():
        assert len(public.sha256) == 64 and public.source.endswith(public.sha256)
    assert len({public.sha256 for public in catalogue.CLIPS.values()}) == len(catalogue.CLIPS)


@pytest.mark.parametrize(
    ("name", "said"),
    [("RN50x46", "'clip-rn50x4'"), ("no/such/place", "unknown CLIP"), ("", "unknown CLIP")],
)
def test_unknown_names(name, said):
    with pytest.raises(UsageError, match=said):
        sis_jax.load_clip(name)


def test_an_empty_folder(tmp_path):
    with pytest.raises(UsageError, match=r"holds no CLIP: expected one of model\.safetensors"):
        sis_jax.load_clip(tmp_path)


class Hub:
    """Stands for the hub's client: `cached` and `online` are folders, None where there is none."""

    def __init__(self, cached=None, online=None):
        self.cached, self.online, self.asked = cached, online, []

    def __call__(self, name, allow_patterns, local_files_only):
        self.asked.append((name, tuple(allow_patterns), local_files_only))
        found = self.cached if local_files_only else self.online
        if found is None:
            raise ConnectionError("Name or service not known.\nMore lines.")
        if callable(found):
            return str(found(allow_patterns))
        return str(found)


@pytest.fixture
def hub(monkeypatch):
    def make(**places):
        import huggingface_hub

        made = Hub(**places)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
        return made

    return make


def test_hub_offline(hub, tmp_path):
    hub()
    with pytest.raises(UsageError) as caught:
        sis_jax.load_clip("openai/clip-vit-base-patch32")
    said = str(caught.value)
    assert (
        "(Name or service not known)" in said
        and "https://huggingface.co/openai/clip-vit-base-patch32" in said
    )
    assert (
        str(tmp_path / "weights" / "clip-vit-base-patch32") in said
        and "give the path" in said
        and "convert_weights.py" in said
    )


def test_hub_cache_and_download(hub, folder, tmp_path, expected):
    snapshot = shutil.copytree(
        folder / "hf_tiny", tmp_path / "models--openai--clip-tiny" / "snapshots" / "1234"
    )
    online = hub(online=snapshot)
    clip = sis_jax.load_clip("openai/clip-tiny")
    close(clip.encode_text(expected("hf_tiny")["ids"]), expected("hf_tiny")["text"])
    assert clip.info.name == "openai/clip-tiny" and clip.info.licence == "MIT (OpenAI CLIP)"
    assert [local for _, _, local in online.asked] == [True, False]
    assert all(
        "*" not in pattern and not pattern.endswith((".msgpack", ".h5"))
        for _, patterns, _ in online.asked
        for pattern in patterns
    )
    cached = hub(cached=snapshot)
    sis_jax.load_clip("openai/clip-tiny")
    assert [local for _, _, local in cached.asked] == [True]


def test_hub_takes_a_pickle_only_where_there_is_nothing_else(hub, folder, tmp_path):
    snapshot = shutil.copytree(folder / "hf_tiny", tmp_path / "models--a--b" / "snapshots" / "1")
    arrays = load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()

    def download(patterns):
        if "pytorch_model.bin" in patterns:
            save_pt(snapshot / "pytorch_model.bin", arrays)
        return snapshot

    online = hub(online=download)
    assert sis_jax.load_clip("a/b").info.source == "pytorch_model.bin"
    assert len(online.asked) == 4


def test_hub_name_in_the_weights_folder(hub, folder, tmp_path):
    hub()
    shutil.copytree(folder / "hf_tiny", tmp_path / "weights" / "clip-tiny")
    assert sis_jax.load_clip("someone/clip-tiny").info.name == "clip-tiny"
    assert (
        "clip-tiny" not in catalogue.folders() and catalogue.shipped()
    )  # a foreign folder is no weights folder of ours


def test_files_are_cached(folder, tmp_path):
    path = shutil.copy(folder / "openai_vit_tiny.pt", tmp_path / "tiny.pt")
    with pytest.raises(
        UsageError, match=r"tiny\.pt holds a CLIP, not a generator: use sis\.load_clip"
    ):
        sis_jax.load_generator(path)
    assert not (tmp_path / "cache").exists()
    sis_jax.load_clip(path)
    (cached,) = (tmp_path / "cache" / "weights").iterdir()
    stamp = (cached / files.MODEL).stat().st_mtime_ns
    assert (
        sis_jax.load_clip(path).info.name == "tiny"
        and (cached / files.MODEL).stat().st_mtime_ns == stamp
    )
    with pytest.raises(UsageError, match=r"tiny\.pt holds a CLIP, not a generator"):
        sis_jax.load_generator(path)
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("no folder can be made here")
    assert sis_jax.load_clip(path).info.name == "tiny"


@pytest.mark.parametrize(
    ("load", "name", "said"),
    [
        (sis_jax.load_clip, "models/clip.pt", r"models/clip\.pt is no file that exists"),
        (sis_jax.load_clip, "ffhq-256", r"use sis\.load_generator"),
        (sis_jax.load_generator, "ViT-B/32", r"use sis\.load_clip"),
        (sis_jax.load_generator, "clip-rn50", r"use sis\.load_clip"),
        (sis_jax.load_clip, "a" * 5000, "has 5000 characters"),
        (sis_jax.load_generator, "a" * 5000, "has 5000 characters"),
    ],
)
def test_wrong_names(load, name, said):
    with pytest.raises(UsageError, match=said):
        load(name)


def test_the_converter_checks_the_digest(folder, tmp_path):
    for name in ("RN50.pt", "weights/RN50.pt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(folder / "openai_rn_tiny.pt", path)
        with pytest.raises(SisError, match=r"not the published RN50\.pt of clip-rn50"):
            convert.convert(path, tmp_path / "out")
    main = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "convert_weights.py"))["main"]
    assert main(["RN50", "--out", str(tmp_path / "out")]) == 1 and not (tmp_path / "out").exists()


def test_the_converter_takes_names(hub, folder, tmp_path, monkeypatch, capsys):
    hub(
        cached=shutil.copytree(
            folder / "hf_tiny", tmp_path / "models--openai--clip-tiny" / "snapshots" / "1234"
        )
    )
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "convert_weights.py"))["main"]
    assert main(["openai/clip-tiny"]) == 0
    assert (
        capsys.readouterr().out.strip() == "ported_weights/clip-tiny"
        and sis_jax.load_clip("clip-tiny").info.name == "openai/clip-tiny"
    )
    assert (
        main([str(folder / "hf_tiny"), "--classes", "3"]) == 2
        and "leave out --classes" in capsys.readouterr().err
    )
    assert main(["clip-rn5", "--out", "x"]) == 2 and "'clip-rn50'" in capsys.readouterr().err
    assert main(["ViT-B/32"]) == 2 and "download https://openaipublic" in capsys.readouterr().err


def test_notes_are_told_once(folder, tmp_path, capfd):
    copy = shutil.copy(folder / "openai_vit_tiny.pt", tmp_path / "told-once.pt")
    with showing_progress():
        for _ in range(2):
            sis_jax.load_clip(copy)
    assert capfd.readouterr().err.count("told-once: such a file does not name its activation") == 1
