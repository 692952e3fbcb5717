"""From a task's data to a served model, on both backends: the labels a client gets are the framework's."""

import csv
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tritonclient.http
from conftest import ROOT, TINY, environment, model_folder

from backends.interface import ONNX_INPUTS
from backends.pretrained import write_model
from bench.serving import serving
from export import __main__ as command_line
from export.benchmark import deployments
from export.benchmark.arguments import BenchmarkArguments
from export.benchmark.processes import Deployment, Runner
from export.benchmark.program import benchmark
from export.convert import OnnxArguments, export
from export.model import OnnxModel
from finetuning.arguments import FinetuneArguments
from finetuning.finetune import finetune
from text.data import Example, read_split
from text.features import classification_features
from text.tasks import TASKS
from text.tokenizer import WordPiece


@pytest.fixture(scope="module")
def student(tmp_path_factory, data, torch_backend):
    """A tiny model with the real vocabulary."""
    folder = tmp_path_factory.mktemp("student")
    vocabulary = WordPiece.from_file(data / "vocab" / "vocab.txt")
    config = {**TINY, "vocab_size": len(vocabulary), "max_position_embeddings": 64, "initializer_range": 0.1}
    torch_backend.seed(3)
    vocabulary.save(folder, 64)
    write_model(folder, config, torch_backend.model(config).weights())
    return folder


def export_command(*arguments):
    assert command_line.main([str(argument) for argument in arguments]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_student_to_server(tmp_path, data, student, name):
    """Fine-tuned on TNEWS, exported, quantized, served; asked by a standard client. Labels of float32 are the
    framework's; those of INT8 too, but where two classes were less than a hundredth apart."""
    if name == "paddle":
        pytest.importorskip("paddle2onnx", reason="paddle2onnx is not there, on Python 3.13 say")
    run = tmp_path / "run"
    finetune(
        FinetuneArguments(
            task_name="tnews", model_name_or_path=str(student), data_dir=str(data / "clue"), output_dir=str(run),
            backend=name, device="cpu", max_seq_length=48, learning_rate=5e-3, max_steps=200, save_steps=200,
        )
    )  # fmt: skip
    framework = [json.loads(line) for line in (run / "dev_predictions.json").read_text().splitlines()][:256]
    examples = read_split(TASKS["tnews"], data / "clue", "dev").examples[:256]
    assert len({row["label"] for row in framework}) > 3
    export_command("onnx", run, tmp_path / "float32.onnx", "--backend", name)
    export_command("onnx", run, tmp_path / "text.onnx", "--backend", name, "--tokenizer", "in-graph")
    export_command("quantize", tmp_path / "float32.onnx", tmp_path / "int8.onnx", "--tokenizer", "in-graph")
    export_command("quantize", tmp_path / "float32.onnx", tmp_path / "tokens.onnx")
    of_file = {}
    for file in ("text", "int8", "tokens"):
        of_file[file] = np.array(served_labels(tmp_path / f"{file}.onnx", examples))
    labels = np.array([row["label"] for row in framework])
    assert of_file["text"].tolist() == labels.tolist()
    model = OnnxModel(tmp_path / "float32.onnx")
    logits = np.stack(model.logits(classification_features(model.tokenizer, examples, 48)))
    best = np.sort(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), axis=1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > 0.01
    assert clear.mean() > 0.7
    for file in ("int8", "tokens"):
        assert of_file[file][clear].tolist() == labels[clear].tolist()


def served_labels(file, examples):
    """The labels that a server of the file gives, as many texts at a time as it takes, through Triton's client."""
    command = [sys.executable, "-m", "export", "serve", str(file), "--port", "0", "--runtime", "onnxruntime"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        address = re.search(r"at http://(.*)$", process.stderr.readline().strip())[1]
        client = tritonclient.http.InferenceServerClient(address)
        model = OnnxModel(file)
        labels = []
        for i in range(0, len(examples), 64):
            part = examples[i : i + 64]
            if model.in_graph:
                inputs = [tritonclient.http.InferInput("text", [len(part)], "BYTES")]
                inputs[0].set_data_from_numpy(np.array([example.text for example in part], object))
                answer = client.infer(file.stem, inputs).as_numpy("label")
                labels += [label.decode() for label in answer]
            else:
                batch = classification_features(model.tokenizer, part, 48).batch(np.arange(len(part)))
                inputs = [tritonclient.http.InferInput(name, a.shape, "INT64") for name, a in zip(ONNX_INPUTS, batch)]
                for put, array in zip(inputs, batch):
                    put.set_data_from_numpy(array)
                best = client.infer(file.stem, inputs).as_numpy("logits").argmax(axis=1)
                labels += [model.description.labels[i] for i in best]
        return labels
    finally:
        process.terminate()
        assert process.wait(30) == 0
        process.stderr.close()


@pytest.mark.slow
def test_benchmark_compares_all(tmp_path, data, monkeypatch, capsys):
    """Every runtime and form is measured; the tables' figures follow from the raw ones."""
    monkeypatch.setattr(deployments, "BASE_SHAPE", "2x64")
    labels = TASKS["tnews"].labels
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    folder = model_folder(tmp_path / "model", **names)
    output = benchmark(
        BenchmarkArguments(
            model=str(folder), output_dir=str(tmp_path / "out"), task_name="tnews", data_dir=str(data / "clue"),
            batch_sizes=[1, 2], lengths=[8, 16], rounds=2, seconds=0.01, examples=50, threads=1,
        )
    )  # fmt: skip
    results = json.loads((output / "benchmark.json").read_text())
    rows = {row["row"]: row for row in results["contenders"]}
    for runtime in ("ONNX Runtime", "PyTorch", "Paddle Inference"):
        assert f"{runtime} float32, tokenizers" in rows
    peers = {"openvino": "OpenVINO INT8 static", "nncf": "OpenVINO INT8 by NNCF", "ctranslate2": "CTranslate2 INT8"}
    for package, title in peers.items():
        assert (f"{title}, tokenizers" in rows) == (importlib.util.find_spec(package) is not None)
    for form in ("float32", "float16", "INT8 dynamic", "INT8 token", "INT8 static"):
        assert {f"ONNX Runtime {form}, {way}" for way in ("tokenizers", "in-graph tokenizer")} <= rows.keys()
    assert {row["accuracy"] for name, row in rows.items() if "ONNX Runtime float32" in name} == {
        rows["PyTorch float32, tokenizers"]["accuracy"]
    }
    for row in rows.values():
        assert len(row["answering_seconds"]) == 2 and row["peak_bytes"] > row["bytes"] > 0
        for shape in row["shapes"]:
            assert 0 < shape["p50_ms"] <= shape["p90_ms"] <= shape["p99_ms"] and shape["runs"] >= 6
            assert shape["sequences_per_second"] == pytest.approx(1000 * shape["batch"] / shape["p50_ms"])
    table = (output / "benchmark.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "CUDA: ONNX Runtime's provider is not there, not measured." in table
    base, fast = rows["BERT-base float32, Python tokenizer"], rows["ONNX Runtime INT8 dynamic, tokenizers"]
    line = next(line for line in table.splitlines() if line.startswith("| ONNX Runtime INT8 dynamic, tokenizers |"))
    ratio = base["shapes"][-1]["p50_ms"] / fast["shapes"][-1]["p50_ms"]
    assert line.split("|")[3].strip() == f"{ratio:.2f}x"
    with (output / "benchmark.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4 * len(rows)
    for picture in ("latency.png", "accuracy.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")


def test_pairs_are_measured_in_the_graph_too(tmp_path):
    """Two texts make as many tokens as were asked for."""
    folder = model_folder(tmp_path / "model")
    file = export(OnnxArguments(str(folder), str(tmp_path / "m.onnx"), tokenizer="in-graph", pairs=True))
    runner = Runner(Deployment("x", "onnxruntime", folder, file, (), 64, tokenizing="in-graph"), 1)
    calls = []
    runner.model.classify = lambda *columns: calls.append(columns)
    assert len(runner.latencies(2, 16, 0.0)) == 3
    texts, pairs = calls[0]
    features = [Example(0, a, b, None) for a, b in zip(texts, pairs)]
    lengths = classification_features(runner.tokenizer, features, 64).lengths
    assert lengths.tolist() == [16, 16]


@pytest.mark.slow
def test_load_on_the_server_is_measured(tmp_path, data, monkeypatch):
    """Every request is answered, with the label that the model gives when it is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    labels = TASKS["tnews"].labels
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    file = export(OnnxArguments(str(model_folder(tmp_path / "model", **names)), str(tmp_path / "m.onnx")))
    serving(str(file), data_dir=str(data / "clue"), clients=16, texts=200, rounds=2, output_dir=str(tmp_path / "out"))
    results = json.loads((tmp_path / "out" / "serving-m.json").read_text())
    for measured in results["served"]:
        assert measured["errors"] == 0 and measured["labels"] == 200
        assert measured["percentiles_ms"] == sorted(measured["percentiles_ms"])
