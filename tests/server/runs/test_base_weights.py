"""A server that holds a base model's configuration and tokenizer alone: the same run, and a refusal at the start of what it cannot do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from cotune.models.trainable import get_model
from cotune.protocol.messages import Request
from cotune.server.app import train_rounds
from cotune.server.deployment.federation import FederationFolder, write_config
from cotune.server.deployment.new_run import create_run
from cotune.server.runs.base_weights import describe_weights, holds_weights
from cotune.server.runs.events import read_events
from cotune.server.runs.results import finalize_run
from cotune.server.runs.run_folder import Progress, RunFolder
from cotune.server.runs.run_model import load_run_model
from tests.support.datasets import sentences, write_csv
from tests.support.failures import fails_with
from tests.support.federations import founded
from tests.support.language_models import language_model
from tests.support.organizations import Answer, update
from tests.support.tiny_models import copy_without_weights
from tests.support.unreliable_grid import wild

__all__ = ["language_model"]  # fixtures
MEASURED = ("seconds", "peak_memory_bytes", "created", "federation", "reproduce")
WRITER = {
    "task": "causal-lm",
    "train": "lora",
    "labels": [],
    "lora": {"targets": ["v_proj"], "factors": "ab", "rank": 2},
    "data": {"source": "nowhere.jsonl", "prompt": "prompt", "target": "target"},
}
ADAPTED = {"train": "lora", "lora": {"rank": 2}}


def moving(seed: int) -> Answer:
    """An organization whose deltas follow from the round."""

    def answer(request: Request) -> Any:
        generator = torch.Generator().manual_seed(10 * request.round + seed)
        return update(
            request, {name: 0.3 * torch.randn(t.shape, generator=generator) for name, t in sorted(request.state.items())}
        )

    return answer


@pytest.fixture
def both(
    tmp_path: Path, base_model: Callable[[str], Path], language_model: Callable[..., Path]
) -> Callable[..., tuple[Any, Any]]:
    """(changes of the plan) -> federations of the same plan, the server of the second without weights."""

    def make(**changes: Any) -> tuple[FederationFolder, FederationFolder]:
        base = language_model() if changes.get("task") == "causal-lm" else base_model("bert")
        model = {"max_length": 16, **changes.pop("model", {})}
        place = shutil.copytree(base, tmp_path / "whole" / "base")
        pins = find_base(ModelConfig(base=str(place))).pins
        small = copy_without_weights(place, tmp_path / "small" / "base")
        made = [
            founded(tmp_path / name, where, "zurich", "basel", **changes, model={**model, "base": str(where), **pins})
            for name, where in (("a", place), ("b", small))
        ]
        return made[0], made[1]

    return make


class Killed(BaseException):
    pass


def play(folder: RunFolder, killed_in: int = 0) -> Progress:
    """Play the rounds that are left, as a process that knows nothing of what was before; it ends within a round if one is given."""
    get_model.cache_clear()

    def evaluate(state: Any) -> None:
        if folder.last_round + 1 == killed_in:
            raise Killed

    answers = {"zurich": moving(1), "basel": moving(2)}
    return train_rounds(wild(folder, answers), folder, load_run_model(folder), evaluate)


def assert_same_model(whole: RunFolder, small: RunFolder) -> None:
    """Bit for bit."""
    ends = [folder.load() for folder in (whole, small)]
    assert ends[0].round == ends[1].round == whole.plan.rounds
    for name in ("state", "memory"):
        tensors = [getattr(end, name) for end in ends]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def assert_same_summary(whole: RunFolder, small: RunFolder) -> None:
    """But for what was measured."""
    said = [finalize_run(folder).as_json() for folder in (whole, small)]
    for summary in said:
        for key in MEASURED:
            summary.pop(key)
        for entry in summary["rounds"]:
            entry.pop("seconds")
    assert said[0] == said[1]


@pytest.mark.parametrize("changes", [{}, ADAPTED, WRITER], ids=["head", "lora and head", "language model"])
def test_run_is_the_same_without_weights(both: Callable[..., Any], changes: dict[str, Any]) -> None:
    runs = [create_run(federation, name="one") for federation in both(**changes)]
    assert [run.file.weights for run in runs] == [True, False]
    assert runs[0].plan.plan_id == runs[1].plan.plan_id
    for run in runs:
        play(run)
    assert not load_run_model(runs[1]).loaded.folder.has_weights
    assert_same_model(*runs)
    assert_same_summary(*runs)
    assert (runs[0].path / "model").is_dir()
    assert not (runs[1].path / "model").exists()
    assert (runs[1].path / "adapter").is_dir() == (changes is WRITER)


def test_run_goes_on_without_weights_to_the_same_end(both: Callable[..., Any]) -> None:
    runs = [create_run(federation, name="one") for federation in both(**ADAPTED)]
    play(runs[0])
    with pytest.raises(Killed):
        play(runs[1], killed_in=2)
    assert runs[1].last_round == 1
    play(RunFolder(runs[1].path))
    assert_same_model(*runs)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft, about its own affairs
def test_adapter_is_the_one_of_the_whole_export_and_peft_loads_it(both: Callable[..., Any]) -> None:
    federations = both(**WRITER)
    runs = [create_run(federation, name="one") for federation in federations]
    for run in runs:
        play(run)
        finalize_run(run)
    whole = runs[0].path / "model"
    alone = runs[1].path / "adapter"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (alone / file).read_bytes() == (whole / "adapter" / file).read_bytes()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (alone / file).read_bytes() == (whole / file).read_bytes()
    assert json.loads((alone / "adapter_config.json").read_bytes())["base_model_name_or_path"] == "base"
    assert str(runs[1].plan.model.base_hash) in (alone / "README.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(alone)("the great day", return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(federations[0].config.base)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(whole)(ids).logits
        torch.testing.assert_close(PeftModel.from_pretrained(base, str(alone))(input_ids=ids).logits, expected)


@pytest.mark.parametrize("changes", [{}, WRITER], ids=["head", "language model"])
def test_coordinator_is_told_at_the_start_and_at_the_end(both: Callable[..., Any], changes: dict[str, Any]) -> None:
    whole, small = (create_run(federation, name="one") for federation in both(**changes))
    sentence = describe_weights(Path(small.file.base), held=False)
    assert sentence in notes(small)
    assert small.file.base in sentence
    play(small)
    before = notes(small)
    finalize_run(small)
    (told,) = notes(small)[len(before) :]
    assert ("adapter/" if changes else "checkpoints/") in told
    assert sentence not in notes(whole)


def notes(run: RunFolder) -> list[str]:
    return [event["text"] for event in read_events(run.events.path) if event["event"] == "note"]


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "full"},
        {"train": "blocks", "layers": 1},
        {"train": [{"mode": "head", "rounds": 1}, {"mode": "full", "rounds": 1}]},
        {"train": "lora", "lora": {"factors": "ab"}, "strategy": {"fusion": "flora"}},
    ],
    ids=["full", "blocks", "full in the second stage", "a fusion that changes the weights"],
)
def test_plan_whose_state_begins_with_the_base_is_refused(
    both: Callable[..., Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    with fails_with("model.weights_needed"):
        both(**changes)
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "a").exists()


def test_set_is_refused_as_the_federation_would_be(both: Callable[..., Any], tmp_path: Path) -> None:
    _, small = both()
    with fails_with("model.weights_needed"):
        create_run(small, ["train=full"])
    assert not any(small.files.runs.iterdir())
    test = write_csv(tmp_path / "test.csv", sentences(30))
    write_config(small.path, small.config.model_copy(update={"test": test}))
    with fails_with("model.weights_needed"):
        create_run(FederationFolder(small.path))


def test_weights_that_are_gone_later_are_missed(both: Callable[..., Any]) -> None:
    """A run that was begun with them does not go on without: they are gone by accident. A new one says so."""
    whole, _ = both()
    run = create_run(whole, name="one")
    for file in whole.config.base.glob("*.safetensors"):
        file.unlink()
    with fails_with("model.missing_weights"):
        play(run)
    assert describe_weights(whole.config.base, held=False) in notes(create_run(whole, name="two"))


def test_weights_that_come_later_are_used(both: Callable[..., Any]) -> None:
    """The run is the same, and the final model is written whole."""
    whole, small = both()
    run = create_run(small, name="one")
    shutil.copy(whole.config.base / "model.safetensors", small.config.base)
    play(run)
    finalize_run(run)
    assert (run.path / "model" / "model.safetensors").is_file()


def test_files_that_change_after_the_start_are_noticed(both: Callable[..., Any]) -> None:
    _, small = both()
    run = create_run(small, name="one")
    config = small.config.base / "config.json"
    config.write_bytes(config.read_bytes() + b" ")
    with fails_with("model.other_config"):
        play(run)
    with fails_with("model.other_config"):
        create_run(small, name="two")


@pytest.mark.parametrize("base", ["package:cotune_encoder", "some/model", "folder:base", "/nowhere"])
def test_what_is_no_folder_is_left_to_who_fetches_it(base: str) -> None:
    assert holds_weights(base)
