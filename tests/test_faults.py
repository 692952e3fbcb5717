"""Runs that are killed, stopped, or meet a full disk or damaged text: they end with the weights of one that was not."""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import ROOT, TINY

from backends.pretrained import read_weights, write_model
from general_distill.__main__ import main
from programs.ends import Preempted
from text.corpus import Corpus
from text.tokenizer import WordPiece
from training.loop import Preemption

DEMO = ROOT / "general_distill" / "demo"
KILLS = 20


def program(argv, log, largest_file):
    """The program, in a process whose framework was imported by the one that it was forked from."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    os._exit(main(argv))


@pytest.fixture(scope="module")
def context():
    """Forks processes from one that has imported both frameworks, so that starting one takes no seconds."""
    os.environ["OMP_NUM_THREADS"] = "1"
    made = multiprocessing.get_context("forkserver")
    # PyTorch imports its compiler when it makes its first optimizer
    own = ["general_distill.distill", "backends.torch", "backends.paddle", "tests.test_faults"]
    made.set_forkserver_preload([*own, "torch._dynamo"])
    return made


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, torch_backend):
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = WordPiece.trained(Corpus(DEMO, folder / "index"), 2000)
    tokenizer.save(folder, 64)
    config = {**TINY, "vocab_size": len(tokenizer)}
    write_model(folder, config, torch_backend.model(config).weights())
    return folder


@pytest.fixture(scope="module", params=["torch", "paddle"])
def start(request, context, teacher):
    """Starts a run in a folder, in a process of its own; what it says is in a ``.log`` beside."""
    settings = {
        "input_dir": DEMO, "backend": request.param, "device": "cpu", "num_layers": 2,
        "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_relation_heads": 8,
        "teacher_layer_index": 1, "student_layer_index": 1, "beta": 0.2, "max_seq_length": 16, "batch_size": 4,
        "max_steps": 250, "logging_steps": 10, "save_steps": 5, "keep_every": 50,
        "teacher_model_name_or_path": teacher,
    }  # fmt: skip
    argv = [f"--{key}={value}" for key, value in settings.items()]

    def start(output, *more, largest_file=None, log=None):
        arguments = [*argv, f"--output_dir={output}", *more]
        process = context.Process(target=program, args=(arguments, log or output.with_suffix(".log"), largest_file))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory, start):
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "whole"
    process = start(output)
    process.join(120)
    assert process.exitcode == 0
    return output


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, start, whole):
    """Twenty kills, every second one in the middle of a save; no more than save_steps are lost by any."""
    output, chance, kills = tmp_path / "killed", random.Random(7), 0
    while kills < KILLS:
        before = newest(output)
        process = start(output, "--resume")
        if kills % 2:
            wait(process, lambda: list(output.glob(".checkpoint-*.partial")))
        else:
            wait(process, lambda: newest(output) > before)  # noqa: B023
            time.sleep(chance.uniform(0, 0.1))
        reached = newest(output)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed often enough"
        assert newest(output) >= reached
        kills += 1
    last = start(output, "--resume")
    last.join(120)
    assert last.exitcode == 0
    check_same(whole, output)
    kept = {int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*")}
    assert kept == {50, 100, 150, 200, 240, 245, 250}


@pytest.mark.slow
def test_sigterm_and_a_full_disk_lose_nothing(tmp_path, start, whole):
    """SIGTERM leaves a checkpoint of the step that it came in. The next save meets a disk without room (a limit on
    files' sizes does the same): that checkpoint stays, the only line said names the file, and it goes on later."""
    output = tmp_path / "out"
    log = output.with_suffix(".log")
    process = start(output, "--save_steps=1000", "--keep_every=0", "--logging_steps=1")
    wait(process, lambda: (output / "metrics.jsonl").exists() and (output / "metrics.jsonl").stat().st_size)
    process.terminate()
    process.join(60)
    assert process.exitcode == 0
    (saved,) = output.glob("checkpoint-*")
    step = newest(output)
    assert 0 < step < 250
    told = log.read_text().splitlines()[-1]
    assert told == f"distil: stopped by SIGTERM; {saved} holds step {step}, --resume goes on from it"
    before = {path: path.read_bytes() for path in saved.iterdir()}

    process = start(output, "--resume", largest_file=100_000)
    process.join(60)
    assert process.exitcode == 1
    message = log.read_text().splitlines()[-1]
    assert re.match(r"error: .*/model\.safetensors: cannot be written \(.*File too large.*\); what was saved", message)
    assert message.endswith("is intact, --resume goes on from it")
    assert {path: path.read_bytes() for path in saved.iterdir()} == before
    assert list(output.glob("*checkpoint*")) == [saved]

    process = start(output, "--resume")
    process.join(60)
    assert process.exitcode == 0
    check_same(whole, output, logs=False)


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(tmp_path, start, whole):
    """Others end with a line that says so, and disturb nothing."""
    output, log = tmp_path / "out", tmp_path / "second.log"
    first = start(output)
    wait(first, lambda: newest(output))
    os.kill(first.pid, signal.SIGSTOP)  # until others have been tried
    for option in ("--resume", "--overwrite"):
        second = start(output, option, log=log)
        second.join(120)
        assert second.exitcode == 2
        told = log.read_text().splitlines()[-1]
        assert told == f"error: --output_dir {output}: another run works there; let it end, or give another folder"
    os.kill(first.pid, signal.SIGCONT)
    first.join(120)
    assert first.exitcode == 0
    check_same(whole, output)


def test_sigterm_after_the_last_look_is_delivered_again():
    """What came too late for training goes to whoever had the signal before; after Preempted it is without effect."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    try:
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGTERM)
            assert preemption.is_requested and not heard
        assert heard == ["SIGTERM"]
        with pytest.raises(Preempted), Preemption():
            raise Preempted
        signal.raise_signal(signal.SIGTERM)
        assert heard == ["SIGTERM"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_bad_lines_are_skipped(tmp_path, capsys, teacher):
    """Those that the index finds, and those of a file that is damaged after it was made."""
    texts, output = tmp_path / "texts", tmp_path / "out"
    shutil.copytree(DEMO, texts)
    (texts / "zeros.txt").write_bytes(b"good\nb\0d\n\xff\n")
    Corpus(texts, output / "corpus_index", bad_lines="skip")
    file = texts / "news.txt"
    before = file.stat()
    file.write_bytes(re.sub(rb"[^\n]", b"\xff", file.read_bytes()))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    arguments = [
        f"--input_dir={texts}", f"--output_dir={output}", "--device=cpu", "--batch_size=16", "--max_steps=20",
        f"--teacher_model_name_or_path={teacher}", f"--student_model_name_or_path={teacher}", "--model_type=bert",
        "--num_relation_heads=8", "--teacher_layer_index=1", "--student_layer_index=1", "--max_seq_length=16",
    ]  # fmt: skip
    assert main([*arguments, "--bad_lines=skip"]) == 0
    told = capsys.readouterr().err
    assert ", 2 that cannot be read\n" in told
    assert int(re.search(r": (\d+) lines could not be read any more; others were taken in their place", told)[1]) > 20
    assert metrics(output)[-1]["step"] == 20


def test_what_a_bad_line_stopped_goes_on_past_it(tmp_path, capsys, teacher):
    """A file is damaged and one is gone in the middle of a run: it goes on with the numbers that its lines had."""
    texts, output = tmp_path / "texts", tmp_path / "out"
    shutil.copytree(DEMO, texts)
    arguments = [
        f"--input_dir={texts}", f"--output_dir={output}", "--device=cpu", "--batch_size=16", "--save_steps=5",
        f"--teacher_model_name_or_path={teacher}", f"--student_model_name_or_path={teacher}", "--model_type=bert",
        "--num_relation_heads=8", "--teacher_layer_index=1", "--student_layer_index=1", "--max_seq_length=16",
        "--max_steps=20",
    ]  # fmt: skip
    assert main(arguments) == 0
    (output / "README.md").unlink()
    for step in (20, 15):
        shutil.rmtree(output / f"checkpoint-{step}")
    (texts / "prose.txt").unlink()
    (texts / "news.txt").write_bytes(b"\xff\n" + (texts / "news.txt").read_bytes())
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 2
    assert "news.txt: not UTF-8 at byte 0" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--bad_lines=skip"]) == 0
    told = capsys.readouterr().err
    assert "goes on after step 10" in told
    assert int(re.search(r": (\d+) lines could not be read any more; others were taken in their place", told)[1]) > 10
    assert f"left out: {texts}/prose.txt: " in told


def newest(output):
    return max((int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*")), default=0)


def wait(process, condition):
    for _ in range(60000):
        if condition():
            return
        assert process.exitcode is None, process.exitcode
        time.sleep(0.001)
    raise AssertionError("waited for nothing")


def metrics(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if "per_second" not in key} for record in records]


def check_same(whole, output, logs=True):
    a, b = read_weights(whole), read_weights(output)
    for key, array in a.items():
        np.testing.assert_array_equal(array, b[key], err_msg=key)
    if logs:
        assert metrics(whole) == metrics(output) and len(metrics(whole)) == 25
