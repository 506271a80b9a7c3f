"""The work of `sis_jax.evaluate`: connects photos, ground truth and `ops.scoring.measure`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax import parallel
from sis_jax.checkpoints.student import load_student
from sis_jax.data.benchmarks import PAPER, canonical, open_benchmark
from sis_jax.data.files import parse_json, plain
from sis_jax.data.ground_truth import GroundTruth, _named_classes, open_pairs
from sis_jax.data.mask_files import read_mask
from sis_jax.ops import protocols
from sis_jax.ops.progress import progress, say
from sis_jax.ops.scoring import Segmenter, measure
from sis_jax.runs.configs.evaluate import EvaluateConfig
from sis_jax.runs.metrics import FOLDER, Metrics, write_summary
from sis_jax.runs.run import RunFolder
from sis_jax.types import UsageError, unknown_name


def evaluate(config: EvaluateConfig) -> Metrics:
    """As `sis_jax.evaluate`, which explains the configuration."""
    stored = isinstance(config.run, str | Path) and (Path(config.run) / "run.json").is_file()
    return parallel.by_turns(_work, config, stored)


def _work(config: EvaluateConfig) -> Metrics:
    rule = protocols.get(config.measure.protocol).at(config.measure.size)
    _check(config)
    gt = _ground_truth(config, rule)
    for name, reason in gt.skipped[:3]:
        more = f" (and {len(gt.skipped) - 3} more)" if len(gt.skipped) > 3 else ""
        say(f"left out {name}: {reason}{more}")
    classes_map = _read_map(config.measure.classes_map)
    resolved = replace(config, measure=replace(config.measure, classes_map=classes_map))
    if isinstance(config.run, str | Path) and (Path(config.run) / "run.json").is_file():
        found = _in_run(Path(config.run), resolved, config, gt, rule)
    else:
        found = _measure(resolved, gt, rule)
    if config.out is not None:
        found.save(config.out)
    say(found.show())
    return found


def _name(config: EvaluateConfig, gt: GroundTruth) -> str:
    """The name of the file of metrics: the measurement and its settings."""
    size, limit = config.measure.size, config.truth.limit
    return "-".join(
        [
            gt.name.replace("/", "-"),
            config.measure.protocol,
            *([] if size is None else [f"{size}px"]),
            *([f"first{limit}"] if limit else []),
            *(["predictions"] if config.predictions else []),
        ]
    )


def _check(config: EvaluateConfig) -> None:
    given = config.truth
    if (given.images is None) == (given.benchmark is None):
        got = "neither" if given.images is None else "both"
        raise UsageError(
            "give photos with --images (and --masks), or a test set with --benchmark and --root; "
            f"got {got}"
        )
    if given.benchmark is not None and given.root is None:
        raise UsageError(
            f"--benchmark {given.benchmark} needs --root, the folder it was unpacked to; nothing "
            "is downloaded"
        )
    if config.run is None and config.predictions is None:
        raise UsageError("give a RUN with a student, or --predictions with a folder of masks")
    if config.batch < 1:
        raise UsageError(f"batch is at least 1, got {config.batch}")
    if given.limit is not None and given.limit < 1:
        raise UsageError(f"limit is {given.limit}, expected at least 1 image")
    if config.measure.resamples < 0:
        raise UsageError(f"resamples is {config.measure.resamples}, expected 0 or more")
    for name in config.measure.matching:
        if name not in ("hungarian", "majority"):
            raise unknown_name("matching", name, ("hungarian", "majority"))


def _ground_truth(config: EvaluateConfig, rule: protocols.Protocol) -> GroundTruth:
    given = config.truth
    if given.benchmark is not None:
        return open_benchmark(
            given.benchmark,
            str(given.root),
            given.split,
            grey_from=rule.grey_from,
            limit=given.limit,
        )
    found = open_pairs(
        str(given.images), given.masks, values=given.mask_values, grey_from=rule.grey_from
    )
    return replace(found, names=found.names[: given.limit])


def _read_map(given: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if given is None or isinstance(given, Mapping):
        return None if given is None else dict(given)
    try:
        content = parse_json(
            given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8")
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--classes-map got {given!r}, which is no JSON file or text ({error}); expected "
            f'{{"hair": "hair", ...}}'
        ) from None
    if not isinstance(content, dict):
        raise UsageError(
            f'--classes-map holds a {type(content).__name__}, expected {{"predicted name": "name '
            f'in the ground truth"}}'
        )
    return content


def _in_run(
    run: Path,
    config: EvaluateConfig,
    given: EvaluateConfig,
    gt: GroundTruth,
    rule: protocols.Protocol,
) -> Metrics:
    """Measure as a stage of the run, or read the numbers of the same configuration and student."""
    name = _name(config, gt)
    with RunFolder.open(run, config.overwrite) as folder:
        with folder.stage(
            config, given=given, name=f"evaluate {name}", inputs=_digest(run, config)
        ) as stage:
            if not stage.done:
                found = _measure(config, gt, rule)
                folder.write_json(
                    f"{FOLDER}/{name}.json",
                    plain({"name": found.name, "paper": found.paper, **found.values}),
                )
        write_summary(run)
    return Metrics.load(run, name)


def _digest(run: Path, config: EvaluateConfig) -> str:
    """Of the student and of the folders, so that a change of either is measured again."""
    weights = run / "student" / "model.safetensors"
    known = weights.is_file() and config.predictions is None
    student = hashlib.sha256(weights.read_bytes()).hexdigest() if known else ""
    folders = (config.predictions, config.truth.images, config.truth.masks)
    return student + "".join(map(_stamp, folders))


def _stamp(place: str | None) -> str:
    """A digest of names, sizes and times of the files in a folder, or of one file."""
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


def _measure(config: EvaluateConfig, gt: GroundTruth, rule: protocols.Protocol) -> Metrics:
    """config: resolved."""
    benchmark, how = config.truth.benchmark, config.measure
    assert not isinstance(how.classes_map, str)
    square = benchmark is not None and canonical(benchmark) in rule.square
    if config.predictions is not None:
        classes, pairs = _from_folder(config.predictions, gt, square)
    else:
        student = _load(config.run)
        pairs = _from_student(student, gt, rule, config.batch, square)
        classes = student.classes
    # An iterator: a bar looks like a list, from which a checker of types would read, and lose, one.
    shown = iter(progress(len(gt), "evaluate", "photo", pairs))
    found = measure(
        shown, list(classes), gt.classes, rule,
        matching=how.matching, resamples=how.resamples, seed=how.seed, classes_map=how.classes_map,
    )  # fmt: skip
    if gt.skipped:
        found["warnings"].append(f"{len(gt.skipped)} files had no partner and were left out")
    found["warnings"] += [gt.note] if gt.note else []
    found |= {"truth": gt.name, "licence": gt.licence, "size": rule.size}
    paper = PAPER.get((canonical(benchmark), rule.name), {}) if benchmark else {}
    return Metrics(_name(config, gt), found, dict(paper))


def _load(run: Any) -> Segmenter:
    if isinstance(run, str | Path):
        return load_student(run)
    if not isinstance(run, Segmenter):
        raise UsageError(
            f"a {type(run).__name__} is no network that can be measured: expected `.classes` and "
            "`.scores(images)`"
        )
    return run


def _from_student(
    student: Segmenter, gt: GroundTruth, rule: protocols.Protocol, batch: int, square: bool
) -> Iterator[Any]:
    """(name, scores, mask), a batch of photos at a time."""
    for start in range(0, len(gt), batch):
        rows = [gt[i] for i in range(start, min(start + batch, len(gt)))]
        if square:
            rows = [(name, _centre(image), _centre(mask)) for name, image, mask in rows]
        scores = student.scores([rule.photo(image) for _, image, _ in rows])
        yield from (
            (name, score, mask) for (name, _, mask), score in zip(rows, scores, strict=True)
        )


def _from_folder(
    folder: str, gt: GroundTruth, square: bool
) -> tuple[Sequence[Mapping[str, Any]], Iterator[Any]]:
    """(name, predicted mask, ground truth); a photo without a prediction is an error."""
    place = Path(folder)
    classes = _named_classes(place)
    if classes is None:
        raise UsageError(
            f"{place} has no classes.json that names the classes of its masks; give a folder that "
            "predict wrote"
        )
    missing = [n for n in gt.names if not (place / f"{Path(n).name}.png").is_file()]
    if missing:
        raise UsageError(
            f"{place} has no mask for {len(missing)} of {len(gt)} photos, the first would be "
            f"{Path(missing[0]).name}.png"
        )

    def pairs() -> Iterator[Any]:
        for name, _, mask in gt:
            predicted = read_mask(place / f"{Path(name).name}.png")
            yield (name, _centre(predicted), _centre(mask)) if square else (name, predicted, mask)

    return classes, pairs()


def _centre(image: np.ndarray) -> np.ndarray:
    """The largest square in the middle."""
    height, width = image.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return image[top : top + edge, left : left + edge]


def plan(config: EvaluateConfig) -> dict[str, Any]:
    run = config.run
    files = [f"{run}/metrics/*.json", f"{run}/metrics.json"] if run else []
    return {"files": files + ([config.out] if config.out else [])}


def results(found: Metrics, config: EvaluateConfig) -> list[Path]:
    run = Path(config.run) if isinstance(config.run, str | Path) else None
    paths = [] if config.out is None else [Path(config.out)]
    if run is None or not (run / "run.json").is_file():
        return paths
    return [run / "metrics" / f"{found.name}.json", run / "metrics.json", *paths]


def summary(found: Metrics, config: EvaluateConfig) -> list[str]:
    row = next(row for row in found.rows() if row["name"].endswith("foreground and background"))
    span = "" if row["low"] is None else f" ({row['low']:.3f} to {row['high']:.3f}, 95 %)"
    return [f"{row['name']} on {found.values['images']} photos: {row['ours']:.3f}{span}"]
