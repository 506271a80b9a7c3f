"""Find the parts a GAN already knows, name them, and distil them into a segmenter for real photos.

    import sis_jax as sis

    gen = sis.load_generator()                # the default that ships, a catalogue name, or a path
    parts = sis.discover(gen, k=10, seed=0)   # -> Parts
    data = sis.synthesize(gen, parts, n=10_000, out="runs/faces/data")
    student = sis.distill(data)               # a segmenter for real photos
    masks = student.predict("photos/")
    sis.report("runs/faces")                  # one HTML file from a run folder

The public names are those of `__all__`. Each is imported on first use, so `import sis_jax` costs
milliseconds and loads no JAX.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from sis_jax.runs import machine

__version__ = "0.1.0"

# Verbs: a function and the module it lives in share one name, so that `sis.discover(gen)` and
# `python -m sis_jax.discover` both work.
_VERBS = (
    "discover", "label", "synthesize", "distill", "predict", "evaluate", "report",
    "train_generator", "edit",
)  # fmt: skip

_HOMES = {
    **{verb: f"sis_jax.{verb}" for verb in _VERBS},
    "project": "sis_jax.stages.project",
    "load_discriminator": "sis_jax.checkpoints",
    "load_clip": "sis_jax.checkpoints",
    "load_backbone": "sis_jax.checkpoints",
    "load_generator": "sis_jax.checkpoints",
    "load_lpips": "sis_jax.checkpoints",
    "load_student": "sis_jax.stages.student",
    "Dataset": "sis_jax.data.folder",
    "Masks": "sis_jax.data.masks",
    "Metrics": "sis_jax.runs.metrics",
    "Student": "sis_jax.stages.student",
    "Parts": "sis_jax.data.parts",
    "Info": "sis_jax.types",
    "Samples": "sis_jax.types",
    "SisError": "sis_jax.types",
    "UsageError": "sis_jax.types",
}

__all__ = [  # noqa: RUF022  (in the order of work, not of the alphabet)
    "load_generator", "load_discriminator", "load_clip", "load_student", "load_backbone",
    "load_lpips", "discover", "label", "synthesize", "distill", "predict", "evaluate",
    "train_generator", "edit", "project", "report", "Parts", "Dataset", "Student", "Masks",
    "Metrics", "Info", "Samples", "SisError", "UsageError", "methods", "__version__",
]  # fmt: skip

if TYPE_CHECKING:
    from sis_jax import methods as methods
    from sis_jax.checkpoints import load_backbone as load_backbone
    from sis_jax.checkpoints import load_clip as load_clip
    from sis_jax.checkpoints import load_discriminator as load_discriminator
    from sis_jax.checkpoints import load_generator as load_generator
    from sis_jax.checkpoints import load_lpips as load_lpips
    from sis_jax.data.folder import Dataset as Dataset
    from sis_jax.data.masks import Masks as Masks
    from sis_jax.data.parts import Parts as Parts
    from sis_jax.discover import discover as discover
    from sis_jax.distill import distill as distill
    from sis_jax.edit import edit as edit
    from sis_jax.evaluate import evaluate as evaluate
    from sis_jax.label import label as label
    from sis_jax.predict import predict as predict
    from sis_jax.report import report as report
    from sis_jax.runs.metrics import Metrics as Metrics
    from sis_jax.stages.project import project as project
    from sis_jax.stages.student import Student as Student
    from sis_jax.stages.student import load_student as load_student
    from sis_jax.synthesize import synthesize as synthesize
    from sis_jax.train_generator import train_generator as train_generator
    from sis_jax.types import Info as Info
    from sis_jax.types import Samples as Samples
    from sis_jax.types import SisError as SisError
    from sis_jax.types import UsageError as UsageError


def __getattr__(name: str):
    if name in _HOMES or name == "methods":
        machine.prepare()
        machine.enable_compilation_cache()
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name == "methods":
        value = importlib.import_module("sis_jax.methods")
    else:
        raise AttributeError(
            f"module 'sis_jax' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """A package whose verbs stay functions.

    After importing `sis_jax.discover`, the import system sets the attribute `discover` of this
    package to that module, which would hide the function; here the function of the same name is
    bound in its place. The module stays in `sys.modules`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _VERBS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
