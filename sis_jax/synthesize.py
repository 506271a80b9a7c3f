"""Write an image + mask dataset with the parts that were found: `python -m sis_jax.synthesize RUN
--n 10000`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sis_jax.runs import cli
from sis_jax.runs.config import door
from sis_jax.runs.configs.synthesize import SynthesizeConfig

if TYPE_CHECKING:
    from sis_jax.data.folder import Dataset


@door(SynthesizeConfig)
def synthesize(config: SynthesizeConfig) -> Dataset:
    """Write images with masks; stop it any time, the same command goes on where it stopped.

    Returns the Dataset. Raises UsageError where there are no parts or the numbers cannot work.
    """
    from sis_jax.stages.synthesize import synthesize as work

    return work(config)


if __name__ == "__main__":
    cli.main(synthesize)
