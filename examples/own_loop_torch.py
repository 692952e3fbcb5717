"""General distillation in a PyTorch loop of one's own: a model of transformers learns another's relations and states.

    python examples/own_loop_torch.py TEACHER TEXTS STUDENT

TEACHER is a BERT's folder, TEXTS a file with a text a line; STUDENT will be the folder of a model half its size.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

import backends
from backends.interface import QKV, Batch, Outputs
from objectives.distillation import Distillation
from objectives.matches import Models, matches_of


def forward(bert, inputs):
    """What a BERT of transformers says of a batch: the states of its layers, and the queries, keys and values there."""
    states = bert(**inputs._asdict(), output_hidden_states=True).hidden_states
    layers = [layer.attention.self for layer in bert.encoder.layer]
    by_head = (len(inputs.input_ids), -1, bert.config.num_attention_heads, layers[0].attention_head_size)
    return Outputs(
        states=states,
        qkv=[
            QKV(*(part(x).view(by_head) for part in (layer.query, layer.key, layer.value)))
            for layer, x in zip(layers, states)
        ],
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "texts", "student"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args(argv)

    torch.manual_seed(1)
    tokenizer, teacher = AutoTokenizer.from_pretrained(arguments.teacher), AutoModel.from_pretrained(arguments.teacher)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    halves = {size: getattr(teacher.config, size) // 2 for size in sizes}
    student = AutoModel.from_config(AutoConfig.from_pretrained(arguments.teacher, **halves))
    backend = backends.load("torch")
    taught, learning = backend.adapt(teacher, forward), backend.adapt(student, forward)
    lines = [
        {"of": "relations", "teacher": "last", "student": len(learning.shape.layers) - 1, "num_relation_heads": 8},
        {"of": "states", "project": "linear", "shared": True},
    ]
    objective = Distillation(backend, taught, learning, matches_of(lines, Models(taught.shape, learning.shape, 1e-3)))

    texts = arguments.texts.read_text(encoding="utf-8").splitlines()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    student.train()
    losses, length = [], min(128, tokenizer.model_max_length)
    for step in range(arguments.steps):
        drawn = [texts[i] for i in torch.randint(len(texts), (32,)).tolist()]
        tokens = tokenizer(drawn, padding=True, truncation=True, max_length=length, return_tensors="np")
        batch = Batch(tokens["input_ids"], tokens["token_type_ids"], tokens["attention_mask"])
        loss, parts = objective(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(step, {name: round(part.item(), 4) for name, part in parts.items()})
    del student.projections  # which only training needs
    student.save_pretrained(arguments.student)
    tokenizer.save_pretrained(arguments.student)
    return losses


if __name__ == "__main__":
    main()
