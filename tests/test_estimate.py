"""The dry run and the model of scaling: what they reckon, counted or measured another way."""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, TINY, environment, make_batch

import backends
from backends.interface import Wanted
from backends.pretrained import write_model
from backends.shape import Shape
from backends.torch.core import TorchBackend
from bench.distill import SIZES, job_of, model_flops
from bench.scaling import scaling
from bench.scaling_prediction import (
    OBJECTIVES,
    Cluster,
    Link,
    all_gather,
    all_reduce,
    backward_share,
    gathered_bytes,
    predict,
    relation_elements,
    returned_bytes,
    ring_all_gather,
    ring_all_reduce,
    straggling,
)
from general_distill.__main__ import main
from general_distill.estimate import (
    activation_bytes,
    expected_maximum,
    kept_checkpoints,
    relation_bytes,
    rows,
)
from objectives.groups import GROUPS
from objectives.relations import RelationLoss
from text.corpus import Corpus
from text.tokenizer import WordPiece
from training import checkpoint
from training.loop import TrainingArguments

DEMO = ROOT / "general_distill" / "demo"
LENGTHS = np.array([7, 30, 12, 60, 33, 33, 2, 50])
FIRST_MOMENT = {"torch": "/exp_avg", "paddle": "/moment1_0"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, torch_backend):
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = WordPiece.trained(Corpus(DEMO, tmp_path_factory.mktemp("index")), 3000)
    tokenizer.save(folder, 64)
    config = {**TINY, "vocab_size": len(tokenizer)}
    write_model(folder, config, torch_backend.model(config).weights())
    return folder


def options(output, **changes):
    settings = {
        "input_dir": DEMO, "output_dir": output, "device": "cpu", "model_type": "bert", "num_layers": 2,
        "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_relation_heads": 8,
        "teacher_layer_index": 1, "student_layer_index": 1, "beta": 0.2, "max_seq_length": 24, "batch_size": 8,
        "gradient_accumulation_steps": 2, "max_steps": 50, "save_steps": 10, "keep_checkpoints": 2, "keep_every": 20,
        "pretrain.num_layers": 2, "pretrain.hidden_size": 48, "pretrain.num_attention_heads": 4,
        "pretrain.intermediate_size": 64, "pretrain.max_steps": 30, "pretrain.vocab_size": 3000, **changes,
    }  # fmt: skip
    given = "teacher_model_name_or_path" in settings
    words = [f"--{key}={value}" for key, value in settings.items() if not (given and key.startswith("pretrain."))]
    return ["--dry_run", *words]


def columns(told):
    """The table's cells by the name of their row."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in told.splitlines() if line.strip()]
    return {name: cells for name, *cells in lines}


def number(cell):
    return float(cell.replace(",", ""))


def size(cell):
    count, unit = cell.split()
    return number(count) * {"MiB": 2**20, "GiB": 2**30}[unit]


@pytest.mark.parametrize("name", ["torch", "paddle"])
@pytest.mark.parametrize("given", [True, False])
def test_a_dry_run_tells_what_the_run_takes_and_leaves_nothing(tmp_path, monkeypatch, capsys, teacher, name, given):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    there = {"teacher_model_name_or_path": teacher} if given else {}
    assert main(options(tmp_path / "out", backend=name, **there)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert {path.name for path in (tmp_path / "temporary").iterdir()} <= {"jieba.cache"}

    found = columns(capsys.readouterr().out)
    lines = [line for path in sorted(DEMO.glob("*.txt")) for line in path.read_text(encoding="utf-8").split("\n")]
    tokenizer = WordPiece.from_model(teacher)  # a vocabulary like the one that is trained
    tokens = np.mean([min(24, len(tokenizer.tokenizer.encode(line))) for line in lines if line.strip()])
    assert number(found["tokens a step"][-1]) == pytest.approx(16 * tokens, abs=1)
    assert number(found["tokens in all"][-1]) == pytest.approx(50 * 16 * tokens, rel=1e-3)
    assert found["steps"] == (["50"] if given else ["30", "50"])
    assert found["lines a step"] == (["16"] if given else ["32", "16"])
    assert found["checkpoints written"][-1] == "5"
    assert found["checkpoints kept"][-1] == "3"  # 20, 40 and 50
    assert all(number(seconds) > 0 for seconds in found["seconds a step"])


MATCHES = "[{of: states, teacher: last, project: linear, shared: true}, {of: attention, teacher: 1, student: 1}]"


@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_a_dry_run_counts_what_matches_train(tmp_path, capsys, teacher, name):
    """The moments that Adam has after a step, of the student and of projections."""
    words = options(tmp_path / "out", backend=name, teacher_model_name_or_path=teacher)
    idle = ("num_relation_heads", "teacher_layer_index", "student_layer_index", "beta")
    words = [word for word in words if word.removeprefix("--").split("=")[0] not in idle]
    assert main([*words, "--matches", MATCHES]) == 0
    told = columns(capsys.readouterr().out)["student"][0]
    trained, of_projections = (
        number(re.search(pattern, told)[1]) for pattern in (r"([\d,]+) of them", r"and ([\d,]+) of")
    )
    words.remove("--dry_run")
    assert main([*words, "--matches", MATCHES, "--max_steps=10"]) == 0
    moments = checkpoint.newest(tmp_path / "out").optimizer()
    counts = [0, 0]
    for key, array in moments.items():
        if key.endswith(FIRST_MOMENT[name]) and array.any():
            counts[key.startswith("projections.")] += array.size
    assert counts == [trained, of_projections]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_memory_is_what_the_run_takes(tmp_path, torch_backend, name):
    """At a size where libraries are not most of it, in a process of its own."""
    (folder := tmp_path / "teacher").mkdir()
    tokenizer = WordPiece.trained(Corpus(DEMO, tmp_path / "index"), 3000)
    tokenizer.save(folder, 64)
    large = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    config = {**TINY, **large, "num_hidden_layers": 4, "vocab_size": len(tokenizer)}
    write_model(folder, config, torch_backend.model(config).weights())
    argv = options(
        tmp_path / "out", backend=name, teacher_model_name_or_path=folder, teacher_layer_index=3, num_layers=4, **large,
        student_layer_index=3, num_relation_heads=48, max_seq_length=64, batch_size=64, gradient_accumulation_steps=1,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "general_distill", *argv], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows_of = columns(done.stdout)
    libraries, expected, measured = (
        size(rows_of[row][-1]) for row in ("libraries, text", "expected", "measured so far")
    )
    assert libraries < measured / 2
    assert expected == pytest.approx(measured, rel=0.1)


def test_a_run_that_is_there_is_not_disturbed(tmp_path, teacher):
    for name in ("arguments.yaml", "notes.txt"):
        (tmp_path / name).write_text("not to be read: [")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    assert main(options(tmp_path, backend="torch", teacher_model_name_or_path=teacher)) == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_two_processes_tell_once(tmp_path, teacher):
    argv = options(tmp_path / "out", backend="torch", teacher_model_name_or_path=teacher, nproc=2)
    command = [sys.executable, "-m", "general_distill", *argv]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("seconds a step") == 1
    found = columns(done.stdout)
    assert found["lines a step"] == ["32"]
    assert "DDP's buckets" in found
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_still_told(tmp_path, capfd, teacher):
    assert main(options(tmp_path / "out", teacher_model_name_or_path=teacher, num_relation_heads=7)) == 2
    assert "num_relation_heads 7" in capfd.readouterr().err


@pytest.mark.parametrize("captured", [0, 1, 2])
def test_parameters_are_those_of_the_model(backend, captured):
    """And those with a gradient are those that Adam has moments of, after a step."""
    config = {**TINY, "hidden_size": 40, "intermediate_size": 72}
    model = backend.model(config)
    shape = Shape.of(config)
    assert shape.weights() == sum(array.size for array in model.weights().values())
    headed = backend.model(config, head="masked_lm").weights()
    assert shape.weights(masked_lm=True) == sum(a.size for name, a in headed.items() if not name.startswith("pooler"))
    optimizer = backend.optimizer(model, weight_decay=0.0, adam_epsilon=1e-8, max_grad_norm=1.0, loss_scale=1.0)
    found = model.run(make_batch([5, 3]), Wanted(qkv=[captured])).qkv[captured]
    optimizer.backward(sum((x * x).sum() for x in found))
    optimizer.step(1e-3)
    moments = sum(a.size for key, a in optimizer.state().items() if key.endswith(FIRST_MOMENT[backend.name]))
    assert shape.reached_weights(captured) == moments


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_what_torch_saves(precision, activation, dropout):
    """The storages that autograd saves in a forward pass, weights and their copies left out, within a quarter."""
    import torch

    backend = backends.load("torch", "cpu", precision)
    config = {
        **TINY,
        "hidden_size": 64,
        "intermediate_size": 192,
        "hidden_act": activation,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    model = backend.model(config)
    model.train()
    shapes = {tuple(p.shape) for p in model.module.parameters() if p.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    saved = {}

    def pack(tensor):
        if tuple(tensor.shape) not in shapes and not isinstance(tensor, torch.nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), backend.autocast():
        model.run(make_batch(LENGTHS).shortest_first(), Wanted(qkv=[2]))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    batch = rows(LENGTHS, len(LENGTHS), False, "cpu")
    assert activation_bytes(Shape.of(config), config, 2, batch, backend, captured=True) == pytest.approx(
        measured, rel=0.25
    )


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_relation_memory_is_what_torch_allocates(torch_backend, alpha, beta):
    """The peak of what the loss allocates, beside captured Q, K, V that are there before."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from backends.interface import QKV

    lengths = np.full(24, 48)
    loss = RelationLoss(16, alpha, beta)
    sides = [QKV(*(torch.randn(24 * 48, width) for _ in range(3))) for width in (128, 64)]
    for x in sides[1]:
        x.requires_grad_()
    mask = np.ones((24, 48), np.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = loss(torch_backend, *sides, mask)
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = np.cumsum(changes).max()
    captured = sum(x.numel() * 4 for side in sides for x in side)
    expected = sum(relation_bytes(loss, (128, 64), lengths, 24, 24 * 48, torch_backend))
    assert expected == pytest.approx(peak + captured, rel=0.25)
    del kept


def test_longest_of_some_lines():
    random = np.random.default_rng(0)
    drawn = random.choice(LENGTHS, (20000, 5)).max(axis=1).mean()
    assert expected_maximum(LENGTHS, 5) == pytest.approx(drawn, rel=0.01)


@pytest.mark.parametrize(("steps", "every", "keep"), [(50, 20, 2), (45, 0, 3), (7, 0, 2), (100, 30, 1)])
def test_kept_checkpoints_are_those_that_are_left(tmp_path, steps, every, keep):
    names = ("max_steps", "learning_rate", "warmup_steps", "weight_decay", "adam_epsilon", "max_grad_norm")
    training = TrainingArguments(
        **dict.fromkeys(names, 1), scale_loss=1, gradient_accumulation_steps=1, logging_steps=1, save_steps=10,
        keep_checkpoints=keep, keep_every=every, max_nonfinite_steps=1, seed=0,
    )  # fmt: skip
    written = 0
    for step in range(1, steps + 1):
        if step % 10 == 0 or step == steps:
            checkpoint.save(tmp_path, step, {}, {}, {}, keep, every)
            written += 1
    assert kept_checkpoints(training, steps) == (written, len(checkpoint.checkpoints(tmp_path)))


def ring(workers, link, payloads):
    """Workers in a ring that add up a payload each, chunk by chunk: what each has in the end, and when the last has it.

    A worker sends a chunk as soon as it has it and its link is free; it knows no formula.
    """
    held = [np.array_split(payload.astype(float), workers) for payload in payloads]
    ready = [[0.0] * workers for _ in range(workers)]
    free = [0.0] * workers
    for step in range(2 * (workers - 1)):
        sent = []
        for worker in range(workers):
            chunk = (worker - step) % workers
            start = max(ready[worker][chunk], free[worker])
            free[worker] = start + link.latency + held[worker][chunk].nbytes / link.bandwidth
            sent.append((chunk, held[worker][chunk], free[worker]))
        for worker, (chunk, values, at) in enumerate(sent):
            to = (worker + 1) % workers
            held[to][chunk] = held[to][chunk] + values if step < workers - 1 else values
            ready[to][chunk] = max(ready[to][chunk], at)
    return [np.concatenate(chunks) for chunks in held], max(map(max, ready))


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("latency", [0.0, 1e-3])
def test_all_reduce_takes_what_a_simulated_ring_takes(workers, latency):
    link = Link(1e6, latency)
    payloads = np.random.default_rng(0).standard_normal((workers, 24 * 50))
    sums, seconds = ring(workers, link, payloads)
    for one in sums:
        np.testing.assert_allclose(one, payloads.sum(axis=0))
    assert ring_all_reduce(payloads[0].nbytes, workers, link) == pytest.approx(seconds)


def test_nodes_are_a_ring_of_rings():
    """Scattered sums and gathering inside each node, and every device's share between them, at a node's bandwidth."""
    inside, between = Link(1e9, 1e-6), Link(1e8, 1e-5)
    cluster = Cluster(4, inside, between, 0.0, 1.0, 1.0, 1.0)
    size, nodes = 4096.0, 3
    share = ring_all_reduce(size / 4, nodes, Link(between.bandwidth / 4, between.latency))
    assert all_reduce(size, 12, cluster) == pytest.approx(ring_all_reduce(size, 4, inside) + share)
    assert all_reduce(size, 4, cluster) == ring_all_reduce(size, 4, inside)
    assert all_gather(size, 4, cluster) == ring_all_gather(size, 4, inside)
    assert all_reduce(size, 1, cluster) == all_gather(size, 1, cluster) == 0.0


class Two(TorchBackend):
    """One of two processes, of which the other has the same; counts what it gives away."""

    world_size, rank, given = 2, 0, 0

    def gather(self, x):
        if x.ndim == 2:
            self.given += x.element_size() * x.numel()
        return [x, x]


def test_gathered_samples_take_their_bytes():
    import torch

    from backends.interface import QKV

    backend = Two("cpu")
    mask = np.arange(9) < np.array([[6], [2], [9]])
    sides = [QKV(*(torch.randn(int(mask.sum()), width) for _ in range(3))) for width in (24, 16)]
    RelationLoss(4, beta=1.0, gather_samples=True)(backend, *sides, mask)
    tokens = int(mask.sum())
    assert backend.given == gathered_bytes((24, 16), tokens, 4) + returned_bytes((24, 16), tokens)


@pytest.mark.parametrize("relation", ["token", "sample"])
def test_relation_elements_are_those_of_the_groups(relation):
    """On average over batches drawn from the lengths."""
    random = np.random.default_rng(0)
    [objective] = [one for one in OBJECTIVES if one.name == "masked, each its own"]
    counted = []
    for _ in range(300):
        mask = np.arange(60) < random.choice(LENGTHS, (16, 1))
        counted.append(5 * sum(g.rows.shape[0] * g.rows.shape[1] ** 2 for g in GROUPS[relation](mask, 5, "masked")))
    found = relation_elements(LENGTHS, 16, 16, 5, replace(objective, relation=relation))
    assert found == pytest.approx(np.mean(counted), rel=0.05)


def test_the_largest_of_the_batches():
    """Drawn, and for many lines from the normal distribution that their sums have."""
    assert straggling(LENGTHS, 8, 1) == 1.0
    random = np.random.default_rng(1)
    drawn = random.choice(LENGTHS, (4000, 4, 8)).sum(axis=2).max(axis=1).mean() / (8 * LENGTHS.mean())
    assert straggling(LENGTHS, 8, 4) == pytest.approx(drawn, rel=0.03)
    assert straggling(LENGTHS, 257, 4) == pytest.approx(straggling(LENGTHS, 256, 4), rel=0.02)


def test_a_prediction_is_the_sum_of_its_parts():
    cluster = Cluster(8, Link(1e11, 1e-5), Link(1e10, 1e-5), 0.7, 4e13, 5e12, 7e11)
    job = job_of(SIZES["large"], 21128, 128, True, "float16")
    for objective in OBJECTIVES:
        one, many = (predict(job, LENGTHS, objective, cluster, devices, 32, 1) for devices in (1, 64))
        assert one["step"] == pytest.approx(one["compute"] + one["relation"])
        parts = sum(many[key] for key in ("compute", "relation", "gather", "exposed"))
        assert many["step"] == pytest.approx(parts)
        assert many["exposed"] >= 0.3 * many["reduce"]
        assert (many["gather"] > 0) == objective.gathered
    [published, *_] = OBJECTIVES
    flops = model_flops(job, np.full(32, expected_maximum(LENGTHS, 32)))
    assert predict(job, LENGTHS, published, cluster, 8, 32, 1)["compute"] == pytest.approx(flops / 4e13)
    student, teacher = (
        layers * (8 * d * d + 4 * d * 4 * d + 4 * d) + 6 * d * d for layers, d in ((5, 768), (19, 1024))
    )
    assert backward_share(job) == pytest.approx(2 * student / (teacher + 3 * student))


def test_predictions_are_written(tmp_path):
    scaling(frameworks=[], input_dir=str(DEMO), output_dir=str(tmp_path))
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert {one["devices"] for one in found["weak"]} == {1, 8, 64, 512}
    assert "Predicted, not measured" in (tmp_path / "scaling.md").read_text()
    for one in found["strong"]:
        lines, micro = one["share"]
        assert one["devices"] * lines * micro == 1024
