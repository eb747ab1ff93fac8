"""Predictions instead of parameters, through real processes: unlike models, kills, and an organization with other public inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig, BertConfig, DistilBertConfig, DistilBertModel

from cotune.client.audit_log import AuditLog
from cotune.plan.public import SCORES
from cotune.server.runs.run_model import STUDENT
from tests.support.deployment import Deployment, bring_back, deployment
from tests.support.loopback import write_model, write_sentences

pytestmark = [pytest.mark.long, pytest.mark.crash]

EVERYTHING = ("trainer:north", "south", "serverapp", "run", "server")
ROUNDS = len(EVERYTHING)


def write_distilbert(folder: Path) -> Path:
    """Another architecture, with the words of the plan's base model."""
    write_model(folder)
    words = BertConfig.from_pretrained(folder).vocab_size
    config = DistilBertConfig(vocab_size=words, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32)
    for old in (*folder.glob("*.safetensors"), folder / "config.json"):
        old.unlink()
    DistilBertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """West has other public inputs than the plan."""
    folder = tmp_path_factory.mktemp("predictions")
    public = write_sentences(folder / "public.csv", 7)
    own = write_distilbert(folder / "distilbert")
    plan = {
        "collaboration": "predictions",
        "rounds": ROUNDS,
        "public": {"source": str(public), "learning_rate": 0.05, "epochs": 5, "license": "CC0-1.0"},
        "strategy": {"weighting": "uniform", "fusion": "mean"},
        "local": {"steps": 4},
    }
    options = {
        "north": ("--public", str(public)),
        "south": ("--public", str(public), "--own-model", str(own)),
    }
    with deployment(folder, "north", "south", plan=plan, options=options) as made:
        yield made


def model_of(fed: Deployment) -> dict[str, bytes]:
    """What all have said together, and the model that has learned it, bit by bit."""
    progress = fed.finish().load()
    held = {**progress.state, **progress.memory}
    assert SCORES in held
    assert any(name.startswith(STUDENT) for name in held)
    return {name: tensor.numpy().tobytes() for name, tensor in held.items()}


def test_kills_change_nothing_of_what_is_learned(fed: Deployment) -> None:
    fed.run()
    expected = model_of(fed)
    fed.run("--set", "seed=7", "--set", f"rounds={ROUNDS}")
    for round, what in enumerate(EVERYTHING, start=1):
        fed.wait(fed.reached("round_started", round))
        fed.kill(what)
        bring_back(fed, what)
    assert model_of(fed) == expected
    history = fed.newest().load().history
    assert [entry.participants for entry in history] == [["north", "south"]] * ROUNDS
    summary = json.loads((fed.newest().path / "summary.json").read_text(encoding="utf-8"))
    assert summary["test"]["federated"]["accuracy"] > 0.4
    assert summary["collaboration"] == "predictions"


def test_members_get_the_student_and_keep_their_own(fed: Deployment) -> None:
    fed.wait(lambda: len(fed.events("delivered")) >= 2)
    kinds = {"north": "bert", "south": "distilbert"}
    for name, kind in kinds.items():
        models = fed.site(name) / "models"
        [own] = models.glob("*-own")
        [student] = [path for path in models.iterdir() if path.is_dir() and not path.name.endswith("-own")]
        assert AutoConfig.from_pretrained(own).model_type == kind
        assert AutoConfig.from_pretrained(student).model_type == "bert"
        lines = AuditLog(fed.site(name)).file.read_text(encoding="utf-8").splitlines()
        sent = [entry["records"] for entry in map(json.loads, lines) if entry["what"] == "update"]
        answers = fed.newest().plan.public.answers
        assert sent
        assert all(sizes.keys() == {"delta", "update"} and sizes["delta"] < 4 * 2 * answers + 1000 for sizes in sent)
