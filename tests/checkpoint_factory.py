"""Writes checkpoint files without torch or TensorFlow: an assembler for pickles, torch's zip format, and hostile variants of both."""

import io
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

STORAGE = {"float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage", "int64": "LongStorage"}


@dataclass(frozen=True)
class Global:
    """A name that the pickle asks for."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """A call of a name (REDUCE), with a state to set afterwards (BUILD) if given."""

    target: Any
    args: tuple = ()
    state: Any = None


@dataclass(frozen=True)
class Persistent:
    """A reference to something outside of the pickle."""

    identity: Any


@dataclass(frozen=True)
class Raw:
    """Instructions as they are."""

    code: bytes


def assemble(value: Any) -> bytes:
    """Instructions that build `value`."""
    if isinstance(value, Raw):
        return value.code
    if isinstance(value, Global):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        built = b"" if value.state is None else assemble(value.state) + b"b"
        return assemble(value.target) + assemble(value.args) + b"R" + built
    if isinstance(value, Persistent):
        return assemble(value.identity) + b"Q"
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return b"\x8e" + struct.pack("<Q", len(value)) + value
    if isinstance(value, dict):
        return b"}(" + b"".join(assemble(part) for item in value.items() for part in item) + b"u"
    opening, closing = (b"(", b"t") if isinstance(value, tuple) else (b"](", b"e")
    return opening + b"".join(map(assemble, value)) + closing


def pickled(value: Any) -> bytes:
    """A whole pickle of protocol 4."""
    return b"\x80\x04" + assemble(value) + b"."


def tensor(key: str, shape: tuple[int, ...], strides: tuple[int, ...], numel: int, dtype: str = "float32", offset: int = 0) -> Call:
    """A torch tensor whose numbers are in storage `key`."""
    storage = Persistent(("storage", Global("torch", STORAGE[dtype]), key, "cpu", numel))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, False, {}))


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous array, in elements."""
    return tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape)))


def torch_zip(tree: Any, compression: int = zipfile.ZIP_STORED, extra: dict[str, bytes] | None = None) -> bytes:
    """The bytes of a torch file (zip format) that holds `tree`; arrays in it become tensors."""
    members: dict[str, bytes] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(part) for key, part in value.items()}
        if isinstance(value, np.ndarray):
            key = str(len(members))
            members[key] = value.tobytes()
            return tensor(key, value.shape, strides_of(value.shape), value.size, str(value.dtype))
        return value

    body = pickled(walk(tree))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", body)
        for key, data in members.items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in (extra or {}).items():
            archive.writestr(name, data)
    return buffer.getvalue()


def numpy_array(value: np.ndarray) -> Call:
    """A NumPy array as NumPy's own pickles hold it."""
    kind = Call(Global("numpy", "dtype"), (value.dtype.str[1:], False, True), (3, "<", None, None, None, -1, -1, 0))
    made = Call(Global("numpy.core.multiarray", "_reconstruct"), (Global("numpy", "ndarray"), (0,), b"b"))
    return Call(made.target, made.args, (1, value.shape, kind, False, value.tobytes()))
