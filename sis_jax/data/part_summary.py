"""What was found, in a few lines, and how reliable it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sis_jax.data.parts import BACKGROUND, Parts

UNSTABLE = 0.7  # agreement below this is marked
_LISTED = 6


def summary_of(parts: Parts) -> list[str]:
    """The parts with their shares, what is unstable, and what has no name."""
    lines = [_found(parts)]
    if parts.finer is not None:
        lines.append(f"in it, {_found(parts.finer)}")
    lines.append(_stability(parts))
    levels = (parts,) if parts.finer is None else (parts, parts.finer)
    unsure = [c for level in levels for c in _foreground(level) if c.get("unsure")]
    unnamed = [f"{c['name']} ({c['guess']}?)" for c in unsure]
    if unnamed:
        lines.append(f"no text fits {_listed(unnamed)}")
    return lines


def _found(parts: Parts) -> str:
    shares = {c["id"]: sum(f.get("share") or 0 for f in facts_of(parts, c)) for c in parts.classes}
    named = [f"{c['name']} {shares[c['id']]:.0%}" for c in _foreground(parts)]
    background = (
        f"{parts.names[BACKGROUND]} {shares[BACKGROUND]:.0%}"
        if BACKGROUND in shares
        else "no background was found"
    )
    return f"{len(named)} {'part' if len(named) == 1 else 'parts'}: {_listed(named)}; {background}"


def _foreground(parts: Parts) -> list[dict[str, Any]]:
    return [c for c in parts.classes if c["id"] != BACKGROUND]


def _stability(parts: Parts) -> str:
    agreement = _agreement(parts)
    finer = {} if parts.finer is None else _agreement(parts.finer)
    both = [*agreement.items(), *finer.items()]
    if low := [f"{name} ({value:.2f})" for name, value in both if value < UNSTABLE]:
        return f"other seeds find other outlines of {_listed(low)} (agreement below {UNSTABLE})"
    if not agreement:
        return "how much other seeds agree was not measured"
    least = f"agreement {min(agreement.values()):.2f} or more"
    if finer:
        least += f", finer parts {min(finer.values()):.2f} or more"
    return f"other seeds find the same parts ({least})"


def _agreement(parts: Parts) -> dict[str, float]:
    """The mean over the clusters of each part whose agreement with other seeds was measured."""
    known = {c["name"]: weighted(facts_of(parts, c), "agreement") for c in parts.classes}
    return {name: value for name, value in known.items() if value is not None}


def _listed(words: list[str]) -> str:
    more = f" and {len(words) - _LISTED} more" if len(words) > _LISTED else ""
    return ", ".join(words[:_LISTED]) + more


def facts_of(parts: Parts, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The facts of a class's clusters."""
    return [c for c in parts.clusters if c["id"] in entry["clusters"]]


def weighted(clusters: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """The mean of a cluster statistic over a class, each cluster by its share of the pixels."""
    known = [(c[key], c.get("share") or 1e-9) for c in clusters if c.get(key) is not None]
    return sum(v * w for v, w in known) / sum(w for _, w in known) if known else None
