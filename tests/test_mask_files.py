"""Masks keep their meaning: alpha, palettes, 16 bits, floating point, EXIF; or are refused by
name.
"""

import json

import numpy as np
import pytest
from PIL import Image

from sis_jax.data import draw
from sis_jax.data.ground_truth import open_pairs
from sis_jax.data.mask_files import read_mask, read_shape
from sis_jax.types import SisError

ROWS, COLUMNS = np.mgrid[0:12, 0:16]
SHAPE = ((COLUMNS - 7) ** 2 + (ROWS - 5) ** 2 < 12).astype(np.uint8)
FULL, NONE = np.full_like(SHAPE, 255), np.zeros_like(SHAPE)
WHITE = 255 * SHAPE


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("channels", "expected", "in_alpha"),
    [
        ([NONE, NONE, NONE, WHITE], WHITE, True),
        ([FULL, FULL, FULL, WHITE], WHITE, True),
        ([FULL, NONE, NONE, WHITE], WHITE, True),
        ([NONE, WHITE], WHITE, True),
        ([NONE, WHITE // 2], WHITE // 2, True),
        ([NONE, NONE], NONE, True),
        ([WHITE, WHITE, WHITE, FULL], WHITE, False),
        ([WHITE, WHITE, WHITE, WHITE], WHITE, False),
        ([3 * SHAPE, WHITE], 3 * SHAPE, False),
        ([3 * SHAPE, FULL], 3 * SHAPE, False),
    ],
)
def test_alpha_is_read_where_it_holds_the_shape(tmp_path, channels, expected, in_alpha):
    values, found = read_shape(save(tmp_path / "m.png", np.dstack(channels)))
    np.testing.assert_array_equal(values, expected)
    assert found == in_alpha


@pytest.mark.parametrize(
    "channels",
    [
        [SHAPE, 255 * (COLUMNS > 8).astype(np.uint8)],  # two shapes
        [SHAPE, NONE],  # a shape that nobody sees
        [SHAPE + COLUMNS.astype(np.uint8), WHITE],
        [SHAPE * COLUMNS.astype(np.uint8), WHITE // 2 + 20],  # soft edges on ids
    ],
)
def test_two_shapes_in_one_mask_are_refused(tmp_path, channels):
    with pytest.raises(SisError, match="alpha"):
        read_mask(save(tmp_path / "m.png", np.dstack(channels)))


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (SHAPE.astype(np.uint16) * 7, SHAPE * 7),
        (SHAPE.astype(np.uint16) * 65535, WHITE),
        (SHAPE.astype(np.float32), SHAPE),
        (SHAPE.astype(np.float32) * 0.5, SHAPE * 128),
        (SHAPE.astype(np.float32) * 200, SHAPE * 200),
    ],
)
def test_deep_and_floating_masks(tmp_path, pixels, expected):
    np.testing.assert_array_equal(read_mask(save(tmp_path / "m.tiff", pixels)), expected)


@pytest.mark.parametrize(
    "pixels",
    [
        SHAPE.astype(np.uint16) * 300,
        SHAPE.astype(np.float32) * 1.5,
        SHAPE.astype(np.float32) * -1,
        SHAPE.astype(np.float32) * np.nan,
        SHAPE.astype(np.float32) * 1e9,
    ],
)
def test_numbers_that_are_neither_ids_nor_grey_are_refused(tmp_path, pixels):
    with np.errstate(invalid="ignore"), pytest.raises(SisError, match=r"m\.tiff has values"):
        read_mask(save(tmp_path / "m.tiff", pixels))


def test_sixteen_bits_per_colour_are_refused_not_cut(tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "m.png"), np.dstack([SHAPE.astype(np.uint16)] * 3))
    with pytest.raises(SisError, match="16 bits per colour"):
        read_mask(tmp_path / "m.png")


def test_a_palette_with_a_transparent_entry_keeps_its_ids(tmp_path):
    draw.palette_png(3 * SHAPE).save(tmp_path / "m.png", transparency=0)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), 3 * SHAPE)


@pytest.mark.parametrize("way", range(1, 9))
def test_a_mask_turns_with_its_own_exif(tmp_path, way):
    exif = Image.Exif()
    exif[0x0112] = way
    save(tmp_path / "p/a.png", np.dstack([WHITE] * 3), exif=exif)
    save(tmp_path / "m/a.png", WHITE, exif=exif)
    _, image, mask = open_pairs(tmp_path / "p", tmp_path / "m")[0]
    np.testing.assert_array_equal(image[..., 0] > 127, mask == 1)


@pytest.mark.parametrize("way", (5, 6, 7, 8))
def test_a_mask_of_the_stored_pixels_turns_with_its_photo(tmp_path, way):
    exif = Image.Exif()
    exif[0x0112] = way
    save(tmp_path / "p/a.png", np.dstack([WHITE] * 3), exif=exif)
    save(tmp_path / "stored/a.png", WHITE)
    _, image, mask = open_pairs(tmp_path / "p", tmp_path / "stored")[0]
    assert image.shape[:2] == SHAPE.shape[::-1]
    np.testing.assert_array_equal(image[..., 0] > 127, mask == 1)


def test_alpha_with_named_classes(tmp_path):
    save(tmp_path / "p/a.png", np.dstack([FULL] * 3))
    save(tmp_path / "m/a.png", np.dstack([NONE, WHITE]))
    one = [{"id": 0, "name": "background"}, {"id": 4, "name": "cat"}]
    (tmp_path / "m/classes.json").write_text(json.dumps(one))
    found = open_pairs(tmp_path / "p", tmp_path / "m")[0][2]
    np.testing.assert_array_equal(found, 4 * SHAPE)
    (tmp_path / "m/classes.json").write_text(json.dumps([*one, {"id": 5, "name": "dog"}]))
    with pytest.raises(SisError, match="alpha"):
        open_pairs(tmp_path / "p", tmp_path / "m")[0]
    (tmp_path / "m/classes.json").unlink()
    save(tmp_path / "p/b.png", np.dstack([FULL] * 3))
    save(tmp_path / "m/b.png", 2 * SHAPE)
    with pytest.raises(SisError, match="alpha"):
        open_pairs(tmp_path / "p", tmp_path / "m")


def test_a_grey_gif_keeps_its_values(tmp_path):
    """Its writer numbers the shades 0, 1, ..."""
    mask = np.zeros((6, 8), np.uint8)
    mask[2:, 3:] = 2
    Image.fromarray(mask).save(tmp_path / "m.gif")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.gif"), mask)


def test_an_empty_file_is_named_as_one(tmp_path):
    (tmp_path / "m.png").write_bytes(b"")
    with pytest.raises(SisError, match="empty"):
        read_mask(tmp_path / "m.png")
