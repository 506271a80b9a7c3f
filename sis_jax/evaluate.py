"""Measure masks on real photos: `python -m sis_jax.evaluate RUN --images DIR --masks DIR`, or
`--benchmark celebamask-hq --root DIR`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sis_jax.runs import cli

if TYPE_CHECKING:
    from sis_jax.ops.scoring import Segmenter
    from sis_jax.runs.metrics import Metrics


@cli.hooks("sis_jax.stages.evaluate", "plan", "results")
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
    """Compare a run's masks with true ones: IoU, F, accuracy, borders, confusion, with intervals;
    no label is used unless a row says so.

    run: a run with a student, or "faces-student", which ships; in Python also the network itself.
    images: photos, a folder, .zip or .npz; an .npz may hold the masks too.
    masks: their true masks, paired by name; class ids in a palette or grey picture, or black and
        white.
    benchmark: a published test set, instead of images and masks: celebamask-hq, cub, duts, ecssd,
        ...
    root: the folder the benchmark was unpacked to.
    split: of the benchmark; the default is the one papers test on.
    predictions: measure this folder of masks (<stem>.png beside classes.json, as predict writes it)
        instead of the student's.
    protocol: native, sis, l4f, voynov, melas or selfmask: how the published method measures; native
        changes neither photos nor masks.
    size: side in pixels of the photos the network sees, 0 for their own; default as the protocol
        says.
    classes_map: {predicted name: true name or list of true names or null}, as a JSON file or text;
        default: equal names.
    mask_values: whether masks hold class ids or grey values (from the protocol's threshold on,
        foreground).
    matching: also match classes with the labels' help, reported apart: hungarian, majority.
    limit: only the first so many images.
    batch: photos at once.
    resamples, seed: of the 95 % bootstrap intervals over images; 0 resamples for none.
    out: also write the metrics to this JSON file.
    overwrite: replace what another configuration measured under the same name.

    Returns `Metrics`; a run gets RUN/metrics/<name>.json and RUN/metrics.json. Raises UsageError
    for what cannot be measured.
    """
    from sis_jax.stages.evaluate import evaluate as work

    return work(
        run,
        images=images,
        masks=masks,
        benchmark=benchmark,
        root=root,
        split=split,
        predictions=predictions,
        protocol=protocol,
        size=size,
        classes_map=classes_map,
        mask_values=mask_values,
        matching=matching,
        limit=limit,
        batch=batch,
        resamples=resamples,
        seed=seed,
        out=out,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        cli.use_cpu_cores()
    cli.main(evaluate)
