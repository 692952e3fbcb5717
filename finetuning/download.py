"""``python -m finetuning.download``: fetches tasks' data from where it was published.

CLUE's own tasks come from CLUE's storage, the others from PaddleNLP's, which publishes
most digests too. A download that broke off goes on where it stopped; an archive is checked
before it is unpacked, and a task's folder appears only when it is whole. Proxies are those of the environment
(``https_proxy``, ``no_proxy``).
"""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.begin()

import gzip
import http.client
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from backends.files import InputError, digest, leaving_nothing
from programs.commandline import command, parse, run, say_next
from programs.console import console, say
from text.tasks import find_task

CLUE = "https://storage.googleapis.com/cluebenchmark/tasks"
PADDLENLP = "https://bj.bcebos.com/paddlenlp/datasets"
RETRIES = 5
TIMEOUT = 30
"""Seconds without a byte before a connection is given up."""
MOST_BYTES = 2 << 30
"""Size of a task's files at most: an archive of kilobytes could unpack to anything."""


@dataclass(frozen=True)
class Archive:
    """An archive of a task's data."""

    url: str
    digest: str | None = None
    """``<algorithm>:<hexadecimal>`` as published; without one the archive's own checksums count."""
    names: Mapping[str, str] = field(default_factory=dict)
    """File in the archive -> the name that `text.data` looks for, where they differ."""


_PARTS = {f"{split}/{part}": f"{split}.tsv" for split in ("train", "dev", "test") for part in ("part.0", "part-0")}
ARCHIVES = {
    "afqmc": Archive(f"{CLUE}/afqmc_public.zip", "md5:3377b559bb4e61d03a35282550902ca0"),
    "tnews": Archive(
        f"{CLUE}/tnews_public.zip", "sha256:77c476e70cfe0b014a81b84c6e1db2142a8a2f52f4ae0a8216aa75e673933462"
    ),
    "iflytek": Archive(f"{CLUE}/iflytek_public.zip", "md5:19e4b19947db126f69aae18db0da2b87"),
    "cmnli": Archive(f"{CLUE}/cmnli_public.zip", "md5:e0e8caefd9b3491220c18b466233f2ff"),
    "ocnli": Archive(f"{CLUE}/ocnli_public.zip", "md5:acb426f6f3345076c6ce79239e7bc307"),
    "cluewsc2020": Archive(f"{CLUE}/cluewsc2020_public.zip"),
    "csl": Archive(f"{CLUE}/csl_public.zip", "sha256:795d1a2e475d59acad8236f6c5baba7a0b43d3e0508cb60f15ffbc76d5f437c4"),
    "cmrc2018": Archive(
        f"{CLUE}/cmrc2018_public.zip", "sha256:6c63dc27e728ec5231aeb7d2861b4c90b6c116390582e0c44416cf3edf030b16"
    ),
    "drcd": Archive(f"{CLUE}/drcd_public.zip"),
    "bustm": Archive(
        f"{PADDLENLP}/FewCLUE/fewclue_bustm.tar.gz",
        "md5:206e037a88a57a8ca1ea157fdb756b14",
        {
            "fewclue_bustm/train_few_all.json": "train.json",
            "fewclue_bustm/dev_few_all.json": "dev.json",
            "fewclue_bustm/test_public.json": "test.json",
            "fewclue_bustm/test.json": "test_unlabelled.json",
        },
    ),
    "lcqmc": Archive(f"{PADDLENLP}/lcqmc_v2.tar.gz", "md5:e44825d8e6d5117bc04caf3982cf934f"),
    "bq": Archive(f"{PADDLENLP}/bq_corpus.zip", "md5:abe6c480b96cb705b4d24bd522848009"),
    "chnsenticorp": Archive(
        "https://paddlenlp.bj.bcebos.com/datasets/data-chnsenticorp.tar.gz",
        "md5:e336e76d7be4ecd5479083d5b8f771e4",
        _PARTS,
    ),
    "xnli": Archive(f"{PADDLENLP}/xnli_cn.tar.gz", "md5:aaf6de381a2553d61d8e6fad4ba96499", _PARTS),
    "msra_ner": Archive(f"{PADDLENLP}/msra_ner.tar.gz", "md5:f1aadbbf328ea2fa50c9c2b56db0d31e"),
    "peoples_daily_ner": Archive(f"{PADDLENLP}/peoples_daily_ner.tar.gz", "md5:a44ff9c4b37b48add9ddc17994d5620c"),
}


class DownloadFailed(InputError):
    """A failed download: the file did not come, or is not the one that was published."""


@dataclass
class DownloadArguments:
    """Options of ``python -m finetuning.download``."""

    tasks: list[str]
    """names of tasks, or all"""
    data_dir: str = "data/clue"
    """where the tasks' folders go"""
    mirror: str | None = None
    """address of a folder that holds the archives under the same names"""
    overwrite: bool = False
    """fetch also what is already there"""

    def __post_init__(self) -> None:
        if self.mirror is not None and not self.mirror.startswith(("http://", "https://")):
            raise InputError(f"--mirror {self.mirror}: expected an address, http://... or https://...")


def download(arguments: DownloadArguments) -> None:
    """Fetches the data of tasks, each into a folder of its own.

    Raises:
        InputError: no such task, or none that is published.
        DownloadFailed: a task could not be fetched; all that could be are.
    """
    names = [find_task(name, option="tasks").name for name in arguments.tasks if name != "all"]
    if "all" in arguments.tasks:
        names = list(ARCHIVES)
    for name in names:
        if name not in ARCHIVES:
            raise InputError(f"--tasks {name}: not published as an archive; there are {', '.join(ARCHIVES)}")
    failed = []
    for name in names:
        target = Path(arguments.data_dir) / name
        if target.exists() and not arguments.overwrite:
            say(f"{name}: already in {target}; --overwrite fetches it again")
            continue
        try:
            with leaving_nothing(target):
                fetch_task(name, ARCHIVES[name], target, arguments.mirror)
        except DownloadFailed as error:
            failed.append(str(error))
            say(f"{name}: {error}")
    if failed:
        raise DownloadFailed(f"{len(failed)} of {len(names)} tasks could not be fetched; the first: {failed[0]}")
    words = [] if arguments.data_dir == DownloadArguments.data_dir else ["--data_dir", arguments.data_dir]
    name = "roberta-wwm-ext"
    model = ["--model_name_or_path", name, "--output_dir", f"output/finetuning/{name}/{names[0]}"]
    say_next(
        f"The data is in {arguments.data_dir}. To fine-tune a model, one of the hub or your own:",
        command("finetuning", "--recipe", names[0], *model, *words, "--device", "auto"),
    )


def fetch_task(name: str, archive: Archive, target: Path, mirror: str | None = None) -> None:
    """Fetches, checks and unpacks one task.

    Raises:
        DownloadFailed: the file did not come, is not the published one, or is unsafe to unpack.
    """
    url = archive.url if mirror is None else f"{mirror.rstrip('/')}/{archive.url.rsplit('/', 1)[1]}"
    file = target.parent / f".{archive.url.rsplit('/', 1)[1]}.partial"
    file.parent.mkdir(parents=True, exist_ok=True)
    fetch(url, file)
    if archive.digest is not None:
        algorithm, _, published = archive.digest.partition(":")
        with open(file, "rb") as content:
            actual = digest(content, algorithm)
        if actual != published:
            file.unlink()
            raise DownloadFailed(f"{url}: {algorithm} {actual}, published was {published}; not unpacked")
    unpacked = target.parent / f".{name}.unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        count = unpack(file, unpacked, archive.names)
        if target.exists():
            shutil.rmtree(target)
        unpacked.rename(target)
    except DownloadFailed:
        file.unlink()
        raise
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        file.unlink(missing_ok=True)
        raise DownloadFailed(f"{url}: not a whole archive ({error}); not unpacked") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    file.unlink()
    say(f"{name}: {count} files in {target}")


def fetch(url: str, file: Path) -> None:
    """Downloads to `file`, after the part that it already holds.

    Raises:
        DownloadFailed: the server says no, or breaks off again and again.
    """
    for attempt in range(RETRIES + 1):
        start = file.stat().st_size if file.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        try:
            with urllib.request.build_opener().open(request, timeout=TIMEOUT) as answer:
                if start and answer.status != 206:  # the server begins anew
                    start = 0
                length = answer.headers.get("Content-Length")
                _receive(answer, file, start, None if length is None else start + int(length), url)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416 and start:  # nothing is left to fetch
                return
            if error.code < 500:
                raise DownloadFailed(f"{url}: the server says {error.code} {error.reason}") from error
            reason = f"the server says {error.code} {error.reason}"
        except (OSError, EOFError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))
        if attempt < RETRIES:
            time.sleep(min(2.0**attempt, 20.0) / 4)
    raise DownloadFailed(f"{url}: {reason}, {RETRIES + 1} times; the same command goes on where it broke off")


def _receive(answer: IO[bytes], file: Path, start: int, total: int | None, url: str) -> None:
    """Writes an answer to a file, from byte `start` of it on."""
    with (
        open(file, "r+b" if start else "wb") as out,
        Progress(
            TextColumn(url.rsplit("/", 1)[1]),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as progress,
    ):
        bar = progress.add_task("", total=total, completed=start)
        out.seek(start)
        while block := answer.read(1 << 16):
            out.write(block)
            progress.advance(bar, len(block))
        out.truncate()
        if total is not None and out.tell() < total:
            raise EOFError(f"broke off after {out.tell()} of {total} bytes")


def unpack(file: Path, folder: Path, names: Mapping[str, str]) -> int:
    """Unpacks an archive's data files, without its folders; returns how many.

    Raises:
        DownloadFailed: a path leads out of the folder, or it is unreasonably large.
    """
    folder.mkdir(parents=True)
    count = total = 0
    for path, size, content in _members(file):
        parts = PurePosixPath(path).parts
        if path.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            raise DownloadFailed(f"{file.name}: holds a path that leads out of its folder, {path!r}; not unpacked")
        total += size
        if total > MOST_BYTES:
            raise DownloadFailed(f"{file.name}: holds more than {MOST_BYTES >> 30} GiB; not unpacked")
        name = names.get("/".join(parts[-2:]), parts[-1])
        if name.startswith((".", "_")) or "__MACOSX" in parts:
            continue
        with open(folder / name, "wb") as out:
            shutil.copyfileobj(content, out)
        count += 1
    return count


def _members(file: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yields path, size and content of an archive's regular files."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for item in archive.infolist():
                if not item.is_dir():
                    with archive.open(item) as content:
                        yield item.filename, item.file_size, content
    else:
        with tarfile.open(file) as archive:
            for member in archive:
                if member.isfile() and (extracted := archive.extractfile(member)) is not None:
                    yield member.name, member.size, extracted


def main(argv: Sequence[str]) -> int:
    def program() -> None:
        download(parse(DownloadArguments, argv, "finetuning.download", "Fetches tasks' data."))

    return run(program, "the same command")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
