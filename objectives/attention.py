"""How a student's attention differs from its teacher's, computed in blocks from queries and keys."""

from __future__ import annotations

from typing import Literal

from backends.interface import QKV, Backend, Tensor
from backends.shape import LayerShape
from objectives.divergence import CE, KL, MSE, PROBABILITY_MSE, between_tokens
from objectives.groups import Tokens

Loss = Literal["mse", "ce", "kl"]
On = Literal["scores", "probabilities"]
Heads = Literal["each", "sum", "mean"]


def attention_loss(
    backend: Backend,
    teacher: QKV,
    student: QKV,
    shapes: tuple[LayerShape, LayerShape],
    tokens: Tokens,
    loss: Loss = "mse",
    on: On = "scores",
    heads: Heads = "each",
) -> Tensor:
    """The loss of scores Q K^T / sqrt(d) between the tokens of each sequence, differentiable in the student's Q, K.

    ``mse`` is the mean over all pairs of tokens, and all heads, of squared differences: of scores, as in TinyBERT (Jiao
    et al., 2020, arXiv:1909.10351) and TextBrewer's `attention_mse`, or of probabilities. ``ce`` is the mean over
    queries and heads of the cross-entropy of probabilities (TextBrewer's `attention_ce`), ``kl`` that less the
    teacher's entropy.

    The heads' scores are compared one by one, or their ``sum`` (`attention_mse_sum`) or ``mean``
    (`attention_ce_mean`). As the sum of Q K^T over heads is that of one head of their whole width, it costs as much as
    one.

    Padding counts nowhere. TinyBERT's code counts padded queries, and keys with a difference of 0;
    TextBrewer's divides by padding only where it is given no mask. TextBrewer reads what transformers calls
    attentions, which are probabilities, where its losses mean scores; these are scores.

    Args:
        teacher, student: of the T tokens, [T, W].
        shapes: of the two layers; their heads are equally many unless they are summed or averaged.
        on: what ``mse`` compares; the others compare probabilities. Sums and means are of scores.
    """
    count = shapes[0].heads if heads == "each" else 1
    scales = None
    if heads != "each":
        of_teacher, of_student = (shape.head_size**-0.5 / (shape.heads if heads == "mean" else 1) for shape in shapes)
        scales = of_teacher, of_student
    divergence = {"ce": CE, "kl": KL, "mse": MSE if on == "scores" else PROBABILITY_MSE}[loss]
    weight = 1.0 / (count * (tokens.pairs if loss == "mse" else tokens.tokens))
    return between_tokens(backend, divergence, teacher[:2], student[:2], tokens, count, scales, weight)
