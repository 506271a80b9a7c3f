"""Name the parts of a run from text, `python -m sis_jax.label RUN --ontology FILE` or `--prompt "a
photo of hair=hair"`, or by hand, with the `--edits edits.json` that its report downloads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sis_jax.runs import cli
from sis_jax.runs.config import door
from sis_jax.runs.configs.label import LabelConfig

if TYPE_CHECKING:
    from sis_jax.data.parts import Parts


@door(LabelConfig)
def label(config: LabelConfig) -> Parts:
    """Name parts from text, or by hand with `edits`; parts that get one name become one, and those
    that no text fits keep theirs, marked unsure.

    Returns the named Parts; the table of all scores is in RUN/parts/names.json. Raises UsageError
    for an ontology or edits that cannot work, parts without a generator, or a text model that is
    not here; SisError for damaged weights.
    """
    from sis_jax.stages.label import label as work

    return work(config)


if __name__ == "__main__":
    cli.main(label)
