"""The parts of a strategy, built from its table: what one round and one run need of it.

Apart from the table itself (`strategy`), as parts compute with PyTorch and a table is data alone.
"""

from __future__ import annotations

from cotune.strategies.client_terms.base import ClientTerm
from cotune.strategies.combination import WeightedFusion
from cotune.strategies.round import RoundContext
from cotune.strategies.server_optimizers.base import ServerOptimizer
from cotune.strategies.strategy import StrategyConfig


def build_aggregator(strategy: StrategyConfig, context: RoundContext) -> WeightedFusion:
    """Return weighting and fusion for one round."""
    weighting = strategy.weighting
    fusion = strategy.fusion
    return WeightedFusion(
        (weighting.info("weighting"), weighting.parameters), (fusion.info("fusion"), fusion.parameters), context
    )


def build_server_optimizer(strategy: StrategyConfig) -> ServerOptimizer:
    """Return what moves the shared model by a fused delta."""
    part = strategy.server_optimizer
    built: ServerOptimizer = part.info("server_optimizer").build(**part.parameters)
    return built


def build_client_term(strategy: StrategyConfig) -> ClientTerm:
    """Return what organizations add to their gradients; the base class, which adds nothing, where the strategy has no term."""
    part = strategy.client_term
    built: ClientTerm = ClientTerm() if part is None else part.info("client_term").build(**part.parameters)
    return built
