"""How much matrices of scores differ, with the gradient, a block of matrices at a time.

The gradient of KL(softmax T || softmax S) is known in closed form: with
``G = weight * (softmax S - softmax T) / sqrt(d)`` a pair ``S = X Y^T / sqrt(d)``
has ``dX = G Y`` and ``dY = G^T X``. So it is for every `Divergence` of scores, with another G.
So one pass over blocks of relation matrices gives value and gradient, and no more than a block of them exists at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from backends.interface import Backend, Ragged, RelationKernel, Tensor
from objectives.groups import Groups, Tokens, blocks, merge, split, token_groups


class Divergence(NamedTuple):
    """How much rows of scores of a teacher and a student, [..., n], differ."""

    prepare: Callable[[Backend, Tensor], Tensor]
    """What of the scores is compared, in float32; a new tensor, or the scores as they are."""
    compare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Teacher's and student's prepared scores, which it may overwrite -> the sum over rows, and its gradient in the
    student's scores."""


def _log_softmax(backend: Backend, scores: Tensor) -> Tensor:
    return backend.log_softmax(scores)


def _softmax(backend: Backend, scores: Tensor) -> Tensor:
    return backend.log_softmax(scores).exp_()


def _as_is(backend: Backend, scores: Tensor) -> Tensor:
    return scores


def _kl(log_t: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
    difference = log_t - log_s
    t = log_t.exp_()
    # softmax S - softmax T, without the rounding errors that a plain difference has where the two are close
    g = log_s.exp_().add_(t).mul_((difference * -0.5).tanh_())
    # Each row of g sums to 0, and with it the sum does not feel rounding errors of the normalisers.
    return difference.mul_(t).add_(g).sum(), g


def _cross_entropy(log_t: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
    entropy = (log_t.exp() * log_t).sum() * -1.0
    value, g = _kl(log_t, log_s)
    return value + entropy, g


def _squares(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    difference = s - t
    return (difference * difference).sum(), difference * 2.0


def _squares_of_probabilities(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    value, g = _squares(t, s)
    mean = (g * s).sum(-1)
    return value, s * (g - mean.reshape([*mean.shape, 1]))


KL = Divergence(_log_softmax, _kl)
"""KL(softmax T || softmax S) of each row."""
CE = Divergence(_log_softmax, _cross_entropy)
"""Cross-entropy, -softmax T log softmax S: KL and the teacher's entropy, so of the same gradient."""
MSE = Divergence(_as_is, _squares)
"""Squared differences of scores, summed."""
PROBABILITY_MSE = Divergence(_softmax, _squares_of_probabilities)
"""Squared differences of the soft-maxed scores, summed."""


class Sums(NamedTuple):
    """What a loss is computed from, and what it adds up."""

    backend: Backend
    sides: Sequence[Sequence[Tensor]]
    """Q, K, V of the teacher and of the student, [R, W] each."""
    row_of: np.ndarray
    """int64 [B * L], the row among R of each position."""
    gradients: list[Tensor]
    """float32, like the student's; none where no gradient is asked for."""
    parts: dict[str, Tensor]

    def add(self, key: str, value: Tensor) -> None:
        self.parts[key] = self.parts[key] + value


class Relation(NamedTuple):
    """What is related, and how much it counts."""

    name: str
    """token, head or sample."""
    heads: int
    pairs: Mapping[str, float]
    """Which of Q, K, V are related, as in ``q-k``, each with its weight."""
    coefficient: float
    """Of the gradient."""
    divergence: Divergence = KL
    scales: tuple[float, float] | None = None
    """Of the teacher's and the student's products; without, 1 / sqrt(d)."""


def add_divergence(sums: Sums, relation: Relation, groups: Sequence[Groups]) -> None:
    """Adds the divergences of a relation and their gradient, by the backend's kernel where it has one."""
    fused = sums.backend.relation_kernel if relation.divergence is KL and relation.scales is None else None
    if fused is not None and groups and "float64" not in str(sums.sides[1][0].dtype):
        _add_fused(fused, sums, relation, groups)
    else:
        for group in groups:
            _add_blocks(sums, relation, group)


def _add_blocks(sums: Sums, relation: Relation, groups: Groups) -> None:
    """`add_divergence` for one kind of groups, by tensor operations."""
    name, heads, pairs, coefficient, divergence, scales = relation
    for block, first, last in blocks(groups, heads, name, sums.backend.block_elements):
        shape = groups.rows[block].shape
        rows = index(sums.backend, sums.row_of[groups.rows[block]].reshape(-1))
        columns = [slice(first * x[0].shape[1] // heads, last * x[0].shape[1] // heads) for x in sums.sides]
        t, s = (
            [split(as_float(x[rows][:, part]), last - first, name, shape) for x in side]
            for side, part in zip(sums.sides, columns)
        )
        bias = None
        if groups.bias is not None:
            bias = sums.backend.tensor(groups.bias[block].repeat(last - first, axis=0)[:, None, :])
        for pair, pair_weight in pairs.items():
            i, j = _sides_of(pair)
            value, g_i, g_j = compare(sums.backend, divergence, (t[i], t[j]), (s[i], s[j]), bias, scales)
            sums.add(f"{name}/{pair}", value * groups.weight)
            weight = coefficient * pair_weight * groups.weight
            # of a pair with itself, in one piece
            changes = [(i, g_i.add_(g_j))] if i == j else [(i, g_i), (j, g_j)]
            for which, change in changes if sums.gradients else ():
                total = sums.gradients[which]
                change = merge(change * weight, last - first, name, shape)
                total[rows, columns[1]] = total[rows, columns[1]] + change


def _add_fused(
    fused: Callable[[Ragged], RelationKernel], sums: Sums, relation: Relation, groups: Sequence[Groups]
) -> None:
    """`add_divergence` by the backend's kernel."""
    name, heads, pairs, coefficient, *_ = relation
    rows = np.concatenate([sums.row_of[group.rows].reshape(-1) for group in groups])
    sizes = np.concatenate([np.full(len(group.rows), group.rows.shape[1]) for group in groups])
    if name == "head":  # a token's heads are what is related: each is a row of its own
        rows = (rows[:, None] * heads + np.arange(heads)).reshape(-1)
        sizes = np.full(len(rows) // heads, heads)
    weights = np.concatenate([np.full(len(group.rows), group.weight) for group in groups])
    biases = [group.bias.reshape(-1) for group in groups if group.bias is not None]
    bias = np.concatenate(biases) if biases else None
    kernel = fused(Ragged(rows, sizes, weights, bias, 1 if name == "head" else heads))
    gradients = sums.gradients or [sums.backend.zeros(x.shape, as_float(x[:1])) for x in sums.sides[1]]
    t, s, changed = (
        [x.reshape([-1, x.shape[1] // heads]) for x in side] if name == "head" else list(side)
        for side in (*sums.sides, gradients)
    )
    for pair, pair_weight in pairs.items():
        i, j = _sides_of(pair)
        value = kernel.add((t[i], t[j]), (s[i], s[j]), (changed[i], changed[j]), coefficient * pair_weight)
        sums.add(f"{name}/{pair}", value)


def compare(
    backend: Backend,
    divergence: Divergence,
    teacher: tuple[Tensor, Tensor],
    student: tuple[Tensor, Tensor],
    bias: Tensor | None = None,
    scales: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of scores X Y^T, summed over rows, and its gradient.

    Args:
        teacher, student: pairs X, Y of [N, n, d]; each side has its own d.
        bias: [N, 1, n] or None, added to the scores of both.
        scales: of the teacher's and the student's products; without, 1 / sqrt(d).

    Returns:
        The sum (a scalar), d sum / d X and d sum / d Y of the student, [N, n, d].
    """

    def prepared(x: Tensor, y: Tensor) -> Tensor:
        scores = x @ y.swapaxes(1, 2)
        return divergence.prepare(backend, scores if bias is None else scores + bias)

    scale_t, scale = scales or (teacher[0].shape[-1] ** -0.5, student[0].shape[-1] ** -0.5)
    x, y = student
    x = x * scale
    value, g = divergence.compare(prepared(teacher[0] * scale_t, teacher[1]), prepared(x, y))
    return value, (g @ y) * scale, g.swapaxes(1, 2) @ x


def between_tokens(
    backend: Backend,
    divergence: Divergence,
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    tokens: Tokens,
    heads: int,
    scales: tuple[float, float] | None,
    weight: float,
) -> Tensor:
    """The divergence of products between the tokens of each sequence, differentiable in the student's; no matrix of
    them is kept.

    Args:
        teacher, student: X and Y of the T tokens, [T, heads * d].
        scales: of the teacher's and the student's products; without, 1 / sqrt(d).
        weight: what a row of one head's matrix counts.

    Returns:
        A float32 scalar (float64 for float64 input).
    """
    sides = [[x.detach() for x in side] for side in (teacher, student)]
    gradients = [backend.zeros(x.shape, as_float(x[:1])) for x in sides[1]]
    sums = Sums(backend, sides, tokens.row_of, gradients, {"token/q-k": backend.zeros([], as_float(sides[1][0][:1]))})
    relation = Relation("token", heads, {"q-k": 1.0}, 1.0, divergence, scales)
    groups = token_groups(tokens.mask, heads, "masked")
    add_divergence(sums, relation, [group._replace(weight=weight) for group in groups])
    return backend.with_gradient(sums.parts["token/q-k"], student, gradients)


def _sides_of(pair: str) -> tuple[int, int]:
    """q-k -> 0, 1."""
    return "qkv".index(pair[0]), "qkv".index(pair[2])


def index(backend: Backend, rows: np.ndarray) -> Any:
    """Rows as a slice where they lie together, which copies nothing; else as a tensor."""
    if rows[-1] - rows[0] + 1 == rows.size and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return backend.tensor(rows)


def as_float(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x if "float64" in str(x.dtype) else x.float()
