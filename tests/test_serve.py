"""The server: a standard client's answers, every bad request refused in its place, nothing lost."""

import asyncio
import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import tritonclient.http
from conftest import CHARACTERS, ROOT, environment, model_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from backends.files import InputError
from backends.interface import ONNX_INPUTS, Batch
from export.batching import Batcher, QueueFull
from export.convert import OnnxArguments, export
from export.model import OnnxModel
from export.runtime_choice import open_model
from export.runtimes import RUNTIMES
from export.serve import ServeArguments, Server, serve
from text.answers import softmax
from text.data import Example


def exported(folder, head="sequence_classification", **options):
    return export(OnnxArguments(str(model_folder(folder / "model", head)), str(folder / "m.onnx"), **options))


@contextmanager
def served(file, silence=0.2, runtime="onnxruntime", **options):
    """A server in a thread; its port and itself."""
    server = Server(open_model(file, 0, runtime), ServeArguments(model=str(file), **options))
    started = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.http.HANDSHAKE", 0.01)
        patch.setattr("export.http.LINGER", 0.2)
        patch.setattr("export.http.SILENCE", silence)
        thread = threading.Thread(target=lambda: asyncio.run(server.run(listening, started.set)), daemon=True)
        thread.start()
        assert started.wait(30)
        try:
            yield listening.getsockname()[1], server
        finally:
            server.stop()
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("inside"), tokenizer="in-graph", pairs=True)


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request):
    pytest.importorskip(request.param, reason="an extra")
    return request.param


@pytest.fixture(scope="module")
def port(plain, runtime):
    with served(plain, runtime=runtime, max_texts=8, max_characters=100, max_body_bytes=10_000) as (port, _):
        yield port


def ask(port, path, body=None, headers=(), method=None):
    """Returns status and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, data, dict(headers))
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if answer.headers.get_content_type() == "application/json" else content


def tensor(array, datatype="INT64", **changed):
    return {"datatype": datatype, "shape": list(np.shape(array)), "data": np.ravel(array).tolist(), **changed}


def tokens(rows=((2, 6, 3),), **changed):
    ids = np.array(rows)
    inputs = {"input_ids": ids, "token_type_ids": 0 * ids, "attention_mask": 0 * ids + 1}
    return {"inputs": [{"name": name, **tensor(value, **changed)} for name, value in inputs.items()]}


# Answers


def test_predict_answers_as_the_model_does(port, plain):
    texts = [CHARACTERS[i:] for i in range(5)]
    wanted = OnnxModel(plain).answers([Example(0, text, None, None) for text in texts])
    status, answers = ask(port, "/predict", [{"text": text} for text in texts])
    assert status == 200
    for text, row, answer in zip(texts, answers, wanted):
        assert row == {"label": answer["label"], "probability": pytest.approx(answer["probability"], abs=1e-5)}
        assert ask(port, "/predict", {"text": text}) == (200, {**row, "probability": pytest.approx(row["probability"])})
    pair = ask(port, "/predict", {"text": "一", "text_pair": "二三"})[1]
    [answer] = OnnxModel(plain).answers([Example(0, "一", "二三", None)])
    assert pair["probability"] == pytest.approx(answer["probability"], abs=1e-5)


@pytest.mark.parametrize("binary", [True, False])
def test_a_standard_client_is_answered(port, plain, binary):
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("m", "1")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("m")
    assert [(put["name"], put["datatype"], put["shape"]) for put in metadata["inputs"]] == [
        (name, "INT64", [-1, -1]) for name in ONNX_INPUTS
    ]
    model = OnnxModel(plain)
    batch = model.tokenizer.encode(["今天天气好", "一", "abc。"], 64).batch
    inputs = []
    for name, array in zip(ONNX_INPUTS, batch):
        inputs.append(tritonclient.http.InferInput(name, array.shape, "INT64"))
        inputs[-1].set_data_from_numpy(array, binary_data=binary)
    wanted = [tritonclient.http.InferRequestedOutput("logits", binary_data=binary)]
    for outputs in (None, wanted):
        answer = client.infer("m", inputs, outputs=outputs, request_id="7")
        assert answer.get_response()["id"] == "7"
        np.testing.assert_allclose(answer.as_numpy("logits"), model.run(batch)[0], atol=1e-5)


def test_strings_go_in_where_the_tokenizer_is_inside(inside):
    client_texts = [("今天", "天气好"), ("", "一二三"), ("abc", "。" * 90)]
    with served(inside, name="strings") as (port, _):
        client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}")
        labels, probabilities = OnnxModel(inside).classify(*zip(*client_texts))
        inputs = []
        for name, column in zip(("text", "text_pair"), zip(*client_texts)):
            inputs.append(tritonclient.http.InferInput(name, [3], "BYTES"))
            inputs[-1].set_data_from_numpy(np.array(column, object))
        answer = client.infer("strings", inputs)
        assert [label.decode() for label in answer.as_numpy("label")] == labels
        np.testing.assert_allclose(answer.as_numpy("probabilities"), probabilities, atol=1e-5)
        status, answers = ask(port, "/predict", [{"text": a, "text_pair": b} for a, b in client_texts])
        assert status == 200 and [row["label"] for row in answers] == labels
        body = {"text": "今天", "text_pair": "天气好", "top_k": 3}
        best = np.argsort(-probabilities[0], kind="stable")
        listed = ask(port, "/predict", body)[1]["top_k"]
        assert [row["label"] for row in listed] == [OnnxModel(inside).description.labels[i] for i in best]
        assert ask(port, "/predict", {"text": "一"})[0] == 422
        second = {"name": "text_pair", **tensor(["b", "c"], "BYTES")}
        status, error = ask(
            port, "/v2/models/strings/infer", {"inputs": [{"name": "text", **tensor(["a"], "BYTES")}, second]}
        )
        assert status == 422 and "shapes [1], [2]" in error["error"]


@pytest.mark.parametrize("shape", [[3], [3, 1]])
def test_strings_come_in_the_shapes_of_triton_too(inside, shape):
    """Whose repository takes a column of them, and answers with one."""
    with served(inside) as (port, _):
        client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}")
        metadata = client.get_model_metadata("m")
        assert [put["shape"] for put in metadata["inputs"]] == [[-1, 1], [-1, 1]]
        assert [put["shape"] for put in metadata["outputs"]] == [[-1, 1], [-1, 3]]
        columns = (["今天", "", "abc"], ["天气好", "一二三", "。"])
        for count in (3, 0):
            inputs = []
            for name, column in zip(("text", "text_pair"), columns):
                inputs.append(tritonclient.http.InferInput(name, [count, *shape[1:]], "BYTES"))
                inputs[-1].set_data_from_numpy(np.array(column[:count], object).reshape(count, *shape[1:]))
            for binary in (True, False):
                wanted = [tritonclient.http.InferRequestedOutput(name, binary) for name in ("label", "probabilities")]
                answer = client.infer("m", inputs, outputs=wanted)
                assert list(answer.as_numpy("label").shape) == [count, *shape[1:]]
                assert answer.as_numpy("probabilities").shape == (count, 3)
                if count and binary:
                    labels = [label.decode() for label in answer.as_numpy("label").ravel()]
                    assert labels == OnnxModel(inside).classify(*columns)[0]


@pytest.mark.parametrize("length", [0, 5])
def test_no_rows_in_no_rows_out(port, length):
    assert ask(port, "/predict", []) == (200, [])
    status, answer = ask(port, INFER, tokens(np.zeros((0, length), int)))
    assert (status, answer["outputs"][0]["shape"], answer["outputs"][0]["data"]) == (200, [0, 3], [])


def test_the_best_answers_are_listed(tmp_path, port, plain):
    """As many as are asked for, each request for itself."""
    model, text = OnnxModel(plain), CHARACTERS[:9]
    probabilities = softmax(np.stack(model.logits(model.features([Example(0, text, None, None)]))))[0]
    objects = [{"text": text}, {"text": text, "top_k": 2}, {"text": text, "top_k": 1000}]
    status, answers = ask(port, "/predict", objects)
    assert status == 200 and "top_k" not in answers[0]
    for answer, count in zip(answers[1:], (2, 3)):
        assert {key: answer[key] for key in answers[0]} == answers[0] == answer["top_k"][0]
        best = [model.description.labels.index(row["label"]) for row in answer["top_k"]]
        assert best == np.argsort(-probabilities)[:count].tolist()
        np.testing.assert_allclose([row["probability"] for row in answer["top_k"]], probabilities[best], atol=1e-5)
    for count in (0, -1, True, 1.5, "2", None):
        status, answer = ask(port, "/predict", {"text": text, "top_k": count})
        assert (status, answer["error"]) == (422, "top_k: expected a whole number from 1")


@pytest.mark.parametrize("head", [None, "token_classification", "question_answering"])
def test_other_heads_are_served(tmp_path, head, runtime):
    """Outputs of tokens come as long as their request's rows, whatever they were computed with."""
    file = exported(tmp_path, head)
    model = OnnxModel(file)
    with served(file, runtime=runtime, max_delay_ms=50) as (port, _), ThreadPoolExecutor(8) as threads:
        rows = [5 + np.arange(n)[None] % 19 for n in (3, 9, 20, 4, 15, 1, 7, 12)]
        answers = list(threads.map(lambda ids: ask(port, "/v2/models/m/infer", tokens(ids)), rows))
        for ids, (status, answer) in zip(rows, answers):
            assert status == 200
            outputs = model.run_whole(Batch(ids, 0 * ids, 0 * ids + 1))
            for name, output, array in zip(model.outputs, answer["outputs"], outputs, strict=True):
                assert output["name"] == name and output["shape"] == list(array.shape)
                np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), array, atol=1e-5)
        status, _ = ask(port, "/predict", {"text": "今天"} if head else {})
        expected = {None: 404, "token_classification": 200, "question_answering": 422}
        assert status == expected[head]
        if head == "question_answering":
            question = {"question": "一", "context": CHARACTERS}
            answer = ask(port, "/predict", question)[1]
            assert len(answer["n_best"]) > 3 and answer["answer"] == answer["n_best"][0]["text"]
            assert ask(port, "/predict", question | {"top_k": 2})[1] == answer | {"n_best": answer["n_best"][:2]}
        if head == "token_classification":
            assert ask(port, "/predict", {"text": "今天", "top_k": 2})[0] == 422


def test_metrics_count_what_happened(plain):
    with served(plain, max_delay_ms=100) as (port, _), ThreadPoolExecutor(8) as threads:
        bodies = [{"text": text} for text in CHARACTERS[:8]] + [{}]
        statuses = [status for status, _ in threads.map(lambda body: ask(port, "/predict", body), bodies)]
        assert statuses == [200] * 8 + [422]
        status, text = ask(port, "/metrics")
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
        }
    for status, count in (("200", 8), ("422", 1)):
        assert samples["minilm_requests_total", (("endpoint", "predict"), ("status", status))] == count
    assert samples["minilm_request_seconds_count", (("endpoint", "predict"),)] == 9
    assert samples["minilm_batch_texts_sum", ()] == 8
    assert samples["minilm_batch_texts_count", ()] < 8, "requests that came together were computed together"
    assert samples["minilm_queue_texts", ()] == 0


# Refusals

INFER = "/v2/models/m/infer"


def changed(path, value):
    """Returns a request for inference with another value at a path."""
    request = json.loads(json.dumps(tokens()))
    *way, last = path
    inner = request
    for step in way:
        inner = inner[step]
    inner[last] = value
    return request


REFUSED = [
    ("/predict", b"{", 400, "body: not JSON"),
    ("/predict", b"\xff{}", 400, "body: not UTF-8 at byte 0"),
    # Python 3.13 goes deeper than the limit on bodies lets anybody go
    ("/predict", b"[" * 9000, 400, "body: JSON nested too deep" if sys.version_info < (3, 13) else "body: not JSON"),
    ("/predict", b"1" * 5000, 400, "body: not JSON"),
    ("/predict", b'{"text": NaN}', 400, "body: not JSON (NaN is no number of JSON)"),
    ("/predict", 3, 422, "expected an object with text"),
    ("/predict", {"text": None}, 422, "text: missing"),
    ("/predict", {"text": ["a"]}, 422, "text: expected a string"),
    ("/predict", {"text": "a", "model": "/etc/passwd"}, 422, "'model': unknown; there are text, text_pair"),
    ("/predict", b'{"\\ud800": 1}', 422, "unknown; there are text"),
    ("/predict", b'{"text": "\\udc00"}', 422, "text: holds half a surrogate pair"),
    ("/predict", {"text": "a" * 101}, 413, "a text has more than 100 characters"),
    ("/predict", [{"text": "a"}] * 9, 413, "body: 9 texts, at most 8 may come together"),
    ("/predict", b" " * 10_001, 413, "body: longer than 10000 bytes"),
    (INFER, {}, 400, "inputs: missing"),
    (INFER, {"inputs": [3]}, 400, "inputs: expected objects"),
    (INFER, tokens() | {"id": 3}, 400, "id: expected a string"),
    (INFER, tokens() | {"id": "a" * 1025}, 400, "id: longer than 1024 characters"),
    (INFER, {"inputs": tokens()["inputs"][:2]}, 422, "attention_mask: missing"),
    (INFER, {"inputs": tokens()["inputs"] * 2}, 422, "'input_ids': given twice"),
    (INFER, changed(["inputs", 0, "name"], "ids"), 422, "'ids': unknown; the model takes input_ids"),
    (INFER, changed(["inputs", 0, "datatype"], "FP32"), 422, "input_ids: datatype 'FP32', expected INT64"),
    (INFER, changed(["inputs", 0, "shape"], [3, 2]), 422, "has room for 6 values, 3 are there"),
    (INFER, changed(["inputs", 0, "shape"], [3, -1]), 422, "shape [3, -1], expected [texts, tokens]"),
    (INFER, changed(["inputs", 0, "shape"], [3]), 422, "shape [3], expected [texts, tokens]"),
    (INFER, changed(["inputs", 0, "shape"], [3, 1]), 422, "shapes [3, 1], [1, 3], [1, 3], expected [texts, tokens]"),
    (INFER, changed(["inputs", 0, "shape"], [2**31 - 1] * 600), 422, "expected [texts, tokens]"),
    (INFER, changed(["inputs", 0, "shape"], [1] * 100), 422, "expected [texts, tokens]"),
    (INFER, changed(["inputs", 0, "data"], [[1, 2], 3]), 422, "input_ids: data of lists and values mixed"),
    (INFER, changed(["inputs", 0, "data"], [1, 2, 0.5]), 422, "input_ids: expected whole numbers"),
    (INFER, changed(["inputs", 0, "data"], [1, 2, 1 << 70]), 422, "input_ids: expected whole numbers"),
    (INFER, changed(["inputs", 0, "data"], [1, 2, 9999]), 422, "input_ids: values from 0 to 23 are expected"),
    (INFER, changed(["inputs", 0, "data"], [1, 2, -1]), 422, "input_ids: values from 0 to 23 are expected"),
    (INFER, changed(["inputs", 1, "data"], [0, 0, 2]), 422, "token_type_ids: values from 0 to 1 are expected"),
    (INFER, changed(["inputs", 0, "parameters"], 3), 400, "input_ids: parameters: expected an object"),
    (INFER, changed(["inputs", 0, "parameters"], {"binary_data_size": 24}), 400, "binary_data_size 24"),
    (INFER, tokens() | {"outputs": [{"name": "x"}]}, 422, "outputs: 'x' unknown; there are logits"),
    (INFER, tokens(np.ones((1, 65), int)), 422, "input_ids: 65 tokens, the model takes from 1 to 64"),
    (INFER, tokens(np.ones((9, 2), int)), 413, "input_ids: 9 texts, at most 8 may come together"),
    ("/v2/models/m/versions/2/infer", tokens(), 404, "m: no version 2; there is 1"),
    ("/v2/models/..%2F..%2Fetc/infer", tokens(), 404, "/v2/models/../../etc/infer: Not Found"),
]


@pytest.mark.parametrize("path, body, status, message", REFUSED)
def test_bad_requests_are_refused(port, path, body, status, message):
    answered, answer = ask(port, path, body)
    assert (answered, message in answer["error"]) == (status, True), answer
    assert ask(port, "/predict", {"text": "一"})[0] == 200, "the server goes on"


def test_nothing_is_nested_too_deep(port):
    """For the parser, or for the message that names it."""
    for depth in range(800, 1001, 8):
        body = b'{"inputs": [{"name": "input_ids", "datatype": %s}]}' % (b"[" * depth + b"]" * depth)
        assert ask(port, INFER, body)[0] in (400, 422)


def test_binary_tensors_must_fit(port):
    head = json.dumps(
        {
            "inputs": [
                {"name": name, "datatype": "INT64", "shape": [1, 1], "parameters": {"binary_data_size": 8}}
                for name in ONNX_INPUTS
            ]
        }
    ).encode()

    def sent(data, length=None):
        return ask(port, INFER, head + data, {"Inference-Header-Content-Length": length or len(head)})

    assert sent(np.ones(3, "<i8").tobytes())[0] == 200
    assert sent(np.ones(2, "<i8").tobytes())[0] == 400
    assert sent(np.ones(4, "<i8").tobytes())[0] == 400
    assert sent(b"", 10**6)[0] == 400 and sent(b"", "x")[0] == 400 and sent(b"", "-1")[0] == 400


def test_a_body_without_a_length_is_bounded(port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        head = b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + (b"fa0\r\n" + b" " * 4000 + b"\r\n") * 3)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert ask(port, "/predict", b"{}", {"Content-Encoding": "gzip"})[0] == 415


def test_an_id_comes_back_whatever_it_is(port):
    status, answer = ask(port, INFER, tokens() | {"id": "\ud800"})
    assert (status, answer["id"]) == (200, "\ud800")


def test_connections_that_send_nothing_are_closed(plain):
    """As are those whose request does not end; one that is used stays."""
    with served(plain, max_seconds=0.5) as (port, _):
        silent, slow = (socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(2))
        used = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        for _ in range(20):
            used.request("POST", "/predict", json.dumps({"text": "一"}))
            assert used.getresponse().read()
            time.sleep(0.1)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        assert ended(slow) and ended(silent)


def ended(connection):
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def test_requests_are_bounded_in_what_they_cost(tmp_path, runtime):
    """Windows of a long context count as texts; numbers of a large answer go out as binary data only."""
    reading = exported(tmp_path, "question_answering")
    with served(reading, runtime=runtime, max_texts=4) as (port, _):
        question = {"question": "天", "context": CHARACTERS * 20}
        status, answer = ask(port, "/predict", question)
        assert status == 413 and "windows of the model's length" in answer["error"]
        assert ask(port, "/predict", {**question, "context": CHARACTERS * 2})[0] == 200
    (tmp_path / "encoder").mkdir()
    encoder = exported(tmp_path / "encoder", None)
    with served(encoder, runtime=runtime) as (port, server):
        rows = tokens(np.ones((64, 64), int))
        assert ask(port, INFER, rows)[0] == 200
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("export.endpoints.MAX_LISTED", 1000)
            status, answer = ask(port, INFER, rows)
            assert status == 413 and "go out as binary data only" in answer["error"]
            binary = rows | {"parameters": {"binary_data_output": True}}
            assert ask(port, INFER, binary)[0] == 200


SLOW = """
import sys, time
from export.model import OnnxModel
from export.serve import ServeArguments, serve

answers, calls = OnnxModel.answers, []

def slow(self, examples, top_k=0):
    calls.append(1)
    time.sleep(60 if len(calls) > 1 else 0)
    return answers(self, examples)

OnnxModel.answers = slow
serve(ServeArguments(model=sys.argv[1], port=0, max_seconds=1))
"""


@pytest.mark.slow
def test_a_stopped_server_gives_up_what_takes_too_long(tmp_path, plain):
    """Then clients are told so, and the process does not wait for the model."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    command = [sys.executable, str(script), str(plain)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    port = int(re.search(r":(\d+)$", process.stderr.readline().strip())[1])
    with ThreadPoolExecutor(2) as threads:
        requests = [threads.submit(ask, port, "/predict", {"text": text}) for text in "一二"]
        time.sleep(0.5)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for future in requests:
            status, answer = future.result()
            assert status == 503 and "did not come to this in time" in answer["error"]
    assert process.wait(20) == 0 and time.monotonic() - started < 10
    assert "2 requests were given up after 1 s" in process.stderr.read()


def test_other_addresses_and_methods_are_refused(port):
    for path in ("/", "/v2/repository/models/m/load", "/etc/passwd", "/v2/models"):
        status, answer = ask(port, path)
        assert status == 404 and path in answer["error"]
    assert ask(port, "/predict")[0] == 405 and ask(port, "/metrics", {})[0] == 405


@pytest.fixture(scope="module")
def connection(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    yield connection
    connection.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELD = st.sampled_from(["name", "datatype", "shape", "data", "parameters"])
VALUES = st.sampled_from(["input_ids", "INT64", [1, 3], [1, 2, 3], [[2, 6, 3]], {"binary_data_size": 8}]) | JSON
TENSORS = st.lists(st.dictionaries(FIELD, VALUES), max_size=4)
NEAR = st.builds(
    lambda number, field, value: changed(["inputs", number, field], value), st.integers(0, 2), FIELD, VALUES
)
BODIES = (
    st.binary(max_size=200)
    | st.builds(lambda value: json.dumps(value).encode(), JSON)
    | st.builds(lambda value: json.dumps({"inputs": value}).encode(), TENSORS)
    | st.builds(lambda value: json.dumps(value).encode(), NEAR)
    | st.builds(lambda text: json.dumps({"text": text}).encode(), st.text())
)
HEADERS = st.none() | st.integers(-5, 300).map(str) | st.text(st.characters(codec="ascii", categories=["L", "N"]))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["/predict", INFER]), body=BODIES, header=HEADERS)
def test_whatever_is_sent_is_answered(connection, path, body, header):
    """Never a status of 5xx, and the same connection goes on."""
    headers = {} if header is None else {"Inference-Header-Content-Length": header}
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    content = json.loads(answer.read())
    assert answer.status in (200, 400, 413, 422)
    assert ("error" in content) == (answer.status != 200)


# Queue, clients, signals


@contextmanager
def held(monkeypatch):
    """Makes the model wait until `go` is set; yields `go` and the number of rows of each call."""
    go, calls = threading.Event(), []
    answers = OnnxModel.answers

    def wait(self, examples, top_k=0):
        calls.append(len(examples))
        assert go.wait(30)
        return answers(self, examples)

    monkeypatch.setattr(OnnxModel, "answers", wait)
    try:
        yield go, calls
    finally:
        go.set()


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited for nothing")


def test_a_full_queue_answers_503(plain, monkeypatch):
    with (
        held(monkeypatch) as (go, calls),
        served(plain, max_queue_size=8, max_texts=8, max_batch_size=4) as (port, server),
        ThreadPoolExecutor(20) as threads,
    ):
        first = threads.submit(ask, port, "/predict", {"text": "一"})
        until(lambda: calls)
        waiting = [threads.submit(ask, port, "/predict", [{"text": "二"}] * 2) for _ in range(4)]
        until(lambda: server.batcher.waiting == 8)
        status, error = ask(port, "/predict", [{"text": "三"}] * 2)
        assert status == 503 and "8 texts wait already" in error["error"]
        assert ask(port, "/v2/health/ready")[0] == 200
        go.set()
        assert [future.result()[0] for future in (first, *waiting)] == [200] * 5
        assert ask(port, "/predict", {"text": "三"})[0] == 200
    assert calls[:3] == [1, 4, 4]


def batches_of(requests, batch=4, queue=1000):
    """Returns the batches of a queue, and the result of each request, where they come while it computes.

    Args:
        requests: (client, rows) in the order in which they come; a row "heavy" weighs as much as 4.
    """
    go, batches = threading.Event(), []

    def compute(rows):
        batches.append(rows)
        assert go.wait(30)
        return rows

    async def run():
        batcher = Batcher(compute, batch, queue, delay=0)
        first = asyncio.ensure_future(batcher.submit(["first"]))
        while not batches:
            await asyncio.sleep(0)
        rest = [
            asyncio.ensure_future(batcher.submit(rows, [4 if row == "heavy" else 1 for row in rows], client))
            for client, rows in requests
        ]
        await asyncio.sleep(0)
        go.set()
        results = await asyncio.gather(first, *rest, return_exceptions=True)
        batcher.close()
        assert batcher.waiting == 0
        return results[1:]

    return batches, asyncio.run(run())


@pytest.mark.parametrize("lone", [("a", 99), ("b", 0)], ids=["a connection", "an address"])
def test_a_lone_request_is_in_the_next_batch(lone):
    """Whatever others have in the queue; and each gets the results of its own rows."""
    large = [(("a", number), [f"{number}-{i}" for i in range(50)]) for number in range(2)]
    batches, results = batches_of([*large, (lone, ["lone"])])
    assert "lone" in batches[1] and all(len(batch) <= 4 for batch in batches)
    assert results == [rows for _, rows in large] + [["lone"]]
    assert batches[1][:2] == ["0-0", "0-1"], "half of a batch is for what came first"


def test_a_lone_request_waits_for_no_heavy_row():
    """Which count half a batch at most, where they come first."""
    batches, _ = batches_of([(("a", number), ["heavy"]) for number in range(5)] + [(("b", 0), ["lone"])])
    assert batches[1:] == [["heavy", "lone"], *[["heavy"]] * 4]


def test_many_addresses_are_served_in_turn():
    requests = [(("a", n), [f"a{n}"]) for n in range(40)] + [(("b", 0), ["b0", "b1"])]
    batches, _ = batches_of(requests)
    assert {*batches[1]} == {"a0", "a1", "b0", "b1"}


def test_the_longest_request_makes_room():
    """Where the queue is full the address that has most in it loses its longest request, the last of them."""
    large = [(("a", n), [n] * 8) for n in range(3)]
    results = batches_of([*large, (("a", 3), ["small"]), (("b", 0), ["other"] * 8)], queue=24)[1]
    assert [type(result) for result in results] == [list, QueueFull, QueueFull, list, list]
    results = batches_of([*large, (("a", 3), [3] * 8)], queue=24)[1]
    assert isinstance(results[3], QueueFull) and results[:3] == [rows for _, rows in large]
    results = batches_of([(("a", n), [n]) for n in range(24)] + [(("b", 0), ["b"] * 6)], queue=24)[1]
    assert results[:18] == [[n] for n in range(18)] and results[-1] == ["b"] * 6


def test_a_client_that_goes_is_no_matter(plain, monkeypatch):
    with held(monkeypatch) as (go, calls), served(plain) as (port, server), ThreadPoolExecutor(2) as threads:
        first = threads.submit(ask, port, "/predict", {"text": "一"})
        until(lambda: calls)
        gone = socket.create_connection(("127.0.0.1", port))
        gone.sendall(b'POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 13\r\n\r\n{"text": "a"}')
        until(lambda: server.batcher.waiting == 1)
        gone.close()
        go.set()
        assert first.result()[0] == 200
        assert ask(port, "/predict", {"text": "一"})[0] == 200


def test_one_bad_row_is_no_others_fault():
    def compute(rows):
        if "bad" in rows:
            raise ValueError("bad")
        return [row.upper() for row in rows]

    async def run():
        batcher = Batcher(compute, batch=8, queue=8, delay=0.01)
        results = await asyncio.gather(
            *(batcher.submit(rows) for rows in (["a"], ["b", "bad"], ["c", "d"])), return_exceptions=True
        )
        with pytest.raises(QueueFull):
            await batcher.submit(["x"] * 9)
        batcher.close()
        return results

    first, second, third = asyncio.run(run())
    assert (first, third) == (["A"], ["C", "D"]) and isinstance(second, ValueError)


# Bytes of a connection


def request(path, body, *headers):
    """Returns the bytes of a request."""
    content = json.dumps(body).encode()
    lines = (f"POST {path} HTTP/1.1", "Host: a", f"Content-Length: {len(content)}", *headers, "", "")
    return "\r\n".join(lines).encode() + content


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def statuses(connection):
    """Returns those of all answers until the other side closes; raises ConnectionResetError if it resets."""
    received = b""
    while piece := connection.recv(1 << 16):
        received += piece
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", received)]


REQUEST = request("/predict", {"text": "一"})
HEAD = b"POST /predict HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BROKEN = {
    "a line without end": (b"GET /" + b"a" * 40_000, 431),
    "a header without end": (HEAD + b"a: " + b"b" * 40_000, 431),
    "headers without end": (HEAD + b"a: b\r\n" * 8_000, 431),
    "many headers": (HEAD + b"a: b\r\n" * 100 + b"\r\n", 431),
    "a chunk's extension without end": (CHUNKED + b"1;" + b"a" * 40_000, 431),
    "trailers without end": (CHUNKED + b"0\r\n" + b"a: b\r\n" * 8_000, 431),
    "many chunks": (CHUNKED + b"1\r\n \r\n" * 10_001, 413),
    "two lengths": (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", 400),
    "length and chunks": (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunks in HTTP/1.0": (CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n", 400),
    "another coding": (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "a negative length": (HEAD + b"Content-Length: -1\r\n\r\n", 400),
    "a bad chunk": (CHUNKED + b"g\r\n\r\n", 400),
    "no host": (b"GET /v2 HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /v2 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
}


@pytest.mark.parametrize("sent, status", BROKEN.values(), ids=BROKEN)
def test_what_is_no_request_is_refused_in_its_turn(port, sent, status):
    """By an answer, which comes after those of the requests before it."""
    with connect(port) as connection:
        connection.sendall(REQUEST + REQUEST + sent)
        assert statuses(connection) == [200, 200, status]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_answered(port, chunked):
    """By 413, however much of it is on its way."""
    body = b" " * 5_000_000
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for _ in range(20):
        with connect(port) as connection:
            connection.sendall(CHUNKED + b"%x\r\n%s\r\n" % (len(body), body) if chunked else whole)
            assert statuses(connection) == [413]


def test_a_client_that_waits_for_100_is_told(port):
    expect = "Expect: 100-continue"
    with connect(port) as connection:
        head, body = request("/predict", {"text": "一"}, expect, "Connection: close").split(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert statuses(connection) == [200]
    with connect(port) as connection:
        connection.sendall(HEAD + expect.encode() + b"\r\nContent-Length: 20000\r\n\r\n")
        assert statuses(connection) == [413]


def test_other_methods_and_versions(port):
    with connect(port) as connection:
        connection.sendall(b"HEAD /v2 HTTP/1.1\r\nHost: a\r\n\r\nGET http://b/v2?c HTTP/1.1\r\nHost: a\r\n\r\n")
        connection.sendall(b"OPTIONS /predict HTTP/1.1\r\nHost: a\r\n\r\nGET /v2 HTTP/1.0\r\n\r\n")
        assert statuses(connection) == [200, 200, 405, 200]


def test_clients_that_go_leave_no_trace(port, capfd):
    """Whether they reset the connection, or close their side, before or after a whole request."""
    for number in range(60):
        with connect(port) as connection:
            connection.sendall(REQUEST[: None if number % 2 else 30])
            if number % 3 == 0:
                connection.shutdown(socket.SHUT_WR)
            if number % 3 == 1:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with connect(port) as connection:
        connection.sendall(REQUEST)
        connection.shutdown(socket.SHUT_WR)
        assert statuses(connection) == [200], "a client that is done with asking is answered"
    assert capfd.readouterr().err == ""


def test_a_client_that_never_reads_is_closed(plain):
    """After its time, and a stop does not wait for it."""
    with served(plain, max_seconds=0.5) as (port, server), connect(port) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(OSError):
            while True:
                connection.sendall(request("/predict", [{"text": "一", "top_k": 3}] * 64) * 100)
        assert ask(port, "/predict", {"text": "一"})[0] == 200


def test_idle_connections_keep_nobody_out(plain, monkeypatch):
    """Where too many are open, the one is closed that has been silent for longest."""
    monkeypatch.setattr("export.http.CONNECTIONS", 4)
    with served(plain) as (port, _):
        silent = [connect(port) for _ in range(6)]
        assert ask(port, "/predict", {"text": "一"})[0] == 200
        assert all(ended(connection) for connection in silent[:3])
        for connection in silent[3:]:
            connection.sendall(REQUEST.replace(b"Host", b"Connection: close\r\nHost"))
            assert statuses(connection) == [200], "no more are closed than must be"
        for connection in silent:
            connection.close()


def test_long_bodies_that_do_not_end_leave_room(plain, monkeypatch):
    monkeypatch.setattr("export.http.LONG_BODIES", 1)
    with served(plain, max_body_bytes=100_000) as (port, server):
        with connect(port) as slow:
            slow.sendall(HEAD + b"Content-Length: 100000\r\n\r\n" + b" " * 90_000)
            until(lambda: server.listener.arriving > 70_000)
            with connect(port) as other:
                other.sendall(HEAD + b"Content-Length: 90000\r\n\r\n" + b" " * 90_000)
                assert statuses(other) == [503]
            assert ask(port, "/predict", {"text": "一"})[0] == 200
        assert ask(port, "/predict", b" " * 90_000)[0] == 400


def test_long_answers_that_are_not_taken_leave_room(tmp_path, monkeypatch):
    monkeypatch.setattr("export.http.ANSWERS", 600_000)
    body = tokens(np.ones((64, 64), int)) | {"parameters": {"binary_data_output": True}}
    with served(exported(tmp_path, None)) as (port, server), socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port))
        slow.sendall(request(INFER, body, "Connection: close"))
        until(lambda: server.listener.leaving > 500_000)
        assert ask(port, INFER, body)[0] == 503
        assert statuses(slow) == [200]
        assert ask(port, INFER, body)[0] == 200


def memory(pid):
    return int(re.search(r"VmHWM:\s+(\d+)", open(f"/proc/{pid}/status").read())[1])


def heed_hangups():
    """Heeds SIGHUP, which tests that run under nohup, say, ignore, and so would what they start."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextmanager
def process(plain, *options):
    """A server in a process of its own; its port is `port`, and its log what it says."""
    command = [sys.executable, "-m", "export", "serve", str(plain), "--port", "0", "--runtime", "onnxruntime", *options]
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=heed_hangups
    )
    try:
        line = server.stderr.readline()
        match = re.search(r"is served as m at http://127\.0\.0\.1:(\d+)$", line.strip())
        assert match, line
        server.port = int(match[1])
        yield server
    finally:
        server.kill()
        server.wait()


def test_memory_is_bounded(plain):
    """Of a server that is sent headers, requests and bodies without end, and whose answers are not read."""
    with process(plain) as server:
        assert ask(server.port, "/predict", [{"text": "一"}] * 64)[0] == 200
        before = memory(server.pid)
        connections = []
        for sent in (HEAD + b"a: b\r\n" * 5_000, HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * 900_000):
            for _ in range(100):
                connections.append(connect(server.port))
                connections[-1].sendall(sent)
        for sent in (HEAD + b"a: b\r\n", REQUEST, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"):
            connections.append(connect(server.port))
            connections[-1].settimeout(0.2)
            with suppress(OSError):
                for _ in range(1_000):
                    connections[-1].sendall(sent * (100_000 // len(sent)))
        assert ask(server.port, "/predict", {"text": "一"})[0] == 200
        assert memory(server.pid) < 1.25 * before
        for connection in connections:
            connection.close()


# Stops


def test_what_waits_in_the_backlog_is_answered(plain):
    """Connections that the kernel made, and the server has not taken when it is stopped, nor while it stops."""
    with served(plain, silence=30) as (port, server):
        go = threading.Event()
        server.loop.call_soon_threadsafe(go.wait)
        connections = [connect(port) for _ in range(80)]
        for connection in connections[:60]:
            connection.sendall(REQUEST)
        server.stop()
        go.set()
        time.sleep(0.2)
        for connection in connections[60:]:
            connection.sendall(REQUEST)
        assert [statuses(connection) for connection in connections] == [[200]] * 80
    with pytest.raises(ConnectionRefusedError):
        connect(port)


def test_connections_end_with_a_stop(plain):
    """Requests on those that stay open are answered, with the word that it was the last; idle ones just end."""
    with served(plain, silence=2) as (port, server):
        kept, idle, double = (connect(port) for _ in range(3))
        for connection in (kept, idle):
            connection.sendall(REQUEST)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        server.stop()
        until(lambda: not server.endpoints.ready)
        double.sendall(REQUEST + REQUEST)
        kept.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = kept.recv(1000)
        assert answer.startswith(b"HTTP/1.1 503") and b"connection: close" in answer
        assert kept.recv(1000) == b"" and idle.recv(1000) == b""
        assert statuses(double) == [200, 200]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_server_answers_what_came_in(plain, number):
    """A signal under load: every request by a connection that was made is answered, and the exit is clean."""

    def client(port):
        statuses = []
        while True:
            try:
                statuses.append(ask(port, "/predict", [{"text": CHARACTERS}] * 40)[0])
            except ConnectionRefusedError:
                return statuses

    with process(plain) as server, ThreadPoolExecutor(8) as threads:
        clients = [threads.submit(client, server.port) for _ in range(8)]
        time.sleep(0.5)
        server.send_signal(number)
        statuses = [status for future in clients for status in future.result()]
        assert server.wait(30) == 0
        log = server.stderr.read()
    assert f"{number.name}: answers what has come in, and stops" in log
    assert "stopped; all that had come in is answered" in log
    assert len(statuses) > 8 and set(statuses) == {200}


def test_bad_options_are_named(plain):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--host 127.0.0.1 --port {port}: cannot listen there"):
            serve(ServeArguments(model=str(plain), port=port))
    with pytest.raises(InputError, match="--max_queue_size 3: must be at least --max_texts 64"):
        ServeArguments(model=str(plain), max_queue_size=3)
    with pytest.raises(InputError, match="--max_batch_size 0: must be at least 1"):
        ServeArguments(model=str(plain), max_batch_size=0)
    assert ServeArguments(model=str(plain)).host == "127.0.0.1"
