"""Clusters with the names a text model gave them, grouped into classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sis_jax.data import draw

BACKGROUND = 0
_Verdicts = Mapping[int, Mapping[str, Any]]
_Classes = Sequence[Mapping[str, Any]]

UNSAID: dict[str, Any] = {
    "prompts": [],
    "score": None,
    "margin": None,
    "runner_up": None,
    "guess": None,
    "unsure": False,
}


def new_class(class_id: int, name: str, clusters: list[int]) -> dict[str, Any]:
    """A class that no text model has named."""
    colour = draw.colour(class_id)
    return {"id": class_id, "name": name, "colour": colour, "clusters": clusters, **UNSAID}


def grouped(
    classes: Sequence[Mapping[str, Any]], clusters: Sequence[Mapping[str, Any]], verdicts: _Verdicts
) -> tuple[dict[str, Any], ...]:
    """New classes: one per name, background first; a class keeps an id of those it is made of."""
    share = {c["id"]: c.get("share") or 1e-9 for c in clusters}
    groups: dict[str | None, list[int]] = {}
    for entry in classes:
        for cluster in entry["clusters"]:
            groups.setdefault(_group(entry, cluster, verdicts), []).append(cluster)
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
        | _facts(members, verdicts, share)
        for name, members in groups.items()
    ]
    return tuple(sorted(made, key=lambda entry: entry["id"]))


def _group(entry: Mapping[str, Any], cluster: int, verdicts: _Verdicts) -> str | None:
    """The name a cluster goes under; None is the background."""
    verdict = verdicts.get(cluster)
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
    """An id per group: the smallest free one of its clusters' classes, first for kept names."""
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


def _facts(
    members: Iterable[int], verdicts: _Verdicts, share: Mapping[int, float]
) -> dict[str, Any]:
    """The text model's scores of a class, averaged over its clusters by their share."""
    scored = [c for c in members if c in verdicts]
    if not scored:
        return dict(UNSAID)
    largest = verdicts[max(scored, key=lambda c: share[c])]
    total = sum(share[c] for c in scored)
    mean = {
        key: sum(verdicts[c][key] * share[c] for c in scored) / total for key in ("score", "margin")
    }
    unsure = any(not verdicts[c]["named"] for c in scored)
    guess = largest["name"] if unsure else None
    prompts = list(
        dict.fromkeys(p for c in scored if verdicts[c]["named"] for p in verdicts[c]["prompts"])
    )
    return {
        "prompts": prompts,
        **mean,
        "runner_up": largest["runner_up"],
        "guess": guess,
        "unsure": unsure,
    }


# The finer of two levels: its clusters name the coarse cluster they lie in, {"id", "parent"}


def finer_classes(classes: _Classes, clusters: _Classes) -> tuple[dict[str, Any], ...]:
    """One class per finer cluster, in the order of the coarse classes and the largest first; those
    of the background are the background.
    """
    children: dict[int, list[Mapping[str, Any]]] = {}
    for cluster in sorted(clusters, key=lambda c: -c["share"]):
        children.setdefault(cluster["parent"], []).append(cluster)
    made: list[dict[str, Any]] = []
    ordered = sorted(classes, key=lambda c: c["id"])
    for entry in ordered:
        own = [c["id"] for parent in entry["clusters"] for c in children.get(parent, ())]
        if entry["id"] == BACKGROUND:
            made.append(new_class(BACKGROUND, entry["name"], sorted(own)))
        else:
            first = 1 + sum(c["id"] != BACKGROUND for c in made)
            made += [new_class(i, "", [cluster]) for i, cluster in enumerate(own, first)]
    return _with_names(classes, made, clusters, {})


def followed(
    before: _Classes, after: _Classes, finer: _Classes, clusters: _Classes
) -> tuple[dict[str, Any], ...]:
    """The finer classes when the coarse ones change: what lies in the background goes there, and
    names that came from a coarse class change with it. Other names stay, and so does what was sent
    to the background at the finer level.
    """
    owner, parent = _owners(after), {c["id"]: c["parent"] for c in clusters}
    dropped = {c for entry in finer if entry["id"] == BACKGROUND for c in entry["clusters"]}
    dropped -= {c for c, p in parent.items() if _owners(before)[p]["id"] == BACKGROUND}
    hidden = [c for c, p in parent.items() if owner[p]["id"] == BACKGROUND or c in dropped]
    usual = inherited(before, finer, clusters, {})
    made, own = [], {}
    if hidden:
        name = next((c["name"] for c in after if c["id"] == BACKGROUND), "background")
        made.append(new_class(BACKGROUND, name, sorted(hidden)))
    fresh = 1 + max(entry["id"] for entry in finer)
    for entry in finer:
        kept = [c for c in entry["clusters"] if c not in hidden]
        if entry["id"] == BACKGROUND:  # no longer, for these
            made += [new_class(i, "", [c]) for i, c in enumerate(kept, fresh)]
        elif kept:
            made.append(dict(entry, clusters=kept))
            if entry["name"] != usual[entry["id"]]:
                own[entry["id"]] = entry["name"]
    return _with_names(after, made, clusters, own)


def finer_named(
    classes: _Classes, finer: _Classes, clusters: _Classes, verdicts: _Verdicts
) -> tuple[dict[str, Any], ...]:
    """The finer classes with the names that a text model gave their clusters, `verdicts` as in
    `Parts.named`. The outline is the coarse level's, so no part becomes background by text. A part
    that no text fits goes by the number of the coarse class, "part 1.2".
    """
    share = {c["id"]: c.get("share") or 1e-9 for c in clusters}
    parts = {c: dict(v, named=v["named"] and v["name"] is not None) for c, v in verdicts.items()}
    owner, parent = _owners(classes), {c["id"]: c["parent"] for c in clusters}
    own, made = {}, []
    for entry in finer:
        found = verdicts if entry["id"] == BACKGROUND else parts
        made.append(dict(entry) | _facts(entry["clusters"], found, share))
        largest = parts.get(max(entry["clusters"], key=lambda c: share[c]))
        if entry["id"] != BACKGROUND and largest is not None:
            number = owner[parent[entry["clusters"][0]]]["id"]
            own[entry["id"]] = largest["name"] if largest["named"] else f"part {number}"
    return _with_names(classes, made, clusters, own)


def inherited(
    classes: _Classes, finer: _Classes, clusters: _Classes, own: Mapping[int, str]
) -> dict[int, str]:
    """Names of the finer classes by id: own[id], or else that of the coarse class they lie in; with
    a number where several share a name, "face 2", or "part 1.2" in "part 1".
    """
    owner, parent = _owners(classes), {c["id"]: c["parent"] for c in clusters}
    groups: dict[str, list[int]] = {}
    for entry in finer:
        if entry["id"] != BACKGROUND:
            coarse = owner[parent[entry["clusters"][0]]]["name"]
            groups.setdefault(own.get(entry["id"], coarse), []).append(entry["id"])
    names = {}
    for name, ids in groups.items():
        mark = "." if name.startswith("part ") else " "
        for number, class_id in enumerate(ids, start=1):
            names[class_id] = f"{name}{mark}{number}" if len(ids) > 1 else name
    return names


def _with_names(
    classes: _Classes, finer: _Classes, clusters: _Classes, own: Mapping[int, str]
) -> tuple[dict[str, Any], ...]:
    names = inherited(classes, finer, clusters, own)
    return tuple(dict(entry, name=names.get(entry["id"], entry["name"])) for entry in finer)


def _owners(classes: _Classes) -> dict[int, Mapping[str, Any]]:
    return {cluster: entry for entry in classes for cluster in entry["clusters"]}
