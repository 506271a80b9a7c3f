"""Names given to parts by hand, as the report downloads them: edits.json.

    {
     "format": 1,
     "parts": "6f0c2a...",
     "levels": {"0": {"3": "hair", "7": "hair", "11": null}}
    }

levels: for a level of the parts, what `Parts.rename` takes: {class id: name}. Two parts of one name
become one part, null sends a part to the background. parts: the fingerprint of the parts that the
ids belong to; it may be left out in a file written by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sis_jax.data.files import json_bytes, parse_json, unique
from sis_jax.data.parts import Parts
from sis_jax.types import UsageError

FORMAT = 1
FORM = 'expected {"format": 1, "levels": {"0": {"3": "hair", "7": "hair", "11": null}}}'
_LARGEST = 1_000_000  # bytes: 255 names need a hundredth of it
_LONGEST = 200  # characters of a name
_FIELDS = ("format", "parts", "levels", "result")

Names = Mapping[int, str | None]


@dataclass(frozen=True)
class PartEdits:
    """levels: {level: {class id: name, or None for the background}}. parts: `fingerprint` of the
    parts they were made for, or "". result: that of the parts they made.
    """

    levels: Mapping[int, Names]
    parts: str = ""
    result: str = ""

    def apply(self, parts: Parts) -> Parts:
        """The parts with these names. Raises UsageError for ids that they do not have."""
        if self.parts and self.parts != state_of(parts):
            raise UsageError(
                "these edits were made for other parts, or are applied already: open the run's "
                "report.html as it is now, and edit there"
            )
        for level, names in sorted(self.levels.items()):
            if level == 0:
                parts = parts.rename(names)  # the finer level follows
            elif level == 1 and parts.finer is not None:
                parts = replace(parts, finer=parts.finer.rename(names))
            else:
                known = "level 0" if parts.finer is None else "the levels 0 and 1"
                raise UsageError(
                    f"the edits name level {level}, and these parts have {known}: make the edits "
                    "in the report of the same run"
                )
        return parts

    def content(self) -> dict[str, Any]:
        """The content of edits.json."""
        levels = {
            str(level): {str(key): name for key, name in names.items()}
            for level, names in self.levels.items()
        }
        known = {"parts": self.parts, "result": self.result}
        return {"format": FORMAT, **{k: v for k, v in known.items() if v}, "levels": levels}

    def dump(self) -> bytes:
        """edits.json as bytes."""
        return json_bytes(self.content())


def fingerprint(*levels: Iterable[Mapping[str, Any]]) -> str:
    """16 hexadecimal digits of the ids, names and clusters of the classes of all levels."""
    known = [
        sorted((c["id"], c["name"], sorted(c.get("clusters", ()))) for c in classes)
        for classes in levels
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def state_of(parts: Parts) -> str:
    """`fingerprint` of parts."""
    return fingerprint(parts.classes, *([] if parts.finer is None else [parts.finer.classes]))


def read_edits(source: str | os.PathLike[str] | Mapping[str, Any]) -> PartEdits:
    """Edits from a file or from its content as a dict. Raises UsageError that names the fault."""
    if isinstance(source, Mapping):
        return _edits(dict(source), "the edits")
    if not isinstance(source, str | os.PathLike):
        raise UsageError(f"edits must be a file or a dict, got {type(source).__name__}; {FORM}")
    path = Path(source).expanduser()
    return _edits(_json(path), str(path))


def _json(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise UsageError(f"{path} has more than {_LARGEST} bytes and is no edits.json; {FORM}")
        hook = unique(lambda key: f"{path} has the key {key!r} twice")
        return parse_json(data, object_pairs_hook=hook)
    except FileNotFoundError:
        raise UsageError(
            f"there is no file {path}: give the path of the edits.json that the report downloaded"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read as JSON ({error}); {FORM}") from None


def _edits(content: Any, where: str) -> PartEdits:
    if not isinstance(content, dict) or not isinstance(content.get("levels"), Mapping):
        raise UsageError(f"{where} holds no edits of parts; {FORM}")
    strange = set(content) - set(_FIELDS)
    if strange:
        raise UsageError(f"{where} has the field {min(strange, key=str)!r}; {FORM}")
    if content.get("format") != FORMAT or type(content["format"]) is not int:
        raise UsageError(
            f"{where} has the format {_short(content.get('format'))}, this sis_jax reads {FORMAT}"
        )
    texts = {key: content.get(key, "") for key in ("parts", "result")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise UsageError(f"{where} has {key} = {_short(text)}, expected a fingerprint as text")
    levels = {
        _number(level, f"{where} names the level"): _names(names, f"level {level} of {where}")
        for level, names in content["levels"].items()
    }
    if not any(levels.values()):
        raise UsageError(f"{where} changes no part; {FORM}")
    return PartEdits({level: names for level, names in levels.items() if names}, **texts)


def _names(names: Any, where: str) -> dict[int, str | None]:
    if not isinstance(names, Mapping):
        raise UsageError(f"{where} is {_short(names)}, expected names by class id; {FORM}")
    return {
        _number(key, f"{where} names the part"): _name(name, f"part {key} of {where}")
        for key, name in names.items()
    }


def _number(text: Any, what: str) -> int:
    """A level or a class id, which JSON keeps as text."""
    text = str(text) if type(text) is int else text
    known = isinstance(text, str) and len(text) <= 3 and text.isascii() and text.isdigit()
    if not known or str(int(text)) != text:
        raise UsageError(f"{what} {_short(text)}, expected a number such as 3; {FORM}")
    return int(text)


def _name(name: Any, what: str) -> str | None:
    if name is None:
        return None
    if not isinstance(name, str) or not name.strip():
        raise UsageError(
            f"{what} is called {_short(name)}, expected a name, or null for the background"
        )
    if len(name) > _LONGEST or not name.isprintable():
        raise UsageError(
            f"{what} is called {_short(name)}, expected at most {_LONGEST} printable characters"
        )
    return name.strip()


def _short(value: Any) -> str:
    return ascii(value) if len(ascii(value)) <= 60 else ascii(value)[:57] + "..."
