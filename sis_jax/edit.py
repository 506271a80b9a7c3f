"""Change the foreground of an image and keep its background: `python -m sis_jax.edit RUN --seed 3
--direction glasses`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sis_jax.runs import cli
from sis_jax.runs.config import door
from sis_jax.runs.configs.edit import EditConfig

if TYPE_CHECKING:
    from sis_jax.data.edits import Edit


@door(EditConfig)
def edit(config: EditConfig) -> Edit:
    """Move images along a direction and keep their background; writes RUN/edits/NAME.

    Returns an Edit. Raises UsageError for an unknown direction (with the nearest names), parts
    without a background, and photos that are not there; SisError where no photo can be read.
    """
    from sis_jax.stages.edit import edit as work

    return work(config)


if __name__ == "__main__":
    cli.main(edit)
