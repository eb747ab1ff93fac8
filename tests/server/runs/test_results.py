"""What a coordinator writes at the end of a run: what it knows, and not a word more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from cotune.data.dataset import DatasetManifest
from cotune.models.evaluation.test_set import evaluate
from cotune.protocol.messages import Request
from cotune.server.app import train_rounds
from cotune.server.deployment.new_run import create_run
from cotune.server.runs.events import read_events
from cotune.server.runs.results import finalize_run
from cotune.server.runs.run_folder import RunFolder
from cotune.server.runs.run_model import final_params, load_run_model
from tests.support.datasets import sentences, write_csv
from tests.support.federations import founded
from tests.support.html import Page
from tests.support.language_models import dialogs, language_model, write_dialogs
from tests.support.organizations import Answer, update
from tests.support.unreliable_grid import wild

__all__ = ["language_model"]  # fixtures
Base = Callable[[str], Path]
Summary = dict[str, Any]
NOT_KNOWN = {
    *("examples", "labels", "alone", "personal", "gain", "delta", "noise_multiplier", "sample_rate", "steps", "own"),
    *("common", "worth", "adaptation"),
    "epsilon_all_models",
}


def stating(*epsilon: float | None) -> Answer:
    """An organization that states an ε in each round; of a round without one, it does not train."""

    def answer(request: Request) -> Any:
        stated = epsilon[request.round - 1]
        if stated == -1:
            raise ValueError("no")
        generator = torch.Generator().manual_seed(request.round)
        delta = {name: 0.3 * torch.randn(t.shape, generator=generator) for name, t in request.state.items()}
        return update(request, delta, epsilon=stated)

    return answer


@pytest.fixture
def played(tmp_path: Path, base_model: Base) -> Callable[..., RunFolder]:
    """(records of the test set, changes of the plan) -> a run of zurich and basel, of which basel misses the second round."""

    def play(records: int = 0, **changes: Any) -> RunFolder:
        test = write_csv(tmp_path / "test.csv", sentences(records)) if records else None
        made = founded(
            tmp_path / "fed", base_model("bert"), "zurich", "basel", test=test, **{"server": {"quorum": 0.5}, **changes}
        )
        folder = create_run(made, name="one")
        private = folder.plan.privacy != "none"
        answers = {
            "zurich": stating(*(1.001, 2.5) if private else (None, None)),
            "basel": stating(*(0.75, -1) if private else (None, -1)),
        }
        model = load_run_model(folder)
        document = folder.path / "test" / "data.json"
        held = DatasetManifest.read(document, folder.plan.labels) if records else None
        judge = lambda state: evaluate(model, state, held, "float32") if held else None  # noqa: E731
        train_rounds(wild(folder, answers), folder, model, judge)
        return folder

    return play


def test_of_organizations_it_knows_what_they_sent_and_stated(played: Callable[..., RunFolder]) -> None:
    folder = played(privacy={"epsilon": 8.0})
    (folder.path / "delivered.json").write_text(json.dumps({"zurich": "2026-01-01T00:00:00+00:00"}))
    summary = finalize_run(folder)
    zurich, basel = summary["organizations"]
    assert {key for key in zurich if zurich[key] is None} == NOT_KNOWN
    assert (zurich["epsilon_spent"], zurich["epsilon_allowed"], zurich["rounds"], zurich["dropped"]) == (2.5, 8.0, 2, 0)
    assert (basel["epsilon_spent"], basel["epsilon_allowed"], basel["rounds"], basel["dropped"]) == (0.75, 8.0, 1, 1)
    assert zurich["bytes_up"] == 2 * (basel["bytes_up"] + 1)  # its name is one letter longer
    assert zurich["bytes_up"] + basel["bytes_up"] == summary["bytes"]["up"]
    assert (zurich["delivered"], basel["delivered"]) == (True, False)
    assert (summary["engine"], summary["status"], summary["federation"]) == ("superlink", "finished", folder.file.federation)
    assert json.loads((folder.path / "summary.json").read_bytes()) == summary
    assert read_events(folder.events.path)[-1]["event"] == "run_finalized"


def test_without_a_test_set_nobody_claims_an_accuracy(played: Callable[..., RunFolder]) -> None:
    folder = played(privacy={"epsilon": 8.0})
    summary = finalize_run(folder)
    assert summary["test"] == {
        "examples": 0,
        **dict.fromkeys(["majority", "alone", "alone_without_privacy", "federated", "adapted", "pooled"]),
    }
    page = Page((folder.path / "report.html").read_text(encoding="utf-8"))
    assert "Not measured: the coordinator has no test set, so nobody knows how good the federated model is." in page.text
    for claim in ("worth joining", "beats", "Gain", "test examples", "this simulation", "None", "Macro precision"):
        assert claim not in page.text, claim
    assert page.row("zurich")[:3] == ["2 of 2", "100.0 %", "2.50 of 8.00"]
    assert page.row("basel")[:3] == ["1 of 2", "50.0 %", "0.75 of 8.00"]


def test_test_set_compares_the_model_with_the_best_constant(played: Callable[..., RunFolder]) -> None:
    folder = played(90)
    summary = finalize_run(folder)
    labels = [label for _, label in sentences(90)]
    most = max(labels.count(label) for label in set(labels))
    assert summary["test"]["majority"]["accuracy"] == pytest.approx(most / 90)
    assert summary["test"]["federated"] == folder.load().history[-1]["metrics"]
    assert summary["test"]["examples"] == 90
    page = Page((folder.path / "report.html").read_text(encoding="utf-8"))
    assert "Measured: the federated model reaches" in page.text
    assert "always giving the most frequent label of the test set." in page.text
    assert "No differential privacy: nothing bounds what this run reveals" in page.text


def test_language_model_writes_after_prompts_of_the_test_file(language_model: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    test = write_dialogs(tmp_path / "test.jsonl", 12)
    texts = {"labels": [], "task": "causal-lm", "train": "lora", "generate": {"examples": 5, "max_new_tokens": 3}}
    data = {"source": "nowhere.jsonl", "prompt": "prompt", "target": "target"}
    made = founded(
        tmp_path / "fed", language_model(), "zurich", "basel", test=test, data=data, lora={"targets": ["v_proj"]}, **texts
    )
    folder = create_run(made, name="one")
    model = load_run_model(folder)
    held = DatasetManifest.read(folder.path / "test" / "data.json", folder.plan.labels)
    answers = {"zurich": stating(None, None), "basel": stating(None, None)}
    train_rounds(wild(folder, answers), folder, model, lambda state: evaluate(model, state, held, "float32"))
    written = finalize_run(folder).test.written
    assert written
    assert (written.examples, set(written.figures)) == (5, {"first_sentence", "base", "federated"})
    known = {record["prompt"] for record in dialogs(12)}
    assert {each["prompt"] for each in written.shown} <= known
    assert len(written.shown) == 5


def test_the_exported_model_is_the_served_one(played: Callable[..., RunFolder]) -> None:
    folder = played(30)
    finalize_run(folder)
    served = pipeline("text-classification", str(folder.path / "model"))
    texts = [text for text, _ in sentences(30)]
    told = [folder.plan.labels.index(answer["label"]) for answer in served(texts)]
    truth = [folder.plan.labels.index(label) for _, label in sentences(30)]
    right = sum(a == b for a, b in zip(told, truth, strict=True)) / 30
    assert final_params(folder.plan, folder.load())
    assert right == pytest.approx(folder.load().history[-1]["metrics"]["accuracy"])


def test_epsilon_is_said_to_be_stated(played: Callable[..., RunFolder]) -> None:
    text = " ".join(finalize_run(played(privacy={"epsilon": 8.0}))["privacy"]["statement"])
    assert "the highest stated is 2.50" in text
    assert "cannot check it" in text
    assert "baselines" not in text
    assert "simulation" not in text


def test_concluding_again_writes_the_same(played: Callable[..., RunFolder]) -> None:
    folder = played(privacy={"epsilon": 8.0})
    first = finalize_run(folder)
    second = finalize_run(folder)
    assert {**first, "peak_memory_bytes": 0} == {**second, "peak_memory_bytes": 0}
