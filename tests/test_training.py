"""The loop, its schedule and its checkpoints."""

import json
import math

import numpy as np
import pytest
from conftest import TINY, make_batch

from backends.interface import InputError
from objectives.relations import RelationDistillation, RelationLoss
from training import checkpoint
from training.loop import TrainingArguments, TrainingFailed, train
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


def run(backend, folder, *, stop_after=None, config=None, **changes):
    """Trains a tiny student with dropout; `stop_after` ends it like a kill, by an error."""
    config = {**TINY, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, **(config or {})}
    backend.seed(7)
    student, teacher = backend.model(config), backend.model(TINY)
    distillation = RelationDistillation(backend, teacher, student, RelationLoss(8, beta=0.2), [(2, 2)])

    def batches(start):
        number = start
        while True:
            if stop_after is not None and number == stop_after:
                raise RuntimeError("killed")
            yield make_batch([7, 4, 9], seed=number)
            number += 1

    arguments = TrainingArguments(**{**ARGUMENTS.__dict__, **changes})
    folder.mkdir(exist_ok=True)
    train(backend, student, distillation, batches, arguments, folder, "distil", 100)
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
        distillation = RelationDistillation(backend, teacher, model, RelationLoss(8), [(2, 2)])
        optimizer = backend.optimizer(model, weight_decay=0, adam_epsilon=1e-8, max_grad_norm=0, loss_scale=1)
        batch = make_batch([6, 6, 6, 6])
        for piece in range(pieces):
            rows = slice(piece * 4 // pieces, (piece + 1) * 4 // pieces)
            part = batch._replace(**{name: getattr(batch, name)[rows] for name in batch._fields[:3]})
            optimizer.backward(distillation(part)[0] / pieces)
        norms.append(optimizer.step(1e-3).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_nan_stops_the_run(backend, tmp_path, monkeypatch):
    """With the step and the last good checkpoint; nothing after it is written."""
    calls = []
    original = RelationDistillation.__call__

    def failing(self, batch):
        calls.append(batch)
        loss, parts = original(self, batch)
        return (loss * math.nan if len(calls) == 10 else loss), parts

    monkeypatch.setattr(RelationDistillation, "__call__", failing)
    with pytest.raises(TrainingFailed, match=r"the loss is nan at step 5; the last good checkpoint is .*checkpoint-3"):
        run(backend, tmp_path)
    assert checkpoint.newest(tmp_path).step == 3


def test_truncated_checkpoint_is_refused(torch_backend, tmp_path):
    run(torch_backend, tmp_path)
    file = tmp_path / "checkpoint-10" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"optimizer\.safetensors: truncated, .*resume from checkpoint-9"):
        run(torch_backend, tmp_path)
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    with pytest.raises(InputError, match=r"trainer_state\.json: damaged or missing"):
        run(torch_backend, tmp_path)


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
    state.write_text(state.read_text().replace('"lines": 100', '"lines": 99'))
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
    ],
)
def test_senseless_arguments(change, says):
    with pytest.raises(InputError, match=says):
        TrainingArguments(**{**ARGUMENTS.__dict__, **change})
