"""Arrays made larger with zeros, to sizes that suit tinygrad."""

from __future__ import annotations

import numpy as np

PAD = 16  # widths are multiples of this: tinygrad's hand-coded schedules need divisible axes


def padded(width: int) -> int:
    """The next multiple of PAD."""
    return -(-width // PAD) * PAD


def widened(array: np.ndarray, width: int) -> np.ndarray:
    """Zeros (False) added along the last axis: [..., N] -> [..., width]."""
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])])


def grown(array: np.ndarray) -> np.ndarray:
    """Padded with zeros along the first axis to the next power of two: more data seldom means another capture."""
    more = (1 << max(0, len(array) - 1).bit_length()) - len(array)
    return np.pad(array, [(0, more)] + [(0, 0)] * (array.ndim - 1))
