"""A fine-tuned BERT teaches a BiGRU, on PyTorch or PaddlePaddle: its logits, and its last states by a projection.

    python examples/bert_to_bigru.py TEACHER DATA OUT [--backend paddle]

TEACHER is a folder that `python -m finetuning` left of a classification, DATA the folder of its texts; OUT gets
checkpoints and logs. Stopped, the same command goes on.
"""

import argparse
from pathlib import Path

import numpy as np

import backends
from backends.interface import Outputs
from finetuning.teachers import TaskTeacher, load_teacher
from objectives.distillation import Distillation
from objectives.matches import Models, matches_of
from text.data import read_split, with_labels_of
from text.features import task_features
from text.folder import ModelFolder
from text.tasks import find_task
from training.loop import TrainingArguments, train
from training.prediction import predict


def torch_bigru(words, width, classes, dropout):
    from torch import nn
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    class BiGRU(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.dropout = nn.Embedding(words, width), nn.Dropout(dropout)
            self.gru = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
            self.classifier = nn.Linear(width, classes)

        def read(self, embedded, lengths):
            packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0]

    return BiGRU()


def paddle_bigru(words, width, classes, dropout):
    from paddle import nn

    class BiGRU(nn.Layer):
        def __init__(self):
            super().__init__()
            self.embedding, self.dropout = nn.Embedding(words, width), nn.Dropout(dropout)
            self.gru = nn.GRU(width, width // 2, direction="bidirect")
            self.classifier = nn.Linear(width, classes)

        def read(self, embedded, lengths):
            return self.gru(embedded, sequence_length=lengths)[0]

    return BiGRU()


def forward(bigru, inputs):
    """What the BiGRU says of a batch: it takes no token types, and answers by the mean over a text's tokens."""
    embedded = bigru.dropout(bigru.embedding(inputs.input_ids))
    lengths, mask = inputs.attention_mask.sum(1), inputs.attention_mask.unsqueeze(-1).float()
    states = bigru.read(embedded, lengths)
    logits = bigru.classifier((states * mask).sum(1) / lengths.unsqueeze(-1).float())
    return Outputs(logits=logits, states=[embedded, states])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "data", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--backend", choices=["torch", "paddle"], default="torch")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    arguments = parser.parse_args(argv)

    backend, folder = backends.load(arguments.backend), ModelFolder(arguments.teacher)
    task = with_labels_of(find_task("classification"), arguments.data)
    length = min(128, folder.shape.positions)
    texts, unseen = (
        task_features(task.kind, folder.tokenizer, read_split(task, arguments.data, split).examples, length)
        for split in ("train", "dev")
    )
    teacher = load_teacher(backend, task, [TaskTeacher(folder)])
    backend.seed(1)
    bigru = {"torch": torch_bigru, "paddle": paddle_bigru}[backend.name]
    module = bigru(folder.shape.vocabulary, arguments.width, len(task.labels), arguments.dropout)
    student = backend.adapt(module, forward)

    training = TrainingArguments(max_steps=arguments.steps, learning_rate=arguments.learning_rate)
    lines = [
        {"of": "logits", "loss": "kl", "temperature": 4, "squared": True},
        {"of": "states", "teacher": len(teacher.shape.layers), "student": 1, "project": "linear"},
    ]
    matches = matches_of(lines, Models(teacher.shape, student.shape, training.learning_rate))
    objective = Distillation(backend, teacher, student, matches, task.kind)

    def batches(start, _):
        return texts.batches(start, 32, training.seed, backend.rank, backend.world_size)

    arguments.output.mkdir(parents=True, exist_ok=True)
    train(backend, student, objective, batches, training, arguments.output, "BiGRU", len(texts))
    answers = np.stack(predict(backend, student, unseen)).argmax(1)
    accuracy = float(np.mean(answers == np.concatenate(unseen.targets)))
    print(f"{accuracy:.1%} of the dev set are right")
    return accuracy


if __name__ == "__main__":
    main()
