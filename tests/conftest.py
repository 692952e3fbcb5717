import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

import backends
from backends.files import InputError
from backends.interface import Batch, Wanted
from backends.pretrained import write_model
from text.tokenizer import SPECIAL_TOKENS, WordPiece

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("MINILM_DATA", ROOT.parent / "shared" / "data"))

TINY = {
    "model_type": "bert",
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
"""A BERT small enough for tests; weights spread wide enough for its relations to differ."""
UNEVEN = {
    **TINY,
    "attention_head_size": 8,
    "num_attention_heads_by_layer": [4, 1, 3],
    "intermediate_size_by_layer": [64, 24, 1],
}
"""One whose layers differ."""


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """Where Paddle writes no ONNX (Python 3.13), tests that need it to are skipped."""
    try:
        return (yield)
    except InputError as error:
        if "paddle2onnx is not installed" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def torch_backend():
    return backends.load("torch", "cpu")


@pytest.fixture(scope="session")
def paddle_backend():
    return backends.load("paddle", "cpu")


@pytest.fixture(params=["torch", "paddle"])
def backend(request):
    return request.getfixturevalue(f"{request.param}_backend")


@pytest.fixture(scope="session")
def data():
    if not DATA.is_dir():
        pytest.skip(f"real text is not at {DATA}; set MINILM_DATA to a folder with corpus/, clue/ and vocab/")
    return DATA


os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-")


def environment(**settings):
    """Environment variables of a process that imports this project and its tests."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **settings}


def make_batch(lengths, vocab_size=200, seed=0):
    """Random tokens, the given numbers of them, padded to the longest."""
    random = np.random.default_rng(seed)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = random.integers(5, vocab_size, mask.shape) * mask
    return Batch(ids, np.zeros_like(ids), mask)


def last_states(model, batch):
    """The last layer's output for each token, [T, D]."""
    last = len(model.shape.layers)
    return model.run(batch, Wanted(states=[last])).states[last]


def logits_of(model, batch):
    return model.run(batch, Wanted(logits=True)).logits


LABELS = ("甲", "乙", "丙")
CHARACTERS = "一二三四五六七八九十天气好坏，。abc"


def model_folder(folder, head="sequence_classification", positions=64, **config):
    """A model with random weights and a small vocabulary, to be exported."""
    tokenizer = WordPiece([*SPECIAL_TOKENS, *CHARACTERS])
    labels = ("start", "end") if head == "question_answering" else LABELS
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    config = {**TINY, **names, "vocab_size": len(tokenizer), "max_position_embeddings": positions, **config}
    backend = backends.load("torch", "cpu")
    backend.seed(3)
    folder.mkdir()
    tokenizer.save(folder, positions)
    write_model(folder, config, backend.model(config, None, head).weights(), head)
    return folder
