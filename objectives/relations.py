"""Multi-head self-attention relations as a loss.

MiniLMv2 (Wang et al., 2021, arXiv:2012.15828) lets a student imitate how the
queries (keys, values) of a teacher layer relate to each other: scaled dot
products between tokens, soft-maxed, compared by KL divergence. PP-MiniLM adds
relations between the samples of a batch and between heads. All three are one
computation (`objectives.divergence`) on different groups (`objectives.groups`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from backends.files import InputError
from backends.interface import QKV, Backend, Tensor
from objectives.divergence import Relation, Sums, add_divergence, as_float, index
from objectives.groups import GROUPS, RELATIONS, Padding

DEFAULT_PAIRS = {"q-q": 1.0, "k-k": 1.0, "v-v": 1.0}


def _shares(backend: Backend, mask: np.ndarray) -> dict[str, float]:
    """What this process' mean over samples (token-token) and over tokens (head-head) counts, so that the mean over
    processes is the mean over all samples and tokens."""
    own = np.array([mask.any(axis=1).sum(), mask.sum()], np.float64)
    token, head = backend.world_size * own / np.maximum(1, backend.total(own))
    return {"token": float(token), "head": float(head)}


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
        """Raises InputError if the relation heads do not divide the width of a layer's Q, K, V."""
        if width % self.num_relation_heads:
            divisors = [str(n) for n in range(1, width + 1) if width % n == 0]
            raise InputError(
                f"num_relation_heads {self.num_relation_heads}: does not divide the width {width} of the {whose}'s "
                f"Q, K, V; these do: {', '.join(divisors)}"
            )

    def __call__(
        self, backend: Backend, teacher: QKV, student: QKV, mask: np.ndarray
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, differentiable in the student's Q, K, V.

        Args:
            teacher, student: the batch's tokens, [T, W], or all its positions,
                [B, L, W] or [B * L, W]; the widths may differ. ``ppminilm``
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
        for name, coefficient in coefficients.items():
            if coefficient == 0.0:
                continue
            relation = Relation(name, self.num_relation_heads, self.pairs, coefficient)
            for pair in self.pairs:
                sums.parts[f"{name}/{pair}"] = backend.zeros([], as_float(sides[1][0][:1]))
            if name == "sample" and together:
                self._add_gathered(relation, sums, mask)
            else:
                self._add(relation, sums, mask, shares.get(name, 1.0))
        return sums.parts, [g.reshape(x.shape) for g, x in zip(sums.gradients, student)]

    def _sums(self, backend: Backend, sides: Sequence[Sequence[Tensor]], mask: np.ndarray, gradient: bool) -> Sums:
        gradients = [backend.zeros(x.shape, as_float(x[:1])) for x in sides[1]] if gradient else []
        return Sums(backend, sides, self._row_of_positions(mask, sides), gradients, {})

    def _add(self, relation: Relation, sums: Sums, mask: np.ndarray, share: float) -> None:
        """Adds `share` times the divergences of a relation and their gradient."""
        groups = GROUPS[relation.name](mask, relation.heads, self.padding)
        add_divergence(sums, relation, [group._replace(weight=share * group.weight) for group in groups])

    def _add_gathered(self, relation: Relation, sums: Sums, mask: np.ndarray) -> None:
        """The sample-sample relation between the samples of all processes, of which each computes some heads."""
        backend, heads = sums.backend, relation.heads
        shapes = [backend.numpy(x) for x in backend.gather(backend.tensor(np.array(mask.shape)))]
        masks = [backend.numpy(x) for x in backend.gather(backend.tensor(mask.reshape(-1).astype(np.int64)))]
        longest = max(length for _, length in shapes)
        whole = np.concatenate(
            [np.pad(m.reshape(shape), ((0, 0), (0, longest - shape[1]))) for m, shape in zip(masks, shapes)]
        ).astype(bool)
        rows = index(backend, sums.row_of[mask.reshape(-1)])
        first, last = (heads * rank // backend.world_size for rank in (backend.rank, backend.rank + 1))

        def of_own_heads(x: Tensor) -> Tensor:
            width = x.shape[1] // heads
            return backend.concat([theirs[:, first * width : last * width] for theirs in backend.gather(x[rows])])

        everyone = [[of_own_heads(x) for x in side] for side in sums.sides]
        gathered = self._sums(backend, everyone, whole, bool(sums.gradients))
        keys = [f"sample/{pair}" for pair in self.pairs]
        gathered.parts.update({key: sums.parts[key] for key in keys})
        if last > first:
            self._add(relation._replace(heads=last - first), gathered, whole, share=(last - first) / heads)
        values = backend.gather(backend.concat([gathered.parts[key].reshape([1]) for key in keys]))
        totals = sum(values[1:], values[0])
        sums.parts.update({key: totals[i] for i, key in enumerate(keys)})
        begin = sum(int(m.sum()) for m in masks[: backend.rank])
        own = slice(begin, begin + int(mask.sum()))
        for total, change in zip(sums.gradients, gathered.gradients):
            of_all_heads = backend.concat(backend.gather(change.swapaxes(0, 1)))[:, own].swapaxes(0, 1)
            # Averaging the processes' gradients divides by their number.
            total[rows] = total[rows] + of_all_heads * backend.world_size

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
