"""How far apart two timings of the same kernel come out on a device, by the kernel's length: the floor of any claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor

from autotune.compiler import Ops, canonical, renderer_of
from autotune.kernel import Kernel
from autotune.measuring.bench import DUEL_SECONDS
from autotune.measuring.runner import NOISE_FLOOR, Refuted, Runner, Unprepared

SIZES = tuple(
    1 << power for power in (8, 12, 15, 18, 21, 24)
)  # elements of a kernel: microseconds to tens of milliseconds
REPEATS = 20  # comparisons of a kernel with itself, for each size
QUANTILE = 0.95  # of their differences is the floor
Curve = tuple[tuple[float, float], ...]  # (seconds of a kernel, relative floor), rising seconds


@dataclass(frozen=True)
class Length:
    """A/A comparisons of one kernel: its median seconds, and the relative difference that each comparison found."""

    seconds: float
    differences: tuple[float, ...]

    @property
    def floor(self) -> float:
        return float(np.quantile(self.differences, QUANTILE))


def measure_noise(
    runner: Runner, repeats: int = REPEATS, tell: Callable[[Length], None] = lambda length: None
) -> list[Length]:
    """Compare kernels of several lengths with themselves, for as long as the final timing does, and `tell` of each length.

    The two sides of a comparison are loaded apart, so that where a binary happens to lie counts as noise too. Takes
    about half a second a comparison. Ends before a length that cannot be measured; where that is the first, raises
    Refuted or Unprepared. Raises DeviceError.
    """
    found: list[Length] = []
    for size in SIZES:
        try:
            found.append(_compare(runner, kernel_of_size(size, runner.device), repeats))
        except (Refuted, Unprepared):
            if not found:
                raise
            break
        tell(found[-1])
    return found


def _compare(runner: Runner, kernel: Kernel, repeats: int) -> Length:
    hand = runner.baselines(kernel)[-1]
    differences, seconds = [], []
    for _ in range(repeats):
        one, other = (statistics.median(s) for s in runner.duel(kernel, [hand.schedule] * 2, False, DUEL_SECONDS))
        differences.append(abs(math.log(one / other)))
        seconds += [one, other]
    return Length(statistics.median(seconds), tuple(differences))


def kernel_of_size(size: int, device: str) -> Kernel:
    """An element-wise kernel of so many elements."""
    linear, _ = (Tensor.empty(size, device=device).sqrt() + 1).linear_with_vars()
    (raw,) = (call.src[0] for call in linear.src if call.src[0].op is Ops.SINK)
    return Kernel.from_ast(canonical(raw, renderer_of(device)))


def curve_of(lengths: list[Length]) -> Curve:
    """Rising in seconds; of lengths that took the same, the largest floor."""
    return tuple(dict(sorted((length.seconds, length.floor) for length in lengths)).items())


def floor_at(curve: Curve | None, seconds: float) -> float:
    """The floor for a kernel of this length, between the measured lengths by their logarithms; NOISE_FLOOR without a curve."""
    if not curve or seconds <= 0:
        return NOISE_FLOOR
    return float(np.interp(math.log(seconds), [math.log(s) for s, _ in curve], [floor for _, floor in curve]))
