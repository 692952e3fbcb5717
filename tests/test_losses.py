"""Losses of states, attention and logits, against a float64 oracle and against TextBrewer's own functions."""

import numpy as np
import oracle
import pytest
import torch
from test_relations import captured, gradients
from textbrewer import distiller_utils, losses, schedulers

from backends.interface import QKV
from backends.shape import LayerShape
from objectives import states
from objectives.attention import attention_loss
from objectives.groups import Tokens
from objectives.logits import LogitsLoss, Rows, shift_probabilities

LENGTHS = [5, 1, 3, 0, 3]
MASK = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]


def arrays(seed, *widths):
    random = np.random.default_rng(seed)
    return [random.standard_normal((sum(LENGTHS), width)).astype(np.float32) for width in widths]


def check(backend, loss, inputs, value, expected_gradients):
    """A loss and its gradient in `inputs`, scaled as a loss scaler would."""
    assert loss.item() == pytest.approx(value, rel=1e-5, abs=1e-7)
    for got, expected in zip(gradients(backend, loss * 3.0, inputs), expected_gradients, strict=True):
        np.testing.assert_allclose(backend.numpy(got) / 3.0, expected, atol=2e-6, rtol=2e-4)


def leaves(backend, *tensors):
    return list(captured(backend, [*tensors, tensors[-1], tensors[-1]][:3]))[: len(tensors)]


@pytest.mark.parametrize("blocks", [1 << 19, 1])
@pytest.mark.parametrize("name", list(states.LOSSES))
def test_states_against_the_definition(backend, monkeypatch, name, blocks):
    monkeypatch.setattr("backends.interface.Backend.block_elements", blocks)
    loss = states.LOSSES[name]
    teacher = arrays(1, *[6 if loss.any_width else 4] * loss.layers)
    student = arrays(2, *[4] * loss.layers)
    side = leaves(backend, *student)
    got = loss.compute(backend, [*map(backend.tensor, teacher)], side, Tokens.of(backend, MASK))
    wide = [x.astype(np.float64) for x in teacher]

    def value(*student):
        return oracle.states_loss(name, wide, student, LENGTHS)

    check(backend, got, side, value(*student), oracle.numeric_gradients(value, student))


@pytest.mark.parametrize("name", ["gram", "nst"])
def test_one_layer_may_be_both_of_a_pair(backend, name):
    """TextBrewer's presets relate a layer to itself: both gradients reach it."""
    (teacher,), (student,) = arrays(1, 4), arrays(2, 4)
    (side,) = leaves(backend, student)
    got = states.LOSSES[name].compute(backend, [backend.tensor(teacher)] * 2, [side] * 2, Tokens.of(backend, MASK))
    wide = teacher.astype(np.float64)

    def value(x):
        return oracle.states_loss(name, [wide] * 2, [x] * 2, LENGTHS)

    check(backend, got, [side], value(student), oracle.numeric_gradients(value, [student]))


ATTENTION = [
    *(("mse", on, heads) for on, heads in (("scores", "each"), ("probabilities", "each"), ("scores", "sum"))),
    *(("ce", "scores", heads) for heads in ("each", "mean")),
    ("kl", "scores", "each"),
]


@pytest.mark.parametrize("blocks", [1 << 19, 1])
@pytest.mark.parametrize(("loss", "on", "heads"), ATTENTION)
def test_attention_against_the_definition(backend, monkeypatch, loss, on, heads, blocks):
    monkeypatch.setattr("backends.interface.Backend.block_elements", blocks)
    counts = (3, 3) if heads == "each" else (3, 2)
    shapes = LayerShape(counts[0], 4, 1), LayerShape(counts[1], 2, 1)
    teacher, student = arrays(3, 12, 12, 12), arrays(4, *[2 * counts[1]] * 3)
    side = captured(backend, student)
    got = attention_loss(backend, captured(backend, teacher), side, shapes, Tokens.of(backend, MASK), loss, on, heads)
    wide = [x.astype(np.float64) for x in teacher[:2]]

    def value(*student):
        return oracle.attention_loss(wide, student, LENGTHS, counts, loss, on, heads)

    check(backend, got, list(side[:2]), value(*student[:2]), oracle.numeric_gradients(value, student[:2]))


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("loss", ["kl", "ce", "mse"])
def test_logits_against_the_definition(backend, loss, squared):
    (teacher,), (student,) = arrays(5, 7), arrays(6, 7)
    (side,) = leaves(backend, student)
    count = len(student)
    rows = Rows(backend.tensor(teacher), side, np.full(count, -1), count, 0, student.size)
    got = LogitsLoss(loss, temperature=3.0, squared=squared)(backend, rows)
    wide = teacher.astype(np.float64)

    def value(x):
        return oracle.logits_loss(wide, x, loss, 3.0, squared)

    check(backend, got, [side], value(student), oracle.numeric_gradients(value, [student]))


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("flsw", schedulers.flsw_temperature_scheduler_builder(1.5, 2.0)),
        ("cwsm", schedulers.cwsm_temperature_scheduler_builder(1.5)),
    ],
)
@pytest.mark.parametrize(("loss", "textbrewers"), [("ce", losses.kd_ce_loss), ("mse", losses.kd_mse_loss)])
def test_temperatures_of_each_row_are_textbrewers(backend, schedule, theirs, loss, textbrewers):
    (teacher,), (student,) = arrays(5, 7), arrays(6, 7)
    on_torch = torch.from_numpy(student).requires_grad_()
    temperatures = theirs(on_torch, torch.from_numpy(teacher), 4.0)
    assert temperatures.std() > 0.1
    expected = textbrewers(on_torch, torch.from_numpy(teacher), temperatures)
    (side,) = leaves(backend, student)
    rows = Rows(backend.tensor(teacher), side, np.full(len(student), -1), len(student), 0, student.size)
    got = LogitsLoss(loss, 4.0, temperature_schedule=schedule, beta=1.5, gamma=2.0)(backend, rows)
    check(backend, got, [side], expected.item(), torch.autograd.grad(expected, [on_torch]))


def test_the_gold_class_gets_the_largest_logit(backend):
    (teacher,) = arrays(7, 5)
    targets = np.arange(len(teacher)) % 6 - 1  # some unknown
    before = backend.tensor(teacher)
    shifted = backend.numpy(shift_probabilities(backend, before, targets))
    known = targets >= 0
    expected = teacher.copy()
    expected[known] = distiller_utils.probability_shift_(
        torch.from_numpy(teacher[known]), torch.from_numpy(targets[known])
    ).numpy()
    np.testing.assert_array_equal(shifted, expected)
    assert (shifted[known].argmax(1) == targets[known]).all() and (shifted != teacher).any()
    np.testing.assert_array_equal(backend.numpy(before), teacher)  # theirs changes what it is given


def padded(x, mask):
    """[T, W] -> a tensor [B, L, W] with something at padding that must not count."""
    spread = np.full((*mask.shape, x.shape[1]), 7.0, np.float32)
    spread[mask] = x
    return torch.from_numpy(spread).requires_grad_()


FILLED = MASK[MASK.any(axis=1)]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("mse", losses.hid_mse_loss),
        ("cos", losses.cos_loss),
        ("pkd", losses.pkd_loss),
        ("gram", losses.fsp_loss),
        ("nst", losses.mmd_loss),
    ],
)
def test_states_are_textbrewers(backend, name, theirs):
    loss = states.LOSSES[name]
    teacher, student = (arrays(seed, *[4] * loss.layers) for seed in (1, 2))
    sides = [[padded(x, FILLED) for x in side] for side in (student, teacher)]
    mask = torch.from_numpy(FILLED.astype(np.int64))
    expected = theirs(*(side if loss.layers > 1 else side[0] for side in sides), mask)
    if name == "nst":  # theirs divides products by the batch's length, ours by the width
        expected = expected * (FILLED.shape[1] / 4) ** 2
    side = leaves(backend, *student)
    got = loss.compute(backend, [*map(backend.tensor, teacher)], side, Tokens.of(backend, FILLED))
    gradients_there = [g.numpy()[FILLED] for g in torch.autograd.grad(expected, sides[0])]
    check(backend, got, side, expected.item(), gradients_there)


@pytest.mark.parametrize(
    ("loss", "heads", "theirs"),
    [
        ("mse", "each", losses.att_mse_loss),
        ("mse", "sum", losses.att_mse_sum_loss),
        ("ce", "each", losses.att_ce_loss),
        ("ce", "mean", losses.att_ce_mean_loss),
    ],
)
def test_attention_is_textbrewers(backend, loss, heads, theirs):
    """Of scores whose padded keys are masked, as they are in a BERT before its soft-max."""
    teacher, student = (arrays(seed, 12, 12, 12) for seed in (3, 4))
    inputs = [[padded(x, FILLED) for x in side[:2]] for side in (student, teacher)]

    def scores(q, k):
        q, k = (x.reshape(*FILLED.shape, 3, 4).transpose(1, 2) for x in (q, k))
        bias = torch.from_numpy(np.where(FILLED, 0.0, -1e4)[:, None, None].astype(np.float32))
        return q @ k.transpose(2, 3) / 2.0 + (bias if loss == "ce" else 0.0)

    expected = theirs(*(scores(*side) for side in inputs), torch.from_numpy(FILLED.astype(np.int64)))
    side, shape = captured(backend, student), LayerShape(3, 4, 1)
    got = attention_loss(
        backend,
        captured(backend, teacher),
        QKV(*side),
        (shape, shape),
        Tokens.of(backend, FILLED),
        loss,
        "scores",
        heads,
    )
    gradients_there = [g.numpy()[FILLED] for g in torch.autograd.grad(expected, inputs[0])]
    check(backend, got, list(side[:2]), expected.item(), gradients_there)
