"""BERT's tokenizer as part of an ONNX graph: strings in, padded token ids out.

Only operators that ONNX Runtime brings are used, so a file with a tokenizer needs no
extension. `text.tokenizer.WordPiece` says what becomes of a character when the graph is built, once
for every code point there is; the ids are the same by construction.

The steps, in the order of the graph, all of them over the characters of all texts at once:

1. characters: each text becomes a row of characters, each character a *kind*: a number for what is
   special about it, or one of three for the many that nothing is special about (removed, stands
   alone and unknown, belongs to a word and unknown);
2. special and added tokens written out in the text, ``[MASK]`` say, become one kind;
3. kinds become *symbols*, none to a few each (accents go, Hangul falls apart): a space, a token that
   stands alone, or a word's character; where accents stay, a letter and its accent become one;
4. added tokens that are looked for in text so normalized become one symbol;
5. words become tokens, the longest piece first, as BERT does it, for all words side by side;
6. tokens are cut to length and laid out in rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import product
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from tokenizers import normalizers

from backends.files import InputError
from backends.interface import ONNX_INPUTS
from export.graph import MICROSOFT, ML, Graph, model_of
from export.model import TEXT_INPUTS, TEXT_OUTPUTS
from text.tokenizer import WordPiece
from text.vocabulary import MAX_WORD, SPECIAL_TOKENS, Settings

PADDING, SPACE_KIND, REMOVED, ALONE, UNKNOWN, END_KIND = range(6)
"""Kinds that do not belong to a single character."""
LONE, END, NOTHING, SPACE, WORD = -4, -3, -2, -1, 1 << 20
"""Symbols: from LONE down, characters that stand alone and are parts of something longer; a row's end, nothing, a
space; from 0 the ids of tokens that stand alone; from WORD the characters of words."""
ACCENTS = 3
"""Accents of a letter at most, in characters that Unicode composes."""
BITS = 20
"""Bits of a token's id, and of a node's number, in the dictionary of pieces."""


def add_tokenizer(graph: Graph, tokenizer: WordPiece, texts: list[str], max_seq_length: int) -> list[str]:
    """Adds the tokenizer of `texts`, the names of one or two inputs, string [N] each.

    Returns:
        The names of input_ids, token_type_ids and attention_mask, int64 [N, longest]:
        ``[CLS] ... [SEP]``, of pairs ``[CLS] ... [SEP] ... [SEP]``, at most `max_seq_length` long,
        the longer text cut first (`text.features.cut_pair`).

    Raises:
        InputError: tokens that were added are of a kind that the graph does not find.
    """
    tables = Tables(tokenizer)
    kinds, rows, count = _characters(graph, tables, texts)
    kinds = _replaced(graph, kinds, tables.written, END_KIND, REMOVED)
    symbols, rows = _symbols(graph, tables, kinds, rows)
    tokens, rows = _tokens(graph, tables, symbols, rows)
    return _layout(graph, tokenizer, texts, tokens, rows, count, max_seq_length)


def with_tokenizer(
    model: onnx.ModelProto, tokenizer: WordPiece, labels: Sequence[str], pairs: bool, max_seq_length: int
) -> onnx.ModelProto:
    """Returns a classifier that takes strings and gives their labels.

    Args:
        model: takes `ONNX_INPUTS` and gives logits.

    Returns:
        A model that takes ``text``, and for pairs ``text_pair``, string [N] each, and gives ``label``,
        string [N], and ``probabilities``, float32 [N, classes].
    """
    graph = Graph("tokenizer/")
    texts = list(TEXT_INPUTS[: 1 + pairs])
    tokens = dict(zip(ONNX_INPUTS, add_tokenizer(graph, tokenizer, texts, max_seq_length)))
    for node in model.graph.node:
        copied = graph.copy(node)
        copied.input[:] = [tokens.get(name, name) for name in node.input]
    label, probabilities = TEXT_OUTPUTS
    graph.into([probabilities], "Softmax", "logits", axis=-1)
    best = graph.op("ArgMax", "logits", axis=1, keepdims=0)
    names = {"keys_int64s": range(len(labels)), "values_strings": list(labels)}
    graph.into([label], "LabelEncoder", best, domain=ML, **names)
    graph.types += model.graph.value_info
    whole = model_of(
        graph,
        [helper.make_tensor_value_info(name, TensorProto.STRING, ["batch"]) for name in texts],
        [
            helper.make_tensor_value_info(label, TensorProto.STRING, ["batch"]),
            helper.make_tensor_value_info(probabilities, TensorProto.FLOAT, ["batch", len(labels)]),
        ],
    )
    whole.graph.initializer.extend(model.graph.initializer)
    whole.producer_name, whole.producer_version = model.producer_name, model.producer_version
    whole.metadata_props.extend(model.metadata_props)
    return whole


# Characters


_BLOCKS = tuple(
    "".join(map(chr, range(start, start + 256))) for start in (*range(0, 0xD800, 256), *range(0xE000, 0x110000, 256))
)
"""All characters."""


@lru_cache(maxsize=2)
def _effects(settings: Settings) -> dict[str, tuple[tuple[str, bool], ...]]:
    """Returns every character -> the characters that the tokenizer makes of it, each with whether it
    stands alone; a space is (" ", True)."""
    tokenizer = WordPiece(SPECIAL_TOKENS, settings).tokenizer
    normalize, split = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str

    @cache
    def part(character: str) -> tuple[str, bool]:
        words = len(split(f"a{character}a"))
        return (" ", True) if words == 2 else (character, words == 3)

    effects: dict[str, tuple[tuple[str, bool], ...]] = {}
    for block in _BLOCKS:
        normalized = normalize(block)
        # Of most blocks nothing is left, or all characters are one word.
        if normalized in ("", block) and len(split(normalized)) <= 1:
            effects |= {character: ((character, False),) * bool(normalized) for character in block}
        else:
            effects |= {character: tuple(map(part, normalize(character))) for character in block}
    return effects


def _compositions(alphabet: set[str], alone: set[str], normalize: Callable[[str], str]) -> dict[tuple[str, str], str]:
    """Returns two characters -> the one that they become where accents stay, as far as a word of an alphabet's
    characters becomes another by it. Adds the characters to the alphabet."""
    decompose = normalizers.NFD().normalize_str
    pairs = {}
    for character in (character for block in _BLOCKS if decompose(block) != block for character in block):
        parts = decompose(character)
        first = normalize(parts[:-1])
        if len(first) == 1 and normalize(parts) == character:
            pairs[first, parts[-1]] = character
    compositions: dict[tuple[str, str], str] = {}
    while more := {
        pair: whole
        for pair, whole in pairs.items()
        if pair not in compositions and (whole in alphabet or pair[0] in alone or alphabet.issuperset(pair))
    }:
        compositions |= more
        alphabet |= {character for pair, whole in more.items() for character in (*pair, whole)}
    return compositions


class Tables:
    """Tables that the graph looks up.

    Raises:
        InputError: added tokens that overlap, or that are words of their own.
    """

    def __init__(self, tokenizer: WordPiece) -> None:
        settings, ids = tokenizer.settings, tokenizer.pieces
        normalize = tokenizer.tokenizer.normalizer.normalize_str
        effects = _effects(Settings(settings.do_lower_case, settings.strip_accents, settings.tokenize_chinese_chars))
        self.unknown = tokenizer.unk
        written = {token.content: tokenizer.ids[token.content] for token in settings.whole if not token.normalized}
        normal = {
            normalize(token.content): tokenizer.ids[token.content] for token in settings.whole if token.normalized
        }
        _check_added(settings, written, normal)

        alone = {part for parts in effects.values() for part, single in parts if single}
        in_words = {part for parts in effects.values() for part, single in parts if not single}
        begin = {token: i for token, i in ids.items() if token and in_words.issuperset(token)}
        inside = {t[2:]: i for t, i in ids.items() if len(t) > 2 and t[:2] == "##" and in_words.issuperset(t[2:])}
        alphabet = {character for piece in (*begin, *inside) for character in piece}
        alphabet.update(character for content in normal for character in content)
        pairs = {} if settings.without_accents else _compositions(alphabet, alone, normalize)
        codes = {character: number for number, character in enumerate(sorted(alphabet - alone), 1)}
        self.pieces = Pieces(begin, inside, codes)
        lone = {character: LONE - number for number, character in enumerate(sorted(alphabet & alone - {" "}))}
        self.lone = [ids.get(character, self.unknown) for character in lone]

        def symbol(part: str, single: bool) -> int:
            if not single:
                return WORD + codes.get(part, 0)
            return SPACE if part == " " else lone.get(part, ids.get(part, self.unknown))

        self.composed = {
            (symbol(a, a in lone), symbol(b, b in lone)): symbol(whole, False) for (a, b), whole in pairs.items()
        }
        self.normal = {tuple(symbol(c, c in alone) for c in content): number for content, number in normal.items()}

        rows = [[NOTHING], [SPACE], [NOTHING], [self.unknown], [WORD], [END]]
        numbers: dict[tuple[str, ...], int] = {}
        self.kinds = {"": PADDING}
        removed, unknown = [], []
        parts_of_tokens = {character for content in written for character in content}
        for character, parts in effects.items():
            symbols = [symbol(*part) for part in parts]
            if WORD in symbols and min(symbols) >= WORD:
                symbols = [WORD]  # what is unknown in part is unknown
            if character in parts_of_tokens:
                pass
            elif not symbols:
                removed.append(ord(character))
                continue
            elif symbols == [self.unknown]:
                unknown.append(ord(character))
                continue
            elif symbols == [WORD]:
                continue
            elif symbols == [SPACE]:
                self.kinds[character] = SPACE_KIND
                continue
            key = (character,) if character in parts_of_tokens else tuple(map(str, symbols))
            if key not in numbers:
                numbers[key] = len(rows)
                rows.append(symbols)
            self.kinds[character] = numbers[key]
        self.removed, self.alone = _ranges(removed), _ranges(unknown)
        self.written: dict[tuple[int, ...], int] = {}
        for content, number in written.items():
            self.written[tuple(self.kinds[character] for character in content)] = len(rows)
            rows.append([number])
        self.symbols = np.full((len(rows), max(map(len, rows))), NOTHING)
        for row, symbols in zip(self.symbols, rows):
            row[: len(symbols)] = symbols


def _check_added(settings: Settings, *contents: Iterable[str]) -> None:
    """Raises InputError if one token that was added can be found inside another, or over its end."""
    for token in settings.whole:
        if token.single_word:
            raise InputError(f"--tokenizer in-graph: does not find whole words only, as the added {token.content!r} is")
    for group in contents:
        for a, b in product(sorted(group), repeat=2):
            if any(a[i : i + len(b)] == b[: len(a) - i] for i in range(1, len(a))):
                raise InputError(f"--tokenizer in-graph: the added tokens {a!r} and {b!r} overlap; leave it out")


def _ranges(codes: Iterable[int]) -> str:
    """Returns a regular expression for any of these code points, which come in order."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in ranges) + "]"


class Pieces:
    """The vocabulary as a trie that is walked several characters at a time.

    A key is a node and up to `stride` characters' codes, as digits; its value says the longest
    piece that ends there, or 0, and where the walk goes on after a full stride, or 0.
    """

    def __init__(self, begin: dict[str, int], inside: dict[str, int], codes: dict[str, int]) -> None:
        longest = max(map(len, (*begin, *inside)), default=1)
        nodes = 2 + sum(map(len, (*begin, *inside)))
        self.radix = len(codes) + 1
        self.stride = max(n for n in range(1, longest + 1) if n == 1 or nodes * self.radix ** (n + 1) < 2**62)
        self.strides = -(-longest // self.stride)
        numbers = {(True, ""): 1, (False, ""): 2}
        entries = {0: [0, 0, 0]}  # no node is 0, and the dictionary may not be empty

        def value(node: int, part: str) -> list[int]:
            digits = sum(codes[character] * self.radix**place for place, character in enumerate(part))
            return entries.setdefault(node * self.radix**self.stride + digits, [0, 0, 0])

        for first, pieces in ((True, begin), (False, inside)):
            for piece, token in pieces.items():
                node = numbers[first, ""]
                walked = 0
                while len(piece) - walked > self.stride:
                    step = value(node, piece[walked : walked + self.stride])
                    walked += self.stride
                    step[2] = node = numbers.setdefault((first, piece[:walked]), len(numbers) + 1)
                value(node, piece[walked:])[:2] = [len(piece), token]
        self.keys = list(entries)
        self.values = [(length << 2 * BITS) + (token << BITS) + node for length, token, node in entries.values()]


# The graph


def _characters(graph: Graph, tables: Tables, texts: list[str]) -> tuple[str, str, str]:
    """Returns the kinds of all characters [K], the rows they are of [K], and how many rows there are [1]."""
    op = graph.op
    empty = graph.constant([""], object)  # one more row, so that there is always one
    rows = op("Concat", *texts, empty, axis=0)
    split = {"separators": [""], "mark": 0, "mincharnum": 1, "pad_value": ""}
    characters = op("Tokenizer", rows, domain=MICROSOFT, **split)
    # ONNX does not know the operator, and its check of the next one needs a type.
    graph.types.append(helper.make_tensor_value_info(characters, TensorProto.STRING, [None, None]))
    names = [character.encode() for character in tables.kinds]
    numbers = list(tables.kinds.values())
    kinds = op("LabelEncoder", characters, domain=ML, keys_strings=names, values_int64s=numbers, default_int64=-1)
    rare = op("Transpose", op("NonZero", op("Less", kinds, 0)), perm=[1, 0])
    rare_characters = op("GatherND", characters, rare)
    others = op("Where", op("RegexFullMatch", rare_characters, pattern=tables.alone), [ALONE], [UNKNOWN])
    others = op("Where", op("RegexFullMatch", rare_characters, pattern=tables.removed), [REMOVED], others)
    kinds = op("ScatterND", kinds, rare, others)
    # Words and tokens do not go on in the next row.
    count = op("Shape", kinds, start=0, end=1)
    ends = op("Expand", [[END_KIND]], op("Concat", count, [1], axis=0))
    kinds = op("Concat", kinds, ends, axis=1)
    places = op("NonZero", kinds)  # of all but padding
    return op("GatherND", kinds, op("Transpose", places, perm=[1, 0])), op("Gather", places, 0, axis=0), count


def _replaced(graph: Graph, values: str, tokens: Mapping[tuple[int, ...], int], filler: int, removed: int) -> str:
    """Replaces sequences of values: by what they become at their first place, and by `removed` at the others."""
    op = graph.op
    ordered = sorted(tokens, key=len)  # the longest is found last, and stays
    longest = len(ordered[-1])
    firsts = sorted({token[0] for token in ordered})
    is_first = op("Equal", values, firsts[0])
    for first in firsts[1:]:
        is_first = op("Or", is_first, op("Equal", values, first))
    begin = op("Transpose", op("NonZero", is_first), perm=[1, 0])
    places = op("Add", begin, [list(range(longest))])
    window = op("Gather", op("Concat", values, [filler] * longest, axis=0), places)
    wanted = np.zeros((1, len(ordered), longest), np.int64)
    free = np.ones(wanted.shape, bool)
    becomes = np.zeros((len(ordered) + 1, longest), np.int64)
    for number, token in enumerate(ordered):
        wanted[0, number, : len(token)] = token
        free[0, number, : len(token)] = False
        becomes[number + 1, : len(token)] = [tokens[token]] + [removed] * (len(token) - 1)
    changes = np.concatenate([np.zeros((1, longest), bool), ~free[0]])
    equal = op("Or", op("Equal", op("Unsqueeze", window, [1]), wanted), graph.constant(free, bool))
    whole = op("ReduceMin", op("Cast", equal, to=TensorProto.INT32), [2], keepdims=0)
    match = op(
        "ReduceMax", op("Mul", op("Cast", whole, to=TensorProto.INT64), [range(1, len(ordered) + 1)]), [1], keepdims=0
    )
    new = op("Reshape", op("Gather", becomes, match), [-1])
    changed = op("Reshape", op("Gather", graph.constant(changes, bool), match), [-1])
    return op(
        "ScatterElements", values, op("Compress", op("Reshape", places, [-1]), changed), op("Compress", new, changed)
    )


def _symbols(graph: Graph, tables: Tables, kinds: str, rows: str) -> tuple[str, str]:
    """Returns the symbols of all rows, and the rows they are of, [S] each."""
    op = graph.op

    def compressed(symbols: str, rows: str) -> tuple[str, str]:
        kept = op("Not", op("Equal", symbols, NOTHING))
        return op("Compress", symbols, kept, axis=0), op("Compress", rows, kept, axis=0)

    symbols = op("Gather", tables.symbols, kinds)
    rows = op("Reshape", op("Expand", op("Unsqueeze", rows, [1]), op("Shape", symbols)), [-1])
    symbols, rows = compressed(op("Reshape", symbols, [-1]), rows)
    for _ in range(ACCENTS if tables.composed else 0):
        symbols, rows = compressed(_composed(graph, tables, symbols), rows)
    if tables.normal:
        symbols, rows = compressed(_replaced(graph, symbols, tables.normal, END, NOTHING), rows)
    if tables.lone:
        lone = op("Gather", tables.lone, op("Max", op("Sub", [LONE], symbols), [0]))
        symbols = op("Where", op("LessOrEqual", symbols, [LONE]), lone, symbols)
    return symbols, rows


def _composed(graph: Graph, tables: Tables, symbols: str) -> str:
    """Composes each letter and the accent behind it. No accent is a letter with another behind it."""
    op = graph.op
    pairs = tables.composed
    assert not {a for a, _ in pairs} & {b for _, b in pairs}
    following = op("Concat", op("Slice", symbols, [1], [2**62], [0]), [END], axis=0)
    maps: dict[str, Any] = {
        "keys_int64s": [(a << 2 * BITS) + b for a, b in pairs],
        "values_int64s": list(pairs.values()),
        "default_int64": NOTHING,
    }
    whole = op("LabelEncoder", op("Add", op("Mul", symbols, [1 << 2 * BITS]), following), domain=ML, **maps)
    first = op("Not", op("Equal", whole, NOTHING))
    second = op("Concat", graph.constant([False], bool), op("Slice", first, [0], [-1], [0]), axis=0)
    return op("Where", first, whole, op("Where", second, [NOTHING], symbols))


def _tokens(graph: Graph, tables: Tables, symbols: str, rows: str) -> tuple[str, str]:
    """Returns the tokens of all rows, and the rows they are of, [T] each."""
    op = graph.op
    in_word = op("GreaterOrEqual", symbols, WORD)
    # Places of words' characters [P], and one more behind them all, where the last piece leads.
    places = op("Concat", op("Squeeze", op("NonZero", in_word), [0]), op("Shape", symbols), axis=0)
    before = op("Concat", [-2], op("Slice", places, [0], [-1], [0]), axis=0)
    starts = op("Greater", op("Sub", places, before), 1)
    length, piece = _longest_pieces(graph, tables.pieces, symbols, places, starts)

    # Where pieces begin: at words' starts and wherever a piece that begins there leads. Followed for
    # 1, 2, 4, ... pieces, until the longest word is through.
    total = op("Shape", places)
    numbers = op("Range", 0, op("Squeeze", total), 1)
    next_place = op("Min", op("Add", numbers, length), op("Sub", total, [1]))
    reached = first = op("Cast", starts, to=TensorProto.INT32)
    for _ in range((MAX_WORD - 1).bit_length()):
        reached = op("ScatterElements", reached, next_place, reached, axis=0, reduction="max")
        next_place = op("Gather", next_place, next_place)

    # A word that is too long, or has a place from which no piece goes on, is unknown.
    begins = op("Squeeze", op("NonZero", starts), [0])
    ends = op("Concat", op("Slice", begins, [1], [2**62], [0]), total, axis=0)
    unknown = op("Cast", op("Greater", op("Sub", ends, begins), MAX_WORD), to=TensorProto.INT32)
    word = op("Sub", op("CumSum", op("Cast", starts, to=TensorProto.INT64), 0), 1)
    stuck = op("Mul", reached, op("Cast", op("Equal", length, 0), to=TensorProto.INT32))
    unknown = op("ScatterElements", unknown, word, stuck, axis=0, reduction="max")
    unknown = op("Cast", op("Gather", unknown, word), to=TensorProto.BOOL)
    tokens = op("Where", unknown, [tables.unknown], piece)
    shown = op("Cast", op("Where", unknown, first, reached), to=TensorProto.BOOL)
    tokens = op("Where", shown, tokens, [NOTHING])

    all_but_last = ([0], [-1], [0])
    symbols = op("ScatterElements", symbols, op("Slice", places, *all_but_last), op("Slice", tokens, *all_but_last))
    kept = op("GreaterOrEqual", symbols, 0)
    return op("Compress", symbols, kept, axis=0), op("Compress", rows, kept, axis=0)


def _longest_pieces(graph: Graph, pieces: Pieces, symbols: str, places: str, starts: str) -> tuple[str, str]:
    """Returns the length of the longest piece that begins at a place, 0 if there is none, and its id; [P] each."""
    op = graph.op
    reach = pieces.stride * pieces.strides
    codes = op("Concat", op("Max", op("Sub", symbols, [WORD]), [0]), [0] * (reach + 1), axis=0)
    window = op("Gather", codes, op("Add", op("Unsqueeze", places, [1]), [list(range(reach))]))
    digits = op("Mul", window, [[pieces.radix ** (place % pieces.stride) for place in range(reach)]])
    digits = op("CumSum", op("Reshape", digits, [0, pieces.strides, pieces.stride]), 2)
    low = (1 << BITS) - 1

    body = Graph(f"{graph.prefix}walk/", graph)
    going, node, best = (body.name(name) for name in ("going", "node", "best"))
    turn = body.name("turn")
    part = body.op("Gather", digits, turn, axis=1)
    key = body.op("Add", part, body.op("Unsqueeze", body.op("Mul", node, [pieces.radix**pieces.stride]), [1]))
    maps: dict[str, Any] = {"keys_int64s": pieces.keys, "values_int64s": pieces.values, "default_int64": 0}
    values = body.op("LabelEncoder", key, domain=ML, **maps)
    longest = body.op("Max", best, body.op("ReduceMax", values, [1], keepdims=0))
    further = body.op("BitwiseAnd", body.op("Gather", values, pieces.stride - 1, axis=1), [low])
    more = body.op("Greater", body.op("ReduceMax", further, keepdims=0), 0)

    def typed(name: str, kind: int = TensorProto.INT64, shape: tuple[None, ...] = (None,)) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    walk = helper.make_graph(
        body.nodes,
        "walk",
        [typed(turn, shape=()), typed(going, TensorProto.BOOL, ()), typed(node), typed(best)],
        [typed(more, TensorProto.BOOL, ()), typed(further), typed(longest)],
    )
    root = op("Where", starts, [1], [2])
    zeros = op("Mul", places, [0])
    _, best = graph.ops(2, "Loop", pieces.strides, graph.constant(True, bool), root, zeros, body=walk)
    shift = graph.constant(2 * BITS, np.uint64)
    length = op("BitShift", op("Cast", best, to=TensorProto.UINT64), shift, direction="RIGHT")
    piece = op("BitwiseAnd", op("Div", best, [1 << BITS]), [low])
    return op("Cast", length, to=TensorProto.INT64), piece


def _layout(
    graph: Graph, tokenizer: WordPiece, texts: list[str], tokens: str, rows: str, count: str, max_seq_length: int
) -> list[str]:
    """Returns input_ids, token_type_ids and attention_mask of the tokens of all texts, those of second texts last."""
    op = graph.op
    ones = op("Expand", [1], op("Shape", tokens))
    lengths = op("ScatterElements", op("Expand", [0], count), rows, ones, axis=0, reduction="add")
    first = op("CumSum", lengths, 0, exclusive=1)
    positions = op("Sub", op("Range", 0, op("Squeeze", op("Shape", tokens)), 1), op("Gather", first, rows))

    lines = op("Shape", texts[0])
    room = max_seq_length - 1 - len(texts)
    a = op("Slice", lengths, [0], lines, [0])
    if len(texts) == 1:
        kept = [op("Min", a, [room])]
        shifts = op("Expand", [1], lines)
    else:
        # Reshaped, so that a first and a second text too many are an error.
        b = op("Reshape", op("Slice", lengths, lines, [-1], [0]), lines, allowzero=1)
        # Each has half of the room and what the other leaves.
        kept = [
            op("Min", length, op("Max", [half], op("Sub", [room], other)))
            for length, other, half in ((a, b, -(-room // 2)), (b, a, room // 2))
        ]
        shifts = op("Concat", op("Expand", [1], lines), op("Add", kept[0], [2]), axis=0)
    total = op("Add", kept[0] if len(texts) == 1 else op("Add", *kept), [1 + len(texts)])
    width = op("ReduceMax", op("Concat", total, [1 + len(texts)], axis=0), [0], keepdims=1)

    begin = op("Mul", op("Range", 0, op("Squeeze", lines), 1), width)
    inside = op("Less", positions, op("Gather", op("Concat", *kept, [0], axis=0), rows))
    tokens, rows, positions = (op("Compress", values, inside, axis=0) for values in (tokens, rows, positions))
    offsets = op("Add", op("Concat", *[begin] * len(texts), axis=0), shifts)
    ends = [op("Sub", op("Add", begin, total), [1])]
    if len(texts) == 2:
        ends.append(op("Add", op("Add", begin, kept[0]), [1]))
    cls, sep = (op("Expand", [token], lines) for token in (tokenizer.cls, tokenizer.sep))
    places = op("Concat", op("Add", op("Gather", offsets, rows), positions), begin, *ends, axis=0)
    blank = op("Expand", [tokenizer.pad], op("Mul", lines, width))
    filled = op("ScatterElements", blank, places, op("Concat", tokens, cls, *[sep] * len(ends), axis=0), axis=0)
    shape = op("Concat", lines, width, axis=0)
    columns = op("Unsqueeze", op("Range", 0, op("Squeeze", width), 1), [0])
    mask = op("Less", columns, op("Unsqueeze", total, [1]))
    if len(texts) == 1:
        types = op("Expand", [[0]], shape)
    else:
        second = op("Greater", columns, op("Unsqueeze", op("Add", kept[0], [1]), [1]))
        types = op("Cast", op("And", mask, second), to=TensorProto.INT64)
    return [op("Reshape", filled, shape, allowzero=1), types, op("Cast", mask, to=TensorProto.INT64)]
