"""What the README shows, run as it stands."""

import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, TINY, make_batch

from backends.pretrained import is_transposed, write_model
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


@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_the_objective_that_contributors_see(request, name):
    """Its value and gradient, by the hidden states and logits of one pass, against PyTorch's own arithmetic."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    scope = {}
    exec(code, scope)
    backend = request.getfixturevalue(f"{name}_backend")
    backend.seed(1)
    config = {**TINY, "num_labels": 3}
    teacher, student = (backend.model(config, head="sequence_classification") for _ in range(2))
    batch = make_batch([5, 3, 9])
    loss, parts = scope["StatesAndLogits"](backend, teacher, student)(batch, 0.0)
    loss.backward()
    expected, gradients = _states_and_logits(teacher.weights(), student.weights(), batch, config)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert sum(part.item() for part in parts.values()) == pytest.approx(expected, rel=1e-4)
    for key, parameter in student.named_parameters():
        if key in gradients:
            gradient = backend.numpy(parameter.grad)
            gradient = gradient.T if name == "paddle" and is_transposed(key, gradient) else gradient
            np.testing.assert_allclose(gradient, gradients[key], atol=1e-4 * max(1, np.abs(gradient).max()))


def _states_and_logits(teacher, student, batch, config):
    """By transformers' own forward pass and torch's differentiation, in float64."""
    import torch
    import transformers

    outputs = []
    for weights in (teacher, student):
        library = transformers.BertForSequenceClassification(
            transformers.BertConfig(**{**config, "model_type": "bert"})
        )
        named = {f"bert.{key}" if not key.startswith("classifier") else key: array for key, array in weights.items()}
        library.load_state_dict({key: torch.from_numpy(array) for key, array in named.items()}, strict=False)
        library.double().eval()
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        output = library(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        outputs.append((output.hidden_states[3][mask.bool()], output.logits))
    (states, logits), (own_states, own_logits) = outputs
    loss = (own_states - states.detach()).square().mean() + (own_logits - logits.detach()).square().mean()
    loss.backward()
    named = library.named_parameters()
    return loss.item(), {key.removeprefix("bert."): p.grad.numpy() for key, p in named if p.grad is not None}


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
