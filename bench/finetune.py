"""``python -m bench finetune``: fine-tuning and evaluation, ours beside those of other tools."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from bench.company import beside, company
from bench.contenders.tuning import FinetuningJob, Outcome
from bench.report import DATA, machine, save
from general_distill.distill import model_config
from programs.worker import Worker, WorkerFailed
from text.data import read_split
from text.features import classification_features
from text.folder import ModelFolder
from text.tasks import find_task
from text.tokenizer import WordPiece
from training.report import markdown

CONTENDERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "ours-torch": ("ours", ("torch",)),
    "trainer": ("trainer", (False,)),
    "trainer-bf16": ("trainer", (True,)),
    "ours-paddle": ("ours", ("paddle",)),
    "paddlenlp": ("paddlenlp", ()),
}
"""Functions of `bench.contenders.tuning`, with what they take after the job."""


def finetune(
    tasks: list[str] = ["ocnli", "tnews"],  # noqa: B006
    model_name_or_path: str | None = None,
    steps: int = 20,
    eval_examples: int = 960,
    seeds: list[int] = [1, 2, 3],  # noqa: B006
    busy: list[int] = [1, 2],  # noqa: B006
    contenders: list[str] = list(CONTENDERS),  # noqa: B006
    batch_size: int = 32,
    max_seq_length: int = 128,
    learning_rate: float = 1e-4,
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    data_dir: str | None = None,
    output_dir: str = "output/bench",
) -> None:
    """Measures the fine-tuning of a model on tasks, and its evaluation, side by side.

    Every contender runs in a process of its own, all of them one after another and then again
    with the next seed; then, with the first seed and a quarter of the updates and examples, alone and beside loops
    that take all the time they get. Prints a table and saves it, with a plot and the raw figures, in output_dir.

    Args:
        tasks: classification tasks.
        model_name_or_path: folder of the model; without, a 6x768 one with random weights, whose speed
            means something and whose accuracy does not.
        steps: updates.
        eval_examples: examples of the dev set that are evaluated, spread over it; 0 takes all.
        seeds: random seeds, each a run of its own.
        busy: numbers of busy loops to measure beside, too.
        contenders: who runs.
        batch_size: sequences a batch.
        max_seq_length: tokens of a sequence that are kept.
        learning_rate: peak learning rate; warm-up is a tenth of the steps.
        precision: ours; the others run as their users run them.
        data_dir: folder with a folder for each task; without, the project's data folder.
        output_dir: where the table, the plot and the figures go.
    """
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        raise SystemExit(f"--contenders {unknown[0]}: no such contender; there are {', '.join(CONTENDERS)}")
    folder = Path(model_name_or_path) if model_name_or_path else None
    records: dict[str, dict[str, Any]] = {}
    for name in tasks:
        data = Path(data_dir) if data_dir else DATA / "clue"
        job = FinetuningJob(
            **_examples(name, folder, data, max_seq_length, eval_examples),
            batch_size=batch_size,
            learning_rate=learning_rate,
            steps=steps,
            seed=0,
            precision=precision,
        )
        runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in contenders}
        for seed in seeds:
            for contender in contenders:
                runs[contender].append(_run(contender, replace(job, seed=seed)))
        short = _examples(name, folder, data, max_seq_length, -(-eval_examples // 4))
        job_beside = replace(job, **short, seed=seeds[0], steps=-(-steps // 4))
        records[name] = {"examples": len(job.dev), "runs": runs, "busy": _beside(contenders, job_beside, busy)}
    results = {
        "machine": machine("cpu"),
        "model": folder.name if folder else "6x768, random weights",
        "steps": steps,
        "batch_size": batch_size,
        "max_seq_length": max_seq_length,
        "seeds": seeds,
        "tasks": records,
    }
    table = _table(results)
    save(Path(output_dir), f"finetune-{folder.name if folder else '6x768'}", table, results, _plot)
    print(table)


def _beside(contenders: Sequence[str], job: FinetuningJob, busy: Sequence[int]) -> list[dict[str, Any]]:
    """Runs of each contender, alone and beside busy loops; none if there are to be none."""
    rounds = []
    for loops in (0, *busy) if busy else ():
        with beside(loops) as share:
            runs = {contender: _run(contender, job) for contender in contenders}
        rounds.append({"loops": loops, "share_left": share, "runs": runs})
    return rounds


def _examples(
    name: str, folder: Path | None, data_dir: Path, max_seq_length: int, eval_examples: int
) -> dict[str, Any]:
    """A task's examples as sequences, and the model they are for."""
    task = find_task(name)
    if task.kind != "classification" or task.labels is None:
        raise SystemExit(f"--tasks {name}: a classification task of CLUE is needed")
    if folder is None:
        tokenizer = WordPiece.from_file(DATA / "vocab" / "vocab.txt")
        config = model_config(
            "bert",
            vocab_size=len(tokenizer),
            num_hidden_layers=6,
            hidden_size=768,
            num_attention_heads=12,
            intermediate_size=3072,
            hidden_act="gelu",
        )
        weights = None
    else:
        source = ModelFolder.find(folder, "model_name_or_path")
        tokenizer, config, weights = source.tokenizer, dict(source.config), source.weights()
    names = dict(enumerate(task.labels))
    splits = {split: read_split(task, data_dir, split).examples for split in ("train", "dev")}
    if eval_examples:  # spread over the set: some are sorted by class
        splits["dev"] = splits["dev"][:: max(1, len(splits["dev"]) // eval_examples)][:eval_examples]
    return {
        "config": {**config, "id2label": names, "label2id": {label: number for number, label in names.items()}},
        "weights": weights,
        **{split: classification_features(tokenizer, rows, max_seq_length) for split, rows in splits.items()},
    }


def _run(name: str, job: FinetuningJob) -> dict[str, Any]:
    """A contender's run, in a process of its own."""
    function, arguments = CONTENDERS[name]
    with closing(Worker(name, importlib.import_module, "bench.contenders.tuning")) as worker:
        try:
            outcome: Outcome = worker.call(function, job, *arguments)
        except WorkerFailed as failure:
            raise SystemExit(str(failure)) from None
    labels = np.concatenate(job.dev.targets)
    return {
        "title": outcome.title,
        "framework": "paddle" if "paddle" in outcome.title else "torch",
        "train_sequences_per_second": sum(map(len, job.order())) / outcome.train_seconds,
        "eval_sequences_per_second": len(labels) / outcome.eval_seconds,
        "accuracy": 100 * float((outcome.predicted == labels).mean()),
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [run["accuracy"] for run in runs]
    return {
        "title": runs[0]["title"],
        "framework": runs[0]["framework"],
        "train": statistics.median(run["train_sequences_per_second"] for run in runs),
        "eval": statistics.median(run["eval_sequences_per_second"] for run in runs),
        "accuracy": f"{statistics.mean(accuracies):.2f}"
        + (f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""),
    }


def _table(results: dict[str, Any]) -> str:
    parts = [
        f"{results['model']}, {results['steps']} updates of {results['batch_size']} sequences of at most "
        f"{results['max_seq_length']} tokens, {len(results['seeds'])} seeds, medians; {results['machine']}"
    ]
    for task, record in results["tasks"].items():
        summaries = [_summary(runs) for runs in record["runs"].values()]
        ours = {summary["framework"]: summary for summary in summaries if summary["title"].startswith("ours")}
        rows = []
        for summary in summaries:
            ours_here = ours.get(summary["framework"])
            row = [summary["title"]]
            for phase in ("train", "eval"):
                speed = summary[phase]
                row += [f"{speed:.1f}", f"{ours_here[phase] / speed:.1f}x" if ours_here else ""]
            rows.append([*row, summary["accuracy"]])
        head = ["", "training, sequences/s", "ours is", "evaluation, sequences/s", "ours is", "accuracy"]
        parts += [f"{task}, {record['examples']} examples evaluated:", markdown(head, rows)]
        if record["busy"]:
            parts += [f"{task}, beside busy loops:", _beside_table(record["busy"])]
    return "\n\n".join(parts)


def _beside_table(rounds: list[dict[str, Any]]) -> str:
    alone = rounds[0]["runs"]
    rows = []
    for beside_loops in rounds:
        runs, share = beside_loops["runs"], beside_loops["share_left"]
        ours = {run["framework"]: run for run in runs.values() if run["title"].startswith("ours")}
        for contender, run in runs.items():
            ours_here = ours.get(run["framework"])
            row = [f"{run['title']}, {company(beside_loops['loops'])}", f"{share:.0%}"]
            for key in ("train_sequences_per_second", "eval_sequences_per_second"):
                row += [
                    f"{run[key]:.1f}",
                    f"{ours_here[key] / run[key]:.1f}x" if ours_here else "",
                    f"{run[key] / alone[contender][key] / share:.0%}",
                ]
            rows.append(row)
    head = ["", "processors left"]
    for phase in ("training", "evaluation"):
        head += [f"{phase}, sequences/s", "ours is", "of what is left"]
    return markdown(head, rows)


def _plot(axes: Axes, results: dict[str, Any]) -> None:
    """A pair of bars a task and contender: sequences a second in training and in evaluation."""
    bars = [
        (f"{task}\n{summary['title'].replace(', ', chr(10))}", summary["train"], summary["eval"])
        for task, record in results["tasks"].items()
        for summary in map(_summary, record["runs"].values())
    ]
    for shift, phase, label in ((-0.2, 1, "training"), (0.2, 2, "evaluation")):
        axes.bar([place + shift for place in range(len(bars))], [bar[phase] for bar in bars], 0.4, label=label)
    axes.set_xticks(range(len(bars)), [bar[0] for bar in bars], fontsize=5)
    axes.set_ylabel("sequences/s")
    axes.set_title(f"{results['model']}: {results['machine']}", fontsize=9)
    axes.legend()
