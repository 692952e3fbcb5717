"""``python -m bench distill``: whole training steps, ours beside those of other tools."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from backends.interface import Batch
from backends.shape import Shape
from bench.company import NOTICED, beside, company
from bench.contenders import PHASES, Contender, Task
from bench.report import ROOT, corpus_and_tokenizer, machine, save, step_plot
from general_distill.distill import model_config
from text.batches import Drawn, line_batches
from text.corpus import Corpus
from text.tokenizer import WordPiece
from training.report import markdown

CONTENDERS = {
    "ours-torch": "ours:OursTorch",
    "plain-torch": "plain_torch:PlainTorch",
    "plain-torch-amp": "plain_torch:PlainTorchAMP",
    "textbrewer": "textbrewer:TextBrewer",
    "ours-paddle": "ours:OursPaddle",
    "paddlenlp": "paddlenlp:PaddleNLP",
}


@dataclass(frozen=True)
class Size:
    teacher: tuple[int, int]
    student: tuple[int, int]
    """Layers and hidden size."""
    teacher_layer: int
    heads: int


SIZES = {
    "small": Size((4, 256), (2, 128), 3, 32),
    "base": Size((12, 768), (6, 768), 11, 48),
    "large": Size((24, 1024), (6, 768), 19, 64),
}


def model_flops(task: Task, lengths: np.ndarray) -> float:
    """Floating-point operations of a step that the models cannot do without.

    Only real tokens count, and only layers up to the captured ones (`backends.shape.Shape.operations`). The teacher
    runs forward; the student forward and, at twice the cost, backward. Look-ups, norms, activations, the relation loss
    and the update count nothing.
    """
    teacher, student = Shape.of(task.teacher), Shape.of(task.student)
    return teacher.operations(lengths, task.teacher_layer) + 3 * student.operations(lengths, task.student_layer)


def distill(
    size: Literal["small", "base", "large"] = "base",
    batch_size: int = 16,
    max_seq_length: int = 128,
    steps: int = 10,
    warmup: int = 8,
    busy: list[int] = [1, 2],  # noqa: B006
    busy_steps: int = 3,
    contenders: list[str] = list(CONTENDERS),  # noqa: B006
    one_at_a_time: bool = False,
    device: Literal["cpu", "gpu"] = "cpu",
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    input_dir: str | None = None,
    vocab_file: str | None = None,
    output_dir: str = "output/bench",
) -> None:
    """Measures whole training steps of distillation, data included, side by side.

    Every contender runs in a process of its own; they take turns, step by step, on
    the same batches of text, alone on the machine and then beside loops that take all the
    time they get. Prints a table and saves it, with a plot and the raw figures, in output_dir.

    Args:
        size: small (4x256 to 2x128), base (12x768 to 6x768, 48 relation heads) or large (24x1024 to 6x768, 64).
        batch_size: lines a batch.
        max_seq_length: tokens of a line that are kept.
        steps: steps that are measured.
        warmup: steps before them.
        busy: numbers of busy loops to measure beside, too.
        busy_steps: steps beside each.
        contenders: who runs.
        one_at_a_time: let each finish before the next starts, where memory does not hold all of them.
        device: cpu, or gpu.
        precision: ours; the others run as their users run them.
        input_dir: folder of text, one sentence a line; without, the project's data folder or its demo corpus.
        vocab_file: vocab.txt; without, the data folder's, or one trained on the text.
        output_dir: where the table, the plot and the figures go.
    """
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        raise SystemExit(f"--contenders {unknown[0]}: no such contender; there are {', '.join(CONTENDERS)}")
    with tempfile.TemporaryDirectory() as folder:
        corpus, tokenizer = corpus_and_tokenizer(input_dir, vocab_file, Path(folder))
        source = corpus.files[0].parent
    task = task_of(SIZES[size], len(tokenizer), max_seq_length, device == "gpu", precision)
    text = (str(source), tokenizer.tokens, batch_size, max_seq_length)
    found: dict[str, dict[str, Any]] = {}
    for group in [[name] for name in contenders] if one_at_a_time else [contenders]:
        found |= _measure(group, task, text, steps, warmup, busy, busy_steps)
    results = {
        "machine": machine(device),
        "size": size,
        "batch_size": batch_size,
        "max_seq_length": max_seq_length,
        "text": source.name if source.is_relative_to(ROOT) else "/".join(source.parts[-3:]),
        "contenders": [_summary(found[name]) for name in contenders],
    }
    table = _table(results)
    save(Path(output_dir), f"distill-{size}-{batch_size}", table, results, step_plot)
    print(table)


def _measure(
    names: Sequence[str],
    task: Task,
    text: tuple[str, list[str], int, int],
    steps: int,
    warmup: int,
    busy: Sequence[int],
    busy_steps: int,
) -> dict[str, dict[str, Any]]:
    """What contenders that take turns, step by step, are found to do."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_work, args=(theirs, CONTENDERS[name], task, text), daemon=True))
        processes[-1].start()
        theirs.close()

    def ask(name: str, *command: Any) -> Any:
        if command[0] in ("step", "rates"):
            # OpenMP's threads go on spinning for a while, on the next one's cores; ours take the last one for company.
            time.sleep(NOTICED)
        try:
            pipes[name].send(command)
            answer = pipes[name].recv()
        except (EOFError, OSError):
            raise SystemExit(
                f"{name}: its process was ended; if memory ran out, --one_at_a_time true needs less"
            ) from None
        if isinstance(answer, Exception):
            raise SystemExit(f"{name}: {answer!r}")
        return answer

    found: dict[str, dict[str, Any]] = {name: {"steps": [], **ask(name, "describe")} for name in names}
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for number in range(warmup + steps):
        for name in names:
            if number in (warmup, warmup + steps // 2):
                for kind, rate in ask(name, "rates").items():
                    rates[name].setdefault(kind, []).append(rate)
            measured = ask(name, "step", number)
            if number >= warmup:
                found[name]["steps"].append(measured)
    for loops in busy:
        with beside(loops) as share:
            beside_loops = [{name: ask(name, "step", number) for name in names} for number in range(busy_steps)]
        for name in names:
            some = [step[name] for step in beside_loops]
            speed = sum(step["sequences"] for step in some) / sum(step["step"] for step in some)
            row = {"loops": loops, "share_left": share, "sequences_per_second": speed}
            found[name].setdefault("busy", []).append(row)
    for name in names:
        found[name]["peak_memory"] = ask(name, "memory")
        found[name]["rates"] = {kind: statistics.median(values) for kind, values in rates[name].items()}
        pipes[name].send(("stop",))
    for process in processes:
        process.join()
    return found


def task_of(size: Size, vocab_size: int, max_seq_length: int, on_gpu: bool, precision: str) -> Task:
    """Distillation of BERTs of a size, last student layer matched."""
    teacher, student = (
        model_config(
            "bert",
            vocab_size=vocab_size,
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=max(2, width // 64),
            intermediate_size=4 * width,
            hidden_act="gelu",
            max_position_embeddings=max(512, max_seq_length),
        )
        for layers, width in (size.teacher, size.student)
    )
    return Task(teacher, student, size.teacher_layer, size.student[0] - 1, size.heads, on_gpu, precision)


def _work(pipe: Any, where: str, task: Task, text: tuple[str, list[str], int, int]) -> None:
    """A contender's process: answers the commands that come through the pipe."""
    # Paddle takes one thread where nothing is said, PyTorch all cores: all get all.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    try:
        module, name = where.split(":")
        contender: Contender = getattr(importlib.import_module(f"bench.contenders.{module}"), name)(task)
        source, tokens, batch_size, max_seq_length = text
        tokenizer = WordPiece(tokens)
        folder = tempfile.TemporaryDirectory()

        def make(drawn: Drawn) -> Batch:
            return tokenizer.encode(drawn.lines, max_seq_length).batch

        batches: Iterator[Batch] = line_batches(Corpus(source, folder.name), make, batch_size=batch_size, seed=0)
        while True:
            command, *arguments = pipe.recv()
            if command == "stop":
                return
            answer: Any = None
            if command == "describe":
                answer = {"title": contender.title, "framework": contender.framework, "precision": contender.precision}
            elif command == "rates":
                # A CPU multiplies float16 one element at a time.
                kinds = ("float32", "bfloat16", "float16") if task.on_gpu else ("float32", "bfloat16")
                answer = {kind: contender.matrix_rate(kind) for kind in kinds}
            elif command == "memory":
                answer = contender.peak_memory()
            elif command == "step":
                contender.seconds.clear()
                with contender.phase("step"):
                    batch = contender.step(batches, arguments[0])
                lengths = batch.attention_mask.sum(axis=1)
                answer = {
                    **contender.seconds,
                    "sequences": batch.sequences,
                    "tokens": batch.tokens,
                    "flops": model_flops(task, lengths),
                }
            pipe.send(answer)
    except Exception as error:
        pipe.send(error)


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    steps = found["steps"]
    total = {key: sum(step.get(key, 0.0) for step in steps) for key in (*steps[0], *PHASES)}
    per_step = [step["sequences"] / step["step"] for step in steps]
    return {
        **{key: found[key] for key in ("title", "framework", "precision", "peak_memory", "rates")},
        "sequences_per_second": total["sequences"] / total["step"],
        "slowest_and_fastest_step": [min(per_step), max(per_step)],
        "tokens_per_second": total["tokens"] / total["step"],
        "useful_flops_per_second": total["flops"] / total["step"],
        "step_seconds": total["step"] / len(steps),
        "phase_seconds": {phase: total[phase] / len(steps) for phase in PHASES},
        "busy": found.get("busy", []),
    }


def _table(results: dict[str, Any]) -> str:
    contenders = results["contenders"]
    ours = {one["framework"]: one for one in contenders if one["title"].startswith("ours")}
    kinds = list(contenders[0]["rates"])
    bfloat16 = max(
        [one["rates"]["bfloat16"] for one in contenders if not math.isnan(one["rates"]["bfloat16"])] or [0.0]
    )
    rows = []
    for one in contenders:
        own = ours.get(one["framework"])
        rows.append(
            [
                one["title"],
                f"{one['sequences_per_second']:.2f}",
                f"{own['sequences_per_second'] / one['sequences_per_second']:.1f}x" if own else "",
                f"{one['tokens_per_second']:,.0f}",
                f"{one['useful_flops_per_second'] / 1e9:,.0f}",
                *(
                    f"{one['useful_flops_per_second'] / rate:.0%}" if rate else ""
                    for rate in (one["rates"][one["precision"]], bfloat16)
                ),
                f"{one['peak_memory'] / 2**30:.1f}",
            ]
        )
    head = ["", "sequences/s", "ours is", "tokens/s", "useful GFLOP/s", "of own rate", "of bf16 rate", "peak GiB"]
    phases = [
        [one["title"], f"{one['step_seconds'] * 1e3:,.0f}"]
        + [
            f"{one['phase_seconds'][phase] * 1e3:,.1f} ({one['phase_seconds'][phase] / one['step_seconds']:.1%})"
            for phase in PHASES
        ]
        for one in contenders
    ]
    rates = [
        [one["title"], *("none" if math.isnan(rate) else f"{rate / 1e9:,.0f}" for rate in one["rates"].values())]
        for one in contenders
    ]
    return "\n\n".join(
        [
            f"{results['size']}, batch {results['batch_size']}, at most {results['max_seq_length']} tokens, "
            f"text {results['text']}; {results['machine']}",
            markdown(head, rows),
            "Milliseconds of a step, and where they go:",
            markdown(["", "step", *PHASES], phases),
            "Matrix products in each process, GFLOP/s:",
            markdown(["", *kinds], rates),
            *([f"Beside busy loops:\n\n{_beside(contenders, ours)}"] if contenders[0]["busy"] else []),
        ]
    )


def _beside(contenders: Sequence[Mapping[str, Any]], ours: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for number, one in product(range(len(contenders[0]["busy"])), contenders):
        row, own = one["busy"][number], ours.get(one["framework"])
        kept = row["sequences_per_second"] / one["sequences_per_second"]
        rows.append(
            [
                f"{one['title']}, {company(row['loops'])}",
                f"{row['sequences_per_second']:.2f}",
                f"{own['busy'][number]['sequences_per_second'] / row['sequences_per_second']:.1f}x" if own else "",
                f"{kept:.0%}",
                f"{row['share_left']:.0%}",
                f"{kept / row['share_left']:.0%}",
            ]
        )
    return markdown(["", "sequences/s", "ours is", "of alone", "processors left", "of what is left"], rows)
