"""Weight files of strangers: what real ones hold is read, the rest is refused in bounded memory and time."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from conftest import ROOT, environment
from limited_reading import CONSTANT

from backends.files import InputError
from backends.pickles import TORCH_MAGIC, read_pickled_weights
from backends.pretrained import read_safetensors

MUTATIONS = int(os.environ.get("MINILM_MUTATIONS", 300))


def limited(*arguments, timeout=120):
    """What `limited_reading.py` prints, a value a line; it fails where its process dies or its memory is too little."""
    command = [sys.executable, str(ROOT / "tests" / "limited_reading.py"), *map(str, arguments)]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), timeout=timeout
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return list(map(json.loads, ended.stdout.splitlines()))


# Pickles, step by step


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"\x8a\x0c" + value.to_bytes(12, "little", signed=True)  # LONG1


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def numbers(*values):
    return b"(" + b"".join(map(number, values)) + b"t"


def weights(value, steps=b""):
    """A pickle of {"w": value}, after some steps that leave nothing on the stack."""
    return b"\x80\4" + steps + b"}" + text("w") + value + b"s."


def dtype(kind, state=b"N" * 3, size=-1):
    """A NumPy dtype; `state` makes its subarray, names and fields."""
    made = name("numpy", "dtype") + b"(" + text(kind) + b"K\0K\1tR"
    return made + b"(K\3" + text("|") + state + b"J" + struct.pack("<i", size) + b"J\xff\xff\xff\xffK\0tb"


def field(kind, offset):
    """The state of a dtype with a field."""
    return b"N(" + text("a") + b"t}" + text("a") + b"(" + kind + b"J" + struct.pack("<i", offset) + b"ts"


def array(shape, kind, data):
    made = name("numpy._core.multiarray", "_reconstruct") + b"(" + name("numpy", "ndarray") + b"K\0\x85C\1btR"
    return made + b"(K\1" + shape + kind + b"\x89" + data + b"tb"


def several(*values):
    return b"](" + b"".join(values) + b"e"


def data(content):
    return b"B" + struct.pack("<I", len(content)) + content


def tensor(shape, strides, offset=0, count=4, key="0"):
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text(key) + text("cpu") + number(count) + b"tQ"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + number(offset) + shape + strides + b"\x89NtR"


def archive(path, pickled, storages=(bytes(16),), root="x/", twice=False, big=False, **how):
    with zipfile.ZipFile(path, "w", **how) as file:
        for _ in range(1 + twice):
            file.writestr(f"{root}data.pkl", pickled)
        if big:
            file.writestr(f"{root}byteorder", "big")
        for key, content in enumerate(storages):
            file.writestr(f"{root}data/{key}", content)


def overlapping(path):
    """An archive whose 50 entries all lie in the same place."""
    archive(path, weights(tensor(numbers(4), numbers(1))), [bytes(100_000)])
    content = path.read_bytes()
    at = content.index(b"PK\1\2")
    directory, end = content[at : content.index(b"PK\5\6")], content[content.index(b"PK\5\6") :]
    last = directory[directory.rindex(b"PK\1\2") :]
    copies = [last.replace(b"x/data/0", b"x/data/%c" % (65 + n)) for n in range(50)]
    directory += b"".join(copies)
    end = end[:8] + struct.pack("<HHII", 52, 52, len(directory), at) + end[20:]
    path.write_bytes(content[:at] + directory + end)


BEYOND, OBJECTS = dtype("V8", field(dtype("f4"), 2**30), 8), dtype("V8", field(dtype("O8"), 0), 8)
SHARED = b"N\x85" + b"".join(b"q%c" % n + b"h%c" % n + b"\x86" for n in range(2, 62))
ENCODED = name("_codecs", "encode") + b"h\1" + text("latin1") + b"\x86R"
ORDERED = name("collections", "OrderedDict") + b"h\1\x85R"
ATTACKS = {
    # what NumPy would take for pointers
    "object array": (array(numbers(1), dtype("O8"), data(b"A" * 8)), "w is of dtype O8, which is not read"),
    "fields beyond the item": (array(numbers(1), BEYOND, data(bytes(8))), "w is of dtype V8, which is not read"),
    "objects in a void": (array(numbers(1), OBJECTS, data(b"A" * 8)), "w is of dtype V8, which is not read"),
    "fields of a number": (array(numbers(1), dtype("f4", field(dtype("f4"), 8)), data(bytes(4))), "w is of dtype f4"),
    "shape of another size": (array(numbers(2**40), dtype("f4"), data(bytes(4))), "w has not the bytes that its shape"),
    "negative shape": (array(numbers(-1), dtype("f4"), data(bytes(4))), "w has sizes or strides .*which no array has"),
    "sizes that overflow": (array(numbers(*[2**33] * 4), dtype("f4"), data(b"")), "w has not the bytes that its shape"),
    "parts that are one value 2^60 times": (array(SHARED, dtype("f4"), data(b"")), "w has sizes or strides"),
    "the same for a dtype": (array(numbers(1), name("numpy", "dtype") + SHARED + b"\x85R", data(b"")), "w is of dtype"),
    "an array for a dtype": (array(numbers(1), array(b")", b"N", b"N"), data(b"")), "w is of dtype .*, which is"),
    "nothing for a shape": (array(b"N", dtype("f4"), data(b"")), "w has sizes or strides None, which no array has"),
    "state of a name": (name("numpy", "ndarray") + b"}b", "it gives a state to what has none"),
    "call of a tensor": (array(b")", b"N", b"N") + b")R", "it calls what is no function"),
    "other code": (name("os", "system") + text("true") + b"\x85R", "it wants to run os.system, which is refused"),
    "eval": (name("builtins", "eval") + text("1+1") + b"}\x86R", "it wants to run builtins.eval, which is refused"),
    # more memory or time than the file is worth
    "memo of 10^8": (b"N" + b"r" + struct.pack("<I", 10**8), None),
    "bytes that do not follow": (b"\x8e" + struct.pack("<Q", 2**40), "1099511627776 bytes are said to follow"),
    "a frame that does not follow": (b"\x95" + struct.pack("<Q", 2**60) + b"N", None),
    "a number of 2 GB": (b"\x8b" + struct.pack("<i", 2**31 - 1), "2147483647 bytes are said to follow"),
    "nested tuples": (b"N" + b"\x85" * 100_000, "it has more than .* steps"),
    "a list of itself": (b"]q\1h\1a", None),
    "keys that collide": (
        b"}(" + b"".join(number(n * (2**61 - 1)) + b"N" for n in range(5000)) + b"u",
        "a dictionary has keys that are neither names nor",
    ),
    "text that is encoded again and again": (several(text("x" * 10**6) + b"q\1", *[ENCODED] * 3000), None),
    "a list copied again and again": (
        several(several(*[b"K\1"] * 5000) + b"q\1", *[name("builtins", "tuple") + b"h\1\x85R"] * 3000),
        "a tuple is made of what is none",
    ),
    "a dictionary made again and again": (
        several(several(*[several(number(n), b"N") for n in range(1000)]) + b"q\1", *[ORDERED] * 1000),
        None,
    ),
    "text that is encoded to other bytes": (
        array(numbers(4), dtype("f1"), name("_codecs", "encode") + text("x") + text("utf7") + b"\x86R"),
        "it wants to encode text as utf7, which is refused",
    ),
}  # fmt: skip
TENSORS = {
    "beyond the storage": (tensor(numbers(2, 4), numbers(4, 1)), "w reaches outside its storage"),
    "before the storage": (tensor(numbers(4), numbers(-1), 3), "w has sizes or strides"),
    "offset beyond": (tensor(numbers(4), numbers(1), 2**40), "w reaches outside its storage"),
    "more strides than sizes": (tensor(numbers(4), numbers(1, 1)), "w has not a stride for each of its sizes"),
    "one number 2^31 times": (tensor(numbers(2**31), numbers(0)), "w repeats numbers of the file more often"),
    "storage that is not there": (
        tensor(numbers(4), numbers(1), key="7"),
        "w lies in storage 7, which is not in the file",
    ),
    "storage that is cut short": (
        tensor(numbers(4), numbers(1), count=5),
        "w lies in storage 0, which is not in the file, or cut short",
    ),
    "storage of 2^45 numbers": (tensor(numbers(2**45), numbers(1), count=2**45), "w repeats numbers of the file"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What reading each of the attacks ends with, in a process that has 64 MiB beside 6 times the greatest file."""
    folder = tmp_path_factory.mktemp("attacks")
    files = {}
    for title, (value, _) in ATTACKS.items():
        files[title] = folder / f"{len(files)}.pdparams"
        files[title].write_bytes(weights(value))
    for title, (value, _) in TENSORS.items():
        files[title] = folder / f"{len(files)}.bin"
        archive(files[title], weights(value))
    return dict(zip(files, limited("files", *files.values()), strict=True))


@pytest.mark.parametrize("title", [*ATTACKS, *TENSORS])
def test_attacks_are_refused(outcomes, title):
    """By a message, or read as what they are: no weights; within seconds and the process' memory."""
    expected = {**ATTACKS, **TENSORS}[title][1]
    outcome = outcomes[title]["outcome"]
    assert outcomes[title]["seconds"] < 10
    if expected is None:
        assert outcome == {}
    else:
        assert isinstance(outcome, str)
        assert re.search(f"not a weight file that can be read safely .({expected})", outcome), outcome


ARCHIVES = {
    "compressed": (lambda path: archive(path, weights(b"N"), compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "a bomb": (
        lambda path: archive(path, weights(b"N"), [bytes(10**8)], compression=zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "entries in one place": (overlapping, "unpacks to more than it has"),
    "two entries of one name": (lambda path: archive(path, weights(b"N"), twice=True), "two entries of one name"),
    "no pickle": (lambda path: archive(path, weights(b"N"), root=""), "not one data.pkl"),
    "many entries": (lambda path: archive(path, weights(b"N"), [b""] * 20_000), "bytes are said to follow"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_are_not_torchs(tmp_path):
    paths = [tmp_path / f"{number}.bin" for number in range(len(ARCHIVES))]
    for path, (write, _) in zip(paths, ARCHIVES.values()):
        write(path)
    for outcome, (title, (_, expected)) in zip(limited("files", *paths), ARCHIVES.items(), strict=True):
        assert expected in outcome["outcome"], title


def test_what_has_no_end_is_not_read(tmp_path):
    """Devices and pipes behind the name of a weight file; a link to a file, as the hub's cache has, is one."""
    paths = [tmp_path / name for name in ("zero.bin", "zero.safetensors", "pipe.pdparams", "folder.bin", "away.bin")]
    for path in paths[:2]:
        path.symlink_to("/dev/zero")
    os.mkfifo(paths[2])
    paths[3].mkdir()
    paths[4].symlink_to("nowhere")
    for outcome in limited("files", *paths, timeout=60)[:4]:
        assert "is not a regular file" in outcome["outcome"]
    assert "No such file or directory" in limited("files", paths[4])[0]["outcome"]
    (tmp_path / "blob").write_bytes(weights(array(numbers(1), dtype("f4"), data(struct.pack("<f", 5)))))
    (tmp_path / "model.bin").symlink_to("blob")
    assert read_pickled_weights(tmp_path / "model.bin")["w"] == [5.0]


def test_storages_have_names(tmp_path):
    """In PyTorch's older files; of a tuple whose parts are one value, the hash takes 2^60 steps."""
    parts = [number(TORCH_MAGIC), b"K\1", b"}", b"}", several(SHARED)]
    (tmp_path / "model.bin").write_bytes(b"".join(b"\x80\2" + part + b"." for part in parts))
    assert "it has a storage (..., ...), which no" in limited("files", tmp_path / "model.bin", timeout=20)[0]["outcome"]


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("name", ["model_state.pdparams", "pytorch_model.bin", "legacy/pytorch_model.bin"])
def test_pickles_run_nothing(tmp_path, name):
    import torch

    target = tmp_path / "pwned"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    content = {"weight": np.zeros(3), "bomb": _Bomb(target)}
    if name.endswith(".bin"):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization="legacy" not in name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=rf"^{tmp_path / name}: .*it wants to run posix\.system, which is refused.*$"):
        read_pickled_weights(tmp_path / name)
    assert not target.exists()


def content_of_checkpoint():
    """PyTorch tensors of every kind that weight files have, and the numbers they hold."""
    import torch

    torch.manual_seed(0)
    words = torch.randn(6, 4)
    marked = torch.nn.Parameter(torch.randn(3))
    marked.tensor_model_parallel = True
    tensors = OrderedDict(
        words=words,
        tied=words,
        view=words[2:, ::2],
        transposed=torch.randn(2, 5).t(),
        expanded=torch.randn(1).expand(3, 4),
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 4),
        half=torch.randn(5).half(),
        bfloat16=torch.randn(5, 3).bfloat16(),
        double=torch.randn(2).double(),
        parameter=torch.nn.Parameter(torch.randn(3)),
        marked=marked,
        positions=torch.arange(7)[None],
        mask=torch.tensor([True, False]),
    )
    tensors._metadata = {"": {"version": 1}}
    return tensors, {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}


def assert_same(arrays, expected):
    assert list(arrays) == list(expected)
    for name, got in arrays.items():
        if got.dtype == np.uint16:  # bfloat16's bits
            got = (got.astype("u4") << 16).view("f4")
        assert got.shape == expected[name].shape, name
        np.testing.assert_array_equal(got.astype("f8"), expected[name], err_msg=name)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_what_torch_saves_is_read(tmp_path, zipped, wrapper):
    """torch.save in both of its formats, alone or in a checkpoint of a whole run, to the last bit."""
    import torch

    tensors, expected = content_of_checkpoint()
    if not zipped:
        tensors = OrderedDict(sorted(tensors.items()))
        expected = dict(sorted(expected.items()))
    content = tensors if wrapper is None else {"epoch": 3, wrapper: tensors, "optimizer": {"state": {0: {"step": 1.0}}}}
    torch.save(content, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
    assert_same(read_pickled_weights(tmp_path / "model.bin"), expected)


def test_big_endian_archive(tmp_path):
    """What torch.save writes on such a machine."""
    archive(tmp_path / "a.bin", weights(tensor(numbers(2), numbers(1), count=2)), [struct.pack(">ff", 1, -2)], big=True)
    np.testing.assert_array_equal(read_pickled_weights(tmp_path / "a.bin")["w"], [1, -2])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])
def test_numpy_arrays_of_every_protocol(tmp_path, protocol, module):
    """C and Fortran order, either byte order, under the module names of NumPy 2 and 1."""
    random = np.random.default_rng(0)
    expected = {
        "rows": random.standard_normal((3, 4), "f4"),
        "columns": np.asfortranarray(random.standard_normal((3, 4))),
        "big": random.standard_normal(5).astype(">f8"),
        "half": random.standard_normal(5).astype("f2"),
        "step": np.float32(2.5),
        "ids": np.arange(4),
        "empty": np.empty((0, 3), "f4"),
    }
    pickled = pickle.dumps(expected, protocol)
    for old in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        new = old.replace(b"numpy._core", module)
        pickled = pickled.replace(b"\x8c%c" % len(old) + old, b"\x8c%c" % len(new) + new)  # SHORT_BINUNICODE
        pickled = pickled.replace(b"c" + old, b"c" + new)  # GLOBAL
    frame = 2 + 9 * (protocol > 3)  # its size changed with the names: PyTorch and Paddle write none this short
    (tmp_path / "a.pdparams").write_bytes(pickled[:2] + pickled[frame:])
    assert_same(read_pickled_weights(tmp_path / "a.pdparams"), expected)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_paddle_saves_is_read(tmp_path, protocol):
    """paddle.save of tensors, of parameters, which come with a name, and of the tensors of static graphs."""
    import paddle

    class DenseTensor:  # paddle.save writes one as a call of eval
        def __init__(self, numbers):
            self.numbers = numbers

        def __reduce__(self):
            return (eval, ("data", {"data": self.numbers}))

    layer = paddle.nn.Linear(3, 2)
    expected = {**{name: value.numpy() for name, value in layer.state_dict().items()}, "b": np.array([1.5, -2.0])}
    content = {**layer.state_dict(), "b": paddle.to_tensor([1.5, -2.0], dtype="bfloat16")}
    paddle.save(content, str(tmp_path / "a.pdparams"), protocol=protocol)
    assert_same(read_pickled_weights(tmp_path / "a.pdparams"), expected)
    pairs = {name: (f"linear_0.{name}", value) for name, value in expected.items()}
    (tmp_path / "pairs.pdparams").write_bytes(pickle.dumps({**pairs, "StructuredToParameterName@@": {}}, protocol))
    assert_same(read_pickled_weights(tmp_path / "pairs.pdparams"), expected)
    static = {name: DenseTensor(value) for name, value in expected.items()}
    (tmp_path / "static.pdparams").write_bytes(pickle.dumps(static, protocol))
    assert_same(read_pickled_weights(tmp_path / "static.pdparams"), expected)


def test_dtypes_that_are_not_read_are_named(tmp_path):
    import torch

    path = tmp_path / "a.bin"
    for dtype, kind in ((torch.float8_e4m3fn, "float8_e4m3fn"), (torch.uint16, "uint16")):
        torch.save({"w": torch.zeros(4, dtype=dtype)}, path)
        with pytest.raises(InputError, match=f"w is of dtype {kind}, which is not read"):
            read_pickled_weights(path)
    torch.save({"w": torch.zeros(4, dtype=torch.complex64)}, path)
    with pytest.raises(InputError, match="it wants to run torch.ComplexFloatStorage, which is refused"):
        read_pickled_weights(path)


DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def test_safetensors_of_every_dtype(tmp_path):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {name: (torch.randn(3, 4) * 3).to(getattr(torch, name)) for name in DTYPES}
    save_file({**tensors, "empty": torch.empty(0, 3), "scalar": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    arrays = read_safetensors(tmp_path / "a.safetensors")
    assert arrays["empty"].shape == (0, 3) and arrays["scalar"] == 2.0
    for name, tensor in tensors.items():
        assert_same({name: arrays[name]}, {name: tensor.double().numpy()})
    for name in ("float8_e4m3fn", "float8_e5m2"):
        save_file({"w": torch.zeros(4).to(getattr(torch, name))}, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match="a.safetensors: w is of dtype F8_E[45]M[23], which is not read; expected"):
            read_safetensors(tmp_path / "a.safetensors")


def header(entries, content=bytes(16), length=None):
    described = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return struct.pack("<Q", len(described) if length is None else length) + described + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        header({}, length=2**63),
        header({}, length=2**62, content=b""),
        header(b"[" * 100_000),
        header(b"{not JSON"),
        header({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}),
        header({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}}),
        header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}),
        header({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}),
        header({"w": {"dtype": "F32", "shape": [2**32, 2**32, 2**32], "data_offsets": [0, 16]}}),
        header({name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"}),
        header({"w": {"dtype": "O", "shape": [2], "data_offsets": [0, 16]}}),
        header({"w": 1}),
    ],
)
def test_safetensors_whose_header_lies(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"^[^\n]*a.safetensors: cannot be read .*; it is cut short or not a safetens"):
        read_safetensors(tmp_path / "a.safetensors")


def test_mutated_weight_files(tmp_path):
    """Real files of every format with bytes changed, put in and left out: read or refused, in little memory.

    ``MINILM_MUTATIONS`` says how many.
    """
    import paddle
    import torch
    from safetensors.torch import save_file

    tensors, _ = content_of_checkpoint()
    torch.save(tensors, tmp_path / "zip.bin")
    torch.save({"state_dict": tensors}, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    arrays = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    arrays["columns"] = np.asfortranarray(np.ones((3, 4), ">f8"))
    for protocol in (2, 4):
        paddle.save(
            {**arrays, "tensor": paddle.ones([2, 3])}, str(tmp_path / f"{protocol}.pdparams"), protocol=protocol
        )
    (tmp_path / "5.pdparams").write_bytes(pickle.dumps(arrays, 5))
    save_file(
        {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors"
    )
    (report,) = limited("mutated", tmp_path, MUTATIONS, timeout=60 + MUTATIONS)
    counts = report["read_and_refused"]
    assert sum(map(sum, counts.values())) == MUTATIONS
    # Files hold addresses and numbers of tensors: what the same mutation spoils differs from run to run.
    assert all(refused for _, refused in counts.values()) and any(read for read, _ in counts.values()), counts
    assert report["slowest_seconds"] < 5
    assert report["grown_bytes"] < CONSTANT


def test_invented_pickles():
    """Any steps in any order, with the names that are known, end in arrays or a refusal."""
    assert limited("invented", 300) == ["done"]
