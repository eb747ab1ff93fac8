"""A plan on a tiny model, the site of an organization with its own records, and the state that a server would send."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotune.client.site import Site
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy
from tests.support import clinic
from tests.support.signing import trusting

WORDS = {"good": ["great", "happy"], "bad": ["awful", "sad"], "so": ["table", "tree"]}
EXAMPLES = 60


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A CSV of 60 labeled sentences, no two alike."""
    rng = random.Random(0)
    rows = ["text,label"]
    while len(rows) <= EXAMPLES:
        label = clinic.LABELS[(len(rows) - 1) % 3]
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
        return clinic.make_plan(base_model(kind), records, **tables)

    return make


@pytest.fixture
def make_site(tmp_path: Path, records: Path) -> Callable[..., Site]:
    """name -> the organization's site, with the rows of the records that it holds, and a policy that allows everything."""

    def make(
        name: str = "clinic",
        *,
        rows: Any = range(EXAMPLES),
        simulated: bool = False,
        at: str = "",
        policy: Policy | None = None,
    ) -> Site:
        folder = tmp_path / "sites" / (at or name)
        rules = policy or Policy.permissive()
        made = clinic.make_site(folder, records, rows, rules, name=name, simulated=simulated)
        if not simulated:
            trusting(folder)
        return made

    return make


@pytest.fixture
def state_for() -> Callable[..., State]:
    """(plan, round) -> what the server sends at the start: the parameters of all stages so far, as in the base model."""
    return clinic.state_of
