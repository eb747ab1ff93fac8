"""How updates become one step of the shared model: weighting → fusion → server optimiser; and how they travel."""

from cotune.strategies.fusion import FUSIONS, WeightedMean
from cotune.strategies.server_optimizers import SERVER_OPTIMIZERS, ServerSGD
from cotune.strategies.strategy import Part, StrategyConfig
from cotune.strategies.updates import Delta, Update, apply_delta, difference
from cotune.strategies.weighting import JOINT_WEIGHTINGS, WEIGHTINGS

__all__ = [
    "FUSIONS",
    "JOINT_WEIGHTINGS",
    "SERVER_OPTIMIZERS",
    "WEIGHTINGS",
    "Delta",
    "Part",
    "ServerSGD",
    "StrategyConfig",
    "Update",
    "WeightedMean",
    "apply_delta",
    "difference",
]
