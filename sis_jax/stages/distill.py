"""The work of `sis_jax.distill`: a small network learns generated images and their masks.

Segmentation in Style, section 3.3; `recipe="paper"` is the published setting (ResNet-18 at output
stride 8, 1000 steps of 15 images at 128 pixels, Adam 1e-4 with poly decay, no augmentation). Where
the default differs, and why:
* a U-Net on a small pretrained backbone that is fast on CPUs, AdamW with a cosine, an average;
* images are varied in place, colour, blur and noise, and other backgrounds are put behind some: a
  teacher that clusters features confuses parts of like colour;
* images whose mask hardly holds background are left out (`trim`), pixels are weighted by the
  teacher's confidence (`weighting`);
* with photos, the student adapts to them (`stages/train_student.py`), if that makes it more stable.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from sis_jax import parallel
from sis_jax.checkpoints import catalogue
from sis_jax.checkpoints.backbones import load_backbone
from sis_jax.checkpoints.student import mirrored
from sis_jax.data import draw
from sis_jax.data.decode import CROPS
from sis_jax.data.files import check_folder, read_run
from sis_jax.data.folder import Dataset, Example
from sis_jax.data.ground_truth import open_pairs
from sis_jax.data.pairs import IGNORE, Pairs, labelled
from sis_jax.data.parts import Parts, no_parts
from sis_jax.data.photo_files import list_source
from sis_jax.data.photos import Photos, own_side
from sis_jax.data.threads import cores
from sis_jax.models import backbones, students
from sis_jax.ops.progress import progress, say
from sis_jax.ops.sampling import probe, sample_seeds
from sis_jax.ops.student_augment import ALIGNED, NONE, WEAK, Augmentation
from sis_jax.runs.config import without
from sis_jax.runs.configs.distill import RECIPES, DistillConfig
from sis_jax.runs.run import RunFolder, Stage
from sis_jax.stages import budget
from sis_jax.stages.budget import Sizes, Speeds
from sis_jax.stages.speeds import of_student
from sis_jax.stages.student import Student, load_student
from sis_jax.stages.teacher import Teacher
from sis_jax.stages.train_student import VALIDATED, VIEWS_PER_PHOTO, Job, StudentTraining
from sis_jax.training.self_training import VIEWS
from sis_jax.training.student import Recipe
from sis_jax.types import SisError, UsageError, unknown_name

MOST_SIDE = 256  # pixels, unless asked for: 32 images take 4 GB, 16 of 512 pixels and 66 of 1024
_CORRECTED = 0.03  # seconds to correct the mask of a photo
_LEAST = {
    **dict.fromkeys(("batch", "rows", "limit", "snapshot"), 1),
    **dict.fromkeys(("side", "weight_decay", "background", "trim", "weighting", "ema"), 0),
    **dict.fromkeys(("adapt_steps", "rounds", "minutes", "seed"), 0),
    "n": 2,
}
_BELOW = {"trim": 1, "ema": 1, "background": 1.0001}


def distill(config: DistillConfig) -> Student:
    """As `sis_jax.distill`, which explains the configuration."""
    return parallel.by_turns(_work, config)


def _work(config: DistillConfig) -> Student:
    resolved = resolve(config)
    _check(resolved)
    place, source = _places(resolved)
    resolved = _with_level(resolved, source)
    with RunFolder.open(place, config.overwrite) as run:
        inputs = _inputs(source, config.source.fly) | _weights_read(config)
        given = replace(config, data=None if source is None else str(source))
        with run.stage(resolved, given=given, inputs=inputs) as stage:
            if not stage.done:
                if not stage.resumed:
                    shutil.rmtree(run.path / "student", ignore_errors=True)
                stage.record |= _train(resolved, source, run, stage)
                stage.files += [f"student/{name}" for name in ("config.json", "model.safetensors")]
    return load_student(place)


def resolve(config: DistillConfig) -> DistillConfig:
    """The configuration with the recipe's values in place of None."""
    if config.recipe not in RECIPES:
        raise unknown_name("recipe", config.recipe, RECIPES)
    recipe = RECIPES[config.recipe]

    def filled(group: Any) -> Any:
        missing = [k for k, v in vars(group).items() if v is None and k in recipe]
        return replace(group, **{k: recipe[k] for k in missing})

    train = filled(config.train)
    if config.adapt.teacher and config.data is None and config.source.images is None:
        train = replace(train, steps=0)  # there is nothing but photos
    return replace(
        config,
        network=filled(config.network),
        train=train,
        augmentation=filled(config.augmentation),
        adapt=filled(config.adapt),
    )


def _check(config: DistillConfig) -> None:
    net, train, source = config.network, config.train, config.source
    least = _LEAST | {"steps": 0 if net.start_from or config.adapt.teacher else 1}
    for name, value in config.flat().items():
        if name in least and value is not None:
            below = _BELOW.get(name, float("inf"))
            if not least[name] <= value < below:
                most = f" and below {below:g}" if name in _BELOW else ""
                raise UsageError(f"{name} is {value}, expected at least {least[name]}{most}")
    students.StudentConfig(net.student, 2, net.width, net.block or 2)
    if not 0 < train.learning_rate < float("inf"):
        raise UsageError(
            f"learning_rate is {train.learning_rate}, expected a number above 0 (0.001 is the "
            "default)"
        )
    if train.side and (train.side < 16 or train.side % 16):
        raise UsageError(
            f"side is {train.side}, expected a multiple of 16, or 0 for the generator's"
        )
    if source.masks and not source.images:
        raise UsageError("--masks needs --images, the photos they belong to")
    adapt = config.adapt
    if adapt.teacher and not config.photos:
        raise UsageError("--teacher needs --photos, which it labels")
    if adapt.alike and not (config.photos and (config.data is not None or source.images)):
        raise UsageError("--alike compares --photos with the images of a RUN: give both")
    if not (
        train.steps or net.start_from or (config.photos and adapt.rounds and adapt.adapt_steps)
    ):
        raise UsageError("there is nothing to learn: give --steps, or --photos and --rounds")
    if net.start_from and net.backbone:
        raise UsageError("--start-from brings its own backbone: leave out --backbone")
    if source.images is None and config.data is None and not config.adapt.teacher:
        raise UsageError(
            "give a RUN (or a data folder) to learn from, --photos and --teacher, or --images and "
            "--masks with human labels"
        )
    if source.images is not None and config.data is not None:
        raise UsageError(
            "give either a RUN to learn from, or --images and --masks with human labels, not both"
        )
    if config.data is None and config.out is None:
        raise UsageError("a student without a RUN needs a run folder of its own: give --out")


def _places(config: DistillConfig) -> tuple[Path, Path | None]:
    """(run folder to write to, where the data are: a run or a data folder)."""
    data = config.data
    if data is None:
        return Path(str(config.out)), None
    source = Path(data if isinstance(data, str | Path) else data.path)
    if not _has_data(source) and not (source / "parts" / "classes.json").is_file():
        catalogue.check_run(source)
        check_folder(source)
        raise UsageError(no_parts(source))
    inside = source.name == "data" and (source.parent / "run.json").is_file()
    home = source.parent if inside else source
    return Path(config.out) if config.out else home, source


def _inputs(source: Path | None, fly: bool) -> dict[str, str]:
    """Digests of what the student learns from, however the folder is spelled."""
    if source is None:
        return {}
    data = source / "data" if (source / "data").is_dir() else source
    if (
        not fly
        and (data / "classes.json").is_file()
        and not (source / "parts.safetensors").is_file()
    ):
        files = [data / "classes.json", data / "train/metadata.jsonl"]
    else:
        files = [source / "parts/classes.json", source / "parts/parts.safetensors"]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


def _weights_read(config: DistillConfig) -> dict[str, str]:
    """Digests of the weights to begin with and to learn from, so that others there are noticed."""
    named = {"start_from": config.network.start_from, "teacher": config.adapt.teacher}
    found = {key: load_student(name).info.sha256 for key, name in named.items() if name}
    name = config.network.backbone
    return found | (
        {"backbone": load_backbone(name).info.sha256} if name not in (None, "none") else {}
    )


def _synthesized(source: Path) -> tuple[Path, dict[str, Any]]:
    """The run that a dataset belongs to, and the record of its writing, empty without one."""
    home = source.parent if source.name == "data" else source
    try:
        return home, read_run(home)["stages"]["synthesize"]
    except (SisError, KeyError):
        return home, {}


def _with_level(config: DistillConfig, source: Path | None) -> DistillConfig:
    """The configuration with a level only where it says more than its absence would. UsageError
    where another level is asked for than the dataset has.
    """
    level, usual = config.source.level, 0
    if level is not None and source is not None and not config.source.fly and _has_data(source):
        home, record = _synthesized(source)
        usual = record.get("config", {}).get("level", 0)
        if level != usual:
            raise UsageError(
                f"level is {level}, and the dataset in {source} has level {usual}: give --fly, or "
                f"write the other one, python -m sis_jax.synthesize {home} --level {level} "
                "--overwrite"
            )
    return config if level != usual else replace(config, source=replace(config.source, level=None))


def _warn_of_other_parts(source: Path) -> None:
    """Warn where the dataset was written with other parts than the run holds now."""
    home, record = _synthesized(source)
    try:
        written = record["inputs"]["parts"]
        now = Parts.load(home).level(record["config"].get("level", 0)).digest()
    except (SisError, KeyError, TypeError):
        return
    if written != now:
        say(
            f"the dataset in {home} was written with other parts than those in it now: python -m "
            f"sis_jax.synthesize {home} --overwrite"
        )


def _train(
    config: DistillConfig, source: Path | None, run: RunFolder, stage: Stage
) -> dict[str, Any]:
    cache = run.path / "student" / "photos"
    job = _job(config, source, cache)
    trainer = StudentTraining(run.path / "student", job)
    try:
        trainer.run()
    finally:
        if (
            trainer.saved
        ):  # there is something to resume from, so the stage stays on record whatever ended it
            stage.files.append("student/checkpoints")
    stage.files.remove("student/checkpoints")
    trainer.student().save(run.path / "student")
    shutil.rmtree(cache, ignore_errors=True)
    return trainer.facts()


def _job(config: DistillConfig, source: Path | None, cache: Path) -> Job:
    """Everything the trainer needs: pairs in memory, photos in a memory map below `cache`."""
    # Looked at before anything that takes time: a mistyped --photos is an error at once.
    own_size = own_side(config.photos) if config.photos else 0
    teacher = load_student(config.adapt.teacher) if config.adapt.teacher else None
    start = load_student(config.network.start_from) if config.network.start_from else None
    backbone = None if start else _backbone(config)
    if config.adapt.alike and backbone is None:
        say("this student begins without a pretrained backbone: --alike does not help its labels")
    if config.source.images is not None:
        classes, train, val, origin, licence = _human(config)
    elif source is None:
        classes, train, val, origin, licence = _of_teacher(teacher)
    elif config.source.fly or not _has_data(source):
        classes, train, val, origin, licence = _on_the_fly(source, config)
    else:
        classes, train, val, origin, licence = _from_folder(source, config)
    if config.source.binary:
        classes, (train, val) = _two_classes(classes), (_as_two(p) for p in (train, val))
    trim = config.train.trim or 0.0
    kept = train.without_odd_ones(trim) if classes[0]["id"] == 0 and len(train) else train
    if len(kept) < len(train):
        say(
            f"{len(train) - len(kept):,} of {len(train):,} images left out: hardly any "
            "background on their frame"
        )
    classes = tuple(dict(c) for c in classes)
    _check_teacher(teacher, classes)
    side = _side(config, min(train.masks.shape[1:]))
    photos = None
    if config.photos:
        rows = slice(0, config.adapt.rows) if config.adapt.rows else None
        finer = 2 if own_size >= 2 * side else 1  # smaller ones have no colours to add at twice
        photos = Photos.open(
            config.photos,
            finer * side,
            rows=rows,
            cache=cache,
            crop=CROPS[config.adapt.fit],
            min_size=min(side, *train.masks.shape[1:]),  # no finer than what was learned first
        )
        say(photos.summary())
    recipe = _recipe(config, side, classes)
    if backbone is None and start is None:  # nothing there to be careful with
        recipe = replace(recipe, backbone_rate=1.0)
    return Job(
        network=_network(config, side, len(classes), start, backbone),
        recipe=recipe,
        adaptation=_adaptation(config, recipe),
        rounds=config.adapt.rounds or 0,
        pasted=recipe.augmentation.background,
        config=without(config.settled(), ("minutes",)),
        classes=classes,
        train=kept,
        val=val,
        photos=photos,
        origin=origin,
        licence=licence,
        seed=config.train.seed,
        snapshot=config.train.snapshot,
        start=start,
        backbone=backbone,
        teacher=teacher,
        fit=config.adapt.fit,
        alike=config.adapt.alike,
        minutes=config.adapt.minutes,
    )


def _side(config: DistillConfig, edge: int) -> int:
    """The resolution to train at, in pixels. edge: the shorter one of the images as held."""
    least = students.LEAST_SIDE if str(config.network.student).startswith("unet-") else 16
    least = 16 if config.network.student == "unet-small" else least
    return config.train.side or max(least, min(16 * round(edge / 16), MOST_SIDE))


def _network(
    config: DistillConfig, side: int, classes: int, start: Student | None, backbone: Any
) -> students.StudentConfig:
    net = config.network
    block = net.block or (start.config.block if start else students.usual_block(side))
    imagenet = backbone is not None and not str(net.student).startswith("unet-")
    imagenet = start.config.imagenet if start else imagenet
    return students.StudentConfig(str(net.student), classes, net.width, block, imagenet)


def _recipe(config: DistillConfig, side: int, classes: tuple[dict[str, Any], ...]) -> Recipe:
    train = config.train
    chosen = {
        name: getattr(train, name)
        for name in (
            "steps", "batch", "learning_rate", "weight_decay", "optimizer", "schedule",
            "weighting", "soft", "ema",
        )
    }  # fmt: skip
    augmentation = _augmentation(config, classes)
    return Recipe(side=side, dtype=config.network.dtype, augmentation=augmentation, **chosen)


def _adaptation(config: DistillConfig, recipe: Recipe) -> Recipe:
    """Of one round: photos vary by themselves, so they are varied less than generated images."""
    views = NONE if config.augmentation.augment == "none" else VIEWS
    views = replace(views, swap=recipe.augmentation.swap)
    steps = config.adapt.adapt_steps or 0
    return replace(recipe, steps=steps, augmentation=views)


def _backbone(config: DistillConfig) -> Any:
    """Pretrained weights of the network's backbone; None where it has none, or shall have none."""
    student, name = str(config.network.student), config.network.backbone
    trunk = {"resnet18": "resnet18"}.get(student, student.removeprefix("deeplabv3-"))
    trunk = student.removeprefix("unet-") if student.startswith("unet-") else trunk
    known = trunk in backbones.NETWORKS
    if name == "none" or (name is None and student != "unet-efficientnet-lite0"):
        if known and name is None:
            say(
                f"{student} begins from random weights, the papers' from ImageNet's, and will be "
                f"worse on photos: give a {trunk} file with --backbone, or --backbone none"
            )
        return None
    if not known:
        raise UsageError(f"{student} has no pretrained backbone: leave out --backbone {name}")
    found = load_backbone(name)
    expected = nnx.state(backbones.build(trunk))
    if jax.tree.map(np.shape, nnx.state(found)) != jax.tree.map(np.shape, expected):
        raise UsageError(f"{found.info.name} is not the {trunk} of {student}: their shapes differ")
    return found


def _augmentation(config: DistillConfig, classes: tuple[dict[str, Any], ...]) -> Augmentation:
    base = {"aligned": ALIGNED, "strong": Augmentation(), "weak": WEAK, "none": NONE}
    background = config.augmentation.background if classes[0]["id"] == 0 else 0.0
    chosen = base[str(config.augmentation.augment)]
    return replace(chosen, swap=mirrored(classes), background=background or 0.0)


def _check_teacher(teacher: Student | None, classes: tuple[dict[str, Any], ...]) -> None:
    """UsageError where the teacher's masks hold other classes than the student's."""
    ours = [c["id"] for c in classes]
    if teacher is not None and [c["id"] for c in teacher.classes] != ours:
        theirs = [c["id"] for c in teacher.classes]
        raise UsageError(
            f"the teacher {teacher.info.name} has classes {theirs}, the student {ours}: they must "
            "be the same"
        )


# Classes, images to train and to validate with, their origin in words, its licence
_Material = tuple[Sequence[Mapping[str, Any]], Pairs, Pairs, str, str]
_UNNAMED = {"prompts": [], "clusters": [], "score": None, "margin": None}  # not from text


def _of_teacher(teacher: Student | None) -> _Material:
    """Nothing to learn from but a teacher's masks of photos."""
    assert teacher is not None
    shape = (0, teacher.side, teacher.side)
    none = Pairs(*(np.zeros(s, np.uint8) for s in ((*shape, 3), shape, shape)))
    return teacher.classes, none, none, f"masks of {teacher.info.name}", teacher.info.licence


def _has_data(source: Path) -> bool:
    return (source / "classes.json").is_file() or (source / "data" / "classes.json").is_file()


def _from_folder(source: Path, config: DistillConfig) -> _Material:
    data = Dataset.open(source)
    _warn_of_other_parts(source)
    if config.train.soft and not data.split("train").rows[0].get("certainty_file_name"):
        raise UsageError(
            f"{data.path} holds no confidence for soft targets: write it with python -m "
            "sis_jax.synthesize ... --soft"
        )
    ids = [c["id"] for c in data.classes]
    side = config.train.side or 256
    train = Pairs.read(data.split("train"), ids, side, str(data.path))
    val = (
        Pairs.read(data.split("val"), ids, side, str(data.path))
        if "val" in data.splits
        else train[:100]
    )
    origin = f"{len(train):,} images of {data.path.parent.name}"
    return data.classes, train, val, origin, data.licence


def _on_the_fly(source: Path, config: DistillConfig) -> _Material:
    teacher = Teacher.from_run(source, config.source.level or 0)
    ids = [c["id"] for c in teacher.parts.classes]
    seeds = sample_seeds(1 + config.train.seed, config.source.n)
    bar = progress(len(seeds), "labelling", "img")

    def counted() -> Any:
        for rows in teacher.label(seeds):
            bar.update(len(rows[0]))
            yield rows

    pairs = labelled(counted(), ids)
    bar.close()
    held = max(1, len(pairs) // 20)
    info = teacher.gen.info
    origin = f"{len(pairs) - held:,} images of {info.name}"
    return teacher.parts.classes, pairs[held:], pairs[:held], origin, info.licence


def _human(config: DistillConfig) -> _Material:
    """Photos with human masks; every tenth is held out to validate with."""
    assert config.source.images is not None
    gt = open_pairs(config.source.images, config.source.masks)
    count = min(len(gt), config.source.limit or len(gt))
    if count < 2:
        raise UsageError(f"{count} photo with a mask is too few to train on: give at least 2")
    rows = [Example(*gt[i]) for i in range(count)]
    classes = [{"colour": draw.colour(c["id"]), **_UNNAMED, **c} for c in gt.classes]
    ids, side = [c["id"] for c in classes], config.train.side or 256
    pairs = Pairs.read(rows, ids, side, str(config.source.images))
    origin = f"{count} photos with human masks of {gt.name}"
    return classes, pairs, pairs[: max(1, count // 10)], origin, gt.licence


def _two_classes(classes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if classes[0]["id"] != 0:
        raise UsageError(
            "there is no background among these parts, so nothing to separate from it: name one "
            "with parts.rename({id: None})"
        )
    rest = {"id": 1, "name": "foreground", "colour": draw.colour(1), **_UNNAMED}
    return [dict(classes[0]), rest]


def _as_two(pairs: Pairs) -> Pairs:
    return replace(
        pairs, masks=np.where(pairs.masks == IGNORE, IGNORE, pairs.masks > 0).astype(np.uint8)
    )


def plan(config: DistillConfig) -> dict[str, Any]:
    """Files, and what two steps of the student and one image to learn from take."""
    config = resolve(config)
    _check(config)
    place, source = _places(config)
    files = ["config.json", "model.safetensors", "README.md", "curves.csv", "checkpoints/"]
    recipe = [f"{k} {v}" for k, v in config.flat().items() if k in RECIPES["default"]]
    found = {"files": [f"{place}/student/{f}" for f in files], "recipe": recipe}
    return found | _tried(config, source)


def _tried(config: DistillConfig, source: Path | None) -> dict[str, float]:
    """Seconds and bytes: `budget.rows` of speeds measured with this student, and the images."""
    began, train = time.perf_counter(), config.train
    start = load_student(config.network.start_from) if config.network.start_from else None
    images, edge, classes, reading = _data(config, source)
    classes = tuple(map(dict, _two_classes(classes) if config.source.binary else classes))
    side, batch = _side(config, edge), train.batch or 1
    network = _network(config, side, len(classes), start, None)
    speeds = Speeds(reading, *of_student(network, _recipe(config, side, classes), edge), batch)
    photos = _photos_of_a_round(config) if config.photos else 0
    rounds, of_round = (config.adapt.rounds or 0) if photos else 0, config.adapt.adapt_steps or 0
    sizes = Sizes(n=images, steps=train.steps or 0, adapt_steps=of_round, rounds=rounds)
    row = next(r for r in budget.rows(sizes, speeds, photos) if r.stage == "distill")
    snapshots = -(-(sizes.steps + rounds * of_round) // train.snapshot)
    judged = min(images, VALIDATED) * snapshots * budget.FORWARD * speeds.student_image
    labels = rounds * photos * (2 * budget.FORWARD * speeds.student_image + _CORRECTED)
    # The first step compiles, now and not again: that is kept for the run.
    now = time.perf_counter() - began - 2 * speeds.student_start
    pixels = images * edge**2 * 5 + photos * side**2 * (3 + 3 + len(classes))
    return {
        "seconds": now + images * reading + row.seconds + judged + labels,
        "memory_bytes": row.memory_bytes + pixels,
    }


def _data(
    config: DistillConfig, source: Path | None
) -> tuple[int, int, Sequence[Mapping[str, Any]], float]:
    """(images to learn from, their shorter edge as held, classes, seconds to get one)."""
    side = config.train.side or 256
    if config.source.images is not None:
        truth = open_pairs(config.source.images, config.source.masks)
        count, classes = min(len(truth), config.source.limit or len(truth)), truth.classes
        read = (Example(*truth[0]) for _ in range(2))
    elif source is None:
        learned = load_student(config.adapt.teacher)
        return 0, learned.side, learned.classes, 0.0
    elif config.source.fly or not _has_data(source):
        teacher = Teacher.from_run(source, config.source.level or 0)
        each = probe(teacher.label(range(2**16))).each
        return config.source.n, teacher.gen.resolution, teacher.parts.classes, each
    else:
        data = Dataset.open(source)
        count, classes, split = len(data), data.classes, data.split("train")
        read = (split[0] for _ in range(2))
    ids, times, edge = [c["id"] for c in classes], [], side
    for example in read:  # the first one loads a decoder
        edge = min(Pairs.read([example], ids, side, "the data").masks.shape[1:])
        times.append(time.perf_counter())
    return count, edge, classes, (times[1] - times[0]) / cores()


def _photos_of_a_round(config: DistillConfig) -> int:
    """Photos that are held at a time."""
    adapt = config.adapt
    photos = len(list_source(Path(str(config.photos))).names)
    views = (adapt.adapt_steps or 0) * (config.train.batch or 1)
    return min(photos, adapt.rows or photos, max(views // VIEWS_PER_PHOTO, 1))


def results(value: Student, config: DistillConfig) -> list[Path]:
    return [_places(resolve(config))[0] / "student"]


_MEASURED = {
    "stability": "stability of the masks of held-out photos",
    "steadiness": "stability of the masks of held-out photos",  # as earlier versions wrote it
    "agreement": "agreement with their colours",
    "val iou": "mean IoU on generated images",
}


def summary(value: Student, config: DistillConfig) -> list[str]:
    run = shlex.quote(str(_places(resolve(config))[0]))
    names, facts = ", ".join(c["name"] for c in value.classes), value.facts
    measured = [
        f"{words} {facts[f'{name} before']:.2f} before the adaptation, "
        f"{facts[f'{name} after']:.2f} after"
        for name, words in _MEASURED.items()
        if f"{name} before" in facts and f"{name} after" in facts
    ]
    return [
        f"a student of {names}, {value.side} pixels; {'; '.join(measured) or 'not adapted'}",
        f"next: python -m sis_jax.predict {run} MY_PHOTOS/ --out masks/",
    ]
