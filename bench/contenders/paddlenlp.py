"""Loops on PaddleNLP, its models run whole, on batches padded to their longest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
from paddle.nn import functional as F
from paddlenlp.transformers import BertConfig, BertForSequenceClassification, BertModel
from paddlenlp.transformers.distill_utils import calc_multi_relation_loss, to_distill

from backends.interface import Batch
from bench.contenders import DistillationJob, TaskJob
from bench.contenders.frameworks import OnPaddle
from text.features import LabelledBatch


class PaddleNLP(OnPaddle):
    """PP-MiniLM's: `to_distill` exposes Q, K, V, `calc_multi_relation_loss` compares them."""

    def __init__(self, job: DistillationJob) -> None:
        super().__init__(job.on_gpu)
        self.precision = "float16" if job.on_gpu else "float32"
        self.title = f"PaddleNLP's loop, paddle, {self.precision}"
        self.heads = job.heads
        paddle.set_device("gpu" if job.on_gpu else "cpu")
        paddle.seed(0)
        self.teacher, self.student = (
            to_distill(
                BertModel(_config(config)),
                return_qkv=True,
                layer_index=layer,
            )
            for config, layer in ((job.teacher, job.teacher_layer), (job.student, job.student_layer))
        )
        self.teacher.eval()
        self.student.train()
        self.loss = paddle.nn.KLDivLoss("sum")
        self.optimizer = paddle.optimizer.AdamW(
            job.learning_rate,
            parameters=self.student.parameters(),
            weight_decay=0.01,
            grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
        )
        self.scaler = paddle.amp.GradScaler(enable=job.on_gpu, init_loss_scaling=2.0**15)

    def step(self, batch: Batch, number: int) -> None:
        with self.phase("data"):
            ids, types, mask = (paddle.to_tensor(array) for array in batch[:3])
            bias = ((1.0 - mask.astype("float32")) * -1e4).unsqueeze([1, 2])
        with paddle.amp.auto_cast(self.on_gpu, custom_white_list=["layer_norm", "gelu", "softmax"]):
            with self.phase("student"):
                self.student(ids, types, attention_mask=bias)
            with self.phase("teacher"), paddle.no_grad():
                self.teacher(ids, types, attention_mask=bias)
            with self.phase("loss"):
                s, t = self.student.outputs, self.teacher.outputs
                pairs = (s.q, t.q), (s.k, t.k), (s.v, t.v)
                loss = sum(calc_multi_relation_loss(self.loss, *pair, bias, self.heads) for pair in pairs)
                loss = loss / (self.heads * mask.size)
        with self.phase("backward"):
            self.scaler.scale(loss).backward()
        with self.phase("optimizer"):
            self.scaler.minimize(self.optimizer, loss)
            self.optimizer.clear_grad()
            loss.item()


class PaddleNLPOnTask(OnPaddle):
    """What TextBrewer computes, written plainly: the library gives all states and attentions, and losses are of whole
    padded batches, masked."""

    title = "PaddleNLP, plain loop, paddle, float32"
    precision = "float32"

    def __init__(self, job: TaskJob) -> None:
        super().__init__()
        self.job = job
        paddle.set_device("cpu")
        paddle.seed(0)
        self.teacher, self.student = (
            BertForSequenceClassification(_config(config)) for config in (job.teacher, job.student)
        )
        self.teacher.eval()
        self.student.train()
        widths = job.student["hidden_size"], job.teacher["hidden_size"]
        self.projections = paddle.nn.LayerList([paddle.nn.Linear(*widths) for _ in job.states])
        self.optimizer = paddle.optimizer.AdamW(
            job.learning_rate,
            parameters=[*self.student.parameters(), *self.projections.parameters()],
            weight_decay=0.01,
            grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
        )

    def step(self, batch: LabelledBatch, number: int) -> None:
        with self.phase("loss"):
            loss, _ = self.losses(batch)
        with self.phase("backward"):
            loss.backward()
        with self.phase("optimizer"):
            self.optimizer.step()
            self.optimizer.clear_grad()
            loss.item()

    def losses(self, batch: LabelledBatch) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
        """The loss, and its parts."""
        with self.phase("data"):
            ids, types, mask = (paddle.to_tensor(array) for array in batch.batch[:3])
        outputs = dict(output_hidden_states=True, output_attentions=True, return_dict=True)
        with self.phase("teacher"), paddle.no_grad():
            t = self.teacher(ids, types, attention_mask=mask, **outputs)
        with self.phase("student"):
            s = self.student(ids, types, attention_mask=mask, **outputs)
        temperature = 8.0
        losses = {"logits": -(F.softmax(t.logits / temperature) * F.log_softmax(s.logits / temperature)).sum(-1).mean()}
        mask = mask.astype("float32")
        for (of_t, of_s), project in zip(self.job.states, self.projections):
            squares = (project(s.hidden_states[of_s]) - t.hidden_states[of_t]) ** 2
            losses[f"states {of_t}-{of_s}"] = (squares.mean(-1) * mask).sum() / mask.sum()
        pairs = mask[:, None, :, None] * mask[:, None, None, :]
        for of_t, of_s in self.job.attention:
            squares = (s.attentions[of_s] - t.attentions[of_t]) ** 2
            losses[f"attention {of_t}-{of_s}"] = (squares * pairs).sum() / (pairs.sum() * squares.shape[1])
        return sum(losses.values()), losses


def _config(config: Mapping[str, Any]) -> BertConfig:
    return BertConfig(**{key: value for key, value in config.items() if key != "model_type"})
