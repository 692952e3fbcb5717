"""The examples, run at a small size."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, environment
from test_finetuning import BOTH, metrics, model, run, small_data  # noqa: F401, model and small_data are fixtures
from two_processes import launcher

from backends.pretrained import read_safetensors, read_weights
from training import checkpoint


@pytest.fixture(scope="module", autouse=True)
def here():
    """Examples are programs; they can be imported from here."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, small_data, model):  # noqa: F811
    """A model that was fine-tuned on the small classification task, whose two classes are equally frequent."""
    output = tmp_path_factory.mktemp("teacher") / "out"
    run(
        backend="torch", task_name="classification", data_dir=small_data, model_name_or_path=model, output_dir=output,
        max_steps=80, save_steps=40,
    )  # fmt: skip
    return output


@BOTH
def test_bert_to_bigru(tmp_path, monkeypatch, small_data, teacher, name):  # noqa: F811
    """It learns; killed half way and started again, it comes to the same bits."""
    import bert_to_bigru

    from training.loop import TrainingArguments

    monkeypatch.setattr(
        bert_to_bigru, "TrainingArguments", lambda **own: TrainingArguments(**own, logging_steps=20, save_steps=40)
    )
    data, whole, parts = str(small_data / "classification"), tmp_path / "whole", tmp_path / "parts"
    options = [str(teacher), data, "--backend", name, "--width", "32", "--steps", "80", "--learning_rate", "1e-2"]
    accuracy = bert_to_bigru.main([*options[:2], str(whole), *options[2:]])
    assert accuracy > 0.8
    records = metrics(whole)
    for part in ("loss", "logits/kl", "states/mse/3-1"):
        assert records[-1][part] < 0.5 * records[0][part], part

    def killed(*arguments):
        if checkpoint.checkpoints(parts):
            raise KeyboardInterrupt
        return saved(*arguments)

    saved = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        bert_to_bigru.main([*options[:2], str(parts), *options[2:]])
    assert [path.name for path in checkpoint.checkpoints(parts)] == ["checkpoint-40"]
    monkeypatch.setattr(checkpoint, "save", saved)
    assert bert_to_bigru.main([*options[:2], str(parts), *options[2:]]) == accuracy
    for file in ("model.safetensors", "optimizer.safetensors"):
        expected, got = (read_safetensors(folder / "checkpoint-80" / file) for folder in (whole, parts))
        assert expected.keys() == got.keys() and any(key.startswith("projections.0.weight") for key in got)
        assert all(np.array_equal(got[key], array) for key, array in expected.items()), file


@BOTH
def test_distilbert_student(small_data, teacher, name):  # noqa: F811
    import distilbert_student

    options = [
        str(teacher),
        str(small_data / "classification"),
        "--backend",
        name,
        "--width",
        "32",
        "--steps",
        "100",
        "--learning_rate",
        "3e-3",
    ]
    assert distilbert_student.main(options) > 0.8


def test_own_loop_torch(tmp_path, teacher):
    """The losses fall, and the folder is of a model half as large, without the projection."""
    import own_loop_torch

    texts = [line for line in (ROOT / "general_distill" / "demo" / "news.txt").read_text("utf-8").splitlines() if line]
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(texts), encoding="utf-8")
    losses = own_loop_torch.main([str(teacher), str(lines), str(tmp_path / "student"), "--steps", "40"])
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    weights = read_weights(tmp_path / "student")
    assert weights["encoder.layer.0.intermediate.dense.weight"].shape == (TINY["intermediate_size"] // 2, 16)
    assert not any("projections" in key for key in weights)


@pytest.mark.slow
@BOTH
def test_two_processes_teach_a_bigru_as_one_does(tmp_path, small_data, teacher, name):  # noqa: F811
    """Under the framework's launcher, up to rounding, where nothing is dropped."""
    import bert_to_bigru

    words = [str(teacher), str(small_data / "classification")]
    more = ["--backend", name, "--width", "32", "--dropout", "0", "--steps", "10"]
    bert_to_bigru.main([*words, str(tmp_path / "one"), *more])
    program = str(ROOT / "examples" / "bert_to_bigru.py")
    command = [sys.executable, "-m", *launcher(name, tmp_path / "logs"), program, *words, str(tmp_path / "two"), *more]
    done = subprocess.run(command, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    one, two = (read_safetensors(tmp_path / side / "checkpoint-10" / "model.safetensors") for side in ("one", "two"))
    assert one.keys() == two.keys()
    for key, array in one.items():
        np.testing.assert_allclose(two[key], array, atol=1e-4, err_msg=key)
