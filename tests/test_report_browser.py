"""The report as a person uses it, in headless Chromium; skipped where none is installed."""

import json
import subprocess
import sys

import browser_kit
import parts_kit
import pytest

from sis_jax.data import draw
from sis_jax.data.part_edits import read_edits
from sis_jax.data.parts import Parts
from sis_jax.label import label
from sis_jax.report import report
from sis_jax.runs import charts

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
    folder = parts_kit.write_run(parts_kit.quarters().rename({2: EVIL}), tmp_path / "run")
    report(folder)
    return folder


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
    chart = charts.line_chart_svg({str(i): [(0, i), (1, i)] for i in range(10)})
    browser.run(
        f"document.querySelector('main').insertAdjacentHTML('beforeend', {json.dumps(chart)})"
    )
    lightest = browser.run(
        "[...document.querySelectorAll('polyline')].map((line) => {"
        "const c = document.createElement('canvas').getContext('2d');"
        "c.fillStyle = getComputedStyle(line).color; c.fillRect(0, 0, 1, 1);"
        "return Math.max(...c.getImageData(0, 0, 1, 1).data.slice(0, 3))})"
    )
    assert len(lightest) == 10 and (min(lightest) > 140) == dark  # the palette's darkest has 105


def test_up_and_down_between_levels(tmp_path, browser):
    """The finest is seen first. One file holds the edits of both; a coarse part takes its finer
    ones to the background.
    """
    before = parts_kit.two_levels()
    run = parts_kit.write_run(before, tmp_path / "run")
    browser.show()
    browser.open(report(run))
    titles = "[...document.querySelectorAll('#levels button')].map((b) => b.textContent)"
    assert browser.run(titles) == ["Coarse: 4 parts", "Fine: 5 parts"]
    assert browser.run("document.querySelector('[data-table=\"0\"]').offsetHeight") == 0
    click(browser, "#levels button:first-child")
    click(browser, "#levels button:last-child")
    assert chips(browser) == list(before.finer.names.values())
    # Its class's colour, as in the masks on disk.
    assert pixel(browser, 0, 0.4, 0.3)[:3] == draw.palette()[2].tolist()
    choose(browser, "part 1.2")
    click(browser, "#levels button:first-child")
    assert browser.run("document.querySelector('#status').textContent") == "Shows part 1 alone."
    click(browser, "#drop")
    choose(browser, "part 3")
    browser.run("document.querySelector('#name').value = 'neck'")
    click(browser, "#rename")
    click(browser, "#levels button:last-child")
    assert chips(browser) == ["background", "part 2", "part 3", "part 4"]
    choose(browser, "part 2")
    browser.run("document.querySelector('#into').value = '4'")
    click(browser, "#merge")
    choose(browser, "part 4")
    click(browser, "#drop")
    (browser.downloads / "edits.json").unlink(missing_ok=True)
    click(browser, "#download")
    edits = read_edits(browser.downloaded("edits.json"))
    assert edits.levels == {0: {1: None, 3: "neck"}, 1: {3: "part 3", 4: "part 3", 5: None}}
    made = label(run, edits=edits.content())
    assert made.names == {0: "background", 2: "part 2", 3: "neck", 4: "part 4"}
    assert made.finer.names == {0: "background", 3: "part 3"}
    assert (browser.dialogs, browser.errors) == ([], [])
