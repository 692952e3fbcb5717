"""The benchmarks, as far as they could be wrong: what they count, and that every contender learns."""

import importlib
import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
from conftest import CHARACTERS, LABELS, ROOT, TINY, model_folder

from backends.files import InputError
from backends.pretrained import is_transposed, to_paddle_name, write_model
from bench import distill_task, finetune, quality
from bench.company import LOOP
from bench.contenders import DistillationJob, TaskJob
from bench.distill import CONTENDERS, model_flops
from bench.finetune import CONTENDERS as TUNERS
from bench.int8 import int8
from bench.runtimes import SHAPES, runtimes
from export.convert import OnnxArguments, export
from export.model import OnnxModel
from export.runtimes import NAMES, installed
from text.data import Example
from text.features import Features
from text.tokenizer import SPECIAL_TOKENS, WordPiece


def test_useful_flops_are_those_that_torch_counts(torch_backend):
    """On one unpadded sequence, forward and backward, against torch's own counter of products."""
    from conftest import make_batch
    from torch.utils.flop_counter import FlopCounterMode

    from objectives.distillation import Distillation, relation_matches
    from objectives.relations import RelationLoss

    student, teacher = TINY, {**TINY, "hidden_size": 48, "num_hidden_layers": 4, "intermediate_size": 96}
    models = torch_backend.model(teacher), torch_backend.model(student)
    distillation = Distillation(torch_backend, *models, relation_matches(RelationLoss(8), [(3, 2)]))
    batch = make_batch([11])
    with FlopCounterMode(display=False) as counter:
        seen = distillation._see(batch, together=False)
        sum(x.sum() for x in seen.student.qkv[2]).backward()
    # Before the first layer, the gradient goes on to the embeddings: all is counted by both.
    job = DistillationJob(teacher, student, 3, 2, 8, on_gpu=False, precision="float32")
    assert model_flops(job, np.array([11])) == pytest.approx(counter.get_total_flops())


@pytest.mark.slow
def test_the_small_pair_end_to_end(tmp_path):
    """Every contender trains on the same batches; the table, the plot and the figures are written."""
    command = [sys.executable, "-m", "bench", "distill", "--size", "small", "--batch_size", "4", "--steps", "2"]
    done = subprocess.run(
        [*command, "--warmup", "1", "--busy=[1]", "--busy_steps", "1", "--output_dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "distill-small-4.json").read_text())
    contenders = results["contenders"]
    assert len(contenders) == len(CONTENDERS)
    # the same text, so the same tokens a sequence and floating-point operations a token
    for ratio in ("tokens_per_second", "useful_flops_per_second"):
        ratios = [contender[ratio] / contender["sequences_per_second"] for contender in contenders]
        assert ratios == pytest.approx([ratios[0]] * len(ratios))
    for contender in contenders:
        assert sum(contender["phase_seconds"].values()) == pytest.approx(contender["step_seconds"], rel=0.2)
        assert contender["peak_memory"] > 2**27
        assert contender["title"] in (tmp_path / "distill-small-4.md").read_text()
        [beside] = contender["busy"]
        assert beside["loops"] == 1 and beside["sequences_per_second"] > 0
        assert 0 < beside["share_left"] < 1
        assert f"{contender['title']}, beside 1 busy loop |" in (tmp_path / "distill-small-4.md").read_text()
    assert (tmp_path / "distill-small-4.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_candidates_one_by_one_and_together(tmp_path, data, torch_backend):
    """In single precision all contenders find the same candidates of the same words."""
    model = tmp_path / "tiny"
    model.mkdir()
    tokenizer = WordPiece.from_file(data / "vocab" / "vocab.txt")
    tokenizer.save(model, 128)
    config = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 128}
    torch_backend.seed(1)
    write_model(model, config, torch_backend.model(config, None, "masked_lm").weights(), "masked_lm")
    command = [sys.executable, "-m", "bench", "augment", "--model_name_or_path", str(model), "--texts", "12"]
    done = subprocess.run(
        [*command, "--rounds", "2", "--output_dir", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    contenders = json.loads((tmp_path / "out" / "augment.json").read_text())["contenders"]
    assert {contender["title"] for contender in contenders} >= {
        f"{name}, {framework}" for name in ("one word at a time", "ours, float32") for framework in ("torch", "paddle")
    }
    assert len({contender["words"] for contender in contenders}) == 1 and contenders[0]["words"] > 10
    for contender in contenders:
        exact = contender["title"].endswith(("time, torch", "time, paddle", "float32, torch", "float32, paddle"))
        assert contender["agreement"] > (0.999 if exact else 0.1)
        assert contender["title"] in done.stdout and len(contender["seconds"]) == 2


@pytest.mark.slow
def test_distillation_on_a_task_end_to_end(tmp_path, data):
    """Every contender trains; those that are compared have seen the same tokens."""
    command = [sys.executable, "-m", "bench", "distill_task", "--task", "tnews", "--size", "small"]
    command += ["--batch_size", "4", "--rounds", "2", "--steps", "1", "--warmup", "1", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "distill-task-tnews-small.json").read_text())
    assert len(results["contenders"]) == len(distill_task.CONTENDERS)
    for group in results["groups"]:
        for contender in group["contenders"]:
            assert len(contender["rounds"]) == 2
            assert sum(contender["phase_seconds"].values()) == pytest.approx(contender["step_seconds"], rel=0.2)
            assert contender["peak_memory"] > 2**27
            assert contender["title"] in (tmp_path / "distill-task-tnews-small.md").read_text()


def test_contenders_on_a_task_compute_the_same_losses():
    """Of equal weights on a ragged batch, part by part: ours on both backends, TextBrewer, PaddleNLP's plain loop."""
    import paddle
    import torch

    from bench.contenders.ours import OursPaddleOnTask, OursTorchFloat32OnTask
    from bench.contenders.paddlenlp import PaddleNLPOnTask
    from bench.contenders.textbrewer import TextBrewerOnTask

    random = np.random.default_rng(0)
    lengths = [3, 11, 7, 7]
    ids = [random.integers(5, 200, length) for length in lengths]
    nothing, labels = np.zeros(0, np.int64), [np.array([label]) for label in (0, 2, 1, 1)]
    features = Features(ids, np.array(lengths), np.zeros(4, bool), np.arange(4), labels, [nothing] * 4)
    student = {**TINY, "id2label": dict(enumerate("abc"))}
    teacher = {**student, "hidden_size": 48, "num_hidden_layers": 6, "intermediate_size": 96}
    states, attention = [(0, 0), (2, 1), (4, 2), (6, 3)], [(1, 0), (3, 1), (5, 2)]
    job = TaskJob(teacher, student, states, attention, features, batch_size=4)
    batch = next(job.batches())
    ours, ours_paddle = OursTorchFloat32OnTask(job), OursPaddleOnTask(job)
    textbrewer, paddlenlp = TextBrewerOnTask(job), PaddleNLPOnTask(job)

    def named(name):
        return name if name.startswith("classifier") else f"bert.{name}"

    for which in ("teacher", "student"):
        weights = getattr(ours.distillation, which).weights()
        getattr(ours_paddle.distillation, which).load_weights(weights)
        projections = {name: array for name, array in weights.items() if name.startswith("projections.")}
        for name in projections:
            _, number, kind = name.split(".")
            array = weights.pop(name)
            getattr(textbrewer.distiller.projs[int(number)], kind).data = torch.from_numpy(array)
            getattr(paddlenlp.projections[int(number)], kind).set_value(array.T)
        model = getattr(textbrewer.distiller, {"teacher": "model_T", "student": "model_S"}[which])
        model.load_state_dict({named(name): torch.from_numpy(array) for name, array in weights.items()})
        getattr(paddlenlp, which).set_state_dict(
            {
                named(to_paddle_name(name)): array.T if is_transposed(name, array) else array
                for name, array in weights.items()
            }
        )
    with torch.no_grad(), paddle.no_grad():
        found = [contender.losses(batch) for contender in (ours, ours_paddle, textbrewer, paddlenlp)]
    expected = [float(part) for part in found[0][1].values()]
    assert len(expected) == 1 + len(states) + len(attention) and min(expected) > 1e-3
    for loss, parts in found:
        assert [float(part) for part in parts.values()] == pytest.approx(expected, rel=1e-4)
        assert float(loss) == pytest.approx(sum(expected), rel=1e-4)


@pytest.mark.slow
def test_fine_tuning_end_to_end(tmp_path, data, torch_backend):
    """Every contender starts from the same model, learns the same task and is evaluated on the same examples."""
    model = tmp_path / "tiny"
    model.mkdir()
    tokenizer = WordPiece.from_file(data / "vocab" / "vocab.txt")
    tokenizer.save(model, 64)
    config = {**TINY, "vocab_size": len(tokenizer), "initializer_range": 0.1}
    torch_backend.seed(1)
    write_model(model, config, torch_backend.model(config).weights())
    command = [sys.executable, "-m", "bench", "finetune", "--tasks=[tnews]", "--steps", "150", "--seeds=[1]"]
    command += ["--model_name_or_path", str(model), "--max_seq_length", "32", "--learning_rate", "5e-3"]
    command += ["--data_dir", str(data / "clue"), "--output_dir", str(tmp_path), "--busy=[]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "finetune-tiny.json").read_text())["tasks"]["tnews"]
    assert record["examples"] == 960
    assert len(record["runs"]) == len(TUNERS)
    accuracies = [run["accuracy"] for [run] in record["runs"].values()]
    assert min(accuracies) > 14  # the most frequent of 15 classes is 7% of them
    assert max(accuracies) - min(accuracies) < 6
    for [run] in record["runs"].values():
        assert run["title"] in (tmp_path / "finetune-tiny.md").read_text()


def test_fine_tuning_beside_busy_loops(monkeypatch):
    """Every contender runs alone and in each company, which is there while it runs and gone afterwards."""
    company = []
    popen = subprocess.Popen

    def start(command, **options):
        process = popen(command, **options)
        if command[-1] == LOOP:
            company.append(process)
        return process

    def run(name, job):
        loops = sum(process.poll() is None for process in company)
        speed = {"ours-torch": 90.0, "trainer": 30.0}[name] / (1 + loops)
        title = {"ours-torch": "ours, torch", "trainer": "Trainer, torch, float32"}[name]
        speeds = {"train_sequences_per_second": speed, "eval_sequences_per_second": 2 * speed}
        return {"title": title, "framework": "torch", **speeds}

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("bench.finetune._run", run)
    monkeypatch.setattr("bench.company.NOTICED", 0.0)
    rounds = finetune._beside(["ours-torch", "trainer"], None, [2])
    assert [beside_loops["loops"] for beside_loops in rounds] == [0, 2]
    assert rounds[0]["share_left"] == 1 > rounds[1]["share_left"] > 0
    assert all(process.poll() is not None for process in company)
    rounds[1]["share_left"] = 0.5
    rows = finetune._beside_table(rounds).splitlines()[2:]
    assert rows[3] == "| Trainer, torch, float32, beside 2 busy loops | 50% | 10.0 | 3.0x | 67% | 20.0 | 3.0x | 67% |"
    assert len(rows) == 4


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]


@pytest.mark.slow
def test_what_int8_loses(tmp_path, backend, monkeypatch, capsys):
    """Scores are the files' own on the dev set; dynamic answers depend on company, others do not; files are kept."""
    monkeypatch.setattr("bench.int8.CALIBRATED", 8)
    if backend.name == "paddle":  # once is enough
        monkeypatch.setattr("bench.int8.find_spec", lambda name: None)
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list(CHARACTERS), random.integers(1, 40))) for _ in range(60)]
    rows = [{"text": text, "label": LABELS[i % 3]} for i, text in enumerate(texts)]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    record = {"task_name": "classification", "data_dir": str(tmp_path), "text_column": "text", "label_column": "label"}
    models = [model_folder(tmp_path / "a"), model_folder(tmp_path / "b", initializer_range=0.2)]
    for model in models:
        (model / "arguments.yaml").write_text(json.dumps({**record, "text_pair_column": None}))
    options = {"backends": [backend.name], "output_dir": str(tmp_path / "out")}
    int8([str(model) for model in models], methods=["dynamic", "token"], examples=50, **options)
    out = tmp_path / "out"
    table = (out / "int8.md").read_text()
    assert table.strip() in capsys.readouterr().out
    losses, company = (cells(part) for part in table.split("if an example is asked alone"))
    assert losses[0] == ["", f"{tmp_path.name}, accuracy"] and len(losses) == len(company)

    def scores(name):
        examples = [Example(i, text, None, None) for i, text in enumerate(texts[:50])]
        answers = [OnnxModel(file).answers(examples) for file in sorted((out / "int8").glob(f"*/{name}.onnx"))]
        return np.array([100 * np.mean([a["label"] == LABELS[i % 3] for i, a in enumerate(rows)]) for rows in answers])

    exact = scores("float32")
    assert losses[2] == ["float32, ONNX Runtime", f"{exact.mean():.2f}"] and len(exact) == 2
    for method in ("dynamic", "token"):
        loss = scores(method) - exact
        cell = f"{loss.mean():+.2f} ({loss.min():+.2f} to {loss.max():+.2f})"
        assert [f"{method}, ONNX Runtime", cell] in losses
    alone = {row: re.fullmatch(r"(\d+), (\d+)( \(by up to .*\))?", cell) for row, cell, _ in company[2:]}
    assert alone["token, ONNX Runtime"][0] == "0, 0" and int(alone["dynamic, ONNX Runtime"][2]) > 25
    written = {file: file.stat().st_mtime_ns for file in (out / "int8").glob("*/*")}
    int8([str(models[0])], methods=["token"], examples=5, **options)
    assert written == {file: file.stat().st_mtime_ns for file in (out / "int8").glob("*/*")}
    (models[0] / "arguments.yaml").write_text("{}")
    with pytest.raises(InputError, match="arguments.yaml: not the arguments of python -m finetuning"):
        int8([str(models[0])], **options)


@pytest.mark.slow
def test_runtimes_start_and_compute(tmp_path):
    """In a process each; the parts make up the whole, and every operator of the graph is counted."""
    folder = model_folder(tmp_path / "model", positions=128)
    file = export(OnnxArguments(str(folder), str(tmp_path / "m.onnx")))
    runtimes([str(file)], rounds=1, seconds=0.0, operators="2x8", output_dir=str(tmp_path / "out"))
    start, *profiles = (tmp_path / "out" / "runtimes.md").read_text().split("Milliseconds of")
    rows = cells(start)[2:]
    assert [row[0] for row in rows] == [f"{file}, {NAMES[name]}" for name in installed()]
    for record, row in zip(json.loads((tmp_path / "out" / "runtimes.json").read_text())["measured"], rows):
        for run in record["rounds"]:
            assert min(run["seconds"].values()) > 0 and min(run["bytes"].values()) > 0
            assert 0.2 < run["seconds"]["imports"] < sum(run["seconds"].values())
            assert len(run["milliseconds"]) == len(SHAPES) and run["milliseconds"][3] > run["milliseconds"][0]
        assert sum(map(float, row[1:5])) == pytest.approx(float(row[5]), abs=0.3)
    [profile] = profiles
    norms = Counter(node.op_type for node in onnx.load(file).graph.node)["LayerNormalization"]
    counts = {kind: cell for kind, cell in cells(profile) if kind == "LayerNormalization"}
    assert counts["LayerNormalization"].endswith(f" ({norms})") and norms == 7
    inside = export(OnnxArguments(str(folder), str(tmp_path / "text.onnx"), tokenizer="in-graph"))
    with pytest.raises(InputError, match="text.onnx"):
        runtimes([str(inside)], output_dir=str(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "contenders"),
    [("distill", CONTENDERS), ("distill_task", distill_task.CONTENDERS), ("finetune", TUNERS)],
)
def test_unknown_contender_is_named(benchmark, contenders):
    command = [sys.executable, "-m", "bench", benchmark, '--contenders=["ours"]']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("ours: no such contender; there are " + ", ".join(contenders))


def test_quality_of_a_small_table(tmp_path, monkeypatch, torch_backend, capsys):
    """Runs that failed go on, those that ended are not run again, and the table has what they wrote."""
    data, model = tmp_path / "data", tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    tokenizer = WordPiece([*SPECIAL_TOKENS, *CHARACTERS])
    tokenizer.save(model, 64)
    config = {**TINY, "vocab_size": len(tokenizer)}
    write_model(model, config, torch_backend.model(config).weights())
    rows = [json.dumps({"text": CHARACTERS[i : i + 4], "label": str(i % 2)}) for i in range(12)]
    for name in ("task/train.json", "task/dev.json", "text/part.txt"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text("\n".join([*map(str, rows)]) + "\n", encoding="utf-8")
    own = {"num_relation_heads": 8, "teacher_layer_index": 2, "max_seq_length": 16, "batch_size": 4, "device": "cpu"}
    table = quality.Table(
        "models/tiny",
        ["text"],
        {"2x32": {**quality.sizes(2, 32, 4), "intermediate_size": 64}},
        {
            "cut": quality.Row("cut", (0, 2)),
            "two": quality.Row("learns", (), 3, ({"hard_label_weight": 1}, quality.LOGITS), 2, "unlabelled"),
        },
        {"t": quality.Task("T", "classification", "task", {}, 8, ("task/train.json", 5))},
        {**own, "model_type": "bert"},
        {"max_steps": 4, "batch_size": 4, "max_seq_length": 16, "device": "cpu"},
    )
    commands = []

    def call(command, **_):
        program, words = command[2], command[3:]
        commands.append(words)
        if len(commands) == 2:
            return 130
        return importlib.import_module(f"{program}.__main__").main(words)

    def measure(**options):
        quality.quality("english", str(data), str(tmp_path / "out"), seeds=[1, 2], **options)
        return capsys.readouterr().out

    monkeypatch.setitem(quality.TABLES, "english", table)
    monkeypatch.setattr(subprocess, "call", call)
    with pytest.raises(SystemExit, match="2x32-cut-seed1: was stopped or failed"):
        measure(rows=["cut"])
    shown = measure(rows=["cut"])
    assert commands[1] == commands[2] and len(commands) == 5
    assert "| learns | 3 steps | not measured |" in shown and "| teacher |  | not measured |" in shown
    shown = measure()
    assert len(commands) == 5 + 4 + 4
    out = tmp_path / "out" / "english"
    assert len((out / "t" / "data" / "train.json").read_text().splitlines()) == 8
    assert (out / "t" / "unlabelled.txt").read_text().splitlines()[0] == CHARACTERS[:4]
    scores = [
        [
            json.loads((out / "t" / f"{name}-seed{seed}" / "eval_results.json").read_text())["dev"]["accuracy"]
            for seed in (1, 2)
        ]
        for name in ("2x32-two", "teacher")
    ]
    kept = sum(scores[0]) / sum(scores[1])
    assert (
        f"| learns | 3 steps, 0.0 min | {np.mean(scores[0]):.2f} ± {np.std(scores[0], ddof=1):.2f} of 2 ({kept:.1%}"
        in shown
    )
    assert shown.endswith(measure()) and len(commands) == 13
    with pytest.raises(InputError, match="--rows cat: no such name; there are cut, two, teacher"):
        measure(rows=["cat"])
    table.finetuning["max_steps"] = 5
    with pytest.raises(InputError, match="was begun by another command"):
        measure()
