"""The check of the prediction: steps of a process alone, of two apart and of two together, measured on this CPU.

Run as a script, this file is one of the processes that are measured.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from backends.interface import Batch, Tensor, Wanted
from backends.shape import Shape
from bench.distill import SIZES
from bench.scaling_prediction import (
    MESSAGES,
    Link,
    gathered_bytes,
    returned_bytes,
    ring_all_gather,
    ring_all_reduce,
)
from general_distill.arguments import DistillArguments, Pretraining
from general_distill.distill import Setup, distillation, prepare
from training.launch import Processes, launch
from training.loop import time_steps
from training.stages import Phase

WARMUP, STEPS, REPEATS, ROUNDS = 2, 20, 2, 2
"""Rounds of one process, two apart and two together, each with repeats of the same steps. Of each step the median
counts: others may be at work on the machine."""
PAYLOADS = (2**10, 2**20, 2**22, 2**24)
"""Bytes of the all-reductions and gatherings that are timed."""


def small_arguments(
    backend: Literal["torch", "paddle"], source: Path, folder: Path, batch_size: int, max_seq_length: int
) -> DistillArguments:
    """Arguments of the distillation that is measured: `SIZES["small"]`, both models at random."""
    size = SIZES["small"]
    (teacher_layers, teacher_width), (layers, width) = size.teacher, size.student
    return DistillArguments(
        input_dir=str(source),
        output_dir=str(folder / "none"),
        backend=backend,
        device="cpu",
        model_type="bert",
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=2,
        intermediate_size=4 * width,
        hidden_act="gelu",
        num_relation_heads=size.heads,
        teacher_layer_index=size.teacher_layer,
        student_layer_index=layers - 1,
        max_seq_length=max_seq_length,
        batch_size=batch_size,
        dry_run=True,
        pretrain=Pretraining(
            vocab_file=str(folder / "vocab.txt"),
            num_layers=teacher_layers,
            hidden_size=teacher_width,
            num_attention_heads=4,
            intermediate_size=4 * teacher_width,
        ),
    )


def check(arguments: DistillArguments) -> dict[str, Any]:
    """Seconds of a step: measured with one process at a time, with two apart and with two together; and those of two
    together predicted from those of two apart."""
    rounds = [
        (_apart(arguments, [0]) + _apart(arguments, [1]), _apart(arguments, [0, 1]), _together(arguments))
        for _ in range(ROUNDS)
    ]
    alone, apart, together = ([_combined(records) for records in zip(*kind)] for kind in zip(*rounds))
    # Any repeat of a step by the one process may meet any by the other.
    first, second = (record["seconds"] for record in apart)
    slower = float(np.median(np.maximum(first[:, None], second[None]), axis=(0, 1)).mean())
    compute = _mean(apart)
    parts = {"compute": compute, "late": slower - compute, "relation": 0.0, "gather": 0.0}
    if arguments.beta:
        single, double = np.mean([record["relation"] for record in apart], axis=0)
        parts["relation"] = double / 2 - single
        widths, tokens = apart[0]["widths"], float(np.maximum(*(record["tokens"] for record in apart)).mean())
        size = gathered_bytes(widths, tokens, 4) + returned_bytes(widths, tokens)
        link = _link(together[0]["gather"])
        parts["gather"] = ring_all_gather(size, 2, link) + MESSAGES * ring_all_gather(0, 2, link)
    parts["reduce"] = ring_all_reduce(apart[0]["gradient_bytes"], 2, _link(together[0]["all_reduce"]))
    return {
        "framework": arguments.backend,
        "beta": arguments.beta,
        "alone": _mean(alone),
        "two": _mean(together),
        "predicted": sum(parts.values()),
        **{f"{key} seconds": together[0][key] for key in ("all_reduce", "gather")},
        **{f"predicted {name}": seconds for name, seconds in parts.items()},
    }


def _link(seconds: Sequence[float]) -> Link:
    """The link between two processes, from the times of `PAYLOADS`: a call sends as many bytes in two messages."""
    return Link((PAYLOADS[-1] - PAYLOADS[0]) / (seconds[-1] - seconds[0]), seconds[0] / 2)


def _combined(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Records of one process in one: the steps of all rounds, of each other time the median."""
    combined = {**rounds[0], "seconds": np.concatenate([record["seconds"] for record in rounds])}
    for key in {"relation", "all_reduce", "gather"} & combined.keys():
        combined[key] = np.median([record[key] for record in rounds], axis=0).tolist()
    return combined


def _mean(processes: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of a step: of each the median."""
    return float(np.mean([np.median(record["seconds"], axis=0).mean() for record in processes]))


def _apart(arguments: DistillArguments, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Records of processes that train at the same time, each for itself on what one of these ranks of two trains on."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = _write(arguments, Path(folder))
        commands = [[sys.executable, __file__, str(path), str(rank)] for rank in ranks]
        processes = [subprocess.Popen(command, env=environment) for command in commands]
        _check_codes(arguments, [process.wait() for process in processes])
        return [json.loads(_record_path(path, rank).read_text(encoding="utf-8")) for rank in ranks]


def _together(arguments: DistillArguments) -> list[dict[str, Any]]:
    """The record of the first of two processes that train together; the other keeps step with it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        path = _write(arguments, Path(folder))
        code = launch(Processes(nproc=2), arguments.backend, "cpu", Path(__file__), [str(path)])
        _check_codes(arguments, [code or 0])
        return [json.loads(_record_path(path, 0).read_text(encoding="utf-8"))]


def _write(arguments: DistillArguments, folder: Path) -> Path:
    path = folder / "arguments.json"
    path.write_text(json.dumps({**vars(arguments), "pretrain": vars(arguments.pretrain)}), encoding="utf-8")
    return path


def _record_path(arguments_path: Path, rank: int) -> Path:
    return arguments_path.with_name(f"record-{rank}.json")


def _check_codes(arguments: DistillArguments, codes: Sequence[int]) -> None:
    for code in codes:
        if code:
            raise SystemExit(f"--frameworks {arguments.backend}: a process ended with exit code {code}")


def _measure(path: Path, rank: int | None) -> None:
    """Measures this process, and writes the record: it trains together with another or, with a rank, for itself on the
    batches of that rank."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    arguments = DistillArguments(**{**settings, "pretrain": Pretraining(**settings["pretrain"])})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        setup = prepare(arguments, folder)
        backend = setup.backend

        def share(phase: Phase) -> Iterator[Batch]:
            batches = phase.batches(0, 0)
            return batches if rank is None else islice(batches, rank, None, 2)

        seconds = []
        for repeat in range(REPEATS):  # a model each: Paddle's, once parallel, takes no second optimizer
            phase = distillation(setup, None)
            shared = phase._replace(batches=lambda *_: share(phase))  # noqa: B023
            seconds.append(time_steps(backend, *shared, folder / str(repeat), WARMUP, STEPS).seconds)
        record: dict[str, Any] = {"seconds": seconds}
        if rank is None:
            for name, send in (("all_reduce", _all_reduce), ("gather", backend.gather)):
                payloads = [backend.tensor(np.ones(size // 4, np.float32)) for size in PAYLOADS]
                record[name] = [_median(partial(send, payload), backend.barrier) for payload in payloads]
        else:
            teacher, student = Shape.of(setup.teacher_config), Shape.of(setup.student_config)
            timed = islice(share(phase), WARMUP, WARMUP + STEPS)
            record |= {
                "relation": [
                    _median(_relating(setup, phase.objective, count * arguments.batch_size)) for count in (1, 2)
                ],
                "tokens": [int(batch.attention_mask.sum()) for batch in timed],
                "gradient_bytes": 4 * student.weights(),
                "widths": [teacher.hidden, student.hidden],
            }
        if rank is not None or backend.rank == 0:
            _record_path(path, rank or 0).write_text(json.dumps(record), encoding="utf-8")
        backend.barrier()


def _median(run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Seconds of a run: the median of some, after some that do not count."""
    seconds = []
    for _ in range(WARMUP + STEPS):
        before()
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[WARMUP:]))


def _all_reduce(x: Tensor) -> None:
    importlib.import_module(type(x).__module__.partition(".")[0]).distributed.all_reduce(x)


def _relating(setup: Setup, objective: Any, count: int) -> Callable[[], object]:
    """The relation loss of so many lines, their Q, K, V computed before."""
    numbers = np.random.default_rng(0).choice(len(setup.corpus), count, replace=False)
    lines = [setup.corpus[int(number)] for number in numbers]
    batch = setup.tokenizer.encode(lines, setup.arguments.max_seq_length).batch.shortest_first()
    [(t, s)] = objective.layer_pairs
    with setup.backend.no_grad():
        teacher = objective.teacher.run(batch, Wanted(qkv=[t])).qkv[t]
        student = objective.student.run(batch, Wanted(qkv=[s])).qkv[s]
    return partial(objective.loss, setup.backend, teacher, student, batch.attention_mask)


if __name__ == "__main__":
    _measure(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
