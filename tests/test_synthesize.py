"""`synthesize` and the dataset folder: what is written, that nothing but the seed decides its
bytes, resuming after a kill, refusals.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fakes
import numpy as np
import pytest
from PIL import Image

import sis_jax
from sis_jax.data.folder import Dataset, Example, SplitWriter, write_chunks
from sis_jax.stages import synthesize as synthesize_stage
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration

ROOT = Path(sis_jax.__file__).parents[1]


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def weights(tiny_weights):
    return tiny_weights


@pytest.fixture(scope="module")
def run(tiny_data_run, tmp_path_factory):
    """A run with parts and a dataset of 40 images."""
    return shutil.copytree(tiny_data_run, tmp_path_factory.mktemp("runs") / "faces")


def test_layout_on_disk(run):
    data = run / "data"
    train = [json.loads(line) for line in (data / "train/metadata.jsonl").read_text().splitlines()]
    assert len(train) == 36 and len((data / "val/metadata.jsonl").read_text().splitlines()) == 4
    assert train[0] == {
        "file_name": "images/000000.png",
        "mask_file_name": "masks/000000.png",
        "seed": 100_000,
    } | {"confidence": train[0]["confidence"]}
    assert (
        all(0 <= row["confidence"] <= 1 for row in train)
        and len({row["seed"] for row in train}) == 36
    )
    with Image.open(data / "train/masks/000000.png") as mask:
        assert mask.mode == "P" and mask.size == (16, 16)
    classes = json.loads((data / "classes.json").read_text())
    assert [c["id"] for c in classes] == [c["id"] for c in sis_jax.Parts.load(run).classes]
    assert "Licence: none needed" in (data / "README.md").read_text()
    assert not list(data.rglob(".chunks")) and not list(data.rglob("*.sis-tmp"))


def test_examples_are_the_generators_pictures_with_the_parts_masks(run, weights):
    data = Dataset.open(run)
    gen, parts = sis_jax.load_generator(weights), sis_jax.Parts.load(run)
    method = sis_jax.methods.get(parts.method)(**parts.settings)
    first = data.split("train")[0]
    (images, clusters, _) = next(iter(method.label_seeds(parts.arrays, gen, [first.seed])))
    assert np.abs(first.image.astype(int) - images[0].astype(int)).max() <= 1
    assert (first.mask == parts.classify(clusters)[0]).mean() > 0.98


@pytest.mark.parametrize("devices", [1, 3])
def test_devices_and_company_do_not_change_a_byte(run, weights, tmp_path, devices, monkeypatch):
    from sis_jax import parallel

    here = parallel.local_devices()
    monkeypatch.setattr(
        parallel, "local_devices", lambda d=None: here[:devices] if d is None else tuple(d)
    )
    monkeypatch.setattr(synthesize_stage, "CHUNK", 17)
    gen, parts = sis_jax.load_generator(weights), sis_jax.Parts.load(run)
    other = sis_jax.synthesize(gen, parts, n=40, val=0.1, out=str(tmp_path / "x" / "data"))
    mine, theirs = content(run / "data"), content(other.path)
    assert mine.keys() == theirs.keys()
    assert [k for k in mine if mine[k] != theirs[k]] == []


def test_soft_keeps_the_certainty(run, weights, tmp_path):
    gen, parts = sis_jax.load_generator(weights), sis_jax.Parts.load(run)
    data = sis_jax.synthesize(gen, parts, n=4, val=0.5, soft=True, out=str(tmp_path / "soft"))
    example = data.split("train")[1]
    assert example.certainty.shape == (16, 16) and example.certainty.mean() == pytest.approx(
        example.confidence, abs=0.003
    )


def test_done_is_kept_and_other_settings_are_refused(run):
    before = (run / "data/train/metadata.jsonl").stat().st_mtime_ns
    sis_jax.synthesize(str(run), n=40, val=0.1)
    assert (run / "data/train/metadata.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"n=40, now asked for 50.*--overwrite"):
        sis_jax.synthesize(str(run), n=50, val=0.1)


def test_parts_of_another_generator_are_refused(run, tmp_path):
    from sis_jax.checkpoints import save_generator

    other = sis_jax.load_generator(save_generator(fakes.tiny_stylegan2(16, seed=5), tmp_path / "w"))
    with pytest.raises(SisError, match="were found in tiny"):
        sis_jax.synthesize(other, sis_jax.Parts.load(run), n=4, out=str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n": 1}, "n is 1"),
        ({"val": 1.0}, "val is 1.0"),
        ({"truncation": -1.0}, "truncation is -1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_numbers_are_told(run, given, said):
    with pytest.raises(UsageError, match=said):
        sis_jax.synthesize(str(run), **given)


def test_a_folder_without_parts_is_told(tmp_path):
    with pytest.raises(UsageError, match="holds no parts"):
        sis_jax.synthesize(str(tmp_path))
    with pytest.raises(UsageError, match="needs its parts and a folder"):
        sis_jax.synthesize(fakes.tiny_stylegan2(16))
    with pytest.raises(UsageError, match="holds no dataset"):
        Dataset.open(tmp_path)


def test_a_damaged_dataset_is_told(tmp_path):
    writer = SplitWriter(tmp_path / "train", 2, 2)
    picture = np.zeros((8, 8, 3), np.uint8)
    write_chunks([(writer, range(2))], iter([Example("", picture, picture[..., 0], 1, 0.5)] * 2))
    (tmp_path / "classes.json").write_text("[]")
    with pytest.raises(UsageError, match="not finished"):
        Dataset.open(tmp_path)
    writer.finish()
    (tmp_path / "train/masks/000001.png").write_bytes(b"no")
    with pytest.raises(SisError, match=r"000001\.png cannot be read"):
        Dataset.open(tmp_path).split("train")[1]


def test_pieces_that_a_stopped_process_left_are_cleared_away(tmp_path):
    writer = SplitWriter(tmp_path, 3, 1)
    (tmp_path / ".chunks").mkdir()
    (tmp_path / "metadata.jsonl").write_text("whole")
    (tmp_path / ".chunks/000002.jsonl").write_text("{}")
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.jsonl"]


def _command(run, n):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    words = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "sis_jax.synthesize",
        str(run),
        "--n",
        str(n),
        "--quiet",
    ]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "kills", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_kill_and_resume_gives_the_same_bytes(tiny_run, tmp_path, kills):
    n = 1200
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out in (whole, cut):
        shutil.copytree(tiny_run, out)
    first = _command(whole, n)
    assert first.communicate(timeout=240)[1] == "" and first.returncode == 0
    rng = np.random.default_rng(0)
    for _ in range(kills):
        process = _command(cut, n)
        began = time.monotonic()
        wait = rng.uniform(0.2, 2.0)
        seen = len(list(cut.glob("data/*/.chunks/*.jsonl")))
        while process.poll() is None and time.monotonic() - began < 120:
            # Counted from when it begins to write: the start of Python and JAX takes most of a
            # short run.
            if (
                len(list(cut.glob("data/*/images/*.png"))) > 0
                and len(list(cut.glob("data/*/.chunks/*.jsonl"))) > seen
            ):
                time.sleep(wait / 10)
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = _command(cut, n)
    out, err = last.communicate(timeout=240)
    assert last.returncode == 0, err
    assert out.strip() == str(cut / "data")
    mine, theirs = content(cut / "data"), content(whole / "data")
    assert mine.keys() == theirs.keys() and [k for k in mine if mine[k] != theirs[k]] == []
