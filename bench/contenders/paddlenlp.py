"""PP-MiniLM's loop on PaddleNLP: `to_distill` exposes Q, K, V of models that run whole, on padded
batches; `calc_multi_relation_loss` compares them."""

from __future__ import annotations

from collections.abc import Iterator

import paddle
from paddlenlp.transformers import BertConfig, BertModel
from paddlenlp.transformers.distill_utils import calc_multi_relation_loss, to_distill

from backends.interface import Batch
from bench.contenders import DistillationJob
from bench.contenders.frameworks import OnPaddle


class PaddleNLP(OnPaddle):
    def __init__(self, job: DistillationJob) -> None:
        super().__init__(job)
        self.precision = "float16" if job.on_gpu else "float32"
        self.title = f"PaddleNLP's loop, paddle, {self.precision}"
        self.heads = job.heads
        paddle.set_device("gpu" if job.on_gpu else "cpu")
        paddle.seed(0)
        self.teacher, self.student = (
            to_distill(
                BertModel(BertConfig(**{key: value for key, value in config.items() if key != "model_type"})),
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

    def step(self, batches: Iterator[Batch], number: int) -> Batch:
        with self.phase("data"):
            batch = next(batches)
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
        return batch
