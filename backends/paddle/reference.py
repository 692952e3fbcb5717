"""Models as paddlenlp itself makes and runs them, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import paddle
import paddlenlp.transformers
from paddlenlp.transformers.ppminilm.configuration import PPMiniLMConfig
from paddlenlp.utils.log import logger

from backends.interface import ONNX_INPUTS, ONNX_OUTPUTS, Batch, Head, Weights
from backends.pretrained import CLASS_SUFFIXES, is_transposed, to_paddle_name

if TYPE_CHECKING:
    from backends.paddle.core import PaddleBackend

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "ernie": "Ernie", "ppminilm": "PPMiniLM"}
"""``model_type`` -> how paddlenlp begins the names of its own classes for it."""


def reference(
    backend: PaddleBackend, folder: Path, model_type: str, weights: Weights, head: Head | None
) -> Callable[[Batch], list[np.ndarray]]:
    """`backends.interface.Backend.reference`."""
    family, library = FAMILIES[model_type], paddlenlp.transformers
    module_class = getattr(library, family + CLASS_SUFFIXES[head])
    logger.set_level("ERROR")
    config_class = PPMiniLMConfig if family == "PPMiniLM" else getattr(library, f"{family}Config")
    module = module_class(config_class.from_pretrained(str(folder), dtype="float32", return_dict=False))
    prefix = f"{module.base_model_prefix}."
    # Its own reading of weights would unpickle whatever the folder's index names.
    arrays = {to_paddle_name(name): array.T if is_transposed(name, array) else array for name, array in weights.items()}
    for name, tensor in module.state_dict().items():
        if (array := arrays.get(name.removeprefix(prefix))) is not None:
            tensor.set_value(np.ascontiguousarray(array))
    for layer in module.sublayers():
        if isinstance(layer, paddle.nn.LayerNorm):
            layer._epsilon = module.config.layer_norm_eps  # which paddlenlp's ERNIE does not read
    module.eval()

    def run(batch: Batch) -> list[np.ndarray]:
        with paddle.no_grad():
            outputs = module(**dict(zip(ONNX_INPUTS, map(backend.tensor, batch[:3]))))
        outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
        # Behind them may be more that the configuration asks for, such as keys and values (``use_cache``).
        return [backend.numpy(output) for output in outputs[: len(ONNX_OUTPUTS[head])]]

    return run
