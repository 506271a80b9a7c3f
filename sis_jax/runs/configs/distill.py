"""What `sis_jax.distill` takes, and the published setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from tyro.conf import Positional, arg

from sis_jax.runs.config import Config, Switch, spelled

T = TypeVar("T")
if TYPE_CHECKING:
    from sis_jax.data.folder import Dataset

    OfRecipe = Annotated[T, "None until the recipe fills it in"]
else:
    Dataset = Any
    OfRecipe = Annotated[T | None, arg(help_behavior_hint="")]
OF_RECIPE: Any = None

RECIPES: dict[str, dict[str, Any]] = {
    "default": {
        "student": "unet-efficientnet-lite0",
        "steps": 400,
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
        "ema": 0.995,
        "adapt_steps": 200,
        "rounds": 4,
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
        "adapt_steps": 200,
        "rounds": 4,
    },
}
# From the small student's masks of many unlabelled faces, in many rounds: hours on two cores.
RECIPES["faces"] = RECIPES["default"] | {
    "teacher": "faces-student-small",
    "steps": 0,
    "side": 192,
    "adapt_steps": 160,
    "rounds": 10,
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network.

    Args:
        student: the network; unet-efficientnet-lite0 by default.
        backbone: pretrained weights of a "unet-" student's backbone: a name ("efficientnet-lite0",
            which ships and is the default of unet-efficientnet-lite0), a package, a path, or "none"
            for random ones.
        start_from: a run, folder or name ("faces-student") with a student of the same network and
            classes to begin with, at any resolution. --steps 0 only adapts it.
        width: channels of the first level of unet-small.
        block: pixels across the squares that unet-small sees and predicts at once, 2 or 4; 0, the
            default, takes 4 from 128 pixels on, or that of --start-from. 4 costs a quarter at the
            same resolution.
        dtype: of the convolutions.
    """

    student: OfRecipe[
        Literal[
            "unet-efficientnet-lite0",
            "unet-resnet18",
            "unet-small",
            "unet",
            "resnet18",
            "deeplabv3-resnet18",
            "deeplabv3-resnet50",
        ]
    ] = OF_RECIPE
    backbone: str | None = None
    start_from: str | None = None
    width: int = 32
    block: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Train:
    """The training on generated images.

    Args:
        steps: of training on generated images (400).
        batch: images per step over all devices (32).
        side: pixels of the images trained on, and of the shorter side of photos later, a multiple
            of 16; 0, the default, takes the generator's, at least 128 on a backbone, at most 256.
        learning_rate: at its highest (0.001).
        weight_decay: see optimizer (0.01).
        optimizer: adamw, the default, decouples the weight decay, adam adds it to the gradient.
        schedule: cosine after a warm-up, the default, or poly, (1 - t / T)^0.9.
        trim: share of the images left out, those on whose frame the least background was found
            (0.25).
        weighting: exponent of the teacher's confidence as a pixel's weight, 0 = none (0.5).
        soft: the teacher's probabilities as soft targets; the dataset must have been written with
            --soft.
        ema: decay of the averaged network, which is the result; 0 takes the last one (0.995).
        snapshot: steps between two checkpoints and entries of the curve.
        seed: of weights, order and augmentation.
    """

    steps: OfRecipe[int] = OF_RECIPE
    batch: OfRecipe[int] = OF_RECIPE
    side: OfRecipe[int] = OF_RECIPE
    learning_rate: OfRecipe[float] = OF_RECIPE
    weight_decay: OfRecipe[float] = OF_RECIPE
    optimizer: OfRecipe[Literal["adamw", "adam"]] = OF_RECIPE
    schedule: OfRecipe[Literal["cosine", "poly"]] = OF_RECIPE
    trim: OfRecipe[float] = OF_RECIPE
    weighting: OfRecipe[float] = OF_RECIPE
    soft: Switch = False
    ema: OfRecipe[float] = OF_RECIPE
    snapshot: int = 250
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How generated images are varied.

    Args:
        augment: "strong" for objects of any size and place; "aligned", the default, varies size and
            place little.
        background: probability of another background behind an image's foreground, 0 to 1 (0.5).
    """

    augment: OfRecipe[Literal["aligned", "strong", "weak", "none"]] = OF_RECIPE
    background: OfRecipe[float] = OF_RECIPE


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """The adaptation to photos without labels.

    Args:
        rows: use only the first so many photos.
        teacher: a student (a run, folder or name) whose masks of the photos are learned in the
            first round; then no RUN is needed, and --steps 0 learns from nothing else.
        adapt_steps: of each round of adaptation, after the training (200).
        rounds: of adaptation: the student labels the photos, and learns from them (4).
        fit: as in `train_generator`, of these photos and of all that the student is given later.
        alike: the photos are framed like the generated images, as those the generator learned from
            are: their first labels begin with the background at the same places.
        minutes: end the adaptation this long after the start, and begin no round that would take
            longer, whatever `rounds` asks for.
    """

    rows: int | None = None
    teacher: str | None = None
    adapt_steps: OfRecipe[int] = OF_RECIPE
    rounds: OfRecipe[int] = OF_RECIPE
    fit: Literal["crop", "pad", "stretch"] = "crop"
    alike: Switch = False
    minutes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is learned from.

    Args:
        binary: background against everything else, whatever parts were found.
        level: of the parts, where images are labelled on the fly: 0, the default, is the coarse
            one, 1 the finer. A dataset has its own.
        fly: label generated images on the fly even where the run holds a dataset.
        n: images to label on the fly, from 2 on.
        images: instead of generated images, photos with human masks: the supervised reference.
        masks: the human masks of `images`, paired by name.
        limit: use only the first so many of these.
    """

    binary: Switch = False
    level: int | None = None
    fly: Switch = False
    n: int = 10_000
    images: str | None = None
    masks: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class DistillConfig(Config):
    """A run in, a student out. Fields that are None take the recipe's value; those of the default
    recipe are in brackets.

    Args:
        data: a run, its data folder or a Dataset; of a run without a dataset images are labelled on
            the fly.
        out: run folder to write `student/` to; by default the run the data belong to.
        photos: real photos without masks to adapt to, a folder, an archive or .npz.
        recipe: settings by name: default; paper, the published one of Segmentation in Style; faces,
            the long one behind the student that ships. Settings given beside it win.
        overwrite: discard a student that was trained with other settings.
    """

    verb: ClassVar[str] = "distill"
    makes: ClassVar[str] = "this student"
    unrecorded: ClassVar[tuple[str, ...]] = ("data", "recipe", "minutes", "out", "overwrite")
    later: ClassVar[Mapping[str, Any]] = {"fit": "crop", "alike": False}

    data: Annotated[str | Dataset | None, Positional, spelled("[RUN]")] = None
    _: KW_ONLY
    out: str | None = None
    photos: str | None = None
    recipe: str = "default"
    overwrite: Switch = False
    network: Network = field(default_factory=Network)
    train: Train = field(default_factory=Train)
    augmentation: Augmentation = field(default_factory=Augmentation)
    adapt: Adapt = field(default_factory=Adapt)
    source: Source = field(default_factory=Source)
