"""The search over hyperparameters: shared, killed, resumed; its tables."""

import contextlib
import csv
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from conftest import ROOT, TINY, environment
from optuna.storages import RDBStorage

from backends.pretrained import read_config, read_weights, write_model
from finetuning.arguments import RECIPES
from finetuning.search import CLUE, GRIDS, Interruption, main, model_name
from finetuning.table import points_of
from programs.ends import Preempted
from text.tasks import TASKS
from text.tokenizer import SPECIAL_TOKENS, WordPiece
from training.folder import Occupied
from training.loop import Preemption

CHARACTERS = [chr(ord("一") + i) for i in range(30)]


@pytest.fixture(scope="module")
def work(tmp_path_factory, torch_backend):
    """A folder with a model and data of two tasks."""
    folder = tmp_path_factory.mktemp("work")
    random = np.random.default_rng(0)
    for task, labels in {"afqmc": ["0", "1"], "bustm": ["0", "1"]}.items():
        (folder / "data" / task).mkdir(parents=True)
        for split, count in {"train": 120, "dev": 40}.items():
            rows = []
            for _ in range(count):
                label = int(random.integers(2))
                first = "".join(random.choice(CHARACTERS[2:], 6)) + CHARACTERS[label]
                rows.append({"sentence1": first, "sentence2": CHARACTERS[5], "label": labels[label]})
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "data" / task / f"{split}.json").write_text(lines, encoding="utf-8")
    model = folder / "student"
    model.mkdir()
    tokenizer = WordPiece([*SPECIAL_TOKENS, *CHARACTERS])
    tokenizer.save(model, 128)
    config = {**TINY, "vocab_size": len(tokenizer), "initializer_range": 0.1, "max_position_embeddings": 128}
    torch_backend.seed(1)
    write_model(model, config, torch_backend.model(config).weights())
    return folder


def options(work, output, **settings):
    quick = {
        "model_name_or_path": work / "student",
        "data_dir": work / "data",
        "output_dir": output,
        "device": "cpu",
        "tasks": '["afqmc","bustm"]',
        "batch_sizes": "[8,16]",
        "learning_rates": "[1e-3,3e-3]",
        "seeds": "[1,2]",
        "max_steps": 12,
    }
    return [f"--{key}={value}" for key, value in {**quick, **settings}.items()]


def studies(output):
    address = f"sqlite:///{output}/search.db"
    return [optuna.load_study(study_name=f"student/{task}", storage=address) for task in ("afqmc", "bustm")]


@pytest.mark.slow
def test_workers_share_a_search_and_one_may_die(tmp_path, work):
    """Of two that start together one is killed and one told to end; two more finish; every point was tried once."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "finetuning.search", *options(work, output, max_steps=40)]

    logs = [tmp_path / "first.txt", tmp_path / "second.txt"]

    def start(path):
        with path.open("w") as file:
            return subprocess.Popen(command, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), stderr=file)

    workers = [start(path) for path in logs]
    while not all("dev: " in path.read_text() for path in logs):  # both are in the middle of a trial
        assert all(worker.poll() is None for worker in workers), [path.read_text() for path in logs]
        time.sleep(0.05)
    for worker, end in zip(workers, (signal.SIGKILL, signal.SIGTERM)):
        worker.send_signal(end)
    assert workers[0].wait() == -signal.SIGKILL
    # 0 where training left a checkpoint, 130 where it was not training (or, of Python's own making, by SIGINT)
    assert workers[1].wait() in (0, 130, -signal.SIGINT), logs[1].read_text()
    assert "the same command goes on" in logs[1].read_text()
    for worker, path in [(start(path), path) for path in logs]:
        assert worker.wait() == 0, path.read_text()
    for study in studies(output):
        complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
        points = {tuple(sorted(trial.params.items())) for trial in complete}
        assert len(complete) == len(points) == 8
    # A finished search is not begun again
    before = (output / "student" / "results.csv").read_text()
    assert (
        subprocess.run(command, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), stderr=subprocess.DEVNULL).returncode
        == 0
    )
    assert (output / "student" / "results.csv").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["in a trial", "in Optuna"])
def test_interruption_is_not_lost_in_a_library(tmp_path, work, capsys, monkeypatch, lost):
    """Where Python drops the exception, or Optuna would break at it, the search still ends."""
    tried = []

    def finetune(arguments):
        tried.append((arguments.task_name, arguments.batch_size, arguments.learning_rate, arguments.seed))
        if lost == "in a trial" and len(tried) == 3:
            with contextlib.suppress(KeyboardInterrupt):  # as Python does in weak references' callbacks
                signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
            raise AssertionError("the trial went on")
        return {"accuracy": 50.0}

    write = RDBStorage.set_trial_state_values

    def interrupted(self, *arguments, **named):
        if lost == "in Optuna" and len(tried) == 3:
            signal.raise_signal(signal.SIGTERM)
        return write(self, *arguments, **named)

    monkeypatch.setattr("finetuning.search.finetune", finetune)
    monkeypatch.setattr(RDBStorage, "set_trial_state_values", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(options(work, tmp_path)) == 130
        assert "stopped; the same command goes on" in capsys.readouterr().err
        assert len(tried) == 3
        tried.append(None)  # the count that interrupts is passed
        assert main(options(work, tmp_path)) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    tried.remove(None)
    assert len(set(tried)) == 16 and len(tried) == (17 if lost == "in a trial" else 16)


@pytest.mark.slow
def test_a_trial_whose_first_worker_lives_after_all_is_tried_later(tmp_path, work, monkeypatch):
    tried = []

    def finetune(arguments):
        tried.append(arguments.output_dir)
        if len(tried) == 2:
            raise Occupied(f"{arguments.output_dir} is another's")
        return {"accuracy": 50.0}

    monkeypatch.setattr("finetuning.search.finetune", finetune)
    monkeypatch.setattr("finetuning.search.HEARTBEAT", 1)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(options(work, tmp_path)) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(tried) == 17 and len(set(tried)) == 16 and tried.count(tried[1]) == 2


def test_a_signal_stays_without_effect_after_preemption():
    """A launcher sends it again while the search leaves."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Preempted), Interruption(), Preemption():
            raise Preempted
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_tables_say_what_was_found(tmp_path, work, capsys):
    output = tmp_path / "out"
    assert main(options(work, output)) == 0
    table = (output / "student" / "results.md").read_text().split("\n")
    assert table[0] == "| Model | AFQMC | BUSTM | Avg |"
    best = []
    for study, cell in zip(studies(output), table[2].split(" | ")[1:3]):
        scores = {}
        for trial in study.trials:
            key = trial.params["batch_size"], trial.params["learning_rate"]
            scores.setdefault(key, []).append(trial.value)
            results = json.loads((ROOT / trial.user_attrs["folder"] / "eval_results.json").read_text())
            assert results["dev"]["accuracy"] == trial.value
        mean, deviation = max((np.mean(pair), np.std(pair, ddof=1)) for pair in scores.values())
        assert points_of(study)[0].mean == pytest.approx(mean)
        assert cell.split(" ± ")[0] == f"{mean:.2f}"
        assert float(cell.split(" ± ")[1]) >= 0 and np.isfinite(deviation)
        best.append(mean)
        # Of the models only the best so far are kept, and no checkpoints
        kept = [
            path.parent.name
            for path in (output / "student" / study.user_attrs["settings"]["task"]).glob("*/model.safetensors")
        ]
        assert str(study.best_trial.number) in kept
        assert not list(output.glob("*/*/*/checkpoint-*"))
    assert table[2].startswith("| student | ")
    assert table[2].endswith(f" | {np.mean(best):.2f} |")
    rows = list(csv.DictReader((output / "student" / "results.csv").open()))
    assert len(rows) == 16
    assert {row["seed"] for row in rows} == {"1", "2"}
    assert (output / "student" / "results.png").read_bytes()[:4] == b"\x89PNG"
    # Another grid is another search
    capsys.readouterr()
    assert main(options(work, output, learning_rates="[1e-3]")) == 2
    assert "a search for afqmc with a model called student was begun with other settings (grid was" in (
        capsys.readouterr().err
    )
    # Another model of the same name is another search, and one of another name has folders of its own
    other = tmp_path / "student"
    shutil.copytree(work / "student", other)
    weights = read_weights(other)
    write_model(other, read_config(other), {name: array * 0.9 for name, array in weights.items()})
    assert main(options(work, output, model_name_or_path=other)) == 2
    assert "begun with other settings (model was" in capsys.readouterr().err
    other = other.rename(tmp_path / "second")
    before = (output / "student" / "results.md").read_text()
    assert main(options(work, output, model_name_or_path=other, tasks="bustm", seeds=1, max_steps=2)) == 0
    assert (output / "student" / "results.md").read_text() == before
    assert (output / "second" / "results.md").read_text().startswith("| Model | BUSTM | Avg |")


@pytest.fixture
def scored(monkeypatch):
    """Trials that are not trained, but scored by a function of their arguments, which the test sets."""
    made = {}
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("finetuning.search.finetune", lambda arguments: {"accuracy": made["score"](arguments)})
    yield made
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", ["[1]", "[1,2]"])
def test_the_table_names_the_trial_whose_hyperparameters_it_shows(tmp_path, work, capsys, scored, seeds):
    """Also where all score alike, and where the best of all is not of the seeds' best point."""

    def score(arguments):
        best_alone = arguments.seed == 2 and (arguments.batch_size, arguments.learning_rate) == (8, 1e-3)
        return {"[1]": 50.0, "[1,2]": 90.0 if best_alone else 20.0 if arguments.batch_size == 8 else 60.0}[seeds]

    scored["score"] = score
    assert main(options(work, tmp_path, tasks="afqmc", seeds=seeds)) == 0
    said = capsys.readouterr().err
    size = 4 * len(json.loads(seeds))
    for number in range(1, size + 1):
        folder = tmp_path / "student" / "afqmc" / str(number - 1)
        assert f"afqmc: trial {number} of {size}, in {folder}: " in " ".join(said.split())
    lines = (tmp_path / "student" / "results.md").read_text().splitlines()
    cells = [cell.strip() for cell in next(line for line in lines if line.startswith("| afqmc ")).split("|")]
    rows = {row["folder"]: row for row in csv.DictReader((tmp_path / "student" / "results.csv").open())}
    folder, _, note = cells[7].partition(" (")
    trial = rows[folder]
    if seeds == "[1]":
        assert not note and [float(cell) for cell in cells[4:7]] == [
            float(trial[name]) for name in ("batch_size", "learning_rate", "num_train_epochs")
        ]
    else:
        assert note == "90.00: seed 2, batch size 8, learning rate 0.001, 3 epochs)"
        assert (trial["seed"], trial["batch_size"], trial["learning_rate"]) == ("2", "8", "0.001")
        assert cells[3:5] == ["60.00 ± 0.00", "16"]


def test_tasks_without_data_are_left_out(tmp_path, work, capsys, scored):
    scored["score"] = lambda arguments: 50.0
    assert main(options(work, tmp_path, tasks='["afqmc","csl"]', seeds="[1]")) == 0
    assert "csl is left out: " in capsys.readouterr().err
    table = (tmp_path / "student" / "results.md").read_text()
    assert table.startswith("| Model | AFQMC | Avg |") and "\nLeft out: csl (" in table and "no train set" in table


@pytest.mark.parametrize("name", ["a?seed=1", "50%41", "#", "{SCHEMA_VERSION}", "[x]*", "五 十\n'\"", "a|b&c;d", "~"])
def test_a_search_lies_in_its_folder_whatever_that_is_called(tmp_path, work, scored, name):
    scored["score"] = lambda arguments: 50.0
    (tmp_path / name).mkdir()
    model = shutil.copytree(work / "student", tmp_path / name / name)
    few = {"tasks": "afqmc", "seeds": "[1]", "batch_sizes": "[8]", "learning_rates": "[1e-3]"}
    assert main(options(work, tmp_path / name / "out", model_name_or_path=model, **few)) == 0
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")} == {name}
    assert (tmp_path / name / "out" / "search.db").exists()
    lines = (tmp_path / name / "out" / name / "results.md").read_text().splitlines()
    assert len(lines[2].replace("\\|", "").split("|")) == 5


def test_a_model_is_called_as_the_hub_calls_it(tmp_path, work, monkeypatch):
    folder = tmp_path / "hub" / "models--someone--small-bert" / "snapshots" / "0123abc"
    assert model_name(folder) == "someone/small-bert"
    assert model_name(tmp_path / "hub" / "models--bert-base-chinese" / "snapshots" / "0123abc") == "bert-base-chinese"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert model_name(Path()) == "someone/small-bert"
    assert model_name(Path("..")) == "snapshots" and model_name(work / "student/") == "student"


@pytest.mark.slow
def test_a_trial_whose_worker_died_without_a_sign_of_life_is_tried_again(tmp_path, work, monkeypatch, scored):
    scored["score"] = lambda arguments: 50.0
    monkeypatch.setattr("finetuning.search.HEARTBEAT", 1)
    assert main(options(work, tmp_path, tasks="afqmc", seeds="[1]")) == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "search.db")) as database, database:
        database.execute("update trials set state = 'RUNNING', datetime_complete = null where number = 1")
        database.execute("delete from trial_heartbeats where trial_id = (select trial_id from trials where number = 1)")
        database.execute("delete from trial_values where trial_id = (select trial_id from trials where number = 1)")
    assert main(options(work, tmp_path, tasks="afqmc", seeds="[1]")) == 0
    trials = optuna.load_study(study_name="student/afqmc", storage=f"sqlite:///{tmp_path}/search.db").get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert trials[4].params == trials[1].params


@pytest.mark.slow
def test_other_data_is_another_search(tmp_path, work, capsys, scored):
    scored["score"] = lambda arguments: 50.0
    data = shutil.copytree(work / "data", tmp_path / "data")
    assert main(options(work, tmp_path / "out", data_dir=data, seeds="[1]")) == 0
    dev = data / "bustm" / "dev.json"
    lines = dev.read_text(encoding="utf-8").splitlines(keepends=True)
    dev.write_text("".join([*lines[1:], lines[0]]), encoding="utf-8")
    assert main(options(work, tmp_path / "out", data_dir=data, seeds="[1]")) == 2
    assert "begun with other settings (dev was 40 examples, sha256 " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["garbage", "a page", "cut short"])
def test_a_damaged_database_is_named(tmp_path, work, capsys, scored, damage):
    scored["score"] = lambda arguments: 50.0
    assert main(options(work, tmp_path, tasks="afqmc", seeds="[1]")) == 0
    file = tmp_path / "search.db"
    content = file.read_bytes()
    changed = {"garbage": b"garbage" * 1000, "a page": content[:8192] + bytes(4096) + content[12288:]}
    file.write_bytes(changed.get(damage, content[: len(content) // 2]))
    capsys.readouterr()
    assert main(options(work, tmp_path, tasks="afqmc", seeds="[1]")) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"error: {file}: cannot be opened (" in said[0]


def test_a_failed_trial_is_told_and_the_rest_go_on(tmp_path, work):
    output = tmp_path / "out"
    settings = {"tasks": '["bustm"]', "learning_rates": "[1e-3,1e30]", "batch_sizes": "[8]", "seeds": "[1]"}
    assert main(options(work, output, **settings)) == 0
    rows = list(csv.DictReader((output / "student" / "results.csv").open()))
    assert sorted(row["state"] for row in rows) == ["COMPLETE", "FAIL"]
    assert "bustm: loss nan" in next(row for row in rows if row["state"] == "FAIL")["error"]
    assert "| 1 of 2 | 1 |" in (output / "student" / "results.md").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": '["afqm"]'}, "--tasks afqm: no such task; did you mean afqmc?"),
        ({"tasks": '["tnews"]'}, ": no train set of tnews in "),
        ({"seeds": "[1,1]"}, "--seeds [1, 1]: must be one or more values, each once"),
        ({"learning_rates": "[]"}, "--learning_rates []: must be one or more values"),
        ({"batch_sizes": "[0,8]"}, "--batch_sizes [0, 8]: must be greater than 0"),
        ({"learning_rates": "[-1]"}, "--learning_rates [-1.0]: must be greater than 0"),
        ({"config": "tnews"}, "--config tnews: cannot be read"),
        ({"grid": "random"}, "grid"),
        (
            {"num_train_epochs": "[3,3]", "max_steps": -1},
            "--num_train_epochs [3, 3]: must be one or more values, each once",
        ),
        ({"device": "tpu"}, "device"),
        ({"storage": "nowhere"}, "--storage nowhere: cannot be opened"),
        ({"model_name_or_path": "./nowhere"}, "--model_name_or_path ./nowhere: no such folder"),
    ],
)
def test_bad_arguments(tmp_path, work, capsys, changes, says):
    assert main(options(work, tmp_path / "out", **changes)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_grids_and_recipes_are_the_published_ones():
    """PP-MiniLM's README; its run_one_search.sh for epochs and lengths."""
    assert GRIDS["ppminilm"] == {"batch_size": [16, 32, 64], "learning_rate": [3e-5, 5e-5, 1e-4]}
    assert set(CLUE) <= TASKS.keys()
    assert TASKS.keys() <= {path.stem for path in RECIPES.glob("*.yaml")}
    from finetuning.arguments import parse

    for task, epochs, length in (("cluewsc2020", 50, 128), ("csl", 8, 256), ("iflytek", 6, 128), ("cmnli", 3, 128)):
        arguments = parse(["--recipe", task, "--model_name_or_path", "m"])
        assert (arguments.task_name, arguments.num_train_epochs, arguments.max_seq_length) == (task, epochs, length)
