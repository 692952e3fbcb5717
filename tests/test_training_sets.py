"""Training sets with text without labels, or with variants: what is read, what a student learns, what is refused."""

import json
import shutil

import numpy as np
import pytest
from test_finetuning import (  # noqa: F401, small_data and model are fixtures
    BOTH,
    fails,
    model,
    rows,
    run,
    same_files,
    small_data,
    write_lines,
)
from test_teachers import small, teacher  # noqa: F401, fixtures

from backends.files import InputError
from text.data import Example, Question, Sentence, read_unlabelled
from text.tasks import find_task


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("task", "files", "expected"),
    [
        ("tnews", {"a.txt": "一 二\n\n 三\r\n"}, [Example(0, "一 二", None, None), Example(1, "三", None, None)]),
        ("ocnli", {"a": "一\t二\n"}, [Example(0, "一", "二", None)]),
        ("tnews", {"a.json": '{"sentence": "一", "label": "no class"}'}, [Example(0, "一", None, None)]),
        ("lcqmc", {"a.tsv": "一\t二\t1\n三\t四\n"}, [Example(0, "一", "二", None), Example(1, "三", "四", None)]),
        ("csl", {"a.jsonl": '{"id": 7, "keyword": ["一", "二"], "abst": "三"}'}, [Example(7, "一 二", "三", None)]),
        ("cmrc2018", {"a.json": '{"context": "一二", "question": "三", "answers": ["没"]}'},
         [Question(0, "三", "一二", (), None)]),
        ("msra_ner", {"a.txt": "一 二三\n"}, [Sentence(0, ("一", "二", "三"), None)]),
        ("msra_ner", {"a.json": '{"tokens": ["ab", "c"], "tags": ["O", "O"]}'}, [Sentence(0, ("ab", "c"), None)]),
        ("tnews", {"b.txt": "二\n", "a.json": '{"sentence": "一"}', ".hidden": "三"},
         [Example(0, "一", None, None), Example(0, "二", None, None)]),
    ],
)  # fmt: skip
def test_what_is_read(tmp_path, task, files, expected):
    for name, content in files.items():
        path = written(tmp_path / "texts" / name, content)
    data = read_unlabelled(find_task(task), path if len(files) == 1 else path.parent)
    assert (data.examples, data.unlabelled, data.bad) == (expected, 0, [])


@pytest.mark.parametrize(
    ("task", "content", "says"),
    [
        ("ocnli", "一\t二\n三\n", "text.txt:2: 1 columns, expected 2, a tab between: sentence1, sentence2 (1 of 2"),
        ("ocnli", "一\t\n", "text.txt:1: sentence2 is empty"),
        ("tnews", "\n \n", "no example in it; expected a text a line, or a JSON object on each line"),
        ("tnews", b"\xff\n", "not UTF-8"),
        ("tnews", None, "--unlabelled {path}: no such file or folder; give one with texts of tnews"),
        ("csl", "一\n", "--unlabelled {path}: plain text has not all that csl needs; give JSON lines, .json"),
        ("reading", "一\n", "plain text has not all that reading needs"),
    ],
)
def test_what_cannot_be_read(tmp_path, task, content, says):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as error:
        read_unlabelled(find_task(task), path)
    assert says.format(path=path) in str(error.value)


@pytest.fixture(scope="module")
def few(tmp_path_factory, small_data):  # noqa: F811
    """Eight labelled examples, and the texts of the others."""
    folder = tmp_path_factory.mktemp("few")
    labelled, dev = (rows(small_data / "classification" / f"{split}.json") for split in ("train", "dev"))
    write_lines(folder / "train.json", labelled[:8])
    write_lines(folder / "dev.json", dev)
    written(folder / "unlabelled.txt", "".join(f"{row['text']}\n" for row in labelled[8:]))
    return folder


def settings(few, student, taught, output, **changes):
    return {
        "task_name": "classification", "data_dir": few, "model_name_or_path": student, "output_dir": output,
        "teacher_model_name_or_path": f"[{taught}]", "unlabelled": few / "unlabelled.txt", **changes,
    }  # fmt: skip


@pytest.mark.slow
@BOTH
def test_a_student_learns_from_text_without_labels(tmp_path, few, small, teacher, name):  # noqa: F811
    """Eight texts are not enough to tell the classes; what the teacher says of the others is."""
    accuracy = {}
    for unlabelled in (None, few / "unlabelled.txt"):
        output = tmp_path / str(unlabelled is None)
        changes = {"backend": name, "hard_label_weight": 0.5, "max_steps": 120, "save_steps": 30}
        given = settings(few, small, teacher, output, **changes, unlabelled=unlabelled)
        run(**{key: value for key, value in given.items() if value is not None})
        accuracy[unlabelled is None] = json.loads((output / "eval_results.json").read_text())["dev"]["accuracy"]
    assert accuracy[False] >= 90 > 80 > accuracy[True]


@BOTH
def test_a_stopped_run_goes_on_with_the_same_texts(tmp_path, capsys, few, small, teacher, name):  # noqa: F811
    """To the same bits, the teacher's answers kept, wherever the texts are; others are refused."""
    changes = {
        "backend": name, "max_steps": 6, "save_steps": 3, "hard_label_weight": 0.5, "max_seq_length": 24,
        "keep_checkpoints": 2, "cache_teacher": tmp_path / "cache",
    }  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(**settings(few, small, teacher, whole, **changes))
    assert np.load(tmp_path / "cache" / "logits-000000000.npy").shape == (300, 2)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-6")
    texts = (few / "unlabelled.txt").read_text(encoding="utf-8")
    moved = written(tmp_path / "moved" / "texts.txt", texts)
    run(**settings(few, small, teacher, resumed, **changes, unlabelled=moved.parent, resume=True))
    assert "goes on after step 3" in capsys.readouterr().err
    same_files(whole, resumed, 0)
    written(moved, texts[1:])
    message = fails(capsys, **settings(few, small, teacher, resumed, **changes, unlabelled=moved, resume=True))
    assert "read something else (unlabelled was '292 examples, sha256" in message
    message = fails(capsys, **settings(few, small, teacher, resumed, **changes, unlabelled=resumed, overwrite=True))
    assert f"--unlabelled {resumed}: lies in --output_dir" in message


@pytest.mark.parametrize(("kind", "right"), [("reading", "answers"), ("labelling", "tags")])
def test_every_kind_learns_without_labels(tmp_path, capsys, small_data, small, model, kind, right):  # noqa: F811
    """If the texts have labels, nothing comes of them."""
    taught, common = tmp_path / "teacher", {"task_name": kind, "data_dir": small_data}
    run(**common, model_name_or_path=model, output_dir=taught, max_steps=2, save_steps=2)
    texts = rows(small_data / kind / "train.json")[:60]
    for name in ("labelled", "bare"):
        write_lines(tmp_path / f"{name}.json", texts)
        run(
            **common, model_name_or_path=small, output_dir=tmp_path / name, unlabelled=tmp_path / f"{name}.json",
            teacher_model_name_or_path=f"[{taught}]", hard_label_weight=1, max_steps=6, save_steps=3,
        )  # fmt: skip
        texts = [{key: value for key, value in row.items() if key != right} for row in texts]
    same_files(tmp_path / "labelled", tmp_path / "bare", 0)
    assert f"unlabelled: {tmp_path}/bare.json, 60 examples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher_model_name_or_path": None}, "has no effect without --teacher_model_name_or_path"),
        ({"kd_weight": 0, "hard_label_weight": 1}, "unlabelled.txt: nothing but labels is learnt; give --kd_weight"),
        ({"kd_weight": 0, "matches": "[{of: labels}]"}, "unlabelled.txt: nothing but labels is learnt"),
        ({"unlabelled": "nowhere"}, "--unlabelled nowhere: no such file or folder"),
    ],
)
def test_what_cannot_be_learnt_is_refused(tmp_path, capsys, few, small, teacher, changes, says):  # noqa: F811
    given = settings(few, small, teacher, tmp_path / "out", **changes)
    assert says in fails(capsys, **{key: value for key, value in given.items() if value is not None})
    assert not (tmp_path / "out").exists()


def test_augmented_rows_stand_in_for_the_training_set(tmp_path, capsys, small_data, small):  # noqa: F811
    """Whose folder need not have one; the dev set is the folder's, and another file is refused when a run goes on."""
    augmented, variants = tmp_path / "augmented.json", rows(small_data / "classification" / "train.json")
    variants += [{**row, "text": row["text"][1:] + row["text"][0]} for row in variants]
    write_lines(augmented, variants)
    write_lines(tmp_path / "whole" / "train.json", variants)
    for name in ("whole", "dev"):
        write_lines(tmp_path / name / "dev.json", rows(small_data / "classification" / "dev.json"))
    common = {"task_name": "classification", "model_name_or_path": small, "max_steps": 4, "save_steps": 2}
    run(**common, data_dir=tmp_path / "whole", output_dir=tmp_path / "1")
    common |= {"data_dir": tmp_path / "dev", "output_dir": tmp_path / "2", "augmented": augmented}
    run(**common)
    assert f"train: {augmented}, 600 examples" in capsys.readouterr().err
    same_files(tmp_path / "1", tmp_path / "2", 0)
    write_lines(augmented, variants[1:])
    message = fails(capsys, **common, resume=True)
    assert "read something else (train was '600 examples" in message
    message = fails(capsys, **{**common, "output_dir": tmp_path / "3", "augmented": "gone.json"})
    assert "--augmented gone.json: no such file; give one that python -m finetuning.augment wrote" in message
    message = fails(capsys, **common, do_train=False, do_eval=True)
    assert f"--augmented {augmented}: has no effect beside --do_train false" in message
