"""Reading photos: every container and pixel format, what is refused and how it is named, and the
resumable stream.
"""

import errno
import io
import itertools
import os
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from sis_jax.data import photo_files
from sis_jax.data.files import TEMPORARY
from sis_jax.data.photos import Photos
from sis_jax.ops.progress import showing_progress
from sis_jax.types import SisError, UsageError


def _pixels(seed: int, h: int = 32, w: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3)).astype(np.uint8)


def _encoded(array: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    image = Image.fromarray(array) if isinstance(array, np.ndarray) else array
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _first(data: bytes, resolution: int, **options) -> np.ndarray:
    return photo_files.decode(data, resolution, **options)


@pytest.fixture
def folder(tmp_path):
    """Six pictures in nested folders, one file of another kind, hidden copies."""
    root = tmp_path / "photos"
    for i, name in enumerate(["b.png", "a.PNG", "deep/er/c.png", "deep/d.bmp", "e.tif", "z.webp"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        options = {"lossless": True} if name.endswith("webp") else {}
        kind = {"png": "PNG", "bmp": "BMP", "tif": "TIFF", "ebp": "WEBP"}[name[-3:].lower()]
        (root / name).write_bytes(_encoded(_pixels(i), kind, **options))
    (root / "notes.txt").write_text("not a photo")
    (root / "._b.png").write_bytes(b"resource fork")
    return root


ORDER = ("a.PNG", "b.png", "deep/d.bmp", "deep/er/c.png", "e.tif", "z.webp")
SEEDS = (1, 0, 3, 2, 4, 5)


def _check_all(photos: Photos) -> None:
    assert photos.images.dtype == np.uint8
    np.testing.assert_array_equal(photos.images, [_pixels(i) for i in SEEDS])
    assert photos.skipped == ()


def test_a_folder_in_the_order_of_names(folder):
    photos = Photos.open(folder, 32)
    assert photos.names == ORDER
    _check_all(photos)
    assert photos.summary() == f"6 photos at 32x32 from {folder}"
    assert photos.resolution == 32


def test_zip_and_tar_give_the_same_as_the_folder(folder, tmp_path):
    files = [p for p in sorted(folder.rglob("*"), reverse=True) if p.is_file()]
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for p in files:
            archive.write(p, p.relative_to(folder).as_posix())
        archive.writestr("__MACOSX/a.png", b"junk")
    for name, mode in (("p.tar", "w"), ("p.tar.gz", "w:gz"), ("p.tgz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            for p in files:
                archive.add(p, p.relative_to(folder).as_posix())
    for name in ("p.zip", "p.tar", "p.tar.gz", "p.tgz"):
        photos = Photos.open(str(tmp_path / name), 32)
        assert photos.names == ORDER, name
        _check_all(photos)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "p.tar",
        "p.tar.gz",
        "p.tgz",
        "p.zip",
        "photos",
    ]


def test_npz_of_arrays_and_of_encoded_files(tmp_path):
    images = np.stack([_pixels(i) for i in range(5)])
    np.savez(tmp_path / "plain.npz", images=images, other=np.zeros(3))
    parts = [_encoded(x) for x in images]
    for key in ("img", "photo"):
        blob = {
            f"{key}_blob": np.frombuffer(b"".join(parts), np.uint8),
            f"{key}_off": np.cumsum([0] + [len(p) for p in parts]),
        }
        np.savez(tmp_path / f"{key}.npz", **blob)
    for name in ("plain", "img", "photo"):
        photos = Photos.open(tmp_path / f"{name}.npz", 32)
        np.testing.assert_array_equal(photos.images, images)
        assert photos.names[-1] == "000004"
    some = Photos.open(tmp_path / "img.npz", 32, rows=slice(1, 3))
    np.testing.assert_array_equal(some.images, images[1:3])
    assert some.names == ("000001", "000002")


def test_npz_that_cannot_be_read(tmp_path):
    np.savez(tmp_path / "objects.npz", images=np.array([{}], object))
    with pytest.raises(SisError, match=r"cannot be read as an \.npz of plain arrays"):
        Photos.open(tmp_path / "objects.npz", 32)
    np.savez(tmp_path / "names.npz", x=np.zeros(2))
    with pytest.raises(UsageError, match=r"holds x; expected"):
        Photos.open(tmp_path / "names.npz", 32)
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(UsageError, match=r"float32\[2, 8, 8, 3\], expected uint8"):
        Photos.open(tmp_path / "floats.npz", 8)
    np.savez(tmp_path / "cut.npz", img_blob=np.zeros(10, np.uint8), img_off=np.array([0, 20]))
    with pytest.raises(SisError, match="does not cut"):
        Photos.open(tmp_path / "cut.npz", 8)


def test_a_list_of_sources_keeps_its_order(folder, tmp_path):
    one = tmp_path / "one.png"
    one.write_bytes(_encoded(_pixels(9)))
    photos = Photos.open([one, folder, one], 32)
    assert photos.names == ("one.png", *ORDER, "one.png")
    np.testing.assert_array_equal(photos.images[0], _pixels(9))
    np.testing.assert_array_equal(photos.images[-1], _pixels(9))
    assert photos.source == "3 sources"


def test_what_is_skipped_is_named_with_the_reason(folder, tmp_path):
    (folder / "broken.jpg").write_bytes(_encoded(_pixels(0), "JPEG")[:200])
    (folder / "c_tiny.png").write_bytes(_encoded(_pixels(0, 9, 40)))
    (folder / "letter.png").write_text("Dear Pillow")
    photos = Photos.open(folder, 32)
    _check_all(Photos(photos.images, photos.names))
    reasons = dict(photos.skipped)
    assert list(reasons) == ["broken.jpg", "c_tiny.png", "letter.png"]
    assert "truncated" in reasons["broken.jpg"].lower()
    assert reasons["c_tiny.png"] == "40x9 is smaller than 16"
    assert reasons["letter.png"] == "not an image that can be read; save it as JPEG or PNG"
    assert "; skipped 3: broken.jpg (" in photos.summary()
    assert "\n" not in photos.summary()
    assert "c_tiny.png" in Photos.open(folder, 32, min_size=0).names


def test_nothing_to_read(tmp_path):
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "y.txt").write_text("")
    with pytest.raises(
        UsageError, match=r"no photos in .*: looked for \*\.jpg .*found \.txt \(2\)"
    ):
        Photos.open(tmp_path, 32)
    (tmp_path / "bad.jpg").write_text("nothing")
    with pytest.raises(
        SisError, match=r"none of the 1 photos in .* could be used \(bad.jpg: not an image"
    ) as caught:
        Photos.open(tmp_path, 32)
    assert not isinstance(caught.value, UsageError)
    with pytest.raises(UsageError, match="there is no file or folder"):
        Photos.open(tmp_path / "nowhere", 32)
    with pytest.raises(UsageError, match="neither a folder"):
        Photos.open(tmp_path / "x.txt", 32)
    with pytest.raises(UsageError, match="leave none"):
        Photos.open(tmp_path, 32, rows=slice(5, 9))


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.npz"])
def test_damaged_archives(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is not an archive" * 40)
    with pytest.raises(SisError, match="cannot be read as a"):
        Photos.open(tmp_path / name, 32)


def test_archive_members_beyond_the_limit_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(photo_files, "MAX_BYTES", 10_000)
    bomb = b"\0" * 1_000_000
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bomb)
        archive.writestr("fine.png", _encoded(_pixels(0)))
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as archive:
        for member, data in (("bomb.png", bomb), ("fine.png", _encoded(_pixels(0)))):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    for name in ("bomb.zip", "bomb.tar.gz"):
        photos = Photos.open(tmp_path / name, 32)
        assert photos.names == ("fine.png",)
        assert photos.skipped[0][0] == "bomb.png"
        assert "more than" in photos.skipped[0][1]


def test_a_picture_with_too_many_pixels_is_skipped_before_it_is_decoded(tmp_path):
    data = bytearray(_encoded(_pixels(0)))
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # the header of a PNG claims 3.6 gigapixels
    with pytest.raises(photo_files.Unusable):
        _first(bytes(data), 32)


# ------------------------------------------------------------------------------------------- pixels


def test_exact_ratio_averages_blocks_after_the_centre_crop():
    wide = _pixels(0, 64, 100)
    expected = wide[:, 18:82].reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert (
        np.abs(_first(_encoded(wide), 16).astype(float) - expected).max() <= 1.01
    )  # rounded once per axis


def test_other_ratios_use_lanczos():
    image = Image.fromarray(_pixels(0, 50, 50))
    np.testing.assert_array_equal(
        _first(_encoded(image), 16), np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS))
    )
    np.testing.assert_array_equal(
        _first(_encoded(image), 70), np.asarray(image.resize((70, 70), Image.Resampling.LANCZOS))
    )


@pytest.mark.parametrize("turned", [False, True])
def test_padding_repeats_the_border_of_the_whole_photo(turned):
    wide, square = _pixels(0, 16, 32), np.empty((32, 32, 3), np.uint8)
    square[:8], square[8:24], square[24:] = wide[:1], wide, wide[-1:]
    given, expected = (np.swapaxes(a, 0, 1) if turned else a for a in (wide, square))
    np.testing.assert_array_equal(_first(_encoded(given), 32, crop="pad"), expected)


def test_without_crop_the_whole_photo_is_squeezed():
    wide = np.repeat(_pixels(0, 16, 16), 2, axis=1)
    np.testing.assert_array_equal(_first(_encoded(wide), 16, crop="none"), _pixels(0, 16, 16))


def test_exif_orientation():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    out = _first(_encoded(pixels, "JPEG", exif=exif, quality=95), 32)
    assert out[:, 20:].mean() > 240
    assert out[:, :12].mean() < 15


def test_transparency_lies_on_white():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = (200, 0, 0, 255)
    rgba[4:, :4] = (0, 0, 0, 128)
    out = _first(_encoded(Image.fromarray(rgba)), 8)
    np.testing.assert_array_equal(out[0, 0], [200, 0, 0])
    np.testing.assert_allclose(out[7, 0].astype(int), [127, 127, 127], atol=1)
    np.testing.assert_array_equal(out[7, 7], [255, 255, 255])
    palette = Image.fromarray(_pixels(0, 8, 8)).quantize(8)
    palette.putpixel((0, 0), 3)
    assert (_first(_encoded(palette, transparency=3), 8)[0, 0] == 255).all()


def test_grey_two_level_sixteen_bit_and_cmyk():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    np.testing.assert_array_equal(_first(_encoded(grey), 8), np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(
        _first(_encoded(Image.fromarray(grey > 100)), 8)[..., 0], (grey > 100) * np.uint8(255)
    )
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(
            _first(_encoded(grey.astype(np.uint16) * 257, kind), 8)[..., 1], grey
        )
    flat = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(
        _first(_encoded(flat, "TIFF"), 8).astype(int).mean((0, 1)), [255, 0, 0], atol=2
    )
    with pytest.raises(photo_files.Unusable, match="floating-point"):
        _first(_encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), 8)


def test_a_large_jpeg_reduced_while_decoding_looks_the_same():
    y, x = np.mgrid[0:640, 0:800]
    photo = np.stack(
        [128 + 100 * np.sin(x / 60), 128 + 100 * np.cos(y / 45), (x + y) / 8], -1
    ).astype(np.uint8)
    full = np.asarray(
        Image.fromarray(photo).crop((80, 0, 720, 640)).resize((64, 64), Image.Resampling.BOX)
    ).astype(float)
    assert np.abs(_first(_encoded(photo, "JPEG", quality=95), 64) - full).max() < 6


def test_no_warning_escapes_and_filters_are_restored(folder):
    before = list(warnings.filters)
    (folder / "odd.jpg").write_bytes(_encoded(_pixels(0), "JPEG", exif=b"Exif\0\0garbage"))
    assert "odd.jpg" in Photos.open(folder, 32).names
    assert warnings.filters == before


# -------------------------------------------------------------------------------- the other options


def test_settings_are_checked(folder):
    for options in ({"resolution": 0}, {"min_size": -1}):
        with pytest.raises(UsageError, match="expected at least"):
            Photos.open(folder, **{"resolution": 32, **options})


def test_holding_out_reads_nothing(folder, tmp_path):
    """Of a memory map either: rows are read when they are asked for."""
    photos = Photos.open(folder, 8, min_size=1, cache=tmp_path)
    train, held = photos.holdout(2, seed=1)
    assert isinstance(photos.images, np.memmap)
    assert not isinstance(train.images, np.ndarray) and len(train) + len(held) == len(photos)
    at = [photos.names.index(name) for name in (*train.names, *held.names)]
    assert np.array_equal(np.concatenate([train.images, held.images]), photos.images[at])
    assert np.array_equal(train.images[1:3], np.asarray(train.images)[1:3])
    again, _ = train.holdout(1)
    assert again.images.shape == (len(train) - 1, 8, 8, 3)


def test_threads_do_not_change_anything(folder, monkeypatch):
    many = Photos.open(folder, 24).images
    monkeypatch.setattr("sis_jax.data.threads.cores", lambda: 1)
    np.testing.assert_array_equal(many, Photos.open(folder, 24).images)


def test_progress_bar_goes_to_stderr(folder, capsys):
    with showing_progress():
        Photos.open(folder, 32)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "6/6" in captured.err


def test_cache(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    (folder / "broken.jpg").write_bytes(b"x")
    first = Photos.open(folder, 32, cache=cache)
    assert isinstance(first.images, np.memmap)
    assert sorted(p.suffix for p in cache.iterdir()) == [".json", ".npy"]
    with monkeypatch.context() as patch:
        patch.setattr("sis_jax.data.photos.decode", None)  # a hit decodes nothing
        second = Photos.open(folder, 32, cache=cache)
    np.testing.assert_array_equal(first.images, second.images)
    assert (first.names, first.skipped) == (second.names, second.skipped)
    assert len(second.skipped) == 1
    (folder / "b.png").write_bytes(_encoded(_pixels(77)))
    np.testing.assert_array_equal(Photos.open(folder, 32, cache=cache).images[1], _pixels(77))
    assert Photos.open(folder, 16, cache=cache).resolution == 16
    next(second.batches(4))[:] = 0  # a batch is a copy: writing to it is allowed and harmless
    _ = next(Photos(second.images, second.names, mirror=True).batches(8))


def test_a_half_written_cache_is_not_taken_for_whole(folder, tmp_path):
    cache = tmp_path / "cache"
    expected = Photos.open(folder, 32, cache=cache).images.copy()
    next(cache.glob("*.npy")).write_bytes(b"\x93NUMPY")
    np.testing.assert_array_equal(Photos.open(folder, 32, cache=cache).images, expected)
    next(cache.glob("*.json")).unlink()
    np.testing.assert_array_equal(Photos.open(folder, 32, cache=cache).images, expected)


def test_a_disk_without_room_for_the_photos(folder, tmp_path, monkeypatch):
    """Asked before the file is mapped: writing to a map without room ends the process."""

    def full(*_):
        assert [path.suffix for path in tmp_path.joinpath("c").iterdir()] == [TEMPORARY]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(SisError, match="No space left on device; choose another cache folder"):
        Photos.open(folder, 32, cache=tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


def test_a_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SisError, match="choose another cache folder"):
        Photos.open(folder, 32, cache=tmp_path / "file")


# --------------------------------------------------------------------------------------- the stream


def _numbered(n: int, mirror: bool = False) -> Photos:
    """Photo i is filled with i on the left half and 100 + i on the right, so that both the photo
    and its flip can be read off.
    """
    images = np.zeros((n, 4, 4, 3), np.uint8)
    images[:, :, :2] = np.arange(n)[:, None, None, None]
    images[:, :, 2:] = 100 + np.arange(n)[:, None, None, None]
    return Photos(images, tuple(map(str, range(n))), mirror=mirror)


def _ids(batches) -> np.ndarray:
    return np.concatenate([b[:, 0, 0, 0] for b in batches]) % 100


def test_stream_visits_every_photo_once_per_epoch_whatever_the_batch():
    ids = _ids(itertools.islice(_numbered(10).batches(3, seed=1), 20))
    epochs = ids.reshape(6, 10)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(np.arange(10), (6, 1)))
    assert len({tuple(e) for e in epochs}) == 6
    np.testing.assert_array_equal(
        ids[:20], _ids(itertools.islice(_numbered(10).batches(20, seed=1), 1))
    )


@pytest.mark.parametrize("batch", [1, 3, 7, 25])
def test_stream_resumes_exactly(batch):
    photos = _numbered(10, mirror=True)
    straight = list(itertools.islice(photos.batches(batch, seed=5), 30))
    resumed = list(itertools.islice(photos.batches(batch, seed=5, start_step=17), 13))
    np.testing.assert_array_equal(straight[17:], resumed)
    assert not np.array_equal(straight, list(itertools.islice(photos.batches(batch, seed=6), 30)))


def test_mirror_flips_half_and_flips_whole_photos():
    images = np.concatenate(list(itertools.islice(_numbered(10, mirror=True).batches(50), 40)))
    left, right = images[:, :, :2].astype(int), images[:, :, 2:].astype(int)
    flipped = (left - right == 100).all((1, 2, 3))
    assert ((np.abs(left - right) == 100).all((1, 2, 3))).all()
    assert flipped.mean() == pytest.approx(0.5, abs=0.04)
    assert not (_ids(_numbered(10).batches(50).__next__()[None]) > 10).any()


def test_stream_never_touches_the_photos():
    photos = _numbered(4, mirror=True)
    before = photos.images.copy()
    for batch in itertools.islice(photos.batches(4), 5):
        batch[:] = 7
    np.testing.assert_array_equal(photos.images, before)


def test_stream_checks_its_numbers_at_once():
    with pytest.raises(UsageError, match="batch >= 1"):
        _numbered(4).batches(0)


def test_holdout_splits_by_seed():
    photos = _numbered(20)
    train, held = photos.holdout(5, seed=3)
    assert (len(train), len(held)) == (15, 5)
    assert set(train.names) | set(held.names) == set(photos.names)
    assert list(held.names) == sorted(held.names, key=int)
    np.testing.assert_array_equal(held.images[:, 0, 0, 0], [int(n) for n in held.names])
    assert photos.holdout(5, seed=3)[1].names == held.names
    assert photos.holdout(5, seed=4)[1].names != held.names
    with pytest.raises(UsageError, match="cannot hold out 20 of 20"):
        photos.holdout(20)
