"""Simulators: what will this schedule cost? They know arrays of numbers, and no compiler.

Every simulator learns the same thing: log2 seconds of a schedule *relative to the other schedules of its
kernel*. The absolute level of a kernel is never needed to choose between its schedules, and cannot be known
from few kernels.
"""

from sims.base import Simulator, SimulatorError
from sims.ensemble import Ensemble, EnsembleConfig
from sims.nearest import NearestConfig, NearestNeighbour

__all__ = ["Ensemble", "EnsembleConfig", "NearestConfig", "NearestNeighbour", "Simulator", "SimulatorError"]
