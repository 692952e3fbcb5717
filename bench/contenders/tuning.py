"""Who is measured in fine-tuning: each trains the same model on the same examples, then evaluates it.

A contender is a function of a `FinetuningJob`, run in a process of its own. What users wait for is
timed: batches made from tokenized examples, the updates, a checkpoint at the end; then
the logits of the dev set. Reading, tokenization and imports are not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from backends.interface import Precision
from text.features import Features


@dataclass(frozen=True)
class FinetuningJob:
    """A classification task's examples, and how to train on them."""

    train: Features
    dev: Features
    config: Mapping[str, Any]
    """The model's configuration, its classes among it."""
    weights: Mapping[str, np.ndarray] | None
    """What to start from; None is at random."""
    batch_size: int
    learning_rate: float
    steps: int
    seed: int
    precision: str
    """Ours, as `backends.interface.Backend` takes it."""

    def order(self) -> list[np.ndarray]:
        """Batches in plain random order, as many as there are steps."""
        random = np.random.default_rng(self.seed)
        batches: list[np.ndarray] = []
        while len(batches) < self.steps:
            order = random.permutation(len(self.train))
            batches += [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return batches[: self.steps]


@dataclass(frozen=True)
class Outcome:
    """What a contender took and predicted."""

    title: str
    train_seconds: float
    eval_seconds: float
    predicted: np.ndarray
    """int64 [dev examples]: classes."""


def ours(job: FinetuningJob, framework: str) -> Outcome:
    """This project, as `finetuning` runs it."""
    import backends
    from finetuning.arguments import FinetuneArguments
    from finetuning.finetune import predict
    from objectives.supervised import Supervised
    from training.loop import TrainingArguments, train

    backend = backends.load(framework, "cpu", cast(Precision, job.precision))
    backend.seed(job.seed)
    model = backend.model(job.config, job.weights, "sequence_classification")
    settings = FinetuneArguments(
        task_name="classification",
        model_name_or_path="",
        learning_rate=job.learning_rate,
        seed=job.seed,
        save_steps=job.steps,
    )
    arguments = TrainingArguments.of(settings, max_steps=job.steps, warmup_steps=job.steps // 10)

    def batches(start: int, _: int) -> Any:
        for number in range(start, job.steps):
            for which in job.train.epoch(number, job.batch_size, job.seed):
                yield job.train.labelled(which)

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        objective = Supervised(backend, model, "classification")
        train(backend, model, objective, batches, arguments, Path(folder), "train", len(job.train))
        trained = time.perf_counter()
    logits = predict(backend, model, job.dev)
    evaluated = time.perf_counter()
    predicted = np.stack(logits).argmax(axis=-1)
    return Outcome(f"ours, {framework}", trained - began, evaluated - trained, predicted)


def trainer(job: FinetuningJob, bf16: bool) -> Outcome:
    """transformers' Trainer with its collator that pads to the longest, everything else as it comes."""
    import torch
    import transformers

    torch.manual_seed(job.seed)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**job.config))
    if job.weights is not None:
        weights = {f"bert.{name}": torch.from_numpy(array) for name, array in job.weights.items()}
        model.load_state_dict(weights, strict=False)

    def rows(features: Features) -> list[dict[str, Any]]:
        return [
            {"input_ids": ids.tolist(), "token_type_ids": types.tolist(), "label": int(label[0])}
            for ids, types, label in zip(features.ids, _types(features), features.targets)
        ]

    def collate(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in batch)
        masked = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in batch]
        padded = {
            key: torch.tensor([row[key] + [0] * (longest - len(row[key])) for row in masked])
            for key in ("input_ids", "token_type_ids", "attention_mask")
        }
        return {**padded, "labels": torch.tensor([row["label"] for row in batch])}

    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            folder,
            use_cpu=True,
            bf16=bf16,
            per_device_train_batch_size=job.batch_size,
            per_device_eval_batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            warmup_steps=job.steps // 10,
            max_steps=job.steps,
            save_steps=job.steps,
            seed=job.seed,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        train, dev = rows(job.train), rows(job.dev)
        whole = transformers.Trainer(model, settings, data_collator=collate, train_dataset=train)
        began = time.perf_counter()
        whole.train()
        trained = time.perf_counter()
        logits = whole.predict(cast(Any, dev)).predictions
        evaluated = time.perf_counter()
    precision = "bfloat16" if bf16 else "float32"
    predicted = logits.argmax(axis=-1)
    return Outcome(f"Trainer, torch, {precision}", trained - began, evaluated - trained, predicted)


def paddlenlp(job: FinetuningJob) -> Outcome:
    """The loop of PP-MiniLM's run_clue.py: batches padded to their longest, in random order."""
    import paddle
    from paddlenlp.transformers import BertConfig, BertForSequenceClassification, LinearDecayWithWarmup

    from backends.pretrained import is_transposed, to_paddle_name

    paddle.set_device("cpu")
    paddle.seed(job.seed)
    settings = {key: value for key, value in job.config.items() if key != "model_type"}
    model = BertForSequenceClassification(BertConfig(**settings))
    if job.weights is not None:
        model.set_state_dict(
            {
                f"bert.{to_paddle_name(name)}": array.T if is_transposed(name, array) else array
                for name, array in job.weights.items()
            }
        )
    rate = LinearDecayWithWarmup(job.learning_rate, job.steps, job.steps // 10)
    optimizer = paddle.optimizer.AdamW(
        rate,
        epsilon=1e-6,
        parameters=model.parameters(),
        weight_decay=0.0,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
    )
    loss_of = paddle.nn.CrossEntropyLoss()

    def logits_of(features: Features, which: np.ndarray) -> Any:
        batch = features.batch(which)
        return model(paddle.to_tensor(batch.input_ids), paddle.to_tensor(batch.token_type_ids))

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        model.train()
        for which in job.order():
            labels = np.concatenate([job.train.targets[i] for i in which])
            loss = loss_of(logits_of(job.train, which), paddle.to_tensor(labels))
            loss.backward()
            optimizer.step()
            rate.step()
            optimizer.clear_grad()
        paddle.save(model.state_dict(), f"{folder}/model_state.pdparams")
        paddle.save(optimizer.state_dict(), f"{folder}/optimizer.pdopt")
        trained = time.perf_counter()
    model.eval()
    predicted = []
    with paddle.no_grad():
        for start in range(0, len(job.dev), job.batch_size):
            which = np.arange(start, min(start + job.batch_size, len(job.dev)))
            predicted.append(logits_of(job.dev, which).numpy().argmax(axis=-1))
    evaluated = time.perf_counter()
    return Outcome("PaddleNLP's loop, paddle, float32", trained - began, evaluated - trained, np.concatenate(predicted))


def _types(features: Features) -> list[np.ndarray]:
    return [(np.arange(len(ids)) >= first).astype(np.int64) for ids, first in zip(features.ids, features.first)]
