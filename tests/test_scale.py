"""Several processes: what one computes with the whole batch, in one order of lines; none outlives another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, environment

from backends.pretrained import read_weights, write_model
from general_distill.__main__ import main
from text.batches import line_batches
from text.corpus import Corpus
from text.tokenizer import WordPiece

BOTH = pytest.mark.parametrize("name", ["torch", "paddle"])
DEMO = ROOT / "general_distill" / "demo"


@pytest.fixture(scope="module")
def models(tmp_path_factory, torch_backend):
    """A teacher and a student without dropout, which every process would draw for itself."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = WordPiece.trained(Corpus(DEMO, folder / "index"), 3000)
    config = {**TINY, "vocab_size": len(tokenizer), "initializer_range": 0.1}
    for seed, name in enumerate(("teacher", "student")):
        torch_backend.seed(seed)
        (folder / name).mkdir()
        tokenizer.save(folder / name, 64)
        write_model(folder / name, config, torch_backend.model(config).weights())
    return folder


def options(models, output, name, **changes):
    """With an epsilon at which AdamW does not turn the rounding of gradients near zero into whole steps."""
    settings = {
        "input_dir": DEMO, "output_dir": output, "backend": name, "device": "cpu", "model_type": "bert",
        "teacher_model_name_or_path": models / "teacher", "student_model_name_or_path": models / "student",
        "num_relation_heads": 8, "teacher_layer_index": 2, "student_layer_index": 2, "alpha": 0.3, "beta": 0.3,
        "max_seq_length": 24, "max_steps": 10, "logging_steps": 1, "save_steps": 5, "learning_rate": 1e-3,
        "adam_epsilon": 1e-4, **changes,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in settings.items()]


def start(*arguments, **changes):
    """The program in two processes, with half of a batch of 16 lines each."""
    command = [
        sys.executable,
        "-m",
        "general_distill",
        *options(*arguments, **{"batch_size": 8, "nproc": 2, **changes}),
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def told(process):
    """What it says until it ends."""
    try:
        return process.communicate(timeout=120)[0]
    finally:
        process.kill()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_same(one, other, atol):
    a, b = read_weights(one), read_weights(other)
    for key, array in a.items():
        np.testing.assert_allclose(array, b[key], rtol=0, atol=atol, err_msg=key)


@pytest.mark.slow
@BOTH
def test_two_processes_train_as_one_does(tmp_path, capsys, models, name):
    """Loss and weights after 10 updates of two batches, all three relations; one log, one set of checkpoints.
    And one process that goes on where two have been, in larger batches, sees the lines that they would have seen."""
    alone, two, changed = (tmp_path / folder for folder in ("alone", "two", "changed"))
    assert main(options(models, alone, name, batch_size=16, gradient_accumulation_steps=2)) == 0
    process = start(models, two, name, gradient_accumulation_steps=2)
    words = told(process)
    assert process.returncode == 0, words
    assert words.count("distil 10/10") == words.count("lines left out") == 1
    records = metrics(alone), metrics(two)
    assert len(records[0]) == len(records[1]) == 10
    for a, b in zip(*records):
        for key in a:
            if "per_second" not in key:
                assert a[key] == pytest.approx(b[key], rel=2e-5, abs=1e-5), key
    check_same(alone, two, 1e-5)
    begun, ended = (read_weights(folder)["encoder.layer.0.output.dense.weight"] for folder in (models / "student", two))
    assert np.abs(begun - ended).max() > 1e-3
    assert {path.name for path in two.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-10"}
    assert "10 steps of 32 lines" in (two / "README.md").read_text()

    shutil.copytree(two, changed)
    (changed / "README.md").unlink()
    shutil.rmtree(changed / "checkpoint-10")
    shutil.copytree(changed, tmp_path / "smaller")
    capsys.readouterr()
    assert main([*options(models, changed, name, batch_size=16, gradient_accumulation_steps=2), "--resume"]) == 0
    words = capsys.readouterr().err
    assert f"goes on after step 5 of {changed / 'checkpoint-5'}" in words
    assert "an update was of" not in words
    check_same(alone, changed, 1e-5)
    assert main([*options(models, tmp_path / "smaller", name, batch_size=4), "--resume=auto"]) == 0
    assert "distil: an update was of 32 lines, and is of 4 now" in capsys.readouterr().err.splitlines()


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_takes_the_others_down(tmp_path, models, name, victim):
    output = tmp_path / "out"
    process = start(models, output, name, max_steps=100000, save_steps=100000)
    wait_for_metrics(process, output)
    workers = workers_of(output)
    assert len(workers) == 2
    os.kill(workers[victim], signal.SIGKILL)
    killed = time.monotonic()
    last = told(process).splitlines()[-1]
    assert time.monotonic() - killed < 20
    assert process.returncode == 128 + signal.SIGKILL
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    assert last == f"rank {victim}: error: ended by SIGKILL; the system does that when memory runs out"


@pytest.mark.slow
@BOTH
def test_a_process_that_fails_takes_the_others_down(tmp_path, models, name):
    """By a line that only the second reads, which was damaged after the index was made."""
    texts, output = tmp_path / "texts", tmp_path / "out"
    shutil.copytree(DEMO, texts)
    corpus = Corpus(texts, output / "corpus_index")
    batches = line_batches(corpus, lambda drawn: drawn.lines, batch_size=8, seed=42)
    line = [next(batches) for _ in range(6)][5][3].encode()
    file, offset = next((file, file.read_bytes().find(line)) for file in corpus.files if line in file.read_bytes())
    before = file.stat()
    with open(file, "r+b") as content:
        content.seek(offset)
        content.write(b"\xff")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    process = start(models, output, name, input_dir=texts)
    last = told(process).splitlines()[-1]
    assert last.startswith(f"rank 1: error: {file}: not UTF-8 at byte {offset} (")
    assert process.returncode == 2


@pytest.mark.slow
@BOTH
def test_sigterm_ends_all_in_good_order(tmp_path, capsys, models, name):
    """With a checkpoint, from which one process goes on and ends as one that was never disturbed."""
    alone, output = tmp_path / "alone", tmp_path / "out"
    settings = {"max_steps": 60, "save_steps": 1000}
    assert main(options(models, alone, name, batch_size=16, **settings)) == 0
    process = start(models, output, name, **settings)
    wait_for_metrics(process, output)
    process.send_signal(signal.SIGTERM)
    words = told(process)
    assert process.returncode == 0, words
    (saved,) = output.glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert step < 60
    last = words.splitlines()[-1]
    assert last == f"distil: stopped by SIGTERM; {saved} holds step {step}, --resume goes on from it"
    assert main([*options(models, output, name, batch_size=16, **settings), "--resume"]) == 0
    assert [record["step"] for record in metrics(output)] == list(range(1, 61))
    check_same(alone, output, 1e-4)


def wait_for_metrics(process, output):
    """Until the first update is logged."""
    path = output / "metrics.jsonl"
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, told(process)
        time.sleep(0.02)


def workers_of(output):
    """The processes with a rank that write to a folder, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_text().split("\0")
            arguments = (entry / "cmdline").read_text().split("\0")
        except OSError:
            continue
        ranks = [v.partition("=")[2] for v in variables if v.startswith(("RANK=", "PADDLE_TRAINER_ID="))]
        if ranks and f"--output_dir={output}" in arguments:
            found[int(ranks[0])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]
