"""How updates become one step of the shared model: weighting → fusion → server optimiser, client terms; and how they travel."""

if __name__ != "cotune.strategies":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.strategies`")

from cotune.strategies.client_term import ClientTerm
from cotune.strategies.parts import Needs, Visibility, fusion, weighting
from cotune.strategies.round import Fused, RoundContext, Weighed
from cotune.strategies.server_optimizer import ServerOptimizer
from cotune.strategies.strategy import Part, StrategyConfig
from cotune.strategies.sums import Sums, mean_of, norm, weighted
from cotune.strategies.updates import Delta, Update, apply_delta, difference

# isort: split
from cotune.strategies.parts import client_term, server_optimizer  # last: modules of these names would hide them

__all__ = [
    "ClientTerm",
    "Delta",
    "Fused",
    "Needs",
    "Part",
    "RoundContext",
    "ServerOptimizer",
    "StrategyConfig",
    "Sums",
    "Update",
    "Visibility",
    "Weighed",
    "apply_delta",
    "client_term",
    "difference",
    "fusion",
    "mean_of",
    "norm",
    "server_optimizer",
    "weighted",
    "weighting",
]
