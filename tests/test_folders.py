"""Model folders as others leave them: read as they are, or refused by a line that says what is wrong with them."""

import json
import os
import re

import numpy as np
import pytest
from conftest import TINY, logits_of, make_batch

from backends.files import InputError
from backends.pretrained import find_model, fingerprint, labels_of, read_config, read_weights, write_model

WORDS = "embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def tiny(torch_backend):
    """The weights of a small classifier."""
    torch_backend.seed(1)
    return torch_backend.model(TINY, head="sequence_classification").weights()


def write_config(folder, name="config.json", **config):
    (folder / name).write_text(json.dumps({**TINY, **config}), encoding="utf-8")


def write_bin(path, arrays):
    import torch

    torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, path)


def of_bert(arrays):
    """The names that a classifier of transformers has."""
    return {name if name.startswith("classifier.") else f"bert.{name}": array for name, array in arrays.items()}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_bfloat16_of_transformers(tmp_path, backend):
    """A folder that save_pretrained wrote in bfloat16: the same logits as the library's own."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = {key: value for key, value in TINY.items() if key != "model_type"}
    library = transformers.BertForSequenceClassification(transformers.BertConfig(**settings)).to(torch.bfloat16).eval()
    library.save_pretrained(tmp_path)
    assert "bfloat16" in (tmp_path / "config.json").read_text()
    model = backend.model(read_config(tmp_path), read_weights(tmp_path), "sequence_classification")
    batch = make_batch([9, 3, 5])
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        expected = library.float()(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits
    np.testing.assert_allclose(backend.numpy(logits_of(model, batch)), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path, tiny, kind):
    """Of several files that an index names, every one counts, in the weights and in the fingerprint."""
    from safetensors.numpy import save_file

    write_config(tmp_path)
    names = sorted(of_bert(tiny))
    stem = "model" if kind == "safetensors" else "pytorch_model"
    parts = [names[::3], names[1::3], names[2::3]]
    files = [tmp_path / f"{stem}-0000{n}-of-00003.{kind}" for n in (1, 2, 3)]
    index = {name: file.name for part, file in zip(parts, files) for name in part}
    (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    def write(weights):
        for part, file in zip(parts, files):
            shard = {name: of_bert(weights)[name] for name in part}
            save_file(shard, file) if kind == "safetensors" else write_bin(file, shard)
        return fingerprint(tmp_path)

    prints = {write(tiny)}
    assert_equal(read_weights(tmp_path), tiny)
    for part in parts:
        changed = part[0].removeprefix("bert.")
        prints.add(write({**tiny, changed: tiny[changed] + 1}))
    assert len(prints) == 4
    files[1].unlink()
    with pytest.raises(
        InputError, match=rf"index.json: weight_map names '{files[1].name}'; .*there are .*{files[0].name}"
    ):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "has no weight_map"),
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"w": 1}}, "weight_map names ''"),
        ({"weight_map": {"w": ["a"]}}, "weight_map names ''"),
        ({"weight_map": {"w": None}}, "weight_map names ''"),
        ({"weight_map": {"w": "../model.safetensors"}}, "weight_map names '../model.safetensors'"),
        ({"weight_map": {"w": "/etc/passwd"}}, "weight_map names '/etc/passwd'"),
        ({"weight_map": {"w": ""}}, "weight_map names ''"),
        ({"weight_map": {"w": "."}}, "weight_map names '.'"),
        ({"weight_map": {"w": "a\0"}}, "weight_map names"),
        ({"weight_map": {"w": "pytorch_model.bin.index.json"}}, "weight_map names 'pytorch_model.bin.index.json'"),
        ({"weight_map": {"w": "x" * 5000 + ".safetensors"}}, "weight_map names 'xxx"),
        ({"weight_map": {"w": "absent.safetensors"}}, "weight_map names 'absent.safetensors'"),
    ],
)
def test_indexes_that_are_none(tmp_path, index, message):
    write_config(tmp_path)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / f"{name}.index.json").write_text(json.dumps(index))
    for read in (read_weights, fingerprint):
        with pytest.raises(InputError, match=f"^{tmp_path}/model.safetensors.index.json: {re.escape(message)}"):
            read(tmp_path)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module.model.", "student.", "encoder."])
@pytest.mark.parametrize("encoder", ["", "bert."])
def test_prefixes_of_wrappers(tmp_path, tiny, prefix, encoder):
    """DataParallel's, Lightning's, torch.compile's, and those of models of which a BERT is a part."""
    write_config(tmp_path)
    arrays = {prefix + (name if name.startswith("classifier") else encoder + name): a for name, a in tiny.items()}
    write_bin(tmp_path / "pytorch_model.bin", arrays)
    got = read_weights(tmp_path)
    assert_equal(got, tiny)
    assert all(array.flags.writeable for array in got.values())  # PyTorch warns of others


def test_wrapped_weights_of_paddle(tmp_path, tiny, paddle_backend):
    import paddle

    write_config(tmp_path)
    state = paddle_backend.model(TINY, tiny, "sequence_classification").module.state_dict()
    paddle.save({f"_layers.{name}": value for name, value in state.items()}, str(tmp_path / "model_state.pdparams"))
    assert_equal(read_weights(tmp_path), tiny)


@pytest.mark.parametrize("layout", ["config.json", "model_config.json"])
def test_readers_of_paddlenlp(tmp_path, paddle_backend, layout):
    """Their head is called a classifier there, and the architecture tells which it is."""
    import paddle

    model = paddle_backend.model({**TINY, "num_labels": 2}, head="question_answering")
    name = "BertForQuestionAnswering"
    if layout == "config.json":
        write_config(tmp_path, architectures=[name])
    else:
        nested = {"init_class": name, "init_args": [{"init_class": "BertModel", **TINY}]}
        (tmp_path / layout).write_text(json.dumps(nested))
    paddle.save(model.module.state_dict(), str(tmp_path / "model_state.pdparams"))
    assert read_config(tmp_path)["architectures"] == [name]
    got, expected = read_weights(tmp_path), model.weights()
    assert got.keys() == expected.keys() and "qa_outputs.weight" in got
    np.testing.assert_array_equal(got["qa_outputs.weight"], expected["qa_outputs.weight"])


def test_weights_of_other_models(tmp_path, tiny):
    """Missing, left over, twice, none: the folder, what was looked for and what is there."""
    write_config(tmp_path)

    def refused(arrays, message):
        write_bin(tmp_path / "pytorch_model.bin", arrays)
        with pytest.raises(InputError, match=f"^{tmp_path}: {message}"):
            read_weights(tmp_path)

    refused({"w": np.zeros(3)}, rf"no {WORDS} among the weights, under any prefix; there are w$")
    refused({}, f"no {WORDS} among the weights, under any prefix; there are none$")
    refused(
        {f"{whose}.{name}": array for whose in ("teacher", "student") for name, array in tiny.items()},
        "the weights of several models, teacher., student.; expected those of one",
    )
    refused(
        {**tiny, "bert.pooler.dense.bias": np.zeros(32)}, "the weights pooler.dense.bias and bert.pooler.dense.bias"
    )
    lost = "encoder.layer.1.output.dense.weight"
    less = {name: array for name, array in tiny.items() if name != lost}
    refused(less, f"{lost} and 0 more weights of the encoder are missing; there are embeddings.*")
    adapter = "encoder.layer.0.output.adapter.weight"
    refused({**tiny, adapter: np.zeros(3)}, f"the weights have {adapter}, which no BERT has; expected those of a BERT")


def test_folders_without_weights(tmp_path):
    write_config(tmp_path)
    (tmp_path / "tf_model.h5").touch()
    message = f"{tmp_path}: no weights there; looked for model.safetensors, .*; there are config.json, tf_model.h5$"
    for read in (read_weights, fingerprint):
        with pytest.raises(InputError, match=message):
            read(tmp_path)


def test_configuration_of_older_folders(tmp_path, tiny):
    """bert_config.json, which says no model_type; a byte order mark before any JSON."""
    write_bin(tmp_path / "pytorch_model.bin", of_bert(tiny))
    (tmp_path / "other.txt").touch()
    with pytest.raises(
        InputError, match=f"^{tmp_path}: no config.json there, nor .*; there are other.txt, pytorch_mod"
    ):
        read_config(tmp_path)
    config = {key: value for key, value in TINY.items() if key != "model_type"}
    (tmp_path / "bert_config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    assert read_config(tmp_path) == TINY
    assert_equal(read_weights(tmp_path), tiny)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "not a model's settings"),
        ("3", "not a model's settings"),
        ('{"init_args": 3}', "not a model's settings"),
        ('{"init_args": [], "a": 1}', "vocab_size, hidden_size, .* missing"),
        ('{"init_args": [5]}', "not a model's settings"),
        (json.dumps({**TINY, "init_class": 5}), "not a model's settings"),
        (json.dumps({**TINY, "hidden_size": None}), "hidden_size missing"),
        ("[" * 100_000, "not valid JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "not valid JSON|missing"),
        (b"\xff\xfe{}", "not valid JSON"),
        (json.dumps({**TINY, "architectures": [3]}), "architectures are no names"),
    ],
)
def test_configurations_that_are_none(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"^{tmp_path}/config.json: ({message})"):
        read_config(tmp_path)


@pytest.mark.parametrize("value", [10**9, 10**30, 0, -1, 16.0, "16", True, [16], float("nan")])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_labels"])
def test_sizes_that_no_model_has(tmp_path, key, value):
    write_config(tmp_path, **{key: value})
    there = "no number" if isinstance(value, list) else re.escape(repr(value))
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/config.json: {key} is {there}; expected a whole number from 1 to"
    ):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads is 5; expected a number that divides hidden_size, 32"),
        ({"num_hidden_layers": 4000}, "num_hidden_layers is 4000; the weights have 3 layers"),
        (
            {"hidden_size": 65536},
            r"with .*hidden_size 65536 .* would be \[200, 65536\], in the weights it is \[200, 32\]",
        ),
        ({"vocab_size": 10**7}, rf"with vocab_size 10000000.* {WORDS} would be .*, in the weights it is \[200, 32\]"),
        (
            {"intermediate_size": 10**6},
            r"with intermediate_size 1000000.* would be \[1000000, 32\], in the .* \[64, 32\]",
        ),
        (
            {"max_position_embeddings": 10**6},
            r"with max_position_embeddings 1000000, .* in the weights it is \[64, 32\]",
        ),
        ({"type_vocab_size": 60000}, r"with type_vocab_size 60000, .* in the weights it is \[2, 32\]"),
    ],
)
def test_sizes_that_are_not_the_weights(tmp_path, tiny, config, message):
    """Before any model is made: the key, the weight, and both shapes."""
    write_config(tmp_path, **config)
    write_bin(tmp_path / "pytorch_model.bin", of_bert(tiny))
    with pytest.raises(InputError, match=rf"^{tmp_path}/config.json: {message}"):
        read_weights(tmp_path)


def test_fewer_layers_than_the_weights_have(tmp_path, tiny, backend):
    """transformers reads the first of them, too."""
    write_config(tmp_path, num_hidden_layers=2)
    write_bin(tmp_path / "pytorch_model.bin", of_bert(tiny))
    weights = backend.model(read_config(tmp_path), read_weights(tmp_path), "sequence_classification").weights()
    assert "encoder.layer.2.output.dense.bias" not in weights
    np.testing.assert_array_equal(
        weights["encoder.layer.1.output.dense.bias"], tiny["encoder.layer.1.output.dense.bias"]
    )


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model_state.pdparams"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e300])
def test_weights_that_are_not_finite(tmp_path, tiny, file, value):
    """NaN, infinity, and float64 beyond float32: the file and the weight are named."""
    import pickle

    from safetensors.numpy import save_file

    write_config(tmp_path)
    name = "encoder.layer.1.output.dense.weight"
    arrays = {**tiny, name: tiny[name].astype("f8")}
    arrays[name][3, 5] = value
    writers = {"model.safetensors": lambda path: save_file(arrays, path), "pytorch_model.bin": None}
    if file == "pytorch_model.bin":
        write_bin(tmp_path / file, arrays)
    elif file == "model_state.pdparams":
        (tmp_path / file).write_bytes(pickle.dumps(arrays))
    else:
        writers[file](tmp_path / file)
    with pytest.raises(InputError, match=f"^{tmp_path / file}: {name} holds NaN or infinity; expected finite numbers$"):
        read_weights(tmp_path)


@pytest.mark.parametrize("names", [["a", "b"], {"0": "a", "2": "b"}, {"x": "a"}, "ab", 3])
def test_names_of_classes_that_are_none(tmp_path, names):
    with pytest.raises(InputError, match=r"config.json: id2label: expected the numbers from 0 on, each with a name"):
        labels_of({"id2label": names}, tmp_path)


def test_pipes_and_devices_in_a_folder(tmp_path, tiny):
    """No file of a model folder is opened that may have no end; links to files are ordinary."""
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshot"
    folder.mkdir()
    write_model(tmp_path / "blobs", TINY, tiny, "sequence_classification")
    for path in (tmp_path / "blobs").iterdir():
        (folder / path.name).symlink_to(f"../blobs/{path.name}")
    assert find_model(str(folder), "model") == folder
    assert_equal(read_weights(folder), tiny)
    os.mkfifo(folder / "vocab.txt")
    with pytest.raises(InputError, match="vocab.txt: is not a regular file"):
        find_model(str(folder), "model")
    for name, read in (
        ("config.json", read_config),
        ("model.safetensors", read_weights),
        ("model.safetensors", fingerprint),
    ):
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        with pytest.raises(InputError, match=f"{name}: is not a regular file; expected one, or a link to one"):
            read(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(InputError, match="config.json: is not a regular file"):
        read_config(folder)
    with pytest.raises(InputError, match="not a folder here|no such folder"):
        find_model("/" + "x" * 5000, "model")
