"""MiniLMv2 on PyTorch as codes to papers do it: Hugging Face's models run whole, on batches padded
to their longest, all hidden states returned; relation matrices in full."""

from __future__ import annotations

import torch
import transformers

from backends.interface import Batch
from bench.contenders import DistillationJob
from bench.contenders.frameworks import OnTorch


class PlainTorch(OnTorch):
    amp = False

    def __init__(self, job: DistillationJob) -> None:
        super().__init__(job.on_gpu)
        self.device = "cuda" if job.on_gpu else "cpu"
        # The way of most such codes: half precision on GPUs, single on CPUs
        self.dtype = torch.bfloat16 if self.amp or job.on_gpu else torch.float32
        self.precision = str(self.dtype).removeprefix("torch.")
        self.title = f"plain MiniLMv2, torch, {self.precision}"
        self.job = job
        torch.manual_seed(0)
        self.teacher, self.student = (
            transformers.BertModel(transformers.BertConfig(**config)).to(self.device)
            for config in (job.teacher, job.student)
        )
        self.teacher.eval()
        self.student.train()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=job.learning_rate)

    def step(self, batch: Batch, number: int) -> None:
        with self.phase("data"):
            ids, types, mask = (torch.from_numpy(array).to(self.device) for array in batch[:3])
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            with self.phase("teacher"), torch.no_grad():
                teacher = self._qkv(self.teacher, self.job.teacher_layer, ids, types, mask)
            with self.phase("student"):
                student = self._qkv(self.student, self.job.student_layer, ids, types, mask)
        with self.phase("loss"):
            loss = sum(self._relation_loss(t, s, mask) for t, s in zip(teacher, student))
        with self.phase("backward"):
            loss.backward()
        with self.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            loss.item()

    def _qkv(self, model, layer, ids, types, mask):
        hidden = model(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True).hidden_states[layer]
        attention = model.encoder.layer[layer].attention.self
        return attention.query(hidden), attention.key(hidden), attention.value(hidden)

    def _relation_loss(self, teacher, student, mask):
        """Mean over a sample's tokens and heads, summed over samples."""
        bias = (1.0 - mask[:, None, None, :].float()) * -1e4
        scores = []
        for x in (teacher.float(), student.float()):
            x = x.unflatten(-1, (self.job.heads, -1)).transpose(1, 2)
            scores.append(x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5 + bias)
        divergence = torch.nn.functional.kl_div(scores[1].log_softmax(-1), scores[0].softmax(-1), reduction="none").sum(
            -1
        )
        tokens = mask.sum(-1)
        return ((divergence * mask[:, None, :]).sum((1, 2)) / (self.job.heads * tokens)).sum()


class PlainTorchAMP(PlainTorch):
    """The same under autocast to bfloat16, which is one switch away."""

    amp = True
