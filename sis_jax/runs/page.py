"""The report page: one HTML file made from a run folder's files. `discover` writes it at its end,
the verb `report` at any time.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from safetensors import safe_open

from sis_jax.data.edits import Edit
from sis_jax.data.files import command_of, parse_json, read_run, utf8, write_atomic
from sis_jax.data.part_summary import UNSTABLE
from sis_jax.runs import charts, cli, page_parts
from sis_jax.runs.page_images import reduced
from sis_jax.types import SisError, UsageError

_LIMIT = 5 * 1024 * 1024
_EDITED = 6  # rows of an edit's image
_EDITS_BUDGET = 1_200_000  # bytes of all edits' images together


def write_page(run: str | Path) -> Path:
    """Write RUN/report.html: parts, samples, the choice of layer and k, warnings, and how to repeat
    the run.

    The page is made from the run's files only, opens offline in any browser, and stays under 5 MB.
    A section without data is left out.

    run: the run folder, as `--out` named it.

    Returns the path of the page. Raises UsageError when the folder is no run, SisError where a file
    in it holds what no stage writes.
    """
    folder = Path(run).expanduser()
    run_record = read_run(folder)
    try:
        context = _context(folder, run_record)
        page = utf8(_render(context))
        if len(page) > _LIMIT:  # masks of noise: they are shown, but cannot be edited
            page = utf8(_render({**context, "script_data": None}))
    except SisError:
        raise
    except Exception as error:  # anything can be in a folder from elsewhere
        why = " ".join(str(error).split())[:200]
        raise SisError(
            f"the report of {folder} cannot be made, since a file in it is damaged ({why}): give "
            "the command of its stage again with --overwrite"
        ) from error
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def _render(context: Mapping[str, Any]) -> str:
    engine = jinja2.Environment(
        loader=jinja2.PackageLoader("sis_jax.runs", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    engine.filters.update(
        number=lambda v: "–" if v is None else charts.number(v),
        fixed=lambda v: "–" if v is None else f"{v:.2f}",
    )
    engine.filters.update(percent=_percent, duration=cli.duration, decibel=_decibel)
    script = files("sis_jax.runs").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    engine.globals.update(
        swatch=lambda i: Markup(charts.swatch(i)), script=Markup(script), script_digest=digest
    )
    return engine.get_template("page.html.jinja").render(context)


def _percent(value: float | int | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if value < 0.0995 else f"{100 * value:.0f} %"


def _decibel(value: float) -> str:
    """PSNR: infinite where no pixel changed, not a number where there is nothing to compare."""
    return (
        "–" if math.isnan(value) else "no pixel changed" if value == math.inf else f"{value:.1f} dB"
    )


def _context(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template shows, each entry None or empty where the run has no data for it."""
    stages = run["stages"]
    found = _json(folder / "parts" / "classes.json", dict) or {}
    levels = page_parts.levels_of(found)
    samples = page_parts.samples_of(folder / "parts" / "samples", found)
    generator = next((s["generator"] for s in stages.values() if s.get("generator")), {})
    finished = [s["finished"] for s in stages.values() if s.get("finished")]
    return {
        "title": folder.resolve().name,
        "generator": generator,
        "facts": _facts(stages),
        "commands": list(dict.fromkeys(filter(None, map(command_of, stages.values())))),
        "seconds": sum(s.get("seconds") or 0 for s in stages.values()),
        "finished": max(finished, default=""),
        "photos": _photos(folder / "photos"),
        "samples": [sample.shown() for sample in samples],
        "levels": [
            {"title": level.title, "rows": page_parts.rows_of(level, number, samples)}
            for number, level in enumerate(levels)
        ],
        "unstable_below": UNSTABLE,
        "script_data": page_parts.script_data(levels, samples),
        "apply": f"python -m sis_jax.label {shlex.quote(str(folder))} --edits edits.json",
        "gallery": None if samples else _gallery(folder / "parts" / "gallery.png"),
        "rare": _rare(folder / "parts"),
        "sweep": _sweep(_json(folder / "parts" / "sweep.json", dict)),
        "edits": _edits(folder / "edits"),
        "curves": _curves(folder / "student" / "curves.csv"),
        "confusions": _confusions(_json(folder / "metrics.json", dict)),
        "metrics": _metrics(_json(folder / "metrics.json", (dict, list))),
        "warnings": _warnings(found, generator, stages, folder),
        "stages": [_provenance(name, record) for name, record in stages.items()],
        "arrays": _arrays(folder / "parts" / "parts.safetensors"),
    }


def _facts(stages: Mapping[str, Any]) -> dict[str, Any]:
    """k, layer and device of the run: those of `discover`, else of its first stage; None where that
    stage has none.
    """
    record = stages.get("discover") or next(iter(stages.values()), {})
    config = record.get("config") or {}
    return {"k": config.get("k"), "layer": config.get("layer"), "device": record.get("device")}


def _json(path: Path, kind: Any) -> Any:
    """The content of a JSON file, None when it is missing or holds something else: the page shows
    the rest.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, kind) else None


def _photos(folder: Path) -> dict[str, Any] | None:
    """Photos with the student's masks, those of least confidence first; None where there are none,
    or the folder is not whole.
    """
    facts = _json(folder / "photos.json", dict) or {}
    notes = [n for n in facts.get("photos", []) if _is_number(n.get("confidence"))]
    notes = sorted(notes, key=lambda n: n["confidence"])
    samples = page_parts.samples_of(folder, {"samples": notes}, most=16)
    if not samples or len(samples) != len(notes):
        return None
    rows = [{"name": n.get("name", "")} | s.shown() for n, s in zip(notes, samples)]
    return {"looked_at": facts.get("looked_at", len(rows)), "rows": rows}


def _gallery(path: Path) -> dict[str, Any] | None:
    try:
        with Image.open(path) as file:
            return reduced(file.convert("RGB"), 1600, 1_500_000)
    except (OSError, ValueError):  # not there, or damaged: the page shows the rest
        return None


def _rare(folder: Path) -> dict[str, Any] | None:
    """How the rare class was found: the numbers of rare.json, and samples before and after the
    move.
    """
    facts = _json(folder / "rare.json", dict)
    numbers = ("displacement", "passing", "share_plain", "share_moved", "evidence")
    if facts is None or not all(isinstance(facts.get(key), int | float) for key in numbers):
        return None
    return {
        "facts": {"name": "Rare class", "prompt": ""} | facts,
        "sheet": _gallery(folder / "rare.png"),
    }


def _edits(folder: Path) -> list[dict[str, Any]]:
    """Every edit of the run: its first images side by side, and how well the background was kept.
    One that cannot be read is left out.
    """
    found, paths = [], sorted(folder.glob("*/edit.json"))
    for path in paths:
        try:
            e = Edit.load(path.parent)
        except UsageError:
            continue
        sheet = reduced(
            e.show(max(1, _EDITED // len(e.strengths))), 1200, _EDITS_BUDGET / len(paths)
        )
        found.append(
            {
                "name": path.parent.name,
                "direction": e.direction,
                "sheet": sheet,
                "rows": e.table(),
                **e.summary(),
            }
        )
    return found


def _sweep(sweep: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Why this layer and k: a chart of the score over k with a line per layer, a heat map of the
    consensus of layers by k, and the table.
    """
    rows = [r for r in (sweep or {}).get("rows", []) if "layer" in r and "k" in r]
    if not rows:
        return None
    shown = next(
        (
            key
            for key in ("score", "agreement", "silhouette")
            if any(r.get(key) is not None for r in rows)
        ),
        None,
    )
    layers, counts = list(dict.fromkeys(r["layer"] for r in rows)), sorted({r["k"] for r in rows})
    chosen = next((r for r in rows if r.get("chosen")), None)
    chart = heat = ""
    if shown and len(counts) > 1:
        lines = {
            layer: [
                (r["k"], r[shown]) for r in rows if r["layer"] == layer and r.get(shown) is not None
            ]
            for layer in layers
        }
        ring = [(chosen["k"], chosen[shown])] if chosen and chosen.get(shown) is not None else []
        chart = charts.line_chart_svg(
            lines, x_label="k (number of clusters)", y_label=shown, marked=ring
        )
    heated = "consensus" if any(r.get("consensus") is not None for r in rows) else shown
    if heated and len(layers) > 1:
        table = np.full((len(layers), len(counts)), math.nan)
        for r in rows:
            value = r.get(heated)
            table[layers.index(r["layer"]), counts.index(r["k"])] = (
                math.nan if value is None else value
            )
        place = (layers.index(chosen["layer"]), counts.index(chosen["k"])) if chosen else None
        mean, titles = (sweep or {}).get("layers") or {}, [f"k={k}" for k in counts]
        if mean:  # the number that decides between layers comes first
            table = np.column_stack([[mean.get(layer, math.nan) for layer in layers], table])
            titles, place = ["mean", *titles], place and (place[0], place[1] + 1)
        heat = charts.heatmap_svg(table, [str(v) for v in layers], titles, chosen=place)
    columns = [
        key
        for key in ("agreement", "consensus", "silhouette", "score")
        if any(r.get(key) is not None for r in rows)
    ]
    criterion = (sweep or {}).get("criterion", "")
    return {
        "criterion": criterion, "rows": rows, "columns": columns, "chosen": chosen,
        "chart": Markup(chart), "heat": Markup(heat), "heated": heated,
        "finer": (sweep or {}).get("finer"),
    }  # fmt: skip


def _curves(path: Path) -> list[Any]:
    """One chart per measured column of student/curves.csv over its first column."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if len(rows) < 2:
        return []
    step, *names = rows[0]
    drawn = []
    for name in names:
        points = [
            (float(r[step]), float(r[name]))
            for r in rows
            if _is_number(r[step]) and _is_number(r[name])
        ]
        if len(points) > 1:
            drawn.append(
                Markup(
                    charts.line_chart_svg(
                        {name: points}, x_label=step, y_label=name, width=420, height=220
                    )
                )
            )
    return drawn


def _is_number(text: Any) -> bool:
    try:
        return math.isfinite(float(text))
    except (TypeError, ValueError):
        return False


def _metrics(content: Any) -> list[dict[str, Any]]:
    """Rows of name, paper, ours, difference, from a list of such records or from {name: number or
    record}.
    """
    if isinstance(content, dict):
        content = content.get("metrics", content)
    if isinstance(content, dict):
        content = [
            {"name": k, **(v if isinstance(v, dict) else {"ours": v})} for k, v in content.items()
        ]
    rows = [r for r in content or [] if isinstance(r, dict) and _is_number(r.get("ours"))]
    both = [(r, _is_number(r.get("paper"))) for r in rows]
    return [
        {
            "name": r.get("name", ""),
            "ours": r["ours"],
            "paper": r["paper"] if p else None,
            "difference": r["ours"] - r["paper"] if p else None,
        }
        for r, p in both
    ]


def _confusions(content: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A heat map per evaluation: the share of each true class that was predicted as each class, in
    percent.
    """
    found = []
    for name, values in (content or {}).get("evaluations", {}).items():
        counts = np.asarray(values.get("confusion", []), np.float64)
        rows, columns = values.get("true_classes", []), values.get("predicted_classes", [])
        if counts.size and counts.shape == (len(rows), len(columns)):
            shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
            titles = [column if len(column) < 8 else f"{column[:6]}…" for column in columns]
            heat = charts.heatmap_svg(shares.round(1), rows, titles, cell=54)
            found.append({"name": name, "heat": Markup(heat)})
    return found


def _warnings(
    found: Mapping[str, Any], generator: Mapping[str, Any], stages: Mapping[str, Any], folder: Path
) -> list[str]:
    """Warnings before the result is used, each with its remedy."""
    finer = found.get("finer") or {}
    warnings = [str(w) for w in (*found.get("warnings", []), *finer.get("warnings", []))]
    background = found.get("background") or {}
    if background.get("found") is False:
        why = str(background.get("why", "")).rstrip(".")
        warnings.append(
            f"No background was found{': ' + why if why else ''}. Class 0 is empty; send parts to "
            f"it with parts.rename({{3: None}})."
        )
    if generator and generator.get("licence", "").startswith("unknown"):
        warnings.append(
            "The licence of the generator is unknown, so that of everything made with it is too. "
            "Ask whoever gave you the weights."
        )
    for name, record in stages.items():
        if record.get("state") != "done":
            warnings.append(
                f"The stage {name} did not finish: {_again(name, folder)} with the same arguments "
                "resumes it."
            )
    return list(dict.fromkeys(warnings))


def _again(stage: str, folder: Path) -> str:
    """The command of a stage: its name is its verb, for some with a word that distinguishes several
    ("evaluate celebamask-hq"), or "edits/NAME".
    """
    verb = "edit" if stage.startswith("edits/") else stage.split(" ")[0]
    where = f"--out {folder}" if verb in ("discover", "train_generator") else str(folder)
    return f"python -m sis_jax.{verb} {where}"


def _provenance(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("finished", "device", "command")
    return {
        "name": name,
        "state": record.get("state", ""),
        "seconds": record.get("seconds"),
        "config": {
            k: json.dumps(v, ensure_ascii=False) for k, v in record.get("config", {}).items()
        },
        "versions": record.get("versions", {}),
        "files": record.get("files", []),
        **{key: record.get(key, "") for key in keys},
    }


def _arrays(path: Path) -> dict[str, Any] | None:
    """The contents of parts.safetensors, and its digest."""
    if not path.exists():
        return None
    with safe_open(path, framework="np") as file:
        shapes = {
            key: " × ".join(map(str, file.get_slice(key).get_shape())) or "scalar"
            for key in file.keys()  # noqa: SIM118
        }
    return {"shapes": shapes, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
