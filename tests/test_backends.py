"""The two rooms against each other, and model folders against both libraries."""

import json
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import oracle
import pytest
from conftest import ROOT, TINY, UNEVEN, last_states, logits_of, make_batch

import backends
from backends.devices import has_kernels
from backends.files import InputError
from backends.interface import HEADS, QKV, Wanted
from backends.packed import pack
from backends.pretrained import (
    find_model,
    from_paddle_name,
    is_transposed,
    read_config,
    read_weights,
    to_paddle_name,
    write_model,
)
from objectives.distillation import Distillation, relation_matches
from objectives.masked_lm import MaskedLanguageModelling
from objectives.relations import RelationLoss
from text.masking import MaskedBatch

LENGTHS = [9, 3, 5, 7, 5]
FAMILIES = [
    TINY,
    {**TINY, "model_type": "ppminilm", "hidden_act": "relu"},
    {**TINY, "model_type": "roberta", "layer_norm_eps": 1e-5},
    {**TINY, "model_type": "ernie", "use_task_id": True, "task_type_vocab_size": 3, "type_vocab_size": 4},
]


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
def test_same_weights_same_numbers(torch_backend, paddle_backend, config):
    torch_backend.seed(1)
    on_torch = torch_backend.model(config)
    on_paddle = paddle_backend.model(config, on_torch.weights())
    batch = make_batch(LENGTHS)
    for layer in range(3):
        wanted = Wanted(qkv=[layer])
        for a, b in zip(on_torch.run(batch, wanted).qkv[layer], on_paddle.run(batch, wanted).qkv[layer]):
            np.testing.assert_allclose(torch_backend.numpy(a), paddle_backend.numpy(b), atol=1e-5)
    hidden = torch_backend.numpy(last_states(on_torch, batch)), paddle_backend.numpy(last_states(on_paddle, batch))
    np.testing.assert_allclose(*hidden, atol=2e-5)
    for name, array in on_paddle.weights().items():
        np.testing.assert_array_equal(array, on_torch.weights()[name])


@pytest.mark.parametrize("head", HEADS)
def test_heads_map_both_ways(torch_backend, paddle_backend, head):
    """Every parameter, heads and pooler included, arrives where the other framework uses it."""
    torch_backend.seed(2)
    on_torch = torch_backend.model({**TINY, "num_labels": 2}, head=head)
    weights = {
        name: np.random.default_rng(3).standard_normal(a.shape, np.float32) for name, a in on_torch.weights().items()
    }
    assert on_torch.load_weights(weights) == []
    on_paddle = paddle_backend.model({**TINY, "num_labels": 2}, head=head)
    # Only the poolers of models whose head does not use one exist in one library alone.
    lacking = on_paddle.load_weights(weights)
    assert all(name.startswith("pooler.") for name in lacking)
    assert weights.keys() <= on_paddle.weights().keys()
    batch = make_batch(LENGTHS)
    import paddle
    import torch

    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        expected = on_torch.module(**{key: torch.from_numpy(array) for key, array in inputs.items()})
    got = on_paddle.module(**{key: paddle.to_tensor(array) for key, array in inputs.items()})
    if head == "question_answering":
        assert relative(got[0].numpy(), expected.start_logits.numpy()) < 1e-4
        assert relative(got[1].numpy(), expected.end_logits.numpy()) < 1e-4
    else:
        assert relative(got.numpy(), expected.logits.numpy()) < 1e-4


def test_masked_lm_loss_is_the_librarys(torch_backend, paddle_backend):
    import torch

    model = torch_backend.model(TINY, head="masked_lm")
    batch = make_batch(LENGTHS)
    positions, answers = np.array([1, 10, 21]), np.array([7, 8, 9])
    labels = np.full(batch.input_ids.size, -100)
    labels[positions] = answers
    with torch.no_grad():
        expected = model.module(
            input_ids=torch.from_numpy(batch.input_ids),
            attention_mask=torch.from_numpy(batch.attention_mask),
            labels=torch.from_numpy(labels.reshape(batch.input_ids.shape)),
        ).loss.item()
    twin = paddle_backend.model(TINY, model.weights(), head="masked_lm")
    for backend, own in ((torch_backend, model), (paddle_backend, twin)):
        loss, _ = MaskedLanguageModelling(backend, own)(MaskedBatch(batch, positions, answers))
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_twenty_steps_agree(torch_backend, paddle_backend):
    torch_backend.seed(3)
    teacher = torch_backend.model({**TINY, "hidden_size": 48, "num_hidden_layers": 4}).weights()
    student = torch_backend.model(TINY).weights()
    runs = {}
    for backend in (torch_backend, paddle_backend):
        model = backend.model(TINY, student)
        distillation = Distillation(
            backend,
            backend.model({**TINY, "hidden_size": 48, "num_hidden_layers": 4}, teacher),
            model,
            relation_matches(RelationLoss(8, 0.2, 0.3), [(3, 2)]),
        )
        optimizer = backend.optimizer(model, weight_decay=0.01, adam_epsilon=1e-8, max_grad_norm=0.1, loss_scale=1.0)
        model.train()
        losses = []
        for step in range(20):
            loss, _ = distillation(make_batch(LENGTHS, seed=step))
            optimizer.backward(loss)
            report = optimizer.step(1e-3 * (20 - step) / 20)
            losses.append((loss.item(), report.grad_norm))
        runs[backend.name] = np.array(losses)
    assert runs["torch"][0, 0] > 2 * runs["torch"][-1, 0]
    np.testing.assert_allclose(runs["torch"][:, 0], runs["paddle"][:, 0], rtol=1e-3)
    np.testing.assert_allclose(runs["torch"][:, 1], runs["paddle"][:, 1], rtol=1e-2)


def test_capturing_stops_the_forward_pass(backend):
    """A layer above the captured one is not needed: here it is not there."""
    model = backend.model(TINY)
    model.layers[2] = None
    assert set(model.run(make_batch(LENGTHS), Wanted(qkv=[0, 1])).qkv) == {0, 1}
    assert set(model.run(make_batch(LENGTHS), Wanted(states=[2, 0])).states) == {0, 2}
    with pytest.raises(AttributeError):
        last_states(model, make_batch(LENGTHS))


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
def test_packed_tokens_are_those_of_the_padded_batch(backend, config, monkeypatch):
    """Q, K, V, the loss and every weight's gradient, whatever the order of the lengths, with fillers and without."""
    backend.seed(8)
    teacher, student = backend.model({**config, "hidden_size": 48}), backend.model(config)
    batch = make_batch([3, 9, 1, 9, 9, 4])
    tokens = batch.attention_mask.reshape(-1).astype(bool)
    updated = []
    for padded, row_multiple in ((True, 1), (False, 1), (False, 32)):
        monkeypatch.setattr(backend, "row_multiple", row_multiple)
        model = backend.model(config, student.weights())
        optimizer = backend.optimizer(model, weight_decay=0, adam_epsilon=1e8, max_grad_norm=0, loss_scale=1)
        sides = [side.run(batch, Wanted(qkv=[2], padded=padded)).qkv[2] for side in (teacher, model)]
        rows = tokens if padded else slice(None)
        values = [backend.numpy(x)[rows] for x in sides[1]]
        loss, _ = RelationLoss(8, 0.2, 0.3)(backend, *sides, batch.attention_mask)
        optimizer.backward(loss)
        norm = optimizer.step(1e8).grad_norm
        updated.append((values, loss.item(), norm, model.weights()))
    expected = updated.pop(0)
    for found in updated:
        np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
        assert found[1:3] == pytest.approx(expected[1:3], rel=1e-4)
        for name, array in found[3].items():
            np.testing.assert_allclose(array, expected[3][name], atol=1e-5 * max(1, norm))


def test_both_ways_to_attend(backend, monkeypatch):
    """By runs of equal length, as on a CPU, and all at once, as on a GPU."""
    batch = make_batch([3, 9, 1, 9, 9, 4])
    packed = pack(backend, batch, padded=False)
    model = backend.model({**TINY, "hidden_size": 24})
    random = np.random.default_rng(0)
    qkv = QKV(*(backend.tensor(random.standard_normal((batch.tokens, 24), np.float32)) for _ in range(3)))
    firsts = packed.row_of[np.arange(6) * 9]
    contexts = []
    askings = qkv, qkv._replace(q=qkv.q[backend.tensor(firsts)])
    for device in ("cpu", "another"):
        monkeypatch.setattr(backend, "device", device)
        for asking in askings:
            contexts.append(backend.numpy(model._context(model.layers[0], asking, packed)))
    np.testing.assert_allclose(contexts[0], contexts[2], atol=1e-6)
    for context in contexts[1::2]:
        np.testing.assert_allclose(context, contexts[0][firsts], atol=1e-6)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("config", [TINY, UNEVEN], ids=["even", "uneven"])
def test_states_qkv_and_logits_are_those_of_numpy(backend, config, padded):
    """All layers' from one pass, against float64; even ones too against the library's own."""
    backend.seed(6)
    model = backend.model({**config, "num_labels": 3}, head="token_classification")
    batch = make_batch([3, 9, 1, 9, 4])
    wanted = Wanted(states=range(4), qkv=range(3), logits=True, padded=padded)
    captured = model.run(batch, wanted)
    kept = batch.attention_mask.reshape(-1).astype(bool)
    states, qkvs = oracle.bert(model.weights(), model.shape, batch)
    weights = model.weights()
    logits = states[3] @ weights["classifier.weight"].astype(np.float64).T + weights["classifier.bias"]
    rows = kept if padded else slice(None)
    for number, state in captured.states.items():
        np.testing.assert_allclose(backend.numpy(state)[rows], states[number][kept], atol=1e-5)
    for number, qkv in captured.qkv.items():
        for ours, right in zip(qkv, qkvs[number]):
            np.testing.assert_allclose(backend.numpy(ours)[rows], right[kept], atol=1e-5)
    np.testing.assert_allclose(backend.numpy(captured.logits)[rows], logits[kept], atol=1e-5)
    for at in ([0, 10, 9, 37], [2, 17, 18, 30, 39], [39, 30, 18, 17, 2]):  # some, one of each sequence, out of order
        some = model.run(batch, Wanted(logits=True, at=np.array(at), padded=padded)).logits
        np.testing.assert_allclose(backend.numpy(some), logits[at], atol=1e-5)
    if model.shape.even and backend.name == "torch":
        import torch

        with torch.no_grad():
            ids, mask = map(torch.from_numpy, (batch.input_ids, batch.attention_mask))
            library = model.module(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for number, state in enumerate(library):
            np.testing.assert_allclose(state.numpy().reshape(-1, 32)[kept], states[number][kept], atol=1e-5)


def test_uneven_models_are_the_same_on_both(torch_backend, paddle_backend, tmp_path):
    """Through a folder, with the gradient of every weight; and transformers does not take them for even ones."""
    import transformers

    torch_backend.seed(7)
    config = {**UNEVEN, "num_labels": 2, "num_hidden_layers": 3}
    first = torch_backend.model(config, head="sequence_classification")
    write_model(tmp_path, config, first.weights(), "sequence_classification")
    batch, labels = make_batch(LENGTHS), np.array([0, 1, 1, 0, 1])
    steps = {}
    for backend in (torch_backend, paddle_backend):
        model = backend.model(read_config(tmp_path), read_weights(tmp_path), "sequence_classification")
        assert [layer.width for layer in model.shape.layers] == [32, 8, 24]
        optimizer = backend.optimizer(model, weight_decay=0, adam_epsilon=1e8, max_grad_norm=0, loss_scale=1)
        optimizer.backward(backend.cross_entropy(logits_of(model, batch), labels))
        optimizer.step(1e8)
        steps[backend.name] = model.weights()
    assert steps["torch"].keys() == steps["paddle"].keys()
    for name, array in steps["torch"].items():
        np.testing.assert_allclose(array, steps["paddle"][name], atol=1e-4 * max(1, np.abs(array).max()), err_msg=name)
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads_by_layer", [4, 1]), ("intermediate_size_by_layer", [1, 0, 2]), ("attention_head_size", 0)],
)
def test_sizes_by_layer_that_make_no_sense(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({**UNEVEN, key: value}))
    with pytest.raises(InputError, match=key):
        read_config(tmp_path)


def test_one_pass_gives_all_with_one_dropout(backend, monkeypatch):
    """Layers run once for hidden states, Q, K, V and logits, which in training belong together."""
    dropouts = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "classifier_dropout": 0.0}
    model = backend.model({**TINY, **dropouts, "num_labels": 2}, head="sequence_classification")
    attended = []
    context = model._context
    monkeypatch.setattr(model, "_context", lambda *arguments: attended.append(1) or context(*arguments))
    batch, wanted = make_batch(LENGTHS), Wanted(states=[2, 3], qkv=[2], logits=True)
    model.train()
    captured = model.run(batch, wanted)
    assert len(attended) == 3
    w = {name: array.astype(np.float64) for name, array in model.weights().items()}
    states = {number: backend.numpy(state) for number, state in captured.states.items()}
    layer = "encoder.layer.2.attention.self.query"
    query = states[2] @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
    np.testing.assert_allclose(backend.numpy(captured.qkv[2].q), query, atol=1e-4)
    firsts = np.cumsum([0, *LENGTHS[:-1]])
    pooled = np.tanh(states[3][firsts] @ w["pooler.dense.weight"].T + w["pooler.dense.bias"])
    logits = pooled @ w["classifier.weight"].T + w["classifier.bias"]
    np.testing.assert_allclose(backend.numpy(captured.logits), logits, atol=1e-4)
    assert not np.allclose(backend.numpy(model.run(batch, wanted).logits), logits, atol=1e-2)


def test_what_a_model_has_not_is_refused(backend):
    model = backend.model(TINY)
    for wanted in (Wanted(states=[4]), Wanted(qkv=[3]), Wanted(logits=True)):
        with pytest.raises(ValueError, match="the model has"):
            model.run(make_batch(LENGTHS), wanted)


@pytest.mark.parametrize("lengths", [[3, 9, 1, 9, 9, 4], [1, 1], [5, 5]])
@pytest.mark.parametrize("row_multiple", [1, 32])
@pytest.mark.parametrize("head", ["sequence_classification", "token_classification", "question_answering"])
def test_logits_and_gradients_are_the_librarys(torch_backend, paddle_backend, monkeypatch, head, row_multiple, lengths):
    """transformers' own forward pass on the padded batch, differentiated by torch, against both backends'."""
    import torch

    torch_backend.seed(5)
    config = {**TINY, "num_labels": 2}
    weights = torch_backend.model(config, head=head).weights()
    batch = make_batch(lengths)
    tokens = batch.attention_mask.astype(bool)
    library = torch_backend.model(config, weights, head)
    output = library.module(input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(tokens))
    if head == "question_answering":
        expected = torch.stack([output.start_logits, output.end_logits], -1)[torch.from_numpy(tokens)]
    else:
        expected = output.logits if head == "sequence_classification" else output.logits[torch.from_numpy(tokens)]
    labels = np.random.default_rng(0).integers(-1, 2, len(expected))
    torch_backend.cross_entropy(expected, labels).backward()
    gradients = {name: p.grad.numpy() for name, p in library.named_parameters() if p.grad is not None}
    for backend in (torch_backend, paddle_backend):
        monkeypatch.setattr(backend, "row_multiple", row_multiple)
        model = backend.model(config, weights, head)
        logits = logits_of(model, batch)
        np.testing.assert_allclose(backend.numpy(logits), expected.detach().numpy(), atol=2e-5)
        loss = backend.cross_entropy(logits, labels)
        loss.backward()
        found = dict(model.named_parameters())
        for name, gradient in gradients.items():
            got = backend.numpy(found[name].grad)
            got = got.T if backend.name == "paddle" and is_transposed(name, got) else got
            np.testing.assert_allclose(got, gradient, atol=1e-4 * max(1, np.abs(gradient).max()), err_msg=name)


def test_optimizer_state_goes_on_where_it_was(backend):
    """Two steps, and one step saved, loaded into fresh objects and continued, are the same."""
    distance = {}
    for interrupted in (False, True):
        backend.seed(4)
        teacher, model = backend.model(TINY), backend.model(TINY)

        def optimizer_of(model):
            return backend.optimizer(model, weight_decay=0.1, adam_epsilon=1e-8, max_grad_norm=1.0, loss_scale=1.0)

        optimizer = optimizer_of(model)
        for step in range(3):
            if interrupted and step == 2:
                state, weights = optimizer.state(), model.weights()
                model = backend.model(TINY, weights)
                optimizer = optimizer_of(model)
                optimizer.load_state(state)
            distillation = Distillation(backend, teacher, model, relation_matches(RelationLoss(8), [(2, 2)]))
            optimizer.backward(distillation(make_batch(LENGTHS, seed=step))[0])
            optimizer.step(1e-2)
        distance[interrupted] = model.weights()
    for name, array in distance[False].items():
        np.testing.assert_array_equal(array, distance[True][name])


def test_decay_leaves_biases_and_norms_alone(backend):
    """With a gradient of nearly nothing, only decay moves weights."""
    backend.seed(5)
    model = backend.model(TINY)
    teacher = backend.model(TINY, model.weights())
    optimizer = backend.optimizer(model, weight_decay=0.5, adam_epsilon=1e8, max_grad_norm=0.0, loss_scale=1.0)
    before = {name: array + 1.0 for name, array in model.weights().items()}
    model.load_weights(before)
    distillation = Distillation(backend, teacher, model, relation_matches(RelationLoss(8), [(2, 2)]))
    optimizer.backward(distillation(make_batch(LENGTHS))[0])
    optimizer.step(0.1)
    after = model.weights()
    kernel, bias = "encoder.layer.0.intermediate.dense.weight", "encoder.layer.0.intermediate.dense.bias"
    norm = "encoder.layer.0.output.LayerNorm.weight"
    np.testing.assert_allclose(after[kernel], before[kernel] * 0.95, rtol=1e-5)
    np.testing.assert_allclose(after[bias], before[bias], rtol=1e-5)
    np.testing.assert_allclose(after[norm], before[norm], rtol=1e-5)


def low_precision(precision):
    try:
        return backends.load("torch", "cpu", precision)
    except InputError as error:  # a processor without bfloat16
        pytest.skip(str(error))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_loss_in_low_precision(torch_backend, precision):
    """Within 1% of float32's, on models of real width; teachers keep their linear weights in it."""
    low = low_precision(precision)
    assert low.precision == precision
    shape = {**TINY, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "initializer_range": 0.05}
    torch_backend.seed(6)
    teacher, student = torch_backend.model({**shape, "num_hidden_layers": 4}), torch_backend.model(shape)
    losses = [
        Distillation(
            backend,
            backend.model({**shape, "num_hidden_layers": 4}, teacher.weights(), trainable=False),
            backend.model(shape, student.weights()),
            relation_matches(RelationLoss(24, 0.2, 0.3), [(3, 2)]),
        )(make_batch([40, 33, 21, 7]))[0].item()
        for backend in (torch_backend, low)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_learns_as_much(torch_backend, precision):
    """200 steps end at the same held-out loss, within 2%."""
    reached = []
    for backend in (torch_backend, low_precision(precision)):
        backend.seed(9)
        teacher, student = backend.model({**TINY, "hidden_size": 48}, trainable=False), backend.model(TINY)
        distillation = Distillation(backend, teacher, student, relation_matches(RelationLoss(8), [(2, 2)]))
        optimizer = backend.optimizer(
            student, weight_decay=0.01, adam_epsilon=1e-8, max_grad_norm=1.0, loss_scale=2.0**12
        )
        held_out = [make_batch([12, 9, 9, 4], seed=1000 + n) for n in range(8)]
        before = sum(distillation.evaluate(batch)["loss"].item() for batch in held_out)
        for step in range(200):
            optimizer.backward(distillation(make_batch([12, 9, 9, 4], seed=step))[0])
            assert not optimizer.step(2e-3 * (1 - step / 200)).skipped
        reached.append(sum(distillation.evaluate(batch)["loss"].item() for batch in held_out))
        assert reached[-1] < 0.7 * before
    assert reached[1] == pytest.approx(reached[0], rel=0.02)


def test_what_a_device_cannot_do_is_refused():
    with pytest.raises(InputError, match="--device gpu: this machine has none that PyTorch can use"):
        _without_gpu("torch")
    with pytest.raises(InputError, match="--device gpu: this machine has none that Paddle can use"):
        _without_gpu("paddle")
    with pytest.raises(InputError, match="--amp_dtype bfloat16: Paddle computes in float32 on this cpu"):
        backends.load("paddle", "cpu", "bfloat16")
    with pytest.raises(InputError, match="--device tpu: must be auto, cpu, gpu or xpu"):
        backends.load("torch", "tpu")
    with pytest.raises(InputError, match="--backend jax: no such backend; choose from torch, paddle"):
        backends.load("jax")


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ((7, 0), ["sm_70", "sm_80"], True),
        ((7, 0), ["sm_75", "sm_80", "sm_90", "compute_90"], False),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90a", "sm_100"], False),
        ((7, 0), ["70", "75", "80"], True),
        ((6, 1), ["70", "75", "80"], False),
    ],
)
def test_code_for_a_gpu(capability, architectures, fits):
    """NVIDIA's rules of binary and intermediate compatibility."""
    assert has_kernels(capability, architectures) == fits


def test_gpu_without_code_in_the_build_is_refused(monkeypatch):
    """A V100 under PyTorch's default wheels, which begin at sm_75."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    with pytest.raises(
        InputError, match=r"no code for Tesla V100-SXM2-16GB \(sm_70\), only for sm_75, sm_80, sm_90; .*whl/cu126"
    ):
        backends.load("torch", "gpu")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_80"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert backends.load("torch", "gpu", "auto").precision == "float16"


@pytest.mark.slow
def test_report_of_the_machine():
    report = subprocess.run([sys.executable, "-m", "backends"], cwd=ROOT, capture_output=True, text=True).stdout
    for package in ("torch", "transformers", "paddlepaddle", "paddlenlp"):
        assert f"{package} {version(package)}" in report
    assert "--backend auto takes torch" in report


def _without_gpu(name):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    backends.load(name, "gpu")


def test_missing_framework_is_named(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda package: None)
    with pytest.raises(
        InputError, match=r"torch and transformers not installed; install with: pip install .*\[torch\]"
    ):
        backends.load("torch")


@pytest.mark.parametrize("config", FAMILIES[:2] + FAMILIES[3:], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("trained_on", ["torch", "paddle"])
def test_folder_loads_in_both_libraries(tmp_path, config, trained_on, request):
    """Unchanged, with nothing but from_pretrained(folder), to the same last hidden state."""
    import paddle
    import paddlenlp.transformers
    import torch
    import transformers

    config = {**config, "layer_norm_eps": 1e-5}  # not BERT's: it must arrive too, where the library has the setting
    if config["model_type"] == "ernie":
        config["layer_norm_eps"] = 1e-12  # paddlenlp's Ernie has it fixed
    backend = request.getfixturevalue(f"{trained_on}_backend")
    model = backend.model(config)
    write_model(tmp_path, config, model.weights())
    batch = make_batch(LENGTHS)
    expected = backend.numpy(last_states(model, batch))
    inputs = batch.input_ids, batch.attention_mask
    on_torch = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ids, mask = map(torch.from_numpy, inputs)
        got = on_torch(ids, attention_mask=mask).last_hidden_state.numpy()
    np.testing.assert_allclose(got[batch.attention_mask == 1], expected, atol=1e-4)
    classes = {"bert": ["BertModel"], "ppminilm": ["PPMiniLMModel", "BertModel"], "ernie": ["ErnieModel"]}
    for name in classes[config["model_type"]]:
        on_paddle = getattr(paddlenlp.transformers, name).from_pretrained(str(tmp_path))
        on_paddle.eval()
        ids, mask = map(paddle.to_tensor, inputs)
        got = on_paddle(ids, attention_mask=mask)[0].numpy()
        np.testing.assert_allclose(got[batch.attention_mask == 1], expected, atol=1e-4)


@pytest.mark.parametrize("head", [None, "masked_lm"])
def test_every_weight_file_is_read(tmp_path, torch_backend, head):
    """The same weights from each file that the two frameworks write."""
    import paddle
    import torch

    model = torch_backend.model(TINY, head=head)
    write_model(tmp_path, TINY, model.weights(), head)
    expected = model.weights()
    assert read_config(tmp_path)["hidden_size"] == 32

    def same():
        got = read_weights(tmp_path)
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array)

    same()
    (tmp_path / "model.safetensors").unlink()
    same()  # from the shards that the index names, which hold Paddle's layout
    for file in ("paddle_model.safetensors", "model.safetensors.index.json"):
        (tmp_path / file).unlink()
    for zipped in (True, False):
        torch.save(model.module.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        same()
    (tmp_path / "pytorch_model.bin").unlink()
    twin = backends.load("paddle", "cpu").model(TINY, expected, head)
    paddle.save(twin.module.state_dict(), str(tmp_path / "model_state.pdparams"))
    same()


def test_names_translate_back(torch_backend):
    for name in torch_backend.model(TINY, head="masked_lm").weights():
        assert from_paddle_name(to_paddle_name(name)) == name
    assert from_paddle_name(to_paddle_name("qa_outputs.bias"), "question_answering") == "qa_outputs.bias"


def test_bad_model_folders(tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        read_config(tmp_path)
    with pytest.raises(InputError, match="no weights there"):
        read_weights(tmp_path)
    with pytest.raises(InputError, match="--teacher_model_name_or_path ./nowhere: no such folder"):
        find_model("./nowhere", "teacher_model_name_or_path")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "roberta", "pad_token_id": 1}))
    with pytest.raises(InputError, match="config.json: pad_token_id 1: not computed here; expected 0"):
        read_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match="cut short or not a safetensors file"):
        read_weights(tmp_path)


def test_weights_that_do_not_fit(backend):
    weights = backend.model(TINY).weights()
    with pytest.raises(InputError, match=r"is \[32, 32\], the configuration says \[48, 48\]|is \[200, 32\]"):
        backend.model({**TINY, "hidden_size": 48}, weights)
    del weights["encoder.layer.1.output.dense.weight"]
    with pytest.raises(InputError, match="encoder.layer.1.output.dense.weight and 0 more encoder weights are missing"):
        backend.model(TINY, weights)


def test_older_paddlenlp_configuration(tmp_path):
    """model_config.json, which nests a model's settings in those of its head."""
    inner = {key: value for key, value in TINY.items() if key != "model_type"}
    nested = {"init_class": "ErnieForMaskedLM", "init_args": [{"init_class": "ErnieModel", **inner}]}
    (tmp_path / "model_config.json").write_text(json.dumps(nested))
    config = read_config(tmp_path)
    assert (config["model_type"], config["hidden_size"]) == ("ernie", 32)
    (tmp_path / "model_config.json").write_text(json.dumps(inner))
    assert read_config(tmp_path, "ppminilm")["model_type"] == "ppminilm"
