"""Tasks: their files, how text is built and cut, answers and scores."""

import csv
import itertools
import json
import re
import unicodedata
from dataclasses import replace

import numpy as np
import pytest

from backends.files import InputError
from text.answers import answers, predictions, scores, submission
from text.data import Example, Question, Sentence, read_split, with_labels_of
from text.features import IGNORED, classification_features, cut_pair, labelling_features, reading_features
from text.metrics import classification_scores, labelling_scores, reading_scores
from text.tasks import TASKS, find_task
from text.tokenizer import SPECIAL_TOKENS, WordPiece

CHARACTERS = "甲乙丙丁戊己庚辛壬癸子丑寅卯"
TOKENIZER = WordPiece([*SPECIAL_TOKENS, *CHARACTERS, "a", "##b", "1", ",", "_", "[", "]"])


def write(folder, name, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")


def test_every_task_declares_what_its_kind_needs():
    for task in TASKS.values():
        assert (task.text is not None) == (task.kind == "classification"), task.name
        assert (task.labels is None) == (task.kind == "reading"), task.name
    assert [len(set(TASKS[name].labels)) for name in ("tnews", "iflytek", "ocnli", "afqmc")] == [15, 119, 3, 2]


def test_names_of_classes_are_those_that_are_published(data):
    """TNEWS's in labels.json, iFLYTEK's beside each text."""
    for task, file, name in (("tnews", "labels.json", "label_desc"), ("iflytek", "train.json", "label_des")):
        lines = (data / "clue" / task / file).read_text(encoding="utf-8").split("\n")
        published = {str(row["label"]): row[name] for row in map(json.loads, filter(None, lines))}
        assert {code: TASKS[task].aliases[code] for code in published} == published


def test_answers_have_names_and_submissions_codes(tmp_path):
    task = TASKS["tnews"]
    write(tmp_path, "test.json", {"id": 5, "sentence": "甲", "label": 103})
    examples = read_split(task, tmp_path, "test").examples
    features = classification_features(TOKENIZER, examples, 9)
    predicted = answers(task, examples, features, [np.eye(15)[4]])
    assert predicted[0]["label"] == "news_finance"
    assert predictions(task, examples, predicted) == [{"text": "甲", "right": "news_sports", **predicted[0]}]
    assert submission(task, predicted) == '{"id": 5, "label": "104"}\n'
    # A model of before, whose classes go by their codes
    codes = task.with_labels(sorted(task.aliases))
    assert read_split(codes, tmp_path, "test").examples == examples
    predicted = answers(codes, examples, features, [np.eye(15)[4]])
    assert (predicted[0]["label"], submission(codes, predicted)) == ("104", '{"id": 5, "label": "104"}\n')
    assert task.with_labels(["100", "101"]) is None


@pytest.mark.parametrize("name, near", [("tnew", "tnews"), ("OCNIL", "ocnli"), ("cmrc", "cmrc2018")])
def test_the_nearest_task_is_named(name, near):
    with pytest.raises(InputError, match=f"--task_name {name.lower()}: no such task; did you mean {near}"):
        find_task(name)


@pytest.mark.parametrize("label", ["1", 1, 1.0, " 1 "])
def test_labels_come_as_numbers_and_strings(tmp_path, label):
    write(tmp_path, "dev.json", {"sentence1": "甲", "sentence2": "乙", "label": label, "id": 7})
    assert read_split(TASKS["afqmc"], tmp_path, "dev").examples == [Example(7, "甲", "乙", 1)]


def test_only_newlines_end_lines(tmp_path):
    write(tmp_path, "dev.json", {"sentence": "甲\u2028乙\x85丙", "label": 100}, {"sentence": "丁", "label": 101})
    assert [example.text for example in read_split(TASKS["tnews"], tmp_path, "dev").examples] == [
        "甲\u2028乙\x85丙",
        "丁",
    ]


def test_rows_without_a_label_are_left_out_of_training_but_not_of_a_test_set(tmp_path):
    rows = [{"sentence1": "甲", "sentence2": "乙", "label": label} for label in ("neutral", "-", "entailment")]
    write(tmp_path, "train.json", *rows)
    write(tmp_path, "test.json", *rows)
    data = read_split(TASKS["ocnli"], tmp_path, "train")
    assert ([example.label for example in data.examples], data.unlabelled) == ([2, 0], 1)
    assert [example.label for example in read_split(TASKS["ocnli"], tmp_path, "test").examples] == [2, None, 0]


def winograd(folder, noun, noun_at, pronoun, pronoun_at, text="甲乙丙丁戊"):
    target = {"span1_text": noun, "span1_index": noun_at, "span2_text": pronoun, "span2_index": pronoun_at}
    write(folder, "dev.json", {"text": text, "target": target, "label": "true"})
    return read_split(TASKS["cluewsc2020"], folder, "dev").examples[0].text


@pytest.mark.parametrize(
    "spans, text",
    [
        (("乙", 1, "丁", 3), "甲_乙_丙[丁]戊"),
        (("丁戊", 3, "甲", 0), "[甲]乙丙_丁戊_"),
        (("乙", 1.0, "丙", 2), "甲_乙_[丙]丁戊"),
        (("乙丙丁", 1, "丙", 2), "甲_乙[丙]丁_戊"),  # nested
        (("丙", 2, "乙丙", 1), "甲[乙_丙_]丁戊"),
        (("乙", 1, "乙丙", 1), "甲[_乙_丙]丁戊"),
        (("乙丙", 1, "丙丁", 2), "甲_乙[丙_丁]戊"),  # overlapping
        (("丙丁", 3, "丁", 2), "甲乙_丙[丁]_戊"),  # beside where they are said to be
    ],
)
def test_winograd_spans_are_marked(tmp_path, spans, text):
    assert winograd(tmp_path, *spans) == text
    assert re.sub(r"[_\[\]]", "", text) == "甲乙丙丁戊"


def test_winograd_marks_leave_every_character(tmp_path):
    """Whatever the spans; and they are what is between the marks."""
    text = "甲乙甲乙丙"
    spans = [(i, j) for i in range(5) for j in range(i + 1, 6)]
    for (a, b), (c, d) in itertools.product(spans, spans):
        marked = winograd(tmp_path, text[a:b], a, text[c:d], c, text)
        assert re.sub(r"[_\[\]]", "", marked) == text
        assert re.sub(r"[\[\]]", "", marked).split("_") == [text[:a], text[a:b], text[b:]]
        assert re.split(r"[\[\]]", marked.replace("_", "")) == [text[:c], text[c:d], text[d:]]


@pytest.mark.parametrize("index", [-1, 5, 1.5, True, "1", None, [1]])
def test_winograd_indices_that_are_none(tmp_path, index):
    with pytest.raises(InputError, match=r"dev.json:1: span1_(index|text) "):
        winograd(tmp_path, "乙", index, "丁", 3)
    with pytest.raises(InputError, match="span1_text '癸' is not at span1_index 1 of the text"):
        winograd(tmp_path, "癸", 1, "丁", 3)


def test_keywords_are_joined(tmp_path):
    write(tmp_path, "dev.json", {"abst": "甲乙", "keyword": ["丙", "丁"], "label": "0"})
    assert read_split(TASKS["csl"], tmp_path, "dev").examples == [Example(0, "丙 丁", "甲乙", 0)]


@pytest.mark.parametrize(
    "row, wrong",
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ({"sentence1": "甲", "label": "0"}, "no column sentence2; there are sentence1, label"),
        ({"sentence1": "甲", "sentence2": "乙"}, "no column label"),
        ({"sentence1": "甲", "sentence2": " ", "label": "0"}, "sentence2 is empty"),
        ({"sentence1": "甲", "sentence2": 3, "label": "0"}, "sentence2 is 3, expected a string"),
        ({"sentence1": "甲", "sentence2": "乙", "label": "2"}, "label '2' is none of the 2 of afqmc: 0, 1"),
    ],
)
def test_a_bad_line_is_named_and_left_out_only_on_request(tmp_path, row, wrong):
    good = {"sentence1": "甲", "sentence2": "乙", "label": "1"}
    write(tmp_path, "dev.json", good, row, good)
    with pytest.raises(InputError) as error:
        read_split(TASKS["afqmc"], tmp_path, "dev")
    assert f"{tmp_path / 'dev.json'}:2: {wrong}" in str(error.value)
    assert "(1 of 3 cannot be read; --skip_bad_lines true" in str(error.value)
    data = read_split(TASKS["afqmc"], tmp_path, "dev", skip_bad_lines=True)
    assert (len(data.examples), len(data.bad)) == (2, 1)


def cmrc(folder, split, *questions, context="小镇图书馆建于1952年，由乡民集资修成，1952年开放。"):
    """As CMRC 2018 is published: each question with its answers, (text, start) each."""
    qas = [
        {"id": f"D_0_Q{i}", "question": "何时", "answers": [{"text": a, "answer_start": at} for a, at in answers]}
        for i, answers in enumerate(questions)
    ]
    paragraphs = [{"id": "D_0", "context": context, "qas": qas}]
    content = {"version": "v1.0", "data": [{"title": "t", "id": "D", "paragraphs": paragraphs}]}
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def test_all_three_annotators_count_and_one_that_is_there_is_learnt(tmp_path):
    """As in cmrc2018_evaluate.py: the best of all answers, one that is in no context among them."""
    three = [("在1952年建成", -1), ("1952年", 7), ("建于1952年", 5)]
    for split in ("train", "dev", "test"):
        cmrc(tmp_path, split, three)
        data = read_split(TASKS["cmrc2018"], tmp_path, split)
        [question] = data.examples
        assert (question.answers, question.start) == (("1952年", "在1952年建成", "建于1952年"), 7)
        assert (data.bad, data.absent) == ([], [])
    for answer, _ in three:
        assert scores(TASKS["cmrc2018"], [question], [{"answer": answer}]) == {"f1": 100, "exact_match": 100}


def test_a_question_whose_answers_are_not_there(tmp_path):
    """Counts in a dev set, by name; is not learnt; and stands for nothing in a test set."""
    for split in ("train", "dev", "test"):
        cmrc(tmp_path, split, [("1952年", 7)], [("一九五二年", 7), ("五二年", -1)])
    with pytest.raises(
        InputError, match=r"train.json, question 2 \(D_0_Q1\): none of the answers is in the context: '一"
    ):
        read_split(TASKS["cmrc2018"], tmp_path, "train")
    data = read_split(TASKS["cmrc2018"], tmp_path, "train", skip_bad_lines=True)
    assert ([question.id for question in data.examples], len(data.bad)) == (["D_0_Q0"], 1)
    data = read_split(TASKS["cmrc2018"], tmp_path, "dev")
    assert data.absent == [f"{tmp_path}/dev.json, question 2 (D_0_Q1)"]
    assert [(question.answers, question.start) for question in data.examples] == [
        (("1952年",), 7),
        (("一九五二年", "五二年"), None),
    ]
    predicted = [{"answer": "1952年"}, {"answer": "五二年"}]
    assert scores(TASKS["cmrc2018"], data.examples, predicted)["exact_match"] == 100
    assert [question.answers for question in read_split(TASKS["cmrc2018"], tmp_path, "test").examples] == [
        ("1952年",),
        (),
    ]


@pytest.mark.parametrize(
    ("offset", "start"), [(7, 7), (9, 7), (5, 7), (19, 21), (22, 21), (500, 21), (-1, 7), (None, 7), (21.0, 21)]
)
def test_an_offset_that_is_off_means_the_nearest_place(tmp_path, offset, start):
    cmrc(tmp_path, "train", [("1952年", offset)])
    assert read_split(TASKS["cmrc2018"], tmp_path, "train").examples[0].start == start


@pytest.mark.parametrize(
    ("answers", "wrong"),
    [
        ([], "no answers; a question that has none (SQuAD 2.0's is_impossible) is not learnt"),
        (["", " "], "no answers"),
        (None, "no answers"),
        ("甲", "answers is '甲', expected a list"),
        ([1952], "answer is 1952, expected a string"),
        ([{"text": None}], "answer is None, expected a string"),
        ([{"answer_start": 1}], "no column text"),
        ([{"text": "甲", "answer_start": "0"}], "answer_start is '0', expected a number of characters"),
        ([{"text": "甲", "answer_start": float("nan")}], "answer_start is nan"),
        ([{"text": "甲", "answer_start": True}], "answer_start is True"),
        ({"text": ["甲"], "answer_start": [0, 1]}, "1 answers, but 2 of answer_start"),
    ],
)
def test_answers_that_are_none(tmp_path, answers, wrong):
    row = {"context": "甲乙甲", "question": "丙", "answers": answers}
    write(tmp_path, "dev.json", {**row, "answers": ["甲"]}, row)
    with pytest.raises(InputError, match=re.escape(f"dev.json:2: {wrong}")):
        read_split(TASKS["cmrc2018"], tmp_path, "dev")


def test_first_layout_of_cmrc_and_one_answer_of_the_hub(tmp_path):
    question = {"query_id": "q", "query_text": "丙", "answers": ["癸", "乙"]}
    write(tmp_path, "dev.json", [{"context_id": "c", "context_text": "甲乙甲", "qas": [question]}])
    assert read_split(TASKS["cmrc2018"], tmp_path, "dev").examples == [Question("q", "丙", "甲乙甲", ("乙", "癸"), 1)]
    write(tmp_path, "dev.json", {"context": "甲乙", "question": "丙", "answers": {"text": "乙", "answer_start": 1}})
    assert read_split(TASKS["cmrc2018"], tmp_path, "dev").examples == [Question(0, "丙", "甲乙", ("乙",), 1)]


HALF = "甲\ud83d"


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("classification", {"text": HALF, "label": "b"}),
        ("classification", {"text": "乙", "label": HALF}),
        ("classification", {"id": HALF, "text": "乙", "label": "b"}),
        ("classification", {"text": "乙", "label": "b", HALF: 1}),
        ("classification", {"text": "乙", "label": "b", "source": {"of": [HALF]}}),
        ("reading", {"context": HALF, "question": "乙", "answers": ["甲"]}),
        ("reading", {"context": "甲", "question": HALF, "answers": ["甲"]}),
        ("reading", {"context": "甲", "question": "乙", "answers": ["甲", HALF]}),
        ("labelling", {"tokens": ["甲", HALF], "tags": ["a", "b"]}),
        ("labelling", {"text": "甲乙", "tags": ["a", HALF]}),
    ],
)
def test_half_a_surrogate_pair_is_named(tmp_path, kind, row):
    """In any string of any split, by its line, and before anything is made of it."""
    good = {
        "classification": [{"text": "甲\U0001f600", "label": label} for label in "ab"],
        "reading": [{"context": "甲", "question": "乙", "answers": ["甲"]}] * 2,
        "labelling": [{"text": "甲乙", "tags": ["a", "b"]}] * 2,
    }[kind]
    for split in ("train", "dev", "test"):
        lines = "\n".join(map(json.dumps, [*good, row]))  # which writes them as escapes
        (tmp_path / f"{split}.json").write_text(lines)
    task = with_labels_of(find_task(kind), tmp_path)
    assert task.labels in (None, ("a", "b"))
    for split in ("train", "dev", "test"):
        with pytest.raises(InputError, match=f"{split}.json:3: .*holds half a surrogate pair at character"):
            read_split(task, tmp_path, split)
        assert len(read_split(task, tmp_path, split, skip_bad_lines=True).examples) == 2


def test_half_a_surrogate_pair_in_squads_layout(tmp_path):
    cmrc(tmp_path, "dev", [("1952年", 7)], [("1952年", 7), ("五\udc00", 7)])
    with pytest.raises(InputError, match="dev.json, question 2: text: holds half a surrogate pair at character 1"):
        read_split(TASKS["cmrc2018"], tmp_path, "dev")


@pytest.mark.parametrize("label", ["NaN", "Infinity", "-Infinity", "1e999", "null", "[1]", "{}"])
def test_labels_that_are_none(tmp_path, label):
    lines = [json.dumps({"text": "甲", "label": name}) for name in "ab"]
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.json").write_text("\n".join([*lines, f'{{"text": "乙", "label": {label}}}']))
    task = with_labels_of(find_task("classification"), tmp_path)
    assert task.labels == ("a", "b")
    for split in ("train", "dev"):
        with pytest.raises(InputError, match=f"{split}.json:3: label is .*, expected a string or a number"):
            read_split(task, tmp_path, split)
    assert read_split(task, tmp_path, "test").examples[2].label is None
    (tmp_path / "train.json").write_text(f'{{"text": "甲乙", "tags": ["a", "b"]}}\n{{"text": "乙", "tags": [{label}]}}')
    with pytest.raises(InputError, match="train.json:2: label is "):
        read_split(with_labels_of(find_task("labelling"), tmp_path), tmp_path, "train")


@pytest.mark.parametrize("identity", ["NaN", "[1]", "{}"])
def test_names_of_rows_that_are_none(tmp_path, identity):
    (tmp_path / "dev.json").write_text(f'{{"id": {identity}, "sentence1": "甲", "sentence2": "乙", "label": 0}}')
    with pytest.raises(InputError, match="dev.json:1: id is .*, expected a string or a number"):
        read_split(TASKS["afqmc"], tmp_path, "dev")


def test_only_named_separators_part_lines_and_columns(tmp_path):
    """Not U+2028, U+0085, form feeds, lone carriage returns or ideographic spaces; before "\\n" goes one "\\r"."""
    odd = "\u2028甲\x85乙\x0b\x0c\x1c\u3000"
    (tmp_path / "dev.tsv").write_bytes(f"text_a\tlabel\r\n{odd}\r丙\r\r\t1\r\n\u3000丁\t0\n \t\n".encode())
    texts = [example.text for example in read_split(TASKS["chnsenticorp"], tmp_path, "dev").examples]
    assert texts == [f"{odd}\r丙\r\r", "\u3000丁"]
    for space in (" ", "\t", "  "):
        lines = "".join(
            f"{token}{space}{tag}\r\n" for token, tag in zip("甲\u3000\x85丙", ("B-PER", "O", "O", "I-PER"))
        )
        (tmp_path / "dev.tsv").write_bytes(lines.encode())
        [sentence] = read_split(TASKS["msra_ner"], tmp_path, "dev").examples
        assert (sentence.tokens, sentence.tags) == (tuple("甲\u3000\x85丙"), (0, 6, 6, 1))


@pytest.mark.parametrize("layout", ["json", "tsv", "csv"])
def test_a_byte_order_mark_is_no_text(tmp_path, layout):
    contents = {
        "json": '{"text": "甲", "label": "1"}\n',
        "tsv": "text\tlabel\n甲\t1\n",
        "csv": "text,label\r\n甲,1\r\n",
    }
    (tmp_path / f"dev.{layout}").write_text(contents[layout], encoding="utf-8-sig")
    task = replace(find_task("classification"), labels=("0", "1"))
    assert read_split(task, tmp_path, "dev").examples == [Example(0, "甲", None, 1)]


def test_tables_with_quotes(tmp_path):
    """CSV as RFC 4180 has it, quotes and line ends in cells; in TSV they are text."""
    rows = [["甲,乙", "1"], ['他说"丙"\n\n丁\u2028', "0"], ["", "1"], [" 戊", "0"]]
    with (tmp_path / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows[:2], [], rows[3]])
    task = with_labels_of(find_task("classification"), tmp_path)
    texts = [example.text for example in read_split(task, tmp_path, "train").examples]
    assert texts == [row[0] for row in (*rows[:2], rows[3])]
    write(tmp_path, "dev.tsv", "text\tlabel", '"甲\t1', '乙 "\t0')
    assert [example.text for example in read_split(task, tmp_path, "dev").examples] == ['"甲', '乙 "']
    (tmp_path / "test.csv").write_text("text\n" + "甲" * 200_000)
    assert [len(example.text) for example in read_split(task, tmp_path, "test").examples] == [200_000]


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ('text,label\n"甲\n乙",1\n"丙"丁,0\n', "train.csv:4: not CSV (',' expected after '\"')"),
        ('text,label\n甲,1\n"乙,0\n丙,1\n', "train.csv:3: not CSV (unexpected end of data)"),
        ("text,label\n甲\r乙,1\n丙,0", "train.csv:2: not CSV (carriage return seen in unquoted field)"),
        ("text,label\n甲,乙,1\n丙,0", "train.csv:2: 3 columns, expected 2: text, label"),
        ("text,label,text\n甲,1,丙\n", "train.csv:1: two columns are called 'text'"),
        ("text;label\n甲;1\n", "train.csv: no column label; columns are text;label"),
    ],
)
def test_tables_that_are_none(tmp_path, content, wrong):
    (tmp_path / "train.csv").write_text(content, encoding="utf-8", newline="")
    with pytest.raises(InputError, match=re.escape(wrong)):
        read_split(with_labels_of(find_task("classification"), tmp_path), tmp_path, "train")


def test_pairs_from_csv_in_any_order_of_columns(tmp_path):
    write(tmp_path, "train.csv", "answer,kind,q", '"乙,乙",x,甲', "丁,y,丙")
    task = with_labels_of(find_task("classification", "q", "answer", "kind"), tmp_path)
    assert read_split(task, tmp_path, "train").examples == [Example(0, "甲", "乙,乙", 0), Example(1, "丙", "丁", 1)]


def test_lines_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "dev.tsv").write_bytes("text_a\tlabel\n甲\t1\n".encode() + "乙\t1\n".encode("gbk"))
    with pytest.raises(InputError, match="dev.tsv:3: not UTF-8 at byte 0; convert the file"):
        read_split(TASKS["chnsenticorp"], tmp_path, "dev")


def test_json_that_is_nested_too_deep_is_named(tmp_path):
    for task in ("afqmc", "cmrc2018"):
        (tmp_path / "dev.json").write_text("[" * 100_000)
        with pytest.raises(InputError, match="dev.json:1: JSON nested too deep"):
            read_split(TASKS[task], tmp_path, "dev")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"data": [\n{"paragraphs": [\n}]}', "dev.json:3: not JSON"),
        ('{"data": [1]}', "dev.json, after question 0: expected SQuAD"),
        ("3", "dev.json, after question 0: expected SQuAD"),
        ('{"context": "甲", "question": "乙", "answers": ["甲"]}\n{', "dev.json:2: not JSON"),
    ],
)
def test_a_broken_reading_file_says_where(tmp_path, content, says):
    (tmp_path / "dev.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(says)):
        read_split(TASKS["cmrc2018"], tmp_path, "dev")


def test_answers_in_the_hubs_layout_and_placeholders(tmp_path):
    row = {"context": "甲乙甲", "question": "丙", "answers": {"text": ["甲"], "answer_start": [2]}}
    write(tmp_path, "dev.json", row)
    write(tmp_path, "test.json", {**row, "answers": [{"text": "", "answer_start": -1}]})
    [question] = read_split(TASKS["cmrc2018"], tmp_path, "dev").examples
    assert (question.answers, question.start) == (("甲",), 2)
    [question] = read_split(TASKS["cmrc2018"], tmp_path, "test").examples
    assert (question.answers, question.start) == ((), None)
    write(tmp_path, "test.json", {"sentence1": "甲", "sentence2": "乙", "label": -1})
    assert read_split(TASKS["afqmc"], tmp_path, "test").examples[0].label is None


@pytest.mark.parametrize(
    ("kind", "rows", "says"),
    [
        ("classification", ["[", '{"text": "甲", "label": 1}'], "train.json:1: not JSON"),
        ("classification", ['{"text": "甲", "klass": 1}'], "train.json: no column label; columns are text, klass"),
        (
            "labelling",
            ['{"text": "甲", "tags": null}'],
            "column tags has 0 labels; expected at least 2 (columns are text, tags)",
        ),
    ],
)
def test_labels_that_cannot_be_found(tmp_path, kind, rows, says):
    write(tmp_path, "train.json", *rows)
    with pytest.raises(InputError, match=re.escape(says)):
        with_labels_of(find_task(kind), tmp_path)


def test_labels_of_ones_own_are_taken_as_they_are(tmp_path):
    rows = [{"text": "甲", "label": label} for label in ("①", "contradictory", "contradiction")]
    write(tmp_path, "train.json", *rows)
    assert set(with_labels_of(find_task("classification"), tmp_path).labels) == {row["label"] for row in rows}
    write(tmp_path, "train.json", {"text": "甲乙", "tags": [0, 1]})
    task = with_labels_of(find_task("labelling"), tmp_path)
    assert read_split(task, tmp_path, "train").examples[0].tags == (0, 1)


def test_a_missing_split_says_what_is_there(tmp_path):
    write(tmp_path / "afqmc", "train.json", "{}")
    with pytest.raises(InputError) as error:
        read_split(TASKS["afqmc"], tmp_path, "dev")
    assert str(error.value) == (
        f"--data_dir {tmp_path}: no dev set of afqmc in {tmp_path / 'afqmc'} (there are train.json); "
        "expected dev.json or dev.jsonl or dev.tsv or dev.txt or dev.csv"
    )


def test_absent_data_can_be_fetched(tmp_path):
    with pytest.raises(InputError) as error:
        read_split(TASKS["cmrc2018"], tmp_path / "data", "train")
    assert str(error.value) == (
        f"--data_dir {tmp_path}/data: no train set of cmrc2018 in {tmp_path}/data (no such folder); expected "
        "train.json or train.jsonl or train.tsv or train.txt; "
        f"python -m finetuning.download --tasks cmrc2018 --data_dir {tmp_path}/data fetches it"
    )
    with pytest.raises(InputError, match=r"no train set of classification in .* \(no file there\); [^;]*csv$"):
        read_split(find_task("classification"), tmp_path, "train")


def test_tables_with_and_without_a_head(tmp_path):
    write(tmp_path / "a", "dev.tsv", "甲\t乙\t1", "丙\t丁\t0")
    write(tmp_path / "b", "dev.tsv", "label\ttext_a\ttext_b", "1\t甲\t乙", "0\t丙\t丁")
    write(tmp_path / "d", "dev.tsv", "", "query\ttitle\tis_same", "甲\t乙\t1", "丙\t丁\t0")  # by its place
    expected = [("甲", "乙", 1), ("丙", "丁", 0)]
    for folder in "abd":
        examples = read_split(TASKS["lcqmc"], tmp_path / folder, "dev").examples
        assert [(example.text, example.pair, example.label) for example in examples] == expected
    write(tmp_path / "c", "dev.tsv", "甲\t乙\t丙\t1")
    with pytest.raises(InputError, match="dev.tsv:1: 4 columns, expected 3: text_a, text_b, label"):
        read_split(TASKS["lcqmc"], tmp_path / "c", "dev")


def test_data_of_ones_own(tmp_path):
    write(tmp_path, "train.tsv", "q\tkind\tanswer", "甲\tx10\t乙", "丙\tx9\t丁", "丙\tx10\t丁")
    task = find_task("classification", "q", "answer", "kind")
    task = with_labels_of(task, tmp_path)
    assert task.labels == ("x10", "x9")
    assert read_split(task, tmp_path, "train").examples[1] == Example(1, "丙", "丁", 1)
    write(tmp_path, "train.tsv", "text\tlabel", *(f"甲\t{number}" for number in (10, 9, 2)))
    assert with_labels_of(find_task("classification"), tmp_path).labels == ("2", "9", "10")


@pytest.mark.parametrize(
    "lines",
    [
        ["甲\tB-PER", "乙\tI-PER", "", "丙\tO"],
        ["甲 B-PER", "乙 I-PER", "", "", "丙 O", ""],
        ["text_a\tlabel", "甲\x02乙\tB-PER\x02I-PER", "丙\tO"],
        ["甲\x02乙\tB-PER\x02I-PER", "丙\x02丙\tO\x02O"],
    ],
)
def test_tagged_text_in_all_layouts(tmp_path, lines):
    write(tmp_path, "dev.tsv", *lines)
    sentences = read_split(TASKS["msra_ner"], tmp_path, "dev").examples
    assert (sentences[0].tokens, sentences[0].tags) == (("甲", "乙"), (0, 1))
    assert set(sentences[1].tags) == {6}


def test_pairs_are_cut_token_by_token():
    """The closed form is the loop that transformers and paddlenlp run."""
    for first in range(12):
        for second in range(12):
            for budget in range(2, 20):
                a, b = first, second
                while a + b > budget:
                    a, b = (a - 1, b) if a > b else (a, b - 1)
                assert cut_pair(first, second, budget) == (a, b)


def test_pairs_are_encoded_as_bert_reads_them():
    examples = [Example(0, "甲乙丙丁", "戊己庚", 1), Example(1, "甲a", None, 0)]
    features = classification_features(TOKENIZER, examples, 8)
    of = TOKENIZER.ids
    # 5 tokens are left beside three special ones: of 4 and 3 tokens, 3 and 2
    assert [TOKENIZER.tokens[i] for i in features.ids[0]] == ["[CLS]", "甲", "乙", "丙", "[SEP]", "戊", "己", "[SEP]"]
    assert list(features.truncated) == [True, False]
    batch = features.batch([1, 0])
    np.testing.assert_array_equal(batch.input_ids[0], [of["[CLS]"], of["甲"], of["a"], of["[SEP]"], 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.token_type_ids, [[0] * 8, [0] * 5 + [1] * 3])
    np.testing.assert_array_equal(batch.attention_mask, [[1] * 4 + [0] * 4, [1] * 8])


def test_windows_cover_a_context_and_its_answer():
    context = CHARACTERS[2:]
    question = Question("q", "甲乙", context, (context[7:9],), 7)
    features = reading_features(TOKENIZER, [question], max_seq_length=9, doc_stride=2, max_query_length=3)
    room = 9 - 2 - 3
    starts = [int(parts[parts[:, 0] >= 0][0, 0]) for parts in features.parts]
    assert starts == list(range(0, len(context) - room + 1, 2))
    for start, targets, ids, parts in zip(starts, features.targets, features.ids, features.parts):
        if start <= 7 and start + room >= 9:
            answer = "".join(TOKENIZER.tokens[i] for i in ids[targets[0] : targets[1] + 1])
            assert answer == context[7:9] == context[parts[targets[0], 0] : parts[targets[1], 1]]
        else:
            assert list(targets) == [0, 0]
    assert any(targets[1] for targets in features.targets)
    with pytest.raises(InputError, match="--doc_stride 4: must be from 1 to 3"):
        reading_features(TOKENIZER, [question], max_seq_length=9, doc_stride=4, max_query_length=3)
    with pytest.raises(InputError, match="--max_seq_length 6: leaves no context .* must be at least 7"):
        reading_features(TOKENIZER, [question], max_seq_length=6, doc_stride=4, max_query_length=3)


def test_only_a_words_first_piece_has_a_tag():
    features = labelling_features(TOKENIZER, [Sentence(0, ("ab", "\u200b", "甲", "乙"), (3, 2, 1, 0))], 5)
    assert [TOKENIZER.tokens[i] for i in features.ids[0]] == ["[CLS]", "a", "##b", "甲", "[SEP]"]
    assert list(features.targets[0]) == [IGNORED, 3, IGNORED, 1, IGNORED]
    logits = np.eye(7)[[0, 5, 4, 1, 0]]
    predicted = answers(TASKS["msra_ner"], [Sentence(0, ("ab", "\u200b", "甲", "乙"), None)], features, [logits])
    assert predicted[0]["tags"] == ["I-LOC", "O", "I-PER", "O"]


def test_an_epoch_has_every_example_once_and_follows_from_the_seed():
    examples = [Example(i, CHARACTERS[: 1 + i % 9], None, 0) for i in range(333)]
    features = classification_features(TOKENIZER, examples, 32)
    batches = features.epoch(1, 4, seed=5)
    assert sorted(np.concatenate(batches)) == list(range(333))
    assert all((a == b).all() for a, b in zip(batches, features.epoch(1, 4, seed=5)))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(batches, features.epoch(2, 4, seed=5)))
    spread, whole = [
        np.mean([np.ptp(features.lengths[w]) for w in ws]) for ws in (batches, np.arange(332).reshape(-1, 4))
    ]
    assert spread < 0.1 * whole
    assert sorted(np.concatenate(features.by_length(100))) == list(range(333))
    assert max(features.lengths[which].sum() for which in features.by_length(100)) <= 100


def test_shares_of_a_batch_are_the_batch():
    examples = [Example(i, CHARACTERS[: 1 + i], None, i % 2) for i in range(5)]
    features = classification_features(TOKENIZER, examples, 32)
    shares = [features.labelled(np.arange(5), rank, 2) for rank in (0, 1)]
    assert [share.counted for share in shares] == [5, 5]
    assert sum(share.sequences for share in shares) == 5
    nobody = features.labelled(np.arange(1), 1, 2)
    assert (nobody.sequences, nobody.tokens, nobody.counted, list(nobody.targets[0])) == (0, 3, 1, [IGNORED])


def test_the_best_span_of_all_windows_wins():
    context = CHARACTERS[2:]
    question = Question("q", "甲乙", context, (), None)
    features = reading_features(TOKENIZER, [question], max_seq_length=9, doc_stride=2, max_query_length=3)
    logits = [np.zeros((len(ids), 2)) for ids in features.ids]
    logits[2][4, 0] = logits[2][6, 1] = 5
    logits[0][0] = 9  # [CLS] is no answer
    logits[3][6, 0] = logits[3][4, 1] = 8  # nor is a span that ends before it starts
    predicted = answers(TASKS["cmrc2018"], [question], features, logits, n_best_size=3)
    assert (predicted[0]["answer"], predicted[0]["n_best"][0]["score"]) == (context[4:7], 10.0)
    assert len(predicted[0]["n_best"]) == 3
    short = answers(TASKS["cmrc2018"], [question], features, logits, n_best_size=20, max_answer_length=2)
    assert len(short[0]["answer"]) <= 2


@pytest.mark.parametrize(
    "right, prediction, exact, f1",
    [
        (["北京大学"], "北京大学", 1, 1),
        (["北京大学"], "北京", 0, 2 * 1 * 0.5 / 1.5),
        (["北京"], "在北京大学", 0, 2 * 0.4 * 1 / 1.4),
        (["《红楼梦》"], "红楼梦。", 1, 1),  # punctuation does not count
        (["1998年", "一九九八年"], "一九九八年", 1, 1),  # the best answer does
        (["1998年"], "1999年", 0, 0.5),  # a number is one segment
        (["iPhone 4S手机"], "IPHONE 4s", 0, 2 * 2 / 6),  # words by spaces, whatever their case
        (["甲乙丙丁"], "甲丙丁", 0, 2 * 2 / 7),  # one run counts, not all that is shared
        (["甲"], "", 0, 0),
        (["甲"], "，", 0, 0),
    ],
)
def test_exact_match_and_f1_of_cmrc(right, prediction, exact, f1):
    """Cases worked out by hand from the published definition."""
    result = reading_scores([right], [prediction])
    assert result["exact_match"] == 100 * exact
    assert result["f1"] == pytest.approx(100 * f1)


def test_scores_of_classes_and_entities():
    labels, predicted = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    result = classification_scores(labels, predicted, 4)
    assert result["accuracy"] == 60
    assert result["macro_f1"] == pytest.approx(100 * (2 * 1 / 4 + 2 * 2 / 5 + 0) / 3)
    tags = ["B-PER", "I-PER", "O", "B-LOC", "I-LOC"]
    result = labelling_scores([tags], [["B-PER", "I-PER", "O", "B-LOC", "O"]])
    assert (result["precision"], result["recall"], result["f1"]) == (50, 50, 50)


def test_submissions_have_clues_form():
    task = TASKS["ocnli"]
    examples = [Example(i, "甲", "乙", None) for i in (3, 5)]
    features = classification_features(TOKENIZER, examples, 9)
    predicted = answers(task, examples, features, [np.array([0, 9, 0]), np.array([0, 0, 9])])
    assert submission(task, predicted) == '{"id": 3, "label": "contradiction"}\n{"id": 5, "label": "neutral"}\n'
    assert json.loads(submission(TASKS["cmrc2018"], [{"id": "Q1", "answer": "甲"}])) == {"Q1": "甲"}
    truth = [Example(0, "甲", "乙", 1), Example(1, "甲", "乙", 1)]
    assert scores(task, truth, predicted)["accuracy"] == 50


@pytest.fixture(scope="module")
def real(data):
    """BERT's Chinese vocabulary, in our tokenizer and in paddlenlp's."""
    paddlenlp = pytest.importorskip("paddlenlp.transformers")
    vocabulary = data / "vocab" / "vocab.txt"
    return WordPiece.from_file(vocabulary), paddlenlp.BertTokenizer(str(vocabulary), do_lower_case=True)


@pytest.mark.parametrize("name, length", [("ocnli", 24), ("tnews", 16), ("csl", 64), ("cluewsc2020", 48)])
def test_sequences_are_those_of_convert_example(data, real, name, length):
    """PP-MiniLM's convert_example gives a row's texts to paddlenlp's tokenizer, and no more. That one also
    splits words at symbols such as ～ and ℃, where BERT's, transformers' and ours do not."""
    tokenizer, paddlenlps = real
    examples = read_split(TASKS[name], data / "clue", "dev").examples[:400]
    features = classification_features(tokenizer, examples, length)
    assert features.truncated.any()
    for i, example in enumerate(examples):
        if any(unicodedata.category(c)[0] == "S" and ord(c) > 127 for c in example.text + (example.pair or "")):
            continue
        expected = paddlenlps(example.text, text_pair=example.pair, max_seq_len=length)
        assert features.ids[i].tolist() == expected["input_ids"], example
        assert features.first[i] == expected["token_type_ids"].count(0)


def test_windows_are_paddlenlps(data, real):
    """paddlenlp's stride is the step from window to window, as in BERT's run_squad; transformers' is their overlap."""
    tokenizer, paddlenlps = real
    questions = read_split(TASKS["cmrc2018"], data / "clue", "dev").examples[:60]
    features = reading_features(tokenizer, questions, max_seq_length=200, doc_stride=64)
    expected = paddlenlps([q.question for q in questions], [q.context for q in questions], stride=64, max_seq_len=200)
    assert len(features) == len(expected["input_ids"]) > 2 * len(questions)
    for i, ids in enumerate(expected["input_ids"]):
        assert features.ids[i].tolist() == ids
        assert features.sources[i] == expected["overflow_to_sample"][i]


def test_spans_are_paddlenlps(data, real):
    squad = pytest.importorskip("paddlenlp.metrics.squad")
    questions = read_split(TASKS["cmrc2018"], data / "clue", "dev").examples[:40]
    questions = [replace(question, id=number) for number, question in enumerate(questions)]
    features = reading_features(real[0], questions, max_seq_length=200, doc_stride=100)
    random = np.random.default_rng(0)
    logits = [random.standard_normal((len(ids), 2)) for ids in features.ids]
    for window, parts in zip(logits, features.parts):
        window[parts[:, 0] < 0] = -100.0  # paddlenlp takes the n best of all tokens and then drops the question's
    mappings = [[None if a < 0 else (a, b) for a, b in parts.tolist()] for parts in features.parts]
    expected, n_best, _ = squad.compute_prediction(
        Examples(questions),
        [{"example_id": int(source), "offset_mapping": m} for source, m in zip(features.sources, mappings)],
        ([window[:, 0] for window in logits], [window[:, 1] for window in logits]),
        n_best_size=20,
        max_answer_length=30,
    )
    for answer in answers(TASKS["cmrc2018"], questions, features, logits, 20, 30):
        assert answer["answer"] == expected[answer["id"]]
        assert answer["n_best"][0]["score"] == pytest.approx(max(logits_sum(n_best[answer["id"]])), abs=1e-3)


def logits_sum(n_best):
    return [answer["start_logit"] + answer["end_logit"] for answer in n_best]


class Examples(list):
    """Questions as paddlenlp wants them: rows, and columns by name."""

    def __init__(self, questions):
        super().__init__({"id": question.id, "context": question.context} for question in questions)

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)
