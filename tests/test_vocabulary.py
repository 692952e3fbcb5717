"""Tokenizers out of model folders: what transformers and paddlenlp save, and what else one finds there."""

import hashlib
import json
import unicodedata

import pytest
from conftest import CHARACTERS
from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, BertTokenizer, BertTokenizerFast

from backends.files import InputError
from export.model import Description
from text.data import Sentence
from text.features import labelling_features
from text.masking import mask_words
from text.tokenizer import WordPiece
from text.vocabulary import SPECIAL_TOKENS, Added, Settings

TOKENS = [*SPECIAL_TOKENS, *CHARACTERS, "国", "caf", "##e", "café", "cafe", "##国", "##天", "foo", "##s", "[unused1]"]
TEXTS = [
    "café一国天 Café CAFE",
    "<e1>天气</e1>好，bar BAR bars foo 天气",
    "x <mask>  y[MASK] [unused1] 不",
    "天国 国天",
    "caf\u00e9",
    "",
]


def save(folder, tokens=TOKENS, **config):
    """A folder of a vocab.txt and settings, as one writes it by hand."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))
    return folder


def ids(tokenizer, text):
    return tokenizer.encode([text], 512).batch.input_ids[0].tolist()


def assert_same(tokenizer, *others):
    for other in others:
        # The fast tokenizers and paddlenlp's do not compose e and its accent.
        composed = ["cafe\u0301"] * (type(other) is BertTokenizer)
        for text in (*TEXTS, *composed):
            assert other(text)["input_ids"] == ids(tokenizer, text), (type(other), text)


SETTINGS = [
    {},
    {"do_lower_case": False},
    {"strip_accents": False, "tokenize_chinese_chars": False},
    {"do_lower_case": False, "strip_accents": True},
    {"unk_token": "<unk>", "mask_token": "<mask>"},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("added", [False, True])
def test_ids_are_those_of_both_libraries(tmp_path, settings, added):
    """A tokenizer that transformers saved, read; saved again, read by transformers and paddlenlp."""
    import paddlenlp.transformers

    tokens = [*TOKENS, *(token for token in settings.values() if isinstance(token, str))]
    reference = BertTokenizer.from_pretrained(save(tmp_path / "by-hand", tokens, **settings))
    if added:
        reference.add_special_tokens({"additional_special_tokens": ["<e1>", "</e1>", "[unused1]"]})
        reference.add_tokens(["天气", "BAR"])
    reference.save_pretrained(tmp_path / "theirs")
    tokenizer = WordPiece.from_model(tmp_path / "theirs")
    assert len(tokenizer) == len(reference)
    assert_same(tokenizer, reference)
    (tmp_path / "ours").mkdir()
    tokenizer.save(tmp_path / "ours", 512)
    assert_same(
        tokenizer,
        AutoTokenizer.from_pretrained(tmp_path / "ours", use_fast=False),
        BertTokenizerFast.from_pretrained(tmp_path / "ours"),
        paddlenlp.transformers.BertTokenizer.from_pretrained(str(tmp_path / "ours")),
    )
    again = WordPiece.from_model(tmp_path / "ours")
    assert (again.tokens, again.settings) == (tokenizer.tokens, tokenizer.settings)
    assert again.fingerprint() == tokenizer.fingerprint()
    metadata = Description(None, (), 64, tokenizer.settings, tuple(tokenizer.tokens)).metadata()
    assert Description.of(metadata).settings == tokenizer.settings


@pytest.mark.parametrize("settings", SETTINGS[:4])
def test_a_folder_of_transformers_5(tmp_path, settings):
    """tokenizer.json alone, with truncation and padding, which are the caller's affair."""
    fast = BertTokenizerFast.from_pretrained(save(tmp_path / "by-hand", **settings))
    fast.add_special_tokens({"additional_special_tokens": ["<e1>", "</e1>"]})
    fast.add_tokens(["天气", "BAR"])
    fast("x", truncation=True, max_length=3, padding="max_length")  # is saved too
    fast.save_pretrained(tmp_path / "saved")
    for name in ("vocab.txt", "special_tokens_map.json", "added_tokens.json"):
        (tmp_path / "saved" / name).unlink()
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = config.pop("additional_special_tokens")
    del config["added_tokens_decoder"]
    (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps({**config, "backend": "tokenizers"}))
    tokenizer = WordPiece.from_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["truncation"]
    assert_same(tokenizer, fast)
    tokenizer.save(tmp_path / "saved", 512)
    assert_same(WordPiece.from_model(tmp_path / "saved"), fast)


def test_a_class_that_takes_its_settings_from_tokenizer_json(tmp_path):
    save(tmp_path / "by-hand", do_lower_case=False)
    BertTokenizerFast.from_pretrained(tmp_path / "by-hand").save_pretrained(tmp_path / "saved")
    for name, lowercase in (("PreTrainedTokenizerFast", False), ("BertTokenizerFast", True)):
        (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        assert WordPiece.from_model(tmp_path / "saved").settings.do_lower_case is lowercase
        reference = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert reference("Café")["input_ids"] == ids(WordPiece.from_model(tmp_path / "saved"), "Café")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"do_basic_tokenize": False}, "do_basic_tokenize 'False': not honoured; expected True"),
        ({"never_split": ["foo"]}, "never_split .*foo.*: not honoured"),
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "tokenizer_class 'BertJapaneseTokenizer': not honoured"),
        ({"truncation_side": "left"}, "truncation_side 'left': not honoured; expected 'right'"),
        ({"split_special_tokens": True}, "split_special_tokens 'True': not honoured"),
        ({"model_input_names": ["input_ids"]}, "model_input_names without token_type_ids"),
        ({"do_lower_case": "yes"}, "'yes' where bool is expected"),
        ({"mask_token": "<mask>"}, "'<mask>' is in no vocabulary there"),
        ({"mask_token": 5}, "'5' where a token is expected"),
        ({"added_tokens_decoder": {"99": {"content": "<e1>"}}}, "'<e1>' has the id 99, where the vocabulary has"),
        (
            {"added_tokens_decoder": {"4": {"content": "<e1>"}}},
            r"'<e1>' has the id 4, where the vocabulary has '\[MASK",
        ),
        ({"added_tokens_decoder": {"x": "<e1>"}}, "'<e1>' has the id 'x'"),
    ],
)
def test_settings_that_are_not_honoured_are_named(tmp_path, config, says):
    with pytest.raises(InputError, match=says):
        WordPiece.from_model(save(tmp_path / "model", **config))


@pytest.mark.parametrize(
    ("part", "content", "says"),
    [
        ("model", {"type": "BPE", "vocab": {}, "merges": []}, "model 'BPE': not honoured"),
        ("model", {"max_input_chars_per_word": 20}, "max_input_chars_per_word '20': not honoured; expected 100"),
        ("model", {"continuing_subword_prefix": "@@"}, "continuing_subword_prefix '@@'"),
        ("model", {"unk_token": "<unk>"}, "unk_token '<unk>'"),
        ("model", {"vocab": {"[PAD]": 10**12}}, "does not number them from 0"),
        ("model", {"vocab": {"[PAD]": 0, "a\nb": 1}}, "has a line end"),
        ("normalizer", {"type": "Sequence", "normalizers": []}, "normalizer 'Sequence': not honoured"),
        ("normalizer", {"clean_text": False}, "clean_text 'False'"),
        ("normalizer", None, "normalizer 'none': not honoured"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer 'Whitespace'"),
        ("post_processor", {"type": "RobertaProcessing"}, "post_processor 'RobertaProcessing'"),
        ("post_processor", {"single": []}, r"post_processor: expected \[CLS\] text \[SEP\]"),
    ],
)
def test_a_tokenizer_json_of_another_tokenizer_is_named(tmp_path, part, content, says):
    BertTokenizerFast.from_pretrained(save(tmp_path / "by-hand")).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "vocab.txt").unlink()
    file = tmp_path / "saved" / "tokenizer.json"
    whole = json.loads(file.read_text())
    whole[part] = {**whole[part], **content} if isinstance(content, dict) and part != "normalizer" else content
    if part == "normalizer" and content and "type" not in content:
        whole[part] = {"type": "BertNormalizer", "lowercase": True, **content}
    file.write_text(json.dumps(whole))
    with pytest.raises(InputError, match=says):
        WordPiece.from_model(tmp_path / "saved")


def test_vocabulary_files(tmp_path):
    """A byte-order mark, Windows line ends; blank and equal lines have ids, and the last of equal ones holds."""
    content = "\ufeff" + "\r\n".join([*SPECIAL_TOKENS, "天", "", "\u3000", "天", "气"]) + "\r\n\r\n"
    save(tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_bytes(content.encode())
    tokenizer = WordPiece.from_model(tmp_path / "model")
    assert len(tokenizer) == 10
    (tmp_path / "model" / "vocab.txt").write_bytes(content.lstrip("\ufeff").encode())
    reference = BertTokenizer.from_pretrained(tmp_path / "model")
    for text in ("天气", "气\u3000天", "x"):
        assert ids(tokenizer, text) == reference(text)["input_ids"]
    tokenizer.save(tmp_path / "model", 64)
    assert_same(WordPiece.from_model(tmp_path / "model"), BertTokenizerFast.from_pretrained(tmp_path / "model"))


def test_no_vocabulary(tmp_path):
    (tmp_path / "spiece.model").touch()
    with pytest.raises(InputError, match=r"neither vocab\.txt nor tokenizer\.json there, only spiece\.model"):
        WordPiece.from_model(tmp_path)


@pytest.mark.parametrize(
    ("entries", "rows", "fits"),
    [
        (118, 118, True),
        (117, 118, False),  # a line is missing
        (119, 118, False),
        (117, 120, True),  # rounded up to a multiple of 8
        (30522, 30528, True),
        (30522, 30592, True),  # of 64
        (17964, 18000, True),  # ERNIE 1.0
        (21127, 21128, False),  # BERT's Chinese vocabulary has no row to spare
        (21128, 21248, True),
        (1000, 1500, False),
    ],
)
def test_a_vocabulary_that_lacks_lines(tmp_path, entries, rows, fits):
    tokenizer = WordPiece([*SPECIAL_TOKENS, *map(str, range(entries - 5))])
    if fits:
        tokenizer.check_fits(rows, tmp_path)
    else:
        with pytest.raises(InputError, match=f"{entries} entries, but the model embeds {rows} tokens"):
            tokenizer.check_fits(rows, tmp_path)


def test_two_vocabularies_that_differ(tmp_path):
    tokenizer = WordPiece(TOKENS)
    tokenizer.save(tmp_path, 64)
    tokenizer.check_fits(len(TOKENS), tmp_path)
    changed = [*TOKENS[:7], "别", *TOKENS[8:]]
    (tmp_path / "vocab.txt").write_text("\n".join(changed) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"token 7 is '别' in vocab\.txt and '三' in tokenizer\.json"):
        WordPiece.from_model(tmp_path).check_fits(len(TOKENS), tmp_path)


def test_a_vocabulary_is_a_file(tmp_path):
    (tmp_path / "vocab.txt").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"vocab\.txt: is not a regular file"):
        WordPiece.from_file(tmp_path / "vocab.txt")
    for name in ("vocab.txt", "tokenizer.json"):
        (tmp_path / name).unlink(missing_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(InputError, match=f"{name}: has 1099511627776 bytes; expected at most"):
            WordPiece.from_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("tokenizer.json", "added_tokens"),
        ("tokenizer_config.json", "added_tokens_decoder"),
        ("tokenizer_config.json", "extra_special_tokens"),
        ("special_tokens_map.json", "additional_special_tokens"),
    ],
)
def test_tokens_that_are_no_list(tmp_path, name, key):
    WordPiece(TOKENS).save(tmp_path, 64)
    (tmp_path / name).write_text(json.dumps({**json.loads((tmp_path / name).read_text()), key: 5}))
    with pytest.raises(InputError, match=f"{key} '5': expected a list or an object of tokens"):
        WordPiece.from_model(tmp_path)


def test_fingerprints(tmp_path):
    """Corpora that were prepared before there were settings are still this vocabulary's."""
    before = hashlib.sha256("\n".join([*TOKENS, "lowercase True"]).encode()).hexdigest()
    assert WordPiece(TOKENS).fingerprint() == before
    others = [{"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]
    others += [{"added": (Added("foo", special=False),)}, {"appended": 1}]
    assert len({before, *(WordPiece(TOKENS, Settings(**other)).fingerprint() for other in others)}) == 6


def test_metadata_of_before_and_of_strangers():
    metadata = {**Description(None, (), 64, Settings(), tuple(TOKENS)).metadata(), "do_lower_case": "false"}
    assert Description.of(metadata).settings == Settings()
    del metadata["tokenizer"]
    assert Description.of(metadata).settings == Settings(do_lower_case=False)
    for lie in ('{"appended": "9"}', '{"added": [{"content": 5}]}', '{"secret": 1}', "[]", "{"):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            Description.of({**metadata, "tokenizer": lie})


def test_added_tokens_in_tasks_and_masks():
    """They are words to the tagger, and special ones nothing that a mask becomes."""
    added = (Added("<e1>"), Added("天气", special=False, normalized=True))
    tokenizer = WordPiece([*TOKENS, "<e1>", "天气"], Settings(added=added, appended=2))
    features = labelling_features(tokenizer, [Sentence(0, ("<e1>", "天气", "好"), (0, 1, 2))], 16)
    assert features.ids[0].tolist() == [2, len(TOKENS), len(TOKENS) + 1, tokenizer.ids["好"], 3]
    assert features.targets[0].tolist() == [-100, 0, 1, 2, -100]
    lines = ["<e1>天气好坏天气一二三" * 3] * 200
    masked = mask_words(tokenizer.encode(lines, 64), lines, tokenizer, 0, 0)
    becomes = set(masked.batch.input_ids.reshape(-1)[masked.positions].tolist())
    assert tokenizer.ids["天气"] in becomes
    assert not becomes & {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("lowercase", [True, False])
def test_every_character_of_unicode_15(lowercase):
    """Alone, repeated and inside a word, as transformers' tokenizer in Python splits text."""
    known = normalizers.Replace(Regex(r"\p{Cn}"), "").normalize_str
    codes = [code for code in (*range(0xD800), *range(0xE000, 0x110000)) if unicodedata.category(chr(code)) != "Cn"]
    codes = [code for code in codes if code < 0xF0000 and known(chr(code))]
    assert len(codes) > 150_000
    tokenizer = WordPiece(SPECIAL_TOKENS, Settings(do_lower_case=lowercase))
    reference = BertTokenizer.__init__.__globals__["BasicTokenizer"](do_lower_case=lowercase)
    exceptions = {0x11938} if lowercase else set()
    exceptions |= {0x1734} if unicodedata.category("\u1734") == "Mn" else set()  # before Unicode 14
    for start in range(0, len(codes), 1000):
        characters = [chr(code) for code in codes[start : start + 1000] if code not in exceptions]
        text = "".join(f"a{c}b {c} a{c}{c} " for c in characters)
        lowered = "".join(c.lower() for c in text) if lowercase else text
        assert tokenizer.words(text) == reference.tokenize(lowered), hex(codes[start])
