"""How a student's hidden states differ from its teacher's.

Every loss here takes the states of the T tokens of a batch, [T, D], of one layer of each model or of two, computes in
float32 and is differentiable in the student's. Padding counts nowhere. They follow TextBrewer's (Yang et al., 2020,
arXiv:2002.12620) under its names, where it is given a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from backends.interface import Backend, Tensor
from objectives.divergence import MSE, as_float, between_tokens, index
from objectives.groups import Tokens, token_groups

Compute = Callable[[Backend, Sequence[Tensor], Sequence[Tensor], Tokens], Tensor]


class StatesLoss(NamedTuple):
    """A loss of hidden states, and what it takes."""

    compute: Compute
    layers: int
    """Of each model."""
    any_width: bool
    """Whether the two models' may differ."""
    of_texts: bool = False
    """Whether it compares texts, each by its first token, and no other tokens."""


def mse(backend: Backend, teacher: Sequence[Tensor], student: Sequence[Tensor], tokens: Tokens) -> Tensor:
    """Mean squared error over tokens and dimensions (TextBrewer's `hidden_mse`, TinyBERT's hidden and embedding losses;
    TinyBERT's code counts padding too)."""
    difference = as_float(student[0]) - as_float(teacher[0])
    return (difference * difference).sum() / (tokens.tokens * difference.shape[1])


def cosine(backend: Backend, teacher: Sequence[Tensor], student: Sequence[Tensor], tokens: Tokens) -> Tensor:
    """Mean over tokens of 1 - cosine, as in DistilBERT (Sanh et al., 2019, arXiv:1910.01108)."""
    return _distances(as_float(teacher[0]), as_float(student[0])) / tokens.tokens


def pkd(backend: Backend, teacher: Sequence[Tensor], student: Sequence[Tensor], tokens: Tokens) -> Tensor:
    """Mean over sequences of the squared distance of their first tokens' states, each of length 1 (Sun et al., 2019,
    arXiv:1908.09355)."""
    lengths = tokens.mask.sum(axis=1)
    first = backend.tensor((lengths.cumsum() - lengths)[lengths > 0])
    return _distances(as_float(teacher[0])[first], as_float(student[0])[first]) * (2.0 / tokens.sequences)


def _distances(t: Tensor, s: Tensor) -> Tensor:
    """The sum over rows of 1 - cosine."""
    # the epsilon of PyTorch's cosine_embedding_loss
    norms = ((s * s).sum(1) + 1e-12) * ((t * t).sum(1) + 1e-12)
    return ((s * t).sum(1) / norms.sqrt() * -1.0 + 1.0).sum()


def gram(backend: Backend, teacher: Sequence[Tensor], student: Sequence[Tensor], tokens: Tokens) -> Tensor:
    """Mean squared error of X^T Y / n over sequences of n tokens, X and Y the states of two layers: [D, D] each
    (the flow of solution procedure of Yim et al., 2017; TextBrewer's `gram` and `fsp`)."""
    (t_x, t_y), (s_x, s_y) = ([as_float(x.detach()) for x in side] for side in (teacher, student))
    width = s_x.shape[1]
    weight = 1.0 / (tokens.sequences * width**2)
    value = backend.zeros([], s_x)
    gradients = [backend.zeros(x.shape, x) for x in (s_x, s_y)]
    for group in token_groups(tokens.mask, 1, "masked"):
        count, size = group.rows.shape
        step = max(1, backend.block_elements // width**2)
        for start in range(0, count, step):
            numbers = group.rows[start : start + step]
            rows = index(backend, tokens.row_of[numbers.reshape(-1)])
            a, b, x, y = (z[rows].reshape([len(numbers), size, -1]) for z in (t_x, t_y, s_x, s_y))
            difference = (x.swapaxes(1, 2) @ y - a.swapaxes(1, 2) @ b) * (1.0 / size)
            value = value + (difference * difference).sum() * weight
            scaled = difference * (2.0 * weight / size)
            for gradient, change in zip(gradients, (y @ scaled.swapaxes(1, 2), x @ scaled)):
                gradient[rows] = change.reshape([-1, width])
    return backend.with_gradient(value, student, gradients)


def nst(backend: Backend, teacher: Sequence[Tensor], student: Sequence[Tensor], tokens: Tokens) -> Tensor:
    """Mean squared error of X Y^T / D over pairs of tokens of a sequence, X and Y the states of two layers (a kind of
    neuron selectivity transfer, Huang & Wang, 2017, arXiv:1707.01219; TextBrewer's `nst` and `mmd`).

    TextBrewer divides by D without a mask, and with one by the batch's length, which makes the loss depend on padding;
    this divides by D.
    """
    scales = 1.0 / teacher[0].shape[1], 1.0 / student[0].shape[1]
    return between_tokens(backend, MSE, teacher, student, tokens, 1, scales, 1.0 / tokens.pairs)


LOSSES = {
    "mse": StatesLoss(mse, 1, False),
    "cos": StatesLoss(cosine, 1, False),
    "pkd": StatesLoss(pkd, 1, False, of_texts=True),
    "gram": StatesLoss(gram, 2, False),
    "nst": StatesLoss(nst, 2, True),
}
