"""Weights out of pickle files, without running what a stranger put in them.

``pytorch_model.bin`` and ``model_state.pdparams`` are pickles, programs that make
objects. `read_pickled_weights` runs such a program on values that can do nothing:
the names in it stand for themselves, and the few functions that weight files call
note down what a tensor consists of. Arrays are made here, once the program has
ended, from shapes, strides, dtypes and sizes that were checked.

Before memory is taken, what it is for is compared with the size of the file. A
file of n bytes takes at most about 6 n, beside a constant.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from backends.files import InputError, check_regular

TORCH_MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
"""What is read; ``u2`` is bfloat16, for which NumPy has no name and paddlenlp takes this one."""
TORCH_DTYPES = {
    "float64": "f8",
    "float32": "f4",
    "float16": "f2",
    "bfloat16": "u2",
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint8": "u1",
    "bool": "b1",
    "uint64": "u8",
    "uint32": "u4",
}
STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "u2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "b1",
    "UntypedStorage": "u1",
}
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Where checkpoints of whole runs (Lightning's, DeepSpeed's, people's own) keep a model's weights."""
DIRECTORY_BYTES = 1 << 20
"""Of an archive's list of entries; that of a BERT of 24 layers has 50,000."""


class RefusedFile(Exception):
    """What is in the file is not a weight file's."""


def read_pickled_weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a PyTorch (zip or legacy) or Paddle weight file, by name; bfloat16 as its bits, uint16.

    Raises:
        InputError: the file holds anything but weights, or is cut short, or would take more memory than
            a weight file of its size.
    """
    check_regular(path)
    try:
        with _File(path) as file:
            zipped = file.read(min(4, file.size)) == b"PK\3\4"
            file.seek(0)
            return _read_torch_zip(file) if zipped else _read_pickles(file)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path}: not a weight file that can be read safely ({reason}); use safetensors, or a file "
            "written by torch.save(model.state_dict()) or paddle.save(model.state_dict())"
        ) from error


class _File(io.BufferedReader):
    """A file of which no read goes beyond the end, or takes more than `most` bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.size = self.most = os.fstat(self.fileno()).st_size

    def read(self, count: int | None = -1, /) -> bytes:
        left = max(self.size - self.tell(), 0)
        count = left if count is None or count < 0 else count
        if count > min(left, self.most):
            raise RefusedFile(f"{count} bytes are said to follow where {min(left, self.most)} can")
        return super().read(count)


# What a pickle's program makes


class _Name(str):
    """A class or function that is named, ``module.name``."""


@dataclass
class _Dtype:
    name: Any
    order: Any = "<"
    plain: bool = True
    """Without fields, subarrays or metadata."""


@dataclass
class _Encoded:
    """Text that is to be encoded: how protocol 2 writes bytes."""

    text: str


@dataclass
class _Array:
    """A NumPy array, as it is pickled."""

    shape: Any = None
    dtype: Any = None
    fortran: Any = False
    data: Any = None

    def read(self, storages: _Storages) -> np.ndarray:
        dtype, data = self.dtype, self.data.text if isinstance(self.data, _Encoded) else self.data
        if not (isinstance(dtype, _Dtype) and dtype.plain and dtype.name in DTYPES and dtype.order in ("<", ">", "|")):
            kind = dtype.name if isinstance(dtype, _Dtype) else dtype
            raise RefusedFile(f"is of dtype {_shown(kind)}, which is not read")
        order = "F" if self.fortran is True or self.fortran == "F" else "C"
        numpy_dtype = np.dtype(dtype.order + dtype.name)
        count = _size(self.shape)
        if not isinstance(data, (bytes, bytearray, str)) or len(data) != count * numpy_dtype.itemsize:
            raise RefusedFile(f"has not the bytes that its shape {_shown(self.shape)} takes")
        storages.count(self.shape, numpy_dtype)
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.ndarray(self.shape, numpy_dtype, data, order=order)  # type: ignore[arg-type]


@dataclass
class _Storage:
    """Numbers that tensors are views of."""

    dtype: str
    key: str
    bytes: int
    position: int = -1
    """In a legacy file."""


@dataclass
class _Tensor:
    """A PyTorch tensor, as it is pickled; offset and strides count elements."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: str

    def read(self, storages: _Storages) -> np.ndarray:
        if self.dtype not in DTYPES:
            raise RefusedFile(f"is of dtype {self.dtype.removeprefix('torch.')}, which is not read")
        numpy_dtype = np.dtype(storages.order + self.dtype)
        for numbers in (self.shape, self.strides, (self.offset,)):
            _size(numbers)
        if len(self.strides) != len(self.shape):
            raise RefusedFile("has not a stride for each of its sizes")
        if 0 in self.shape:
            return np.empty(self.shape, numpy_dtype)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides))
        if (last + 1) * numpy_dtype.itemsize > self.storage.bytes:
            raise RefusedFile("reaches outside its storage")
        storages.count(self.shape, numpy_dtype)
        strides = [step * numpy_dtype.itemsize for step in self.strides]
        return np.ndarray(
            self.shape, numpy_dtype, storages.read(self.storage), self.offset * numpy_dtype.itemsize, strides
        )


def _size(shape: Any) -> int:
    """Of an array; raises RefusedFile if its shape is none."""
    if not isinstance(shape, tuple) or len(shape) > 32 or any(type(n) is not int or not 0 <= n < 2**48 for n in shape):
        raise RefusedFile(f"has sizes or strides {_shown(shape)}, which no array has")
    return math.prod(shape)


def _shown(value: Any) -> str:
    """A value for a message. Of what is nested only the outside: its parts may be the same value many times over."""
    if isinstance(value, tuple):
        return f"({', '.join('...' if isinstance(part, tuple) else _shown(part) for part in value[:8])})"
    return str(value)[:40] if value is None or isinstance(value, (str, int, float)) else type(value).__name__


class _Storages:
    """The content of tensors, read when one asks for it.

    Args:
        size: of the file, in bytes.
        order: the byte order of tensors' numbers.
    """

    def __init__(self, size: int, order: str = "<", content: Callable[[_Storage], bytes] | None = None) -> None:
        self.size = size
        self.left = 4 * size + (1 << 20)
        self.order = order
        self.content = content
        self.declared: dict[str, _Storage] = {}
        self.contents: dict[str, bytes] = {}

    def count(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Raises RefusedFile if all arrays so far take more memory than those of a file of this size."""
        self.left -= _size(shape) * max(dtype.itemsize, 4)
        if self.left < 0:
            raise RefusedFile("repeats numbers of the file more often than weights do")

    def refer(self, saved: Any) -> _Storage:
        """The storage that a pickle refers to."""
        if self.content is None or not isinstance(saved, tuple) or len(saved) < 5 or saved[0] != "storage":
            raise RefusedFile("it refers to something outside the file")
        _, kind, key, _location, count, *view = saved
        dtype = STORAGES.get(kind.removeprefix("torch.").removeprefix("storage.")) if type(kind) is _Name else None
        if dtype is None or type(key) is not str or any(part is not None for part in view):
            raise RefusedFile(f"it refers to a storage of {_shown(kind)}, which is not read")
        storage = _Storage(dtype, key, _size((count,)) * np.dtype(dtype).itemsize)
        if self.declared.setdefault(key, storage) != storage:
            raise RefusedFile(f"it refers to storage {key[:40]} in two ways")
        return self.declared[key]

    def read(self, storage: _Storage) -> bytes:
        if storage.key not in self.contents and self.content is not None:
            self.contents[storage.key] = self.content(storage)
        return self.contents[storage.key]


# The functions that weight files call, by name


def _ordered_dict(pairs: Any = None) -> Any:
    """An empty one; Python 2 wrote a list of pairs, which is emptied, so that none is used again and again."""
    items = []
    if pairs is not None:
        if type(pairs) is not list or any(type(pair) is not list or len(pair) != 2 for pair in pairs):
            raise RefusedFile("a dictionary is made of what are no pairs")
        items = [item for pair in pairs for item in pair]
        pairs.clear()
    return _set({}, items)


def _tuple(values: Any) -> Any:
    if type(values) is not tuple:
        raise RefusedFile("a tuple is made of what is none")
    return values


def _dense_tensor(expression: Any, values: Any) -> Any:
    """Paddle's tensors outside of dygraph are written as a call of eval."""
    if expression != "data" or not isinstance(values, dict):
        raise RefusedFile("it wants to run builtins.eval, which is refused")
    return values["data"]


def _encode(text: Any, encoding: Any) -> _Encoded:
    if encoding != "latin1" or not isinstance(text, str):
        raise RefusedFile(f"it wants to encode text as {_shown(encoding)}, which is refused")
    return _Encoded(text)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _Array(shape, dtype, order, data)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise RefusedFile("a tensor has no storage")
    return _Tensor(storage, offset, shape, strides, storage.dtype)


def _rebuild_tensor_of(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    tensor, dtype = _rebuild_tensor(storage, offset, shape, strides), rest[2]
    tensor.dtype = TORCH_DTYPES.get(_shown(dtype).removeprefix("torch."), _shown(dtype))
    return tensor


def _first(value: Any, *_: Any) -> Any:
    return value


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "builtins.bytes": lambda: b"",
    "builtins.tuple": _tuple,
    "builtins.eval": _dense_tensor,
    "_codecs.encode": _encode,
    "numpy.dtype": lambda name, *_: _Dtype(name),
    "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy._core.multiarray.scalar": lambda dtype, data: _Array((), dtype, False, data),
    "numpy._core.numeric._frombuffer": _from_buffer,
    "torch.Size": _tuple,
    "torch.device": lambda *_: None,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_of,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": lambda build, _kind, arguments, *_: _call(build, arguments),
}
_NAMES = {
    *("numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.storage.UntypedStorage"),
    *(f"torch.{name}" for name in (*STORAGES, *TORCH_DTYPES, "uint16", "complex64", "complex128")),
    *(f"torch.float8_{name}" for name in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")),
}


def _name(module: Any, name: Any) -> _Name:
    """A name as it is spelled today; raises RefusedFile if weight files have it not."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise RefusedFile("a name is no text")
    today = {"__builtin__": "builtins", "torch.cuda": "torch"}.get(module, module.replace("numpy.core", "numpy._core"))
    if (full := f"{today}.{name}") not in _FUNCTIONS and full not in _NAMES:
        raise RefusedFile(f"it wants to run {module[:60]}.{name[:60]}, which is refused")
    return _Name(full)


def _call(function: Any, arguments: Any) -> Any:
    if type(function) is not _Name or function not in _FUNCTIONS or not isinstance(arguments, tuple):
        raise RefusedFile("it calls what is no function")
    return _FUNCTIONS[function](*arguments)


def _build(value: Any, state: Any) -> None:
    """Completes an array or a dtype with what was pickled as its state."""
    match value, state:
        case _Dtype(), (int(), order, subarray, names, fields, *_):
            value.order, value.plain = order, (subarray, names, fields) == (None, None, None)
        case _Array(), (int(), shape, dtype, fortran, data):
            value.shape, value.dtype, value.fortran, value.data = shape, dtype, bool(fortran), data
        case dict(), _:  # of an OrderedDict: PyTorch keeps the versions of modules there
            pass
        case _:
            raise RefusedFile("it gives a state to what has none")


def _set(target: Any, items: list[Any]) -> Any:
    """Adds items, a key, a value, a key, ..., to a dictionary."""
    if type(target) is not dict:
        raise RefusedFile("it adds items to what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str) and not (type(key) is int and abs(key) < 2**31):
            raise RefusedFile("a dictionary has keys that are neither names nor numbers")
        target[key] = value
    return target


def _unpickle(file: IO[bytes], storages: _Storages) -> Any:
    """What the pickle that begins here makes."""
    most = min(20_000 + storages.size // 32, 1 << 19)
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any

    def pop(count: int) -> list[Any]:
        if len(stack) < count:
            raise RefusedFile("its stack is empty")
        values = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return values

    def marked() -> list[Any]:
        return pop(len(stack) - marks.pop())

    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if number > most:
            raise RefusedFile(f"it has more than {most} steps")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return pop(1)[0]
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(["EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"].index(opcode.name))))
            case "TUPLE":
                stack.append(tuple(marked()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                items = pop(1) if opcode.name == "APPEND" else marked()
                if type(stack[-1]) is not list:
                    raise RefusedFile("it appends to what is no list")
                stack[-1] += items
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                items = pop(2) if opcode.name == "SETITEM" else marked()
                _set(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*pop(2)))
            case "REDUCE":
                stack.append(_call(*pop(2)))
            case "BUILD":
                (state,) = pop(1)
                _build(stack[-1], state)
            case "BINPERSID":
                stack.append(storages.refer(*pop(1)))
            case _:
                raise RefusedFile(f"its step {opcode.name} is not one of a weight file's")
    raise RefusedFile("it has no end")


# Files


def _read_pickles(file: _File) -> dict[str, np.ndarray]:
    """A Paddle file, or one that PyTorch before 1.6 wrote: pickles of a magic number, its protocol's version, the
    system and the content, then a list of storages and these."""
    storages = _Storages(file.size)
    loaded = _unpickle(file, storages)
    if not (type(loaded) is int and loaded == TORCH_MAGIC):
        return _arrays(loaded, storages)

    def content(storage: _Storage) -> bytes:
        if storage.position < 0:
            raise RefusedFile(f"lies in storage {storage.key[:40]}, which is not in the file")
        file.seek(storage.position)
        return file.read(storage.bytes)

    for _ in range(2):
        _unpickle(file, storages)
    storages.content = content
    loaded = _unpickle(file, storages)
    keys = _unpickle(file, storages)
    for key in keys:
        if type(key) is not str or key not in storages.declared:
            raise RefusedFile(f"it has a storage {_shown(key)}, which no tensor refers to")
        storage = storages.declared[key]
        if int.from_bytes(file.read(8), "little") * np.dtype(storage.dtype).itemsize != storage.bytes:
            raise RefusedFile(f"storage {key[:40]} has another size than it is said to have")
        storage.position = file.tell()
        file.seek(storage.bytes, os.SEEK_CUR)
    return _arrays(loaded, storages)


def _read_torch_zip(file: _File) -> dict[str, np.ndarray]:
    file.most = DIRECTORY_BYTES
    with zipfile.ZipFile(file) as archive:
        file.most = file.size
        entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(entries) != len(archive.infolist()) or len(roots) != 1:
            raise RefusedFile("the archive has two entries of one name, or not one data.pkl")
        if any(entry.compress_type or entry.compress_size != entry.file_size for entry in entries.values()):
            raise RefusedFile("the archive is compressed, which torch.save's are not")
        if sum(entry.file_size for entry in entries.values()) > file.size:
            raise RefusedFile("the archive unpacks to more than it has")
        (root,) = roots
        big = f"{root}byteorder" in entries and archive.read(f"{root}byteorder") == b"big"

        def content(storage: _Storage) -> bytes:
            entry = entries.get(f"{root}data/{storage.key}")
            if entry is None or entry.file_size < storage.bytes:
                raise RefusedFile(f"lies in storage {storage.key[:40]}, which is not in the file, or cut short")
            return archive.read(entry)

        storages = _Storages(file.size, ">" if big else "<", content)
        return _arrays(_unpickle(io.BytesIO(archive.read(f"{root}data.pkl")), storages), storages)


def _arrays(loaded: Any, storages: _Storages) -> dict[str, np.ndarray]:
    """The arrays among what a file holds, wherever a checkpoint keeps its model's."""
    named: dict[str, _Array | _Tensor] = {}
    for _ in WRAPPERS:
        if type(loaded) is not dict:
            raise RefusedFile(f"it holds a {type(loaded).__name__.strip('_')}, expected a dictionary of weights")
        named = dict(_named(loaded))
        inner = next((key for key in WRAPPERS if type(loaded.get(key)) is dict), None)
        if named or inner is None:
            break
        loaded = loaded[inner]
    arrays = {}
    for name, value in named.items():
        try:
            arrays[name] = value.read(storages)
        except RefusedFile as error:
            raise RefusedFile(f"{name[:80]} {error}") from error
    return arrays


def _named(loaded: dict[Any, Any]) -> Iterator[tuple[str, _Array | _Tensor]]:
    for name, value in loaded.items():
        if type(value) is tuple and len(value) == 2:  # Paddle: the tensor's other name, and its numbers
            value = value[1]
        if isinstance(name, str) and isinstance(value, (_Array, _Tensor)):
            yield name, value
