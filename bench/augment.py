"""``python -m bench augment``: candidates of words, asked for together and, as TinyBERT's code does, one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

import backends
from bench.report import DATA, machine, save
from finetuning.augment import Candidates, Question
from programs.worker import Worker, WorkerFailed
from text.augmentation import Replaceable
from text.data import read_split
from text.folder import ModelFolder
from text.tasks import find_task
from text.tokenizer import WordPiece
from training.report import markdown

ALONE = "one word at a time"
BASE = {
    "model_type": "bert",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
"""A model of BERT-base's shape, whose speed means something and whose candidates do not."""
CANDIDATES, LENGTH, BATCH = 15, 128, 64
"""The program's own defaults."""
SEVERAL = 4
"""Words of a text that a question of the last contender hides."""


def augment(
    task: str = "tnews",
    model_name_or_path: str | None = None,
    texts: int = 96,
    rounds: int = 3,
    frameworks: list[Literal["torch", "paddle"]] = ["torch", "paddle"],  # noqa: B006
    device: Literal["cpu", "gpu"] = "cpu",
    data_dir: str | None = None,
    output_dir: str = "output/bench",
) -> None:
    """Measures how many words a masked language model finds candidates for in a second.

    Asked one by one, the model runs as its library runs it, a question a batch, with logits of the whole question; ours
    asks in batches of tokens alone, in single precision and in the lowest that the device gains from, in that also for
    several words a question. They take turns on the same texts. Prints a table and saves it, with a plot and the raw
    figures, in output_dir.

    Args:
        task: the task whose first training texts are asked about.
        model_name_or_path: folder of a masked language model; without, one of 12x768 with random weights.
        texts: how many texts.
        rounds: turns of each; medians are told.
        frameworks: torch, paddle or both.
        device: cpu, or gpu.
        data_dir: folder with the task's files; without, the project's data folder.
        output_dir: where the table, the plot and the figures go.
    """
    examples = read_split(find_task(task), Path(data_dir) if data_dir else DATA / "clue", "train").examples
    asked = [example.text for example in examples[:texts]]
    records: list[dict[str, Any]] = []
    for framework in frameworks:
        with closing(Worker(framework, Askers, framework, device, model_name_or_path, asked)) as worker:
            try:
                for name in worker.call("names") * rounds:
                    records.append({"framework": framework, "name": name, **worker.call("ask", name)})
            except WorkerFailed as failure:
                raise SystemExit(str(failure)) from None
    results = {
        "machine": machine(device),
        "model": model_name_or_path or "12x768, random weights",
        "task": task,
        "texts": len(asked),
        "rounds": rounds,
        "contenders": [
            _summary([record for record in records if (record["framework"], record["name"]) == key])
            for key in dict.fromkeys((record["framework"], record["name"]) for record in records)
        ],
    }
    table = _table(results)
    save(Path(output_dir), "augment", table, results, _plot)
    print(table)


@dataclass(frozen=True)
class OneByOne(Candidates):
    """What the model's library answers, a word at a time."""

    def ask(self, questions: Sequence[Question]) -> list[list[str]]:
        module: Any = self.model.module  # type: ignore[attr-defined]
        answers = []
        for question in questions:
            types = (np.arange(len(question.ids)) >= question.second).astype(np.int64)
            inputs = {"input_ids": question.ids, "token_type_ids": types}
            with self.backend.no_grad():
                said = module(**{name: self.backend.tensor(array[None]) for name, array in inputs.items()})
                scores = getattr(said, "logits", said)[0, question.places[0]] + self.words_only
                best = self.backend.numpy(scores.topk(self.count)[1])
            answers.append([self.tokenizer.tokens[token] for token in np.sort(best)])
        return answers


class Askers:
    """A framework's contenders, on one model."""

    def __init__(self, framework: str, device: str, model: str | None, texts: list[str]) -> None:
        self.texts = texts
        self.contenders: dict[str, Candidates] = {}
        if model is None:
            tokenizer = WordPiece.from_file(DATA / "vocab" / "vocab.txt")
            config, weights = {**BASE, "vocab_size": len(tokenizer)}, None
        else:
            folder = ModelFolder.find(model, "model_name_or_path")
            tokenizer, config, weights = folder.tokenizer, dict(folder.config), folder.weights()
        for precision in ("float32", "auto"):
            backend = backends.load(framework, device, precision)
            name = f"ours, {backend.precision}"
            if name in self.contenders:
                continue
            made = backend.model(config, weights, "masked_lm", trainable=False)
            weights = weights or made.weights()
            parts = backend, made, tokenizer, None, CANDIDATES, LENGTH, 1, BATCH
            if precision == "float32":
                self.contenders[ALONE] = OneByOne(*parts)
            self.contenders[name] = Candidates(*parts)
        self.contenders[f"{name}, {SEVERAL} words a question"] = replace(
            self.contenders[name], words_a_question=SEVERAL
        )
        self.found: dict[str, list[Replaceable]] = {}
        """What the first contender found, one by one."""

    def names(self) -> list[str]:
        return [*self.contenders]

    def ask(self, name: str) -> dict[str, Any]:
        """Returns the seconds that a contender took, the words it found candidates of, and the share of these that are
        found one by one too."""
        find = self.contenders[name].of
        find(self.texts[:2])
        start = time.perf_counter()
        found = find(self.texts)
        seconds = time.perf_counter() - start
        self.found = self.found or found
        agreeing = [
            len({*ours.candidates} & {*theirs.candidates}) / len(theirs.candidates)
            for text in found
            for ours, theirs in zip(found[text], self.found[text])
        ]
        return {"seconds": seconds, "words": sum(map(len, found.values())), "agreement": statistics.mean(agreeing)}


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "title": f"{records[0]['name']}, {records[0]['framework']}",
        "framework": records[0]["framework"],
        "words": records[0]["words"],
        "words_per_second": statistics.median(record["words"] / record["seconds"] for record in records),
        "agreement": records[0]["agreement"],
        "seconds": [record["seconds"] for record in records],
    }


def _table(results: dict[str, Any]) -> str:
    alone = {c["framework"]: c["words_per_second"] for c in results["contenders"] if c["title"].startswith(ALONE)}
    rows = [
        [
            contender["title"],
            f"{contender['words_per_second']:.1f}",
            f"{contender['words_per_second'] / alone[contender['framework']]:.1f}x",
            f"{contender['agreement']:.2%}",
            ", ".join(f"{seconds:.1f}" for seconds in contender["seconds"]),
        ]
        for contender in results["contenders"]
    ]
    return "\n\n".join(
        [
            f"{results['model']}; {results['contenders'][0]['words']} words of {results['texts']} texts of "
            f"{results['task']}, medians of {results['rounds']} rounds; {results['machine']}",
            markdown(["", "words/s", "of one at a time", "the same candidates", "seconds"], rows),
        ]
    )


def _plot(axes: Axes, results: dict[str, Any]) -> None:
    """A bar a contender: words a second."""
    contenders = results["contenders"][::-1]
    axes.barh([contender["title"] for contender in contenders], [c["words_per_second"] for c in contenders])
    axes.set_xlabel("words/s")
    axes.set_title(f"{results['model']}: {results['machine']}", fontsize=9)
