"""`python -m sis_jax run`: all stages in one folder, from a generator and from photos."""

import contextlib
import json
from pathlib import Path
from time import sleep
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from sis_jax.checkpoints.student import Student
from sis_jax.data.masks import Prediction, write_mask
from sis_jax.models.students import StudentConfig
from sis_jax.run import run
from sis_jax.stages import background, budget, clock, foreground, photo_samples, speeds
from sis_jax.stages.budget import Speeds
from sis_jax.types import UsageError


@pytest.fixture
def quick(monkeypatch):
    """Small settings for the stages that `run` leaves at their defaults."""
    import sis_jax

    for verb, settings in (
        ("discover", {"k": 3, "layer": "16x16", "n": 6, "n_init": 1, "max_points": 1536}),
        (
            "distill",
            {"student": "unet-small", "width": 8, "batch": 8, "snapshot": 2, "adapt_steps": 2},
        ),
        (
            "train_generator",
            {
                "batch": 8,
                "channel_base": 128,
                "channel_max": 8,
                "latent": 8,
                "mapping_layers": 1,
                "snapshot": 8,
                "holdout": 2,
            },
        ),
    ):
        real = getattr(sis_jax, verb)

        def work(*a, real=real, settings=settings, verb=verb, **k):
            # The plan chooses a network, too large for a test.
            return real(*a, **(k | settings if verb == "train_generator" else settings | k))

        monkeypatch.setattr(sis_jax, verb, work)


def photos_in(place, height=48):
    """24 photos of noise, light or dark, 32 pixels wide."""
    place.mkdir()
    for i, image in enumerate(np.random.default_rng(0).uniform(0, 1, (24, height, 32, 3))):
        Image.fromarray((image * (20 + 10 * i)).astype(np.uint8)).save(place / f"{i:02d}.png")
    return place


def write_run(out, stages):
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"format": 1, "stages": stages}))


def stages_of(out):
    return json.loads((out / "run.json").read_text())["stages"]


@pytest.mark.integration
def test_from_a_generator(quick, tiny_weights, tmp_path):
    report = run(str(tiny_weights), out=str(tmp_path / "r"), n=24, steps=2)
    assert report.is_file()
    stages = stages_of(tmp_path / "r")
    assert list(stages) == ["run", "discover", "run, planned again", "synthesize", "distill"]
    assert all(s["state"] == "done" for s in stages.values())
    assert stages["run"]["command"].startswith("python -m sis_jax run ")
    assert not (tmp_path / "r/masks").exists()
    before = (tmp_path / "r/student/model.safetensors").stat().st_mtime_ns
    run(str(tiny_weights), out=str(tmp_path / "r"), n=24, steps=2)
    assert (tmp_path / "r/student/model.safetensors").stat().st_mtime_ns == before


ANEW = {"overwrite": True}
# Of a machine on which eight minutes are just enough.
SLOW = Speeds(
    sample=0.5, student_start=0.5, student_image=0.05, student_bytes=1, snapshot=5,
    gan_start=1, gan_image=0.3, gan_bytes=1,
)  # fmt: skip


@pytest.mark.integration
def test_from_photos(quick, tmp_path, monkeypatch):
    """Every stage in a given time, on photos that are not square; the same command again does
    nothing.
    """
    place, out, timed = photos_in(tmp_path / "photos"), tmp_path / "r", []
    monkeypatch.setattr(speeds, "measured", lambda *a: timed.append(a) or SLOW)
    asked = {"out": str(out), "budget": "12m", "resolution": 16, "fit": "pad"}
    asked |= {"train_images": 24, "steps": 4}
    report = run(str(place), **asked)
    stages = stages_of(out)
    assert stages_of(out / "training")["train_generator"]["images"] == 24
    assert stages["distill"]["config"]["fit"] == "pad" and "adaptation_kept" in stages["distill"]
    for i in range(24):
        with Image.open(out / f"masks/{i:02d}.png") as mask:
            assert mask.size == (32, 48)
    assert report.read_text().count("photo with mask of") == 16
    kept = {p: p.stat().st_mtime_ns for p in (out / "training").rglob("*.safetensors")}
    kept |= {p: p.stat().st_mtime_ns for p in (out / "masks").iterdir()}
    run(str(place), **asked)
    assert len(timed) == 1 and {p: p.stat().st_mtime_ns for p in kept} == kept


class Bright(nnx.Module):
    """Foreground where a photo is light."""

    def __call__(self, x, tape=None):
        light = x.mean(-1, keepdims=True)
        return jnp.concatenate([-light, light], -1)


@pytest.fixture
def doors(monkeypatch):
    """Doors that take as long as they are told and write little: {verb: seconds; "then": called at
    the end of the generator's training}, [(verb, what it was given)].
    """
    import sis_jax

    took: dict[str, Any] = {"train_generator": 100.0}
    calls, now = [], [0.0]

    def door(verb):
        def work(*args, **given):
            calls.append((verb, given))
            now[0] += took.get(verb, 1.0)
            if verb == "train_generator" and took.get("then"):
                took["then"]()
            if verb == "predict":
                for photo in Path(args[1]).iterdir():
                    write_mask(
                        Path(given["out"]),
                        Prediction(photo.name, None, np.eye(48, 32, dtype=np.uint8)),
                    )

        return work

    for verb in ("train_generator", "discover", "synthesize", "distill", "predict"):
        monkeypatch.setattr(sis_jax, verb, door(verb))
    student = Student(
        Bright(), StudentConfig(), ({"id": 0, "name": "background"}, {"id": 1, "name": "light"}), 32
    )
    monkeypatch.setattr(photo_samples, "load_student", lambda run: student)
    monkeypatch.setattr(background, "missing_background", lambda *a: {})
    monkeypatch.setattr(foreground, "features", lambda *a: None)
    monkeypatch.setattr(foreground, "clustering", lambda *a: {"k": 4, "layer": "16x16"})
    monkeypatch.setattr(speeds, "measured", lambda *a: calls.append(("measured", a)) or SLOW)
    monkeypatch.setattr(clock, "perf_counter", lambda: now[0])
    return took, calls


def test_a_budget_too_short_for_any_machine_is_refused_before_it_is_timed(doors, tmp_path):
    place = photos_in(tmp_path / "photos")
    with pytest.raises(UsageError, match=r"the budget is 2 min, .* --budget \d+m or more"):
        run(str(place), out=str(tmp_path / "r"), budget="2m")
    assert doors[1] == []


def test_the_plan_of_photos(doors, tmp_path):
    """Kept in run.json and made once; what the stages are asked for follows it."""
    _, calls = doors
    place, out = photos_in(tmp_path / "photos"), tmp_path / "r"
    asked = {"out": str(out), "budget": "12m", "fit": "pad", "seed": 3}
    page = run(str(place), **asked).read_text()
    verbs = ["measured", "train_generator", "discover", "synthesize", "distill", "predict"]
    given = dict(calls)
    assert list(given) == verbs
    stages = stages_of(out)
    first, later = stages["run"], stages["run, planned again"]
    assert [s["stage"] for s in first["stages"]] == [*verbs[1:], "report"]
    assert all(s["seconds"] > 0 and s["memory_bytes"] > 1e8 for s in first["stages"])
    assert 0.7 * 720 < sum(s["seconds"] for s in first["stages"]) <= 0.92 * 720
    training, distilled = given["train_generator"], given["distill"]
    assert all(first["sizes"][k] == training[k] for k in ("images", "batch", "channel_base"))
    assert training["fit"] == distilled["fit"] == "pad" and training["seed"] == 3
    assert 0 < training["minutes"] < distilled["minutes"] < 12
    chosen = stages["run, the clustering"]["settings"]
    assert chosen.items() <= given["discover"].items() and chosen["k"] == 4
    assert given["synthesize"]["n"] == later["sizes"]["n"]
    assert all(distilled[k] == later["sizes"][k] for k in ("steps", "adapt_steps"))
    assert distilled["rounds"] == budget.Sizes().rounds >= later["sizes"]["rounds"]
    assert distilled["photos"] == str(place) and distilled["alike"] is True
    assert page.count("python -m sis_jax run ") == 1
    calls.clear()
    run(str(place), **asked)
    assert [verb for verb, _ in calls] == verbs[2:]  # not measured, nor trained again
    again = dict(calls)["distill"]
    assert again["minutes"] <= distilled["minutes"]
    assert again | {"minutes": 0} == distilled | {"minutes": 0}
    with pytest.raises(UsageError, match="budget='12m', now asked for '13m'"):
        run(str(place), **asked | {"budget": "13m"})


OLDER = {"state": "started", "started": "2026", "config": {}}  # before there was `--alike`


def test_a_resumed_run_goes_on_as_it_began(doors, tmp_path):
    """A generator that is finished is not trained again, and a student from before `--alike` stays
    without it, unless all is repeated.
    """
    took, calls = doors
    place, out = photos_in(tmp_path / "photos"), tmp_path / "r"

    def trained():
        record = {"state": "done", "images": 32, "training_seconds": 100.0, "started": "2026"}
        write_run(out / "training", {"train_generator": record})
        raise KeyboardInterrupt

    took["then"] = trained
    with pytest.raises(KeyboardInterrupt):
        run(str(place), out=str(out), budget="12m")
    content = {"format": 1, "stages": stages_of(out) | {"distill": OLDER}}
    (out / "run.json").write_text(json.dumps(content))
    calls.clear()
    run(str(place), out=str(out), budget="12m")
    assert [verb for verb, _ in calls] == ["discover", "synthesize", "distill", "predict"]
    assert dict(calls)["distill"]["alike"] is False
    took["then"] = None
    run(str(place), out=str(out), budget="12m", overwrite=True)
    assert dict(calls)["distill"]["alike"] is True and "train_generator" in dict(calls)


def test_a_slow_training_leaves_a_smaller_student(doors, tmp_path):
    took, calls = doors
    place, steps = photos_in(tmp_path / "photos"), {}
    for seconds in (50.0, 300.0, 4000.0):
        took["train_generator"] = seconds
        run(str(place), out=str(tmp_path / f"{seconds:g}"), budget="12m")
        steps[seconds] = dict(calls)["distill"]["steps"]
    assert steps[50.0] > steps[300.0] >= steps[4000.0] > 0


def test_a_machine_that_became_slow_is_planned_for(doors, tmp_path):
    """The later stages are as slow as the generator's training was."""
    took, calls = doors
    place, work = photos_in(tmp_path / "photos"), {}
    for pace in (1, 2):
        out = tmp_path / str(pace)

        def trained(pace=pace, out=out):
            sizes = stages_of(out)["run"]["sizes"]
            row = stages_of(out)["run"]["stages"][0]
            record = {"images": sizes["images"], "training_seconds": pace * row["seconds"]}
            record["started"] = "2026-01-01T00:00:00Z"
            write_run(out / "training", {"train_generator": record})

        took["then"] = trained
        run(str(place), out=str(out), budget="12m")
        work[pace] = dict(calls)["distill"]["steps"]
    assert 0 < work[2] < 0.8 * work[1]


def test_the_time_of_a_killed_call_counts(doors, tmp_path, monkeypatch):
    """Also of a stage that was not finished; --overwrite counts anew."""
    took, calls = doors
    place, out = photos_in(tmp_path / "photos"), tmp_path / "r"
    asked, minutes = {"out": str(out), "budget": "30m"}, {}
    monkeypatch.setattr(clock.Clock, "__exit__", lambda *_: None)  # a kill is not an exit
    monkeypatch.setattr(clock, "EVERY", 0.01)

    def killed():
        while float((out / clock.FILE).read_text()) < took["train_generator"]:
            sleep(0.01)
        raise KeyboardInterrupt

    for name, then, extra in (("killed", killed, {}), ("again", None, {}), ("anew", None, ANEW)):
        took["then"] = then
        with contextlib.suppress(KeyboardInterrupt):
            run(str(place), **asked, **extra)
        minutes[name] = dict(calls)["train_generator"]["minutes"]
    assert minutes["again"] == pytest.approx(minutes["killed"] - 100 / 60, abs=0.1)
    assert minutes["anew"] == pytest.approx(minutes["killed"], abs=0.1)


def test_photos_of_least_confidence_come_first(doors, tmp_path):
    place, out = photos_in(tmp_path / "photos"), tmp_path / "r"
    run(str(place), out=str(out), budget="12m")
    shown = json.loads((out / "photos/photos.json").read_text())
    confidence = [p["confidence"] for p in shown["photos"]]
    assert shown["looked_at"] == 24 and len(confidence) == 16 and confidence == sorted(confidence)
    with (
        Image.open(out / "photos/00_image.png") as image,
        Image.open(out / "photos/00_mask.png") as mask,
    ):
        assert image.size == mask.size == (32, 48)
        assert np.array_equal(np.asarray(mask), np.eye(48, 32))


@pytest.mark.parametrize(("height", "fit"), [(48, "stretch"), (32, "crop")])
def test_without_a_budget_nothing_is_measured(doors, tmp_path, height, fit):
    """And only photos that are nearly square are cropped."""
    _, calls = doors
    run(str(photos_in(tmp_path / "photos", height)), out=str(tmp_path / "r"), n=50)
    given = dict(calls)
    assert given["train_generator"]["fit"] == given["distill"]["fit"] == fit
    assert "measured" not in given and given["train_generator"]["minutes"] is None
    assert given["train_generator"]["resolution"] == 64 and given["synthesize"]["n"] == 50


def test_either_level(doors, tmp_path):
    """Of the parts, in the masks; the plan of an earlier version names none and means the first."""
    _, calls = doors
    for level in (0, 1):
        run(out=str(tmp_path / str(level)), level=level)
    assert [given["level"] for verb, given in calls if verb == "synthesize"] == [0, 1]
    asked = [stages_of(tmp_path / str(i))["run"]["config"] for i in (0, 1)]
    assert "level" not in asked[0] and asked[1]["level"] == 1


@pytest.mark.parametrize("count", [0, 7])
def test_a_folder_of_too_few_photos_is_refused_first(doors, tmp_path, count):
    place = photos_in(tmp_path / "few")
    for photo in sorted(place.iterdir())[count:]:
        photo.unlink()
    with pytest.raises(UsageError, match="few holds 7 photos, .* at least 8" if count else "few"):
        run(str(place), out=str(tmp_path / "r"), budget="2h")
    assert not doors[1]
