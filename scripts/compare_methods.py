"""Every registered method on one generator, measured alike: same seeds, same student recipe, same
human masks.

    python scripts/compare_methods.py --out RUN --images photos/ --masks masks/ \\
        --blanks blanks/ --photos faces/

Each method gets RUN/<method>, a run of its own: discover, synthesize, distill, evaluate, every one
in a fresh process, so that the peak memory is its own. The table (comparison.md, comparison.json,
report.html) stands beside published numbers, which come from other images, sizes and networks:
they show the order of magnitude, not a race. A method that fails, or lacks what it needs, keeps a
row that says why. Give the command again to go on; rows that are there are kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sis_jax.runs.config import Config

# CelebAMask-HQ, DeepLabV3 trained on images of FFHQ's generator: IoU of foreground, background,
# their mean, mean in a border of 3 pixels, labels used; as Feng et al. 2023 (CVPR) report them for
# all methods.
PUBLISHED: dict[str, tuple[str, float, float, float, float, str]] = {
    "segmentation_in_style": (
        "Segmentation in Style, 50 + 15k images",
        0.92,
        0.80,
        0.86,
        0.39,
        "0 (clusters chosen by hand)",
    ),
    "labels4free": ("Labels4Free", 0.92, 0.82, 0.87, 0.41, "0"),
    "style_mixing": ("Feng et al. 2023", 0.92, 0.82, 0.87, 0.42, "0"),
    "datasetgan": ("DatasetGAN", 0.90, 0.79, 0.84, 0.41, "16"),
    "supervised": ("U-Net, human masks", 0.95, 0.87, 0.91, 0.49, "1000"),
}
SCORES = ("iou_foreground", "iou_background", "mean_iou", "border_mean_iou")
SMOKE = {"n": 64, "steps": 20, "limit": 8}


@dataclass(frozen=True)
class Job:
    """What all methods share."""

    gen: str | None
    out: Path
    images: str
    masks: str | None
    blanks: str | None
    photos: str | None
    n: int
    steps: int
    limit: int | None
    seed: int
    settings: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class CompareConfig(Config):
    """What decides the rows."""

    verb: ClassVar[str] = "compare"

    gen: str | None
    images: str
    masks: str | None
    seed: int
    settings: dict[str, dict[str, Any]]
    n: int
    steps: int
    limit: int | None

    def command(self) -> str:
        return " ".join(["python", *sys.argv])


def compare(
    out: str,
    images: str,
    masks: str | None = None,
    gen: str | None = None,
    methods: tuple[str, ...] = (),
    blanks: str | None = None,
    photos: str | None = None,
    n: int = 4000,
    steps: int = 1000,
    limit: int | None = None,
    seed: int = 0,
    settings: str = "{}",
    smoke: bool = False,
    overwrite: bool = False,
) -> Path:
    """Compare methods; returns the table's path.

    Args:
        out: Run folder for the table and one run per method.
        images: Photos to measure on, a folder or an .npz that also holds the masks.
        masks: Their human masks.
        gen: Generator; the default one ships with the library.
        methods: Names; all that are registered where none is given.
        blanks: Painted samples for methods that learn from some.
        photos: Unlabelled photos for methods that want some.
        n: Generated images per method.
        steps: Of every student's training.
        limit: Measure on the first so many photos.
        seed: Of every stage.
        settings: JSON, {"method": {"setting": value}}.
        smoke: A few images and steps, to see that everything runs.
        overwrite: Throw away the rows and runs that are there.
    """
    from sis_jax.methods.base import METHODS
    from sis_jax.runs.page import write_page
    from sis_jax.runs.run import RunFolder
    from sis_jax.types import UsageError, unknown_name

    small = SMOKE if smoke else {"n": n, "steps": steps, "limit": limit}
    try:
        own = json.loads(settings)
    except ValueError as error:
        raise UsageError(
            f'settings is {settings!r}, expected JSON such as {{"segmentation_in_style": {{"k": '
            f"9}}}} ({error})"
        ) from None
    for name in (*methods, *own):
        if name not in METHODS:
            raise unknown_name("method", name, METHODS)
    job = Job(gen, Path(out), images, masks, blanks, photos, seed=seed, settings=own, **small)
    chosen = methods or tuple(METHODS)
    config = CompareConfig(gen, images, masks, seed, own, **small)
    with RunFolder.open(out, overwrite) as run, run.stage(config, again=True) as stage:
        rows = [] if overwrite or not stage.resumed else _read(run.path / "comparison.json")
        for name in chosen:
            if any(r["method"] == name and not r["note"] for r in rows):
                continue
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows = [r for r in rows if r["method"] != name] + [measure(name, job, overwrite)]
            rows.sort(key=lambda r: list(METHODS).index(r["method"]))
            run.write_json("comparison.json", {"rows": rows, "published": PUBLISHED})
            run.write_bytes("comparison.md", table(rows).encode())
            run.write_json("metrics.json", {"metrics": summary(rows)})
    write_page(out)
    print(table(rows), file=sys.stderr)
    return job.out / "comparison.md"


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def measure(name: str, job: Job, overwrite: bool = False) -> dict[str, Any]:
    """One method through all stages: its row; "note" says why there are no numbers."""
    row: dict[str, Any] = {
        "method": name,
        "labels": None,
        **dict.fromkeys(SCORES),
        "find_seconds": None,
        "seconds": None,
        "peak_bytes": None,
    }
    try:
        flags, labels = given(name, job)
    except Exception as error:  # one method must not stop the others
        return row | {"note": f"skipped: {error}"}
    run = str(job.out / name)
    seed, again = ["--seed", str(job.seed)], ["--overwrite"] if overwrite else []
    masks = ["--masks", job.masks] if job.masks else []
    stages = {
        "discover": [
            *([job.gen] if job.gen else []),
            "--method",
            name,
            "--out",
            run,
            *flags,
            *seed,
        ],
        "synthesize": [run, "--n", str(job.n), "--seed", str(job.seed + 1)],
        "distill": [run, "--binary", "--steps", str(job.steps), *seed],
        "evaluate": [
            run,
            "--images",
            job.images,
            *masks,
            *(["--limit", str(job.limit)] if job.limit else []),
        ],
    }
    for verb, words in stages.items():
        code, peak, told = started(
            [sys.executable, "-m", f"sis_jax.{verb}", *words, *again, "--quiet"]
        )
        if verb == "discover":
            row["peak_bytes"] = peak
        if code:
            return row | {"note": f"{verb} failed: {told}"}
    return row | {"labels": labels, "note": ""} | _numbers(Path(run))


def given(name: str, job: Job) -> tuple[list[str], int]:
    """Flags of `discover` for this method, and how many labelled images it learns from.
    ValueError where something it needs was not given.
    """
    import dataclasses

    from sis_jax import methods

    cls = methods.get(name)
    fields, labels = {f.name for f in dataclasses.fields(cls) if f.init}, 0
    values = dict(job.settings.get(name, {}))
    if "annotated" in cls.wants:
        if job.blanks is None:
            raise ValueError("it learns from annotated samples, give --blanks")
        from sis_jax.data.blanks import read_blanks

        labels = int((read_blanks(job.blanks).masks != 255).any((1, 2)).sum())
        values.setdefault("masks", job.blanks)
    if "photos" in fields and job.photos is not None:
        values.setdefault("photos", job.photos)
    words = []
    for key, value in values.items():
        flag = key.replace("_", "-")
        words += (
            [f"--{'' if value else 'no-'}{flag}"]
            if isinstance(value, bool)
            else [f"--{flag}", str(value)]
        )
    return words, labels


def started(command: list[str]) -> tuple[int, int, str]:
    """Run a process: exit code, peak of its resident memory in bytes, and the last line it said.

    On Linux the peak is at least what this process holds when it forks, which is little as long as
    no JAX array is made here.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with process.stderr as said:
        told = said.read().strip()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return (
        process.returncode,
        used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        told.splitlines()[-1] if told else "",
    )


def _numbers(run: Path) -> dict[str, Any]:
    """What the run's files say: scores of the student on photos, seconds of every stage."""
    from sis_jax.data.files import read_run
    from sis_jax.runs.metrics import Metrics

    stages = read_run(run)["stages"]
    found = Metrics.load(run)
    seconds = [s.get("seconds") or 0 for s in stages.values()]
    scores = {key: float(found[f"foreground.{key}"]) for key in SCORES}
    return {
        **scores,
        "find_seconds": stages["discover"]["seconds"],
        "seconds": round(sum(seconds), 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: ours, then published numbers."""
    from sis_jax.runs.cli import byte_size, duration

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    head = (
        "| method | IoU fg | IoU bg | mean | border, 3 px | labels | finding parts | all stages | "
        "peak memory |\n|---|---|---|---|---|---|---|---|---|"
    )
    lines = ["# Methods on one generator, students on the same photos", "", head]
    for r in rows:
        cells = [number(r[key]) for key in SCORES] + [
            "–" if r["labels"] is None else str(r["labels"])
        ]
        cells += [
            "–" if r[key] is None else duration(r[key]) for key in ("find_seconds", "seconds")
        ]
        cells += ["–" if r["peak_bytes"] is None else byte_size(r["peak_bytes"])]
        lines.append(f"| {r['method']} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {r['method']}: {r['note']}" for r in rows if r["note"])]
    lines += [
        "",
        "Published, CelebAMask-HQ, after Feng et al. 2023 (other generator, size and student):",
        "",
    ]
    lines += [
        "| method | IoU fg | IoU bg | mean | border, 3 px | labels |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {title} | {' | '.join(f'{v:.2f}' for v in scores)} | {labels} |"
        for title, *scores, labels in PUBLISHED.values()
    ]
    return "\n".join(lines) + "\n"


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same numbers as the report reads them: name, ours, paper."""
    told = dict(
        zip(
            SCORES,
            ("foreground IoU", "background IoU", "mean IoU", "mean IoU in a border of 3 pixels"),
        )
    )
    return [
        {
            "name": f"{r['method']}: {told[key]}",
            "ours": r[key],
            "paper": PUBLISHED[r["method"]][1 + i] if r["method"] in PUBLISHED else None,
        }
        for r in rows
        for i, key in enumerate(SCORES)
        if r[key] is not None
    ]


if __name__ == "__main__":
    import tyro

    from sis_jax.types import SisError

    try:
        print(tyro.cli(compare))
    except SisError as error:
        print(f"compare_methods: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
