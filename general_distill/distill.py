"""General distillation, from a folder of text to a student: read it top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

import backends
from backends.files import InputError, leaving_nothing, write_json
from backends.interface import Backend, Batch, Head, Model, Weights
from backends.pretrained import find_model, read_weights
from backends.shape import Shape
from general_distill.arguments import Assistant, DistillArguments, Pretraining
from general_distill.card import student_card, teacher_card
from objectives.distillation import (
    Distillation,
    Match,
    Teacher,
    check_texts_are_compared,
    relation_matches,
    wanted_of,
)
from objectives.masked_lm import MaskedLanguageModelling
from objectives.matches import Models, matches_of
from objectives.relations import RelationLoss
from objectives.teachers import ForeignTeacher
from programs.console import console, say
from text.batches import Drawn, line_batches
from text.corpus import Corpus, Lines
from text.folder import ModelFolder, check_length, write_folder
from text.masking import MaskedBatch, mask_words
from text.shards import Shards, open_corpus
from text.tokenizer import WordPiece
from text.vocabulary import SERIALIZED, VOCABULARY
from training.folder import RECORD, check_inputs, check_output, claim, finished, read_record, write_card
from training.loop import TrainingArguments, seed_of
from training.schedule import count_warmup_steps
from training.stages import Phase, Stage, run_stages

STUDENT_SIZES = {
    6: {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    4: {"hidden_size": 256, "num_attention_heads": 16, "intermediate_size": 1024},
    # PP-MiniLM leaves the heads of this one at 12, which do not divide 128; two of 64 are BERT-tiny's.
    2: {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512},
}
"""PP-MiniLM's students by their number of layers."""

MATCHES_OF = {"assistant": "--assistant.matches", "student": "--matches"}
INIT_LAYERS_OF = {"assistant": "--assistant.init_layers", "student": "--student_init_layers"}
"""The options that say what they learn."""
MASKED_LM_WEIGHT = "cls.predictions.transform.dense.weight"
INDEXES = ("corpus_index", "eval_index")
# What may differ when a run is resumed: where it runs and what it tells, how an update's lines are divided, and how
# what it reads is named, which is known by its content
FREE_TO_CHANGE = {
    *("resume", "overwrite", "dry_run", "output_dir", "device"),
    *("input_dir", "eval_dir", "teacher_model_name_or_path", "student_model_name_or_path", "pretrain.vocab_file"),
    *("logging_steps", "save_steps", "keep_checkpoints", "keep_every", "max_nonfinite_steps", "bad_lines"),
    *("nproc", "nnodes", "node_rank", "master", "batch_size", "assistant.batch_size", "gradient_accumulation_steps"),
}


@dataclass(frozen=True)
class Setup:
    """What the arguments of a distillation come to, checked; nothing but the indexes of its text is written yet."""

    arguments: DistillArguments
    """Of an assistant, those with which it would be a run's student."""
    backend: Backend
    corpus: Corpus | Shards
    held_out: Corpus | Shards | None
    tokenizer: WordPiece
    """The student's."""
    foreign: WordPiece | None
    """The teacher's, if its vocabulary is another."""
    teacher_folder: Path
    """Where the teacher is, or will be once an earlier stage made it."""
    teacher_config: Mapping[str, Any]
    student_config: Mapping[str, Any]
    matches: Sequence[Match]
    training: TrainingArguments
    role: Literal["assistant", "student"] = "student"
    """Of the model that learns."""
    assistant: Setup | None = None
    """The distillation that the teacher of this one comes from."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What the run reads, by option (`training.folder.check_inputs`)."""

    @property
    def name(self) -> str:
        """Of the stage."""
        return "distil" if self.role == "student" else "distil assistant"

    @property
    def distillations(self) -> list[Setup]:
        """This one, behind those that it needs."""
        return [*([] if self.assistant is None else self.assistant.distillations), self]

    @property
    def pretrains(self) -> bool:
        """Whether the run pretrains its teacher first."""
        return self.arguments.teacher_model_name_or_path is None

    @property
    def teacher_is_to_come(self) -> bool:
        """Whether an earlier stage makes the teacher."""
        return self.pretrains or self.assistant is not None

    @property
    def lines_per_update(self) -> int:
        """Of all processes."""
        arguments = self.arguments
        return arguments.batch_size * arguments.gradient_accumulation_steps * self.backend.world_size

    @property
    def head(self) -> Head | None:
        """Of the student while it learns, and of a teacher that reads the same tokens."""
        return "masked_lm" if wanted_of(self.matches)[1].logits else None

    def masked(self, drawn: Drawn) -> MaskedBatch:
        """Lines with some of their words masked."""
        encoded = self.tokenizer.encode(drawn.lines, self.arguments.max_seq_length)
        masked = mask_words(encoded, drawn.lines, self.tokenizer, self.arguments.seed, drawn.position)
        return masked._replace(batch=masked.batch._replace(numbers=drawn.numbers))

    def read(self, drawn: Drawn) -> Batch | MaskedBatch:
        """Lines as the models read them, some of their words masked if the student has a head; a teacher of another
        vocabulary reads them without masks."""
        length = self.arguments.max_seq_length
        masked = self.masked(drawn) if self.head is not None else None
        batch = self.tokenizer.encode(drawn.lines, length).batch if masked is None else masked.batch
        batch = batch._replace(numbers=drawn.numbers)
        if self.foreign is not None:
            of_teacher = self.foreign.encode(drawn.lines, self.arguments.teacher_max_seq_length or length).batch
            batch = batch._replace(of_teacher=of_teacher)
        return batch if masked is None else masked._replace(batch=batch)

    def batches(self, make: Callable[[Drawn], Any], batch_size: int, start: int) -> Iterator[Any]:
        """`line_batches` of this process."""
        backend = self.backend
        return line_batches(
            self.corpus,
            make,
            batch_size=batch_size,
            seed=self.arguments.seed,
            start=start,
            rank=backend.rank,
            world_size=backend.world_size,
        )


def distill(arguments: DistillArguments) -> Path:
    """Runs general distillation; returns the student's folder.

    Raises:
        InputError: something in `arguments` or what they name is wrong, found
            before training starts; or another run works in the folder.
        TrainingFailed: the loss became NaN or infinite.
    """
    output = Path(arguments.output_dir)
    arguments = _as_begun(arguments, output)
    if finished(output) and arguments.resume:
        check_output(output, arguments, FREE_TO_CHANGE, _reads(arguments), INDEXES)
        say(f"{output} is finished, nothing is left to do; --overwrite in place of --resume starts it anew")
        return output

    with leaving_nothing(output, INDEXES), ExitStack() as claimed:
        setup = prepare(arguments, output)
        backend, distillations = setup.backend, setup.distillations

        def claim_output() -> None:
            if backend.rank == 0:
                claimed.enter_context(claim(output, arguments, setup.inputs, INDEXES))
            backend.barrier()  # an old run's checkpoints are gone

        stages = [*([PretrainTeacher(distillations[0])] if setup.pretrains else []), *map(DistilStudent, distillations)]
        run_stages(backend, stages, arguments.resume, claim_output)
    return output


class PretrainTeacher(Stage):
    """A small BERT at random goes through whole-word masked language modelling."""

    name = "pretrain teacher"
    lines_per_update: int

    def __init__(self, setup: Setup) -> None:
        self.setup, self.folder, self.lines = setup, setup.teacher_folder, len(setup.corpus)
        self.lines_per_update = setup.arguments.pretrain.batch_size * setup.backend.world_size

    def finished(self) -> bool:
        return finished(self.folder)

    def begin(self) -> Phase:
        return pretraining(self.setup)

    def enter(self, phase: Phase) -> None:
        if self.setup.backend.rank == 0:
            self.folder.mkdir(exist_ok=True)
            self.setup.tokenizer.save(self.folder, Shape.of(self.setup.teacher_config).positions)

    def leave(self, phase: Phase, kept: str | None) -> None:
        setup, config = self.setup, self.setup.teacher_config
        if setup.backend.rank:
            return
        write_folder(self.folder, config, setup.tokenizer, phase.model.weights(), "masked_lm")
        versions = setup.backend.versions()
        card = teacher_card(setup.arguments, self.folder, config, setup.corpus, self.lines_per_update, versions)
        write_card(self.folder, card)


class DistilStudent(Stage):
    """A student, or an assistant, learns from its teacher, and is measured on held-out text before and after."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.folder, self.lines = setup, Path(setup.arguments.output_dir), len(setup.corpus)
        self.name, self.lines_per_update = setup.name, setup.lines_per_update
        self.results: dict[str, dict[str, float]] = {}
        self.unreadable = 0
        """Lines of which that was said before."""

    def finished(self) -> bool:
        return finished(self.folder)

    def begin(self) -> Phase:
        return distillation(self.setup, read_weights(self.setup.teacher_folder))

    def enter(self, phase: Phase) -> None:
        if self.setup.backend.rank == 0:
            self.folder.mkdir(exist_ok=True)
        self._measure("before", phase)
        self.unreadable = len(self.setup.corpus.unreadable)

    def leave(self, phase: Phase, kept: str | None) -> None:
        setup, backend, corpus = self.setup, self.setup.backend, self.setup.corpus
        if replaced := int(backend.total(np.array([corpus.replaced]))[0]):
            where = setup.arguments.input_dir
            say(f"{where}: {replaced} lines could not be read any more; others were taken in their place")
            _say_unreadable(corpus, self.unreadable)
        self._measure("after", phase)
        if backend.rank:
            return
        if self.results:
            _say_results(self.results)
            write_json(self.folder / "eval_results.json", self.results)
        write_folder(self.folder, setup.student_config, setup.tokenizer, phase.model.weights(), setup.head)
        card = student_card(
            setup.arguments,
            setup.role,
            self.folder,
            setup.teacher_config,
            setup.student_config,
            corpus,
            setup.training.max_steps,
            setup.lines_per_update,
            {**backend.versions(), "device": backend.device, "precision": backend.precision},
            self.results,
            setup.matches,
        )
        write_card(self.folder, card)

    def _measure(self, when: str, phase: Phase) -> None:
        setup = self.setup
        if setup.held_out is not None:
            assert isinstance(phase.objective, Distillation)
            self.results[when] = evaluate(phase.objective, setup.held_out, setup)


def prepare(arguments: DistillArguments, folder: Path) -> Setup:
    """Checks arguments and what they name, and indexes the text; returns the student's distillation.

    Args:
        folder: gets the indexes.

    Raises:
        InputError: something is wrong; of an output_dir that is not this run's only without ``dry_run``.
    """
    if arguments.matches is None:
        relation_matches_of(arguments)
    if arguments.batch_size < 1:
        raise InputError(f"--batch_size {arguments.batch_size}: must be at least 1")
    for option in ("max_seq_length", "teacher_max_seq_length"):
        length = getattr(arguments, option)
        if length is not None and length < 3:
            raise InputError(f"--{option} {length}: must be at least 3 ([CLS], a token, [SEP])")
    backend = backends.load(arguments.backend, arguments.device, arguments.precision)
    console.quiet = backend.rank > 0
    output = Path(arguments.output_dir)
    begun: Mapping[str, str] = {}
    if not arguments.dry_run:
        begun = check_output(output, arguments, FREE_TO_CHANGE, _reads(arguments), INDEXES)

    with backend.in_turn():
        corpus = open_corpus(
            arguments.input_dir, folder / INDEXES[0], bad_lines=arguments.bad_lines, begun=begun.get("input_dir")
        )
        held_out = None
        if arguments.eval_dir:
            held_out = open_corpus(arguments.eval_dir, folder / INDEXES[1], "eval_dir", begun=begun.get("eval_dir"))
    say(
        f"{arguments.input_dir}: {len(corpus.files)} files, {len(corpus)} lines, {corpus.characters} characters; "
        f"{corpus.blank} blank lines left out" + (f", {corpus.bad} that cannot be read" if corpus.bad else "")
    )
    _say_unreadable(corpus)
    teacher_folder = output / "teacher"
    if arguments.teacher_model_name_or_path is not None:
        teacher = ModelFolder.find(
            arguments.teacher_model_name_or_path, "teacher_model_name_or_path", arguments.teacher_model_type
        )
        teacher_folder, teacher_config, tokenizer = teacher.path, teacher.config, teacher.tokenizer
    else:
        tokenizer = new_vocabulary(corpus, arguments.pretrain, teacher_folder, arguments.resume)
        teacher_config = new_teacher_config(arguments.pretrain, len(tokenizer))
    teachers_tokenizer = tokenizer
    tokenizer = student_tokenizer(arguments, teachers_tokenizer, Shape.of(teacher_config).vocabulary)
    foreign = teachers_tokenizer if tokenizer is not teachers_tokenizer else None
    for option, lines in (("input_dir", corpus), ("eval_dir", held_out)):
        if isinstance(lines, Shards) and foreign is not None:
            raise InputError(
                f"--{option} {lines.folder}: has tokens, and the teacher's vocabulary is not the student's; give the "
                "text that was prepared"
            )
        if isinstance(lines, Shards):
            lines.check_vocabulary(tokenizer, teacher_folder)
    if foreign is None and arguments.teacher_max_seq_length is not None:
        raise InputError(
            f"--teacher_max_seq_length {arguments.teacher_max_seq_length}: has no effect on a teacher that shares the "
            "student's vocabulary, and reads its tokens; leave it out"
        )
    common = (backend, corpus, held_out)
    assistant = None
    if arguments.assistant.num_layers is not None:
        of_assistant = arguments.of_assistant()
        config = new_assistant_config(arguments.assistant, teacher_config)
        models = (teacher_folder, teacher_config, config)
        assistant = new_setup(of_assistant, *common, teachers_tokenizer, None, *models, "assistant")
        teacher_folder, teacher_config = Path(of_assistant.output_dir), config
    config = new_student_config(arguments, teacher_config)
    models = (teacher_folder, teacher_config, config)
    setup = new_setup(arguments, *common, tokenizer, foreign, *models, "student", assistant)

    inputs: dict[str, str] = {}
    if backend.rank == 0 and not arguments.dry_run:
        inputs = {"vocabulary": tokenizer.fingerprint(), "input_dir": corpus.identity()}
        if held_out is not None:
            inputs["eval_dir"] = held_out.identity()
        for option, model_type, of_model in (
            ("teacher_model_name_or_path", arguments.teacher_model_type, teachers_tokenizer),
            ("student_model_name_or_path", arguments.model_type, tokenizer),
        ):
            if (name := getattr(arguments, option)) is not None:
                inputs[option] = ModelFolder.find(name, option, model_type).identity(of_model)
        check_inputs(output, begun, inputs)
    return replace(setup, inputs=inputs)


def new_setup(
    arguments: DistillArguments,
    backend: Backend,
    corpus: Corpus | Shards,
    held_out: Corpus | Shards | None,
    tokenizer: WordPiece,
    foreign: WordPiece | None,
    teacher_folder: Path,
    teacher_config: Mapping[str, Any],
    student_config: Mapping[str, Any],
    role: Literal["assistant", "student"],
    assistant: Setup | None = None,
) -> Setup:
    """A distillation of models of known shapes; raises InputError if they, or the text, do not fit its matches."""
    option = MATCHES_OF[role]
    teacher, student = Shape.of(teacher_config), Shape.of(student_config)
    matches = new_matches(arguments, teacher, student, together=backend.world_size > 1, option=option)
    if wanted_of(matches)[1].logits:
        for source, lines in (("input_dir", corpus), ("eval_dir", held_out)):
            if isinstance(lines, Shards) and not lines.words:
                raise InputError(
                    f"--{source} {lines.folder}: was prepared without --words, which {option} of logits or labels "
                    "need; prepare it again with --words"
                )
        if assistant is not None and assistant.head is None and foreign is None:
            raise InputError(
                f"{option}: logits or labels need an assistant with the head of masked language modelling; give "
                "--assistant.matches a line of logits or labels too, or leave these lines out"
            )
    whose = "teacher" if assistant is None else "assistant"
    if foreign is None:
        check_length(teacher, arguments.max_seq_length, whose=whose)
    else:
        check_texts_are_compared(matches, None, teacher_folder, f"{option} of {{of: states, loss: pkd}} or labels")
        length = arguments.teacher_max_seq_length or arguments.max_seq_length
        check_length(teacher, length, "--teacher_max_seq_length", whose)
        say(f"{teacher_folder}: reads its own tokens of each line, at most {length}; its vocabulary is another")
    check_length(student, arguments.max_seq_length, whose=role)
    max_steps = arguments.max_steps
    if max_steps <= 0:
        lines_per_update = arguments.batch_size * arguments.gradient_accumulation_steps * backend.world_size
        max_steps = -(-arguments.num_train_epochs * len(corpus) // lines_per_update)
    warmup_steps = count_warmup_steps(arguments.warmup_steps, arguments.warmup_proportion, max_steps)
    training = TrainingArguments.of(arguments, max_steps=max_steps, warmup_steps=warmup_steps)
    texts = (corpus, held_out, tokenizer, foreign)
    configs = (teacher_config, student_config)
    return Setup(arguments, backend, *texts, teacher_folder, *configs, matches, training, role, assistant)


def distillation(setup: Setup, teacher_weights: Weights | None) -> Phase:
    """The student, at its start, and its distillation from a teacher; both at random without the teacher's weights."""
    arguments, backend = setup.arguments, setup.backend
    student_weights = None
    if teacher_weights is not None:
        shapes = Shape.of(setup.teacher_config), Shape.of(setup.student_config)
        layers = initial_layers(arguments.student_init_layers, *shapes)
        student_weights = initial_weights(arguments, teacher_weights, layers)
        if layers and arguments.student_init_layers == "auto" and arguments.student_model_name_or_path is None:
            named, option = ", ".join(map(str, layers)), INIT_LAYERS_OF[setup.role]
            say(f"the {setup.role} starts from the teacher's layers {named}; {option} random would not")
    teacher_head = setup.head if setup.foreign is None else None
    if teacher_head is not None and teacher_weights is not None and MASKED_LM_WEIGHT not in teacher_weights:
        raise InputError(
            f"{MATCHES_OF[setup.role]}: logits or labels need a teacher with the head of masked language modelling, "
            f"and {setup.teacher_folder} has no {MASKED_LM_WEIGHT}; give another teacher, or leave these lines out"
        )
    backend.seed(seed_of(arguments.seed))
    student = backend.model(setup.student_config, student_weights, setup.head)
    model = backend.model(setup.teacher_config, teacher_weights, teacher_head, trainable=False)
    say(
        f"{backend.name} on {backend.device}, {backend.precision}: teacher {_shape(model)}, "
        f"{setup.role} {_shape(student)}"
    )
    teacher: Teacher = model
    if setup.foreign is not None:
        teacher = ForeignTeacher(backend, model, _tokens_of_teacher)

    def make(drawn: Drawn) -> Batch | MaskedBatch:
        batch = setup.read(drawn)
        return batch if isinstance(batch, MaskedBatch) else batch.shortest_first()

    def batches(_: int, start: int) -> Iterator[Batch | MaskedBatch]:
        return setup.batches(make, arguments.batch_size, start)

    objective = Distillation(backend, teacher, student, setup.matches, seed=arguments.seed)
    return Phase(student, objective, batches, setup.training)


def _tokens_of_teacher(batch: Batch) -> Batch:
    assert batch.of_teacher is not None
    return batch.of_teacher


def relation_matches_of(arguments: DistillArguments, together: bool = False) -> list[Match]:
    """The matches of the options for relations; raises InputError if they make no sense.

    Args:
        together: whether several processes share a batch.
    """
    relations = RelationLoss(
        arguments.num_relation_heads,
        arguments.alpha,
        arguments.beta,
        arguments.padding,
        arguments.relation_pairs,
        gather_samples=together and arguments.padding == "masked" and arguments.gather_samples,
    )
    return relation_matches(relations, arguments.layer_pairs())


def new_matches(
    arguments: DistillArguments, teacher: Shape, student: Shape, together: bool, option: str = "--matches"
) -> list[Match]:
    """What is compared of models of these shapes; raises InputError if they cannot be so compared."""
    if arguments.matches is not None:
        gather = together and arguments.gather_samples
        return matches_of(arguments.matches, Models(teacher, student, arguments.learning_rate, gather), option)
    matches = relation_matches_of(arguments, together)
    for match in matches:
        match.check(teacher, student)
    return matches


def new_vocabulary(corpus: Lines[Any], settings: Pretraining, folder: Path, resume: bool) -> WordPiece:
    """The vocabulary of a teacher that is to be pretrained, or with `resume` was begun, in `folder`.

    Raises:
        InputError: the corpus was prepared without words.
    """
    if isinstance(corpus, Shards) and not corpus.words:
        raise InputError(
            f"{corpus.folder}: was prepared without --words, which pretraining a teacher needs; prepare it again with "
            "--words, or give --teacher_model_name_or_path"
        )
    if resume and (folder / "vocab.txt").exists():
        return WordPiece.from_model(folder)
    if settings.vocab_file:
        return WordPiece.from_file(Path(settings.vocab_file))
    if isinstance(corpus, Shards):
        return corpus.tokenizer()
    return WordPiece.trained(corpus, settings.vocab_size)


def new_teacher_config(settings: Pretraining, vocab_size: int) -> dict[str, Any]:
    _check_heads("pretrain.", settings.num_attention_heads, settings.hidden_size)
    return model_config(
        "bert",
        vocab_size=vocab_size,
        num_hidden_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
        hidden_act="gelu",
    )


def pretraining(setup: Setup) -> Phase:
    """A teacher at random and its masked language modelling."""
    arguments, backend = setup.arguments, setup.backend
    settings = arguments.pretrain
    backend.seed(seed_of(arguments.seed, 1))
    teacher = backend.model(setup.teacher_config, head="masked_lm")
    say(f"no teacher given: pretraining {_shape(teacher)} on {backend.device} by whole-word masked language modelling")

    def batches(_: int, start: int) -> Iterator[MaskedBatch]:
        return setup.batches(setup.masked, settings.batch_size, start)

    training = TrainingArguments.of(
        arguments,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.max_steps // 10,
        gradient_accumulation_steps=1,
    )
    return Phase(teacher, MaskedLanguageModelling(backend, teacher), batches, training)


def model_config(model_type: str, **shape: Any) -> dict[str, Any]:
    """A BERT's configuration under Hugging Face's keys, the rest as BERT's."""
    return {
        "model_type": model_type,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        **shape,
    }


def student_tokenizer(arguments: DistillArguments, teacher: WordPiece, vocabulary: int) -> WordPiece:
    """The student's tokenizer: the teacher's, unless the student's folder has another vocabulary.

    Args:
        vocabulary: entries that the teacher embeds.

    Raises:
        InputError: the student embeds another vocabulary, and has none, or the teacher is to be pretrained.
    """
    option = "student_model_name_or_path"
    if arguments.student_model_name_or_path is None:
        return teacher
    student = ModelFolder.find(arguments.student_model_name_or_path, option, arguments.model_type)
    has_one = any((student.path / name).exists() for name in (VOCABULARY, SERIALIZED))
    if has_one and student.tokenizer.tokens != teacher.tokens:
        if arguments.teacher_model_name_or_path is None:
            raise InputError(
                f"--{option} {student.path}: its vocabulary is not that of the teacher, which is pretrained; give "
                "--pretrain.vocab_file, the student's, or --teacher_model_name_or_path"
            )
        return student.tokenizer
    if student.shape.vocabulary != vocabulary:
        raise InputError(
            f"{student.path}: the student's vocabulary has {student.shape.vocabulary} entries, the teacher's "
            f"{vocabulary}; they must share one, or the student's folder must have its own"
        )
    return teacher


def new_student_config(arguments: DistillArguments, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The student's configuration: its folder's, or of the sizes asked for.

    Raises:
        InputError: a size is missing, or does not fit another or the teacher.
    """
    of_teacher = Shape.of(teacher)
    if arguments.student_model_name_or_path is not None:
        student = ModelFolder.find(
            arguments.student_model_name_or_path, "student_model_name_or_path", arguments.model_type
        )
        return {**student.config}

    sizes: dict[str, Any] = dict(STUDENT_SIZES.get(arguments.num_layers, {}))
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        value = getattr(arguments, name)
        if value is not None:
            sizes[name] = value
        elif name not in sizes:
            raise InputError(
                f"--num_layers {arguments.num_layers}: PP-MiniLM has sizes for 2, 4 and 6 layers; for another number "
                f"give --{name} too"
            )
    _check_heads("", sizes["num_attention_heads"], sizes["hidden_size"])
    config = model_config(
        arguments.model_type,
        vocab_size=of_teacher.vocabulary,
        num_hidden_layers=arguments.num_layers,
        hidden_act=arguments.hidden_act,
        **sizes,
    )
    return _starting_from(teacher, arguments.student_init_layers, config, "student")


def new_assistant_config(settings: Assistant, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The assistant's configuration: the teacher's sizes, but for those that are given.

    Raises:
        InputError: a size does not fit another or the teacher.
    """
    of_teacher = Shape.of(teacher)
    layer = of_teacher.layers[0]
    sizes = {
        "hidden_size": of_teacher.hidden,
        "num_attention_heads": layer.heads,
        "intermediate_size": layer.intermediate,
    }
    for name in ("num_layers", *sizes):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(f"--assistant.{name} {value}: must be at least 1")
        if value is not None and name in sizes:
            sizes[name] = value
    _check_heads("assistant.", sizes["num_attention_heads"], sizes["hidden_size"])
    config = model_config(
        "bert",
        vocab_size=of_teacher.vocabulary,
        num_hidden_layers=settings.num_layers,
        hidden_act=teacher.get("hidden_act", "gelu"),
        **sizes,
    )
    return _starting_from(teacher, settings.init_layers or "auto", config, "assistant")


def _check_heads(group: str, heads: int, hidden: int) -> None:
    if hidden % heads:
        raise InputError(f"--{group}num_attention_heads {heads}: does not divide {group}hidden_size {hidden}")


def _starting_from(
    teacher: Mapping[str, Any], layers: list[int] | str | None, config: dict[str, Any], whose: str
) -> dict[str, Any]:
    """The configuration of a model that starts from layers of its teacher, if there are any.

    Raises:
        InputError: the teacher's layers are not of its sizes, or not as many as it has.
    """
    of_teacher, shape, option = Shape.of(teacher), Shape.of(config), INIT_LAYERS_OF[whose]
    layers = initial_layers(layers, of_teacher, shape)
    if layers is None:
        return config
    if len(layers) != len(shape.layers):
        raise InputError(f"{option} {layers}: names {len(layers)} layers, the {whose} has {len(shape.layers)}")
    for layer in layers:
        if not 0 <= layer < len(of_teacher.layers):
            raise InputError(f"{option} {layers}: the teacher has layers 0 to {len(of_teacher.layers) - 1}")
        own, theirs = shape.layers[0], of_teacher.layers[layer]
        for name, value, needed in (
            ("hidden_size", shape.hidden, of_teacher.hidden),
            ("intermediate_size", own.intermediate, theirs.intermediate),
            ("num_attention_heads", own.heads, theirs.heads),
        ):
            if value != needed:
                raise InputError(
                    f"{option} {layers}: needs the teacher's {name} {needed}, but the {whose}'s is {value}"
                )
    names = ("max_position_embeddings", "type_vocab_size", "layer_norm_eps")
    return {**config, **{name: teacher.get(name, config[name]) for name in names}}


def initial_layers(layers: list[int] | str | None, teacher: Shape, student: Shape) -> list[int] | None:
    """The teacher's layers that the student's start from, of the option's value; None is at random."""
    if layers == "auto":
        count = len(student.layers)
        spaced = [number * len(teacher.layers) // count for number in range(count)]
        alike = count <= len(teacher.layers) and all(teacher.layers[layer] == student.layers[0] for layer in spaced)
        return spaced if alike and teacher.hidden == student.hidden else None
    return layers if isinstance(layers, list) else None


def initial_weights(arguments: DistillArguments, teacher: Weights, layers: Sequence[int] | None) -> Weights | None:
    """The weights a student starts from; None is at random.

    Args:
        layers: the teacher's, if the student's start from them.
    """
    if arguments.student_model_name_or_path is not None:
        return read_weights(find_model(arguments.student_model_name_or_path, "student_model_name_or_path"))
    if layers is None:
        return None
    weights = {name: array for name, array in teacher.items() if not name.startswith("encoder.")}
    for to, layer in enumerate(layers):
        prefix = f"encoder.layer.{layer}."
        for name, array in teacher.items():
            if name.startswith(prefix):
                weights[f"encoder.layer.{to}.{name.removeprefix(prefix)}"] = array
    return weights


def evaluate(distillation: Distillation, corpus: Lines[Any], setup: Setup) -> dict[str, float]:
    """Means over a corpus' batches of every part of the loss, dropout off; processes share the batches."""
    backend, keys, batch_size = setup.backend, distillation.keys, setup.arguments.batch_size
    sums = np.zeros(len(keys))
    distillation.student.train(False)
    starts = range(0, len(corpus), batch_size)
    for start in starts[backend.rank :: backend.world_size]:
        numbers = np.arange(start, min(start + batch_size, len(corpus)))
        lines = [corpus[i] for i in numbers.tolist()]
        values = distillation.evaluate(setup.read(Drawn(start, numbers, lines)))
        sums += [values[key].item() for key in keys]
    return dict(zip(keys, (backend.total(sums) / len(starts)).tolist()))


def _as_begun(arguments: DistillArguments, output: Path) -> DistillArguments:
    """The arguments of a run that goes on and was begun when students started at random unless layers were named."""
    if arguments.resume and arguments.student_init_layers == "auto" and (output / RECORD).exists():
        with suppress(ValueError):  # which check_output explains
            if read_record(output / RECORD).get("student_init_layers", "auto") is None:
                return replace(arguments, student_init_layers=None)
    return arguments


def _reads(arguments: DistillArguments) -> list[tuple[str, str | None]]:
    """Options, with what a run reads."""
    names = ("input_dir", "eval_dir", "teacher_model_name_or_path", "student_model_name_or_path")
    return [*((name, getattr(arguments, name)) for name in names), ("vocab_file", arguments.pretrain.vocab_file)]


def _shape(model: Model) -> str:
    return f"{model.shape} ({model.shape.weights(masked_lm=model.head == 'masked_lm') / 1e6:.1f} M parameters)"


def _say_unreadable(lines: Lines[Any], first: int = 0) -> None:
    for message in lines.unreadable[first:]:
        say(f"left out: {message}")


def _say_results(results: Mapping[str, Mapping[str, float]]) -> None:
    for key in results["after"]:
        say(f"held-out {key}: {results['before'][key]:.5g} before, {results['after'][key]:.5g} after")
