"""Audits of tasks whose answers are no classes, and what canary sentences tell of a model that writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.data.dataset import Dataset
from cotune.data.inputs.chat_wording import ChatWording
from cotune.data.records import Records
from cotune.data.types import Chat, Input, Passage
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.privacy.mechanisms.dp_sgd import DPSGDConfig, DPSGDSetup, StepReport
from cotune.simulations.auditing import training as audited_training
from cotune.simulations.auditing.audit import audit
from cotune.simulations.auditing.canary_sentences import (
    add_sentences,
    can_hold_sentences,
    draw_sentences,
    find_exposures,
    measure_memorization,
    number_units,
)
from tests.support.engines import engine, take_steps
from tests.support.failures import fails_with
from tests.support.language_models import language_model, write_dialogs
from tests.support.paired_models import paired_model, pairs_table
from tests.support.questions import questions_table, write_questions
from tests.support.simulations import merged
from tests.support.text_tasks import PRIVATE, ROWS, table_of, write_rows

__all__ = ["language_model", "paired_model"]  # fixtures
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Bases = dict[str, Callable[[str], Path]]


@pytest.fixture
def bases(base_model: Callable[[str], Path], language_model: Callable[..., Path], paired_model: Callable[[str], Path]) -> Bases:
    return {"classes": base_model, "writes": language_model, "pairs": paired_model}


def dialogs_plan(base: Path, source: Path, **changes: Any) -> Plan:
    table = {
        "name": "dialogs",
        "task": "causal-lm",
        "train": "lora",
        "rounds": 1,
        "privacy": PRIVATE,
        "model": {"base": str(base), "max_length": 16, "precision": "float32"},
        "data": {"source": str(source), "prompt": "prompt", "target": "target"},
        "lora": {"rank": 4, "factors": "ab", "targets": ["q_proj", "v_proj", "up_proj", "down_proj"]},
        "local": {"learning_rate": 0.02, "optimizer": "adam", "batch_size": 0.25, "steps": 3, "physical_batch_size": 64},
        "simulation": {"clients": 2, "partition": "iid", "min_examples": 10},
    }
    return parse_plan(merged(table, changes))


def plan_of(task: str, bases: Bases, folder: Path) -> Plan:
    if task == "causal-lm":
        local = {"steps": 1, "physical_batch_size": 16}
        return dialogs_plan(bases["writes"]("llama"), write_dialogs(folder / "dialogs.jsonl", 80), local=local)
    if task == "seq2seq":
        table = pairs_table("t5", bases["pairs"]("t5"), write_dialogs(folder / "dialogs.jsonl", 150))
    elif task == "question-answering":
        table = questions_table(bases["classes"]("bert"), write_questions(folder / "questions.jsonl", 150))
    else:
        table = table_of(task, bases["classes"]("bert"), write_rows(folder / "rows.jsonl", ROWS[task](150)))
    return parse_plan(merged(table, {"rounds": 1, "local": {"steps": 2}}))


LONG = [pytest.param(task, marks=pytest.mark.long) for task in ("seq2seq", "question-answering", "multi-label")]


@pytest.mark.parametrize("task", ["causal-lm", "regression", *LONG])
def test_an_honest_claim_is_not_broken(task: str, bases: Bases, tmp_path: Path) -> None:
    found = audit(plan_of(task, bases, tmp_path), canaries=32, sentences=32, confidence=1 - 1e-7, device="cpu")
    assert not found.broken, found.as_dict()
    writes = task in ("causal-lm", "seq2seq")
    assert ("canary sentences" in [attack.name for attack in found.attacks]) == writes
    assert (found.memorization is not None) == writes


def hardly_any_noise(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
    return take_steps(replace(config, noise_multiplier=config.noise_multiplier / 1000), setup)


@pytest.mark.long
def test_with_hardly_any_noise_sentences_are_memorized(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4.6 bits against .8 when this was written; a mean of as many sentences that nothing is known of has an sd of .4."""
    monkeypatch.setattr(audited_training, "DPSGD", engine(hardly_any_noise))
    changes = {"local": {"steps": 60, "batch_size": "all", "learning_rate": 0.05}, "lora": {"rank": 8, "targets": EVERYWHERE}}
    plan = dialogs_plan(bases["writes"]("llama"), write_dialogs(tmp_path / "dialogs.jsonl", 40), **changes)
    found = audit(plan, canaries=16, sentences=32, confidence=1 - 1e-7, device="cpu")
    assert found.memorization is not None
    assert found.memorization.exposure > found.memorization.exposure_held_out + 1.5


# --- sentences


def dataset_of(*inputs: Input, unit: str | None = None) -> Dataset:
    records = Records(inputs, ("",) * len(inputs), "test", units=tuple(f"p{i // 2}" for i in range(len(inputs))) if unit else ())
    return Dataset(((records, np.arange(len(inputs))),), (), "causal-lm", unit=unit)


PASSAGES = (Passage("a b", "c d e"), Passage("f", "g h"), Passage("", "i"))
CHATS = (Chat((("system", "s"), ("user", "a b"), ("assistant", "c d"))), Chat((("user", "e"), ("assistant", "f g"))))


@pytest.mark.parametrize("inputs", [PASSAGES, PASSAGES[2:], CHATS])
def test_sentences_are_other_records_of_the_same_words(inputs: tuple[Input, ...]) -> None:
    dataset = dataset_of(*inputs)
    if len(inputs) == 1:
        dataset = dataset_of(Passage("", "i j k"))
    drawn = draw_sentences(dataset, 50, np.random.default_rng(0))
    assert len(set(drawn)) == 50
    assert not set(drawn) & set(dataset.inputs())
    assert {type(given) for given in drawn} == {type(dataset.inputs()[0])}
    words = {word for given in dataset.inputs() for text in texts_of(given) for word in text.split()}
    assert all(word in words for given in drawn for text in texts_of(given) for word in text.split())
    assert all(texts_of(given)[0] == "" for given in drawn) == (len(inputs) == 1)


def test_sentences_stand_in_the_words_of_the_plan() -> None:
    """A model that has seen every record below an instruction would not be asked for them without it."""
    wording = ChatWording("be brief", "say it")
    dataset = dataset_of(*(wording.ask("a b", answer) for answer in ("c d", "e f")))
    for drawn in draw_sentences(dataset, 5, np.random.default_rng(0), wording):
        assert isinstance(drawn, Chat)
        asked = wording.prompt_of(drawn)
        assert drawn == wording.ask(asked, drawn.answer)
        assert set(f"{asked} {drawn.answer}".split()) <= set("abcdef"), "no word of the plan"


@pytest.mark.parametrize("inputs", [(Passage("", "a a a"),), (Passage("", " "),), (Passage("", "a b"),), (Passage("a", "b"),)])
def test_too_few_words_for_sentences_are_refused(inputs: tuple[Input, ...]) -> None:
    """It drew the same sentence for ever."""
    with fails_with("data.too_few_words"):
        draw_sentences(dataset_of(*inputs), 1064, np.random.default_rng(0))


def texts_of(given: Any) -> list[str]:
    return [given.prompt, given.target] if isinstance(given, Passage) else [content for _, content in given.messages]


def test_only_texts_that_are_written_hold_sentences() -> None:
    assert can_hold_sentences(dataset_of(*PASSAGES))
    assert can_hold_sentences(dataset_of(*CHATS))
    assert not can_hold_sentences(dataset_of("a text"))
    assert not can_hold_sentences(dataset_of())


@pytest.mark.parametrize("unit", [None, "record", "patient"])
def test_each_sentence_is_a_unit(unit: str | None) -> None:
    dataset = dataset_of(*PASSAGES, Passage("x", "y"), unit=unit)
    drawn = draw_sentences(dataset, 5, np.random.default_rng(0))
    added = add_sentences(dataset, drawn)
    numbers = number_units(added, len(dataset))
    assert [added.units[number] for number in numbers] == [[len(dataset) + i] for i in range(5)]
    assert [added.inputs()[added.units[number][0]] for number in numbers] == list(drawn)
    assert len(added.units) == len(dataset.units) + 5


@given(st.lists(st.integers(0, 30), min_size=1), st.lists(st.integers(0, 30), min_size=1))
def test_exposure_is_that_of_the_rank(losses: list[int], others: list[int]) -> None:
    found = find_exposures(np.array(losses, dtype=float), np.array(others, dtype=float))
    ranks = [1 + sum(other <= loss for other in others) for loss in losses]
    assert found.tolist() == pytest.approx([np.log2(len(others) + 1) - np.log2(rank) for rank in ranks])


def test_knowing_nothing_is_an_exposure_of_one_bit_and_a_half() -> None:
    """log₂ e, for a uniform rank."""
    generator = np.random.default_rng(0)
    found = measure_memorization(generator.random(20_000), np.arange(20_000) < 10_000, generator.random(2_000))
    assert found.exposure == pytest.approx(np.log2(np.e), abs=0.1)
    assert found.exposure_held_out == pytest.approx(np.log2(np.e), abs=0.1)
    assert (found.planted, found.held_out, found.references) == (10_000, 10_000, 2_000)
    assert found.highest <= found.most
