"""One of two processes with half a batch each; see test_processes.py.

torchrun --nproc_per_node 2 two_processes.py torch OUT
python -m paddle.distributed.launch --nproc_per_node 2 two_processes.py paddle OUT
"""

import sys
from pathlib import Path

import numpy as np

import backends
from backends.interface import QKV
from objectives.relations import RelationLoss

HEADS = {"packed": 4, "padded": 1}  # one head leaves a process without any
WIDTHS, LENGTHS = (24, 16), ([6, 2, 5], [3, 9, 1])
LOSS = {"alpha": 0.0, "beta": 0.4}


def launcher(name, logs):
    """The module that starts two processes, and its options: the port where they meet is a free one."""
    if name == "torch":
        return ["torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node", "2"]
    return ["paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(logs)]


def batch(rank):
    """Padded Q, K, V of teacher and student, and the mask, as this rank has them."""
    random = np.random.default_rng(rank)
    mask = np.arange(max(LENGTHS[rank])) < np.array(LENGTHS[rank])[:, None]
    return *([random.standard_normal((*mask.shape, w)).astype(np.float32) for _ in range(3)] for w in WIDTHS), mask


def main(name, out, layout):
    backend = backends.load(name, "cpu")
    assert backend.world_size == 2
    teacher, student, mask = batch(backend.rank)
    if layout == "packed":
        teacher, student = ([x[mask] for x in side] for side in (teacher, student))
    student = [backend.tensor(x) for x in student]
    for x in student:
        if name == "torch":
            x.requires_grad_()
        else:
            x.stop_gradient = False
    loss = RelationLoss(HEADS[layout], **LOSS, gather_samples=True)
    value, parts = loss(backend, QKV(*map(backend.tensor, teacher)), QKV(*student), mask)
    value.backward()
    np.savez(
        Path(out) / f"{backend.rank}.npz",
        **{key: backend.numpy(part) for key, part in parts.items()},
        **{f"gradient {i}": backend.numpy(x.grad) for i, x in enumerate(student)},
    )
    backend.barrier()  # neither leaves before the other is done


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
