"""Find the parts that a generator knows: `python -m sis_jax.discover [GEN] --k 10 --out RUN`."""

from __future__ import annotations

from collections import ChainMap
from typing import TYPE_CHECKING

from sis_jax.methods.settings import SETTINGS, USUAL
from sis_jax.runs import cli
from sis_jax.runs.config import door
from sis_jax.runs.configs.discover import DiscoverConfig

if TYPE_CHECKING:
    from sis_jax.data.parts import Parts


@door(DiscoverConfig, variants=ChainMap({"auto": SETTINGS[USUAL]}, SETTINGS))
def discover(config: DiscoverConfig) -> Parts:
    """Find the parts of a generator's images, without labels.

    Returns `Parts`. Raises UsageError for settings that cannot work (the sentence names those that
    can), SisError for damaged weights.
    """
    from sis_jax.stages.discover import discover as work

    return work(config)


if __name__ == "__main__":
    cli.main(discover)
