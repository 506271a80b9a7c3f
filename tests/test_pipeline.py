"""`python -m sis_jax run`: all stages in one folder, from a generator and from photos."""

import json

import numpy as np
import pytest

from sis_jax.stages.pipeline import run

pytestmark = pytest.mark.integration


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
        monkeypatch.setattr(
            sis_jax, verb, lambda *a, real=real, settings=settings, **k: real(*a, **settings | k)
        )


def test_from_a_generator(quick, tiny_weights, tmp_path):
    report = run(str(tiny_weights), out=str(tmp_path / "r"), n=24, steps=2)
    assert report.is_file()
    stages = json.loads((tmp_path / "r/run.json").read_text())["stages"]
    assert list(stages) == ["discover", "synthesize", "distill"] and all(
        s["state"] == "done" for s in stages.values()
    )
    before = (tmp_path / "r/student/model.safetensors").stat().st_mtime_ns
    run(str(tiny_weights), out=str(tmp_path / "r"), n=24, steps=2)
    assert (tmp_path / "r/student/model.safetensors").stat().st_mtime_ns == before


def test_from_photos(quick, tmp_path):
    photos = tmp_path / "photos.npz"
    np.savez(
        photos, images=np.random.default_rng(0).integers(0, 255, (24, 32, 32, 3), dtype=np.uint8)
    )
    run(str(photos), out=str(tmp_path / "r"), resolution=16, train_images=8, n=24, steps=2)
    stages = json.loads((tmp_path / "r/run.json").read_text())["stages"]
    assert stages["discover"]["config"]["gen"].endswith("training/generator")
    assert "adaptation_kept" in stages["distill"]
