"""From pairs of predicted and true masks to every score, with bootstrap intervals.

All of it follows from one confusion matrix per image. Scores that use no ground truth (classes of
one name, background against the rest) are separate from those that do (Hungarian, majority).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64, Integer, UInt8

from sis_jax.ops import metrics, protocols
from sis_jax.ops.protocols import Protocol as Rule
from sis_jax.types import SisError, UsageError

Classes = Sequence[Mapping[str, Any]]
Pair = tuple[str, np.ndarray, np.ndarray]
RADIUS = 3.0  # pixels of the border band: the trimap of the papers
MATCHINGS = {"hungarian": metrics.hungarian, "majority": metrics.majority}


@runtime_checkable
class Segmenter(Protocol):
    """A network to evaluate: its classes ({"id", "name"}) and scores per class id."""

    @property
    def classes(self) -> Classes: ...
    def scores(
        self, images: list[UInt8[np.ndarray, "h w 3"]]
    ) -> list[Float[np.ndarray, "h w c"]]: ...


def measure(
    pairs: Iterable[Pair],
    classes_pred: Classes,
    classes_true: Classes,
    protocol: str | Rule = "native",
    *,
    classes_map: Mapping[str, Any] | None = None,
    matching: Sequence[str] = ("hungarian", "majority"),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score predictions against true masks; a plain dictionary for JSON (NaN: undefined).

    pairs: (name, prediction, ground truth); a prediction is class ids [h w] (resized by nearest) or
        scores float[h w c]; a ground truth is uint8[h w], 255 = ignore. classes_pred, classes_true:
        {"id", "name"}, id 0 is the background. protocol: a name of `PROTOCOLS`. classes_map:
        predicted name -> true name, list of names (merged), or None; without it, equal names belong
        together. matching: of "hungarian", "majority". resamples, seed: of the 95 % intervals over
        images; 0 for none. Raises UsageError for unknown names, SisError where nothing was
        measured.
    """
    rule = protocols.get(protocol) if isinstance(protocol, str) else protocol
    for name in matching:
        if name not in MATCHINGS:
            raise UsageError(f"unknown matching {name!r}: type {' or '.join(map(repr, MATCHINGS))}")
    rows, assigned, lookup, warnings = match_names(classes_pred, classes_true, classes_map)
    tally = Tally(len(rows), len(assigned), rule, lookup)
    for name, prediction, gt in pairs:
        tally.add(name, prediction, gt)
    if not tally.names:
        raise SisError("nothing was measured: there was no pair of a prediction and a mask")
    weights = (
        metrics.resampling_weights(len(tally.names), resamples, seed)
        if resamples and len(tally.names) > 1
        else None
    )
    counts, band = np.stack(tally.counts), np.stack(tally.band)
    total = counts.sum(0)
    ways = {"zero_label": assigned} | {name: MATCHINGS[name](total) for name in matching}
    named = {p: c["name"] for p, c in _by_id(classes_pred).items()}
    return {
        "images": len(tally.names),
        "pixels": int(total.sum()),
        "protocol": rule.name,
        "headline": rule.headline,
        "true_classes": rows,
        "predicted_classes": [named.get(p, f"class {p}") for p in range(len(assigned))],
        "confusion": total.tolist(),
        "foreground": _foreground(tally, rule, weights),
        **{key: _classes(counts, band, to, rows, weights) for key, to in ways.items()},
        "assignment": {key: [None if t < 0 else rows[t] for t in to] for key, to in ways.items()},
        "per_image": _per_image(tally, counts, assigned),
        "warnings": warnings,
    }


# ------------------------------------------------------------------------------------------ classes


def _by_id(classes: Classes) -> dict[int, Mapping[str, Any]]:
    return {0: {"id": 0, "name": "background"}} | {int(c["id"]): c for c in classes}


def match_names(
    classes_pred: Classes, classes_true: Classes, classes_map: Mapping[str, Any] | None = None
) -> tuple[list[str], Int64[np.ndarray, "p"], UInt8[np.ndarray, "256"], list[str]]:
    """Which predicted class means which true class, without looking at a mask.

    Returns the names of the true rows; for each predicted id its row, or -1; a table from true ids
    to rows (merged classes share one, 255 stays); and warnings. The background is row 0.
    """
    predicted, true = _by_id(classes_pred), _by_id(classes_true)
    ids = {_plain(c["name"]): i for i, c in true.items()} | {"background": 0}
    wanted = {
        _plain(k): [] if v is None else [v] if isinstance(v, str) else list(v)
        for k, v in (classes_map or {}).items()
    }
    names = {_plain(c["name"]) for c in predicted.values()} | {"background"}
    for key, group in wanted.items():
        for name, known, kind in [
            (key, names, "predicted"),
            *((str(g), ids, "true") for g in group),
        ]:
            if _plain(name) not in known:
                raise UsageError(
                    f"the class map names {name!r}, which is no {kind} class; there are "
                    f"{', '.join(sorted(known))}"
                )
    merged = {
        ids[_plain(g)]: (key, min(ids[_plain(x)] for x in group))
        for key, group in wanted.items()
        if len(group) > 1
        for g in group
    }
    kept = [i for i in sorted(true) if i not in merged or merged[i][1] == i]
    rows = [
        merged[i][0] if i in merged else "background" if i == 0 else str(true[i]["name"])
        for i in kept
    ]
    # 254: an id that is not among the true classes; `Tally` names it
    lookup = np.full(256, 254, np.uint8)
    lookup[255] = 255
    for i in true:
        lookup[i] = kept.index(merged[i][1] if i in merged else i)
    assigned = np.full(max(predicted) + 1, -1, np.int64)
    for p, entry in predicted.items():
        name = _plain(entry["name"]) if p else "background"
        targets = wanted.get(name, [name] if name in ids else [])
        if len(true) == 2 and p and name not in wanted:
            targets = [true[max(true)]["name"]]  # one foreground class: whatever is not background
        if targets:
            assigned[p] = lookup[ids[_plain(str(targets[0]))]]
    missing = [row for r, row in enumerate(rows) if r not in assigned]
    warnings = (
        [
            f"no predicted class means {', '.join(missing)}; give --classes-map, or read the "
            "matched scores"
        ]
        if missing
        else []
    )
    if 0 not in {int(c["id"]) for c in classes_pred}:
        warnings.append("the predicted classes list no background (id 0)")
    return rows, assigned, lookup, warnings if len(classes_pred) else []


def _plain(name: Any) -> str:
    return " ".join(str(name).replace("_", " ").split()).casefold()


# -------------------------------------------------------------------------------------------- tally


class Tally:
    """The counts of each image: confusions, whole and in the border band, and F curves."""

    def __init__(
        self, n_true: int, n_pred: int, rule: Rule, lookup: UInt8[np.ndarray, "256"]
    ) -> None:
        self.n_true = n_true
        self.n_pred = n_pred
        self.rule = rule
        self.lookup = lookup
        self.names: list[str] = []
        self.counts: list[np.ndarray] = []
        self.band: list[np.ndarray] = []
        self.fg: list[np.ndarray] = []
        self.fg_band: list[np.ndarray] = []
        self.curves: list[np.ndarray] = []

    def add(self, name: str, prediction: np.ndarray, gt: np.ndarray) -> None:
        """Count one image; see `measure` for the arrays."""
        gt = np.asarray(gt)
        if gt.ndim != 2 or gt.dtype != np.uint8:
            raise SisError(
                f"the true mask of {name} is {gt.dtype}{list(gt.shape)}, expected uint8[h w]"
            )
        ids, soft = self._read(name, np.asarray(prediction), *gt.shape)
        rows = self.lookup[gt]
        if (rows == 254).any():
            raise SisError(
                f"the true mask of {name} holds class id {gt[rows == 254][0]}, which is not "
                "among the true classes"
            )
        keep = gt != 255
        fg_true = np.where(keep, gt > 0, 255).astype(np.uint8)
        fg = soft > 0.5 if self.rule.binary else ids > 0
        band = metrics.boundary_band(rows, RADIUS)
        fg_band = metrics.boundary_band(fg_true, RADIUS)
        self.names.append(str(name))
        self.counts.append(self._count(rows, ids, keep))
        self.band.append(self._count(rows, ids, band))
        self.fg.append(metrics.confusion(fg_true, fg, 2))
        self.fg_band.append(metrics.confusion(fg_true[fg_band], fg[fg_band], 2))
        self.curves.append(protocols.f_curve(soft, gt > 0, keep, self.rule.beta2))

    def _count(self, rows: np.ndarray, ids: np.ndarray, where: np.ndarray) -> np.ndarray:
        flat = rows[where].astype(np.int64) * self.n_pred + ids[where]
        return (
            np.bincount(flat, minlength=self.n_true * self.n_pred)
            .reshape(self.n_true, self.n_pred)
            .astype(np.int32)
        )

    def _read(
        self, name: str, prediction: np.ndarray, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if prediction.ndim == 3 and prediction.dtype.kind == "f":
            if prediction.shape[2] > self.n_pred:
                raise SisError(
                    f"{name} has scores for {prediction.shape[2]} classes, but only {self.n_pred} "
                    "are named"
                )
            return self.rule.masks(prediction, height, width)
        if prediction.ndim != 2 or prediction.dtype.kind not in "iub":
            raise SisError(
                f"the prediction of {name} is {prediction.dtype}{list(prediction.shape)}, "
                "expected ids [h w] or scores float[h w c]"
            )
        if prediction.shape != (height, width):
            y, x = ((np.arange(n) * m) // n for n, m in zip((height, width), prediction.shape))
            prediction = prediction[y[:, None], x]
        if prediction.min() < 0 or prediction.max() >= self.n_pred:
            raise SisError(
                f"the prediction of {name} holds class id {prediction.max()}, but the named "
                f"classes end at {self.n_pred - 1}"
            )
        return prediction.astype(np.uint8), (prediction > 0).astype(np.float32)


# ------------------------------------------------------------------------------------------- scores


def regions(
    counts: Integer[np.ndarray, "n k p"], to: Integer[np.ndarray, "p"]
) -> Float[np.ndarray, "3 n k"]:
    """(hits, predicted, true) pixels per image and true class; to: predicted -> true or -1."""
    member = (to[:, None] == np.arange(counts.shape[1])).astype(np.float64)
    hits = np.einsum("nkp,pk->nk", counts, member)
    return np.stack([hits, counts.sum(1) @ member, counts.sum(2).astype(np.float64)])


def _iou(found: Float[np.ndarray, "3 *n k"]) -> np.ndarray:
    hits, predicted, gt = found
    return metrics.ratio(hits, predicted + gt - hits)


def _mean(values: np.ndarray, axis: int | None = None) -> Any:
    """The mean of the defined values, NaN where nothing is."""
    known = ~np.isnan(values)
    return metrics.ratio(np.where(known, values, 0).sum(axis), known.sum(axis))


def _interval(values: np.ndarray | None) -> list[float] | None:
    """The 95 % interval of a bootstrapped number."""
    if values is None or np.isnan(values).all():
        return None
    return [float(v) for v in np.nanpercentile(values, [2.5, 97.5])]


def _classes(
    counts: Integer[np.ndarray, "n k p"], band: Integer[np.ndarray, "n k p"],
    to: Integer[np.ndarray, "p"], rows: list[str], weights: Integer[np.ndarray, "r n"] | None,
) -> dict[str, Any]:  # fmt: skip
    """The scores of one assignment. The assignment itself is not redone in the resamples."""
    found, border = regions(counts, to), regions(band, to).sum(1)
    hits, predicted, gt = whole = found.sum(1)
    drawn = None if weights is None else np.einsum("rn,snk->srk", weights, found, optimize=True)
    boot = None if drawn is None else _iou(drawn)
    table = {
        "iou": _iou(whole), "f1": metrics.ratio(2 * hits, predicted + gt),
        "precision": metrics.ratio(hits, predicted), "recall": metrics.ratio(hits, gt),
        "iou_image_mean": _mean(_iou(found), 0), "border_iou": _iou(border), "pixels": gt,
    }  # fmt: skip
    return {
        "classes": [
            {
                "name": row,
                **{key: float(v[i]) for key, v in table.items()},
                "iou_interval": _interval(None if boot is None else boot[:, i]),
            }
            for i, row in enumerate(rows)
        ],
        "mean_iou": float(_mean(table["iou"])),
        "mean_iou_interval": _interval(None if boot is None else _mean(boot, 1)),
        "mean_f1": float(_mean(table["f1"])),
        "mean_precision": float(_mean(table["precision"])),
        "mean_recall": float(_mean(table["recall"])),
        "accuracy": float(metrics.ratio(hits.sum(), gt.sum())),
        "accuracy_interval": _interval(
            None if drawn is None else metrics.ratio(drawn[0].sum(1), drawn[2].sum(1))
        ),
        "mean_iou_image_mean": float(_mean(_mean(_iou(found), 1))),
        "border_mean_iou": float(_mean(table["border_iou"] if len(rows) else np.array([np.nan]))),
    }


def _foreground(
    tally: Tally, rule: Rule, weights: Integer[np.ndarray, "r n"] | None
) -> dict[str, Any]:
    """Background (class 0) against the rest, over all pixels and per image, as `rule` does."""
    both = np.array([0, 1])
    found = regions(np.stack(tally.fg), both)
    border = _iou(regions(np.stack(tally.fg_band), both).sum(1))
    images = per_image_iou(found, rule.empty)
    sharp = np.array(
        [
            protocols.f_measure(h[1:], p[1:], float(t[1]), rule.beta2)[0]
            for h, p, t in found.transpose(1, 0, 2)
        ]
    )
    curves = np.stack(tally.curves)[:, slice(*rule.thresholds)].astype(np.float64)
    right = metrics.ratio(found[0].sum(1), found[2].sum(1))

    def scores(draw: np.ndarray) -> dict[str, np.ndarray]:
        """Every number for resamples draw[r, n] of the images."""
        whole = np.einsum("rn,snk->srk", draw, found, optimize=True)
        iou, (hits, predicted, gt) = _iou(whole), whole
        n, known = draw.sum(1), ~np.isnan(images)
        best = curves.max(1)[None] if rule.f_order == "max-mean" else None
        return {
            "iou_foreground": iou[:, 1],
            "iou_background": iou[:, 0],
            "mean_iou": _mean(iou, 1),
            "accuracy": metrics.ratio(hits.sum(1), gt.sum(1)),
            "f1": metrics.ratio(2 * hits, predicted + gt)[:, 1],
            "iou_image_mean": metrics.ratio(
                draw @ np.where(known, images, 0), draw @ known.astype(float)
            ),
            "accuracy_image_mean": metrics.ratio(
                draw @ np.nan_to_num(right), draw @ (~np.isnan(right)).astype(float)
            ),
            "f_beta": draw @ sharp / n,
            "max_f": (draw @ best[0] if best is not None else (draw @ curves).max(1)) / n,
        }

    once = scores(np.ones((1, len(images))))
    boot = None if weights is None else scores(weights.astype(np.float64))
    result: dict[str, Any] = {key: float(v[0]) for key, v in once.items()}
    return result | {
        "border_iou_foreground": float(border[1]),
        "border_iou_background": float(border[0]),
        "border_mean_iou": float(_mean(border)),
        "max_f_threshold": float((rule.thresholds[0] + curves.mean(0).argmax()) / 255)
        if rule.f_order == "mean-max"
        else math.nan,
        "beta2": rule.beta2,
        "intervals": {key: _interval(v) for key, v in boot.items()} if boot else {},
    }


def per_image_iou(found: Float[np.ndarray, "3 n 2"], empty: float) -> Float[np.ndarray, "n"]:
    """Foreground IoU of each image; `empty` where neither mask has foreground."""
    iou = _iou(found)[:, 1]
    return np.where(np.isnan(iou), empty, iou)


def _per_image(
    tally: Tally, counts: Integer[np.ndarray, "n k p"], assigned: Integer[np.ndarray, "p"]
) -> list[dict[str, Any]]:
    """Worst foreground first: where to look."""
    foreground = per_image_iou(regions(np.stack(tally.fg), np.array([0, 1])), tally.rule.empty)
    mean = _mean(_iou(regions(counts, assigned)), 1)
    order = np.argsort(np.where(np.isnan(foreground), 2, foreground), kind="stable")
    return [
        {"name": tally.names[i], "iou_foreground": float(foreground[i]), "mean_iou": float(mean[i])}
        for i in order
    ]
