"""Sequence-to-sequence models from a plan to an exported model: with ε, killed and continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from cotune.client.site import Site
from cotune.errors import ModelError, PlanError
from cotune.models.evaluation.predictor import open_predictor
from cotune.plan.load import parse_plan
from cotune.plan.schema import Plan
from cotune.simulations.run import Run, simulate
from tests.support.language_models import write_dialogs
from tests.support.paired_models import paired_model, pairs_table
from tests.support.processes import Cotune, play_whole_and_killed
from tests.support.simulations import final_model, merged, same, tensors_of

__all__ = ["paired_model"]  # fixtures
NewPlan = Callable[..., Plan]


@pytest.fixture(scope="module")
def new_plan(paired_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> NewPlan:
    source = write_dialogs(tmp_path_factory.mktemp("dialogs") / "dialogs.jsonl", 300)

    def make(kind: str = "t5", **changes: Any) -> Plan:
        return parse_plan(merged(pairs_table(kind, paired_model(kind), source), changes))

    return make


@pytest.fixture(scope="module")
def private(new_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = new_plan(simulation={"baselines": ["alone"]})
    return simulate(plan, tmp_path_factory.mktemp("private") / "run", device="cpu")


def test_a_private_run_learns_beyond_the_base_model(private: Run) -> None:
    test = private.summary.test
    assert test.federated
    assert test.majority
    assert test.federated.loss < test.majority.loss - 0.1, "the base model as it came"
    assert set(test.federated) == {"loss", "perplexity", "accuracy"}
    for organization in private.summary.organizations:
        assert Site(private.folder / "sites" / organization.name).ledger().spent()
        assert organization.epsilon_spent is not None
        assert 0 < organization.epsilon_spent <= 8.0
        assert organization.worth


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name
def test_plain_transformers_and_peft_load_what_comes_out(private: Run, new_plan: NewPlan) -> None:
    folder = private.folder / "model"
    base = AutoModelForSeq2SeqLM.from_pretrained(new_plan().model.base)
    whole = AutoModelForSeq2SeqLM.from_pretrained(folder)
    reader = AutoTokenizer.from_pretrained(folder)
    inputs = {**reader("the great day\n", return_tensors="pt"), "labels": reader("great the", return_tensors="pt").input_ids}
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        before = base(**inputs).logits
        expected = whole(**inputs).logits
        adapted = PeftModel.from_pretrained(base, folder / "adapter")
        torch.testing.assert_close(adapted(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_bytes())["task_type"] == "SEQ_2_SEQ_LM"
    written = whole.generate(input_ids=inputs["input_ids"], max_new_tokens=3, do_sample=False)
    assert written.shape[1] > 1
    assert "text2text-generation" in (folder / "README.md").read_text(encoding="utf-8")


def test_predicting_refuses_it_in_one_sentence(private: Run) -> None:
    with pytest.raises(ModelError) as raised:
        open_predictor(str(private.folder), "cpu")
    assert raised.value.code == "model.no_classifier"


@pytest.mark.crash
def test_a_killed_run_ends_as_if_it_had_not_been_killed(new_plan: NewPlan, cotune: Cotune, tmp_path: Path) -> None:
    plan = new_plan(privacy="none", simulation={"baselines": []})  # noise differs from run to run
    whole, run = play_whole_and_killed(cotune, plan, tmp_path)
    assert same(final_model(run), final_model(whole))
    assert tensors_of(run) == tensors_of(whole)


@pytest.mark.parametrize(
    "changes",
    [{"train": "head"}, {"labels": ["no", "yes"]}, {"data": {"prompt": None, "target": None}}, {"data": {"target": None}}],
)
def test_a_plan_that_does_not_fit_is_refused(new_plan: NewPlan, changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as raised:
        new_plan(**changes)
    assert raised.value.code == "plan.invalid"
