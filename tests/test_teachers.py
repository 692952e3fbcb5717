"""Fine-tuning with teachers: what is learnt of every kind of task, from one or several, and what is refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import oracle
import pytest
from conftest import ROOT, TINY, environment
from test_finetuning import (  # noqa: F401, small_data and model are fixtures
    BOTH,
    CHARACTERS,
    fails,
    metrics,
    model,
    options,
    run,
    same_files,
    small_data,
    text,
    write_lines,
)
from test_stages import killed_after, same_bits
from two_processes import launcher

from backends.interface import Wanted
from backends.pretrained import read_safetensors, read_weights, write_model
from backends.shape import Shape
from finetuning.__main__ import main
from finetuning.arguments import RECIPES, parse
from finetuning.teacher_cache import TeacherCache
from finetuning.teachers import TaskTeacher, load_teacher
from objectives.distillation import Distillation, LabelsMatch, LogitsMatch, wanted_of
from objectives.logits import LogitsLoss
from objectives.matches import Models, matches_of
from objectives.teachers import MeanTeacher
from text.data import read_split, read_unlabelled, with_labels_of
from text.features import IGNORED, task_features
from text.folder import ModelFolder
from text.tasks import HEAD_OF, TASKS, find_task
from text.tokenizer import SPECIAL_TOKENS, WordPiece

STATES = [{"of": "states", "teacher": [0, 3], "student": [0, 2], "project": "linear"}]


@pytest.fixture(scope="module")
def small(tmp_path_factory, torch_backend):
    """A random student, without dropout, with the vocabulary of `model`."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = WordPiece([*SPECIAL_TOKENS, *CHARACTERS])
    tokenizer.save(folder, 64)
    config = {**TINY, "vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.1}
    torch_backend.seed(2)
    write_model(folder, config, torch_backend.model(config).weights())
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, small_data, model):  # noqa: F811
    """A model that was fine-tuned on the small classification task."""
    output = tmp_path_factory.mktemp("teacher") / "out"
    run(
        backend="torch", task_name="classification", data_dir=small_data, model_name_or_path=model, output_dir=output,
        max_steps=60, save_steps=60,
    )  # fmt: skip
    assert json.loads((output / "eval_results.json").read_text())["dev"]["accuracy"] >= 95
    return output


@pytest.mark.parametrize("loss", ["ce", "mse"])
@pytest.mark.parametrize("kind", ["classification", "reading", "labelling"])
@pytest.mark.parametrize(("labelled", "weights"), [(9, ()), (5, (3.0, 1.0))])
def test_logits_of_every_kind(backend, small_data, model, kind, loss, labelled, weights):  # noqa: F811
    """Rows of classes, of positions, of the tokens that have a label, of which those of some texts are not known;
    against float64 NumPy."""
    task = with_labels_of(find_task(kind), small_data)
    data = read_split(task, small_data, "train", False)
    tokenizer = WordPiece.from_model(model)
    lengths = {"max_seq_length": 32, "doc_stride": 8, "max_query_length": 8}
    features = task_features(kind, tokenizer, data.examples[:labelled], **lengths)
    if labelled < 9:
        others = read_unlabelled(task, small_data / kind / "train.json").examples[labelled:9]
        features += task_features(kind, tokenizer, others, **lengths)
        assert len(features) - features.sources.searchsorted(labelled) == sum(
            (targets < 0).all() for targets in features.targets
        )
    batch = features.labelled(np.arange(len(features)))
    backend.seed(4)
    config = {**TINY, "vocab_size": len(tokenizer), "id2label": dict.fromkeys(range(2 if kind == "reading" else 3), "")}
    models = [backend.model(config, head=HEAD_OF[kind]) for _ in range(3)]
    matches = [LogitsMatch(LogitsLoss(loss, 2.0)), LabelsMatch(weight=0.5)]
    total, parts = Distillation(backend, MeanTeacher(models[:2], weights), models[2], matches, kind)(batch)

    answers = [backend.numpy(m.run(batch.batch, Wanted(logits=True)).logits).astype(np.float64) for m in models]
    t, s = np.average(answers[:2], axis=0, weights=weights or None), answers[2]
    targets = np.concatenate(batch.targets)
    if kind == "labelling":
        kept = targets != IGNORED
        t, s, targets = t[kept], s[kept], targets[kept]
        assert len(t) < batch.tokens
    gold = np.eye(3)
    if kind == "reading":  # each sequence's start and its end are choices among its tokens
        ends = np.cumsum(batch.batch.attention_mask.sum(1))
        rows = [(x[:end][-n:].T) for x in (t, s) for end, n in zip(ends, batch.batch.attention_mask.sum(1))]
        t, s = rows[: len(ends)], rows[len(ends) :]
        sizes = np.array([x.size for x in t])
        each = np.array([oracle.logits_loss(a, b, loss, 2.0) for a, b in zip(t, s)])
        expected = np.average(each, weights=sizes if loss == "mse" else None)
        of_labels = np.mean(
            [
                oracle.logits_loss(np.eye(b.shape[1])[y] * 1e9, b, "ce")
                for b, y in zip(s, targets.reshape(-1, 2))
                if y[0] >= 0
            ]
        )
    else:
        expected = oracle.logits_loss(t, s, loss, 2.0)
        of_labels = oracle.logits_loss(gold[targets[targets >= 0]] * 1e9, s[targets >= 0], "ce")
    assert parts[f"logits/{loss}"].item() == pytest.approx(expected, rel=1e-4)
    assert parts["labels"].item() == pytest.approx(of_labels, rel=1e-4)
    assert total.item() == pytest.approx(expected + 0.5 * of_labels, rel=1e-4)


@pytest.mark.slow
@BOTH
def test_a_student_learns_from_logits_alone(tmp_path, capsys, small_data, small, teacher, name):  # noqa: F811
    """Its labels are all wrong in training, and count nothing: what is right it has from two teachers."""
    data = tmp_path / "data"
    for split in ("train", "dev"):
        rows = [json.loads(line) for line in (small_data / "classification" / f"{split}.json").open(encoding="utf-8")]
        if split == "train":
            rows = [{**row, "label": {"好": "坏", "坏": "好"}[row["label"]]} for row in rows]
        write_lines(data / f"{split}.json", rows)
    run(
        backend=name, task_name="classification", data_dir=data, model_name_or_path=small, output_dir=tmp_path / "out",
        teacher_model_name_or_path=f"[{teacher}, {teacher}]", temperature=2, max_steps=120, save_steps=30,
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["dev"]["accuracy"] >= 90
    assert "logits/ce x 1" in capsys.readouterr().err


def test_a_teachers_classes_may_stand_in_another_order(tmp_path, torch_backend, small_data, teacher):  # noqa: F811
    """Its head is turned to the order of the task's."""
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    weights = read_weights(teacher)
    for part in ("weight", "bias"):
        weights[f"classifier.{part}"] = weights[f"classifier.{part}"][::-1].copy()
    config = json.loads((teacher / "config.json").read_text())
    config["id2label"] = {"0": "好", "1": "坏"}
    config["label2id"] = {"好": 0, "坏": 1}
    write_model(other, config, weights, "sequence_classification")
    task = find_task("classification").with_labels(("坏", "好"))
    examples = read_split(task, small_data, "dev", False).examples[:5]
    batch = task_features("classification", WordPiece.from_model(teacher), examples, 32).batch(range(5))
    answers = []
    for folder in (teacher, other):
        loaded = load_teacher(torch_backend, task, [TaskTeacher(ModelFolder.find(folder, ""))])
        answers.append(torch_backend.numpy(loaded.run(batch, Wanted(logits=True)).logits))
    np.testing.assert_array_equal(*answers)


@BOTH
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, small_data, small, teacher, name):  # noqa: F811
    arguments = {
        "backend": name, "task_name": "classification", "data_dir": small_data, "model_name_or_path": small,
        "teacher_model_name_or_path": f"[{teacher}]", "hard_label_weight": 0.5, "probability_shift": "true",
        "matches": json.dumps(STATES), "max_steps": 8, "save_steps": 4, "keep_checkpoints": 2, "max_seq_length": 24,
    }  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(**arguments, output_dir=whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-8")
    run(**arguments, output_dir=resumed, resume=True)
    same_files(whole, resumed, 0)
    expected, got = (read_safetensors(folder / "checkpoint-8" / "model.safetensors") for folder in (whole, resumed))
    assert sum(key.startswith("projections.") for key in expected) == 4
    assert all(np.array_equal(expected[key], got[key]) for key in expected)
    assert {"logits/ce", "labels", "states/mse/0-0", "states/mse/3-2"} <= metrics(whole)[-2].keys()


@BOTH
def test_two_stages_are_what_two_runs_make(tmp_path, small_data, small, teacher, name):  # noqa: F811
    """States alone, then logits, of an augmented training set and text without labels: the bits of a run for each, the
    second from the model that the first left; so has a run that was killed in either stage."""
    rows = (small_data / "classification" / "train.json").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "augmented.json").write_text("".join(rows[:90]), encoding="utf-8")
    common = {
        "backend": name, "task_name": "classification", "data_dir": small_data, "max_seq_length": 24,
        "teacher_model_name_or_path": f"[{teacher}]", "augmented": tmp_path / "augmented.json",
        "unlabelled": small_data / "classification" / "test.json", "keep_checkpoints": 2,
    }  # fmt: skip
    states = json.dumps(STATES)
    of_first = {"max_steps": 4, "learning_rate": 1e-3, "batch_size": 8}
    group = {f"intermediate.{key}": value for key, value in of_first.items()}
    last = {**common, "max_steps": 8, "hard_label_weight": 0.5}
    both = {**last, **group, "intermediate.matches": states, "model_name_or_path": small, "save_steps": 2}
    whole, apart = tmp_path / "whole", tmp_path / "apart"
    run(**both, output_dir=whole)
    first = {**common, **of_first, "model_name_or_path": small, "kd_weight": 0, "matches": states, "save_steps": 4}
    run(**first, output_dir=apart)
    expected, got = (read_weights(folder) for folder in (apart, whole / "intermediate"))
    assert all(np.array_equal(expected[key], got[key]) for key in expected)
    run(**last, model_name_or_path=apart, output_dir=tmp_path / "last", save_steps=2)
    same_files(tmp_path / "last", whole, 0)
    assert "logits/ce" not in metrics(whole / "intermediate")[0] and "states/mse/0-0" not in metrics(whole)[0]

    for stage in ("intermediate", "last"):
        resumed = tmp_path / f"killed-{stage}"
        shutil.copytree(whole, resumed)
        killed_after(resumed, 0 if stage == "intermediate" else 6)
        if stage == "intermediate":
            (resumed / "metrics.jsonl").unlink()
            killed_after(resumed / "intermediate", 2)
        else:
            shutil.copy(whole / "model.safetensors", resumed)  # the best so far, which the checkpoint knows
            shutil.copy(whole / "paddle_model.safetensors", resumed)
        run(**both, output_dir=resumed, resume=True)
        same_bits(whole, resumed)


@pytest.mark.slow
@BOTH
def test_two_processes_learn_what_one_learns(tmp_path, small_data, small, model, name):  # noqa: F811
    """Of tags, whose number differs from one half of a batch to the other, and of sentences without; temperatures are
    of all rows."""
    taught = tmp_path / "teacher"
    run(
        backend=name,
        task_name="labelling",
        data_dir=small_data,
        model_name_or_path=model,
        output_dir=taught,
        max_steps=20,
    )
    lines = [*STATES, {"of": "logits", "temperature": 3, "temperature_schedule": "cwsm"}]
    random = np.random.default_rng(5)
    unlabelled = tmp_path / "unlabelled.txt"
    unlabelled.write_text("".join(f"{text(random)}\n" for _ in range(100)), encoding="utf-8")
    for count in (1, 2):
        arguments = options(
            task_name="labelling", data_dir=small_data, model_name_or_path=small, output_dir=tmp_path / str(count),
            teacher_model_name_or_path=f"[{taught}]", matches=json.dumps(lines), batch_size=32, max_steps=10,
            save_steps=5, learning_rate=1e-3, backend=name, hard_label_weight=0.5, kd_loss="mse", adam_epsilon=1e-4,
            unlabelled=unlabelled,
        )  # fmt: skip
        program = ["-m", "finetuning"]
        if count == 2:
            program = ["-m", *launcher(name, tmp_path / "logs"), str(ROOT / "finetuning" / "__main__.py")]
        done = subprocess.run(
            [sys.executable, *program, *arguments], cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for expected, record in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert record == pytest.approx(expected, rel=2e-4, abs=1e-6)
    same_files(tmp_path / "1", tmp_path / "2", 2e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher_model_name_or_path": None, "temperature": 2}, "--temperature 2: has no effect without --teacher"),
        ({"kd_weight": 0, "kd_loss": "mse", "hard_label_weight": 1}, "--kd_loss mse: has no effect beside --kd_"),
        ({"kd_weight": 0}, "--kd_weight 0 --hard_label_weight 0: nothing to learn from"),
        ({"kd_weight": 0, "hard_label_weight": 1, "cache_teacher": "kept"}, "keeps logits, and none are learnt"),
        ({"kd_weight": -1}, "--kd_weight -1.0: must be at least 0"),
        ({"temperature": 0}, "--temperature 0.0: must be greater than 0"),
        ({"matches": "[{of: states}]"}, "--matches, line 1: teacher: uniform: the teacher's 3 layers are no multiple"),
        ({"matches": "[{of: states, teacher: 3, student: 2}]"}, "have 32 dimensions, the student's 16"),
        ({"teacher_model_name_or_path": "./nowhere"}, "--teacher_model_name_or_path ./nowhere: no such folder"),
        ({"teacher_model_name_or_path": "untuned"}, "its classes (none, ...) are not those of"),
        ({"task_name": "labelling"}, "its classes (坏, 好, ...) are not those of labelling (B-PER, I-PER, O, ...)"),
        ({"task_name": "reading"}, "has no head of reading; give a model that was fine-tuned on reading"),
        ({"teacher_model_name_or_path": "two", "matches": json.dumps(STATES)}, "of 2 teachers only logits are"),
        ({"teacher_model_name_or_path": "two", "teacher_weights": "[1]"}, "--teacher_weights 1: must be as many as"),
        ({"teacher_model_name_or_path": "two", "teacher_weights": "[1, 0]"}, "--teacher_weights 1 0: must be greater"),
        ({"teacher_model_name_or_path": "two", "teacher_weights": "[1, .nan]"}, "1 nan: must be greater than 0"),
        ({"teacher_model_name_or_path": None, "teacher_weights": "[1, 2]"}, "has no effect without --teacher_model"),
        ({"teacher_model_name_or_path": "foreign", "matches": json.dumps(STATES)}, "states/mse/0-0 compares token by"),
        ({"teacher_model_name_or_path": "foreign", "task_name": "reading"}, "and windows of reading are cut by tokens"),
        ({"teacher_model_name_or_path": "foreign", "teacher_max_seq_length": 65}, "max_seq_length 65: the teacher /"),
        ({"teacher_max_seq_length": 24}, "--teacher_max_seq_length 24: has no effect on teachers that share"),
        ({"do_train": "false", "do_eval": "true"}, "--teacher_model_name_or_path"),
        ({"intermediate.matches": "[{of: states}]"}, "--intermediate.matches, line 1: teacher: uniform: "),
        ({"intermediate.max_steps": 3}, "--intermediate.max_steps 3: has no effect without --intermediate.matches"),
        ({"intermediate.matches": "[]"}, "--intermediate.matches: none given; a line is one of"),
        (
            {"intermediate.matches": json.dumps(STATES), "intermediate.batch_size": 0},
            "--intermediate.batch_size 0: must be at least 1",
        ),
        (
            {"teacher_model_name_or_path": "two", "intermediate.matches": json.dumps(STATES)},
            "--intermediate.matches: of 2 teachers only logits are",
        ),
        (
            {"teacher_model_name_or_path": None, "intermediate.matches": json.dumps(STATES)},
            "has no effect without --teacher_model",
        ),
    ],
)  # fmt: skip
def test_what_cannot_teach_is_refused(tmp_path, capsys, small_data, small, model, teacher, changes, says):  # noqa: F811
    output = tmp_path / "out"
    foreign = tmp_path / "foreign"
    shutil.copytree(teacher, foreign)
    (foreign / "tokenizer.json").unlink(missing_ok=True)
    vocabulary = (foreign / "vocab.txt").read_text(encoding="utf-8").splitlines()
    (foreign / "vocab.txt").write_text("\n".join([*vocabulary[:-2], *vocabulary[:-3:-1]]) + "\n", encoding="utf-8")
    named = {"untuned": f"[{model}]", "two": f"[{teacher}, {teacher}]", "foreign": f"[{foreign}]"}
    settings = {
        "task_name": "classification", "data_dir": small_data, "model_name_or_path": small, "output_dir": output,
        "teacher_model_name_or_path": f"[{teacher}]", **changes,
    }  # fmt: skip
    settings["teacher_model_name_or_path"] = named.get(
        settings["teacher_model_name_or_path"], settings["teacher_model_name_or_path"]
    )
    message = fails(capsys, **{key: value for key, value in settings.items() if value is not None})
    assert says in message
    assert not (output / "arguments.yaml").exists()


def test_another_teacher_is_refused_when_a_run_goes_on(tmp_path, capsys, small_data, small, teacher):  # noqa: F811
    arguments = {
        "task_name": "classification", "data_dir": small_data, "model_name_or_path": small, "max_steps": 1,
        "output_dir": tmp_path / "out",
    }  # fmt: skip
    run(**arguments, teacher_model_name_or_path=f"[{teacher}]")
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    assert main(options(**arguments, teacher_model_name_or_path=f"[{moved}]", resume=True)) == 0
    capsys.readouterr()
    weights = read_weights(moved)
    weights["classifier.bias"][0] += 1
    write_model(moved, json.loads((moved / "config.json").read_text()), weights, "sequence_classification")
    message = fails(capsys, **arguments, teacher_model_name_or_path=f"[{moved}]", resume=True)
    assert "read something else (teacher_model_name_or_path was 'weights" in message


def distil(output, small_data, student, taught, cache, **changes):  # noqa: F811
    run(**cached_options(output, small_data, student, taught, cache, **changes))


def cached_options(output, small_data, student, taught, cache, **changes):  # noqa: F811
    return {
        "task_name": "classification", "data_dir": small_data, "model_name_or_path": student, "output_dir": output,
        "teacher_model_name_or_path": f"[{taught}]", "max_steps": 6, "save_steps": 3, "max_seq_length": 24,
        **({} if cache is None else {"cache_teacher": cache}), **changes,
    }  # fmt: skip


@BOTH
def test_what_is_kept_is_what_the_teacher_says(tmp_path, monkeypatch, small_data, small, teacher, name):  # noqa: F811
    """Once whole it is not asked again; the same bits come of it."""
    sides = {"plain": None, "first": tmp_path / "cache", "second": tmp_path / "cache"}
    for side, cache in sides.items():
        if side == "second":
            monkeypatch.setattr("finetuning.finetune.load_teacher", None)
        distil(tmp_path / side, small_data, small, teacher, cache, backend=name)
    same_files(tmp_path / "first", tmp_path / "second", 0)
    same_files(tmp_path / "first", tmp_path / "plain", 1e-5)


def test_answers_for_every_token_are_kept(tmp_path, monkeypatch, torch_backend, small_data, model):  # noqa: F811
    """Of sequences in any order, from parts of a few."""
    monkeypatch.setattr("finetuning.teacher_cache.SEQUENCES", 7)
    task = with_labels_of(find_task("labelling"), small_data)
    tokenizer = WordPiece.from_model(model)
    features = task_features("labelling", tokenizer, read_split(task, small_data, "train", False).examples[:30], 32)
    config = {**TINY, "vocab_size": len(tokenizer), "id2label": dict.fromkeys(range(3), "")}
    taught = torch_backend.model(config, head="token_classification")
    cache = TeacherCache(torch_backend, tmp_path, {"teachers": "one"}, features, 3, taught.shape)
    cache.fill(taught)
    again = TeacherCache(torch_backend, tmp_path, {"teachers": "one"}, features, 3, taught.shape)
    assert again.whole and len(list(tmp_path.glob("*.npy"))) == 5
    batch = features.labelled(np.array([29, 3, 6, 7, 13])).batch
    expected, got = (side.run(batch, Wanted(logits=True)).logits for side in (taught, again))
    np.testing.assert_allclose(torch_backend.numpy(got), torch_backend.numpy(expected), atol=1e-5)


def test_a_cache_that_was_begun_is_filled(tmp_path, monkeypatch, small_data, small, teacher):  # noqa: F811
    """What a kill left is kept, and the rest is asked for."""
    from finetuning import teacher_cache

    monkeypatch.setattr(teacher_cache, "SEQUENCES", 100)
    asked, original = [], teacher_cache.predict

    def failing(backend, model, features, numbers):  # noqa: F811
        asked.append(numbers.start)
        if asked == [0, 100]:
            raise KeyboardInterrupt
        return original(backend, model, features, numbers)

    monkeypatch.setattr(teacher_cache, "predict", failing)
    arguments = cached_options(tmp_path / "out", small_data, small, teacher, tmp_path / "cache")
    assert main(options(**arguments)) == 130
    run(**arguments, resume=True)
    assert asked == [0, 100, 100, 200]
    distil(tmp_path / "other", small_data, small, teacher, tmp_path / "whole")
    same_files(tmp_path / "out", tmp_path / "other", 1e-6)


@pytest.mark.parametrize(
    ("damage", "changes", "says"),
    [
        (lambda cache: flip(cache / "logits-000000000.npy"), {}, "logits-000000000.npy is not what was written"),
        (lambda cache: (cache / "logits-000000000.npy").unlink(), {}, "No such file"),
        (lambda cache: flip(cache / "cache.json"), {}, "cache.json is"),
        (lambda cache: (cache / "cache.json").unlink(), {}, "is no such cache; give a new or empty folder"),
        (None, {"max_seq_length": 20}, "text was 300 sequences, sha256"),
        (None, {"teacher": "another"}, "teachers was weights"),
        (None, {"matches": json.dumps(STATES)}, "--cache_teacher: keeps logits alone"),
    ],
)
def test_a_cache_that_is_damaged_or_of_another_is_refused(request, tmp_path, capsys, kept, damage, changes, says):
    small_data, small, teacher = map(request.getfixturevalue, ("small_data", "small", "teacher"))  # noqa: F811
    cache = tmp_path / "cache"
    shutil.copytree(kept, cache)
    if damage is not None:
        damage(cache)
    if changes.pop("teacher", None):
        other = tmp_path / "other"
        shutil.copytree(teacher, other)
        weights = read_weights(teacher)
        weights["classifier.bias"][0] += 1
        write_model(other, json.loads((teacher / "config.json").read_text()), weights, "sequence_classification")
        teacher = other
    before = {path: path.read_bytes() for path in cache.iterdir()}
    message = fails(capsys, **cached_options(tmp_path / "out", small_data, small, teacher, cache, **changes))
    assert "--cache_teacher" in message and says in message
    assert {path: path.read_bytes() for path in cache.iterdir()} == before
    assert not (tmp_path / "out" / "arguments.yaml").exists()


def test_teachers_count_by_their_weights(tmp_path, capsys, small_data, small, model, teacher):  # noqa: F811
    """In what is kept, and learnt; other weights are another teacher's."""
    other, out, cache = tmp_path / "other", tmp_path / "out", tmp_path / "cache"
    run(task_name="classification", data_dir=small_data, model_name_or_path=model, output_dir=other, max_steps=1)
    answers = {}
    for name, taught, changes in (
        ("one", teacher, {}),
        ("another", other, {}),
        ("both", f"{teacher}, {other}", {"teacher_weights": "[3, 1]"}),
    ):
        distil(out / name, small_data, small, taught, cache / name, max_steps=1, **changes)
        answers[name] = np.load(cache / name / "logits-000000000.npy")
    expected = np.average([answers["one"], answers["another"]], axis=0, weights=[3, 1])
    np.testing.assert_allclose(answers["both"], expected, atol=1e-5)
    for weights in ({}, {"teacher_weights": "[1, 3]"}):
        more = cached_options(out / "more", small_data, small, f"{teacher}, {other}", cache / "both", **weights)
        assert "teachers was weights" in fails(capsys, **more)


def test_labels_alone_are_learnt_as_without_teachers(tmp_path, small_data, small, teacher):  # noqa: F811
    taught = {"teacher_model_name_or_path": f"[{teacher}, {teacher}]", "kd_weight": 0, "hard_label_weight": 1}
    common = {"task_name": "classification", "data_dir": small_data, "model_name_or_path": small, "max_steps": 2}
    for name, changes in (("plain", {}), ("taught", taught)):
        run(output_dir=tmp_path / name, **common, **changes)
    plain, learnt = (read_weights(tmp_path / name) for name in ("plain", "taught"))
    for name, array in plain.items():
        np.testing.assert_allclose(learnt[name], array, atol=1e-6)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def kept(tmp_path_factory, small_data, small, teacher):  # noqa: F811
    """A whole cache."""
    folder = tmp_path_factory.mktemp("kept")
    distil(folder / "out", small_data, small, teacher, folder / "cache", max_steps=1)
    return folder / "cache"


@pytest.mark.slow
@BOTH
def test_two_processes_fill_one_cache(tmp_path, small_data, small, teacher, name):  # noqa: F811
    more = {"backend": name, "adam_epsilon": 1e-4, "unlabelled": small_data / "classification" / "test.json"}
    distil(tmp_path / "1", small_data, small, teacher, tmp_path / "one", **more)
    arguments = cached_options(tmp_path / "2", small_data, small, teacher, tmp_path / "two", **more)
    command = [sys.executable, "-m", *launcher(name, tmp_path / "logs"), str(ROOT / "finetuning" / "__main__.py")]
    done = subprocess.run(
        [*command, *options(**arguments)],
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answers = [np.load(tmp_path / folder / "logits-000000000.npy") for folder in ("one", "two")]
    np.testing.assert_allclose(*answers, atol=1e-5)
    same_files(tmp_path / "1", tmp_path / "2", 2e-5)


STUDENTS = {
    "textbrewer_logits": (3, 768, 12),
    "textbrewer_t6": (6, 768, 12),
    "textbrewer_t3": (3, 768, 12),
    "textbrewer_t3_small": (3, 384, 12),
    "textbrewer_t4_tiny": (4, 312, 12),
    "textbrewer_t12_nano": (12, 256, 4),
    "tinybert_task": (4, 312, 12),
}
"""Recipe -> layers, hidden size and attention heads of the student that it was published for."""


@pytest.mark.parametrize("recipe", STUDENTS)
def test_recipes_fit_the_students_that_they_were_published_for(recipe):
    """Beside a task's, of a base teacher; they have lines for a student's last states."""

    def shape(layers, hidden, heads):
        sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
        return Shape.of({**TINY, **sizes})

    beside = ["--recipe", "tnews", "--recipe", recipe, "--teacher_model_name_or_path", "t", "--model_name_or_path", "m"]
    arguments = parse(beside)
    assert arguments.task_name == "tnews" and arguments.kd_weight == 1
    models = Models(shape(12, 768, 12), shape(*STUDENTS[recipe]), arguments.learning_rate)
    stages = [lines for lines in (arguments.intermediate.matches, arguments.matches) if lines is not None]
    assert len(stages) == (recipe != "textbrewer_logits")
    for lines in stages:
        wanted, of_student = wanted_of(matches_of(lines, models))
        assert max(wanted.states) == 12 and max(of_student.states) == STUDENTS[recipe][0]
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*STUDENTS, *TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_recipes_of_tasks_are_accepted(task):
    assert parse(["--recipe", task, "--model_name_or_path", "m"]).task_name == task
