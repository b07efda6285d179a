"""Simulators: what will this schedule cost? They know arrays of numbers, and no compiler.

Every simulator learns the same thing: log2 seconds of a schedule *relative to the other schedules of its
kernel*. The absolute level of a kernel is never needed to choose between its schedules, and cannot be known
from few kernels.

A `Simulator` judges a schedule by the summary of its state; a `PathSimulator` predicts every prefix of a schedule, and
goes on without the compiler. `Flat` makes the second of the first.
"""

from sims.base import PathSimulator, Prediction, Simulator, SimulatorError
from sims.committee import Committee
from sims.diffusion import Diffusion, DiffusionConfig
from sims.ensemble import Ensemble, EnsembleConfig
from sims.flat import Flat
from sims.linear import Linear, LinearConfig
from sims.nearest import NearestConfig, NearestNeighbour
from sims.paths import Paths, Widths
from sims.roofline import Roofline, RooflineConfig
from sims.transformer import Transformer, TransformerConfig
from sims.trees import Trees, TreesConfig

__all__ = ["Committee", "Diffusion", "DiffusionConfig", "Ensemble", "EnsembleConfig", "Flat", "Linear", "LinearConfig",
           "NearestConfig", "NearestNeighbour", "PathSimulator", "Paths", "Prediction", "Roofline", "RooflineConfig",
           "Simulator", "SimulatorError", "Transformer", "TransformerConfig", "Trees", "TreesConfig", "Widths"]  # fmt: skip
