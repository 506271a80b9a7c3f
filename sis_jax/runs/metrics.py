"""The scores of an evaluation: saved in the run, as a table, and as rows for the report."""

from __future__ import annotations

import html
import json
import math
import os
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sis_jax.data.files import parse_json, plain, utf8, write_atomic
from sis_jax.types import SisError, UsageError

FOLDER, FILE = "metrics", "metrics.json"
# The foreground's numbers in the table and the report, in this order.
_FOREGROUND = {
    "mean_iou": "mean IoU of foreground and background", "iou_foreground": "foreground IoU",
    "iou_background": "background IoU", "iou_image_mean": "foreground IoU, mean of images",
    "accuracy": "pixel accuracy", "accuracy_image_mean": "accuracy, mean of images",
    "f1": "foreground F1", "f_beta": "F-beta, mean of images", "max_f": "max F-beta",
    "border_mean_iou": "border mean IoU",
}  # fmt: skip
_WAYS = {
    "zero_label": "classes of one name, no label used",
    "hungarian": "Hungarian matching, chosen with the labels",
    "majority": "majority matching, chosen with the labels",
}


@dataclass(frozen=True)
class Metrics:
    """The scores of one evaluation; `metrics["foreground.mean_iou"]` is one number or NaN.

    name: the measurement and its protocol. values: of `ops.scoring.measure`; paper: published
        numbers.
    """

    name: str
    values: dict[str, Any]
    paper: dict[str, float]

    def __getitem__(self, key: str) -> Any:
        found: Any = self.values
        for part in key.split("."):
            found = found[part]
        return math.nan if found is None else found

    def rows(self) -> list[dict[str, Any]]:
        """One record per number: name, ours, low and high of the 95 % interval, paper or None."""
        rows, foreground = [], self.values["foreground"]
        for key, title in _FOREGROUND.items():
            rows.append(self._row(title, foreground[key], foreground["intervals"].get(key), key))
        for way in (w for w in _WAYS if w in self.values):
            found = self.values[way]
            rows.append(
                self._row(
                    f"mean IoU of classes ({way.replace('_', ' ')})",
                    found["mean_iou"],
                    found["mean_iou_interval"],
                    f"{way}.mean_iou",
                )
            )
            rows.append(
                self._row(
                    f"accuracy of classes ({way.replace('_', ' ')})",
                    found["accuracy"],
                    found["accuracy_interval"],
                    f"{way}.accuracy",
                )
            )
        return rows

    def _row(
        self, title: str, ours: float | None, interval: list[float] | None, key: str
    ) -> dict[str, Any]:
        low, high = interval or (None, None)
        return {
            "name": f"{self.name}: {title}",
            "ours": ours,
            "low": low,
            "high": high,
            "paper": self.paper.get(key),
        }

    def show(self) -> str:
        """A table for people: foreground, classes by name, then the matchings' scores."""
        v = self.values
        lines = [
            f"{self.name}: {v['images']} images, protocol {v['protocol']}; its headline is the "
            f"{v['headline']}",
            "",
        ]
        lines += [
            f"{'background against the rest, no label used':<44}{'ours':>8}"
            f"{'95 % interval':>18}{'paper':>8}"
        ]
        for row in self.rows()[: len(_FOREGROUND)]:
            lines.append(
                "  "
                f"{row['name'].removeprefix(self.name + ': '):<42}{_n(row['ours']):>8}"
                f"{_span(row):>18}{_n(row['paper'], ''):>8}"
            )
        lines += [
            "",
            *_table(
                _WAYS["zero_label"],
                v["zero_label"],
                v["assignment"]["zero_label"],
                v["predicted_classes"],
            ),
        ]
        for way in ("hungarian", "majority"):
            if way in v:
                pairs = [
                    f"{p} = {t or 'nothing'}"
                    for p, t in zip(v["predicted_classes"], v["assignment"][way])
                ]
                lines += [
                    "",
                    f"{_WAYS[way]}: mean IoU {_n(v[way]['mean_iou'])}, accuracy "
                    f"{_n(v[way]['accuracy'])}",
                    "  " + ", ".join(pairs),
                ]
        lines += ["", "confusion, rows are the ground truth", *_confusion(v)]
        lines += [f"note: {text}" for text in v.get("warnings", [])]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.show())}</pre>"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one JSON file, whole or not at all."""
        path = Path(path)
        content = plain({"name": self.name, "paper": self.paper, **self.values})
        write_atomic(
            path,
            utf8(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
        )
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], name: str | None = None) -> Metrics:
        """The metrics in a file or of a run (`name`, or the only one); UsageError without."""
        path = Path(path)
        if path.is_dir():
            found = sorted((path / FOLDER).glob("*.json"))
            chosen = [f for f in found if name is None or f.stem == name]
            if len(chosen) != 1:
                known = ", ".join(f.stem for f in found) or "none: run python -m sis_jax.evaluate"
                raise UsageError(
                    f"{path} has the evaluations {known}; asked for "
                    f"{name or 'one of them without its name'}"
                )
            path = chosen[0]
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            found = cls(
                content.pop("name"),
                {k: v for k, v in content.items() if k != "paper"},
                content["paper"],
            )
            found.rows()  # raises for numbers that are none
            return found
        except FileNotFoundError:
            raise UsageError(f"there is no file {path}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = " ".join(str(error).split())[:200]
            raise SisError(f"{path} cannot be read as metrics: {why}") from None


def write_summary(run: Path) -> Path:
    """RUN/metrics.json of all evaluations: "metrics" has a row per number."""
    every = [Metrics.load(f) for f in sorted((run / FOLDER).glob("*.json"))]
    content = {
        "metrics": [row for m in every for row in m.rows()],
        "evaluations": {
            m.name: {k: v for k, v in m.values.items() if k != "per_image"} for m in every
        },
    }
    write_atomic(
        run / FILE,
        utf8(json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
    )
    return run / FILE


def _n(value: float | None, missing: str = "-") -> str:
    return missing if value is None or math.isnan(value) else f"{value:.4f}"


def _span(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else f"{row['low']:.4f}..{row['high']:.4f}"


def _table(
    title: str, found: dict[str, Any], assignment: list[str | None], predicted: list[str]
) -> Iterator[str]:
    """The scores per true class, with the predicted classes that count as it."""
    columns = {
        "iou": "IoU",
        "iou_interval": "95 % interval",
        "f1": "F1",
        "precision": "precision",
        "recall": "recall",
        "border_iou": "border IoU",
    }
    yield f"{title}: mean IoU {_n(found['mean_iou'])}, accuracy {_n(found['accuracy'])}"
    wide = max(len("class"), *(len(row["name"]) for row in found["classes"]))
    yield (
        f"  {'class':<{wide}}"
        + "".join(f"{c:>{18 if k == 'iou_interval' else 11}}" for k, c in columns.items())
        + "  from"
    )
    for row in found["classes"]:
        low, high = row["iou_interval"] or (None, None)
        cells = [
            f"{_span({'low': low, 'high': high}):>18}"
            if k == "iou_interval"
            else f"{_n(row[k]):>11}"
            for k in columns
        ]
        source = (
            ", ".join(p for p, t in zip(predicted, assignment) if t == row["name"]) or "nothing"
        )
        yield f"  {row['name']:<{wide}}{''.join(cells)}  {source}"


def _confusion(v: dict[str, Any]) -> Iterable[str]:
    """Counts as shares of each true class, in percent; twelve columns at most fit a terminal.
    Long names stand in several lines above their column.
    """
    heads = [textwrap.wrap(name, 10) for name in v["predicted_classes"][:12]]
    wide = max(len(name) for name in v["true_classes"])
    high = max(len(lines) for lines in heads)
    more = "  ..." if len(v["predicted_classes"]) > 12 else ""
    for row in zip(*([""] * (high - len(lines)) + lines for lines in heads)):
        yield f"  {'':<{wide}}" + "".join(f"{line:>11}" for line in row) + more
    for name, counts in zip(v["true_classes"], v["confusion"]):
        total = sum(counts)
        yield f"  {name:<{wide}}" + "".join(
            f"{100 * c / total:>10.1f}%" if total else f"{'-':>11}" for c in counts[:12]
        )
