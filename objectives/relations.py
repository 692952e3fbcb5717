"""Multi-head self-attention relation distillation.

MiniLMv2 (Wang et al., 2021, arXiv:2012.15828) lets a student imitate how the
queries (keys, values) of a teacher layer relate to each other: scaled dot
products between tokens, soft-maxed, compared by KL divergence. PP-MiniLM adds
relations between the samples of a batch and between heads.

The gradient of KL(softmax T || softmax S) is known in closed form: with
``G = weight * (softmax S - softmax T) / sqrt(d)`` a pair ``S = X Y^T / sqrt(d)``
has ``dX = G Y`` and ``dY = G^T X``. So one pass over blocks of relation matrices
gives value and gradient, and no more than a block of them exists at a time.

All three relations are one computation on different groups of tokens:

    relation       a group is                   related are
    token-token    the tokens of a sample       tokens, head by head
    sample-sample  the tokens at a position     samples, head by head
    head-head      one token                    its heads

and only tokens that count are in groups, so padding costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from backends.interface import QKV, Backend, Batch, InputError, Model, Ragged, RelationKernel, Tensor

Padding = Literal["masked", "ppminilm"]
RELATIONS = ("token", "head", "sample")
DEFAULT_PAIRS = {"q-q": 1.0, "k-k": 1.0, "v-v": 1.0}


class Groups(NamedTuple):
    """G groups of n tokens each."""

    rows: np.ndarray
    """int64 [G, n], indices into the B * L tokens of the batch."""
    weight: float
    """What one row of one head's relation matrix counts in the loss."""
    bias: np.ndarray | None = None
    """float32 [G, n], added to the scores of each key."""


def _ragged(mask: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The valid entries of each line of `rows`, lines with equally many stacked."""
    counts = mask.sum(axis=1)
    for count in np.unique(counts[counts > 0]):
        lines = counts == count
        yield rows[lines][mask[lines]].reshape(-1, count)


def token_groups(mask: np.ndarray, heads: int, padding: Padding) -> Iterator[Groups]:
    samples, length = mask.shape
    rows = np.arange(samples * length).reshape(samples, length)
    if padding == "ppminilm":
        # A sample without any token has the same bias on all keys, where soft-max ignores it.
        bias = np.where(mask | ~mask.any(axis=1, keepdims=True), 0.0, -1e4).astype(np.float32)
        yield Groups(rows, 1.0 / (heads * length * samples), bias)
        return
    nonempty = int(mask.any(axis=1).sum())
    for group in _ragged(mask, rows):
        yield Groups(group, 1.0 / (nonempty * heads * group.shape[1]))


def sample_groups(mask: np.ndarray, heads: int, padding: Padding) -> Iterator[Groups]:
    samples, length = mask.shape
    rows = np.arange(samples * length).reshape(samples, length).T
    if padding == "ppminilm":
        yield Groups(rows, 1.0 / (heads * length * samples))
        return
    for group in _ragged(mask.T, rows):
        yield Groups(group, 1.0 / (heads * int(mask.sum())))


def head_groups(mask: np.ndarray, heads: int, padding: Padding) -> Iterator[Groups]:
    rows = np.flatnonzero(mask) if padding == "masked" else np.arange(mask.size)
    if rows.size:
        yield Groups(rows[:, None], 1.0 / (heads * rows.size))


GROUPS = {"token": token_groups, "head": head_groups, "sample": sample_groups}


def _kl(
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


def _shares(backend: Backend, mask: np.ndarray) -> dict[str, float]:
    """What this process' mean over samples (token-token) and over tokens (head-head) counts, so that the mean over
    processes is the mean over all samples and tokens."""
    own = np.array([mask.any(axis=1).sum(), mask.sum()], np.float64)
    token, head = backend.world_size * own / np.maximum(1, backend.total(own))
    return {"token": float(token), "head": float(head)}


class Sums(NamedTuple):
    """What a loss is computed from, and what it adds up."""

    backend: Backend
    sides: Sequence[Sequence[Tensor]]
    """Q, K, V of the teacher and of the student, [R, D] each."""
    mask: np.ndarray
    """bool [B, L]."""
    row_of: np.ndarray
    """int64 [B * L], the row among R of each position."""
    gradients: list[Tensor]
    """float32, like the student's; none where no gradient is asked for."""
    parts: dict[str, Tensor]

    def add(self, key: str, value: Tensor) -> None:
        self.parts[key] = self.parts[key] + value


def _sides_of(pair: str) -> tuple[int, int]:
    """q-k -> 0, 1."""
    return "qkv".index(pair[0]), "qkv".index(pair[2])


@dataclass(frozen=True)
class RelationLoss:
    """Relation loss between captured Q, K, V, value and gradient in one pass.

    Per pair X-Y of {q, k, v} with its weight:
    ``(1 - alpha - beta) * token + alpha * head + beta * sample``.

    Args:
        num_relation_heads: A; must divide the widths of teacher and student.
        alpha, beta: weights of the head-head and sample-sample relations.
        padding: ``masked``: padded tokens neither count nor are attended to;
            token-token is the mean over a sample's tokens and heads, then over
            samples (MiniLMv2's 1 / (A |x|)), the others means over counted rows
            and heads. ``ppminilm``: what PaddleNLP's `calc_multi_relation_loss`
            computes, padded queries included, over A * L * B.
        pairs: weight of each relation pair, keyed ``q-q``, ``q-k``, ...
        gather_samples: of several processes with a batch each, relate the samples
            of all, and weigh each batch by its samples and tokens. Values and
            gradients, averaged over the processes, are then those of the whole.

    Raises:
        InputError: a weight or pair that makes no sense.
    """

    num_relation_heads: int
    alpha: float = 0.0
    beta: float = 0.0
    padding: Padding = "masked"
    pairs: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_PAIRS))
    gather_samples: bool = False

    def __post_init__(self) -> None:
        if self.num_relation_heads < 1:
            raise InputError(f"num_relation_heads {self.num_relation_heads}: must be at least 1")
        if min(self.alpha, self.beta) < 0 or self.alpha + self.beta > 1:
            raise InputError(
                f"alpha {self.alpha}, beta {self.beta}: both must be at least 0 and their sum at most 1 "
                "(what remains is the weight of the token-token relation)"
            )
        if self.padding not in ("masked", "ppminilm"):
            raise InputError(f"padding {self.padding!r}: must be masked or ppminilm")
        if self.gather_samples and self.padding != "masked":
            raise InputError(f"gather_samples with padding {self.padding!r}: processes pad differently; use masked")
        if not self.pairs:
            raise InputError("relation pairs: none given; the usual are q-q, k-k and v-v")
        for pair in self.pairs:
            if not (len(pair) == 3 and pair[1] == "-" and {pair[0], pair[2]} <= set("qkv")):
                raise InputError(f"relation pair {pair!r}: must be two of q, k, v joined by '-', as in q-k")

    @property
    def coefficients(self) -> dict[str, float]:
        """Weight of each relation in the loss."""
        token = 1.0 - self.alpha - self.beta
        # Decimal fractions such as 0.7 + 0.3 do not add up to 1 to the last bit.
        return {"token": token if token > 1e-9 else 0.0, "head": self.alpha, "sample": self.beta}

    def check_width(self, width: int, whose: str) -> None:
        """Raises InputError if the relation heads do not divide a hidden size."""
        if width % self.num_relation_heads:
            divisors = [str(n) for n in range(1, width + 1) if width % n == 0]
            raise InputError(
                f"num_relation_heads {self.num_relation_heads}: does not divide the {whose}'s hidden size {width}; "
                f"these do: {', '.join(divisors)}"
            )

    def __call__(
        self, backend: Backend, teacher: QKV, student: QKV, mask: np.ndarray
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, differentiable in the student's Q, K, V.

        Args:
            teacher, student: the batch's tokens, [T, D], or all its positions,
                [B, L, D] or [B * L, D]; the widths may differ. ``ppminilm``
                needs all positions.
            mask: [B, L], nonzero at tokens.

        Returns:
            The loss, a float32 scalar (float64 for float64 input), and its parts
            unweighted, keyed ``<relation>/<pair>`` as in ``token/q-q``.

        Raises:
            InputError: the relation heads do not divide a width.
            ValueError: Q, K, V are not of these tokens.
        """
        parts, gradients = self._compute(backend, teacher, student, mask, self.coefficients, gradient=True)
        return backend.with_gradient(self._weigh(parts), student, gradients), parts

    def evaluate(self, backend: Backend, teacher: QKV, student: QKV, mask: np.ndarray) -> dict[str, Tensor]:
        """Every relation, those of weight 0 too, and the weighted ``loss``; no gradient."""
        parts, _ = self._compute(backend, teacher, student, mask, dict.fromkeys(RELATIONS, 1.0), gradient=False)
        return {"loss": self._weigh(parts), **parts}

    def _weigh(self, parts: Mapping[str, Tensor]) -> Tensor:
        coefficients = self.coefficients
        terms = [
            part * (coefficients[relation] * self.pairs[pair])
            for key, part in parts.items()
            for relation, pair in [key.split("/")]
        ]
        return sum(terms[1:], terms[0])

    def _compute(
        self,
        backend: Backend,
        teacher: QKV,
        student: QKV,
        mask: np.ndarray,
        coefficients: Mapping[str, float],
        gradient: bool,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        mask = np.asarray(mask).astype(bool)
        self.check_width(teacher.q.shape[-1], "teacher")
        self.check_width(student.q.shape[-1], "student")
        sides = [[x.detach().reshape([-1, x.shape[-1]]) for x in side] for side in (teacher, student)]
        sums = self._sums(backend, sides, mask, gradient)
        together = self.gather_samples and backend.world_size > 1
        shares = _shares(backend, mask) if together else {}
        for relation, coefficient in coefficients.items():
            if coefficient == 0.0:
                continue
            for pair in self.pairs:
                sums.parts[f"{relation}/{pair}"] = backend.zeros([], _float(sides[1][0][:1]))
            if relation == "sample" and together:
                self._add_gathered(coefficient, sums)
            else:
                self._add(relation, coefficient, sums, shares.get(relation, 1.0))
        return sums.parts, [g.reshape(x.shape) for g, x in zip(sums.gradients, student)]

    def _sums(self, backend: Backend, sides: Sequence[Sequence[Tensor]], mask: np.ndarray, gradient: bool) -> Sums:
        gradients = [backend.zeros(x.shape, _float(x[:1])) for x in sides[1]] if gradient else []
        return Sums(backend, sides, mask, self._row_of_positions(mask, sides), gradients, {})

    def _add(self, relation: str, coefficient: float, sums: Sums, share: float = 1.0) -> None:
        """Adds `share` times a relation's divergences, and `coefficient` times their gradient."""
        groups = [
            group._replace(weight=share * group.weight)
            for group in GROUPS[relation](sums.mask, self.num_relation_heads, self.padding)
        ]
        fused = sums.backend.relation_kernel
        if fused is not None and groups and "float64" not in str(sums.sides[1][0].dtype):
            self._add_fused(fused, relation, groups, coefficient, sums)
        else:
            for group in groups:
                self._add_blocks(relation, group, coefficient, sums)

    def _add_gathered(self, coefficient: float, sums: Sums) -> None:
        """The sample-sample relation between the samples of all processes, of which each computes some heads."""
        backend, mask, heads = sums.backend, sums.mask, self.num_relation_heads
        shapes = [backend.numpy(x) for x in backend.gather(backend.tensor(np.array(mask.shape)))]
        masks = [backend.numpy(x) for x in backend.gather(backend.tensor(mask.reshape(-1).astype(np.int64)))]
        longest = max(length for _, length in shapes)
        whole = np.concatenate(
            [np.pad(m.reshape(shape), ((0, 0), (0, longest - shape[1]))) for m, shape in zip(masks, shapes)]
        ).astype(bool)
        rows = _index(backend, sums.row_of[mask.reshape(-1)])
        first, last = (heads * rank // backend.world_size for rank in (backend.rank, backend.rank + 1))

        def of_own_heads(x: Tensor) -> Tensor:
            width = x.shape[1] // heads
            return backend.concat([theirs[:, first * width : last * width] for theirs in backend.gather(x[rows])])

        everyone = [[of_own_heads(x) for x in side] for side in sums.sides]
        some = self._sums(backend, everyone, whole, bool(sums.gradients))
        keys = [f"sample/{pair}" for pair in self.pairs]
        some.parts.update({key: sums.parts[key] for key in keys})
        if last > first:
            own_heads = replace(self, num_relation_heads=last - first)
            own_heads._add("sample", coefficient, some, share=(last - first) / heads)
        values = backend.gather(backend.concat([some.parts[key].reshape([1]) for key in keys]))
        totals = sum(values[1:], values[0])
        sums.parts.update({key: totals[i] for i, key in enumerate(keys)})
        begin = sum(int(m.sum()) for m in masks[: backend.rank])
        own = slice(begin, begin + int(mask.sum()))
        for total, change in zip(sums.gradients, some.gradients):
            of_all_heads = backend.concat(backend.gather(change.swapaxes(0, 1)))[:, own].swapaxes(0, 1)
            # Averaging the processes' gradients divides by their number.
            total[rows] = total[rows] + of_all_heads * backend.world_size

    def _add_blocks(self, relation: str, groups: Groups, coefficient: float, sums: Sums) -> None:
        """`_add` for one kind of groups, by blocks of tensor operations."""
        heads = self.num_relation_heads
        for block, first, last in _blocks(groups, heads, relation, sums.backend.block_elements):
            shape = groups.rows[block].shape
            rows = _index(sums.backend, sums.row_of[groups.rows[block]].reshape(-1))
            columns = [slice(first * x[0].shape[1] // heads, last * x[0].shape[1] // heads) for x in sums.sides]
            t, s = (
                [_split(_float(x[rows][:, part]), last - first, relation, shape) for x in side]
                for side, part in zip(sums.sides, columns)
            )
            bias = None
            if groups.bias is not None:
                bias = sums.backend.tensor(groups.bias[block].repeat(last - first, axis=0)[:, None, :])
            for pair, pair_weight in self.pairs.items():
                i, j = _sides_of(pair)
                value, g_i, g_j = _kl(sums.backend, (t[i], t[j]), (s[i], s[j]), bias)
                sums.add(f"{relation}/{pair}", value * groups.weight)
                weight = coefficient * pair_weight * groups.weight
                # of a pair with itself, in one piece
                changes = [(i, g_i.add_(g_j))] if i == j else [(i, g_i), (j, g_j)]
                for which, change in changes if sums.gradients else ():
                    total = sums.gradients[which]
                    change = _merge(change * weight, last - first, relation, shape)
                    total[rows, columns[1]] = total[rows, columns[1]] + change

    def _add_fused(
        self,
        fused: Callable[[Ragged], RelationKernel],
        relation: str,
        groups: Sequence[Groups],
        coefficient: float,
        sums: Sums,
    ) -> None:
        """`_add` for all groups, by the backend's kernel."""
        heads = self.num_relation_heads
        rows = np.concatenate([sums.row_of[group.rows].reshape(-1) for group in groups])
        sizes = np.concatenate([np.full(len(group.rows), group.rows.shape[1]) for group in groups])
        if relation == "head":  # a token's heads are what is related: each is a row of its own
            rows = (rows[:, None] * heads + np.arange(heads)).reshape(-1)
            sizes = np.full(len(rows) // heads, heads)
        weights = np.concatenate([np.full(len(group.rows), group.weight) for group in groups])
        biases = [group.bias.reshape(-1) for group in groups if group.bias is not None]
        bias = np.concatenate(biases) if biases else None
        kernel = fused(Ragged(rows, sizes, weights, bias, 1 if relation == "head" else heads))
        gradients = sums.gradients or [sums.backend.zeros(x.shape, _float(x[:1])) for x in sums.sides[1]]
        t, s, changed = (
            [x.reshape([-1, x.shape[1] // heads]) for x in side] if relation == "head" else list(side)
            for side in (*sums.sides, gradients)
        )
        for pair, pair_weight in self.pairs.items():
            i, j = _sides_of(pair)
            value = kernel.add((t[i], t[j]), (s[i], s[j]), (changed[i], changed[j]), coefficient * pair_weight)
            sums.add(f"{relation}/{pair}", value)

    def _row_of_positions(self, mask: np.ndarray, sides: Sequence[Sequence[Tensor]]) -> np.ndarray:
        """The rows of Q, K, V that hold each of the B * L positions."""
        rows = {int(x.shape[0]) for side in sides for x in side}
        if rows == {mask.size}:
            return np.arange(mask.size)
        if self.padding == "ppminilm":
            raise ValueError(f"Q, K, V have {rows} rows: padding 'ppminilm' compares all {mask.size} positions")
        if rows != {int(mask.sum())}:
            raise ValueError(
                f"Q, K, V have {rows} rows; the mask has {mask.size} positions, {mask.sum()} of them tokens"
            )
        return mask.reshape(-1).cumsum() - 1


def _blocks(groups: Groups, heads: int, relation: str, most: int) -> Iterator[tuple[slice, int, int]]:
    """Cuts groups into blocks of relation matrices with at most so many elements (but at least
    a matrix): (groups, first head, end of heads)."""
    count, size = groups.rows.shape
    elements = heads**2 * size if relation == "head" else heads * size**2
    step = max(1, most // elements)
    head_step = heads
    if relation != "head" and elements > most:
        head_step = max(1, most // size**2)
    for start in range(0, count, step):
        for first in range(0, heads, head_step):
            yield slice(start, start + step), first, min(first + head_step, heads)


def _index(backend: Backend, rows: np.ndarray) -> Any:
    """Rows as a slice where they lie together, which copies nothing; else as a tensor."""
    if rows[-1] - rows[0] + 1 == rows.size and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return backend.tensor(rows)


def _float(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x if "float64" in str(x.dtype) else x.float()


def _split(x: Tensor, heads: int, relation: str, shape: Sequence[int]) -> Tensor:
    """Tokens of groups [G * n, heads * d] -> the vectors that are related, [N, n', d]."""
    count, size = shape
    x = x.reshape([count, size, heads, -1])
    if relation == "head":
        return x.reshape([count * size, heads, -1])
    return x.swapaxes(1, 2).reshape([count * heads, size, -1])


def _merge(x: Tensor, heads: int, relation: str, shape: Sequence[int]) -> Tensor:
    """The reverse of `_split`."""
    count, size = shape
    if relation != "head":
        x = x.reshape([count, heads, size, -1]).swapaxes(1, 2)
    return x.reshape([count * size, -1])


def check_layers(
    loss: RelationLoss,
    layer_pairs: Sequence[tuple[int, int]],
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
) -> None:
    """Raises InputError if the models of these configurations cannot be related:
    a layer is not there, or the relation heads do not divide a hidden size."""
    for whose, config, layers in (
        ("teacher", teacher, [layer for layer, _ in layer_pairs]),
        ("student", student, [layer for _, layer in layer_pairs]),
    ):
        loss.check_width(config["hidden_size"], whose)
        for layer in layers:
            if not 0 <= layer < config["num_hidden_layers"]:
                raise InputError(
                    f"{whose}_layer_index {layer}: the {whose} has layers 0 to {config['num_hidden_layers'] - 1}"
                )


@dataclass(frozen=True)
class RelationDistillation:
    """Relation losses between layers of a teacher and a student, summed over the layer pairs.

    Only the layers up to the captured ones run. The student layer whose Q, K, V
    are matched gets no gradient in its attention output and feed-forward weights.

    Args:
        layer_pairs: (teacher layer, student layer), from 0.

    Raises:
        InputError: a layer that is not there, or relation heads that do not
            divide a hidden size.
    """

    backend: Backend
    teacher: Model
    student: Model
    loss: RelationLoss
    layer_pairs: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        check_layers(self.loss, self.layer_pairs, self.teacher.config, self.student.config)

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its unweighted parts (see `RelationLoss`)."""
        losses, all_parts = [], []
        for teacher, student in self._captured(batch):
            loss, parts = self.loss(self.backend, teacher, student, batch.attention_mask)
            losses.append(loss)
            all_parts.append(parts)
        return sum(losses[1:], losses[0]), _add(all_parts)

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Every relation of a batch, without gradient (see `RelationLoss.evaluate`)."""
        with self.backend.no_grad():
            return _add(
                [
                    self.loss.evaluate(self.backend, teacher, student, batch.attention_mask)
                    for teacher, student in self._captured(batch)
                ]
            )

    def _captured(self, batch: Batch) -> list[tuple[QKV, QKV]]:
        teacher_layers, student_layers = zip(*self.layer_pairs)
        with self.backend.autocast():
            padded = self.loss.padding == "ppminilm"
            with self.backend.no_grad():
                teacher = self.teacher.qkv(batch, teacher_layers, padded)
            student = self.student.qkv(batch, student_layers, padded)
        return [(teacher[t], student[s]) for t, s in self.layer_pairs]


def _add(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums dictionaries key by key."""
    return {key: sum((p[key] for p in parts[1:]), parts[0][key]) for key in parts[0]}
