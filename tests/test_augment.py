"""Augmentation: words, vectors and candidates against straightforward ways to find them; what a killed run leaves."""

import gzip
import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY, environment

import backends
from backends.files import InputError, locked
from backends.pretrained import write_model
from finetuning import augment as program
from finetuning.augment import AugmentArguments, Candidates, augment, main
from text.augmentation import Replaceable, is_content_word, replaceable_words, variants
from text.data import read_split
from text.tasks import find_task
from text.tokenizer import SPECIAL_TOKENS, WordPiece
from text.word_vectors import read_word_vectors

BOTH = pytest.mark.parametrize("name", ["torch", "paddle"])
CHINESE = "天气好坏书山水火人大小红绿花草鱼鸟云雨风"
ENGLISH = ["good", "bad", "film", "story", "actor", "plot", "music", "scene", "great", "dull", "warm", "day"]
PIECES = [*"，。不的是", "not", "the", ",", ".", "'", "##s", "##ing", "##书", "i", "a"]
VECTORS = ["天气", "山水", "花草", "北京", "films", "stories", "acting", "film"]
RANDOM = np.random.default_rng(5)
TABLE = RANDOM.standard_normal((len(VECTORS), 6)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random masked language model of Chinese and English words."""
    folder = tmp_path_factory.mktemp("masked-lm")
    tokenizer = WordPiece([*SPECIAL_TOKENS, *PIECES, *CHINESE, *ENGLISH])
    tokenizer.save(folder, 64)
    config = {**TINY, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    backend = backends.load("torch", "cpu")
    backend.seed(4)
    write_model(folder, config, backend.model(config, None, "masked_lm").weights(), "masked_lm")
    return folder


def in_text(header=True):
    lines = [f"{len(VECTORS)} 6"] * header
    lines += [f"{word} {' '.join(map(str, vector))}" for word, vector in zip(VECTORS, TABLE)]
    return "".join(f"{line}\n" for line in lines).encode()


def in_binary(end=b"\n"):
    content = b"".join(word.encode() + b" " + vector.tobytes() + end for word, vector in zip(VECTORS, TABLE))
    return f"{len(VECTORS)} 6\n".encode() + content


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "vectors.txt"
    path.write_bytes(in_text())
    return path


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def sentence(random):
    if random.random() < 0.5:
        words = [*CHINESE, *VECTORS[:4], "，", "不", "的", "是"]
        return "".join(random.choice(words, 9))
    words = [*ENGLISH, *VECTORS[4:], "not", "The", "Film", "don't", ","]
    return " ".join(random.choice(words, 8))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of single texts, and of pairs."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    singles = [{"id": i, "text": sentence(random), "label": "AB"[i % 2]} for i in range(23)]
    singles[7]["text"] = singles[3]["text"]
    pairs = [
        {"sentence1": sentence(random), "sentence2": sentence(random), "label": label, "genre": "gov"}
        for label in ("neutral", "-", "contradiction", "entailment")
    ]
    for split in ("train", "dev"):
        write_rows(root / "classification" / f"{split}.json", singles)
    write_rows(root / "ocnli" / "train.json", pairs)
    return root


def arguments(data, folder, output, **options):
    quick = {"task_name": "classification", "device": "cpu", "max_seq_length": 48, "num_copies": 5, "seed": 3}
    paths = {"data_dir": str(data), "model_name_or_path": str(folder), "output": str(output)}
    return AugmentArguments(**{**quick, "num_candidates": 6, **paths, **options})


def words_of(arguments):
    """The command line of what is not as by default."""
    defaults = vars(AugmentArguments(task_name="", model_name_or_path="", output="out.json"))
    return [f"--{name}={value}" for name, value in vars(arguments).items() if value != defaults[name]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("content", [in_text(), in_text(header=False), in_binary(), in_binary(end=b"")])
def test_layouts_of_word_vectors(tmp_path, content, packed):
    path = tmp_path / "vectors"
    path.write_bytes(gzip.compress(content) if packed else content)
    read = read_word_vectors(path, 100)
    assert read.words == VECTORS
    expected = TABLE / np.sqrt((TABLE.astype(np.float64) ** 2).sum(1, keepdims=True))
    np.testing.assert_allclose(read.vectors, expected, rtol=1e-6)
    first = read_word_vectors(path, 2)
    assert first.words == VECTORS[:2] and first.identity() != read.identity()


def test_which_words_of_a_file_count(tmp_path):
    """Content words alone, the first of equal ones, and the lower-case form where a word's own is not there."""
    path = tmp_path / "vectors.txt"
    path.write_text("7 2\nfilm 3 4\n. 1 1\nnot 1 0\nNew York 1 0\nfilm 0 1\nParis 0 2\nzero 0 0\n")
    read = read_word_vectors(path, 100)
    assert read.words == ["film", "Paris", "zero"]
    np.testing.assert_allclose(read.vectors, [[0.6, 0.8], [0, 1], [0, 0]])
    assert [read.row_of(word) for word in ("Film", "FILM", "Paris", "paris", "York")] == [0, 0, 1, None, None]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "its first line is no number of words and of dimensions"),
        (b"\x00\x01\x02" * 50, "its first line is no number"),
        (b"0 5\n", "0 words of 5 dimensions"),
        (b"3 99999\n", "3 words of 99999 dimensions; expected at least one, of 1 to 4096"),
        (in_text()[:-80], r"vectors:9: expected a word and 6 numbers|ends after 7 of 8 words"),
        (b"3 2\nfilm 1 2\nstory 3 4\n", "ends after 2 of 3 words; it is cut short"),
        (b"2 3\nfilm 1 2\nstory 3 4\n", "vectors:2: expected a word and 3 numbers"),
        (b"2 2\nfilm 1 2\nstory 3 4 5\n", "vectors:3: expected a word and 2 numbers"),
        (b"2 2\nfilm 1 2\nstory 3 x\n", "vectors:3: expected a word and 2 numbers"),
        (b"1 2\nfilm 1 nan\n", "the vector of 'film' holds NaN or infinity"),
        (in_binary()[:-10], "ends after 7 of 8 words; it is cut short"),
        (b"2 2\n" + b"\x01" * 5000, "word 1 is longer than 1000 bytes"),
        (b"1 2\n, 1 2\n", "no content word in it"),
        (gzip.compress(in_text())[:-20], "cannot be read .*; expected word2vec's"),
        (b"\x1f\x8bnot gzip at all", "cannot be read"),
    ],
)
def test_malformed_word_vectors_are_refused(tmp_path, content, message):
    (tmp_path / "vectors").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_word_vectors(tmp_path / "vectors", 100)
    assert str(tmp_path / "vectors") in str(error.value) and "\n" not in str(error.value)


def test_words_that_may_be_replaced():
    """Jieba's in Chinese, at blanks and punctuation in English; function words, numbers and marks stay."""

    def words(text):
        return [text[start:end] for start, end in replaceable_words(text)]

    assert words("我们不喜欢北京的天气，iPhone12很好") == ["喜欢", "北京", "天气", "好"]
    assert words("The film's plot isn't well-known, in 1999 or mp3") == ["film", "plot", "well", "known"]
    assert words("") == words("，。 12") == []


def test_variants_replace_words_with_the_chance_that_is_given():
    """Words in their places, capitals kept, none twice; each word as often as asked, each candidate as often as
    another."""
    text = "Good film, good day"
    words = [Replaceable(0, 4, ["warm", "cold"]), Replaceable(5, 9, ["plot"]), Replaceable(16, 19, ["x", "y", "z"])]
    made = variants(text, words, 4000, 0.25, np.random.default_rng(0))
    all_possible = {f"{a} {b}, good {c}" for a in ("Good", "Warm", "Cold") for b in ("film", "plot") for c in DAYS}
    assert sorted(made) == sorted(all_possible - {text})
    assert variants(text, [], 5, 1.0, np.random.default_rng(0)) == []
    assert variants(text, words[1:2], 5, 1.0, np.random.default_rng(0)) == ["Good plot, good day"]
    drawn = [variants(text, words, 1, 0.25, np.random.default_rng(i)) for i in range(4000)]
    last = [made[0].split()[-1] if made else "day" for made in drawn]
    assert last.count("day") / 4000 == pytest.approx(0.75, abs=0.03)
    for letter in "xyz":
        assert last.count(letter) / 4000 == pytest.approx(0.25 / 3, abs=0.02)


DAYS = ("day", "x", "y", "z")


def asked_one_by_one(folder, text, start, end, count):
    """TinyBERT's way: transformers' model, one word of one text at a time; the logits of all content words."""
    import torch
    import transformers

    model = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    [token] = tokenizer.tokenize(text[start:end])
    before, after = tokenizer.tokenize(text[:start]), tokenizer.tokenize(text[end:])
    masked, original = [*before, "[MASK]", *after], [*before, token, *after]
    ids = tokenizer.convert_tokens_to_ids(["[CLS]", *masked, "[SEP]", *original, "[SEP]"])
    types = [0] * (len(masked) + 2) + [1] * (len(original) + 1)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0, len(before) + 1]
    return {
        word: logits[i].item()
        for word, i in tokenizer.get_vocab().items()
        if is_content_word(word) and word not in SPECIAL_TOKENS
    }


@BOTH
def test_candidates_are_those_of_one_word_at_a_time(folder, vectors, data, name):
    """Of words of one token the model's likeliest, of others the nearest neighbours; others have none."""
    arguments_ = arguments(data, folder, "out.json", backend=name, batch_size=7)
    read = read_word_vectors(vectors, 100)
    candidates = program._candidates(arguments_, program.ModelFolder.find(folder, "model"), read)
    texts = [row["text"] for row in rows_of(data / "classification" / "train.json")][:6] + ["花草 Films书北京"]
    found = candidates.of(texts)
    one_token = several = 0
    for text in texts:
        spans = {(word.start, word.end): list(word.candidates) for word in found[text]}
        for start, end in replaceable_words(text):
            word = text[start:end]
            if word.lower() in [*CHINESE, *ENGLISH]:
                scores = asked_one_by_one(folder, text, start, end, 6)
                least = sorted(scores.values())[-6]
                chosen = spans.pop((start, end))
                assert len(set(chosen)) == 6 and all(scores[other] > least - 1e-4 for other in chosen)
                one_token += 1
            elif word.lower() in VECTORS:
                row = VECTORS.index(word.lower())
                cosines = read.vectors.astype(np.float64) @ read.vectors[row]
                nearest = [other for other in np.argsort(-cosines) if other != row][:6]
                assert set(spans.pop((start, end))) == {VECTORS[other] for other in nearest}
                several += 1
        assert not spans
    assert one_token > 10 and several > 3
    assert [word.candidates for word in found[texts[-1]]][0] != [word.candidates for word in found[texts[-1]]][-1]


@BOTH
def test_candidates_do_not_depend_on_the_batch(folder, data, name):
    texts = [row["text"] for row in rows_of(data / "classification" / "train.json")]
    source = program.ModelFolder.find(folder, "model")
    candidates = program._candidates(arguments(data, folder, "out.json", backend=name), source, None)
    found = candidates.of(texts)
    assert sum(map(len, found.values())) > 40
    for batch_size in (1, 5, 1000):
        assert replace(candidates, batch_size=batch_size).of(texts) == found
    assert {text: replace(candidates, batch_size=1).of([text])[text] for text in texts} == found


@BOTH
def test_several_words_a_question(folder, data, name):
    """Each place of each question has the answer of the model to that question, asked alone."""
    source = program.ModelFolder.find(folder, "model")
    candidates = program._candidates(arguments(data, folder, "o.json", backend=name, words_a_question=3), source, None)
    texts = [row["text"] for row in rows_of(data / "classification" / "train.json")]
    found, differing = candidates.of(texts), 0
    for text, words in found.items():
        encoding = candidates.tokenizer.tokenizer.encode(text)
        places = [encoding.offsets[1:-1].index((word.start, word.end)) + 1 for word in words]
        for start in range(0, len(words), 3):
            question = candidates._question(np.array(encoding.ids), places[start : start + 3])
            assert (question.ids[: question.second] == candidates.tokenizer.mask).sum() == len(words[start : start + 3])
            assert candidates.ask([question]) == [word.candidates for word in words[start : start + 3]]
        differing += words != replace(candidates, words_a_question=1).of([text])[text]
    assert differing > 5


def test_a_long_text_is_asked_as_far_as_it_goes(folder, data):
    """The question is cut as a pair is long: a word behind the cut has no candidates, one before it has."""
    source = program.ModelFolder.find(folder, "model")
    candidates = program._candidates(arguments(data, folder, "out.json", max_seq_length=16), source, None)
    text = "书，" * 20
    words = candidates.of([text])[text]
    assert [word.start for word in words] == [0, 2, 4, 6, 8, 10, 12, 14][: len(words)] and len(words) == 8
    question = candidates._question(np.array([2, *range(10, 30), 3]), [4])
    assert question.ids.tolist() == [2, 10, 11, 12, 4, *range(14, 25)]
    short = candidates._question(np.array([2, 10, 11, 3]), [1])
    assert short.ids.tolist() == [2, 4, 11, 3, 10, 11, 3] and short.second == 4


def expected_rows(rows, columns, candidates, arguments):
    """What a run writes, in loops."""
    lines = []
    for number, row in enumerate(rows):
        lines.append(row)
        for place, column in enumerate(columns):
            text, random = row[column], np.random.default_rng((arguments.seed, number, place))
            words = candidates.of([text])[text]
            chosen = random.random((arguments.num_copies, len(words))) < arguments.replace_probability
            which = random.integers(0, [len(word.candidates) for word in words], chosen.shape)
            seen = [text]
            for attempt in range(arguments.num_copies):
                new = text
                for word, is_chosen, index in reversed([*zip(words, chosen[attempt], which[attempt])]):
                    if is_chosen:
                        other = word.candidates[index]
                        other = other[0].upper() + other[1:] if text[word.start].isupper() else other
                        new = new[: word.start] + other + new[word.end :]
                if new not in seen:
                    seen.append(new)
                    lines.append({**row, column: new})
    return lines


@BOTH
@pytest.mark.parametrize("task, columns", [("classification", ["text"]), ("ocnli", ["sentence1", "sentence2"])])
def test_a_training_set_is_augmented(tmp_path, monkeypatch, folder, vectors, data, name, task, columns):
    """Rows with labels, each before its variants; of pairs one text varies at a time. Fine-tuning reads them."""
    monkeypatch.setattr(program, "BLOCK", 5)
    output = tmp_path / "new" / "train.json"
    options = arguments(data, folder, output, task_name=task, backend=name, word_vectors=str(vectors))
    augment(options)
    rows = [row for row in rows_of(data / task / "train.json") if row["label"] != "-"]
    source = program.ModelFolder.find(folder, "model")
    candidates = program._candidates(options, source, read_word_vectors(vectors, 100))
    written = rows_of(output)
    assert written == expected_rows(rows, columns, candidates, options)
    assert len(written) > 3 * len(rows)
    assert [path.name for path in output.parent.iterdir()] == ["train.json"]
    known = find_task(task) if task == "ocnli" else replace(find_task(task), labels=("A", "B"))
    assert len(read_split(known, output.parent, "train").examples) == len(written)


def test_tables_become_json_lines(tmp_path, folder):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tsv").write_text("text\tlabel\n天书好\tA\nwarm film\tB\n")
    augment(arguments(tmp_path / "data", folder, tmp_path / "train.json"))
    written = rows_of(tmp_path / "train.json")
    assert {tuple(row) for row in written} == {("text", "label")} and len(written) > 6
    assert written[0] == {"text": "天书好", "label": "A"}


STOPPED = """
import os, signal, sys
from finetuning import augment as program
program.BLOCK = 4
write = program._write
def stop(file, rows):
    write(file, rows)
    stop.rows += 1
    if stop.rows == 10:
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
stop.rows = 0
program._write = stop
program.main(sys.argv[1:])
"""


@BOTH
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, folder, vectors, data, name):
    monkeypatch.setattr(program, "BLOCK", 4)
    settings = {"backend": name, "word_vectors": str(vectors)}
    augment(arguments(data, folder, tmp_path / "whole.json", **settings))
    output = tmp_path / "out.json"
    words = words_of(arguments(data, folder, output, **settings))
    done = subprocess.run([sys.executable, "-c", STOPPED, *words], env=environment(), cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    part, record = tmp_path / "out.json.part", tmp_path / "out.json.of"
    assert part.stat().st_size > json.loads(record.read_text())["done"]["bytes"] > 0
    assert not output.exists()

    def refused(message, **options):
        with pytest.raises(InputError, match=message):
            augment(arguments(data, folder, output, **settings, **options))

    refused("half done .*--resume goes on")
    refused("begun with other seed; --overwrite starts anew", resume=True, seed=4)
    before = record.read_bytes()
    record.write_text("{}")
    refused("out.json.of is damaged.*--overwrite", resume=True)
    record.write_bytes(before)
    kept = part.read_bytes()
    part.write_bytes(kept[:100])
    refused("is shorter than it was", resume=True)
    part.write_bytes(kept)
    with locked(part):
        refused("another run is writing it", resume=True)
    asked = []
    monkeypatch.setattr(Candidates, "of", lambda self, texts, of=Candidates.of: asked.append(texts) or of(self, texts))
    augment(arguments(data, folder, output, resume=True, **settings))
    assert len(asked) == 4  # of six blocks
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "whole.json"]
    refused("is there already")
    augment(arguments(data, folder, output, overwrite=True, **{**settings, "backend": name}, num_copies=1))
    assert len(rows_of(output)) < len(rows_of(tmp_path / "whole.json"))


def test_bad_options_are_refused_in_one_line(tmp_path, capsys, folder, data, torch_backend):
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    WordPiece([*SPECIAL_TOKENS, *CHINESE]).save(encoder, 64)
    config = {**TINY, "vocab_size": 5 + len(CHINESE), "num_hidden_layers": 2}
    write_model(encoder, config, torch_backend.model(config).weights())
    single = tmp_path / "single"
    single.mkdir()
    WordPiece([*SPECIAL_TOKENS, *CHINESE]).save(single, 64)
    config["type_vocab_size"] = 1
    write_model(single, config, torch_backend.model(config, None, "masked_lm").weights(), "masked_lm")
    train = data / "classification" / "train.json"
    for options, message in (
        ({"task_name": "cmrc2018"}, "--task_name cmrc2018: answers are places in its texts; expected a task"),
        ({"task_name": "msra_ner"}, "--task_name msra_ner: its tags belong to the tokens"),
        ({"task_name": "cluewsc2020"}, "--task_name cluewsc2020: its texts are put together"),
        ({"model_name_or_path": encoder}, f"{encoder}: has no head of masked language modelling; give a model"),
        ({"model_name_or_path": single}, f"{single}: its type_vocab_size is 1"),
        ({"max_seq_length": 65}, "--max_seq_length 65: the model has 64 positions"),
        ({"output": tmp_path / "train.tsv"}, "train.tsv: must end in .json or .jsonl"),
        ({"output": train}, "is the training set that is read; give another file"),
        ({"replace_probability": 0}, "--replace_probability 0.0: must be above 0"),
        ({"num_copies": 0}, "--num_copies 0: must be at least 1"),
        ({"word_vectors": tmp_path / "no.txt"}, "no.txt: cannot be read (No such file"),
        ({"max_words": 5}, "--max_words 5: has no effect without --word_vectors"),
        ({"label_column": "class"}, "no column class"),
    ):
        words = words_of(arguments(data, folder, tmp_path / "deep" / "out.json"))
        assert main([*words, *(word for option in options for word in (f"--{option}", str(options[option])))]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (tmp_path / "deep").exists()
