"""Language models from a plan to an exported model: with ε, alone and together, killed and continued."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotune.client.site import Site
from cotune.errors import PlanError, PrivacyError
from cotune.plan.load import dump_plan, load_plan, parse_plan
from cotune.plan.plan import Plan
from cotune.plan.required_classes import require_classes
from cotune.plan.trained_parameters import get_plan_model
from cotune.reporting.documents.summary import RunSummary
from cotune.reporting.verdict import conclude_verdict
from cotune.simulations.comparison.compare import compare
from cotune.simulations.prepare import prepare
from cotune.simulations.run import Run, simulate
from tests.support.chats import word_tokenizer, write_chat_model
from tests.support.language_models import language_model, write_dialogs
from tests.support.processes import Cotune, play_whole_and_killed
from tests.support.simulations import final_model, merged, same, tensors_of

__all__ = ["language_model"]  # fixtures
NewPlan = Callable[..., Plan]
PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dialogs(tmp_path_factory.mktemp("dialogs") / "dialogs.jsonl", 400)


@pytest.fixture(scope="module")
def new_plan(language_model: Callable[..., Path], records: Path) -> NewPlan:
    def make(*, tied: bool = False, **changes: Any) -> Plan:
        table: dict[str, Any] = {
            "name": "dialogs",
            "task": "causal-lm",
            "train": "lora",
            "rounds": 2,
            "privacy": PRIVATE,
            "model": {"base": str(language_model("llama", tied=tied)), "max_length": 16, "precision": "float32"},
            "data": {"source": str(records), "prompt": "prompt", "target": "target"},
            "lora": {"rank": 4, "factors": "ab", "targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
            "local": {"learning_rate": 0.02, "optimizer": "adam", "batch_size": 0.25, "steps": 4, "physical_batch_size": 64},
            "simulation": {"clients": 2, "partition": "iid", "min_examples": 10},
        }
        return parse_plan(merged(table, changes))

    return make


@pytest.fixture(scope="module")
def private(new_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    writing = {"generate": {"examples": 12, "max_new_tokens": 4}} if find_spec("sacrebleu") and find_spec("rouge_score") else {}
    return simulate(new_plan(rounds=3, **writing), tmp_path_factory.mktemp("private") / "run", device="cpu")


def test_a_private_run_learns_beyond_the_base_model(private: Run) -> None:
    test = private.summary.test
    assert test.federated
    assert test.majority
    assert test.alone
    assert test.federated.loss < test.majority.loss - 0.02, "the unchanged base model"
    assert test.federated.loss < test.alone.mean.loss + 0.05  # at this size as good as alone, with or without noise
    assert set(test.federated) == {"loss", "perplexity", "accuracy"}
    for organization in private.summary.organizations:
        spent = Site(private.folder / "sites" / organization.name).ledger().spent()
        assert spent
        assert organization.epsilon_spent is not None
        assert 0 < organization.epsilon_spent <= 8.0


def test_the_verdict_is_about_the_loss(private: Run) -> None:
    found = conclude_verdict(private.summary)
    assert "nats per token" in found.sentence
    assert "base model" in " ".join(found.notes)
    page = (private.folder / "report.html").read_text(encoding="utf-8")
    assert "Token accuracy" in page
    assert "Macro" not in page
    for organization in private.summary.organizations:
        assert organization.own
        assert organization.own.federated
        assert organization.worth
        low, high = organization.own.federated.loss_interval
        assert low <= organization.own.federated.loss <= high
        other = organization.own[organization.worth.against]
        assert organization.worth.difference == pytest.approx(other.loss - organization.own.federated.loss)


def test_the_report_shows_what_the_models_write(private: Run) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    written = private.summary.test.written
    assert written
    assert written.examples == 12
    assert written.left_out == 0
    assert set(written.figures) == {"first_sentence", "base", "federated", "alone", "alone_without_privacy", "pooled"}
    assert all(0 <= value <= 1 for figures in written.figures.values() for value in figures.values())
    assert len(written.shown) == 10
    page = (private.folder / "report.html").read_text(encoding="utf-8")
    assert "What the models write" in page
    model = AutoModelForCausalLM.from_pretrained(private.folder / "model")
    reader = AutoTokenizer.from_pretrained(private.folder / "model")
    for each in written.shown:  # plain transformers writes the same with the model that comes out
        ids = reader(each["prompt"] + "\n", return_tensors="pt").input_ids
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert reader.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip() == each["federated"]


@pytest.mark.parametrize("data", [{"text": "prompt"}, {"prompt": "prompt", "target": "target"}])
def test_writing_without_prompts_is_refused(data: dict[str, str]) -> None:
    task = "causal-lm" if "text" in data else "sequence-classification"
    table = {"task": task, "train": "lora", "generate": {}, "model": {"base": "x"}, "data": {"source": "y", **data}}
    with pytest.raises(PlanError) as raised:
        parse_plan(table)
    assert raised.value.code == "plan.invalid"


def test_plain_transformers_loads_and_writes_with_what_comes_out(private: Run, new_plan: NewPlan) -> None:
    plan = new_plan()
    folder = private.folder / "model"
    merged = AutoModelForCausalLM.from_pretrained(folder)
    reader = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(plan.model.base)
    ids = reader("the great day\n", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = merged(ids).logits
        assert not torch.allclose(base(ids).logits, expected, atol=1e-4)
    written_tokens = merged.generate(ids, max_new_tokens=3, do_sample=False)
    assert written_tokens.shape[1] > ids.shape[1]
    assert "text-generation" in (folder / "README.md").read_text(encoding="utf-8")
    assert str(Path(plan.model.base).parent) not in (folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8")


def test_what_is_told_of_texts_that_are_cut(new_plan: NewPlan) -> None:
    prepared = prepare(new_plan(model={"max_length": 4}), "cpu")
    assert prepared.left_out["target cut off"] > 0
    assert prepared.left_out["cut at 4 tokens"] > prepared.left_out["target cut off"]


@pytest.mark.crash
def test_a_killed_run_ends_as_if_it_had_not_been_killed(new_plan: NewPlan, cotune: Cotune, tmp_path: Path) -> None:
    plan = new_plan(privacy="none", simulation={"baselines": []})  # noise differs from run to run
    whole, run = play_whole_and_killed(cotune, plan, tmp_path)
    assert same(final_model(run), final_model(whole))
    assert tensors_of(run) == tensors_of(whole)
    one, other = (json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in (run, whole))
    assert one["test"] == other["test"]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (run / "model" / "adapter" / file).read_bytes() == (whole / "model" / "adapter" / file).read_bytes()


# --- what a language model cannot have is refused


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "head"},
        {"labels": ["no", "yes"]},
        {"class_weights": {"no": 0.5}},
        {"disclosures": {"label_histogram": True}},
    ],
)
def test_what_is_for_classes_is_refused(new_plan: NewPlan, changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as raised:
        new_plan(**changes)
    assert raised.value.code == "plan.invalid"


def test_a_partition_by_classes_is_refused(new_plan: NewPlan) -> None:
    with pytest.raises(PlanError) as raised:
        prepare(new_plan(simulation={"partition": "dirichlet:0.5"}), "cpu")
    assert raised.value.code == "plan.partition"


def test_tied_weights_are_trained_by_nobody_under_privacy(new_plan: NewPlan) -> None:
    stage = {"mode": "full", "rounds": 1, "freeze_embeddings": False}
    with pytest.raises(PrivacyError) as raised:
        prepare(new_plan(tied=True, train=[stage]), "cpu")
    assert raised.value.code == "privacy.tied_weights"


def test_base_model_of_16_bits_trains_as_in_float32(
    new_plan: NewPlan, language_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Its frozen weights stay in 16 bits; every number of the run is the same."""
    models = []
    for dtype in (torch.bfloat16, torch.float32):
        base = shutil.copytree(language_model("llama"), tmp_path / f"base-{dtype}")
        rounded = {name: tensor.bfloat16().to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
        save_file(rounded, base / "model.safetensors", {"format": "pt"})
        plan = new_plan(privacy="none", model={"base": str(base)}, simulation={"baselines": []})
        run = simulate(plan, tmp_path / f"run-{dtype}", device="cpu")
        kept = {parameter.dtype for name, parameter in get_plan_model(plan, "cpu").parameters() if "proj.weight" in name}
        assert kept == {dtype}
        models.append((final_model(run.folder), run.summary.test))
    (narrow, narrow_test), (wide, wide_test) = models
    assert same(narrow, wide)
    assert narrow_test == wide_test


def test_adapters_alone_travel_of_a_language_model(new_plan: NewPlan) -> None:
    """Neither the output layer nor the table of tokens, tied or not."""
    for tied in (False, True):
        plan = new_plan(tied=tied)
        names = get_plan_model(plan, "cpu").names("lora")
        assert names
        assert all(".lora_" in name for name in names)


def test_what_judges_classes_alone_is_refused(new_plan: NewPlan) -> None:
    with pytest.raises(PlanError) as raised:
        require_classes(new_plan(), "adapting the received model")
    assert raised.value.code == "plan.no_classes"


def test_a_summary_of_texts_has_no_figures_of_classes(private: Run) -> None:
    table = json.loads((private.folder / "summary.json").read_text(encoding="utf-8"))
    assert (table["task"], table["labels"]) == ("causal-lm", [])
    assert set(table["test"]["federated"]) == {"loss", "perplexity", "accuracy"}
    assert RunSummary.model_validate(table).as_json() == table


def test_plans_of_language_models_are_compared_by_their_losses(new_plan: NewPlan, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    fast = {"rounds": 1, "privacy": "none", "local": {"steps": 2, "batch_size": 8}}
    plan.write_text(dump_plan(new_plan(**fast)))
    found = compare(plan, ["local.learning_rate=0.0001,0.05"], seeds=1, out=tmp_path / "compared", jobs=1, device="cpu")
    [timid, bold] = found.rows
    assert found.measure.key == "loss"
    assert timid.score
    assert bold.score
    assert bold.difference
    assert bold.score.mean < timid.score.mean
    assert bold.difference.estimate.mean == pytest.approx(bold.score.mean - timid.score.mean)
    assert bold.worst
    assert bold.worst.mean >= bold.score.mean  # the larger loss of two organizations
    [line, *_] = csv.DictReader((tmp_path / "compared" / "results.csv").read_text(encoding="utf-8").splitlines())
    summary = json.loads((tmp_path / "compared" / found.cells[0].folder / "summary.json").read_text(encoding="utf-8"))
    assert {key: float(line[key]) for key in ("loss", "perplexity", "accuracy")} == summary["test"]["federated"]
    assert json.loads((tmp_path / "compared" / "results.json").read_text())["measure"]["less_is_better"] is True


# --- the preset debian


@pytest.mark.long
def test_preset_debian_is_played_by_ten_teams(tmp_path: Path) -> None:
    """On its own records, with a tiny model instead of one that must be fetched, and for one round without comparisons."""
    small = ("rounds=1", "simulation.baselines=[]", "generate.examples=2", "generate.max_new_tokens=2")
    base = write_chat_model(tmp_path / "base", reader=word_tokenizer())
    plan = load_plan("debian", [f"model.base={base}", *small])
    run = simulate(plan, tmp_path / "run", device="cpu")
    assert len(run.summary.organizations) == 10
    assert all(each.epsilon_spent is not None and 0 < each.epsilon_spent <= 8.0 for each in run.summary.organizations)
    assert run.summary.test.federated
    assert run.summary.test.written
    assert {"first_sentence", "base", "federated"} <= set(run.summary.test.written.figures)
