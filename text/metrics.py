"""Scores of predictions, in per cent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
from nltk.tokenize import NLTKWordTokenizer

_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_CHINESE = re.compile("[\u4e00-\u9fa5]")
_WORDS = NLTKWordTokenizer()


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts how many of a label (row) were predicted as another (column): int64 [classes, classes]."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def classification_scores(labels: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
    """Computes accuracy, and the mean F1 of the classes that occur."""
    matrix = confusion_matrix(labels, predicted, classes)
    right = matrix.diagonal()
    total = matrix.sum(axis=0) + matrix.sum(axis=1)
    f1 = 2 * right[total > 0] / total[total > 0]
    return {"accuracy": 100 * float(right.sum() / matrix.sum()), "macro_f1": 100 * float(f1.mean())}


def reading_scores(answers: Sequence[Sequence[str]], predicted: Sequence[str]) -> dict[str, float]:
    """Computes exact match and F1 as CMRC 2018 defines them (cmrc2018_evaluate.py, v6).

    Case and punctuation do not count. F1 is that of the longest run of segments that a
    prediction and an answer share, segments being Chinese characters and Latin words; the
    best of a question's answers counts. Words are told apart by NLTK's rules, without the
    sentence splitter that the published script runs before, which needs a model file.
    """
    pairs = list(zip(answers, predicted))
    f1 = [max(_f1(answer, prediction) for answer in right) for right, prediction in pairs]
    exact = [any(_bare(answer) == _bare(prediction) for answer in right) for right, prediction in pairs]
    return {"f1": 100 * float(np.mean(f1)), "exact_match": 100 * float(np.mean(exact))}


def _bare(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _PUNCTUATION)


def _segments(text: str) -> list[str]:
    segments: list[str] = []
    latin = ""
    for character in _bare(text):
        if _CHINESE.match(character):
            segments += [*_WORDS.tokenize(latin), character]
            latin = ""
        else:
            latin += character
    return segments + _WORDS.tokenize(latin)


def _f1(answer: str, prediction: str) -> float:
    a, p = _segments(answer), _segments(prediction)
    shared = SequenceMatcher(None, a, p, autojunk=False).find_longest_match().size
    return 2 * shared / (len(a) + len(p)) if shared else 0.0


def labelling_scores(tags: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Computes precision, recall and F1 of whole entities, by seqeval, as conlleval counts them."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    truth, answers = [list(row) for row in tags], [list(row) for row in predicted]
    return {
        "f1": 100 * float(f1_score(truth, answers)),
        "precision": 100 * float(precision_score(truth, answers, zero_division=0)),
        "recall": 100 * float(recall_score(truth, answers, zero_division=0)),
    }
