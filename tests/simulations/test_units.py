"""A plan whose privacy is promised to persons, on data in which a person has 1 to 20 records."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cotune.client.site import Site
from cotune.data.config import TaskName
from cotune.data.dataset import DatasetManifest
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.privacy.mechanisms.dp_sgd import DPSGDConfig, DPSGDSetup, StepReport
from cotune.simulations.auditing import training as audited_training
from cotune.simulations.auditing.audit import AuditResult, audit
from cotune.simulations.prepare import Prepared, make_run, prepare
from cotune.simulations.run import simulate
from tests.support.datasets import sentences, tagged, write_images
from tests.support.engines import Steps, engine, take_steps
from tests.support.failures import fails_with

CANARIES = 400
PRIVATE = {"epsilon": 8.0, "unit": "patient_id", "max_records": 5}
PEOPLE = 60
MOST = 20


def of_people(count: int) -> list[str]:
    """A person for each record: the first has one, others up to 20."""
    rng = random.Random(0)
    whose = [f"P-{person}" for person in range(PEOPLE) for _ in range(1 if person == 0 else rng.randint(1, MOST))]
    return whose[:count]


def write_people(folder: Path, task: TaskName) -> Path:
    """Records of people in a file, each in a spelling of its own."""
    if task == "sequence-classification":
        rows = [{"text": text, "label": label} for text, label in sentences(700, seed=3)]
    elif task == "token-classification":
        rows = [{"text": words, "label": tags} for words, tags in tagged(300, seed=3)]
    else:
        files = sorted(write_images(folder / "images", 90).rglob("*.*g"))
        rows = [{"image": str(file.relative_to(folder)), "label": file.parent.name} for file in files]
    random.Random(1).shuffle(rows)
    whose = of_people(len(rows)) if task != "image-classification" else [f"P-{i // 3}" for i in range(len(rows))]
    whole = [
        {**row, "patient_id": name.lower() if i % 2 else name} for i, (row, name) in enumerate(zip(rows, whose, strict=False))
    ]
    file = folder / "people.jsonl"
    file.write_text("\n".join(map(json.dumps, whole)), encoding="utf-8")
    return file


@pytest.fixture
def plan(base_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Plan]:
    def make(task: TaskName = "sequence-classification", **changes: object) -> Plan:
        file = write_people(tmp_path, task)
        images = task == "image-classification"
        return parse_plan(
            {
                "task": task,
                "rounds": 2,
                "train": "lora" if task == "token-classification" else "head",
                "model": {"base": str(base_model("vit" if images else "shallow-bert")), "max_length": 16},
                "data": {"source": str(file)},
                "local": {"learning_rate": 1.0, "batch_size": 0.3, "steps": 3},
                "privacy": PRIVATE,
                "simulation": {"clients": 2, "partition": "iid", "min_examples": 5, "baselines": []},
                **changes,
            }
        )

    return make


def persons(prepared: Prepared, rows: object) -> set[str]:
    (records,) = prepared.records.values()
    return {records.units[int(row)] for row in rows}  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "image-classification"])
def test_a_person_is_in_one_place(plan: Callable[..., Plan], tmp_path: Path, task: TaskName) -> None:
    found = prepare(plan(task, validation_fraction=0.2), "cpu")
    assert found.plan.data.unit == "patient_id"  # as the unit is called
    ((_, test),), ((_, validation),) = found.test, found.validation
    places = [persons(found, rows) for rows in (test, validation, *(share.rows for share in found.shares))]
    assert all(places)
    assert sum(map(len, places)) == len(set.union(*places))
    assert set.union(*places) == set(found.records[None].units)
    make_run(found, tmp_path / "run", "in-process", "cpu")
    for share in found.shares:
        held = (
            Site(tmp_path / "run" / "sites" / share.name)
            .dataset(found.plan.labels)
            .bound_contributions(found.plan.privacy, found.plan.seed)
        )
        assert len(held.units) == share.units == len(persons(found, share.rows)) <= len(held) <= len(share.rows)
        assert max(map(len, held.units)) <= 5
    assert DatasetManifest.read(tmp_path / "run" / "test" / "data.json", found.plan.labels).inputs()


def test_the_promise_to_persons_is_kept_and_charged(plan: Callable[..., Plan], tmp_path: Path) -> None:
    result = simulate(plan(), tmp_path / "run", device="cpu")
    prepared = prepare(plan(), "cpu")
    for share in prepared.shares:
        ledger = Site(tmp_path / "run" / "sites" / share.name).ledger()
        (data,) = ledger.data_sets()
        assert (data.unit, data.records) == ("patient_id", share.units)
        assert ledger.spent()
    assert all(0 < o["epsilon_spent"] <= 8.0 for o in result.summary["organizations"])


def test_copies_of_a_text_do_not_test_what_was_learned_of_them(toy_plan: Callable[..., Plan], tmp_path: Path) -> None:
    """Without a column of units: texts that differ in spaces alone stay together, in one file and over several."""
    folder = tmp_path / "sites"
    folder.mkdir()
    for number in range(2):
        with (folder / f"org-{number}.csv").open("w", newline="") as stream:
            rows = [*sentences(80, seed=number), *sentences(60, seed=9)]
            csv.writer(stream).writerows(
                [("text", "label"), *rows, *((f" {text.replace(' ', '  ')}", label) for text, label in rows)]
            )
    found = prepare(toy_plan(data={"source": str(folder)}), "cpu")
    trained = {identity for s in found.shares for identity in found.records[s.file].select(s.rows).identities}
    tested = {identity for file, rows in found.test for identity in found.records[file].select(rows).identities}
    assert trained
    assert tested
    assert not trained & tested


def test_whose_records_are_must_be_known(plan: Callable[..., Plan]) -> None:
    with fails_with("data.missing_column", "ward", "data.unit"):
        prepare(plan(privacy={**PRIVATE, "unit": "ward"}), "cpu")


@pytest.mark.parametrize("privacy", [{"unit": "patient_id"}, {"max_records": 3}])
def test_a_unit_needs_a_bound_and_a_record_none(plan: Callable[..., Plan], privacy: dict[str, object]) -> None:
    with pytest.raises(Exception, match="max_records"):
        plan(privacy={"epsilon": 8.0, **privacy})


@pytest.mark.long
def test_canaries_of_an_audit_are_persons_too(plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with as many records as a person may have; so an engine that bounds records instead of persons is accused.

    It lets five records of a person add up to 5 C: nearly every canary is told rightly.
    """
    planted: list[Sequence[Sequence[int]]] = []

    def watched(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
        planted.append(setup.units)
        return take_steps(config, setup)

    def of_rows(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
        units = [[row] for unit in setup.units for row in unit]
        return take_steps(config, replace(setup, units=units))

    def audited(steps: Steps) -> AuditResult:
        monkeypatch.setattr(audited_training, "DPSGD", engine(steps))
        few = plan(rounds=1, privacy={**PRIVATE, "epsilon": 2.0})
        return audit(few, canaries=CANARIES, tight=True, confidence=1 - 1e-7, device="cpu")

    honest = audited(watched)
    assert not honest.broken
    assert max(probe.contribution for probe in honest.states) > 0.5
    units = planted[-1]
    assert len(units) == honest.examples + CANARIES
    assert max(map(len, units[:-CANARIES])) == 5
    assert {len(unit) for unit in units[-CANARIES:]} == {5}
    rows = [row for unit in units for row in unit]
    assert len(rows) == len(set(rows))
    accused = audited(of_rows)
    assert accused.broken
    assert accused.at_least > accused.epsilon
