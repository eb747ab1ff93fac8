"""Check that a component of a strategy does what it declares, built-in or not, on synthetic updates.

>>> from cotune.strategies.registry import get_builtin_components
>>> [finding for finding in check_component(get_builtin_components("fusion")["mean"]) if not finding.passed]
[]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cotune.strategies.conformance import client_terms, fusions, server_optimizers, weightings
from cotune.strategies.conformance.checks import Finding, run
from cotune.strategies.conformance.samples import complete, sample
from cotune.strategies.registry import ComponentInfo
from cotune.strategies.types import RoundContext

_CHECKS = {
    "weighting": weightings.CHECKS,
    "fusion": fusions.CHECKS,
    "server_optimizer": server_optimizers.CHECKS,
    "client_term": client_terms.CHECKS,
}


def check_component(
    info: ComponentInfo, parameters: Mapping[str, Any] | None = None, context: RoundContext | None = None
) -> list[Finding]:
    """Run every check that applies to what the component declares.

    Args:
        info: The component's declaration.
        parameters: As a plan gives them. Missing required parameters get a value that their type allows.
        context: θ, adapters and what else a component may know of a round; None: a synthetic one.

    Returns:
        One finding per check, in a fixed order.

    Raises:
        ValueError: If the component does not take the parameters.
    """
    case = sample(info, info.check({**complete(info), **(parameters or {})}), context)
    return [run(check, case) for check in _CHECKS[info.kind] if check.applies(info)]
