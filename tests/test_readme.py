"""What the README shows, run as it stands."""

import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, TINY

from backends.pretrained import write_model
from text.corpus import Corpus
from text.tasks import TASKS
from text.tokenizer import WordPiece


@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_library_use(tmp_path, monkeypatch, torch_backend, name):
    folder = tmp_path / "output" / "demo-torch" / "teacher"
    folder.mkdir(parents=True)
    corpus = Corpus(ROOT / "general_distill" / "demo", tmp_path / "index")
    tokenizer = WordPiece.trained(corpus, 3000)
    tokenizer.save(folder, 64)
    config = {**TINY, "num_hidden_layers": 4, "hidden_size": 64, "vocab_size": len(tokenizer)}
    write_model(folder, config, torch_backend.model(config).weights())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert 'backends.load("torch")' in code
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code.replace('backends.load("torch")', f'backends.load("{name}", "cpu")'), scope)
    assert scope["backend"].name == name
    assert scope["loss"].item() > 0
    assert set(scope["parts"]) == {f"{r}/{p}" for r in ("token", "sample") for p in ("q-q", "k-k", "v-v")}
    gradients = {key: p.grad for key, p in scope["student"].named_parameters()}
    moved = gradients["encoder.layer.0.output.dense.weight"]
    assert np.abs(scope["backend"].numpy(moved)).max() > 0
    assert gradients["encoder.layer.1.output.dense.weight"] is None


def test_recipes_in_the_readme_are_the_ones_there_are():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    there = {path.stem for path in (ROOT / "general_distill" / "recipes").glob("*.yaml")}
    table = re.search(r"\| recipe \|.*?\n\n", readme, re.DOTALL).group()
    assert set(re.findall(r"`(\w+)`", table)) == there


def test_tasks_in_the_readme_are_the_ones_there_are():
    readme = (ROOT / "finetuning" / "README.md").read_text(encoding="utf-8")
    table = re.search(r"\| kind \|.*?\n\n", readme, re.DOTALL).group()
    assert set(re.findall(r"`(\w+)`", table)) == TASKS.keys()


SCRIPTS = ["run.sh", "tests/run.sh", "setup.sh", ".ci/run", "finetuning/run_clue.sh", "finetuning/run_all_search.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_plain_sh(script):
    import subprocess

    shell = shutil.which("dash") or "sh"
    subprocess.run([shell, "-n", ROOT / script], check=True)
