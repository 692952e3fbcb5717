"""A fine-tuned BERT teaches a DistilBERT, which takes no token types, in a loop that runs on either framework.

    python examples/distilbert_student.py TEACHER DATA [--backend paddle]

TEACHER is a folder that `python -m finetuning` left of a classification, DATA the folder of its texts.
"""

import argparse
from pathlib import Path

import numpy as np

import backends
from backends.interface import Outputs
from finetuning.teachers import TaskTeacher, load_teacher
from objectives.distillation import Distillation, LabelsMatch, LogitsMatch
from objectives.logits import LogitsLoss
from text.data import read_split, with_labels_of
from text.features import task_features
from text.folder import ModelFolder
from text.tasks import find_task
from training.prediction import predict
from training.schedule import linear_warmup_decay


def torch_distilbert(words, width, classes):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=words, dim=width, n_layers=3, n_heads=4, hidden_dim=4 * width, num_labels=classes
    )
    return DistilBertForSequenceClassification(config), lambda module, inputs: Outputs(
        logits=module(inputs.input_ids, inputs.attention_mask).logits
    )


def paddle_distilbert(words, width, classes):
    from paddlenlp.transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 4 * width}
    config = DistilBertConfig(vocab_size=words, num_labels=classes, **sizes)
    return DistilBertForSequenceClassification(config), lambda module, inputs: Outputs(
        logits=module(inputs.input_ids, inputs.attention_mask)
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backend", choices=["torch", "paddle"], default="torch")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
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
    distilbert = {"torch": torch_distilbert, "paddle": paddle_distilbert}[backend.name]
    student = backend.adapt(*distilbert(folder.shape.vocabulary, arguments.width, len(task.labels)))

    matches = [LogitsMatch(LogitsLoss("kl", temperature=4.0, squared=True)), LabelsMatch(weight=0.5)]
    objective = Distillation(backend, teacher, student, matches, task.kind)
    optimizer = backend.optimizer(student, weight_decay=0.01, adam_epsilon=1e-6, max_grad_norm=1.0, loss_scale=2**15)
    student.train()
    for step, batch in zip(range(arguments.steps), texts.batches(0, 32, seed=1)):
        loss, parts = objective(batch, step / arguments.steps)
        optimizer.backward(loss)
        optimizer.step(linear_warmup_decay(step, arguments.learning_rate, arguments.steps // 10, arguments.steps))
        if step % 100 == 0:
            print(step, {name: round(part.item(), 4) for name, part in parts.items()})
    student.train(False)
    answers = np.stack(predict(backend, student, unseen)).argmax(1)
    accuracy = float(np.mean(answers == np.concatenate(unseen.targets)))
    print(f"{accuracy:.1%} of the dev set are right")
    return accuracy


if __name__ == "__main__":
    main()
