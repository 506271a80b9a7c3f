"""`distill`: what is written, resuming to the same bits, adaptation, the recipe, human masks,
refusals. Networks are tiny and learn next to nothing.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import sis_jax
from sis_jax.data.pairs import Pairs
from sis_jax.data.threads import in_threads
from sis_jax.ops import grabcut
from sis_jax.runs.configs.distill import DistillConfig, Network, Source, Train
from sis_jax.stages import adapt, distill, train_student
from sis_jax.stages.adapt import Judgement
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
QUICK = {
    "student": "unet-small", "steps": 6, "batch": 8, "width": 8, "snapshot": 2, "trim": 0.0
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_data_run, tmp_path_factory):
    return shutil.copytree(tiny_data_run, tmp_path_factory.mktemp("runs") / "faces")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    file = tmp_path_factory.mktemp("photos") / "photos.npz"
    np.savez(
        file, images=np.random.default_rng(0).integers(0, 255, (24, 32, 32, 3), dtype=np.uint8)
    )
    return str(file)


@pytest.fixture(scope="module")
def student(run):
    return sis_jax.distill(str(run), **QUICK)


def test_what_is_written(run, student):
    place = run / "student"
    config = json.loads((place / "config.json").read_text())
    assert config["network"]["arch"] == "unet-small" and config["side"] == 16
    assert [c["id"] for c in config["classes"]] == [
        c["id"] for c in sis_jax.Parts.load(run).classes
    ]
    rows = list(csv.DictReader((place / "curves.csv").read_text().splitlines()))
    assert [int(r["step"]) for r in rows] == [2, 4, 6] and all(
        np.isfinite(float(r["loss"])) for r in rows
    )
    assert "none needed" in (place / "README.md").read_text()
    record = json.loads((run / "run.json").read_text())["stages"]["distill"]
    assert (
        record["state"] == "done"
        and record["pictures"] == 36
        and "sis_jax.distill" in record["command"]
    )


def test_what_was_stored_is_what_was_trained(run, student):
    pictures = list(np.random.default_rng(1).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8))
    again = sis_jax.load_student(run)
    for a, b in zip(student.scores(pictures), again.scores(pictures)):
        np.testing.assert_array_equal(a, b)


def test_done_is_kept_and_another_setting_is_refused(run, student):
    before = (run / "student/model.safetensors").stat().st_mtime_ns
    sis_jax.distill(str(run), **QUICK)
    assert (run / "student/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"steps=6, now asked for 7"):
        sis_jax.distill(str(run), **QUICK | {"steps": 7})


class _Killed(Exception):
    pass


@pytest.mark.parametrize("at", [3, 5, 8, 10])
def test_resuming_gives_the_same_bits_in_every_phase(run, photos, tmp_path, at, monkeypatch):
    settings = QUICK | {"photos": photos, "adapt_steps": 3, "rounds": 2, "batch": 4}
    sis_jax.distill(str(run), out=str(tmp_path / "whole"), **settings)
    calls = []
    straight = train_student.StudentTraining._blocks

    def killed(self, rows):
        calls.append(1)
        if len(calls) == at:
            raise _Killed
        return straight(self, rows)

    monkeypatch.setattr(train_student.StudentTraining, "_blocks", killed)
    with pytest.raises(_Killed):
        sis_jax.distill(str(run), out=str(tmp_path / "cut"), **settings)
    again = []
    monkeypatch.setattr(
        train_student.StudentTraining,
        "_blocks",
        lambda self, rows: again.append(1) or straight(self, rows),
    )
    sis_jax.distill(str(run), out=str(tmp_path / "cut"), **settings)
    assert len(again) < 12 - (at - 1) + settings["snapshot"], "it began again instead of going on"
    for name in ("model.safetensors", "curves.csv"):
        assert (tmp_path / "whole/student" / name).read_bytes() == (
            tmp_path / "cut/student" / name
        ).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_and_the_same_bytes(run, photos, tmp_path):
    """SIGKILL at random moments of both phases, between them, while a checkpoint is written, and
    while Python starts.
    """
    settings = QUICK | {"steps": 150, "adapt_steps": 150, "snapshot": 3, "photos": str(photos)}

    def command(out):
        words = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
        }
        return subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-m",
                "sis_jax.distill",
                str(run),
                "--out",
                str(tmp_path / out),
                "--quiet",
                *words,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = command("whole")
    assert first.communicate(timeout=300)[1] == "" and first.returncode == 0
    rng, seen, moved = np.random.default_rng(0), [], 0
    for _ in range(50):
        process, began, wait = command("cut"), time.monotonic(), rng.uniform(0, 0.5)
        early = rng.uniform(0, 10) if rng.random() < 0.1 else 120
        while process.poll() is None and time.monotonic() - began < early:
            now = sorted((tmp_path / "cut/student/checkpoints").glob("*"))
            if (
                now and now != seen
                # counted from the first checkpoint: the start of Python and JAX takes most of a
                # short run
            ):
                time.sleep(wait)
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        moved, seen = moved + (now != seen), now
    last = command("cut")
    _, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert moved > 10, "hardly any run was killed at work"
    for name in ("model.safetensors", "curves.csv", "config.json"):
        assert (tmp_path / "whole/student" / name).read_bytes() == (
            tmp_path / "cut/student" / name
        ).read_bytes().replace(b"cut-student", b"whole-student")


def test_adaptation_says_what_it_compared(run, photos, tmp_path):
    student = sis_jax.distill(
        str(run), out=str(tmp_path / "a"), photos=photos, adapt_steps=2, **QUICK
    )
    record = json.loads((tmp_path / "a/run.json").read_text())["stages"]["distill"]
    assert record["adaptation_kept"] in (True, False)
    assert all(
        0 <= record[f"{what}_{when}"] <= 1
        for what in ("stability", "agreement", "val_iou")
        for when in ("before", "after")
    )
    assert student.facts["adapted to"] == "photos.npz"


def test_a_student_begins_with_another_at_a_larger_side(
    run, student, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_student.StudentTraining, "_choose", lambda self: None)
    settings = QUICK | {"steps": 0, "side": 32, "start_from": str(run), "rounds": 0}
    same = sis_jax.distill(str(run), out=str(tmp_path / "same"), **settings)
    a, b = (jax.tree.leaves(nnx.state(s.network)) for s in (student, same))
    assert same.side == 32 and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    more = sis_jax.distill(
        str(run),
        out=str(tmp_path / "more"),
        photos=str(photos),
        adapt_steps=2,
        **settings | {"rounds": 1},
    )
    assert not np.array_equal(a[0], jax.tree.leaves(nnx.state(more.network))[0])
    with pytest.raises(UsageError, match=r"unet-small of width 8 .* they cannot share weights"):
        sis_jax.distill(str(run), out=str(tmp_path / "wide"), **settings | {"width": 16})
    with pytest.raises(
        UsageError, match=r"width 8 and block 2 .* width 8 and block 4 .* they cannot share weights"
    ):
        sis_jax.distill(str(run), out=str(tmp_path / "blocks"), **settings | {"block": 4})
    with pytest.raises(
        UsageError, match=r"faces-student is .* width 32 .* they cannot share weights"
    ):
        sis_jax.distill(
            str(run), out=str(tmp_path / "named"), **settings | {"start_from": "faces-student"}
        )
    with pytest.raises(UsageError, match="steps is 0"):
        sis_jax.distill(str(run), out=str(tmp_path / "none"), **QUICK | {"steps": 0})


@pytest.mark.parametrize("side", [None, 32])
def test_an_adaptation_that_shakes_is_not_kept(run, student, photos, tmp_path, monkeypatch, side):
    """Whatever the photos did, a worse student is thrown away, and the one from before is what is
    written, with its own side.
    """
    said = iter([Judgement(0.9, 0.8, 0.7), Judgement(0.95, 0.7, 0.7)])
    monkeypatch.setattr(adapt, "judge", lambda *a, **k: next(said))
    start = {"start_from": str(run), "steps": 0, "side": side} if side else {}
    kept = sis_jax.distill(
        str(run), out=str(tmp_path / "adapted"), photos=photos, adapt_steps=2, **QUICK | start
    )
    plain = student if side else sis_jax.distill(str(run), out=str(tmp_path / "plain"), **QUICK)
    pictures = list(np.random.default_rng(1).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8))
    np.testing.assert_array_equal(plain.scores(pictures)[0], kept.scores(pictures)[0])
    assert kept.facts["adaptation kept"] is False and kept.side == plain.side


def test_masks_without_an_object_are_no_better():
    """They are as steady as can be, and no colour contradicts them: only the generated pictures
    tell.
    """
    before = Judgement(0.9, 0.8, 0.8)
    assert not Judgement(1.0, 1.0, 0.4).better_than(before)
    assert Judgement(0.89, 0.85, 0.75).better_than(before)
    assert not Judgement(0.85, 0.84, 0.8).better_than(before)
    assert Judgement(0.91, None, 0.8).better_than(Judgement(0.9, None, 0.8))


def test_agreement_is_of_masks_that_follow_the_photo(student, monkeypatch):
    """Bright discs on dark ground: a student that reads brightness agrees with the colours, one
    that is blind does not.
    """
    y, x = np.mgrid[:16, :16]
    rng = np.random.default_rng(0)
    discs = np.stack([(x - 8) ** 2 + (y - 8) ** 2 < r**2 for r in rng.uniform(4, 6, 12)])
    photos = np.where(discs[..., None], 220, 30) + rng.integers(0, 20, (12, 16, 16, 3))
    photos = photos.astype(np.uint8)

    def says(ground):
        monkeypatch.setattr(
            adapt,
            "predicted",
            lambda student, photos, mirrored: np.stack([ground, 1 - ground], -1).astype(np.float32),
        )
        return adapt.agreement(student, photos, True)

    seeing = says(1 - photos[..., 0] / 255)
    blind = says(np.broadcast_to(np.where(y < 8, 0.9, 0.1), discs.shape))
    assert seeing > 0.95 and blind < seeing - 0.2


def test_a_failure_before_the_first_checkpoint_leaves_no_trace(run, tmp_path):
    with pytest.raises(SisError, match="diverged"):
        sis_jax.distill(
            str(run),
            out=str(tmp_path / "x"),
            **QUICK | {"learning_rate": 1e30, "steps": 40, "snapshot": 40},
        )
    assert "distill" not in json.loads((tmp_path / "x/run.json").read_text())["stages"]


def test_a_moved_run_is_the_same_run_and_other_parts_are_not(run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "there")
    before = (tmp_path / "there/student/model.safetensors").stat().st_mtime_ns
    sis_jax.distill(str(tmp_path / "there"), **QUICK)
    assert (tmp_path / "there/student/model.safetensors").stat().st_mtime_ns == before
    classes = tmp_path / "there/data/classes.json"
    classes.write_text(classes.read_text().replace("part 1", "hair"))
    with pytest.raises(UsageError, match="--overwrite"):
        sis_jax.distill(str(tmp_path / "there"), **QUICK)


def test_on_the_fly_needs_no_dataset(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "r")
    student = sis_jax.distill(str(tmp_path / "r"), n=20, **QUICK)
    assert student.facts["learned from"] == "19 images of tiny"


def test_an_estimate_follows_the_steps_and_the_images(run, tiny_run, monkeypatch):
    """With a student of known speed: 1 s for the first step, 0.01 s an image, 1 GB."""
    asked = []

    def known(config, recipe, resolution):
        asked.append((config.arch, recipe.side, recipe.batch, resolution))
        return 1.0, 0.01, 1e9

    monkeypatch.setattr(distill, "of_student", known)

    def estimated(source, steps, n=2):
        net, train = Network(student="unet-small", width=8), Train(steps=steps, batch=8)
        return distill.plan(
            DistillConfig(str(source), network=net, train=train, source=Source(n=n))
        )

    few, many = (estimated(run, steps) for steps in (2, 100_000))
    assert asked == [("unet-small", 16, 8, 16)] * 2
    assert 8000 < many["seconds"] - few["seconds"] < 9000
    assert 2e9 < few["memory_bytes"] == many["memory_bytes"] < 3e9
    drawn = [estimated(tiny_run, 2, n) for n in (2, 10_000_000)]
    assert drawn[1]["seconds"] > 100 + drawn[0]["seconds"]
    assert drawn[1]["memory_bytes"] - drawn[0]["memory_bytes"] > 1e10


def test_the_papers_recipe(run, tmp_path):
    student = sis_jax.distill(
        str(run), out=str(tmp_path / "p"), recipe="paper", steps=2, side=32, snapshot=1
    )
    config = json.loads((tmp_path / "p/run.json").read_text())["stages"]["distill"]["config"]
    assert (
        config["steps"] == 2 and config["side"] == 32
    )  # what is given beside a recipe wins, also where it is the ordinary default
    wanted = {
        "student": "resnet18",
        "batch": 15,
        "learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "optimizer": "adam",
        "schedule": "poly",
    }
    assert (
        {k: config[k] for k in wanted} == wanted
        and config["augment"] == "none"
        and student.config.arch == "resnet18"
    )
    with pytest.raises(UsageError, match="papr"):
        sis_jax.distill(str(run), out=str(tmp_path / "q"), recipe="papr")


def test_supervised_reference_from_human_masks(tmp_path):
    rng = np.random.default_rng(0)
    masks = np.zeros((12, 32, 32), np.uint8)
    masks[:, 8:24, 8:24] = 3
    images = np.where(masks[..., None] > 0, 220, 30).astype(np.uint8) + rng.integers(
        0, 20, (12, 32, 32, 3), dtype=np.uint8
    )
    np.savez(tmp_path / "pairs.npz", images=images, masks=masks)
    settings = {
        "steps": 40,
        "batch": 8,
        "width": 8,
        "side": 32,
        "learning_rate": 1e-2,
        "background": 0.0,
        "binary": True,
        "ema": 0.9,
    }
    student = sis_jax.distill(
        images=str(tmp_path / "pairs.npz"), out=str(tmp_path / "s"), **settings
    )
    assert [c["name"] for c in student.classes] == ["background", "foreground"]
    assert (student.masks([images[0]])[0] == (masks[0] > 0)).mean() > 0.9


def test_odd_pictures_are_left_out():
    masks = np.ones((8, 10, 10), np.uint8)
    masks[2:, :5] = 0
    pairs = Pairs(np.zeros((8, 10, 10, 3), np.uint8), masks, np.full_like(masks, 255))
    assert (
        len(pairs.without_odd_ones(0.25)) == 6
        and (pairs.without_odd_ones(0.25).masks[:, 0] == 0).all()
    )
    assert len(pairs.without_odd_ones(0.0)) == 8


def test_batches_depend_on_seed_and_step_alone():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    pairs = Pairs(images, images[..., 0], images[..., 0])
    from itertools import islice

    straight = [b[0][:, 0, 0, 0].tolist() for b in islice(pairs.batches(3, 7), 6)]
    late = [b[0][:, 0, 0, 0].tolist() for b in islice(pairs.batches(3, 7, start=4), 2)]
    assert straight[4:] == late
    assert sorted(i for batch in straight[:5] for i in batch) == sorted(list(range(5)) * 3)


def test_colours_correct_a_mask_that_leaks():
    """A disc on ground of another colour; the network thinks a piece of the ground belongs to the
    disc.
    """
    at = np.arange(48)
    truth = (at[None] - 24) ** 2 + (at[:, None] - 24) ** 2 < 150
    photo = np.where(truth[..., None], (200, 60, 40), (40, 60, 160)) + np.random.default_rng(
        0
    ).integers(-15, 15, (48, 48, 3))
    photo = np.clip(photo, 0, 255).astype(np.uint8)
    ground = np.where(truth, 0.05, 0.9).astype(np.float32)
    ground[24:, 36:] = 0.2
    wrong = (ground < 0.5) != truth
    prior = np.where(truth, 0.05, 0.9)
    found = grabcut.foreground(photo, (ground + prior) / 2, grabcut.LOOSE)
    assert wrong.mean() > 0.1 and (found != truth).mean() < 0.02
    many = list(in_threads(lambda i: grabcut.corrected(photo, ground), range(3), threads=2))
    np.testing.assert_array_equal(many[0], many[2])
    assert ((many[0] < 0.5) != truth).mean() < wrong.mean()


def test_nothing_to_compare_keeps_the_prediction():
    photo = np.zeros((16, 16, 3), np.uint8)
    certain = np.full((16, 16), 0.99, np.float32)
    assert not grabcut.foreground(photo, certain, grabcut.LOOSE).any()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"trim": 1.0}, "trim is 1.0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"side": 20}, "multiple of 16"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"masks": "m"}, "--masks needs --images"),
        ({"images": "i"}, "not both"),
        ({"soft": True}, "no confidence"),
        ({"width": 9}, "multiple of 8"),
    ],
)
def test_what_cannot_work_is_told_and_leaves_nothing(run, given, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        sis_jax.distill(str(run), out=str(tmp_path / "x"), **{"steps": 2, "batch": 4, **given})
    assert not (tmp_path / "x/student/model.safetensors").exists()


def test_a_run_without_parts_or_data_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"give a RUN"):
        sis_jax.distill()
    with pytest.raises(UsageError, match=r"no folder .*nowhere"):
        sis_jax.distill(str(tmp_path / "nowhere"), steps=2)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("side", [8, 12, 16, 24, 32])
def test_photos_are_reduced_to_any_side(side):
    """A student that `--start-from` brings may have a side that does not divide that of the
    photos.
    """
    from sis_jax.stages.adapt import reduced

    ramp = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None] * 10, (2, 16, 16))[
        ..., None
    ].repeat(3, -1)
    found = reduced(ramp, side)
    assert found.shape == (2, side, side, 3) and found.dtype == np.uint8
    assert (
        abs(found.mean() - ramp.mean()) < 2 and (np.diff(found[0, :, 0, 0].astype(int)) >= 0).all()
    )


def test_photos_are_looked_for_first(tiny_run, tmp_path, monkeypatch):
    """A mistyped name is told before ten thousand images are labelled."""
    monkeypatch.setattr(distill, "_on_the_fly", lambda *a: pytest.fail("labelled first"))
    with pytest.raises(UsageError, match="no file or folder nosuch"):
        sis_jax.distill(str(tiny_run), out=str(tmp_path / "x"), photos="nosuch", **QUICK)


@pytest.mark.parametrize(("edge", "side"), [(64, 128), (256, 256), (1024, 256)])
def test_the_side_follows_the_images_within_bounds(edge, side):
    student = Network(student="unet-efficientnet-lite0")
    config = DistillConfig("r", network=student, train=Train(side=0))
    assert distill._side(config, edge) == side
    asked = DistillConfig("r", network=student, train=Train(side=1024))
    assert distill._side(asked, edge) == 1024


def test_masks_of_one_class_are_no_stable_masks():
    """Without an object they agree in any colours; a student without any used to win."""
    empty, half = np.zeros((8, 8), np.uint8), np.repeat(np.uint8([[0], [1]]), 8, 1).repeat(4, 0)
    assert adapt._same(empty, empty, 2) == 0
    assert adapt._same(half, half, 2) == 1
    assert 0 < adapt._same(half, empty, 2) < 1
