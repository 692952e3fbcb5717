"""Models as transformers itself makes and runs them, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers

from backends.interface import ONNX_INPUTS, ONNX_OUTPUTS, Batch, Head, Weights
from backends.pretrained import CLASS_SUFFIXES

if TYPE_CHECKING:
    from backends.torch.core import TorchBackend

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "ernie": "Ernie"}
"""``model_type`` -> how transformers begins the names of its own classes for it."""


def reference(
    backend: TorchBackend, folder: Path, model_type: str, weights: Weights, head: Head | None
) -> Callable[[Batch], list[np.ndarray]]:
    """`backends.interface.Backend.reference`."""
    family = FAMILIES[model_type]
    options = {"local_files_only": True, "trust_remote_code": False, "attn_implementation": "eager"}
    options["chunk_size_feed_forward"] = 0  # which is the same, but refuses most lengths
    config = getattr(transformers, f"{family}Config").from_pretrained(folder, **options)
    module = getattr(transformers, family + CLASS_SUFFIXES[head])(config)
    # Its own reading of weights would follow whatever else the folder names, an adapter's base say.
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if (array := weights.get(name.removeprefix(f"{module.base_model_prefix}."))) is not None:
                tensor.copy_(torch.from_numpy(array))
    module.float().to(backend.device).eval()

    def run(batch: Batch) -> list[np.ndarray]:
        with torch.no_grad():
            outputs = module(**dict(zip(ONNX_INPUTS, map(backend.tensor, batch[:3]))), return_dict=True)
        return [backend.numpy(outputs[name]) for name in ONNX_OUTPUTS[head]]

    return run
