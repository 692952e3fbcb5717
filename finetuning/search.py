"""``python -m finetuning.search``: fine-tunes over a grid of hyperparameters, and tabulates the best.

A task's grid is an Optuna study in a storage that outlives the program: stopped, the
same command goes on, and several workers or machines that name the same storage share
the trials among them. Another worker takes up the trial of one that died.
"""

from __future__ import annotations

import minilm_duet

if __name__ == "__main__":
    minilm_duet.begin()

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

import optuna
import sqlalchemy
from optuna.samplers import GridSampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState

import backends
from backends.files import InputError, leaving_nothing
from finetuning.arguments import RECIPES, FinetuneArguments
from finetuning.arguments import parse as parse_trial
from finetuning.finetune import data_identity, finetune
from finetuning.table import grid_size, points_of, write_tables
from programs import commandline
from programs.console import say
from programs.ends import Preempted, TrainingFailed
from text.data import Split, read_split, split_file, with_labels_of
from text.folder import ModelFolder
from text.tasks import TASKS, find_task
from training import checkpoint
from training.folder import Occupied

Grid: TypeAlias = dict[str, list[Any]]
"""Names of fine-tuning's arguments -> the values to try."""
CLUE = ["afqmc", "tnews", "iflytek", "cmnli", "ocnli", "cluewsc2020", "csl"]
GRIDS: dict[str, Grid] = {
    "ppminilm": {"batch_size": [16, 32, 64], "learning_rate": [3e-5, 5e-5, 1e-4]},
    # Small models want higher rates and more epochs; 5e-5 and 1e-4 were the best ones that MiniRBT reports.
    "minirbt": {"batch_size": [32], "learning_rate": [5e-5, 1e-4, 2e-4], "num_train_epochs": [2, 3, 5, 10]},
}
HEARTBEAT = 10
"""Seconds between a worker's signs of life; after three times as many without one, another takes up its trial."""
SPLITS: tuple[Split, ...] = ("train", "dev")
REPEAT = 5
"""Seconds after which a signal whose exception was lost raises it again."""


@dataclass
class SearchArguments:
    """A search over the hyperparameters of fine-tuning, for each of several tasks."""

    model_name_or_path: str
    """the model's folder or its name on the model hub"""
    tasks: list[str] = field(default_factory=lambda: list(CLUE))
    """tasks, each with the epochs and length of its recipe"""
    data_dir: str = "data/clue"
    """folder with a folder of each task's name"""
    output_dir: str = "output/search"
    """folder for trials and tables"""
    storage: str | None = None
    """address of the database that workers share; without, a file in output_dir"""
    grid: Literal["ppminilm", "minirbt"] = "ppminilm"
    """preset of batch sizes, learning rates and epochs"""
    batch_sizes: list[int] | None = None
    """batch sizes, if not the preset's"""
    learning_rates: list[float] | None = None
    """learning rates, if not the preset's"""
    num_train_epochs: list[int] | None = None
    """epochs, if not the preset's or the recipes'"""
    seeds: list[int] = field(default_factory=lambda: [42])
    """random seeds; with more than one, means and deviations are told"""
    max_steps: int = -1
    """updates of each trial; if not positive, epochs count"""
    backend: Literal["auto", "torch", "paddle"] = "auto"
    """framework; auto takes the one installed, torch first"""
    device: Literal["auto", "cpu", "gpu", "xpu"] = "gpu"
    """device; auto takes an accelerator if there is one"""
    use_amp: bool = False
    """compute in low precision"""

    def without_effect(self, options: Collection[str]) -> dict[str, str]:
        """Returns the options that others keep from having an effect, each with the reason."""
        return {"num_train_epochs": f"beside --max_steps {self.max_steps}"} if self.max_steps > 0 else {}

    def grid_of(self, epochs: int) -> Grid:
        """Makes the grid of a task whose recipe has so many epochs."""
        grid = {"num_train_epochs": [epochs], **GRIDS[self.grid], "seed": self.seeds}
        instead = {
            "batch_size": self.batch_sizes,
            "learning_rate": self.learning_rates,
            "num_train_epochs": self.num_train_epochs,
        }
        grid |= {name: values for name, values in instead.items() if values is not None}
        for name, values in grid.items():
            option = name if name.endswith("s") else f"{name}s"
            if not values or len(set(values)) < len(values):
                raise InputError(f"--{option} {values}: must be one or more values, each once")
            if name != "seed" and not all(value > 0 for value in values):
                raise InputError(f"--{option} {values}: must be greater than 0")
        return grid


class Interruption:
    """A handler of SIGTERM and Ctrl-C, which end a trial at once, but the search between trials only where `check` is
    called: Optuna breaks at a KeyboardInterrupt while it writes to its storage."""

    def __init__(self) -> None:
        self._signalled = self._at_once = False

    def __enter__(self) -> Interruption:
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGALRM
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, reason: type[BaseException] | None, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            if (number, reason) != (signal.SIGTERM, Preempted):  # a launcher's further SIGTERMs stay without effect
                signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self._signalled = True
        if self._at_once:
            # Python drops an exception that is raised in a callback of a weak reference.
            signal.setitimer(signal.ITIMER_REAL, REPEAT)
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal came."""
        if self._signalled:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Lets signals raise KeyboardInterrupt wherever the program is."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False
            signal.setitimer(signal.ITIMER_REAL, 0)


@dataclass(frozen=True)
class TaskSearch:
    """The search for a task."""

    arguments: FinetuneArguments
    """Arguments of every trial, in which a point of the grid replaces some."""
    grid: Grid
    storage: RDBStorage
    study: optuna.Study
    folder: Path
    """Folder that gets one of the task's name, and in that a folder for each trial."""
    interruption: Interruption

    @property
    def size(self) -> int:
        return grid_size(self.grid)

    def run(self, report: Callable[[], None]) -> None:
        """Works until all points have been tried, by this worker or another.

        Args:
            report: called after each trial.
        """
        awaited: set[int] = set()
        while True:
            self.interruption.check()
            trials = self.study.get_trials(deepcopy=False)
            # A worker that died between two writes leaves a trial without a point, which does not count.
            begun = [trial for trial in trials if "grid_id" in trial.system_attrs]
            running = [trial for trial in begun if trial.state == TrialState.RUNNING]
            points = {trial.system_attrs["grid_id"] for trial in begun}
            if len(points) < self.size or any(trial.state == TrialState.WAITING for trial in trials):
                self._run_trial()
                report()
            elif running:
                if not awaited:
                    say(f"{self.arguments.task_name}: waiting for {len(running)} trials of other workers")
                for trial in running:
                    if trial.number not in awaited:  # its worker may have died before it gave a sign of life
                        self.storage.record_heartbeat(trial._trial_id)
                        awaited.add(trial.number)
                time.sleep(1)
                optuna.storages.fail_stale_trials(self.study)
            else:
                report()
                return

    def _run_trial(self) -> None:
        """Takes up the next trial; hands it back if it is interrupted."""
        numbers: list[int] = []

        def attempt(trial: Trial) -> float:
            numbers.append(trial.number)
            return self._try(trial)

        try:
            self.study.optimize(attempt, n_trials=1, catch=(TrainingFailed,))
        except BaseException as error:  # the user's Ctrl-C, a full disk: the trial is not at fault
            for number in numbers:
                RetryHeartbeatStaleTrialCallback()(self.study, self._trial(number))
            if not isinstance(error, Occupied):
                raise
            say(str(error))
            time.sleep(HEARTBEAT)  # the worker that gave no sign of life is alive after all

    def _trial(self, number: int) -> FrozenTrial:
        return next(trial for trial in self.study.get_trials() if trial.number == number)

    def _try(self, trial: Trial) -> float:
        """Fine-tunes at a trial's point of the grid; returns the score that models are chosen by."""
        point: dict[str, Any] = {name: trial.suggest_categorical(name, values) for name, values in self.grid.items()}
        attributes = self._trial(trial.number).system_attrs
        grid_id = attributes["grid_id"]
        earlier = [
            other
            for other in self.study.get_trials(deepcopy=False)
            if other.number < trial.number and "grid_id" in other.system_attrs
        ]
        same_point = [other for other in earlier if other.system_attrs["grid_id"] == grid_id]
        if any(other.state in (TrialState.RUNNING, TrialState.COMPLETE) for other in same_point):
            raise optuna.TrialPruned  # two workers saw the same last point
        # A trial that was handed back goes on in the folder of the first attempt.
        output = self.folder / self.arguments.task_name / str(attributes.get("failed_trial", trial.number))
        trial.set_user_attr("folder", str(output))
        values = ", ".join(f"{name} {value}" for name, value in point.items())
        tried = [*dict.fromkeys([*(other.system_attrs["grid_id"] for other in earlier), grid_id])]
        number = tried.index(grid_id) + 1
        say(f"{self.arguments.task_name}: trial {number} of {self.size}, in {output}: {values}")
        try:
            with self.interruption.at_once():
                scores = finetune(replace(self.arguments, **point, output_dir=str(output), resume=True))
        except TrainingFailed as error:
            trial.set_user_attr("error", str(error))
            say(f"{output}: {error}")
            raise
        score = scores[find_task(self.arguments.task_name).metric]
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        _tidy(output, best=all(score >= (other.value or 0.0) for other in done))
        return score


def _tidy(output: Path, best: bool) -> None:
    """Leaves a finished trial its results, and its model only if it is the best so far."""
    for saved in checkpoint.checkpoints(output):
        checkpoint.remove(saved)
    for weights in () if best else output.glob("*.safetensors"):
        weights.unlink()


def search(arguments: SearchArguments) -> None:
    """Tries all points of each task's grid, and writes the tables.

    Raises:
        InputError: something in `arguments` is wrong, which shows before any trial, or the storage holds a search with
            other settings.
    """
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    model = ModelFolder.find(arguments.model_name_or_path, "model_name_or_path")
    backends.load(arguments.backend, arguments.device)
    trials, absent = _check_tasks(arguments, model)
    root, name = Path(arguments.output_dir), model_name(model.path)
    output = root / name.replace("/", "--")
    file = root.resolve() / "search.db"
    settings = {"model": model.identity(), "backend": arguments.backend, "use_amp": arguments.use_amp}
    interruption = Interruption()
    with leaving_nothing(output), leaving_nothing(root, [file.name]):
        output.mkdir(parents=True, exist_ok=True)
        if arguments.storage is None:
            storage = _open(_address_of(file), str(file))
        else:
            storage = _open(arguments.storage, f"--storage {arguments.storage}")
        searches = [
            TaskSearch(
                trial_arguments,
                grid,
                storage,
                _study(storage, name, settings | identity, trial_arguments, grid),
                output,
                interruption,
            )
            for trial_arguments, grid, identity in trials
        ]
    for task_name, reason in absent.items():
        say(f"{task_name} is left out: {reason}")
    present = set(optuna.get_all_study_names(storage))
    names = [study_name for task in TASKS if (study_name := f"{name}/{task}") in present]
    studies = [optuna.load_study(study_name=study_name, storage=storage) for study_name in names]
    with interruption:
        for task_search in searches:
            task_search.run(report=lambda: write_tables(output, name, studies, absent))
    size = sum(task_search.size for task_search in searches)
    result = f"{output / 'results.md'}: the best of {size} trials and where it is"
    best = next((points[0].trials[0] for study in studies if (points := points_of(study))), None)
    if best is None:
        say(result)
    else:
        export = commandline.command("export onnx", best.user_attrs["folder"])
        commandline.say_next(f"{result}. To export one, the first for example:", export)


def _check_tasks(
    arguments: SearchArguments, model: ModelFolder
) -> tuple[list[tuple[FinetuneArguments, Grid, dict[str, str]]], dict[str, str]]:
    """Reads the tasks' data.

    Returns:
        For each task the arguments of its trials, its grid and the identity of its data; and the tasks that are left
        out because their data is absent, each with the reason.

    Raises:
        InputError: a task, its data or the grid is wrong, or no task has data.
    """
    data_dir = Path(arguments.data_dir)
    trials = []
    absent: dict[str, str] = {}
    for task_name in arguments.tasks:
        task = find_task(task_name, option="tasks")
        trial_arguments = _arguments_of(task.name, arguments)
        grid = arguments.grid_of(trial_arguments.num_train_epochs)
        try:
            for split in SPLITS:
                split_file(task, data_dir, split)
        except InputError as error:
            absent[task.name] = str(error)
            continue
        model.check_length(trial_arguments.max_seq_length, f"the recipe of {task.name}: max_seq_length")
        task = with_labels_of(task, data_dir)
        skip = trial_arguments.skip_bad_lines
        identity = data_identity(task, {split: read_split(task, data_dir, split, skip) for split in SPLITS})
        trials.append((trial_arguments, grid, identity))
    if not trials:
        raise InputError(next(iter(absent.values())))
    return trials, absent


def model_name(model: Path) -> str:
    """Names a model: as on the hub if it lies in the hub's cache, else as its folder."""
    path = Path(os.path.abspath(model))
    cached = path.parents[1].name if path.parent.name == "snapshots" else ""
    return cached.removeprefix("models--").replace("--", "/") if cached.startswith("models--") else path.name


def _address_of(path: Path) -> str:
    """Makes the address of a SQLite file. Its name may hold any character: only the driver reads the quoted URI."""
    uri = f"file:{quote(os.fsencode(path))}"
    return str(sqlalchemy.engine.URL.create("sqlite", database=uri, query={"uri": "true"}))


def _arguments_of(task: str, arguments: SearchArguments) -> FinetuneArguments:
    """Makes fine-tuning's arguments for a task, of its recipe and the search's arguments."""
    recipe = ["--recipe", task] if (RECIPES / f"{task}.yaml").is_file() else []
    shared = ("model_name_or_path", "data_dir", "backend", "device", "use_amp", "max_steps")
    options = [f"--{name}={getattr(arguments, name)}" for name in shared]
    return parse_trial([*recipe, f"--task_name={task}", *options])


def _open(address: str, what: str, attempts: int = 3) -> RDBStorage:
    """Opens the database at an address; `what` is what an error calls it."""
    sqlite = address.startswith("sqlite")
    try:
        storage = RDBStorage(
            address,
            {"connect_args": {"timeout": 60}} if sqlite else None,
            heartbeat_interval=HEARTBEAT,
            grace_period=3 * HEARTBEAT,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )
        if sqlite:
            with storage.engine.connect() as link:
                if (state := link.exec_driver_sql("PRAGMA integrity_check").scalar()) != "ok":
                    raise ValueError(f"it is damaged: {state}")
    except Exception as error:  # SQLAlchemy's and its drivers', which share no class
        if attempts > 1 and isinstance(error, sqlalchemy.exc.SQLAlchemyError):
            time.sleep(1)  # of workers that create the tables at the same moment all but one fail
            return _open(address, what, attempts - 1)
        reason = " ".join(str(error).split())
        raise InputError(f"{what}: cannot be opened ({reason[:200]}); expected sqlite:///FILE") from error
    if sqlite:
        # The driver would begin a transaction only at the first write, after the reads that the write depends
        # on: two workers could take the same trial.
        storage.engine.dispose()
        sqlalchemy.event.listen(storage.engine, "connect", lambda link, _: setattr(link, "isolation_level", None))
        sqlalchemy.event.listen(storage.engine, "begin", lambda link: link.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def _study(
    storage: RDBStorage, model: str, settings: dict[str, Any], trial_arguments: FinetuneArguments, grid: Grid
) -> optuna.Study:
    """Creates a task's study, or goes on with it.

    Raises:
        InputError: it was begun with other settings.
    """
    study = optuna.create_study(
        storage=storage,
        study_name=f"{model}/{trial_arguments.task_name}",
        sampler=GridSampler(grid, seed=0),
        direction="maximize",
        load_if_exists=True,
    )
    settings = settings | {
        "task": trial_arguments.task_name,
        "metric": find_task(trial_arguments.task_name).metric,
        "grid": grid,
        "max_seq_length": trial_arguments.max_seq_length,
        "max_steps": trial_arguments.max_steps,
    }
    before = study.user_attrs.get("settings", settings)
    changed = [
        f"{key} was {before.get(key)}, now {value}" for key, value in settings.items() if before.get(key) != value
    ]
    if changed:
        raise InputError(
            f"a search for {trial_arguments.task_name} with a model called {model} was begun with other settings "
            f"({'; '.join(changed)}); give the same, or another --output_dir (or --storage)"
        )
    study.set_user_attr("settings", settings)
    return study


def parse(argv: Sequence[str]) -> SearchArguments:
    description = "Fine-tunes over a grid of hyperparameters for each of several tasks, and tabulates the best."
    return commandline.parse(SearchArguments, argv, "finetuning.search", description)


def main(argv: Sequence[str]) -> int:
    # SIGTERM, by which schedulers end programs, is like Ctrl-C: the trial under way is handed back.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def program() -> None:
        try:
            search(parse(argv))
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, json.JSONDecodeError) as error:
            raise InputError(
                f"the search's database is damaged or full ({' '.join(str(error).split())[:200]})"
            ) from error

    return commandline.run(program, "the same command")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
