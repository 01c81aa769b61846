"""A matrix cut to 8 or 4 bits in blocks, as onnxruntime's MatMulNBits reads it.

Letters: N outputs, K inputs of a matrix, B blocks of its row, C weights of a block. A weight is (q - zero) * scale,
with one scale and one integer zero point per block; without zero points zero is the middle code.
Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ModelError

Floats = NDArray[np.float32]
TINY = np.float32(1e-10)
CHUNK_WEIGHTS = 1 << 17  # weights searched together: they stay in the processor's cache
# Tried ends of a block's range, as shares of its largest and smallest weight; and where its middle is zero.
SHRINK = (1.05, 0.98, 0.91, 0.84, 0.77, 0.7)
SYMMETRIC = (1.2, 1.15, 1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
LEAST = np.float32(1e-3)  # added to every input's importance, a share of the mean: other rows may use what these do not


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored."""

    bits: int
    block: int = 32
    zero_points: bool = False

    @property
    def middle(self) -> int:
        """The code of 0 where there are no zero points."""
        return 1 << (self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        """With scales of 32 bits and zero points."""
        return self.bits + (32 + self.bits * self.zero_points) / self.block


def candidates(blocks: Sequence[int]) -> list[Scheme]:
    """The ways to store 4 bits with these block sizes: with zero points and without."""
    return [Scheme(4, block, zero_points) for block in sorted(set(blocks)) for zero_points in (False, True)]


def uses_bits_best(schemes: Sequence[Scheme], kl: Sequence[float]) -> Scheme:
    """The scheme with the lowest KL for its size: one bit more is worth it if it divides the KL by more than four.

    The squared error of a quantiser falls by four with each bit (Bennett 1948), and KL with the squared error.
    """
    return min(zip(schemes, kl, strict=True), key=lambda found: found[1] * 4 ** found[0].bits_per_weight)[0]


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix; `zero_NB` is None where every zero is the middle code."""

    q_NBC: NDArray[np.uint8]
    scale_NB: Floats
    zero_NB: NDArray[np.uint8] | None
    scheme: Scheme

    def weights(self) -> Floats:
        """The matrix [N, K] that the runtime computes with."""
        zero = np.float32(self.scheme.middle) if self.zero_NB is None else self.zero_NB.astype(np.float32)[..., None]
        w_NBC: Floats = (self.q_NBC - zero) * self.scale_NB[..., None]
        return w_NBC.reshape(len(w_NBC), -1)


def quantize_matrix(w_NK: Floats, scheme: Scheme, importance_K: Floats | None = None) -> Blocks:
    """Quantise in blocks along K: 8 bits by the largest weight, 4 bits by a search for the least squared error.

    `importance_K` weighs that error: the mean square of each input on real rows, so that what is lost of the products,
    not of the weights, becomes small. With 8 bits the rounding of the activations decides (measured).

    Raises ModelError if K is no multiple of the block.
    """
    num_rows, width = w_NK.shape
    if width % scheme.block:
        raise ModelError(
            f"a matrix of width {width} cannot be cut into blocks of {scheme.block}", "export this model as fp32"
        )
    h_BC = _weights_of_error(importance_K, width).reshape(-1, scheme.block)
    w_NBC = np.ascontiguousarray(w_NK, np.float32).reshape(num_rows, -1, scheme.block)
    q, scale = np.empty(w_NBC.shape, np.uint8), np.empty(w_NBC.shape[:2], np.float32)
    zero = np.empty(w_NBC.shape[:2], np.uint8)
    rows = max(1, CHUNK_WEIGHTS // width)
    for at in range(0, num_rows, rows):
        part = slice(at, at + rows)
        q[part], scale[part], zero[part] = _quantize(w_NBC[part], h_BC, scheme)
    return Blocks(q, scale, zero if scheme.zero_points else None, scheme)


def _weights_of_error(importance_K: Floats | None, width: int) -> Floats:
    if importance_K is None:
        return np.ones(width, np.float32)
    if importance_K.shape != (width,):
        raise ModelError(
            f"an importance of {importance_K.shape[0]} inputs does not fit a matrix of width {width}",
            "compute the importance with the model that is exported",
        )
    mean = np.float32(max(importance_K.mean(dtype=np.float64), float(TINY)))
    weights: Floats = importance_K.astype(np.float32) / mean + LEAST
    return weights


def _quantize(w_NBC: Floats, h_BC: Floats, scheme: Scheme) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8]]:
    """Codes, scales and zero points of some rows."""
    if scheme.bits == 8 and not scheme.zero_points:
        scale: Floats = np.maximum(np.abs(w_NBC).max(-1), TINY) / np.float32(127)
        zero = np.full_like(scale, scheme.middle)
    else:
        scale, zero = _search(w_NBC, h_BC, scheme)
    return _codes(w_NBC, scale, zero, scheme).astype(np.uint8), scale, zero.astype(np.uint8)


def _search(w_NBC: Floats, h_BC: Floats, scheme: Scheme) -> tuple[Floats, Floats]:
    """Scale and zero point of the best of all tried ranges, each with its best scale.

    For given d = q - zero the scale of least error sum h (w - s d)^2 is <w,d>/<d,d>, and leaves |w|^2 - <w,d>^2/<d,d>,
    with products weighted by h.
    """
    best = np.full(w_NBC.shape[:2], -1.0, np.float32)
    scale, zero = np.ones_like(best), np.full_like(best, scheme.middle)
    for step, at in _ranges(w_NBC, scheme):
        d = _codes(w_NBC, step, at, scheme) - at[..., None]
        hd = h_BC * d
        wd, dd = np.einsum("nbc,nbc->nb", w_NBC, hd), np.maximum(np.einsum("nbc,nbc->nb", d, hd), TINY)
        gain = wd * wd / dd
        better = gain > best
        best[better], zero[better] = gain[better], at[better]
        scale[better] = np.where(wd != 0, wd / dd, step)[better]
    return scale, zero


def _ranges(w_NBC: Floats, scheme: Scheme) -> Iterator[tuple[Floats, Floats]]:
    """Steps and zero points to try."""
    top = 2 * scheme.middle - 1
    low, high = np.minimum(w_NBC.min(-1), 0), np.maximum(w_NBC.max(-1), 0)
    if scheme.zero_points:
        for a, b in product(SHRINK, SHRINK):
            step = np.maximum((high * b - low * a) / np.float32(top), TINY)
            yield step, np.clip(np.rint(-low * a / step), 0, top)
        return
    farthest = np.where(high > -low, high, low)  # gets the code 0: there is one more below the middle than above
    farthest = np.where(np.abs(farthest) < TINY, -TINY, farthest)
    middle = np.full_like(farthest, scheme.middle)
    for share in SYMMETRIC:
        yield farthest * np.float32(-share / scheme.middle), middle


def _codes(w_NBC: Floats, step_NB: Floats, zero_NB: Floats, scheme: Scheme) -> Floats:
    codes: Floats = w_NBC * (np.float32(1) / step_NB)[..., None]
    codes += zero_NB[..., None]
    np.rint(codes, out=codes)
    np.clip(codes, 0, 2 * scheme.middle - 1, out=codes)
    return codes


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes along the last axis as the operators store them: two of 4 bits per byte, the lower half first."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
