"""The server: a standard client's answers, every bad request refused in its place, nothing lost."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import tritonclient.http
import uvicorn
from conftest import CHARACTERS, ROOT, model_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from backends.interface import ONNX_INPUTS, InputError
from export.batching import Batcher, QueueFull
from export.convert import OnnxArguments, export
from export.model import OnnxModel
from export.serve import ServeArguments, Server, configuration, serve
from text.tasks import Example


def exported(folder, head="sequence_classification", **options):
    return export(OnnxArguments(str(model_folder(folder / "model", head)), str(folder / "m.onnx"), **options))


@contextmanager
def served(file, **options):
    """A server in a thread; its port and itself."""
    server = Server(OnnxModel(file), ServeArguments(model=str(file), **options))
    started = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(configuration(server, started.set))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield listener.getsockname()[1], server
    finally:
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("inside"), tokenizer="in-graph", pairs=True)


@pytest.fixture(scope="module")
def port(plain):
    with served(plain, max_texts=8, max_characters=100, max_body_bytes=10_000) as (port, _):
        yield port


def ask(port, path, body=None, headers=(), method=None):
    """Status and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, content, dict(headers))
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    return answer.status, json.loads(found) if answer.headers.get_content_type() == "application/json" else found


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
    status, found = ask(port, "/predict", [{"text": text} for text in texts])
    assert status == 200
    for text, row, right in zip(texts, found, wanted):
        assert row == {"label": right["label"], "probability": pytest.approx(right["probability"], abs=1e-5)}
        assert ask(port, "/predict", {"text": text}) == (200, {**row, "probability": pytest.approx(row["probability"])})
    pair = ask(port, "/predict", {"text": "一", "text_pair": "二三"})[1]
    [right] = OnnxModel(plain).answers([Example(0, "一", "二三", None)])
    assert pair["probability"] == pytest.approx(right["probability"], abs=1e-5)


def test_no_rows_in_no_rows_out(port, inside):
    status, answer = ask(port, INFER, tokens(np.zeros((0, 5), int)))
    [logits] = answer["outputs"]
    assert (status, logits["shape"], logits["data"]) == (200, [0, 3], [])
    assert ask(port, "/predict", []) == (200, [])
    with served(inside) as (strings, _):
        nothing = [{"name": name, **tensor([], "BYTES")} for name in ("text", "text_pair")]
        status, answer = ask(strings, INFER, {"inputs": nothing})
    assert (status, [output["shape"] for output in answer["outputs"]]) == (200, [[0], [0, 3]])


@pytest.mark.parametrize("binary", [True, False])
def test_a_standard_client_is_answered(port, plain, binary):
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("m", "1")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    told = client.get_model_metadata("m")
    assert [(put["name"], put["datatype"], put["shape"]) for put in told["inputs"]] == [
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
        status, found = ask(port, "/predict", [{"text": a, "text_pair": b} for a, b in client_texts])
        assert status == 200 and [row["label"] for row in found] == labels
        assert ask(port, "/predict", {"text": "一"})[0] == 422
        wrong = {"name": "text_pair", **tensor(["b", "c"], "BYTES")}
        status, error = ask(
            port, "/v2/models/strings/infer", {"inputs": [{"name": "text", **tensor(["a"], "BYTES")}, wrong]}
        )
        assert status == 422 and "shapes [1], [2]" in error["error"]


@pytest.mark.parametrize("head", [None, "token_classification", "question_answering"])
def test_other_heads_are_served(tmp_path, head):
    """Outputs of tokens come as long as their request's rows, whatever they were computed with."""
    file = exported(tmp_path, head)
    model = OnnxModel(file)
    with served(file, max_delay_ms=50) as (port, _), ThreadPoolExecutor(8) as threads:
        rows = [5 + np.arange(n)[None] % 19 for n in (3, 9, 20, 4, 15, 1, 7, 12)]
        found = list(threads.map(lambda ids: ask(port, "/v2/models/m/infer", tokens(ids)), rows))
        for ids, (status, answer) in zip(rows, found):
            assert status == 200
            session = model.session.run(None, dict(zip(ONNX_INPUTS, (ids, 0 * ids, 0 * ids + 1))))
            for put, output, right in zip(model.session.get_outputs(), answer["outputs"], session):
                assert output["name"] == put.name and output["shape"] == list(right.shape)
                np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), right, atol=1e-5)
        status, found = ask(port, "/predict", {"text": "今天"} if head else {})
        expected = {None: 404, "token_classification": 200, "question_answering": 422}
        assert status == expected[head]
        if head == "question_answering":
            assert "answer" in ask(port, "/predict", {"question": "一", "context": CHARACTERS})[1]


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
    """A request for inference with another value somewhere."""
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
    ("/predict", b"[" * 9000, 400, "body: JSON nested too deep"),
    ("/predict", b"1" * 5000, 400, "body: not JSON"),
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
    (INFER, {"inputs": tokens()["inputs"][:2]}, 422, "attention_mask: missing"),
    (INFER, {"inputs": tokens()["inputs"] * 2}, 422, "'input_ids': given twice"),
    (INFER, changed(["inputs", 0, "name"], "ids"), 422, "'ids': unknown; the model takes input_ids"),
    (INFER, changed(["inputs", 0, "datatype"], "FP32"), 422, "input_ids: datatype 'FP32', expected INT64"),
    (INFER, changed(["inputs", 0, "shape"], [3, 2]), 422, "has room for 6 values, 3 are there"),
    (INFER, changed(["inputs", 0, "shape"], [3, -1]), 422, "shape [3, -1], expected 2 sizes"),
    (INFER, changed(["inputs", 0, "shape"], [3]), 422, "shape [3], expected 2 sizes"),
    (INFER, changed(["inputs", 0, "shape"], [3, 1]), 422, "shapes [3, 1], [1, 3], [1, 3], expected [texts, tokens]"),
    (INFER, changed(["inputs", 0, "shape"], [2**31 - 1] * 600), 422, "expected 2 sizes"),
    (INFER, changed(["inputs", 0, "shape"], [1] * 100), 422, "expected 2 sizes"),
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
    found, answer = ask(port, path, body)
    assert (found, message in answer["error"]) == (status, True), answer
    assert ask(port, "/predict", {"text": "一"})[0] == 200, "the server goes on"


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


def test_requests_are_bounded_in_what_they_cost(tmp_path):
    """Windows of a long context count as texts; numbers of a large answer go out as binary data only."""
    reading = exported(tmp_path, "question_answering")
    with served(reading, max_texts=4) as (port, _):
        asked = {"question": "天", "context": CHARACTERS * 20}
        status, answer = ask(port, "/predict", asked)
        assert status == 413 and "windows of the model's length" in answer["error"]
        assert ask(port, "/predict", {**asked, "context": CHARACTERS * 2})[0] == 200
    (tmp_path / "encoder").mkdir()
    encoder = exported(tmp_path / "encoder", None)
    with served(encoder) as (port, server):
        rows = tokens(np.ones((64, 64), int))
        assert ask(port, INFER, rows)[0] == 200
        server_limit = "export.serve.MAX_LISTED"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server_limit, 1000)
            status, answer = ask(port, INFER, rows)
            assert status == 413 and "go out as binary data only" in answer["error"]
            binary = rows | {"parameters": {"binary_data_output": True}}
            assert ask(port, INFER, binary)[0] == 200


SLOW = """
import sys, time
from export.model import OnnxModel
from export.serve import ServeArguments, serve

answers, calls = OnnxModel.answers, []

def slow(self, examples):
    calls.append(1)
    time.sleep(60 if len(calls) > 1 else 0)
    return answers(self, examples)

OnnxModel.answers = slow
serve(ServeArguments(model=sys.argv[1], port=0, max_seconds=1))
"""


def test_a_stopped_server_gives_up_what_takes_too_long(tmp_path, plain):
    """Then clients are told so, and the process does not wait for the model."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(plain)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    port = int(re.search(r":(\d+)$", process.stderr.readline().strip())[1])
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(ask, port, "/predict", {"text": text}) for text in "一二"]
        time.sleep(0.5)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for future in asked:
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
    made = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    yield made
    made.close()


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
    """While it lasts, the model waits; how many rows each of its calls was given."""
    go, calls = threading.Event(), []
    answers = OnnxModel.answers

    def wait(self, examples):
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
        status, error = ask(port, "/predict", {"text": "三"})
        assert status == 503 and "8 texts wait already" in error["error"]
        assert ask(port, "/v2/health/ready")[0] == 200
        go.set()
        assert [future.result()[0] for future in (first, *waiting)] == [200] * 5
        assert ask(port, "/predict", {"text": "三"})[0] == 200
    assert calls[:3] == [1, 4, 4]


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
        found = await asyncio.gather(
            *(batcher.submit(rows) for rows in (["a"], ["b", "bad"], ["c", "d"])), return_exceptions=True
        )
        with pytest.raises(QueueFull):
            await batcher.submit(["x"] * 9)
        await batcher.close()
        return found

    first, second, third = asyncio.run(run())
    assert (first, third) == (["A"], ["C", "D"]) and isinstance(second, ValueError)


def test_a_stopped_server_answers_what_came_in(plain):
    """SIGTERM under load: every request that was taken is answered, and the exit is clean."""
    command = [sys.executable, "-m", "export", "serve", str(plain), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    found = re.search(r"is served as m at http://127\.0\.0\.1:(\d+)$", line.strip())
    assert found, line
    port = int(found[1])

    def client(number):
        statuses = []
        while True:
            try:
                statuses.append(ask(port, "/predict", [{"text": CHARACTERS}] * 40)[0])
            except ConnectionRefusedError:
                return statuses

    with ThreadPoolExecutor(8) as threads:
        clients = [threads.submit(client, number) for number in range(8)]
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        statuses = [status for future in clients for status in future.result()]
    assert process.wait(30) == 0
    assert "stopped; all that had come in is answered" in process.stderr.read()
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
