"""Fine-tuning on several tasks together: what is trained of a batch, what is drawn, what is left, and errors."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, environment, logits_of
from test_finetuning import (  # noqa: F401, small_data and model are fixtures
    BOTH,
    classification,
    fails,
    metrics,
    model,
    options,
    rows,
    run,
    same_files,
    small_data,
    text,
    write_lines,
)
from test_teachers import STATES, small, teacher  # noqa: F401, fixtures
from two_processes import launcher

from backends.pretrained import read_safetensors
from export.convert import OnnxArguments, export
from export.predict import PredictArguments, predict
from finetuning.several_tasks import TaskBatch, Together, draw_batches, draw_shares, draw_tasks
from objectives.supervised import Supervised
from text.data import Example, Sentence
from text.features import task_features
from text.tasks import HEAD_OF
from text.tokenizer import WordPiece

NLI = ("entailment", "contradiction", "neutral")


def ocnli(random, number):
    """Does a sentence begin as another does?"""
    first, second, label = text(random, 4, 16), text(random, 4, 16), int(random.integers(3))
    return {"sentence1": first, "sentence2": first[:label] + second, "label": NLI[label], "id": number}


@pytest.fixture(scope="module")
def tasks_data(tmp_path_factory, small_data):  # noqa: F811
    """Folders of a task of single texts, one of pairs and one of tags, of different sizes."""
    root = tmp_path_factory.mktemp("tasks")
    shutil.copytree(small_data / "labelling", root / "labelling")
    for name, make, train in (("reviews", classification, 300), ("ocnli", ocnli, 100)):
        for seed, (split, count) in enumerate({"train": train, "dev": 31, "test": 9}.items()):
            random = np.random.default_rng(seed)
            write_lines(root / name / f"{split}.json", (make(random, number) for number in range(count)))
    return root


@pytest.fixture(scope="module")
def of_ocnli(tmp_path_factory, tasks_data, model):  # noqa: F811
    """A model that was fine-tuned on the pairs, a little."""
    output = tmp_path_factory.mktemp("teacher") / "ocnli"
    run(task_name="ocnli", data_dir=tasks_data, model_name_or_path=model, output_dir=output, max_steps=1)
    return output


def together(data, model, output, **changes):  # noqa: F811
    return {
        "tasks": "[ocnli, classification:reviews]", "data_dir": data, "model_name_or_path": model, "output_dir": output,
        **changes,
    }  # fmt: skip


def same_answers(folder, task_name, data, output, **settings):
    """What training said of a model is what its folder answers in a run of its own."""
    run(
        task_name=task_name, data_dir=data, model_name_or_path=folder, output_dir=output, do_train=False, do_eval=True,
        **settings,
    )  # fmt: skip
    assert rows(output / "dev_predictions.json") == rows(folder / "dev_predictions.json")


def test_a_batch_of_one_task_moves_what_it_would_alone(backend, model):  # noqa: F811
    """The gradients and the update are those of a model with that head alone; the other head stays as it is, weight
    decay and all, also after batches of its own."""
    tokenizer, random = WordPiece.from_model(model), np.random.default_rng(1)
    texts = [text(random) for _ in range(8)]
    examples = {
        "classification": [Example(i, body, None, i % 3) for i, body in enumerate(texts)],
        "labelling": [Sentence(i, tuple(body), (i % 5,) * len(body)) for i, body in enumerate(texts)],
    }
    batches = {
        kind: task_features(kind, tokenizer, listed, 32).labelled(np.arange(8)) for kind, listed in examples.items()
    }
    settings = {"weight_decay": 0.5, "adam_epsilon": 1e-6, "max_grad_norm": 1.0, "loss_scale": 1.0}
    config = {**TINY, "vocab_size": len(tokenizer)}

    def model_of(kind, classes):
        return backend.model({**config, "id2label": dict.fromkeys(range(classes), "")}, weights, HEAD_OF[kind])

    backend.seed(5)
    weights = backend.model(config).weights()
    joined = backend.join((kind, model_of(kind, n)) for kind, n in (("labelling", 5), ("classification", 3)))
    alone = backend.model(
        joined.models["classification"].config, joined.models["classification"].weights(), HEAD_OF["classification"]
    )
    loss = Together({kind: Supervised(backend, joined.models[kind], kind) for kind in batches})
    optimizer, optimizer_alone = (backend.optimizer(side, **settings) for side in (joined, alone))

    value, parts = loss(TaskBatch("classification", batches["classification"]), 0.0)
    expected, _ = Supervised(backend, alone, "classification")(batches["classification"])
    assert value.item() == expected.item() == parts["classification/loss"].item()
    optimizer.backward(value)
    optimizer_alone.backward(expected)
    got = {key: None if p.grad is None else backend.numpy(p.grad) for key, p in joined.named_parameters()}
    for key, parameter in alone.named_parameters():
        name = f"heads.classification.{key}" if key.startswith("classifier") else key
        np.testing.assert_array_equal(got.pop(name), backend.numpy(parameter.grad), err_msg=key)
    assert got.keys() == {"heads.labelling.classifier.weight", "heads.labelling.classifier.bias"}
    assert all(gradient is None for gradient in got.values())

    before = joined.weights()
    optimizer.step(1e-2)
    optimizer_alone.step(1e-2)
    moved = joined.models["classification"].weights()
    assert all(np.array_equal(moved[key], array) for key, array in alone.weights().items())
    assert all(np.array_equal(joined.weights()[key], before[key]) for key in got)
    for kind in ("labelling", "classification"):
        before = joined.weights()
        optimizer.backward(loss(TaskBatch(kind, batches[kind]), 0.0)[0])
        optimizer.step(1e-2)
        still = {key for key, array in joined.weights().items() if np.array_equal(array, before[key])}
        other = ({*batches} - {kind}).pop()
        assert {key for key in before if key.startswith(f"heads.{other}.")} <= still
        assert not any(key.startswith(("encoder.", f"heads.{kind}.")) for key in still)

    again = backend.join((kind, model_of(kind, n)) for kind, n in (("labelling", 5), ("classification", 3)))
    assert again.load_weights(joined.weights()) == []
    for kind, batch in batches.items():
        answers = [backend.numpy(logits_of(side.models[kind], batch.batch)) for side in (joined, again)]
        np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_tasks_are_drawn_by_their_sizes(tau):
    """As often as TextBrewer's probabilities say; wherever a run goes on, the same tasks come."""
    sizes = np.array([30, 2, 9])
    shares = draw_shares(sizes.tolist(), tau)
    np.testing.assert_allclose(shares, [30**tau, 2**tau, 9**tau] / np.sum(sizes**tau))
    _, tasks = draw_tasks(shares, 7)
    drawn = np.array([next(tasks) for _ in range(20000)])
    deviation = np.sqrt(shares * (1 - shares) / len(drawn))
    assert (np.abs(np.bincount(drawn) / len(drawn) - shares) < 4 * deviation).all()
    for start in (1, 250, 9999):
        before, rest = draw_tasks(shares, 7, start)
        assert before.tolist() == np.bincount(drawn[:start], minlength=3).tolist()
        assert [next(rest) for _ in range(500)] == drawn[start : start + 500].tolist()
    _, others = draw_tasks(shares, 8)
    assert [next(others) for _ in range(500)] != drawn[:500].tolist()


def test_every_task_has_its_own_batches_in_order():
    """From where a run goes on each task's batches come as they would have."""

    class Numbered:
        def __init__(self, name):
            self.name = name

        def batches(self, start):
            while True:
                yield start
                start += 1

    tasks, shares = [Numbered("a"), Numbered("b")], np.array([0.3, 0.7])
    whole = draw_batches(tasks, shares, 3, 0)
    sequence = [next(whole) for _ in range(60)]
    for name in "ab":
        numbers = [batch.labelled for batch in sequence if batch.task == name]
        assert numbers == [*range(len(numbers))]
    rest = draw_batches(tasks, shares, 3, 23)
    assert [next(rest) for _ in range(37)] == sequence[23:]


@pytest.mark.slow
def test_each_task_leaves_a_folder_of_its_own(tmp_path, tasks_data, model):  # noqa: F811
    """Single texts, pairs and tags are learnt; what training said of the best models is what their folders answer, in
    a run of their own and as ONNX."""
    output = tmp_path / "out"
    run(
        **together(tasks_data, model, output, tasks="[classification:reviews, ocnli, labelling]"),
        max_steps=90, save_steps=30, do_predict=True, task_tau=0.5,
    )  # fmt: skip
    best = max((record for record in metrics(output) if "dev/mean" in record), key=lambda record: record["dev/mean"])
    scores = []
    for folder, task_name, metric in (
        ("reviews", "classification", "accuracy"), ("ocnli", "ocnli", "accuracy"), ("labelling", "labelling", "f1"),
    ):  # fmt: skip
        results = json.loads((output / folder / "eval_results.json").read_text())
        assert results["task"] == folder and results["dev_examples"] == len(rows(tasks_data / folder / "dev.json"))
        assert results["dev"][metric] == pytest.approx(best[f"dev/{folder}/{metric}"])
        assert f"| {folder} | {metric} | {results['dev'][metric]:.2f} |" in (output / "results.md").read_text()
        scores.append(results["dev"][metric])
        left = {path.name for path in (output / folder).iterdir()}
        assert {"dev_predictions.json", "test_predictions.json", "config.json"} <= left
        assert ("confusion_matrix.png" in left) == ("confusion_matrix.csv" in left) == (metric == "accuracy")
        same_answers(output / folder, task_name, tasks_data / folder, tmp_path / folder)
    assert scores[0] >= 90 and scores[2] >= 80
    assert best["dev/mean"] == pytest.approx(np.mean(scores))
    assert (output / "ocnli" / "ocnli_50k_predict.json").exists()
    assert json.loads((output / "ocnli" / "config.json").read_text())["takes_pairs"] is True

    predicted = rows(output / "ocnli" / "dev_predictions.json")
    texts = tmp_path / "texts.json"
    write_lines(texts, [{key: row[key] for key in ("text", "text_pair")} for row in predicted])
    onnx = export(OnnxArguments(str(output / "ocnli"), str(tmp_path / "ocnli.onnx"), "torch"))
    answers = rows(predict(PredictArguments(model=str(onnx), texts=str(texts))))
    assert [answer["label"] for answer in answers] == [row["label"] for row in predicted]


@pytest.mark.parametrize("name, precision", [("torch", {}), ("paddle", {}), ("torch", {"amp_dtype": "float16"})])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, tasks_data, small, teacher, of_ocnli, name, precision):  # noqa: F811
    """With a teacher each, projections, and tasks that change within an update."""
    arguments = together(
        tasks_data, small, tmp_path / "whole", backend=name, max_steps=4, save_steps=2, keep_checkpoints=2,
        gradient_accumulation_steps=2, max_seq_length=24, matches=json.dumps(STATES), hard_label_weight=0.5,
        teacher_model_name_or_path=f"[{of_ocnli}, {teacher}]", use_amp=bool(precision), **precision,
    )  # fmt: skip
    run(**arguments)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    (resumed / "ocnli" / "eval_results.json").unlink()
    run(**{**arguments, "output_dir": resumed}, resume=True)
    expected, got = (read_safetensors(folder / "checkpoint-4" / "model.safetensors") for folder in (whole, resumed))
    assert sum(".projections." in key for key in expected) == 8
    assert expected.keys() == got.keys() and all(np.array_equal(expected[key], got[key]) for key in expected)
    assert metrics(whole) == metrics(resumed)
    for folder, task_name in (("ocnli", "ocnli"), ("reviews", "classification")):
        same_files(whole / folder, resumed / folder, 0)
        if not precision:
            data, again = tasks_data / folder, tmp_path / folder
            same_answers(whole / folder, task_name, data, again, backend=name, max_seq_length=24)
    logged = {key for record in metrics(whole) for key in record}
    assert {"ocnli/loss", "ocnli/labels", "reviews/logits/ce", "reviews/states/mse/3-2"} <= logged


@pytest.mark.slow
@BOTH
def test_two_processes_learn_what_one_learns(tmp_path, tasks_data, small, teacher, of_ocnli, name):  # noqa: F811
    """With teachers whose answers are kept, a folder for each task."""
    alone, shared = (
        dict(
            **together(tasks_data, small, tmp_path / count), backend=name, batch_size=24, max_steps=6, save_steps=3,
            learning_rate=1e-3, adam_epsilon=1e-4, hard_label_weight=0.5,
            teacher_model_name_or_path=f"[{of_ocnli}, {teacher}]", cache_teacher=tmp_path / f"cache-{count}",
        )
        for count in "12"
    )  # fmt: skip
    run(**alone)
    program = ["-m", *launcher(name, tmp_path / "logs"), str(ROOT / "finetuning" / "__main__.py")]
    done = subprocess.run(
        [sys.executable, *program, *options(**shared)], cwd=ROOT, env=environment(OMP_NUM_THREADS="1"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for expected, record in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert record == pytest.approx(expected, rel=2e-4, abs=1e-6)
    for folder in ("ocnli", "reviews"):
        same_files(tmp_path / "1" / folder, tmp_path / "2" / folder, 2e-5)
        assert (tmp_path / "cache-2" / folder / "cache.json").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": "[ocnli, tnew]"}, "--tasks tnew: no such task; did you mean tnews?"),
        ({"tasks": "[ocnli, ocnli:reviews]"}, "--tasks ocnli:reviews: expected classification:FOLDER, reading:FOLDER,"),
        ({"tasks": "[ocnli, 'classification:../x']"}, "--tasks classification:../x: expected classification:FOLDER"),
        ({"tasks": "[ocnli]"}, "--tasks ocnli: must be two or more, each once; of one task give --task_name"),
        ({"tasks": "[ocnli, OCNLI]"}, "--tasks ocnli OCNLI: must be two or more, each once"),
        ({"task_name": "ocnli"}, "--tasks ocnli classification:reviews: beside --task_name ocnli; give one of the two"),
        ({"tasks": "[ocnli, tnews]"}, "no folder tnews; with --tasks each has one there"),
        ({"task_tau": -1}, "--task_tau -1.0: must be at least 0"),
        ({"do_train": "false", "do_eval": "true"}, "are to be learnt; beside --do_train false give --task_name"),
        ({"augmented": "x.json"}, "--augmented x.json: is for one task; leave it out beside --tasks"),
        (
            {"intermediate.matches": "[L4_hidden_smmd]"},
            "--intermediate.matches ['L4_hidden_smmd']: is for one task; leave it out beside --tasks",
        ),
        ({"tasks": None, "task_name": "ocnli", "task_tau": 2}, "--task_tau 2: has no effect without --tasks"),
        ({"tasks": "[ocnli, labelling]", "text_column": "x"}, "--text_column x: has no effect on ocnli, labelling"),
        ({"teacher_model_name_or_path": "[{teacher}]"}, "must be as many as tasks, 2, each task's in its place"),
        (
            {"teacher_model_name_or_path": "[{teacher}, {of_ocnli}]"},
            "its classes (坏, 好, ...) are not those of ocnli (entailment, contradiction, neutral, ...); give a model",
        ),
        (
            {"teacher_model_name_or_path": "[{of_ocnli}, {teacher}]", "teacher_weights": "[1, 2]"},
            "--teacher_weights [1.0, 2.0]: is for one task; leave it out beside --tasks",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_together(tmp_path, capsys, tasks_data, small, teacher, of_ocnli, changes, says):  # noqa: F811
    settings = together(tasks_data, small, tmp_path / "out", **changes)
    folders = {"teacher": teacher, "of_ocnli": of_ocnli}
    settings |= {key: value.format(**folders) for key, value in settings.items() if "teacher_m" in key}
    assert says in fails(capsys, **{key: value for key, value in settings.items() if value is not None})
    assert not (tmp_path / "out").exists()


def test_other_tasks_or_data_are_refused_when_a_run_goes_on(tmp_path, capsys, tasks_data, small):  # noqa: F811
    data = tmp_path / "data"
    shutil.copytree(tasks_data, data)
    arguments = together(data, small, tmp_path / "out", max_steps=1)
    run(**arguments)
    assert "had other arguments (tasks was" in fails(
        capsys, **{**arguments, "tasks": "[ocnli, labelling]"}, resume=True
    )
    lines = (data / "reviews" / "train.json").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / "reviews" / "train.json").write_text("".join(lines[1:]), encoding="utf-8")
    assert "read something else (reviews.train was '300 examples" in fails(capsys, **arguments, resume=True)
