"""Read the pickles of PyTorch without running any: a small machine that only builds plain data.

`pickle.load` calls whatever a file names. This machine calls nothing. A global is the inert
`Global`, a call of it the inert `Call`, and only names on a list may occur at all. A pickle that
names anything else is refused, because nobody who saves weights needs it.

The standard library's tokenizer reads the opcodes. Each one costs at least a byte, so the work is
bounded by the size of the file. The standard unpickler is not: one opcode with a large index makes
it allocate gigabytes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from .entry import MOST_NAME, CheckpointError
from .files import short

_MOST_OPCODES = 4_000_000  # 30 a tensor; an empty list has 64 bytes of memory for one in the file
_MOST_READ = 64 * 2**20  # bytes of one string; tensors are never inside of a torch pickle
_ALLOWED = {
    "collections": {"OrderedDict", "defaultdict"},
    "torch": {"Size", "device", "strided", "dtype"},
    "torch._utils": {
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_meta_tensor_no_storage",
        "_rebuild_qtensor",
        "_rebuild_sparse_tensor",
    },
    "torch._tensor": {"_rebuild_from_type_v2", "_rebuild_from_type"},
    "torch.nn.parameter": {"Parameter", "Buffer"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "numpy.core.multiarray": {"scalar", "_reconstruct"},
    "numpy._core.multiarray": {"scalar", "_reconstruct"},
    "numpy": {"dtype", "ndarray"},
    "_codecs": {"encode"},
    "builtins": {"set", "frozenset", "complex", "bytearray", "slice", "getattr"},
    "__builtin__": {"set", "frozenset", "complex", "bytearray", "slice"},
}
_DTYPES = {
    *("float64", "float32", "float16", "bfloat16", "complex32", "complex64", "complex128", "bool"),
    *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("quint8", "qint8", "qint32", "quint4x2", "quint2x4"),
    *("per_tensor_affine", "per_channel_affine"),
    *("strided", "sparse_coo", "sparse_csr"),
}  # fmt: skip


class Global(NamedTuple):
    """A name in a pickle: a class or function that is never looked up."""

    module: str
    name: str


class Call:
    """A call in a pickle, which never happens: a function, its arguments, and a state."""

    __slots__ = ("arguments", "function", "state")

    def __init__(self, function: object, arguments: object) -> None:
        self.function = function
        self.arguments = arguments if isinstance(arguments, tuple) else ()
        self.state: object = None

    @property
    def name(self) -> str:
        """Name of the function, without its module."""
        return self.function.name if isinstance(self.function, Global) else ""


class Persistent(NamedTuple):
    """A reference to a storage outside of the pickle."""

    value: object


class _Mark:
    pass


_MARK = _Mark()


class _Bounded:
    """A file whose single reads are bounded, whatever lengths a pickle claims."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell = file.tell

    def read(self, count: int) -> bytes:
        if count > _MOST_READ:
            raise CheckpointError(f"its pickle has a string of {count:,} bytes")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(1 << 16)


def loads(file: BinaryIO) -> object:
    r"""Return the data of the pickle at the position of a file, and leave the file behind it.

    >>> import io
    >>> loads(io.BytesIO(b"(lp0\nI1\naI2\na."))
    [1, 2]
    >>> loads(io.BytesIO(b"cos\nsystem\n(S'ls'\ntR."))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    spectral_core._report.entry.CheckpointError: its pickle names 'os.system', ...
    """
    machine = _Machine()
    try:
        opcodes = pickletools.genops(_Bounded(file))  # type: ignore[arg-type]
        for count, (opcode, argument, _) in enumerate(opcodes):
            if count > _MOST_OPCODES:
                raise CheckpointError(f"its pickle has more than {_MOST_OPCODES:,} opcodes")
            machine.run(opcode.name, argument)
    except CheckpointError:
        raise
    except _MALFORMED as error:
        raise CheckpointError(f"its pickle is broken: {short(error)}") from None
    if len(machine.stack) != 1:
        raise CheckpointError("its pickle is broken: it does not end with one object")
    return machine.stack[0]


# What the tokenizer and the machine raise for bytes that are no pickle.
_MALFORMED = (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


class _Machine:
    """The stack, the marks and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Run one opcode."""
        if name in _IGNORED:
            return
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        else:
            raise CheckpointError(f"its pickle uses the opcode {name}, which no weights need")

    def to_mark(self) -> list[Any]:
        """Return and remove everything above the last mark, and the mark."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("no mark")
        found = self.stack[place + 1 :]
        del self.stack[place:]
        return found

    def pop(self) -> Any:
        """Return and remove the object on top, which is no mark."""
        found = self.stack.pop()
        if found is _MARK:
            raise ValueError("a mark where an object should be")
        return found


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def run(machine: _Machine, _: Any) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(items)))

    return run


def _global(machine: _Machine, argument: Any) -> None:
    module, _, name = str(argument).partition(" ")
    machine.stack.append(_named(module, name))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    machine.stack.append(_named(module, name))


def _named(module: object, name: object) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a global without a name")
    allowed = name in _ALLOWED.get(module, ())
    storage = module in ("torch", "torch.cuda") and name.endswith("Storage") and name.isalnum()
    if not (allowed or storage or (module == "torch" and name in _DTYPES)):
        raise CheckpointError(
            f"its pickle names {short(f'{module}.{name}')}, which no weights need: refused. "
            "Save a state_dict()."
        )
    return Global(module, name)


def _call(machine: _Machine, _: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    if isinstance(function, Global) and function.name in ("OrderedDict", "defaultdict"):
        items = arguments[0] if isinstance(arguments, tuple) and arguments else ()
        pairs = items if isinstance(items, list) else []
        machine.stack.append({_key(key): value for key, value in pairs})
    else:
        machine.stack.append(Call(function, arguments))


def _build(machine: _Machine, _: Any) -> None:
    state, built = machine.pop(), machine.stack[-1]
    if isinstance(built, Call):
        built.state = state


def _append(machine: _Machine, _: Any) -> None:
    item = machine.pop()
    _list(machine).append(item)


def _appends(machine: _Machine, _: Any) -> None:
    items = machine.to_mark()
    _list(machine).extend(items)


def _list(machine: _Machine) -> list[Any]:
    found = machine.stack[-1]
    if not isinstance(found, list):
        raise ValueError("items for an object that is no list")
    return found


def _set_items(machine: _Machine, items: list[Any]) -> None:
    found = machine.stack[-1]
    if not isinstance(found, dict) or len(items) % 2:
        raise ValueError("items for an object that is no dict")
    found.update(zip(map(_key, items[::2]), items[1::2], strict=True))


def _key(key: Any) -> Any:
    """Return a key that has a hash: calls are compared by identity."""
    if isinstance(key, str):
        if len(key) > MOST_NAME:
            raise CheckpointError(f"its pickle has a name of {len(key):,} characters")
        return key
    if isinstance(key, int):
        return key if abs(key) < 2**63 else "a huge number"
    return key if isinstance(key, Call) else short(key)


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.stack[-1]


_IGNORED = {"PROTO", "FRAME", "STOP"}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
    "MARK": lambda: _MARK,
}
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.to_mark())),
    "LIST": lambda machine, _: machine.stack.append(machine.to_mark()),
    "FROZENSET": lambda machine, _: machine.stack.append(tuple(machine.to_mark())),
    "DICT": lambda machine, _: _dict(machine),
    "APPEND": _append,
    "APPENDS": _appends,
    "ADDITEMS": _appends,
    "SETITEM": lambda machine, _: _set_items(machine, [machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.to_mark()),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "BUILD": _build,
    "BINPERSID": lambda machine, _: machine.stack.append(Persistent(machine.pop())),
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _put,
    "GET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "POP": lambda machine, _: machine.stack.__delitem__(-1),
    "POP_MARK": lambda machine, _: machine.to_mark().clear(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
}


def _dict(machine: _Machine) -> None:
    items = machine.to_mark()
    machine.stack.append({})
    _set_items(machine, items)


def walk(root: object, separator: str = ".") -> Iterator[tuple[str, object]]:
    """Yield (path, leaf) of nested dicts, lists and tuples, each container once.

    A container that holds itself, or that occurs twice, is entered at its first place alone.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = [("", root)]
    while waiting:
        path, found = waiting.pop()
        # Named tuples are the readers' own leaves.
        if not isinstance(found, dict | list | tuple) or hasattr(found, "_fields"):
            yield path, found
            continue
        if id(found) in seen or len(path) > 1000:
            continue
        seen.add(id(found))
        items = found.items() if isinstance(found, dict) else enumerate(found)
        prefix = f"{path}{separator}" if path else ""
        waiting += [(f"{prefix}{key}", value) for key, value in reversed(list(items))]
