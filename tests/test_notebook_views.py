"""Nouns show themselves in a notebook."""

import io

import numpy as np
import parts_kit
from PIL import Image

from sis_jax.data.folder import Dataset
from sis_jax.data.masks import Masks, Prediction
from sis_jax.runs.metrics import Metrics


def size(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_parts():
    parts = parts_kit.quarters()
    assert size(parts._repr_png_()) == parts.show().size


def test_masks(tmp_path):
    photo, mask = np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=np.uint8)
    classes = ({"id": 1, "name": "line"},)
    held = Masks(classes, ("a",), held=(Prediction("a", photo, mask),))
    assert size(held._repr_png_()) == held.show().size
    assert Masks(classes, ("a",), folder=tmp_path)._repr_png_() is None


def test_metrics_are_text(monkeypatch):
    monkeypatch.setattr(Metrics, "show", lambda _: "a < b")
    assert Metrics("mine", {}, {})._repr_html_() == "<pre>a &lt; b</pre>"


def test_datasets(tiny_data_run):
    data = Dataset.open(tiny_data_run)
    assert size(data._repr_png_()) == data.show().size
