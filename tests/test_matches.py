"""Matches: lines of a recipe, what they are refused for, and what a student learns by them."""

import json
import shutil
import subprocess
import sys
from itertools import permutations

import numpy as np
import oracle
import pytest
from conftest import ROOT, TINY, environment, make_batch
from test_general_distill import DEMO, metrics
from test_losses import leaves
from test_relations import gradients
from test_scale import models, options  # noqa: F401, models is a fixture

import backends
from backends.files import InputError
from backends.interface import PROJECTIONS, Captured, Wanted
from backends.pretrained import read_safetensors, read_weights, write_model
from backends.shape import Shape
from general_distill.__main__ import main
from objectives.distillation import (
    AttentionMatch,
    Distillation,
    LabelsMatch,
    LogitsMatch,
    Projection,
    RelationMatch,
    StatesMatch,
    TransportMatch,
    projections_of,
)
from objectives.logits import LogitsLoss
from objectives.matches import PRESETS, Models, matches_of
from objectives.transport import cheapest_flow
from text.masking import MaskedBatch

WIDE = {**TINY, "hidden_size": 48, "num_hidden_layers": 6}
BASE = Shape.of({**TINY, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12})


def parse(*lines, teacher=WIDE, student=TINY):
    teacher, student = (x if isinstance(x, Shape) else Shape.of(x) for x in (teacher, student))
    return matches_of(lines, Models(teacher, student, learning_rate=1e-3))


def layers(matches):
    return [(match.teacher, match.student) for match in matches]


def test_layers_are_mapped():
    assert layers(parse({"of": "states", "project": "linear"})) == [
        ((t,), (s,)) for t, s in ((0, 0), (2, 1), (4, 2), (6, 3))
    ]
    assert layers(parse({"of": "attention"})) == [(1, 0), (3, 1), (5, 2)]
    assert layers(parse({"of": "attention", "teacher": "last", "student": [0, 2]})) == [(3, 0), (5, 2)]
    assert layers(parse({"of": "states", "teacher": "last", "loss": "nst"})) == [
        ((t, t), (s, s)) for t, s in ((0, 0), (4, 1), (5, 2), (6, 3))
    ]
    two = {"of": "states", "loss": "nst", "teacher": [[0, 6], 3], "student": [[0, 3], 1]}
    assert layers(parse(two)) == [((0, 6), (0, 3)), ((3, 3), (1, 1))]
    relations = {"of": "relations", "num_relation_heads": 8, "teacher": 5, "student": 2, "beta": 0.5, "weight": 2}
    [relation] = parse(relations)
    assert isinstance(relation, RelationMatch) and relation.relations.beta == 0.5 and relation.weight == 2


def test_projections_are_shared_or_not():
    lines = ({"of": "states", "project": "linear", "shared": True}, {"of": "states", "project": "tanh", "rate": 5e-3})
    found = projections_of(parse(*lines))
    assert [projection.kind for projection in found] == ["linear"] + ["tanh"] * 4
    assert len({projection.number for projection in found}) == 5
    assert [projection.rate for projection in found] == [1.0] + [5.0] * 4


@pytest.mark.parametrize(
    ("name", "depth", "width", "expected"),
    [
        ("L3_attention_mse", 3, 768, [(3, 0), (7, 1), (11, 2)]),
        ("L4_attention_ce_mean", 4, 768, [(2, 0), (5, 1), (8, 2), (11, 3)]),
        ("L3n_hidden_mse", 3, 384, [((t,), (s,)) for t, s in ((0, 0), (4, 1), (8, 2), (12, 3))]),
        ("L4t_hidden_sgram", 4, 312, [((t, t), (s, s)) for t, s in ((0, 0), (3, 1), (6, 2), (9, 3), (12, 4))]),
        ("L6_hidden_smmd", 6, 768, [((2 * s, 2 * s), (s, s)) for s in range(7)]),
        ("small_hidden_mse", 12, 256, [((s,), (s,)) for s in range(0, 13, 2)]),
    ],
)
def test_presets_are_textbrewers(name, depth, width, expected):
    student = Shape.of(
        {**TINY, "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 12 if width != 256 else 8}
    )
    found = parse(name, teacher=BASE, student=student)
    assert layers(found) == expected
    assert {match.weight for match in found} == {1.0}
    assert bool(projections_of(found)) == (width != 768)
    assert len(PRESETS) == 18


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("L6_hiden_mse", "line 1: no preset is called L6_hiden_mse; did you mean L6_hidden_mse?"),
        ("{of: states}", "keys and values stand in a list, as in [{of: states, "),
        (7, "line 1: 7: expected keys and values"),
        ({"of": "state"}, "of: state: must be one of states, attention, relations, logits, labels"),
        ({"of": "states", "los": "mse"}, "los: unknown for states; did you mean loss?"),
        ({"of": "logits", "teacher": 1}, "teacher: unknown for logits; there are weight"),
        ({"of": "states", "loss": "kl"}, "loss: kl: must be one of mse, cos, pkd, gram, nst"),
        ({"of": "states", "weight": -1}, "weight: -1: must be a number of at least 0"),
        ({"of": "logits", "temperature": 0}, "temperature: 0: must be a number greater than 0"),
        ({"of": "states", "teacher": 7, "student": 3}, "teacher: 7: the teacher has states 0 (the embeddings) to 6"),
        ({"of": "attention", "teacher": 6, "student": 2}, "teacher: 6: the teacher has layers 0 to 5"),
        ({"of": "attention", "teacher": 5, "student": [3]}, "student: 3: the student has layers 0 to 2"),
        ({"of": "attention", "teacher": [5, 4], "student": 2}, "2 layers and 1; give as many of the one"),
        ({"of": "attention", "teacher": "first"}, "without student: give as many of the student's layers"),
        ({"of": "states", "teacher": 6, "student": 3}, "have 48 dimensions, the student's 32; give project"),
        ({"of": "states", "loss": "gram"}, "the teacher's states have 48 dimensions"),
        ({"of": "states", "loss": "nst", "shared": True}, "shared: has no effect without project"),
        ({"of": "attention", "on": "probabilities", "heads": "sum"}, "sums and means are of scores; leave one out"),
        ({"of": "states", "teacher": "emd"}, "have 48 dimensions, the student's 32; give project"),
        ({"of": "attention", "teacher": "emd", "student": [0]}, "student: [0]: has no effect beside teacher: emd"),
        ({"of": "relations"}, "num_relation_heads: is missing"),
        ({"of": "relations", "num_relation_heads": 7}, "does not divide the width 48 of the teacher's Q, K, V"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(line, says):
    with pytest.raises(InputError) as refused:
        parse(line)
    assert says in str(refused.value)
    assert str(refused.value).startswith("--matches, line 1: ")
    assert "\n" not in str(refused.value)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="no multiple of the student's 4; name the layers, or give teacher: last"):
        parse({"of": "attention"}, student={**TINY, "num_hidden_layers": 4})
    with pytest.raises(InputError, match="the teacher's layer 1 has 4 attention heads, the student's layer 0 8; give"):
        parse({"of": "attention"}, student={**TINY, "num_attention_heads": 8})
    assert len(parse({"of": "attention", "heads": "sum"}, student={**TINY, "num_attention_heads": 8})) == 3
    with pytest.raises(InputError, match="--matches: none given"):
        parse()


def flat(batch, states):
    """A padded model's states as those of tokens."""
    return [x[batch.attention_mask.reshape(-1) > 0] for x in states]


def test_one_pass_gives_all_losses(backend, monkeypatch):
    """Models, projection, weights and schedules against float64 NumPy; each model runs once."""
    backend.seed(3)
    teacher, student = backend.model(WIDE), backend.model(TINY)
    matches = [
        StatesMatch((6,), (3,), "mse", Projection(0, "tanh"), weight=2.0, weight_schedule="linear_decay"),
        StatesMatch((0, 4), (0, 2), "nst"),
        AttentionMatch((teacher.shape, student.shape), 5, 2, weight=0.5, weight_schedule="linear_growth"),
    ]
    distillation = Distillation(backend, teacher, student, matches, seed=1)
    runs = []
    for model in (teacher, student):
        monkeypatch.setattr(model, "run", lambda *a, own=model.run: runs.append(own) or own(*a))
    batch = make_batch([7, 3, 5])
    loss, parts = distillation(batch, 0.25)
    assert len(runs) == 2

    lengths = [7, 3, 5]
    weights = student.weights()
    (t_states, t_qkv), (s_states, s_qkv) = (oracle.bert(m.weights(), m.shape, batch) for m in (teacher, student))
    t, s = flat(batch, t_states), flat(batch, s_states)
    projected = np.tanh(s[3] @ weights["projections.0.weight"].T + weights["projections.0.bias"])
    q = [flat(batch, side[:2]) for side in (t_qkv[5], s_qkv[2])]
    expected = {
        "states/mse/6-3": oracle.states_loss("mse", [t[6]], [projected], lengths),
        "states/nst/0+4-0+2": oracle.states_loss("nst", [t[0], t[4]], [s[0], s[2]], lengths),
        "attention/mse/5-2": oracle.attention_loss(*q, lengths, (4, 4), "mse", "scores", "each"),
    }
    assert {key: part.item() for key, part in parts.items()} == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(np.dot([*expected.values()], [2.0 * 0.75, 1.0, 0.5 * 0.25]), rel=1e-4)
    evaluated = distillation.evaluate(batch)
    assert list(evaluated) == distillation.keys
    assert evaluated["loss"].item() == pytest.approx(np.dot([*expected.values()], [2.0, 1.0, 0.5]), rel=1e-4)


def earth_movers_distance(distances):
    """Of layers that weigh the same, by brute force: all ways to pair equally many shares of layers."""
    shares = np.lcm(*distances.shape)
    of_shares = distances.repeat(shares // distances.shape[0], axis=0).repeat(shares // distances.shape[1], axis=1)
    return min(of_shares[np.arange(shares), list(order)].mean() for order in permutations(range(shares)))


@pytest.mark.parametrize("shape", [(6, 3), (3, 2), (4, 4), (2, 6), (5, 1)])
def test_the_flow_is_the_cheapest(shape):
    for seed, size in enumerate((1.0, 1e-6, 1e6)):
        distances = size * np.random.default_rng(seed).random(shape)
        flow = cheapest_flow(distances)
        assert (flow * distances).sum() == pytest.approx(earth_movers_distance(distances), rel=1e-9)
        np.testing.assert_allclose(flow.sum(1), 1 / shape[0], atol=1e-12)
        np.testing.assert_allclose(flow.sum(0), 1 / shape[1], atol=1e-12)
        assert (flow >= 0).all() and (flow > 0).sum() < sum(shape)
    assert (cheapest_flow(np.full(shape, np.nan)) == 1 / np.prod(shape)).all()


def test_layers_are_matched_by_earth_movers_distance(backend):
    """States, projected by a layer for each of the student's, and attention, against float64 NumPy."""
    backend.seed(3)
    teacher, student = backend.model(WIDE), backend.model(TINY)
    line = {"teacher": "emd"}
    found = parse({"of": "states", "project": "linear", **line}, {"of": "attention", "weight": 2, **line})
    assert all(isinstance(match, TransportMatch) and len(match.parts) == 18 for match in found)
    assert len(projections_of(found)) == 3
    lengths = [7, 3, 5]
    batch = make_batch(lengths)
    loss, parts = Distillation(backend, teacher, student, found, seed=1)(batch)
    weights = student.weights()
    (t_states, t_qkv), (s_states, s_qkv) = (oracle.bert(m.weights(), m.shape, batch) for m in (teacher, student))
    t, s = flat(batch, t_states), flat(batch, s_states)
    names = [f"projections.{match.projection.number}" for match in found[0].pairs[0]]
    projected = [x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"] for x, name in zip(s[1:], names)]
    of_states = [[oracle.states_loss("mse", [a], [b], lengths) for b in projected] for a in t[1:]]
    q = [[flat(batch, layer[:2]) for layer in side] for side in (t_qkv, s_qkv)]
    of_attention = [[oracle.attention_loss(a, b, lengths, (4, 4), "mse", "scores", "each") for b in q[1]] for a in q[0]]
    expected = [earth_movers_distance(np.array(distances)) for distances in (of_states, of_attention)]
    assert {key: part.item() for key, part in parts.items()} == pytest.approx(
        dict(zip(("states/mse/emd", "attention/mse/emd"), expected)), rel=1e-4
    )
    assert loss.item() == pytest.approx(np.dot(expected, [1.0, 2.0]), rel=1e-4)


def test_the_gradient_is_that_of_the_distances_that_flow(backend):
    """Of every layer of the student, against float64 NumPy, for which the flow is part of the function."""
    teacher, student = ({**TINY, "num_hidden_layers": count} for count in (4, 2))
    random, batch = np.random.default_rng(5), make_batch([2, 1])
    of_teacher, of_student = ([random.standard_normal((3, 4)).astype(np.float32) for _ in range(n)] for n in (4, 2))
    sides = [map(backend.tensor, of_teacher), leaves(backend, *of_student)]

    class Given:
        def __init__(self, config, states):
            self.shape, self.states = Shape.of(config), dict(enumerate(states, 1))

        def run(self, batch, wanted):
            return Captured(self.states, {}, None)

    models = [Given(*both) for both in zip((teacher, student), sides)]  # noqa: F811
    found = parse({"of": "states", "teacher": "emd"}, teacher=teacher, student=student)
    loss, _ = Distillation(backend, *models, found)(batch)

    def value(*states):
        return earth_movers_distance(np.array([[np.mean((s - t) ** 2) for s in states] for t in of_teacher]))

    assert loss.item() == pytest.approx(value(*of_student), rel=1e-5)
    for got, expected in zip(gradients(backend, loss, sides[1]), oracle.numeric_gradients(value, of_student)):
        np.testing.assert_allclose(backend.numpy(got), expected, atol=1e-5)


def test_the_vocabulary_is_compared_at_masked_positions(backend):
    backend.seed(3)
    teacher, student = backend.model(WIDE, head="masked_lm"), backend.model(TINY, head="masked_lm")
    batch = make_batch([7, 3])
    masked = MaskedBatch(batch, np.array([1, 4, 8]), np.array([6, 7, 199]))
    matches = [LogitsMatch(LogitsLoss("ce", 2.0)), LabelsMatch(weight=0.5)]
    _, parts = Distillation(backend, teacher, student, matches)(masked)
    t, s = (
        backend.numpy(m.run(batch, Wanted(logits=True, at=masked.positions)).logits).astype(np.float64)
        for m in (teacher, student)
    )
    assert parts["logits/ce"].item() == pytest.approx(oracle.logits_loss(t, s, "ce", 2.0), rel=1e-4)
    gold = np.eye(200)[masked.labels] * 1e9
    assert parts["labels"].item() == pytest.approx(oracle.logits_loss(gold, s, "ce"), rel=1e-4)


def test_projections_learn_at_their_own_rate_and_stay_behind(backend, tmp_path):
    """Adam's first step is of the learning rate; a model's folder has no projection."""
    backend.seed(3)
    teacher, student = backend.model(WIDE), backend.model(TINY)
    found = parse({"of": "states", "project": "linear", "shared": True, "rate": 5e-3})
    distillation = Distillation(backend, teacher, student, found, seed=2)
    before = student.weights()
    assert before["projections.0.weight"].shape == (48, 32)
    assert before["projections.0.weight"].std() == pytest.approx(0.02, rel=0.1)
    optimizer = backend.optimizer(student, weight_decay=0.0, adam_epsilon=1e-12, max_grad_norm=0.0, loss_scale=1.0)
    optimizer.backward(distillation(make_batch([5, 2]))[0])
    optimizer.step(1e-3)
    after = student.weights()
    for name, rate in (("projections.0.weight", 5e-3), ("encoder.layer.1.attention.output.dense.weight", 1e-3)):
        assert np.median(np.abs(after[name] - before[name])) == pytest.approx(rate, rel=0.01)
    state = optimizer.state()
    assert any(key.startswith("projections.0.weight/") for key in state)
    write_model(tmp_path, TINY, after)
    assert not any(name.startswith(PROJECTIONS) for name in read_weights(tmp_path))


EVERY_LOSS = [
    *({"of": "states", "loss": loss, "project": "tanh"} for loss in ("mse", "cos", "pkd", "gram")),
    {"of": "states", "loss": "nst"},
    *({"of": "attention", "loss": loss, "heads": heads} for loss, heads in (("mse", "each"), ("ce", "mean"))),
    {"of": "attention", "on": "probabilities", "weight": 1000},
]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_losses_are_those_of_single_precision(torch_backend, precision):
    """And so is the gradient's norm: only products are in low precision."""
    if precision == "bfloat16" and precision not in torch_backend.devices()[0].precisions:
        pytest.skip("this processor has no bfloat16")
    sizes = {"hidden_size": 192, "num_attention_heads": 4, "intermediate_size": 768, "initializer_range": 0.05}
    configs = {**TINY, **sizes, "hidden_size": 256, "num_hidden_layers": 6}, {**TINY, **sizes}
    torch_backend.seed(1)
    weights = [torch_backend.model(config).weights() for config in configs]
    found = []
    for backend in (torch_backend, backends.load("torch", "cpu", precision)):
        teacher, student = (backend.model(*both) for both in zip(configs, weights))
        distillation = Distillation(
            backend, teacher, student, parse(*EVERY_LOSS, teacher=configs[0], student=configs[1])
        )
        optimizer = backend.optimizer(
            student, weight_decay=0.0, adam_epsilon=1e-8, max_grad_norm=1.0, loss_scale=1024.0
        )
        loss, parts = distillation(make_batch([40, 33, 21, 7]))
        optimizer.backward(loss)
        values = {key: part.item() for key, part in parts.items()}
        found.append({**values, "loss": loss.item(), "norm": optimizer.step(1e-3).grad_norm})
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[1] != found[0]


LINES = json.dumps(
    [
        {"of": "states", "project": "relu", "rate": 1e-2},
        {"of": "attention", "weight_schedule": "linear_growth"},
        {"of": "states", "teacher": "emd", "project": "linear"},
    ]
)
NO_RELATIONS = dict.fromkeys(("num_relation_heads", "teacher_layer_index", "student_layer_index", "alpha", "beta"))


def run_options(models, output, name, **changes):  # noqa: F811
    words = options(models, output, name, batch_size=16, matches=LINES, **changes)
    return [word for word in words if word.removeprefix("--").split("=")[0] not in NO_RELATIONS]


@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, models, name):  # noqa: F811
    """Projections, their moments and their rate among them, from a checkpoint half way."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main([*run_options(models, whole, name), "--eval_dir", str(DEMO)]) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-10")
    for path in ("README.md", "model.safetensors"):
        (resumed / path).unlink()
    assert any(
        key.startswith("projections.") for key in read_safetensors(resumed / "checkpoint-5" / "model.safetensors")
    )
    assert main([*run_options(models, resumed, name), "--eval_dir", str(DEMO), "--resume"]) == 0
    for file in ("model.safetensors", "checkpoint-10/model.safetensors", "checkpoint-10/optimizer.safetensors"):
        expected, got = (read_safetensors(folder / file) for folder in (whole, resumed))
        assert expected.keys() == got.keys()
        assert all(np.array_equal(expected[key], got[key]) for key in expected), file
    assert not any(key.startswith(PROJECTIONS) for key in read_safetensors(whole / "model.safetensors"))
    results = json.loads((whole / "eval_results.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"]
    assert len(results["after"]) == 1 + 4 + 3 + 1
    card = (whole / "README.md").read_text()
    assert "states/mse/3-3 x 1, attention/mse/0-0 x 1" in card
    assert "\nThe pooler got no gradient" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_two_processes_train_as_one_does(tmp_path, models, name):  # noqa: F811
    """Means are over the tokens and pairs of tokens of all; projections are averaged with the rest."""
    changes = {"adam_epsilon": 1e-4, "save_steps": 10}
    assert main(run_options(models, tmp_path / "one", name, **changes)) == 0
    words = run_options(models, tmp_path / "two", name, **changes, nproc=2)
    words = [word.replace("--batch_size=16", "--batch_size=8") for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "general_distill", *words], cwd=ROOT, env=environment(OMP_NUM_THREADS="1"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_safetensors(tmp_path / each / "checkpoint-10" / "model.safetensors") for each in ("one", "two"))
    for key, array in one.items():
        np.testing.assert_allclose(two[key], array, atol=1e-5, err_msg=key)
    for key in ("loss", "states/mse/3-3", "attention/mse/2-2", "states/mse/emd"):
        values = [[record[key] for record in metrics(tmp_path / each)] for each in ("one", "two")]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-4, err_msg=key)
