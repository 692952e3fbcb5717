"""General distillation, from a folder of text to a student: read it top to bottom."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import backends
from backends.interface import Backend, Batch, InputError, Model, Weights
from backends.pretrained import atomically, find_model, read_config, read_weights, write_json, write_model
from general_distill.arguments import Arguments, Pretraining
from general_distill.card import finished, student_card, teacher_card
from objectives.masked_lm import MaskedLanguageModelling
from objectives.relations import RelationDistillation, RelationLoss, check_layers
from text.batches import line_batches
from text.corpus import Corpus
from text.masking import MaskedBatch, mask_words
from text.tokenizer import WordPiece
from training.folder import check_output, claim
from training.log import say
from training.loop import TrainingArguments, seed_of, train
from training.schedule import count_warmup_steps

STUDENT_SIZES = {
    6: {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    4: {"hidden_size": 256, "num_attention_heads": 16, "intermediate_size": 1024},
    # PP-MiniLM leaves the heads of this one at 12, which do not divide 128; two of 64 are BERT-tiny's.
    2: {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512},
}
"""PP-MiniLM's students by their number of layers."""

INDEXES = ("corpus_index", "eval_index")
# What may differ when a run is resumed: where it runs and what it tells, not what it computes
FREE_TO_CHANGE = {
    *("resume", "overwrite", "output_dir", "input_dir", "eval_dir", "device"),
    *("logging_steps", "save_steps", "keep_checkpoints"),
}


def distill(arguments: Arguments) -> Path:
    """Runs general distillation; returns the student's folder.

    Raises:
        InputError: something in `arguments` or what they name is wrong, found
            before training starts.
        TrainingFailed: the loss became NaN or infinite.
    """
    output = Path(arguments.output_dir)
    if finished(output) and arguments.resume:
        say(f"{output} is finished; --overwrite starts it anew")
        return output
    relation_loss = RelationLoss(
        arguments.num_relation_heads, arguments.alpha, arguments.beta, arguments.padding, arguments.relation_pairs
    )
    layer_pairs = arguments.layer_pairs()
    if arguments.batch_size < 1 or arguments.max_seq_length < 3:
        raise InputError("--batch_size must be at least 1 and --max_seq_length at least 3 ([CLS], a token, [SEP])")
    if max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "PADDLE_TRAINERS_NUM")) > 1:
        raise InputError(
            "started as one of several processes, which would each train a student of their own; start one"
        )
    backend = backends.load(
        arguments.backend,
        arguments.device,
        arguments.amp_dtype if arguments.use_amp else "float32",
        arguments.compile,
    )
    check_output(output, arguments, FREE_TO_CHANGE, INDEXES)

    corpus = Corpus(arguments.input_dir, output / INDEXES[0])
    held_out = Corpus(arguments.eval_dir, output / INDEXES[1], "eval_dir") if arguments.eval_dir else None
    say(
        f"{arguments.input_dir}: {len(corpus.files)} files, {len(corpus)} lines, {corpus.characters} characters; "
        f"{corpus.blank} blank lines left out"
    )
    max_steps = arguments.max_steps
    if max_steps <= 0:
        lines_a_step = arguments.batch_size * arguments.gradient_accumulation_steps
        max_steps = -(-arguments.num_train_epochs * len(corpus) // lines_a_step)
    warmup_steps = count_warmup_steps(arguments.warmup_steps, arguments.warmup_proportion, max_steps)
    training = TrainingArguments.of(arguments, max_steps=max_steps, warmup_steps=warmup_steps)

    pretraining = arguments.teacher_model_name_or_path is None
    teacher_folder = output / "teacher"
    if arguments.teacher_model_name_or_path is not None:
        teacher_folder = find_model(arguments.teacher_model_name_or_path, "teacher_model_name_or_path")
        teacher_config = read_config(teacher_folder, arguments.teacher_model_type)
        tokenizer = WordPiece.from_model(teacher_folder)
        tokenizer.check_fits(teacher_config, teacher_folder)
    else:
        tokenizer = new_vocabulary(corpus, arguments.pretrain, teacher_folder, arguments.resume)
        teacher_config = new_teacher_config(arguments.pretrain, len(tokenizer))
    student_config = new_student_config(arguments, teacher_config)
    check_layers(relation_loss, layer_pairs, teacher_config, student_config)
    check_length(arguments.max_seq_length, teacher_config, student_config)

    if pretraining:
        claim(output, arguments, INDEXES)
        pretrain_teacher(backend, corpus, tokenizer, teacher_config, arguments, teacher_folder)
    teacher_weights = read_weights(teacher_folder)
    student_weights = initial_weights(arguments, teacher_weights)
    backend.seed(seed_of(arguments.seed))
    student = backend.model(student_config, student_weights)
    teacher = backend.model(teacher_config, teacher_weights, trainable=False)
    del teacher_weights, student_weights
    distillation = RelationDistillation(backend, teacher, student, relation_loss, layer_pairs)
    if not pretraining:
        claim(output, arguments, INDEXES)
    say(
        f"{backend.name} on {backend.device}, {backend.precision}: teacher {_shape(teacher)}, student {_shape(student)}"
    )

    def batches(start: int) -> Iterator[Batch]:
        def make(number: int, lines: list[str]) -> Batch:
            return tokenizer.encode(lines, arguments.max_seq_length).batch.shortest_first()

        return line_batches(corpus, make, batch_size=arguments.batch_size, seed=arguments.seed, start=start)

    results: dict[str, dict[str, float]] = {}
    results_path = output / "eval_results.json"
    if held_out is not None:
        measure = partial(evaluate, distillation, held_out, tokenizer, arguments)
        results = json.loads(results_path.read_text()) if results_path.exists() else {"before": measure()}
        write_json(results_path, results)
    train(backend, student, distillation, batches, training, output, "distil", len(corpus))
    if held_out is not None:
        results["after"] = measure()
        write_json(results_path, results)
        _say_results(results)

    tokenizer.save(output, student_config["max_position_embeddings"])
    write_model(output, student_config, student.weights())
    versions = {**backend.versions(), "device": backend.device, "precision": backend.precision}
    card = student_card(arguments, output, teacher_config, student_config, corpus, max_steps, versions, results)
    with atomically(output / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    return output


def new_vocabulary(corpus: Corpus, settings: Pretraining, folder: Path, resume: bool) -> WordPiece:
    """The vocabulary of a teacher that is to be pretrained, or with `resume` was begun, in `folder`."""
    if resume and (folder / "vocab.txt").exists():
        return WordPiece.from_model(folder)
    if settings.vocab_file:
        return WordPiece.from_file(Path(settings.vocab_file))
    return WordPiece.trained(corpus, settings.vocab_size)


def new_teacher_config(settings: Pretraining, vocab_size: int) -> dict[str, Any]:
    if settings.hidden_size % settings.num_attention_heads:
        raise InputError(
            f"--pretrain.num_attention_heads {settings.num_attention_heads}: does not divide "
            f"pretrain.hidden_size {settings.hidden_size}"
        )
    return model_config(
        "bert",
        vocab_size=vocab_size,
        num_hidden_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        num_attention_heads=settings.num_attention_heads,
        intermediate_size=settings.intermediate_size,
        hidden_act="gelu",
    )


def pretrain_teacher(
    backend: Backend,
    corpus: Corpus,
    tokenizer: WordPiece,
    config: dict[str, Any],
    arguments: Arguments,
    folder: Path,
) -> None:
    """Pretrains a small BERT by whole-word masked language modelling, resuming if it was begun."""
    settings = arguments.pretrain
    if finished(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder, config["max_position_embeddings"])
    backend.seed(seed_of(arguments.seed, 1))
    teacher = backend.model(config, head="masked_lm")
    say(f"no teacher given: pretraining {_shape(teacher)} on {backend.device} by whole-word masked language modelling")

    def batches(start: int) -> Iterator[MaskedBatch]:
        def make(number: int, lines: list[str]) -> MaskedBatch:
            encoded = tokenizer.encode(lines, arguments.max_seq_length)
            return mask_words(encoded, lines, tokenizer, np.random.default_rng((arguments.seed, number)))

        return line_batches(corpus, make, batch_size=settings.batch_size, seed=arguments.seed, start=start)

    training = TrainingArguments.of(
        arguments,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.max_steps // 10,
        gradient_accumulation_steps=1,
    )
    objective = MaskedLanguageModelling(backend, teacher)
    train(backend, teacher, objective, batches, training, folder, "pretrain teacher", len(corpus))
    write_model(folder, config, teacher.weights(), head="masked_lm")
    with atomically(folder / "README.md") as temporary:
        temporary.write_text(teacher_card(arguments, folder, config, corpus, backend.versions()), encoding="utf-8")


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


def new_student_config(arguments: Arguments, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The student's configuration: its folder's, or of the sizes asked for.

    Raises:
        InputError: a size is missing, or does not fit another or the teacher.
    """
    if arguments.student_model_name_or_path is not None:
        folder = find_model(arguments.student_model_name_or_path, "student_model_name_or_path")
        config = {"max_position_embeddings": 512, **read_config(folder, arguments.model_type)}
        if config["vocab_size"] != teacher["vocab_size"]:
            raise InputError(
                f"{folder}: the student's vocabulary has {config['vocab_size']} entries, the teacher's "
                f"{teacher['vocab_size']}; they must share one"
            )
        return config

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
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise InputError(
            f"--num_attention_heads {sizes['num_attention_heads']}: does not divide hidden_size {sizes['hidden_size']}"
        )
    config = model_config(
        arguments.model_type,
        vocab_size=teacher["vocab_size"],
        num_hidden_layers=arguments.num_layers,
        hidden_act=arguments.hidden_act,
        **sizes,
    )
    layers = arguments.student_init_layers
    if layers is None:
        return config
    if len(layers) != arguments.num_layers:
        raise InputError(
            f"--student_init_layers {layers}: names {len(layers)} layers, the student has {arguments.num_layers}"
        )
    for layer in layers:
        if not 0 <= layer < teacher["num_hidden_layers"]:
            raise InputError(
                f"--student_init_layers {layers}: the teacher has layers 0 to {teacher['num_hidden_layers'] - 1}"
            )
    for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
        if config[name] != teacher[name]:
            raise InputError(
                f"--student_init_layers {layers}: needs the teacher's {name} {teacher[name]}, "
                f"but the student's is {config[name]}"
            )
    for name in ("max_position_embeddings", "type_vocab_size", "layer_norm_eps"):
        config[name] = teacher.get(name, config[name])
    return config


def initial_weights(arguments: Arguments, teacher: Weights) -> Weights | None:
    """The weights a student starts from; None is at random."""
    if arguments.student_model_name_or_path is not None:
        return read_weights(find_model(arguments.student_model_name_or_path, "student_model_name_or_path"))
    if arguments.student_init_layers is None:
        return None
    weights = {name: array for name, array in teacher.items() if not name.startswith("encoder.")}
    for to, layer in enumerate(arguments.student_init_layers):
        prefix = f"encoder.layer.{layer}."
        for name, array in teacher.items():
            if name.startswith(prefix):
                weights[f"encoder.layer.{to}.{name.removeprefix(prefix)}"] = array
    return weights


def check_length(max_seq_length: int, teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    """Raises InputError if a model has too few positions."""
    for whose, config in (("teacher", teacher), ("student", student)):
        positions = config.get("max_position_embeddings", 512)
        if max_seq_length > positions:
            raise InputError(f"--max_seq_length {max_seq_length}: the {whose} has {positions} positions")


def evaluate(
    distillation: RelationDistillation, corpus: Corpus, tokenizer: WordPiece, arguments: Arguments
) -> dict[str, float]:
    """Means over a corpus' batches of every relation's loss, dropout off."""
    sums: dict[str, float] = {}
    distillation.student.train(False)
    starts = range(0, len(corpus), arguments.batch_size)
    for start in starts:
        lines = [corpus[i] for i in range(start, min(start + arguments.batch_size, len(corpus)))]
        for key, value in distillation.evaluate(tokenizer.encode(lines, arguments.max_seq_length).batch).items():
            sums[key] = sums.get(key, 0.0) + value.item()
    return {key: value / len(starts) for key, value in sums.items()}


def _shape(model: Model) -> str:
    config = model.config
    return f"{config['num_hidden_layers']}x{config['hidden_size']} ({model.parameter_count() / 1e6:.1f} M parameters)"


def _say_results(results: Mapping[str, Mapping[str, float]]) -> None:
    for key in results["after"]:
        say(f"held-out {key}: {results['before'][key]:.5g} before, {results['after'][key]:.5g} after")
