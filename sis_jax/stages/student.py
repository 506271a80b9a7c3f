"""The student as people hold it: `sis.load_student`, the result of `sis.distill`."""

from __future__ import annotations

import os
from typing import Any

from sis_jax.checkpoints import student
from sis_jax.data.masks import Masks
from sis_jax.runs.config import build, signature
from sis_jax.runs.configs.predict import PredictConfig
from sis_jax.stages.predict import predict


class Student(student.Student):
    __doc__ = student.Student.__doc__

    def predict(self, photos: Any, **options: Any) -> Masks:
        """`sis_jax.predict` with this student: an array, a list, a path or an archive -> Masks."""
        given = signature(PredictConfig, Masks).bind(self, photos, **options).arguments
        return predict(build(PredictConfig, given))


def load_student(name_or_path: str | os.PathLike | None = None) -> Student:
    """The student in a run or a folder, or one in ported_weights/ by name; None is the one that
    ships.

    Raises UsageError where there is none, SisError where it is damaged.
    """
    return Student.load(name_or_path)
