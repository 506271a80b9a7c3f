"""The run folder: resuming, refusing, locking, and files that are whole or not there."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from fakes import configured
from filelock import SoftFileLock
from PIL import Image

from sis_jax.data.files import CannotWrite, disk_errors, plain, read_run
from sis_jax.discover import discover
from sis_jax.methods.settings import USUAL, SegmentationInStyleSettings
from sis_jax.runs import run as run_module
from sis_jax.runs.configs.edit import EditConfig, Move
from sis_jax.runs.configs.label import LabelConfig
from sis_jax.runs.configs.synthesize import Images, SynthesizeConfig
from sis_jax.runs.run import RunFolder, difference
from sis_jax.types import Info, SisError, UsageError

pytestmark = pytest.mark.integration


def _finish(path, config, **options):
    with (
        RunFolder.open(path, **options) as run,
        run.stage(configured("discover", **config)) as stage,
    ):
        if not stage.done:
            run.write_json("parts/classes.json", {"k": config["k"]})
        return stage


def test_a_stage_is_recorded(tmp_path):
    info = Info(name="faces", licence="CC0-1.0", sha256="12")
    with (
        RunFolder.open(tmp_path / "r") as run,
        run.stage(configured("discover", k=10, seed=4, taps=("a",)), generator=info) as stage,
    ):
        run.write_json("parts/classes.json", [1])
        stage.record["note"] = "kept"
    record = read_run(tmp_path / "r")["stages"]["discover"]
    assert record["config"] == {"k": 10, "seed": 4, "taps": ["a"]}
    assert record["seeds"] == {"seed": 4}
    assert record["command"] == "python -m sis_jax.discover --k 10 --seed 4 --taps a"
    assert record["generator"]["licence"] == "CC0-1.0"
    assert {"python", "jax", "flax", "numpy"} <= record["versions"].keys()
    assert record["device"] == f"8 x {os.uname().machine} CPU"
    assert record["files"] == ["parts/classes.json"]
    assert record["note"] == "kept"
    assert record["state"] == "done"
    assert 0 <= record["seconds"] < 60


def test_the_same_configuration_is_done_and_another_refused(tmp_path):
    assert not _finish(tmp_path / "r", {"k": 10, "out": "a"}).done
    again = _finish(tmp_path / "r", {"k": 10, "out": "b"})
    assert again.done
    assert again.record["files"] == ["parts/classes.json"]
    with pytest.raises(UsageError, match=r"discover with k=10, now asked for 12.*--overwrite"):
        _finish(tmp_path / "r", {"k": 12})
    assert json.loads((tmp_path / "r/parts/classes.json").read_text()) == {"k": 10}
    assert not _finish(tmp_path / "r", {"k": 12}, overwrite=True).done
    assert json.loads((tmp_path / "r/parts/classes.json").read_text()) == {"k": 12}


def test_an_impossible_overwrite_loses_nothing(tmp_path):
    """A late stage removes what it replaces when it writes its first file, not when it is asked
    for.
    """
    _finish(tmp_path / "r", {"k": 10})
    before = (tmp_path / "r/run.json").read_bytes()
    with RunFolder.open(tmp_path / "r", overwrite=True) as run:
        with (
            pytest.raises(UsageError, match="no such layer"),
            run.stage(configured("discover", k=12), late=True),
        ):
            raise UsageError("no such layer")
        assert (tmp_path / "r/run.json").read_bytes() == before and (
            tmp_path / "r/parts/classes.json"
        ).is_file()
        with run.stage(configured("discover", k=12), late=True):
            assert (tmp_path / "r/parts/classes.json").is_file()
            run.write_json("parts/other.json", {})
            assert (
                not (tmp_path / "r/parts/classes.json").exists()
                and run.read()["stages"]["discover"]["state"] == "started"
            )
        assert run.read()["stages"]["discover"]["files"] == ["parts/other.json"]
        with run.stage(configured("discover", k=13), late=True):
            pass
    assert (
        not (tmp_path / "r/parts/other.json").exists() and _finish(tmp_path / "r", {"k": 13}).done
    )


def test_changed_inputs_are_refused(tmp_path):
    with RunFolder.open(tmp_path) as run:
        with run.stage(configured("label"), inputs={"parts": "aa"}):
            pass
        with (
            pytest.raises(UsageError, match=r"inputs.parts='aa', now asked for 'bb'"),
            run.stage(configured("label"), inputs={"parts": "bb"}),
        ):
            pass


def test_a_lost_file_makes_a_stage_undone(tmp_path):
    _finish(tmp_path, {"k": 10})
    (tmp_path / "parts/classes.json").unlink()
    stage = _finish(tmp_path, {"k": 10})
    assert stage.resumed
    assert not stage.done


def test_a_failed_stage_resumes_or_leaves_no_trace(tmp_path):
    with RunFolder.open(tmp_path) as run:
        with pytest.raises(ZeroDivisionError), run.stage(configured("discover", k=1)):
            raise ZeroDivisionError
        assert run.read()["stages"] == {}
        with pytest.raises(ZeroDivisionError), run.stage(configured("discover", k=2)):
            run.write_bytes("a.bin", b"1")
            raise ZeroDivisionError
        with pytest.raises(UsageError), run.stage(configured("discover", k=3)):
            pass
        with run.stage(configured("discover", k=2)) as stage:
            assert stage.resumed


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"holds 'thesis.tex' and no run.json"):
        RunFolder.open(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]
    with pytest.raises(UsageError, match="is a file"):
        RunFolder.open(tmp_path / "thesis.tex")
    with pytest.raises(SisError, match="Not a directory"):
        RunFolder.open(tmp_path / "thesis.tex" / "run")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"stages": []}'])
def test_a_broken_run_json_is_refused_and_kept(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"run\.json"):
        RunFolder.open(tmp_path)
    assert (tmp_path / "run.json").read_text() == content


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "give an --out you may write to"),
        (errno.EIO, "could not"),
    ],
)
def test_disk_troubles_are_one_sentence_and_leave_the_old_file(
    tmp_path, monkeypatch, code, sentence
):
    with RunFolder.open(tmp_path) as run:
        run.write_bytes("a.bin", b"old")

        def full(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(run_module.os, "replace", full)
        with pytest.raises(SisError, match=sentence) as caught:
            run.write_bytes("a.bin", b"new")
        assert "\n" not in str(caught.value)
        assert (tmp_path / "a.bin").read_bytes() == b"old"
        assert not list(tmp_path.glob(".a.bin*"))


def test_leftovers_are_removed_and_other_files_kept(tmp_path):
    _finish(tmp_path, {"k": 1})
    (tmp_path / "parts/.classes.json.99.sis-tmp").write_text("half")
    (tmp_path / "parts/.mine").write_text("x")
    RunFolder.open(tmp_path).close()
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [".mine", "classes.json"]


def test_nothing_is_written_outside_or_after_closing(tmp_path):
    run = RunFolder.open(tmp_path / "r")
    for name in ("../a", str(tmp_path / "a")):
        with pytest.raises(UsageError, match="outside"):
            run.write_bytes(name, b"")
    run.close()
    with pytest.raises(SisError, match="closed"):
        run.write_bytes("a", b"")


def test_every_kind_of_file_can_be_read_back(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    with RunFolder.open(tmp_path) as run:
        run.write_image("a/x.png", picture)
        run.write_image("x.png", Image.fromarray(picture[..., 0]))
        run.write_json(
            "x.json",
            {
                "nan": float("nan"),
                "np": np.float32(0.5),
                "path": tmp_path,
                "tuple": (1,),
                "info": Info(name="é"),
            },
        )
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a/x.png")), picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), picture[..., 0])
    content = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert content["nan"] is None
    assert (content["np"], content["path"], content["tuple"], content["info"]["name"]) == (
        0.5,
        str(tmp_path),
        [1],
        "é",
    )


_HOLD = (
    "import sys, time\nfrom sis_jax.runs.run import RunFolder\nrun = "
    "RunFolder.open(sys.argv[1])\nprint('open', flush=True)\ntime.sleep(60)"
)


def test_two_processes_are_refused_and_a_killed_one_is_forgotten(tmp_path):
    folder = tmp_path / "r"
    other = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(SisError, match=f"in use by process {other.pid}"):
            RunFolder.open(folder)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    assert (folder / ".lock").exists()
    RunFolder.open(folder).close()
    assert not (folder / ".lock").exists()


def test_without_system_locks_the_file_decides(tmp_path, monkeypatch):
    def none(fd):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock._unix.lock_fd_nonblocking", none)
    with (
        SoftFileLock(tmp_path / ".lock.soft", thread_local=False),
        pytest.raises(SisError, match="in use"),
    ):
        RunFolder.open(tmp_path)
    with RunFolder.open(tmp_path):
        assert (tmp_path / ".lock.soft").exists()
    assert not list(tmp_path.glob(".lock*"))


def test_one_process_may_open_a_run_twice(tmp_path):
    outer = RunFolder.open(tmp_path)
    with RunFolder.open(tmp_path):
        pass
    outer.write_bytes("still", b"open")
    assert (tmp_path / ".lock").exists()
    del outer
    assert not (tmp_path / ".lock").exists()


def test_an_older_record_is_read_in_todays_names(tmp_path):
    """One with `seeds`, and without fields that came since."""
    before = {"seeds": [3], "direction": "pca:0", "strength": [1.0], "slots": None}
    before |= {"truncation": 0.7, "photo": None, "space": None, "steps": None}
    record = {"state": "done", "config": before | {"inpainter": "telea"}, "files": []}
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "stages": {"edits/a": record}}))
    move = Move(direction="pca:0", strength=(1.0,))
    same = EditConfig("r", seed=(3,), truncation=0.7, inpainter="telea", move=move)
    with RunFolder.open(tmp_path) as run:
        with run.stage(same, name="edits/a") as stage:
            assert stage.done
        other = replace(same, seed=(4,))
        with pytest.raises(UsageError, match="seed"), run.stage(other, name="edits/a"):
            pass


@pytest.mark.parametrize(
    ("config", "old"),
    [
        (
            vars(discover)["door"].build({"gen": "faces64", "method": USUAL}, {"k": 6}),
            {"gen": "faces64", "method": "segmentation_in_style", "recipe": None, "seed": 0}
            | vars(SegmentationInStyleSettings(k=6)),
        ),
        (
            LabelConfig("r", clip="faces-clip"),
            {"clip": "faces-clip", "ontology": None, "mode": "dense", "size": 0, "n": 50}
            | {"margin": 0.1, "align_corners": False, "seed": 0},
        ),
        (
            SynthesizeConfig("r", images=Images(truncation=0.7), classes=("a",)),
            {"n": 10_000, "val": 0.05, "truncation": 0.7, "soft": False, "seed": 1}
            | {"classes": ["a"]},
        ),
    ],
    ids=lambda value: getattr(value, "verb", "old"),
)
def test_a_record_from_before_the_configurations_equals_todays(config, old):
    assert difference(plain(old), plain(config.record())) is None


def test_differences_name_the_field():
    assert difference({"a": 1}, {"a": 1, "b": None, "c": []}) is None
    assert difference({"a": {"b": 1}}, {"a": {"b": 2}}) == ("a.b", 1, 2)
    assert difference({"a": 1}, {"a": 1, "n": 5}) == ("n", None, 5)
    with pytest.raises(TypeError, match="object"):
        plain({"a": object()})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "full"), "the disk is full"),
        (RuntimeError("write() failed: No space left on device; at byte 4096"), "the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: Disk quota exceeded"), "the disk is full"),
        (RuntimeError("PERMISSION_DENIED: Permission denied"), "give an --out you may write to"),
        (OSError(errno.EIO, "Input/output error"), "could not be written or read: Input/output"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_sentence(tmp_path, error, said):
    with pytest.raises(CannotWrite, match=said), disk_errors(tmp_path):
        raise error


def test_other_errors_are_not_the_disks(tmp_path):
    with pytest.raises(ValueError, match="no shape"), disk_errors(tmp_path):
        raise ValueError("no shape")
