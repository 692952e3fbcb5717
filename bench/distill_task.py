"""``python -m bench distill_task``: whole training steps of distillation on a task, beside those of other tools."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.contenders import TaskJob
from bench.report import DATA, machine, save, step_plot
from bench.turns import Turns, means, phase_table, speeds
from general_distill.distill import model_config
from text.data import read_split, with_labels_of
from text.features import classification_features
from text.tasks import find_task
from text.tokenizer import WordPiece
from training.report import markdown


@dataclass(frozen=True)
class Group:
    """Contenders that are compared."""

    title: str
    contenders: Mapping[str, str]
    """Names -> modules of `bench.contenders` and their classes."""
    layers: bool = True
    """Whether states and attention are matched, beside logits."""


GROUPS = (
    Group(
        "PyTorch; states, attention and logits",
        {
            "ours-torch": "ours:OursTorchOnTask",
            "ours-torch-float32": "ours:OursTorchFloat32OnTask",
            "textbrewer": "textbrewer:TextBrewerOnTask",
            "textbrewer-bf16": "textbrewer:TextBrewerAutocastOnTask",
        },
    ),
    Group(
        "Paddle; states, attention and logits",
        {"ours-paddle": "ours:OursPaddleOnTask", "paddlenlp": "paddlenlp:PaddleNLPOnTask"},
    ),
    Group(
        "PyTorch; logits alone, the second epoch",
        {
            "ours-torch-cached": "ours:OursTorchCachedOnTask",
            "textbrewer-logits": "textbrewer:TextBrewerOnTask",
            "textbrewer-cached": "textbrewer:TextBrewerCachedOnTask",
        },
        layers=False,
    ),
)
CONTENDERS = [name for group in GROUPS for name in group.contenders]
DATA_OF = {"reviews10": ("classification", DATA / "own" / "reviews10"), "tnews": ("tnews", DATA / "clue")}
SIZES = {
    "small": ((4, 256, 1024), (2, 128, 512), 4),
    "base": ((12, 768, 3072), (4, 312, 1200), 12),
}
"""Layers, hidden and intermediate sizes of teacher and student, and the heads of both."""


def distill_task(
    task: Literal["reviews10", "tnews"] = "reviews10",
    size: Literal["small", "base"] = "base",
    batch_size: int = 32,
    max_seq_length: int = 128,
    rounds: int = 3,
    steps: int = 2,
    warmup: int = 3,
    contenders: list[str] = CONTENDERS,  # noqa: B006
    output_dir: str = "output/bench",
) -> None:
    """Measures whole training steps of distillation on a task, data included, side by side.

    Each of the student's layers learns hidden states and attention of one of the teacher's, and the last the logits;
    or the logits are all. Every contender runs in a process of its own; those that are compared take turns, step by
    step, on the same batches in plain random order. Prints tables and saves them, with a plot and the raw figures, in
    output_dir.

    Args:
        task: whose examples, of the project's data folder.
        size: base (12x768 to 4x312) or small (4x256 to 2x128), with random weights.
        batch_size: sequences a batch.
        max_seq_length: tokens of a sequence that are kept.
        rounds: parts of the measurement, of which medians are taken.
        steps: steps of each.
        warmup: steps before them.
        contenders: who runs.
        output_dir: where the tables, the plot and the figures go.
    """
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        raise SystemExit(f"--contenders {unknown[0]}: no such contender; there are {', '.join(CONTENDERS)}")
    job = _job(task, size, batch_size * (warmup + rounds * steps), batch_size, max_seq_length)
    measured = []
    for group in GROUPS:
        chosen = {name: where for name, where in group.contenders.items() if name in contenders}
        if chosen:
            own = job if group.layers else replace(job, states=(), attention=())
            measured.append({"title": group.title, "contenders": _measure(chosen, own, rounds, steps, warmup)})
    results = {
        "machine": machine("cpu"),
        "size": f"{size}, {task}",
        "batch_size": batch_size,
        "max_seq_length": max_seq_length,
        "tokens": float(job.features.lengths.mean()),
        "rounds": [rounds, steps],
        "groups": measured,
        "contenders": [contender for group in measured for contender in group["contenders"]],
    }
    table = _table(results)
    save(Path(output_dir), f"distill-task-{task}-{size}", table, results, step_plot)
    print(table)


def _job(name: str, size: str, examples: int, batch_size: int, max_seq_length: int) -> TaskJob:
    """Distillation on some of a task's examples, drawn at random."""
    task_name, folder = DATA_OF[name]
    task = with_labels_of(find_task(task_name), folder)
    rows = read_split(task, folder, "train").examples
    tokenizer = WordPiece.from_file(DATA / "vocab" / "vocab.txt")
    drawn = np.random.default_rng(0).permutation(len(rows))[:examples]
    features = classification_features(tokenizer, [rows[number] for number in drawn], max_seq_length)
    *sizes, heads = SIZES[size]
    teacher, student = (
        model_config(
            "bert",
            vocab_size=len(tokenizer),
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            hidden_act="gelu",
            id2label=dict(enumerate(task.labels or ())),
        )
        for layers, width, intermediate in sizes
    )
    depth = student["num_hidden_layers"]
    stride = teacher["num_hidden_layers"] // depth
    states = [(stride * layer, layer) for layer in range(depth + 1)]
    attention = [(stride * (layer + 1) - 1, layer) for layer in range(depth)]
    return TaskJob(teacher, student, states, attention, features, batch_size)


def _measure(contenders: Mapping[str, str], job: TaskJob, rounds: int, steps: int, warmup: int) -> list[dict[str, Any]]:
    """Summaries of contenders that take turns."""
    with Turns(contenders, job, job.batches) as turns:
        records: dict[str, dict[str, Any]] = turns.ask("description")
        measured = [turns.ask("step", number) for number in range(warmup + rounds * steps)][warmup:]
        peaks = turns.ask("peak_memory")
    for name, record in records.items():
        own = [by_name[name] for by_name in measured]
        parts = [speeds(own[start : start + steps]) for start in range(0, len(own), steps)]
        record |= {key: statistics.median(part[key] for part in parts) for key in parts[0]}
        record["rounds"] = [part["sequences_per_second"] for part in parts]
        record |= {**means(own), "peak_memory": peaks[name]}
    return list(records.values())


def _table(results: Mapping[str, Any]) -> str:
    rounds, steps = results["rounds"]
    parts = [
        f"{results['size']}, batch {results['batch_size']}, at most {results['max_seq_length']} tokens, "
        f"{results['tokens']:.0f} on average; medians of {rounds} rounds of {steps} steps; {results['machine']}"
    ]
    for group in results["groups"]:
        contenders = group["contenders"]
        ours = [contender for contender in contenders if contender["title"].startswith("ours")]
        rows = [
            [
                contender["title"],
                f"{contender['sequences_per_second']:.2f}",
                *(_times(one["rounds"], contender["rounds"]) for one in ours),
                f"{contender['processor_seconds']:.2f}",
                f"{contender['tokens_per_second']:,.0f}",
                f"{contender['peak_memory'] / 2**30:.1f}",
            ]
            for contender in contenders
        ]
        head = [
            "",
            "sequences/s",
            *(f"{one['title']} is" for one in ours),
            "processor s a step",
            "tokens/s",
            "peak GiB",
        ]
        parts += [f"{group['title']}:", markdown(head, rows)]
        parts += ["Milliseconds of a step, and where they go:", phase_table(contenders)]
    return "\n\n".join(parts)


def _times(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """How many times as fast ours is, the median of rounds and their range."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    return f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
