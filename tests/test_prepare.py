"""Preparing corpora: against brute force and plain text; killed and resumed; in one process, several and on Ray."""

import gzip
import hashlib
import html
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import ROOT, TINY, environment
from hypothesis import given
from hypothesis import strategies as st

from backends.files import InputError
from backends.pretrained import write_model
from text.batches import line_batches
from text.corpus import Corpus
from text.masking import mask_words
from text.prepare import pipeline
from text.prepare.duplicates import candidates, keys_of, sketches, sorted_run
from text.prepare.pipeline import PrepareArguments, prepare
from text.prepare.raw import paragraphs, pieces_of
from text.prepare.sentences import clean, split
from text.prepare.workers import on_this_machine
from text.shards import Shards, open_corpus
from text.tokenizer import WordPiece
from text.vocabulary import Settings

DEMO = ROOT / "general_distill" / "demo"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("今天下雨。我们不去了！真的吗？！", ["今天下雨。", "我们不去了！", "真的吗？！"]),
        ("他说：“走吧。快！”然后走了。", ["他说：“走吧。快！”", "然后走了。"]),
        ("“走吧。”他说，“快！”", ["“走吧。”", "他说，“快！”"]),
        ("“走吧！”，他说。好。", ["“走吧！”，他说。", "好。"]),
        ("「甲。乙？」丙。（丁。戊。）己。", ["「甲。乙？」", "丙。", "（丁。戊。）己。"]),
        ("“没有关上。走了。", ["“没有关上。", "走了。"]),
        ("等等……好吧", ["等等……", "好吧"]),
        ("Mr. Li paid 3.5 yuan. He left! Why?", ["Mr. Li paid 3.5 yuan.", "He left!", "Why?"]),
        ("见http://a.cn/?q=1和v1.2.3版。完", ["见http://a.cn/?q=1和v1.2.3版。", "完"]),
    ],
)
def test_sentences(text, sentences):
    assert list(split(text)) == sentences


@given(st.text(alphabet="甲乙，。！？!?…“”「」（）\"'.a A1", max_size=60))
def test_splitting_loses_nothing(text):
    assert "".join("".join(split(text)).split()) == "".join(text.split())
    assert all(sentence.strip() for sentence in split(text))


def test_cleaning():
    assert clean(" 甲&amp;乙<br/>丙\u200b丁\ufeff　戊\x07\t己&lt;b&gt; ") == "甲&乙 丙丁 戊 己<b>"
    assert clean("ｆｕｌｌ　ｗｉｄｔｈ，。３") == "ｆｕｌｌ ｗｉｄｔｈ，。３"


@pytest.mark.parametrize(
    "text",
    [
        "当p<q时函数递增，并且当r>s时函数递减。",
        "书名号外的<HELLO WORLD>也是正文。",
        "a<b and c>d",
        "若x<y>z",
        "List<String>和Map<Object>",
        "见<http://a.cn/?q=1>，写信给<a@b.cn>",
        "I <3 you > me",
        "甲<标题>乙",
        "没有完的<!-- 注",
        "1<x<5，y>3",
        "他说<script>吗",
    ],
)
def test_what_looks_like_a_tag_is_text(text):
    """Nor is what was escaped a tag, whatever it looks like."""
    assert clean(text) == text.replace("<script>", " ")
    assert clean(html.escape(text, quote=False)) == text
    assert clean(html.escape(f"{text}<b>&amp;", quote=False)) == f"{text}<b>&amp;"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ('甲<p class="a" id=b>乙</P>丙', "甲 乙 丙"),
        ('<a href="http://a.cn/?b=1&c=>" target=_blank>甲</a>', "甲"),
        ("甲<input disabled>乙<BR>丙<br />丁", "甲 乙 丙 丁"),
        ('<doc id="1" url="u" title="数学 &amp; 逻辑">甲</doc>', "甲"),
        ("甲<x:y/>乙<Foo a='1'>丙</Foo>", "甲 乙 丙"),
        ("甲<!-- 注 <b> -->乙<script src=x>if (a<b) c>d;</script>丙<STYLE>p{}</style >丁", "甲 乙 丙 丁"),
    ],
)
def test_tags_go(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    "text", ["<a", "<a x", "<!--", "<a x=y,", '<a x="', "<a x='\"", "<a\"'", "<a x=<", "<script <"]
)
def test_what_never_ends_is_read_through_once(text):
    """Where an expression went back over it, this would take hours."""
    assert clean(text * 300_000) == text * 300_000


def read(path, layout="lines", size=1 << 20, field="text"):
    bad = []
    pieces = pieces_of(path, layout, size)
    return [text for piece in pieces for text in paragraphs(piece, layout, field, bad.append)], [str(b) for b in bad]


def test_pieces_of_any_size_have_each_line_once(tmp_path):
    path = tmp_path / "text.txt"
    lines = [f"第{i}行" * (i % 4 + 1) for i in range(50)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    for size in range(1, path.stat().st_size + 2):
        assert read(path, size=size) == (lines, [])


def test_compressed_files_read_as_plain_ones(tmp_path):
    lines = [f"第{i}行" for i in range(300_000)]
    content = "\n".join(lines).encode()
    half = len(content) // 2
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    frames = [zstandard.compress(part) for part in (content[:half], content[half:])]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    for name in ("a.txt.gz", "a.txt.zst"):
        assert read(tmp_path / name) == (lines, [])
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-1000])
        readable, bad = read(tmp_path / name)
        assert 0 < len(readable) < len(lines)
        assert readable == lines[: len(readable)]
        assert len(bad) == 1
        assert name in bad[0]


def test_layouts(tmp_path):
    article = {"id": "1", "url": "u", "title": "数学", "text": "数学\n\n数学是一门学科。\n它很有用。"}
    (tmp_path / "wiki_00").write_text(
        f"{json.dumps(article)}\n{json.dumps(article, ensure_ascii=False)}\n", encoding="utf-8"
    )
    assert [t for t in read(tmp_path / "wiki_00", "wikipedia")[0] if t] == ["数学是一门学科。", "它很有用。"] * 2
    document = '<doc id="1" url="u" title="数学 &amp; 逻辑">\n数学 & 逻辑\n\n正文。\n\n</doc>\n'
    (tmp_path / "wiki_01").write_text(document * 2, encoding="utf-8")
    assert read(tmp_path / "wiki_01", "wikipedia") == (["正文。"] * 2, [])
    content = '{"body": "甲\\n乙"}\n{"text": "x"}\n[1]\n{bad\n'.encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    texts, bad = read(tmp_path / "a.jsonl", "jsonl", field="body")
    assert texts == ["甲", "乙"]
    places = [content.index(line) for line in (b'{"text', b"[1]", b"{bad")]
    assert [int(re.search(r"byte (\d+)", message)[1]) for message in bad] == places
    assert "no text under 'body'" in bad[0]
    (tmp_path / "c.txt").write_text("一句。\n两句。\n\n另一篇。\n", encoding="utf-8")
    assert read(tmp_path / "c.txt", "cluecorpus2020")[0] == ["一句。", "两句。", "另一篇。"]


def trigrams(line):
    return {line[i : i + 3] for i in range(max(1, len(line) - 2))}


def jaccard(a, b):
    return len(trigrams(a) & trigrams(b)) / len(trigrams(a) | trigrams(b))


def changed_lines(count, seed=0):
    """Lines, and copies of them with some characters changed, in any order."""
    chance = random.Random(seed)
    alphabet = [chr(0x4E00 + i) for i in range(3000)]
    lines = []
    for _ in range(count):
        if lines and chance.random() < 0.5:
            line = list(chance.choice(lines))
            for _ in range(chance.choice([0, 1, 1, 2, 5, 20])):
                line[chance.randrange(len(line))] = chance.choice(alphabet)
        else:
            line = chance.choices(alphabet, k=chance.randint(1, 80))
        lines.append("".join(line))
    return lines


def test_sketches_estimate_similarity():
    lines = changed_lines(200)
    sketch = sketches(lines)
    pairs = [(i, j) for i in range(200) for j in range(i)]
    estimated = np.array([(sketch[i] == sketch[j]).mean() for i, j in pairs])
    exact = np.array([jaccard(lines[i], lines[j]) for i, j in pairs])
    assert np.abs(estimated - exact).max() < 0.3
    assert np.abs(estimated - exact)[exact > 0.1].mean() < 0.05
    np.testing.assert_array_equal(sketches(lines[50:60]), sketch[50:60])


def test_candidates_are_those_of_brute_force():
    lines = changed_lines(400)
    keys = keys_of(lines, sketches(lines))
    numbers = np.repeat(np.arange(400), keys.shape[1])
    order = np.random.default_rng(0).permutation(keys.size)
    copies, pairs = candidates(keys.reshape(-1)[order], numbers[order])
    assert copies.tolist() == [i for i in range(400) if lines[i] in lines[:i]]
    shared = {(i, j) for i in range(400) for j in range(i) if set(keys[i, 1:]) & set(keys[j, 1:])}
    assert {tuple(pair) for pair in pairs} <= shared
    few = {pair for pair in shared if sum(i == pair[0] for i, _ in shared) <= 8}
    assert few <= {tuple(pair) for pair in pairs}


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocab")
    WordPiece.trained(Corpus(DEMO, folder / "index"), 3000).save(folder, 64)
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Sentences of the demo's parts put together anew, some of them twice or changed a little."""
    folder, chance = tmp_path_factory.mktemp("raw"), random.Random(1)
    words = [part for line in Corpus(DEMO, folder / "index") for part in re.findall(r"\w+", line)]
    for name in ("a.txt", "b.txt", "c.txt.gz"):
        lines = []
        for _ in range(4_000):
            line = "，".join(chance.choices(words, k=5)) + "。"
            lines += [line] * (1 if chance.random() < 0.98 else 2)
            if chance.random() < 0.02:
                lines.append(line.replace("，", "、", 1))
        content = "\n".join(lines).encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    return folder


def arguments(raw, vocab, output, **changes):
    return PrepareArguments(
        input=[f"{raw}/*.txt*"], output=str(output), vocab=str(vocab), **{"unit_mb": 0.15, **changes}
    )


def run(raw, vocab, output, processes=1, **changes):
    return prepare(arguments(raw, vocab, output, **changes), on_this_machine(processes), lambda *_: None)


def files(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, raw, vocab):
    folder = tmp_path_factory.mktemp("prepared") / "one"
    run(raw, vocab, folder, words=True)
    return folder


def test_what_is_kept_and_what_is_dropped(raw, vocab, prepared):
    """By the texts themselves: no copy stays, nothing similar to an earlier line stays, and nothing else goes."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    counts = manifest["counts"]
    paths = [raw / "a.txt", raw / "b.txt"]
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").split("\n")]
    lines += gzip.decompress((raw / "c.txt.gz").read_bytes()).decode().split("\n")
    assert counts["sentences"] == len(lines) == counts["paragraphs"] - counts.get("too_short", 0)
    assert counts["copies"] == len(lines) - len(set(lines))
    assert counts["lines"] == len(lines) - counts["copies"] - counts["near_duplicates"] == len(Shards(prepared))
    tokenizer = WordPiece.from_model(vocab)
    tokens = {tuple(tokenizer.tokenizer.encode(line).ids[1:-1]): line for line in lines}
    kept = [tokens[tuple(line.ids.tolist())] for line in Shards(prepared)]
    dropped = sorted(set(lines) - set(kept))
    assert len(dropped) == counts["near_duplicates"] > 150
    earlier = {}
    for i, line in enumerate(lines):
        earlier.setdefault(line, i)
    by_trigram = {}
    for line in set(lines):
        for trigram in trigrams(line):
            by_trigram.setdefault(trigram, []).append(line)

    def most_similar_earlier(line):
        shared = {}
        for trigram in trigrams(line):
            for other in by_trigram[trigram]:
                if earlier[other] < earlier[line]:
                    shared[other] = shared.get(other, 0) + 1
        best = sorted(shared, key=shared.get)[-20:]
        return max((jaccard(line, other) for other in best), default=0)

    similar = [most_similar_earlier(line) for line in dropped]
    assert min(similar) > 0.55
    assert np.mean(np.array(similar) > 0.75) > 0.9
    stayed = [most_similar_earlier(line) for line in random.Random(0).sample(kept, 300)]
    assert max(stayed) < 0.95
    assert np.mean(np.array(stayed) > 0.85) < 0.02


@pytest.mark.slow
def test_the_same_bytes_in_any_way(tmp_path, raw, vocab, prepared, monkeypatch):
    run(raw, vocab, tmp_path / "two", processes=2, words=True)
    assert files(tmp_path / "two") == files(prepared)
    monkeypatch.setattr(pipeline, "RUN_LINES", 600)
    monkeypatch.setattr(pipeline, "RANGE_KEYS", 20_000)
    monkeypatch.setattr(pipeline, "CHUNK", 100)
    run(raw, vocab, tmp_path / "small", words=True)
    assert files(tmp_path / "small") == files(prepared)


@pytest.mark.slow
def test_other_units_hold_the_same_lines(tmp_path, raw, vocab, prepared):
    run(raw, vocab, tmp_path / "large", unit_mb=16, words=True)
    small, large = Shards(prepared), Shards(tmp_path / "large")
    assert len(large.files) < len(small.files)
    for a, b in zip(small, large, strict=True):
        assert a.ids.tolist() == b.ids.tolist()


def command(raw, vocab, output, *more):
    options = [
        "--input",
        f"{raw}/*.txt*",
        "--output",
        str(output),
        "--vocab",
        str(vocab),
        "--unit_mb",
        "0.15",
        "--words",
    ]
    return [sys.executable, "-m", "text.prepare", *options, *more]


@pytest.mark.slow
def test_killed_and_run_again(tmp_path, raw, vocab, prepared):
    """Twice, each time after two more results; its workers end with it."""
    for _ in range(2):
        enough = len(done(tmp_path / "out")) + 2
        process = subprocess.Popen(
            command(raw, vocab, tmp_path / "out", "--processes", "2"),
            cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        workers = []
        while len(workers) < 2 or len(done(tmp_path / "out")) < enough:
            assert process.poll() is None
            workers = children(process.pid)
            time.sleep(0.005)
        process.kill()
        process.wait()
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            time.sleep(0.01)
    whole = subprocess.run(
        command(raw, vocab, tmp_path / "out"), cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    assert files(tmp_path / "out") == files(prepared)


def children(pid):
    """Lists the children of a process, and theirs."""
    pids = []
    for children_of_a_thread in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children_of_a_thread.read_text().split():
            pids += [int(child), *children(child)]
    return pids


def done(output):
    work = output / ".work"
    return sorted(work.glob("unit-*.json")) + sorted(work.glob("range-*.npz"))


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_worker(tmp_path, raw, vocab, prepared):
    process = subprocess.Popen(
        command(raw, vocab, tmp_path / "out", "--ray", "--processes", "2"),
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = set()
    while process.poll() is None:
        workers = ray_workers("read_unit")
        seen |= workers
        if len(seen) == 2 and len(workers) == 2:
            os.kill(max(workers), signal.SIGKILL)
            break
    assert len(seen) == 2, process.stderr.read()
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert files(tmp_path / "out") == files(prepared)


def ray_workers(task):
    pids = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"ray::{task}" in Path(f"/proc/{entry}/cmdline").read_text():
                pids.add(int(entry))
        except OSError:
            continue
    return pids


def test_shards_train_as_their_text_does(tmp_path, vocab):
    """Batches and masks are equal, for lines that preparation leaves as they are."""
    lines = list(dict.fromkeys(clean(line) for line in Corpus(DEMO, tmp_path / "index")))
    lines = [line for line in lines if list(split(line)) == [line] and 5 <= len(line) <= 500]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    run(tmp_path / "text", vocab, tmp_path / "shards", similarity=0, words=True)
    tokenizer = WordPiece.from_model(vocab)

    def make(drawn):
        return mask_words(tokenizer.encode(drawn.lines, 20), drawn.lines, tokenizer, 3, drawn.position)

    sources = [open_corpus(tmp_path / name, tmp_path / "other") for name in ("text", "shards")]
    assert [type(source) for source in sources] == [Corpus, Shards]
    text, shards = (line_batches(source, make, batch_size=7, seed=1) for source in sources)
    for _ in range(len(lines) // 7 + 5):
        a, b = next(text), next(shards)
        for array, expected in zip([*b.batch[:3], b.positions, b.labels], [*a.batch[:3], a.positions, a.labels]):
            np.testing.assert_array_equal(array, expected)
        assert a.truncated == b.truncated


@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_distillation_reads_shards(tmp_path, vocab, prepared, torch_backend, name):
    from general_distill.__main__ import main

    tokenizer = WordPiece.from_model(vocab)
    for folder, tokens in (("teacher", tokenizer.tokens), ("other", [*tokenizer.tokens[:-1], "另"])):
        (tmp_path / folder).mkdir()
        WordPiece(tokens).save(tmp_path / folder, 64)
        config = {**TINY, "vocab_size": len(tokens)}
        write_model(tmp_path / folder, config, torch_backend.model(config).weights())
    options = {
        "input_dir": prepared, "output_dir": tmp_path / "student", "backend": name, "device": "cpu", "max_steps": 2,
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "batch_size": 4,
        "num_relation_heads": 8, "teacher_layer_index": 1, "student_layer_index": 1, "max_seq_length": 16,
    }  # fmt: skip
    argv = [f"--{key}={value}" for key, value in options.items()]
    assert main([*argv, f"--teacher_model_name_or_path={tmp_path / 'teacher'}"]) == 0
    record = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["loss"] > 0
    assert main([*argv, f"--teacher_model_name_or_path={tmp_path / 'other'}", "--overwrite"]) == 2


def test_shards_of_another_vocabulary_are_refused(vocab, prepared):
    tokens = WordPiece.from_model(vocab).tokens
    Shards(prepared).check_vocabulary(WordPiece(tokens), "it")
    for other in (WordPiece([*tokens[:-1], "另"]), WordPiece(tokens, Settings(do_lower_case=False))):
        with pytest.raises(InputError, match="another vocabulary"):
            Shards(prepared).check_vocabulary(other, "it")


def copy(prepared, folder):
    for name in files(prepared):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((prepared / name).read_bytes())
    return sorted(folder.glob("*.array_record"))


def test_a_shard_that_is_cut_or_gone(tmp_path, prepared):
    shards = copy(prepared, tmp_path)
    lines = len(Shards(tmp_path))
    os.truncate(shards[0], shards[0].stat().st_size // 2)
    with pytest.raises(InputError, match=f"{shards[0].name}: .* bytes long, .* were written"):
        Shards(tmp_path)
    shards[1].unlink()
    left = Shards(tmp_path, bad_lines="skip")
    assert len(left) == lines
    assert left.bad == sum(json.loads((tmp_path / "manifest.json").read_text())["shards"][i]["lines"] for i in (0, 1))
    assert all(len(left[i].ids) for i in range(0, len(left), 97))
    assert left.replaced == len(range(0, left.bad, 97))
    assert [shard.name in message for shard, message in zip(shards[:2], left.unreadable)] == [True, True]


def test_a_record_that_is_damaged(tmp_path, prepared):
    shard = copy(prepared, tmp_path)[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    strict, lenient = Shards(tmp_path), Shards(tmp_path, bad_lines="skip")
    broken = []
    for i in range(json.loads((tmp_path / "manifest.json").read_text())["shards"][0]["lines"]):
        try:
            strict[i]
        except InputError as error:
            broken.append((i, str(error)))
    assert 0 < len(broken) <= 64
    assert re.search(rf"{shard.name}: record {broken[0][0]} cannot be read \(.*hash mismatch", broken[0][1])
    assert all(len(lenient[i].ids) for i, _ in broken)
    assert lenient.replaced == len(broken)


def small(tmp_path, vocab, capsys):
    """Runs the program on files of `tmp_path`."""
    from text.prepare.__main__ import main

    def run(*argv, output="out", workers="--processes=1"):
        code = main([f"--output={tmp_path / output}", f"--vocab={vocab}", workers, *argv])
        return code, capsys.readouterr().err.strip().split("\n")[-1]

    return run


def test_only_what_a_preparation_wrote_is_written_over(tmp_path, vocab, capsys):
    program = small(tmp_path, vocab, capsys)
    (tmp_path / "a.txt").write_text("一句好的话在这里。\n另一句好的话在那里。\n", encoding="utf-8")
    option_of_input = f"--input={tmp_path}/a.txt"
    (tmp_path / "mine").mkdir()
    for record in ('{"name": "my web app"}', "[", "[]"):
        (tmp_path / "mine" / "manifest.json").write_text(record)
        assert program(option_of_input, "--overwrite", output="mine")[0] == 2
        assert (tmp_path / "mine" / "manifest.json").read_text() == record
    assert program(option_of_input)[0] == 0
    (tmp_path / "out" / "notes.txt").write_text("我的一些笔记在这里。")
    before = files(tmp_path / "out")
    assert program(option_of_input)[0] == 0
    assert program(option_of_input, "--overwrite")[0] == 0
    assert files(tmp_path / "out") == before
    code, message = program(f"--input={tmp_path}/out/notes.txt")
    assert (code, message.endswith("give files, folders or patterns in quotes")) == (2, True)
    assert "only what lies in --output" in message
    [shard] = (tmp_path / "out").glob("shard-*")
    shard.unlink()
    code, message = program(option_of_input)
    assert code == 2
    assert f"{shard}: gone; python -m text.prepare --overwrite writes it again" in message
    assert program(option_of_input, "--overwrite")[0] == 0
    assert files(tmp_path / "out") == before
    for option in ("--unit_mb=1", "--min_characters=6", "--words"):
        code, message = program(option_of_input, option)
        assert (code, "with other settings; give another folder, or --overwrite" in message) == (2, True)
    assert files(tmp_path / "out") == before


def test_odd_input(tmp_path, vocab, capsys):
    program = small(tmp_path, vocab, capsys)
    (tmp_path / "0.txt").write_bytes(b"")
    (tmp_path / "1.txt").write_text("一句好的话在这里。\n" * 3, encoding="utf-8")
    halves = '{"text": "代理\\ud800字符在这句话里。"}\n'
    (tmp_path / "2.jsonl").write_text('{"text": "一句好的话在这里。"}\n' + halves + "[" * 100_000 + "\n")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("名字不是文字的文件。", encoding="utf-8")
    code, message = program(f"--input={tmp_path}/*.txt")
    assert (code, "2 copies, 2 lines, 0 near duplicates, 4 paragraphs" in message) == (0, True)
    code, message = program(f"--input={tmp_path}/2.jsonl", "--layout=jsonl", "--bad_lines=skip", output="json")
    assert (code, message.split("; ")[1].split(", ")[0]) == (0, "2 bad")
    code, message = program(f"--input={tmp_path}/2.jsonl", "--layout=jsonl", output="json2")
    assert (code, "2.jsonl: at byte 40, text: holds half a surrogate pair at character 2" in message) == (2, True)
    code, message = program(f"--input={tmp_path}/1.txt", "--min_characters=400", output="none")
    assert code == 2
    assert "--input: nothing is left of 3 paragraphs" in message
    code, message = program(f"--input={tmp_path}/0.txt", "--overwrite", output="none")
    assert (code, "nothing is left of 0 paragraphs" in message) == (2, True)


def test_what_was_stopped_goes_on_past_a_bad_line(tmp_path, vocab, capsys):
    """Its units that were done are there, but for one that lost a file."""
    program = small(tmp_path, vocab, capsys)
    for name, last in (("a", b""), ("b", b"\xff bad")):
        lines = [f"{name}第{i}句好的话在这里。".encode() for i in range(50)]
        (tmp_path / f"{name}.txt").write_bytes(b"\n".join([*lines, last]))
    options = [f"--input={tmp_path}/*.txt", "--unit_mb=0.001", "--similarity=0"]
    code, message = program(*options)
    assert (code, message.endswith("--bad_lines skip leaves it out")) == (2, True)
    units = sorted((tmp_path / "out" / ".work").glob("unit-*.json"))
    assert len(units) > 1
    units[0].with_suffix(".txt").unlink()
    kept = units[1].stat().st_mtime_ns, units[1].stat().st_ino
    stages = []
    arguments = PrepareArguments(
        input=[f"{tmp_path}/*.txt"], output=str(tmp_path / "out"), vocab=str(vocab), unit_mb=0.001, similarity=0.0,
        bad_lines="skip",
    )  # fmt: skip

    def report(stage, done, total, result):
        stages.append((stage, done))
        assert stage != "pack" or (units[1].stat().st_mtime_ns, units[1].stat().st_ino) == kept

    counts = prepare(arguments, on_this_machine(1), report)["counts"]
    assert stages[0] == ("read", len(units) - 1)
    assert (counts["bad"], counts["lines"]) == (1, 100)


def test_one_preparation_at_a_time(tmp_path, raw, vocab, capsys):
    program = small(tmp_path, vocab, capsys)
    process = subprocess.Popen(command(raw, vocab, tmp_path / "out"), env=environment(), stderr=subprocess.DEVNULL)
    while not done(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.01)
    code, message = program(f"--input={raw}/a.txt", "--overwrite")
    process.kill()
    process.wait()
    assert code == 2
    assert "another preparation is at work there" in message


def test_no_cluster_at_the_address(tmp_path, vocab, capsys):
    program = small(tmp_path, vocab, capsys)
    code, message = program(f"--input={tmp_path}", workers="--ray=127.0.0.1:1")
    assert code == 2
    assert message.startswith("error: --ray 127.0.0.1:1: no cluster there")


def test_copies_do_not_fill_a_range_of_keys():
    lines = ["这一句话在每一页上都有。"] * 1000 + ["这一句话只有一次，在最后一页。"]
    run = sorted_run(keys_of(lines, sketches(lines)), 7)
    assert len(run) == 1001 + 2 * 10
    assert set(run["row"].tolist()) == set(range(7, 1008))
    assert (np.diff(run["key"].astype(object)) >= 0).all()


def test_bad_input_is_told_in_one_line(tmp_path, vocab, capsys):
    from text.prepare.__main__ import main

    (tmp_path / "a.txt").write_bytes(
        "好的句子在这里。\n".encode() + b"\xff\xfe bad\n" + "又一句好的句子。\0\n".encode()
    )
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("压缩的句子也好。\n".encode() * 9)[:-12])

    def program(*argv, output="out"):
        code = main([f"--output={tmp_path / output}", f"--vocab={vocab}", *argv])
        return code, capsys.readouterr().err.strip().split("\n")[-1]

    code, message = program("--input", f"{tmp_path}/*.md")
    assert (code, message) == (
        2,
        f"error: --input {tmp_path}/*.md: no such file; give files, folders or patterns in quotes",
    )
    code, message = program("--input", f"{tmp_path}/a.txt")
    assert code == 2
    assert f"{tmp_path}/a.txt: not UTF-8 at byte 25" in message
    code, message = program(
        "--input", f"{tmp_path}/a.txt", f"{tmp_path}/b.txt.gz", "--bad_lines=skip", output="skipped"
    )
    assert code == 0
    counts = json.loads((tmp_path / "skipped" / "manifest.json").read_text())["counts"]
    assert (counts["bad"], counts["lines"]) == (3, 1 + bool(counts["copies"]))
    code, message = program("--input", f"{tmp_path}/a.txt", "--bad_lines=skip", "--similarity=0.5", output="skipped")
    assert code == 2
    assert "prepared with other settings, inputs" in message
    code, message = program("--input", f"{tmp_path}/a.txt", "--similarity=2")
    assert (code, message) == (2, "error: --similarity 2.0: must be from 0 to 1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    code, message = program("--input", f"{tmp_path}/a.txt", "--overwrite", output="mine")
    assert code == 2
    assert (tmp_path / "mine" / "thesis.txt").exists()
