"""One of two processes that train; see test_processes.py.

torchrun --nproc_per_node 2 reaching.py torch OUT
python -m paddle.distributed.launch --nproc_per_node 2 reaching.py paddle OUT
"""

import sys
from pathlib import Path

import numpy as np
from conftest import TINY, make_batch

import backends
from backends.interface import Wanted
from backends.pretrained import write_safetensors

LAYERS = [0, 2, 1, 3]
"""The hidden state that each micro-batch's loss is of: the second reaches weights that the first does not, the third
leaves them out again."""
MICRO_BATCHES = 2


def batch(number, rank):
    return make_batch([5, 3, 4], seed=2 * number + rank)


def compute(backend, model, number, ranks):
    """The loss of a micro-batch of some ranks."""
    losses = []
    for rank in ranks:
        state = model.run(batch(number, rank), Wanted(states=[LAYERS[number]])).states[LAYERS[number]]
        losses.append((state * state).mean())
    return sum(losses[1:], losses[0]) / len(losses), {f"layer {LAYERS[number]}": losses[0].detach()}


def initial(name, shape):
    return np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)


def train(backend, ranks):
    """Weights after two updates, of two micro-batches each."""
    backend.seed(0)
    model = backend.model(TINY)
    model.load_weights({name: initial(name, array.shape) for name, array in model.weights().items()})
    optimizer = backend.optimizer(model, weight_decay=0.1, adam_epsilon=1e-3, max_grad_norm=0, loss_scale=1)
    for number in range(len(LAYERS)):
        last = number % MICRO_BATCHES == MICRO_BATCHES - 1
        loss, _ = optimizer.forward(lambda: compute(backend, model, number, ranks), last)  # noqa: B023
        optimizer.backward(loss / MICRO_BATCHES)
        if last:
            optimizer.step(0.1)
    return model.weights()


if __name__ == "__main__":
    backend = backends.load(sys.argv[1], "cpu")
    write_safetensors(Path(sys.argv[2]) / f"{backend.rank}.safetensors", train(backend, [backend.rank]))
    backend.barrier()
