"""The pickles of PyTorch files, read as plain data: nothing is imported, made or called for them.

A pickle is a program for a small stack machine. This is such a machine, with the opcodes that pickle protocols 2 to 5
write and without a way to run anything: a class or function is a `Name`, and what it would make a `Placeholder`. Work
and memory grow with the bytes of the pickle alone. Opcodes: Lib/pickletools.py of Python; what PyTorch asks for:
torch/_weights_only_unpickler.py and torch/_utils.py.
"""

import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

from rear_jax.errors import RearError

LONGEST = 1 << 24  # bytes of a pickle: the tensors lie outside of it, a thousand of them need 200 kB
_MARK = object()
# Modules and names that training scripts save as data. Other names of Python itself and of PyTorch are refused: no
# checkpoint needs them. Names of other packages (settings, schedules) become placeholders.
_DATA_MODULES = {"argparse", "collections", "datetime", "decimal", "enum", "fractions", "pathlib", "types", "uuid"}
_DATA_NAMES = {
    "builtins": {"bool", "bytearray", "complex", "dict", "float", "frozenset", "int", "list", "object", "range"}
    | {"set", "slice", "str", "tuple"},
    "__builtin__": {"dict", "frozenset", "list", "long", "object", "set", "unicode"},
    "_codecs": {"encode"},
    "copyreg": {"_reconstructor"},
    "copy_reg": {"_reconstructor"},
    "torch": {"Size", "bfloat16", "bool", "device", "float16", "float32", "float64", "int32", "int64", "uint8"},
}
_PYTHON_2 = {"__builtin__", "commands", "copy_reg"}  # modules of Python 2 that Python 3 calls otherwise
_DICTS = {("collections", "OrderedDict"), ("collections", "defaultdict")}
_KEYS = (str, int, float, bytes, type(None))  # of dicts; an entry with another key holds no tensor and is left out


class Name(NamedTuple):
    """Stands for a class or function that a pickle names."""

    module: str
    name: str


_NEWER_TENSOR = Name("torch._utils", "_rebuild_tensor_v3")  # of dtypes that PyTorch has no storage class for


class Placeholder:
    """Stands for an object that a pickle wants made."""


def load(
    file: BinaryIO,
    size: int,
    path: Any,
    functions: dict[Name, Callable[..., Any]],
    stored: Callable[[Any], Any],
) -> Any:
    """What one pickle says, in plain containers; entries of dicts whose keys are containers are left out.

    Args:
      file: read from where it stands to the end of the pickle.
      size: bytes of the file.
      path: how messages call it.
      functions: names of which the pickle may want results -> what gives these; it must check its arguments.
      stored: what takes the place of a reference to something outside the pickle; it must check it.

    Raises RearError: the pickle names what no checkpoint needs; ValueError and others: it is damaged.
    """
    return _Machine(file, min(size, file.tell() + LONGEST), path, functions, stored).run()


class _Machine:
    """Stack, marks and memo of one pickle that is being read."""

    def __init__(self, file: BinaryIO, end: int, path: Any, functions: dict[Name, Callable], stored: Callable):
        self._file, self._left = file, end - file.tell()
        self._path, self._functions, self._stored = path, functions, stored
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (code := self._take(1)) != b".":
            if code not in _OPCODES:
                raise ValueError(f"opcode {code!r} of its pickle is not known here")
            _OPCODES[code](self)
        return self._pop()

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise EOFError("its pickle ends early or is too long")
        self._left -= count
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError("its pickle ends early")
        return data

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self, form: str) -> str:
        return self._take(self._number(form)).decode("utf-8", "surrogatepass")

    def _line(self) -> str:
        data = bytearray()
        while (one := self._take(1)) != b"\n":
            data += one
        return data.decode()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("its pickle takes a mark for a value")
        return value

    def _top(self) -> Any:
        value = self._pop()
        self._push(value)
        return value

    def _items(self) -> list[Any]:
        """Everything above the last mark."""
        items = []
        while (value := self._stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def _wrap(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(items[::-1]))

    def _append(self, items: list[Any]) -> None:
        if isinstance(target := self._top(), list):
            target.extend(items)
        elif not isinstance(target, Placeholder):
            raise ValueError("its pickle adds to what is no list")

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict | Placeholder) or len(items) % 2:
            raise ValueError("its pickle sets entries of what is no dict")
        if isinstance(target, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((key, value) for key, value in pairs if isinstance(key, _KEYS))

    def _name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("its pickle has a name that is no text")
        found, package = Name(module, name), module.partition(".")[0]
        if found == _NEWER_TENSOR:
            raise RearError(
                f"{self._path} has tensors of float8 or a newer type, which are not read here: save them as bfloat16."
            )
        is_data = module in _DATA_MODULES or name in _DATA_NAMES.get(module, ()) or found in self._functions
        if not is_data and (package in sys.stdlib_module_names or package in _PYTHON_2 or package == "torch"):
            raise RearError(
                f"{self._path} asks for {module[:99]}.{name[:99]}, which is refused because a checkpoint could run "
                "code through it; save the bare state dict (nothing but tensors) from PyTorch and give that file."
            )
        self._push(found)

    def _call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not (isinstance(function, Name | Placeholder) and isinstance(arguments, tuple)):
            raise ValueError("its pickle calls what is no function")
        if function in _DICTS:
            self._push({})
        elif isinstance(function, Name) and function in self._functions:
            self._push(self._functions[function](*arguments))
        else:
            self._push(Placeholder())

    def _make(self, parts: int) -> None:
        """An object of a class; the arguments do not matter."""
        for _ in range(parts - 1):
            self._pop()
        made = self._pop()
        if not isinstance(made, Name | Placeholder):
            raise ValueError("its pickle makes an object of what is no class")
        self._push({} if made in _DICTS else Placeholder())

    def _give_state(self) -> None:
        """Attributes of an object: they are dropped."""
        self._pop()
        if isinstance(self._top(), Name):
            raise ValueError("its pickle changes what is no object")

    def _recall(self, form: str) -> None:
        self._push(self._memo[self._number(form)])

    def _keep(self, form: str) -> None:
        self._memo[self._number(form)] = self._top()

    def _long(self, form: str) -> None:
        count = self._number(form)
        if count < 0:
            raise ValueError("its pickle has a number of negative length")
        self._push(int.from_bytes(self._take(count), "little", signed=True))


def _simple(value: Callable[["_Machine"], Any]) -> Callable[["_Machine"], None]:
    return lambda machine: machine._push(value(machine))


_OPCODES: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m._take(1),  # PROTO
    b"\x95": lambda m: m._take(8),  # FRAME
    b"(": _simple(lambda _: _MARK),
    b"0": lambda m: m._stack.pop(),
    b"1": lambda m: m._items(),  # POP_MARK
    b"N": _simple(lambda _: None),
    b"\x88": _simple(lambda _: True),
    b"\x89": _simple(lambda _: False),
    b"J": _simple(lambda m: m._number("<i")),
    b"K": _simple(lambda m: m._number("<B")),
    b"M": _simple(lambda m: m._number("<H")),
    b"G": _simple(lambda m: m._number(">d")),
    b"\x8a": lambda m: m._long("<B"),
    b"\x8b": lambda m: m._long("<i"),
    b"X": _simple(lambda m: m._text("<I")),
    b"\x8c": _simple(lambda m: m._text("<B")),
    b"\x8d": _simple(lambda m: m._text("<Q")),
    b"U": _simple(lambda m: m._take(m._number("<B")).decode("latin-1")),  # of Python 2
    b"T": _simple(lambda m: m._take(m._number("<I")).decode("latin-1")),
    b"C": _simple(lambda m: m._take(m._number("<B"))),
    b"B": _simple(lambda m: m._take(m._number("<I"))),
    b"\x8e": _simple(lambda m: m._take(m._number("<Q"))),
    b"\x96": _simple(lambda m: m._take(m._number("<Q"))),
    b")": _simple(lambda _: ()),
    b"]": _simple(lambda _: []),
    b"}": _simple(lambda _: {}),
    b"\x8f": _simple(lambda _: Placeholder()),  # EMPTY_SET
    b"\x90": lambda m: m._items(),  # ADDITEMS
    b"\x91": _simple(lambda m: (m._items(), Placeholder())[1]),  # FROZENSET
    b"t": _simple(lambda m: tuple(m._items())),
    b"\x85": lambda m: m._wrap(1),
    b"\x86": lambda m: m._wrap(2),
    b"\x87": lambda m: m._wrap(3),
    b"a": lambda m: m._append([m._pop()]),
    b"e": lambda m: m._append(m._items()),
    b"s": lambda m: m._set([m._pop(), m._pop()][::-1]),
    b"u": lambda m: m._set(m._items()),
    b"q": lambda m: m._keep("<B"),
    b"r": lambda m: m._keep("<I"),
    b"\x94": lambda m: m._memo.__setitem__(len(m._memo), m._top()),  # MEMOIZE
    b"h": lambda m: m._recall("<B"),
    b"j": lambda m: m._recall("<I"),
    b"c": lambda m: m._name(m._line(), m._line()),
    b"\x93": lambda m: m._name(*[m._pop(), m._pop()][::-1]),  # STACK_GLOBAL
    b"R": _Machine._call,
    b"\x81": lambda m: m._make(2),  # NEWOBJ
    b"\x92": lambda m: m._make(3),  # NEWOBJ_EX
    b"b": _Machine._give_state,
    b"Q": _simple(lambda m: m._stored(m._pop())),  # BINPERSID
}
