"""Interprets the pickles in PyTorch's files without running anything: only what ``torch.save`` writes is understood.

``pickletools.genops`` splits a pickle into opcodes, and each is checked before it has any effect. Names of classes and
functions are compared with the known ones and never imported. A tensor becomes a ``Tensor``, which says where its
values are. Plain values, lists, tuples and the dicts that people save weights in stay what they are. Any other object
becomes a ``Placeholder``.

The size of a pickle limits the memory and the time that it takes. A number in it never becomes an allocation, an object
is never copied more often than the pickle has opcodes, and nothing here walks through nested objects, so that neither
deep nesting nor a tuple that contains itself a million times over has any effect.
"""

import io
import pickletools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from flax_googlenet.errors import GoogLeNetError

MAX_PICKLE_BYTES = 2**22  # that of a training checkpoint has 150 kB
_MAX_OPCODES = 2**19  # a training checkpoint has 50,000; each can take 150 bytes
MAX_NAME = 1000  # characters
_MAX_CLASS_NAME = 250  # characters; a pickle can combine n texts to n * n names of classes
MAX_AXES = 64  # of a tensor in PyTorch and of an array in NumPy

_STORAGES = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
    "ComplexDouble": np.complex128,
    "ComplexFloat": np.complex64,
    "QInt32": np.int32,  # quantized: a tensor of them is never read
    "QInt8": np.int8,
    "QUInt8": np.uint8,
    "QUInt4x2": np.uint8,
    "QUInt2x4": np.uint8,
    "Untyped": np.uint8,
}
STORAGE_DTYPES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in _STORAGES.items()}
"""PyTorch's name of a kind of storage -> dtype of its elements."""

_UNTYPED_DTYPES = {f"torch.{dtype.__name__}": np.dtype(dtype) for dtype in (np.uint16, np.uint32, np.uint64)}
"""The integers of PyTorch that have no storages of their own."""

_UNUSUAL_TENSORS = {
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_meta_tensor_no_storage": "without values (device meta)",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_wrapper_subclass": "of a subclass without values",
    "torch._utils._rebuild_device_tensor_from_numpy": "of an accelerator's own format",
}
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_PARAMETER_CLASSES = ("torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_DICTS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")

_ORDINARY = re.compile(
    r"argparse\.Namespace|collections\.\w+|datetime\.\w+|pathlib\.(\w+\.)*\w+|numpy\.[\w.]+|_codecs\.encode"
    r"|torch\.(\w+|serialization\._get_layout|nn\.parameter\.\w+|storage\.\w+|(_utils|_tensor|tensor)\._rebuild\w+)"
    r"|builtins\.(bool|bytearray|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple)"
)
"""Names that training checkpoints have in them, and that need no note."""

_MAX_ARGUMENTS = 8  # of the functions that make tensors

_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # torch.save writes for Python 2


class StateDictError(GoogLeNetError, ValueError):
    """A file that is damaged, unsafe or without a state dict; the message is one line that names the file."""


@dataclass(frozen=True, slots=True, eq=False)
class Placeholder:
    """A class or function that is never imported, what it would return, or an object of such a class."""

    name: str
    """Full name of the class or function."""


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A block of numbers in a file, or a part of one."""

    key: str
    """Name of the block in the file."""
    dtype: np.dtype[Any]
    length: int
    """Number of elements in the block."""
    start: int = 0
    """First element of the part."""
    stop: int | None = None
    """End of the part; None is that of the block."""
    is_untyped: bool = False

    @property
    def size(self) -> int:
        """Number of bytes in the block."""
        return self.length * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor as a view of a storage; nothing about it has been checked but the types."""

    storage: Storage
    dtype: np.dtype[Any]
    offset: int
    """First element in the storage."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Distances between elements along each axis, in elements."""

    @property
    def first_byte(self) -> int:
        """Where the first element is in the block of the storage."""
        return self.storage.start * self.storage.dtype.itemsize + self.offset * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class UnusualTensor:
    """A tensor that cannot be read. It has a shape and a dtype so that it counts as an array."""

    problem: str
    """What it is, such as "sparse"."""
    shape: tuple[int, ...] = (0,)
    dtype: None = None


class Interpreter:
    """Interprets the pickles of one file.

    Args:
        folder: What the keys of the storages begin with: the folder of a zip that has them.
    """

    def __init__(self, folder: str = "") -> None:
        self._folder = folder
        self.storages: dict[str, Storage] = {}
        """Storages in the order of their first use, by key."""
        self.unknown: dict[str, None] = {}
        """Names of classes and functions that do not belong to training checkpoints, in their order."""
        self._opcodes = 0
        self._pairs = 0

    def load(self, stream: io.BytesIO) -> Any:
        """Interpret one pickle, and leave the stream at its end.

        Returns:
            None, a bool, int, float, str, bytes, list, tuple, dict, ``Tensor``, ``UnusualTensor``, ``Storage`` or
            ``Placeholder``.

        Raises:
            StateDictError: If the pickle has anything in it that ``torch.save`` never writes.
            Exception: If the pickle is damaged: almost any exception.
        """
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def after_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        argument: Any
        for opcode, argument, _ in pickletools.genops(stream):
            self._opcodes += 1
            if self._opcodes > _MAX_OPCODES:
                raise StateDictError(f"its pickle has more than {_MAX_OPCODES:,} steps, too many for a list of tensors")
            match opcode.name:
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "BININT1" | "BINUNICODE" | "BININT2" | "BININT" | "LONG1" | "BINFLOAT":
                    stack.append(argument)
                case "SHORT_BINUNICODE" | "BINUNICODE8":
                    stack.append(argument)
                case "SHORT_BINSTRING" | "BINSTRING":  # PyTorch decodes UTF-8 here, and genops Latin-1
                    stack.append(argument.encode("latin-1").decode(errors="surrogateescape"))
                case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                    stack.append(bytes(argument))
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(after_mark()))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "APPEND":
                    item = stack.pop()
                    _extend(stack[-1], [item])
                case "APPENDS":
                    items = after_mark()
                    _extend(stack[-1], items)
                case "SETITEM":
                    items = [stack.pop(-2), stack.pop()]
                    _update(stack[-1], items)
                case "SETITEMS":
                    items = after_mark()
                    _update(stack[-1], items)
                case "EMPTY_SET":
                    stack.append(Placeholder("builtins.set"))
                case "FROZENSET":
                    after_mark()
                    stack.append(Placeholder("builtins.frozenset"))
                case "ADDITEMS":
                    after_mark()
                case "GLOBAL":
                    stack.append(self._global(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    name = stack.pop()
                    stack.append(self._global(stack.pop(), name))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(self._call(stack.pop(), arguments))
                case "NEWOBJ":  # calls __new__ alone, and __init__ is what fills a dict
                    arguments = stack.pop()
                    result = self._call(stack.pop(), arguments)
                    stack.append({} if isinstance(result, dict) else result)
                case "NEWOBJ_EX":
                    del stack[-2:]
                case "BUILD":
                    stack.pop()
                    if not isinstance(stack[-1], dict | Placeholder):  # an OrderedDict has its attributes here
                        raise StateDictError("its pickle changes the state of an object that is not known")
                case "BINPERSID":
                    stack.append(self._persistent(stack.pop()))
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    after_mark()
                case "PROTO" | "FRAME":
                    if opcode.name == "PROTO" and not 2 <= argument <= 5:
                        raise StateDictError(f"its pickle has protocol {argument}, and only 2 to 5 are read")
                case "STOP":
                    return stack.pop()
                case _:
                    raise StateDictError(f"its pickle has the opcode {opcode.name}, which torch.save never writes")
        raise StateDictError("the file is damaged or cut off (a pickle without an end)")

    def _global(self, module: Any, name: Any) -> Placeholder:
        if not isinstance(module, str) or not isinstance(name, str):
            raise StateDictError("its pickle names a class by something that is not text")
        full_name = f"{_PYTHON_2_MODULES.get(module, module)}.{name}".replace("torch.cuda.", "torch.")
        if len(full_name) > _MAX_CLASS_NAME or not re.fullmatch(r"[\w.<>-]+", full_name):
            raise StateDictError("the file is damaged or cut off (its pickle names a class that cannot exist)")
        if not _ORDINARY.fullmatch(full_name):
            self.unknown[full_name] = None
        return Placeholder(full_name)

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return what a call of a class or function stands for; nothing is called."""
        if not isinstance(function, Placeholder) or not isinstance(arguments, tuple):
            raise StateDictError("its pickle calls something that is not a class or function")
        name = function.name
        if name in _DICTS:
            return self._dict(arguments)
        if name == "torch.Size" and len(arguments) == 1 and isinstance(arguments[0], tuple | list):
            return arguments[0]
        return _tensor(name, arguments) or function

    def _dict(self, arguments: Sequence[Any]) -> dict[Any, Any]:
        match arguments:
            case [dict() | list() as items]:  # of a Counter; of an OrderedDict from Python 2
                self._pairs += len(items)
                if self._pairs > _MAX_OPCODES:
                    raise StateDictError("its pickle repeats the same list of tensors too often")
                if isinstance(items, dict):
                    return items.copy()
                result: dict[Any, Any] = {}
                for pair in items:
                    if not isinstance(pair, list | tuple) or len(pair) != 2:
                        raise StateDictError("its pickle makes a dict of something that is not pairs")
                    _update(result, pair)
                return result
        return {}

    def _persistent(self, saved_id: Any) -> Storage | Placeholder:
        match saved_id:
            case ("module", Placeholder() as module, _, _):  # the source code of a class
                return module
            case ("storage", Placeholder(name), str(key), _, int(length), *views) if len(views) < 2:
                name = re.sub(r"^torch\.storage\._?", "torch.", name)
                if name in STORAGE_DTYPES and 0 <= length < 2**62 and len(key) <= MAX_NAME:
                    dtype, is_untyped = STORAGE_DTYPES[name], name == "torch.UntypedStorage"
                    storage = Storage(self._folder + key, dtype, length, is_untyped=is_untyped)
                    first = self.storages.setdefault(storage.key, storage)
                    if first.size != storage.size:
                        raise StateDictError(f"its pickle names storage {key[:20]} with two different sizes")
                    if first.dtype != dtype and storage.size:
                        raise StateDictError(f"its pickle names storage {key[:20]} with two different dtypes")
                    match views:
                        case [] | [None]:
                            return storage
                        case [(_, int(start), int(count))] if 0 <= start <= start + count <= length:
                            return Storage(storage.key, dtype, length, start, start + count)
        raise StateDictError("its pickle refers to something that is not a storage of numbers")


def _tensor(name: str, arguments: tuple[Any, ...]) -> Tensor | UnusualTensor | None:
    """Return the tensor that a call of a function of PyTorch makes, or None for all other functions."""
    if name.startswith("torch._utils._rebuild") and len(arguments) > _MAX_ARGUMENTS:
        raise StateDictError(f"its pickle calls {name} with {len(arguments)} arguments")
    if name in (
        "torch._tensor._rebuild_from_type_v2",
        "torch.tensor._rebuild_from_type",
        "torch._tensor._rebuild_from_type",
    ):
        match arguments:
            case (Placeholder(inner), Placeholder(kind), tuple() as inner_arguments, _) if "from_type" not in inner:
                tensor = _tensor(inner, inner_arguments)
                if kind in ("torch.Tensor", "torch._tensor.Tensor", *_PARAMETER_CLASSES):
                    return tensor
                return UnusualTensor(f"of the class {kind}")
        return UnusualTensor("of a class of its own")
    if name in _PARAMETERS + _PARAMETER_CLASSES and arguments and isinstance(arguments[0], Tensor | UnusualTensor):
        return arguments[0]
    if name in _UNUSUAL_TENSORS:
        return UnusualTensor(_UNUSUAL_TENSORS[name])
    match name, arguments:
        case "torch._utils._rebuild_device_tensor_from_cpu_tensor", (Tensor() as tensor, Placeholder(dtype), *_):
            return tensor if dtype == f"torch.{tensor.dtype}" else UnusualTensor("of another dtype than its values")
        case "torch._utils._rebuild_tensor", (storage, offset, shape, strides):
            return _view(storage, offset, shape, strides)
        case "torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, _, _, *metadata):
            return _view(storage, offset, shape, strides, metadata)
        case "torch._utils._rebuild_tensor_v3", (storage, offset, shape, strides, _, _, Placeholder(dtype), *metadata):
            if dtype not in _UNTYPED_DTYPES:
                return UnusualTensor(f"of the dtype {dtype}")
            return _view(storage, offset, shape, strides, metadata, _UNTYPED_DTYPES[dtype])
    if name.startswith("torch._utils._rebuild"):
        raise StateDictError(f"its pickle calls {name} with arguments that are not those of a tensor")
    return None


def _view(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    metadata: Sequence[Any] = (),
    dtype: np.dtype[Any] | None = None,
) -> Tensor | UnusualTensor:
    lengths_agree = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MAX_AXES
    if (
        not isinstance(storage, Storage)
        or not lengths_agree
        or not all(type(number) is int for number in (offset, *shape, *strides))
        or (dtype is not None) != storage.is_untyped
    ):
        raise StateDictError("its pickle has a tensor whose storage, shape or strides are of the wrong kind")
    if any(metadata):  # a bit says that all values are to be negated
        return UnusualTensor("conjugated or negated")
    return Tensor(storage, dtype or storage.dtype, offset, shape, strides)


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Placeholder):
        raise StateDictError("its pickle appends to something that is not a list")


def _update(target: Any, items: Sequence[Any]) -> None:
    """Set items of a dict, given as keys and values in turn; those with keys that no name can be are left out."""
    if isinstance(target, Placeholder):
        return
    if not isinstance(target, dict) or not isinstance(items, Sequence) or len(items) % 2:
        raise StateDictError("its pickle sets items of something that is not a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Larger integers can be chosen so that they all have the same hash, and a dict of them takes forever.
        if (type(key) is str and len(key) <= MAX_NAME) or (type(key) is int and abs(key) < 2**31):
            target[key] = value
