"""The loop, its schedule and its checkpoints."""

import hashlib
import itertools
import json
import math
import os
import pickle
import re

import numpy as np
import pytest
from conftest import TINY, make_batch

from backends.files import InputError, read_sealed, write_sealed
from backends.interface import Wanted
from objectives.distillation import Distillation, relation_matches
from objectives.relations import RelationLoss
from programs.ends import TrainingFailed
from training import checkpoint
from training.loop import TrainingArguments, train
from training.schedule import count_warmup_steps, linear_warmup_decay

ARGUMENTS = TrainingArguments(
    max_steps=10,
    learning_rate=1e-3,
    warmup_steps=2,
    weight_decay=0.01,
    adam_epsilon=1e-8,
    max_grad_norm=1.0,
    scale_loss=2.0**15,
    gradient_accumulation_steps=2,
    logging_steps=4,
    save_steps=3,
    keep_checkpoints=2,
    keep_every=0,
    max_nonfinite_steps=3,
    seed=0,
)


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (4, 10), (10, 10), (1, 3)])
def test_schedule_is_the_libraries(warmup, total):
    import torch
    from paddlenlp.transformers import LinearDecayWithWarmup
    from transformers import get_linear_schedule_with_warmup

    on_torch = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = get_linear_schedule_with_warmup(on_torch, warmup, total)
    on_paddle = LinearDecayWithWarmup(0.5, total, warmup)
    for step in range(total):
        expected = linear_warmup_decay(step, 0.5, warmup, total)
        assert scheduler.get_last_lr()[0] == pytest.approx(expected)
        assert on_paddle() == pytest.approx(expected)
        on_torch.step()
        scheduler.step()
        on_paddle.step()


def test_warmup_steps_override_the_proportion():
    assert count_warmup_steps(-1, 0.01, 1000) == 10
    assert count_warmup_steps(7, 0.01, 1000) == 7


def run(backend, folder, *, stop_after=None, config=None, selection=None, **changes):
    """Trains a tiny student with dropout; `stop_after` ends it like a kill, by an error."""
    config = {**TINY, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, **(config or {})}
    backend.seed(7)
    student, teacher = backend.model(config), backend.model(TINY)
    distillation = Distillation(backend, teacher, student, relation_matches(RelationLoss(8, beta=0.2), [(2, 2)]))

    def batches(number, sequences):
        assert sequences == 3 * number
        while True:
            if stop_after is not None and number == stop_after:
                raise RuntimeError("killed")
            yield make_batch([7, 4, 9], seed=number)
            number += 1

    arguments = TrainingArguments(**{**ARGUMENTS.__dict__, **changes})
    folder.mkdir(exist_ok=True)
    train(backend, student, distillation, batches, arguments, folder, "distil", 100, selection=selection)
    return student.weights()


def metrics(folder):
    """What was logged, without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if "per_second" not in key} for record in records]


def test_killed_and_resumed_is_the_same_run(backend, tmp_path):
    """Weights bit for bit, and metrics, also where the kill fell between checkpoint and log."""
    expected = run(backend, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(backend, tmp_path / "parts", stop_after=17)  # in step 9; checkpoint-6 exists
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "parts")] == ["checkpoint-3", "checkpoint-6"]
    got = run(backend, tmp_path / "parts")
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert [record["step"] for record in metrics(tmp_path / "whole")] == [4, 8, 10]


def test_metrics_say_everything(backend, tmp_path):
    run(backend, tmp_path, max_steps=4)
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    parts = {f"{relation}/{pair}" for relation in ("token", "sample") for pair in ("q-q", "k-k", "v-v")}
    named = {"step", "epoch", "loss", "learning_rate", "grad_norm", "truncated_lines"}
    assert record.keys() == parts | named | {"sequences_per_second", "tokens_per_second"}
    weighted = sum(record[part] * (0.8 if part.startswith("token") else 0.2) for part in parts)
    assert record["loss"] == pytest.approx(weighted, rel=1e-4)
    assert record["learning_rate"] == pytest.approx(1e-3 * 1 / 2)
    assert record["epoch"] == pytest.approx(4 * 2 * 3 / 100)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_accumulation_is_a_larger_batch(backend):
    """Two halves of equally long lines give the gradient of the whole."""
    teacher, student = backend.model(TINY), backend.model(TINY)
    norms = []
    for pieces in (1, 2):
        model = backend.model(TINY, student.weights())
        distillation = Distillation(backend, teacher, model, relation_matches(RelationLoss(8), [(2, 2)]))
        optimizer = backend.optimizer(model, weight_decay=0, adam_epsilon=1e-8, max_grad_norm=0, loss_scale=1)
        batch = make_batch([6, 6, 6, 6])
        for piece in range(pieces):
            rows = slice(piece * 4 // pieces, (piece + 1) * 4 // pieces)
            part = batch._replace(**{name: getattr(batch, name)[rows] for name in batch._fields[:3]})
            optimizer.backward(distillation(part)[0] / pieces)
        norms.append(optimizer.step(1e-3).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_micro_batches_may_have_parts_of_their_own(backend, tmp_path):
    """Each is the mean over those that had it; and the objective is told how much of training is done."""
    model = backend.model(TINY)
    heard = []

    def objective(batch, done):
        heard.append(done)
        state = model.run(batch, Wanted(states=[1])).states[1]
        loss = (state * state).mean()
        part = backend.tensor(np.array(float(len(heard)), np.float32))
        return loss, {"odd" if len(heard) % 2 else "even": part}

    arguments = TrainingArguments(**{**ARGUMENTS.__dict__, "max_steps": 4, "logging_steps": 2})
    train(backend, model, objective, lambda *_: itertools.repeat(make_batch([4, 2])), arguments, tmp_path, "x", 9)
    assert heard == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert [(each["odd"], each["even"]) for each in metrics(tmp_path)] == [(2, 3), (6, 7)]


def failing_from(monkeypatch, first, last, fault):
    """Makes the losses of some batches, counted from 1, not finite, or only their gradients."""
    calls = []
    original = Distillation.__call__

    def failing(self, batch, done):
        calls.append(batch)
        loss, parts = original(self, batch, done)
        if not first <= len(calls) <= last:
            return loss, parts
        return (loss * math.nan if fault == "loss" else loss + (loss * 0).sqrt()), parts

    monkeypatch.setattr(Distillation, "__call__", failing)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(backend, tmp_path, monkeypatch, fault):
    """Neither weights nor moments; it is counted, left out of the means, and the schedule waits for it."""
    failing_from(monkeypatch, 5, 6, fault)
    run(backend, tmp_path, gradient_accumulation_steps=1, logging_steps=1, save_steps=1, keep_checkpoints=10)
    saved = {step: checkpoint.Checkpoint(tmp_path / f"checkpoint-{step}", step, {}) for step in (3, 4, 6, 7)}
    for kind in ("weights", "optimizer"):
        arrays = {step: getattr(one, kind)() for step, one in saved.items()}
        for name, array in arrays[4].items():
            np.testing.assert_array_equal(arrays[6][name], array, err_msg=name)
        for a, b in ((3, 4), (6, 7)):
            assert any((arrays[a][name] != arrays[b][name]).any() for name in arrays[a])
    records = metrics(tmp_path)
    assert [record.get("nonfinite_steps", 0) for record in records] == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert [record["step"] for record in records if record["loss"] is None] == [5, 6]
    assert [record["learning_rate"] for record in records[4:7]] == [linear_warmup_decay(4, 1e-3, 2, 10)] * 3


def test_too_many_that_are_not_finite_stop_the_run(backend, tmp_path, monkeypatch):
    """The last checkpoint is named, and what the last was computed from is there to be looked at."""
    failing_from(monkeypatch, 2 * 4 + 1, 100, "loss")
    with pytest.raises(TrainingFailed, match=r"loss nan, .* at step 7, the last of 3 in a row") as failed:
        run(backend, tmp_path, save_steps=3)
    assert f"the last checkpoint is {tmp_path / 'checkpoint-6'}" in str(failed.value)
    path = tmp_path / "nonfinite-step-7-rank-0.npz"
    assert f"its batch is in {path}," in str(failed.value)
    with np.load(path, allow_pickle=False) as arrays:
        for micro in range(2):
            for name, array in make_batch([7, 4, 9], seed=12 + micro)._asdict().items():
                if isinstance(array, np.ndarray):
                    np.testing.assert_array_equal(arrays[f"{micro}.{name}"], array)


def damage_size(folder):
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_content(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_size, r"optimizer.safetensors is truncated, \d+ bytes where \d+ were written"),
        (damage_content, r"model.safetensors is not what was written \(its hash is another\)"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is truncated, 0 bytes"),
        (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (
            lambda folder: (folder / "trainer_state.json").write_text('{"step": 10, "fi'),
            "trainer_state.json is damaged .*Unterminated",
        ),
        (lambda folder: (folder / "trainer_state.json").write_text("[10]"), "trainer_state.json is damaged, or of an"),
    ],
)
def test_damaged_checkpoints_are_passed_over(torch_backend, tmp_path, capsys, damage, says):
    """The newest that is whole is taken, with a word on why not a newer one; if none is, training does not start."""
    expected = run(torch_backend, tmp_path)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    damage(tmp_path / "checkpoint-10")
    capsys.readouterr()
    got = run(torch_backend, tmp_path)
    told = capsys.readouterr().err.splitlines()
    assert re.match(rf"{tmp_path}/checkpoint-10 is passed over: .*{says}", told[0])
    assert told[1] == f"distil: goes on after step 9 of {tmp_path / 'checkpoint-9'}"
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array)
    for step in (9, 10):
        damage(tmp_path / f"checkpoint-{step}")
    with pytest.raises(InputError, match=rf"no checkpoint in {tmp_path} is whole \({tmp_path}/checkpoint-10 .*{says}"):
        run(torch_backend, tmp_path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_checkpoints_with_pickles_in_them_run_nothing(torch_backend, tmp_path, name):
    """Though the record of the file's size and hash was made to fit."""
    run(torch_backend, tmp_path, max_steps=3)
    state_path, path = (tmp_path / "checkpoint-3" / file for file in ("trainer_state.json", name))
    path.write_bytes(pickle.dumps({"weight": Bomb(tmp_path / "pwned")}))
    state = read_sealed(state_path)
    state["files"][name] = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    write_sealed(state_path, state)
    with pytest.raises(InputError, match=rf"^{path}: cannot be read .* not a safetensors file$"):
        run(torch_backend, tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_newest_and_every_nth_checkpoint_stay(torch_backend, tmp_path):
    run(torch_backend, tmp_path, max_steps=17, save_steps=2, keep_every=6)
    steps = [path.name.removeprefix("checkpoint-") for path in checkpoint.checkpoints(tmp_path)]
    assert steps == ["6", "12", "16", "17"]


def test_a_broken_checkpoint_goes_once_the_run_has_another(tmp_path):
    """It is later than where the run resumed, and must not count among the newest."""
    weights = {"w": np.zeros(3, np.float32)}
    for step in (100, 200):
        checkpoint.save(tmp_path, step, weights, weights, {}, keep=1, keep_every=100)
    (tmp_path / "checkpoint-250").mkdir()
    saved = checkpoint.save(tmp_path, 230, weights, weights, {}, keep=1, keep_every=100)
    assert saved.exists()
    steps = [path.name.removeprefix("checkpoint-") for path in checkpoint.checkpoints(tmp_path)]
    assert steps == ["100", "200", "230"]


def test_every_flipped_bit_of_the_state_is_found(tmp_path, monkeypatch):
    """The checkpoint before it is taken, with a line."""
    told = []
    monkeypatch.setattr(checkpoint, "say", told.append)
    weights = {"w": np.zeros(3, np.float32)}
    for step in (1, 2):
        checkpoint.save(tmp_path, step, weights, weights, {"best": 1e-05, "window": {"sums": {}}}, 2, 0)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    content = path.read_bytes()
    assert checkpoint.newest(tmp_path).step == 2 and not told
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert checkpoint.newest(tmp_path).step == 1
        assert "trainer_state.json is" in told.pop() and not told


def strange(folder):
    """Everything that looks like a checkpoint and is none of ours, under a folder."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    for name in ("precious.txt", "model.safetensors"):
        (elsewhere / name).write_text("precious")
    (folder / "checkpoint-999999").write_text("precious")
    (folder / "checkpoint-999998").symlink_to(elsewhere / "precious.txt")
    (folder / "checkpoint-999997").symlink_to(folder / "nowhere")
    (folder / "checkpoint-999996").symlink_to(elsewhere)
    for name in ("checkpoint-999995", "checkpoint-1e3", "checkpoint-٣", "checkpoint-0007", "checkpoint-"):
        (folder / name).mkdir()
        (folder / name / "precious.txt").write_text("precious")
    return {path.relative_to(folder.parent) for path in [*folder.rglob("*"), *elsewhere.rglob("*")]}


def test_what_only_looks_like_a_checkpoint_is_left_alone(tmp_path):
    output, weights = tmp_path / "out", {"w": np.zeros(3, np.float32)}
    output.mkdir()
    before = strange(output)
    (output / "checkpoint-999994").mkdir()  # which is none and holds nothing
    for step in (1, 2, 3):
        checkpoint.save(output, step, weights, weights, {}, keep=1, keep_every=0)
        assert checkpoint.newest(output).step == step
    saved = {path.relative_to(tmp_path) for path in output.glob("checkpoint-3/**/*")}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == before | saved | {
        (output / "checkpoint-3").relative_to(tmp_path), output.relative_to(tmp_path),
        (tmp_path / "elsewhere").relative_to(tmp_path),
    }  # fmt: skip
    (output / "checkpoint-4").write_text("precious")
    with pytest.raises(OSError, match="checkpoint-4: is in the way, and not a checkpoint of this run; move it away"):
        checkpoint.save(output, 4, weights, weights, {}, keep=1, keep_every=0)
    assert checkpoint.newest(output).step == 3


def test_a_checkpoint_that_was_moved_and_linked_to_is_read_and_stays(tmp_path):
    output, weights = tmp_path / "out", {"w": np.zeros(3, np.float32)}
    checkpoint.save(output, 1, weights, weights, {}, keep=1, keep_every=0)
    moved = (output / "checkpoint-1").rename(tmp_path / "moved")
    (output / "checkpoint-1").symlink_to(moved)
    assert checkpoint.newest(output).step == 1
    checkpoint.save(output, 2, weights, weights, {}, keep=1, keep_every=0)
    assert checkpoint.newest(output).step == 2
    assert (output / "checkpoint-1").resolve() == moved and len(list(moved.iterdir())) == 3


def test_a_damaged_log_goes_on(torch_backend, tmp_path, capsys):
    """Half lines, garbage and what is no record are left out, with a word."""
    run(torch_backend, tmp_path, max_steps=6, logging_steps=1)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\xff\x00\n", b"[1]\n", b'{"step": "2"}\n', *lines[2:], b'{"step": 7']))
    capsys.readouterr()
    run(torch_backend, tmp_path, max_steps=8, logging_steps=1)
    assert f"{path}: 3 lines are damaged and left out" in capsys.readouterr().err
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, 9))


def test_weights_that_became_infinite_are_neither_scored_nor_saved(backend, tmp_path):
    """By the very last update, whose loss was finite."""

    class Selection:
        def evaluate(self):
            raise AssertionError("scored")

        keep = evaluate

    with pytest.raises(TrainingFailed, match=r"weights are not finite after step 1, first .* no checkpoint yet"):
        run(backend, tmp_path, learning_rate=1e39, warmup_steps=0, max_steps=1)
    with pytest.raises(TrainingFailed, match="weights are not finite after step 1"):
        run(backend, tmp_path, selection=Selection(), learning_rate=1e39, warmup_steps=0, max_steps=1)
    assert not checkpoint.checkpoints(tmp_path)
    assert len(metrics(tmp_path)) == 1 and math.isfinite(metrics(tmp_path)[0]["loss"])


def test_full_disk_leaves_the_last_checkpoint(torch_backend, tmp_path, monkeypatch):
    run(torch_backend, tmp_path, max_steps=3)
    written = checkpoint.write_safetensors

    def full(path, *rest):
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device", str(path))
        written(path, *rest)

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        run(torch_backend, tmp_path)
    assert checkpoint.newest(tmp_path).step == 3
    assert not list(tmp_path.glob(".checkpoint*"))


def test_other_text_is_refused(torch_backend, tmp_path):
    run(torch_backend, tmp_path, max_steps=3)
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    write_sealed(state, {**read_sealed(state), "lines": 99})
    with pytest.raises(InputError, match="the text has 100 lines, but .* saw 99"):
        run(torch_backend, tmp_path)


def test_fp16_with_a_loss_scaler(torch_backend, tmp_path, monkeypatch):
    """autocast and GradScaler run on this CPU: an overflow skips its step, halves the scale and
    moves the schedule not."""
    import torch

    from backends.torch.core import TorchBackend

    backend = TorchBackend("cpu")
    backend.dtype, backend.precision = torch.float16, "float16"
    run(backend, tmp_path, scale_loss=2.0**60, logging_steps=1, max_steps=50, gradient_accumulation_steps=1)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = records[-1]["skipped_steps"]
    assert 0 < skipped < 50
    assert records[0]["loss_scale"] == 2.0**60
    assert records[-1]["loss_scale"] == 2.0**60 / 2**skipped
    for before, record in zip(records, records[1:]):
        updates = before["step"] - before["skipped_steps"]
        assert record["learning_rate"] == linear_warmup_decay(updates, 1e-3, 2, 50)
        assert (record["grad_norm"] is None) == (record["skipped_steps"] > before["skipped_steps"])
    assert all(math.isfinite(record["loss"]) for record in records)
    saved = checkpoint.newest(tmp_path).optimizer()
    assert saved["scaler/scale"][0] == records[-1]["loss_scale"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_steps": 0}, "--max_steps 0"),
        ({"learning_rate": 0.0}, "--learning_rate"),
        ({"save_steps": -1}, "save_steps"),
        ({"keep_every": 4}, "--keep_every 4: must be a multiple of --save_steps 3, or 0"),
        ({"max_nonfinite_steps": 0}, "--max_nonfinite_steps 0"),
    ],
)
def test_senseless_arguments(change, says):
    with pytest.raises(InputError, match=says):
        TrainingArguments(**{**ARGUMENTS.__dict__, **change})
