"""Model cards: the README.md of a student, of an assistant, and of a teacher pretrained here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from backends.pretrained import fingerprint
from backends.shape import Shape
from general_distill.arguments import DistillArguments
from objectives.distillation import Match, wanted_of
from text.corpus import Lines


def loading_lines(folder: Path, backend: str) -> list[str]:
    """Three lines of Python that load a student."""
    name = json.dumps(str(folder), ensure_ascii=False)
    if backend == "paddle":
        return [
            "from paddlenlp.transformers import BertModel, BertTokenizer",
            f"tokenizer = BertTokenizer.from_pretrained({name})",
            f"model = BertModel.from_pretrained({name})",
        ]
    return [
        "from transformers import AutoModel, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({name})",
        f"model = AutoModel.from_pretrained({name})",
    ]


def student_card(
    arguments: DistillArguments,
    role: Literal["assistant", "student"],
    folder: Path,
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    corpus: Lines[Any],
    steps: int,
    lines_per_update: int,
    versions: Mapping[str, str],
    results: Mapping[str, Mapping[str, float]],
    matches: Sequence[Match],
) -> str:
    beside = "" if role == "student" else "../"
    teacher_named = arguments.teacher_model_name_or_path or f"pretrained on the same text, in `{beside}teacher/`"
    if arguments.assistant.num_layers is not None:
        teacher_named = f"the assistant in `assistant/`, whose teacher was {teacher_named}"
    lines = [
        f"# {Shape.of(student)} {role}",
        "",
        f"Distilled by MiniLM Duet from {'self-attention relations' if arguments.matches is None else 'matches'}.",
        "",
        "| | |",
        "|---|---|",
        f"| teacher | {teacher_named}, {Shape.of(teacher)} |",
        f"| {role} | {Shape.of(student)}, {student['hidden_act']}; weights {fingerprint(folder)} |",
        *(_relations(arguments) if arguments.matches is None else [_matches(matches)]),
        f"| text | {arguments.input_dir}: {len(corpus.files)} files, {len(corpus)} lines, "
        f"at most {arguments.max_seq_length} tokens a line |",
        f"| training | {steps} steps of {lines_per_update} lines, "
        f"learning rate {arguments.learning_rate:g}, seed {arguments.seed} |",
        f"| made with | {', '.join(f'{name} {version}' for name, version in versions.items())} |",
        "",
        f"All arguments are in `{beside}arguments.yaml`, every logged step in `metrics.jsonl`.",
        "",
        *_losses(folder),
    ]
    if results:
        lines += [
            "",
            f"Mean over the batches of {arguments.eval_dir}, which was held out:",
            "",
            "| loss | before | after |",
            "|---|---|---|",
            *(f"| {key} | {results['before'][key]:.5g} | {value:.5g} |" for key, value in results["after"].items()),
        ]
    for name in ("torch", "paddle"):
        library = {"torch": "PyTorch (transformers)", "paddle": "PaddlePaddle (paddlenlp)"}[name]
        lines += ["", f"On {library}:", "", "```python", *loading_lines(folder, name), "```"]
    lines += ["", _untrained(matches, Shape.of(student))]
    return "\n".join(lines) + "\n"


def _relations(arguments: DistillArguments) -> list[str]:
    return [
        f"| layers (teacher, student) | {', '.join(map(str, arguments.layer_pairs()))} |",
        f"| relations | {arguments.num_relation_heads} heads; alpha {arguments.alpha}, beta {arguments.beta}; "
        f"{', '.join(f'{pair} {weight:g}' for pair, weight in arguments.relation_pairs.items())}; "
        f"padding {arguments.padding} |",
    ]


def _matches(matches: Sequence[Match]) -> str:
    return f"| matches (teacher-student) | {', '.join(f'{match} x {match.weight:g}' for match in matches)} |"


def _untrained(matches: Sequence[Match], student: Shape) -> str:
    """What of the student got no gradient."""
    _, wanted = wanted_of(matches)
    if wanted.logits:
        return "It has the head of masked language modelling; a pooler starts at random: fine-tune before use."
    deepest = max([*wanted.states, *wanted.qkv])
    untrained = []
    if deepest in wanted.qkv:
        untrained.append("the matched layer's attention output and feed-forward weights")
    if deepest < len(student.layers) - (deepest in wanted.qkv):
        untrained.append("the layers above the deepest that is matched")
    listed = ", ".join([*untrained, "and the pooler,"]) if untrained else "the pooler"
    return f"{listed[0].upper()}{listed[1:]} got no gradient in this stage: fine-tune before use."


def teacher_card(
    arguments: DistillArguments,
    folder: Path,
    config: Mapping[str, Any],
    corpus: Lines[Any],
    lines_per_update: int,
    versions: Mapping[str, str],
) -> str:
    settings = arguments.pretrain
    return "\n".join(
        [
            f"# {Shape.of(config)} teacher",
            "",
            f"Pretrained by MiniLM Duet on {len(corpus)} lines of {arguments.input_dir} by whole-word masked language "
            f"modelling: {settings.max_steps} steps of {lines_per_update} lines, learning rate "
            f"{settings.learning_rate:g}, seed {arguments.seed}, {Shape.of(config).vocabulary} tokens in the "
            "vocabulary; "
            f"{', '.join(f'{name} {version}' for name, version in versions.items())}. Weights {fingerprint(folder)}.",
            "",
            *_losses(folder),
            "",
        ]
    )


def _losses(folder: Path) -> list[str]:
    """First and last logged loss that were finite."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if record.get("loss") is not None]
    if not records:
        return []
    first, last = records[0], records[-1]
    return [f"Loss at step {first['step']}: {first['loss']:.5g}; at step {last['step']}: {last['loss']:.5g}."]
