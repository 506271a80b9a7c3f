"""Name the parts of a run from text: `python -m sis_jax.label RUN --ontology FILE`, or `--prompt "a
photo of hair=hair"`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sis_jax.runs import cli

if TYPE_CHECKING:
    from sis_jax.checkpoints.clip import CLIP
    from sis_jax.data.ontology import Ontology
    from sis_jax.data.parts import Parts
    from sis_jax.types import Generator


@cli.hooks("sis_jax.stages.label", "plan", "results")
def label(
    run: str | Path | Parts,
    ontology: str | Path | Mapping[str, Any] | Ontology | None = None,
    *,
    prompt: tuple[str, ...] = (),
    neutral: tuple[str, ...] = (),
    templates: tuple[str, ...] = (),
    clip: str | CLIP | None = None,
    gen: Generator | None = None,
    recipe: str | None = None,
    mode: Literal["dense", "crop"] = "dense",
    size: int = 0,
    n: int = 50,
    margin: float = 0.1,
    seed: int = 0,
    overwrite: bool = False,
) -> Parts:
    """Name parts from text; parts that get one name become one, and those that no text fits stay as
    they are, marked unsure.

    run: the folder in which `discover` left its parts; in Python also parts.
    ontology: what is called what, {prompt: class}; null is the background. A JSON file, "faces"
        (which ships), in Python also a dict; more in data/ontology.py.
    prompt: the same as words, "a photo of hair=hair"; "a wall=" is background. May be given beside
        an ontology.
    neutral: words that fit nothing in particular; a part that they fit best gets no name.
    templates: sentences for the prompts, "a photo of {}"; the average of several is more reliable
        than one.
    clip: text model, a name or a path. By default one made for the generator (faces64:
        "faces-clip") where it lies in ported_weights, else openai/clip-vit-base-patch32.
    gen: the generator of the parts, in Python; found by its name otherwise.
    recipe: "paper" is the setting of Segmentation in Style: RN50x64 on pictures of 2048 pixels.
        Settings given beside it win.
    mode: "dense" averages CLIP's features over the pixels of a part, "crop" shows it cut-out parts.
    size: pixels of the shorter side at which CLIP reads pictures in the mode "dense", 0 is what it
        prefers, usually twice what it was trained on.
    n: samples to look at.
    margin: a name is given only where its probability is ahead of the next by this much (0 =
        always).
    seed: of the samples.
    overwrite: throw away the names that another configuration gave.

    Returns the named Parts, the table of all scores is in RUN/parts/names.json. Raises UsageError
    for an ontology that cannot work, parts without a generator, or a text model that is not here;
    SisError for damaged weights.
    """
    from sis_jax.stages.label import label as work

    return work(
        run,
        ontology,
        prompt=prompt,
        neutral=neutral,
        templates=templates,
        clip=clip,
        gen=gen,
        recipe=recipe,
        mode=mode,
        size=size,
        n=n,
        margin=margin,
        seed=seed,
        overwrite=overwrite,
    )


shell = cli.with_flag(label, "ontology")


if __name__ == "__main__":
    cli.use_cpu_cores()
    cli.main(shell, argv=cli.gathered(sys.argv[1:], "--prompt"))
