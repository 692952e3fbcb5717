"""Runtimes: the same answers of the same file, alone or in company, and the choice among them."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import CHARACTERS, LABELS, ROOT, environment, make_batch, model_folder
from onnx import TensorProto, numpy_helper

from backends.files import InputError
from backends.interface import ONNX_INPUTS, Batch
from export import runtime_choice, runtimes
from export.convert import OnnxArguments, export
from export.int8 import with_signed_factors
from export.model import OnnxModel
from export.quantize import QuantizeArguments, quantize
from export.runtime_choice import open_model
from export.runtimes import RUNTIMES
from export.schemes import METHODS
from text.data import Example

COMPANY_FREE = [method for method in METHODS if method not in ("dynamic", "float16")]


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request):
    pytest.importorskip(request.param, reason="an extra")
    return request.param


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtimes")
    texts = [CHARACTERS[i % 19 :] * (i % 3) + CHARACTERS[: 1 + i % 7] for i in range(40)]
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return export(OnnxArguments(str(model_folder(folder / "model")), str(folder / "float32.onnx")))


@pytest.fixture(scope="module")
def files(plain):
    """A file of every method, by its name; and the one that all are made of."""
    written = {"float32": plain}
    for method in METHODS:
        options = {"calibration": str(plain.with_name("texts.txt"))} if method.startswith("static") else {}
        output = str(plain.with_name(f"{method}.onnx"))
        written[method] = quantize(QuantizeArguments(model=str(plain), output=output, methods=[method], **options)).path
    return written


def examples(count=2000):
    """Texts of many lengths, as real ones are drawn together by chance."""
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list(CHARACTERS), random.integers(0, 70))) for _ in range(count)]
    return [Example(i, text, None, None) for i, text in enumerate(texts)]


@pytest.mark.slow
@pytest.mark.parametrize("method", COMPANY_FREE)
def test_an_answer_does_not_depend_on_company(files, runtime, method):
    """Of 2,000 texts alone, together, and together in another order: on ONNX Runtime to the last digit. On OpenVINO the
    last bits of float32 differ, and now and then push a value to the next integer; never to another label."""
    model, texts = OnnxModel(files[method], 2, RUNTIMES[runtime]), examples()
    together = model.answers(texts)
    order = np.random.default_rng(1).permutation(len(texts))
    shuffled = dict(zip(order.tolist(), model.answers([texts[i] for i in order])))
    differences = []
    for text, answer in zip(texts, together):
        [alone] = model.answers([text])
        for other in (alone, shuffled[text.id]):
            assert other["label"] == answer["label"]
            differences.append(abs(other["probability"] - answer["probability"]))
    assert np.mean(np.array(differences) > 1e-5) <= (0 if runtime == "onnxruntime" else 0.005)


def test_wide_models_answer_to_the_last_bit_beside_longer_texts(tmp_path, backend):
    """ONNX Runtime groups the terms of a sum by the sizes of what is multiplied; those are a text's own."""
    wide = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 2}
    folder = model_folder(tmp_path / "model", positions=128, initializer_range=0.03, **wide)
    model = OnnxModel(export(OnnxArguments(str(folder), str(tmp_path / "m.onnx"), backend.name)), 1)
    batch = make_batch([*range(3, 60, 4), 100], 24)
    [beside], alone = model.run(batch), []
    for i, length in enumerate(batch.attention_mask.sum(1)):
        alone += [*model.run(Batch(*(part[i : i + 1, :length] for part in batch[:3])))[0]]
    np.testing.assert_array_equal(beside, alone)


def test_dynamic_answers_depend_on_company(files):
    """What the others are there for: the same comparison finds it."""
    model, texts = OnnxModel(files["dynamic"], 2), examples(200)
    together = model.answers(texts)
    alone = [model.answers([text])[0] for text in texts]
    assert max(abs(a["probability"] - b["probability"]) for a, b in zip(alone, together)) > 1e-4


@pytest.mark.parametrize("method", ["float32", *METHODS])
def test_runtimes_agree(files, method):
    """To what INT8 rounds; to 1e-5 without it. The largest differences are of what lies between two integers."""
    pytest.importorskip("openvino", reason="an extra")
    batch = make_batch([60, 3, 17, 40] * 8, 24)
    here, there = (OnnxModel(files[method], 2, RUNTIMES[name]) for name in RUNTIMES)
    exact = OnnxModel(files["float32"], 2).run(batch)[0]
    difference = np.abs(here.run(batch)[0] - there.run(batch)[0])
    if method in ("float32", "float16"):
        assert difference.max() < (1e-5 if method == "float32" else 2e-2) * np.abs(exact).max()
    else:
        assert np.sqrt((difference**2).mean()) < 0.1 * exact.std()


def test_signed_factors_have_the_same_values(files):
    """Queries pass through other integers for OpenVINO, but those of the last of three layers, which are not rounded;
    what a token's own scale rounds stays unsigned."""
    session = onnxruntime.InferenceSession
    for method, changed in (("static-mse", 2), ("token", 0), ("float32", 0)):
        content = files[method].read_bytes()
        signed = with_signed_factors(content)
        before, after = ({t.name: t for t in onnx.load_from_string(c).graph.initializer} for c in (content, signed))
        different = [name for name, tensor in before.items() if after[name] != tensor]
        assert len(different) == changed and all(after[name].data_type == TensorProto.INT8 for name in different)
        feed = dict(zip(ONNX_INPUTS, make_batch([60, 3, 17], 24)[:3]))
        unsigned_logits, signed_logits = (session(c).run(None, feed)[0] for c in (content, signed))
        np.testing.assert_allclose(signed_logits, unsigned_logits, atol=1e-5)


def test_sizes_of_batches_do_not_add_up(plain, monkeypatch):
    """OpenVINO keeps something for each: after some it is set up anew, and computes the same."""
    openvino = pytest.importorskip("openvino", reason="an extra")
    monkeypatch.setattr(runtimes, "SHAPES", 2)
    compiled, compile_model = [], openvino.Core.compile_model
    monkeypatch.setattr(
        openvino.Core, "compile_model", lambda *arguments: compiled.append(1) or compile_model(*arguments)
    )
    model, exact = OnnxModel(plain, 1, RUNTIMES["openvino"]), OnnxModel(plain, 1)
    for length in (3, 5, 3, 5, 7, 9, 11, 3):  # the first is that of the trial when it was opened
        batch = make_batch([length] * 2, 24)
        np.testing.assert_allclose(model.run(batch)[0], exact.run(batch)[0], atol=1e-5)
    assert len(compiled) == 3


@pytest.mark.parametrize("head", [None, "token_classification", "question_answering"])
def test_other_heads_agree(tmp_path, head):
    pytest.importorskip("openvino", reason="an extra")
    file = export(OnnxArguments(str(model_folder(tmp_path / "model", head)), str(tmp_path / "m.onnx")))
    batch = make_batch([60, 3, 17, 40], 24)
    kept = batch.attention_mask.astype(bool)
    here, there = (OnnxModel(file, 2, RUNTIMES[name]) for name in RUNTIMES)
    for name, values, others in zip(here.outputs, here.run(batch), there.run(batch), strict=True):
        if name in here.by_token:
            values, others = values[kept], others[kept]
        np.testing.assert_allclose(others, values, atol=2e-5)


def test_no_rows_in_no_rows_out(files, runtime):
    for method in ("float32", "token", "static-mse"):
        model = OnnxModel(files[method], 2, RUNTIMES[runtime])
        assert model.run(Batch(*[np.zeros((0, 5), np.int64)] * 3))[0].shape == (0, len(LABELS))
        assert model.answers([]) == []


def changed(file, path, change):
    model = onnx.load(file)
    change(model)
    onnx.save(model, path)
    return path


def swap_weight(model, shape, kind=np.float32):
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and tensor.dims[0] != 64)
    weight.CopyFrom(numpy_helper.from_array(np.ones(shape, kind), weight.name))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: swap_weight(model, (3, 5)),
        lambda model: swap_weight(model, (24, 32), np.int8),
        lambda model: model.graph.node[-1].input.__setitem__(0, "nowhere"),
        lambda model: model.graph.node.pop(len(model.graph.node) // 2),
        lambda model: setattr(model.graph.output[0].type.tensor_type, "elem_type", TensorProto.DOUBLE),
    ],
)
def test_malformed_files_are_refused(plain, tmp_path, runtime, change):
    """In one line that names the file, whatever looks into it."""
    path = changed(plain, tmp_path / "bad.onnx", change)
    with pytest.raises(InputError, match=f"{path}: ") as error:
        OnnxModel(path, 1, RUNTIMES[runtime])
    assert "\n" not in str(error.value)


def field(number, content):
    """Bytes of a field of protobuf."""
    length, size = [], len(content)
    while size >= 128:
        length.append(size % 128 + 128)
        size //= 128
    return bytes([8 * number + 2, *length, size]) + content


def test_bytes_of_two_formats_are_read_as_onnx(plain, tmp_path):
    """OpenVINO's own format in the name of an ONNX file's producer: what was checked is what is computed."""
    openvino = pytest.importorskip("openvino", reason="an extra")
    operators = openvino.opset13
    inputs = [operators.parameter([-1, -1], openvino.Type.i64, name=name) for name in ONNX_INPUTS]
    for put, name in zip(inputs, ONNX_INPUTS):
        put.output(0).set_names({name})
    logits = operators.sin(operators.convert(operators.add(operators.add(inputs[0], inputs[1]), inputs[2]), "f32"))
    logits.output(0).set_names({"logits"})
    openvino.save_model(openvino.Model([logits], inputs, "another"), tmp_path / "another.xml")
    other = (tmp_path / "another.xml").read_bytes()
    other = re.sub(rb">\s+<", b"><", other[other.index(b"<net") :])
    path = tmp_path / "two.onnx"
    path.write_bytes(field(2, other) + plain.read_bytes())
    batch = make_batch([3, 3], 24)
    expected = OnnxModel(plain, 1).run(batch)[0]
    np.testing.assert_allclose(OnnxModel(path, 1, RUNTIMES["openvino"]).run(batch)[0], expected, atol=1e-5)


def test_operators_that_index_without_bounds_are_refused(plain, tmp_path):
    """OpenVINO would write where such an index says, beyond the tensor too."""
    pytest.importorskip("openvino", reason="an extra")

    def scatter(model):
        last = model.graph.node[-1]
        last.output[0] = "before"
        for name, value in (("at", np.array([[-(10**8)]])), ("value", np.ones((1, 1), np.float32))):
            model.graph.initializer.append(numpy_helper.from_array(value, name))
        model.graph.node.append(onnx.helper.make_node("ScatterElements", ["before", "at", "value"], ["logits"]))

    path = changed(plain, tmp_path / "scatter.onnx", scatter)
    with pytest.raises(InputError, match="scatter.onnx holds the operator ScatterElements, which OpenVINO does"):
        OnnxModel(path, 1, RUNTIMES["openvino"])
    with pytest.raises(InputError, match="scatter.onnx: not an ONNX model that ONNX Runtime runs"):
        OnnxModel(path, 1)


def test_tokens_beyond_the_table_read_nothing_else(plain, runtime):
    """Of a file whose tokens are checked by nobody else: an error, or numbers that do not change from run to run."""
    model, ids = OnnxModel(plain, 1, RUNTIMES[runtime]), np.array([[1, 10**6, -(10**6), 2]])
    batch = make_batch([4], 24)._replace(input_ids=ids)
    try:
        first, second = (model.run(batch)[0] for _ in range(2))
    except Exception as error:
        assert "out of" in str(error)
    else:
        np.testing.assert_array_equal(first, second)
        assert np.isfinite(first).all()


def test_the_faster_runtime_is_measured_once(plain, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openvino", reason="an extra")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []

    def compare(contenders):
        measured.append(list(contenders))
        return {"onnxruntime": 2.0, "openvino": 1.0}

    monkeypatch.setattr(runtime_choice, "compare", compare)
    for _ in range(2):
        assert open_model(plain, 2, "auto").runtime.name == "openvino"
    assert measured == [["onnxruntime", "openvino"]]
    said = capsys.readouterr().err
    assert "OpenVINO for" in said and "ONNX Runtime 2000.0 ms, OpenVINO 1000.0 ms" in said
    assert "the fastest for" in said
    assert open_model(plain, 1, "auto").runtime.name == "openvino" and len(measured) == 2
    [record] = tmp_path.rglob("runtimes.json")
    for content in ("{", "[]", '{"a": "another"}', '{"a": []}'):
        record.write_text(content)
        open_model(plain, 2, "auto")
    assert len(measured) == 6
    assert open_model(plain, 2, "onnxruntime").runtime.name == "onnxruntime" and len(measured) == 6


def test_comparison_takes_turns():
    """The geometric mean of medians, of rounds after the first."""
    calls = []
    contenders = {name: [lambda name=name, i=i: calls.append((name, i)) for i in (0, 1)] for name in ("a", "b")}
    seconds = runtime_choice.compare(contenders)
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * (1 + runtime_choice.ROUNDS)
    assert min(seconds.values()) > 0


def test_without_the_extra_all_works(plain, monkeypatch, capsys):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "openvino" else object())
    monkeypatch.setitem(sys.modules, "openvino", None)
    runtimes._openvino.cache_clear()
    assert open_model(plain, 1, "auto").runtime.name == "onnxruntime"
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="--runtime openvino: not installed; pip install openvino"):
        open_model(plain, 1, "openvino")


def test_the_tokenizer_in_the_graph_has_one_runtime(plain, tmp_path, capsys):
    pytest.importorskip("openvino", reason="an extra")
    folder = plain.with_name("model")
    inside = export(OnnxArguments(str(folder), str(tmp_path / "strings.onnx"), tokenizer="in-graph"))
    capsys.readouterr()
    assert open_model(inside, 1, "auto").runtime.name == "onnxruntime"
    assert "holds a tokenizer, which OpenVINO does not run" in capsys.readouterr().err
    with pytest.raises(
        InputError, match="--runtime openvino: .*strings.onnx holds a tokenizer, which OpenVINO does not run"
    ):
        open_model(inside, 1, "openvino")


def test_search_names_file_and_runtime(plain, tmp_path, capsys):
    """Every method on every runtime is in the table; the command ends with the one to serve."""
    pytest.importorskip("openvino", reason="an extra")
    model = OnnxModel(plain)
    rows = [{"text": e.text, "label": model.answers([e])[0]["label"]} for e in examples(60)]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = quantize(
        QuantizeArguments(
            model=str(plain), output=str(tmp_path / "out.onnx"), methods=["token", "static-mse"], max_drop=100.0,
            task_name="classification", data_dir=str(tmp_path), calibration_sizes=[20],
        )
    )  # fmt: skip
    output = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.out.splitlines()[2:]]
    assert [row[:2] for row in rows[1:]] == [
        [method, name] for method in ("token", "static-mse, 20 texts") for name in ("ONNX Runtime", "OpenVINO")
    ]
    [taken] = [row for row in rows if row[7] == "taken"]
    assert result.runtime == {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}[taken[1]]
    assert OnnxModel(result.path).description.quantized == taken[0]
    assert f"the fastest within 100 points: {taken[0]}, on {taken[1]}" in output.err


KILLED = """
import os, signal, sys
from pathlib import Path
from export import predict as program
from export.model import OnnxModel

program.BLOCK, place = 16, int(sys.argv[3])
written = program._json_line

def line(answer):
    global place
    place -= 1
    if not place:
        Path(sys.argv[2]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return written(answer)

program._json_line = line
options = dict(runtime="onnxruntime", threads=2, resume=True)
program.predict(program.PredictArguments(model=sys.argv[1], texts=sys.argv[2], **options))
"""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(files, tmp_path):
    """Dynamic quantization, whose answers depend on company; killed at ten places, in blocks and between them."""
    lines = [example.text for example in examples(200)]
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(KILLED)

    def run(name, place=0):
        command = [sys.executable, str(script), str(files["dynamic"]), str(tmp_path / f"{name}.txt"), str(place)]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)

    assert run("whole").returncode == 0
    for place in (1, 2, 16, 17, 18, 31, 33, 40, 7, 50):
        assert run("killed", place).returncode == -9
    done = run("killed")
    assert done.returncode == 0, done.stderr
    whole, killed = (tmp_path / f"{name}.answers.jsonl" for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes() and os.path.getsize(whole) > 5000
