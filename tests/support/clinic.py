"""An organization with a few records: the plan of its federation, its site, and the state that a server would send."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotune.client.site import Site
from cotune.client.site_folder import SiteFile
from cotune.data.config import DataConfig
from cotune.data.dataset import write_manifest
from cotune.models.trainable import State
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, shared_names
from cotune.privacy.policy import Policy, dump_policy

LABELS = ("bad", "good", "so")


def make_plan(base: Path, records: Path, **tables: Any) -> Plan:
    """Return the plan with these tables and keys; tables are merged one level deep, but for `privacy`, which is none else."""
    given: dict[str, Any] = {
        "labels": LABELS,
        "rounds": 3,
        "model": {"base": str(base), "max_length": 16, "precision": "float32"},
        "data": {"source": str(records)},
        "lora": {"rank": 2},
        "local": {"learning_rate": 0.5, "batch_size": 0.2, "steps": 4, "physical_batch_size": 5},
        "privacy": "none",
        "personalize": {"folds": 2, "methods": ["prior", "mix", "alone"]},  # each fold fits six heads, with "head" a dozen
    }
    for key, value in tables.items():
        given[key] = {**given[key], **value} if isinstance(given.get(key), dict) and key != "privacy" else value
    return parse_plan(given)


def make_site(
    folder: Path, records: Path, rows: Sequence[int], policy: Policy, *, name: str = "clinic", simulated: bool = False
) -> Site:
    """Write the site of an organization that holds these rows of the records."""
    write_manifest(folder / "data.json", DataConfig(source=str(records)), [(None, list(rows))])
    described = SiteFile(organization=name, simulated=simulated, device="cpu")
    (folder / "site.json").write_text(described.model_dump_json())
    (folder / "policy.toml").write_text(dump_policy(policy))
    return Site(folder)


def state_of(plan: Plan, round: int = 1) -> State:
    """Return what the server sends at the start: the parameters of all stages up to a round, as in the base model."""
    model = get_plan_model(plan, "cpu")
    model.load({})
    names: dict[str, None] = {}
    for number in range(1, round + 1):
        names |= dict.fromkeys(shared_names(plan, model, number))
    return model.state(names)
