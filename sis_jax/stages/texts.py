"""Text in `discover`: names for the parts, and one more part that is generated too rarely."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Any

from sis_jax.checkpoints.clip import CLIP
from sis_jax.data import draw
from sis_jax.data.files import json_bytes
from sis_jax.data.ontology import Ontology, ontology_of
from sis_jax.data.parts import Parts
from sis_jax.runs.configs.discover import DiscoverConfig, RareClass
from sis_jax.runs.configs.label import Naming
from sis_jax.stages.directions import LEAST_N, STEPS, TRIED, trial
from sis_jax.stages.naming import check_words, load_text_model, name_parts
from sis_jax.stages.rare import Rare, add_rare, class_name, described, sheet
from sis_jax.stages.teacher import Teacher
from sis_jax.types import Generator, UsageError

MOST_CLUSTERS = (
    253  # and one for the rare class; class ids are below 255, which masks keep for "ignore"
)


@dataclass(frozen=True)
class Texts:
    """The text of a request, checked, with the text model loaded."""

    clip: CLIP
    ontology: Ontology | None
    rare_class: RareClass

    @classmethod
    def of(cls, gen: Generator, method: Any, config: DiscoverConfig) -> Texts:
        """UsageError for texts that cannot work, before anything is computed."""
        words = ontology_of(config.ontology) if config.ontology is not None else None
        asked = config.rare_class
        if asked.rare is not None:
            check_rare(method, asked)
            asked = replace(asked, rare=asked.rare.strip(), neutral=asked.neutral.strip())
        model = load_text_model(config.clip, gen.info.name)
        check_words(model, [asked.rare, asked.neutral] if asked.rare is not None else [])
        check_words(
            model,
            [text for several in words.filled() for text in several] if words is not None else [],
        )
        return cls(model, words, asked)

    def tried(self, gen: Generator, method: Any, fit: dict[str, float]) -> dict[str, float]:
        """Seconds and bytes of `discover` with the rare class, from what it takes without, `fit`,
        and a second's worth of scores. The parts are found twice, and half of the displacements
        are tried until one is far enough.
        """
        asked, began = self.rare_class, time.perf_counter()
        assert asked.rare is not None
        scored = trial(gen, self.clip, asked.rare, asked.neutral, truncation=method.truncation)
        samples = asked.rare_n + TRIED * STEPS / 2 - scored.read
        return {
            "seconds": 2 * fit["seconds"] + time.perf_counter() - began + samples * scored.each,
            "memory_bytes": max(fit["memory_bytes"], scored.memory),
        }

    def extended(self, gen: Generator, fitted: Any, seed: int) -> Rare | None:
        """The fitted method with the rare class, None where none was asked for."""
        asked = self.rare_class
        if asked.rare is None:
            return None
        return add_rare(
            gen,
            fitted,
            self.clip,
            asked.rare,
            asked.neutral,
            n=asked.rare_n,
            share=asked.rare_share,
            seed=seed,
        )

    def named(self, gen: Any, parts: Parts, rare: Rare | None) -> tuple[Parts, dict[str, bytes]]:
        """(named parts, further files): scores; the rare class keeps its prompt's name."""
        files: dict[str, bytes] = {}
        if rare is not None:
            parts = parts.rename(
                {next(c["id"] for c in parts.classes if rare.cluster in c["clusters"]): rare.name}
            )
        if self.ontology is not None:
            named = name_parts(Teacher.of(gen, parts), self.clip, self.ontology, Naming())
            parts, files["names.json"] = named.parts, json_bytes(named.table())
        if rare is not None:
            class_id = next(c["id"] for c in parts.classes if rare.cluster in c["clusters"])
            files |= {
                "rare.json": json_bytes(described(rare)),
                "rare.png": draw.png(sheet(rare, class_id), optimize=True),
                "rare.safetensors": rare.direction.to_bytes(),
            }
        return parts, files


def check_rare(method: Any, asked: RareClass) -> None:
    """UsageError for a rare class that cannot be looked for, by its settings alone."""
    rare, neutral, n, share = asked.rare, asked.neutral, asked.rare_n, asked.rare_share
    if not method.adds_clusters:
        raise UsageError(
            "--rare needs parts that are cluster centres: use --method segmentation_in_style, "
            f"got {type(method).__name__}"
        )
    if not (
        isinstance(rare, str)
        and isinstance(neutral, str)
        and rare.strip()
        and neutral.strip()
        and rare.strip() != neutral.strip()
    ):
        raise UsageError(
            f"--rare got {rare!r} and --neutral {neutral!r}: expected two texts that differ in "
            "what is rare"
        )
    name = class_name(rare)
    if re.fullmatch(r"|background|part \d+|(.* )?(a|an|the|with|wearing|of)", name):
        raise UsageError(
            f"--rare is {rare!r}, which would call the part {name!r}: expected a text that ends "
            'in a name, "a person with glasses"'
        )
    if not isinstance(n, int) or n < LEAST_N:
        raise UsageError(
            f"--rare-n is {n!r}, expected an integer number of samples to learn from, at least "
            f"{LEAST_N} (2000 is the default)"
        )
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise UsageError(
            f"--rare-share is {share!r}, expected a share of the samples above 0, up to 1 (0.5 "
            "moves every second one)"
        )
    if isinstance(method.k, int) and method.k > MOST_CLUSTERS:
        raise UsageError(
            f"--k is {method.k}, expected at most {MOST_CLUSTERS} with --rare: masks hold 255 "
            "classes, and the rare one is one more"
        )
