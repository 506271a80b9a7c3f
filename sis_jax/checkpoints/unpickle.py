"""A pickle reader that cannot run anything: a stack machine over bytes that builds plain data.

Python's own unpickler imports whatever a file names and calls it. This one never imports, never
calls a function that a file names and never sets an attribute on anything but its own records: a
name is looked up in a table of builders written here. Byte strings are views of the file. Work is
bounded: instructions, keys that are fast to hash, numbers of limited length.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sis_jax.types import SisError

Builder = Callable[..., Any]
_MAX_WORK = (
    1_000_000  # instructions; a training checkpoint of the largest network takes about 100,000
)
_MAX_TEXT = 1 << 24
_MAX_INTEGER = 64  # bytes
# Now: Python would import it when a file first uses it
_RAW_UNICODE = codecs.lookup("raw_unicode_escape")
_MARK = object()
_NOT_THERE = object()


class Refused(SisError):
    """A file was not read: it is damaged, or asks for what weights have no need of."""


@dataclass(eq=False)
class Budget:
    """Work left for all streams of one file: instructions, and bytes copied."""

    work: int = _MAX_WORK
    copied: int = 1 << 34

    def charge(self, args: tuple) -> None:
        """Subtract bytes that a builder copies: one list could be recalled a million times."""
        for value in args:
            if type(value) in (list, tuple, dict, set):
                self.work -= len(value)
            elif type(value) is str:
                self.copied -= len(value)
        if self.work < 0 or self.copied < 0:
            raise Refused("the pickle asks for more work than any checkpoint needs")


@dataclass(eq=False)
class Record:
    """An object of a class we do not have: its name, arguments and state."""

    name: str
    args: tuple = ()
    state: Any = None
    items: dict = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Name:
    """A name that a file may use, and our function in its place (None: it may not be called)."""

    text: str
    builder: Builder | None


def record(name: str) -> Builder:
    """A builder that keeps the arguments and makes nothing of them."""
    return lambda *args: Record(name, args)


def _key(value: Any) -> Any:
    """Keys of dicts and sets: plain ones, which hash fast."""
    if type(value) in (str, bool, type(None)) or (type(value) is int and abs(value) < 1 << 60):
        return value
    raise Refused(f"a {type(value).__name__} is used as a key, which weights have no need of")


def ordered_dict(*args: Any) -> dict:
    """`collections.OrderedDict` and the like: from nothing, a dict, or a list of pairs."""
    if not args:
        return {}
    pairs = args[0].items() if type(args[0]) is dict else args[0]
    if len(args) > 1 or not isinstance(pairs, (list, tuple, type({}.items()))):
        raise Refused("a dict is made from something that is no list of pairs")
    made = {}
    for pair in pairs:
        if type(pair) not in (tuple, list) or len(pair) != 2:
            raise Refused("a dict is made from something that is no list of pairs")
        made[_key(pair[0])] = pair[1]
    return made


def plain_set(values: Any = ()) -> set:
    """`builtins.set`."""
    if type(values) not in (list, tuple, set, frozenset):
        raise Refused("a set is made from something that is no list")
    return {_key(v) for v in values}


def encode(text: Any, encoding: Any = "latin1") -> bytes:
    """`_codecs.encode`: how protocol 2 writes bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused("text is encoded in another way than latin1")
    return text.encode("latin1")


PLAIN: dict[str, Name] = {
    name: Name(name, builder)
    for name, builder in {
        "collections.OrderedDict": ordered_dict,
        "builtins.dict": ordered_dict,
        "__builtin__.dict": ordered_dict,
        "builtins.set": plain_set,
        "__builtin__.set": plain_set,
        "builtins.frozenset": plain_set,
        "_codecs.encode": encode,
        "argparse.Namespace": record("argparse.Namespace"),
        "dnnlib.util.EasyDict": ordered_dict,
        "dnnlib.EasyDict": ordered_dict,
    }.items()
}


class Machine:
    """One pickle stream; after `run`, `position` is the first byte after it."""

    def __init__(
        self,
        data: bytes | memoryview,
        names: Mapping[str, Name],
        persistent: Callable[[Any], Any] | None = None,
        start: int = 0,
        budget: Budget | None = None,
    ):
        self.data = memoryview(data).cast("B")
        self.names = names
        self.persistent = persistent
        self.position = start
        self.budget = budget or Budget(copied=len(self.data))
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value of the stream. Refused with the reason, whatever the bytes are."""
        try:
            return self._run()
        except Refused:
            raise
        except (
            IndexError,
            struct.error,
            UnicodeError,
            ValueError,
            TypeError,
            KeyError,
            OverflowError,
            AttributeError,
        ) as error:
            raise Refused(
                f"the pickle is damaged near byte {self.position} ({type(error).__name__})"
            ) from None

    def _run(self) -> Any:
        table = _INSTRUCTIONS
        while self.budget.work > 0:
            self.budget.work -= 1
            code = self.data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                return self._pop()
            instruction = table.get(code)
            if instruction is None:
                raise Refused(
                    f"the pickle holds the instruction 0x{code:02x}, which weights have no need of"
                )
            instruction(self)
        raise Refused("the pickle asks for more work than any checkpoint needs")

    # Reading bytes

    def _take(self, n: int) -> memoryview:
        end = self.position + n
        if n < 0 or end > len(self.data):
            raise Refused(
                f"the file ends early: {n} bytes were announced at byte {self.position}, "
                f"{len(self.data) - self.position} are there"
            )
        part = self.data[self.position : end]
        self.position = end
        return part

    def _number(self, fmt: str) -> Any:
        return struct.unpack(fmt, self._take(struct.calcsize(fmt)))[0]

    def _line(self) -> str:
        window = bytes(self.data[self.position : self.position + 4096])
        end = window.find(b"\n")
        if end < 0:
            raise Refused(f"a line without an end at byte {self.position}")
        self.position += end + 1
        return window[:end].decode("latin1")

    def _text(self, n: int, encoding: str = "utf-8") -> str:
        if n > _MAX_TEXT:
            raise Refused(f"a text of {n} bytes, more than any checkpoint needs")
        return str(self._take(n), encoding, "surrogatepass" if encoding == "utf-8" else "strict")

    # The stack

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Refused("the pickle is damaged: a mark where a value was expected")
        return value

    def _top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise Refused("the pickle is damaged: a mark where a value was expected")
        return self.stack[-1]

    def _to_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                values = self.stack[i + 1 :]
                del self.stack[i:]
                return values
        raise Refused("the pickle is damaged: no mark to go back to")

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    # Instructions that need more than a line

    def _find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Refused("the pickle is damaged: a name that is no text")
        full = f"{module}.{name}"
        if full not in self.names:
            raise Refused(
                f"it asks for {full[:120]!r}, which weights have no need of; nothing was run"
            )
        self._push(self.names[full])

    def _call(self, target: Any, args: Any) -> Any:
        if not isinstance(target, Name) or target.builder is None:
            shown = target.text if isinstance(target, Name) else type(target).__name__
            raise Refused(
                f"it calls {shown[:120]!r}, which weights have no need of; nothing was run"
            )
        if type(args) is not tuple:
            raise Refused("the pickle is damaged: arguments that are no tuple")
        self.budget.charge(args)
        return target.builder(*args)

    def _reduce(self) -> None:
        args = self._pop()
        self._push(self._call(self._pop(), args))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        build = getattr(type(target), "build_state", None)
        if isinstance(target, Record):
            target.state = state
        elif build is not None:
            build(target, state)
        elif type(target) is dict and type(state) is dict:
            pass  # attributes of an OrderedDict (torch's _metadata): nothing we need
        else:
            raise Refused(
                f"it sets the state of a {type(target).__name__}, which weights have no need of; "
                "nothing was run"
            )

    def _fill(self, pairs: list[Any]) -> None:
        target = self._top()
        target = target.items if isinstance(target, Record) else target
        if type(target) is not dict or len(pairs) % 2:
            raise Refused("the pickle is damaged: items for something that is no dict")
        for key, value in zip(pairs[::2], pairs[1::2]):
            target[_key(key)] = value

    def _extend(self, values: list[Any], kind: type) -> None:
        target = self._top()
        if type(target) is not kind:
            raise Refused(
                f"the pickle is damaged: values for a {type(target).__name__}, expected a "
                f"{kind.__name__}"
            )
        if isinstance(target, set):
            target.update(map(_key, values))
        else:
            target.extend(values)

    def _set_item(self) -> None:
        value = self._pop()
        key = self._pop()
        self._fill([key, value])

    def _append(self) -> None:
        value = self._pop()
        self._extend([value], list)

    def _tuple(self, n: int) -> None:
        values = [self._pop() for _ in range(n)]
        self._push(tuple(values[::-1]))

    def _get(self, index: int) -> None:
        value = self.memo.get(index, _NOT_THERE)
        if value is _NOT_THERE:
            raise Refused(
                f"the pickle is damaged: it recalls entry {index}, which was never stored"
            )
        self._push(value)

    def _put(self, index: int) -> None:
        self.memo[index] = self._top()

    def _persistent(self, identity: Any) -> None:
        if self.persistent is None:
            raise Refused("it refers to objects outside of the file")
        self._push(self.persistent(identity))

    def _integer(self, text: str) -> None:
        if len(text) > 3 * _MAX_INTEGER:
            raise Refused("a number with more digits than any checkpoint needs")
        self._push(
            {"00": False, "01": True}[text] if text in ("00", "01") else int(text.rstrip("L"))
        )

    def _long(self, n: int) -> None:
        if not 0 <= n <= _MAX_INTEGER:
            raise Refused("a number with more digits than any checkpoint needs")
        self._push(int.from_bytes(self._take(n), "little", signed=True))

    def _protocol(self) -> None:
        if (protocol := self._number("B")) > 5:
            raise Refused(f"pickle protocol {protocol} does not exist")

    def _global(self) -> None:
        self._find(self._line(), self._line())

    def _stack_global(self) -> None:
        name = self._pop()
        self._find(self._pop(), name)

    def _dict_from_mark(self) -> None:
        pairs = self._to_mark()
        self._push({})
        self._fill(pairs)

    def _quoted(self) -> None:
        text = self._line()
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"" or "\\" in text:
            raise Refused("the pickle is damaged: a text without quotes")
        self._push(text[1:-1])

    def _raw_unicode(self) -> None:
        self._push(_RAW_UNICODE.decode(self._line().encode("latin1"))[0])


def _instructions() -> dict[int, Callable[[Machine], Any]]:
    # Left out on purpose: extension codes, INST and OBJ, NEWOBJ_EX, out-of-band buffers.
    table: dict[bytes, Callable[[Machine], Any]] = {
        b"\x80": Machine._protocol,
        b"\x95": lambda m: m._number("<Q"),  # FRAME: its length adds nothing to the bytes
        b"(": lambda m: m._push(_MARK),
        b"0": lambda m: m.stack.pop(),
        b"1": lambda m: m._to_mark(),
        b"2": lambda m: m._push(m._top()),
        b"N": lambda m: m._push(None),
        b"\x88": lambda m: m._push(True),
        b"\x89": lambda m: m._push(False),
        b"I": lambda m: m._integer(m._line()),
        b"L": lambda m: m._integer(m._line()),
        b"J": lambda m: m._push(m._number("<i")),
        b"K": lambda m: m._push(m._number("B")),
        b"M": lambda m: m._push(m._number("<H")),
        b"\x8a": lambda m: m._long(m._number("B")),
        b"\x8b": lambda m: m._long(m._number("<i")),
        b"F": lambda m: m._push(float(m._line())),
        b"G": lambda m: m._push(m._number(">d")),
        b"S": Machine._quoted,
        b"T": lambda m: m._push(m._text(m._number("<i"), "latin1")),
        b"U": lambda m: m._push(m._text(m._number("B"), "latin1")),
        b"V": Machine._raw_unicode,
        b"X": lambda m: m._push(m._text(m._number("<I"))),
        b"\x8c": lambda m: m._push(m._text(m._number("B"))),
        b"\x8d": lambda m: m._push(m._text(m._number("<Q"))),
        b"B": lambda m: m._push(m._take(m._number("<I"))),
        b"C": lambda m: m._push(m._take(m._number("B"))),
        b"\x8e": lambda m: m._push(m._take(m._number("<Q"))),
        b"\x96": lambda m: m._push(m._take(m._number("<Q"))),
        b")": lambda m: m._push(()),
        b"t": lambda m: m._push(tuple(m._to_mark())),
        b"\x85": lambda m: m._tuple(1),
        b"\x86": lambda m: m._tuple(2),
        b"\x87": lambda m: m._tuple(3),
        b"]": lambda m: m._push([]),
        b"l": lambda m: m._push(m._to_mark()),
        b"a": Machine._append,
        b"e": lambda m: m._extend(m._to_mark(), list),
        b"}": lambda m: m._push({}),
        b"d": Machine._dict_from_mark,
        b"s": Machine._set_item,
        b"u": lambda m: m._fill(m._to_mark()),
        b"\x8f": lambda m: m._push(set()),
        b"\x90": lambda m: m._extend(m._to_mark(), set),
        b"\x91": lambda m: m._push(plain_set(m._to_mark())),
        b"c": Machine._global,
        b"\x93": Machine._stack_global,
        b"R": Machine._reduce,
        b"\x81": Machine._reduce,  # NEWOBJ: the same builders stand for classes
        b"b": Machine._build,
        b"p": lambda m: m._put(int(m._line()[:20])),
        b"q": lambda m: m._put(m._number("B")),
        b"r": lambda m: m._put(m._number("<I")),
        b"\x94": lambda m: m._put(len(m.memo)),
        b"g": lambda m: m._get(int(m._line()[:20])),
        b"h": lambda m: m._get(m._number("B")),
        b"j": lambda m: m._get(m._number("<I")),
        b"P": lambda m: m._persistent(m._line()),
        b"Q": lambda m: m._persistent(m._pop()),
    }
    return {code[0]: instruction for code, instruction in table.items()}


_INSTRUCTIONS = _instructions()
