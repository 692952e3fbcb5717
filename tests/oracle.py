"""Losses of distillation in float64 NumPy, written as their definitions read: full
matrices, loops over samples, positions and heads, no shared code with the project."""

from math import erf

import numpy as np


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _heads(x, count):
    batch, length, width = x.shape
    return x.reshape(batch, length, count, width // count)


def _scores(x, y, relation):
    """[B, L, A, d] twice -> [B, A, L, L], [L, A, B, B] or [B, L, A, A]."""
    pattern = {"token": "bqad,bkad->baqk", "sample": "qlad,klad->laqk", "head": "blqd,blkd->blqk"}[relation]
    return np.einsum(pattern, x, y) / np.sqrt(x.shape[-1])


def _back(g, x, y, relation):
    """The gradient g of the scores -> those of x and y."""
    scale = np.sqrt(x.shape[-1])
    to_x = {"token": "baqk,bkad->bqad", "sample": "laqk,klad->qlad", "head": "blqk,blkd->blqd"}[relation]
    to_y = {"token": "baqk,bqad->bkad", "sample": "laqk,qlad->klad", "head": "blqk,blqd->blkd"}[relation]
    return np.einsum(to_x, g, y) / scale, np.einsum(to_y, g, x) / scale


def _bias_and_weights(mask, heads, relation, padding):
    """What is added to the scores, and what each row's divergence counts."""
    batch, length = mask.shape
    if padding == "ppminilm":
        bias = np.zeros((1, 1, 1, 1))
        if relation == "token":
            bias = np.where(mask[:, None, None, :], 0.0, -1e4)
        shape = {"token": (batch, heads, length), "sample": (length, heads, batch), "head": (batch, length, heads)}
        return bias, np.full(shape[relation], 1.0 / (heads * length * batch))
    big = -1e300
    if relation == "token":
        bias = np.where(mask[:, None, None, :], 0.0, big)
        weights = np.zeros((batch, heads, length))
        filled = [b for b in range(batch) if mask[b].any()]
        for b in filled:
            weights[b] = mask[b] / (len(filled) * heads * mask[b].sum())
    elif relation == "sample":
        bias = np.where(mask.T[:, None, None, :], 0.0, big)
        weights = np.repeat(mask.T[:, None, :], heads, axis=1) / (heads * max(1, mask.sum()))
    else:
        bias = np.zeros((1, 1, 1, 1))
        weights = np.repeat(mask[:, :, None], heads, axis=2) / (heads * max(1, mask.sum()))
    return bias, weights


def relation_loss(teacher, student, mask, heads, alpha, beta, padding, pairs):
    """Loss, unweighted parts and the gradient in the student's [Q, K, V].

    Args:
        teacher, student: three arrays [B, L, D] each.
        mask: [B, L], True at tokens.
        pairs: {"q-k": weight, ...}
    """
    teacher = [_heads(np.asarray(x, np.float64), heads) for x in teacher]
    student = [_heads(np.asarray(x, np.float64), heads) for x in student]
    gradients = [np.zeros_like(x) for x in student]
    mask = np.asarray(mask, bool)
    total, parts = 0.0, {}
    for relation, coefficient in (("token", 1 - alpha - beta), ("head", alpha), ("sample", beta)):
        bias, weights = _bias_and_weights(mask, heads, relation, padding)
        for pair, pair_weight in pairs.items():
            i, j = "qkv".index(pair[0]), "qkv".index(pair[2])
            t = _scores(teacher[i], teacher[j], relation) + bias
            s = _scores(student[i], student[j], relation) + bias
            divergence = (_softmax(t) * (_log_softmax(t) - _log_softmax(s))).sum(-1)
            part = (weights * divergence).sum()
            parts[f"{relation}/{pair}"] = part
            total += coefficient * pair_weight * part
            g = coefficient * pair_weight * weights[..., None] * (_softmax(s) - _softmax(t))
            g_i, g_j = _back(g, student[i], student[j], relation)
            gradients[i] += g_i
            gradients[j] += g_j
    batch, length = mask.shape
    return total, parts, [g.reshape(batch, length, -1) for g in gradients]


def bert(weights, shape, batch):
    """A BERT on a padded batch in float64: its hidden states and Q, K, V, each of all positions, [B * L, .]."""
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    count, length = batch.input_ids.shape
    bias = np.where(batch.attention_mask[:, None, None, :] > 0, 0.0, -1e30)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][batch.input_ids]
    x = x + w["embeddings.token_type_embeddings.weight"][batch.token_type_ids]
    x = norm(x + w["embeddings.position_embeddings.weight"][:length], "embeddings.LayerNorm").reshape(
        count * length, -1
    )
    states, qkvs = [x], []
    for number, layer in enumerate(shape.layers):
        name = f"encoder.layer.{number}"
        qkvs.append([linear(x, f"{name}.attention.self.{side}") for side in ("query", "key", "value")])
        q, k, v = (side.reshape(count, length, layer.heads, -1).swapaxes(1, 2) for side in qkvs[-1])
        context = _softmax(q @ k.swapaxes(2, 3) / np.sqrt(layer.head_size) + bias) @ v
        context = context.swapaxes(1, 2).reshape(count * length, -1)
        x = norm(x + linear(context, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        inner = linear(x, f"{name}.intermediate.dense")
        inner = inner * 0.5 * (1 + np.vectorize(erf)(inner / np.sqrt(2)))
        x = norm(x + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        states.append(x)
    return states, qkvs


def numeric_gradients(function, inputs, step=1e-5):
    """Central differences of a function of arrays, one gradient for each."""
    inputs = [np.array(x, np.float64) for x in inputs]
    gradients = []
    for x in inputs:
        gradients.append(np.zeros_like(x))
        for at in np.ndindex(x.shape):
            before = x[at]
            values = []
            for x[at] in (before + step, before - step):
                values.append(function(*inputs))
            x[at] = before
            gradients[-1][at] = (values[0] - values[1]) / (2 * step)
    return gradients


def states_loss(name, teacher, student, lengths):
    """A loss of hidden states, lists of [T, D] of the sequences' tokens, one sequence's after another's."""
    ends = np.cumsum(lengths)
    sequences = [slice(end - length, end) for end, length in zip(ends, lengths) if length]
    if name == "mse":
        return np.mean((student[0] - teacher[0]) ** 2)
    if name == "cos":
        norms = np.linalg.norm(student[0], axis=1) * np.linalg.norm(teacher[0], axis=1)
        return np.mean(1 - (student[0] * teacher[0]).sum(1) / norms)
    if name == "pkd":
        firsts = [[x[0][one.start] / np.linalg.norm(x[0][one.start]) for one in sequences] for x in (teacher, student)]
        return np.mean([((s - t) ** 2).sum() for t, s in zip(*firsts)])
    if name == "gram":
        grams = [[x[0][one].T @ x[1][one] / (one.stop - one.start) for one in sequences] for x in (teacher, student)]
        return np.mean([np.mean((s - t) ** 2) for t, s in zip(*grams)])
    products = [[x[0][one] @ x[1][one].T / x[0].shape[1] for one in sequences] for x in (teacher, student)]
    return sum(((s - t) ** 2).sum() for t, s in zip(*products)) / sum(s.size for s in products[1])


def attention_loss(teacher, student, lengths, heads, loss, on, over):
    """A loss of attention; sides are (Q, K) of the sequences' tokens, [T, W] each, `heads` those of both."""
    ends = np.cumsum(lengths)
    total, pairs, queries = 0.0, 0, 0
    for end, length in zip(ends, lengths):
        if not length:
            continue
        scores = []
        for (q, k), count in zip((teacher, student), heads):
            q, k = (x[end - length : end].reshape(length, count, -1).swapaxes(0, 1) for x in (q, k))
            scores.append(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
        if over != "each":
            scores = [getattr(np, over)(x, axis=0)[None] for x in scores]
        t, s = scores
        if loss == "mse":
            if on == "probabilities":
                t, s = _softmax(t), _softmax(s)
            total += ((s - t) ** 2).sum()
        else:
            total -= (_softmax(t) * _log_softmax(s)).sum()
            if loss == "kl":
                total += (_softmax(t) * _log_softmax(t)).sum()
        pairs, queries = pairs + s.size, queries + s[..., 0].size
    return total / (pairs if loss == "mse" else queries)


def logits_loss(t, s, loss, temperature=1.0, squared=False):
    """Distillation of logits [R, C]; the temperature is a number, or [R, 1]."""
    t, s = t / temperature, s / temperature
    value = {
        "mse": lambda: np.mean((s - t) ** 2),
        "ce": lambda: -np.mean((_softmax(t) * _log_softmax(s)).sum(1)),
        "kl": lambda: np.mean((_softmax(t) * (_log_softmax(t) - _log_softmax(s))).sum(1)),
    }[loss]()
    return value * (temperature**2 if squared else 1.0)
