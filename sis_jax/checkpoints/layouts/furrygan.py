"""A FurryGAN from the arrays that `save_generator` wrote: names and shapes are the modules' own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sis_jax.checkpoints.build import build
from sis_jax.checkpoints.layouts import stylegan2
from sis_jax.models.furrygan import FurryGAN, FurryGANConfig
from sis_jax.types import Info, SisError, UsageError


def config_of(fields: Mapping[str, Any]) -> FurryGANConfig:
    """The config from the fields in a `config.json`; SisError where they are no such thing."""
    halves = fields.get("foreground"), fields.get("background")
    try:
        if len(fields) != 2 or not all(isinstance(half, Mapping) for half in halves):
            raise UsageError("it needs a foreground and a background")
        front, behind = (stylegan2.generator_config(half) for half in halves)  # type: ignore
        return FurryGANConfig(front, behind)
    except UsageError as error:
        raise SisError(
            f'the "generator" in config.json describes no FurryGAN: {error}; save it again'
        ) from None


def build_generator(
    config: FurryGANConfig, arrays: Mapping[str, np.ndarray], what: str, info: Info
) -> FurryGAN:
    """A generator with these numbers; SisError that lists every array which does not fit."""
    return build(lambda: FurryGAN(config), arrays, what, info)
