"""A language model through real processes, of which the server's hold no weights and are killed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from cotune.client.site import Site
from tests.support.deployment import deployment
from tests.support.language_models import dialogs, write_language_model
from tests.support.tiny_models import copy_without_weights

pytestmark = [pytest.mark.long, pytest.mark.crash]
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def write_prompts(file: Path, seed: int) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, ["prompt", "target"])
        table.writeheader()
        table.writerows(dialogs(60, seed))


def test_server_without_weights_writes_the_adapter_that_organizations_get(tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "models" / "base")
    small = copy_without_weights(base, tmp_path / "server" / "base")
    plan = {
        "task": "causal-lm",
        "train": "lora",
        "labels": [],
        "lora": {"targets": ["v_proj"], "factors": "ab", "rank": 2},
        "model": {"base": str(base), "pooling": "auto"},
        "data": {"source": "records.csv", "prompt": "prompt", "target": "target"},
        "privacy": {"epsilon": 8.0, "delta": 0.001},
    }
    options = {name: ("--model", str(base)) for name in ("north", "south")}
    with deployment(
        tmp_path / "fed", "north", "south", plan=plan, write=write_prompts, options=options, server_base=small
    ) as fed:
        fed.run()
        fed.wait(fed.reached("round_started", 2))
        fed.kill("serverapp")
        run = fed.finish()
        models = [fed.wait(lambda site=fed.site(name): list(site.glob("models/*/adapter"))) for name in options]
        killed = fed.events("run_started")
    assert len(killed) > 1, "it was begun again"
    assert not run.file.weights
    assert run.load().round == 3
    assert all(Site(fed.site(name)).ledger().spent() for name in options)
    assert not (run.path / "model").exists()
    for file in ADAPTER:
        written = (run.path / "adapter" / file).read_bytes()
        assert [(found[0] / file).read_bytes() == written for found in models] == [True, True], file
    assert not list(small.glob("*.safetensors"))
