"""The number of records, read off the noise. Sample rate, batch, σ, steps and δ came from the private number n.

From one step's noise scale (σC/B, with 0.75 % of the coordinates' spread left as error) the audit estimated 1237 records, which
is exact, with a standard error of .5, at a site whose policy declared another number. For one record more or less it is a
distinguisher: at n = 1200, MiniLM with adapters told ε = 4.1 where 3.0 was stated, and full fine-tuning 116. Now everything that
a server can see besides the update itself follows from the public number N: it is the same for n and n + 1 records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cotune.client.training.charged_steps
import cotune.client.training.round as training
from cotune.client.site import Site
from cotune.errors import PolicyError
from cotune.models.trainable import get_model
from cotune.plan.plan import Plan
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig
from cotune.privacy.policy import DisclosureRules, Policy, dump_policy
from cotune.simulations.prepare import prepare
from cotune.strategies.types import Update
from tests.support import clinic
from tests.support.matrix import crossed

ROWS = 121


@pytest.fixture(autouse=True)
def _one_model_at_a_time() -> Iterator[None]:
    get_model.cache_clear()
    yield
    get_model.cache_clear()


@pytest.fixture
def records(tmp_path: Path) -> Path:
    file = tmp_path / "records.csv"
    rows = [f"the number {'great' if i % 2 else 'sad'} {i},{clinic.LABELS[i % 3]}" for i in range(ROWS)]
    file.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def plan_of(base_model: Callable[[str], Path], records: Path) -> Callable[..., Plan]:
    def make(**tables: Any) -> Plan:
        given: dict[str, Any] = {
            "rounds": 2,
            "local": {"batch_size": 20, "steps": 2},
            "privacy": {"epsilon": 3.0, "delta": "1/n^1.5"},
            "strategy": {"weighting": "noise_aware"},
        }
        return clinic.make_plan(base_model("bert"), records, **given | tables)

    return make


def site_of(folder: Path, records: Path, count: int, **rules: Any) -> Site:
    policy = Policy.permissive().model_copy(update={"disclosures": DisclosureRules(**rules)})
    return clinic.make_site(folder, records, range(count), policy)


@pytest.fixture
def mechanism(monkeypatch: pytest.MonkeyPatch) -> list[DPSGDConfig]:
    """What decides the noise of a step, as it reaches the mechanism."""
    seen: list[DPSGDConfig] = []

    def watched(config: DPSGDConfig) -> DPSGD:
        seen.append(config)
        return DPSGD(config)

    monkeypatch.setattr(cotune.client.training.charged_steps, "DPSGD", watched)
    return seen


def visible(update: Update) -> tuple[Any, ...]:
    return update.examples, update.steps, update.epsilon, update.noise_variance, update.disclosures


@pytest.mark.parametrize(
    ("declared", "local"),
    crossed(
        [100, 120, 250],
        [{"batch_size": 20, "steps": 2}, {"batch_size": 0.2, "steps": 2}, {"batch_size": 20, "epochs": 1.0, "steps": None}],
    ),
)
def test_a_declared_number_decides_all_that_can_be_seen(
    plan_of: Callable[..., Plan],
    records: Path,
    tmp_path: Path,
    mechanism: list[DPSGDConfig],
    declared: int,
    local: dict[str, Any],
) -> None:
    plan = plan_of(local=local)
    seen = []
    for count in (ROWS - 1, ROWS):
        site = site_of(tmp_path / str(count), records, count, example_count="declared", declared_examples=declared)
        seen.append(visible(training.train_round(plan, site, 1, clinic.state_of(plan))))
    assert seen[0] == seen[1]
    assert seen[0][0] == declared
    assert mechanism[0] == mechanism[1]
    assert mechanism[0].expected_batch == pytest.approx(20 if local["batch_size"] == 20 else 0.2 * declared)


def test_a_noised_number_decides_all_that_can_be_seen(
    plan_of: Callable[..., Plan],
    records: Path,
    tmp_path: Path,
    mechanism: list[DPSGDConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two sites that drew the same N look the same for the whole plan, whatever their numbers of records."""
    plan = plan_of()
    seen = []
    for count in (ROWS - 1, ROWS):
        shift = float(ROWS - count)  # the noise that makes N the same
        monkeypatch.setattr(
            "cotune.client.run_account.add_geometric_noise", lambda number, *_, shift=shift: int(number + shift - 7)
        )
        site = site_of(tmp_path / str(count), records, count, example_count="noised")
        state = clinic.state_of(plan)
        seen.append([visible(training.train_round(plan, site, round, state)) for round in (1, 2)])
        purposes = [charge.purpose for charge in site.ledger().charges()]
        assert purposes == ["example count", "training", "training"]
    assert seen[0] == seen[1]
    assert {round[0] for site in seen for round in site} == {ROWS - 7}
    assert mechanism[:2] == mechanism[2:]


def test_refusals_follow_from_the_public_number(plan_of: Callable[..., Plan], records: Path, tmp_path: Path) -> None:
    """min_examples and min_batch answer alike on both sides of their limit."""
    plan = plan_of()
    for limit in (ROWS - 1, ROWS, ROWS + 1):
        answers = []
        for count in (ROWS - 1, ROWS):
            folder = tmp_path / f"{limit}-{count}"
            site = site_of(folder, records, count, example_count="declared", declared_examples=120)
            policy = site.policy()
            rules = policy.training.model_copy(update={"min_examples": limit})
            (folder / "policy.toml").write_text(dump_policy(policy.model_copy(update={"training": rules})))
            try:
                training.train_round(plan, site, 1, clinic.state_of(plan))
                answers.append("trained")
            except PolicyError as declined:
                answers.append(str(declined))
        assert answers[0] == answers[1]


def test_simulated_organizations_declare_two_digits(plan_of: Callable[..., Plan]) -> None:
    prepared = prepare(plan_of(simulation={"clients": 1, "partition": "iid"}, labels=()), "cpu")
    [share] = prepared.shares
    assert share.units == 103
    assert share.public_examples(prepared.plan) == 100
    assert share.policy(prepared.plan).disclosures.declared_examples == 100


def test_a_record_that_comes_between_rounds_draws_no_new_number(
    plan_of: Callable[..., Plan], records: Path, tmp_path: Path
) -> None:
    plan = plan_of(strategy={})
    told = []
    for round, count in ((1, 100), (2, 101)):
        get_model.cache_clear()
        site = site_of(tmp_path / "site", records, count, example_count="noised")
        told.append(training.train_round(plan, site, round, clinic.state_of(plan)).examples)
    assert told[0] == told[1]
    assert [c.purpose for c in site.ledger().charges()].count("example count") == 1
