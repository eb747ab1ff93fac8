"""The plan: the one document that server and organisations agree on. Whatever it does not say, nobody does."""

from cotune.plan.load import load_plan, preset_names, preset_text
from cotune.plan.schema import LocalTraining, Plan, SimulationConfig, Stage

__all__ = ["LocalTraining", "Plan", "SimulationConfig", "Stage", "load_plan", "preset_names", "preset_text"]
