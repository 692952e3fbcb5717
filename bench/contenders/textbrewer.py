"""TextBrewer's distillers on transformers' models (Yang et al., 2020, arXiv:2002.12620), on batches padded to their
longest."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import textbrewer
import torch
import transformers

from backends.interface import Batch
from backends.shape import Shape
from bench.contenders import DistillationJob, TaskJob
from bench.contenders.frameworks import OnTorch
from text.features import LabelledBatch


class TextBrewer(OnTorch):
    """Its GeneralDistiller, hidden states matched layer to layer."""

    title = "TextBrewer, torch, float32"
    precision = "float32"

    def __init__(self, job: DistillationJob) -> None:
        super().__init__(job.on_gpu)
        torch.manual_seed(0)
        teacher, student = (
            transformers.BertModel(transformers.BertConfig(**config, output_hidden_states=True))
            for config in (job.teacher, job.student)
        )
        layers = len(Shape.of(job.student).layers)
        stride = (job.teacher_layer + 1) // layers
        widths = Shape.of(job.student).hidden, Shape.of(job.teacher).hidden
        states = [_states_match(layer * stride, layer, widths) for layer in range(layers + 1)]
        self._distil(
            textbrewer.GeneralDistiller,
            textbrewer.DistillationConfig(intermediate_matches=states),
            teacher,
            student,
            lambda batch, outputs: {"hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]},
            job.learning_rate,
        )

    def _distil(
        self,
        distiller: type[textbrewer.BasicDistiller],
        config: textbrewer.DistillationConfig,
        teacher: torch.nn.Module,
        student: torch.nn.Module,
        adaptor: Callable[[Mapping[str, Any], Any], dict[str, Any]],
        learning_rate: float,
    ) -> None:
        logging.getLogger("Distillation").setLevel(logging.WARNING)
        device = "cuda" if self.on_gpu else "cpu"
        teacher.to(device).eval()
        student.to(device).train()
        teacher.forward = self.timed("teacher", teacher.forward)
        student.forward = self.timed("student", student.forward)
        self.folder = tempfile.TemporaryDirectory()
        settings = textbrewer.TrainingConfig(device=device, output_dir=self.folder.name)
        self.distiller = distiller(settings, config, teacher, student, adaptor, adaptor)
        self.student = student
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
        self.distiller.initialize_training(self.optimizer, None, None, None)

    def step(self, batch: Any, number: int) -> None:
        """What `train` does for a batch, so that its parts can be timed."""
        with self.phase("loss"):
            loss, losses = self.losses(batch)
            self.distiller.write_loss(loss, number, losses)
        with self.phase("backward"):
            loss.backward()
        with self.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def losses(self, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and its parts."""
        with self.phase("data"):
            inputs = self._inputs(batch)
        return self.distiller.train_on_batch(inputs, {})

    def _inputs(self, batch: Batch) -> Any:
        names = ("input_ids", "token_type_ids", "attention_mask")
        return {name: torch.from_numpy(array) for name, array in zip(names, batch[:3])}


class TextBrewerOnTask(TextBrewer):
    """Its GeneralDistiller on a task: hidden states and attentions as transformers gives them (attentions are
    probabilities, after dropout), compared under the mask, and logits at temperature 8."""

    autocast = False

    def __init__(self, job: TaskJob) -> None:
        OnTorch.__init__(self)
        torch.manual_seed(0)
        widths = job.student["hidden_size"], job.teacher["hidden_size"]
        matches = [
            *(_states_match(*layers, widths) for layers in job.states),
            *(_match(*layers, "attention", "attention_mse") for layers in job.attention),
        ]
        outputs = {"output_hidden_states": bool(matches), "output_attentions": bool(matches)}
        # transformers gives attentions from this code alone.
        code = {"attn_implementation": "eager"} if matches else {}
        teacher, student = (
            transformers.BertForSequenceClassification(transformers.BertConfig(**config, **outputs, **code))
            for config in (job.teacher, job.student)
        )
        self._distil(*self._distiller(matches), teacher, student, self._adapt, job.learning_rate)

    def _distiller(self, matches: list[Any]) -> tuple[type[textbrewer.BasicDistiller], textbrewer.DistillationConfig]:
        config = textbrewer.DistillationConfig(temperature=8, intermediate_matches=matches)
        return textbrewer.GeneralDistiller, config

    @staticmethod
    def _adapt(batch: Mapping[str, Any], outputs: Any) -> dict[str, Any]:
        given = {"logits": outputs.logits, "inputs_mask": batch["attention_mask"]}
        if outputs.hidden_states is not None:
            given |= {"hidden": outputs.hidden_states, "attention": outputs.attentions}
        return given

    def losses(self, batch: LabelledBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            return super().losses(batch)

    def _inputs(self, batch: LabelledBatch) -> Any:
        return super()._inputs(batch.batch)


class TextBrewerAutocastOnTask(TextBrewerOnTask):
    """The same, its user having put `torch.autocast` around it."""

    title = "TextBrewer, torch, bfloat16 by autocast"
    precision = "bfloat16"
    autocast = True


class TextBrewerCachedOnTask(TextBrewerOnTask):
    """Its BasicDistiller, which keeps batches with the teacher's logits in memory: the first epoch is over."""

    title = "TextBrewer's BasicDistiller, torch, float32, answers kept"

    def __init__(self, job: TaskJob) -> None:
        super().__init__(job)
        batches = job.batches()
        for _ in range(len(job.features) // job.batch_size):
            self.distiller.cache_logits(super()._inputs(next(batches)), {}, None)
        self.taken = 0

    def _distiller(self, matches: list[Any]) -> tuple[type[textbrewer.BasicDistiller], textbrewer.DistillationConfig]:
        return textbrewer.BasicDistiller, textbrewer.DistillationConfig(temperature=8, is_caching_logits=True)

    def _inputs(self, batch: LabelledBatch) -> Any:
        kept = self.distiller.logits_cache[self.taken % len(self.distiller.logits_cache)]
        self.taken += 1
        return kept


def _match(teacher: int, student: int, feature: str, loss: str, **more: Any) -> dict[str, Any]:
    return {"layer_T": teacher, "layer_S": student, "feature": feature, "loss": loss, "weight": 1, **more}


def _states_match(teacher: int, student: int, widths: tuple[int, int]) -> dict[str, Any]:
    projection = {} if widths[0] == widths[1] else {"proj": ["linear", *widths]}
    return _match(teacher, student, "hidden", "hidden_mse", **projection)
