"""Triton's kernels against the float64 oracle, on a CPU by Triton's interpreter.

Triton decides on import whether it interprets: the tests run in a process of their own.
"""

import functools
import os
import subprocess
import sys

import numpy as np
import oracle
import pytest
from conftest import ROOT
from test_relations import PAIRS, captured, gradients

from objectives.relations import RelationLoss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_under_the_interpreter's process")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_under_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture
def fused(torch_backend, monkeypatch):
    from backends.torch.kernels import TritonRelationKernel

    monkeypatch.setattr(torch_backend, "relation_kernel", functools.partial(TritonRelationKernel, device="cpu"))
    return torch_backend


# Head sizes: PP-MiniLM's 16 and 12, MiniLMv2's 16 and 8, and others; lengths on both sides of a tile.
CASES = [
    ([5, 3, 1], 4, (16, 12), (0.0, 0.0), "masked", PAIRS[0]),
    ([70, 64, 2], 2, (16, 8), (0.0, 0.0), "masked", PAIRS[0]),
    ([6, 6, 2], 3, (5, 24), (0.2, 0.3), "masked", PAIRS[2]),
    ([4, 7, 1], 4, (16, 12), (0.2, 0.3), "ppminilm", PAIRS[0]),
    ([9, 5], 4, (16, 12), (0.0, 0.0), "ppminilm", PAIRS[2]),
    ([5] * 18, 2, (8, 8), (0.0, 1.0), "masked", PAIRS[0]),
    ([3, 2], 20, (12, 16), (1.0, 0.0), "masked", PAIRS[1]),
    ([0, 4], 2, (12, 16), (0.0, 0.0), "masked", PAIRS[0]),
]


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[2:5])))
@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0])
def test_kernel_against_oracle(fused, case, scale):
    lengths, heads, head_sizes, (alpha, beta), padding, pairs = case
    random = np.random.default_rng(0)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    teacher, student = (
        [(scale * random.standard_normal((*mask.shape, heads * size))).astype(np.float32) for _ in range(3)]
        for size in head_sizes
    )
    problem = teacher, student, mask, heads, alpha, beta, padding, pairs
    expected, parts, expected_gradients = oracle.relation_loss(*problem)
    side = captured(fused, student)
    loss, got = RelationLoss(heads, alpha, beta, padding, pairs)(fused, captured(fused, teacher), side, mask)
    assert fused.numpy(loss) == pytest.approx(expected, rel=1e-5, abs=1e-8)
    for key, part in got.items():
        assert fused.numpy(part) == pytest.approx(parts[key], rel=1e-5, abs=1e-8)
    for gradient, wanted in zip(gradients(fused, loss, list(side)), expected_gradients):
        assert np.linalg.norm(fused.numpy(gradient) - wanted) <= 1e-4 * np.linalg.norm(wanted) + 1e-9


@interpreted
def test_low_precision_input(fused):
    """As AMP gives it: tiles in low precision, sums and soft-max in float32. (In bfloat16 the
    interpreter multiplies bit patterns: that takes a GPU.)"""
    import torch

    random = np.random.default_rng(1)
    mask = np.arange(9) < np.array([[9], [4]])
    sides = [[random.standard_normal((2, 9, 4 * size)).astype(np.float32) for _ in range(3)] for size in (16, 12)]
    rounded = [[torch.from_numpy(x).half() for x in side] for side in sides]
    exact = [[x.double().numpy() for x in side] for side in rounded]
    expected, _, wanted = oracle.relation_loss(*exact, mask, 4, 0.2, 0.3, "masked", PAIRS[0])
    student = [x.requires_grad_() for x in rounded[1]]
    loss, _ = RelationLoss(4, 0.2, 0.3)(fused, _qkv(rounded[0]), _qkv(student), mask)
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    for gradient, oracles in zip(torch.autograd.grad(loss * 1024, student), wanted):
        assert gradient.dtype == student[0].dtype
        assert np.linalg.norm(gradient.double().numpy() / 1024 - oracles) <= 0.02 * np.linalg.norm(oracles)


def _qkv(tensors):
    from backends.interface import QKV

    return QKV(*tensors)
