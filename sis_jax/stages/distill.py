"""The work of `sis_jax.distill`.

Segmentation in Style, section 3.3: a small network is trained on generated pictures and the masks
the parts give them. `recipe="paper"` is the published setting (ResNet-18 at output stride 8, 1000
steps of 15 pictures at 128 pixels, Adam 1e-4 with poly decay, no augmentation).

Where the default differs, and why:
* a U-Net that is fast on CPUs, AdamW with a cosine, an averaged network;
* pictures are varied in place, colour, blur and noise, and another background is put behind some: a
  teacher that clusters features confuses parts of like colour, and photos are more varied than a
  truncated generator's pictures;
* pictures whose mask hardly holds background are left out (`trim`), pixels count by how sure the
  teacher was (`weighting`);
* with photos, the student adapts to them without labels (`training/student_loop.py`), and the
  result is kept only where it is the steadier one.

    RUN/student/ config.json · model.safetensors · README.md · curves.csv · checkpoints/ (Orbax)
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sis_jax.checkpoints.backbones import load_backbone
from sis_jax.checkpoints.student import load_student
from sis_jax.data import draw
from sis_jax.data.files import read_run
from sis_jax.data.folder import Dataset, Example
from sis_jax.data.ground_truth import open_pairs
from sis_jax.data.pairs import IGNORE, Pairs, labelled
from sis_jax.data.parts import Parts
from sis_jax.data.photos import Photos, own_side
from sis_jax.models import students
from sis_jax.ops.progress import progress, progress_shown, say
from sis_jax.ops.sampling import sample_seeds
from sis_jax.ops.student_augment import ALIGNED, NONE, WEAK, Augmentation
from sis_jax.runs import cli
from sis_jax.runs.run import RunFolder
from sis_jax.stages.teacher import Teacher
from sis_jax.stages.train_student import Job, StudentTraining
from sis_jax.training.self_training import VIEWS
from sis_jax.training.student import Recipe
from sis_jax.types import SisError, UsageError, unknown_name

if TYPE_CHECKING:
    from sis_jax.checkpoints.student import Student

MASKED = 0.25  # share of a round's views that lose blocks of pixels
ROUND_EMA = 0.995  # decay of the averaged network of a round, which is shorter than a training

RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "student": "unet-small",
        "steps": 2000,
        "batch": 32,
        "side": 0,
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
        "optimizer": "adamw",
        "schedule": "cosine",
        "augment": "aligned",
        "background": 0.5,
        "trim": 0.25,
        "weighting": 0.5,
        "ema": 0.999,
    },
    "paper": {
        "student": "resnet18",
        "steps": 1000,
        "batch": 15,
        "side": 128,
        "learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "optimizer": "adam",
        "schedule": "poly",
        "augment": "none",
        "background": 0.0,
        "trim": 0.0,
        "weighting": 0.0,
        "ema": 0.0,
    },
}


def distill(
    data: str | Dataset | None = None,
    *,
    out: str | None = None,
    student: Literal["unet-small", "unet", "resnet18", "deeplabv3-resnet18", "deeplabv3-resnet50"]
    | None = None,
    recipe: str = "default",
    start_from: str | None = None,
    steps: int | None = None,
    batch: int | None = None,
    side: int | None = None,
    width: int = 32,
    block: int = 0,
    backbone: str | None = None,
    binary: bool = False,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    optimizer: Literal["adamw", "adam"] | None = None,
    schedule: Literal["cosine", "poly"] | None = None,
    augment: Literal["aligned", "strong", "weak", "none"] | None = None,
    background: float | None = None,
    trim: float | None = None,
    weighting: float | None = None,
    soft: bool = False,
    ema: float | None = None,
    photos: str | None = None,
    rows: int | None = None,
    adapt_steps: int = 700,
    rounds: int = 2,
    fly: bool = False,
    n: int = 10_000,
    images: str | None = None,
    masks: str | None = None,
    limit: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    snapshot: int = 250,
    seed: int = 0,
    overwrite: bool = False,
) -> Student:
    """As `sis_jax.distill`, which explains the arguments."""
    given = dict(locals())
    config = _resolve(given)
    _check(config)
    place, source = _places(config)

    compared = {k: v for k, v in config.items() if k not in ("data", "overwrite", "out", "recipe")}
    shown = {k: v for k, v in given.items() if v is not None and v is not False} | {
        "data": None if source is None else str(source)
    }
    with RunFolder.open(place, overwrite) as run:
        inputs = _inputs(source, config["fly"]) | _first_weights(config["start_from"])
        with run.stage(
            "distill",
            compared,
            inputs=inputs,
            command=cli.command("distill", shown, positional=("data",)),
        ) as stage:
            if stage.done:
                say(f"{place} already holds this student; give --overwrite to train it again")
            else:
                if not stage.resumed:
                    shutil.rmtree(run.path / "student", ignore_errors=True)
                stage.record |= _train(config, source, run, stage)
                stage.files += [f"student/{name}" for name in ("config.json", "model.safetensors")]

    return load_student(place)


def _resolve(config: dict[str, Any]) -> dict[str, Any]:
    """The recipe's settings, overridden by those given."""
    if config["recipe"] not in RECIPES:
        raise unknown_name("recipe", config["recipe"], RECIPES)
    return config | {k: v for k, v in RECIPES[config["recipe"]].items() if config[k] is None}


def _check(config: dict[str, Any]) -> None:
    least = {
        "steps": 1,
        "batch": 1,
        "side": 0,
        "weight_decay": 0,
        "background": 0,
        "trim": 0,
        "weighting": 0,
        "ema": 0,
        "adapt_steps": 0,
        "n": 2,
        "snapshot": 1,
        "seed": 0,
        "rounds": 0,
        "rows": 1,
        "limit": 1,
    }
    below = {"trim": 1, "ema": 1, "background": 1.0001}
    least["steps"] = 0 if config["start_from"] else 1
    for name, bound in least.items():
        if config[name] is not None and not bound <= config[name] < below.get(name, float("inf")):
            most = f" and below {below[name]:g}" if name in below else ""
            raise UsageError(f"{name} is {config[name]}, expected at least {bound}{most}")
    students.StudentConfig(config["student"], 2, config["width"], config["block"] or 2)
    if not 0 < config["learning_rate"] < float("inf"):
        raise UsageError(
            f"learning_rate is {config['learning_rate']}, expected a number above 0 (0.001 is the "
            "default)"
        )
    if config["side"] and (config["side"] < 16 or config["side"] % 16):
        raise UsageError(
            f"side is {config['side']}, expected a multiple of 16, or 0 for the generator's"
        )
    if config["masks"] and not config["images"]:
        raise UsageError("--masks needs --images, the photos they belong to")
    if config["images"] is None and config["data"] is None:
        raise UsageError(
            "give a RUN (or a data folder) to learn from, or --images and --masks with human labels"
        )
    if config["images"] is not None and config["data"] is not None:
        raise UsageError(
            "give either a RUN to learn from, or --images and --masks with human labels, not both"
        )
    if config["images"] is not None and config["out"] is None:
        raise UsageError("a student of human masks needs a run folder of its own: give --out")


def _places(config: dict[str, Any]) -> tuple[Path, Path | None]:
    """(run folder to write to, where the data are: a run or a data folder)."""
    data = config["data"]
    if data is None:
        return Path(config["out"]), None
    source = Path(data if isinstance(data, str | Path) else data.path)
    if not _has_data(source) and not (source / "parts" / "classes.json").is_file():
        raise UsageError(
            f"{source} holds no parts and no dataset to learn from: run python -m "
            f"sis_jax.discover --out {source} first"
        )
    home = (
        source.parent
        if source.name == "data" and (source.parent / "run.json").is_file()
        else source
    )
    return Path(config["out"]) if config["out"] else home, source


def _inputs(source: Path | None, fly: bool) -> dict[str, str]:
    """Digests of what the student is learned from, however the folder is spelled, so that a change
    of parts or data is noticed.
    """
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


def _first_weights(folder: str | None) -> dict[str, str]:
    """Digest of the student to begin with, so that another one there is noticed."""
    if folder is None:
        return {}

    return {"start_from": load_student(folder).info.sha256}


def _warn_of_other_parts(source: Path) -> None:
    """Say so where the dataset was written with other parts than the run holds now."""
    home = source.parent if source.name == "data" else source
    try:
        written = read_run(home)["stages"]["synthesize"]["inputs"]["parts"]
        now = Parts.load(home).digest()
    except (SisError, KeyError, TypeError):
        return
    if written != now:
        say(
            f"the dataset in {home} was written with other parts than those in it now: python -m "
            f"sis_jax.synthesize {home} --overwrite"
        )


def _train(config: dict[str, Any], source: Path | None, run: Any, stage: Any) -> dict[str, Any]:
    job = _job(config, source)
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
    return trainer.facts()


def _job(config: dict[str, Any], source: Path | None) -> Job:
    """Everything the trainer needs, in memory: pairs to learn from, pairs to watch, photos to adapt
    to.
    """
    if source is None:
        classes, train, val, origin, licence = _human(config)
    elif config["fly"] or not _has_data(source):
        classes, train, val, origin, licence = _on_the_fly(source, config)
    else:
        classes, train, val, origin, licence = _from_folder(source, config)
    if config["binary"]:
        classes, (train, val) = _two_classes(classes), (_as_two(p) for p in (train, val))
    kept = train.without_odd_ones(config["trim"]) if classes[0]["id"] == 0 else train
    if len(kept) < len(train):
        say(
            f"{len(train) - len(kept):,} of {len(train):,} pictures left out: hardly any "
            "background on their frame"
        )
    side = config["side"] or max(16, 16 * round(min(train.masks.shape[1:]) / 16))
    photos = None
    if config["photos"]:
        rows = slice(0, config["rows"]) if config["rows"] else None
        finer = (
            2 if own_side(config["photos"]) >= 2 * side else 1
        )  # what is smaller has no colours to add at twice the size
        photos = Photos.open(
            config["photos"], finer * side, rows=rows, min_size=side, progress=progress_shown()
        )
        say(photos.summary())
    classes = tuple(dict(c) for c in classes)
    start = load_student(config["start_from"]) if config["start_from"] else None
    recipe = _recipe(config, side, classes)
    return Job(
        network=_network(config, side, len(classes), start),
        recipe=recipe,
        adaptation=_adaptation(config, recipe),
        rounds=config["rounds"],
        pasted=config["background"] if classes[0]["id"] == 0 else 0.0,
        config=config,
        classes=classes,
        train=kept,
        val=val,
        photos=photos,
        origin=origin,
        licence=licence,
        seed=config["seed"],
        snapshot=config["snapshot"],
        start=start,
        backbone=None if start else _backbone(config),
    )


def _network(
    config: dict[str, Any], side: int, classes: int, start: Student | None
) -> students.StudentConfig:
    block = config["block"] or (start.config.block if start else students.usual_block(side))
    return students.StudentConfig(config["student"], classes, config["width"], block)


def _recipe(config: dict[str, Any], side: int, classes: tuple[dict[str, Any], ...]) -> Recipe:
    return Recipe(
        steps=config["steps"], batch=config["batch"], side=side,
        learning_rate=config["learning_rate"], weight_decay=config["weight_decay"],
        optimizer=config["optimizer"], schedule=config["schedule"], weighting=config["weighting"],
        soft=config["soft"], ema=config["ema"], dtype=config["dtype"],
        augmentation=_augmentation(config, classes),
    )  # fmt: skip


def _adaptation(config: dict[str, Any], recipe: Recipe) -> Recipe:
    """Of one round: photos vary by themselves, so they are varied less than generated images."""
    views = NONE if config["augment"] == "none" else VIEWS
    return replace(
        recipe, steps=config["adapt_steps"], ema=recipe.ema and ROUND_EMA, masked=MASKED,
        augmentation=replace(views, swap=recipe.augmentation.swap),
    )  # fmt: skip


def _backbone(config: dict[str, Any]) -> Any:
    """Pretrained weights of the network's backbone; None where it has none, or shall have none."""
    arch, name = config["student"], config["backbone"]
    if name == "none" or not (name or arch == "unet-efficientnet-lite0"):
        return None
    if not arch.startswith("unet-"):
        raise UsageError(f"{arch} has no backbone to load weights into: leave out --backbone")
    return load_backbone(name)


def _augmentation(config: dict[str, Any], classes: tuple[dict[str, Any], ...]) -> Augmentation:
    base = {"aligned": ALIGNED, "strong": Augmentation(), "weak": WEAK, "none": NONE}
    background = config["background"] if classes[0]["id"] == 0 else 0.0
    return replace(base[config["augment"]], swap=_mirror(classes), background=background)


def _mirror(classes: tuple[dict[str, Any], ...]) -> tuple[int, ...]:
    """The channel of each class in the mirror: left and right swap. Empty where nothing does."""
    names = [str(c["name"]).lower() for c in classes]
    table = list(range(len(names)))
    for i, name in enumerate(names):
        for one, other in (("left", "right"), ("right", "left"), ("l_", "r_"), ("r_", "l_")):
            if name.startswith(one) or f" {one}" in name:
                twin = name.replace(one, other, 1)
                table[i] = names.index(twin) if twin in names else i
    return tuple(table) if table != list(range(len(names))) else ()


def _has_data(source: Path) -> bool:
    return (source / "classes.json").is_file() or (source / "data" / "classes.json").is_file()


def _from_folder(
    source: Path, config: dict[str, Any]
) -> tuple[Sequence[Mapping[str, Any]], Pairs, Pairs, str, str]:
    data = Dataset.open(source)
    _warn_of_other_parts(source)
    if config["soft"] and not data.split("train").rows[0].get("certainty_file_name"):
        raise UsageError(
            f"{data.path} holds no certainty for soft targets: write it with python -m "
            "sis_jax.synthesize ... --soft"
        )
    ids = [c["id"] for c in data.classes]
    side = config["side"] or 256
    train = Pairs.read(data.split("train"), ids, side, str(data.path))
    val = (
        Pairs.read(data.split("val"), ids, side, str(data.path))
        if "val" in data.splits
        else _head(train, 100)
    )
    return (
        data.classes,
        train,
        val,
        f"{len(train):,} pictures of {data.path.parent.name}",
        data.licence,
    )


def _on_the_fly(
    source: Path, config: dict[str, Any]
) -> tuple[Sequence[Mapping[str, Any]], Pairs, Pairs, str, str]:
    teacher = Teacher.from_run(source)
    ids = [c["id"] for c in teacher.parts.classes]
    seeds = sample_seeds(1 + config["seed"], config["n"])
    bar = progress(len(seeds), "labelling", "img")

    def counted() -> Any:
        for rows in teacher.label(seeds):
            bar.update(len(rows[0]))
            yield rows

    pairs = labelled(counted(), ids)
    bar.close()
    held = max(1, len(pairs) // 20)
    train, val = _part(pairs, slice(held, None)), _part(pairs, slice(0, held))
    return (
        teacher.parts.classes,
        train,
        val,
        f"{len(train):,} pictures of {teacher.gen.info.name}",
        teacher.gen.info.licence,
    )


def _human(config: dict[str, Any]) -> tuple[Sequence[Mapping[str, Any]], Pairs, Pairs, str, str]:
    """Photos with human masks; every tenth is kept to watch the training by."""
    truth = open_pairs(config["images"], config["masks"])
    count = min(len(truth), config["limit"] or len(truth))
    if count < 2:
        raise UsageError(f"{count} photo with a mask is too few to train on: give at least 2")
    rows = [Example(*truth[i]) for i in range(count)]
    classes = [
        {
            "colour": draw.colour(c["id"]),
            "prompts": [],
            "clusters": [],
            "score": None,
            "margin": None,
            **c,
        }
        for c in truth.classes
    ]
    pairs = Pairs.read(
        rows, [c["id"] for c in classes], config["side"] or 256, str(config["images"])
    )
    return (
        classes,
        pairs,
        _head(pairs, max(1, count // 10)),
        f"{count} photos with human masks of {truth.name}",
        truth.licence,
    )


def _two_classes(classes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if classes[0]["id"] != 0:
        raise UsageError(
            "there is no background among these parts, so nothing to tell from it: name one with "
            "parts.rename({id: None})"
        )
    rest = {
        "id": 1,
        "name": "foreground",
        "colour": draw.colour(1),
        "prompts": [],
        "clusters": [],
        "score": None,
        "margin": None,
    }
    return [dict(classes[0]), rest]


def _as_two(pairs: Pairs) -> Pairs:
    return replace(
        pairs, masks=np.where(pairs.masks == IGNORE, IGNORE, pairs.masks > 0).astype(np.uint8)
    )


def _part(pairs: Pairs, rows: slice) -> Pairs:
    return replace(
        pairs, images=pairs.images[rows], masks=pairs.masks[rows], certainty=pairs.certainty[rows]
    )


def _head(pairs: Pairs, count: int) -> Pairs:
    return _part(pairs, slice(0, count))


def plan(config: dict[str, Any]) -> dict[str, Any]:
    config = _resolve(config)
    _check(config)
    place, _ = _places(config)
    start = load_student(config["start_from"]) if config["start_from"] else None
    files = ["config.json", "model.safetensors", "README.md", "curves.csv", "checkpoints/"]
    side = config["side"] or 64
    # Measured for unet-small on two cores: 77 pictures a second at 64 pixels, in proportion to the
    # pixels; 60 ms to refine the mask of a photo.
    block = config["block"] or (start.config.block if start else students.usual_block(side))
    per_picture = (
        (side / 64) ** 2 / 77 * {"unet-small": (2 / block) ** 2}.get(config["student"], 6.0)
    )
    count = config["steps"] + (config["rounds"] * config["adapt_steps"] if config["photos"] else 0)
    return {
        "files": [f"{place}/student/{f}" for f in files],
        "recipe": [f"{k} {v}" for k, v in config.items() if k in RECIPES["default"]],
        "seconds": 20 + count * config["batch"] * per_picture,
        "memory_bytes": 1.2e9 + 4e5 * config["batch"] * (side / 64) ** 2,
    }


def results(value: Any, config: Any) -> list[Path]:
    return [_places(_resolve(config))[0] / "student"]
