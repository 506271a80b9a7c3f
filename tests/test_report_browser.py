"""The report as a person uses it, in headless Chromium; skipped where none is installed."""

import json
import subprocess
import sys

import browser_kit
import numpy as np
import pytest
from fakes import configured
from PIL import Image

from sis_jax.data import draw
from sis_jax.data.part_edits import read_edits
from sis_jax.data.parts import Parts, classes_from
from sis_jax.report import report
from sis_jax.runs.run import RunFolder
from sis_jax.types import Info

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(browser_kit.CHROMIUM is None, reason="no Chromium is installed"),
]
EVIL = "<img src=x onerror=\"document.title='run'\">"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = browser_kit.Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture
def run(tmp_path):
    """A run with a background and four parts, quarters of the images; part 2 has a hostile name."""
    facts = {"border_share": 0.1, "agreement": 0.9, "confidence": 0.4}
    clusters = [{"id": i, "share": 0.5 - 0.1 * i, "background": i == 0} | facts for i in range(5)]
    masks = np.zeros((2, 32, 32), np.uint8)
    masks[:, 4:16, 4:16], masks[:, 4:16, 16:28], masks[:, 16:28, 4:16], masks[:, 16:, 16:] = range(
        1, 5
    )
    parts = Parts(
        method="segmentation_in_style",
        settings={"k": 5},
        arrays={"centers": np.zeros((5, 2), np.float32)},
        classes=classes_from(clusters, True),
        clusters=tuple(c | {"class_id": c["id"]} for c in clusters),
        background={"found": True, "why": "it is"},
        generator=Info("tiny", "none needed"),
        samples=draw.colour_mask(masks),
        masks=masks,
        seeds=(0, 1),
        confidence=(0.5, 0.4),
    ).rename({2: EVIL})
    folder = tmp_path / "run"
    config = configured("discover", k=5)
    with RunFolder.open(folder) as made, made.stage(config, generator=parts.generator):
        for name, data in parts.files().items():
            made.write_bytes(f"parts/{name}", data)
    report(folder)
    return folder


def add_finer(run):
    """A finer level of the same run: part 1 becomes parts 1 and 2, split in the middle; parts 2, 3
    and 4 become 3, 4 and 5.
    """
    file = run / "parts" / "classes.json"
    found = json.loads(file.read_text())
    parents = [0, 1, 1, 2, 3, 4]
    clusters = [
        found["clusters"][parent] | {"id": i, "class_id": i, "parent": parent}
        for i, parent in enumerate(parents)
    ]
    classes = [{"id": i, "name": f"fine {i}", "clusters": [i]} for i in range(1, 6)]
    classes = [{"id": 0, "name": "background", "clusters": [0]}, *classes]
    found["finer"] = {"classes": classes, "clusters": clusters, "warnings": ["Mind the gap."]}
    file.write_text(json.dumps(found))
    for path in (run / "parts" / "samples").glob("*_mask.png"):
        coarse = np.asarray(Image.open(path))
        fine = np.array([0, 1, 3, 4, 5], np.uint8)[coarse]
        fine[(coarse == 1) & (np.arange(32) > 9)] = 2
        draw.palette_png(fine).save(path.with_name(path.name.replace("_mask", "_finer")))


def chips(browser):
    return browser.run("[...document.querySelectorAll('#chips button')].map((b) => b.textContent)")


def click(browser, selector):
    browser.run(f"document.querySelector({json.dumps(selector)}).click()")


def choose(browser, name):
    at = chips(browser).index(name)
    browser.run(f"document.querySelectorAll('#chips button')[{at}].click()")


def pixel(browser, row, x, y):
    """[r, g, b, alpha] of the first sample's canvas; row 0: the mask, 1: both."""
    return browser.run(
        f"(() => {{const c = document.querySelectorAll('.samples canvas')[{2 * row}];"
        f"const at = [c.width * {x}, c.height * {y}];"
        "return [...c.getContext('2d').getImageData(...at, 1, 1).data]})()"
    )


def test_click_download_label(run, browser):
    """Rename, merge, drop and undo with the mouse; the file makes the parts that the page shows."""
    before = Parts.load(run)
    browser.show()
    browser.open(run / "report.html")
    choose(browser, "part 1")
    browser.run("document.querySelector('#name').value = 'hair'")
    click(browser, "#rename")
    browser.run("document.querySelector('#into').value = '2'")
    click(browser, "#merge")
    assert chips(browser) == ["background", EVIL, "part 3", "part 4"]
    click(browser, "#undo")
    choose(browser, "part 3")
    browser.run("document.querySelector('#into').value = '1'")
    click(browser, "#merge")
    choose(browser, "part 4")
    click(browser, "#drop")
    assert chips(browser) == ["background", "hair", EVIL]
    assert browser.run("document.querySelector('#count').textContent") == "3 changes"
    click(browser, "#download")
    path = browser.downloaded("edits.json")
    assert read_edits(path).levels == {0: {1: "hair", 3: "hair", 4: None}}
    words = browser.run("document.querySelector('#next').textContent").split()
    assert words == ["python", "-m", "sis_jax.label", str(run), "--edits", "edits.json"]
    subprocess.run([sys.executable, *words[1:-1], str(path)], check=True, cwd=run.parent)
    made = Parts.load(run)
    assert made.classes == before.rename({1: "hair", 3: "hair", 4: None}).classes
    browser.open(run / "report.html")
    assert chips(browser) == ["background", "hair", EVIL]
    assert browser.run("document.title").startswith("run ·")
    assert (browser.dialogs, browser.errors) == ([], [])


def test_the_keyboard_does_everything(run, browser):
    browser.show()
    browser.open(run / "report.html")
    browser.run("document.querySelector('#chips button').focus()")
    browser.key("ArrowRight")
    browser.key("Enter")
    assert browser.run("document.querySelector('#status').textContent") == "Shows part 1 alone."
    assert browser.run("document.activeElement.textContent") == "part 1"
    for _ in range(4):  # past the other parts to the name
        browser.key("Tab")
    browser.type("hair")
    browser.key("Enter")
    assert chips(browser)[1] == "hair"
    browser.run("document.activeElement.blur()")
    browser.key("z", modifiers=2)
    assert chips(browser)[1] == "part 1"
    browser.key("Escape")
    assert browser.run("document.querySelectorAll('#chips [aria-pressed=true]').length") == 0
    assert browser.errors == []


def test_one_part_alone(run, browser):
    """Its colour stays on the mask and its pixels on the image; the rest fades."""
    browser.show()
    browser.open(run / "report.html")
    colour = [*draw.palette()[1].tolist(), 255]
    assert pixel(browser, 0, 0.3, 0.3) == colour and pixel(browser, 0, 0.7, 0.3)[3] == 255
    choose(browser, "part 1")
    assert pixel(browser, 0, 0.3, 0.3) == colour and pixel(browser, 0, 0.7, 0.3)[3] < 60
    assert pixel(browser, 1, 0.3, 0.3)[3] == 255 and pixel(browser, 1, 0.7, 0.3)[3] < 60
    box = browser.run(
        "(() => {const c = document.querySelector('.samples canvas'); c.scrollIntoView();"
        "const b = c.getBoundingClientRect();"
        "return [b.left + 0.7 * b.width, b.top + 0.3 * b.height]})()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser(
            "Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1
        )
    assert browser.run("document.querySelector('#status').textContent") == f"Shows {EVIL} alone."


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_sizes_and_colours(run, browser, width, dark):
    """Nothing but the tables and the samples is wider than the page; text stands out."""
    browser.show(width, dark=dark)
    browser.open(run / "report.html")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    ink, paper = (
        browser.run(f"getComputedStyle(document.body).{name}.match(/\\d+/g).map(Number)")
        for name in ("color", "backgroundColor")
    )
    assert (max(ink) < 60 and min(paper) > 200) != dark
    assert (min(ink) > 200 and max(paper) < 60) == dark


def test_up_and_down_between_levels(run, browser):
    """One file holds the edits of both; a coarse part takes its finer ones to the background."""
    add_finer(run)
    report(run)
    browser.show()
    browser.open(run / "report.html")
    titles = "[...document.querySelectorAll('#levels button')].map((b) => b.textContent)"
    assert browser.run(titles) == ["Coarse: 4 parts", "Fine: 5 parts"]
    assert (
        browser.run("getComputedStyle(document.querySelector('[data-table=\"1\"]')).display")
        == "none"
    )
    click(browser, "#levels button:last-child")
    assert chips(browser) == ["background", *(f"fine {i}" for i in range(1, 6))]
    assert pixel(browser, 0, 0.4, 0.3)[:3] == draw.palette()[2].tolist()
    choose(browser, "fine 2")
    click(browser, "#levels button:first-child")
    assert browser.run("document.querySelector('#status').textContent") == "Shows part 1 alone."
    click(browser, "#drop")
    click(browser, "#levels button:last-child")
    assert chips(browser) == ["background", "fine 3", "fine 4", "fine 5"]
    choose(browser, "fine 4")
    browser.run("document.querySelector('#into').value = '5'")
    click(browser, "#merge")
    (browser.downloads / "edits.json").unlink(missing_ok=True)
    click(browser, "#download")
    assert read_edits(browser.downloaded("edits.json")).levels == {
        0: {1: None}, 1: {1: None, 2: None, 4: "fine 5"}
    }  # fmt: skip
    assert (browser.dialogs, browser.errors) == ([], [])
