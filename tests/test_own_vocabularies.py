"""Teachers whose vocabulary is not the student's: each reads a text in its own tokens."""

import json
import shutil
import subprocess
import sys

import numpy as np
import oracle
import pytest
from conftest import ROOT, TINY, environment, make_batch
from test_finetuning import BOTH, fails, metrics, options, run, same_files, small_data  # noqa: F401, a fixture
from test_finetuning import model as model  # a fixture
from test_losses import leaves
from test_relations import gradients
from test_scale import DEMO, models  # noqa: F401, a fixture
from test_scale import options as distil_options
from test_teachers import small, teacher  # noqa: F401, fixtures
from two_processes import launcher

from backends.interface import Captured, Wanted
from backends.pretrained import read_safetensors, read_weights, write_model
from backends.shape import Shape
from general_distill.__main__ import main as distil
from objectives.distillation import Distillation, StatesMatch
from objectives.teachers import ForeignTeacher
from text.prepare.pipeline import PrepareArguments, prepare
from text.prepare.workers import on_this_machine
from text.tokenizer import WordPiece

RELATIONS = {"num_relation_heads": 8, "teacher_layer_index": 2, "student_layer_index": 2}
PKD = {"of": "states", "loss": "pkd", "teacher": [1, 3], "student": [1, 2], "project": "linear"}


def in_another_order(folder, source, head):
    """A model that says the same of a text, by tokens with other numbers, among more that no text has."""
    tokens, weights = WordPiece.from_model(source).tokens, read_weights(source)
    random = np.random.default_rng(7)
    order = [0, *(1 + random.permutation(len(tokens) - 1)).tolist()]
    name, more = "embeddings.word_embeddings.weight", [f"[more{number}]" for number in range(20)]
    rows = random.standard_normal((len(more), weights[name].shape[1])).astype(np.float32)
    weights[name] = np.concatenate([weights[name][order], rows])
    config = {**json.loads((source / "config.json").read_text()), "vocab_size": len(weights[name])}
    folder.mkdir()
    WordPiece([*(tokens[number] for number in order), *more]).save(folder, config["max_position_embeddings"])
    write_model(folder, config, weights, head)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, teacher):  # noqa: F811
    return in_another_order(tmp_path_factory.mktemp("foreign") / "model", teacher, "sequence_classification")


@pytest.fixture(scope="module")
def foreign_of_corpus(tmp_path_factory, models):  # noqa: F811
    return in_another_order(tmp_path_factory.mktemp("foreign") / "model", models / "teacher", None)


def test_first_tokens_are_compared_of_sequences_of_other_lengths(backend):
    """Value and gradient of PKD against float64 NumPy."""
    backend.seed(3)
    model = backend.model(TINY)  # noqa: F811
    own, of_student = make_batch([4, 9, 2, 6]), make_batch([7, 3, 5, 2], seed=1)
    states = np.random.default_rng(2).standard_normal((of_student.tokens, TINY["hidden_size"])).astype(np.float32)
    [leaf] = leaves(backend, states)

    class Given:
        shape = Shape.of(TINY)

        def run(self, batch, wanted):
            return Captured({2: leaf}, {}, None)

    taught = ForeignTeacher(backend, model, lambda batch: batch.of_teacher)
    batch = of_student._replace(of_teacher=own)
    for seen in (batch, batch.shortest_first()):
        assert seen.of_teacher.attention_mask.sum(1).tolist() == [
            {7: 4, 3: 9, 5: 2, 2: 6}[length] for length in seen.attention_mask.sum(1)
        ]
    loss, _ = Distillation(backend, taught, Given(), [StatesMatch((3,), (2,), "pkd")])(batch)

    of_teacher, _ = oracle.bert(model.weights(), model.shape, own)
    firsts = of_teacher[3].reshape(*own.input_ids.shape, -1)[:, 0]
    lengths = [7, 3, 5, 2]
    starts = np.cumsum(lengths) - lengths
    in_students_tokens = np.zeros_like(states, np.float64)
    in_students_tokens[starts] = firsts

    def value(x):
        return oracle.states_loss("pkd", [in_students_tokens], [x], lengths)

    assert loss.item() == pytest.approx(value(states.astype(np.float64)), rel=1e-4)
    [expected] = oracle.numeric_gradients(value, [states])
    [got] = gradients(backend, loss, [leaf])
    np.testing.assert_allclose(backend.numpy(got), expected, atol=2e-5)
    with pytest.raises(ValueError, match="no attention or tokens in common"):
        taught.run(batch, Wanted(qkv=[0]))


def settings_of(output, data, student, taught, **changes):
    return {
        "task_name": "classification", "data_dir": data, "model_name_or_path": student, "output_dir": output,
        "teacher_model_name_or_path": f"[{taught}]", "max_steps": 8, "save_steps": 4, "max_seq_length": 24,
        "hard_label_weight": 0.5, "unlabelled": data / "classification" / "test.json", **changes,
    }  # fmt: skip


@BOTH
def test_a_task_is_learnt_as_from_one_that_shares_the_vocabulary(
    tmp_path,
    small_data,  # noqa: F811
    small,  # noqa: F811
    teacher,  # noqa: F811
    foreign,
    name,
):
    """Logits, labels and [CLS] states, of text without labels too; stopped, it goes on to the same bits."""
    more = {"backend": name, "matches": json.dumps([PKD]), "keep_checkpoints": 2}
    for side, taught in (("shared", teacher), ("own", foreign)):
        run(**settings_of(tmp_path / side, small_data, small, taught, **more))
    same_files(tmp_path / "own", tmp_path / "shared", 1e-6)
    assert {"logits/ce", "labels", "states/pkd/1-1", "states/pkd/3-2"} <= metrics(tmp_path / "own")[-2].keys()
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "own", resumed)
    shutil.rmtree(resumed / "checkpoint-8")
    run(**settings_of(resumed, small_data, small, foreign, **more), resume=True)
    same_files(resumed, tmp_path / "own", 0)


@BOTH
def test_several_teachers_have_a_vocabulary_each(
    tmp_path,
    capsys,
    small_data,  # noqa: F811
    small,  # noqa: F811
    teacher,  # noqa: F811
    foreign,
    name,
):
    """Their answers are kept too, of what each reads."""
    cache = tmp_path / "cache"
    sides = {"shared": (teacher, teacher, None), "own": (teacher, foreign, None), "kept": (teacher, foreign, cache)}
    for side, (one, other, folder) in sides.items():
        more = {"backend": name, **({} if folder is None else {"cache_teacher": folder})}
        run(**settings_of(tmp_path / side, small_data, small, f"{one}, {other}", teacher_weights="[3, 1]", **more))
    for side in ("own", "kept"):
        same_files(tmp_path / side, tmp_path / "shared", 1e-5)
    capsys.readouterr()
    changed = {"teacher_weights": "[3, 1]", "cache_teacher": cache, "teacher_max_seq_length": 12, "backend": name}
    message = fails(capsys, **settings_of(tmp_path / "short", small_data, small, f"{teacher}, {foreign}", **changed))
    assert "text was 309 sequences" in message and "give another folder" in message


def test_of_labelling_the_first_tokens_alone_are_compared(
    tmp_path,
    capsys,
    torch_backend,
    small_data,  # noqa: F811
    small,  # noqa: F811
    model,  # noqa: F811
):
    taught = tmp_path / "taught"
    shutil.copytree(model, taught)
    config = {**json.loads((model / "config.json").read_text()), "id2label": dict(enumerate(("B-PER", "I-PER", "O")))}
    config["label2id"] = {label: number for number, label in config["id2label"].items()}
    torch_backend.seed(4)
    labelling = torch_backend.model(config, read_weights(model), "token_classification")
    write_model(taught, config, labelling.weights(), "token_classification")
    foreign = in_another_order(tmp_path / "foreign", taught, "token_classification")  # noqa: F811
    more = {
        "task_name": "labelling",
        "matches": json.dumps([PKD]),
        "unlabelled": small_data / "labelling" / "test.json",
    }
    message = fails(capsys, **settings_of(tmp_path / "refused", small_data, small, foreign, **more))
    assert "and logits/ce compares token by token; give --kd_weight 0, labels or {of: states, loss: pkd}" in message
    for side, source in (("shared", taught), ("own", foreign)):
        run(**settings_of(tmp_path / side, small_data, small, source, kd_weight=0, **more))
    same_files(tmp_path / "own", tmp_path / "shared", 1e-6)


@pytest.mark.slow
@BOTH
def test_two_processes_learn_what_one_learns(tmp_path, small_data, small, foreign, name):  # noqa: F811
    more = {"backend": name, "adam_epsilon": 1e-4, "matches": json.dumps([PKD])}
    run(**settings_of(tmp_path / "1", small_data, small, foreign, **more))
    arguments = settings_of(tmp_path / "2", small_data, small, foreign, **more)
    command = [sys.executable, "-m", *launcher(name, tmp_path / "logs"), str(ROOT / "finetuning" / "__main__.py")]
    done = subprocess.run(
        [*command, *options(**arguments)],
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    same_files(tmp_path / "1", tmp_path / "2", 2e-5)


def distillation_of(models, output, name, taught, **changes):  # noqa: F811
    lines = [{"of": "states", "loss": "pkd", "teacher": [1, 3], "student": [1, 3]}]
    settings = {"matches": json.dumps(lines), "teacher_model_name_or_path": taught, "batch_size": 16, **changes}
    words = distil_options(models, output, name, **settings)
    return [word for word in words if word.removeprefix("--").split("=")[0] not in (*RELATIONS, "alpha", "beta")]


@BOTH
def test_text_is_learnt_as_from_one_that_shares_the_vocabulary(tmp_path, models, foreign_of_corpus, name):  # noqa: F811
    """On held-out text too; stopped, it goes on to the same bits."""
    for side, taught in (("shared", models / "teacher"), ("own", foreign_of_corpus)):
        assert distil(distillation_of(models, tmp_path / side, name, taught, eval_dir=DEMO)) == 0
    shared, own = (read_safetensors(tmp_path / side / "model.safetensors") for side in ("shared", "own"))
    for key, array in shared.items():
        np.testing.assert_allclose(own[key], array, atol=1e-6, err_msg=key)
    results = [json.loads((tmp_path / side / "eval_results.json").read_text()) for side in ("shared", "own")]
    assert results[1]["after"] == pytest.approx(results[0]["after"], rel=1e-5)
    assert results[1]["after"]["loss"] < results[1]["before"]["loss"]
    assert WordPiece.from_model(tmp_path / "own").tokens == WordPiece.from_model(models / "student").tokens
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "own", resumed)
    shutil.rmtree(resumed / "checkpoint-10")
    (resumed / "README.md").unlink()
    words = distillation_of(models, resumed, name, foreign_of_corpus, eval_dir=DEMO)
    assert distil([*words, "--resume"]) == 0
    again = read_safetensors(resumed / "model.safetensors")
    assert all(np.array_equal(own[key], array) for key, array in again.items())


def test_words_are_learnt_beside_a_teacher_that_has_no_head(tmp_path, capsys, models, foreign_of_corpus):  # noqa: F811
    """And the length of what it reads is its own."""
    lines = [{"of": "states", "loss": "pkd", "teacher": 3, "student": 3}, {"of": "labels"}]
    changes = {"matches": json.dumps(lines), "teacher_max_seq_length": 12, "max_steps": 2}
    assert distil(distillation_of(models, tmp_path / "out", "torch", foreign_of_corpus, **changes)) == 0
    assert {"states/pkd/3-3", "labels"} <= metrics(tmp_path / "out")[-1].keys()
    assert "reads its own tokens of each line, at most 12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"matches": "[{of: states}]"}, "and states/mse/0-0 compares token by token; give --matches of {of: states"),
        ({"matches": "[{of: attention}]"}, "and attention/mse/0-0 compares token by token"),
        ({"matches": "[{of: logits}]"}, "and logits/ce compares token by token"),
        ({"matches": None, **RELATIONS}, "and relations/2-2 compares token by token"),
        ({"teacher_max_seq_length": 65}, "--teacher_max_seq_length 65: the teacher has 64 positions"),
        ({"teacher_max_seq_length": 2}, "--teacher_max_seq_length 2: must be at least 3"),
        ({"input_dir": "prepared"}, "has tokens, and the teacher's vocabulary is not the student's; give the text"),
        ({"teacher_model_name_or_path": "teacher", "teacher_max_seq_length": 9}, "has no effect on a teacher that"),
        ({"teacher_model_name_or_path": None}, "its vocabulary is not that of the teacher, which is pretrained; give"),
    ],
)  # fmt: skip
def test_what_cannot_be_distilled_is_refused(tmp_path, capsys, models, foreign_of_corpus, changes, says):  # noqa: F811
    changes = {**changes}
    if changes.get("input_dir"):
        changes["input_dir"] = tmp_path / "prepared"
        words = {"input": [str(DEMO)], "output": str(changes["input_dir"]), "vocab": str(models / "student")}
        prepare(PrepareArguments(**words), on_this_machine(1), lambda *_: None)
    taught = changes.pop("teacher_model_name_or_path", foreign_of_corpus)
    words = distillation_of(models, tmp_path / "out", "torch", models / "teacher" if taught == "teacher" else taught)
    given = {word.split("=")[0]: word for word in words}
    given |= {f"--{key}": f"--{key}={value}" for key, value in changes.items()}
    absent = [f"--{key}" for key, value in changes.items() if value is None]
    if taught is None:
        absent.append("--teacher_model_name_or_path")
        given["--pretrain.vocab_file"] = f"--pretrain.vocab_file={foreign_of_corpus / 'vocab.txt'}"
    assert distil([word for option, word in given.items() if option not in absent]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and says in message
    assert not (tmp_path / "out" / "arguments.yaml").exists()
