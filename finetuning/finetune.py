"""Fine-tuning on a task, from its files to scores and predictions: read it top to bottom."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import backends
from backends.files import InputError, atomically, read_json, write_json
from backends.interface import Backend, Model, Wanted, Weights
from backends.pretrained import PAIRS, fingerprint, read_weights
from finetuning.arguments import Arguments
from objectives.supervised import Supervised
from programs.console import say
from text.answers import answers, predictions, scores, submission
from text.data import Data, Example, Question, Sentence, Split, read_split, with_labels_of
from text.features import Features, LabelledBatch, task_features
from text.folder import ModelFolder, write_folder
from text.metrics import confusion_matrix
from text.tasks import HEAD_OF, Task, find_task
from text.tokenizer import WordPiece
from training.folder import RECORD, check_inputs, check_output, claim
from training.loop import TrainingArguments, seed_of, train
from training.pictures import draw_confusion
from training.schedule import count_warmup_steps

FREE_TO_CHANGE = {
    *("resume", "overwrite", "output_dir", "data_dir", "model_name_or_path", "device", "do_eval", "do_predict"),
    *("logging_steps", "keep_checkpoints", "keep_every", "max_nonfinite_steps"),
    *("nproc", "nnodes", "node_rank", "master"),
}
"""What may differ when a run is resumed: where it runs, what it tells and how what it reads is named, not what it
computes."""
TOKENS_AT_ONCE = {"cpu": 2048}
"""Tokens of a batch that is evaluated, on a CPU what its caches hold."""
RESULTS = "eval_results.json"


@dataclass(frozen=True)
class Part:
    """A split of the task, ready for a model."""

    data: Data
    features: Features


def finetune(arguments: Arguments) -> dict[str, float]:
    """Runs fine-tuning; returns the best model's scores on the dev set (none without one).

    Raises:
        InputError: something in `arguments` or what they name is wrong, found
            before training starts.
        Occupied: another run works in the output folder.
        TrainingFailed: the loss became NaN or infinite.
    """
    output, data_dir = Path(arguments.output_dir), Path(arguments.data_dir)
    task = find_task(arguments.task_name, arguments.text_column, arguments.text_pair_column, arguments.label_column)
    source = ModelFolder.find(arguments.model_name_or_path, "model_name_or_path", arguments.model_type)
    backend = backends.load(arguments.backend, arguments.device, arguments.precision)
    first = backend.rank == 0
    begun: Mapping[str, str] = {}
    if arguments.do_train and first:
        reads = {"model_name_or_path": str(source.path), "data_dir": arguments.data_dir}
        begun = check_output(output, arguments, FREE_TO_CHANGE, reads)
    elif (output / RECORD).exists() and output.resolve() != source.path.resolve():
        raise InputError(f"--output_dir {output}: holds the run of another model; give another folder, or that model's")

    tokenizer = source.tokenizer
    source.check_length(arguments.max_seq_length)
    task = with_labels_of(task, data_dir) if arguments.do_train else _with_labels_of_model(task, source)
    weights = _fitting_weights(source, task, arguments.do_train)
    wanted: dict[Split, bool] = {
        "train": arguments.do_train,
        "dev": arguments.do_train or arguments.do_eval,
        "test": arguments.do_predict,
    }
    parts = {split: _read(arguments, task, tokenizer, data_dir, split, first) for split in wanted if wanted[split]}
    for part in parts.values():
        part.features.check_types(source.shape.token_types, source.path)

    training = training_arguments(arguments, len(parts["train"].features)) if arguments.do_train else None
    inputs: dict[str, str] = {}
    if arguments.do_train and first:
        inputs = {"model_name_or_path": source.identity()}
        inputs |= data_identity(task, {split: part.data for split, part in parts.items() if split != "test"})
        check_inputs(output, begun, inputs)

    head = HEAD_OF[task.kind]
    config = dict(source.config)
    if task.kind == "classification":
        config[PAIRS] = _takes_pairs(parts, source, arguments.do_train)
    names = dict(enumerate(("start", "end") if task.kind == "reading" else task.labels or ()))
    config |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    for of_another_task in ("problem_type", "num_labels"):
        config.pop(of_another_task, None)
    backend.seed(seed_of(arguments.seed))
    model = backend.model(config, weights, head, trainable=arguments.do_train)
    del weights
    run = Run(arguments, task, backend, model, tokenizer, config, output, parts)
    with claim(output, arguments, inputs) if training is not None and first else nullcontext():
        if training is not None:
            backend.barrier()  # an old run's checkpoints are gone
            run.train(training)
            model.load_weights(read_weights(output))
        found: dict[str, float] = {}
        if "dev" in parts:
            found = run.report()
        if "test" in parts:
            run.submit()
        return found


def data_identity(task: Task, splits: Mapping[Split, Data]) -> dict[str, str]:
    """What tells a task's classes, and the examples of splits, their answers and their order, from others."""
    found = {} if task.labels is None else {"classes": f"{len(task.labels)}, sha256 {_sha256(task.labels)}"}
    for split, data in splits.items():
        found[split] = f"{len(data.examples)} examples, sha256 {_sha256(map(vars, data.examples))}"
    return found


def _sha256(rows: Iterable[Any]) -> str:
    every = hashlib.sha256()
    for row in rows:
        every.update(json.dumps(row).encode() + b"\n")
    return every.hexdigest()[:16]


def _with_labels_of_model(task: Task, source: ModelFolder) -> Task:
    """The task with the classes that a fine-tuned model knows."""
    if task.kind == "reading":
        return task
    known, labels = source.labels, task.labels or ()
    if not known:
        return task  # the head's absence is told with its weights
    fitting = task.with_labels(known)
    if fitting is None:
        raise InputError(
            f"{source.path}: its head has {len(known)} classes ({', '.join(known[:4])}, ...), {task.name} has "
            f"{len(labels)} ({', '.join(labels[:4])}, ...); give a model that was fine-tuned on {task.name}"
        )
    return fitting


def _takes_pairs(parts: Mapping[Split, Part], source: ModelFolder, training: bool) -> bool:
    """Whether a classifier's texts come in pairs; raises InputError if it was fine-tuned on others."""
    pairs = any(part.data.examples[0].pair is not None for part in parts.values())
    if not training and source.takes_pairs not in (None, pairs):
        texts = ("single texts", "pairs of texts")
        raise InputError(
            f"{source.path}: was fine-tuned on {texts[not pairs]}, this task has {texts[pairs]}; give its own"
        )
    return pairs


def _fitting_weights(source: ModelFolder, task: Task, training: bool) -> Weights:
    """Weights without a head that is another task's."""
    weights = source.weights()
    name = "qa_outputs" if task.kind == "reading" else "classifier"
    classes = 2 if task.kind == "reading" else len(task.labels or ())
    head = weights.get(f"{name}.weight")
    if head is not None and len(head) == classes:
        return weights
    if not training:
        there = "no such head" if head is None else f"a head of {len(head)} classes"
        size = f" of {classes}" if classes else ""
        raise InputError(f"{source.path}: has {there}, {task.name} needs one{size}; train it first (--do_train true)")
    if head is not None:
        say(f"{source.path}: its head of {len(head)} classes is another task's; {task.name}'s starts at random")
    return {key: array for key, array in weights.items() if not key.startswith(f"{name}.")}


def _read(arguments: Arguments, task: Task, tokenizer: WordPiece, data_dir: Path, split: Split, first: bool) -> Part:
    data = read_split(task, data_dir, split, arguments.skip_bad_lines)
    features = task_features(
        task.kind,
        tokenizer,
        data.examples,
        arguments.max_seq_length,
        doc_stride=arguments.doc_stride,
        max_query_length=arguments.max_query_length,
    )
    left_out = [f"{data.unlabelled} without a label left out"] * bool(data.unlabelled)
    left_out += [f"{len(data.bad)} that cannot be read left out, the first: {data.bad[0]}"] if data.bad else []
    if data.absent:
        left_out.append(f"of {len(data.absent)} no answer is in the context, the first: {data.absent[0]}; they count")
    windows = f" in {len(features)} windows" if len(features) > len(data.examples) else ""
    if first:
        say(
            f"{split}: {data.path}, {len(data.examples)} examples{windows}, {int(features.truncated.sum())} cut to "
            f"{arguments.max_seq_length} tokens" + "".join(f"; {words}" for words in left_out)
        )
    return Part(data, features)


def training_arguments(arguments: Arguments, sequences: int) -> TrainingArguments:
    """How to train on so many sequences."""
    max_steps = arguments.max_steps
    if max_steps <= 0:
        an_epoch = -(-sequences // arguments.batch_size)
        max_steps = -(-an_epoch * arguments.num_train_epochs // arguments.gradient_accumulation_steps)
    warmup = count_warmup_steps(arguments.warmup_steps, arguments.warmup_proportion, max_steps)
    return TrainingArguments.of(arguments, max_steps=max_steps, warmup_steps=warmup)


@dataclass
class Run:
    """A model on its task; chooses the best that training goes through (`training.loop.Selection`)."""

    arguments: Arguments
    task: Task
    backend: Backend
    model: Model
    tokenizer: WordPiece
    config: Mapping[str, Any]
    output: Path
    parts: Mapping[Split, Part]

    def train(self, training: TrainingArguments) -> None:
        arguments, features = self.arguments, self.parts["train"].features
        an_epoch = -(-len(features) // arguments.batch_size)

        def batches(start: int, _: int) -> Iterator[LabelledBatch]:
            epoch, skip = divmod(start, an_epoch)
            while True:
                for which in features.epoch(epoch, arguments.batch_size, arguments.seed)[skip:]:
                    yield features.labelled(which, self.backend.rank, self.backend.world_size)
                epoch, skip = epoch + 1, 0

        kept = train(
            self.backend,
            self.model,
            Supervised(self.backend, self.model, self.task.kind),
            batches,
            training,
            self.output,
            self.task.name,
            len(features),
            selection=self,
        )
        self.backend.barrier()  # the best model is written
        if self.backend.rank == 0 and kept != fingerprint(self.output):
            say(f"{self.output}: its weights are not those that were kept as the best: damaged, or of a killed attempt")

    def evaluate(self) -> dict[str, float]:
        """The model's scores on the dev set, the task's metric first."""
        found = self.answers("dev")
        every = scores(self.task, self.parts["dev"].data.examples, found)
        return {self.task.metric: every[self.task.metric], **every}

    def keep(self) -> str:
        """Writes the model to the output folder, for both libraries to load."""
        if self.backend.rank:
            return ""
        write_folder(self.output, self.config, self.tokenizer, self.model.weights(), HEAD_OF[self.task.kind])
        return fingerprint(self.output)

    def answers(self, split: Split) -> list[dict[str, Any]]:
        """The model's answers to the examples of a split."""
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

    def report(self) -> dict[str, float]:
        """Writes the scores on the dev set, the answers and, of classes, a picture of what was taken for what."""
        found = self.answers("dev")
        every = self._write("dev", found)
        task, examples = self.task, self.parts["dev"].data.examples
        if self.backend.rank == 0 and task.kind == "classification" and task.labels is not None:
            truth = np.array([example.label for example in examples])
            predicted = np.array([task.labels.index(answer["label"]) for answer in found])
            matrix = confusion_matrix(truth, predicted, len(task.labels))
            title = f"{task.name}, dev set of {len(examples)}: {self.arguments.model_name_or_path}"
            draw_confusion(self.output / "confusion_matrix.png", matrix, title, task.labels)
        return every

    def submit(self) -> None:
        """Writes the answers to the test set, CLUE's file to hand in, and the scores if the right ones are known."""
        found = self.answers("test")
        self._write("test", found)
        if self.task.submission is not None and self.backend.rank == 0:
            with atomically(self.output / self.task.submission) as temporary:
                temporary.write_text(submission(self.task, found), encoding="utf-8")
            say(f"the test set's answers are in {self.output / self.task.submission}")

    def _write(self, split: Split, found: list[dict[str, Any]]) -> dict[str, float]:
        """Writes a split's answers, and its scores among the results; returns them."""
        examples = self.parts[split].data.examples
        known = all(answer_is_known(example) for example in examples)
        every = scores(self.task, examples, found) if known else {}
        if self.backend.rank:
            return every
        self.output.mkdir(parents=True, exist_ok=True)
        write_lines(self.output / f"{split}_predictions.json", predictions(self.task, examples, found))
        if known:
            path = self.output / RESULTS
            results = _results(path) if split == "test" and path.exists() else {}
            results |= {
                "task": self.task.name,
                "metric": self.task.metric,
                split: every,
                f"{split}_examples": len(examples),
                "backend": {**self.backend.versions(), "precision": self.backend.precision},
            }
            write_json(path, results)
            told = ", ".join(f"{key} {value:.2f}" for key, value in every.items())
            say(f"{self.task.name}: {told} on the {split} set")
        return every


def _results(path: Path) -> dict[str, Any]:
    """What is in a file of results; nothing if it is damaged."""
    try:
        return dict(read_json(path))
    except (InputError, ValueError, TypeError):
        say(f"{path} is damaged and begun anew")
        return {}


def answer_is_known(example: Example | Question | Sentence) -> bool:
    if isinstance(example, Question):
        return bool(example.answers)
    return (example.label if isinstance(example, Example) else example.tags) is not None


def predict(backend: Backend, model: Model, features: Features) -> list[np.ndarray]:
    """A model's logits for each sequence, computed without padding; several processes share the work."""
    batches = features.by_length(TOKENS_AT_ONCE.get(backend.device, 1 << 15))
    rows = 1 if features.parts and not len(features.parts[0]) else None
    found: list[np.ndarray] = [np.zeros(0)] * len(features)
    for turn in range(0, len(batches), backend.world_size):
        which = [batches[min(turn + rank, len(batches) - 1)] for rank in range(backend.world_size)]
        with backend.no_grad(), backend.autocast():
            logits = model.run(features.batch(which[backend.rank]), Wanted(logits=True)).logits.float()
        everywhere = backend.gather(logits) if backend.world_size > 1 else [logits]
        for theirs, values in zip(which, everywhere):
            sizes = [rows or len(features.ids[i]) for i in theirs]
            for i, piece in zip(theirs, np.split(backend.numpy(values), np.cumsum(sizes)[:-1])):
                found[i] = piece[0] if rows else piece
    return found


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
