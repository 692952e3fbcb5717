"""Two processes with half a batch each against one with the whole."""

import subprocess
import sys

import numpy as np
import oracle
import pytest
import reaching
import two_processes
from conftest import environment

from backends.files import InputError
from backends.pretrained import read_safetensors
from objectives.relations import DEFAULT_PAIRS, RelationLoss


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_samples_are_related_across_processes(tmp_path, name, layout):
    """The mean of both processes' gradients is the whole batch's, as is the relation's value."""
    _launch(tmp_path, name, two_processes.__file__, name, str(tmp_path), layout)
    found = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]

    whole, mask = _whole()
    beta = two_processes.LOSS["beta"]
    heads = two_processes.HEADS[layout]
    arguments = heads, 0.0, 1.0, "masked", DEFAULT_PAIRS
    _, parts, sample_gradients = oracle.relation_loss(*whole, mask, *arguments)
    for key, part in parts.items():
        if key.startswith("sample"):
            assert found[0][key] == pytest.approx(part, rel=1e-5)
            assert found[1][key] == pytest.approx(part, rel=1e-5)
    # Token to token, the whole batch's mean over samples is the mean of two equally large halves'.
    _, _, token_gradients = oracle.relation_loss(
        *whole, mask, two_processes.HEADS[layout], 0.0, 0.0, "masked", DEFAULT_PAIRS
    )
    for i in range(3):
        wanted = beta * sample_gradients[i] + (1 - beta) * token_gradients[i]
        start = 0
        for rank, lengths in enumerate(two_processes.LENGTHS):
            got = found[rank][f"gradient {i}"] / 2
            rows = wanted[start : start + len(lengths), : max(lengths)]
            if layout == "packed":
                rows = rows[mask[start : start + len(lengths), : max(lengths)]]
            np.testing.assert_allclose(got, rows, rtol=1e-4, atol=1e-8)
            start += len(lengths)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "paddle"])
def test_losses_may_reach_other_weights_as_they_go(tmp_path, name, request):
    """Micro-batches whose losses reach different weights, against one process with both batches."""
    _launch(tmp_path, name, reaching.__file__, name, str(tmp_path))
    expected = reaching.train(request.getfixturevalue(f"{name}_backend"), [0, 1])
    for rank in range(2):
        for key, array in read_safetensors(tmp_path / f"{rank}.safetensors").items():
            np.testing.assert_allclose(array, expected[key], atol=1e-4, err_msg=key)
            moved = not np.array_equal(array, reaching.initial(key, array.shape))
            assert moved == (not key.startswith("pooler")), key


def _launch(folder, name, *script):
    command = [sys.executable, "-m", *two_processes.launcher(name, folder / "logs")]
    settings = environment(OMP_NUM_THREADS="1")
    done = subprocess.run([*command, *script], env=settings, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def _whole():
    halves = [two_processes.batch(rank) for rank in range(2)]
    longest = max(half[2].shape[1] for half in halves)

    def join(arrays):
        return np.concatenate(
            [np.pad(x, ((0, 0), (0, longest - x.shape[1])) + ((0, 0),) * (x.ndim - 2)) for x in arrays]
        )

    sides = [[join(arrays) for arrays in zip(*(half[side] for half in halves))] for side in range(2)]
    return sides, join([half[2] for half in halves])


def test_gathering_needs_masked_padding():
    with pytest.raises(InputError, match="gather_samples with padding 'ppminilm'"):
        RelationLoss(4, beta=1.0, padding="ppminilm", gather_samples=True)
