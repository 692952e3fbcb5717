"""Every setting of config.json: honoured on both backends as the libraries honour it, or refused by name."""

import json
import shutil

import numpy as np
import pytest
from conftest import CHARACTERS, LABELS, TINY, last_states, make_batch, model_folder

import backends
from backends import packed
from backends.files import InputError
from backends.pretrained import labels_of, read_config, read_weights
from export.__main__ import main as export_main
from export.convert import OnnxArguments, export
from export.examples import from_object
from export.model import OnnxModel
from finetuning.__main__ import main as finetuning_main

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LENGTHS = [9, 3, 5]


def states(backend, folder):
    model = backend.model(read_config(folder), read_weights(folder), trainable=False)
    with backend.no_grad():
        return backend.numpy(last_states(model, batch_of(folder)))


def batch_of(folder):
    batch = make_batch(LENGTHS, vocab_size=SHAPE["vocab_size"])
    types = read_config(folder).get("type_vocab_size", 2)
    return batch._replace(token_type_ids=np.arange(batch.input_ids.size).reshape(batch.input_ids.shape) % types)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("Bert", {"layer_norm_eps": 1e-3}),
        ("Bert", {"hidden_act": "silu", "type_vocab_size": 1, "chunk_size_feed_forward": 3, "classifier_dropout": 0.5}),
        ("Ernie", {"layer_norm_eps": 1e-3, "type_vocab_size": 4}),
        ("Ernie", {"use_task_id": True, "task_type_vocab_size": 5, "layer_norm_eps": 1e-5}),
    ],
    ids=str,
)
def test_folders_of_transformers_are_computed_as_transformers_does(backend, tmp_path, family, settings):
    import torch
    import transformers

    torch.manual_seed(0)
    library = getattr(transformers, f"{family}Model")(
        getattr(transformers, f"{family}Config")(**{**SHAPE, **settings})
    ).eval()
    library.save_pretrained(tmp_path)
    batch = batch_of(tmp_path)
    names = ("input_ids", "token_type_ids", "attention_mask")
    with torch.no_grad():
        right = library(**{n: torch.from_numpy(a) for n, a in zip(names, batch)}).last_hidden_state.numpy()
    np.testing.assert_allclose(states(backend, tmp_path), right[batch.attention_mask.astype(bool)], atol=2e-5)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("Bert", {"layer_norm_eps": 1e-3, "fuse": False, "type_vocab_size": 16}),
        ("PPMiniLM", {"layer_norm_eps": 1e-3, "hidden_act": "relu"}),
        ("Ernie", {"use_task_id": True, "task_type_vocab_size": 5}),
    ],
    ids=str,
)
def test_folders_of_paddlenlp_are_computed_as_paddlenlp_does(backend, tmp_path, family, settings):
    import paddle
    import paddlenlp.transformers
    from paddlenlp.transformers.ppminilm.configuration import PPMiniLMConfig

    paddle.seed(0)
    config = PPMiniLMConfig if family == "PPMiniLM" else getattr(paddlenlp.transformers, f"{family}Config")
    library = getattr(paddlenlp.transformers, f"{family}Model")(config(**{**SHAPE, **settings}))
    library.eval()
    words = library.embeddings.word_embeddings.weight
    words.set_value(words.numpy() * (np.arange(60) > 0)[:, None])  # padding is zeros to two of them anyway
    library.save_pretrained(str(tmp_path))
    batch = batch_of(tmp_path)
    names = ("input_ids", "token_type_ids", "attention_mask")
    right = library(**{n: paddle.to_tensor(a) for n, a in zip(names, batch)})[0].numpy()
    np.testing.assert_allclose(states(backend, tmp_path), right[batch.attention_mask.astype(bool)], atol=2e-5)


def test_every_activation_is_that_of_transformers(backend):
    """And those that a backend lacks are refused, with what it has."""
    import torch
    from transformers.activations import ACT2FN

    x = np.linspace(-8, 8, 641, dtype=np.float32)
    for name in backend.activations:
        model = backend.model({**TINY, "num_hidden_layers": 1, "hidden_act": name})
        if backend.name == "torch":
            activation = model.encoder.encoder.layer[0].intermediate.intermediate_act_fn
        else:
            activation = model.encoder.encoder.layers[0].activation
        right = ACT2FN[name](torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(backend.numpy(activation(backend.tensor(x))), right, atol=5e-6, err_msg=name)
    assert {"gelu", "relu", "silu", "tanh"} <= {*backend.activations}
    for name in {*ACT2FN, "no such", 3} - {*backend.activations}:
        with pytest.raises(InputError, match=rf"hidden_act {name}: the {backend.name} backend has .*gelu.*relu"):
            backend.model({**TINY, "hidden_act": name})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type relative_key: .*expected absolute"),
        ({"position_embedding_type": "relative_key_query"}, "position_embedding_type relative_key_query: "),
        ({"pool_act": "relu"}, "pool_act relu: not computed here; expected tanh"),
        ({"is_decoder": True}, "is_decoder True: "),
        ({"is_encoder_decoder": True}, "is_encoder_decoder True: "),
        ({"is_decoder": True, "add_cross_attention": True}, "is_decoder True: "),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads "),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config "),
        ({"task_id": 2, "model_type": "ernie", "use_task_id": True}, "task_id 2: not computed here; expected 0"),
        ({"type_vocab_size": 0, "model_type": "ernie"}, "type_vocab_size is 0; expected a whole number from 1"),
        ({"hidden_dropout_prob": 5}, "hidden_dropout_prob 5: expected a number from 0 to 1"),
        ({"classifier_dropout": "x"}, "classifier_dropout x: "),
        ({"initializer_range": -1}, "initializer_range -1: "),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps nan: "),
        ({"id2label": {"0": "\ud83d", "1": "b"}}, "not valid JSON .*surrogates not allowed"),
        ({"id2label": 0}, "id2label: expected the numbers from 0 on, each with a name"),
        ({"id2label": {"a": "b"}}, "id2label: expected the numbers from 0 on"),
        ({"auto_map": {"AutoModel": "modeling_own.OwnModel"}}, "auto_map: the model is computed by code of its own"),
        ({"model_type": "nezha"}, "model_type nezha: .*expected bert, roberta, ernie, ppminilm"),
        ({"model_type": "roberta", "pad_token_id": 1}, "pad_token_id 1: "),
        (
            {"model_type": "roberta", "transformers_version": "4.57.6"},
            "model_type roberta: transformers' RobertaModel counts positions",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, settings, message):
    """With the file's name, and in one line."""
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **settings}))
    with pytest.raises(InputError, match=f"config.json: {message}") as refusal:
        read_config(tmp_path)
    assert "\n" not in str(refusal.value)


def test_what_changes_nothing_passes(tmp_path):
    harmless = {
        "position_embedding_type": None,
        "model_type": None,
        "type_vocab_size": None,
        "max_position_embeddings": None,
        "pool_act": "tanh",
        "is_decoder": False,
        "pruned_heads": {},
        "use_cache": 1,
        "auto_map": {"AutoTokenizer": "own.Own"},
        "dtype": "bfloat16",
        "fuse": True,
        "attn_implementation": "flash",
        "directionality": "bidi",
        "num_classes": 3,
        "dropout": 0.3,
        "output_hidden_states": True,
        "torchscript": True,
    }
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **harmless}))
    config = read_config(tmp_path)
    assert config["num_labels"] == 3 and config["classifier_dropout"] == 0.3
    for name in ("torch", "paddle"):
        model = backends.load(name, "cpu").model(config, None, "sequence_classification")
        assert model.weights()["classifier.weight"].shape == (3, 32)
        assert model.module.dropout.p == 0.3


def test_heads_that_choose_no_class_are_refused(tmp_path):
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"problem_type": "regression"}, "problem_type regression: expected a head that chooses one"),
        ({"problem_type": "multi_label_classification"}, "problem_type multi_label_classification: "),
        ({"id2label": {"0": "LABEL_0"}}, "id2label: one name, as for regression"),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "id2label: names two classes alike"),
    ):
        with pytest.raises(InputError, match=message):
            labels_of({**config, **change}, folder)
    (folder / "config.json").write_text(json.dumps({**config, "problem_type": "regression"}))
    with pytest.raises(InputError, match="problem_type regression"):
        export(OnnxArguments(str(folder), backend="torch"))


def test_untied_embeddings_are_refused_for_masked_words(backend):
    with pytest.raises(InputError, match="tie_word_embeddings false"):
        backend.model({**TINY, "tie_word_embeddings": False}, None, "masked_lm")
    backend.model({**TINY, "tie_word_embeddings": False}, None, "token_classification")


def test_paddle_refuses_an_epsilon_that_it_does_not_compute(torch_backend, paddle_backend):
    torch_backend.model({**TINY, "layer_norm_eps": 0.01})
    with pytest.raises(InputError, match="layer_norm_eps 0.01: Paddle's LayerNorm takes 0.001 at most"):
        paddle_backend.model({**TINY, "layer_norm_eps": 0.01})


@pytest.mark.parametrize("name, library", [("torch", "transformers"), ("paddle", "paddlenlp")])
@pytest.mark.parametrize("head", ["sequence_classification", None])
def test_an_export_is_compared_with_the_library(tmp_path, monkeypatch, name, library, head):
    """A setting that both the model here and its export ignore does not pass."""
    if name == "paddle":
        pytest.importorskip("paddle2onnx", reason="there is none for Python 3.13")
    folder = model_folder(tmp_path / "model", head, layer_norm_eps=1e-3)
    settings = packed.library_settings
    monkeypatch.setattr(packed, "library_settings", lambda *args: {**settings(*args), "layer_norm_eps": 1e-12})
    with pytest.raises(InputError, match=f"outputs differ from those of {library} by"):
        export(OnnxArguments(str(folder), backend=name))
    assert not (folder / "model.onnx").exists()


@pytest.mark.parametrize("head", ["token_classification", "question_answering"])
def test_weights_in_pickles_are_those_that_were_read(tmp_path, capsys, head):
    """The libraries, which would unpickle them, get them from here; a folder that one does not know is named."""
    import torch

    folder = model_folder(tmp_path / "model", head)
    torch.save({k: torch.from_numpy(a) for k, a in read_weights(folder).items()}, folder / "pytorch_model.bin")
    for file in folder.glob("*model*.safetensors*"):
        file.unlink()
    for name, library in (("torch", "transformers"), ("paddle", "paddlenlp")):
        export(OnnxArguments(str(folder), backend=name))
        assert f"differ from those of {library} by" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "ppminilm"}))
    export(OnnxArguments(str(folder), backend="torch"))
    told = capsys.readouterr().err
    assert "transformers does not load it ('ppminilm'); compared with what torch computes here" in told
    assert "differ from those of torch by" in told


def test_an_encoder_without_a_pooler_is_said_to_have_none(tmp_path, capsys):
    folder = model_folder(tmp_path / "model", "masked_lm")
    assert OnnxModel(export(OnnxArguments(str(folder), backend="torch"))).description.head is None
    told = capsys.readouterr().err
    assert (
        "has no pooler; pooler_output comes of random weights" in told
        and "differ from those of transformers by" in told
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_one_type_of_token(tmp_path, name, capsys):
    """Single texts are trained on, exported, and answered, by strings too; pairs are refused before."""
    folder = model_folder(tmp_path / "model", type_vocab_size=1)
    rows = [{"text": CHARACTERS[i:], "label": LABELS[i % 3]} for i in range(6)]
    for data, extra in (("single", {}), ("pairs", {"text_pair": "好"})):
        (tmp_path / data).mkdir()
        for split in ("train", "dev"):
            lines = [json.dumps({**row, **extra}) + "\n" for row in rows]
            (tmp_path / data / f"{split}.json").write_text("".join(lines))

    def finetune(data, *options):
        line = (
            f"--device cpu --backend {name} --max_seq_length 32 --max_steps 1 --batch_size 2 --task_name classification"
        )
        line += f" --model_name_or_path {folder} --data_dir {tmp_path / data} --output_dir {tmp_path / data}-out"
        return finetuning_main([*line.split(), *options])

    capsys.readouterr()
    assert finetune("pairs", "--text_pair_column", "text_pair") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"error: {folder}: its type_vocab_size is 1: it takes single texts, and here are pairs"
    assert not (tmp_path / "pairs-out").exists()
    assert finetune("single") == 0
    tuned = tmp_path / "single-out"
    for tokenizer in ("none", "in-graph"):
        file = export(OnnxArguments(str(tuned), str(tmp_path / f"{tokenizer}.onnx"), name, tokenizer=tokenizer))
        model = OnnxModel(file)
        example = from_object(model, {"text": "今天"}, 0)
        assert model.answers([example])[0]["label"] in LABELS
        with pytest.raises(ValueError, match="text_pair: the model takes single texts"):
            from_object(model, {"text": "今天", "text_pair": "好"}, 0)
    assert export_main(f"onnx {tuned} --backend {name} --tokenizer in-graph --pairs".split()) == 2
    assert "its type_vocab_size is 1, so it takes single texts, no pairs" in capsys.readouterr().err
    shutil.rmtree(tuned)
