"""Names from files: none leads out of its folder, and what cannot be read is named while the rest
is done.
"""

import io
import json
import os
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sis_jax.data import names, photo_files
from sis_jax.data.decode import Unusable, read_file
from sis_jax.data.files import replacing, write_atomic
from sis_jax.data.folder import METADATA, Split
from sis_jax.data.masks import Prediction, write_mask
from sis_jax.data.npz import load_npz
from sis_jax.data.photos import Photos
from sis_jax.runs.page import write_page
from sis_jax.runs.run import RunFolder
from sis_jax.stages import predict as stage
from sis_jax.types import SisError, UsageError


def jpeg(shade=90):
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (shade, 120, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def save(path, shade=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(shade))
    return path


def zipped(path, *members):
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(zipfile.ZipInfo(member), jpeg())
    return path


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("../x.jpg", "out of the folder"),
        ("a/../../x.jpg", "out of the folder"),
        ("a\\..\\x.jpg", "out of the folder"),
        ("..", "out of the folder"),
        ("/tmp/x.jpg", "absolute"),
        ("\\\\server\\x.jpg", "absolute"),
        ("C:x.jpg", "drive"),
        ("c:/x.jpg", "drive"),
        ("a\0.jpg", "NUL"),
        ("con.jpg", "reserved"),
        ("a/AUX .png", "reserved"),
        ("Lpt1", "reserved"),
        ("é" * 128 + ".jpg", "longer"),
        ("a/" * 2100 + "x.jpg", "longer"),
        ("", "no name"),
        ("./.", "no name"),
    ],
)
def test_names_that_lead_elsewhere_say_why(tmp_path, name, word):
    assert word in names.problem(name)
    with pytest.raises(SisError, match=r"list\.json"):
        names.below(tmp_path, name, tmp_path / "list.json")


@pytest.mark.parametrize(
    "name",
    ["a.jpg", "a/b.jpg", "..a.jpg", "a..b/c.jpg", "console.jpg", "12:30.jpg", "caf\udce9.jpg"],
)
def test_usual_names_stay(tmp_path, name):
    assert names.problem(name) == ""
    assert names.below(tmp_path, name, "list.json") == tmp_path / name


def test_twins_and_flat_names():
    assert names.twins(["a.png", "b.png"]) is None
    for pair in (
        ("A.png", "a.PNG"),
        ("caf\u00e9", "cafe\u0301"),
        ("x. ", "x"),
        ("stra\u00dfe", "STRASSE"),
    ):
        assert names.twins(["other", *pair]) == pair
    assert names.flat("a/b\\c.jpg") == "a_b_c.jpg"
    assert names.flat("caf\udce9.jpg") == "caf%E9.jpg"
    assert names.flat(" a\nb\u2028c ") == "_a_b_c_"
    assert names.flat("con.jpg") == "_con.jpg"
    assert names.flat(".thumbnails/a.jpg") == "_thumbnails_a.jpg"
    long = names.flat("x/" * 300 + "end.jpg")
    assert len(long.encode()) <= 200
    assert long != names.flat("x/" * 300 + "END.jpg")


def test_archive_members_that_lead_out_are_named(tmp_path):
    leading = ("../above.jpg", "/root.jpg", "sub/../../wind.jpg", "C:\\drive.jpg", "nul.jpg")
    photos = Photos.open(
        zipped(tmp_path / "p.zip", "plain.jpg", "./dot//b.jpg", "win\\c.jpg", *leading), 8
    )
    assert photos.names == ("dot/b.jpg", "plain.jpg", "win/c.jpg")
    assert {name for name, _ in photos.skipped} == set(leading)


def test_a_member_without_a_name_is_passed_over(tmp_path):
    assert Photos.open(zipped(tmp_path / "p.zip", "", "a.jpg"), 8).names == ("a.jpg",)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_whose_name_occurs_twice_is_named(tmp_path):
    photos = Photos.open(zipped(tmp_path / "p.zip", "a.jpg", "a.jpg"), 8)
    assert photos.names == ("a.jpg",)
    assert photos.skipped == (("a.jpg", "another photo in the archive has this name"),)


def test_links_in_a_tar_are_read_inside_and_named_outside(tmp_path):
    links = [
        ("early.jpg", tarfile.SYMTYPE, "real/a.jpg"),
        ("hard.jpg", tarfile.LNKTYPE, "./real/a.jpg"),
        ("sub/soft.jpg", tarfile.SYMTYPE, "../real/a.jpg"),
        ("chain.jpg", tarfile.SYMTYPE, "hard.jpg"),
        ("out.jpg", tarfile.SYMTYPE, "../../etc/x.jpg"),
        ("abs.jpg", tarfile.LNKTYPE, "/etc/x.jpg"),
        ("gone.jpg", tarfile.SYMTYPE, "nowhere.jpg"),
        ("loop.jpg", tarfile.SYMTYPE, "loop.jpg"),
        ("pipe.jpg", tarfile.FIFOTYPE, ""),
        ("folder", tarfile.SYMTYPE, "/somewhere"),
        ("same", tarfile.SYMTYPE, "real"),
    ]
    path = tmp_path / "p.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, kind, target in links[:1]:
            add_link(archive, name, kind, target)
        info = tarfile.TarInfo("./real/a.jpg")
        info.size = len(jpeg())
        archive.addfile(info, io.BytesIO(jpeg()))
        for name, kind, target in links[1:]:
            add_link(archive, name, kind, target)
    photos = Photos.open(path, 8)
    assert photos.names == ("chain.jpg", "early.jpg", "hard.jpg", "real/a.jpg", "sub/soft.jpg")
    assert (photos.images == photos.images[:1]).all()
    left = {name for name, _ in photos.skipped}
    assert left == {"out.jpg", "abs.jpg", "gone.jpg", "loop.jpg", "pipe.jpg", "folder"}


@pytest.mark.parametrize("bomb", ["facts", "members", "sparse"])
def test_a_tar_that_unpacks_without_bounds_is_refused(tmp_path, monkeypatch, bomb):
    monkeypatch.setattr(photo_files, "_FREE_MEMBERS", 2)
    path, info = tmp_path / "p.tar.gz", tarfile.TarInfo("a.jpg")
    with tarfile.open(path, "w:gz") as archive:
        if bomb == "facts":
            info.pax_headers = {"comment": "x" * 2**21}
        if bomb == "sparse":
            info.type = tarfile.GNUTYPE_SPARSE
        for _ in range(3 if bomb != "members" else 10_000):
            archive.addfile(info)
    with pytest.raises(SisError, match=r"described in|more than \d+ mem|in pieces"):
        Photos.open(path, 8)


def add_link(archive, name, kind, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    archive.addfile(info)


def test_linked_folders_are_read_once_and_circles_end(tmp_path):
    root = tmp_path / "photos"
    save(root / "own/a.jpg")
    save(tmp_path / "elsewhere/deep/b.jpg")
    (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "again").symlink_to(root / "own", target_is_directory=True)
    (root / "own/circle").symlink_to(root, target_is_directory=True)
    (root / "own/up").symlink_to(tmp_path, target_is_directory=True)
    (root / "own/broken").symlink_to(tmp_path / "gone")
    listing = photo_files.list_source(root)
    assert listing.names == ("linked/deep/b.jpg", "own/a.jpg")
    assert dict(listing.refused) == {
        "own/up": "a link to a folder above",
        "own/broken": "a link to nothing",
    }


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    save(tmp_path / "open/a.jpg")
    save(tmp_path / "shut/b.jpg")
    scan = os.scandir

    def closed(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    photos = Photos.open(tmp_path, 8)
    assert photos.names == ("open/a.jpg",)
    assert photos.skipped == (("shut", "cannot be opened: Permission denied"),)
    assert "shut (cannot be opened" in photos.summary()


def test_kinds_that_are_not_read_are_named_beside_their_jpeg(tmp_path):
    save(tmp_path / "IMG_1.JPG")
    for name in ("IMG_1.HEIC", "IMG_2.heif", "raw.dng", "new.jxl"):
        (tmp_path / name).write_bytes(b"....ftypheic")
    (tmp_path / "notes.txt").write_text("")
    photos = Photos.open(tmp_path, 8)
    assert photos.names == ("IMG_1.JPG",)
    assert len(photos.skipped) == 4
    assert photo_files.list_source(tmp_path).others == Counter({".txt": 1})
    with pytest.raises(UsageError, match=r"new\.heic \(not a kind"):
        (tmp_path / "heics").mkdir()
        (tmp_path / "heics/new.heic").write_bytes(b"")
        Photos.open(tmp_path / "heics", 8)


def test_a_pipe_is_no_photo(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(Unusable, match="not a plain file"):
        read_file(tmp_path / "pipe.jpg")


def test_results_are_checked_before_any_work(tmp_path):
    """Names that one file would be written for, and names that no file system takes."""
    long = "x" * 251
    for name in ("a.jpg", f"{long}.jpg"):
        save(tmp_path / "p" / name)
    sources, skipped = stage._sources(str(tmp_path / "p")), []
    assert len(stage._names(sources, tmp_path / "out", "png", False, skipped)) == 2
    assert stage._names(sources, tmp_path / "out", "png", True, skipped) == ["a.jpg"]
    assert skipped[0][0] == f"{long}.jpg"
    assert stage._names(sources, tmp_path.joinpath(*["y" * 200] * 21), "png", False, []) == []
    for pair, kind in (
        (("A.jpg", "a.png"), "png"),
        (("d/e.jpg", "d_e.jpg"), "coco"),
        (("caf\u00e9.jpg", "cafe\u0301.jpg"), "voc"),
    ):
        folder = tmp_path / kind
        for name in pair:
            save(folder / name)
        with pytest.raises(UsageError, match="rename one of them"):
            stage._names(stage._sources(str(folder)), tmp_path / "out", kind, False, [])


def test_a_name_at_the_limit_is_written(tmp_path):
    path = tmp_path / ("n" * 251 + ".png")
    write_atomic(path, b"all")
    assert path.read_bytes() == b"all"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_masks_stay_in_their_folder(tmp_path):
    mask = np.zeros((2, 2), np.uint8)
    for name in ("../x.jpg", "/x.jpg"):
        with pytest.raises(SisError, match="refused"):
            write_mask(tmp_path / "out", Prediction(name, None, mask))
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "out/link").symlink_to(tmp_path / "mine", target_is_directory=True)
    with pytest.raises(SisError, match="leads out of"):
        write_mask(tmp_path / "out", Prediction("link/x.jpg", None, mask))
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/secret.png", None, 3])
def test_metadata_reads_below_its_split_only(tmp_path, name):
    row = {"file_name": name, "mask_file_name": "masks/0.png"}
    with pytest.raises(SisError, match=METADATA):
        Split(tmp_path, (row,))[0]


def test_an_array_that_unpacks_without_bounds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sis_jax.data.npz._FREE", 1000)
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((1000, 32, 32, 3), np.uint8))
    with pytest.raises(SisError, match="unpacks to"):
        load_npz(tmp_path / "bomb.npz")


@pytest.mark.parametrize("moment", ["filling", "between", "after"])
def test_a_replacement_that_was_killed_is_brought_to_an_end(tmp_path, moment):
    """Nobody's process 2 ** 31 - 1 was at work on it."""
    folder, name = tmp_path / "w", f".w.{2**31 - 1}-abc123"
    for place in (folder, tmp_path / f"{name}.old") if moment == "after" else (folder,):
        place.mkdir()
        (place / "model").write_text("model")
    other = folder if moment == "filling" else tmp_path / f"{name}.old"
    if moment == "between":
        folder.rename(other)
    if moment != "after":
        (tmp_path / f"{name}.part").mkdir()
    (other / "notes").write_text("mine")
    with replacing(folder, mine=["model"]) as new:
        (new / "model").write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w"]
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"model": "new", "notes": "mine"}


def test_a_replacement_at_work_is_left_alone(tmp_path):
    mine = tmp_path / f".w.{os.getpid()}-abc123.part"
    mine.mkdir()
    with replacing(tmp_path / "w"):
        pass
    assert mine.is_dir()


def test_a_folder_whose_name_is_no_text(tmp_path):
    """A name of Latin-1 is a part of commands and records."""
    with RunFolder.open(tmp_path / "caf\udce9") as run:
        path = run.write_json("a.json", {"name": "caf\udce9"})
    assert json.loads(path.read_text("utf-8")) == {"name": "caf\udce9"}
    assert write_page(run.path).read_bytes().count(rb"caf\udce9")
