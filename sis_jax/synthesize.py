"""Write an image + mask dataset with the parts that were found: `python -m sis_jax.synthesize RUN
--n 10000`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sis_jax.runs import cli

if TYPE_CHECKING:
    from sis_jax.data.folder import Dataset
    from sis_jax.data.parts import Parts
    from sis_jax.types import Generator


@cli.hooks("sis_jax.stages.synthesize", "plan", "results")
def synthesize(
    run: str | Generator,
    parts: Parts | None = None,
    *,
    n: int = 10_000,
    out: str | None = None,
    val: float = 0.05,
    truncation: float | None = None,
    soft: bool = False,
    mix: float | None = None,
    seed: int = 1,
    overwrite: bool = False,
) -> Dataset:
    """Write pictures with masks; stop it any time, the same command goes on where it stopped.

    run: the folder in which `discover` left its parts; in Python also a generator, with its parts
        as the second argument.
    parts: see run.
    n: pictures in all.
    out: where to write, a run folder or its `data`; by default the run itself.
    val: share of the pictures that goes into the split "val".
    truncation: psi of the pictures; by default that of the samples the parts were learned from.
    soft: also keep, per pixel, how sure the label is (8-bit grey, `certainty/`).
    mix: share of the pictures that are moved towards the rare class found by `discover --rare`; by
        default the share given there.
    seed: the pictures' seeds are seed * 100000, + 1, ...; discover took those of seed 0.
    overwrite: throw away a dataset that was made with other settings.

    Returns the Dataset. Raises UsageError where there are no parts or the numbers cannot work.
    """
    from sis_jax.stages.synthesize import synthesize as work

    return work(
        run,
        parts,
        n=n,
        out=out,
        val=val,
        truncation=truncation,
        soft=soft,
        mix=mix,
        seed=seed,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    cli.use_cpu_cores()
    cli.main(synthesize)
