"""What a stage says at its end: what was found, how reliable it is, the next command."""

from dataclasses import replace

import parts_kit

from sis_jax.data.part_summary import summary_of
from sis_jax.label import label
from sis_jax.runs import cli


def test_parts():
    assert summary_of(parts_kit.quarters()) == [
        "4 parts: part 1 40%, part 2 30%, part 3 20%, part 4 10%; background 50%",
        "other seeds find the same parts (agreement 0.90 or more)",
    ]
    assert summary_of(parts_kit.two_levels())[1].startswith(
        "in it, 5 parts: part 1.1 30%, part 1.2"
    )


def test_what_is_unstable_unnamed_or_missing():
    parts = parts_kit.quarters()
    clusters = (parts.clusters[0], parts.clusters[1] | {"agreement": 0.41}, *parts.clusters[2:])
    named = parts.classes[2] | {"unsure": True, "guess": "hat"}
    classes = (parts.classes[1], named, *parts.classes[3:])
    assert summary_of(replace(parts, clusters=clusters, classes=classes)) == [
        "4 parts: part 1 40%, part 2 30%, part 3 20%, part 4 10%; no background was found",
        "other seeds find other outlines of part 1 (0.41) (agreement below 0.7)",
        "no text fits part 2 (hat?)",
    ]
    two = parts_kit.two_levels()
    below = tuple(c | {"unsure": c["id"] == 3, "guess": "ear"} for c in two.finer.classes)
    finer = replace(two.finer, classes=below)
    assert summary_of(replace(two, finer=finer))[-1] == f"no text fits {finer.names[3]} (ear?)"


def test_many_parts_are_counted():
    parts = parts_kit.quarters()
    classes = tuple(parts.classes[1] | {"id": i, "name": f"p{i}"} for i in range(1, 10))
    line = summary_of(replace(parts, classes=classes))[0]
    assert line.startswith("9 parts: p1 40%") and "p6 40% and 3 more" in line and "p7" not in line


def test_the_command_says_what_is_next(tmp_path, capfd):
    run = parts_kit.write_run(parts_kit.quarters(), tmp_path / "my run")
    (tmp_path / "edits.json").write_text('{"format": 1, "levels": {"0": {"1": "hair"}}}')
    words = [str(run), "--edits", str(tmp_path / "edits.json")]
    assert cli.run(label, words) == 0
    out, err = capfd.readouterr()
    assert "4 parts: hair 40%" in err and "hair" not in out
    assert f"next: python -m sis_jax.synthesize '{run}' --n 10000" in err
    assert cli.run(label, [*words, "--quiet"]) == 0
    assert "next:" not in capfd.readouterr().err
