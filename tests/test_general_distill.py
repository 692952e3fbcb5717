"""The program: command line, recipes, runs, their results and their errors."""

import ast
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY

from backends.files import InputError
from backends.pretrained import read_weights, write_model
from backends.shape import Shape
from general_distill.__main__ import main
from general_distill.arguments import RECIPES, DistillArguments, parse
from general_distill.card import loading_lines
from general_distill.distill import (
    STUDENT_SIZES,
    initial_layers,
    initial_weights,
    new_assistant_config,
    new_matches,
    new_student_config,
    new_teacher_config,
)
from objectives.distillation import wanted_of
from text.corpus import Corpus
from text.prepare.pipeline import PrepareArguments, prepare
from text.prepare.workers import on_this_machine
from text.tokenizer import WordPiece

DEMO = ROOT / "general_distill" / "demo"
QUICK = {
    "input_dir": str(DEMO),
    "device": "cpu",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_relation_heads": 8,
    "teacher_layer_index": 1,
    "student_layer_index": 1,
    "beta": 0.2,
    "max_seq_length": 24,
    "batch_size": 8,
    "max_steps": 12,
    "logging_steps": 5,
    "save_steps": 4,
    "pretrain": {
        "num_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_steps": 6,
        "batch_size": 8,
        "vocab_size": 3000,
    },
}


def options(**changes):
    """A command line from QUICK and changes to it; None leaves an option out."""
    settings = {**QUICK, **changes}
    pretrain = settings.pop("pretrain")
    if "teacher_model_name_or_path" in settings:
        pretrain = None
    if "student_model_name_or_path" in settings:
        settings |= dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "intermediate_size"))
    settings |= {f"pretrain.{key}": value for key, value in (pretrain or {}).items()}
    return [
        f"--{key}={json.dumps(value) if not isinstance(value, str) else value}"
        for key, value in settings.items()
        if value is not None
    ]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, torch_backend):
    """A model folder with a vocabulary trained on the demo corpus."""
    folder = tmp_path_factory.mktemp("teacher")
    corpus = Corpus(DEMO, tmp_path_factory.mktemp("index"))
    tokenizer = WordPiece.trained(corpus, 3000)
    tokenizer.save(folder, 64)
    config = {**TINY, "vocab_size": len(tokenizer)}
    write_model(folder, config, torch_backend.model(config).weights())
    return folder


def metrics(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if "per_second" not in key} for record in records]


@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_whole_run(tmp_path, capsys, name, data):
    """Teacher pretrained, student distilled; everything the README promises is there and loads."""
    output = tmp_path / "out"
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    lines = (data / "corpus" / "valid" / "part-00.txt").read_text(encoding="utf-8").split("\n")[:40]
    (held_out / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    assert main([*options(output_dir=str(output), eval_dir=str(held_out)), "--backend", name]) == 0
    code = capsys.readouterr().out
    scope = {}
    exec(code, scope)
    batch = scope["tokenizer"](lines[0])
    assert batch["input_ids"][0] == 2
    assert scope["model"].config.hidden_size == 32
    files = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json", "README.md"} <= files
    assert {"arguments.yaml", "metrics.jsonl", "eval_results.json", "teacher"} <= files
    assert any(file.startswith("events.out.tfevents") for file in files)
    assert {"checkpoint-4", "checkpoint-8", "checkpoint-12"} <= files
    results = json.loads((output / "eval_results.json").read_text())
    assert len(results["after"]) == 10
    assert results["after"]["loss"] < results["before"]["loss"]
    card = (output / "README.md").read_text()
    assert f"{name}" in card
    assert "12 steps of 8 lines" in card
    assert f"{results['after']['loss']:.5g}" in card
    records = metrics(output / "teacher")
    assert records[-1]["step"] == 6


@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_student_on_real_text_in_both_libraries(tmp_path, name, data, teacher):
    """The last hidden state of 100 lines of the real corpus, in transformers and in paddlenlp."""
    import paddle
    import paddlenlp.transformers
    import torch
    import transformers

    output = tmp_path / "out"
    assert (
        main(
            [*options(output_dir=str(output), teacher_model_name_or_path=str(teacher), max_steps=3), "--backend", name]
        )
        == 0
    )
    lines = (data / "corpus" / "valid" / "part-00.txt").read_text(encoding="utf-8").split("\n")[:100]
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    on_torch = transformers.AutoModel.from_pretrained(output).eval()
    on_paddle = paddlenlp.transformers.PPMiniLMModel.from_pretrained(str(output))
    on_paddle.eval()
    for line in lines:
        batch = tokenizer(line, truncation=True, max_length=64, return_tensors="np")
        with torch.no_grad():
            expected = on_torch(**{key: torch.from_numpy(a) for key, a in batch.items()}).last_hidden_state.numpy()
        got = on_paddle(**{key: paddle.to_tensor(a) for key, a in batch.items()})[0].numpy()
        np.testing.assert_allclose(got, expected, atol=1e-4)


def fails(capsys, *arguments):
    """The one line of an error, for which nothing was started."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    message = lines[-1]
    assert message.startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input_dir": "nowhere"}, "--input_dir nowhere: no such folder"),
        (
            {"num_relation_heads": 7},
            "num_relation_heads 7: does not divide the width 32 of the teacher's Q, K, V; these do: 1, 2,",
        ),
        ({"teacher_layer_index": 3}, "teacher_layer_index 3: the teacher has layers 0 to 2"),
        ({"student_layer_index": 5}, "student_layer_index 5: the student has layers 0 to 1"),
        ({"teacher_layer_index": [1, 2]}, "2 layers and 1; give as many of the one as of the other"),
        ({"alpha": 0.7, "beta": 0.7}, "alpha 0.7, beta 0.7"),
        ({"max_seq_length": 65}, "--max_seq_length 65: the teacher has 64 positions"),
        ({"num_layers": 3, "hidden_size": None}, "--num_layers 3: PP-MiniLM has sizes for 2, 4 and 6 layers"),
        ({"num_attention_heads": 5}, "--num_attention_heads 5: does not divide hidden_size 32"),
        ({"student_init_layers": [0, 3]}, "the teacher has layers 0 to 2"),
        ({"student_init_layers": [0]}, "names 1 layers, the student has 2"),
        ({"student_init_layers": [0, 2], "intermediate_size": 128}, "needs the teacher's intermediate_size 64"),
        ({"student_model_name_or_path": "./nowhere"}, "--student_model_name_or_path ./nowhere: no such folder"),
        ({"padding": "none"}, "padding"),
        ({"relation_pairs": {"q-z": 1.0}}, "relation pair 'q-z'"),
        ({"max_steps": "many"}, "max_steps"),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"save_steps": 0}, "--save_steps 0: must be at least 1"),
        ({"eval_dir": "nowhere"}, "--eval_dir nowhere: no such folder"),
        ({"learning_rat": 1.0}, "--learning_rat: unknown; did you mean --learning_rate?"),
        ({"backend": "jax"}, "backend"),
        ({"nproc": -1}, "--nproc -1 --nnodes 1 --node_rank 0: nproc must be at least 0"),
        ({"nnodes": 2, "node_rank": 2}, "--nnodes 2 --node_rank 2: "),
        ({"nnodes": 2}, "--master None: 2 machines need the first one's HOST:PORT"),
        ({"nnodes": 2, "master": "somewhere"}, "--master somewhere: 2 machines need the first one's HOST:PORT"),
    ],
)
def test_bad_arguments(tmp_path, capsys, teacher, changes, says):
    output = tmp_path / "out"
    settings = {"output_dir": str(output), "teacher_model_name_or_path": str(teacher), **changes}
    assert says in fails(capsys, *options(**settings))
    # Nothing stands in the way of the corrected command.
    assert not (output / "arguments.yaml").exists()


def test_gpu_asked_for_and_absent(tmp_path, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    message = fails(capsys, *options(output_dir=str(tmp_path), device=None))
    assert "--device gpu: this machine has none" in message


def test_recipe_errors(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    for content, says in [
        ("learning_rat: 1\n", f"{recipe}: learning_rat: unknown; did you mean learning_rate?"),
        ("pretrain:\n  max_step: 1\n", "pretrain.max_step: unknown; did you mean pretrain.max_steps?"),
        ("a: [\n", "not valid YAML"),
        ("- 1\n", "expected lines of 'option: value'"),
        ("num_layers: six\n", "num_layers"),
    ]:
        recipe.write_text(content)
        assert says in fails(capsys, "--config", str(recipe), *options(output_dir=str(tmp_path / "out")))
    assert "or one of demo, " in fails(capsys, "--config", "nowhere.yaml")
    assert "input_dir" in fails(capsys)


def test_output_dir_of_another_run(tmp_path, capsys, teacher):
    output = tmp_path / "out"
    arguments = options(output_dir=str(output), teacher_model_name_or_path=str(teacher), max_steps=2)
    assert main(arguments) == 0
    assert "holds another run; --resume goes on with it, --overwrite" in fails(capsys, *arguments)
    # A finished run is left as it is
    before = (output / "metrics.jsonl").stat().st_mtime_ns
    assert main([*arguments, "--resume"]) == 0
    assert (output / "metrics.jsonl").stat().st_mtime_ns == before
    (output / "README.md").unlink()
    message = fails(capsys, *arguments, "--resume", "--learning_rate=1e-4")
    assert "learning_rate was 0.0006, now 0.0001" in message
    # A wrong argument costs the old run nothing
    assert "does not divide" in fails(capsys, *arguments, "--overwrite", "--num_relation_heads=7")
    assert (output / "checkpoint-2").exists()
    assert main([*arguments, "--overwrite", "--max_steps=1"]) == 0
    assert not (output / "checkpoint-2").exists()
    assert metrics(output)[-1]["step"] == 1
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("precious")
    message = fails(capsys, *options(output_dir=str(stranger), overwrite=True))
    assert "holds files that are not a run's" in message
    assert (stranger / "thesis.txt").read_text() == "precious"


TEXT = "".join(f"{a}{b}的{c}。\n" for a in "天地人" for b in "好坏" for c in "一二三四")


@pytest.fixture(scope="module")
def began(tmp_path_factory, teacher):
    """A folder with text in two files, held-out text and a run that was stopped after two steps of four."""
    root = tmp_path_factory.mktemp("began")
    for name, lines in {"in/a.txt": TEXT[:54], "in/b.txt": TEXT[54:], "held/a.txt": TEXT[:18]}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(lines, encoding="utf-8")
    shutil.copytree(teacher, root / "teacher")
    assert main(resumed(root, resume=False)) == 0
    shutil.rmtree(root / "out" / "checkpoint-4")
    (root / "out" / "README.md").unlink()
    return root


def resumed(root, resume=True, **changes):
    settings = {
        "input_dir": str(root / "in"), "eval_dir": str(root / "held"), "output_dir": str(root / "out"),
        "teacher_model_name_or_path": str(root / "teacher"), "pretrain": None, "max_steps": 4, "save_steps": 2,
        "resume": resume, **changes,
    }  # fmt: skip
    return options(**settings)


def swap(folder):
    """Two lines of equal length change places."""
    file = folder / "a.txt"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join([lines[1], lines[0], *lines[2:]]), encoding="utf-8")


def change(file):
    return lambda root: (root / file).write_text(
        (root / file).read_text(encoding="utf-8").replace("的", "得", 1), encoding="utf-8"
    )


def edit_json(file, **changes):
    return lambda root: (root / file).write_text(json.dumps({**json.loads((root / file).read_text()), **changes}))


def scale_weights(root):
    config = json.loads((root / "teacher" / "config.json").read_text())
    write_model(root / "teacher", config, {key: a * 0.9 for key, a in read_weights(root / "teacher").items()})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (change("in/b.txt"), "--resume: --input_dir {root}/in: has 24 lines, sha256 "),
        (lambda root: swap(root / "in"), "--resume: --input_dir {root}/in: has 24 lines, sha256 "),
        (lambda root: (root / "in" / "a.txt").rename(root / "in" / "c.txt"), "--input_dir {root}/in: has 24 lines, "),
        (lambda root: (root / "in" / "a.txt").unlink(), "--input_dir {root}/in: has 15 lines, sha256 "),
        (lambda root: (root / "in" / "c.txt").write_text("一\n"), "--input_dir {root}/in: has 25 lines, sha256 "),
        (lambda root: swap(root / "held"), "--resume: --eval_dir {root}/held: has 3 lines, sha256 "),
        (scale_weights, "the run in {root}/out read something else (teacher_model_name_or_path was 'weights "),
        (edit_json("teacher/config.json", hidden_act="relu"), "read something else (teacher_model_name_or_path was "),
        (edit_json("teacher/tokenizer_config.json", do_lower_case=False), "read something else (vocabulary was "),
        (lambda root: (root / "out" / "inputs.json").write_text("{"), "/inputs.json: inputs.json is damaged (Expec"),
        (edit_json("out/inputs.json", eval_dir="none"), "inputs.json is not what was written (its hash is another)"),
        (lambda root: (root / "out" / "arguments.yaml").write_bytes(b"\xff\0"), "/out/arguments.yaml is damaged ("),
        (lambda root: (root / "out" / "arguments.yaml").write_text("- a\n"), "/out/arguments.yaml is damaged ("),
        (lambda root: (root / "out" / "arguments.yaml").write_text("a: [\n"), "/out/arguments.yaml is damaged ("),
    ],
)
def test_what_a_run_began_with_is_what_it_goes_on_with(tmp_path, capsys, began, damage, says):
    """Other lines, fewer, more, or in another order; another teacher; records that are damaged. Nothing is changed."""
    root = tmp_path / "run"
    shutil.copytree(began, root)
    damage(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert says.format(root=root) in fails(capsys, *resumed(root))
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_prepared_text_is_known_by_its_content(tmp_path, capsys, began):
    lines = [f"{a}{b}的{c}，一二三四五六七八九十。\n" for a in "天地人" for b in "好坏" for c in "一二三四"]
    for name, text in {"[one]": lines, "[two]": [lines[1], lines[0], *lines[2:]]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("".join(text), encoding="utf-8")
        given = {"input": [str(tmp_path / name)], "vocab": str(began / "teacher"), "similarity": 0}
        prepare(PrepareArguments(output=str(tmp_path / name[1:-1]), **given), on_this_machine(1), lambda *_: None)
    root = tmp_path / "run"
    root.mkdir()
    changes = {"eval_dir": None, "teacher_model_name_or_path": str(began / "teacher")}
    assert main(resumed(root, False, **changes, input_dir=str(tmp_path / "one"))) == 0
    (root / "out" / "README.md").unlink()
    message = fails(capsys, *resumed(root, **changes, input_dir=str(tmp_path / "two")))
    assert re.search(r"read something else \(input_dir was '24 lines, sha256 \w+', now '24 lines, sha256 ", message)
    (tmp_path / "one").rename(tmp_path / "moved")
    assert main(resumed(root, **changes, input_dir=str(tmp_path / "moved"))) == 0
    file = tmp_path / "two" / "manifest.json"
    manifest = json.loads(file.read_text())
    for key in ("settings", "counts", "shards", "vocabulary"):
        file.write_text(json.dumps({**{name: value for name, value in manifest.items() if name != key}, "x": 1}))
        message = fails(capsys, *options(input_dir=str(tmp_path / "two"), output_dir=str(tmp_path / "new")))
        assert message == f"error: --input_dir {file}: damaged (KeyError('{key}')); prepare the corpus again"


def test_the_same_text_and_teacher_go_on_wherever_they_are(tmp_path, capsys, began, monkeypatch):
    """Moved, divided otherwise, named otherwise, with the index lost or damaged: the run ends as it would have."""
    root = tmp_path / "run"
    shutil.copytree(began, root)
    whole = tmp_path / "whole"
    shutil.copytree(began, whole)
    assert main(resumed(whole)) == 0
    moved = tmp_path / "[data]" / "50%?"
    moved.mkdir(parents=True)
    (moved / "all.txt").write_text(TEXT.replace("\n", "\r\n"), encoding="utf-8")
    (root / "in").rename(tmp_path / "gone")
    (root / "out" / "corpus_index" / "manifest.json").write_text("[")
    (root / "out" / "eval_index" / "lines.bin").write_bytes(b"?")
    (tmp_path / "link").symlink_to(root / "teacher")
    monkeypatch.chdir(tmp_path)
    changes = {"input_dir": "[data]/50%?", "teacher_model_name_or_path": "link/", "eval_dir": "run/../run/held"}
    assert main(resumed(root, output_dir="run/out", **changes)) == 0
    assert "goes on after step 2 of run/out/checkpoint-2" in capsys.readouterr().err
    assert metrics(root / "out") == metrics(whole / "out")
    for key, array in read_weights(whole / "out").items():
        np.testing.assert_array_equal(read_weights(root / "out")[key], array)
    results = [json.loads((folder / "out" / "eval_results.json").read_text()) for folder in (root, whole)]
    assert results[0] == results[1]


def test_changed_lines_of_a_run_that_skips_are_left_out(tmp_path, capsys, began):
    root = tmp_path / "run"
    shutil.copytree(began, root)
    change("in/b.txt")(root)
    assert main(resumed(root, bad_lines="skip")) == 0
    told = capsys.readouterr().err
    assert f"left out: {root}/in/b.txt: lines that are no longer what they were" in told
    assert re.search(r"/in: \d+ lines could not be read any more; others were taken in their place", told)
    assert re.search(r"left out: .*/in/b\.txt: not the line at byte \d+ that was there", told)


def test_overwriting_follows_no_links_and_deletes_nothing_that_is_read(tmp_path, capsys, began):
    root = tmp_path / "run"
    shutil.copytree(began, root)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("precious")
    (root / "out" / "checkpoint-1").symlink_to(precious)
    (root / "out" / "note.txt").symlink_to(precious / "thesis.txt")
    (root / "out" / "nothing").symlink_to(tmp_path / "nowhere")
    shutil.copytree(root / "teacher", root / "out" / "teacher")
    message = fails(capsys, *resumed(root, False, overwrite=True, teacher_model_name_or_path=f"{root}/out/teacher"))
    assert f"--teacher_model_name_or_path {root}/out/teacher: lies in --output_dir {root}/out, which --over" in message
    assert (root / "out" / "teacher" / "model.safetensors").exists() and (root / "out" / "checkpoint-2").exists()
    assert main(resumed(root, False, overwrite=True)) == 0
    assert [path.name for path in (root / "out").iterdir() if path.is_symlink()] == []
    assert (precious / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("damage", ["card", "weights"])
def test_what_only_seems_finished_goes_on(tmp_path, capsys, began, damage):
    """A README.md that is not the card of the weights that are there is no sign of the end."""
    root = tmp_path / "run"
    shutil.copytree(began, root)
    assert main(resumed(root)) == 0
    assert main(resumed(root)) == 0
    assert f"{root}/out is finished" in capsys.readouterr().err
    weights = read_weights(root / "out")
    if damage == "card":
        (root / "out" / "README.md").write_text("my student")
    else:
        content = bytearray((root / "out" / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (root / "out" / "model.safetensors").write_bytes(content)
    assert main(resumed(root)) == 0
    assert "goes on after step 4" in capsys.readouterr().err
    for key, array in read_weights(root / "out").items():
        np.testing.assert_array_equal(weights[key], array)


def test_printed_lines_load_a_folder_of_any_name():
    for name in ('a"b', "a\\b", "a\nb", "{0}", "五 十%"):
        for backend in ("torch", "paddle"):
            assert ast.literal_eval(loading_lines(Path(name), backend)[1].split("from_pretrained")[1]) == name


def test_damaged_teacher(tmp_path, capsys, teacher):
    """Found before the run is recorded: the corrected command is not refused."""
    folder, output = tmp_path / "teacher", tmp_path / "out"
    shutil.copytree(teacher, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-50])
    arguments = options(output_dir=str(output), teacher_model_name_or_path=str(folder), max_steps=1)
    assert "model.safetensors: cannot be read" in fails(capsys, *arguments)
    (folder / "model.safetensors").write_bytes(weights)
    assert main(arguments) == 0


def test_vocabulary_that_is_not_the_teachers(tmp_path, capsys, teacher):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    (folder / "vocab.txt").write_text("\n".join(vocabulary[:1000]), encoding="utf-8")
    message = fails(capsys, *options(output_dir=str(tmp_path / "out"), teacher_model_name_or_path=str(folder)))
    assert re.search(r"vocab\.txt: 1000 entries, but the model embeds \d+ tokens", message)


def test_command_line_wins_over_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 0.5\nbatch_size: 3\npretrain:\n  max_steps: 9\nrelation_pairs: {q-k: 2.0}\n")
    arguments = parse(["--batch_size", "7", "--input_dir", "i", "--output_dir=o", "--config", str(recipe)])
    assert (arguments.learning_rate, arguments.batch_size) == (0.5, 7)
    assert arguments.pretrain.max_steps == 9
    assert arguments.relation_pairs == {"q-k": 2.0}
    assert arguments.num_relation_heads == 64
    switched = parse(["--resume", "--use_amp", "--input_dir", "i", "--overwrite", "false", "--output_dir=o"])
    assert (switched.resume, switched.use_amp, switched.overwrite) == (True, True, False)
    for resume in (["--resume=auto"], ["--resume", "auto"], ["--resume", "true"]):
        assert parse([*resume, "--input_dir=i", "--output_dir=o"]).resume is True
    with pytest.raises(InputError, match="use_amp"):
        parse(["--use_amp", "auto", "--input_dir=i", "--output_dir=o"])
    both = parse(["--input_dir=i", "--output_dir=o", "--teacher_layer_index=[3,5]", "--student_layer_index=[1,2]"])
    assert both.layer_pairs() == [(3, 1), (5, 2)]


def test_defaults_are_ppminilms():
    """Those of PaddleNLP's general_distill.py."""
    arguments = DistillArguments(input_dir="i", output_dir="o")
    expected = dict(
        max_seq_length=128, learning_rate=6e-4, max_grad_norm=1.0, num_layers=6, batch_size=512,
        teacher_layer_index=19, student_layer_index=5, num_train_epochs=3, logging_steps=100, save_steps=100,
        num_relation_heads=64, alpha=0.0, beta=0.0, weight_decay=0.01, seed=42, warmup_steps=-1,
        warmup_proportion=0.01, adam_epsilon=1e-8, max_steps=400000, device="gpu", use_amp=False,
        scale_loss=2**15, model_type="ppminilm", teacher_model_type="roberta",
    )  # fmt: skip
    assert {key: getattr(arguments, key) for key in expected} == expected


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as done:
        parse(["--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in (
        "num_relation_heads",
        "teacher_layer_index",
        "scale_loss",
        "pretrain.vocab_file",
        "student_init_layers",
    ):
        assert re.search(rf"--{re.escape(name)}\b.*?\S+ .*?default: ", text), name
    assert "relation heads; must divide the widths of both" in text


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_hold_together(recipe):
    """They parse, and what they match fits the models they name."""
    arguments = parse(["--config", str(recipe), "--input_dir=i", "--output_dir=o"])
    settings = yaml.safe_load(recipe.read_text())
    assert settings.get("matches") == arguments.matches
    assert settings.get("num_relation_heads", 64) == arguments.num_relation_heads
    published = {
        "roberta-wwm-ext-large": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
        "roberta-wwm-ext": {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
        },
    }
    config = new_teacher_config(arguments.pretrain, 21128)
    if arguments.teacher_model_name_or_path is not None:
        config |= published[arguments.teacher_model_name_or_path]
    runs = [(arguments, new_student_config(arguments, config))]
    if arguments.assistant.num_layers is not None:
        assistant = new_assistant_config(arguments.assistant, config)
        runs = [(arguments.of_assistant(), assistant), (arguments, new_student_config(arguments, assistant))]
    for settings_of_run, learns in runs:
        teacher, student = Shape.of(config), Shape.of(learns)
        _, wanted = wanted_of(new_matches(settings_of_run, teacher, student, together=False))
        assert len(student.layers) in (*wanted.states, *(layer + 1 for layer in wanted.qkv))
        assert student.even
        config = learns


def test_student_sizes_are_ppminilms():
    assert STUDENT_SIZES[6] == {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    assert STUDENT_SIZES[4] == {"hidden_size": 256, "num_attention_heads": 16, "intermediate_size": 1024}


def test_student_starts_from_chosen_layers(teacher):
    arguments = DistillArguments(
        **{**QUICK, "pretrain": None, "output_dir": "o", "student_init_layers": [2, 0]}, model_type="bert"
    )
    weights = read_weights(teacher)
    config = new_student_config(arguments, {**TINY, "vocab_size": 3000})
    assert config["max_position_embeddings"] == 64
    got = initial_weights(arguments, weights, [2, 0])
    for to, source in ((0, 2), (1, 0)):
        name = "attention.self.key.weight"
        np.testing.assert_array_equal(got[f"encoder.layer.{to}.{name}"], weights[f"encoder.layer.{source}.{name}"])
    assert not any(name.startswith("encoder.layer.2") for name in got)
    np.testing.assert_array_equal(got["pooler.dense.bias"], weights["pooler.dense.bias"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0, 1]),
        ({"num_layers": 3}, [0, 1, 2]),
        ({"num_layers": 1, "student_layer_index": 0}, [0]),
        ({"num_layers": 4}, None),
        ({"hidden_size": 48}, None),
        ({"num_attention_heads": 2}, None),
        ({"intermediate_size": 128}, None),
        ({"student_init_layers": "random"}, None),
    ],
)
def test_student_starts_from_layers_of_a_teacher_of_its_shape(changes, expected):
    arguments = DistillArguments(**{**QUICK, "pretrain": None, "output_dir": "o", **changes})
    config = new_student_config(arguments, TINY)
    assert initial_layers(arguments.student_init_layers, Shape.of(TINY), Shape.of(config)) == expected
    assert config["max_position_embeddings"] == (512 if expected is None else TINY["max_position_embeddings"])


def test_runs_that_began_at_random_go_on(tmp_path, teacher, capsys):
    """A record of before that names no layers is of a run that started at random, and ends as if it had not stopped."""
    common = {"teacher_model_name_or_path": str(teacher), "teacher_layer_index": 2}
    random, auto, before = (tmp_path / name for name in ("random", "auto", "before"))
    assert main(options(output_dir=str(random), student_init_layers="random", **common)) == 0
    assert "starts from" not in capsys.readouterr().err
    assert main(options(output_dir=str(auto), **common)) == 0
    assert "the student starts from the teacher's layers 0, 1; --student_init_layers random" in capsys.readouterr().err
    words = "embeddings.word_embeddings.weight"
    np.testing.assert_allclose(read_weights(auto)[words], read_weights(teacher)[words], atol=0.02)

    shutil.copytree(random, before)
    record = before / "arguments.yaml"
    record.write_text(record.read_text().replace("student_init_layers: random", "student_init_layers: null"))
    for gone in ("README.md", "model.safetensors", "checkpoint-8", "checkpoint-12"):
        path = before / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main([*options(output_dir=str(before), **common), "--resume"]) == 0
    assert "starts from" not in capsys.readouterr().err
    ended = read_weights(before)
    for name, array in read_weights(random).items():
        np.testing.assert_array_equal(ended[name], array)


def test_student_goes_on_from_a_folder(tmp_path, teacher):
    """A second run starts from the first one's student: its loss starts where that ended."""
    first, second = tmp_path / "first", tmp_path / "second"
    common = {"teacher_model_name_or_path": str(teacher), "learning_rate": 5e-3, "logging_steps": 1, "max_steps": 30}
    assert main(options(output_dir=str(first), **common)) == 0
    assert (
        main(options(output_dir=str(second), student_model_name_or_path=str(first), **{**common, "max_steps": 2})) == 0
    )
    began, ended, continued = metrics(first)[0]["loss"], metrics(first)[-1]["loss"], metrics(second)[0]["loss"]
    assert continued < (began + ended) / 2


def test_epochs_count_where_max_steps_does_not(tmp_path, teacher):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(f"第{i}句\n" for i in range(21)))
    output = tmp_path / "out"
    changes = {"input_dir": str(folder), "max_steps": 0, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    assert main(options(output_dir=str(output), teacher_model_name_or_path=str(teacher), **changes)) == 0
    assert metrics(output)[-1]["step"] == 3  # 42 lines, 16 a step
