"""From a model's outputs on features to answers: classes, spans of text, tags; and to scores and CLUE's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from text.data import Example, Question, Sentence
from text.features import Features
from text.metrics import classification_scores, labelling_scores, reading_scores
from text.tasks import Task


def softmax(x: np.ndarray) -> np.ndarray:
    """Computes softmax over the last axis."""
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def answers(
    task: Task,
    examples: Sequence[Any],
    features: Features,
    logits: Sequence[np.ndarray],
    n_best_size: int = 20,
    max_answer_length: int = 50,
    top_k: int = 0,
) -> list[dict[str, Any]]:
    """Makes an answer for each example: ``id``, and the label, the tags or the text with its probability.

    Args:
        logits: for each sequence [classes] (classification), [n, 2] for start and end (reading) or
            [n, tags] (labelling).
        n_best_size: starts and ends that are considered, and spans that are kept.
        max_answer_length: tokens of an answer at most.
        top_k: how many of the best classes are listed too.
    """
    if task.kind == "classification":
        return classes(task, examples, softmax(np.stack(logits)), top_k)
    if task.kind == "labelling":
        return [_tags(task, *row) for row in zip(examples, features.parts, logits)]
    windows: list[list[int]] = [[] for _ in examples]
    for number, source in enumerate(features.sources):
        windows[source].append(number)
    return [
        _spans(question, [(features.parts[i], logits[i]) for i in numbers], n_best_size, max_answer_length)
        for question, numbers in zip(examples, windows)
    ]


def classes(task: Task, examples: Sequence[Any], probabilities: np.ndarray, top_k: int = 0) -> list[dict[str, Any]]:
    """Finds the best class of each example, and under ``top_k`` the best `top_k` unless that is 0.

    Args:
        probabilities: [examples, classes].
    """
    assert task.labels is not None
    rows = []
    for example, row in zip(examples, probabilities):
        best = [
            {"label": task.labels[i], "probability": round(float(row[i]), 6)}
            for i in np.argsort(-row, kind="stable")[: max(1, top_k)]
        ]
        rows.append({"id": example.id, **best[0], **({"top_k": best} if top_k else {})})
    return rows


def _tags(task: Task, sentence: Sentence, parts: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """Finds a tag for each token: "O", or the last label, if it was cut off or is no text to the tokenizer."""
    assert task.labels is not None
    outside = "O" if "O" in task.labels else task.labels[-1]
    tags = [outside] * len(sentence.tokens)
    for part, best in zip(parts, logits.argmax(axis=-1)):
        if part >= 0:
            tags[part] = task.labels[best]
    return {"id": sentence.id, "tags": tags}


def _spans(
    question: Question, windows: Sequence[tuple[np.ndarray, np.ndarray]], n_best_size: int, max_answer_length: int
) -> dict[str, Any]:
    """Finds the spans with the highest sum of start and end logit over all windows, as in BERT's run_squad."""
    spans: list[tuple[float, int, int]] = []
    for offsets, logits in windows:
        context = np.flatnonzero(offsets[:, 0] >= 0)
        starts, ends = (context[np.argsort(-logits[context, side], kind="stable")[:n_best_size]] for side in (0, 1))
        scores = logits[starts, 0][:, None] + logits[ends, 1][None, :]
        length = ends[None, :] - starts[:, None] + 1
        scores = np.where((length >= 1) & (length <= max_answer_length), scores, -np.inf)
        for i in np.argsort(-scores, axis=None, kind="stable")[:n_best_size]:
            start, end = starts[i // len(ends)], ends[i % len(ends)]
            if np.isfinite(scores.flat[i]):
                spans.append((float(scores.flat[i]), int(offsets[start, 0]), int(offsets[end, 1])))
    spans.sort(key=lambda span: -span[0])
    texts: dict[str, float] = {}
    for score, start, end in spans:
        texts.setdefault(question.context[start:end], score)
    best = list(texts.items())[:n_best_size]
    probabilities = softmax(np.array([[score for _, score in best]]))[0] if best else np.zeros(0)
    return {
        "id": question.id,
        "answer": best[0][0] if best else "",
        "n_best": [
            {"text": text, "probability": round(float(probability), 6), "score": round(score, 4)}
            for (text, score), probability in zip(best, probabilities)
        ],
    }


def scores(task: Task, examples: Sequence[Any], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Computes the task's scores, in per cent; the task's metric is among them."""
    if task.kind == "reading":
        return reading_scores([question.answers for question in examples], [answer["answer"] for answer in answers])
    assert task.labels is not None
    if task.kind == "labelling":
        tags = [[task.labels[tag] for tag in sentence.tags] for sentence in examples]
        return labelling_scores(tags, [answer["tags"] for answer in answers])
    truth = np.array([example.label for example in examples])
    predicted = np.array([task.labels.index(answer["label"]) for answer in answers])
    return classification_scores(truth, predicted, len(task.labels))


def predictions(task: Task, examples: Sequence[Any], answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins answers with their examples' texts and, under ``right``, the right answers where they are known."""
    rows = []
    for example, answer in zip(examples, answers):
        texts: dict[str, Any]
        right: Any
        if isinstance(example, Example):
            texts = {"text": example.text} | ({} if example.pair is None else {"text_pair": example.pair})
            right = None if example.label is None else (task.labels or ())[example.label]
        elif isinstance(example, Question):
            texts, right = {"question": example.question, "context": example.context}, list(example.answers) or None
        else:
            texts = {"tokens": list(example.tokens)}
            right = None if example.tags is None else [(task.labels or ())[tag] for tag in example.tags]
        rows.append({"id": example.id, **texts, **answer, **({} if right is None else {"right": right})})
    return rows


def submission(task: Task, answers: Sequence[dict[str, Any]]) -> str:
    """Makes the content of CLUE's file for a test set: JSON lines of id and label, as
    the task's files spell it, or one object of answers by question."""
    if task.kind == "reading":
        return (
            json.dumps({str(answer["id"]): answer["answer"] for answer in answers}, ensure_ascii=False, indent=1) + "\n"
        )
    rows = ({"id": answer["id"], "label": task.spelling(answer["label"])} for answer in answers)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
