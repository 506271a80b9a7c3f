"""Ontologies: which words describe which class, `{prompt: class or None}`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sis_jax.data.files import parse_json, unique
from sis_jax.types import UsageError

NEUTRAL = "(neutral)"
_FORM = 'expected {"a photo of hair": "hair", "the background": null}'
# What ships, by name. "faces": the parts that the text model "faces-clip" was seen to distinguish.
SHIPPED: dict[str, dict[str, Any]] = {
    "faces": {
        "classes": {
            "hair": ["hair", "a head of hair"],
            "face": {
                "face": ["skin", "cheeks"],
                "eyes": ["eyes", "eyebrows"],
                "nose": ["a nose"],
                "mouth": ["a mouth", "lips"],
            },
            # it takes necks for clothes
            "neck and clothes": ["clothes", "clothing"],
        },
        "background": ["the background", "a wall", "what is behind a person"],
    }
}
_FIELDS = ("classes", "background", "neutral", "templates")


@dataclass(frozen=True)
class Ontology:
    """prompts: (text, class), class None is the background. neutral: texts whose parts stay
    unnamed.

    templates: every prompt is put in place of each "{}", and the results are averaged. finer:
        (text, finer class) of some prompts, by which the finer level of parts separates what is
        one class at the coarse one.
    """

    prompts: tuple[tuple[str, str | None], ...]
    neutral: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)
    finer: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    @property
    def classes(self) -> tuple[str | None, ...]:
        """The classes in order; None is the background, `NEUTRAL` the last one, if there is any."""
        return tuple(
            dict.fromkeys([c for _, c in self.prompts] + ([NEUTRAL] if self.neutral else []))
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """Prompts, then neutral words, without templates."""
        return (*(text for text, _ in self.prompts), *self.neutral)

    def owner(self) -> Int[np.ndarray, "p"]:
        """For each of `texts`, the number of its class in `classes`."""
        at = {c: i for i, c in enumerate(self.classes)}
        return np.array(
            [at[c] for _, c in self.prompts] + [at[NEUTRAL] for _ in self.neutral], np.int64
        )

    def filled(self) -> list[list[str]]:
        """For each of `texts`, that text in every template."""
        return [
            [template.replace("{}", text) for template in self.templates] for text in self.texts
        ]

    def prompts_of(self, name: str | None) -> list[str]:
        """The prompts of one class."""
        return [text for text, c in self.prompts if c == name]

    def finer_of(self, name: str | None) -> dict[str, list[str]]:
        """{finer class: its prompts} of one class, empty where it has none."""
        below, found = dict(self.finer), {}
        for text in self.prompts_of(name):
            if text in below:
                found.setdefault(below[text], []).append(text)
        return found


def ontology_of(
    source: Any = None,
    prompts: Sequence[str] = (),
    neutral: Sequence[str] = (),
    templates: Sequence[str] = (),
) -> Ontology:
    """An ontology from a user's input; UsageError names the fault.

    source: an Ontology, {prompt: class or None}, a name in `SHIPPED`, or a JSON file with one, or
        with {"classes": {name: [prompts]}, "background": [prompts], "neutral": [words],
        "templates": [...]}; in place of [prompts] a class may have {finer class: [prompts]}, the
        one of its own name for what is none of the others. prompts: further "prompt=class",
        "prompt=" for the background.
    """
    if source is None and not prompts:
        raise UsageError(
            'no ontology was given: give --ontology FILE, or --prompt "a photo of hair=hair" once '
            "or more"
        )
    pairs, words, forms, finer = _read(source) if source is not None else ((), (), (), ())
    pairs = (*pairs, *map(_pair, prompts))
    _check_pairs(pairs)
    return Ontology(pairs, (*words, *neutral), (*forms, *templates) or ("{}",), finer)


_Read = tuple[tuple[Any, ...], tuple[str, ...], tuple[str, ...], tuple[tuple[str, str], ...]]


def _read(source: Any) -> _Read:
    if isinstance(source, Ontology):
        return (
            source.prompts,
            source.neutral,
            source.templates if source.templates != ("{}",) else (),
            source.finer,
        )
    if isinstance(source, str) and source in SHIPPED and not Path(source).is_file():
        return _content(SHIPPED[source], "")
    if isinstance(source, str | os.PathLike):
        return _content(_json(Path(source)), f"{os.fspath(source)} ")
    if isinstance(source, Mapping):
        return _content(dict(source), "")
    raise UsageError(
        f"an ontology must be a dict or the path of a JSON file, got {type(source).__name__}; "
        f"{_FORM}"
    )


def _json(path: Path) -> Any:
    hook = unique(
        lambda key: f"{path} has the prompt {key!r} twice: every prompt belongs to one class"
    )
    try:
        return parse_json(path.read_text(encoding="utf-8"), object_pairs_hook=hook)
    except FileNotFoundError:
        names = ", ".join(map(repr, SHIPPED))
        raise UsageError(
            f"there is no ontology file {path}: {_FORM} in it, or one that ships: {names}"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read as JSON ({error}); {_FORM}") from None


def _content(content: Any, where: str) -> _Read:
    if not isinstance(content, dict):
        raise UsageError(f"{where}holds {type(content).__name__}, no ontology; {_FORM}")
    if not isinstance(content.get("classes"), dict):
        return tuple(content.items()), (), (), ()
    strange = set(content) - set(_FIELDS)
    if strange:
        raise UsageError(
            f"{where}has the field {min(strange)!r}; an ontology with classes may have "
            f"{', '.join(_FIELDS)}"
        )
    groups = [
        (name, below, prompt)
        for name, given in content["classes"].items()
        for below, several in (given.items() if isinstance(given, dict) else [(None, given)])
        for prompt in _listed(several, f"{where}classes.{name}" + (f".{below}" if below else ""))
    ]
    finer = tuple((prompt, below) for _, below, prompt in groups if below is not None)
    _check_pairs(finer)
    pairs = [(prompt, name) for name, _, prompt in groups]
    pairs += [
        (prompt, None) for prompt in _listed(content.get("background", []), f"{where}background")
    ]
    neutral, templates = (
        tuple(_listed(content.get(key, []), f"{where}{key}")) for key in ("neutral", "templates")
    )
    return tuple(pairs), neutral, templates, finer


def _listed(value: Any, what: str) -> list[str]:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        raise UsageError(f"{what} must be a list of texts, got {value!r}")
    return list(value)


def _pair(text: str) -> tuple[str, str | None]:
    prompt, equals, name = text.rpartition("=")
    if not equals:
        raise UsageError(
            f'--prompt got {text!r}, expected "prompt=class", such as "a photo of hair=hair"; '
            '"the wall=" is background'
        )
    return prompt.strip(), name.strip() or None


def _check_pairs(pairs: Iterable[tuple[Any, Any]]) -> None:
    for prompt, name in pairs:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError(
                f"a prompt must be a text that is not empty, got {prompt!r} for the class {name!r}"
            )
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise UsageError(
                f"the class of the prompt {prompt!r} must be a name, or null for the background, "
                f"got {name!r}"
            )
        if name == NEUTRAL:
            raise UsageError(
                f"{NEUTRAL!r} is no name for a class: give neutral words apart from the prompts"
            )


def _check(ontology: Ontology) -> None:
    if not ontology.prompts:
        raise UsageError(f"the ontology is empty: {_FORM}")
    _check_pairs(ontology.prompts)
    twice = first_twin(ontology.texts)
    if twice is not None:
        raise UsageError(
            f"the prompt {twice!r} is there twice: every prompt belongs to one class, and neutral "
            "words to none"
        )
    for template in ontology.templates:
        if template.count("{}") != 1:
            raise UsageError(
                f'the template {template!r} must hold "{{}}" once, where the prompt goes: "a '
                f'photo of {{}}"'
            )
    classes = ontology.classes
    if len(classes) == 1:
        raise UsageError(
            f"the ontology has the class {classes[0]!r} only, which every part would get: give a "
            "second class, a background (null), or neutral words"
        )


def first_twin(texts: Iterable[str]) -> str | None:
    """The first text that is there twice, capital letters and spaces aside, or None."""
    seen: set[str] = set()
    for text in texts:
        plain = " ".join(text.lower().split())
        if plain in seen:
            return text
        seen.add(plain)
    return None
