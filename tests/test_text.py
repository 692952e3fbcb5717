"""The text pipeline: lines, tokens, order, masks."""

import collections
import os
import re
from pathlib import Path

import jieba
import numpy as np
import pytest
from conftest import ROOT

from backends.files import InputError
from text.batches import line_batches
from text.corpus import Corpus
from text.masking import mask_words, word_starts, words_of
from text.tokenizer import SPECIAL_TOKENS, WordPiece

DEMO = ROOT / "general_distill" / "demo"


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_lines_of_several_files(tmp_path):
    """Blank lines, Windows line ends, a byte-order mark, no final newline, an empty file; U+2028 is no line end."""
    folder = write(
        tmp_path / "in",
        a="第一行\r\n\n  \n第二\u2028行\n",
        b="",
        c=b"\xef\xbb\xbf" + "第三行".encode(),
        d="\n",
    )
    (folder / ".hidden").write_bytes(b"\xff")
    corpus = Corpus(folder, tmp_path / "index")
    assert [corpus[i] for i in range(len(corpus))] == ["第一行", "第二\u2028行", "第三行"]
    assert corpus.blank == 3
    assert corpus.characters == 10


def test_index_follows_the_files(tmp_path):
    folder = write(tmp_path / "in", a="一\n二\n")
    first = Corpus(folder, tmp_path / "index")
    assert len(first) == 2
    file = tmp_path / "index" / "lines.bin"
    made = file.stat().st_ino
    assert Corpus(folder, tmp_path / "index").identity() == first.identity() and file.stat().st_ino == made
    write(folder, a="一\n二\n三\n")
    assert len(Corpus(folder, tmp_path / "index")) == 3


def test_a_damaged_index_is_made_again_or_its_lines_cannot_be_read(tmp_path):
    """Wherever a bit of it is flipped, no other line is given."""
    folder, index = write(tmp_path / "in", a="一\n二二\n三\n", b="四\n"), tmp_path / "index"
    lines = list(Corpus(folder, index))
    for file in (index / "manifest.json", index / "lines.bin"):
        whole = file.read_bytes()
        for bit in range(0, 8 * len(whole), 13 if file.suffix == ".json" else 1):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            corpus = Corpus(folder, index)
            if file.name == "manifest.json":
                assert list(corpus) == lines and file.read_bytes() == whole
                continue
            for number, line in enumerate(lines):
                if number == bit // 96:
                    with pytest.raises(
                        InputError, match=r"(not the line|no such line|cannot be read|not UTF-8) at byte"
                    ):
                        corpus[number]
                else:
                    assert corpus[number] == line
        file.write_bytes(whole)
    file.write_bytes(whole[:-1])
    assert list(Corpus(folder, index)) == lines


def test_the_same_lines_in_the_same_order_are_the_same_corpus(tmp_path):
    texts = {
        "one": {"a": "一\n二\n三\n"},
        "two": {"x": b"\xef\xbb\xbf" + "一\r\n\n".encode(), "y": "二\n三"},
        "other": {"a": "一\n三\n二\n"},
        "joined": {"a": "一\n二三\n"},
    }
    corpora = {
        name: Corpus(write(tmp_path / name, **files), tmp_path / "index" / name) for name, files in texts.items()
    }
    assert corpora["one"].identity() == corpora["two"].identity()
    assert len({corpus.identity() for corpus in corpora.values()}) == 3
    with pytest.raises(
        InputError, match=r"^--resume: --input_dir .*: has 3 lines, sha256 .*, the run began with 3 lines"
    ):
        Corpus(tmp_path / "other", tmp_path / "index" / "one", begun=corpora["one"].identity())
    assert Corpus(tmp_path / "one", tmp_path / "index" / "one").identity() == corpora["one"].identity()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no file there"),
        ({"a": "\n \n"}, "every line is blank"),
        ({"a": "好\n", "b": "好的\n".encode() + b"ab\xff\n"}, r"b\.txt: not UTF-8 at byte 9"),
        ({"a": "新闻\n".encode("gb18030")}, r"a\.txt: not UTF-8 at byte 0"),
        ({"a": "好\n", "b": b"one\ntw\0o\n"}, r"b\.txt: a NUL byte at byte 6"),
    ],
)
def test_bad_corpora(tmp_path, files, says):
    with pytest.raises(InputError, match=says):
        Corpus(write(tmp_path / "in", **files), tmp_path / "index")
    with pytest.raises(InputError, match="no such folder"):
        Corpus(tmp_path / "nowhere", tmp_path / "index")


def test_bad_lines_are_skipped_and_counted(tmp_path):
    folder = write(tmp_path / "in", a=b"one\n\xff\xfe\n\ntwo\n", b=b"th\0ree\nfour\xe5\n")
    corpus = Corpus(folder, tmp_path / "index", bad_lines="skip")
    assert list(corpus) == ["one", "two"]
    assert (corpus.bad, corpus.blank, corpus.replaced) == (3, 1, 0)
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8 at byte 4"):  # not the index of a run that skips
        Corpus(folder, tmp_path / "index")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "cannot be read at byte 4 (No such file or directory)"),
        (lambda file: os.truncate(file, 4), "not the line at byte 4 that was there; the file was cut short or changed"),
        (lambda file: file.write_bytes(b"one\nsix\n"), "not the line at byte 4 that was there; the file was cut"),
        (lambda file: file.write_bytes(b"one\nt\0o\n"), "a NUL byte at byte 5"),
        (lambda file: file.write_bytes(b"one\ntw\xff\n"), "not UTF-8 at byte 6 (invalid start byte)"),
    ],
)
def test_lines_that_go_bad_while_training(tmp_path, damage, says):
    """Another line is taken, the same each time; or it ends, with the place."""
    folder = write(tmp_path / "in", a="one\ntwo\n", b="".join(f"{i}\n" for i in range(50)))
    stopping = Corpus(folder, tmp_path / "stopping")
    skipping = Corpus(folder, tmp_path / "skipping", bad_lines="skip")
    damage(folder / "a.txt")
    with pytest.raises(InputError, match=re.escape(f"{folder / 'a.txt'}: {says}")):
        stopping[1]
    assert skipping[1] == skipping[1] in {str(i) for i in range(50)}
    assert skipping[2] == stopping[2] == "0"
    assert skipping.replaced == 2
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(InputError, match="hardly any of its 52 lines can be read any more"):
        skipping[1]


@pytest.mark.slow
@pytest.mark.parametrize("lowercase", [True, False])
def test_ids_are_transformers(data, lowercase):
    """On every 7th line of the real corpus, and on what trips tokenizers."""
    from transformers import BertTokenizer

    reference = BertTokenizer(str(data / "vocab" / "vocab.txt"), do_lower_case=lowercase)
    tokenizer = WordPiece.from_file(data / "vocab" / "vocab.txt", lowercase)
    lines = []
    for path in sorted((data / "corpus" / "train").iterdir()):
        lines += path.read_text(encoding="utf-8").split("\n")[:-1:7]
    lines += [
        "Ünïcödé ABC　全角，ｆｕｌｌ",
        "emoji 😀👨‍👩‍👧 \ufe0f",
        "tab\tnul\0bell\x07",
        "[MASK] [SEP]",
        "x" * 300,
        "𠀀𪜶 ㎡ ½",
    ]
    for line in lines:
        expected = reference(line, truncation=True, max_length=64)["input_ids"]
        assert tokenizer.encode([line], 64).batch.input_ids[0].tolist() == expected, line


def test_batches_are_padded_and_cut(data):
    tokenizer = WordPiece.from_file(data / "vocab" / "vocab.txt")
    batch = tokenizer.encode(["今天天气好", "今天" * 10, "好"], 9).batch
    assert batch.input_ids.shape == (3, 9)
    assert batch.attention_mask.sum(axis=1).tolist() == [7, 9, 3]
    assert batch.truncated == 1
    assert (batch.input_ids[:, 0] == tokenizer.ids["[CLS]"]).all()
    assert batch.input_ids[1, 8] == batch.input_ids[2, 2] == tokenizer.ids["[SEP]"]
    assert (batch.input_ids[batch.attention_mask == 0] == 0).all()


def test_saved_tokenizer_loads_in_both_libraries(tmp_path):
    import paddlenlp.transformers
    import transformers

    corpus = Corpus(DEMO, tmp_path / "index")
    lines = [corpus[i] for i in range(0, len(corpus), 10)]
    tokenizer = WordPiece.trained(lines, 1500)
    tokenizer.save(tmp_path, 512)
    for library in (
        transformers.AutoTokenizer.from_pretrained(str(tmp_path)),
        transformers.BertTokenizer.from_pretrained(str(tmp_path)),
        paddlenlp.transformers.BertTokenizer.from_pretrained(str(tmp_path)),
        paddlenlp.transformers.AutoTokenizer.from_pretrained(str(tmp_path)),
    ):
        for line in lines[:40]:
            expected = tokenizer.encode([line], 128).batch.input_ids[0].tolist()
            assert library(line)["input_ids"] == expected, line
    again = WordPiece.from_model(tmp_path)
    assert again.tokens == tokenizer.tokens


def test_training_a_vocabulary_is_repeatable(tmp_path):
    corpus = Corpus(DEMO, tmp_path / "index")
    lines = [corpus[i] for i in range(len(corpus))] + ["running runner runs ran", "abcabc bcabca cabcab"]
    first, second = (WordPiece.trained(lines, 3000).tokens for _ in range(2))
    assert first == second
    assert first[:5] == list(SPECIAL_TOKENS)
    assert len(first) == len(set(first)) <= 3000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n", r"vocab\.txt: vocabulary: \[MASK\] missing"),
        ("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n", r"\[PAD\] is entry 1, expected 0"),
    ],
)
def test_bad_vocabularies(tmp_path, content, says):
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(InputError, match=says):
        WordPiece.from_file(tmp_path / "vocab.txt")
    with pytest.raises(InputError, match="no such file"):
        WordPiece.from_file(tmp_path / "nothing.txt")


def numbered(tmp_path, count):
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    for part in range(3):
        (folder / f"{part}.txt").write_text("".join(f"{i}\n" for i in range(count) if i % 3 == part))
    return Corpus(folder, tmp_path / "index")


def take(corpus, batches, **options):
    iterator = line_batches(corpus, lambda drawn: (drawn.position, [int(line) for line in drawn.lines]), **options)
    return [next(iterator) for _ in range(batches)]


def test_every_line_comes_once_an_epoch(tmp_path):
    """Also where batches run over the epoch's end; epochs differ, seeds differ, files mix."""
    corpus = numbered(tmp_path, 50)
    stream = [line for _, lines in take(corpus, 25, batch_size=4, seed=1) for line in lines]
    assert sorted(stream[:50]) == sorted(stream[50:]) == list(range(50))
    assert stream[:50] != stream[50:]
    assert {line % 3 for line in stream[:10]} == {0, 1, 2}
    other = [line for _, lines in take(corpus, 10, batch_size=4, seed=2) for line in lines]
    assert other != stream[:40]


def test_lines_keep_their_numbers(tmp_path):
    """In the corpus, whatever order they come in, and their batch is put into."""
    corpus = numbered(tmp_path, 50)
    tokenizer = WordPiece.trained(corpus, 50)

    def make(drawn):
        batch = tokenizer.encode(drawn.lines, 8).batch._replace(numbers=drawn.numbers)
        assert [corpus[number] for number in drawn.numbers] == drawn.lines
        return batch.shortest_first()

    batches = line_batches(corpus, make, batch_size=8, seed=3)
    for _ in range(9):
        batch = next(batches)
        for ids, number in zip(batch.input_ids, batch.numbers):
            alone = tokenizer.encode([corpus[number]], 8).batch.input_ids[0]
            np.testing.assert_array_equal(ids[: len(alone)], alone)
            assert not ids[len(alone) :].any()


def test_any_position_is_restored(tmp_path):
    corpus = numbered(tmp_path, 50)
    stream = take(corpus, 20, batch_size=7, seed=1)
    assert [position for position, _ in stream] == list(range(0, 140, 7))
    assert take(corpus, 5, batch_size=7, seed=1, start=15 * 7) == stream[15:]
    lines = [line for _, batch in stream for line in batch]
    assert take(corpus, 9, batch_size=11, seed=1, start=40) == [
        (first, lines[first : first + 11]) for first in range(40, 40 + 99, 11)
    ]


def test_ranks_share_the_stream(tmp_path):
    corpus = numbered(tmp_path, 60)
    alone = take(corpus, 12, batch_size=5, seed=1)
    ranks = [take(corpus, 4, batch_size=5, seed=1, rank=rank, world_size=3) for rank in range(3)]
    assert [batch for step in zip(*ranks) for batch in step] == alone


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """200 times the lines, and no more memory held than for a few; a number for each line would be 1.6 MB."""
    import tracemalloc

    peaks = []
    for count in (1_000, 200_000):
        folder = write(tmp_path / str(count), a="".join(f"第{i}行文字\n" for i in range(count)))
        tracemalloc.start()
        corpus = Corpus(folder, tmp_path / f"index{count}")
        assert corpus[count - 1] == f"第{count - 1}行文字"
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_000_000


def test_words_are_jiebas():
    tokenizer = WordPiece([*SPECIAL_TOKENS, *"北京大学生前来应聘", "跑", "##ning", "run", "fast"])
    text = "北京大学生 running fast"
    encoding = tokenizer.encode([text], 64).encodings[0]
    groups = [
        "".join(encoding.tokens[position].removeprefix("##") for position in word)
        for word in words_of(word_starts(encoding, text), len(encoding))
    ]
    assert groups == [word for word in jieba.cut(text) if word.strip()]
    assert "running" in groups


def test_every_line_gets_a_mask():
    """A line of one long word too, though the word is more than 15% of it."""
    tokenizer = WordPiece([*SPECIAL_TOKENS, "ru", "##nn", "##ing"])
    masked = mask_words(tokenizer.encode(["running"], 64), ["running"], tokenizer, 0, 0)
    assert masked.positions.tolist() == [1, 2, 3]


def test_masks_cover_whole_words(data):
    """15% of tokens; 80/10/10; words whole; the labels are what stood there."""
    tokenizer = WordPiece.from_file(data / "vocab" / "vocab.txt")
    lines = (data / "corpus" / "valid" / "part-00.txt").read_text(encoding="utf-8").split("\n")[:400]
    encoded = tokenizer.encode(lines, 64)
    masked = mask_words(encoded, lines, tokenizer, 0, 0)
    original, now = encoded.batch.input_ids.reshape(-1), masked.batch.input_ids.reshape(-1)
    assert (original[masked.positions] == masked.labels).all()
    untouched = np.ones(len(original), bool)
    untouched[masked.positions] = False
    assert (original[untouched] == now[untouched]).all()
    tokens = encoded.batch.tokens - 2 * len(lines)
    assert len(masked.positions) / tokens == pytest.approx(0.15, abs=0.012)
    fates = collections.Counter(
        "mask" if new == tokenizer.ids["[MASK]"] else "kept" if new == old else "random"
        for new, old in zip(now[masked.positions], masked.labels)
    )
    total = len(masked.positions)
    assert fates["mask"] / total == pytest.approx(0.8, abs=0.04)
    assert fates["kept"] / total == pytest.approx(0.1, abs=0.03)
    chosen = set(masked.positions.tolist())
    length = encoded.batch.input_ids.shape[1]
    for row, (encoding, line) in enumerate(zip(encoded.encodings, lines)):
        valid = int(encoded.batch.attention_mask[row].sum())
        for word in words_of(word_starts(encoding, line), valid):
            assert len({row * length + position in chosen for position in word}) == 1
