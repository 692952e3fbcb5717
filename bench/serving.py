"""``python -m bench serving``: a served model under many clients, beside the same model called directly."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bench.report import DATA, machine, save
from export.model import OnnxModel
from text.data import read_split
from text.tasks import find_task
from training.report import markdown


def serving(
    model: str,
    task: str = "tnews",
    data_dir: str | None = None,
    clients: int = 64,
    texts: int = 4000,
    rounds: int = 3,
    output_dir: str = "output/bench",
) -> None:
    """Measures ``python -m export serve`` under load: every client asks for one text, waits for the answer, asks again.

    Beside it, in turns, the same texts are given to the model directly, as many at a time as there
    are clients; that process has the machine to itself, the server shares it with its clients.

    Args:
        model: ONNX file of a classifier.
        task: whose dev texts are asked for.
        data_dir: folder with a folder for each task; without, the project's data folder.
        clients: connections, each with one request at a time.
        texts: requests a round.
        rounds: how often all is measured.
        output_dir: where the table, the plot and the figures go.
    """
    classifier = OnnxModel(Path(model))
    examples = read_split(find_task(task), Path(data_dir) if data_dir else DATA / "clue", "dev").examples
    source = cycle(np.random.default_rng(0).permutation(np.array(examples, object)).tolist())
    sample = [next(source) for _ in range(texts)]
    labels: list[str] = []
    direct: list[float] = []
    served: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with _server(model) as port, context.Pool(1) as pool:
        pool.apply(_load, (port, _requests(sample[:500]), clients))
        for _ in range(rounds):
            start = time.perf_counter()
            labels = [
                answer["label"]
                for i in range(0, texts, clients)
                for answer in classifier.answers(sample[i : i + clients])
            ]
            direct.append(texts / (time.perf_counter() - start))
            served.append(pool.apply(_load, (port, _requests(sample), clients)))
    results = {
        "machine": machine("cpu"),
        "model": Path(model).name,
        "task": task,
        "clients": clients,
        "texts": texts,
        "direct_texts_per_second": direct,
        "served": [{**run, "labels": sum(a == b for a, b in zip(run["labels"], labels))} for run in served],
    }
    table = _table(results)
    save(Path(output_dir), f"serving-{Path(model).stem}", table, results, _plot)
    print(table)


@contextmanager
def _server(model: str) -> Iterator[int]:
    """A server of the model; its port."""
    command = [sys.executable, "-m", "export", "serve", model, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if address := re.search(r"is served as .* at http://.*:(\d+)$", line.strip()):
                yield int(address[1])
                break
        else:
            raise SystemExit(f"{model}: the server did not start")
    finally:
        process.terminate()
        process.wait()


def _requests(examples: list[Any]) -> list[bytes]:
    """HTTP requests for single texts."""
    requests = []
    for example in examples:
        texts = {"text": example.text, **({"text_pair": example.pair} if example.pair is not None else {})}
        body = json.dumps(texts, ensure_ascii=False).encode()
        requests.append(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return requests


def _load(port: int, requests: list[bytes], clients: int) -> dict[str, Any]:
    """Sends all requests, from so many clients; in a process of its own."""
    seconds = [0.0] * len(requests)
    labels: list[str | None] = [None] * len(requests)
    numbers = iter(range(len(requests)))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            start = time.perf_counter()
            writer.write(requests[number])
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            seconds[number] = time.perf_counter() - start
            if head.startswith(b"HTTP/1.1 200"):
                labels[number] = json.loads(body)["label"]
        writer.close()

    async def all_clients() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    start = time.perf_counter()
    asyncio.run(all_clients())
    total = time.perf_counter() - start
    return {
        "texts_per_second": len(requests) / total,
        "percentiles_ms": [1000 * float(np.percentile(seconds, p)) for p in (50, 90, 99)],
        "errors": labels.count(None),
        "labels": labels,
    }


def _table(results: dict[str, Any]) -> str:
    direct, served = results["direct_texts_per_second"], results["served"]
    speed = statistics.median(run["texts_per_second"] for run in served)
    percentiles = [statistics.median(run["percentiles_ms"][i] for run in served) for i in range(3)]
    share = statistics.median(run["texts_per_second"] / speed_alone for run, speed_alone in zip(served, direct))
    rows = [
        ["called directly", f"{statistics.median(direct):.0f}", "", "", "", "", ""],
        [
            "served",
            f"{speed:.0f}",
            f"{100 * share:.0f} %",
            *(f"{value:.0f}" for value in percentiles),
            f"{sum(run['errors'] for run in served)} of {len(served) * results['texts']}",
        ],
    ]
    head = ["", "texts/s", "of direct", "p50, ms", "p90, ms", "p99, ms", "errors"]
    caption = (
        f"{results['model']}, texts of {results['task']}, {results['clients']} clients with a text each, median of "
        f"{len(served)} rounds of {results['texts']} texts; {results['machine']}"
    )
    return f"{caption}\n\n{markdown(head, rows)}"


def _plot(axes: Axes, results: dict[str, Any]) -> None:
    """Texts a second of each round, directly and served."""
    direct = results["direct_texts_per_second"]
    served = [run["texts_per_second"] for run in results["served"]]
    for shift, heights, label in ((-0.2, direct, "called directly"), (0.2, served, "served")):
        axes.bar([i + shift for i in range(len(heights))], heights, 0.4, label=label)
    axes.set_xlabel("round")
    axes.set_ylabel("texts/s")
    axes.set_title(f"{results['model']}, {results['clients']} clients: {results['machine']}", fontsize=9)
    axes.legend()
