"""`discover` in Python and from the shell: run folder, resuming, refusals; on the default, a DCGAN,
a generator in plain Python.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import pytest
from PIL import Image

import sis_jax
from sis_jax.checkpoints import files
from sis_jax.checkpoints.build import arrays_of
from sis_jax.data.parts import Parts
from sis_jax.runs import cli
from sis_jax.types import SisError, UsageError

pytestmark = pytest.mark.integration

ROOT = Path(sis_jax.__file__).parents[1]
QUICK = fakes.TINY_PARTS
LAYOUT = {
    "run.json",
    "report.html",
    "parts/classes.json",
    "parts/parts.safetensors",
    "parts/gallery.png",
}
LAYOUT |= {f"parts/samples/{i:02d}_{what}.png" for i in range(8) for what in ("image", "mask")}


def shell(*words, timeout=240):
    """`python -W error -m sis_jax.discover ...` in a process of its own, which sees one device."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC", "JAX_PLATFORMS")
    }
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "sis_jax.discover", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


def content(folder):
    """Name -> bytes of every file a user sees."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name[0] != "."
    }


def one_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    return lines[0]


@pytest.fixture(scope="module")
def weights(tiny_weights):
    return tiny_weights


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    """A finished run, and the parts it returned."""
    out = tmp_path_factory.mktemp("runs") / "faces"
    return out, sis_jax.discover(weights, out=str(out), **QUICK)


# In Python


def test_without_out_nothing_is_written(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = sis_jax.discover(weights, **QUICK)
    assert isinstance(parts, Parts) and not list(tmp_path.iterdir())
    assert (
        parts.samples.shape == (8, 16, 16, 3)
        and parts.masks.shape == (8, 16, 16)
        and parts.seeds == tuple(range(8))
    )
    assert (
        parts.masks.max() < 3
        and len(parts.clusters) == 3
        and parts.settings["k"] == 3
        and parts.sweep is None
    )
    assert sorted(c for entry in parts.classes for c in entry["clusters"]) == [0, 1, 2]
    assert all(
        {"share", "border_share", "agreement", "confidence", "class_id"} <= set(c)
        for c in parts.clusters
    )
    assert parts.generator.sha256 and all(0 <= c <= 1 for c in parts.confidence)
    assert (0 in parts.names) == parts.background["found"]
    assert parts.background["found"] or any("background" in w for w in parts.warnings)


def test_run_folder(run):
    out, parts = run
    assert set(content(out)) == LAYOUT
    record = json.loads((out / "run.json").read_text())["stages"]["discover"]
    assert (
        record["state"] == "done"
        and record["config"]["k"] == 3
        and record["config"]["normalize"] == "tap"
    )
    assert (
        record["inputs"] == parts.generator.sha256 == record["generator"]["sha256"]
        and record["generator"]["licence"] == "none needed"
    )
    assert (
        record["command"].startswith("python -m sis_jax.discover") and "--k 3" in record["command"]
    )
    loaded = Parts.load(out)
    assert loaded.classes == parts.classes and np.array_equal(loaded.masks, parts.masks)
    page = (out / "report.html").read_text()
    assert "part 1" in page and 'http-equiv="refresh"' not in page and len(page) < 5_000_000
    with Image.open(out / "parts" / "gallery.png") as gallery:
        assert gallery.width > 500


def test_a_second_time_nothing_is_done(run, weights):
    out, parts = run
    before, times = content(out), {p: p.stat().st_mtime_ns for p in (out / "parts").rglob("*")}
    again = sis_jax.discover(weights, out=str(out), **QUICK)
    after = content(out)
    assert {p: p.stat().st_mtime_ns for p in (out / "parts").rglob("*")} == times
    assert all(before[name] == after[name] for name in LAYOUT - {"report.html"})
    assert again.classes == parts.classes and np.array_equal(again.masks, parts.masks)


def test_a_lost_file_is_made_again_with_the_same_bytes(run, weights):
    out, _ = run
    before = content(out)
    (out / "parts" / "gallery.png").unlink()
    (out / "parts" / "samples" / "03_mask.png").unlink()
    sis_jax.discover(weights, out=str(out), **QUICK)
    after = content(out)
    assert all(before[name] == after[name] for name in LAYOUT - {"report.html", "run.json"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 4}, "k=3, now asked for 4"),
        ({"n": 7}, "n=6, now asked for 7"),
        ({"seed": 1}, "seed=0"),
    ],
)
def test_another_configuration_is_refused(run, weights, change, said):
    out, _ = run
    before = content(out)
    with pytest.raises(UsageError) as error:
        sis_jax.discover(weights, out=str(out), **QUICK | change)
    assert said in str(error.value) and "--overwrite" in str(error.value)
    assert content(out) == before


def test_other_weights_are_refused(run, tmp_path):
    """The same path with other numbers in it is not the same generator."""
    from sis_jax.checkpoints import load_generator, save_generator

    other = load_generator(save_generator(fakes.tiny_stylegan2(16, seed=9), tmp_path / "tiny"))
    with pytest.raises(UsageError, match="already has discover with"):
        sis_jax.discover(other, out=str(run[0]), **QUICK)


def test_overwrite(weights, tmp_path):
    first = sis_jax.discover(weights, out=str(tmp_path / "run"), **QUICK)
    second = sis_jax.discover(
        weights, out=str(tmp_path / "run"), overwrite=True, **QUICK | {"seed": 1}
    )
    assert (
        second.seed == 1
        and second.seeds[0] == 100_000
        and not np.array_equal(first.samples, second.samples)
    )
    assert set(content(tmp_path / "run")) == LAYOUT
    assert (
        json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["discover"]["config"][
            "seed"
        ]
        == 1
    )


def test_a_fresh_folder_gets_the_same_bytes(run, weights, tmp_path):
    sis_jax.discover(weights, out=str(tmp_path / "run"), **QUICK)
    ours, theirs = content(tmp_path / "run"), content(run[0])
    assert all(ours[name] == theirs[name] for name in LAYOUT - {"report.html", "run.json"})


def test_a_dcgan(tmp_path):
    gen = fakes.tiny_dcgan((16, 4))
    config = {"z_dim": gen.z_dim, "channels": list(gen.config.channels)}
    files.write_folder(
        tmp_path / "dc", files.Folder("dcgan", "dc", "free", config), arrays_of(gen), None, "card"
    )
    parts = sis_jax.discover(
        tmp_path / "dc", out=str(tmp_path / "run"), k=2, layer="8x8", n=32, n_init=2
    )
    assert (
        set(content(tmp_path / "run")) == LAYOUT
        and parts.generator.name == "dc"
        and parts.samples.shape == (8, 16, 16, 3)
    )


def test_a_generator_in_plain_python(tmp_path):
    gen = fakes.Blocks(16)
    parts = sis_jax.discover(gen, out=str(tmp_path / "run"), k=2, layer="16x16", n=8, n_init=2)
    assert parts.names == {0: "background", 1: "part 1"} and parts.background["found"]
    assert np.array_equal(parts.classify(parts.masks) == 1, gen.truth(parts.seeds, 0.7))
    assert set(content(tmp_path / "run")) == LAYOUT


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"method": "segmentation_in_stile"},
            "unknown method 'segmentation_in_stile'; did you mean 'segmentation_in_style'",
        ),
        ({"recipe": "papre"}, "unknown recipe 'papre'; did you mean 'paper'"),
        (
            {"layers": "8x8"},
            "unknown setting of auto 'layers'; did you mean 'layer'",
        ),
        ({"k": 1}, "k is 1"),
        ({"layer": "64x64"}, "it has 4x4"),
        ({"n": 1}, "n is 1"),
        ({"truncation": float("nan")}, "truncation is nan, expected a finite number"),
        ({"truncation": -3.0}, "truncation is -3.0, expected 0 to 2"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"position_weight": float("inf")}, "position_weight is inf, expected a finite number"),
    ],
)
def test_impossible_requests_leave_nothing(weights, tmp_path, settings, said):
    with pytest.raises(UsageError) as error:
        sis_jax.discover(weights, out=str(tmp_path / "run"), **QUICK | settings)
    assert said in str(error.value)
    assert (
        not list((tmp_path / "run").glob("parts/*"))
        and not (tmp_path / "run" / "report.html").exists()
    )


def test_only_methods_that_cluster_say_lower_k():
    """A class that somebody painted, or one of two sides, is not made steadier by fewer
    clusters.
    """
    from sis_jax.methods.base import METHODS, Fitted, get
    from sis_jax.stages.discover import _warnings

    said = {}
    for name in METHODS:
        cluster = {"id": 4, "agreement": 0.1, "background": True, "border_share": 0.6, "share": 0.3}
        fitted = Fitted(get(name)(), {}, (cluster,), {"found": True})
        said[name] = [
            w for w in _warnings(fitted) if "lower k" in w and w.startswith("Clusters 4 change")
        ]
    assert {name for name, found in said.items() if found} == {
        "segmentation_in_style",
        "style_mixing",
    }


@pytest.mark.parametrize(("share", "told"), [(0.6, False), (0.3, True)])
def test_a_background_that_leaves_most_of_the_frame_is_told(share, told):
    from sis_jax.methods.base import Fitted
    from sis_jax.methods.latent_direction import LatentDirection
    from sis_jax.stages.discover import _warnings

    shares = (share, 0.1, 0.9 - share), (0.2, 0.02, 0.78)
    clusters = [
        {"id": i, "agreement": 1.0, "background": i < 2, "border_share": s, "share": t}
        for i, (s, t) in enumerate(zip(*shares))
    ]
    said = _warnings(Fitted(LatentDirection(), {}, tuple(clusters), {"found": True}))
    assert [
        w.startswith(f"The background holds only {share + 0.1:.0%}") for w in said if "holds" in w
    ] == [True] * told


@pytest.mark.parametrize(
    ("on_frame", "in_picture", "told"),
    [
        (0.40, 0.247, True),
        (0.60, 0.25, False),
        (0.9, 0.6, False),
    ],  # dark hair and dark ground at k 6, seed 2; plain ground; a large ground
)
def test_a_cluster_that_is_background_by_a_narrow_margin_is_told(on_frame, in_picture, told):
    from sis_jax.methods.base import Fitted
    from sis_jax.methods.segmentation_in_style import SegmentationInStyle
    from sis_jax.stages.discover import _warnings

    shares = zip((on_frame, 1 - on_frame), (in_picture, 1 - in_picture))
    clusters = [
        {"id": i, "agreement": 1.0, "background": i == 0, "border_share": f, "share": s}
        for i, (f, s) in enumerate(shares)
    ]
    said = [
        w
        for w in _warnings(Fitted(SegmentationInStyle(k=6), {}, tuple(clusters), {"found": True}))
        if "only just" in w
    ]
    assert [
        w.startswith(f"Cluster 0 was only just taken for background ({on_frame:.0%} of the frame")
        for w in said
    ] == [True] * told


def test_after_a_refused_request_the_folder_takes_another(weights, tmp_path):
    with pytest.raises(UsageError):
        sis_jax.discover(weights, out=str(tmp_path / "run"), **QUICK | {"layer": "64x64"})
    sis_jax.discover(weights, out=str(tmp_path / "run"), **QUICK)
    assert set(content(tmp_path / "run")) == LAYOUT


def test_damaged_weights_leave_nothing(tmp_path):
    from flax import nnx

    gen = fakes.tiny_stylegan2(16)
    graph, state = nnx.split(gen)
    state["synthesis"]["b8"]["conv1"]["bias"] = state["synthesis"]["b8"]["conv1"]["bias"].replace(
        np.full(8, np.nan, np.float32)
    )
    with pytest.raises(SisError, match="NaN or infinite"):
        sis_jax.discover(nnx.merge(graph, state), out=str(tmp_path / "run"), **QUICK)
    assert not list((tmp_path / "run").glob("parts/*"))


# From the shell


@pytest.fixture(scope="module")
def shell_run(tmp_path_factory):
    """The default that ships, at a small size, with warnings as errors."""
    out = tmp_path_factory.mktemp("shell") / "run"
    words = [
        "--k",
        4,
        "--layer",
        "16x16",
        "--n",
        6,
        "--n-init",
        1,
        "--max-points",
        1500,
        "--out",
        out,
    ]
    return out, words, shell(*words)


def test_the_default_from_the_shell(shell_run):
    out, _, done = shell_run
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and set(content(out)) == LAYOUT
    assert done.stdout.split() == [
        str(out / name) for name in ("parts/gallery.png", "parts/classes.json", "report.html")
    ]
    facts = json.loads((out / "parts" / "classes.json").read_text())
    assert (
        facts["generator"]["name"] == "faces64"
        and "non-commercial" in facts["generator"]["licence"]
    )
    assert len(facts["clusters"]) == 4 and facts["settings"]["layer"] == "16x16"
    assert Parts.load(out).samples.shape == (8, 64, 64, 3)


@pytest.fixture
def call(capfd, monkeypatch):
    """The command line without a new process: exit code and what it said."""
    from sis_jax.discover import discover

    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)

    def with_words(*words):
        code = cli.run(discover, list(map(str, words)))
        said = capfd.readouterr()
        assert "Traceback" not in said.err and (said.out == "" or code == 0)
        return code, said.err if code == 0 else one_line(said.err)

    return with_words


def test_resuming_from_the_shell(shell_run, call):
    out, words, _ = shell_run
    before = (out / "run.json").read_bytes()
    code, said = call(*words)
    assert (
        code == 0
        and f"{out} already holds these parts; give --overwrite" in said
        and (out / "run.json").read_bytes() == before
    )


def test_refused_from_the_shell(shell_run, call):
    out, words, _ = shell_run
    before = content(out)
    code, said = call(*words[2:], "--k", 5)
    assert code == 2 and "k=4, now asked for 5" in said and content(out) == before


def test_unknown_generator(call, tmp_path):
    code, said = call("faces46", "--out", tmp_path / "run")
    assert (
        code == 2
        and said.count("'") == 2 + 2 * 3
        and "'faces64'" in said
        and not (tmp_path / "run").exists()
    )


def test_a_folder_that_is_no_generator(call, tmp_path):
    (tmp_path / "photos").mkdir()
    code, said = call(tmp_path / "photos", "--out", tmp_path / "run")
    assert (
        code == 2
        and "config.json" in said
        and str(tmp_path / "photos") in said
        and not (tmp_path / "run").exists()
    )


def test_a_file_that_is_no_checkpoint(call, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"not a checkpoint at all")
    code, said = call(tmp_path / "weights.pt", "--out", tmp_path / "run")
    assert code in (1, 2) and "weights.pt" in said and not (tmp_path / "run").exists()


def test_a_foreign_run_folder(call, weights, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"a photo")
    code, said = call(weights, "--k", 3, "--layer", "8x8", "--out", tmp_path)
    assert code == 2 and "is not a run: it holds 'holiday.jpg'" in said
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_run_folder_that_is_a_file(call, weights, tmp_path):
    (tmp_path / "run").write_text("a file")
    code, said = call(weights, "--k", 3, "--layer", "8x8", "--out", tmp_path / "run")
    assert code == 2 and "is a file" in said


def test_a_place_that_cannot_be_written(call, weights):
    """/dev/null/run can be made by nobody, the administrator included."""
    code, said = call(weights, "--k", 3, "--layer", "8x8", "--out", "/dev/null/run")
    assert code in (1, 2) and "/dev/null" in said


@pytest.mark.parametrize(
    ("words", "keyword"),
    [(["--k", "many"], "'many'"), (["--clusters", "3"], "--clusters"), (["--method", "x"], "'x'")],
)
def test_words_that_cannot_be_read(capfd, words, keyword):
    assert cli.run(sis_jax.discover, words) == 2
    said = capfd.readouterr()
    assert keyword in said.err and said.out == "" and "Traceback" not in said.err


def test_impossible_numbers_from_the_shell(call, weights, tmp_path):
    code, said = call(weights, "--k", 1, "--layer", "8x8", "--out", tmp_path / "run")
    assert code == 2 and "k is 1, expected at least 2" in said
    code, said = call(weights, "--k", 3, "--layer", "512x512", "--out", tmp_path / "run")
    assert code == 2 and "no tap '512x512'; it has 4x4" in said


def test_dry_run_touches_nothing(capfd, weights, tmp_path):
    from sis_jax.discover import discover

    code = cli.run(
        discover,
        [str(weights), "--dry-run", "--k", "3", "--layer", "8x8", "--out", str(tmp_path / "run")],
    )
    said = capfd.readouterr().out
    assert (
        code == 0
        and "run/parts/gallery.png" in said
        and "memory" in said
        and "not estimated" not in said
        and not (tmp_path / "run").exists()
    )
