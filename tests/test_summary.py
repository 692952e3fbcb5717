"""What a model is made of, against the counts of the libraries themselves."""

import re

import numpy as np
import pytest
from conftest import TINY, UNEVEN, make_batch

from backends.__main__ import main
from backends.interface import HEADS
from backends.pretrained import CLASS_SUFFIXES, read_config, write_model
from backends.shape import Shape
from backends.summary import head_of, modules, operations, parameters

SETTINGS = {key: value for key, value in TINY.items() if key != "model_type"}
CLASSES = {"sequence_classification": 3, "token_classification": 3, "question_answering": 2}


def library_model(head, **settings):
    import transformers

    config = transformers.BertConfig(**SETTINGS, num_labels=CLASSES.get(head, 2), **settings)
    return getattr(transformers, f"Bert{CLASS_SUFFIXES[head]}")(config).eval()


@pytest.mark.parametrize("head", [None, *HEADS])
@pytest.mark.parametrize("safe", [True, False])
def test_parameters_are_those_that_transformers_counts(tmp_path, head, safe):
    """In a folder as it saves one; embeddings that the masked-LM head shares count once."""
    library = library_model(head)
    library.save_pretrained(tmp_path, safe_serialization=safe)
    counts = parameters(tmp_path)
    assert sum(counts.values()) == library.num_parameters()
    root, *inner = modules(counts)
    assert root == (0, "model", library.num_parameters())
    assert sum(module.parameters for module in inner if module.depth == 1) == library.num_parameters()
    encoder = getattr(library, "bert", library).encoder
    [layers] = [module for module in inner if module.name == "layer 0 to 2"]
    assert layers.parameters == sum(weight.numel() for weight in encoder.parameters())
    [query] = [module for module in inner if module.name == "query"]
    assert query.parameters == 3 * (32 * 32 + 32)
    assert head_of(read_config(tmp_path), counts) == head


@pytest.mark.parametrize("head", ["masked_lm", "token_classification"])
def test_parameters_are_those_that_paddlenlp_counts(tmp_path, head):
    import paddlenlp

    config = paddlenlp.transformers.BertConfig(**SETTINGS, num_labels=3)
    library = getattr(paddlenlp.transformers, f"Bert{CLASS_SUFFIXES[head]}")(config)
    library.save_pretrained(str(tmp_path))
    counts = parameters(tmp_path)
    # paddlenlp's models have the pooler's weights, used or not
    assert sum(counts.values()) == sum(weight.size for weight in library.parameters())
    assert head_of(read_config(tmp_path), counts) == head


def test_layers_that_differ_are_told_apart(tmp_path, torch_backend):
    model = torch_backend.model(UNEVEN)
    write_model(tmp_path, UNEVEN, model.weights())
    listed = modules(parameters(tmp_path))
    assert listed[0].parameters == Shape.of(UNEVEN).weights()
    layers = {module.name: module.parameters for module in listed if module.name.startswith("layer ")}
    assert layers == {f"layer {i}": layer.weights(32) for i, layer in enumerate(Shape.of(UNEVEN).layers)}


@pytest.mark.parametrize("head", [None, *HEADS])
def test_operations_are_those_that_torch_counts(head):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    library = library_model(head, attn_implementation="eager")
    ids = torch.from_numpy(make_batch([23]).input_ids)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        library(input_ids=ids, attention_mask=torch.ones_like(ids))
    parts = operations(Shape.of(TINY), head, CLASSES.get(head, 0), 23)
    assert parts["in all"] == counter.get_total_flops() == parts["layers"] + parts["head"]


def test_the_command(tmp_path, capsys, torch_backend):
    """Shares add up, a line says what is wrong, and the devices are still reported."""
    config = {**TINY, "num_labels": 3}
    write_model(tmp_path, config, torch_backend.model(config, None, "sequence_classification").weights())
    assert main(["summary", str(tmp_path), "--max_seq_length", "20"]) == 0
    table = capsys.readouterr().out
    total = sum(parameters(tmp_path).values())
    assert re.search(rf"\nmodel +{total:,} +100\.0% +{4 * total / 2**20:.1f}\n", table)
    shares = re.findall(r"\n  \w+ +[\d,]+ +([\d.]+)%", table)
    assert len(shares) == 4 and sum(map(float, shares)) == pytest.approx(100, abs=0.3)
    assert f"{16 * total / 2**20:.1f} with their gradients and Adam's moments" in table
    count = operations(Shape.of(TINY), "sequence_classification", 3, 20)["in all"]
    assert f"operations for 20 tokens, GFLOP: layers 0.001, head 0.000, in all {count / 1e9:.3f}" in table
    for words, message in (
        ([str(tmp_path), "--max_seq_length", "65"], "--max_seq_length 65: must be from 1 to 64, the model's positions"),
        ([str(tmp_path / "none")], f"--model {tmp_path / 'none'}: no such folder"),
    ):
        assert main(["summary", *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line


def test_operations_of_many_lengths_are_their_sum():
    shape = Shape.of(UNEVEN)
    lengths = np.array([3, 9, 1])
    assert shape.operations(lengths, 2) == sum(shape.operations(lengths[i : i + 1], 2) for i in range(3))
