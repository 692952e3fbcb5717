"""The relation loss as Triton kernels: value and gradient without a relation matrix in memory.

For pairs X, Y of one side, S = X Y^T / sqrt(d) exists a tile at a time, in registers. One kernel
finds the normalisers of soft-max over both sides' rows (online, Milakov & Gimelshein, 2018,
arXiv:1805.02867), another walks the tiles again for the divergence and the gradient. A
program owns the rows it writes, so nothing is added twice, atomically, or in another order.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from backends.interface import Ragged


@triton.jit
def _vectors(base, rows, valid, width, head, D: tl.constexpr, PADDED: tl.constexpr):
    """Rows' vectors of a head, [len(rows), PADDED], zero beyond D and where not valid."""
    columns = tl.arange(0, PADDED)
    at = rows[:, None] * width + head * D + columns[None, :]
    return tl.load(base + at, mask=valid[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _scores(own, other, scale, PRECISION: tl.constexpr):
    return tl.dot(own, tl.trans(other), input_precision=PRECISION) * scale


@triton.jit
def _normaliser_kernel(
    t_x, t_y, s_x, s_y, rows, bias, block_group, block_first, starts, sizes, norm_t, norm_s,
    t_width, s_width, t_scale, s_scale, heads,
    T_D: tl.constexpr, S_D: tl.constexpr, T_PADDED: tl.constexpr, S_PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    group = tl.load(block_group + block)
    start, size = tl.load(starts + group), tl.load(sizes + group)
    own = tl.load(block_first + block) + tl.arange(0, BLOCK)
    own_valid = own < size
    own_rows = tl.load(rows + start + own, mask=own_valid, other=0)
    own_t = _vectors(t_x, own_rows, own_valid, t_width, head, T_D, T_PADDED)
    own_s = _vectors(s_x, own_rows, own_valid, s_width, head, S_D, S_PADDED)
    top_t = tl.full([BLOCK], float("-inf"), tl.float32)
    top_s = tl.full([BLOCK], float("-inf"), tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    sum_s = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        other = first + tl.arange(0, BLOCK)
        valid = other < size
        other_rows = tl.load(rows + start + other, mask=valid, other=0)
        t = _scores(own_t, _vectors(t_y, other_rows, valid, t_width, head, T_D, T_PADDED), t_scale, PRECISION)
        s = _scores(own_s, _vectors(s_y, other_rows, valid, s_width, head, S_D, S_PADDED), s_scale, PRECISION)
        if HAS_BIAS:
            keys = tl.load(bias + start + other, mask=valid, other=0.0)[None, :]
            t += keys
            s += keys
        t = tl.where(valid[None, :], t, float("-inf"))
        s = tl.where(valid[None, :], s, float("-inf"))
        new_t = tl.maximum(top_t, tl.max(t, 1))
        new_s = tl.maximum(top_s, tl.max(s, 1))
        sum_t = sum_t * tl.exp(top_t - new_t) + tl.sum(tl.exp(t - new_t[:, None]), 1)
        sum_s = sum_s * tl.exp(top_s - new_s) + tl.sum(tl.exp(s - new_s[:, None]), 1)
        top_t, top_s = new_t, new_s
    at = (start + own) * heads + head
    tl.store(norm_t + 2 * at, top_t, mask=own_valid)
    tl.store(norm_t + 2 * at + 1, tl.log(sum_t), mask=own_valid)
    tl.store(norm_s + 2 * at, top_s, mask=own_valid)
    tl.store(norm_s + 2 * at + 1, tl.log(sum_s), mask=own_valid)


@triton.jit
def _log_softmax(scores, norm, at, valid, ROWS: tl.constexpr):
    """From scores and the rows' normalisers, which lie along the first axis of scores or the second.
    The largest score is taken off first: their sum would round what is left."""
    top = tl.load(norm + 2 * at, mask=valid, other=0.0)
    rest = tl.load(norm + 2 * at + 1, mask=valid, other=0.0)
    if ROWS:
        return scores - top[:, None] - rest[:, None]
    return scores - top[None, :] - rest[None, :]


@triton.jit
def _difference(log_t, log_s):
    """p_s - p_t, and p_t; without cancellation where the two are close."""
    p_t = tl.exp(log_t)
    x = log_s - log_t
    near = 1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.008333334 + x * 0.0013888889))))
    return tl.where(tl.abs(x) < 0.3, p_t * x * near, tl.exp(log_s) - p_t), p_t


@triton.jit
def _gradient_kernel(
    t_own, t_other, s_own, s_other, rows, bias, block_group, block_first, starts, sizes, norm_t, norm_s,
    weights, gradient, values,
    t_width, s_width, t_scale, s_scale, heads, factor,
    T_D: tl.constexpr, S_D: tl.constexpr, T_PADDED: tl.constexpr, S_PADDED: tl.constexpr,
    OWN_ROWS: tl.constexpr, OTHER_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient in the vectors `s_own`, as rows of the relation matrix, as its columns, or as both."""
    block, head = tl.program_id(0), tl.program_id(1)
    group = tl.load(block_group + block)
    start, size = tl.load(starts + group), tl.load(sizes + group)
    own = tl.load(block_first + block) + tl.arange(0, BLOCK)
    own_valid = own < size
    own_rows = tl.load(rows + start + own, mask=own_valid, other=0)
    x_t = _vectors(t_own, own_rows, own_valid, t_width, head, T_D, T_PADDED)
    x_s = _vectors(s_own, own_rows, own_valid, s_width, head, S_D, S_PADDED)
    own_at = (start + own) * heads + head
    change = tl.zeros([BLOCK, S_PADDED], tl.float32)
    value = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        other = first + tl.arange(0, BLOCK)
        valid = other < size
        both = own_valid[:, None] & valid[None, :]
        other_rows = tl.load(rows + start + other, mask=valid, other=0)
        y_s = _vectors(s_other, other_rows, valid, s_width, head, S_D, S_PADDED)
        t = _scores(x_t, _vectors(t_other, other_rows, valid, t_width, head, T_D, T_PADDED), t_scale, PRECISION)
        s = _scores(x_s, y_s, s_scale, PRECISION)
        g = tl.zeros([BLOCK, BLOCK], tl.float32)
        if OWN_ROWS:
            keys = tl.zeros([1, BLOCK], tl.float32)
            if HAS_BIAS:
                keys += tl.load(bias + start + other, mask=valid, other=0.0)[None, :]
            log_t = _log_softmax(t + keys, norm_t, own_at, own_valid, True)
            log_s = _log_softmax(s + keys, norm_s, own_at, own_valid, True)
            difference, p_t = _difference(log_t, log_s)
            # Each row of the difference sums to 0: added, it takes the normalisers' rounding errors out.
            value += tl.sum(tl.where(both, p_t * (log_t - log_s) + difference, 0.0), 1)
            g += difference
        if OTHER_ROWS:
            other_at = (start + other) * heads + head
            keys = tl.zeros([BLOCK, 1], tl.float32)
            if HAS_BIAS:
                keys += tl.load(bias + start + own, mask=own_valid, other=0.0)[:, None]
            log_t = _log_softmax(t + keys, norm_t, other_at, valid, False)
            log_s = _log_softmax(s + keys, norm_s, other_at, valid, False)
            difference, p_t = _difference(log_t, log_s)
            g += difference
        g = tl.where(both, g, 0.0)
        change += tl.dot(g.to(y_s.dtype), y_s, input_precision=PRECISION)
    weight = tl.load(weights + group)
    columns = tl.arange(0, S_PADDED)
    at = gradient + own_rows[:, None] * s_width + head * S_D + columns[None, :]
    inside = own_valid[:, None] & (columns < S_D)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + change * (weight * factor * s_scale), mask=inside)
    if OWN_ROWS:
        tl.store(values + block * heads + head, tl.sum(tl.where(own_valid, value, 0.0), 0) * weight)


class TritonRelationKernel:
    """The kernels on the groups of one batch and relation.

    Args:
        ragged: the groups.
        device: where Q, K, V lie.
    """

    def __init__(self, ragged: Ragged, device: str = "cuda") -> None:
        self.heads = ragged.heads
        self.block = 16 if ragged.sizes.max() <= 16 else 32 if ragged.sizes.max() <= 32 else 64
        blocks = -(-ragged.sizes // self.block)
        within = np.arange(blocks.sum()) - np.repeat(blocks.cumsum() - blocks, blocks)

        def on_gpu(array: np.ndarray, dtype: type) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype)).to(device, non_blocking=True)

        self.rows = on_gpu(ragged.rows, np.int64)
        self.bias = None if ragged.bias is None else on_gpu(ragged.bias, np.float32)
        self.groups = [
            on_gpu(np.repeat(np.arange(len(blocks)), blocks), np.int32),
            on_gpu(within * self.block, np.int32),
            on_gpu(ragged.sizes.cumsum() - ragged.sizes, np.int32),
            on_gpu(ragged.sizes, np.int32),
        ]
        self.weights = on_gpu(ragged.weights, np.float32)

    def add(
        self,
        teacher: tuple[torch.Tensor, torch.Tensor],
        student: tuple[torch.Tensor, torch.Tensor],
        gradients: tuple[torch.Tensor, torch.Tensor],
        factor: float,
    ) -> torch.Tensor:
        """The weighted divergence of a pair X, Y; `factor` times its gradient is added to `gradients`.

        Args:
            teacher, student: X and Y, contiguous [R, heads * d] of any one floating dtype.
            gradients: float32, like the student's; the same tensor twice where X is Y.
        """
        vectors = [x.contiguous() for x in (*teacher, *student)]
        t_x, t_y, s_x, s_y = vectors
        t_d, s_d = t_x.shape[1] // self.heads, s_x.shape[1] // self.heads
        # The largest score and the logarithm of the sum, for every row of every head
        norms = [torch.empty(len(self.rows) * self.heads * 2, device=t_x.device) for _ in range(2)]
        grid = (len(self.groups[0]), self.heads)
        values = torch.zeros(grid, device=t_x.device)
        bias = self.rows if self.bias is None else self.bias
        shape = dict(
            t_width=t_x.shape[1], s_width=s_x.shape[1], t_scale=t_d**-0.5, s_scale=s_d**-0.5, heads=self.heads,
            T_D=t_d, S_D=s_d, T_PADDED=_padded(t_d), S_PADDED=_padded(s_d),
            HAS_BIAS=self.bias is not None, BLOCK=self.block,
            PRECISION="ieee" if torch.float32 in (t_x.dtype, s_x.dtype) else "tf32",
        )  # fmt: skip
        _normaliser_kernel[grid](t_x, t_y, s_x, s_y, self.rows, bias, *self.groups, *norms, **shape)

        def run(own: int, gradient: torch.Tensor, own_rows: bool, other_rows: bool) -> None:
            sides = (t_x, t_y, s_x, s_y) if own == 0 else (t_y, t_x, s_y, s_x)
            _gradient_kernel[grid](
                *sides, self.rows, bias, *self.groups, *norms, self.weights, gradient, values,
                factor=factor, OWN_ROWS=own_rows, OTHER_ROWS=other_rows, **shape,
            )  # fmt: skip

        if gradients[0] is gradients[1]:
            run(0, gradients[0], True, True)
        else:
            run(0, gradients[0], True, False)
            run(1, gradients[1], False, True)
        return values.sum()


def _padded(d: int) -> int:
    """The head size that matrix units take."""
    return max(16, triton.next_power_of_2(d))
