"""A reader of HDF5 files of plain arrays in groups, h5py's default. No links, no filters.

libhdf5 follows links, opens other files, runs filters and plug-ins: not on files from the internet.
Format: "HDF5 File Format Specification" version 3.0; here superblocks 0 and 1, object headers 1,
groups with symbol tables, arrays in one piece. Everything else is refused by name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from sis_jax.checkpoints.unpickle import Refused

MAGIC = b"\x89HDF\r\n\x1a\n"
_NOWHERE = (1 << 64) - 1
_MAX_STEPS, _MAX_DEPTH, _MAX_AXES, _MAX_NAME = 100_000, 16, 32, 200
_CURE = (
    "open it with h5py and save its arrays as .safetensors, or rewrite it with `h5repack -l CONTI "
    "-f NONE`"
)
_DATASPACE = 0x01
_DATATYPE = 0x03
_EXTERNAL = 0x07
_LAYOUT = 0x08
_FILTERS = 0x0B
_CONTINUATION = 0x10
_SYMBOLS = 0x11
_EXPONENT_BITS = {2: 5, 4: 8, 8: 11}


def read(data: memoryview) -> dict[str, np.ndarray]:
    """Path -> array, as views of the file; Refused for what is not plain, or damaged."""
    return _File(data).arrays()


class _File:
    def __init__(self, data: memoryview):
        self.data = data
        self.steps = 0
        self.seen: set[int] = set()

    def take(self, at: int, n: int) -> memoryview:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise Refused("the HDF5 file has more parts than any checkpoint")
        if not 0 <= at <= at + n <= len(self.data):
            raise Refused("the HDF5 file ends early or is damaged: a part is beyond its end")
        return self.data[at : at + n]

    def fields(self, fmt: str, at: int) -> tuple[Any, ...]:
        return struct.unpack(fmt, self.take(at, struct.calcsize(fmt)))

    def expect(self, at: int, signature: bytes) -> None:
        if bytes(self.take(at, len(signature))) != signature:
            raise Refused(f"the HDF5 file is damaged: no {signature.decode('ascii')} at byte {at}")

    def arrays(self) -> dict[str, np.ndarray]:
        version, offsets, lengths = self.fields("<B4xBB", 8)
        if version > 1:
            raise Refused(
                f"it is an HDF5 file in the newer format (superblock {version}), which is not "
                f"supported: {_CURE}"
            )
        if (offsets, lengths) != (8, 8):
            raise Refused(
                "the HDF5 file has addresses of another size than 8 bytes, which is not supported"
            )
        base = 24 + 4 * version
        (start,) = self.fields("<Q", base)
        if start:
            raise Refused(
                "the HDF5 file starts somewhere inside of another file, which is not supported"
            )
        found: dict[str, np.ndarray] = {}
        # After four addresses and the offset of the root's name
        waiting = [("", self.fields("<Q", base + 40)[0], 0)]
        while waiting:
            path, header, depth = waiting.pop()
            messages = list(self.messages(header))
            symbols = next((body for kind, body in messages if kind == _SYMBOLS), None)
            if symbols is None:
                found[path] = self.array(path, messages)
            elif depth > _MAX_DEPTH or header in self.seen:
                raise Refused("the groups of the HDF5 file contain each other")
            else:
                self.seen.add(header)
                waiting += [
                    (f"{path}/{name}" if path else name, child, depth + 1)
                    for name, child in self.children(symbols)
                ]
        return found

    def messages(self, header: int) -> Iterator[tuple[int, memoryview]]:
        """(type, body) of an object's messages."""
        version, left, size = self.fields("<BxH4xI", header)
        if version != 1:
            raise Refused(
                f"the HDF5 file has an object of the newer format, which is not supported: {_CURE}"
            )
        blocks = [(header + 16, size)]
        while blocks and left > 0:
            at, size = blocks.pop(0)
            end = at + size
            while at + 8 <= end and left > 0:
                kind, n, flags = self.fields("<HHB3x", at)
                body = self.take(at + 8, n)
                at, left = at + 8 + n, left - 1
                if kind == _CONTINUATION:
                    blocks.append(struct.unpack("<QQ", _first(body, 16)))
                elif flags & 2 and kind in (_DATASPACE, _DATATYPE, _LAYOUT):
                    raise Refused(
                        "the HDF5 file shares descriptions between arrays, which is not "
                        f"supported: {_CURE}"
                    )
                else:
                    yield kind, body

    def children(self, symbols: memoryview) -> Iterator[tuple[str, int]]:
        """(name, address of the header) of everything in a group."""
        tree, heap = struct.unpack("<QQ", _first(symbols, 16))
        self.expect(heap, b"HEAP")
        size, names = self.fields("<Q8xQ", heap + 8)
        text = self.take(names, size)
        waiting = [tree]
        while waiting:
            node = waiting.pop()
            if node in self.seen:
                raise Refused("the groups of the HDF5 file contain each other")
            self.seen.add(node)
            self.expect(node, b"TREE")
            kind, level, used = self.fields("<BBH", node + 4)
            if kind != 0:
                raise Refused("the HDF5 file is damaged: a group whose index is none")
            # Key, child, key, child, ... from byte 24
            inner = [self.fields("<Q", node + 32 + 16 * i)[0] for i in range(used)]
            if level:
                waiting += inner
            else:
                for leaf in inner:
                    yield from self.leaf(leaf, text)

    def leaf(self, leaf: int, text: memoryview) -> Iterator[tuple[str, int]]:
        self.expect(leaf, b"SNOD")
        for i in range(self.fields("<H", leaf + 6)[0]):
            name_at, header, cached = self.fields("<QQI", leaf + 8 + 40 * i)
            if cached == 2:
                raise Refused("the HDF5 file holds links by name, which weights have no need of")
            name = bytes(text[name_at : name_at + _MAX_NAME]).split(b"\0")[0]
            yield name.decode("utf-8", "replace"), header

    def array(self, path: str, messages: list[tuple[int, memoryview]]) -> np.ndarray:
        """An array in one piece; Refused for any other."""
        what = f"array {path[:80]!r} of the HDF5 file"
        table = dict(messages[::-1])
        if not {_DATASPACE, _DATATYPE, _LAYOUT} <= table.keys():
            raise Refused(f"{what} lacks its shape, its type or its place")
        if table.keys() & {_EXTERNAL, _FILTERS}:
            raise Refused(
                f"{what} is compressed or stored in another file, which is not supported: {_CURE}"
            )
        shape, kind = _shape(table[_DATASPACE], what), _dtype(table[_DATATYPE], what)
        need = math.prod(shape) * kind.itemsize
        layout = table[_LAYOUT]
        version, style = struct.unpack("<BB", _first(layout, 2))
        if version not in (3, 4) or style > 1:
            raise Refused(f"{what} is stored in pieces, which is not supported: {_CURE}")
        if style == 0:
            (size,) = struct.unpack("<H", _first(layout[2:], 2))
            content = _first(layout[4:], size)
        else:
            at, size = struct.unpack("<QQ", _first(layout[2:], 16))
            if at == _NOWHERE and need:
                raise Refused(f"{what} was never written")
            content = self.take(at, size) if need else self.data[:0]
        if len(content) != need:
            raise Refused(
                f"{what} of shape {list(shape)} needs {need} bytes and has {len(content)}"
            )
        return np.frombuffer(content, kind).reshape(shape) if need else np.zeros(shape, kind)


def _first(body: memoryview, n: int) -> memoryview:
    if len(body) < n:
        raise Refused("the HDF5 file is damaged: a description ends early")
    return body[:n]


def _shape(body: memoryview, what: str) -> tuple[int, ...]:
    version, rank, _, style = struct.unpack("<4B", _first(body, 4))
    if version not in (1, 2) or rank > _MAX_AXES or (version == 2 and style > 1):
        raise Refused(f"{what} has no shape that is known here")
    start = 8 if version == 1 else 4
    sizes = struct.unpack(f"<{rank}Q", _first(body[start:], 8 * rank))
    if any(n >= 1 << 40 for n in sizes):
        raise Refused(f"{what} has an impossible shape")
    return sizes


def _dtype(body: memoryview, what: str) -> np.dtype:
    first, bits, size = struct.unpack("<BBxxI", _first(body, 8))
    style, order = first & 15, ">" if bits & 1 else "<"
    if style == 0 and size in (1, 2, 4, 8):
        return np.dtype(f"{order}{'i' if bits & 8 else 'u'}{size}")
    if style == 1 and _EXPONENT_BITS.get(size) == _first(body[12:], 2)[1] and not bits & 0x40:
        return np.dtype(f"{order}f{size}")
    raise Refused(f"{what} holds something else than plain numbers")
