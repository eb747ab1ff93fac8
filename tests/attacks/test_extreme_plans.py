"""Extreme plans and states. Arithmetic that holds for numbers as training has them was driven out of its range by others.

A LayerNorm weight of 1e12 in the received state made a record whose positions cancel contribute 56,843 clip norms under ghost
clipping, and 1e7 made it 26; the learning rate and the bound on updates that carried this to the server were in a plan that
nobody was shown. Now every number of a plan has plausible bounds, an approver sees those that decide how far a record can move
the model, and states beyond any usable parameter are refused before a record is read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.client.consent.plan_summary import summarize_plan
from cotune.client.site import Site
from cotune.client.site_folder import SiteFile
from cotune.client.training.round import train_round
from cotune.data.config import DataConfig
from cotune.data.dataset import write_manifest
from cotune.errors import PlanError
from cotune.models.trainable import State, get_model
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.policy import Policy, dump_policy
from tests.support.failures import fails_with

LABELS = ("bad", "good")
EXTREME = [
    ("local", "learning_rate", 1e12),
    ("local", "head_learning_rate", 1e12),
    ("local", "weight_decay", 1e12),
    ("local", "momentum", 1.5),
    ("local", "batch_size", 1e12),
    ("local", "steps", 10**9),
    ("local", "epochs", 1e9),
    ("local", "physical_batch_size", 10**9),
    ("lora", "alpha", 1e12),
    ("lora", "rank", 10**6),
    ("privacy", "clip_norm", 1e12),
    ("privacy", "clip_norm", 1e-30),
    ("privacy", "epsilon", 1e6),
    ("client_privacy", "clip_norm", 1e12),
    ("server", "max_update_norm", 1e30),
    ("server", "deadline_seconds", 1e30),
    ("strategy", "server_optimizer", {"name": "sgd", "lr": 1e12}),
    ("strategy", "client_term", {"name": "proximal", "mu": 1e12}),
]


@pytest.fixture
def plan_of(base_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Plan]:
    source = tmp_path / "records.csv"
    rows = [f"the number {'great' if i % 2 else 'sad'} {i},{LABELS[i % 2]}" for i in range(40)]
    source.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")

    def make(**tables: Any) -> Plan:
        get_model.cache_clear()
        given: dict[str, Any] = {
            "labels": LABELS,
            "rounds": 2,
            "train": "full",
            "model": {"base": str(base_model("bert")), "max_length": 16, "precision": "float32"},
            "data": {"source": str(source)},
            "local": {"batch_size": 10, "steps": 2},
            "privacy": {"epsilon": 3.0},
        }
        return parse_plan(given | tables)

    return make


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folder = tmp_path / "site"
    write_manifest(folder / "data.json", DataConfig(source=str(tmp_path / "records.csv")), [(None, list(range(40)))])
    (folder / "site.json").write_text(SiteFile(organization="clinic", device="cpu").model_dump_json())
    (folder / "policy.toml").write_text(dump_policy(Policy.permissive()))
    return Site(folder)


def start(plan: Plan) -> State:
    model = get_plan_model(plan, "cpu")
    model.load({})
    return model.state(model.names("full", freeze_embeddings=True))


@pytest.mark.parametrize(("table", "key", "value"), EXTREME)
def test_no_plan_has_such_a_number(plan_of: Callable[..., Plan], table: str, key: str, value: Any) -> None:
    with pytest.raises(PlanError, match=key):
        plan_of(**{table: {key: value}})


@pytest.mark.parametrize("value", [1e12, 1e7, -1e12, float("inf"), float("nan")])
def test_no_such_state_reaches_a_record(plan_of: Callable[..., Plan], site: Site, value: float) -> None:
    plan = plan_of()
    state = start(plan)
    name = next(name for name in state if name.endswith("LayerNorm.weight"))
    state[name] = torch.full_like(state[name], value)
    with fails_with("run.extreme_values"):
        train_round(plan, site, 1, state)
    assert not site.ledger_file.exists()


def test_nor_does_what_is_sent_beside_it(plan_of: Callable[..., Plan], site: Site) -> None:
    plan = plan_of()
    state = start(plan)
    name = next(iter(state))
    with fails_with("run.extreme_values"):
        train_round(plan, site, 1, state, sent={name: torch.full_like(state[name], 1e7)})
    assert not site.ledger_file.exists()


def test_who_approves_a_plan_is_shown_what_moves_the_model(plan_of: Callable[..., Plan]) -> None:
    local = {"batch_size": 13, "steps": 17, "learning_rate": 0.123, "head_learning_rate": 4.56}
    plan = plan_of(local=local, privacy={"epsilon": 2.25, "delta": 3e-7, "clip_norm": 0.789}, server={"max_update_norm": 4321})
    shown = " ".join(summarize_plan(plan))
    for value in ("13", "17", "0.123", "4.56", "2.25", "3e-07", "0.789", "4321"):
        assert value in shown


def test_finite_rows_with_overflowing_sum_reveal_no_person(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    """In a state within all bounds each row's gradient is near 3e38, and that of a person with three rows is infinite.

    Clipped, it was not a number, and the round failed: a person was there exactly if the site refused.
    """
    lines = [f"p{i},the {word} it,{LABELS[i % 2]}" for i, word in enumerate(["great", "sad", "tree", "happy"] * 5)]
    person = ["z,the great it is,bad", "z,so very great,bad", "z,a great day,bad"]
    privacy = {"epsilon": 3.0, "unit": "pid", "max_records": 3}
    for folder, held in (("without", lines), ("with", lines + person)):
        source = tmp_path / f"{folder}.csv"
        source.write_text("\n".join(["pid,text,label", *held]) + "\n", encoding="utf-8")
        get_model.cache_clear()
        plan = parse_plan(
            {
                "labels": LABELS,
                "rounds": 1,
                "train": "full",
                "model": {"base": str(base_model("bert")), "max_length": 16, "precision": "float32"},
                "data": {"source": str(source), "unit": "pid"},
                "local": {"batch_size": 20, "steps": 1},  # every person is in it
                "privacy": privacy,
            }
        )
        site = tmp_path / folder
        write_manifest(site / "data.json", DataConfig(source=str(source), unit="pid"), [(None, list(range(len(held))))])
        (site / "site.json").write_text(SiteFile(organization="clinic", device="cpu").model_dump_json())
        (site / "policy.toml").write_text(dump_policy(Policy.permissive(examples=20)))
        state = {name: _steep(name, tensor) for name, tensor in start(plan).items()}
        assert max(float(tensor.abs().max()) for tensor in state.values()) <= 1e4
        assert train_round(plan, Site(site), 1, state).examples == 20


def _steep(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Weights with which a gradient grows to 3e38: through norms of constants, each a factor of 1e10."""
    if name.endswith("layer.0.attention.output.LayerNorm.weight"):
        return torch.zeros_like(tensor)
    if name.endswith("LayerNorm.weight"):
        return torch.full_like(tensor, 1e4)
    if name.endswith("pooler.dense.weight"):
        return torch.eye(len(tensor)) * 1e4
    if name.endswith(("intermediate.dense.weight", "output.dense.weight")) and "attention" not in name:
        return torch.eye(*tensor.shape) * 0.5
    steep = torch.zeros_like(tensor)
    if name == "classifier.weight":
        steep[0, 0::2] = -1e4
        steep[0, 1::2] = 1e4
    return steep
