"""The student as one file for other programs: a serialised JAX function, or ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax import export as jax_export

from sis_jax.data.files import write_atomic
from sis_jax.types import UsageError

OPSET = 18  # read by the runtimes of the last years
Network = Callable[[jax.Array], jax.Array]


def write(run: Network, size: int, path: Path, facts: dict[str, str]) -> Path:
    """The function uint8[b size size 3] -> float32[b size size k] in the format of the suffix.

    facts: ONNX's metadata. Raises UsageError for ONNX without the package jax2onnx, SisError where
        the file cannot be written.
    """
    (b,) = jax_export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((b, size, size, 3), np.uint8)
    if path.suffix.lower() == ".onnx":
        data = _onnx(run, shape, facts)
    else:
        platforms = ("cpu", "cuda", "tpu")
        data = bytes(jax_export.export(jax.jit(run), platforms=platforms)(shape).serialize())
    write_atomic(path, data)
    return path


def _onnx(network: Network, shape: jax.ShapeDtypeStruct, facts: dict[str, str]) -> bytes:
    """Input "images", output "probabilities"."""
    try:
        from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UsageError(
            f"ONNX needs the package jax2onnx ({e}): pip install -e '.[onnx]', or take --format jax"
        ) from None
    with warnings.catch_warnings():  # of shapes that are only known when it runs
        warnings.simplefilter("ignore")
        logger = logging.getLogger("onnx_ir")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            model = to_onnx(
                network,
                [shape],
                opset=OPSET,
                input_names=["images"],
                output_names=["probabilities"],
            )
        finally:
            logger.setLevel(level)
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()
