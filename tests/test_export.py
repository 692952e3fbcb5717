"""ONNX files: the same whichever framework wrote them, and what the framework computes."""

import json
import threading

import numpy as np
import onnx
import pytest
from conftest import CHARACTERS, LABELS, TINY, UNEVEN, logits_of, model_folder

import backends
from backends.files import InputError
from backends.interface import ONNX_INPUTS, ONNX_OUTPUTS
from backends.pretrained import read_config, read_weights, write_model
from export import convert, runtimes
from export.__main__ import main
from export.convert import OnnxArguments, export
from export.model import OnnxModel
from text.data import Example
from text.features import classification_features
from text.tokenizer import SPECIAL_TOKENS

HEADS = [None, "sequence_classification", "token_classification", "question_answering"]


@pytest.mark.parametrize("sizes", [{}, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("head", HEADS)
def test_either_framework_writes_the_same(tmp_path, head, sizes):
    """Inputs, outputs, types, axes and metadata are equal, and what they compute, to the last digits."""
    by_layer = {key: value for key, value in sizes.items() if key not in TINY}
    folder = model_folder(tmp_path / "model", head, **by_layer)
    files = [export(OnnxArguments(str(folder), str(tmp_path / f"{name}.onnx"), name)) for name in ("torch", "paddle")]
    graphs = [onnx.load(file).graph for file in files]
    for puts in ("input", "output"):
        assert list(getattr(graphs[0], puts)) == list(getattr(graphs[1], puts))
    assert [put.name for put in graphs[0].input] == list(ONNX_INPUTS)
    assert [put.name for put in graphs[0].output] == list(ONNX_OUTPUTS[head])
    opened = [OnnxModel(file) for file in files]
    assert opened[0].description == opened[1].description
    assert opened[0].description.labels == (LABELS if head and head != "question_answering" else ())
    batch = opened[0].tokenizer.encode(["今天天气好", "一" * 60, "", "abc，。"] * 20, 64).batch
    for a, b in zip(*(model.run(batch) for model in opened)):
        assert np.isfinite(a).all() and a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_outputs_that_a_configuration_adds_are_not_compared(tmp_path, name, head):
    folder = model_folder(tmp_path / "model", head)
    config = json.loads((folder / "config.json").read_text())
    more = dict.fromkeys(["use_cache", "output_hidden_states", "output_attentions", "return_dict"], True)
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    assert OnnxModel(export(OnnxArguments(str(folder), backend=name))).description.head == head


def test_a_file_opens_beside_other_programs(tmp_path, monkeypatch):
    """Where the one part of the first run is computed by one thread."""
    file = export(OnnxArguments(str(model_folder(tmp_path / "model", "sequence_classification")), backend="torch"))
    crowded = threading.Event()
    crowded.set()
    monkeypatch.setattr(runtimes, "crowded", crowded)
    batch = OnnxModel(file, 1).tokenizer.encode(["今天天气好"], 64).batch
    np.testing.assert_allclose(OnnxModel(file, 2).run(batch)[0], OnnxModel(file, 1).run(batch)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_nothing_of_this_machine_is_in_the_file(tmp_path, name):
    folder = model_folder(tmp_path / "model", "sequence_classification")
    content = export(OnnxArguments(str(folder), backend=name)).read_bytes()
    assert str(tmp_path).encode() not in content
    assert b"site-packages" not in content and b"/backends/" not in content


def test_no_file_is_left_if_the_check_fails(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "model", "sequence_classification")
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(convert, "TOLERANCE", 0.0)
    with pytest.raises(InputError, match="outputs differ from those of transformers"):
        export(OnnxArguments(str(folder), backend="torch"))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_weights_that_are_no_numbers_do_not_pass(tmp_path):
    folder = model_folder(tmp_path / "model")
    weights = read_weights(folder)
    for name, value, message in (
        ("classifier.weight", 3e38, "outputs differ from those of transformers by nan"),
        ("classifier.bias", np.nan, "model.safetensors: classifier.bias holds NaN or infinity"),
    ):
        weights[name] = np.full_like(weights[name], value)
        write_model(folder, read_config(folder), weights, "sequence_classification")
        with pytest.raises(InputError, match=message):
            export(OnnxArguments(str(folder), backend="torch"))


@pytest.mark.parametrize("head", HEADS[1:])
def test_heads_without_weights_are_named(tmp_path, head):
    """A head at random answers nothing."""
    folder = model_folder(tmp_path / "model", head)
    config, weights = read_config(folder), read_weights(folder)
    encoder = {
        name: array for name, array in weights.items() if name.startswith(("embeddings.", "encoder.", "pooler."))
    }
    write_model(folder, config, encoder, head)
    with pytest.raises(InputError, match="has a head, and .*.weight is not among the weights; train it first"):
        export(OnnxArguments(str(folder), backend="torch"))


@pytest.mark.parametrize("head", [None, "sequence_classification"])
def test_every_output_and_second_texts_are_compared(tmp_path, head, monkeypatch):
    """A file whose pooler's output, or whose answer to second texts alone, is wrong does not pass."""
    folder = model_folder(tmp_path / "model", head)
    tidy = convert._tidy

    def spoil(model, outputs):
        tidy(model, outputs)
        for weight in model.graph.initializer:
            if weight.name.endswith("pooler.dense.weight" if head is None else "token_type_embeddings.weight"):
                values = onnx.numpy_helper.to_array(weight).copy()
                values.flat[-1] += 1.0
                weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    monkeypatch.setattr(convert, "_tidy", spoil)
    with pytest.raises(InputError, match="outputs differ from those of transformers by"):
        export(OnnxArguments(str(folder), backend="torch"))


def test_classes_without_names_have_transformers_own(tmp_path):
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())

    def changed(**changes):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return OnnxModel(export(OnnxArguments(str(folder), backend="torch"))).description.labels

    assert changed() == LABELS
    for names in ({"a": "b"}, {"1": "b", "2": "c", "3": "d"}, {"0": "b"}, {"0": "b", "1": "b", "2": "c"}):
        with pytest.raises(InputError, match="id2label"):
            changed(id2label=names)
    two = model_folder(tmp_path / "two", id2label={0: "x", 1: "y"}, label2id={"x": 0, "y": 1})
    config = json.loads((two / "config.json").read_text())
    for key in ("id2label", "label2id"):
        config.pop(key)
    (two / "config.json").write_text(json.dumps(config))
    exported = OnnxModel(export(OnnxArguments(str(two), backend="torch", tokenizer="in-graph")))
    assert exported.description.labels == ("LABEL_0", "LABEL_1")


def test_other_heads_and_records_are_named(tmp_path):
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMultipleChoice"]}))
    with pytest.raises(InputError, match="BertForMultipleChoice is not exported"):
        export(OnnxArguments(str(folder)))
    (folder / "config.json").write_text(json.dumps({**config, "architectures": "BertForSequenceClassification"}))
    for record in (
        "max_seq_length: 4000",
        "max_seq_length: null",
        "max_seq_length: 2",
        "a: [",
        "- 3",
        "a: &a {}\nb: *a",
        "[" * 10_000,
    ):
        (folder / "arguments.yaml").write_text(record)
        with pytest.raises(InputError, match="arguments.yaml: "):
            export(OnnxArguments(str(folder)))
    (folder / "arguments.yaml").unlink()
    with pytest.raises(InputError, match="--pairs: goes with --tokenizer in-graph"):
        export(OnnxArguments(str(folder), pairs=True))
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        export(OnnxArguments(str(folder), str(tmp_path)))
    assert OnnxModel(export(OnnxArguments(str(folder)))).description.head == "sequence_classification"
    reader = model_folder(tmp_path / "reader", "question_answering")
    with pytest.raises(InputError, match="--max_seq_length 8: leaves no room for a context"):
        export(OnnxArguments(str(reader), max_seq_length=8))


def test_length_is_the_runs_or_the_one_given(tmp_path):
    folder = model_folder(tmp_path / "model", "sequence_classification")
    assert OnnxModel(export(OnnxArguments(str(folder)))).description.max_seq_length == 64
    (folder / "arguments.yaml").write_text("max_seq_length: 48\n")
    assert OnnxModel(export(OnnxArguments(str(folder)))).description.max_seq_length == 48
    assert OnnxModel(export(OnnxArguments(str(folder), max_seq_length=16))).description.max_seq_length == 16
    with pytest.raises(InputError, match="--max_seq_length 65: must be from 3 to the model's 64 positions"):
        export(OnnxArguments(str(folder), max_seq_length=65))


def test_files_that_are_not_ours_are_named(tmp_path):
    absent = tmp_path / "absent.onnx"
    with pytest.raises(InputError, match="absent.onnx: no such file"):
        OnnxModel(absent)
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(InputError, match="text.onnx: not an ONNX model"):
        OnnxModel(tmp_path / "text.onnx")
    folder = model_folder(tmp_path / "model", "sequence_classification")
    model = onnx.load(export(OnnxArguments(str(folder))))
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(InputError, match="bare.onnx: says nothing of its labels"):
        OnnxModel(tmp_path / "bare.onnx")
    model.graph.input[0].name = "ids"
    for node in model.graph.node:
        node.input[:] = ["ids" if name == "input_ids" else name for name in node.input]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match="other.onnx: takes ids: int64, .*; expected input_ids"):
        OnnxModel(tmp_path / "other.onnx")


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "no command given; there are onnx, quantize, predict, benchmark, serve, triton"),
        ("server", "python -m export: server: no such command; did you mean serve?; there are onnx,"),
        ("onnx", "--model is missing (the model's folder"),
        ("onnx a b c", "c: unexpected; python -m export onnx takes MODEL OUTPUT and options"),
        ("quantize m.onnx --method mse", "--method: unknown; did you mean --methods?"),
        ("serve absent.onnx", "absent.onnx: no such file; give a model that python -m export onnx wrote"),
        ("onnx /nowhere", "--model /nowhere: no such folder"),
    ],
)
def test_command_lines_are_checked(capsys, line, message):
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_vocabulary_must_fit(tmp_path):
    folder = model_folder(tmp_path / "model", "sequence_classification")
    config = json.loads((folder / "config.json").read_text())
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *CHARACTERS, *map(str, range(300))]) + "\n")
    with pytest.raises(InputError, match=f"but the model embeds {config['vocab_size']} tokens"):
        export(OnnxArguments(str(folder)))


@pytest.mark.parametrize("name", ["torch", "paddle"])
@pytest.mark.parametrize("pairs", [False, True])
def test_strings_in_labels_out(tmp_path, name, pairs):
    """With the tokenizer in the file: the labels and probabilities of the framework's logits."""
    folder = model_folder(tmp_path / "model", "sequence_classification")
    file = export(OnnxArguments(str(folder), backend=name, max_seq_length=20, tokenizer="in-graph", pairs=pairs))
    model = OnnxModel(file)
    assert model.in_graph and model.takes_pairs == pairs
    texts = ["今天天气好", "一" * 60, "", "abc，。不认识 ABC"]
    seconds = ["坏", "", "二三四" * 5, "。"] if pairs else None
    labels, probabilities = model.classify(texts, seconds)
    examples = [Example(i, text, seconds[i] if pairs else None, None) for i, text in enumerate(texts)]
    batch = classification_features(model.tokenizer, examples, 20).batch(np.arange(4))
    backend = backends.load(name, "cpu")
    framework = backend.model(read_config(folder), read_weights(folder), "sequence_classification")
    logits = backend.numpy(logits_of(framework, batch)).astype(np.float64)
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, wanted, atol=1e-5)
    assert labels == [LABELS[best] for best in wanted.argmax(axis=1)]


def test_tokenizer_goes_into_classifiers_only(tmp_path):
    folder = model_folder(tmp_path / "model", "token_classification")
    with pytest.raises(InputError, match="--tokenizer in-graph: .* is no classifier"):
        export(OnnxArguments(str(folder), tokenizer="in-graph"))
