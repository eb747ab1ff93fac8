"""Combine the updates of a round into one step of the shared model: weighting → fusion → server optimizer, and client terms.

`__all__` lists what a custom component needs (docs/strategies.md). Names are imported on first use, so that a process that only
reads the tables of a plan does not load PyTorch.
"""

from typing import TYPE_CHECKING

from cotune.lazy_names import import_lazily

if __name__ != "cotune.strategies":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.strategies`")

if TYPE_CHECKING:
    from cotune.strategies.client_terms.base import ClientTerm
    from cotune.strategies.config import Component, StrategyConfig
    from cotune.strategies.registry import Needs, Visibility, client_term, fusion, server_optimizer, weighting
    from cotune.strategies.server_optimizers.base import ServerOptimizer
    from cotune.strategies.sums import Sums, norm, weighted, weighted_mean
    from cotune.strategies.types import Aggregate, Delta, RoundContext, Update, WeightedUpdate, apply_delta, difference

__all__ = [
    "Aggregate",
    "ClientTerm",
    "Component",
    "Delta",
    "Needs",
    "RoundContext",
    "ServerOptimizer",
    "StrategyConfig",
    "Sums",
    "Update",
    "Visibility",
    "WeightedUpdate",
    "apply_delta",
    "client_term",
    "difference",
    "fusion",
    "norm",
    "server_optimizer",
    "weighted",
    "weighted_mean",
    "weighting",
]

_MODULES = {
    "client_terms.base": ("ClientTerm",),
    "config": ("Component", "StrategyConfig"),
    "registry": ("Needs", "Visibility", "client_term", "fusion", "server_optimizer", "weighting"),
    "server_optimizers.base": ("ServerOptimizer",),
    "sums": ("Sums", "weighted_mean", "norm", "weighted"),
    "types": ("Delta", "Aggregate", "RoundContext", "Update", "WeightedUpdate", "apply_delta", "difference"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__getattr__ = import_lazily(globals(), _MODULE_OF)
