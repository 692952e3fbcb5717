"""``python -m bench distill``: whole training steps, ours beside those of other tools."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from backends.interface import Batch
from backends.shape import Shape
from bench.company import beside, company
from bench.contenders import DistillationJob
from bench.report import ROOT, corpus_and_tokenizer, machine, save, step_plot
from bench.turns import Turns, means, phase_table, speeds
from general_distill.distill import model_config
from text.batches import Drawn, line_batches
from text.corpus import Corpus, Lines
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
    """Sizes of a teacher and its student."""

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


def model_flops(job: DistillationJob, lengths: np.ndarray) -> float:
    """Floating-point operations of a step that the models cannot do without.

    Only real tokens count, and only layers up to the captured ones (`backends.shape.Shape.operations`). The teacher
    runs forward; the student forward and, at twice the cost, backward. Look-ups, norms, activations, the relation loss
    and the update count nothing.
    """
    teacher, student = Shape.of(job.teacher), Shape.of(job.student)
    return teacher.operations(lengths, job.teacher_layer) + 3 * student.operations(lengths, job.student_layer)


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
    job = job_of(SIZES[size], len(tokenizer), max_seq_length, device == "gpu", precision)
    text = Text(source, tokenizer.tokens, batch_size, max_seq_length)
    records: dict[str, dict[str, Any]] = {}
    for group in [[name] for name in contenders] if one_at_a_time else [contenders]:
        records |= _measure(group, job, text, steps, warmup, busy, busy_steps)
    results = {
        "machine": machine(device),
        "size": size,
        "batch_size": batch_size,
        "max_seq_length": max_seq_length,
        "text": source.name if source.is_relative_to(ROOT) else "/".join(source.parts[-3:]),
        "contenders": [records[name] for name in contenders],
    }
    table = _table(results)
    save(Path(output_dir), f"distill-{size}-{batch_size}", table, results, step_plot)
    print(table)


def job_of(size: Size, vocab_size: int, max_seq_length: int, on_gpu: bool, precision: str) -> DistillationJob:
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
    return DistillationJob(teacher, student, size.teacher_layer, size.student[0] - 1, size.heads, on_gpu, precision)


def encoded_batches(lines: Lines[Any], tokenizer: WordPiece, batch_size: int, max_seq_length: int) -> Iterator[Batch]:
    """Batches of lines in random order."""

    def make(drawn: Drawn) -> Batch:
        return tokenizer.encode(drawn.lines, max_seq_length).batch

    return line_batches(lines, make, batch_size=batch_size, seed=0)


@dataclass(frozen=True)
class Text:
    """What a process needs to make the batches that all train on."""

    folder: Path
    tokens: list[str]
    """The vocabulary."""
    batch_size: int
    max_seq_length: int

    def batches(self) -> Iterator[Batch]:
        with tempfile.TemporaryDirectory() as index:  # of the text's lines
            corpus, tokenizer = Corpus(self.folder, index), WordPiece(self.tokens)
            yield from encoded_batches(corpus, tokenizer, self.batch_size, self.max_seq_length)


def _measure(
    names: Sequence[str],
    job: DistillationJob,
    text: Text,
    steps: int,
    warmup: int,
    busy: Sequence[int],
    busy_steps: int,
) -> dict[str, dict[str, Any]]:
    """Summaries of contenders that take turns."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    with Turns({name: CONTENDERS[name] for name in names}, job, text.batches) as turns:
        records: dict[str, dict[str, Any]] = turns.ask("description")
        for number in range(warmup + steps):
            if number in (warmup, warmup + steps // 2):
                for name, found in turns.ask("rates").items():
                    for precision, rate in found.items():
                        rates[name].setdefault(precision, []).append(rate)
            for name, step in turns.ask("step", number).items():
                if number >= warmup:
                    measured[name].append(step)
        for name in names:
            records[name] |= {**_summary(job, measured[name]), "busy": []}
            records[name]["rates"] = {precision: statistics.median(values) for precision, values in rates[name].items()}
        for loops in busy:
            with beside(loops) as share:
                rounds = [turns.ask("step", number) for number in range(busy_steps)]
            for name in names:
                speed = speeds([steps_by_name[name] for steps_by_name in rounds])["sequences_per_second"]
                records[name]["busy"].append({"loops": loops, "share_left": share, "sequences_per_second": speed})
        for name, peak in turns.ask("peak_memory").items():
            records[name]["peak_memory"] = peak
    return records


def _summary(job: DistillationJob, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    per_step = [speeds([step])["sequences_per_second"] for step in steps]
    seconds = sum(step["step"] for step in steps)
    return {
        **speeds(steps),
        **means(steps),
        "slowest_and_fastest_step": [min(per_step), max(per_step)],
        "useful_flops_per_second": sum(model_flops(job, step["lengths"]) for step in steps) / seconds,
    }


def _table(results: dict[str, Any]) -> str:
    contenders = results["contenders"]
    ours = {contender["framework"]: contender for contender in contenders if contender["title"].startswith("ours")}
    precisions = list(contenders[0]["rates"])
    bfloat16_rates = [contender["rates"]["bfloat16"] for contender in contenders]
    bfloat16 = max([rate for rate in bfloat16_rates if not math.isnan(rate)] or [0.0])
    rows, rates = [], []
    for contender in contenders:
        title, speed, flops = (contender[key] for key in ("title", "sequences_per_second", "useful_flops_per_second"))
        ours_here = ours.get(contender["framework"])
        rows.append(
            [
                title,
                f"{speed:.2f}",
                f"{ours_here['sequences_per_second'] / speed:.1f}x" if ours_here else "",
                f"{contender['tokens_per_second']:,.0f}",
                f"{flops / 1e9:,.0f}",
                *(
                    f"{flops / rate:.0%}" if rate else ""
                    for rate in (contender["rates"][contender["precision"]], bfloat16)
                ),
                f"{contender['peak_memory'] / 2**30:.1f}",
            ]
        )
        rates.append(
            [title, *("none" if math.isnan(rate) else f"{rate / 1e9:,.0f}" for rate in contender["rates"].values())]
        )
    head = ["", "sequences/s", "ours is", "tokens/s", "useful GFLOP/s", "of own rate", "of bf16 rate", "peak GiB"]
    return "\n\n".join(
        [
            f"{results['size']}, batch {results['batch_size']}, at most {results['max_seq_length']} tokens, "
            f"text {results['text']}; {results['machine']}",
            markdown(head, rows),
            "Milliseconds of a step, and where they go:",
            phase_table(contenders),
            "Matrix products in each process, GFLOP/s:",
            markdown(["", *precisions], rates),
            *([f"Beside busy loops:\n\n{_beside(contenders, ours)}"] if contenders[0]["busy"] else []),
        ]
    )


def _beside(contenders: Sequence[Mapping[str, Any]], ours: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for number, contender in product(range(len(contenders[0]["busy"])), contenders):
        run, ours_here = contender["busy"][number], ours.get(contender["framework"])
        speed = run["sequences_per_second"]
        kept = speed / contender["sequences_per_second"]
        rows.append(
            [
                f"{contender['title']}, {company(run['loops'])}",
                f"{speed:.2f}",
                f"{ours_here['busy'][number]['sequences_per_second'] / speed:.1f}x" if ours_here else "",
                f"{kept:.0%}",
                f"{run['share_left']:.0%}",
                f"{kept / run['share_left']:.0%}",
            ]
        )
    return markdown(["", "sequences/s", "ours is", "of alone", "processors left", "of what is left"], rows)
