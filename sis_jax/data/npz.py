"""Images in an .npz: `NAMEs` uint8[n h w 3], or files in `NAME_blob`, cut by `NAME_off`."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from sis_jax.types import SisError, UsageError

Stored = bytes | np.ndarray  # an encoded file, or its pixels
_MAX_SHRINK, _FREE = 200, 2**30  # an array may be so many times larger than its packed form
_FAULTS = (
    ValueError, OSError, EOFError, AttributeError, TypeError, KeyError, NotImplementedError,
    MemoryError, OverflowError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def load_npz(path: Path, wanted: Collection[str] | None = None) -> dict[str, np.ndarray | None]:
    """Name -> array of a file of plain arrays; None for those not `wanted`.

    UsageError where there is no file, SisError where it cannot be read or unpacks to more than
    `_MAX_SHRINK` times its size.
    """
    try:
        # NumPy leaves a file open that it opened itself and could not read.
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            for member in file.zip.infolist() if file.zip else ():
                if member.file_size > _FREE + _MAX_SHRINK * member.compress_size:
                    raise ValueError(
                        f"{member.filename[:60]} unpacks to {member.file_size:,} bytes"
                    )
            return {k: file[k] if wanted is None or k in wanted else None for k in file.files}
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except _FAULTS as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise SisError(f"{path} cannot be read as an .npz of plain arrays: {why}") from None


def open_images(path: Path, names: Sequence[str], lone: bool = False) -> list[Callable[[], Stored]]:
    """A function per image of an .npz that gives it.

    names: possible names of the array, the best first; a blob goes before an array. lone: take the
        only blob whatever its name. UsageError where none is there, SisError where the offsets do
        not cut it.
    """
    keys = load_npz(path, ())
    blobs = [k[:-5] for k in keys if k.endswith("_blob") and f"{k[:-5]}_off" in keys]
    plain = next((n for n in names if n in keys), None)
    blob = next((n for n in names if n in blobs), None)
    if blob is plain is None and lone and len(blobs) == 1:
        blob = blobs[0]
    if blob is not None:
        parts = load_npz(path, {f"{blob}_blob", f"{blob}_off"})
        data, off = parts[f"{blob}_blob"], parts[f"{blob}_off"]
        assert data is not None and off is not None
        _check_cut(path, blob, data, off)
        return [partial(_cut, data, off, i) for i in range(len(off) - 1)]
    if plain is None:
        raise UsageError(
            f"{path} holds {', '.join(sorted(keys)) or 'nothing'}; expected `{names[0]}_blob` "
            f"uint8 with `{names[0]}_off` int64[n + 1], or `{names[-1]}` uint8"
        )
    stack = load_npz(path, {plain})[plain]
    assert stack is not None
    if stack.dtype != np.uint8 or stack.ndim not in (3, 4):
        raise UsageError(
            f"`{plain}` in {path} is {stack.dtype}{list(stack.shape)}, expected uint8[n h w 3] or "
            "uint8[n h w]"
        )
    return [partial(stack.__getitem__, i) for i in range(len(stack))]


def _check_cut(path: Path, blob: str, data: np.ndarray, off: np.ndarray) -> None:
    fits = data.dtype == np.uint8 and off.dtype.kind in "iu" and data.ndim == off.ndim == 1
    if fits and len(off):
        steps = np.diff(off.astype(object)) if off.dtype == np.uint64 else np.diff(off)
        fits = bool(off[0] >= 0 and off[-1] <= len(data) and (steps >= 0).all())
    if not fits or not len(off):
        raise SisError(
            f"`{blob}_off` in {path} does not cut `{blob}_blob` ({data.size:,} bytes) into images"
        )


def _cut(data: UInt8[np.ndarray, "n"], off: Int[np.ndarray, "m"], i: int) -> bytes:
    return data[int(off[i]) : int(off[i + 1])].tobytes()
