"""``python -m bench quality``: what distillation is worth on tasks, by this project's own commands."""

from __future__ import annotations

import json
import math
import resource
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from backends.files import InputError, atomically, read_json, write_json
from bench.report import DATA, machine
from programs.console import say
from training.report import markdown

Options = Mapping[str, Any]
WRITTEN_LAST = {
    "general_distill": "README.md",
    "finetuning": "eval_results.json",
    "finetuning.augment": "augmented.json",
}


@dataclass(frozen=True)
class Task:
    """A classification task of a table."""

    title: str
    name: str
    folder: str
    """In the data folder."""
    options: Options
    """Of each run on it."""
    labels: int | None = None
    """Rows of the training set that are taken, spread over it; all without."""
    unlabelled: tuple[str, int] | None = None
    """A file of text in the data folder, a text a line or rows with `text`, and how many lines are taken."""


@dataclass(frozen=True)
class Row:
    """What is done to a student."""

    title: str
    start: Sequence[int] = ()
    """Layers of the teacher that the student starts from, if it has as many; random without."""
    steps: int = 0
    """Of general distillation."""
    stages: Sequence[Options] = ({},)
    """Options of fine-tuning, a run each, one after another."""
    teachers: int = 0
    """That the stages learn from: one fine-tuned from the student's seed, and of the next ones."""
    more: Literal["unlabelled", "augmented"] | None = None
    """What the last stage learns on beside the training set."""


@dataclass(frozen=True)
class Table:
    """A teacher, students, tasks, and what is done."""

    teacher: str | Options
    """A folder beside the data folder, or options of general distillation that pretrain it."""
    corpus: Sequence[str]
    """Folders of text in the data folder."""
    students: Mapping[str, Options]
    rows: Mapping[str, Row]
    tasks: Mapping[str, Task]
    distilling: Options
    finetuning: Options


LOGITS = {"temperature": 4, "squared_temperature": True, "hard_label_weight": 1}
STATES = {"kd_weight": 0, "matches": "[{of: states, project: linear}, {of: attention}]"}
STEPS = (300, 1000, 3000)


def distilled(what: str, start: Sequence[int]) -> dict[str, Row]:
    """A start by itself, and after general distillation of several lengths; keys begin with its first word."""
    name = what.partition(" ")[0]
    made = {f"{name}-{steps}": Row(f"{what}, distilled for {steps:,} steps", start, steps) for steps in STEPS}
    return {name: Row(what, start), **made}


def on_the_task(start: Sequence[int], steps: int) -> dict[str, Row]:
    """What may follow general distillation."""
    both = (STATES, LOGITS)
    return {
        "logits": Row("and then the logits of the fine-tuned teacher", start, steps, (LOGITS,), 1),
        "states": Row("and then its states and attention, then its logits", start, steps, both, 1),
        "augmented": Row("and then its logits, on variants of the texts too", start, steps, (LOGITS,), 1, "augmented"),
        "unlabelled": Row("and then its logits, on text without labels too", start, steps, (LOGITS,), 1, "unlabelled"),
        "two-teachers": Row("and then the logits of two such teachers", start, steps, (LOGITS,), 2),
        "three-teachers": Row("and then the logits of three", start, steps, (LOGITS,), 3),
    }


def sizes(layers: int, width: int, heads: int) -> dict[str, Any]:
    names = ("num_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return {**dict(zip(names, (layers, width, heads, 4 * width))), "student_layer_index": layers - 1}


ON_CPU = {"device": "cpu", "use_amp": True}
DISTILLING = {
    **ON_CPU,
    "model_type": "bert",
    "hidden_act": "gelu",
    "teacher_layer_index": 5,
    "max_seq_length": 64,
    "batch_size": 32,
    "learning_rate": 6e-4,
    "warmup_proportion": 0.1,
    "save_steps": 250,
    "keep_checkpoints": 1,
}
START = {"max_steps": 1, "learning_rate": 1e-12}
"""A step that leaves the weights as they are, for the start alone."""
VARIANTS = {**ON_CPU, "num_copies": 5, "words_a_question": 4}
FINETUNING = {**ON_CPU, "batch_size": 32, "num_train_epochs": 3, "save_steps": 1_000_000}
"""Scored once, at the end: nothing is chosen by the scores."""
PAIRS = {"text_column": "sentence1", "text_pair_column": "sentence2"}
TABLES = {
    "english": Table(
        "models/all-MiniLM-L6-v2",
        ["corpus_en/train"],
        {"3x384": sizes(3, 384, 12), "2x192": sizes(2, 192, 12)},
        {
            **distilled("random weights", ()),
            **distilled("cut from layers 0, 2, 4", (0, 2, 4)),
            "cut-135": Row("cut from layers 1, 3, 5", (1, 3, 5)),
            "cut-025": Row("cut from layers 0, 2, 5", (0, 2, 5)),
            "cut-logits": Row(
                "cut from layers 0, 2, 4, and the logits of the fine-tuned teacher", (0, 2, 4), 0, (LOGITS,), 1
            ),
            **on_the_task((0, 2, 4), 1000),
        },
        {
            "sst2": Task(
                "SST-2, test set", "classification", "own/sst2", {}, None, ("corpus_en/train/part-00.txt", 20_000)
            ),
            "pawsx": Task("PAWS-X", "classification", "own/pawsx_en", {**PAIRS, "max_seq_length": 128}),
        },
        {**DISTILLING, "num_relation_heads": 48},
        {**FINETUNING, "max_seq_length": 64, "learning_rate": 1e-4},
    ),
    "chinese": Table(
        {
            "pretrain.num_layers": 6,
            "pretrain.hidden_size": 256,
            "pretrain.num_attention_heads": 4,
            "pretrain.max_steps": 5000,
            "pretrain.batch_size": 64,
            "pretrain.learning_rate": 1e-3,
        },
        ["corpus/train", "corpus_reviews"],
        {"3x128": sizes(3, 128, 4), "2x128": sizes(2, 128, 4)},
        {**distilled("random weights", ()), **on_the_task((), 1000)},
        {
            "titles10": Task(
                "titles, 1,000 labels", "classification", "own/titles10", {}, 1000, ("own/titles10/train.json", 9000)
            ),
            "reviews10": Task(
                "reviews, 1,000 labels",
                "classification",
                "own/reviews10",
                {},
                1000,
                ("own/reviews10/unlabelled.txt", 30_000),
            ),
            "tnews": Task("TNEWS", "tnews", "clue/tnews", {}, None, ("own/titles10/train.json", 10_000)),
            "ocnli": Task("OCNLI", "ocnli", "clue/ocnli", {}),
        },
        {**DISTILLING, "num_relation_heads": 32},
        {**FINETUNING, "max_seq_length": 128, "learning_rate": 3e-4},
    ),
}


class NotMeasured(Exception):
    """A run is not finished, and is not to be run now."""


@dataclass(frozen=True)
class Runs:
    """Runs of a table, each a command in a process and a folder of its own, with its record and its log beside the
    folder. A run that was stopped goes on; one that is finished is not run again."""

    table: Table
    data: Path
    output: Path
    seeds: Sequence[int]
    looking: bool = False
    """Whether nothing is run: what is not finished is `NotMeasured`."""

    def do(self, name: str, program: str, options: Options) -> Path:
        """Finishes a run; returns its folder.

        Raises:
            InputError: its folder has another run.
        """
        folder = self.output / name
        path, last = folder.with_name(f"{folder.name}.json"), folder / WRITTEN_LAST[program]
        target = {"output": last} if program == "finetuning.augment" else {"output_dir": folder}
        command = ["python", "-m", program, *_words({**options, **target})]
        record: dict[str, Any] = {"command": command, "processor_seconds": 0.0, "finished": False}
        if path.exists():
            record = dict(read_json(path))
        if record["command"] != command:
            raise InputError(f"{folder}: was begun by another command (see {path}); give another --output_dir")
        if record["finished"]:
            return folder
        if self.looking:
            raise NotMeasured
        say(shlex.join(command))
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        start = _processor_seconds()
        with folder.with_name(f"{folder.name}.log").open("a") as log:
            code = subprocess.call([sys.executable, *command[1:], "--resume"], stdout=log, stderr=log)
        record["processor_seconds"] += _processor_seconds() - start
        record["finished"] = code == 0 and last.exists()  # a run that was told to stop ends with 0
        write_json(path, record)
        if not record["finished"]:
            raise SystemExit(f"{name}: was stopped or failed, see {log.name}; the same command goes on")
        return folder

    def pretrained(self) -> Path:
        """The teacher; pretraining it ends with a step of distillation that nobody uses."""
        if isinstance(self.table.teacher, str):
            return self.data.parent / self.table.teacher
        size = next(iter(self.table.students.values()))
        vocabulary = self.data / "vocab" / "vocab.txt"
        options = {**self.table.distilling, **size, **START, **self.table.teacher, "pretrain.vocab_file": vocabulary}
        return self.do("pretrained", "general_distill", {"input_dir": self._corpus, **options}) / "teacher"

    def student(self, size: str, row: Row, seed: int) -> Path:
        """A student before it meets a task."""
        start = [*row.start] if len(row.start) == self.table.students[size]["num_layers"] else "random"
        length = {"max_steps": row.steps} if row.steps else START
        options = {
            "input_dir": self._corpus,
            "teacher_model_name_or_path": self.pretrained(),
            "seed": seed,
            **self.table.distilling,
            **self.table.students[size],
            "student_init_layers": start,
            **length,
        }
        name = "-".join([*map(str, row.start), str(row.steps)]) if isinstance(start, list) else f"random-{row.steps}"
        return self.do(f"students/{size}-{name}-seed{seed}", "general_distill", options)

    def applies(self, size: str, row: Row) -> bool:
        """Whether a row is of a student: of one that cannot start so, what follows general distillation is."""
        return len(row.start) in (0, self.table.students[size]["num_layers"]) or bool(row.teachers and row.steps)

    def taught(self, key: str, model: Path, options: Options, seed: int, name: str) -> Path:
        """A model fine-tuned on a task."""
        task = self.table.tasks[key]
        common = {**self.table.finetuning, **task.options, "task_name": task.name, "data_dir": self._rows(key)}
        if (self._rows(key) / "test.json").exists():
            common["do_predict"] = True
        return self.do(name, "finetuning", {**common, "model_name_or_path": model, "seed": seed, **options})

    def teacher(self, key: str, seed: int) -> Path:
        return self.taught(key, self.pretrained(), {}, seed, f"{key}/teacher-seed{seed}")

    def result(self, key: str, size: str, name: str, seed: int) -> Path:
        """What a row comes to on a task."""
        row = self.table.rows[name]
        if row.teachers > len(self.seeds) or not self.applies(size, row):
            raise NotMeasured
        model, options = self.student(size, row, seed), dict[str, Any]()
        place = self.seeds.index(seed)
        others = [*self.seeds[place:], *self.seeds[:place]][: row.teachers]
        if others:
            options["teacher_model_name_or_path"] = [self.teacher(key, other) for other in others]
        for number, stage in enumerate(row.stages, 1):
            last = number == len(row.stages)
            more = {str(row.more): getattr(self, f"_{row.more}")(key)} if row.more and last else {}
            run = f"{key}/{size}-{name}-seed{seed}" + ("" if last else f"-stage{number}")
            model = self.taught(key, model, {**options, **stage, **more}, seed, run)
        return model

    @property
    def _corpus(self) -> Path:
        """The folder of the text; of several, one of links."""
        if len(self.table.corpus) == 1:
            return self.data / self.table.corpus[0]
        folder = self.output / "corpus"
        folder.mkdir(parents=True, exist_ok=True)
        for source in self.table.corpus:
            for file in (self.data / source).glob("*.txt"):
                link = folder / f"{source.replace('/', '-')}-{file.name}"
                if not link.exists():
                    link.symlink_to(file.resolve())
        return folder

    def _rows(self, key: str) -> Path:
        """The folder of a task's rows, of which the training set may be a part."""
        task, folder = self.table.tasks[key], self.output / key / "data"
        whole = self.data / task.folder
        if task.labels is None:
            return whole
        if not (folder / "train.json").exists():
            _spread(whole / "train.json", task.labels, folder / "train.json")
            (folder / "dev.json").write_bytes((whole / "dev.json").read_bytes())
        return folder

    def _unlabelled(self, key: str) -> Path:
        """The file of a task's text without labels."""
        path, task = self.output / key / "unlabelled.txt", self.table.tasks[key]
        if task.unlabelled is None:
            raise NotMeasured
        if not path.exists():
            name, count = task.unlabelled
            _spread(self.data / name, count, path)
        return path

    def _augmented(self, key: str) -> Path:
        """The file of a task's training set with variants, for which a teacher is asked that was pretrained here."""
        task = self.table.tasks[key]
        if isinstance(self.table.teacher, str):
            raise NotMeasured
        columns = {name: value for name, value in task.options.items() if name in PAIRS}
        options = {"task_name": task.name, "data_dir": self._rows(key), "model_name_or_path": self.pretrained()}
        return self.do(f"{key}/augmented", "finetuning.augment", {**options, **columns, **VARIANTS}) / "augmented.json"


def quality(
    table: Literal["english", "chinese"] = "english",
    data: str | None = None,
    output_dir: str = "output/bench/quality",
    seeds: list[int] = [1, 2, 3],  # noqa: B006
    students: list[str] | None = None,
    tasks: list[str] | None = None,
    rows: list[str] | None = None,
) -> None:
    """Measures what each step of distillation is worth on tasks, run by run of this project's own commands.

    What was finished before is not run again, what was stopped goes on. All of the first seed comes before
    the second; the table is written anew after each row, with what is not measured yet.

    Args:
        table: english, with a published teacher, or chinese, whose teacher is pretrained first.
        data: data folder; without, the project's. The English teacher lies beside it, in models.
        output_dir: gets a folder of the table's name, with the table and all runs.
        seeds: random seeds, each a run of its own.
        students: those to run, as 3x384; all without.
        tasks: those to run, in this order; all without.
        rows: those to run, in this order; all without. One of them is teacher. Several teachers want as many seeds.
    """
    spec, source = TABLES[table], Path(data) if data else DATA
    runs = Runs(spec, source, Path(output_dir) / table, seeds)
    chosen = [
        _chosen("tasks", tasks, spec.tasks),
        _chosen("students", students, spec.students),
        _chosen("rows", rows, [*spec.rows, "teacher"]),
    ]
    for seed in seeds:
        for task, size, row in product(*chosen):
            with suppress(NotMeasured):
                runs.teacher(task, seed) if row == "teacher" else runs.result(task, size, row, seed)
            with atomically(runs.output / "table.md") as temporary:
                temporary.write_text(report(replace(runs, looking=True)) + "\n", encoding="utf-8")
    print((runs.output / "table.md").read_text(encoding="utf-8"))


def report(runs: Runs) -> str:
    """A table for each student of what is finished, and the commands of one seed."""
    table = runs.table
    parts = [
        "Accuracy, mean ± deviation of so many seeds; in brackets the share of the teacher's that is kept, and the "
        f"minutes of processors that a seed's runs on the task took. {machine('cpu')}"
    ]
    teachers = {key: _results(runs, runs.teacher, key) for key in table.tasks}
    commands: dict[str, None] = {}
    for size in table.students:
        lines = []
        for name, row in table.rows.items():
            if not runs.applies(size, row):
                continue
            students = _results(runs, runs.student, size, row)
            minutes = f", {_minutes(students)} min" if students else ""
            line = [row.title, f"{row.steps:,} steps{minutes}" if row.steps else ""]
            for key in table.tasks:
                results = _results(runs, runs.result, key, size, name)
                line.append(_cell(results, teachers[key]))
                commands |= dict.fromkeys(shlex.join(record["command"]) for record in [*students[:1], *results[:1]])
            lines.append(line)
        lines.append(["teacher", "", *(_cell(teachers[key], teachers[key]) for key in table.tasks)])
        parts.append(markdown([size, "general distillation", *(task.title for task in table.tasks.values())], lines))
    commands |= {shlex.join(record["command"]): None for results in teachers.values() for record in results[:1]}
    return "\n\n".join([*parts, "Commands:", "\n".join(f"    {command}" for command in commands)])


def _results(runs: Runs, of: Callable[..., Path], *names: Any) -> list[dict[str, Any]]:
    """Records of the seeds whose run is finished, with the seconds of stages before it."""
    records = []
    for seed in runs.seeds:
        with suppress(NotMeasured):
            folder = of(*names, seed)
            record = {**read_json(folder.with_name(f"{folder.name}.json")), "accuracy": _accuracy(folder)}
            for earlier in folder.parent.glob(f"{folder.name}-stage*.json"):
                record["processor_seconds"] += read_json(earlier)["processor_seconds"]
            records.append(record)
    return records


def _accuracy(folder: Path) -> float:
    """On the test set, or the dev set of a task without one; of a student without a task none."""
    results = folder / WRITTEN_LAST["finetuning"]
    scores = read_json(results) if results.exists() else {}
    return float((scores.get("test") or scores.get("dev") or {}).get("accuracy", math.nan))


def _cell(results: Sequence[Mapping[str, Any]], teacher: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "not measured"
    mean, deviation = _mean(results), ""
    if len(results) > 1:
        deviation = f" ± {statistics.stdev(result['accuracy'] for result in results):.2f}"
    kept = f"{mean / _mean(teacher):.1%}, " if teacher else ""
    return f"{mean:.2f}{deviation} of {len(results)} ({kept}{_minutes(results)} min)"


def _mean(results: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(result["accuracy"] for result in results)


def _minutes(results: Sequence[Mapping[str, Any]]) -> str:
    return f"{statistics.fmean(result['processor_seconds'] for result in results) / 60:.1f}"


def _chosen(option: str, names: Sequence[str] | None, there: Iterable[str]) -> list[str]:
    if unknown := [name for name in names or () if name not in there]:
        raise InputError(f"--{option} {unknown[0]}: no such name; there are {', '.join(there)}")
    return [*(names or there)]


def _words(options: Options) -> list[str]:
    """A command line's words."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
        words += [f"--{name}", *map(str, values)]
    return words


def _spread(source: Path, count: int, target: Path) -> None:
    """Writes so many lines of a file, spread over it; as plain text, the texts of rows."""
    lines = source.read_text(encoding="utf-8").split("\n")
    taken = [lines[number * (len(lines) - 1) // count] for number in range(min(count, len(lines) - 1))]
    if source.suffix != target.suffix:
        taken = [json.loads(line)["text"] if source.suffix == ".json" else line for line in taken]
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomically(target) as temporary:
        temporary.write_text("\n".join(taken) + "\n", encoding="utf-8")


def _processor_seconds() -> float:
    """Of processes that were started and have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime
