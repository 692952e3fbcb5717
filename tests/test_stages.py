"""Runs of several stages: an assistant between teacher and student."""

import json
import shutil

import numpy as np
import pytest
import yaml
from conftest import TINY
from test_estimate import columns
from test_general_distill import DEMO, fails, metrics

from backends.pretrained import read_safetensors, write_model
from general_distill.__main__ import main
from text.corpus import Corpus
from text.tokenizer import WordPiece

BOTH = pytest.mark.parametrize("name", ["torch", "paddle"])
OF_STUDENT = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
    "matches": [{"of": "logits", "temperature": 8}, {"of": "states", "project": "linear"}],
}  # fmt: skip
OF_ASSISTANT = {
    "num_layers": 2, "init_layers": [0, 2], "learning_rate": 2e-3, "batch_size": 4,
    "matches": [{"of": "logits", "temperature": 8}, {"of": "states", "teacher": [0, 1, 3], "student": [0, 1, 2]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, torch_backend):
    """With the head of masked language modelling, and a vocabulary of the demo corpus."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = WordPiece.trained(Corpus(DEMO, tmp_path_factory.mktemp("index")), 2000)
    tokenizer.save(folder, 64)
    config = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 40}
    torch_backend.seed(1)
    write_model(folder, config, torch_backend.model(config, None, "masked_lm").weights(), "masked_lm")
    return folder


def options(output, **settings):
    common = {
        "input_dir": DEMO, "output_dir": output, "device": "cpu", "model_type": "bert", "hidden_act": "gelu",
        "max_seq_length": 16, "batch_size": 8, "learning_rate": 1e-3, "max_steps": 6, "save_steps": 3,
        "logging_steps": 2, **settings,
    }  # fmt: skip
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value, default=str).strip(chr(34))}"
        for key, value in common.items()
        if value is not None
    ]


def with_assistant(output, teacher, **changes):
    group = {f"assistant.{key}": value for key, value in OF_ASSISTANT.items()}
    return options(output, teacher_model_name_or_path=teacher, **{**OF_STUDENT, **group, **changes})


def same_bits(expected, got):
    """Of every file of weights and moments beneath a folder, and of the logs."""
    files = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(got) for path in got.rglob("*.safetensors"))
    for file in files:
        one, other = read_safetensors(expected / file), read_safetensors(got / file)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one), file
    for log in expected.rglob("metrics.jsonl"):
        assert metrics(log.parent) == metrics(got / log.parent.relative_to(expected)), log


def killed_after(folder, step):
    """Takes back what a run wrote in a folder after a checkpoint."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob("*.safetensors"), *folder.glob("README.md")]:
        if path.is_dir() and int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


@BOTH
def test_an_assistant_is_what_two_runs_make(tmp_path, teacher, name):
    """The assistant distilled by one run and the student by another, from its folder, have the bits of one run's; so
    has a run that was killed in either stage."""
    whole = tmp_path / "whole"
    assert main([*with_assistant(whole, teacher, backend=name)]) == 0
    settings = {key: value for key, value in OF_ASSISTANT.items() if key != "init_layers"}
    sizes = {key: TINY[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size")}
    settings |= {"student_init_layers": OF_ASSISTANT["init_layers"], "backend": name, **sizes}
    apart = tmp_path / "apart"
    assert main(options(apart / "assistant", teacher_model_name_or_path=teacher, **settings)) == 0
    student = options(apart / "out", teacher_model_name_or_path=apart / "assistant", **OF_STUDENT, backend=name)
    assert main(student) == 0
    same_bits(apart / "assistant", whole / "assistant")
    for file in ("model.safetensors", "checkpoint-6/optimizer.safetensors"):
        one, other = (read_safetensors(folder / file) for folder in (apart / "out", whole))
        assert all(np.array_equal(one[key], other[key]) for key in one), file
    assert metrics(apart / "out") == metrics(whole)
    card = (whole / "assistant" / "README.md").read_text()
    assert "2x32 assistant" in card and "6 steps of 4 lines, learning rate 0.002" in card
    assert "the assistant in `assistant/`, whose teacher was" in (whole / "README.md").read_text()

    for stage in ("assistant", "student"):
        resumed = tmp_path / stage
        shutil.copytree(whole, resumed)
        killed_after(resumed, 0 if stage == "assistant" else 3)
        if stage == "assistant":
            (resumed / "metrics.jsonl").unlink()
            killed_after(resumed / "assistant", 3)
        assert main([*with_assistant(resumed, teacher, backend=name), "--resume"]) == 0
        same_bits(whole, resumed)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"assistant.matches": None}, "--assistant.num_layers 2: an assistant needs --assistant.matches"),
        ({"assistant.matches": ["L6_hidden_mse"]}, "--assistant.matches, L6_hidden_mse: student: 3: the student has"),
        ({"assistant.matches": [{"of": "states", "project": "linear"}]}, "--assistant.matches, line 1: teacher: uni"),
        (
            {"assistant.matches": [{"of": "states", "teacher": 3, "student": 2}]},
            "--matches: logits or labels need an assistant with the head",
        ),
        ({"matches": ["L6_hidden_mse"]}, "--matches, L6_hidden_mse: student: 3: the student has states 0"),
        ({"matches": [{"of": "states"}]}, "--matches, line 1: loss mse: the teacher's states have 32 dimensions"),
        ({"assistant.init_layers": [0, 3]}, "--assistant.init_layers [0, 3]: the teacher has layers 0 to 2"),
        ({"assistant.init_layers": [0]}, "--assistant.init_layers [0]: names 1 layers, the assistant has 2"),
        ({"assistant.hidden_size": 40}, "--assistant.init_layers [0, 2]: needs the teacher's hidden_size 32, but the"),
        ({"assistant.num_attention_heads": 5}, "--assistant.num_attention_heads 5: does not divide assistant.hidden"),
        ({"assistant.num_attention_heads": 0}, "--assistant.num_attention_heads 0: must be at least 1"),
        ({"assistant.batch_size": 0}, "--assistant.batch_size 0: must be at least 1"),
        ({"assistant.learning_rate": 0}, "--assistant.learning_rate 0.0: must be greater than 0"),
        ({"assistant.num_layers": None}, "--assistant.init_layers [0, 2]: has no effect without --assistant.num_l"),
    ],
)  # fmt: skip
def test_both_stages_are_checked_before_the_first(tmp_path, capsys, teacher, changes, says):
    output = tmp_path / "out"
    assert says in fails(capsys, *with_assistant(output, teacher, **changes))
    assert not output.exists()


def test_an_assistant_is_refused_another_way_when_a_run_goes_on(tmp_path, capsys, teacher):
    assert main(with_assistant(tmp_path, teacher, max_steps=1)) == 0
    again = with_assistant(tmp_path, teacher, max_steps=1, **{"assistant.learning_rate": 1e-2})
    assert "assistant.learning_rate was 0.002, now 0.01" in fails(capsys, *again, "--resume")


def test_a_run_that_knows_of_no_assistant_goes_on(tmp_path, teacher):
    """Its record is of a version that had none."""
    words = options(tmp_path, teacher_model_name_or_path=teacher, **{**OF_STUDENT, "num_layers": 3})
    assert main(words) == 0
    before = read_safetensors(tmp_path / "model.safetensors")
    killed_after(tmp_path, 3)
    record = yaml.safe_load((tmp_path / "arguments.yaml").read_text())
    del record["assistant"]
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(record))
    assert main([*words, "--resume"]) == 0
    after = read_safetensors(tmp_path / "model.safetensors")
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_dry_run_counts_every_stage(tmp_path, capsys, teacher):
    """Of a teacher that is pretrained, its assistant and the student."""
    sizes = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 2000}
    pretrain = {f"pretrain.{key}": value for key, value in sizes.items()}
    words = with_assistant(tmp_path / "out", None, **pretrain, **{"assistant.num_train_epochs": 2})
    assert main([*words, "--dry_run"]) == 0
    told = columns(capsys.readouterr().out)
    lines = len(Corpus(DEMO, tmp_path / "index"))
    assert told["steps"] == ["1,000", f"{-(-2 * lines // 4)}", "6"]
    assert told["lines a step"] == ["32", "4", "8"]
    assert len(told["seconds a step"]) == len(told["disk"]) == 3
    assert "2x32" in told["assistant"][0] and "2x16" in told["student"][0]
    assert not (tmp_path / "out").exists()
