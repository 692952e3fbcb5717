"""Weights out of pickle files, without running what a stranger put in them.

``pytorch_model.bin`` and ``model_state.pdparams`` are pickles, and unpickling
runs code. `read_pickled_weights` admits nothing but the few names that plain
weight files consist of and builds NumPy arrays from them, with no framework.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from backends.interface import InputError

TORCH_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}


def read_pickled_weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a PyTorch (zip or legacy) or Paddle weight file, by name.

    Raises:
        InputError: the file holds anything but weights, or is cut short.
    """
    try:
        if zipfile.is_zipfile(path):
            loaded = _read_torch_zip(path)
        else:
            with open(path, "rb") as file:
                loaded = _Unpickler(file).load()
                if loaded == TORCH_MAGIC:
                    loaded = _read_torch_legacy(file)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path}: not a weight file that can be read safely ({error}); use safetensors, or a file "
            "written by torch.save(model.state_dict()) or paddle.save(model.state_dict())"
        ) from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary of weights")
    arrays = {name: value[1] if isinstance(value, tuple) else value for name, value in loaded.items()}
    return {str(name): array for name, array in arrays.items() if isinstance(array, np.ndarray) and array.dtype != "O"}


class _Unpickler(pickle.Unpickler):
    """Resolves only the names in `_ALLOWED`."""

    def __init__(self, file: IO[bytes], storage: Callable[[str, str, int], np.ndarray] | None = None) -> None:
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module.replace("numpy.core", "numpy._core"), name) in _ALLOWED:
            return _ALLOWED[module.replace("numpy.core", "numpy._core"), name]
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}, which is refused")

    def persistent_load(self, saved_id: Any) -> Any:
        if self.storage is None or saved_id[0] != "storage":
            raise pickle.UnpicklingError("it refers to something outside the file")
        _, dtype, key, _location, count = saved_id[:5]
        return self.storage(dtype, key, count)


def _read_torch_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("data.pkl")).removesuffix("data.pkl")

        def storage(dtype: str, key: str, count: int) -> np.ndarray:
            return _numbers(archive.read(f"{root}data/{key}"), dtype, count)

        with archive.open(f"{root}data.pkl") as file:
            return _Unpickler(file, storage).load()


def _read_torch_legacy(file: IO[bytes]) -> Any:
    """The rest of a file written before PyTorch 1.6: the pickles of its protocol
    version, system and content, then the storages."""
    _Unpickler(file).load()
    _Unpickler(file).load()
    storages: dict[str, tuple[str, np.ndarray]] = {}

    def storage(dtype: str, key: str, count: int) -> np.ndarray:
        # Filled in below; the tensors are views of it.
        return storages.setdefault(key, (dtype, np.zeros(count, "<f4" if dtype == "bfloat16" else dtype)))[1]

    content = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        count = int(np.frombuffer(file.read(8), "<i8")[0])
        dtype, array = storages[key]
        size = 2 if dtype == "bfloat16" else array.itemsize
        array[:] = _numbers(file.read(count * size), dtype, count)
    return content


def _numbers(data: bytes, dtype: str, count: int) -> np.ndarray:
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2", count).astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, dtype, count)


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if min(offset, 0, *size, *stride) < 0 or (0 not in size and last >= storage.size):
        raise pickle.UnpicklingError("a tensor reaches outside its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it wants to encode text as {encoding}, which is refused")
    return text.encode(encoding)


# How NumPy pickles arrays and scalars; where the functions live depends on its version.
_reconstruct = np.empty(0).__reduce__()[0]
_frombuffer = np.empty(0).__reduce_ex__(5)[0]
_scalar = np.float32(0).__reduce__()[0]

_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "tuple"): tuple,
    ("__builtin__", "tuple"): tuple,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}
