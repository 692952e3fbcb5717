"""The divergence of relations in groups, with its gradient, a block of relation matrices at a time.

The gradient of KL(softmax T || softmax S) is known in closed form: with
``G = weight * (softmax S - softmax T) / sqrt(d)`` a pair ``S = X Y^T / sqrt(d)``
has ``dX = G Y`` and ``dY = G^T X``. So one pass over blocks of relation matrices
gives value and gradient, and no more than a block of them exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from backends.interface import Backend, Ragged, RelationKernel, Tensor
from objectives.groups import Groups, blocks, merge, split


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


def add_divergence(sums: Sums, relation: Relation, groups: Sequence[Groups]) -> None:
    """Adds the divergences of a relation and their gradient, by the backend's kernel where it has one."""
    fused = sums.backend.relation_kernel
    if fused is not None and groups and "float64" not in str(sums.sides[1][0].dtype):
        _add_fused(fused, sums, relation, groups)
    else:
        for group in groups:
            _add_blocks(sums, relation, group)


def _add_blocks(sums: Sums, relation: Relation, groups: Groups) -> None:
    """`add_divergence` for one kind of groups, by tensor operations."""
    name, heads, pairs, coefficient = relation
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
            value, g_i, g_j = kl(sums.backend, (t[i], t[j]), (s[i], s[j]), bias)
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
    name, heads, pairs, coefficient = relation
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


def kl(
    backend: Backend, teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor], bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over rows of KL(softmax teacher || softmax student), and its gradient.

    Args:
        teacher, student: pairs X, Y of [N, n, d]; each side has its own d.
        bias: [N, 1, n] or None, added to the scores of both.

    Returns:
        The sum (a scalar), d sum / d X and d sum / d Y of the student, [N, n, d].
    """

    def log_probabilities(x: Tensor, y: Tensor) -> Tensor:
        scores = x @ y.swapaxes(1, 2)
        return backend.log_softmax(scores if bias is None else scores + bias)

    x, y = student
    scale = x.shape[-1] ** -0.5
    x = x * scale
    log_t = log_probabilities(teacher[0] * teacher[0].shape[-1] ** -0.5, teacher[1])
    log_s = log_probabilities(x, y)
    difference = log_t - log_s
    t = log_t.exp_()
    # softmax S - softmax T, without the rounding errors that a plain difference has where the two are close
    g = log_s.exp_().add_(t).mul_((difference * -0.5).tanh_())
    # Each row of g sums to 0, and with it the sum does not feel rounding errors of the normalisers.
    value = difference.mul_(t).add_(g).sum()
    return value, (g @ y) * scale, g.swapaxes(1, 2) @ x


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
