"""What PyTorch and transformers offer for answering texts, to be measured beside ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from backends.interface import ONNX_INPUTS, Batch, Precision, Wanted, Weights
from backends.torch.core import TorchBackend


def classifier(config: Mapping[str, Any], weights: Weights, precision: Precision) -> Callable[[Batch], np.ndarray]:
    """A classifier as it runs in the framework on a CPU, with the OMP_NUM_THREADS that it found when it was imported:
    a function from a padded batch to float32 logits [B, classes]."""
    backend = TorchBackend("cpu", precision)
    model = backend.model(config, weights, "sequence_classification", trainable=False)

    def logits(batch: Batch) -> np.ndarray:
        with backend.no_grad(), backend.autocast():
            return backend.numpy(model.run(batch, Wanted(logits=True)).logits)

    return logits


def python_tokenizer(folder: Path) -> Callable[[Sequence[str], Sequence[str] | None, int], Batch]:
    """The library's BertTokenizer, in Python, of a model folder: a function of texts, second texts
    and how many tokens are kept of a pair, to a batch padded to the longest."""
    tokenizer = transformers.BertTokenizer.from_pretrained(str(folder))

    def encode(texts: Sequence[str], pairs: Sequence[str] | None, max_seq_length: int) -> Batch:
        second = None if pairs is None else list(pairs)
        encoded = tokenizer(list(texts), second, truncation=True, max_length=max_seq_length, padding=True)
        return Batch(*(np.array(encoded[name], np.int64) for name in ONNX_INPUTS))

    return encode
