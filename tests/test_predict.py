"""Answers to files of texts: in order, whatever stops the run."""

import json

import pytest
from conftest import CHARACTERS, model_folder

from backends.interface import InputError
from export import predict as program
from export.convert import OnnxArguments, export
from export.model import OnnxModel
from export.predict import PredictArguments, predict
from text.tasks import Example, Question, Sentence


def exported(folder, head="sequence_classification", **options):
    file = folder / f"{head}.onnx"
    return export(OnnxArguments(str(model_folder(folder / head, head)), str(file), **options))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("predict"))


def run(model, texts, **options):
    output = predict(PredictArguments(model=str(model), texts=str(texts), **options))
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def many(path, count):
    lines = [CHARACTERS[i % 19 :] * (i % 3) + CHARACTERS[: i % 7] for i in range(count)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return lines


def test_every_line_is_answered_in_order(tmp_path, classifier, monkeypatch):
    """Each line, empty ones too, as the model answers it alone; the last line has no end."""
    monkeypatch.setattr(program, "BLOCK", 16)
    lines = [*many(tmp_path / "texts.txt", 100), "一\u2028二\x85三"]
    with (tmp_path / "texts.txt").open("a", encoding="utf-8") as file:
        file.write(lines[-1])
    found = run(classifier, tmp_path / "texts.txt")
    model = OnnxModel(classifier)
    assert len({row["label"] for row in found}) > 1
    for number, line in enumerate(lines):
        [alone] = model.answers([Example(number, line, None, None)])
        assert found[number]["id"] == number and found[number]["label"] == alone["label"]
        assert found[number]["probability"] == pytest.approx(alone["probability"], abs=1e-5)


@pytest.mark.parametrize("tokenizer", ["none", "in-graph"])
def test_pairs_are_split_at_the_tab(tmp_path, tokenizer):
    model = exported(tmp_path, tokenizer=tokenizer, pairs=tokenizer == "in-graph")
    (tmp_path / "texts.txt").write_text("一二\t三四\n天气\t好\n")
    rows = [{"text": "一二", "text_pair": "三四"}, {"text": "天气", "text_pair": "好"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(model, tmp_path / "texts.txt", pairs=tokenizer == "none")
    assert found == run(model, tmp_path / "rows.jsonl")
    singles = [Example(i, row["text"], None, None) for i, row in enumerate(rows)]
    if tokenizer == "none":
        assert found != OnnxModel(model).answers(singles)
    (tmp_path / "bad.txt").write_text("一二\t三四\n天气\n")
    with pytest.raises(InputError, match="bad.txt:2: expected two texts with a tab between them, found 1"):
        run(model, tmp_path / "bad.txt", pairs=True)


def test_other_heads_answer_too(tmp_path):
    labelling, reading = (exported(tmp_path, head) for head in ("token_classification", "question_answering"))
    (tmp_path / "texts.txt").write_text("今天 天气\n")
    tags = OnnxModel(labelling).answers([Sentence(0, tuple("今天天气"), None)])
    assert run(labelling, tmp_path / "texts.txt") == tags
    (tmp_path / "tokens.jsonl").write_text(json.dumps({"tokens": list("今天天气")}) + "\n")
    assert run(labelling, tmp_path / "tokens.jsonl") == tags
    context = CHARACTERS * 8  # more than one window
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "天气", "context": context}) + "\n")
    found = run(reading, tmp_path / "questions.jsonl")
    assert found == OnnxModel(reading).answers([Question(0, "天气", context, (), None)])
    assert found[0]["answer"] and found[0]["answer"] in context
    with pytest.raises(InputError, match="texts.txt: .*answers questions"):
        run(reading, tmp_path / "texts.txt")


def test_stopped_run_goes_on(tmp_path, classifier, monkeypatch):
    """Stopped after two blocks and in the middle of a line, it ends with the bytes of a run that was not."""
    monkeypatch.setattr(program, "BLOCK", 16)
    texts = tmp_path / "texts.txt"
    many(texts, 70)
    run(classifier, texts, output=str(tmp_path / "whole.jsonl"))
    answered = []
    answers = OnnxModel.answers

    def stop(self, examples):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(len(examples))
        return answers(self, examples)

    output = tmp_path / "texts.answers.jsonl"
    monkeypatch.setattr(OnnxModel, "answers", stop)
    with pytest.raises(KeyboardInterrupt):
        run(classifier, texts)
    assert not output.exists()
    with (tmp_path / "texts.answers.jsonl.part").open("ab") as part:
        part.write(b'{"id": 32, "lab')
    with pytest.raises(InputError, match="half done .*--resume goes on"):
        run(classifier, texts)
    other = tmp_path / "other.txt"
    many(other, 71)
    with pytest.raises(InputError, match="begun with other texts; --overwrite starts anew"):
        run(classifier, other, output=str(output), resume=True)
    answered.clear()
    monkeypatch.setattr(OnnxModel, "answers", lambda self, some: answered.append(len(some)) or answers(self, some))
    run(classifier, texts, resume=True)
    assert answered == [16, 16, 6]
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("texts.answers*")) == [output.name]
    with pytest.raises(InputError, match="is there already; give another, or --overwrite"):
        run(classifier, texts)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xe4\xb8\x80\n\xe4\xb8\n", "texts.txt:2: not UTF-8 at byte 0"),
        (b"a" * (program.LONGEST + 1), "texts.txt:1: longer than"),
    ],
)
def test_bad_lines_are_named(tmp_path, classifier, content, message):
    (tmp_path / "texts.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        run(classifier, tmp_path / "texts.txt")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("3", "expected an object with text"),
        ('{"txt": "a"}', "'txt': unknown; there are text, text_pair"),
        ("{}", "text: missing"),
        ('{"text": 3}', "text: expected a string"),
        ('{"text": "\\ud800"}', "text: holds half a surrogate pair at character 0"),
    ],
)
def test_bad_objects_are_named(tmp_path, classifier, line, message):
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(InputError, match=f"rows.jsonl:2: {message}"):
        run(classifier, tmp_path / "rows.jsonl")


def test_nested_lines_are_named(tmp_path, classifier):
    (tmp_path / "rows.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match="rows.jsonl:1: JSON nested too deep"):
        run(classifier, tmp_path / "rows.jsonl")


def test_a_run_that_answered_nothing_leaves_nothing(tmp_path, classifier):
    texts = tmp_path / "rows.jsonl"
    texts.write_text('{"text": 3}\n')
    with pytest.raises(InputError, match="text: expected a string"):
        run(classifier, texts)
    assert [path.name for path in tmp_path.iterdir()] == [texts.name]
    texts.write_text('{"text": "a"}\n')
    assert len(run(classifier, texts)) == 1
    (tmp_path / "none.txt").write_text("")
    assert run(classifier, tmp_path / "none.txt") == []


def test_what_is_read_is_not_written_over(tmp_path, classifier):
    texts = tmp_path / "texts.txt"
    many(texts, 3)
    for output in (texts, classifier):
        before = output.read_bytes()
        with pytest.raises(InputError, match=f"--output {output}: is read here; give another file"):
            run(classifier, texts, output=str(output), overwrite=True)
        assert output.read_bytes() == before
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        run(classifier, texts, output=str(tmp_path))


def test_pairs_are_not_taken_for_texts(tmp_path, classifier):
    (tmp_path / "texts.txt").write_text("一二\t三四\n天气\t好\n")
    with pytest.raises(InputError, match="every line holds a tab; give --pairs"):
        run(classifier, tmp_path / "texts.txt")
    (tmp_path / "texts.txt").write_text("一二\t三四\n天气\n")
    assert len(run(classifier, tmp_path / "texts.txt")) == 2


def test_two_runs_do_not_write_one_file(tmp_path, classifier, monkeypatch):
    many(tmp_path / "texts.txt", 3)
    answers = OnnxModel.answers

    def meanwhile(self, examples):
        monkeypatch.setattr(OnnxModel, "answers", answers)
        with pytest.raises(InputError, match="another run is writing it"):
            run(classifier, tmp_path / "texts.txt", resume=True)
        return answers(self, examples)

    monkeypatch.setattr(OnnxModel, "answers", meanwhile)
    assert len(run(classifier, tmp_path / "texts.txt")) == 3


def test_encoder_answers_nothing(tmp_path):
    file = export(OnnxArguments(str(model_folder(tmp_path / "model", None)), str(tmp_path / "encoder.onnx")))
    many(tmp_path / "texts.txt", 3)
    with pytest.raises(InputError, match="encoder.onnx: an encoder without a head answers nothing"):
        run(file, tmp_path / "texts.txt")
