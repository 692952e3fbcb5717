"""The earth mover's distance between the layers of two models (BERT-EMD, Li et al., 2020, arXiv:2010.06133)."""

from __future__ import annotations

import numpy as np


def cheapest_flow(distances: np.ndarray) -> np.ndarray:
    """How much each layer of a teacher gives to each layer of a student so that amount times distance is least in all.

    All layers of a model weigh the same: each of the teacher's N gives 1 / N, each of the student's M takes 1 / M.

    Args:
        distances: [N, M]; if one is not finite, all pairs of layers get the same.

    Returns:
        float64 [N, M], with at most N + M - 1 entries other than 0.
    """
    from scipy.optimize import linprog  # half a second, which other runs need not wait for

    count_t, count_s = distances.shape
    if not np.isfinite(distances).all():
        return np.full(distances.shape, 1.0 / distances.size)
    given = np.kron(np.eye(count_t), np.ones(count_s))
    taken = np.kron(np.ones(count_t), np.eye(count_s))
    amounts = np.repeat([1.0 / count_t, 1.0 / count_s], [count_t, count_s])
    # What the last layer takes follows from the others; numbers of order 1 keep the solver's tolerances away.
    scaled = distances.reshape(-1) / max(float(np.abs(distances).max()), 1e-300)
    solved = linprog(scaled, A_eq=np.concatenate([given, taken])[:-1], b_eq=amounts[:-1], method="highs-ds")
    return np.where(solved.x > 1e-9, solved.x, 0.0).reshape(distances.shape)
