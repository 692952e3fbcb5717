"""``python -m bench corpus``: what preparing a corpus costs, and whether training can wait for its shards."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bench.contenders.ours import OursTorch
from bench.distill import SIZES, encoded_batches, job_of
from bench.report import ROOT, corpus_and_tokenizer, machine, save
from text.corpus import Lines
from text.shards import Shards
from text.tokenizer import WordPiece
from training.report import markdown

LARGE = 100_000
"""Megabytes of the corpus that is reckoned for: CLUECorpus2020's hundred gigabytes."""
CORES = (1, 8, 64)


def corpus(
    sizes: list[int] = [10, 40, 160],  # noqa: B006
    words: bool = False,
    batch_size: int = 32,
    max_seq_length: int = 128,
    steps: int = 6,
    input_dir: str | None = None,
    vocab_file: str | None = None,
    output_dir: str = "output/bench",
) -> None:
    """Prepares text of several sizes on one core and on all, reads it back, and trains on it.

    The text is made longer than it is by putting halves of its lines together anew, a different half each round.
    Prints tables and saves them, with a plot and the raw figures, in output_dir.

    Args:
        sizes: megabytes (10^6 bytes) of text.
        words: keep where words begin.
        batch_size: lines a batch, where shards are read.
        max_seq_length: tokens of a line that are kept.
        steps: training steps that are timed.
        input_dir: folder of text, one sentence a line; without, the project's data folder or its demo corpus.
        vocab_file: vocab.txt; without, the data folder's, or one trained on the text.
        output_dir: where the tables, the plot and the figures go.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines, tokenizer = corpus_and_tokenizer(input_dir, vocab_file, folder / "index")
        (folder / "vocab").mkdir()
        tokenizer.save(folder / "vocab", 512)
        runs = []
        all_cores = len(os.sched_getaffinity(0))
        for size in sizes:
            text = folder / f"{size}.txt"
            count = _write(lines, size * 10**6, text)
            for cores in (1, all_cores) if size == sizes[-1] and all_cores > 1 else (1,):
                runs.append({"megabytes": text.stat().st_size / 1e6, "lines": count, "cores": cores})
                runs[-1] |= _prepare(text, folder, cores, words)
        reading = _read(Shards(folder / f"{sizes[-1]}.txt-1"), tokenizer, batch_size, max_seq_length)
        training = {
            name: _train(name, lines, tokenizer, batch_size, max_seq_length, steps) for name in ("small", "base")
        }
        source = lines.files[0].parent
    results = {
        "machine": machine("cpu"),
        "text": source.name if source.is_relative_to(ROOT) else "/".join(source.parts[-3:]),
        "words": words,
        "batch_size": batch_size,
        "max_seq_length": max_seq_length,
        "preparations": runs,
        "lines_read_per_second": reading,
        "lines_trained_per_second": training,
    }
    table = _table(results)
    save(Path(output_dir), "corpus", table, results, _plot)
    print(table)


def _write(lines: Lines[str], size: int, path: Path) -> int:
    """Writes text of `size` bytes, returns its number of lines."""
    written = count = 0
    texts = list(lines)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for turn in range(size):
            for i, line in enumerate(texts):
                other = texts[(i + turn * 7919) % len(texts)]
                line = line[: len(line) // 2] + other[len(other) // 2 :] + "\n"
                file.write(line)
                written += len(line.encode())
                count += 1
                if written >= size:
                    return count
    raise AssertionError("unreachable")


def _prepare(text: Path, folder: Path, cores: int, words: bool) -> dict[str, Any]:
    output = folder / f"{text.name}-{cores}"
    options = ["--input", str(text), "--output", str(output), "--vocab", str(folder / "vocab")]
    options += ["--processes", str(cores), "--unit_mb", "16", *(["--words"] if words else [])]
    # Its peak is asked of a process between, as this one knows only the largest of all its children.
    program = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
    program += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, sys.executable, "-m", "text.prepare", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    disk = sum(path.stat().st_size for path in output.rglob("*"))
    return {"seconds": seconds, "peak_memory": int(done.stdout) * 1024, "disk": disk}


def _read(shards: Shards, tokenizer: WordPiece, batch_size: int, max_seq_length: int) -> float:
    """Lines a second, in batches, in random order."""
    batches = encoded_batches(shards, tokenizer, batch_size, max_seq_length)
    next(batches)
    count = max(1, min(len(shards), 200_000) // batch_size)
    start = time.perf_counter()
    for _ in islice(batches, count):
        pass
    return count * batch_size / (time.perf_counter() - start)


def _train(
    size: str, lines: Lines[str], tokenizer: WordPiece, batch_size: int, max_seq_length: int, steps: int
) -> float:
    """Lines a second."""
    contender = OursTorch(job_of(SIZES[size], len(tokenizer), max_seq_length, False, "auto"))
    batches = encoded_batches(lines, tokenizer, batch_size, max_seq_length)
    for number in range(2):
        contender.step(next(batches), number)
    start = time.perf_counter()
    for number in range(steps):
        contender.step(next(batches), 2 + number)
    return steps * batch_size / (time.perf_counter() - start)


def _table(results: dict[str, Any]) -> str:
    runs = results["preparations"]
    single = [run for run in runs if run["cores"] == 1]
    megabytes, seconds = (np.array([run[key] for run in single]) for key in ("megabytes", "seconds"))
    slope, start = np.polyfit(megabytes, seconds, 1)
    efficiency = single[-1]["seconds"] / runs[-1]["seconds"] / runs[-1]["cores"]
    rows = [
        [
            f"{run['megabytes']:.0f}",
            f"{run['lines']:,}",
            str(run["cores"]),
            f"{run['seconds']:.1f}",
            f"{run['lines'] / run['seconds'] / run['cores']:,.0f}",
            f"{run['seconds'] / (start + slope * run['megabytes']) - 1:+.1%}" if run["cores"] == 1 else "",
            f"{run['peak_memory'] / 2**20:,.0f}",
            f"{run['disk'] / 1e6:,.0f}",
        ]
        for run in runs
    ]
    head = ["MB", "lines", "cores", "seconds", "lines/s a core", "off the line", "largest process, MiB", "shards, MB"]
    hours = LARGE * slope / 3600
    large = [[str(cores), f"{hours / cores:,.1f}", f"{hours / cores / efficiency:,.1f}"] for cores in CORES]
    reading = results["lines_read_per_second"]
    training = [
        [name, f"{rate:,.1f}", f"{reading / rate:,.0f}x"] for name, rate in results["lines_trained_per_second"].items()
    ]
    kind = "put together anew, with words" if results["words"] else "put together anew"
    return "\n\n".join(
        [
            f"text {results['text']}, {kind}; {results['machine']}",
            markdown(head, rows),
            f"On one core: {start:.1f} s and {slope * 1e3:.1f} ms a MB. "
            f"{runs[-1]['cores']} cores are {efficiency * runs[-1]['cores']:.2f} times as fast as one.",
            f"Reckoned for {LARGE // 1000} GB, in hours:",
            markdown(["cores", "if cores did not disturb each other", f"at {efficiency:.0%} of that"], large),
            f"Shards give {reading:,.0f} lines/s at random, in batches of {results['batch_size']}. Training (PyTorch):",
            markdown(["size", "lines/s", "shards are faster"], training),
        ]
    )


def _plot(axes: Axes, results: dict[str, Any]) -> None:
    runs = [run for run in results["preparations"] if run["cores"] == 1]
    axes.plot([run["megabytes"] for run in runs], [run["seconds"] for run in runs], "o-")
    axes.set_xlabel("MB of text")
    axes.set_ylabel("seconds on one core")
