"""A toy federation: a tiny bert, 240 sentences with something to learn in them, and the plan that trains its head."""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors.torch import load_file
from torch import Tensor

from cotune.plan.load import dump_plan, parse_plan
from cotune.plan.plan import Plan
from cotune.server.runs.events import read_events
from tests.support.datasets import sentences, write_csv

NewPlan = Callable[..., Plan]


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", sentences(240))


COMPARED = {"baselines": ["alone", "pooled"]}  # a table [simulation]
UNADAPTED = {"methods": []}  # a table [personalize]: each head that is fitted costs as much as a round
BY_PRIOR = {"methods": ["prior"]}
TOY_MODEL = {"max_length": 16, "precision": "float32"}  # processors with fast bfloat16 round off what a tiny model has learned


@pytest.fixture(scope="session")
def toy_plan(base_model: Callable[[str], Path], toy_data: Path) -> NewPlan:
    """Changes of top-level keys -> a plan; tables are merged one level deep. Without changes it learns well within seconds.

    It has no baselines, as each costs as much as the run: a test about them says `simulation=COMPARED`, or which.
    """

    def make(kind: str = "bert", **changes: Any) -> Plan:
        table: dict[str, Any] = {
            "name": "toy",
            "rounds": 3,
            "privacy": "none",
            "model": {
                **TOY_MODEL,
                "base": str(base_model(kind)),
                "pooling": "mean" if kind.endswith("-bert") or kind == "bert" else "auto",
            },
            "data": {"source": str(toy_data)},
            "local": {"learning_rate": 5.0, "momentum": 0.9, "batch_size": 0.5, "steps": 5},
            "personalize": {"folds": 2},  # each fits a dozen heads
            "simulation": {"clients": 2, "partition": "iid", "baselines": []},
        }
        return parse_plan(merged(table, changes))

    return make


def merged(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of top-level keys in a plan's table; tables are merged one level deep."""
    both = {key for key, value in changes.items() if isinstance(value, dict) and isinstance(table.get(key), dict)}
    return {**table, **{key: {**table[key], **value} if key in both else value for key, value in changes.items()}}


@pytest.fixture(scope="session")
def plan_file(toy_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short one for comparisons, which leaves the baselines open."""
    simulation = {"clients": 2, "partition": "dirichlet:0.5", "min_examples": 10}
    plan = toy_plan(rounds=2, local={"learning_rate": 1.0, "momentum": 0.0, "steps": 2}, simulation=simulation)
    file = tmp_path_factory.mktemp("plan") / "toy.toml"
    table = tomllib.loads(dump_plan(plan))
    del table["simulation"]["baselines"]
    file.write_text(tomli_w.dumps(table), encoding="utf-8")
    return file


def table(folder: Path, *without: str) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as stream:
        return [{key: value for key, value in row.items() if key not in without} for row in csv.DictReader(stream)]


def rounds_played(folder: Path) -> int:
    """Over all cells and processes: a round that was finished twice counts twice."""
    events = [event for file in folder.glob("cells/*/events.jsonl") for event in read_events(file)]
    return sum(event["event"] == "round_finished" for event in events)


def final_model(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(one[n].numpy().tobytes() == other[n].numpy().tobytes() for n in one)


def told(run: Path, event: str, **fields: Any) -> int:
    """How often an event with these fields stands in the run's file so far."""
    events = read_events(run / "events.jsonl") if (run / "events.jsonl").exists() else []
    return sum(e["event"] == event and all(e.get(key) == value for key, value in fields.items()) for e in events)


def tensors_of(run: Path) -> list[bytes]:
    """All checkpoints without their metadata, which holds times."""
    files = sorted((run / "checkpoints").glob("*.safetensors"))
    return [content[8 + int.from_bytes(content[:8], "little") :] for content in (file.read_bytes() for file in files)]
