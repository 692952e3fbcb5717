"""The relation loss against a float64 oracle and against paddlenlp's own function."""

import numpy as np
import oracle
import pytest
from conftest import TINY, make_batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.files import InputError
from backends.interface import QKV
from objectives.distillation import Distillation, relation_matches
from objectives.relations import DEFAULT_PAIRS, RelationLoss

PAIRS = [{**DEFAULT_PAIRS}, {"q-k": 1.0}, {"q-q": 0.5, "v-k": 2.0, "k-v": 0.25}]


@st.composite
def problems(draw):
    """Shapes, masks, head counts and weights; widths differ between the sides."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, length = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    widths = [heads * draw(st.integers(1, 6)) for _ in range(2)]
    kind = draw(st.sampled_from(["ragged", "random", "full", "empty line"]))
    mask = np.arange(length) < random.integers(1, length + 1, (batch, 1))
    if kind == "random":
        mask = random.random((batch, length)) < 0.6
    elif kind == "full":
        mask[:] = True
    elif kind == "empty line":
        mask[0] = False
    alpha, beta = draw(st.sampled_from([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.2, 0.3), (0.5, 0.5)]))
    scale = draw(st.sampled_from([0.5, 1.0, 4.0]))
    teacher, student = (
        [(scale * random.standard_normal((batch, length, width))).astype(np.float32) for _ in range(3)]
        for width in widths
    )
    padding = draw(st.sampled_from(["masked", "ppminilm"]))
    return teacher, student, mask, heads, alpha, beta, padding, draw(st.sampled_from(PAIRS))


def gradients(backend, loss, inputs):
    if backend.name == "torch":
        import torch

        return torch.autograd.grad(loss, inputs)
    import paddle

    return paddle.grad(loss, inputs)


def captured(backend, arrays):
    """Tensors that gradients reach, as a model's Q, K, V are."""
    tensors = [backend.tensor(array) for array in arrays]
    for tensor in tensors:
        if backend.name == "torch":
            tensor.requires_grad_()
        else:
            tensor.stop_gradient = False
    return QKV(*tensors)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_loss_and_gradient_against_oracle(backend, problem):
    teacher, student, mask, heads, alpha, beta, padding, pairs = problem
    expected, parts, expected_gradients = oracle.relation_loss(*problem)
    side = captured(backend, student)
    loss, got = RelationLoss(heads, alpha, beta, padding, pairs)(backend, captured(backend, teacher), side, mask)
    # float32 scores resolve divergences to about 1e-8, whatever their size
    assert backend.numpy(loss) == pytest.approx(expected, rel=1e-5, abs=1e-8)
    for key, part in got.items():
        assert backend.numpy(part) == pytest.approx(parts[key], rel=1e-5, abs=1e-8)
    # Scaled, as a loss scaler would
    got_gradients = gradients(backend, loss * 3.0, list(side))
    norm = np.sqrt(sum((g**2).sum() for g in expected_gradients))
    difference = np.sqrt(
        sum(((backend.numpy(g) / 3.0 - e) ** 2).sum() for g, e in zip(got_gradients, expected_gradients))
    )
    # nor do gradients get finer than float32 resolves probabilities, where soft-max is all but saturated
    floor = 1e-7 * np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in student)) / len(mask)
    assert difference <= 1e-4 * norm + floor


def test_blocks_do_not_change_the_result(backend, monkeypatch):
    random = np.random.default_rng(0)
    teacher, student = ([random.standard_normal((4, 9, 24)).astype(np.float32) for _ in range(3)] for _ in range(2))
    mask = np.arange(9) < np.array([[9], [4], [4], [7]])
    loss = RelationLoss(6, 0.2, 0.3)
    results = []
    for elements in (1 << 21, 1):
        monkeypatch.setattr("backends.interface.Backend.block_elements", elements)
        side = captured(backend, student)
        value, _ = loss(backend, captured(backend, teacher), side, mask)
        results.append([backend.numpy(x) for x in (value, *gradients(backend, value, list(side)))])
    for whole, blocks in zip(*results):
        np.testing.assert_allclose(whole, blocks, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.3, 0.3)])
def test_ppminilm_padding_is_paddlenlps(paddle_backend, torch_backend, alpha, beta):
    """In float64, where paddlenlp's -1e4 on padded keys does not round scores."""
    import paddle
    from paddlenlp.transformers.distill_utils import calc_multi_relation_loss

    heads, random = 8, np.random.default_rng(1)
    batch, length, (t_heads, s_heads) = 5, 11, (6, 4)
    mask = np.arange(length) < np.array([[11], [3], [7], [1], [7]])
    teacher, student = ([random.standard_normal((batch, length, width)) for _ in range(3)] for width in (48, 32))
    paddle.set_default_dtype("float64")
    try:
        bias = paddle.to_tensor(np.where(mask, 0.0, -1e4)[:, None, None, :])
        total = 0.0
        for t, s in zip(teacher, student):
            t = paddle.to_tensor(t.reshape(batch, length, t_heads, -1).swapaxes(1, 2))
            s = paddle.to_tensor(s.reshape(batch, length, s_heads, -1).swapaxes(1, 2))
            total += calc_multi_relation_loss(paddle.nn.KLDivLoss("sum"), s, t, bias, heads, alpha, beta)
        expected = float(total) / (heads * length * batch)
    finally:
        paddle.set_default_dtype("float32")
    for backend in (torch_backend, paddle_backend):
        loss, _ = RelationLoss(heads, alpha, beta, "ppminilm")(
            backend, captured(backend, teacher), captured(backend, student), mask
        )
        assert float(backend.numpy(loss)) == pytest.approx(expected, rel=1e-5)


def test_masked_padding_is_the_papers_mean(backend):
    """1 / (A |x|) per sample: a sample alone weighs as much as in a batch, and padding nothing."""
    random = np.random.default_rng(2)
    teacher, student = ([random.standard_normal((2, 6, 16)).astype(np.float32) for _ in range(3)] for _ in range(2))
    mask = np.array([[1] * 6, [1, 1, 0, 0, 0, 0]])
    loss = RelationLoss(4)
    both, _ = loss(backend, captured(backend, teacher), captured(backend, student), mask)
    alone = [
        loss(
            backend,
            captured(backend, [x[i : i + 1, :n] for x in teacher]),
            captured(backend, [x[i : i + 1, :n] for x in student]),
            mask[i : i + 1, :n],
        )[0].item()
        for i, n in ((0, 6), (1, 2))
    ]
    assert both.item() == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_evaluate_gives_every_relation(backend):
    student = backend.model(TINY)
    teacher = backend.model({**TINY, "hidden_size": 48, "num_hidden_layers": 4})
    distillation = Distillation(
        backend, teacher, student, relation_matches(RelationLoss(8, beta=1.0), [(3, 2), (1, 0)])
    )
    batch = make_batch([5, 3])
    values = distillation.evaluate(batch)
    assert {key.split("/")[0] for key in values} == {"loss", "token", "head", "sample"}
    loss, parts = distillation(batch)
    assert set(parts) == {"sample/q-q", "sample/k-k", "sample/v-v"}
    assert loss.item() == pytest.approx(values["loss"].item(), rel=1e-5)
    assert values["token/q-q"].item() > 0


def test_only_what_the_captured_layer_needs_is_trained(backend):
    """No gradient in the matched layer's output and feed-forward weights, nor above it."""
    backend.seed(0)
    student, teacher = backend.model(TINY), backend.model(TINY)
    distillation = Distillation(backend, teacher, student, relation_matches(RelationLoss(8), [(2, 1)]))
    before = student.weights()
    optimizer = backend.optimizer(student, weight_decay=0.0, adam_epsilon=1e-8, max_grad_norm=1.0, loss_scale=1.0)
    optimizer.backward(distillation(make_batch([6, 4]))[0])
    optimizer.step(1e-2)
    moved = {name for name, array in student.weights().items() if not np.array_equal(array, before[name])}
    still = set(before) - moved
    assert {"encoder.layer.1.attention.output.dense.weight", "encoder.layer.1.intermediate.dense.weight"} <= still
    assert all(name in still for name in before if name.startswith(("encoder.layer.2.", "pooler.")))
    assert {"encoder.layer.1.attention.self.value.weight", "encoder.layer.0.output.dense.weight"} <= moved


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_relation_heads": 0}, "num_relation_heads 0"),
        ({"num_relation_heads": 4, "alpha": 0.6, "beta": 0.6}, "alpha 0.6, beta 0.6"),
        ({"num_relation_heads": 4, "beta": -0.1}, "beta -0.1"),
        ({"num_relation_heads": 4, "padding": "none"}, "padding 'none'"),
        ({"num_relation_heads": 4, "pairs": {"q-x": 1.0}}, "relation pair 'q-x'"),
        ({"num_relation_heads": 4, "pairs": {}}, "relation pairs"),
    ],
)
def test_senseless_losses_are_refused(arguments, says):
    with pytest.raises(InputError, match=says):
        RelationLoss(**arguments)


def test_models_that_cannot_be_related_are_refused(torch_backend):
    teacher, student = torch_backend.model({**TINY, "hidden_size": 48}), torch_backend.model(TINY)
    with pytest.raises(InputError, match="the width 32 of the student's Q, K, V; these do: 1, 2, 4, 8, 16, 32"):
        Distillation(torch_backend, teacher, student, relation_matches(RelationLoss(6), [(2, 2)]))
    with pytest.raises(InputError, match="teacher_layer_index 3: the teacher has layers 0 to 2"):
        Distillation(torch_backend, teacher, student, relation_matches(RelationLoss(8), [(3, 2)]))
