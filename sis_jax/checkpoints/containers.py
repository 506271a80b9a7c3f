"""File formats to plain trees of arrays: torch's zip and old streams, pickles, safetensors, HDF5.

Every size in a file is checked against its bytes before anything is built from it, so memory stays
within a few times the file's size. Nothing of a file is run.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sis_jax.checkpoints import hdf5, torchscript
from sis_jax.checkpoints.arrays import (
    MODULE_HOOK,
    STORAGES,
    TENSORS,
    TF_NETWORK,
    Storage,
    from_bfloat16,
)
from sis_jax.checkpoints.unpickle import Budget, Machine, Name, Refused
from sis_jax.data.files import parse_json
from sis_jax.types import SisError

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001
_MAX_MEMBERS = 1 << 16
_MAX_HEADER = 100 << 20
_SAFE = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_SAFE |= {"U16": "<u2", "U32": "<u4", "U64": "<u8"}


def read_tree(path: str | os.PathLike) -> Any:
    """The content of a checkpoint file: dicts, lists, numbers, arrays (wrapped as in `arrays.py`).

    Raises SisError for whatever is not a checkpoint or asks for more than arrays.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            data = (
                memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
                if size
                else memoryview(b"")
            )
    except (OSError, ValueError) as error:
        raise SisError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        return _parse(data)
    except Refused as error:
        raise SisError(f"{path} was not read: {error}") from None


def _parse(data: memoryview) -> Any:
    head = bytes(data[:9])
    if not head:
        raise Refused("the file is empty")
    if head[:4] == b"PK\x03\x04":
        return torch_zip(data)
    if head[:8] == hdf5.MAGIC:
        return hdf5.read(data)
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= _MAX_HEADER:
        return safetensors(data)
    if head[:1] != b"\x80":
        raise Refused(
            "it is no checkpoint: expected a .pkl, .pt or .safetensors file (a web page saved "
            "under that name, perhaps?)"
        )
    budget = Budget(copied=len(data))
    if head[2:4] == b"\x8a\x0a" and head[4:9] == _TORCH_MAGIC.to_bytes(10, "little")[:5]:
        return torch_legacy(data, TENSORS, budget)
    machine = Machine(
        data, {**TENSORS, **MODULE_HOOK, **TF_NETWORK, **_embedded(budget)}, budget=budget
    )
    return machine.run()


def _embedded(budget: Budget) -> dict[str, Name]:
    """Tensors in a plain pickle carry a torch stream each; all share one budget."""

    def load(data: Any) -> Any:
        if not isinstance(data, (memoryview, bytes)):
            raise Refused("a storage that is no byte string")
        return torch_legacy(memoryview(data), TENSORS, budget)

    return {"torch.storage._load_from_bytes": Name("torch.storage._load_from_bytes", load)}


def _storages(find: Callable[[str, Storage], None]) -> Callable[[Any], Storage]:
    """torch's persistent ids ("storage", type, key, location, numel[, view])."""
    known: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        if (
            type(identity) is not tuple
            or len(identity) not in (5, 6)
            or identity[0] != "storage"
            or not isinstance(identity[1], Name)
        ):
            raise Refused("it refers to objects outside of the file")
        code = STORAGES.get(identity[1].text.removeprefix("torch."))
        key, numel = identity[2], identity[4]
        if (
            code is None
            or type(key) is not str
            or type(numel) is not int
            or not 0 <= numel < 1 << 40
            or (len(identity) == 6 and identity[5] is not None)
        ):
            raise Refused("a storage of an unknown kind or size")
        if key not in known:
            known[key] = Storage(code, numel)
            find(key, known[key])
        elif (known[key].code, known[key].numel) != (code, numel):
            raise Refused("one storage with two kinds or sizes")
        return known[key]

    return storage


def torch_legacy(data: memoryview, names: dict[str, Name], budget: Budget | None = None) -> Any:
    """torch before 1.6: magic, protocol, system, object and keys as pickles, then the numbers."""
    budget = budget or Budget(copied=len(data))
    position = 0
    waiting: dict[str, Storage] = {}
    parts = []
    for i in range(5):
        # The last part lists the storages; only the object refers to them.
        machine = Machine(
            data, names, _storages(waiting.__setitem__) if i == 3 else None, position, budget
        )
        parts.append(machine.run())
        position = machine.position
    magic, protocol, system, content, keys = parts
    if (
        magic != _TORCH_MAGIC
        or protocol != _TORCH_PROTOCOL
        or type(system) is not dict
        or type(keys) is not list
    ):
        raise Refused("it is no torch file of the old format")
    if system.get("little_endian") is not True:
        raise Refused("it was written on a big-endian machine, which is not supported")
    for key in keys:
        if type(key) is not str or key not in waiting:
            raise Refused("it holds a storage that nothing refers to, or the same one twice")
        storage = waiting.pop(key)
        if (
            position + 8 > len(data)
            or struct.unpack("<q", data[position : position + 8])[0] != storage.numel
        ):
            raise Refused(
                f"the numbers of storage {key[:40]} are missing or of another length than announced"
            )
        start, position = position + 8, position + 8 + storage.numel * storage.itemsize
        storage.fill(data[start:position])
    return content


def torch_zip(data: memoryview) -> Any:
    """torch's format since 1.6: a zip archive of data.pkl and one stored member per storage."""
    members = zip_members(data)
    pickles = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        raise Refused("it is a zip archive, but no torch checkpoint: expected one member data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    if prefix + "byteorder" in members and bytes(members[prefix + "byteorder"][:8]) != b"little":
        raise Refused("it was written on a big-endian machine, which is not supported")

    def find(key: str, storage: Storage) -> None:
        part = members.get(f"{prefix}data/{key}")
        if part is None:
            raise Refused(f"storage {key[:40]} is not in the archive")
        storage.fill(part)

    names = torchscript.NAMES if prefix + "constants.pkl" in members else TENSORS
    return Machine(
        members[pickles[0]], names, _storages(find), budget=Budget(copied=len(data))
    ).run()


# Not `zipfile`: it builds an object of a kilobyte for every 46 bytes of a directory before anybody
# can count them, so that a hostile file of 1 GB takes 20 GB.


def zip_members(data: memoryview) -> dict[str, memoryview]:
    """Name -> view of each member of a zip archive; Refused for compressed ones."""
    try:
        return _zip_members(data)
    except (struct.error, UnicodeError, OverflowError):
        raise Refused("the zip archive is damaged") from None


def _zip_members(data: memoryview) -> dict[str, memoryview]:
    start, count = _zip_directory(data)
    members: dict[str, memoryview] = {}
    total = 0
    for _ in range(count):
        fields = struct.unpack("<4s6H3I5H2I", data[start : start + 46])
        signature, flags, method, packed, size, n_name, n_extra, n_comment, where = (
            *fields[:1],
            *fields[3:5],
            *fields[8:13],
            fields[16],
        )
        name = str(data[start + 46 : start + 46 + n_name], "utf-8")
        program = "/code/" in name  # a TorchScript archive's: compressed, and never read
        if signature != b"PK\x01\x02" or flags & 1 or (method != 0 and not program):
            raise Refused(
                "the zip archive is damaged, or its members are compressed or encrypted, which "
                "torch never does"
            )
        extra = bytes(data[start + 46 + n_name : start + 46 + n_name + n_extra])
        size, packed, where = _zip64(extra, size, packed, where)
        start += 46 + n_name + n_extra + n_comment
        if program:
            continue
        local = struct.unpack("<4s5H3I2H", data[where : where + 30])
        begin = where + 30 + local[9] + local[10]
        total += size
        if (
            local[0] != b"PK\x03\x04"
            or packed != size
            or begin + size > len(data)
            or total > len(data)
            or name in members
        ):
            raise Refused("the zip archive is damaged: a member is not where its directory states")
        members[name] = data[begin : begin + size]
    return members


def _zip_directory(data: memoryview) -> tuple[int, int]:
    """Where the central directory starts, and how many members it lists."""
    tail_start = max(0, len(data) - 66_000)
    tail = bytes(data[tail_start:])
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + 22 > len(tail):
        raise Refused(
            "the zip archive ends early: its directory is missing; download the file again"
        )
    count, _, start = struct.unpack("<H2I", tail[at + 10 : at + 20])
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":
        where = struct.unpack("<Q", tail[at - 12 : at - 4])[0]
        signature, count, _, start = struct.unpack("<4s28xQ2Q", data[where : where + 56])
        if signature != b"PK\x06\x06":
            raise Refused("the zip archive is damaged")
    if count > _MAX_MEMBERS:
        raise Refused(f"the zip archive lists {count} members, more than any checkpoint has")
    return start, count


def _zip64(extra: bytes, size: int, packed: int, where: int) -> tuple[int, int, int]:
    """The three numbers of a member, from its 64-bit field where they do not fit 32 bits."""
    values = [size, packed, where]
    while len(extra) >= 4:
        tag, n = struct.unpack("<HH", extra[:4])
        body, extra = extra[4 : 4 + n], extra[4 + n :]
        if tag == 1:
            for i, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    values[i], body = struct.unpack("<Q", body[:8])[0], body[8:]
    return values[0], values[1], values[2]


# Not the `safetensors` library: its NumPy front end copies every array and knows no bfloat16.


def safetensors(data: memoryview) -> dict[str, np.ndarray]:
    """Name -> array of a .safetensors file, as views (bfloat16: float32 copies)."""
    n = struct.unpack("<Q", data[:8])[0]
    try:
        header = parse_json(str(data[8 : 8 + n], "utf-8")) if 8 + n <= len(data) else None
    except ValueError:
        header = None
    if type(header) is not dict:
        raise Refused("the header of the safetensors file is damaged")
    body, found, total = data[8 + n :], {}, 0
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            kind = np.dtype(_SAFE[entry["dtype"]])
            shape = entry["shape"]
            (begin, end) = entry["data_offsets"]
            whole = [*shape, begin, end]
            total += end - begin
            if (
                not all(type(v) is int and 0 <= v < 1 << 48 for v in whole)
                or len(shape) > 32
                or not begin <= end <= len(body)
                or total > len(body)
            ):
                raise ValueError
            if math.prod(shape) * kind.itemsize != end - begin:
                raise ValueError
            array = (
                np.frombuffer(body[begin:end], kind).reshape(shape)
                if end > begin
                else np.zeros(shape, kind)
            )
        except (KeyError, TypeError, ValueError):
            raise Refused(
                f"array {str(key)[:60]!r} does not fit the bytes of the safetensors file, or has "
                "an unknown type"
            ) from None
        found[key] = from_bfloat16(array) if entry["dtype"] == "BF16" else array
    return found
