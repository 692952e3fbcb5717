"""Quantized files: what they hold, what they compute, and which of several is taken."""

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import CHARACTERS, LABELS, model_folder
from onnx import numpy_helper

from backends.files import InputError
from export import quantize as program
from export.calibration import least_error
from export.convert import OnnxArguments, export
from export.model import OnnxModel
from export.quantize import QuantizeArguments, quantize
from export.schemes import METHODS, Scheme, has_vnni
from text.data import Example
from text.features import classification_features

OWN = {"task_name": "classification"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float32 file, and data for it beside it, labelled as the model labels them."""
    folder = tmp_path_factory.mktemp("quantize")
    file = export(OnnxArguments(str(model_folder(folder / "model")), str(folder / "model.onnx")))
    random = np.random.default_rng(0)
    model = OnnxModel(file)
    for split, count in (("train", 40), ("dev", 300)):
        texts = ["".join(random.choice(list(CHARACTERS), random.integers(1, 50))) for _ in range(count)]
        answers = model.answers([Example(i, text, None, None) for i, text in enumerate(texts)])
        lines = [json.dumps({"text": text, "label": a["label"]}) for text, a in zip(texts, answers)]
        (folder / f"{split}.json").write_text("\n".join(lines) + "\n")
    return file


def quantized(source, tmp_path, **options):
    options = {"data_dir": str(source.parent), "reduce_range": "false", **options}
    return quantize(QuantizeArguments(model=str(source), output=str(tmp_path / "out.onnx"), **options)).path


def weights_of(file, kinds=(onnx.TensorProto.INT8,)):
    model = onnx.load(file)
    return {
        weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer if weight.data_type in kinds
    }


def texts_of(source, split="dev"):
    rows = [json.loads(line) for line in (source.parent / f"{split}.json").read_text().splitlines()]
    return [Example(i, row["text"], None, LABELS.index(row["label"])) for i, row in enumerate(rows)]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_nearly_the_same(source, tmp_path, method):
    """Logits off by a part of their spread, from a smaller file with the same interface and metadata."""
    file = quantized(source, tmp_path, methods=[method], calibration_sizes=[20], **OWN)
    before, after = OnnxModel(source), OnnxModel(file)
    assert file.stat().st_size < source.stat().st_size
    assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
    assert after.description.vocabulary == before.description.vocabulary
    assert method in after.description.quantized
    features = classification_features(before.tokenizer, texts_of(source), 64)
    wanted, logits = (np.stack(model.logits(features)) for model in (before, after))
    difference = np.sqrt(((wanted - logits) ** 2).mean()) / wanted.std()
    assert 0 < difference < {"float16": 0.01, "dynamic": 0.1}.get(method, 0.25)
    kinds = [onnx.TensorProto.FLOAT16] if method == "float16" else [onnx.TensorProto.INT8]
    small = sum(array.size for array in weights_of(file, kinds).values())
    large = sum(array.size for array in weights_of(file, [onnx.TensorProto.FLOAT]).values())
    assert small > 4 * large
    operators = {node.op_type for node in onnx.load(file).graph.node}
    assert ("ReduceMax" in operators) == (method == "token")
    assert ("DynamicQuantizeLinear" in operators) == (method == "dynamic")


@pytest.mark.parametrize("method", ["dynamic", "token", "static-min-max"])
def test_reduced_range_is_seven_bits(source, tmp_path, method):
    """Sums of two products then fit 16 bits: 2 * 255 * 64 < 2**15."""
    for reduced, most in (("true", 64), ("false", 127)):
        weights = weights_of(
            quantized(source, tmp_path, methods=[method], reduce_range=reduced, calibration_sizes=[7], **OWN)
        )
        matrices = [array for array in weights.values() if array.ndim == 2]
        assert len(matrices) >= 18
        assert max(abs(array.astype(int)).max() for array in matrices) == most


@pytest.mark.parametrize("method, end", [("dynamic", "scale"), ("token", "scales")])
def test_scales_are_of_columns(source, tmp_path, method, end):
    def scales(per_channel):
        file = quantized(source, tmp_path, methods=[method], per_channel=per_channel)
        weights = weights_of(file, [onnx.TensorProto.FLOAT])
        return [array.size for name, array in weights.items() if "MatMul" in name and name.endswith(end)]

    assert max(scales(True)) == 64 and max(scales(False)) == 1


@pytest.mark.parametrize("method", ["dynamic", "static-min-max"])
def test_tables_are_small_and_rows_have_scales(tmp_path, method):
    """Every row comes back to within half a step of 1/127 of its largest value; small tables stay as they are."""
    file = export(OnnxArguments(str(model_folder(tmp_path / "model", positions=300)), str(tmp_path / "model.onnx")))
    lines = [json.dumps({"text": CHARACTERS[i % 9 :], "label": LABELS[0]}) for i in range(10)]
    (tmp_path / "train.json").write_text("\n".join(lines) + "\n")
    small = quantized(file, tmp_path, methods=[method], calibration_sizes=[5], **OWN)
    [(name, rows)] = [(n, a) for n, a in weights_of(small).items() if a.shape == (300, 32)]
    table = weights_of(file, [onnx.TensorProto.FLOAT])[name.removesuffix("_quantized")].astype(np.float64)
    scales = weights_of(small, [onnx.TensorProto.FLOAT])[name.replace("_quantized", "_scales")].astype(np.float64)
    step = np.abs(table).max(axis=1, keepdims=True) / 127
    assert (np.abs(rows * scales - table) <= 0.501 * step).all()
    assert any(array.shape == (24, 32) for array in weights_of(small, [onnx.TensorProto.FLOAT]).values())


def test_ranges_are_those_of_the_calibration_texts(source, tmp_path):
    """min-max: the scale of the first matrix product's input, from its values on the texts, computed beside it."""
    file = quantized(source, tmp_path, methods=["static-min-max"], calibration_sizes=[7], **OWN)
    graph = onnx.load(file).graph
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear" and "LayerNorm" in node.input[0])
    watched = onnx.load(source)
    watched.graph.output.append(onnx.helper.make_tensor_value_info(first.input[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    tokenizer = OnnxModel(source).tokenizer
    examples = texts_of(source, "train")
    values = []
    for example in [examples[int(i)] for i in np.linspace(0, len(examples) - 1, 7)]:
        batch = classification_features(tokenizer, [example], 64).batch(np.array([0]))
        feed = dict(zip(("input_ids", "token_type_ids", "attention_mask"), batch[:3]))
        values.append(session.run([first.input[0]], feed)[0].ravel())
    values = np.concatenate(values).astype(np.float64)
    scale = next(numpy_helper.to_array(weight) for weight in graph.initializer if weight.name == first.input[1])
    assert float(scale) == pytest.approx((values.max() - values.min()) / 255, rel=1e-5)


def test_least_error_cuts_outliers_off():
    """Against the error of the values themselves, in float64, of every cut there is."""
    values = np.concatenate([np.random.default_rng(0).normal(size=20000), [40.0, -25.0]])
    histogram, edges = np.histogram(values, 2048, (-40, 40))

    def error(low, high):
        step = (high - low) / 255
        return ((np.clip(np.round((values - low) / step), 0, 255) * step + low - values) ** 2).mean()

    low, high = least_error(histogram, edges, values.min(), values.max())
    assert error(low, high) < error(values.min(), values.max())
    cuts = [error(share * values.min(), share * values.max()) for share in np.linspace(0.2, 1, 33)]
    assert error(low, high) < 1.05 * min(cuts)
    flat, edges = np.histogram(np.linspace(0, 1, 10000), 2048, (-1, 1))
    low, high = least_error(flat, edges, 0.0, 1.0)
    assert low == 0 and high == pytest.approx(1, abs=0.02)


def test_vnni_is_asked_of_the_processor(tmp_path):
    for flags, vnni in (("sse avx512_vnni", True), ("sse avx2 avx_vnni", True), ("sse avx2", False)):
        (tmp_path / "cpuinfo").write_text(f"model name : x\nflags : {flags}\n")
        assert has_vnni(tmp_path / "cpuinfo") == vnni
    (tmp_path / "cpuinfo").write_text("Features : fp asimd\n")
    assert has_vnni(tmp_path / "cpuinfo") and has_vnni(tmp_path / "absent")


def test_automatic_range_follows_the_processor(source, monkeypatch):
    for vnni in (True, False):
        monkeypatch.setattr(program, "has_vnni", lambda vnni=vnni: vnni)
        assert program.schemes_of(QuantizeArguments(model=str(source))) == [Scheme("token", reduce_range=not vnni)]


@pytest.mark.slow
def test_search_takes_the_fastest_that_is_accurate(source, tmp_path, capsys, monkeypatch):
    """Every method is in the table; one that loses more than it may is not taken, were it the fastest."""
    file = quantized(source, tmp_path, search=True, max_drop=100.0, calibration_sizes=[4, 8], **OWN)
    table = capsys.readouterr().out
    assert all(method in table for method in METHODS) and "static-mse, 8 texts" in table
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    fastest = max(rows[1:], key=lambda row: float(row[5].rstrip("x")))
    taken = next(row for row in rows if row[7] == "taken")
    assert float(taken[5].rstrip("x")) == float(fastest[5].rstrip("x"))
    assert OnnxModel(file).description.quantized == taken[0]
    with pytest.raises(InputError, match="--max_drop -100.0: every method loses more"):
        quantized(source, tmp_path, methods=["dynamic", "float16"], max_drop=-100.0, **OWN)
    assert "loses more than -100.0" in capsys.readouterr().out


def test_tokenizer_goes_in_after_quantization(source, tmp_path):
    model = OnnxModel(quantized(source, tmp_path, tokenizer="in-graph"))
    plain = OnnxModel(quantized(source, tmp_path))
    texts = texts_of(source)[:50]
    assert model.in_graph
    for text in texts:
        [answer], [wanted] = model.answers([text]), plain.answers([text])
        assert answer == {**wanted, "probability": pytest.approx(wanted["probability"], abs=2e-6)}


def test_reading_is_calibrated_in_windows(tmp_path):
    file = export(OnnxArguments(str(model_folder(tmp_path / "q", "question_answering")), str(tmp_path / "q.onnx")))
    rows = [{"id": i, "question": "天气", "context": CHARACTERS * 5, "answers": ["好"]} for i in range(4)]
    (tmp_path / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = quantized(file, tmp_path, methods=["static-mse"], calibration_sizes=[4], task_name="reading")
    assert OnnxModel(small).description.quantized == "static-mse, 4 texts"


def test_what_there_is_chooses_the_method(source, tmp_path, capsys):
    """Static where there are texts, of a file or of the task; else scales of each token. Both say what it costs."""
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{example.text}\n\n" for example in texts_of(source)[:30]), encoding="utf-8")
    for options, scheme in (
        ({}, "token"),
        (OWN, "static-mse, 40 texts"),
        ({"calibration": str(texts)}, "static-mse, 30 texts"),
        ({"calibration": str(texts), "calibration_sizes": [9]}, "static-mse, 9 texts"),
    ):
        assert OnnxModel(quantized(source, tmp_path, **options)).description.quantized == scheme
        said = capsys.readouterr().err
        assert re.search(rf"out.onnx: {scheme}; .* MiB.*; logits off by \d+\.\d% of their spread", said)
        assert ("for want of texts; with --calibration FILE it is static-mse" in said) == (scheme == "token")
    assert "depend on" not in said
    quantized(source, tmp_path, methods=["dynamic"])
    assert "its answers depend on what is computed with them" in capsys.readouterr().err


def test_texts_to_calibrate_on_are_read_as_predict_reads_them(source, tmp_path):
    for name, content, message in (
        ("a.jsonl", '{"text": "一"}\n{"text": 1}\n', "a.jsonl:2: text: expected a string"),
        ("a.txt", "\n \n", "a.txt: holds no texts; give a file with a text a line"),
        ("a.csv", "text\n", "a.csv: CSV is not read here"),
        ("b.txt", None, "b.txt: no such file; give a file with a text a line"),
        ("c.txt", b"\xff\n", "c.txt:1: not UTF-8 at byte 0"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=message):
            quantized(source, tmp_path, calibration=str(path))
    assert not (tmp_path / "out.onnx").exists()


def test_bad_input_is_named(source, tmp_path):
    def refused(match, **options):
        with pytest.raises(InputError, match=match):
            quantized(source, tmp_path, **options)

    refused("--task_name: not given; calibration .or --calibration FILE. needs a task's texts", methods=["static-mse"])
    refused("--task_name: not given; choosing a method needs", methods=["dynamic", "float16"])
    refused("train.json.*no such file|no train", methods=["static-mse"], data_dir=str(tmp_path / "nowhere"), **OWN)
    refused("--task_name tnews: .* does classification with 3 classes", methods=["static-mse"], task_name="tnews")
    with pytest.raises(InputError, match=f"--output {source}: is read here; give another file"):
        quantize(QuantizeArguments(model=str(source), output=str(source)))
    with pytest.raises(InputError, match="--methods: --search tries all"):
        QuantizeArguments(model=str(source), methods=["dynamic"], search=True)
    with pytest.raises(InputError, match="--pairs: goes with --tokenizer in-graph"):
        QuantizeArguments(model=str(source), pairs=True)
    with pytest.raises(InputError, match="--methods: none given"):
        QuantizeArguments(model=str(source), methods=[])
    encoder = export(OnnxArguments(str(model_folder(tmp_path / "encoder", None)), str(tmp_path / "encoder.onnx")))
    with pytest.raises(InputError, match="--tokenizer in-graph: .*encoder.onnx is no classifier"):
        quantized(encoder, tmp_path, tokenizer="in-graph")
    assert OnnxModel(quantize(QuantizeArguments(model=str(encoder))).path).description.head is None
    small = quantized(source, tmp_path)
    with pytest.raises(InputError, match="is token already; give the float32 file"):
        quantize(QuantizeArguments(model=str(small)))
    inside = export(OnnxArguments(str(source.parent / "model"), str(tmp_path / "t.onnx"), tokenizer="in-graph"))
    with pytest.raises(InputError, match="has its tokenizer inside"):
        quantize(QuantizeArguments(model=str(inside)))
