"""Personal parts through real processes: what is kept survives a kill, never leaves, and makes each organization's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cotune.client.personalization.evaluation import evaluate_site
from cotune.client.site import Site
from cotune.client.training.personal.parameters import PERSONAL
from cotune.models.evaluation.predictor import load_finished
from cotune.plan.load import load_plan
from tests.support.deployment import bring_back, deployment

pytestmark = [pytest.mark.long, pytest.mark.crash]

NAMES = ("north", "south")


@pytest.mark.parametrize(
    "personal",
    [{"parts": ["adapter", "head"], "order": "own_first"}, {"method": "pfedme", "inner_steps": 2}],
    ids=["adapter and head first", "pfedme"],
)
def test_real_run_leaves_each_organization_its_own_model(tmp_path: Path, personal: Any) -> None:
    plan = {
        "train": "lora",
        "lora": {"rank": 2},
        "personal": personal,
        "privacy": {"epsilon": 8.0, "delta": 0.001},
        "local": {"batch_size": 32},
    }
    with deployment(tmp_path, *NAMES, plan=plan) as fed:
        fed.run()
        fed.wait(fed.reached("round_started", 2))
        fed.kill("south")
        bring_back(fed, "south")
        folder = fed.finish()
        fed.wait(lambda: all(list((fed.site(name) / "models").glob("*/cotune.json")) for name in NAMES))
    progress = folder.load()
    assert progress.round == 3
    assert not [event for event in fed.events("update_dropped", "update_quarantined") if "lost" not in event["reason"]]
    agreed = load_plan(tmp_path / "plan.toml")
    models = {}
    for name in NAMES:
        site = Site(fed.site(name))
        [model] = (file.parent for file in site.models.glob("*/cotune.json"))
        plan_id = json.loads((model / "cotune.json").read_text(encoding="utf-8"))["plan_id"]
        kept = site.load_newest_state(plan_id, PERSONAL)
        assert kept
        assert agreed.personal.keeps_copy or not kept.keys() & progress.state.keys()
        models[name] = load_file(model / "model.safetensors")
        assert torch.equal(models[name]["classifier.weight"], kept["classifier.weight"])
        assert evaluate_site(site)["model"] == str(model)  # what `client evaluate` prints
        assert load_finished(str(model), 16)[1] == agreed.labels  # what `predict` opens
    assert not torch.equal(models["north"]["classifier.weight"], models["south"]["classifier.weight"])
