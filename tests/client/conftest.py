"""A plan on a tiny model, the site of an organisation with its own records, and the state that a server would send."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.client.site import Site, SiteFile
from cotune.models.holdings import write_holdings
from cotune.models.records import DataConfig
from cotune.models.sharing import State, resident
from cotune.plan.load import parse_plan
from cotune.plan.model import model_of
from cotune.plan.schema import Plan
from cotune.privacy.policy import Policy, dump_policy
from tests.support.signing import trusting

torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other

LABELS = ("bad", "good", "so")
WORDS = {"good": ["great", "happy"], "bad": ["awful", "sad"], "so": ["table", "tree"]}
EXAMPLES = 60


@pytest.fixture(autouse=True)
def _one_model_at_a_time() -> Iterator[None]:
    """No test sees the resident model of another."""
    resident.cache_clear()
    yield
    resident.cache_clear()


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A CSV of 60 labelled sentences, no two alike."""
    rng = random.Random(0)
    rows = ["text,label"]
    while len(rows) <= EXAMPLES:
        label = LABELS[(len(rows) - 1) % 3]
        words = [*rng.choices(["the", "is", "a", "very", "it"], k=rng.randint(1, 6)), *rng.choices(WORDS[label], k=2)]
        row = f"{' '.join(words)},{label}"
        rows += [] if row in rows else [row]
    file = tmp_path / "records.csv"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def make_plan(base_model: Callable[[str], Path], records: Path) -> Callable[..., Plan]:
    """Tables and keys of a plan -> the plan; without privacy unless `privacy` says otherwise."""

    def make(kind: str = "bert", **tables: Any) -> Plan:
        given: dict[str, Any] = {
            "labels": LABELS,
            "rounds": 3,
            "model": {"base": str(base_model(kind)), "max_length": 32, "precision": "float32"},
            "data": {"source": str(records)},
            "lora": {"rank": 2},
            "local": {"learning_rate": 0.5, "batch_size": 0.2, "steps": 4, "physical_batch_size": 5},
            "privacy": "none",
        }
        for key, value in tables.items():
            given[key] = {**given[key], **value} if isinstance(given.get(key), dict) and key != "privacy" else value
        return parse_plan(given)

    return make


@pytest.fixture
def make_site(tmp_path: Path, records: Path) -> Callable[..., Site]:
    """name -> the organisation's site, with the rows of the records that it holds, and a policy that allows everything."""

    def make(
        name: str = "clinic",
        *,
        rows: Any = range(EXAMPLES),
        simulated: bool = False,
        at: str = "",
        policy: Policy | None = None,
    ) -> Site:
        folder = tmp_path / "sites" / (at or name)
        write_holdings(folder / "data.json", DataConfig(source=str(records)), [(None, list(rows))])
        described = SiteFile(organisation=name, simulated=simulated, device="cpu")
        (folder / "site.json").write_text(described.model_dump_json())
        (folder / "policy.toml").write_text(dump_policy(policy or Policy.permissive()))
        if not simulated:
            trusting(folder)
        return Site(folder)

    return make


@pytest.fixture
def state_for() -> Callable[[Plan, int], State]:
    """(plan, round) -> what the server sends at the start: the parameters of all stages so far, as in the base model."""

    def make(plan: Plan, round: int = 1) -> State:
        model = model_of(plan, "cpu")
        model.load({})
        names: dict[str, None] = {}
        for number in range(1, round + 1):
            stage = plan.stage_of(number)
            names |= dict.fromkeys(model.names(stage.mode, freeze_embeddings=stage.freeze_embeddings))
        return model.state(names)

    return make
