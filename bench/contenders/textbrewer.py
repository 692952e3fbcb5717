"""TextBrewer's GeneralDistiller, hidden states matched layer to layer (Yang et al., 2020, arXiv:2002.12620)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator

import textbrewer
import torch
import transformers

from backends.interface import Batch
from backends.shape import Shape
from bench.contenders import DistillationJob
from bench.contenders.frameworks import OnTorch


class TextBrewer(OnTorch):
    title = "TextBrewer, torch, float32"
    precision = "float32"

    def __init__(self, job: DistillationJob) -> None:
        super().__init__(job)
        logging.getLogger("Distillation").setLevel(logging.WARNING)
        self.device = "cuda" if job.on_gpu else "cpu"
        torch.manual_seed(0)
        teacher, student = (
            transformers.BertModel(transformers.BertConfig(**config, output_hidden_states=True)).to(self.device)
            for config in (job.teacher, job.student)
        )
        teacher.eval()
        student.train()
        teacher.register_forward_pre_hook(self._start)
        teacher.register_forward_hook(self._stop("teacher"))
        student.register_forward_pre_hook(self._start)
        student.register_forward_hook(self._stop("student"))
        layers = len(Shape.of(job.student).layers)
        stride = (job.teacher_layer + 1) // layers
        widths = Shape.of(job.student).hidden, Shape.of(job.teacher).hidden
        matches = [
            {
                "layer_T": layer * stride,
                "layer_S": layer,
                "feature": "hidden",
                "loss": "hidden_mse",
                "weight": 1,
                **({} if widths[0] == widths[1] else {"proj": ["linear", *widths]}),
            }
            for layer in range(layers + 1)
        ]
        self.folder = tempfile.TemporaryDirectory()
        self.distiller = textbrewer.GeneralDistiller(
            textbrewer.TrainingConfig(device=self.device, output_dir=self.folder.name),
            textbrewer.DistillationConfig(intermediate_matches=matches),
            teacher,
            student,
            *[lambda batch, outputs: {"hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}] * 2,
        )
        self.student = student
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=job.learning_rate)
        self.distiller.initialize_training(self.optimizer, None, None, None)

    def step(self, batches: Iterator[Batch], number: int) -> Batch:
        """What `GeneralDistiller.train` does for a batch, so that its parts can be timed."""
        with self.phase("data"):
            batch = next(batches)
            names = ("input_ids", "token_type_ids", "attention_mask")
            inputs = {name: torch.from_numpy(array) for name, array in zip(names, batch[:3])}
        models = self.seconds.get("teacher", 0.0) + self.seconds.get("student", 0.0)
        with self.phase("loss"):
            loss, losses = self.distiller.train_on_batch(inputs, {})
            self.distiller.write_loss(loss, number, losses)
        self.seconds["loss"] -= self.seconds["teacher"] + self.seconds["student"] - models
        with self.phase("backward"):
            loss.backward()
        with self.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return batch

    def _start(self, module, inputs) -> None:
        self._open = self.phase("models")
        self._open.__enter__()

    def _stop(self, name):
        def hook(module, inputs, outputs) -> None:
            self._open.__exit__(None, None, None)
            self.seconds[name] = self.seconds.get(name, 0.0) + self.seconds.pop("models")

        return hook
