"""ONNX files from strangers: refused before ONNX Runtime sees them, in one line; all of ours are opened."""

import json
import os

import numpy as np
import onnx
import pytest
from conftest import CHARACTERS, LABELS, TINY, make_batch, model_folder
from onnx import TensorProto, helper, numpy_helper

import backends
from backends.files import InputError
from backends.interface import ONNX_INPUTS, ONNX_OUTPUTS, Batch
from export.__main__ import main
from export.admission import OPERATORS, admit
from export.convert import OnnxArguments, export
from export.model import OnnxModel
from export.predict import PredictArguments, predict
from export.quantize import QuantizeArguments, quantize

FRAMEWORKS = ("torch", "paddle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier with data to quantize it."""
    folder = tmp_path_factory.mktemp("admission")
    lines = [json.dumps({"text": CHARACTERS[i % 9 :], "label": LABELS[0]}) + "\n" for i in range(10)]
    (folder / "train.json").write_text("".join(lines))
    return model_folder(folder / "model")


@pytest.fixture(scope="module")
def files(folder):
    """A file of each kind that is written, by its name."""
    pytest.importorskip("paddle2onnx", reason="there is none for Python 3.13")
    files, at = {}, folder.parent
    data = {"task_name": "classification", "data_dir": str(at), "calibration_sizes": [5]}
    for name, pairs in (("torch", False), ("paddle", True)):
        plain = files[name] = export(OnnxArguments(str(folder), str(at / f"{name}.onnx"), name))
        path = at / f"{name}-strings.onnx"
        files[path.stem] = export(OnnxArguments(str(folder), str(path), name, tokenizer="in-graph", pairs=pairs))
        for method, tokenizer in (
            ("dynamic", "none"),
            ("token", "none"),
            ("static-min-max", "in-graph"),
            ("float16", "none"),
        ):
            path = at / f"{name}-{method}.onnx"
            files[path.stem] = quantize(
                QuantizeArguments(model=str(plain), output=str(path), methods=[method], tokenizer=tokenizer, **data)
            ).path
    ernie = {"model_type": "ernie", "use_task_id": True, "task_type_vocab_size": 3}
    for name, head in (("torch", None), ("paddle", "token_classification"), ("paddle", "question_answering")):
        path = at / f"{name}-{head}.onnx"
        files[path.stem] = export(OnnxArguments(str(model_folder(at / str(head), head, **ernie)), str(path), name))
    return files


def test_no_rows_in_no_rows_out(files):
    """Of every kind of file, in ONNX Runtime and through everything that answers."""
    for path in files.values():
        model = OnnxModel(path, 2)
        if model.in_graph:
            labels, probabilities = model.classify([], [] if model.takes_pairs else None)
            assert labels == [] and probabilities.shape == (0, 3)
            feed = dict.fromkeys(model.inputs, np.array([], object))
            [outputs] = model.runtime.compute(list(model.outputs), [feed])
            assert [output.shape for output in outputs] == [(0,), (0, 3)]
        else:
            nothing = Batch(*np.zeros((3, 0, 5), np.int64))
            outputs, empty = model.run(make_batch([5, 4], 24)), model.run(nothing)
            assert [output.shape for output in empty] == [(0, *output.shape[1:]) for output in outputs]
            assert model.run_rows([]) == []
        if model.description.head is not None:
            assert model.answers([]) == []


def test_files_are_opened_beside_other_programs(files, monkeypatch):
    """Where even what is computed alone is computed by one thread."""
    monkeypatch.setattr("export.runtimes.crowded.is_set", lambda: True)
    for path in files.values():
        assert OnnxModel(path, 2).threads == 2


def test_an_empty_file_has_no_answers(files, tmp_path):
    (tmp_path / "none.txt").write_text("")
    for name in ("torch", "torch-strings"):
        output = predict(PredictArguments(model=str(files[name]), texts=str(tmp_path / "none.txt"), overwrite=True))
        assert output.read_bytes() == b""


def test_all_activations_export_to_operators_that_are_opened(folder, tmp_path):
    for name in FRAMEWORKS:
        backend = backends.load(name, "cpu")
        for activation in backend.activations:
            config = {**TINY, "num_hidden_layers": 1, "hidden_act": activation, "num_labels": 2}
            backend.model(config, None, "sequence_classification").export_onnx(tmp_path / "model.onnx")
            written = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
            assert written <= {*OPERATORS[""], "Constant", "Identity"}, activation  # the last two are folded


def changed(path, tmp_path, change):
    """Writes a copy of a file that a function has changed."""
    model = onnx.load(path)
    change(model)
    (tmp_path / "changed.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "changed.onnx"


def with_metadata(key, value):
    def change(model):
        entry = next(entry for entry in model.metadata_props if entry.key == key)
        entry.value = value(entry.value) if callable(value) else value

    return change


def external(tensor, location):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", str(location)), ("offset", "0")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def append(*nodes, **fields):
    def change(model):
        model.graph.node.extend(nodes)
        for name, value in fields.items():
            getattr(model.graph, name).extend(value)

    return change


def loop_of_two_minds(model):
    """Adds a second tensor of one name, of which ONNX Runtime takes the last."""
    loop(5)(model)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1 << 62), "turns"))


def not_utf_8(part):
    """Spoils a name as protobuf's Python does not write it."""

    def change(model):
        content = model.SerializeToString()
        name = model.graph.output[0].name if part == "output" else model.graph.node[0].op_type
        kind = b"\x0a" if part == "output" else b"\x22"
        at = content.rindex(kind + bytes([len(name)]) + name.encode())
        model.ParseFromString(content[: at + 2] + b"\xff" + content[at + 3 :])

    return change


def unknown_type(model):
    model.graph.input[0].type.tensor_type.elem_type = 118


def bias(model):
    return next(tensor for tensor in model.graph.initializer if tensor.name.endswith("classifier.bias"))


def grow(model):
    bias(model).dims[0] = 1 << 40


def loop(turns, body=()):
    def change(model):
        kind = helper.make_tensor_value_info("going", TensorProto.BOOL, ())
        count = helper.make_tensor_value_info("turn", TensorProto.INT64, ())
        graph = helper.make_graph(
            [*body, helper.make_node("And", ["going", "going"], ["more"])], "body", [count, kind], []
        )
        graph.output.append(helper.make_tensor_value_info("more", TensorProto.BOOL, ()))
        model.graph.initializer.append(numpy_helper.from_array(np.array(turns), "turns"))
        model.graph.node.append(helper.make_node("Loop", ["turns", ""], [], body=graph))

    return change


def attribute(model):
    node = model.graph.node[0]
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), "inside")
    external(tensor, "/etc/passwd")
    node.attribute.append(helper.make_attribute("value", tensor))


def function(model):
    model.functions.add().name = "own"


def sparse(model):
    model.graph.sparse_initializer.add()


def twice(model):
    model.metadata_props.add(key="head", value="")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda model: external(bias(model), "/etc/passwd"),
            "tensor '.*classifier.bias': its data are in another file",
        ),
        (lambda model: external(bias(model), "link"), "its data are in another file"),
        (attribute, "holds a tensor, a graph or a function as 'value'"),
        (function, "defines functions or training of its own"),
        (sparse, "holds sparse tensors"),
        (grow, "has not the size that it says"),
        (loop(1 << 62), "holds a loop of more than 128 turns"),
        (not_utf_8("output"), "gives b.*says head"),
        (not_utf_8("operator"), "holds the operator b"),
        (unknown_type, "takes input_ids: 118, "),
        (loop_of_two_minds, "holds two tensors of one name"),
        (loop([5]), ""),
        (append(helper.make_node("Loop", [], [])), "Loop: has 0 inputs, at least 2 are expected"),
        (append(helper.make_node("Gather", ["input_ids"], ["x"])), "Gather: has 1 inputs, at least 2 are expected"),
        (
            loop(5, [helper.make_node("Loop", ["turns", ""], [], body=onnx.GraphProto(name="inner"))]),
            "a loop within a loop",
        ),
        (loop(5, [helper.make_node("Scan", [], [])]), "holds the operator Scan"),
        (
            append(helper.make_node("Loop", ["input_ids", ""], [], body=onnx.GraphProto())),
            "without a fixed number of turns",
        ),
        (append(helper.make_node("If", ["x"], [])), "holds the operator If"),
        (
            append(helper.make_node("Attention", ["input_ids"], ["x"], domain="com.microsoft")),
            "com.microsoft Attention",
        ),
        (append(helper.make_node("Own", ["input_ids"], ["x"], domain="own")), "holds the operator own Own"),
        (
            append(
                helper.make_node("Expand", ["one", "sides"], ["huge"]),
                initializer=[
                    numpy_helper.from_array(np.ones(1, np.float32), "one"),
                    numpy_helper.from_array(np.array([1 << 20, 1 << 20]), "sides"),
                ],
            ),
            "Expand '': computes a constant",
        ),
        (twice, "its metadata holds a name twice"),
        (with_metadata("labels", '["甲", "乙"]'), "says 2 labels, but logits of 2 texts of 3 tokens is .2, 3."),
        (with_metadata("labels", '["甲", "乙", "丙", "丁"]'), "says 4 labels, but logits"),
        (
            with_metadata("labels", '["甲", "甲", "乙"]'),
            "3 labels of head sequence_classification, 2 of them different",
        ),
        (with_metadata("labels", '{"a": 1}'), "labels that are no list of strings"),
        (with_metadata("labels", "[1, 2, 3]"), "labels that are no list of strings"),
        (with_metadata("labels", "[]"), "0 labels of head sequence_classification"),
        (with_metadata("labels", '["甲", "乙", "\\ud83d"]'), "half a surrogate pair"),
        (with_metadata("labels", "[" * 10_000), "nested too deep"),
        (with_metadata("tokenizer", '{"appended": 99}'), "UNK. is among tokens that were added"),
        (with_metadata("labels", "["), "says nothing of its labels and vocabulary"),
        (with_metadata("head", "question_answering"), "3 labels of head question_answering"),
        (with_metadata("head", "token_classification"), "says 3 labels, but logits of 2 texts of 3 tokens is"),
        (with_metadata("head", "masked_lm"), "head masked_lm"),
        (with_metadata("head", "of a fish"), "head of a fish"),
        (with_metadata("max_seq_length", "100000"), "says max_seq_length 100000, but has 64 positions"),
        (with_metadata("max_seq_length", "-1"), "says max_seq_length -1, but"),
        (with_metadata("max_seq_length", "many"), "says nothing of its labels and vocabulary"),
        (
            with_metadata("vocabulary", lambda text: text + "\nx" * 9),
            "says a vocabulary of 33 entries, but embeds 24 tokens",
        ),
        (with_metadata("vocabulary", lambda text: text.replace("[SEP]", "[END]")), "SEP"),
    ],
)
def test_strangers_files_are_refused(files, tmp_path, capsys, change, message):
    """At once, by every command, in one line that names the file."""
    path = changed(files["torch"], tmp_path, change)
    with pytest.raises(InputError, match=f"{path}: .*{message}"):
        OnnxModel(path, 1)
    assert main(["predict", str(path), str(tmp_path / "texts.txt")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and error.count("\n") == 1


def test_what_answers_strings_is_checked_too(files, tmp_path):
    path = files["torch-strings"]
    for change, message in (
        (with_metadata("labels", '["甲", "乙"]'), "names 2 labels, but answers others"),
        (with_metadata("labels", '["甲", "乙", "丁"]'), "names 3 labels, but answers others"),
        (with_metadata("head", "token_classification"), "says head token_classification, but takes strings"),
        (with_metadata("max_seq_length", "65"), "says max_seq_length 65, but has 64 positions"),
        (
            lambda model: model.graph.output.pop(),
            "gives label; says head sequence_classification, which gives label, prob",
        ),
    ):
        with pytest.raises(InputError, match=message):
            OnnxModel(changed(path, tmp_path, change), 1)


def test_data_in_another_file_are_never_read(files, tmp_path, monkeypatch):
    """Nor what is quantized: the file is read once, and what was read is opened."""
    (tmp_path / "secret").write_bytes(np.arange(3, dtype=np.float32).tobytes())
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    for location in ("link", "secret", tmp_path / "secret"):
        path = changed(files["torch"], tmp_path, lambda model, at=location: external(bias(model), at))
        for command in (["quantize", str(path)], ["serve", str(path)], ["triton", str(path), str(tmp_path / "out")]):
            assert main(command) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["changed.onnx", "link", "secret"]


def test_a_file_that_changes_behind_its_back_is_not_read_again(files, tmp_path):
    """The session of several parts is opened from what was checked."""
    path = tmp_path / "model.onnx"
    path.write_bytes(files["torch"].read_bytes())
    model = OnnxModel(path, 2)
    batch = make_batch([60] * 40, 24)
    logits = model.run_whole(batch)[0]
    path.write_bytes(b"another")
    np.testing.assert_allclose(model.run(batch)[0], logits, atol=1e-5)
    assert model.runtime._content == b""


def test_only_regular_files_are_read(files, folder, tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "zeros.onnx").write_bytes(bytes(1 << 16))
    with open(tmp_path / "large.onnx", "wb") as file:
        file.truncate(1 << 32)
    for path, message in (
        (tmp_path / "fifo.onnx", "is no regular file"),
        ("/dev/zero", "is no regular file"),
        (tmp_path / "empty.onnx", "not an ONNX model"),
        (tmp_path / "zeros.onnx", "not an ONNX model"),
        (tmp_path / "large.onnx", "4294967296 bytes; an ONNX file has at most 2147483647"),
        (tmp_path / "\0.onnx", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            admit(type(tmp_path)(path))
    message = f"error: {folder}: is a folder, an ONNX file is wanted; python -m export onnx {folder} makes one of it\n"
    for command in ("quantize {}", "predict {} x.txt", "serve {}", "triton {} out"):
        assert main(command.format(folder).split()) == 2
        assert capsys.readouterr().err == message
    (folder / "model.onnx").write_bytes(files["torch"].read_bytes())
    with pytest.raises(InputError, match=f"is a folder, an ONNX file is wanted; give {folder}/model.onnx"):
        OnnxModel(folder)


def test_another_format_in_the_same_bytes_is_not_loaded(tmp_path, files):
    """A file that is ONNX to the check and ONNX Runtime's own format to ONNX Runtime is taken for ONNX."""
    polyglot = b"\x12\x06  ORTM" + files["torch"].read_bytes()  # the name of a producer, in front of all
    assert polyglot[4:8] == b"ORTM"
    (tmp_path / "polyglot.onnx").write_bytes(polyglot)
    batch = make_batch([5, 3], 24)
    model = OnnxModel(tmp_path / "polyglot.onnx", 1)
    np.testing.assert_array_equal(model.run(batch)[0], OnnxModel(files["torch"], 1).run(batch)[0])


def test_files_of_other_inputs_or_none_at_all(files, tmp_path):
    with pytest.raises(InputError, match="takes input_ids: int64, token_type_ids: int64; expected"):
        OnnxModel(changed(files["torch"], tmp_path, lambda model: model.graph.input.pop()), 1)
    with pytest.raises(InputError, match="takes input_ids: float, "):

        def change(model):
            model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT

        OnnxModel(changed(files["torch"], tmp_path, change), 1)
    assert list(admit(files["torch"]).inputs) == list(ONNX_INPUTS)
    assert tuple(admit(files["torch-None"]).outputs) == ONNX_OUTPUTS[None]
