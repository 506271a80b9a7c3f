"""NumPy's and torch's arrays inside pickles, turned into views of the file after every check."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sis_jax.checkpoints.unpickle import PLAIN, Name, Record, Refused

_MAX_AXES = 32
_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
BFLOAT16 = "bfloat16"
STORAGES = {
    "FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "BFloat16Storage": BFLOAT16,
    "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1",
    "ByteStorage": "u1", "BoolStorage": "b1",
}  # fmt: skip


def _sizes(values: Any, what: str) -> tuple[int, ...]:
    if (
        type(values) not in (tuple, list)
        or len(values) > _MAX_AXES
        or not all(type(v) is int and 0 <= v < 1 << 40 for v in values)
    ):
        raise Refused(f"an array with an impossible {what}")
    return tuple(values)


def _strided(
    data: memoryview, dtype: np.dtype, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    """A view of `data`, strides in elements; Refused beyond its bytes or for overlaps."""
    count = math.prod(shape)
    have = len(data) // dtype.itemsize
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides)) if count else offset
    if count > have or last >= have + (count == 0):
        raise Refused(f"an array of shape {list(shape)} reaches beyond its {have} numbers")
    return np.ndarray(
        shape, dtype, data, offset * dtype.itemsize, tuple(s * dtype.itemsize for s in strides)
    )


@dataclass(eq=False)
class DType:
    """`numpy.dtype`: plain numbers only."""

    code: str
    order: str = "<"

    def build_state(self, state: Any) -> None:
        """(version, byte order, None, None, None, ...)."""
        if (
            type(state) is not tuple
            or len(state) < 5
            or state[1] not in ("<", ">", "|", "=")
            or any(s is not None for s in state[2:5])
        ):
            raise Refused("a NumPy type that is no plain number")
        self.order = state[1]

    def numpy(self) -> np.dtype:
        """The real thing."""
        return np.dtype(("<" if self.order in "=|" else self.order) + self.code)


def dtype(code: Any, *_: Any) -> DType:
    """`numpy.dtype`."""
    text = str(code, "latin1") if isinstance(code, memoryview) else code
    text = text.lstrip("<|=") if type(text) is str else ""
    if text not in _DTYPES:
        raise Refused("a NumPy type that is no plain number")
    return DType(text)


@dataclass(eq=False)
class NumpyArray:
    """`numpy.ndarray`, being rebuilt."""

    state: tuple | None = None

    def build_state(self, state: Any) -> None:
        """(version, shape, dtype, fortran order, bytes)."""
        if type(state) is not tuple or len(state) not in (4, 5):
            raise Refused("a NumPy array with an impossible state")
        self.state = state[-4:]

    def array(self) -> np.ndarray:
        """A view of the file."""
        if self.state is None:
            raise Refused("a NumPy array without content")
        shape, kind, fortran, data = self.state
        shape = _sizes(shape, "shape")
        if isinstance(data, bytes):
            data = memoryview(data)
        if not isinstance(kind, DType) or not isinstance(data, memoryview):
            raise Refused("a NumPy array that does not hold plain numbers")
        real = kind.numpy()
        if len(data) != math.prod(shape) * real.itemsize:
            raise Refused(f"a NumPy array of shape {list(shape)} with {len(data)} bytes")
        order = shape[::-1] if fortran is True else shape
        flat = np.frombuffer(data, real).reshape(order) if len(data) else np.zeros(order, real)
        return flat.T if fortran is True else flat


def numpy_reconstruct(*_: Any) -> NumpyArray:
    """`numpy.core.multiarray._reconstruct`: an empty array, to be filled by BUILD."""
    return NumpyArray()


def numpy_frombuffer(data: Any, kind: Any, shape: Any, order: Any) -> NumpyArray:
    """`numpy.core.numeric._frombuffer`: how pickle protocol 5 writes arrays."""
    return NumpyArray((shape, kind, order == "F", data))


def numpy_scalar(kind: Any, data: Any) -> Any:
    """`numpy.core.multiarray.scalar`: a Python number."""
    if (
        not isinstance(kind, DType)
        or not isinstance(data, (memoryview, bytes))
        or len(data) != kind.numpy().itemsize
    ):
        raise Refused("a NumPy number that is none")
    return np.frombuffer(data, kind.numpy())[0].item()


@dataclass(eq=False)
class Storage:
    """A torch storage of `numel` numbers; the old format gives its `data` behind the pickles."""

    code: str
    numel: int
    data: memoryview | None = None

    @property
    def itemsize(self) -> int:
        return 2 if self.code == BFLOAT16 else np.dtype(self.code).itemsize

    def fill(self, data: memoryview) -> None:
        """Lay the bytes under the storage; there must be exactly as many as it needs."""
        if len(data) != self.numel * self.itemsize:
            raise Refused(f"a storage of {self.numel} numbers has {len(data)} bytes")
        self.data = data


@dataclass(eq=False)
class Tensor:
    """A torch tensor: a window on a storage, offset and strides in elements."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any

    def array(self) -> np.ndarray:
        """A view of the file (bfloat16: a float32 copy); Refused where it does not fit."""
        shape = _sizes(self.shape, "shape")
        strides = _sizes(self.strides, "stride")
        storage = self.storage
        (offset,) = _sizes((self.offset,), "offset")
        if not isinstance(storage, Storage) or len(strides) != len(shape):
            raise Refused("a tensor without a storage, or with as many strides as it has no axes")
        if storage.data is None:
            raise Refused("a tensor whose numbers are not in the file")
        if storage.code != BFLOAT16:
            return _strided(storage.data, np.dtype("<" + storage.code), offset, shape, strides)
        return from_bfloat16(_strided(storage.data, np.dtype("<u2"), offset, shape, strides))


def from_bfloat16(upper: np.ndarray) -> np.ndarray:
    """float32 from the upper halves of its numbers, uint16; an array of no axes stays one."""
    wide = np.zeros(upper.shape, np.uint32)
    np.left_shift(upper, 16, out=wide, dtype=np.uint32)
    return wide.view(np.float32)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    return Tensor(storage, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _reconstruct_module(meta: Any, *_: Any) -> Record:
    """NVIDIA's persistence hook: keeps the description, never runs the source in the file."""
    return Record("module", (), meta)


def _names(builders: dict[str, Callable[..., Any] | None]) -> dict[str, Name]:
    return {name: Name(name, builder) for name, builder in builders.items()}


NUMPY = _names(
    {
        "numpy.ndarray": None,
        "numpy.dtype": dtype,
        **{
            f"numpy.{core}.multiarray._reconstruct": numpy_reconstruct for core in ("core", "_core")
        },
        **{f"numpy.{core}.multiarray.scalar": numpy_scalar for core in ("core", "_core")},
        **{f"numpy.{core}.numeric._frombuffer": numpy_frombuffer for core in ("core", "_core")},
    }
)
TORCH = _names(
    {
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch.nn.parameter.Parameter": _parameter,
        "torch.Size": lambda sizes=(): sizes,
        "torch.device": lambda *_: None,
        **{
            f"torch.{kind}": None
            for kind in (
                *STORAGES,
                "float32",
                "float64",
                "float16",
                "bfloat16",
                "int64",
                "int32",
                "uint8",
                "bool",
            )
        },
    }
)
TENSORS: dict[str, Name] = {**PLAIN, **NUMPY, **TORCH}
MODULE_HOOK = _names({"torch_utils.persistence._reconstruct_persistent_obj": _reconstruct_module})
TF_NETWORK = _names({"dnnlib.tflib.network.Network": lambda *_: Record("network")})
