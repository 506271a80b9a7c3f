"""Benchmarks on small trees in their published layouts, paired folders, and the same sets through
TFDS without TensorFlow.
"""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sis_jax.data import draw
from sis_jax.data.benchmark_layouts import CELEBA_PARTS
from sis_jax.data.benchmarks import BENCHMARKS, PAPER, open_benchmark
from sis_jax.data.exports import tfds as tfds_export
from sis_jax.data.ground_truth import open_pairs, read_photo
from sis_jax.data.mask_files import read_mask
from sis_jax.types import SisError, UsageError


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def photo(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def disc(size, radius, value=255):
    y, x = np.mgrid[: size[0], : size[1]]
    return np.where(np.hypot(y - size[0] / 2, x - size[1] / 2) < radius, value, 0).astype(np.uint8)


# -------------------------------------------------------------------------------------------- faces


@pytest.fixture
def faces(tmp_path):
    """Images 0, 1999, 2000 and 28000 of CelebAMask-HQ at 64 and 32 pixels, with original indices on
    both sides of the split's limits.
    """
    root = tmp_path / "data" / "CelebAMask-HQ"
    original = {0: 5, 1999: 162771, 2000: 182638, 28000: 182637}
    for number in original:
        save(root / "CelebA-HQ-img" / f"{number}.jpg", photo((64, 64), number))
        folder = root / "CelebAMask-HQ-mask-anno" / str(number // 2000)
        skin, hair, eye = (
            disc((32, 32), 12),
            np.zeros((32, 32), np.uint8),
            np.zeros((32, 32), np.uint8),
        )
        hair[:10], eye[15:17, 12:14] = 255, 255
        for part, mask in (("skin", skin), ("hair", hair), ("l_eye", eye)):
            save(
                folder / f"{number:05d}_{part}.png", np.repeat(mask[..., None], 3, 2)
            )  # the files have three equal channels
    lines = ["idx orig_idx orig_file", *(f"{i} {o} {o:06d}.jpg" for i, o in original.items())]
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines))
    return tmp_path / "data"


def test_faces_paint_parts_in_order_at_the_size_of_the_masks(faces):
    ((name, image, mask),) = open_benchmark("celebamask-hq", faces, "train")
    assert (name, image.shape, mask.shape) == ("0", (32, 32, 3), (32, 32))
    expected = np.where(disc((32, 32), 12) > 0, 1, 0)
    expected[15:17, 12:14] = CELEBA_PARTS.index("l_eye")
    expected[:10] = CELEBA_PARTS.index("hair")  # painted last, so it covers the skin
    np.testing.assert_array_equal(mask, expected)


def test_face_splits_go_by_the_original_index(faces):
    splits = {
        s: open_benchmark("celebamask-hq", faces, s).names
        for s in ("train", "val", "test", "sis", "all")
    }
    assert splits == {
        "train": ("0",),
        "val": ("1999", "28000"),
        "test": ("2000",),
        "sis": ("28000",),
        "all": ("0", "1999", "2000", "28000"),
    }
    assert open_benchmark("celebamask_hq", faces).name == "celebamask-hq/test"


def test_faces_with_8_classes_and_foreground(faces):
    full = open_benchmark("celebamask-hq", faces, "all")[0][2]
    eight, binary = (open_benchmark(f"celebamask-hq-{k}", faces, "all") for k in ("8", "fg"))
    names = [c["name"] for c in eight.classes]
    assert names == ["background", "skin", "nose", "eye", "brow", "ear", "mouth", "hair"]
    for part, group in (
        ("skin", "skin"),
        ("hair", "hair"),
        ("l_eye", "eye"),
        ("background", "background"),
    ):
        where = full == CELEBA_PARTS.index(part)
        assert set(eight[0][2][where]) == {names.index(group)}
    np.testing.assert_array_equal(binary[0][2], full > 0)


def test_a_face_without_masks_is_named(faces):
    for file in (faces / "CelebAMask-HQ" / "CelebAMask-HQ-mask-anno" / "1").glob("*"):
        file.unlink()
    with pytest.raises(SisError, match=r"02000_\*\.png of 2000\.jpg"):
        list(open_benchmark("celebamask-hq", faces, "test"))


def test_faces_without_the_split_file_say_what_works(faces):
    (faces / "CelebAMask-HQ" / "CelebA-HQ-to-CelebA-mapping.txt").unlink()
    with pytest.raises(UsageError, match=r'CelebA-HQ-to-CelebA-mapping\.txt.*"sis" and "all"'):
        open_benchmark("celebamask-hq", faces)
    assert len(open_benchmark("celebamask-hq", faces, "sis")) == 1


# ----------------------------------------------------------------------------- birds, flowers, eyes


@pytest.fixture
def birds(tmp_path):
    root = tmp_path / "CUB_200_2011"
    names = [f"00{c}.Bird/Bird_{i}" for c in (1, 2) for i in (1, 2)]
    for k, name in enumerate(names):
        save(root / "images" / f"{name}.jpg", photo((20, 30), k))
        grey = disc((20, 30), 6, 128)
        grey[:2] = 127  # fewer than half of the annotators
        save(
            tmp_path / "segmentations" / f"{name}.png",
            np.stack([grey, np.full_like(grey, 255)], -1),
        )  # two channels: grey and opacity
    (root / "images.txt").write_text("".join(f"{i} {n}.jpg\n" for i, n in enumerate(names, 1)))
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n4 0\n")
    (root / "train_val_test_split.txt").write_text("1 0\n2 1\n3 2\n4 2\n")
    return tmp_path


def test_birds(birds):
    found = open_benchmark("cub", birds)
    assert found.names == ("001.Bird/Bird_2", "002.Bird/Bird_2")
    assert open_benchmark("cub", birds, "redo-test").names == ("002.Bird/Bird_1", "002.Bird/Bird_2")
    _, image, mask = found[0]
    assert image.shape == (20, 30, 3)
    np.testing.assert_array_equal(mask, disc((20, 30), 6, 1) * (np.arange(20) >= 2)[:, None])
    assert open_benchmark("cub", birds, grey_from=1)[0][2][:2].all()
    assert not open_benchmark("cub", birds, grey_from=255)[0][2].any()


def test_flowers_follow_the_blue_rule(tmp_path):
    from scipy.io import savemat

    painted = np.full((12, 12, 3), [200, 60, 90], np.uint8)
    painted[:5] = [0, 0, 254]
    for n in (1, 2, 3):
        save(tmp_path / "jpg" / f"image_{n:05d}.jpg", photo((12, 12), n))
        save(tmp_path / "segmim" / f"segmim_{n:05d}.jpg", painted, quality=100, subsampling=0)
    savemat(tmp_path / "setid.mat", {"trnid": [[2]], "valid": [[3]], "tstid": [[1]]})
    found = open_benchmark("flowers", tmp_path)
    assert found.names == ("image_00002",)  # ReDO tests on the official train list
    assert open_benchmark("flowers", tmp_path, "test").names == ("image_00001",)
    mask = found[0][2]
    red, green, blue = np.moveaxis(
        np.asarray(Image.open(tmp_path / "segmim" / "segmim_00002.jpg")), 2, 0
    )
    np.testing.assert_array_equal(mask == 0, (red == 0) | (green == 0) | (blue == 254))
    assert mask[6:].all()
    assert mask[:3].mean() < 0.5


def test_eyes(tmp_path):
    root = tmp_path / "Semantic_Segmentation_Dataset"
    labels = np.zeros((64, 40), np.int64)
    labels[20:40, 10:30], labels[25:35, 15:25], labels[28:32, 18:22] = 1, 2, 3
    save(root / "validation" / "images" / "000000.png", photo((64, 40))[..., 0])
    (root / "validation" / "labels").mkdir()
    np.save(root / "validation" / "labels" / "000000.npy", labels)
    save(root / "test" / "images" / "000001.png", photo((64, 40))[..., 0])
    ((name, image, mask),) = open_benchmark("openeds", tmp_path, "validation")
    assert (name, image.shape) == ("000000", (64, 40, 3))
    np.testing.assert_array_equal(mask, labels)
    with pytest.raises(UsageError, match="test has images but no labels"):
        open_benchmark("openeds", tmp_path)


@pytest.mark.parametrize(
    ("name", "photos", "masks"),
    [
        ("duts", "DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask"),
        ("ecssd", "ECSSD/images", "ECSSD/ground_truth_mask"),
        ("dut-omron", "x/DUT-OMRON-image", "x/pixelwiseGT-new-PNG"),
    ],
)
def test_saliency_sets_pair_by_stem_and_threshold_by_protocol(tmp_path, name, photos, masks):
    soft = np.tile(np.array([0, 1, 127, 128, 254, 255], np.uint8), (6, 1))
    for stem in ("b", "a"):
        save(tmp_path / photos / f"{stem}.jpg", photo((6, 6)))
        save(tmp_path / masks / f"{stem}.png", soft)
    found = open_benchmark(name, tmp_path)
    assert found.names == ("a", "b")
    for grey_from, expected in (
        (1, [0, 1, 1, 1, 1, 1]),
        (128, [0, 0, 0, 1, 1, 1]),
        (255, [0, 0, 0, 0, 0, 1]),
    ):
        np.testing.assert_array_equal(
            open_benchmark(name, tmp_path, grey_from=grey_from)[0][2][0], expected
        )
    (tmp_path / masks / "a.png").unlink()
    with pytest.raises(UsageError, match=r"1 of 2 photos .* have no mask .* a\.jpg"):
        open_benchmark(name, tmp_path)


# ------------------------------------------------------------------------------------ pets and TFDS


TRIMAP = np.where(disc((16, 20), 5) > 0, 1, np.where(disc((16, 20), 6) > 0, 3, 2)).astype(np.uint8)


def test_pets_from_their_own_folders(tmp_path):
    save(tmp_path / "images" / "Abyssinian_1.jpg", photo((16, 20)))
    save(tmp_path / "annotations" / "trimaps" / "Abyssinian_1.png", TRIMAP)
    (tmp_path / "annotations" / "test.txt").write_text("#comment\nAbyssinian_1 1 1 1\n")
    ((name, _, mask),) = open_benchmark("oxford_iiit_pet", tmp_path)
    assert name == "Abyssinian_1"
    np.testing.assert_array_equal(mask, np.array([0, 1, 0, 255])[TRIMAP])


class _Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A stand-in with the features of TFDS's own builder, as its prepared folder lies on disk."""

    VERSION = tfds.core.Version("4.0.0")
    MASK = TRIMAP
    code_path = None

    def _info(self):
        mask = tfds.features.Image(shape=(None, None, 1))
        features = tfds.features.FeaturesDict(
            {"image": tfds.features.Image(), "segmentation_mask": mask}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        buffers = []
        for array in (photo((16, 20)), self.MASK):
            buffers.append(io.BytesIO())
            Image.fromarray(array).save(buffers[-1], "PNG")
            buffers[-1].seek(0)
        yield "a", {"image": buffers[0], "segmentation_mask": buffers[1]}


class OxfordIiitPet(_Prepared, skip_registration=True):
    name = "oxford_iiit_pet"


class CaltechBirds2011(_Prepared, skip_registration=True):
    name = "caltech_birds2011"
    MASK = disc((16, 20), 5, 200)


def test_prepared_tfds_folders(tmp_path):
    for builder in (OxfordIiitPet, CaltechBirds2011):
        tfds_export.prepare(builder(data_dir=str(tmp_path), file_format="array_record"))
    ((_, image, mask),) = open_benchmark("oxford-iiit-pet", tmp_path)
    np.testing.assert_array_equal(image, photo((16, 20)))
    np.testing.assert_array_equal(mask, np.array([0, 1, 0, 255])[TRIMAP])
    np.testing.assert_array_equal(
        open_benchmark("caltech-birds2011", tmp_path)[0][2], disc((16, 20), 5, 1)
    )


# ---------------------------------------------------------------------------------- mistakes, pairs


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'ecssd'"):
        open_benchmark("ecsd", tmp_path)
    with pytest.raises(UsageError, match="unknown split of duts 'tset'"):
        open_benchmark("duts", tmp_path, "tset")
    with pytest.raises(UsageError, match="there is no folder"):
        open_benchmark("duts", tmp_path / "none")
    with pytest.raises(
        UsageError, match=r"does not hold DUTS: there is no DUTS-TE-Image; expected DUTS-TE/"
    ):
        open_benchmark("duts", tmp_path)
    assert {b for b, _ in PAPER} <= set(BENCHMARKS)


def test_paired_folders_and_what_has_no_partner(tmp_path):
    ids = disc((10, 14), 3, 2)
    ids[0] = 255
    for stem in ("a", "b"):
        save(tmp_path / "photos" / "sub" / f"{stem}.jpg", photo((20, 28)))
        (tmp_path / "masks").mkdir(exist_ok=True)
        draw.palette_png(ids).save(tmp_path / "masks" / f"{stem}.png")
    save(tmp_path / "masks" / "c.png", ids)
    found = open_pairs(tmp_path / "photos", tmp_path / "masks")
    assert found.names == ("sub/a", "sub/b")
    assert found.skipped == (("c.png", "no photo of this name"),)
    assert [c["id"] for c in found.classes] == [0, 2]
    _, image, mask = found[0]
    assert image.shape == (10, 14, 3)  # the photo follows the mask
    np.testing.assert_array_equal(mask, ids)
    (tmp_path / "masks" / "classes.json").write_text(
        '[{"id": 0, "name": "background"}, {"id": 2, "name": "cat"}]'
    )
    assert open_pairs(tmp_path / "photos", tmp_path / "masks").classes[1] == {
        "id": 2,
        "name": "cat",
    }


def test_grey_masks_are_told_from_ids(tmp_path):
    save(tmp_path / "p" / "a.png", photo((8, 8)))
    for name, mask, expected in (
        ("extremes", disc((8, 8), 3), disc((8, 8), 3, 1)),
        ("soft", disc((8, 8), 3, 140), disc((8, 8), 3, 1)),
        ("ones", disc((8, 8), 3, 1), disc((8, 8), 3, 1)),
        ("ids", disc((8, 8), 3, 7), disc((8, 8), 3, 7)),
    ):
        save(tmp_path / name / "a.png", mask)
        np.testing.assert_array_equal(
            open_pairs(tmp_path / "p", tmp_path / name)[0][2], expected, err_msg=name
        )
    assert open_pairs(tmp_path / "p", tmp_path / "soft", values="ids")[0][2].max() == 140
    assert not open_pairs(tmp_path / "p", tmp_path / "soft", grey_from=255)[0][2].any()


def test_one_npz_holds_photos_and_masks(tmp_path):
    photos, masks = [photo((6, 8), i) for i in range(3)], [disc((6, 8), 2, i + 1) for i in range(3)]
    arrays = {
        "labels": np.array(["background", "one", "two", "three"]),
        "name": np.array(["x", "y", "z"]),
    }
    for key, pictures in (("img", photos), ("mask", masks)):
        files = []
        for p in pictures:
            buffer = io.BytesIO()
            Image.fromarray(p).save(buffer, "PNG")
            files.append(buffer.getvalue())
        arrays[f"{key}_blob"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{key}_off"] = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "set.npz", **arrays)
    for given in (None, tmp_path / "set.npz"):
        found = open_pairs(tmp_path / "set.npz", given)
        assert found.names == ("x", "y", "z")
        assert [c["name"] for c in found.classes] == ["background", "one", "two", "three"]
        for (_, image, mask), p, m in zip(found, photos, masks, strict=True):
            np.testing.assert_array_equal(image, p)
            np.testing.assert_array_equal(mask, m)
    np.savez(tmp_path / "plain.npz", images=np.stack(photos), masks=np.stack(masks))
    np.testing.assert_array_equal(open_pairs(tmp_path / "plain.npz")[2][2], masks[2])
    np.savez(tmp_path / "half.npz", images=np.stack(photos))
    with pytest.raises(UsageError, match="holds images; expected `mask_blob`"):
        open_pairs(tmp_path / "half.npz")


def test_pairs_that_cannot_be(tmp_path):
    save(tmp_path / "p" / "a.jpg", photo((8, 8)))
    save(tmp_path / "m" / "b.png", disc((8, 8), 3))
    with pytest.raises(
        UsageError, match=r"no photo in .* has a mask of its name .* a\.jpg and b\.png"
    ):
        open_pairs(tmp_path / "p", tmp_path / "m")
    with pytest.raises(UsageError, match="give --masks"):
        open_pairs(tmp_path / "p")
    save(tmp_path / "m" / "a.png", disc((8, 16), 3))
    with pytest.raises(SisError, match="photo a is 8x8, its mask 16x8"):
        open_pairs(tmp_path / "p", tmp_path / "m")[0]
    save(tmp_path / "m" / "a.png", photo((8, 8)))
    with pytest.raises(SisError, match=r"a\.png is a colour image"):
        open_pairs(tmp_path / "p", tmp_path / "m")
    (tmp_path / "m" / "a.png").write_bytes(b"no picture")
    with pytest.raises(SisError, match=r"the mask a\.png cannot be read"):
        open_pairs(tmp_path / "p", tmp_path / "m")
    with pytest.raises(SisError, match=r"the photo .*a\.png cannot be read"):
        read_photo(tmp_path / "m" / "a.png")


def test_one_bit_and_sixteen_bit_masks(tmp_path):
    Image.fromarray(disc((8, 8), 3) > 0).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "bit.png"), disc((8, 8), 3))
    Image.fromarray(disc((8, 8), 3).astype(np.uint16) * 100).save(tmp_path / "deep.png")
    with pytest.raises(SisError, match="values up to 25500"):
        read_mask(tmp_path / "deep.png")
