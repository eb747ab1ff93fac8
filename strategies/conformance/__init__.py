"""Does a part of a strategy do what it says of itself? Checks for any part, cotune's and others', on made-up updates.

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
    """One finding for each check that the part's own statements ask for, in a fixed order.

    parameters: of the part, as a plan gives them; one that is required and not given gets a value that its type allows.
    context: θ, adapters and what else a part may know of a round; made up where it is not given.
    Raises ValueError for parameters that the part does not take.
    """
    case = sample(info, info.check({**complete(info), **(parameters or {})}), context)
    return [run(check, case) for check in _CHECKS[info.kind] if check.applies(info)]
