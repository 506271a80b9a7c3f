"""The settings of the methods, which their classes inherit and `discover` shows as flags without
importing JAX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sis_jax.errors import SisError, UsageError


@dataclass(frozen=True)
class SegmentationInStyleSettings:
    """Parts by k-means on generator features.

    Args:
        k: number of clusters; "auto" lets a sweep choose, and splits the foreground further, into
            a second level of finer parts.
        layer: tap such as "32x32", several joined by "+", or "auto".
        n: samples to learn from.
        truncation: psi of these samples.
        normalize: "tap" scales every channel to unit variance and then makes every tap count the
            same, however many channels it has; "channel" does the first alone (one tap: no
            difference); "none" keeps raw features.
        position_weight: how much the place of a pixel counts against its features (0 = not at all,
            1 = as much as all channels together).
        grid: resolution of the grid on which features are compared; 0 takes the finest tap's own.
        n_init: restarts of k-means; the best one is taken.
        max_points: pixels to cluster, at most; more samples give fewer pixels each.
        align_corners: interpolation rule when features are brought to one size.
        smooth: filter features with [1,2,1] first, "on", "off" or "auto" (where the checkerboard of
            transposed convolutions shows, as in a DCGAN).
        refine: "crf" makes labels follow the outlines of the image and the usual class at each
            place; "none" takes the nearest centre, as published. Saved parts keep the rule they
            learned.
    """

    k: int | Literal["auto"] = "auto"
    layer: str = "auto"
    n: int = 50
    truncation: float = 0.7
    normalize: Literal["tap", "channel", "none"] = "tap"
    position_weight: float = 0.0
    grid: int = 0
    n_init: int = 10
    max_points: int = 204_800
    align_corners: bool = False
    smooth: Literal["auto", "on", "off"] = "auto"
    refine: Literal["crf", "none"] = "crf"


@dataclass(frozen=True)
class Labels4FreeSettings:
    """A soft mask of the foreground, learned against a discriminator from nothing but the
    generator.

    Args:
        photos: folder or archive of real photos for D; "" uses generated ones.
        steps: training steps, at most.
        batch: images per step over all devices, a multiple of 4 (or less than 4).
        truncation: psi of the images that are segmented.
        background_truncation: psi of the backgrounds.
        stage: the layer that is zeroed in the background generator: "const", "4x4" as published,
            "8x8/conv0", "8x8", ... or "auto".
        same_latents: the background is made from the image's own latents.
        adversarial: weight s of fooling D.
        binary: weight lambda of hard masks and of the least foreground.
        least_foreground: phi_fg, share of an image.
        background: weight w_bg of the least background.
        least_background: phi_bg, share of an image.
        least_frame: share of an image's frame (5 % of its height and width at top, left and right)
            to be background, same weight; 0 = as published.
        coverage: which must have these shares, each "image" or the whole "batch" on average.
        learning_rate: of the alpha network.
        d_learning_rate: of D.
        discriminator: "scratch", or the generator's "own" to start from.
        d_width: D's channels over the generator's.
        r1_gamma: weight of D's gradient penalty.
        r1_interval: steps between two of its steps.
        ema: decay per step of the averaged alpha network, 0 = none.
        normalize: standardise the features per channel.
        decay: both learning rates fall to 0, on a cosine.
        start: logit of the first masks, 0 = half foreground.
        pick: "best" checkpoint by a rule without labels, or the "last".
        check: steps between checkpoints.
        threshold: alpha above it is foreground.
        quirk: add the published code's + D(real) to the penalty's step.
        tries: runs from other weights, at most, while the masks are wrong as far as that shows.
    """

    photos: str = ""
    steps: int = 90
    batch: int = 16
    truncation: float = 0.7
    background_truncation: float = 1.0
    stage: str = "4x4"
    same_latents: bool = False
    adversarial: float = 1.0
    binary: float = 1.2
    least_foreground: float = 0.25
    background: float = 3.0
    least_background: float = 0.2
    least_frame: float = 0.5
    coverage: Literal["image", "batch"] = "image"
    learning_rate: float = 3e-3
    d_learning_rate: float = 2e-3
    discriminator: Literal["scratch", "own"] = "scratch"
    d_width: float = 0.25
    r1_gamma: float = 1.0
    r1_interval: int = 16
    ema: float = 0.9
    normalize: bool = True
    decay: bool = True
    start: float = 2.0
    pick: Literal["best", "last"] = "best"
    check: int = 10
    threshold: float = 0.5
    quirk: bool = False
    tries: int = 6


@dataclass(frozen=True)
class DatasetGANSettings:
    """Parts from annotated samples.

    Args:
        masks: folder of annotated images, made with `python -m sis_jax export RUN --format blanks`.
        classifier: "mlp", the paper's networks, or "linear", a linear read-out.
        layer: taps such as "32x32/conv0" joined by "+", or "auto", every convolution.
        members: classifiers in the ensemble.
        bootstrap: each member learns from annotated samples drawn with replacement, so that their
            confidence falls where they differ.
        truncation: psi the annotated images were generated with.
        vote: label by the "mean" of the members' probabilities, or by "majority".
        max_points: pixels to learn from, at most; rare classes are taken first.
        steps: of training.
        batch: pixels per step.
        learning_rate: at its highest.
        weight_decay: pull of the weights towards zero.
    """

    masks: str = ""
    classifier: Literal["mlp", "linear"] = "mlp"
    layer: str = "auto"
    members: int = 10
    bootstrap: bool = True
    truncation: float = 0.7
    vote: Literal["mean", "majority"] = "mean"
    max_points: int = 16_384
    steps: int = 300
    batch: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2


@dataclass(frozen=True)
class LatentDirectionSettings:
    """Foreground and background from directions in latent space: cluster 0 is the background, 1 the
    foreground.

    Args:
        mode: "light" or "dark" (one direction against the image itself), or "both" (one against the
            other).
        space: where the direction lives: "z" (any generator), "w" (one step for all layers), "w+"
            (a step per layer).
        prior: where the object is expected: "center" (the published code), "linear" (the paper),
            "portrait" (down to the lower edge).
        center_weight: weight of brightness under the prior.
        structure_weight: weight of the change of edges.
        shift: length of the step that makes the masks, in standard deviations of the latent.
        fit_shift: mean length of the steps while the direction is learned, drawn anew for each
            coordinate.
        fit_shift_std: their standard deviation.
        steps: optimisation steps.
        batch: samples per step.
        learning_rate: of Adam.
        truncation: psi of the samples.
        threshold: of the difference: "zero" (published), "std" (0.3 standard deviations of the
            image below zero, published too), "otsu".
        min_component: foreground patches smaller than this share of the largest one become
            background; 0 keeps all.
        max_area: a mask that covers more than this share of its image is not trusted (confidence
            0).
        min_peaks: a shifted image whose histogram has fewer peaks is not trusted; 0 trusts all.
    """

    mode: Literal["both", "light", "dark"] = "both"
    space: Literal["z", "w", "w+"] = "w"
    prior: Literal["portrait", "center", "linear"] = "portrait"
    center_weight: float = 2.0
    structure_weight: float = 10.0
    shift: float = 2.0
    fit_shift: float = 2.0
    fit_shift_std: float = 0.5
    steps: int = 60
    batch: int = 16
    learning_rate: float = 0.01
    truncation: float = 0.7
    threshold: Literal["otsu", "zero", "std"] = "otsu"
    min_component: float = 0.2
    max_area: float = 1.0
    min_peaks: int = 0


@dataclass(frozen=True)
class StyleMixingSettings:
    """Parts from pixels that change colour together when fine styles are mixed.

    Args:
        labels: "parts" (clusters of all images matched by their mean features into k parts) or
            "ground" (background and foreground, by each image's border).
        variants: style mixes per image (the paper's N).
        slots: W+ layers that keep the image's own styles, the others are mixed; 0 takes two fifths
            of them.
        clusters: groups of pixels in one image.
        k: parts in all images together, for labels "parts".
        mode: "correlation" compares how pixels change over the variants, "raw" their colours.
        color: "rgb", "ycc" (luma and two differences) or "lab".
        grid: resolution at which pixels are clustered, 0 takes the image's, at most 128.
        n_init: restarts of the clustering of an image; the best one is taken.
        layer: tap whose mean features match clusters of different images; "auto" takes 32x32 or the
            nearest below.
        n: samples to learn the parts from.
        truncation: psi of the samples.
        mix_truncation: psi of the styles that are mixed in.
        min_patch: patches smaller than this share of the image go to their neighbour; 0 keeps all.
    """

    labels: Literal["parts", "ground"] = "parts"
    variants: int = 16
    slots: int = 0
    clusters: int = 5
    k: int = 8
    mode: Literal["correlation", "raw"] = "raw"
    color: Literal["rgb", "ycc", "lab"] = "rgb"
    grid: int = 0
    n_init: int = 4
    layer: str = "auto"
    n: int = 100
    truncation: float = 0.7
    mix_truncation: float = 0.7
    min_patch: float = 0.002


@dataclass(frozen=True)
class FurryGANSettings:
    """Foreground and background by the mask that a FurryGAN draws.

    Args:
        truncation: psi of the samples.
        threshold: where the mask is above it is foreground.
    """

    truncation: float = 0.7
    threshold: float = 0.5


SETTINGS: dict[str, type] = {
    "segmentation_in_style": SegmentationInStyleSettings,
    "labels4free": Labels4FreeSettings,
    "datasetgan": DatasetGANSettings,
    "latent_direction": LatentDirectionSettings,
    "style_mixing": StyleMixingSettings,
    "furrygan": FurryGANSettings,
}
USUAL = "segmentation_in_style"  # what "auto" is for most generators, and whose settings it takes


def restored(method: type[Any], stored: Mapping[str, Any]) -> Any:
    """The method with settings as JSON keeps them, tuples as lists; SisError where one is none."""
    hints = get_type_hints(method)
    kinds = {f.name: hints[f.name] for f in fields(method)}
    for name, value in stored.items():
        if name not in kinds or not _fits(value, kinds[name]):
            raise SisError(
                f"the settings of these parts hold {name[:40]} = {str(value)[:40]!a}, which this "
                f"version of {method.__name__} does not take: discover again"
            )
    return method(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is one of a field's type."""
    if get_origin(kind) is Literal:
        return type(value) is str and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_fits(v, get_args(kind)[0]) for v in value)
    if get_args(kind):  # a union
        return any(_fits(value, one) for one in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def check(settings: Any, **least: float) -> None:
    """UsageError for a text that is none of its field's choices, or a number below its least."""
    for name, kind in get_type_hints(type(settings)).items():
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if choices and getattr(settings, name) not in choices:
            known = " or ".join(f'"{choice}"' for choice in choices)
            raise UsageError(f"{name} is {getattr(settings, name)!r}, expected {known}")
    for name, smallest in least.items():
        if getattr(settings, name) < smallest:
            raise UsageError(f"{name} is {getattr(settings, name)}, expected at least {smallest}")
