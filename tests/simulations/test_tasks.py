"""Token and image classification from a plan to an exported model, on sets that a tiny model can learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, ResNetConfig, pipeline

from cotune.client.site import Site
from cotune.errors import ModelError
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.simulations.forecast.forecast import forecast
from cotune.simulations.prepare import prepare
from cotune.simulations.run import resume, simulate
from tests.support.datasets import COLORS, tagged, write_images, write_tagged
from tests.support.failures import fails_with
from tests.support.matrix import crossed
from tests.support.simulations import NewPlan
from tests.support.tiny_models import PROCESSOR

TAGS = ("B-BAD", "B-GOOD", "B-SO", "O")
PRIVATE = {"epsilon": 8.0, "delta": 1e-3}
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # transformers, reading an image processor
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="session")
def tags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tagged(tmp_path_factory.mktemp("tags") / "tags.jsonl")


@pytest.fixture(scope="session")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("colors") / "images", 90)


@pytest.fixture
def new_plan(base_model: Callable[[str], Path], tags: Path, colors: Path) -> Callable[..., Plan]:
    def make(task: str, /, **changes: Any) -> Plan:
        kind, source = ("bert", tags) if task == "token-classification" else ("vit", colors)
        return parse_plan(
            {
                "task": task,
                "rounds": 3,
                "privacy": "none",
                "model": {"base": str(base_model(kind)), "max_length": 16},
                "data": {"source": str(source)},
                "local": {"learning_rate": 2.0, "momentum": 0.9, "batch_size": 0.5, "steps": 6},
                "personalize": {"folds": 2},  # each fits a dozen heads
                "simulation": {"clients": 2, "partition": "iid", "min_examples": 10, "baselines": []},
                **changes,
            }
        )

    return make


def gain(summary: dict[str, Any]) -> float:
    return float(summary["test"]["federated"]["accuracy"] - summary["test"]["majority"]["accuracy"])


@pytest.mark.parametrize("privacy", ["none", PRIVATE])
def test_tags_are_learnt_and_the_model_is_a_plain_one(new_plan: Callable[..., Plan], tmp_path: Path, privacy: Any) -> None:
    local = {"learning_rate": 0.5, "momentum": 0.9, "batch_size": 0.5, "steps": 10}
    plan = new_plan("token-classification", train="lora", local=local, privacy=privacy)
    result = simulate(plan, tmp_path / "run", device="cpu")
    assert result.summary["labels"] == list(TAGS)
    assert gain(result.summary) > 0.05
    words = [len(w) for w, _ in tagged(240)]
    assert sum(sum(o["labels"].values()) for o in result.summary["organizations"]) < sum(words)  # words, not records
    twice = 1 if privacy != "none" else 0  # one text is there twice, and counts once where something is promised to it
    assert sum(o["examples"] for o in result.summary["organizations"]) + result.summary["test"]["examples"] == 240 - twice
    if privacy == "none":
        predict_tags = pipeline("token-classification", str(result.folder / "model"), ignore_labels=[])
        said = {entry["word"]: entry["entity"] for entry in predict_tags("the great table is awful")}
        assert list(said) == ["the", "great", "table", "is", "awful"]
        assert set(said.values()) <= set(TAGS)
    else:
        assert all(0 < o["epsilon_spent"] <= 8.0 for o in result.summary["organizations"])


@pytest.mark.parametrize("train", ["head", "full"])
def test_colors_are_learnt_and_the_model_is_a_plain_one(
    new_plan: Callable[..., Plan], tmp_path: Path, colors: Path, train: str
) -> None:
    local = {"learning_rate": 0.5 if train == "head" else 0.1, "momentum": 0.9, "batch_size": 0.5, "steps": 6}
    result = simulate(new_plan("image-classification", train=train, local=local, privacy=PRIVATE), tmp_path / "run", device="cpu")
    assert result.summary["labels"] == sorted(COLORS)
    assert gain(result.summary) > 0.3
    classify = pipeline("image-classification", str(result.folder / "model"))
    right = 0
    for file in sorted(colors.rglob("*.png"))[:20]:
        with Image.open(file) as image:
            right += classify(image)[0]["label"] == file.parent.name
    assert right >= 12


def test_the_baselines_of_a_tagger(new_plan: Callable[..., Plan], tmp_path: Path) -> None:
    simulation = {"clients": 2, "partition": "dirichlet:1.0", "min_examples": 20}
    personalize = {"folds": 2, "methods": ["prior", "mix", "alone"]}
    plan = new_plan("token-classification", rounds=1, simulation=simulation, personalize=personalize)
    summary = simulate(plan, tmp_path / "run", device="cpu").summary
    assert set(summary["test"]["alone"]["each"]) == {"org-1", "org-2"}
    assert summary["test"]["pooled"]["accuracy"] > summary["test"]["majority"]["accuracy"]
    assert summary["test"]["majority"]["precision"] == pytest.approx(summary["test"]["majority"]["accuracy"] / 4)
    for organization in summary["organizations"]:
        own = organization["own"]
        assert all(own[column] is not None for column in ("alone", "alone_without_privacy", "federated", "adapted"))
        assert organization["adaptation"]["method"] in organization["adaptation"]["tried"]
        assert organization["worth"]["joined"] == "adapted"


def test_organizations_as_folders_of_images(new_plan: Callable[..., Plan], tmp_path: Path) -> None:
    for seed, name in enumerate(("east.wing", "west")):
        write_images(tmp_path / "orgs" / name, 30 + 6 * seed, seed)
    plan = new_plan("image-classification", data={"source": str(tmp_path / "orgs")}, rounds=1)
    result = simulate(plan, tmp_path / "run", device="cpu")
    assert {o["name"] for o in result.summary["organizations"]} == {"east.wing", "west"}
    site = Site(result.folder / "sites" / "west").dataset(tuple(sorted(COLORS)))
    assert site.task == "image-classification"
    assert len(set(site.identities())) == len(site)
    assert resume(result.folder).summary["test"]["federated"] == result.summary["test"]["federated"]


@pytest.mark.parametrize(("train", "task"), crossed(["head", "lora", "full"], ["token-classification", "image-classification"]))
def test_a_plan_is_forecast(new_plan: Callable[..., Plan], task: str, train: str) -> None:
    seen = forecast(new_plan(task, train=train, privacy=PRIVATE), "cpu")
    assert seen.time is not None
    assert 0 < seen.time.seconds.low <= seen.time.seconds.high
    assert [o.name for o in seen.organizations] == ["org-1", "org-2"]
    assert all(o.epsilon_planned is not None and o.epsilon_planned <= 8.0 for o in seen.organizations)


# --- what cannot be trained is said before anything is


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    AutoModel.from_config(config).save_pretrained(tmp_path / "resnet")
    (tmp_path / "resnet" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return tmp_path / "resnet"


@pytest.mark.parametrize("train", ["head", "full"])
def test_batch_norm_under_privacy(new_plan: Callable[..., Plan], resnet: Path, train: str) -> None:
    plan = new_plan("image-classification", model={"base": str(resnet)}, train=train, privacy=PRIVATE)
    for check in (prepare, forecast):
        with fails_with("privacy.batch_norm"):
            check(plan, "cpu")
    prepare(plan.model_copy(update={"privacy": "none"}), "cpu")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["word_embeddings"]}, "lora.targets names the embedding bert.embeddings.word_embeddings"),
        ({"targets": ["key", "word_embeddings"]}, "lora.targets names the embedding bert.embeddings.word_embeddings"),
        ({"targets": ["q_proj"]}, "matches no linear module of bert"),
        ({"layers": 7}, "lora.layers = 7, but the modules to adapt lie in 2 layers"),
    ],
)
def test_adapters_that_cannot_be_had(new_plan: Callable[..., Plan], lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        prepare(new_plan("token-classification", train="lora", lora=lora), "cpu")


def test_a_task_that_the_data_are_not_for(new_plan: Callable[..., Plan], tags: Path, base_model: Callable[[str], Path]) -> None:
    with fails_with("data.wrong_type", "text", "1"):
        prepare(new_plan("token-classification", task="sequence-classification"), "cpu")


# --- from a trained head on


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_adapters_start_from_the_trained_head(toy_plan: NewPlan, tmp_path: Path, method: str) -> None:
    """B = 0: a round of LoRA that hardly moves leaves the model as the head's stage ended, and far from where that began."""
    still = {"learning_rate": 1e-12, "momentum": 0.0}
    stages = [{"mode": "head", "rounds": 2}, {"mode": "lora", "rounds": 1, "local": still}]
    plan = toy_plan(train=stages, lora={"rank": 2, "method": method}, simulation={"baselines": []})
    result = simulate(plan, tmp_path / "run", device="cpu")
    _, head, adapted = (load_file(file) for file in sorted((result.folder / "checkpoints").glob("*.safetensors")))
    assert {name.split("/")[-1].split(".")[0] for name in head} == {"classifier"}
    assert adapted.keys() - head.keys() == {name for name in adapted if ".lora_B." in name}
    assert adapted.keys() - head.keys()
    for name, tensor in adapted.items():
        torch.testing.assert_close(tensor, head.get(name, torch.zeros_like(tensor)), atol=1e-9, rtol=1e-6)
    before, after = (entry["metrics"] for entry in result.summary["rounds"][1:])
    assert before == after
    assert before["accuracy"] > result.summary["test"]["majority"]["accuracy"] + 0.2


def test_a_fine_tuned_model_goes_on_with_its_head(toy_plan: NewPlan, tmp_path: Path) -> None:
    """What a run exports is the base of the next: with the same labels it starts as good as the first one ended."""
    first = simulate(toy_plan(simulation={"baselines": []}), tmp_path / "first", device="cpu")
    base = {"base": str(first.folder / "model")}
    still = {"learning_rate": 1e-6, "momentum": 0.0}
    again = simulate(toy_plan(model=base, local=still, rounds=1, simulation={"baselines": []}), tmp_path / "again", device="cpu")
    assert again.summary["rounds"][0]["metrics"] == pytest.approx(first.summary["rounds"][-1]["metrics"])
    other = {"model": base, "labels": ["so", "good", "bad"]}
    assert prepare(toy_plan(model=base)).plan.labels == tuple(first.summary["labels"])
    weights = [
        get_plan_model(prepare(toy_plan(**changes)).plan, "cpu").state(["classifier.weight"])
        for changes in ({"model": base}, other)
    ]
    kept = load_file(first.folder / "model" / "model.safetensors")["classifier.weight"]
    assert torch.equal(weights[0]["classifier.weight"], kept)
    assert not torch.isin(weights[1]["classifier.weight"], kept).any()
