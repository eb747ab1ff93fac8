"""Collaborative fine-tuning without sharing data: federated, differentially private, on Flower and Opacus.

What stands in `__all__` is the public interface, with the names of `cotune.strategies` for rules of one's own; everything
else may change without notice. Names are imported when they are first used, as PyTorch takes seconds to load.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from cotune.lazy_names import import_lazily

if TYPE_CHECKING:
    from cotune.errors import CotuneError, DataError, DeviceError, ModelError, PlanError, PolicyError, PrivacyError, RunError
    from cotune.plan.load import load_plan
    from cotune.plan.plan import Plan
    from cotune.privacy.ledger.ledger import Ledger
    from cotune.privacy.policy import Policy
    from cotune.simulations.auditing.audit import audit
    from cotune.simulations.comparison.compare import compare
    from cotune.simulations.forecast.forecast import forecast
    from cotune.simulations.run import Run, resume, simulate
    from cotune.strategies.registry import client_term, fusion, server_optimizer, weighting

__version__ = version("cotune")

_MODULES = {
    "CotuneError": "errors",
    "DataError": "errors",
    "PolicyError": "errors",
    "DeviceError": "errors",
    "Ledger": "privacy.ledger.ledger",
    "ModelError": "errors",
    "Plan": "plan.plan",
    "PlanError": "errors",
    "Policy": "privacy.policy",
    "PrivacyError": "errors",
    "Run": "simulations.run",
    "RunError": "errors",
    "audit": "simulations.auditing.audit",
    "client_term": "strategies.registry",
    "compare": "simulations.comparison.compare",
    "forecast": "simulations.forecast.forecast",
    "fusion": "strategies.registry",
    "load_plan": "plan.load",
    "resume": "simulations.run",
    "server_optimizer": "strategies.registry",
    "simulate": "simulations.run",
    "weighting": "strategies.registry",
}

__all__ = [
    "CotuneError",
    "DataError",
    "DeviceError",
    "Ledger",
    "ModelError",
    "Plan",
    "PlanError",
    "Policy",
    "PolicyError",
    "PrivacyError",
    "Run",
    "RunError",
    "__version__",
    "audit",
    "client_term",
    "compare",
    "forecast",
    "fusion",
    "load_plan",
    "resume",
    "server_optimizer",
    "simulate",
    "weighting",
]

__getattr__ = import_lazily(globals(), _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
