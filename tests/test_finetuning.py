"""Fine-tuning: runs of every kind of task on both backends, what they leave, and their errors."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, environment
from two_processes import launcher

from backends.pretrained import read_weights, write_model
from finetuning.__main__ import main
from text.data import read_split
from text.tasks import TASKS
from text.tokenizer import SPECIAL_TOKENS, WordPiece

CHARACTERS = [chr(ord("一") + i) for i in range(60)]
GOOD, BAD = CHARACTERS[0], CHARACTERS[1]
BACKENDS = ("torch", "paddle")
BOTH = pytest.mark.parametrize("name", BACKENDS)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def text(random, low=4, high=40):
    return "".join(random.choice(CHARACTERS[2:], int(random.integers(low, high))))


def classification(random, number):
    """Which of two characters is in a text?"""
    label = int(random.integers(2))
    body = text(random)
    at = int(random.integers(len(body)))
    return {"id": number, "text": body[:at] + (GOOD, BAD)[label] + body[at:], "label": ("好", "坏")[label]}


def reading(random, number):
    """What do two characters of a text enclose?"""
    before, answer, after = text(random, 0, 30), GOOD + text(random, 1, 4) + BAD, text(random, 0, 60)
    return {"id": number, "context": before + answer + after, "question": CHARACTERS[2], "answers": [answer]}


def labelling(random, number):
    """Two characters are names, and the one after them belongs to it."""
    tokens = list(text(random))
    tags = ["O"] * len(tokens)
    for at in range(0, len(tokens) - 1, 7):
        tokens[at] = GOOD
        tags[at : at + 2] = ["B-PER", "I-PER"]
    return {"id": number, "tokens": tokens, "tags": tags}


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """A folder of data for each kind of task."""
    root = tmp_path_factory.mktemp("data")
    for kind in (classification, reading, labelling):
        for seed, (split, count) in enumerate({"train": 300, "dev": 61, "test": 9}.items()):
            random = np.random.default_rng(seed)
            write_lines(root / kind.__name__ / f"{split}.json", (kind(random, number) for number in range(count)))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory, torch_backend):
    """A random BERT whose vocabulary is CHARACTERS."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = WordPiece([*SPECIAL_TOKENS, *CHARACTERS])
    tokenizer.save(folder, 64)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = {**TINY, **dropout, "vocab_size": len(tokenizer), "initializer_range": 0.1}
    torch_backend.seed(1)
    write_model(folder, config, torch_backend.model(config).weights())
    return folder


def options(**settings):
    quick = {
        "device": "cpu",
        "max_seq_length": 48,
        "max_query_length": 8,
        "doc_stride": 16,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "max_steps": 12,
        "save_steps": 6,
        "logging_steps": 5,
    }
    return [f"--{key}={value}" for key, value in {**quick, **settings}.items()]


def run(**settings):
    assert main(options(**settings)) == 0


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(folder):
    return [
        {key: value for key, value in record.items() if "per_second" not in key}
        for record in rows(folder / "metrics.jsonl")
    ]


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("kind, score", [("classification", 95), ("reading", 80), ("labelling", 95)])
def test_each_kind_is_learnt(tmp_path, small_data, model, name, kind, score):
    """From a random model to nearly all right, and the best model kept, scored and used."""
    output = tmp_path / "out"
    steps = {"max_steps": 180 if kind == "reading" else 60, "save_steps": 20}
    run(
        backend=name,
        task_name=kind,
        data_dir=small_data,
        model_name_or_path=model,
        output_dir=output,
        do_predict=True,
        **steps,
    )
    results = json.loads((output / "eval_results.json").read_text())
    metric = results["metric"]
    assert results["dev"][metric] >= score
    on_dev = [record[f"dev/{metric}"] for record in metrics(output) if f"dev/{metric}" in record]
    assert results["dev"][metric] == pytest.approx(max(on_dev))
    assert (output / "confusion_matrix.png").exists() == (kind == "classification")
    test, predicted = rows(small_data / kind / "test.json"), rows(output / "test_predictions.json")
    assert [row["id"] for row in predicted] == [row["id"] for row in test]
    keys, right = {
        "classification": (("text",), "label"),
        "reading": (("question", "context"), "answers"),
        "labelling": (("tokens",), "tags"),
    }[kind]
    for row, answer in zip(rows(small_data / kind / "dev.json"), rows(output / "dev_predictions.json"), strict=True):
        assert [answer[key] for key in (*keys, "right")] == [row[key] for key in (*keys, right)]
    if kind == "classification":
        assert sum(a["label"] == b["label"] for a, b in zip(test, predicted)) >= 7
    # The folder is a model of its own, which says the same again
    again = tmp_path / "again"
    run(
        backend=name, task_name=kind, data_dir=small_data, model_name_or_path=output, output_dir=again, do_train=False,
        do_eval=True,
    )  # fmt: skip
    assert rows(again / "dev_predictions.json") == rows(output / "dev_predictions.json")
    assert json.loads((again / "eval_results.json").read_text())["dev"] == results["dev"]


def test_libraries_load_what_is_left(tmp_path, small_data, model):
    """transformers and paddlenlp give the probabilities that were written."""
    import paddle
    import paddlenlp.transformers
    import torch
    import transformers

    output = tmp_path / "out"
    run(task_name="classification", data_dir=small_data, model_name_or_path=model, output_dir=output, backend="torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    on_torch = transformers.AutoModelForSequenceClassification.from_pretrained(output).eval()
    on_paddle = paddlenlp.transformers.BertForSequenceClassification.from_pretrained(str(output))
    on_paddle.eval()
    assert on_torch.config.id2label == {0: "坏", 1: "好"}
    for row, answer in zip(rows(small_data / "classification" / "dev.json"), rows(output / "dev_predictions.json")):
        batch = dict(tokenizer(row["text"], truncation=True, max_length=48, return_tensors="np"))
        with torch.no_grad():
            torch_logits = on_torch(**{key: torch.from_numpy(a) for key, a in batch.items()}).logits.numpy()[0]
        paddle_logits = on_paddle(**{key: paddle.to_tensor(a) for key, a in batch.items()}).numpy()[0]
        np.testing.assert_allclose(paddle_logits, torch_logits, atol=1e-4)
        assert on_torch.config.id2label[int(torch_logits.argmax())] == answer["label"]
        assert torch.from_numpy(torch_logits).softmax(0).max() == pytest.approx(answer["probability"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("task_name, kind", [("tnews", "classification"), ("cmrc2018", "reading")])
def test_backends_predict_the_same(tmp_path, data, torch_backend, task_name, kind):
    """Of a real dev set, at most 1 answer in 1,000 differs."""
    vocabulary = WordPiece.from_file(data / "vocab" / "vocab.txt")
    config = {**TINY, "vocab_size": len(vocabulary), "max_position_embeddings": 128, "initializer_range": 0.1}
    (tmp_path / "model").mkdir()
    torch_backend.seed(3)
    vocabulary.save(tmp_path / "model", 128)
    write_model(tmp_path / "model", config, torch_backend.model(config).weights())
    common = {"task_name": task_name, "data_dir": data / "clue", "max_seq_length": 128, "doc_stride": 48}
    trained = tmp_path / "trained"
    start = {"model_name_or_path": tmp_path / "model", "output_dir": trained, "max_steps": 40, "save_steps": 40}
    run(**common, **start, backend="torch", max_query_length=64)
    answers = {}
    for name in BACKENDS:
        run(
            **common, backend=name, model_name_or_path=trained, output_dir=tmp_path / name, do_train=False, do_eval=True
        )  # fmt: skip
        answers[name] = rows(tmp_path / name / "dev_predictions.json")
    key = "label" if kind == "classification" else "answer"
    different = sum(a[key] != b[key] for a, b in zip(answers["torch"], answers["paddle"]))
    assert len(answers["torch"]) == len(read_split(TASKS[task_name], data / "clue", "dev").examples)
    assert len({row[key] for row in answers["torch"]}) > 1
    assert different <= len(answers["torch"]) / 1000


@pytest.mark.slow
@BOTH
def test_killed_process_resumes(tmp_path, small_data, model, name):
    """The same seed gives the same run, also where it was killed and resumed."""
    for fate in ("whole", "killed"):
        output = tmp_path / fate
        arguments = options(
            task_name="classification", data_dir=small_data, model_name_or_path=model, output_dir=output, max_steps=40,
            save_steps=5, logging_steps=3, backend=name,
        )  # fmt: skip
        command = [sys.executable, "-m", "finetuning", *arguments]
        if fate == "killed":
            process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
            while not any((output / f"checkpoint-{step}").exists() for step in (15, 20, 25)):
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert not (output / "eval_results.json").exists()
            command.append("--resume")
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("goes on after step" in done.stderr) == (fate == "killed")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    same_files(tmp_path / "whole", tmp_path / "killed", 0)


def same_files(folder, expected, tolerance):
    weights, expected_weights = read_weights(folder), read_weights(expected)
    assert weights.keys() == expected_weights.keys()
    for key, array in weights.items():
        np.testing.assert_allclose(array, expected_weights[key], rtol=0, atol=tolerance, err_msg=key)
    for file in ("dev_predictions.json", "eval_results.json"):
        if tolerance == 0:
            assert (folder / file).read_bytes() == (expected / file).read_bytes()


@pytest.mark.slow
@BOTH
def test_two_processes_give_what_one_gives(tmp_path, small_data, model, name):
    quiet = tmp_path / "model"
    config = json.loads((model / "config.json").read_text())
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        config[key] = 0.0
    quiet.mkdir()
    WordPiece.from_model(model).save(quiet, 64)
    write_model(quiet, config, read_weights(model))
    for count in (1, 2):
        output = tmp_path / str(count)
        # 300 examples in batches of 32: the last one is of 12
        arguments = options(
            task_name="labelling", data_dir=small_data, model_name_or_path=quiet, output_dir=output, batch_size=32,
            max_steps=10, save_steps=5, learning_rate=1e-3, backend=name, do_predict=True,
        )  # fmt: skip
        program = ["-m", "finetuning"]
        if count == 2:
            program = ["-m", *launcher(name, tmp_path / "logs"), str(ROOT / "finetuning" / "__main__.py")]
        command = [sys.executable, *program, *arguments]
        for resume in ([], ["--resume"]):
            done = subprocess.run(
                [*command, *resume], cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for expected, record in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert record.keys() == expected.keys()
        for key in record:
            assert record[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-6), key
    same_files(tmp_path / "1", tmp_path / "2", 2e-5)
    for file in ("dev_predictions.json", "test_predictions.json"):
        assert rows(tmp_path / "2" / file) == rows(tmp_path / "1" / file)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_learns_too(tmp_path, small_data, model, dtype, torch_backend):
    if dtype == "bfloat16" and dtype not in torch_backend.devices()[0].precisions:
        pytest.skip("this processor has no bfloat16")
    output = tmp_path / "out"
    run(
        backend="torch", task_name="classification", data_dir=small_data, model_name_or_path=model, output_dir=output,
        use_amp=True, amp_dtype=dtype, max_steps=60, save_steps=30,
    )  # fmt: skip
    assert json.loads((output / "eval_results.json").read_text())["dev"]["accuracy"] >= 95
    assert read_weights(output)["classifier.weight"].dtype == np.float32
    assert ("loss_scale" in metrics(output)[0]) == (dtype == "float16")


def fails(capsys, **settings):
    assert main(options(**settings)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task_name": "clasification"}, "--task_name clasification: no such task; did you mean classification?"),
        ({"task_name": "tnews"}, "label '好' is none of the 15 of tnews: 100, 101,"),
        ({"task_name": "ocnli"}, "no column label; there are"),
        ({"label_column": "klasse"}, "train.json: no column klasse; columns are id, text, label"),
        ({"model_name_or_path": ""}, "--model_name_or_path '': no such folder; give one with config.json"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0: must be at least 1"),
        ({"max_steps": 0, "num_train_epochs": 0}, "--num_train_epochs 0: must be at least 1"),
        ({"text_column": "body"}, "train.json:1: no column body; there are id, text, label (300 of 300 cannot be read"),
        ({"max_seq_length": 65}, "--max_seq_length 65: the model has 64 positions"),
        ({"max_seq_length": 4}, "--max_seq_length 4: must be at least 8"),
        ({"model_name_or_path": "./nowhere"}, "--model_name_or_path ./nowhere: no such folder"),
        (
            {"data_dir": "nowhere"},
            "--data_dir nowhere: no train set of classification in nowhere (no such folder); expected train.json",
        ),
        ({"do_train": "false"}, "--do_train, --do_eval and --do_predict are all false"),
        ({"do_train": "false", "do_eval": "true"}, "has no such head, classification needs one; train it"),
        (
            {"do_train": "false", "do_eval": "true", "task_name": "tnews", "label_column": "label"},
            "has no such head, tnews needs one of 15; train it first",
        ),
        ({"task_name": "reading", "doc_stride": 40}, "--doc_stride 40: must be from 1 to 37"),
        ({"save_steps": 0}, "--save_steps 0: must be at least 1"),
        ({"backend": "jax"}, "backend"),
    ],
)
def test_bad_arguments(tmp_path, capsys, small_data, model, changes, says):
    output = tmp_path / "out"
    data_dir = small_data / "classification" if changes.get("task_name") in ("tnews", "ocnli") else small_data
    if changes.get("task_name") == "ocnli":
        data_dir = tmp_path / "ocnli"
        write_lines(data_dir / "train.json", [{"sentence1": "甲", "sentence2": "乙"}])
    if changes.get("task_name") == "tnews":
        data_dir = tmp_path / "tnews"
        write_lines(data_dir / "train.json", [{"sentence": "甲", "label": "好"}])
    settings = {
        "task_name": "classification",
        "data_dir": data_dir,
        "model_name_or_path": model,
        "output_dir": output,
        **changes,
    }
    assert says in fails(capsys, **settings)
    assert not (output / "arguments.yaml").exists()


def test_bad_lines_are_refused_or_left_out(tmp_path, capsys, small_data, model):
    for split in ("train", "dev"):
        lines = (small_data / "classification" / f"{split}.json").read_text(encoding="utf-8").split("\n")
        lines[2:2] = ["{", json.dumps({"text": "", "label": "好"})]
        (tmp_path / f"{split}.json").write_text("\n".join(lines), encoding="utf-8")
    settings = {
        "task_name": "classification",
        "data_dir": tmp_path,
        "model_name_or_path": model,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "save_steps": 2,
    }
    assert "train.json:3: not JSON" in fails(capsys, **settings)
    run(**settings, skip_bad_lines=True)
    said = capsys.readouterr().err
    assert "300 examples" in said and "2 that cannot be read left out" in said


def test_a_model_of_another_task(tmp_path, capsys, small_data, model):
    """Its head is replaced in training and refused in evaluation."""
    output = tmp_path / "out"
    run(task_name="labelling", data_dir=small_data, model_name_or_path=model, output_dir=output, max_steps=1)
    common = {"task_name": "tnews", "model_name_or_path": output, "output_dir": tmp_path / "tnews"}
    write_lines(tmp_path / "train.json", [{"sentence": GOOD * 9, "label": 100}, {"sentence": BAD * 9, "label": "101"}])
    write_lines(tmp_path / "dev.json", [{"sentence": GOOD * 9, "label": 100}])
    message = fails(capsys, **common, data_dir=tmp_path, do_train=False, do_eval=True)
    assert "its head has 3 classes (B-PER, I-PER, O, ...), tnews has 15" in message
    run(**common, data_dir=tmp_path, max_steps=1)
    assert "its head of 3 classes is another task's" in capsys.readouterr().err


def rewrite(file, change):
    file.write_text("".join(change(file.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")


def exchange_tokens(folder):
    """The last two of a vocabulary, which is a file alone then."""
    (folder / "tokenizer.json").unlink()
    rewrite(folder / "vocab.txt", lambda rows: [*rows[:-2], rows[-1], rows[-2]])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data, _: rewrite(data / "train.json", lambda rows: [rows[1], rows[0], *rows[2:]]), "train was '40 ex"),
        (lambda data, _: rewrite(data / "train.json", lambda rows: rows[:-1]), "now '39 examples"),
        (
            lambda data, _: rewrite(data / "train.json", lambda rows: [rows[0].translate(SWAP), *rows[1:]]),
            "train was '40 examples",
        ),
        (
            lambda data, _: rewrite(data / "dev.json", lambda rows: [rows[0].translate(SWAP), *rows[1:]]),
            "dev was '9 ex",
        ),
        (
            lambda data, _: rewrite(
                data / "train.json", lambda rows: [rows[0].translate(str.maketrans("好坏", "中中")), *rows[1:]]
            ),
            "(classes was '2, sha256",
        ),
        (lambda _, model: exchange_tokens(model), "vocabulary"),
        (lambda _, model: edit_config(model, layer_norm_eps=1e-6), "model_name_or_path was 'weights "),
    ],
    ids=["order", "fewer", "a label", "a label of dev", "classes", "vocabulary", "settings"],
)
def test_other_data_or_another_model_is_refused(tmp_path, capsys, begun, damage, says):
    root = tmp_path / "run"
    shutil.copytree(begun, root)
    damage(root / "data", root / "model")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    message = fails(capsys, **settings_of(root, resume=True))
    assert message.startswith(f"error: --resume: the run in {root}/out read something else (") and says in message
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_the_same_data_and_model_go_on_wherever_they_are(tmp_path, capsys, begun, monkeypatch):
    root = tmp_path / "run"
    shutil.copytree(begun, root)
    (root / "data").rename(tmp_path / "[x] 1%")
    (tmp_path / "link").symlink_to(root / "model")
    monkeypatch.chdir(root)
    moved = {"data_dir": "../[x] 1%", "model_name_or_path": "../link/", "output_dir": "out"}
    run(**{**settings_of(root, resume=True), **moved})
    assert "goes on after step 2 of out/checkpoint-2" in capsys.readouterr().err
    # What is to be read is not deleted
    message = fails(capsys, **{**settings_of(root, overwrite=True), **moved, "model_name_or_path": root / "out"})
    assert f"--model_name_or_path {root}/out: lies in --output_dir out, which --overwrite empties" in message
    assert read_weights(root / "out")


def test_a_run_of_an_older_version_goes_on(tmp_path, capsys, begun):
    """Its record lacks options that came later, which were at their defaults."""
    root = tmp_path / "run"
    shutil.copytree(begun, root)
    rewrite(root / "out" / "arguments.yaml", lambda rows: [row for row in rows if not row.startswith("task_tau")])
    run(**settings_of(root, resume=True))
    assert "goes on after step 2" in capsys.readouterr().err


def test_a_damaged_best_model_is_told(tmp_path, capsys, begun):
    """It was kept before the run was stopped, and what is trained after is no better."""
    root = tmp_path / "run"
    shutil.copytree(begun, root)
    run(**settings_of(root, resume=True))
    assert "not those that were kept" not in capsys.readouterr().err
    weights = root / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    run(**settings_of(root, resume=True))
    assert f"{root}/out: its weights are not those that were kept as the best: dam" in capsys.readouterr().err


def test_damaged_results_are_begun_anew(tmp_path, capsys, begun):
    root = tmp_path / "run"
    shutil.copytree(begun, root)
    shutil.copy(root / "data" / "dev.json", root / "data" / "test.json")
    settings = settings_of(root, do_train=False, do_predict=True, model_name_or_path=root / "out")
    for content in (b"\xff", b"[1]", b'{"dev": '):
        (root / "out" / "eval_results.json").write_bytes(content)
        run(**settings)
        assert f"{root}/out/eval_results.json is damaged and begun anew" in capsys.readouterr().err
        assert json.loads((root / "out" / "eval_results.json").read_text())["test_examples"] == 9


SWAP = str.maketrans("好坏", "坏好")


def edit_config(model, **changes):
    (model / "config.json").write_text(json.dumps({**json.loads((model / "config.json").read_text()), **changes}))


def settings_of(root, **changes):
    return {
        "task_name": "classification", "data_dir": root / "data", "model_name_or_path": root / "model",
        "output_dir": root / "out", "max_steps": 4, "save_steps": 2, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory, model):
    """A folder with data, a model and a run that was stopped after two steps of four."""
    root = tmp_path_factory.mktemp("begun")
    shutil.copytree(model, root / "model")
    random = np.random.default_rng(0)
    for split, count in {"train": 40, "dev": 9}.items():
        write_lines(root / "data" / f"{split}.json", (classification(random, number) for number in range(count)))
    run(**settings_of(root, keep_checkpoints=2))
    shutil.rmtree(root / "out" / "checkpoint-4")
    return root


def test_submission_of_a_task_of_clue(tmp_path, small_data, model):
    random = np.random.default_rng(0)
    for split, count in {"train": 20, "dev": 5}.items():
        write_lines(
            tmp_path / f"{split}.json", [{"sentence": text(random), "label": 100 + i % 5} for i in range(count)]
        )
    write_lines(tmp_path / "test.json", [{"id": 10 + i, "sentence": text(random)} for i in range(7)])
    output = tmp_path / "out"
    run(task_name="tnews", data_dir=tmp_path, model_name_or_path=model, output_dir=output, max_steps=2, do_predict=True)
    submitted = rows(output / "tnews11_predict.json")
    assert [row["id"] for row in submitted] == list(range(10, 17))
    assert all(row["label"] in TASKS["tnews"].aliases for row in submitted)
    named = [{**row, "label": TASKS["tnews"].aliases[row["label"]]} for row in submitted]
    predicted = rows(output / "test_predictions.json")
    assert [{key: row[key] for key in ("id", "label")} for row in predicted] == named
    assert json.loads((output / "config.json").read_text())["id2label"]["3"] == "news_sports"


def test_a_model_of_single_texts_is_not_asked_about_pairs(tmp_path, capsys, small_data, model):
    output = tmp_path / "out"
    run(task_name="classification", data_dir=small_data, model_name_or_path=model, output_dir=output, max_steps=1)
    assert json.loads((output / "config.json").read_text())["takes_pairs"] is False
    write_lines(tmp_path / "dev.json", [{"text": GOOD, "other": BAD, "label": "好"}])
    settings = {"task_name": "classification", "data_dir": tmp_path, "text_pair_column": "other", "do_eval": True}
    message = fails(capsys, **settings, model_name_or_path=output, output_dir=output, do_train=False)
    assert f"{output}: was fine-tuned on single texts, this task has pairs of texts" in message


@BOTH
def test_cmrc_2018_as_it_is_published(tmp_path, capsys, model, name):
    """Three annotators, answers that are not verbatim, and a question none of whose answers is: it counts all the
    same, and the test set's placeholders do not."""
    context = "".join(CHARACTERS[:50])
    answers = [[context[5:9], context[4:9], "没有"], ["没有", context[20:24], "也没有"], ["没有", "也没有", "都没有"]]
    for split in ("train", "dev", "test"):
        qas = [
            {
                "id": f"D_0_Q{i}",
                "question": context[30:33],
                "answers": [{"text": text, "answer_start": context.find(text)} for text in texts],
            }
            for i, texts in enumerate(answers[: 2 if split == "train" else 3])
        ]
        if split == "test":
            qas[0]["answers"] = [{"text": "FAKE_ANSWER_1", "answer_start": -1}]
        data = [{"paragraphs": [{"id": "D_0", "context": context, "qas": qas}], "id": "D", "title": "t"}]
        (tmp_path / f"{split}.json").write_text(json.dumps({"version": "v1.0", "data": data}, indent=1))
    output = tmp_path / "out"
    run(
        backend=name, task_name="cmrc2018", data_dir=tmp_path, model_name_or_path=model, output_dir=output, max_steps=1,
        save_steps=1, do_predict=True,
    )  # fmt: skip
    said = capsys.readouterr().err
    assert f"of 1 no answer is in the context, the first: {tmp_path}/dev.json, question 3 (D_0_Q2); they count" in said
    assert json.loads((output / "eval_results.json").read_text())["dev_examples"] == 3
    predicted = rows(output / "dev_predictions.json")
    assert [sorted(row["right"]) for row in predicted] == [sorted(texts) for texts in answers]
    assert predicted[1]["right"][0] == context[20:24]
    submitted = json.loads((output / "cmrc2018_predict.json").read_text(encoding="utf-8"))
    assert list(submitted) == ["D_0_Q0", "D_0_Q1", "D_0_Q2"]
    assert "right" not in rows(output / "test_predictions.json")[0]
