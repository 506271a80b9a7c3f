"""Find the parts a generator draws: `python -m sis_jax.discover [GEN] --k 10 --out RUN`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sis_jax.methods import METHODS
from sis_jax.runs import cli

if TYPE_CHECKING:
    from sis_jax.checkpoints.clip import CLIP
    from sis_jax.data.parts import Parts
    from sis_jax.types import Generator


@cli.hooks("sis_jax.stages.discover", "plan", "results")
def discover(
    gen: str | Generator | None = None,
    *,
    out: str | None = None,
    method: str = "segmentation_in_style",
    recipe: str | None = None,
    ontology: str | Mapping[str, Any] | None = None,
    rare: str | None = None,
    neutral: str = "a photo",
    rare_n: int = 2000,
    rare_share: float = 0.5,
    clip: str | CLIP | None = None,
    seed: int = 0,
    overwrite: bool = False,
    **settings: Any,
) -> Parts:
    """Find the parts a generator draws, without labels.

    gen: a generator, the name of one, a weights folder, or a checkpoint file; the default one ships
        with the library.
    out: run folder to write (parts, gallery, report); in Python nothing is written without it.
    method: how; its own settings are flags too.
    recipe: settings by name; "paper" is the published one of Segmentation in Style. Settings given
        beside it win where they differ from the usual defaults.
    ontology: names for the parts, {prompt: class}, a JSON file or in Python a dict; `python -m
        sis_jax.label` has more to say about it.
    rare: what is drawn too rarely to become a part, "a person with glasses": samples are moved
        towards it until it does.
    neutral: the same without it, "a person".
    rare_n: samples to learn the way from.
    rare_share: share of the samples that are moved in what is made from the parts.
    clip: text model for both, a name or a path; by default as in `label`.
    seed: of samples and clustering.
    overwrite: replace what another configuration left in `out`.

    Returns `Parts`. Raises UsageError for what cannot work (the sentence says what can), SisError
    for damaged weights.
    """
    from sis_jax.stages.discover import discover as work

    return work(
        gen,
        out=out,
        method=method,
        recipe=recipe,
        ontology=ontology,
        rare=rare,
        neutral=neutral,
        rare_n=rare_n,
        rare_share=rare_share,
        clip=clip,
        seed=seed,
        overwrite=overwrite,
        **settings,
    )


if __name__ == "__main__":
    cli.use_cpu_cores()
    cli.main(discover, variants={"method": METHODS})
