"""The report: opens offline, shows what the run holds, escapes what it is given, stays small."""

import base64
import csv
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fakes import configured
from PIL import Image
from safetensors.numpy import save

from sis_jax.data import draw
from sis_jax.data.edits import keep_background
from sis_jax.data.part_edits import fingerprint
from sis_jax.report import report
from sis_jax.runs.run import RunFolder
from sis_jax.types import Info, UsageError

_VOID = {"meta", "img", "br", "line", "rect", "polyline", "path", "circle", "input"}


class _Page(HTMLParser):
    """Collects what a browser would load, and checks that every tag is closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.loads, self.ids, self.text = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in _VOID:
            self.open.append(tag)
        self.loads += [
            value
            for name, value in attrs
            if name in ("src", "href", "srcset", "action", "data", "poster")
        ]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _faces(n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Discs on a ramp: id 1 the disc, id 2 a spot in it, 0 the ground."""
    y, x = np.mgrid[:size, :size] / size
    images, masks = [], []
    for i in range(n):
        r = np.hypot(x - 0.4 - 0.03 * i, y - 0.5)
        mask = np.where(r < 0.12, 2, np.where(r < 0.33, 1, 0)).astype(np.uint8)
        ramp = np.stack([90 + 90 * x, 120 + 60 * y, 150 + 0 * x], -1)
        images.append(
            np.where(
                mask[..., None] > 0, np.array([210, 160 - 50 * (mask[0, 0]), 90 + 10 * i]), ramp
            ).astype(np.uint8)
        )
        masks.append(mask)
    return np.stack(images), np.stack(masks)


def _make_run(folder: Path, *, size: int = 128, full: bool = True) -> Path:
    images, masks = _faces(8, size)
    clusters = [
        {
            "id": 0,
            "share": 0.55,
            "confidence": 0.95,
            "agreement": 0.99,
            "border_share": 0.9,
            "background": True,
            "class_id": 0,
        },
        {
            "id": 1,
            "share": 0.40,
            "confidence": 0.90,
            "agreement": 0.97,
            "border_share": 0.0,
            "background": False,
            "class_id": 1,
        },
        {
            "id": 2,
            "share": 0.05,
            "confidence": 0.55,
            "agreement": 0.41,
            "border_share": 0.0,
            "background": False,
            "class_id": 2,
        },
    ]
    classes = [
        {
            "id": 1,
            "name": "disc",
            "colour": draw.colour(1),
            "clusters": [1],
            "score": None,
            "margin": None,
        },
        {
            "id": 2,
            "name": "<script>spot</script>",
            "colour": draw.colour(2),
            "clusters": [2],
            "score": None,
            "margin": None,
        },
    ]
    config = {"gen": "discs", "k": "auto", "layer": "auto", "seed": 0}
    info = Info(name="discs-128", licence="CC0-1.0", source="made by the test", sha256="ab" * 32)
    with RunFolder.open(folder) as run, run.stage(configured("discover", **config), generator=info):
        if not full:
            return folder
        run.write_json(
            "parts/classes.json",
            {
                "classes": classes,
                "clusters": clusters,
                "background": {"found": True, "why": "touches the border"},
                "warnings": ["Part 2 is small: try k=4."],
                "samples": [{"seed": i, "confidence": 0.9 - 0.1 * i} for i in range(8)],
            },
        )
        rows = [
            {
                "layer": layer,
                "k": k,
                "agreement": 0.9 - 0.02 * k,
                "silhouette": None,
                "score": 0.5 + 0.01 * k * s,
                "chosen": (layer, k) == ("32x32", 6),
            }
            for s, layer in enumerate(("16x16", "32x32"), 1)
            for k in (3, 4, 6, 8)
        ]
        run.write_json(
            "parts/sweep.json",
            {"criterion": "The largest k whose agreement stays above 0.75.", "rows": rows},
        )
        for i in range(8):
            run.write_image(f"parts/samples/{i:02d}_image.png", images[i])
            run.write_image(f"parts/samples/{i:02d}_mask.png", draw.palette_png(masks[i]))
        run.write_image("parts/gallery.png", draw.sample_grid(images, masks))
        arrays = {"centroids": np.zeros((3, 16), np.float32)}
        run.write_bytes("parts/parts.safetensors", save(arrays))
        run.write_json(
            "metrics.json", {"mIoU": {"paper": 0.80, "ours": 0.83}, "pixel accuracy": 0.91}
        )
        (folder / "student").mkdir()
        with (folder / "student" / "curves.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [["step", "loss"], *[[s, 1 / (1 + s)] for s in range(0, 50, 5)]]
            )
    return folder


def test_the_page_opens_offline(tmp_path):
    path = report(_make_run(tmp_path / "faces"))
    html = path.read_text(encoding="utf-8")
    page = _Page(html)
    assert page.open == []
    assert len(page.loads) >= 24
    assert all(value.startswith("data:image/") for value in page.loads)
    assert "://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "@import" not in html
    assert "url(" not in html
    assert path.stat().st_size < 5 * 1024 * 1024
    assert "prefers-color-scheme: dark" in html


def test_the_heat_map_shows_what_decided_the_layer(tmp_path):
    run = _make_run(tmp_path / "faces")
    table = json.loads((run / "parts/sweep.json").read_text())
    assert "<figcaption>Score</figcaption>" in report(run).read_text()
    for i, row in enumerate(table["rows"]):
        row["consensus"] = 0.11 + 0.01 * i
    (run / "parts/sweep.json").write_text(
        json.dumps(table | {"layers": {"16x16": 0.31, "32x32": 0.77}})
    )
    heat = report(run).read_text().split('class="chart heat"')[1].split("</svg>")[0]
    assert (
        all(f">{value}<" in heat for value in ("mean", "0.31", "0.77", "0.11", "0.18"))
        and "<figcaption>Consensus: how much" in report(run).read_text()
    )


def test_every_section_with_data_is_there(tmp_path):
    page = _Page(report(_make_run(tmp_path / "faces")).read_text(encoding="utf-8"))
    assert page.ids == [
        *("samples", "tool", "levels", "chips", "edit", "name", "rename", "into", "merge", "drop"),
        *("undo", "download", "count", "status", "next"),
        "parts",
        "sweep",
        "student",
        "metrics",
        "provenance",
        "run",
    ]
    text = " ".join(page.text)
    for part in (
        "CC0-1.0",
        "python -m sis_jax.discover --gen discs --k auto",
        "Part 2 is small: try k=4.",
        "The largest k",
        "centroids",
        "ab" * 32,
        "0.03",
    ):
        assert part in text, part


def test_confusion_is_shown_in_percent_of_the_true_class(tmp_path):
    folder = _make_run(tmp_path / "faces")
    values = {
        "confusion": [[30, 10], [0, 5]],
        "true_classes": ["background", "<i>hair</i>"],
        "predicted_classes": ["background", "hair"],
    }
    content = {
        "metrics": [{"name": "faces: mean IoU", "ours": 0.9}],
        "evaluations": {"faces": values, "half": {"confusion": [[1]]}},
    }
    (folder / "metrics.json").write_text(json.dumps(content))
    html = report(folder).read_text()
    section = html[html.index('id="metrics"') :]
    heat = section[section.index('class="chart heat"') : section.index("</svg>")]
    assert [text for text in ("75", "25", "100", "backgr…") if f">{text}<" not in heat] == []
    assert "&lt;i&gt;hair&lt;/i&gt;" in heat and section.count('class="chart heat"') == 1


def test_sections_without_data_are_left_out(tmp_path):
    page = _Page(report(_make_run(tmp_path / "bare", full=False)).read_text(encoding="utf-8"))
    assert page.ids == ["provenance"]
    assert page.loads == []


def test_unstable_parts_come_first_and_names_are_escaped(tmp_path):
    html = report(_make_run(tmp_path / "faces")).read_text(encoding="utf-8")
    assert "<script>spot" not in html
    table = html[html.index('<section id="parts">') :]
    assert (
        table.index("&lt;script&gt;spot")
        < table.index("disc</span>")
        < table.index("background</span>")
    )
    assert re.findall(r'class="tag warn">([^<]+)<', table) == ["unstable"]


def test_no_image_is_there_twice(tmp_path):
    loads = _Page(_page_of(_make_run(tmp_path / "faces"))).loads
    assert len(loads) == len(set(loads)) == 3 * 8 + 3 * 4


def test_samples_of_lowest_confidence_come_first(tmp_path):
    html = _page_of(_make_run(tmp_path / "faces"))
    shown = re.findall(r'class="number">([0-9.]+)<small>seed (\d+)', html)
    assert shown == [(f"{0.9 - 0.1 * i:.2f}", str(i)) for i in reversed(range(8))]


def test_only_the_pages_own_script_may_run(tmp_path):
    """A name that closes the script's data, and one with a handler, stay text."""
    folder = _make_run(tmp_path / "faces")
    file = folder / "parts" / "classes.json"
    found = json.loads(file.read_text())
    found["classes"][0]["name"] = "</script><img src=x onerror=alert(1)>"
    file.write_text(json.dumps(found))
    html = _page_of(folder)
    assert "<img src=x" not in html
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", html, re.S)
    names = [c["name"] for c in json.loads(data)["levels"][0]["classes"]]
    assert names == ["</script><img src=x onerror=alert(1)>", "<script>spot</script>"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; " in html
    assert f"script-src 'sha256-{digest}'\">" in html
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def test_the_script_gets_the_masks_and_the_parts(tmp_path):
    folder = _make_run(tmp_path / "faces", size=64)
    data = json.loads(re.findall(r'id="run">(.*?)</script>', _page_of(folder), re.S)[0])
    found = json.loads((folder / "parts" / "classes.json").read_text())
    assert data["parts"] == fingerprint(found["classes"])
    _, masks = _faces(8, 64)
    for i, runs in enumerate(data["masks"][0]):  # lowest confidence first: the last sample
        ids = np.repeat(runs[::2], runs[1::2]).reshape(data["height"], data["width"])
        np.testing.assert_array_equal(ids, masks[7 - i])


def test_what_went_wrong_is_told(tmp_path):
    folder = _make_run(tmp_path / "faces")
    found = json.loads((folder / "parts/classes.json").read_text())
    found["background"] = {"found": False, "why": "no cluster touches the border"}
    (folder / "parts/classes.json").write_text(json.dumps(found))
    record = json.loads((folder / "run.json").read_text())
    record["stages"]["distill"] = {"state": "started", "config": {}}
    record["stages"]["discover"]["generator"]["licence"] = "unknown: ask"
    (folder / "run.json").write_text(json.dumps(record))
    text = report(folder).read_text(encoding="utf-8")
    for part in (
        "No background was found: no cluster touches the border.",
        "The stage distill did not finish",
        "licence of the generator is unknown",
    ):
        assert part in text


def test_large_pictures_are_reduced(tmp_path):
    folder = _make_run(tmp_path / "faces", size=64)
    noise = np.random.default_rng(0).integers(0, 256, (3000, 2600, 3), np.uint8)
    with RunFolder.open(folder) as run:
        run.write_image("parts/samples/00_image.png", noise[:1024, :1024], compress_level=1)
        run.write_image(
            "parts/samples/00_mask.png",
            draw.palette_png(np.ones((1024, 1024), np.uint8)),
            compress_level=1,
        )
    assert report(folder).stat().st_size < 5 * 1024 * 1024


@pytest.mark.parametrize("content", [None, "[]", "{", '{"stages": 3}'])
def test_a_folder_that_is_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


# Names from text, and runs that hold little


def _page_of(folder: Path) -> str:
    return report(folder).read_text(encoding="utf-8")


def test_names_from_text_are_shown(tmp_path):
    folder = _make_run(tmp_path / "run")
    file = folder / "parts" / "classes.json"
    content = json.loads(file.read_text())
    content["classes"][0] |= {
        "name": "hair",
        "score": 0.81,
        "margin": 0.7,
        "runner_up": "hat",
        "guess": None,
        "unsure": False,
    }
    content["classes"][1] |= {
        "name": "part 2",
        "score": 0.4,
        "margin": 0.05,
        "runner_up": "skin",
        "guess": "ear",
        "unsure": True,
    }
    file.write_text(json.dumps(content))
    page = _page_of(folder)
    table = page[page.index('id="parts"') :]
    assert (
        "Runner-up" in table
        and ">0.81<" in table
        and ">0.70<" in table
        and ">hat<" in table
        and ">skin<" in table
    )
    assert "unnamed: ear?" in table and table.index("part 2") < table.index(
        "hair"
    )  # unsure ones first


def test_a_class_without_a_name_goes_by_its_number(tmp_path):
    folder = _make_run(tmp_path / "run")
    file = folder / "parts" / "classes.json"
    content = json.loads(file.read_text())
    content["classes"][0].pop("name")
    content["classes"][1]["name"] = ["a", "list"]
    file.write_text(json.dumps(content))
    html = _page_of(folder)
    assert '<span class="name">part 1</span>' in html
    assert '<span class="name">[&#39;a&#39;, &#39;list&#39;]</span>' in html


def test_the_background_is_not_unnamed(tmp_path):
    """The finer level's has no text of its own."""
    folder = _make_run(tmp_path / "run")
    file = folder / "parts" / "classes.json"
    content = json.loads(file.read_text())
    content["classes"].insert(0, {"id": 0, "name": "background", "clusters": [0], "unsure": True})
    content["classes"][1]["unsure"] = True
    file.write_text(json.dumps(content))
    assert re.findall(r'class="tag warn">(unnamed)', _page_of(folder)) == ["unnamed"]


def test_without_scores_there_is_no_such_column(tmp_path):
    page = _page_of(_make_run(tmp_path / "run"))
    assert "Runner-up" not in page and "unnamed:" not in page


def test_a_run_whose_first_stage_knows_no_layer_and_no_generator(tmp_path):
    """Such as one that only holds a dataset, or only a training."""
    with RunFolder.open(tmp_path / "run") as run, run.stage(configured("distill", steps=3)):
        run.write_bytes("student/a.txt", b"x")
    page = _page_of(tmp_path / "run")
    assert (
        "python -m sis_jax.distill --steps 3" in page
        and "<dt>Layer</dt>" not in page
        and "<dt>Generator</dt>" not in page
    )


def test_a_run_without_any_stage(tmp_path):
    with RunFolder.open(tmp_path / "run"):
        pass
    assert "<h1>run</h1>" in _page_of(tmp_path / "run")


def test_only_our_own_commands_are_shown(tmp_path):
    """A run folder may come from anybody, and its commands are copied into a shell."""
    with RunFolder.open(tmp_path / "run") as run, run.stage(configured("any", n=3), name="any"):
        pass
    record = json.loads((tmp_path / "run/run.json").read_text())
    ours = "python -m sis_jax.any --n 3"
    for name, command in (("a", ours), ("b", f"{ours}; curl evil")):
        record["stages"][name] = record["stages"]["any"] | {"command": command}
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    page = _page_of(tmp_path / "run")
    assert ours in page and "evil" not in page


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("evaluate celebamask-hq", "python -m sis_jax.evaluate {run} with"),
        ("discover", "python -m sis_jax.discover --out {run} with"),
        ("label", "python -m sis_jax.label {run} with"),
        ("edits/pca-0", "python -m sis_jax.edit {run} with"),
    ],
)
def test_how_to_go_on_with_an_unfinished_stage(tmp_path, stage, command):
    folder = tmp_path / "run"
    with (
        pytest.raises(KeyboardInterrupt),
        RunFolder.open(folder) as run,
        run.stage(configured("any", n=3), name=stage),
    ):
        run.write_bytes("half.txt", b"x")
        raise KeyboardInterrupt
    assert f"The stage {stage} did not finish: {command.format(run=folder)}" in _page_of(folder)


def _edit_of(count: int, shift: int, direction: str = "glasses"):
    """Discs that get darker, on a ground that the plain edit makes brighter by `shift` and the
    other keeps.
    """
    images, masks = _faces(count, 32)
    plain = np.where(masks[..., None] > 0, images // 2, images + np.uint8(shift))
    alphas = (masks > 0).astype(np.float32)
    return keep_background(
        tuple(f"seed {i}" for i in range(count)),
        (1.0,),
        direction,
        images,
        alphas,
        plain[:, None],
        alphas[:, None],
    )


def test_edits_are_shown_side_by_side(tmp_path):
    """Each edit has its picture, its PSNRs over all pictures, and a row per picture."""
    folder = _make_run(tmp_path / "faces")
    before = len(_Page(_page_of(folder)).loads)
    _edit_of(2, 8).save(folder / "edits" / "glasses")
    _edit_of(9, 16, "<b>hat</b>").save(folder / "edits" / "hat")
    (folder / "edits" / "half").mkdir()
    (folder / "edits" / "half" / "edit.json").write_text("{")  # what cannot be read is left out
    html = _page_of(folder)
    page = _Page(html)
    assert "edits" in page.ids and len(page.loads) == before + 2
    text = " ".join("".join(page.text).split())
    for shift in (8, 16):  # the definition: 10 log10(255^2 / shift^2)
        assert (
            f"background kept at no pixel changed, plain edit {20 * np.log10(255 / shift):.1f} dB"
            in text
        )
    assert "2 images of glasses" in text and "9 images of hat" in text and "seed 8" in text
    assert "&lt;b&gt;hat&lt;/b&gt;" in html and "half" not in text
    wide, tall = (
        _size(uri) for uri in re.findall(r'<img class="gallery" src="([^"]+)" alt="edit ', html)
    )
    assert wide[0] == tall[0] and tall[1] > 2.5 * wide[1]  # 2 rows, and 6 of 9


def test_many_edits_keep_the_page_small(tmp_path):
    folder = _make_run(tmp_path / "faces")
    noise = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), np.uint8)
    alphas = np.zeros((4, 128, 128), np.float32)
    alphas[:, 40:90, 40:90] = 1
    for i in range(6):
        keep_background(
            tuple("abcd"), (1.0,), "pca:0", noise, alphas, noise[:, None], alphas[:, None]
        ).save(folder / "edits" / str(i))
    html = _page_of(folder)
    sheets = re.findall(r'<img class="gallery" src="([^"]+)" alt="edit ', html)
    assert len(sheets) == 6 and sum(map(len, sheets)) <= 1_200_000


def _size(uri: str) -> tuple[int, int]:
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as picture:
        return picture.size


@pytest.mark.parametrize("damaged", [False, True])
def test_photos_with_their_masks_come_in_the_order_of_the_run(tmp_path, damaged):
    """Two rows of up to eight; names are escaped, and a folder that is not whole is left out."""
    run = _make_run(tmp_path / "run", full=False)
    images, masks = _faces(10, 32)
    notes = [{"name": f"<b>{i}.jpg", "confidence": 0.5 + i / 20} for i in range(10)]
    with RunFolder.open(run) as folder:
        for i in range(10):
            folder.write_image(f"photos/{i:02d}_image.png", images[i])
            folder.write_image(f"photos/{i:02d}_mask.png", draw.palette_png(masks[i]))
        folder.write_json(
            "photos/photos.json", {"looked_at": 99, "photos": notes[: 9 if damaged else 10]}
        )
    html = report(run).read_text(encoding="utf-8")
    page = _Page(html)
    assert not page.open and ("photos" in page.ids) != damaged
    if not damaged:
        assert html.count("photo with mask of &lt;b&gt;") == 10 and "of 99 photos" in html
        assert [t for t in page.text if re.fullmatch(r"0\.\d\d", t)][:3] == ["0.50", "0.55", "0.60"]
