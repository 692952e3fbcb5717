"""Fine-tuning on a task, from its files to scores and predictions: read it top to bottom."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import backends
from backends.files import InputError, atomically, read_json, write_json
from backends.interface import Backend, Model, Weights
from backends.pretrained import PAIRS, fingerprint, read_weights
from finetuning.arguments import FinetuneArguments
from finetuning.teacher_cache import TeacherCache
from finetuning.teachers import TaskTeacher, find_teachers, identity_of, load_teacher, open_cache, task_matches
from objectives.distillation import Distillation, Match, Teacher, wanted_of
from objectives.supervised import Supervised
from programs.console import say
from text.answers import answers, predictions, scores, submission
from text.data import Data, Example, Question, Sentence, Split, read_split, read_unlabelled, with_labels_of
from text.features import Features, LabelledBatch, task_features
from text.folder import ModelFolder, write_folder
from text.metrics import confusion_matrix
from text.tasks import HEAD_OF, Task, find_task
from text.tokenizer import WordPiece
from training.folder import RECORD, check_inputs, check_output, claim, finished, write_card
from training.loop import Objective, TrainingArguments, seed_of
from training.pictures import draw_confusion
from training.prediction import predict
from training.schedule import count_warmup_steps
from training.stages import Phase, Stage, run_stages

FREE_TO_CHANGE = {
    *("resume", "overwrite", "output_dir", "data_dir", "model_name_or_path", "teacher_model_name_or_path"),
    *("unlabelled", "augmented", "device", "do_eval", "do_predict"),
    *("cache_teacher", "logging_steps", "keep_checkpoints", "keep_every", "max_nonfinite_steps"),
    *("nproc", "nnodes", "node_rank", "master"),
}
"""Options that may differ when a run is resumed: where it runs, what it logs and how its inputs are named, not what
it computes."""
RESULTS = "eval_results.json"


@dataclass(frozen=True)
class Part:
    """A split of the task, or text without labels, ready for a model."""

    data: Data
    features: Features
    """Of the training set, with those of text without labels behind them."""


def finetune(arguments: FinetuneArguments) -> dict[str, float]:
    """Runs fine-tuning; returns the best model's scores on the dev set (none without one).

    Raises:
        InputError: something in `arguments` or what they name is wrong, which shows before training starts.
        Occupied: another run works in the output folder.
        TrainingFailed: the loss became NaN or infinite.
    """
    output = Path(arguments.output_dir)
    task = find_task(arguments.task_name, arguments.text_column, arguments.text_pair_column, arguments.label_column)
    source = ModelFolder.find(arguments.model_name_or_path, "model_name_or_path", arguments.model_type)
    backend = backends.load(arguments.backend, arguments.device, arguments.precision)
    if not arguments.do_train:
        return _report_untrained(arguments, task, source, backend)

    first = backend.rank == 0
    begun = check_output(output, arguments, FREE_TO_CHANGE, paths_read(arguments, source)) if first else {}
    run = prepare(arguments, task, source, backend)
    inputs: dict[str, str] = {}
    if first:
        inputs = {"model_name_or_path": source.identity(), **run.identity()}
        check_inputs(output, begun, inputs)

    earlier: list[Stage] = []
    if run.teachers and arguments.intermediate.matches is not None:
        earlier = [LearnLayers(run)]
    last = LearnTask(run, ModelFolder(earlier[0].folder) if earlier else source)
    with trained(arguments, backend, [*earlier, last], inputs):
        return run.report_best()


def _report_untrained(
    arguments: FinetuneArguments, task: Task, source: ModelFolder, backend: Backend
) -> dict[str, float]:
    """Writes the answers of a model as it is; returns its scores on the dev set."""
    output = Path(arguments.output_dir)
    if (output / RECORD).exists() and output.resolve() != source.path.resolve():
        raise InputError(f"--output_dir {output}: holds the run of another model; give another folder, or that model's")
    task = _with_labels_of_model(task, source)
    weights = _fitting_weights(source, task, training=False)
    run = prepare(arguments, task, source, backend)
    backend.seed(seed_of(arguments.seed))
    run.model = backend.model(run.config, weights, HEAD_OF[task.kind], trainable=False)
    return run.report()


def paths_read(arguments: FinetuneArguments, source: ModelFolder) -> list[tuple[str, str | None]]:
    """Lists the options that name what a run reads, with the paths."""
    reads = [("model_name_or_path", str(source.path))]
    reads += [(option, getattr(arguments, option)) for option in ("data_dir", "augmented", "unlabelled")]
    return [*reads, *(("teacher_model_name_or_path", name) for name in arguments.teacher_model_name_or_path or [])]


def prepare(arguments: FinetuneArguments, task: Task, source: ModelFolder, backend: Backend) -> Run:
    """Reads a task's data, and finds its teachers.

    Args:
        task: with its labels, if nothing is trained.

    Raises:
        InputError: something in `arguments` or what they name is wrong.
    """
    data_dir, training = Path(arguments.data_dir), arguments.do_train
    tokenizer = source.tokenizer
    source.check_length(arguments.max_seq_length)
    augmented = _augmented(arguments) if training else None
    if training:
        task = with_labels_of(task, data_dir, augmented)
    needed: dict[Split, bool] = {
        "train": training,
        "dev": training or arguments.do_eval,
        "test": arguments.do_predict,
    }
    splits = [split for split, is_needed in needed.items() if is_needed]
    skip = arguments.skip_bad_lines
    read: dict[str, Data] = {
        split: read_split(task, data_dir, split, skip, augmented if split == "train" else None) for split in splits
    }
    taught = training and arguments.teacher_model_name_or_path
    if taught and arguments.unlabelled is not None:
        read["unlabelled"] = read_unlabelled(task, Path(arguments.unlabelled), skip)
    first = backend.rank == 0
    parts = {name: _part(arguments, task, tokenizer, name, data, first) for name, data in read.items()}
    for part in parts.values():
        part.features.check_types(source.shape.token_types, source.path)
    if "unlabelled" in parts:
        parts["train"] = Part(parts["train"].data, parts["train"].features + parts["unlabelled"].features)

    examples = [example for name in ("train", "unlabelled") if name in read for example in read[name].examples]
    teachers = find_teachers(arguments, task, source, examples, parts["train"].features) if taught else []
    return Run(arguments, task, backend, source, _config(source, task, parts, training), parts, teachers)


@contextmanager
def trained(
    arguments: FinetuneArguments, backend: Backend, stages: Sequence[Stage], inputs: Mapping[str, str]
) -> Iterator[None]:
    """Goes through the stages of a run, whose folder others are kept out of until results are written.

    Args:
        inputs: what the run reads (`training.folder.check_inputs`), on the first process.

    Raises:
        InputError, TrainingFailed, Preempted: as `training.folder.claim` and `training.stages.run_stages`.
    """
    with ExitStack() as claimed:

        def claim_output() -> None:
            if backend.rank == 0:
                claimed.enter_context(claim(Path(arguments.output_dir), arguments, inputs))
            backend.barrier()  # until the first process has deleted an old run's checkpoints

        run_stages(backend, stages, arguments.resume, claim_output)
        yield


def _augmented(arguments: FinetuneArguments) -> Path | None:
    """The file that stands in for the training set, if one does; raises InputError if there is no such file."""
    path = None if arguments.augmented is None else Path(arguments.augmented)
    if path is not None and not path.is_file():
        raise InputError(f"--augmented {path}: no such file; give one that python -m finetuning.augment wrote")
    return path


def _with_labels_of_model(task: Task, source: ModelFolder) -> Task:
    """Returns the task with a fine-tuned model's classes.

    Raises:
        InputError: they are not the task's.
    """
    if task.kind == "reading":
        return task
    classes, labels = source.labels, task.labels or ()
    if not classes:
        return task  # `_fitting_weights` reports that the model has no head
    fitting = task.with_labels(classes)
    if fitting is None:
        raise InputError(
            f"{source.path}: its head has {len(classes)} classes ({', '.join(classes[:4])}, ...), {task.name} has "
            f"{len(labels)} ({', '.join(labels[:4])}, ...); give a model that was fine-tuned on {task.name}"
        )
    return fitting


def _fitting_weights(source: ModelFolder, task: Task, training: bool) -> Weights:
    """Reads the model's weights; leaves out a head that is another task's.

    Raises:
        InputError: the model is not trained, and has no head of the task.
    """
    weights = source.weights()
    name = "qa_outputs" if task.kind == "reading" else "classifier"
    classes = 2 if task.kind == "reading" else len(task.labels or ())
    head = weights.get(f"{name}.weight")
    if head is not None and len(head) == classes:
        return weights
    if not training:
        present = "no such head" if head is None else f"a head of {len(head)} classes"
        size = f" of {classes}" if classes else ""
        raise InputError(f"{source.path}: has {present}, {task.name} needs one{size}; train it first (--do_train true)")
    if head is not None:
        say(f"{source.path}: its head of {len(head)} classes is another task's; {task.name}'s starts at random")
    return {key: array for key, array in weights.items() if not key.startswith(f"{name}.")}


def _part(arguments: FinetuneArguments, task: Task, tokenizer: WordPiece, name: str, data: Data, first: bool) -> Part:
    """Makes sequences of what was read, and reports it on the first process."""
    features = task_features(
        task.kind,
        tokenizer,
        data.examples,
        arguments.max_seq_length,
        doc_stride=arguments.doc_stride,
        max_query_length=arguments.max_query_length,
    )
    remarks = []
    if data.unlabelled:
        remarks.append(f"{data.unlabelled} without a label left out")
    if data.bad:
        remarks.append(f"{len(data.bad)} that cannot be read left out, the first: {data.bad[0]}")
    if data.absent:
        remarks.append(f"of {len(data.absent)} no answer is in the context, the first: {data.absent[0]}; they count")
    windows = f" in {len(features)} windows" if len(features) > len(data.examples) else ""
    if first:
        say(
            f"{name}: {data.path}, {len(data.examples)} examples{windows}, {int(features.truncated.sum())} cut to "
            f"{arguments.max_seq_length} tokens" + "".join(f"; {remark}" for remark in remarks)
        )
    return Part(data, features)


def training_arguments(arguments: FinetuneArguments, *sequences: int) -> TrainingArguments:
    """Computes the arguments of training on one or several sets of so many sequences."""
    max_steps = arguments.max_steps
    if max_steps <= 0:
        batches = sum(batches_per_epoch(arguments, count) for count in sequences) * arguments.num_train_epochs
        max_steps = -(-batches // arguments.gradient_accumulation_steps)
    warmup = count_warmup_steps(arguments.warmup_steps, arguments.warmup_proportion, max_steps)
    return TrainingArguments.of(arguments, max_steps=max_steps, warmup_steps=warmup)


def batches_per_epoch(arguments: FinetuneArguments, sequences: int) -> int:
    return -(-sequences // arguments.batch_size)


def data_identity(task: Task, splits: Mapping[str, Data]) -> dict[str, str]:
    """Returns what tells a task's classes, and the examples of splits, their answers and their order, from others."""
    identity = {} if task.labels is None else {"classes": f"{len(task.labels)}, sha256 {_sha256(task.labels)}"}
    for split, data in splits.items():
        identity[split] = f"{len(data.examples)} examples, sha256 {_sha256(map(vars, data.examples))}"
    return identity


def _sha256(rows: Iterable[Any]) -> str:
    """Returns the first digits of the SHA-256 of rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()[:16]


def _config(source: ModelFolder, task: Task, parts: Mapping[str, Part], training: bool) -> dict[str, Any]:
    """Makes the configuration of a model on the task."""
    config = dict(source.config)
    if task.kind == "classification":
        config[PAIRS] = _takes_pairs(parts, source, training)
    names = dict(enumerate(("start", "end") if task.kind == "reading" else task.labels or ()))
    config |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    for key_of_another_task in ("problem_type", "num_labels"):
        config.pop(key_of_another_task, None)
    return config


def _takes_pairs(parts: Mapping[str, Part], source: ModelFolder, training: bool) -> bool:
    """Tells whether a classifier's texts come in pairs; raises InputError if it was fine-tuned on others."""
    pairs = any(part.data.examples[0].pair is not None for part in parts.values())
    if not training and source.takes_pairs not in (None, pairs):
        texts = ("single texts", "pairs of texts")
        raise InputError(
            f"{source.path}: was fine-tuned on {texts[not pairs]}, this task has {texts[pairs]}; give its own"
        )
    return pairs


@dataclass
class Run:
    """A run on a task; as a `training.loop.Selection` it keeps the best model that training goes through."""

    arguments: FinetuneArguments
    task: Task
    """With its labels."""
    backend: Backend
    source: ModelFolder
    """What the model is made of."""
    config: Mapping[str, Any]
    """The model's."""
    parts: Mapping[str, Part]
    teachers: Sequence[TaskTeacher]
    model: Model = field(init=False)
    """The one that is scored."""

    @property
    def output(self) -> Path:
        return Path(self.arguments.output_dir)

    def identity(self) -> dict[str, str]:
        """Returns what tells teachers and data from others."""
        identity = {}
        if self.teachers:
            identity["teacher_model_name_or_path"] = identity_of(self.teachers, self.arguments.teacher_weights)
        read = {split: part.data for split, part in self.parts.items() if split != "test"}
        return identity | data_identity(self.task, read)

    def evaluate(self) -> dict[str, float]:
        """Computes the model's scores on the dev set, the task's metric first."""
        dev_scores = scores(self.task, self.parts["dev"].data.examples, self.answers("dev"))
        return {self.task.metric: dev_scores[self.task.metric], **dev_scores}

    def keep(self) -> str:
        """Writes the model to the output folder, for both libraries to load; returns its fingerprint."""
        if self.backend.rank:
            return ""
        tokenizer, head = self.source.tokenizer, HEAD_OF[self.task.kind]
        write_folder(self.output, self.config, tokenizer, self.model.weights(), head)
        return fingerprint(self.output)

    def answers(self, split: Split) -> list[dict[str, Any]]:
        """Computes the model's answers to the examples of a split."""
        part = self.parts[split]
        logits = predict(self.backend, self.model, part.features)
        return answers(
            self.task,
            part.data.examples,
            part.features,
            logits,
            self.arguments.n_best_size,
            self.arguments.max_answer_length,
        )

    def report_best(self) -> dict[str, float]:
        """Goes back to the best model and writes its scores and answers; returns the scores on the dev set."""
        self.model.load_weights(read_weights(self.output))
        return self.report()

    def report(self) -> dict[str, float]:
        """Writes scores and answers for the splits that were read; returns the scores on the dev set."""
        dev_scores = self._evaluate() if "dev" in self.parts else {}
        if "test" in self.parts:
            self._submit()
        return dev_scores

    def _evaluate(self) -> dict[str, float]:
        """Writes the scores on the dev set, which it returns, the answers and, of classes, the confusion matrix."""
        answers = self.answers("dev")
        dev_scores = self._write("dev", answers)
        task, examples = self.task, self.parts["dev"].data.examples
        if self.backend.rank == 0 and task.kind == "classification" and task.labels is not None:
            truth = np.array([example.label for example in examples])
            predicted = np.array([task.labels.index(answer["label"]) for answer in answers])
            matrix = confusion_matrix(truth, predicted, len(task.labels))
            title = f"{task.name}, dev set of {len(examples)}: {self.arguments.model_name_or_path}"
            draw_confusion(self.output / "confusion_matrix.png", matrix, title, task.labels)
        return dev_scores

    def _submit(self) -> None:
        """Writes the answers to the test set, CLUE's file to hand in, and the scores if the right ones are known."""
        answers = self.answers("test")
        self._write("test", answers)
        if self.task.submission is not None and self.backend.rank == 0:
            with atomically(self.output / self.task.submission) as temporary:
                temporary.write_text(submission(self.task, answers), encoding="utf-8")
            say(f"the test set's answers are in {self.output / self.task.submission}")

    def _write(self, split: Split, answers: list[dict[str, Any]]) -> dict[str, float]:
        """Writes a split's answers and, if all right ones are known, adds its scores to the results; returns them."""
        examples = self.parts[split].data.examples
        known = all(map(_answer_is_known, examples))
        split_scores = scores(self.task, examples, answers) if known else {}
        if self.backend.rank:
            return split_scores
        self.output.mkdir(parents=True, exist_ok=True)
        _write_lines(self.output / f"{split}_predictions.json", predictions(self.task, examples, answers))
        if known:
            path = self.output / RESULTS
            results = _read_results(path) if split == "test" and path.exists() else {}
            results |= {
                "task": self.task.name,
                "metric": self.task.metric,
                split: split_scores,
                f"{split}_examples": len(examples),
                "backend": {**self.backend.versions(), "precision": self.backend.precision},
            }
            write_json(path, results)
            figures = ", ".join(f"{key} {value:.2f}" for key, value in split_scores.items())
            say(f"{self.task.name}: {figures} on the {split} set")
        return split_scores


class Learn(Stage):
    """A model goes through the training set, and learns from its labels or from teachers."""

    def __init__(self, run: Run, arguments: FinetuneArguments, source: ModelFolder, option: str = "--matches") -> None:
        """
        Args:
            arguments: those of the stage.
            source: where its model is, or will be once an earlier stage left it.
            option: what has its lines of matches.

        Raises:
            InputError: what is to be learnt from teachers is nothing, or cannot be; or their answers are others'.
        """
        self.run, self.arguments, self.source = run, arguments, source
        features = run.parts["train"].features
        self.folder, self.lines = Path(arguments.output_dir), len(features)
        self.training = training_arguments(arguments, self.lines)
        self.matches: Sequence[Match] = ()
        self.cache: TeacherCache | None = None
        if run.teachers:
            together = run.backend.world_size > 1
            self.matches = task_matches(arguments, run.task, run.teachers, run.source.shape, together, option)
            self.cache = open_cache(arguments, run.backend, run.task, run.teachers, features)

    def begin(self) -> Phase:
        self.run.backend.seed(seed_of(self.arguments.seed))
        model = self.make_model()
        return Phase(model, self.objective(model), self.batches, self.training)

    def make_model(self) -> Model:
        run, head = self.run, HEAD_OF[self.run.task.kind]
        return run.backend.model(run.config, _fitting_weights(self.source, run.task, training=True), head)

    def objective(self, model: Model) -> Objective[LabelledBatch]:
        run = self.run
        if not run.teachers:
            return Supervised(run.backend, model, run.task.kind)
        teacher = self._load_teacher() if self.cache is None else self.cache
        if run.backend.rank == 0:
            say(f"learns from {self.lesson}")
        return Distillation(run.backend, teacher, model, self.matches, run.task.kind, self.arguments.seed)

    def batches(self, start: int, _: int = 0) -> Iterator[LabelledBatch]:
        """Makes this process' shares of the batches of the training set, from the one numbered `start`."""
        features, backend, arguments = self.run.parts["train"].features, self.run.backend, self.arguments
        return features.batches(start, arguments.batch_size, arguments.seed, backend.rank, backend.world_size)

    @property
    def lesson(self) -> str:
        """What is learnt, of which teachers."""
        learnt = ", ".join(f"{match} x {match.weight:g}" for match in self.matches)
        return f"{', '.join(map(str, self.run.teachers))}: {learnt}"

    def _load_teacher(self) -> Teacher:
        return load_teacher(self.run.backend, self.run.task, self.run.teachers, self.arguments.teacher_weights)

    def enter(self, phase: Phase) -> None:
        if self.run.backend.rank == 0:
            self.folder.mkdir(exist_ok=True)
        if self.cache is not None and not self.cache.whole:
            self.cache.fill(self._load_teacher())


class LearnLayers(Learn):
    """The stage before the last: what the teacher's layers do."""

    name = "intermediate"

    def __init__(self, run: Run) -> None:
        super().__init__(run, run.arguments.of_intermediate(), run.source, "--intermediate.matches")

    def finished(self) -> bool:
        return finished(self.folder)

    def leave(self, phase: Phase, kept: str | None) -> None:
        run, arguments = self.run, self.arguments
        if run.backend.rank:
            return
        write_folder(self.folder, run.config, run.source.tokenizer, phase.model.weights(), HEAD_OF[run.task.kind])
        head = "" if wanted_of(self.matches)[1].logits else " Its head has learnt nothing yet."
        card = (
            f"# {run.source.shape} student before its last stage\n\n"
            f"Trained on {run.task.name} by MiniLM Duet, from {self.lesson}; {self.training.max_steps} steps, learning "
            f"rate {arguments.learning_rate:g}, seed {arguments.seed}.{head} Weights {fingerprint(self.folder)}. All "
            "arguments are in `../arguments.yaml`, every logged step in `metrics.jsonl`.\n"
        )
        write_card(self.folder, card)


class LearnTask(Learn):
    """The last stage: the task itself, the best model of which on the dev set is kept."""

    def __init__(self, run: Run, source: ModelFolder) -> None:
        super().__init__(run, run.arguments, source)
        self.name, self.selection = run.task.name, run

    def finished(self) -> bool:
        return False  # answers and scores are written anew

    def make_model(self) -> Model:
        self.run.model = super().make_model()
        return self.run.model

    def leave(self, phase: Phase, kept: str | None) -> None:
        if self.run.backend.rank == 0 and kept != fingerprint(self.folder):
            say(f"{self.folder}: its weights are not those that were kept as the best: damaged, or of a killed attempt")


def _read_results(path: Path) -> dict[str, Any]:
    """Reads a file of results; returns none if it is damaged."""
    try:
        return dict(read_json(path))
    except (InputError, ValueError, TypeError):
        say(f"{path} is damaged and begun anew")
        return {}


def _answer_is_known(example: Example | Question | Sentence) -> bool:
    """Tells whether an example's right answer is known, as it may not be in a test set."""
    if isinstance(example, Question):
        return bool(example.answers)
    return (example.label if isinstance(example, Example) else example.tags) is not None


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    with atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
