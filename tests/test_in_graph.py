"""The tokenizer inside ONNX graphs: the ids of transformers' BertTokenizer, whatever the text."""

import json
import random

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, checker, helper

from backends.files import InputError
from export.graph import Graph, model_of
from export.tokenizer_graph import add_tokenizer
from text.data import Example
from text.features import classification_features
from text.tokenizer import SPECIAL_TOKENS, WordPiece
from text.vocabulary import Added, Settings


def session(tokenizer, texts=1, max_seq_length=128):
    graph = Graph("tokenizer/")
    names = ["text", "text_pair"][:texts]
    outputs = add_tokenizer(graph, tokenizer, names, max_seq_length)
    inputs = [helper.make_tensor_value_info(name, TensorProto.STRING, ["batch"]) for name in names]
    model = model_of(
        graph, inputs, [helper.make_tensor_value_info(o, TensorProto.INT64, ["batch", "length"]) for o in outputs]
    )
    checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session, *texts):
    feed = {put.name: np.array(column, object) for put, column in zip(session.get_inputs(), texts)}
    return session.run(None, feed)


@pytest.fixture(scope="module")
def chinese(data):
    return WordPiece.from_file(data / "vocab" / "vocab.txt")


@pytest.fixture(scope="module")
def single(chinese):
    return session(chinese, max_seq_length=512)


def texts_of(folder):
    """Every line of the corpus, and every text of every task."""
    for path in sorted(folder.glob("corpus/*/*.txt")):
        yield from path.read_text(encoding="utf-8").split("\n")
    for path in sorted(folder.glob("clue/*/*.json")):
        if path.name == "labels.json":
            continue
        content = path.read_text(encoding="utf-8")
        rows = (
            [json.loads(content)]
            if path.parent.name == "cmrc2018"
            else map(json.loads, content.rstrip("\n").split("\n"))
        )
        for row in rows:
            yield from strings(row)


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


HARD = [
    "",
    " ",
    "今天iPhone，12 Pro卖￥9999。5％off！",
    "Ünïcödé ÀÉÎ ǅ ŉ İstanbul ΑΣ ﬁ ½ ㎡ Ⅷ ｆｕｌｌ　全角",
    "emoji 😀👨‍👩‍👧👍🏽 \ufe0f ☕️",
    "tab\tnul\0bell\x07 line\u2028end\u2029\u0085\ufeff",
    "\u200b\u202e\u00ad a\u0301\u0323b \u0345",
    "한국어 텍스트 각가 ㄱ",
    "𠀀𪜶𝔘𝟘 \ue000\uf8ff",
    "[MASK][SEP] a[CLS]b [UNK [PAD]] [mask] [ MASK ] [SEP",
    "##ing ## # a##b",
    "日本語のテキスト、カタカナ・ﾊﾝｶｸ",
    "x" * 100 + " " + "y" * 101 + "中" + "3.14e-10",
    "العربية עברית हिन्दी ไทย",
    "\ud7a3\ufffd\uffff",
]


def assert_equal(outputs, batch):
    for name, output, wanted in zip(("input_ids", "token_type_ids", "attention_mask"), outputs, batch[:3], strict=True):
        assert np.array_equal(output, wanted), name


@pytest.mark.slow
def test_all_text_there_is(data, chinese, single):
    """Every line of the corpus and every text of the tasks, against the tokenizer that tests/test_text.py and
    this file hold against transformers'."""
    texts = sorted(set(texts_of(data)), key=len)
    assert len(texts) > 100_000
    for start in range(0, len(texts), 256):
        batch = texts[start : start + 256]
        assert_equal(run(single, batch), chinese.encode(batch, 512).batch)


def test_hard_cases_are_transformers(data, chinese, single):
    """Each alone, in a batch, in long lines, and against transformers itself."""
    from transformers import BertTokenizer

    reference = BertTokenizer(str(data / "vocab" / "vocab.txt"))
    longest = ["中" * 10_000, "word " * 2_000, "é" * 10_000, "".join(HARD) * 60]
    for text in HARD + longest:
        [ids], _, _ = run(single, [text])
        assert ids.tolist() == reference(text, truncation=True, max_length=512)["input_ids"], text[:50]
    assert_equal(run(single, HARD), chinese.encode(HARD, 512).batch)
    assert [array.shape for array in run(single, [])] == [(0, 2)] * 3


@pytest.mark.slow
@pytest.mark.parametrize("lowercase", [True, False])
def test_every_character_there_is(data, chinese, single, lowercase):
    """Alone between Chinese characters, repeated, and inside a word."""
    if not lowercase:
        chinese = WordPiece.from_file(data / "vocab" / "vocab.txt", lowercase)
        single = session(chinese, max_seq_length=512)
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x2A6D0, 0x32000), *range(0xE0000, 0xE0200)]
    texts = [
        "".join(f"中{chr(code)}国 {chr(code) * 2} a{chr(code)}b " for code in codes[start : start + 60])
        for start in range(0, len(codes), 60)
    ]
    for start in range(0, len(texts), 64):
        batch = texts[start : start + 64]
        assert_equal(run(single, batch), chinese.encode(batch, 512).batch)


@given(st.lists(st.text(max_size=40), max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_text(chinese, single, texts):
    if texts:
        assert_equal(run(single, texts), chinese.encode(texts, 512).batch)


@pytest.mark.parametrize("max_seq_length", [5, 16, 17])
def test_pairs(chinese, max_seq_length):
    """Short and long ones, either longer than the other, cut as features are."""
    pairs = session(chinese, 2, max_seq_length)
    texts = ["", "中", "中国", "一二三四五六七", "abc 一二三四五六七八九十" * 3]
    examples = [Example(0, a, b, None) for a in texts for b in texts]
    features = classification_features(chinese, examples, max_seq_length)
    outputs = run(pairs, [example.text for example in examples], [example.pair for example in examples])
    assert_equal(outputs, features.batch(np.arange(len(examples))))
    with pytest.raises(Exception, match="Reshape"):  # of ONNX Runtime, whose versions call it differently
        run(pairs, ["一", "二"], ["一"])


@pytest.mark.slow
@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_any_vocabulary(seed, lowercase):
    """Random pieces of few characters: many ways to begin a word, few to end it."""
    chance = random.Random(seed)
    letters = "abÀéИ가#"
    pieces = {"".join(chance.choices(letters, k=chance.randint(1, 12))) for _ in range(60)}
    pieces |= {"##" + piece for piece in list(pieces)[::2]} | set("中，")
    tokenizer = WordPiece([*SPECIAL_TOKENS, *sorted(pieces)], Settings(do_lower_case=lowercase))
    opened = session(tokenizer)
    texts = ["".join(chance.choices(letters.lower() + letters + " 中，", k=chance.randint(0, 150))) for _ in range(500)]
    assert_equal(run(opened, texts), tokenizer.encode(texts, 128).batch)


SETTINGS = [
    Settings(strip_accents=False),
    Settings(do_lower_case=False, strip_accents=True),
    Settings(tokenize_chinese_chars=False),
    Settings(do_lower_case=False, unk_token="<unk>", mask_token="<mask>"),
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_any_settings(settings):
    """Accents alone and composed, also of punctuation, Korean; pieces of them in the vocabulary and not."""
    units = ["a", "A", "à", "À", "a\u0300", "A\u0300", "ü\u0300", "u\u0308\u0300", "<\u0338", "=", "\u2260", "\u0338"]
    units += [
        "각",
        "\u1100\u1161",
        "\u11a8",
        "가",
        "中",
        "\U0002b820",
        "，",
        " ",
        "\u3000",
        "\u200b",
        "é",
        "e\u200b\u0301",
    ]
    for seed in range(2):
        chance = random.Random(seed)
        pieces = {"".join(chance.choices(units, k=chance.randint(1, 3))) for _ in range(80)} | set("aàǜé≠각가中=")
        pieces = {piece for piece in pieces if piece.isprintable() and " " not in piece}
        pieces |= {"##" + piece for piece in list(pieces)[::2]}
        tokenizer = WordPiece([*settings.special, *sorted(pieces)], settings)
        texts = ["".join(chance.choices(units, k=chance.randint(0, 30))) for _ in range(200)]
        assert_equal(run(session(tokenizer), texts), tokenizer.encode(texts, 128).batch)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [Settings(), *SETTINGS[:3]])
def test_added_tokens(settings):
    """Written so, or looked for in normalized text; in and out of the vocabulary, one the beginning of another."""
    added = (Added("[X]"), Added("[X]]", rstrip=True), Added("<É>", lstrip=True), Added("中，国"))
    added += tuple(Added(content, special=False, normalized=True) for content in ("天气", "天气ü", "né w", "<Ö>"))
    tokens = [*SPECIAL_TOKENS, *"中国天气，abn<", "##a", "##b", "née", "[X]", *(token.content for token in added[1:])]
    tokenizer = WordPiece(tokens, Settings(**{**settings.__dict__, "added": added, "appended": len(added) - 1}))
    units = [
        "[X]",
        "[X]]",
        "[X",
        "]",
        "<É>",
        "<é>",
        "É",
        "中，国",
        "中",
        "，",
        "天气",
        "天",
        "气",
        "ü",
        "u\u0308",
        "né w",
        "ne",
    ]
    units += ["NÉ W", " ", "w", "<Ö>", "<ö>", "a", "b", "[MASK]", "<"]
    chance = random.Random(1)
    texts = ["".join(chance.choices(units, k=chance.randint(0, 20))) for _ in range(1000)]
    batch = tokenizer.encode(texts, 128).batch
    assert {tokenizer.ids[token.content] for token in added} <= set(batch.input_ids.reshape(-1).tolist())
    assert_equal(run(session(tokenizer), texts), batch)


@pytest.mark.parametrize(
    ("added", "says"),
    [
        (Added("x", single_word=True), "whole words only, as the added 'x' is"),
        (Added("aba"), "'aba' and 'aba' overlap"),
        (Added("x[CLS]"), r"'x\[CLS\]' and '\[CLS\]' overlap"),
    ],
)
def test_added_tokens_that_the_graph_does_not_find(added, says):
    tokenizer = WordPiece([*SPECIAL_TOKENS, added.content], Settings(added=(added,), appended=1))
    with pytest.raises(InputError, match=says):
        session(tokenizer)
