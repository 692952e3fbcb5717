"""Reads weight files in a process whose memory is limited, mutates them, and makes up pickles.

python tests/limited_reading.py files PATH ...           # a line of JSON for each file
python tests/limited_reading.py mutated FOLDER COUNT     # COUNT mutations of FOLDER's files
python tests/limited_reading.py invented COUNT           # COUNT pickles of random steps, by hypothesis
"""

import io
import json
import pickletools
import random
import resource
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from backends.files import InputError
from backends.pickles import read_pickled_weights
from backends.pretrained import read_safetensors

CONSTANT = 64 << 20
"""Bytes that reading a file may take beside `MULTIPLE` of its size."""
MULTIPLE = 6


def limit(size):
    """Leaves this process the memory that reading a file of a size may take."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + CONSTANT + MULTIPLE * size, resource.RLIM_INFINITY))


def read(path):
    """What reading a file ends with: its arrays by name, or the message of its refusal."""
    try:
        np.seterr(all="ignore")
        arrays = read_safetensors(path) if path.suffix == ".safetensors" else read_pickled_weights(path)
        for array in arrays.values():
            array.astype("f4")
        return {name: list(array.shape) for name, array in arrays.items()}
    except InputError as error:
        assert not isinstance(error.__cause__, MemoryError), f"{error} took too much memory"
        assert "\n" not in str(error), str(error)
        return str(error)


def mutate(content, random):
    """Changes a byte, several, or a stretch of a file."""
    content = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 2, 8])):
        # Headers and pickles stand at either end, or at the beginning of what is called by name.
        length = len(content)
        near = random.choice([length, min(length, 4096), min(length, 200)])
        at = random.randrange(near) if random.random() < 0.7 else length - 1 - random.randrange(near)
        size = random.choice([1, 2, 4, 8, 64])
        huge = random.choice([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
        match random.randrange(8):
            case 0:
                content[at] ^= 1 << random.randrange(8)
            case 1:
                content[at] = random.randrange(256)
            case 2:
                content[at : at + size] = random.randbytes(size)
            case 3:
                content[at : at + 8] = huge.to_bytes(8, "little")
            case 4:
                content[at : at + 4] = huge.to_bytes(8, "little")[:4]
            case 5:
                del content[at : at + size]
            case 6:
                content[at:at] = content[at : at + size] * random.choice([1, 2, 100])
            case 7:
                content[at:at] = random.choice(pickletools.opcodes).code.encode("latin1") + random.randbytes(
                    random.randrange(9)
                )
        if not content:
            break
    return bytes(content[: random.randrange(len(content))] if random.random() < 0.05 else content)


def mutate_archive(content, random):
    """Mutates the pickle in an archive, whose checksums and sizes are right afterwards."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(result, "w") as mutated:
        for name in archive.namelist():
            data = archive.read(name)
            mutated.writestr(name, mutate(data, random) if name.endswith("data.pkl") else data)
    return result.getvalue()


def read_mutated(folder, count):
    """Counts of files that were read and refused, by kind, and the most memory and time that one took."""
    sources = sorted(folder.iterdir())
    limit(max(path.stat().st_size for path in sources))
    counts = {path.name: [0, 0] for path in sources}
    slowest = 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(count):
            source = sources[number % len(sources)]
            content, chance = source.read_bytes(), random.Random(number)
            inside = content[:4] == b"PK\3\4" and chance.random() < 0.7
            path = Path(temporary) / source.name
            path.write_bytes((mutate_archive if inside else mutate)(content, chance))
            begun = time.process_time()
            counts[source.name][isinstance(read(path), str)] += 1
            slowest = max(slowest, time.process_time() - begun)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    return {"read_and_refused": counts, "slowest_seconds": slowest, "grown_bytes": grown}


def read_invented(count):
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from backends import pickles

    names = [name.rpartition(".")[::2] for name in (*pickles._FUNCTIONS, *pickles._NAMES, "os.system")]
    text = st.sampled_from(["f4", "u2", "O8", "<", ">", "latin1", "data", "storage", "0", "w", "\u4e00"])
    number = st.sampled_from([0, 1, 2, 3, 4, 8, 255, 2**31 - 1])
    codes = {opcode.name: opcode.code.encode("latin1") for opcode in pickletools.opcodes}
    plain = [name for name in codes if pickletools.code2op[codes[name].decode("latin1")].arg is None]
    step = st.one_of(
        st.sampled_from([codes[name] for name in plain if name != "STOP"]),
        st.sampled_from([f"c{module}\n{name}\n".encode() for module, name in names]),
        text.map(lambda value: b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()),
        number.map(lambda value: b"J" + value.to_bytes(4, "little")),
        number.map(lambda value: b"r" + value.to_bytes(4, "little")),
        st.integers(0, 9).map(lambda value: b"h%c" % value),
        st.integers(0, 9).map(lambda value: b"q%c" % value),
        st.binary(max_size=16).map(lambda value: b"C%c" % len(value) + value),
        st.sampled_from([b"(", b"}(Xw".replace(b"X", b"X\1\0\0\0"), b"t", b"R", b"b", b"u", b"\x85", b"\x86", b"\x87"]),
    )
    array = b"cnumpy._core.multiarray\n_reconstruct\n)Rq\1"

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "weights.bin"

        @settings(
            max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
        )
        @given(st.lists(step, max_size=30), st.booleans())
        def never_ends_otherwise(steps, with_array):
            path.write_bytes(b"\x80\2}(X\1\0\0\0w" + array * with_array + b"".join(steps) + b"u.")
            read(path)

        limit(0)
        never_ends_otherwise()
    return "done"


def main():
    kind, *arguments = sys.argv[1:]
    if kind == "mutated":
        print(json.dumps(read_mutated(Path(arguments[0]), int(arguments[1]))))
    elif kind == "invented":
        print(json.dumps(read_invented(int(arguments[0]))))
    else:
        paths = list(map(Path, arguments))
        limit(max((path.stat().st_size for path in paths if path.is_file()), default=0))
        for path in paths:
            begun = time.process_time()
            outcome = read(path)
            print(json.dumps({"outcome": outcome, "seconds": time.process_time() - begun}), flush=True)


if __name__ == "__main__":
    main()
