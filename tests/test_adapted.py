"""Modules of the user's as teachers and students."""

import numpy as np
import pytest
from conftest import TINY, make_batch

from backends.files import InputError
from backends.interface import PROJECTIONS, QKV, Outputs, Wanted
from objectives.distillation import AttentionMatch, Distillation, LogitsMatch, Projection, StatesMatch
from objectives.logits import LogitsLoss
from objectives.matches import Models, matches_of
from text.features import LabelledBatch
from training.loop import TrainingArguments, train

LABELLED = {**TINY, "id2label": {0: "a", 1: "b", 2: "c"}}


def library_bert(backend, head="token_classification"):
    """A BERT of the framework's library, and the same as the library runs it, whose function tells all it has."""
    model = backend.model(LABELLED, head=head)

    def forward(module, inputs):
        ids, types, mask = inputs
        if backend.name == "torch":
            bert, keys = module.bert, {"output_hidden_states": True, "return_dict": True}
            states = bert(ids, mask, types, **keys).hidden_states
            layers = [layer.attention.self for layer in bert.encoder.layer]
            parts = [(layer.query, layer.key, layer.value) for layer in layers]
        else:
            bert = module.bert
            additive = (1.0 - mask.astype("float32")).unsqueeze([1, 2]) * -1e4
            states = bert(
                ids, types, attention_mask=additive, output_hidden_states=True, return_dict=True
            ).hidden_states
            layers = [layer.self_attn for layer in bert.encoder.layers]
            parts = [(layer.q_proj, layer.k_proj, layer.v_proj) for layer in layers]
        size = [*ids.shape, TINY["num_attention_heads"], -1]
        qkv = [QKV(*(part(x).reshape(size) for part in three)) for three, x in zip(parts, states)]
        return Outputs(module.classifier(states[-1]), states, qkv)

    return model, backend.adapt(model.module, forward)


def test_it_gives_what_the_packed_model_gives(backend):
    """States, Q, K, V and logits of the tokens, of all positions, and at some of them."""
    model, adapted = library_bert(backend)
    assert adapted.shape.hidden == 32 and [layer[:2] for layer in adapted.shape.layers] == [(4, 8)] * 3
    batch = make_batch([4, 7, 2])
    everything = Wanted(states=[0, 3], qkv=[1], logits=True)
    asked = everything, everything._replace(at=np.array([0, 8, 15]))
    for wanted in asked:
        expected, got = (side.run(batch, wanted) for side in (model, adapted))
        pairs = [*((expected.states[n], got.states[n]) for n in (0, 3)), *zip(expected.qkv[1], got.qkv[1])]
        for theirs, own in (*pairs, (expected.logits, got.logits)):
            np.testing.assert_allclose(backend.numpy(own), backend.numpy(theirs), atol=2e-5)
    assert list(adapted.run(batch, Wanted(qkv=[2], padded=True)).qkv[2].v.shape) == [3 * 7, 32]


def test_it_trains_as_the_packed_model_does(backend):
    """Losses, gradients' norm and weights after a step of distillation, projections among them."""
    model, adapted = library_bert(backend)
    first = model.weights()
    teacher = backend.model({**TINY, "hidden_size": 48})
    batch, results = make_batch([4, 7, 2]), []
    for student in (model, adapted):
        model.load_weights(first)
        matches = [
            StatesMatch((3,), (2,), projection=Projection(0, rate=3.0)),
            AttentionMatch((teacher.shape, student.shape), 2, 1),
        ]
        distillation = Distillation(backend, teacher, student, matches)
        optimizer = backend.optimizer(student, weight_decay=0.1, adam_epsilon=1e-6, max_grad_norm=1.0, loss_scale=1.0)
        loss, _ = distillation(batch)
        optimizer.backward(loss)
        results.append((loss.item(), optimizer.step(1e-3).grad_norm, model.weights()))
    (loss, norm, weights), (own_loss, own_norm, own_weights) = results
    assert own_loss == pytest.approx(loss, rel=1e-4) and own_norm == pytest.approx(norm, rel=1e-4)
    for name, array in weights.items():
        np.testing.assert_allclose(own_weights[name], array, atol=2e-5, err_msg=name)


def linear_module(backend):
    """An embedding, a linear layer and a norm, the same weights on both frameworks."""
    if backend.name == "torch":
        from torch.nn import Embedding, LayerNorm, Linear, Sequential
    else:
        from paddle.nn import Embedding, LayerNorm, Linear, Sequential
    return Sequential(Embedding(200, 16), Linear(16, 24), LayerNorm(24))


def linear_states(module, inputs):
    embedded = module[1](module[0](inputs.input_ids))
    return Outputs(states=[embedded, module[2](embedded)])


def test_weights_are_laid_out_alike_and_come_back(torch_backend, paddle_backend):
    """A module has its own names; linear weights are [out, in] on both frameworks, so one loads what the other has."""
    ours, theirs = (b.adapt(linear_module(b), linear_states) for b in (torch_backend, paddle_backend))
    weights = ours.weights()
    assert {name: array.shape for name, array in weights.items()} == {
        "0.weight": (200, 16), "1.weight": (24, 16), "1.bias": (24,), "2.weight": (24,), "2.bias": (24,),
    }  # fmt: skip
    weights["2.weight"] += np.arange(24, dtype=np.float32)
    assert theirs.load_weights(weights) == ours.load_weights(weights) == []
    assert theirs.load_weights({name: array for name, array in weights.items() if name != "1.bias"}) == ["1.bias"]
    batch, wanted = make_batch([3, 5]), Wanted(states=[1])
    a, b = (
        backend.numpy(m.run(batch, wanted).states[1])
        for backend, m in ((torch_backend, ours), (paddle_backend, theirs))
    )
    np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(InputError, match="1.weight is"):
        theirs.load_weights({"1.weight": weights["1.weight"][:, 1:]})


def test_only_matrices_decay(backend):
    """Whatever their names: with a loss without gradient to them, weights shrink, biases and norms stay."""
    model = backend.adapt(linear_module(backend), linear_states)
    before = {name: array + 1.0 for name, array in model.weights().items()}
    model.load_weights(before)
    optimizer = backend.optimizer(model, weight_decay=0.5, adam_epsilon=1e-8, max_grad_norm=0.0, loss_scale=1.0)
    optimizer.backward(model.run(make_batch([3]), Wanted(states=[1])).states[1].sum() * 0.0)
    optimizer.step(0.1)
    for name, array in model.weights().items():
        np.testing.assert_allclose(array, before[name] * (0.95 if array.ndim == 2 else 1.0), rtol=1e-5, err_msg=name)


def normed_module(backend):
    """An embedding that is frozen, a linear layer and a norm that counts as it trains."""
    if backend.name == "torch":
        from torch.nn import BatchNorm1d, Embedding, Linear, Sequential
    else:
        from paddle.nn import BatchNorm1D as BatchNorm1d
        from paddle.nn import Embedding, Linear, Sequential
    module = Sequential(Embedding(200, 16), Linear(16, 32), BatchNorm1d(32))
    if backend.name == "torch":
        module[0].requires_grad_(False)
    else:
        module[0].weight.stop_gradient = True
    return module


def normed_states(module, inputs):
    states = module[1](module[0](inputs.input_ids))
    return Outputs(states=[module[2](states.reshape([-1, 32])).reshape(states.shape)])


def test_what_is_no_trained_weight_is_kept_too(backend, tmp_path):
    """What a norm counted is in a checkpoint, so that a resumed run has the same bits; what is frozen stays."""
    teacher = backend.model(TINY)
    arguments = TrainingArguments(max_steps=4, learning_rate=1e-2, weight_decay=0.1, save_steps=2)

    def run(folder, stop_after):
        def batches(start, _):
            for number in range(start, stop_after):
                yield make_batch([5, 3], seed=number)

        backend.seed(3)
        student = backend.adapt(normed_module(backend), normed_states)
        before = student.weights()
        distillation = Distillation(backend, teacher, student, [StatesMatch((3,), (0,))])
        folder.mkdir(exist_ok=True)
        train(backend, student, distillation, batches, arguments, folder, "own", 10)
        return before, student.weights()

    before, expected = run(tmp_path / "whole", 4)
    with pytest.raises(StopIteration):
        run(tmp_path / "parts", 3)
    _, got = run(tmp_path / "parts", 4)
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
        assert np.array_equal(array, before[name]) == (name == "0.weight"), name


@pytest.mark.parametrize(
    ("give", "says"),
    [
        (lambda x: x, "Tensor; it must give Outputs"),
        (lambda x: Outputs(states=[x, x.swapaxes(0, 1)]), "states 1: [3, 2, 24] of a batch of 2, length 3; must be"),
        (lambda x: Outputs(states=[x, x[:, :, :8]]), "states: are [24, 8] wide; give those of one width"),
        (lambda x: Outputs(logits=x.sum(0)[0]), "logits: [24] of a batch of 2, length 3; must be [batch, classes]"),
        (lambda x: Outputs(qkv=[QKV(x, x, x)]), "q of layer 0: [2, 3, 24] of a batch of 2, length 3; must be"),
        (lambda x: Outputs(states=[x], qkv=[QKV(*[x.reshape([2, 3, 4, 6])] * 3)]), "1 beside Q, K, V of 1 layers"),
    ],
)  # fmt: skip
def test_a_function_that_gives_something_else_is_refused(backend, give, says):
    with pytest.raises(InputError) as refused:
        backend.adapt(linear_module(backend), lambda module, inputs: give(module[1](module[0](inputs.input_ids))))
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"of": "states", "student": 1, "teacher": 3}, "the teacher's states have 32 dimensions, the student's 24"),
        ({"of": "states", "student": 2, "teacher": 3}, "student: 2: the student has states 0 (the embeddings) to 1"),
        ({"of": "attention", "heads": "mean"}, "the student has no queries, keys and values"),
        ({"of": "relations", "num_relation_heads": 4}, "the student has no queries, keys and values"),
    ],
)
def test_what_a_module_has_not_is_refused_before_training(torch_backend, line, says):
    student = torch_backend.adapt(linear_module(torch_backend), linear_states)
    with pytest.raises(InputError) as refused:
        matches_of([line], Models(torch_backend.model(TINY).shape, student.shape, learning_rate=1e-3))
    assert says in str(refused.value)


def test_a_module_of_logits_alone(torch_backend):
    """It has no states to be compared, as teacher or student; logits that it does not give are missed at once."""
    teacher = torch_backend.model(TINY)
    alone = torch_backend.adapt(
        linear_module(torch_backend), lambda module, inputs: Outputs(linear_states(module, inputs).states[0][:, 0])
    )
    with pytest.raises(InputError, match="the student has no hidden states"):
        matches_of(
            [{"of": "states", "student": 0, "teacher": 3, "project": "linear"}], Models(teacher.shape, alone.shape, 1.0)
        )
    with pytest.raises(InputError, match="no multiple of the student's 0"):
        matches_of([{"of": "states"}], Models(teacher.shape, alone.shape, 1.0))
    with pytest.raises(InputError, match="the teacher has no queries"):
        matches_of([{"of": "attention"}], Models(alone.shape, teacher.shape, 1.0))
    student = torch_backend.adapt(linear_module(torch_backend), linear_states)
    with pytest.raises(InputError, match="gives 2 states, Q, K, V of 0 layers and no logits"):
        Distillation(torch_backend, alone, student, [LogitsMatch(LogitsLoss())])(make_batch([3]))
    three = torch_backend.model(LABELLED, head="sequence_classification")
    labelled = LabelledBatch(make_batch([3]), [np.array([1])], 1, 1)
    with pytest.raises(InputError, match="logits: the teacher's are of 3 classes, the student's of 24"):
        Distillation(torch_backend, three, alone, [LogitsMatch(LogitsLoss())], "classification")(labelled)
    with pytest.raises(InputError, match="exported by its framework"):
        student.export_onnx("model.onnx")
    assert not any(name.startswith(PROJECTIONS) for name in student.weights())
