"""The comparison of methods: what each is given, processes that are measured, rows that fail
softly, tables.
"""

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sis_jax.types import UsageError

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_methods.py"


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def job(script, tmp_path, **more):
    base = {
        "gen": None,
        "out": tmp_path,
        "images": "photos",
        "masks": None,
        "blanks": None,
        "photos": None,
        "n": 8,
        "steps": 2,
        "limit": 1,
    }
    return script.Job(**base | {"seed": 0, "settings": {}} | more)


def row(method, **more):
    empty = dict.fromkeys(
        (
            "iou_foreground",
            "iou_background",
            "mean_iou",
            "border_mean_iou",
            "find_seconds",
            "seconds",
            "peak_bytes",
        )
    )
    return {"method": method, "labels": None, **empty, "note": ""} | more


def test_what_a_method_is_given(script, tmp_path):
    settings = {"segmentation_in_style": {"k": 5, "align_corners": False}}
    words, labels = script.given("segmentation_in_style", job(script, tmp_path, settings=settings))
    assert words == ["--k", "5", "--no-align-corners"] and labels == 0
    with pytest.raises(ValueError, match="give --blanks"):
        script.given("datasetgan", job(script, tmp_path))


def test_a_process_and_its_memory():
    """Measured from a small process, as the script is one: Linux counts what the parent held when
    it forked.
    """
    inner = (
        "import sys; x = b'x' * 200_000_000; print('first\\nlast', file=sys.stderr); sys.exit(3)"
    )
    outer = (
        f"import runpy, sys; print(runpy.run_path({str(SCRIPT)!r})['started']([sys.executable, "
        f"'-c', {inner!r}]))"
    )
    code, peak, told = ast.literal_eval(
        subprocess.run(
            [sys.executable, "-c", outer], capture_output=True, text=True, check=True
        ).stdout
    )
    assert code == 3 and told == "last" and 2e8 < peak < 4e8


def test_a_method_that_lacks_something_or_fails_keeps_a_row(script, tmp_path, monkeypatch):
    found = script.measure("datasetgan", job(script, tmp_path))
    assert (
        found["note"] == "skipped: it learns from annotated samples, give --blanks"
        and found["mean_iou"] is None
    )
    monkeypatch.setitem(
        script.measure.__globals__, "started", lambda command: (2, 5, "no such generator")
    )
    found = script.measure("segmentation_in_style", job(script, tmp_path, gen="nothing"))
    assert found["note"] == "discover failed: no such generator" and found["peak_bytes"] == 5


def test_table_and_rows_for_the_report(script):
    good = row(
        "datasetgan",
        labels=16,
        iou_foreground=0.9,
        iou_background=0.7,
        mean_iou=0.8,
        border_mean_iou=0.4,
        find_seconds=61.0,
        seconds=300.0,
        peak_bytes=2**30,
    )
    rows = [good, row("labels4free", note="skipped: no photos")]
    text = script.table(rows)
    assert "| datasetgan | 0.900 | 0.700 | 0.800 | 0.400 | 16 | 61 s | 5 min | 1.0 GiB |" in text
    assert (
        "- labels4free: skipped: no photos" in text
        and "| U-Net, human masks | 0.95 | 0.87 | 0.91 | 0.49 | 1000 |" in text
    )
    found = script.summary(rows)
    assert len(found) == 4 and found[2] == {
        "name": "datasetgan: mean IoU",
        "ours": 0.8,
        "paper": 0.84,
    }


def test_rows_are_written_and_kept(script, tmp_path, monkeypatch):
    """Two methods, one of which fails at first: given again, only that one is tried."""
    tried = []

    def measure(name, job, overwrite):
        tried.append(name)
        failed = name == "datasetgan" and len(tried) < 3
        return row(name, **({"note": "skipped: x"} if failed else {"mean_iou": 0.5}))

    monkeypatch.setitem(script.compare.__globals__, "measure", measure)
    out = tmp_path / "cmp"
    for _ in range(2):
        path = script.compare(
            str(out), "photos", methods=("datasetgan", "segmentation_in_style"), smoke=True
        )
    assert (
        tried == ["datasetgan", "segmentation_in_style", "datasetgan"]
        and path == out / "comparison.md"
    )
    assert [r["note"] for r in json.loads((out / "comparison.json").read_text())["rows"]] == [
        "",
        "",
    ]
    assert (out / "report.html").is_file() and "datasetgan: mean IoU" in (
        out / "report.html"
    ).read_text()
    with pytest.raises(UsageError, match="unknown method 'datasetgun'; did you mean 'datasetgan'"):
        script.compare(str(tmp_path / "b"), "photos", methods=("datasetgun",))
    with pytest.raises(UsageError, match="expected JSON"):
        script.compare(str(tmp_path / "b"), "photos", settings="{")
