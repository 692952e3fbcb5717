"""``python -m finetuning.augment``: a task's training set with variants of its texts, as TinyBERT makes them.

What may stand in for a word comes from a masked language model, where the word is one token, else from the nearest
neighbours in a file of word vectors; `text.augmentation` says which words these are, and makes variants. The model is
asked for many words at a time. Rows are augmented in blocks, each on disk before the next is begun, and what becomes of
a row follows from the seed and its number: killed, the program goes on, to the same bytes.
"""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.begin()

import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import backends
from backends.files import InputError, digest, is_at, leaving_nothing, locked, read_sealed, write_sealed
from backends.interface import Backend, Batch, Model, Tensor, Wanted
from programs import commandline
from programs.console import console, say
from text.augmentation import Replaceable, is_content_word, replaceable_words, variants
from text.data import labelled_rows, with_labels_of
from text.folder import ModelFolder
from text.rows import Row
from text.tasks import Columns, Task, find_task
from text.tokenizer import WordPiece
from text.word_vectors import WordVectors, read_word_vectors

BLOCK = 128
"""Rows whose words are asked for together, each text once; a run that is killed loses at most what it did of one."""
NEIGHBOURS_AT_ONCE = 64
"""Words that are compared with all others at a time."""
SECONDS = 10.0
"""Seconds between two reports where no progress bar can be drawn."""
HEAD = "cls.predictions.transform.dense.weight"
"""A weight that only models with a head of masked language modelling have."""
OF_A_RUN = (
    *("task_name", "text_column", "text_pair_column", "label_column", "skip_bad_lines", "max_words", "num_candidates"),
    *("num_copies", "replace_probability", "max_seq_length", "words_a_question", "batch_size", "backend", "use_amp"),
    *("amp_dtype", "seed"),
)
"""Options that what is written depends on."""


@dataclass(kw_only=True)
class AugmentArguments:
    """Augmentation of a task's training set, as TinyBERT does it."""

    task_name: str
    """the task, whose texts are one column or two; classification for data of your own"""
    model_name_or_path: str
    """folder, or name on the model hub, of a masked language model, as pretraining leaves it"""
    output: str
    """the file for the rows and their variants, JSON lines, which finetuning takes as --augmented"""
    data_dir: str = "data/clue"
    """folder with the task's files, or with a folder of the task's name that has them"""
    word_vectors: str | None = None
    """word2vec's text or binary file, or GloVe's, perhaps in gzip; without, words of several tokens stay"""
    max_words: int = 100_000
    """words of that file that are read, from its start, where the frequent ones are"""
    num_candidates: int = 15
    """words that may stand in for a word (TinyBERT's M)"""
    num_copies: int = 30
    """attempts at a variant of each text (TinyBERT's N)"""
    replace_probability: float = 0.4
    """chance of a word to be replaced in a variant (TinyBERT's p)"""
    max_seq_length: int = 128
    """tokens of a question to the model: the text with words hidden, then the text as it is, as far as it fits"""
    words_a_question: int = 1
    """words of a text that a question hides; more take less time, and have somewhat other candidates"""
    batch_size: int = 64
    """questions that the model is asked at a time"""
    model_type: Literal["ppminilm", "roberta", "bert", "ernie"] = "bert"
    """type of the model, where its folder does not say"""
    backend: Literal["auto", "torch", "paddle"] = "auto"
    """framework; auto takes the one installed, torch first"""
    device: Literal["auto", "cpu", "gpu", "xpu"] = "gpu"
    """device; auto takes an accelerator if there is one"""
    use_amp: bool = False
    """compute in low precision"""
    amp_dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """which: auto takes bfloat16 where the device has it, else float16"""
    seed: int = 42
    """random seed; everything random follows from it"""

    text_column: str = "text"
    """classification of your own data: the column with the text"""
    text_pair_column: str | None = None
    """and the one with the second text, if texts come in pairs"""
    label_column: str = "label"
    """and the one with the class"""
    skip_bad_lines: bool = False
    """leave out lines that cannot be read, instead of refusing the file"""
    resume: bool = False
    """go on where a run was stopped that augmented the same data"""
    overwrite: bool = False
    """replace a file that is there"""

    def __post_init__(self) -> None:
        counts = ("num_candidates", "num_copies", "max_words", "words_a_question", "batch_size")
        for name, number in {**dict.fromkeys(counts, 1), "max_seq_length": 8, "seed": 0}.items():
            if getattr(self, name) < number:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least {number}")
        if not 0 < self.replace_probability <= 1:
            raise InputError(f"--replace_probability {self.replace_probability}: must be above 0, and 1 at most")
        if Path(self.output).suffix not in (".json", ".jsonl"):
            raise InputError(f"--output {self.output}: must end in .json or .jsonl, by which JSON lines are known")

    def without_effect(self, options: Collection[str]) -> dict[str, str]:
        """Returns the options that others keep from having an effect, each with the reason."""
        idle: dict[str, str] = {}
        if self.task_name.lower() != "classification":
            columns = ("text_column", "text_pair_column", "label_column")
            idle |= dict.fromkeys(columns, f"on {self.task_name}; it is for --task_name classification")
        if self.word_vectors is None:
            idle["max_words"] = "without --word_vectors"
        if not self.use_amp:
            idle["amp_dtype"] = "without --use_amp"
        return idle


def augment(arguments: AugmentArguments) -> Path:
    """Writes each row of a training set, and behind it the variants of its text; of a pair first those of the first
    text, then those of the second, the other as it was. All else of a row stays, its label too.

    Raises:
        InputError: the data, the model, the vectors or an option is wrong; what was written before is kept.
    """
    output, data_dir = Path(arguments.output), Path(arguments.data_dir)
    task = find_task(arguments.task_name, arguments.text_column, arguments.text_pair_column, arguments.label_column)
    columns = _text_columns(task)
    source = ModelFolder.find(arguments.model_name_or_path, "model_name_or_path", arguments.model_type)
    source.check_length(arguments.max_seq_length)
    if source.shape.token_types < 2:
        raise InputError(f"{source.path}: its type_vocab_size is 1: it takes single texts, and questions are pairs")
    arguments.backend = backends.choose(arguments.backend)
    path, rows = labelled_rows(with_labels_of(task, data_dir), data_dir, arguments.skip_bad_lines)
    vectors = None
    if arguments.word_vectors is not None:
        vectors = read_word_vectors(Path(arguments.word_vectors), arguments.max_words)
    run = {name: getattr(arguments, name) for name in OF_A_RUN} | {"model": source.identity()}
    with path.open("rb") as file:
        run["data"] = digest(file)
    run["word_vectors"] = None if vectors is None else vectors.identity()

    with _claimed(arguments, run, output, path) as (file, progress):
        candidates = _candidates(arguments, source, vectors)
        with (
            Progress(
                *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
                console=console,
                disable=not console.is_terminal,
            ) as bars,
        ):
            bar = bars.add_task("augment", total=len(rows), completed=progress.rows)
            began, first = time.monotonic(), progress.rows
            reported = began
            for start in range(first, len(rows), BLOCK):
                block = rows[start : start + BLOCK]
                for number, augmented in enumerate(augmented_rows(block, columns, candidates, start, arguments), start):
                    _write(file, [rows[number], *augmented])
                    progress.written += 1 + len(augmented)
                progress.rows = start + len(block)
                progress.save(file)
                bars.update(bar, completed=progress.rows)
                now = time.monotonic()
                if not console.is_terminal and now - reported > SECONDS:
                    speed = (progress.rows - first) / (now - began)
                    say(f"augment: {progress.rows} of {len(rows)} rows, {speed:.1f} rows/s")
                    reported = now
        progress.finish(output)
    say(f"{output}: {progress.written} rows, of {len(rows)} in {path}")
    return output


def _text_columns(task: Task) -> tuple[str, ...]:
    """Returns the columns whose texts vary; raises InputError if the task's texts are no columns of their own."""
    if not isinstance(task.text, Columns):
        reason = {
            "reading": "answers are places in its texts",
            "labelling": "its tags belong to the tokens that would be replaced",
        }.get(task.kind, "its texts are put together from more than their words")
        raise InputError(
            f"--task_name {task.name}: {reason}; expected a task whose texts are one column or two, as tnews, ocnli, "
            "classification"
        )
    return task.text.names


def augmented_rows(
    rows: Sequence[Row], columns: Sequence[str], candidates: Candidates, first: int, arguments: AugmentArguments
) -> Iterator[list[Row]]:
    """Yields for each row those with a variant of one of its texts.

    Args:
        first: the number of the first row; what is drawn for a row follows from its number.
    """
    found = candidates.of([row[column] for row in rows for column in columns])
    for number, row in enumerate(rows, first):
        augmented: list[Row] = []
        for place, column in enumerate(columns):
            random = np.random.default_rng((arguments.seed, number, place))
            text = row[column]
            made = variants(text, found[text], arguments.num_copies, arguments.replace_probability, random)
            augmented += [{**row, column: variant} for variant in made]
        yield augmented


def _candidates(arguments: AugmentArguments, source: ModelFolder, vectors: WordVectors | None) -> Candidates:
    """Loads the model; raises InputError if it has no head of masked language modelling."""
    weights = source.weights()
    if HEAD not in weights:
        raise InputError(
            f"{source.path}: has no head of masked language modelling; give a model as pretraining leaves it, not one "
            "that was fine-tuned or distilled"
        )
    precision = arguments.amp_dtype if arguments.use_amp else "float32"
    backend = backends.load(arguments.backend, arguments.device, precision)
    model = backend.model(source.config, weights, "masked_lm", trainable=False)
    sizes = arguments.num_candidates, arguments.max_seq_length, arguments.words_a_question, arguments.batch_size
    return Candidates(backend, model, source.tokenizer, vectors, *sizes)


class Question(NamedTuple):
    """A question to the model: which words could stand at these places?"""

    ids: np.ndarray
    """int64 [n], the text with some tokens hidden, and the text as it is, as a pair."""
    second: int
    """Where the second text begins."""
    places: list[int]
    """Of the hidden tokens."""


@dataclass(frozen=True)
class Candidates:
    """What may stand in for words: of one token, what the model finds likeliest there; of several, their nearest
    neighbours by cosine."""

    backend: Backend
    model: Model
    tokenizer: WordPiece
    vectors: WordVectors | None
    count: int
    """Candidates of a word."""
    max_seq_length: int
    words_a_question: int
    batch_size: int

    def of(self, texts: Sequence[str]) -> dict[str, list[Replaceable]]:
        """Finds the words of each text that have candidates; each different text is asked once."""
        texts = [*dict.fromkeys(texts)]
        questions: list[Question] = []
        words: list[tuple[str, tuple[int, int], int | str]] = []
        """A text, where the word is in it, and its answer's number or the word itself."""
        answered = 0
        for text, encoding in zip(texts, self.tokenizer.tokenizer.encode_batch(texts)):
            tokens = np.array(encoding.ids, np.int64)
            places: dict[tuple[int, int], int | None] = {}
            for place, span in enumerate(encoding.offsets[1:-1], 1):
                places[span] = None if span in places or tokens[place] == self.tokenizer.unk else place
            hidden: list[int] = []
            for span in replaceable_words(text):
                token_at = places.get(span)
                if token_at is None:
                    words.append((text, span, text[slice(*span)]))
                elif token_at < self.max_seq_length:
                    words.append((text, span, answered + len(hidden)))
                    hidden.append(token_at)
            answered += len(hidden)
            for start in range(0, len(hidden), self.words_a_question):
                questions.append(self._question(tokens, hidden[start : start + self.words_a_question]))
        neighbours = self._neighbours({what for _, _, what in words if isinstance(what, str)})
        answers = self.ask(questions)
        found: dict[str, list[Replaceable]] = {text: [] for text in texts}
        for text, span, what in words:
            candidates = neighbours.get(what, ()) if isinstance(what, str) else answers[what]
            if candidates:
                found[text].append(Replaceable(*span, candidates))
        return found

    def _question(self, tokens: np.ndarray, places: list[int]) -> Question:
        """Hides some of a text's tokens, which stand between [CLS] and [SEP]."""
        hidden = tokens.copy()
        hidden[places] = self.tokenizer.mask
        return Question(np.concatenate([hidden, tokens[1:]])[: self.max_seq_length], len(tokens), places)

    def ask(self, questions: Sequence[Question]) -> list[list[str]]:
        """Asks the model: the likeliest content words at each place of each question, in the vocabulary's order.
        Equally long questions are asked together, as far as they go."""
        answers: list[list[list[str]]] = [[]] * len(questions)
        order = sorted(range(len(questions)), key=lambda number: len(questions[number].ids))
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            asked = [questions[number] for number in numbers]
            batch = _batch(asked)
            length = batch.input_ids.shape[1]
            at = np.concatenate([row * length + np.array(question.places) for row, question in enumerate(asked)])
            with self.backend.no_grad(), self.backend.autocast():
                logits = self.model.run(batch, Wanted(logits=True, at=at)).logits
            best = self._best(logits.float() + self.words_only, min(self.count, self._word_count))
            found = ([self.tokenizer.tokens[token] for token in tokens] for tokens in np.sort(best, axis=1))
            for number, question in zip(numbers, asked):
                answers[number] = list(islice(found, len(question.places)))
        return [answer for question in answers for answer in question]

    def _best(self, scores: Tensor, count: int) -> np.ndarray:
        """Returns the indices of each row's highest scores, highest first: int64 [R, count]."""
        return self.backend.numpy(scores.topk(count)[1])

    @cached_property
    def _is_word(self) -> np.ndarray:
        """Which tokens are content words, bool [V]; special ones and pieces inside words are none."""
        others = {token.content for token in self.tokenizer.settings.whole}
        is_word = [is_content_word(token) and token not in others for token in self.tokenizer.tokens]
        return np.array(is_word + [False] * (self.model.shape.vocabulary - len(is_word)))

    @cached_property
    def _word_count(self) -> int:
        return int(self._is_word.sum())

    @cached_property
    def words_only(self) -> Tensor:
        """Float32 [V], to be added to scores."""
        return self.backend.tensor(np.where(self._is_word, 0, -np.inf).astype(np.float32))

    @cached_property
    def _vectors(self) -> Tensor:
        assert self.vectors is not None
        return self.backend.tensor(self.vectors.vectors)

    def _neighbours(self, words: Collection[str]) -> dict[str, list[str]]:
        """Finds the nearest neighbours of each word that has a vector, in the order of the file."""
        if self.vectors is None:
            return {}
        rows = {word: row for word in sorted(words) if (row := self.vectors.row_of(word)) is not None}
        asked = np.array(sorted({*rows.values()}), np.int64)
        nearest: dict[int, list[str]] = {}
        for start in range(0, len(asked), NEIGHBOURS_AT_ONCE):
            some = asked[start : start + NEIGHBOURS_AT_ONCE]
            with self.backend.no_grad():
                scores = self.backend.tensor(self.vectors.vectors[some]) @ self._vectors.swapaxes(0, 1)
                best = self._best(scores, min(self.count + 1, len(self.vectors.words)))
            for row, others in zip(some.tolist(), best.tolist()):
                kept = [other for other in others if other != row][: self.count]
                nearest[row] = [self.vectors.words[other] for other in sorted(kept)]
        return {word: nearest[row] for word, row in rows.items()}


def _batch(questions: Sequence[Question]) -> Batch:
    """Pads questions to the longest of them."""
    lengths = np.array([len(question.ids) for question in questions])
    positions = np.arange(lengths.max())
    mask = positions < lengths[:, None]
    input_ids = np.zeros(mask.shape, np.int64)
    input_ids[mask] = np.concatenate([question.ids for question in questions])
    types = (positions >= np.array([question.second for question in questions])[:, None]) & mask
    return Batch(input_ids, types.astype(np.int64), mask.astype(np.int64))


@dataclass
class Written:
    """How far a run is: a file of whole blocks, and a record beside it of how many bytes they are."""

    part: Path
    record: Path
    run: Mapping[str, Any]
    rows: int = 0
    """Rows of the data that are done."""
    written: int = 0
    """Lines in the file."""

    def save(self, file: BinaryIO) -> None:
        """Says that all that was written stays; raises InputError if the file was removed meanwhile."""
        file.flush()
        os.fsync(file.fileno())
        if not is_at(file, self.part):
            raise InputError(f"{self.part}: was removed while rows were written to it; run the command again")
        done = {"rows": self.rows, "written": self.written, "bytes": file.seek(0, os.SEEK_END)}
        write_sealed(self.record, {"run": self.run, "done": done})

    def go_on(self, file: BinaryIO) -> None:
        """Takes up what a run left that was stopped; what is behind its last whole block is cut off.

        Raises:
            InputError: it was another run, or what it left is damaged.
        """
        try:
            before = read_sealed(self.record)
        except (OSError, ValueError) as error:
            raise InputError(f"--resume: {self.record}: {error}; --overwrite starts anew") from error
        if changed := [name for name in self.run if before["run"].get(name) != self.run[name]]:
            raise InputError(
                f"--resume: {self.part} was begun with other {', '.join(changed)}; --overwrite starts anew"
            )
        done = before["done"]
        if self.part.stat().st_size < done["bytes"]:
            raise InputError(f"--resume: {self.part} is shorter than it was; --overwrite starts anew")
        file.truncate(done["bytes"])
        self.rows, self.written = done["rows"], done["written"]

    def finish(self, output: Path) -> None:
        os.replace(self.part, output)
        self.record.unlink(missing_ok=True)


@contextmanager
def _claimed(
    arguments: AugmentArguments, run: Mapping[str, Any], output: Path, data: Path
) -> Iterator[tuple[BinaryIO, Written]]:
    """Opens the file that a run writes before it takes the output's name, for this run alone. A run that fails before
    its first block is done leaves nothing."""
    if output.resolve() == data.resolve():
        raise InputError(f"--output {output}: is the training set that is read; give another file")
    progress = Written(output.with_name(f"{output.name}.part"), output.with_name(f"{output.name}.of"), run)
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(progress.part) as file:
        try:
            if output.exists() and not arguments.overwrite:
                raise InputError(f"--output {output}: is there already; give another, or --overwrite")
            if not progress.part.stat().st_size or arguments.overwrite:
                file.truncate(0)
                progress.save(file)
            elif arguments.resume:
                progress.go_on(file)
            else:
                name = progress.part.name
                raise InputError(f"--output {output}: half done ({name}); --resume goes on, --overwrite starts anew")
            yield file, progress
        except BaseException:
            if is_at(file, progress.part) and not progress.part.stat().st_size:
                progress.part.unlink()
                progress.record.unlink(missing_ok=True)
            raise


def _write(file: BinaryIO, rows: Sequence[Row]) -> None:
    file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)


def main(argv: Sequence[str]) -> int:
    def program() -> None:
        description = "A task's training set with variants of its texts, as TinyBERT makes them."
        arguments = commandline.parse(AugmentArguments, argv, "finetuning.augment", description)
        with leaving_nothing(Path(arguments.output).parent):
            augment(arguments)

    return commandline.run(program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
