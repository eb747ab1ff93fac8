"""The plan: the one document that server and organisations agree on. Whatever it does not say, nobody does."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cotune.plan.document import preset_names, preset_text
    from cotune.plan.load import load_plan
    from cotune.plan.schema import LocalTraining, Plan, SimulationConfig, Stage

if __name__ != "cotune.plan":  # a second copy of every class would be made, and `except CotuneError` would miss
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.plan`")

__all__ = ["LocalTraining", "Plan", "SimulationConfig", "Stage", "load_plan", "preset_names", "preset_text"]

_MODULES = {"load_plan": "load", "preset_names": "document", "preset_text": "document"}  # of the others: schema


def __getattr__(name: str) -> Any:
    """Import when asked for: torch takes seconds, and reading a plan's text needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'schema')}"), name)
