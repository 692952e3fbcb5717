"""Commands as users type them: options, scripts, folders, and what is said and left behind."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, environment, model_folder

import bench.__main__
import export.__main__
import finetuning.__main__
import finetuning.arguments
import finetuning.augment
import finetuning.download
import finetuning.search
import general_distill.__main__
import general_distill.arguments
import minilm_duet
import text.prepare.__main__
from backends.files import InputError, leaving_nothing
from backends.shape import Shape
from programs import commandline
from text.prepare.pipeline import PrepareArguments
from training.log import RunLog

PROGRAMS = {
    "general_distill": general_distill.__main__.main,
    "finetuning": finetuning.__main__.main,
    "finetuning.search": finetuning.search.main,
    "finetuning.download": finetuning.download.main,
    "finetuning.augment": finetuning.augment.main,
    "text.prepare": text.prepare.__main__.main,
    "export": export.__main__.main,
    "bench": bench.__main__.main,
}
COMMANDS = [
    *([name] for name in PROGRAMS),
    *(["export", name] for name in export.__main__.COMMANDS),
    *(["bench", name] for name in bench.__main__.MEASUREMENTS),
]
DISTIL = "general_distill --input_dir i --output_dir o"
TUNE = "finetuning --task_name tnews --model_name_or_path m"
PREPARE = "text.prepare --input i --output o --vocab v"


def parsed(line):
    """What a command line comes to, without running it."""
    program, *words = line.split()
    if program == "general_distill":
        return general_distill.arguments.parse(words)
    if program == "finetuning":
        return finetuning.arguments.parse(words)
    if program == "finetuning.search":
        return finetuning.search.parse(words)
    if program == "finetuning.download":
        return commandline.parse(finetuning.download.DownloadArguments, words, program, "")
    if program == "finetuning.augment":
        return commandline.parse(finetuning.augment.AugmentArguments, words, program, "")
    if program == "text.prepare":
        return commandline.parse(PrepareArguments, words, program, "")
    name, *words = words
    command = export.__main__.COMMANDS[name]
    return commandline.parse(
        command.arguments, words, f"export {name}", "", export.__main__.RECIPES, command.positional
    )


def fails(capsys, words, code=2):
    """The one line that a command says when it is refused."""
    assert PROGRAMS[words[0]](words[1:]) == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


# Help, versions, words


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_in_words(capsys, words, option):
    with pytest.raises(SystemExit) as done:
        PROGRAMS[words[0]]([*words[1:], option])
    assert done.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: python -m {' '.join(words)}")
    assert not re.search(r"``|type: |Optional|list\[|<class|Literal|null|ITEM|\.\.\.\]\]", told)
    if len(words) == 2:
        assert re.search(r"--config( RECIPE)?, --recipe RECIPE", told)  # Python 3.13 names what follows once


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_version(capsys, words):
    with pytest.raises(SystemExit) as done:
        PROGRAMS[words[0]]([*words[1:], "--version"])
    assert (done.value.code, capsys.readouterr().out) == (0, f"MiniLM Duet {minilm_duet.VERSION}\n")


def test_help_shows_the_forms_that_documents_use(capsys):
    for words, forms in [
        (["general_distill"], ["--resume [true|false]", "--teacher_layer_index N [N ...]", "one of demo, "]),
        (["finetuning.search"], ["--seeds N [N ...]", "--learning_rates NUMBER [NUMBER ...]"]),
        (["export", "onnx"], ["export onnx MODEL [OUTPUT] [options]", "--pairs [true|false]"]),
        (["export", "predict"], ["export predict MODEL TEXTS [OUTPUT] [options]"]),
        (["text.prepare"], ["--input INPUT [INPUT ...] --output OUTPUT --vocab VOCAB [options]", "or --ray alone"]),
    ]:
        with pytest.raises(SystemExit):
            PROGRAMS[words[0]]([*words[1:], "--help"])
        told = " ".join(capsys.readouterr().out.split())
        for form in forms:
            assert form in told


@pytest.mark.parametrize(
    "line, says",
    [
        (f"{TUNE} --batch_size abc", "--batch_size abc: must be a whole number"),
        (f"{TUNE} --max_steps 1.5", "--max_steps 1.5: must be a whole number"),
        (f"{TUNE} --learning_rate x", "--learning_rate x: must be a number"),
        (f"{TUNE} --do_train maybe", "--do_train maybe: must be true or false"),
        (f"{TUNE} --device cuda", "--device cuda: must be one of auto, cpu, gpu, xpu; did you mean gpu?"),
        (f"{TUNE} --device CUDA", "did you mean gpu?"),
        (f"{TUNE} --backend pytorch", "--backend pytorch: must be one of auto, torch, paddle; did you mean torch?"),
        (f"{TUNE} --backend paddlepaddle", "did you mean paddle?"),
        (f"{TUNE} --batch_size", "--batch_size: its value is missing; must be a whole number"),
        (f"{TUNE} --batch_size 1 2", "--batch_size 1 2: must be a whole number, one value"),
        (f"{TUNE} --batch-size 1", "--batch-size: unknown; did you mean --batch_size?"),
        (f"{TUNE} --lr 1", "--lr: unknown; did you mean --learning_rate?"),
        (f"{TUNE} --epochs 1", "--epochs: unknown; did you mean --num_train_epochs?"),
        (f"{TUNE} -x", "-x: unknown; --help lists all options"),
        (f"{TUNE} --config", "--config: must be followed by one recipe"),
        ("finetuning tnews", "tnews: unexpected; python -m finetuning takes options; see --help"),
        ("finetuning", "--model_name_or_path is missing (the model's folder or its name on the model hub)"),
        ("finetuning --model_name_or_path m", "--task_name is missing; give a task, or with --tasks several to be"),
        ("finetuning.search --model_name_or_path m --seeds a", "--seeds a: must be whole numbers, as in --seeds 1 2"),
        ("finetuning.search --model_name_or_path m --learning_rates", "must be numbers, as in --learning_rates 1e-4"),
        (f"{DISTIL} --teacher_layer_index a", "--teacher_layer_index a: must be whole numbers, as in"),
        (f"{DISTIL} --relation_pairs q", "must be names, each with a number, as in '{q-q: 1, k-k: 1, v-v: 1}'"),
        (f"{DISTIL} --pretrain.hidden_size x", "--pretrain.hidden_size x: must be a whole number"),
        (f"{DISTIL} --pretrain 3", "--pretrain 3: must be given option by option"),
        ("export quantize m --methods dynamc", "did you mean dynamic?"),
        ("export quantize --search m", "--search m: must be true or false"),
        ("export predict --overwrite m t", "one value; what has no name stands before the options"),
        ("export onnx", "--model is missing (the model's folder or its name on the model hub)"),
        ("export onnx m --tokenizer in-graph o", "in-graph, one value; what has no name stands before the options"),
        (f"{PREPARE} --layout json", "--layout json: must be one of lines, jsonl, cluecorpus2020, wikipedia; did you"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_words(line, says):
    with pytest.raises(InputError) as error:
        parsed(line)
    assert says in str(error.value)


@pytest.mark.parametrize("program", ["export", "bench"])
def test_commands_that_do_not_exist(capsys, program):
    command = next(words[1] for words in COMMANDS if len(words) == 2 and words[0] == program)
    assert f"{command}x: no such" in (line := fails(capsys, [program, f"{command}x"])) and f"mean {command}?" in line
    assert "given; there are" in fails(capsys, [program])


def test_a_recipe_is_named_where_its_value_is_wrong(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("\ufeffbatch_size: abc\npretrain:\n  num_layers: 2\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"{recipe}: batch_size: abc: must be a whole number"):
        parsed(f"{DISTIL} --config {recipe}")
    recipe.write_text("pretrain:\n  num_layers: x\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"{recipe}: pretrain.num_layers: x: must be a whole number"):
        parsed(f"{DISTIL} --config {recipe}")


@pytest.mark.parametrize("value", ["#x", "~", "null", "&a", "[a", "a: b", "'q'", "1", "😀", "\x7f"])
def test_texts_are_taken_as_they_are(value):
    """YAML has other meanings for them."""
    options = ("--input_dir", "--output_dir", "--eval_dir", "--pretrain.vocab_file")
    arguments = general_distill.arguments.parse([word for option in options for word in (option, value)])
    taken = arguments.input_dir, arguments.output_dir, arguments.eval_dir, arguments.pretrain.vocab_file
    assert taken == (value,) * 4
    assert finetuning.search.parse(["--model_name_or_path", "m", "--tasks", value, "b"]).tasks == [value, "b"]


def test_patterns_stay_as_they_are():
    assert parsed("text.prepare --input a[1],b *.txt x:y --output o --vocab v").input == ["a[1],b", "*.txt", "x:y"]


def documented():
    """The commands in documents that a reader can type, with words such as DATA for his own."""
    for path in sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("[defg]*/*.md")):
        for line in re.findall(
            r"^    python -m (.*)$", path.read_text(encoding="utf-8").replace("\\\n", " "), re.MULTILINE
        ):
            line = re.split(r"\s{2,}#|\s{2,}\(", line)[0].strip()
            if "..." not in line and "[" not in line and line.split()[0].partition(".")[0] not in ("bench", "paddle"):
                yield pytest.param(line, id=f"{path.relative_to(ROOT)}: {line}")


@pytest.mark.parametrize("line", documented())
def test_commands_in_documents_are_understood(line):
    if line.split()[0] == "backends":
        assert line in ("backends", "backends summary MODEL")
    else:
        for word, value in (("'", ""), ("EPOCHS", "3"), ("LENGTH", "128"), ("TASK", "tnews")):
            line = line.replace(word, value)
        parsed(line)


# Options that have no effect


@pytest.mark.parametrize(
    "line",
    [
        f"{DISTIL} --resume --overwrite",
        f"{DISTIL} --num_train_epochs 1",
        f"{DISTIL} --config ppminilm_6l768h --warmup_proportion 0.2",
        f"{DISTIL} --amp_dtype float16",
        f"{DISTIL} --scale_loss 1",
        f"{DISTIL} --use_amp --amp_dtype bfloat16 --scale_loss 1",
        f"{DISTIL} --teacher_model_name_or_path t --pretrain.num_layers 2",
        f"{DISTIL} --teacher_model_type bert",
        f"{DISTIL} --student_model_name_or_path s --num_layers 2",
        f"{DISTIL} --student_model_name_or_path s --student_init_layers 1",
        f"{DISTIL} --master host:1",
        f"{TUNE} --resume true --overwrite true",
        f"{TUNE} --text_column x",
        f"{TUNE} --do_train false --do_eval --resume",
        f"{TUNE} --amp_dtype float16",
        "finetuning.search --model_name_or_path m --max_steps 3 --num_train_epochs 1 2",
        "export quantize m --max_drop 1",
        "export quantize m --methods token --task_name tnews",
        "export quantize m --calibration f --task_name tnews",
        "export quantize m --methods token --calibration f",
        "export quantize m --runtime openvino",
        "export quantize m --calibration_sizes 4",
        "export quantize m --methods float16 --per_channel false",
        "export predict m t.jsonl --pairs",
        "export predict m t --resume --overwrite",
        "export benchmark m --examples 3",
        f"{PREPARE} --field x",
        f"{PREPARE} --ray auto --processes 3",
    ],
)
def test_an_option_that_cannot_have_its_effect_is_refused(line):
    name = re.findall(r"--(\S+)", line)[-1]
    with pytest.raises(InputError, match=f"--{name}.*(has no effect|give one)"):
        parsed(line)


@pytest.mark.parametrize(
    "line",
    [
        f"{DISTIL} --num_train_epochs 1 --max_steps -1",
        f"{DISTIL} --use_amp --amp_dtype float16 --scale_loss 1",
        f"{DISTIL} --config demo --teacher_model_name_or_path t",  # the recipe's pretraining is not the user's wish
        f"{DISTIL} --config ppminilm_6l768h --use_amp false",
        f"{DISTIL} --resume false --overwrite",
        f"{DISTIL} --dry_run --resume auto",
        f"{TUNE} --num_train_epochs 2 --max_steps 20",  # as run_clue.sh gives them
        f"{TUNE} --recipe tnews --max_steps 20",
        "finetuning --task_name cmrc2018 --model_name_or_path m --doc_stride 3",
        "finetuning --task_name classification --model_name_or_path m --text_column x",
        "export quantize m --search --task_name tnews --max_drop 1",
        "export quantize m --config ppminilm --task_name tnews",
        "export predict m t.txt --pairs",
        f"{PREPARE} --layout jsonl --field x",
    ],
)
def test_what_has_its_effect_is_not_refused(line):
    parsed(line)


def test_a_launcher_says_how_many_processes_there_are(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="--nproc 2: has no effect where a launcher started the processes"):
        parsed(f"{TUNE} --nproc 2")


# What is left, and what is said at the end


def test_what_is_refused_leaves_nothing(tmp_path):
    (tmp_path / "kept").mkdir()
    for folder in (tmp_path / "a" / "b", tmp_path / "kept"):
        with pytest.raises(InputError), leaving_nothing(folder, ["index", "file"]):
            (folder / "index").mkdir(parents=True)
            (folder / "index" / "lines").write_text("")
            (folder / "file").write_text("")
            raise InputError("no")
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]
    with pytest.raises(InputError), leaving_nothing(tmp_path / "c", ["index"]):
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "of another").write_text("")
        raise InputError("no")
    assert (tmp_path / "c" / "of another").exists()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model, a corpus and data, where the user is."""
    model_folder(tmp_path / "model", positions=128)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("今天天气好\n三四五六\n" * 4, encoding="utf-8")
    (tmp_path / "data").mkdir()
    for split in ("train", "dev"):
        rows = "".join(f'{{"text": "一二三{label}", "label": "{label}"}}\n' for label in "甲乙丙" * 4)
        (tmp_path / "data" / f"{split}.json").write_text(rows, encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = (
    "--device cpu --num_layers 1 --hidden_size 16 --num_attention_heads 2 --intermediate_size 16 --batch_size 2 "
    "--num_relation_heads 2 --teacher_layer_index 1 --student_layer_index 0 --max_seq_length 16 --max_steps 1"
)
DATA = "--task_name classification --data_dir data --device cpu"


@pytest.mark.parametrize(
    "line, says",
    [
        (f"general_distill --input_dir corpus --output_dir out/x {SMALL} --teacher_model_name_or_path none", "none"),
        (f"general_distill --input_dir corpus --output_dir out/x {SMALL} --num_relation_heads 3 "
         "--teacher_model_name_or_path model", "num_relation_heads"),
        (f"general_distill --input_dir corpus --output_dir out/x {SMALL} --eval_dir gone "
         "--teacher_model_name_or_path model", "gone"),
        (f"general_distill --input_dir corpus --output_dir out/x {SMALL} --pretrain.num_attention_heads 7", "divide"),
        (f"general_distill --input_dir corpus --output_dir out/x {SMALL} --max_seq_length 200 --dry_run "
         "--teacher_model_name_or_path model", "positions"),
        (f"finetuning {DATA} --model_name_or_path none --output_dir out/x", "none"),
        (f"finetuning {DATA} --model_name_or_path model --output_dir out/x --max_seq_length 200", "positions"),
        (f"finetuning {DATA} --model_name_or_path model --output_dir out/x --label_column l", "l"),
        (f"finetuning {DATA} --model_name_or_path model --output_dir out/x --save_steps 0", "save_steps"),
        ("finetuning.search --tasks tnews --data_dir gone --model_name_or_path model --output_dir out/x --device cpu",
         "gone"),
        (f"finetuning.search {DATA.replace('task_name', 'tasks')} --model_name_or_path model --output_dir out/x "
         "--storage nodb://x", "storage"),
        ("finetuning.download --tasks tnew --data_dir out/x", "tnew"),
        ("finetuning.download --tasks tnews --data_dir out/x --mirror http://127.0.0.1:9/none", "127.0.0.1"),
        ("text.prepare --input corpus --output out/x --vocab none", "none"),
        ("text.prepare --input gone --output out/x --vocab model", "gone"),
        ("text.prepare --input bad.txt --output out/x --vocab model --processes 1", "UTF-8"),
        ("text.prepare --input corpus --output out/x --vocab model --processes 1 --min_characters 9", "nothing is"),
        ("export onnx none out/x/m.onnx", "none"),
        ("export onnx model out/x/m.onnx --max_seq_length 2000", "2000"),
        ("export quantize none.onnx out/x/m.onnx", "none"),
        ("export predict none.onnx bad.txt out/x/a.jsonl", "none"),
        ("export serve none.onnx", "none"),
        ("export triton none.onnx out/x", "none"),
        ("export benchmark none out/x", "none"),
    ],
)  # fmt: skip
def test_a_refused_run_leaves_nothing(place, capsys, monkeypatch, line, says):
    monkeypatch.setattr(finetuning.download, "RETRIES", 0)
    before = sorted(place.rglob("*"))
    assert says in fails(capsys, line.split())
    assert sorted(place.rglob("*")) == before


def test_each_command_ends_with_the_next(place, capsys):
    """From fine-tuning to serving by what is printed, in folders that need quotes."""
    output = "我的 model"
    words = [*DATA.split(), "--model_name_or_path", "model", "--max_steps", "1", "--batch_size", "4", "--output_dir"]
    assert finetuning.__main__.main([*words, output]) == 0
    said = following(capsys)
    assert said == [["export", "onnx", output]]
    assert export.__main__.main(said[0][1:]) == 0
    said = following(capsys)
    assert said == [["export", name, f"{output}/model.onnx"] for name in ("quantize", "serve")]
    assert export.__main__.main(said[0][1:]) == 0
    assert following(capsys) == [["export", "serve", f"{output}/model-int8.onnx"]]
    Path("texts.txt").write_text("一二三\n", encoding="utf-8")
    assert export.__main__.main(["predict", f"{output}/model-int8.onnx", "texts.txt"]) == 0
    assert following(capsys) == [["export", "serve", f"{output}/model-int8.onnx"]]
    preparing = "--input corpus --output prepared --vocab model --processes 1 --min_characters 1"
    assert text.prepare.__main__.main(preparing.split()) == 0
    assert following(capsys) == [["general_distill", "--help"]]  # no recipe is for so small a teacher
    config = json.loads(Path("model/config.json").read_text())
    for layers, recipe in ((12, "minilmv2_6l384h"), (24, "ppminilm_6l768h")):
        Path("model/config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        assert text.prepare.__main__.main(preparing.split()) == 0
        [next_words] = following(capsys)
        assert next_words[:3] == ["general_distill", "--config", recipe]
        assert general_distill.arguments.parse(next_words[1:]).input_dir == "prepared"


def following(capsys):
    """The commands that were told, without the Python that runs them."""
    lines = [shlex.split(line) for line in capsys.readouterr().err.splitlines() if line.startswith("    ")]
    assert lines and all(shutil.which(line[0]) and line[1] == "-m" for line in lines)
    return [line[2:] for line in lines]


def test_a_command_works_where_modules_have_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commandline.command("export onnx", "a b").endswith(" -m export onnx 'a b'")
    Path("export").mkdir()
    assert commandline.command("export onnx", "a b").endswith(" -m minilm_duet export onnx 'a b'")


def test_tensorboard_reads_the_events(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = {"learning_rate": 0.1, "sequences_per_second": 1.0, "truncated_lines": 0}
    with RunLog(tmp_path, "distil", 0, 2) as log:
        for step in (1, 2):
            log.record({"step": step, "loss": 0.5 / step, **metrics})
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("distil/loss")] == [(1, 0.5), (2, 0.25)]


# Folders


CLASHES = ["training", "text", "export", "backends", "bench", "general_distill", "finetuning", "objectives"]


def clash(folder, names):
    """Modules of the user's own."""
    folder.mkdir()
    for name in names:
        (folder / f"{name}.py").write_text(f"raise SystemExit('the user's {name}')\n")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("今天天气好\n三四五六\n" * 40, encoding="utf-8")
    model_folder(folder / "model")


def run(words, folder, path=ROOT):
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env={"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "HOME": "/"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("start", [["-m", "minilm_duet"], [str(ROOT / "minilm_duet.py")]], ids=["module", "script"])
def test_modules_of_the_user_take_nobodys_place(tmp_path, start):
    folder = tmp_path / "user"
    clash(folder, [*CLASHES, "random", "queue", "yaml", "torch", "numpy"])
    done = run(
        [
            *start,
            *[
                "text.prepare",
                "--input",
                "corpus",
                "--output",
                "prepared",
                "--vocab",
                "model",
                "--processes",
                "2",
                "--unit_mb",
                "0.0005",
            ],
        ],
        folder,
    )
    assert (done.returncode, "shards; " in done.stderr) == (0, True), done.stderr


@pytest.mark.slow
def test_programs_of_other_names_run_where_the_user_has_a_training(tmp_path):
    """In several processes, too."""
    folder = tmp_path / "user"
    clash(folder, ["training", "text", "export", "backends", "random"])
    words = (
        f"-m general_distill --input_dir corpus --output_dir out --teacher_model_name_or_path model {SMALL} --nproc 2"
    )
    done = run([*words.split(), "--backend", "torch"], folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "model.safetensors").exists()
    assert "-m finetuning --recipe tnews --model_name_or_path out" in done.stderr


def test_recipes_find_what_they_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", str(ROOT / "general_distill" / "recipes" / "demo.yaml")):
        found = general_distill.arguments.parse(["--config", name, "--output_dir", "o"])
        assert len(list(Path(found.input_dir).glob("*.txt"))) == 5
        assert (
            general_distill.arguments.parse(["--config", name, "--input_dir", "i", "--output_dir", "o"]).input_dir
            == "i"
        )
    own = tmp_path / "recipes" / "own.yaml"
    own.parent.mkdir()
    own.write_text(yaml.safe_dump({"input_dir": "text", "output_dir": "o"}))
    assert general_distill.arguments.parse(["--config", str(own)]).input_dir == "text"


@pytest.mark.slow
def test_installed_from_a_wheel(tmp_path):
    """Everything that is read beside the code is in the wheel."""
    source = tmp_path / "source"
    names = [
        path.name for path in ROOT.iterdir() if path.name.startswith(".") or path.name in ("output", "tests", "docs")
    ]
    shutil.copytree(ROOT, source, ignore=lambda folder, _: names if Path(folder) == ROOT else ["__pycache__"])
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    made = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)]
    subprocess.run(made, check=True)
    target = tmp_path / "target"
    [wheel] = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    shutil.rmtree(source)
    (folder := tmp_path / "empty").mkdir()
    words = f"-m general_distill --config demo --output_dir out --backend torch --pretrain.max_steps 1 {SMALL}"
    done = run(words.split(), folder, target)
    assert done.returncode == 0, done.stderr
    assert f"{target}/general_distill/demo: 5 files, 1009 lines" in done.stderr
    done = run(["-m", "export", "onnx", "out/teacher", "m.onnx", "--backend", "torch"], folder, target)
    assert done.returncode == 0, done.stderr
    done = run(
        ["-m", "finetuning", "--recipe", "tnews", "--model_name_or_path", "none", "--device", "cpu"], folder, target
    )
    assert "none" in done.stderr.splitlines()[-1]
    done = subprocess.run([target / "bin" / "minilm-duet", "--version"], capture_output=True, text=True,
                          env={"PYTHONPATH": str(target)})  # fmt: skip
    assert done.stdout == f"MiniLM Duet {minilm_duet.VERSION}\n"


# Scripts


@pytest.fixture
def script(tmp_path):
    """Runs a script with a Python that says what it is asked; returns the exit code, and what it is asked."""
    python = tmp_path / "my venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase $1$2 in *minilm_duet.py*) printf "%s\\n" "$PWD" "$@" ;; esac\n')
    python.chmod(0o755)
    (folder := tmp_path / "where the user is").mkdir()

    def call(name, *words, **environment):
        done = subprocess.run(
            ["sh", ROOT / name, *words],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "VENV": "../my venv", **environment},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    call.folder = folder
    return call


def test_run_sh_is_where_the_user_is(script):
    code, (place, program, *words), _ = script("run.sh")
    assert (code, place, program) == (0, str(script.folder), f"{ROOT}/minilm_duet.py")
    default = ["general_distill", "--backend", "torch", "--config", "demo", "--output_dir", "output/demo-torch"]
    assert words == [*default, "--resume"]
    given = ["--input_dir", "corpus", "--output_dir", "my out"]
    assert script("run.sh", *given)[1][2:] == ["general_distill", "--backend", "torch", *given]
    assert script("run.sh", "--max_steps", "20")[1][2:] == [*default, "--resume", "--max_steps", "20"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_run_sh_distils_the_demo(tmp_path, name):
    """In this environment, as if the script had made it; fewer updates than the recipe's."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    installed = subprocess.check_output("cat pyproject.toml constraints.txt | cksum", shell=True, cwd=ROOT)
    for extra in (name, f"{name}-gpu"):
        (tmp_path / "venv" / f".installed-{extra}").write_bytes(installed)

    def run(*words):
        command = ["sh", ROOT / "run.sh", "--device", "cpu", "--logging_steps", "10", *words]
        settings = environment(VENV="venv", BACKEND=name)
        return subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)

    steps = ["--pretrain.max_steps", "40", "--max_steps", "60"]
    done = run(*steps)
    assert done.returncode == 0, done.stderr[-3000:]
    output = tmp_path / "output" / f"demo-{name}"
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 6 and losses[-1] < losses[0] / 2
    shape = Shape.of(json.loads((output / "config.json").read_text()))
    assert (len(shape.layers), shape.vocabulary) == (2, len((output / "vocab.txt").read_text().split()))
    assert (output / "model.safetensors").exists() and (output / "teacher" / "model.safetensors").exists()
    assert "is finished, nothing is left to do" in run(*steps).stderr


@pytest.mark.parametrize(
    "words", [["--overwrite"], ["--overwrite", "true"], ["--resume", "false"], ["--overwrite=true"]]
)
def test_run_sh_leaves_the_last_word_to_the_user(script, words):
    _, (_, _, *told), _ = script("run.sh", *words)
    assert told[-len(words) :] == words
    assert "--resume" not in told[: -len(words)]


def test_a_finished_demo_is_not_another_run(place, capsys):
    line = f"--input_dir corpus --output_dir out --backend torch --teacher_model_name_or_path model {SMALL}".split()
    main = general_distill.__main__.main
    assert main(line) == 0
    made = (place / "out" / "model.safetensors").stat().st_mtime_ns
    assert main([*line, "--resume"]) == 0
    assert "out is finished, nothing is left to do; --overwrite in place of --resume" in capsys.readouterr().err
    refused = fails(capsys, ["general_distill", *line, "--resume", "--max_steps", "2"])
    assert "max_steps was 1, now 2" in refused
    assert (place / "out" / "model.safetensors").stat().st_mtime_ns == made
    assert main([*line, "--overwrite"]) == 0
    assert (place / "out" / "model.safetensors").stat().st_mtime_ns > made


def test_run_clue_names_the_model(script):
    (script.folder / "students" / "六层").mkdir(parents=True)
    words = ["tnews", "5e-5", "32", "6", "128", "cpu"]
    for model, name in [
        ("students/六层", "六层"),
        ("students/六层/", "六层"),
        ("hfl/rbt3", "rbt3"),
        (".", script.folder.name),
    ]:
        _, told, _ = script("finetuning/run_clue.sh", *words, model)
        output = f"output/finetuning/{name}/tnews/5e-5-32-torch"
        assert told[told.index("--output_dir") + 1] == output
        assert told[told.index("--model_name_or_path") + 1] == model
    assert "CUDA" not in script("finetuning/run_clue.sh", *words, "m", "--data_dir", "a b")[2]
    for count in (1, 2, 30):  # however many options follow
        code, told, _ = script("finetuning/run_clue.sh", *words, "m", *["--data_dir", "a b"] * count)
        assert code == 0 and told[-2:] == ["--data_dir", "a b"]


@pytest.mark.parametrize("name", ["run.sh", "tests/run.sh", "finetuning/run_clue.sh", "finetuning/run_all_search.sh"])
def test_scripts_answer_what_they_are(script, name):
    assert script(name, "--version")[:2] == (0, [f"MiniLM Duet {minilm_duet.VERSION}"])
    for option in ("-h", "--help"):
        code, told, _ = script(name, option)
        assert code == 0 and f"  sh {name}" in "\n".join(told)
        assert (option in told) == (name == "run.sh")  # whose program has more to say


def test_scripts_refuse(script):
    for name in ("pytorch", "paddlepaddle", "torch,test"):
        code, _, said = script("run.sh", BACKEND=name)
        assert (code, said) == (2, f"error: BACKEND={name}: must be torch or paddle\n")
    assert script("finetuning/run_clue.sh", "tnews")[0] == 2
    assert script("finetuning/run_all_search.sh")[0] == 2
    assert script("finetuning/run_all_search.sh", "--data_dir", "x")[0] == 2
