"""Clusters with the names a text model gave them, grouped into classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sis_jax.data import draw

BACKGROUND = 0
_Said = Mapping[int, Mapping[str, Any]]


def grouped(
    classes: Sequence[Mapping[str, Any]], clusters: Sequence[Mapping[str, Any]], said: _Said
) -> tuple[dict[str, Any], ...]:
    """New classes: one per name, the background first; `said` as in `Parts.named`.

    A class keeps an id of those it is made of, so that colours stay; one that was split from
    another gets a new id.
    """
    share = {c["id"]: c.get("share") or 1e-9 for c in clusters}
    groups: dict[str | None, list[int]] = {}
    for entry in classes:
        for cluster in entry["clusters"]:
            groups.setdefault(_group(entry, cluster, said), []).append(cluster)
    owner = {cluster: entry for entry in classes for cluster in entry["clusters"]}
    label = next((c["name"] for c in classes if c["id"] == BACKGROUND), "background")
    names = {name: label if name is None else name for name in groups}
    ids = _ids(groups, owner)
    made = [
        {
            "id": ids[name],
            "name": names[name],
            "colour": draw.colour(ids[name]),
            "clusters": sorted(members),
        }
        | _facts(members, said, share)
        for name, members in groups.items()
    ]
    return tuple(sorted(made, key=lambda entry: entry["id"]))


def _group(entry: Mapping[str, Any], cluster: int, said: _Said) -> str | None:
    """The name a cluster goes under; None is the background."""
    verdict = said.get(cluster)
    if verdict is not None and verdict["named"]:
        return verdict["name"]
    if entry["id"] == BACKGROUND:
        return None
    if verdict is None or entry.get("score") is None or entry.get("unsure"):
        return entry["name"]
    return f"part {entry['id']}" if len(entry["clusters"]) == 1 else f"part {entry['id']}.{cluster}"


def _ids(
    groups: Mapping[str | None, list[int]], owner: Mapping[int, Mapping[str, Any]]
) -> dict[str | None, int]:
    """An id per group: the smallest free one of the classes its clusters come from, first for
    groups that keep their name.
    """
    fresh = max((entry["id"] for entry in owner.values()), default=0) + 1
    ids: dict[str | None, int] = {None: BACKGROUND}
    for name in sorted(
        (n for n in groups if n is not None),
        key=lambda n: all(owner[c]["name"] != n for c in groups[n]),
    ):
        mine = sorted({owner[c]["id"] for c in groups[name]} - {BACKGROUND, *ids.values()})
        ids[name] = mine[0] if mine else fresh
        fresh += not mine
    return ids


def _facts(members: Iterable[int], said: _Said, share: Mapping[int, float]) -> dict[str, Any]:
    """The text model's scores of a class: the mean over its clusters, by their share of the pixels;
    the runner-up is that of the largest.
    """
    told = [c for c in members if c in said]
    if not told:
        return {
            "prompts": [],
            "score": None,
            "margin": None,
            "runner_up": None,
            "guess": None,
            "unsure": False,
        }
    largest = said[max(told, key=lambda c: share[c])]
    total = sum(share[c] for c in told)
    mean = {key: sum(said[c][key] * share[c] for c in told) / total for key in ("score", "margin")}
    unsure = any(not said[c]["named"] for c in told)
    guess = largest["name"] if unsure else None
    prompts = list(dict.fromkeys(p for c in told if said[c]["named"] for p in said[c]["prompts"]))
    return {
        "prompts": prompts,
        **mean,
        "runner_up": largest["runner_up"],
        "guess": guess,
        "unsure": unsure,
    }
