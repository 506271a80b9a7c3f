"""The work of `sis_jax.evaluate`.

This file only wires: photos and truth come from `data`, the scores from `ops.scoring.measure`,
which can be called on any pairs of arrays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sis_jax.checkpoints.student import load_student
from sis_jax.data.benchmarks import PAPER, canonical, open_benchmark
from sis_jax.data.files import plain
from sis_jax.data.ground_truth import _named_classes, open_pairs
from sis_jax.data.mask_files import read_mask
from sis_jax.ops import protocols
from sis_jax.ops.progress import progress, say
from sis_jax.ops.scoring import Segmenter, measure
from sis_jax.runs import cli
from sis_jax.runs.metrics import FOLDER, Metrics, write_summary
from sis_jax.runs.run import RunFolder
from sis_jax.types import UsageError, unknown_name

if TYPE_CHECKING:
    import numpy as np

    from sis_jax.data.ground_truth import Truth


def evaluate(
    run: str | Path | Segmenter | None = None,
    *,
    images: str | None = None,
    masks: str | None = None,
    benchmark: str | None = None,
    root: str | None = None,
    split: str | None = None,
    predictions: str | None = None,
    protocol: str = "native",
    size: int | None = None,
    classes_map: str | dict[str, Any] | None = None,
    mask_values: Literal["auto", "ids", "grey"] = "auto",
    matching: tuple[str, ...] = ("hungarian", "majority"),
    limit: int | None = None,
    batch: int = 16,
    resamples: int = 1000,
    seed: int = 0,
    out: str | None = None,
    overwrite: bool = False,
) -> Metrics:
    """As `sis_jax.evaluate`, which explains the arguments."""
    rule = protocols.get(protocol).at(size)
    _check(run, images, benchmark, root, predictions, batch)
    _check_numbers(limit, resamples, matching)
    truth = _truth(images, masks, benchmark, root, split, mask_values, rule, limit)
    for name, reason in truth.skipped[:3]:
        say(
            f"left out {name}: {reason}"
            + (f" (and {len(truth.skipped) - 3} more)" if len(truth.skipped) > 3 else "")
        )
    mapping = _read_map(classes_map)
    settings = {"matching": matching, "resamples": resamples, "seed": seed, "classes_map": mapping}
    name = "-".join(
        [
            truth.name.replace("/", "-"),
            protocol,
            *([] if size is None else [f"{size}px"]),
            *([f"first{limit}"] if limit else []),
            *(["predictions"] if predictions else []),
        ]
    )

    def work() -> Metrics:
        return _measure(run, predictions, truth, rule, batch, benchmark, name, settings)

    if not isinstance(run, str | Path) or not (Path(run) / "run.json").is_file():
        found = work()
    else:
        told = {
            "images": images,
            "masks": masks,
            "benchmark": benchmark,
            "root": root,
            "split": split,
            "predictions": predictions,
        }
        config = {
            **told,
            "protocol": protocol,
            "size": size,
            "mask_values": mask_values,
            "limit": limit,
            **settings,
        }
        found = _in_run(Path(run), name, config, work, overwrite)
    if out is not None:
        found.save(out)
    say(found.show())
    return found


def _check(
    run: Any,
    images: str | None,
    benchmark: str | None,
    root: str | None,
    predictions: str | None,
    batch: int,
) -> None:
    if (images is None) == (benchmark is None):
        got = "neither" if images is None else "both"
        raise UsageError(
            "give photos with --images (and --masks), or a test set with --benchmark and --root; "
            f"got {got}"
        )
    if benchmark is not None and root is None:
        raise UsageError(
            f"--benchmark {benchmark} needs --root, the folder it was unpacked to; nothing is "
            "downloaded"
        )
    if run is None and predictions is None:
        raise UsageError("give a RUN with a student, or --predictions with a folder of masks")
    if batch < 1:
        raise UsageError(f"batch is at least 1, got {batch}")


def _truth(
    images: str | None, masks: str | None, benchmark: str | None, root: str | None,
    split: str | None, values: Any, rule: protocols.Protocol, limit: int | None,
) -> Truth:  # fmt: skip

    if benchmark is not None:
        return open_benchmark(benchmark, str(root), split, grey_from=rule.grey_from, limit=limit)

    found = open_pairs(str(images), masks, values=values, grey_from=rule.grey_from)
    return replace(found, names=found.names[:limit])


def _read_map(given: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None or isinstance(given, Mapping):
        return None if given is None else dict(given)
    try:
        content = json.loads(
            given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8")
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--classes-map got {given!r}, which is no JSON file or text ({error}); expected "
            f'{{"hair": "hair", ...}}'
        ) from None
    if not isinstance(content, dict):
        raise UsageError(
            f'--classes-map holds a {type(content).__name__}, expected {{"predicted name": "true '
            f'name"}}'
        )
    return content


def _in_run(run: Path, name: str, config: dict[str, Any], work: Any, overwrite: bool) -> Metrics:
    """Measure as a stage of the run, or read what the same configuration measured before on the
    same student.
    """
    weights = run / "student" / "model.safetensors"
    digest = (
        hashlib.sha256(weights.read_bytes()).hexdigest()
        if weights.is_file() and config["predictions"] is None
        else ""
    )
    digest += "".join(_stamp(config[name]) for name in ("predictions", "images", "masks"))
    with RunFolder.open(run, overwrite) as folder:
        with folder.stage(
            f"evaluate {name}", config, inputs=digest, command=_command(run, config)
        ) as stage:
            if stage.done:
                say(f"{run} already holds this evaluation; give --overwrite to measure again")
            else:
                found = work()
                folder.write_json(
                    f"{FOLDER}/{name}.json",
                    plain({"name": found.name, "paper": found.paper, **found.values}),
                )
        write_summary(run)
    return Metrics.load(run, name)


def _stamp(place: str | None) -> str:
    """A digest of names, sizes and times of what lies in a folder or file, so that changed masks
    are measured again.
    """
    if place is None:
        return ""
    path = Path(place)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    rows = [
        (f.relative_to(path).as_posix(), f.stat().st_size, f.stat().st_mtime_ns)
        for f in files
        if f.is_file()
    ]
    return " " + hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def _check_numbers(limit: int | None, resamples: int, matching: tuple[str, ...]) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}, expected at least 1 image")
    if resamples < 0:
        raise UsageError(f"resamples is {resamples}, expected 0 or more")
    for name in matching:
        if name not in ("hungarian", "majority"):
            raise unknown_name("matching", name, ("hungarian", "majority"))


def _command(run: Path, config: Mapping[str, Any]) -> str:
    shown = {k: json.dumps(v) if isinstance(v, Mapping) else v for k, v in config.items()}
    return cli.command("evaluate", {"run": str(run), **shown})


def _measure(
    run: Any, predictions: str | None, truth: Truth, rule: protocols.Protocol, batch: int,
    benchmark: str | None, name: str, settings: Mapping[str, Any],
) -> Metrics:  # fmt: skip

    square = benchmark is not None and canonical(benchmark) in rule.square
    with progress(len(truth), "evaluate", "photo") as bar:
        if predictions is not None:
            classes, pairs = _from_folder(predictions, truth, square)
        else:
            student = _load(run)
            classes, pairs = student.classes, _from_student(student, truth, rule, batch, square)
        found = measure(_counted(pairs, bar), list(classes), truth.classes, rule, **settings)
    found["warnings"] += (
        [f"{len(truth.skipped)} files had no partner and were left out"] if truth.skipped else []
    )
    found["warnings"] += [truth.note] if truth.note else []
    found |= {"truth": truth.name, "licence": truth.licence, "size": rule.side}
    return Metrics(
        name, found, dict(PAPER.get((canonical(benchmark), rule.name), {})) if benchmark else {}
    )


def _counted(pairs: Iterator[Any], bar: Any) -> Iterator[Any]:
    for pair in pairs:
        yield pair
        bar.update(1)


def _load(run: Any) -> Segmenter:
    if not isinstance(run, str | Path):
        if not isinstance(run, Segmenter):
            raise UsageError(
                f"a {type(run).__name__} is no network that can be measured: expected `.classes` "
                "and `.scores(images)`"
            )
        return run

    return load_student(run)


def _from_student(
    student: Segmenter, truth: Truth, rule: protocols.Protocol, batch: int, square: bool
) -> Iterator[Any]:
    """(name, scores, mask), a batch of photos at a time."""
    for start in range(0, len(truth), batch):
        rows = [truth[i] for i in range(start, min(start + batch, len(truth)))]
        if square:
            rows = [(name, _centre(image), _centre(mask)) for name, image, mask in rows]
        scores = student.scores([rule.photo(image) for _, image, _ in rows])
        yield from (
            (name, score, mask) for (name, _, mask), score in zip(rows, scores, strict=True)
        )


def _from_folder(
    folder: str, truth: Truth, square: bool
) -> tuple[Sequence[Mapping[str, Any]], Iterator[Any]]:
    """(name, mask as predicted, true mask); a photo without a predicted mask is an error: leaving
    it out would flatter.
    """
    place = Path(folder)
    classes = _named_classes(place)
    if classes is None:
        raise UsageError(
            f"{place} has no classes.json that names the classes of its masks; give a folder that "
            "predict wrote"
        )
    missing = [n for n in truth.names if not (place / f"{Path(n).name}.png").is_file()]
    if missing:
        raise UsageError(
            f"{place} has no mask for {len(missing)} of {len(truth)} photos, the first would be "
            f"{Path(missing[0]).name}.png"
        )

    def pairs() -> Iterator[Any]:
        for name, _, mask in truth:
            predicted = read_mask(place / f"{Path(name).name}.png")
            yield (name, _centre(predicted), _centre(mask)) if square else (name, predicted, mask)

    return classes, pairs()


def _centre(picture: np.ndarray) -> np.ndarray:
    """The largest square in the middle."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]


def plan(config: dict[str, Any]) -> dict[str, Any]:
    run = config["run"]
    files = [f"{run}/metrics/*.json", f"{run}/metrics.json"] if run else []
    return {"files": files + ([config["out"]] if config["out"] else [])}


def results(found: Any, config: dict[str, Any]) -> list[Path]:
    run = Path(config["run"]) if config["run"] else None
    paths = (
        [run / "metrics" / f"{found.name}.json", run / "metrics.json"]
        if run is not None and (run / "run.json").is_file()
        else []
    )
    return paths + ([Path(config["out"])] if config["out"] else [])
