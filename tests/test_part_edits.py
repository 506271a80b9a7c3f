"""edits.json: its form, what it does to parts, and `label RUN --edits`."""

import json

import numpy as np
import parts_kit
import pytest

from sis_jax.data.part_edits import PartEdits, read_edits, state_of
from sis_jax.data.parts import Parts
from sis_jax.label import label
from sis_jax.runs import cli
from sis_jax.types import UsageError

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def parts():
    """Background, and parts 1 to 4, the clusters 1 to 4."""
    return parts_kit.quarters()


@pytest.fixture
def run(parts, tmp_path):
    return parts_kit.write_run(parts, tmp_path / "run")


def edits(names, level="0", **more):
    return {"format": 1, "levels": {level: {str(k): v for k, v in names.items()}}} | more


def test_edits_do_what_rename_does(parts):
    names = {1: "hair", 2: None, 3: "hair"}
    made = label(parts, edits=edits(names))
    assert made.classes == parts.rename(names).classes
    assert made.names == {0: "background", 1: "hair", 4: "part 4"}


def test_levels_are_edited_apart():
    """The finer level follows the coarse one, and is then edited by its own ids."""
    parts = parts_kit.two_levels()
    assert parts.finer.names[1] == "part 1.1"
    names = {"0": {"1": "hair", "4": None}, "1": {"2": "ear", "3": "ear", "4": None}}
    content = {"format": 1, "parts": state_of(parts), "levels": names}
    made = read_edits(content).apply(parts)
    assert made.names == {0: "background", 1: "hair", 2: "part 2", 3: "part 3"}
    assert made.finer.names == {0: "background", 1: "hair 1", 2: "ear"}
    assert {c["id"]: c["clusters"] for c in made.finer.classes} == {0: [0, 4, 5], 1: [1], 2: [2, 3]}
    later = made.rename({1: "head"})  # what was sent to the background stays there
    assert later.finer.names == {0: "background", 1: "head", 2: "ear"}
    assert later.finer.classes[0]["clusters"] == [0, 4, 5]
    assert state_of(made) != state_of(parts.rename({1: "hair", 4: None}))


def test_a_file_is_read_as_its_content(parts, tmp_path):
    content = edits({1: EVIL, 3: None}, parts=state_of(parts))
    (tmp_path / "edits.json").write_text(json.dumps(content))
    found = read_edits(tmp_path / "edits.json")
    assert found == read_edits(content) == PartEdits({0: {1: EVIL, 3: None}}, content["parts"])
    assert read_edits(json.loads(found.dump())) == found
    assert found.apply(parts).names[1] == EVIL


def test_edits_of_other_parts_are_refused(parts):
    known = read_edits(edits({1: "hair"}, parts=state_of(parts)))
    with pytest.raises(UsageError, match=r"made for other parts, or are applied already"):
        known.apply(known.apply(parts))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([], "holds no edits of parts"),
        ({"format": 1}, "holds no edits of parts"),
        ({"format": 1, "levels": []}, "holds no edits of parts"),
        ({"format": 1, "levels": {}}, "changes no part"),
        ({"format": 1, "levels": {"0": {}}}, "changes no part"),
        ({"format": 2, "levels": {"0": {"1": "a"}}}, "has the format 2, this sis_jax reads 1"),
        ({"format": True, "levels": {"0": {"1": "a"}}}, "has the format True"),
        ({"format": 1, "levels": {"0": []}}, r"level 0 of .* is \[\], expected names by class id"),
        (edits({1: "a"}, level="-1"), "names the level '-1', expected a number"),
        (edits({1: "a"}, level="²"), "names the level '.xb2', expected a number"),
        (edits({"1.0": "a"}), r"names the part '1\.0', expected a number"),
        (edits({"01": "a"}), "names the part '01', expected a number"),
        (edits({"9" * 5000: "a"}), "names the part '9999.*, expected a number"),
        (edits({1: 7}), "part 1 of level 0 .* is called 7, expected a name, or null"),
        (edits({1: " "}), "is called ' ', expected a name, or null"),
        (edits({1: ["hair"]}), r"is called \['hair'\], expected a name"),
        (edits({1: "a\nb"}), "expected at most 200 printable characters"),
        (edits({1: "\ud800"}), "expected at most 200 printable characters"),
        (edits({1: "a" * 201}), "expected at most 200 printable characters"),
        (edits({1: "a"}, parts=3), "has parts = 3, expected a fingerprint"),
        (edits({1: "a"}, run="x"), "has the field 'run'"),
        (edits({1: "a"}, level="1"), "name level 1, and these parts have level 0"),
        (edits({9: "a"}), r"there is no part 9; there are 0 \(background\), 1 \(part 1\)"),
    ],
)
def test_what_is_no_edit_is_refused_by_name(parts, tmp_path, content, complaint):
    (tmp_path / "edits.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=complaint):
        label(parts, edits=tmp_path / "edits.json")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe{", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b" " * 1_000_001, "has more than 1000000 bytes"),
        (b'{"format": 1, "levels": {"0": {"1": "a", "1": "b"}}}', "has the key '1' twice"),
        (None, "there is no file .*edits.json"),
    ],
)
def test_files_that_are_no_json(parts, tmp_path, data, complaint):
    if data is not None:
        (tmp_path / "edits.json").write_bytes(data)
    with pytest.raises(UsageError, match=complaint):
        label(parts, edits=str(tmp_path / "edits.json"))


def test_a_run_is_edited_twice(run, parts, tmp_path, capfd):
    """Each file is a stage of its own; the same one again changes nothing."""
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    renamed = parts.rename({1: "hair"})
    contents = [
        edits({1: "hair"}, parts=state_of(parts)),
        edits({2: None, 3: "hair"}, parts=state_of(renamed)),
    ]
    for path, content in zip(paths, contents):
        path.write_text(json.dumps(content))
        assert cli.run(label, [str(run), "--edits", str(path)]) == 0
        assert capfd.readouterr().out.split()[1] == str(run / "parts" / "edits.json")
    found = Parts.load(run)
    assert found.classes == renamed.rename({2: None, 3: "hair"}).classes
    np.testing.assert_array_equal(found.arrays["centers"], parts.arrays["centers"])
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert list(stages) == ["discover", "label edits 1", "label edits 2"]
    assert stages["label edits 2"]["config"]["edits"]["levels"] == contents[1]["levels"]
    assert f"label {run} --edits {paths[1]}" in (run / "report.html").read_text()

    before = (run / "run.json").read_bytes(), (run / "parts" / "classes.json").read_bytes()
    assert cli.run(label, [str(run), "--edits", str(paths[1])]) == 0
    assert "already has the names" in capfd.readouterr().err
    assert before == (
        (run / "run.json").read_bytes(), (run / "parts" / "classes.json").read_bytes()
    )  # fmt: skip
    assert cli.run(label, [str(run), "--edits", str(paths[0])]) == 2
    assert "applied already" in capfd.readouterr().err


def test_an_application_that_was_killed_is_completed(run, parts, monkeypatch):
    """Before classes.json is written the parts are the old ones, after it they are the new ones."""
    from sis_jax.stages import label as stage

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "write_page", kill)
    monkeypatch.setattr(stage, "write_atomic", kill)
    with pytest.raises(KeyboardInterrupt):
        label(run, edits=edits({1: "hair"}))
    assert Parts.load(run).classes == parts.classes
    monkeypatch.undo()
    assert label(run, edits=edits({1: "hair"})).names[1] == "hair"
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert {name: record["state"] for name, record in stages.items()} == {
        "discover": "done", "label edits 1": "done"
    }  # fmt: skip


def test_a_request_that_cannot_work_leaves_the_run_alone(run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="there is no part 9"):
        label(run, edits=edits({9: "hair"}))
    with pytest.raises(UsageError, match="takes no --ontology: leave one of them out"):
        label(run, "faces", edits=edits({1: "hair"}))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_dry_run(run, tmp_path, capfd):
    (tmp_path / "edits.json").write_text(json.dumps(edits({1: "hair"})))
    assert cli.run(label, [str(run), "--edits", str(tmp_path / "edits.json"), "--dry-run"]) == 0
    assert f"{run}/parts/edits.json" in capfd.readouterr().out
    assert Parts.load(run).names[1] == "part 1"
