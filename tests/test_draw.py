"""Colours, overlays, grids and charts."""

import inspect

import numpy as np
import pytest
from PIL import Image

from sis_jax.data import draw
from sis_jax.runs import charts
from sis_jax.types import UsageError

# Machado, Oliveira and Fernandes (2009), severity 1, in linear RGB.
_VIEWERS = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def _oklab(rgb: np.ndarray) -> np.ndarray:
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(np.clip(rgb, 0, 1) @ to_lms.T) @ to_lab.T


@pytest.mark.parametrize(
    ("viewer", "least"), [("normal", 0.07), ("protan", 0.04), ("deutan", 0.04), ("tritan", 0.035)]
)
def test_colours_are_told_apart_by_every_viewer(viewer, least):
    colours = draw.palette()[: draw.DISTINCT + 1] / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    lab = _oklab(linear @ np.array(_VIEWERS[viewer]).T)
    distance = np.linalg.norm(lab[:, None] - lab, axis=-1) + 9 * np.eye(len(lab))
    assert draw.DISTINCT >= 32
    assert distance.min() > least  # 0.02 is about what an eye can just see


def test_colours_stay_with_their_class():
    assert [draw.colour(i) for i in (0, 1, 2, 8)] == ["#7a7a7a", "#e69f00", "#56b4e9", "#690000"]
    assert len({tuple(c) for c in draw.palette()[:65]}) == 65
    with pytest.raises(ValueError, match="read-only"):
        draw.palette()[0] = 1


def test_colour_mask_and_palette_png_agree(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = draw.palette_png(mask)
    picture.save(tmp_path / "m.png")
    again = Image.open(tmp_path / "m.png")
    assert again.mode == "P"
    np.testing.assert_array_equal(np.asarray(again), mask)
    np.testing.assert_array_equal(np.asarray(again.convert("RGB")), draw.colour_mask(mask))


def test_overlay_leaves_the_background_and_tints_the_rest():
    image = np.full((6, 6, 3), 100, np.uint8)
    mask = np.zeros((6, 6), np.uint8)
    mask[2:5, 2:5] = 3
    mask[5, 5] = draw.IGNORE
    out = draw.overlay(image, mask)
    np.testing.assert_array_equal(out[0, 0], image[0, 0])
    np.testing.assert_array_equal(out[5, 5], image[5, 5])
    np.testing.assert_array_equal(out[3, 3], ((100 + draw.palette()[3].astype(float)) / 2).round())
    assert (out[draw.edges(mask)].min(-1) > 190).all()
    np.testing.assert_array_equal(
        draw.overlay(np.stack([image, image]), np.stack([mask, mask]))[1], out
    )


@pytest.mark.parametrize("mask", [np.full((2, 2), -1), np.full((2, 2), 256)])
def test_masks_outside_the_range_are_refused(mask):
    with pytest.raises(UsageError, match="from 0 to 255"):
        draw.colour_mask(mask)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="size"):
        # Unwrapped: in tests the shape check would speak first.
        inspect.unwrap(draw.overlay)(np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4), np.uint8))
    with pytest.raises(UsageError, match="one label per image"):
        draw.grid(np.zeros((2, 4, 4, 3), np.uint8), 2, labels=["a"])
    with pytest.raises(UsageError, match="one image"):
        draw.grid([], 2)


def test_grid_puts_pictures_in_rows():
    images = np.stack([np.full((8, 10, 3), 10 * i, np.uint8) for i in range(5)])
    sheet = draw.grid(images, columns=3, pad=2)
    assert sheet.shape == (2 * 10 + 2, 3 * 12 + 2, 3)
    for i in range(5):
        top, left = 2 + (i // 3) * 10, 2 + (i % 3) * 12
        assert (sheet[top : top + 8, left : left + 10] == 10 * i).all()
    assert (sheet[12:20, 26:36] == 255).all()


def test_labels_are_written_below_and_never_wider_than_the_picture():
    images = np.zeros((2, 40, 40, 3), np.uint8)
    sheet = draw.grid(images, columns=2, pad=8, labels=["ok", "a very long name indeed"])
    assert sheet.shape[0] > 40 + 16 + 10
    below = sheet[48:]
    assert (below < 128).any()
    assert (below[:, 48:56] == 255).all()
    assert (below[:, 96:] == 255).all()


def test_sample_grid_has_three_rows():
    images = np.full((4, 16, 16, 3), 50, np.uint8)
    masks = np.ones((4, 16, 16), np.uint8)
    plain = draw.sample_grid(images, masks)
    assert plain.shape == (3 * 20 + 4, 4 * 20 + 4, 3)
    np.testing.assert_array_equal(plain[4, 4], [50, 50, 50])
    np.testing.assert_array_equal(plain[24, 4], draw.palette()[1])
    labelled = draw.sample_grid(images, masks, list("abcd"))
    np.testing.assert_array_equal(labelled[: 2 * 20], plain[: 2 * 20])
    assert labelled.shape[0] > plain.shape[0]


def test_charts_are_well_formed():
    from xml.etree import ElementTree

    chart = charts.line_chart_svg(
        {"a<b": [(1, 0.5), (2, float("nan")), (4, 0.25)], "c": [(1, 1)]},
        x_label="k & n",
        y_label="score",
        marked=[(4, 0.25)],
    )
    root = ElementTree.fromstring(chart)
    lines = root.findall("{*}polyline")
    assert len(lines) == 2
    assert len(lines[0].attrib["points"].split()) == 2  # the NaN is left out
    assert len(root.findall("{*}circle")) == 1
    # A larger value is drawn higher.
    (_, low), (_, high) = (
        tuple(map(float, p.split(","))) for p in lines[0].attrib["points"].split()
    )
    assert low < high
    heat = ElementTree.fromstring(
        charts.heatmap_svg(
            np.array([[0.1, np.nan], [0.3, 0.9]]), ["16x16", "32x32"], ["k=3", "k=4"], chosen=(1, 1)
        )
    )
    cells = heat.findall("{*}rect")
    assert len(cells) == 3
    assert "stroke" in cells[2].attrib
    assert charts.line_chart_svg({}) == ""
    ElementTree.fromstring(charts.line_chart_svg({"one": [(3, 3)]}))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.81349, "0.813"),
        (12.5, "12.5"),
        (3000, "3000"),
        (0, "0"),
        (1.23e-5, "1.2e-05"),
        (-0.5, "-0.5"),
        (6.0, "6"),
    ],
)
def test_numbers_are_short(value, text):
    assert charts.number(value) == text


@pytest.mark.parametrize("side, shown", [(16, 128), (100, 100), (256, 256), (1024, 256)])
def test_cells_of_a_sheet_are_neither_tiny_nor_huge(side, shown):
    mask = np.arange(side * side, dtype=np.uint8).reshape(1, side, side) % 7
    image = np.repeat(mask[..., None], 3, -1)
    assert draw.cells(image).shape == (1, shown, shown, 3)
    assert draw.cells(mask).shape == (1, shown, shown)
    assert set(np.unique(draw.cells(mask))) <= set(range(7))  # classes are never mixed
