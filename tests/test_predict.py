"""Answers to files of texts: in order, whatever stops the run."""

import json
import threading

import pytest
from conftest import CHARACTERS, model_folder

from backends.files import InputError
from export import predict as program
from export.convert import OnnxArguments, export
from export.examples import LONGEST
from export.model import OnnxModel
from export.predict import PredictArguments, predict
from text.data import Example, Question, Sentence


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
    answers = run(classifier, tmp_path / "texts.txt")
    model = OnnxModel(classifier)
    assert len({row["label"] for row in answers}) > 1
    for number, line in enumerate(lines):
        [alone] = model.answers([Example(number, line, None, None)])
        assert answers[number]["id"] == number and answers[number]["label"] == alone["label"]
        assert answers[number]["probability"] == pytest.approx(alone["probability"], abs=1e-5)


@pytest.mark.parametrize("tokenizer", ["none", "in-graph"])
def test_pairs_are_split_at_the_tab(tmp_path, tokenizer):
    model = exported(tmp_path, tokenizer=tokenizer, pairs=tokenizer == "in-graph")
    (tmp_path / "texts.txt").write_text("一二\t三四\n天气\t好\n")
    rows = [{"text": "一二", "text_pair": "三四"}, {"text": "天气", "text_pair": "好"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = run(model, tmp_path / "texts.txt", pairs=tokenizer == "none")
    assert answers == run(model, tmp_path / "rows.jsonl")
    singles = [Example(i, row["text"], None, None) for i, row in enumerate(rows)]
    if tokenizer == "none":
        assert answers != OnnxModel(model).answers(singles)
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
    answers = run(reading, tmp_path / "questions.jsonl")
    assert answers == OnnxModel(reading).answers([Question(0, "天气", context, (), None)])
    assert answers[0]["answer"] and answers[0]["answer"] in context
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
    record = tmp_path / "texts.answers.jsonl.of"
    before = record.read_bytes()
    record.write_text("[]")
    with pytest.raises(InputError, match="texts.answers.jsonl.of is damaged.*; --overwrite starts anew"):
        run(classifier, texts, resume=True)
    record.write_bytes(before)
    answered.clear()
    monkeypatch.setattr(OnnxModel, "answers", lambda self, texts: answered.append(len(texts)) or answers(self, texts))
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
        (b"a" * (LONGEST + 1), "texts.txt:1: longer than"),
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


def after_two_blocks(monkeypatch, act):
    """Calls `act` once, when two blocks have been answered and a third is about to be."""
    monkeypatch.setattr(program, "BLOCK", 16)
    answers, blocks = OnnxModel.answers, []

    def meanwhile(self, examples):
        blocks.append(len(examples))
        if len(blocks) == 3:
            act()
        return answers(self, examples)

    monkeypatch.setattr(OnnxModel, "answers", meanwhile)


@pytest.mark.parametrize("option", ["overwrite", "resume", None])
def test_two_runs_do_not_write_one_file(tmp_path, classifier, monkeypatch, option):
    """The second is refused and takes nothing from the first, whatever it was told to do."""
    lines = many(tmp_path / "texts.txt", 70)
    many(tmp_path / "other.txt", 5)
    output = tmp_path / "texts.answers.jsonl"
    options = {option: True} if option else {}

    def second():
        before = {path: path.read_bytes() for path in tmp_path.glob("texts.answers*")}
        with pytest.raises(InputError, match="another run is writing it"):
            run(classifier, tmp_path / "other.txt", output=str(output), **options)
        assert {path: path.read_bytes() for path in tmp_path.glob("texts.answers*")} == before

    after_two_blocks(monkeypatch, second)
    answers = run(classifier, tmp_path / "texts.txt")
    assert [row["id"] for row in answers] == list(range(70))
    model = OnnxModel(classifier)
    assert [row["label"] for row in answers] == [
        model.answers([Example(0, line, None, None)])[0]["label"] for line in lines
    ]
    assert sorted(path.name for path in tmp_path.glob("texts.answers*")) == [output.name]


def test_two_runs_begun_at_once(tmp_path, classifier):
    """Of many that begin at once on one file, one at a time writes it, and each that ends well has all its answers."""
    many(tmp_path / "texts.txt", 40)
    output = tmp_path / "out.jsonl"
    ended = []

    def run_alone():
        try:
            run(classifier, tmp_path / "texts.txt", output=str(output), overwrite=True)
            ended.append(True)
        except InputError as error:
            assert "another run is writing it" in str(error)

    threads = [threading.Thread(target=run_alone) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == list(range(40))
    assert [path.name for path in tmp_path.glob("out*")] == [output.name]


def test_an_output_that_came_meanwhile_is_kept(tmp_path, classifier, monkeypatch):
    """A run that waited long for its model finds what another has written since."""
    many(tmp_path / "texts.txt", 3)
    output = tmp_path / "texts.answers.jsonl"
    locked = program.locked

    def late(part):
        output.write_text("answers of another\n")
        return locked(part)

    monkeypatch.setattr(program, "locked", late)
    with pytest.raises(InputError, match="is there already; give another, or --overwrite"):
        run(classifier, tmp_path / "texts.txt")
    assert output.read_text() == "answers of another\n"
    assert [path.name for path in tmp_path.glob("texts.answers*")] == [output.name]


def test_answers_that_are_removed_meanwhile(tmp_path, classifier, monkeypatch):
    many(tmp_path / "texts.txt", 70)
    part = tmp_path / "texts.answers.jsonl.part"
    after_two_blocks(monkeypatch, part.unlink)
    with pytest.raises(InputError, match="answers.jsonl.part: was removed while answers were written to it"):
        run(classifier, tmp_path / "texts.txt")
    assert len(run(classifier, tmp_path / "texts.txt")) == 70


def test_overwriting_replaces_answers_only_with_answers(tmp_path, classifier, monkeypatch):
    """What is there stays until the new file is whole."""
    many(tmp_path / "texts.txt", 70)
    output = tmp_path / "texts.answers.jsonl"
    output.write_text("old\n")

    def stop():
        assert output.read_text() == "old\n"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        after_two_blocks(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            run(classifier, tmp_path / "texts.txt", overwrite=True)
    assert output.read_text() == "old\n"
    assert len(run(classifier, tmp_path / "texts.txt", overwrite=True, resume=True)) == 70


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_byte_order_marks_and_blank_lines(tmp_path, classifier, monkeypatch, ends):
    """JSON lines have an answer for each object, in order; of plain text a blank line is a text. Lines keep their
    numbers, and a run that was stopped goes on."""
    texts = many(tmp_path / "plain.txt", 70)
    expected = run(classifier, tmp_path / "plain.txt")
    lines = [json.dumps({"text": text}) for text in texts]
    for place in (70, 40, 40, 33, 16, 1, 0):
        lines.insert(place, " \t" * (place % 2))
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes("\ufeff".encode() + ends.join(lines).encode())
    assert run(classifier, rows, output=str(tmp_path / "whole.jsonl")) == expected
    whole = (tmp_path / "whole.jsonl").read_bytes()

    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        after_two_blocks(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            run(classifier, rows)
    run(classifier, rows, resume=True)
    assert (tmp_path / "rows.answers.jsonl").read_bytes() == whole
    rows.write_text(f'{ends}{{"text": "a"}}{ends}{ends}{{"text": 1}}', newline="")
    with pytest.raises(InputError, match="rows.jsonl:4: text: expected a string"):
        run(classifier, rows, overwrite=True)
    (tmp_path / "plain.txt").write_bytes("\ufeff天气\n\n".encode())
    assert run(classifier, tmp_path / "plain.txt", overwrite=True) == OnnxModel(classifier).answers(
        [Example(0, "天气", None, None), Example(1, "", None, None)]
    )


def test_csv_is_not_taken_for_lines_of_text(tmp_path, classifier):
    (tmp_path / "texts.csv").write_text("text\n一\n")
    with pytest.raises(InputError, match="texts.csv: CSV is not read here; give JSON lines or a text a line"):
        run(classifier, tmp_path / "texts.csv")
    assert len(run(classifier, tmp_path / "texts.csv", format="text")) == 2


def test_a_model_says_what_it_was_fine_tuned_on(tmp_path):
    """Pairs or single texts; it is asked for nothing else, and need not be told."""
    (tmp_path / "pairs.txt").write_text("一二\t三四\n天气\t好\n")
    (tmp_path / "pairs.jsonl").write_text(
        '{"text": "一二", "text_pair": "三四"}\n{"text": "天气", "text_pair": "好"}\n'
    )
    (tmp_path / "texts.txt").write_text("一二\n天气\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "一二"}\n{"text": "天气"}\n')
    for pairs, accepted, refused in (
        (
            True,
            ("pairs.txt", "pairs.jsonl"),
            {
                "texts.txt": "expected two texts with a tab between them, found 1",
                "texts.jsonl": "text_pair: missing; the model takes pairs of texts",
            },
        ),
        (False, ("texts.txt", "texts.jsonl"), {"pairs.jsonl": "text_pair: the model takes single texts"}),
    ):
        folder = model_folder(tmp_path / str(pairs), takes_pairs=pairs)
        model = export(OnnxArguments(str(folder)))
        assert OnnxModel(model).takes_pairs is pairs
        answers = [run(model, tmp_path / name, output=str(tmp_path / f"{name}.out")) for name in accepted]
        assert answers[0] == answers[1]
        for name, message in refused.items():
            with pytest.raises(InputError, match=f"{name}:1: {message}"):
                run(model, tmp_path / name, output=str(tmp_path / "x"))
    with pytest.raises(InputError, match="pairs.txt:1: text_pair: the model takes single texts"):
        run(model, tmp_path / "pairs.txt", output=str(tmp_path / "x"), pairs=True)
    with pytest.raises(InputError, match="--pairs: the model was fine-tuned on single texts"):
        export(OnnxArguments(str(folder), tokenizer="in-graph", pairs=True))


def test_the_tokenizer_inside_takes_what_the_model_was_fine_tuned_on(tmp_path):
    folder = model_folder(tmp_path / "model", takes_pairs=True)
    assert OnnxModel(export(OnnxArguments(str(folder), tokenizer="in-graph"))).takes_pairs


def test_encoder_answers_nothing(tmp_path):
    file = export(OnnxArguments(str(model_folder(tmp_path / "model", None)), str(tmp_path / "encoder.onnx")))
    many(tmp_path / "texts.txt", 3)
    with pytest.raises(InputError, match="encoder.onnx: an encoder without a head answers nothing"):
        run(file, tmp_path / "texts.txt")
