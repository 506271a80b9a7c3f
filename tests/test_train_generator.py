"""`train_generator` on a handful of small pictures: what it writes, that it resumes to the same
bits, what it refuses.
"""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import fakes
import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import sis_jax
from sis_jax import parallel
from sis_jax.checkpoints import save_generator
from sis_jax.models.layers import Conv
from sis_jax.runs import cli
from sis_jax.stages import train_generator as stage
from sis_jax.training import generator_loop, quality
from sis_jax.training.generator_loop import GeneratorTraining
from sis_jax.types import Info, SisError, UsageError

pytestmark = pytest.mark.integration

train_generator = sis_jax.train_generator


# 8 pixels, batch 8: two devices with a group of four images each. All four phases run in step 0,
# path length in step 4 again.
SMALL = {
    "resolution": 8, "batch": 8, "channel_base": 64, "channel_max": 8, "latent": 8,
    "mapping_layers": 2, "holdout": 16, "snapshot": 16, "path_length": 2.0, "dtype": "float32",
}  # fmt: skip


class Edges(nnx.Module):
    """A backbone of one random convolution."""

    info = Info("edges")

    def __init__(self):
        self.conv = Conv(3, 6, np.random.default_rng(0), size=3, stride=2)

    def __call__(self, x, tape=None):
        return (jax.nn.relu(self.conv(x)),)


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    """The quality curve from 100 pictures instead of 2000, by a small backbone."""
    patch = pytest.MonkeyPatch()
    patch.setattr(generator_loop, "SWD_IMAGES", 100)
    patch.setattr(stage, "load_backbone", Edges)
    patch.setattr(quality, "SIZES", (8, 8))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An .npz of 80 pictures: light discs of many sizes on dark ground."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:8, :8] + 0.5
    size, shade = rng.uniform(1, 4, 80)[:, None, None], rng.uniform(100, 250, (80, 1, 1, 3))
    disc = ((x - 4) ** 2 + (y - 4) ** 2 < size**2)[..., None]
    path = tmp_path_factory.mktemp("photos") / "discs.npz"
    np.savez(path, images=np.where(disc, shade, 20).astype(np.uint8))
    return str(path)


def checkpoint(folder):
    """Everything the last checkpoint holds, by name, without the clock."""
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager((folder / "checkpoints").absolute())
    latest = manager.latest_step()
    back = manager.restore(
        latest,
        args=ocp.args.Composite(arrays=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()),
    )
    manager.close()
    curve = [{k: v for k, v in row.items() if k != "seconds"} for row in back["meta"]["curve"]]
    return latest, jax.tree_util.tree_flatten_with_path(back["arrays"])[0], curve


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A run of 6 steps in one go, a snapshot every second one."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train_generator(photos, out=str(out), images=48, **SMALL)


def test_what_it_writes(whole):
    out, gen = whole
    record = json.loads((out / "run.json").read_text())["stages"]["train_generator"]
    assert (
        record["state"] == "done"
        and record["images"] == 48
        and record["photos"] == 64
        and record["held_out"] == 16
    )
    assert record["recipe"]["r1_gamma"] == pytest.approx(0.0002 * 64 / 8) and record["swd"] > 0
    with (out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["images"]) for r in rows] == [16, 32, 48]
    assert all(
        np.isfinite(float(r[name]))
        for r in rows
        for name in ("swd", "loss_g", "loss_d", "score_real", "score_fake", "augment")
    )
    assert {r["frechet_floor"] for r in rows} == {rows[0]["frechet_floor"]}
    most = 1.05 * min(float(r["frechet"]) for r in rows)
    best = [r for r in rows if float(r["frechet"]) <= most][-1]
    assert record["best"]["images"] == int(best["images"]) and float(best["frechet"]) > 0
    assert "edges (not the FID)" in (out / "generator" / "README.md").read_text()
    assert (
        gen.resolution == 8
        and gen.config.channels == (8, 8)
        and gen.z_dim == 8
        and gen.config.mapping_layers == 2
    )


def test_sample_grids(whole):
    """One per snapshot, 64 pictures each, named by images seen."""
    grids = sorted((whole[0] / "samples").glob("*.png"))
    assert len(grids) == 3
    with Image.open(grids[-1]) as grid:
        assert (
            grid.width >= 64
            and grid.height >= 64
            and len(np.unique(np.asarray(grid.convert("RGB")).reshape(-1, 3), axis=0)) > 64
        )


def test_the_generator_it_leaves(whole):
    out, gen = whole
    loaded = sis_jax.load_generator(out / "generator")
    assert loaded.config == gen.config
    np.testing.assert_allclose(
        loaded.sample(range(4)).images, gen.sample(range(4)).images, atol=0.02
    )  # stored in half precision
    disc = sis_jax.load_discriminator(out / "generator")
    assert np.isfinite(disc(loaded.sample(range(4)).images)).all()
    assert "48" in (out / "generator" / "README.md").read_text()
    assert not [p for p in out.rglob("*") if p.name.endswith((".part", ".sis-tmp", ".tmp"))]


def test_it_trained(whole, photos):
    """The averaged generator is not the one it began with."""
    out, gen = whole
    first = train_generator(
        photos, out=str(out.parent / "one"), images=8, **SMALL | {"snapshot": 8}
    )
    assert (
        np.abs(np.asarray(first.sample([0]).images) - np.asarray(gen.sample([0]).images)).max()
        > 1e-3
    )


def test_resumed_to_the_same_bits(whole, photos, tmp_path):
    """Stopped at 16 and at 32 of 48 images, then gone on: checkpoint, curve and generator equal
    those of the uninterrupted run.
    """
    out, gen = whole
    for images in (16, 32, 48):
        again = train_generator(photos, out=str(tmp_path / "run"), images=images, **SMALL)
    (step, state, curve), (other_step, other_state, other_curve) = (
        checkpoint(out),
        checkpoint(tmp_path / "run"),
    )
    assert step == other_step == 6 and curve == other_curve and len(state) == len(other_state) > 50
    for (path, a), (other, b) in zip(state, other_state):
        assert path == other and np.array_equal(a, b), jax.tree_util.keystr(path)
    name = "generator/model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert np.array_equal(gen.sample([1]).images, again.sample([1]).images)
    assert len((tmp_path / "run" / "curves.csv").read_text().splitlines()) == 4


def test_a_finished_run_is_left_alone(whole, photos):
    out, gen = whole
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.parent != out}
    again = train_generator(photos, out=str(out), images=48, **SMALL)
    assert np.array_equal(gen.sample([0]).images, again.sample([0]).images)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_killed_between_snapshots(whole, photos, tmp_path, monkeypatch):
    """Stopped by force in step 4, after the snapshot at step 2: the same bits again."""
    from sis_jax.training import gan as training

    real, calls = training.ema_decay, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "ema_decay", dies)
    with pytest.raises(KeyboardInterrupt):
        train_generator(photos, out=str(tmp_path / "run"), images=48, **SMALL)
    monkeypatch.undo()
    train_generator(photos, out=str(tmp_path / "run"), images=48, **SMALL)
    (_, state, curve), (_, other, other_curve) = checkpoint(whole[0]), checkpoint(tmp_path / "run")
    assert curve == other_curve and all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(state, other)
    )


def test_nothing_compiles_twice_and_corrections_resume(photos, tmp_path, monkeypatch, caplog):
    """A run whose augmentation grows at the fourth of six steps, in one go and stopped between two
    corrections: the same bits, and only the augmented phases compile after the first step.
    """
    jax.clear_caches()
    parallel._compiled.cache_clear()
    step, compiled = GeneratorTraining._step, []

    def counted(self, *args):
        caplog.clear()
        done = step(self, *args)
        compiled.append(sum("Finished XLA" in r.getMessage() for r in caplog.records))
        return done

    monkeypatch.setattr(GeneratorTraining, "_step", counted)
    monkeypatch.setattr(generator_loop, "adjust_probability", lambda p, r, n: p + n * (r + 2) / 500)
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        train_generator(photos, out=str(tmp_path / "a"), images=48, **SMALL)
    assert compiled[0] > 4 and compiled[1:4] == [0, 0, 0]
    assert compiled[4:] == [2, 0]  # G main and D main, augmented
    for images in (16, 48):
        train_generator(photos, out=str(tmp_path / "b"), images=images, **SMALL)
    (_, state, curve), (_, other, other_curve) = (
        checkpoint(tmp_path / "a"),
        checkpoint(tmp_path / "b"),
    )
    assert curve == other_curve and [row["augment"] > 0 for row in curve] == [False, True, True]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(state, other))


def test_a_checkpoint_of_the_older_format(whole, photos, tmp_path):
    """Optax state as a list of leaves, in an item of another name: it goes on all the same."""
    import orbax.checkpoint as ocp

    out, gen = whole
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    new = ocp.CheckpointManager((out / "checkpoints").absolute())
    how = ocp.args.Composite(arrays=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
    saved = new.restore(6, args=how)
    new.close()
    state = saved["arrays"]["state"]
    state |= {name: jax.tree.leaves(state[name]) for name in ("opt_g", "opt_d")}
    meta = {name: saved["meta"][name] for name in ("step", "seconds", "curve")}
    old = ocp.CheckpointManager((tmp_path / "run" / "checkpoints").absolute())
    save = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
    old.save(6, args=ocp.args.Composite(**save))
    old.close()
    again = train_generator(photos, out=str(tmp_path / "run"), images=48, **SMALL)
    assert np.array_equal(gen.sample([0]).images, again.sample([0]).images)
    train_generator(photos, out=str(tmp_path / "run"), images=56, **SMALL)
    assert checkpoint(tmp_path / "run")[0] == 7


def test_another_configuration_is_refused(whole, photos):
    out, _ = whole
    with pytest.raises(UsageError, match=r"seed=0, now asked for 1.*--overwrite"):
        train_generator(photos, out=str(out), images=48, seed=1, **SMALL)
    with pytest.raises(UsageError, match="latent=8, now asked for 4"):
        train_generator(photos, out=str(out), images=48, **SMALL | {"latent": 4})


def test_overwrite(photos, tmp_path):
    out = tmp_path / "run"
    train_generator(photos, out=str(out), images=16, **SMALL)
    before = checkpoint(out)[1]
    train_generator(photos, out=str(out), images=16, seed=1, overwrite=True, **SMALL)
    step, after, curve = checkpoint(out)
    assert step == 2 and len(curve) == 1 and len((out / "curves.csv").read_text().splitlines()) == 2
    assert not all(np.array_equal(a, b) for (_, a), (_, b) in zip(before, after))


def test_the_best_snapshot_is_kept_and_patience_ends(photos, tmp_path, monkeypatch):
    """Distances 3, 1, 2 (, 1.5): the folder holds the second snapshot; with a patience of one the
    third is the last, until the same command is given more.
    """
    measured = dict.fromkeys(quality.NAMES, 0.5)
    by_images = {16: 3.0, 32: 1.0, 48: 2.0, 64: 1.5}
    seen, said = [], []

    def measure(self, images):
        seen.append(16 * (len(seen) + 1))
        return measured | {"frechet": by_images[seen[-1]]}

    monkeypatch.setattr(quality.Quality, "measure", measure)
    monkeypatch.setattr(generator_loop, "say", said.append)
    settings = SMALL | {"images": 64, "patience": 1}
    train_generator(photos, out=str(tmp_path / "a"), **settings)
    assert seen == [16, 32, 48] and "that at 32 images" in said[-1]
    train_generator(photos, out=str(tmp_path / "a"), **settings)
    assert len(seen) == 3 and "--patience 0" in said[-1]
    last = train_generator(photos, out=str(tmp_path / "a"), **settings | {"patience": 0})
    assert seen == [16, 32, 48, 64]
    seen.clear()
    train_generator(photos, out=str(tmp_path / "b"), **settings | {"images": 32})
    name = "generator/model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    kept = sis_jax.load_generator(tmp_path / "b" / "generator")
    np.testing.assert_allclose(kept.sample([0]).images, last.sample([0]).images, atol=0.02)
    record = json.loads((tmp_path / "a" / "run.json").read_text())["stages"]["train_generator"]
    assert record["best"]["images"] == 32 and record["images"] == 64


@pytest.mark.parametrize(
    ("distances", "best", "least"),
    [([2231, 1523, 1546], 2, 1), ([100, 96, 102, 90], 3, 3), ([100, 106], 0, 0), ([None], 0, 0)],
)
def test_of_equal_distances_the_last_is_best(distances, best, least):
    training = object.__new__(GeneratorTraining)
    curve = [{} if d is None else {"frechet": d} for d in distances]
    training.run = SimpleNamespace(curve=curve)
    assert training.best is curve[best] and training.least is curve[least]


def test_too_few_held_out_photos_are_not_measured(photos, tmp_path):
    """Then the last snapshot is the best."""
    out = tmp_path / "run"
    train_generator(photos, out=str(out), images=8, **SMALL | {"holdout": 4, "snapshot": 8})
    with (out / "curves.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["frechet"] == "" and float(row["swd"]) > 0


def test_minutes(photos, tmp_path):
    """No time left: one step, saved, and the same command goes on."""
    out = tmp_path / "run"
    train_generator(photos, out=str(out), images=48, minutes=0.0, **SMALL)
    assert checkpoint(out)[0] == 1
    train_generator(photos, out=str(out), images=16, **SMALL)
    assert checkpoint(out)[0] == 2


def test_divergence_is_said(photos, tmp_path, monkeypatch):
    """Losses that are not a number stop the run with a sentence; the checkpoint before stays."""
    out = tmp_path / "run"
    train_generator(photos, out=str(out), images=16, **SMALL)
    real = parallel.map_devices

    def spoiled(body, *args, **static):
        def call(*blocks):
            found = real(body, *args, **static)(*blocks)
            if not isinstance(found, tuple):  # features of photos, no step
                return found
            return found[0], {name: value * np.nan for name, value in found[1].items()}

        return call

    monkeypatch.setattr(parallel, "map_devices", spoiled)
    with pytest.raises(SisError, match=r"diverged at step 4 .* good.* --r1-gamma"):
        train_generator(photos, out=str(out), images=32, **SMALL)
    monkeypatch.undo()
    assert checkpoint(out)[0] == 2 and sis_jax.load_generator(out / "generator").resolution == 8


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A generator to start from, with its discriminator."""
    path = tmp_path_factory.mktemp("parent") / "tiny"
    return save_generator(fakes.tiny_stylegan2(8), path, fakes.tiny_discriminator(8))


def test_start_from(parent, photos, tmp_path):
    """One step from given weights stays near them, in shape and in numbers; the checkpoint's own
    shape counts, not the flags.
    """
    gen = train_generator(
        photos,
        out=str(tmp_path / "run"),
        images=8,
        start_from=str(parent),
        **SMALL | {"snapshot": 8, "latent": 64},
    )
    origin = sis_jax.load_generator(parent)
    assert gen.config == origin.config
    a, b = (np.asarray(g.sample([0, 1]).images) for g in (gen, origin))
    assert 0 < np.abs(a - b).max() < 0.1 * np.abs(b).max()
    assert "tiny" in (tmp_path / "run" / "generator" / "README.md").read_text()


def test_start_from_without_a_discriminator(photos, tmp_path):
    path = save_generator(fakes.tiny_stylegan2(8), tmp_path / "tiny")
    with pytest.raises(UsageError, match="no discriminator"):
        train_generator(photos, out=str(tmp_path / "run"), images=8, start_from=str(path), **SMALL)


def test_start_from_another_size(parent, photos, tmp_path):
    with pytest.raises(UsageError, match="8 pixels, asked for --resolution 16"):
        train_generator(
            photos,
            out=str(tmp_path / "run"),
            images=8,
            start_from=str(parent),
            **SMALL | {"resolution": 16},
        )


def test_start_from_another_family(photos, tmp_path):
    """A DCGAN is a generator, but not one that this trains: a sentence, no traceback."""
    from sis_jax.checkpoints import files
    from sis_jax.checkpoints.build import arrays_of

    gen = fakes.tiny_dcgan((8,))
    config = {"z_dim": gen.z_dim, "channels": list(gen.config.channels)}
    files.write_folder(
        tmp_path / "dc", files.Folder("dcgan", "dc", "free", config), arrays_of(gen), None, "card"
    )
    with pytest.raises(SisError):
        train_generator(
            photos, out=str(tmp_path / "run"), images=8, start_from=str(tmp_path / "dc"), **SMALL
        )


def test_rows(photos, tmp_path):
    """Only the first photos are used, in training and in what is held out."""
    train_generator(photos, out=str(tmp_path / "run"), images=8, rows=20, **SMALL | {"snapshot": 8})
    record = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["train_generator"]
    assert record["photos"] == 16 and record["held_out"] == 4  # a fifth at most


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resolution": 48}, "resolution is 48, expected 8, 16, 32"),
        ({"resolution": 4}, "resolution is 4, expected 8"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 10}, "batch is 10, expected a multiple of 4"),
        ({"batch": 64}, "80 photos are too few for batches of 64: give at least 128"),
        ({"images": 0}, "images is 0"),
        ({"snapshot": 0}, "snapshot is 0"),
        ({"mapping_layers": 0}, "mapping_layers is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"r1_gamma": -1.0}, "r1_gamma is -1"),
        ({"path_length": -1.0}, "path_length is -1"),
        ({"rows": -5}, "rows"),
        ({"holdout": 0}, "holdout is 0"),
        ({"seed": -1}, "seed"),
        ({"channel_base": 4}, "channel_base"),
    ],
    ids=str,
)
def test_impossible_settings(photos, tmp_path, settings, said):
    with pytest.raises(SisError) as error:
        train_generator(photos, out=str(tmp_path / "run"), **{"images": 8} | SMALL | settings)
    assert said in str(error.value)
    assert not (tmp_path / "run" / "generator").exists() and not list(
        (tmp_path / "run").glob("samples/*")
    )


def test_from_the_shell(capfd, monkeypatch, tmp_path):
    """One line for a folder without photos: the folder, what was looked for, what was found;
    nothing is left.
    """
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.docx").write_bytes(b"text")
    code = cli.run(
        train_generator,
        argv=[str(tmp_path / "docs"), "--out", str(tmp_path / "run"), "--resolution", "8"],
    )
    said = capfd.readouterr()
    assert code == 2 and said.out == "" and "Traceback" not in said.err
    line = [text for text in said.err.splitlines() if text.strip()][-1]
    assert str(tmp_path / "docs") in line and ".docx" in line and ".png" in line
    assert not list((tmp_path / "run").glob("*/*"))


def test_dry_run(capfd, photos, tmp_path):
    code = cli.run(train_generator, argv=[photos, "--out", str(tmp_path / "run"), "--dry-run"])
    said = capfd.readouterr().out
    assert code == 0 and "generator/" in said and not (tmp_path / "run").exists()
    assert re.search(r"(h|days|hours|min)\b", said), said
