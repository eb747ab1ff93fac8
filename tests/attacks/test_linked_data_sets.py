"""Attack: learn from noise and refusals whether two data sets of a site share a record.

Limits held for every data set that shares a record with the one that is charged. Anyone who had seen a first run (ε = 2 of 3 in total,
60 records) asked for a second one after the site's records had been replaced: refused, if a single one of the new records was
among the old ones, and answered otherwise; with less left, the noise differed. That told one bit about one record, with certainty
and for nothing. Now all charges of a site count, whichever data they were made on. Where its owner keeps records in collections with
totals of their own, a record that was charged in one counts in no other, and whether it is in the file changes no bit of an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cotune.client.run_account as account_module
import cotune.privacy.mechanisms.dp_sgd as dp_sgd
from cotune.client.site import Site
from cotune.client.site_folder import SiteFile
from cotune.client.training.round import train_round
from cotune.data.config import DataConfig
from cotune.data.dataset import DatasetManifest, FileSlice
from cotune.errors import PolicyError, PrivacyError
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.mechanisms.random_generators import seeded_generator
from cotune.privacy.policy import DisclosureRules, Policy, dump_policy
from cotune.protocol.refusals import GENERIC_REFUSAL

OLD = [f"the table is very {word}" for word in ("great", "sad", "awful", "happy")]
NEW = [f"a {word} tree it is" for word in ("great", "sad", "awful", "happy")]
OTHER = "it is a tree"
WORLDS = {"shared": [*NEW, OLD[0]], "apart": [*NEW, OTHER]}
LABELS = ("bad", "good", "so")
PRIVATE = {"epsilon": 2.0, "delta": 1e-3}

MakePlan = Callable[..., Plan]
StateFor = Callable[[Plan, int], State]


def hold(site: Path, texts: list[str], collection: str = "") -> None:
    """From now on these are the records of the site."""
    source = site / f"records-{len(list(site.glob('*.csv')))}.csv"
    source.write_text("text,label\n" + "".join(f"{text},{LABELS[i % 3]}\n" for i, text in enumerate(texts)), encoding="utf-8")
    described = DatasetManifest(data=DataConfig(source=str(source)), portions=(FileSlice(path=None),), collection=collection)
    (site / "data.json").write_text(described.model_dump_json())


@pytest.fixture
def new_site(tmp_path: Path) -> Callable[..., Site]:
    def make(name: str, total: float, disclosures: dict[str, Any] | None = None) -> Site:
        folder = tmp_path / name
        folder.mkdir()
        allowed = Policy.permissive(examples=60)
        budget = allowed.budget.model_copy(update={"epsilon_total": total, "delta_total": 1e-3})
        rules = {"budget": budget} | ({"disclosures": DisclosureRules(**disclosures)} if disclosures else {})
        (folder / "policy.toml").write_text(dump_policy(allowed.model_copy(update=rules)))
        (folder / "site.json").write_text(SiteFile(organization="clinic", device="cpu").model_dump_json())
        return Site(folder)

    return make


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """σ of every step, as it reaches the mechanism: each coordinate of an update shows it."""
    found: list[float] = []
    honest = dp_sgd.add_gaussian_noise

    def watched(total: Any, clip_norm: float, noise_multiplier: float, generator: Any) -> Any:
        found.append(noise_multiplier)
        return honest(total, clip_norm, noise_multiplier, generator)

    monkeypatch.setattr(dp_sgd, "add_gaussian_noise", watched)
    return found


@pytest.fixture
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws in both worlds, so that answers can be compared to the bit."""
    for module in (dp_sgd, account_module):
        monkeypatch.setattr(module, "private_generator", lambda: seeded_generator(8, "drawn"))


def answer(plan: Plan, site: Site, round: int, state: State) -> tuple[Any, ...]:
    """All that a server sees of a round, but for what the noise hides."""
    try:
        update = train_round(plan, site, round, state)
    except PolicyError as declined:
        return ("refused", declined.public)
    except PrivacyError:
        return ("refused", GENERIC_REFUSAL)
    return ("update", update.examples, update.steps, update.epsilon, update.noise_variance, sorted(update.disclosures))


def plan_of(make_plan: MakePlan, seed: int, **tables: Any) -> Plan:
    return make_plan(rounds=2, seed=seed, privacy=PRIVATE, strategy={"weighting": "noise_aware"}, **tables)


@pytest.mark.parametrize("total", [3.0, 3.6, 6.0])
def test_a_second_plan_is_answered_alike(
    new_site: Callable[..., Site], make_plan: MakePlan, state_for: StateFor, seen: list[float], total: float
) -> None:
    """Nothing is left, something is left, everything fits: the same refusals, the same σ."""
    first = plan_of(make_plan, 1)
    second = plan_of(make_plan, 2)
    found = []
    for world, texts in WORLDS.items():
        site = new_site(world, total)
        hold(site.folder, OLD)
        answers = [answer(first, site, round, state_for(first, 1)) for round in (1, 2)]
        hold(site.folder, texts)
        answers += [answer(second, site, round, state_for(second, 1)) for round in (1, 2)]
        found.append((answers, list(seen)))
        seen.clear()
    assert found[0] == found[1]
    assert found[0][0][0][0] == "update"
    assert {kind for kind, *_ in found[0][0][2:]} == ({"update"} if total == 6.0 else {"refused"})


def test_records_that_are_replaced_in_the_middle_of_a_run(
    new_site: Callable[..., Site], make_plan: MakePlan, state_for: StateFor, seen: list[float]
) -> None:
    """The rest of a run is calibrated to what the run has spent, not to what some of the records have."""
    plan = plan_of(make_plan, 1)
    found = []
    for world, texts in WORLDS.items():
        site = new_site(world, 6.0)
        hold(site.folder, OLD)
        answers = [answer(plan, site, 1, state_for(plan, 1))]
        hold(site.folder, texts)
        found.append(([*answers, answer(plan, site, 2, state_for(plan, 1))], list(seen)))
        seen.clear()
    assert found[0] == found[1]
    assert [kind for kind, *_ in found[0][0]] == ["update", "update"]


def test_another_unit_of_privacy_is_refused_alike(
    new_site: Callable[..., Site], make_plan: MakePlan, state_for: StateFor
) -> None:
    """It was refused only where the new data shared a record with the old."""
    records = plan_of(make_plan, 1)
    people = make_plan(rounds=2, privacy={**PRIVATE, "unit": "pid", "max_records": 2})
    found = []
    for world, texts in WORLDS.items():
        site = new_site(world, 20.0)
        hold(site.folder, OLD)
        answers = [answer(records, site, 1, state_for(records, 1))]
        hold(site.folder, texts)
        document = site.folder / "data.json"
        source = site.folder / "records-1.csv"
        lines = source.read_text().splitlines()
        source.write_text("\n".join([f"{lines[0]},pid", *(f"{line},p{i}" for i, line in enumerate(lines[1:]))]))
        described = DatasetManifest(data=DataConfig(source=str(source), unit="pid"), portions=(FileSlice(path=None),))
        document.write_text(described.model_dump_json())
        found.append([*answers, answer(people, site, 1, state_for(people, 1))])
    assert found[0] == found[1]
    assert [kind for kind, *_ in found[0]] == ["update", "refused"]


@pytest.mark.usefixtures("fixed_noise")
@pytest.mark.parametrize("disclosures", [{"example_count": "declared", "declared_examples": 60}, {"example_count": "noised"}])
def test_in_another_collection_a_record_changes_no_bit(
    new_site: Callable[..., Site], make_plan: MakePlan, state_for: StateFor, disclosures: dict[str, Any]
) -> None:
    """Its total is its own: a run fits, though the other collection has nothing left. The shared record is left out of it."""
    first = plan_of(make_plan, 1)
    second = plan_of(make_plan, 2, local={"batch_size": 0.5})
    found = []
    for world, texts in {"shared": [*NEW, OLD[0]], "apart": NEW}.items():
        site = new_site(world, 3.0, disclosures)
        hold(site.folder, OLD, "wards")
        answer(first, site, 1, state_for(first, 1))
        hold(site.folder, texts, "images")
        state = state_for(second, 1)
        update = train_round(second, site, 1, state)
        assert site.counted_dataset(second).left_out() == ({"in another collection": 1} if world == "shared" else {})
        deltas = {name: tensor.tolist() for name, tensor in update.delta.items()}
        found.append((deltas, update.examples, update.steps, update.epsilon, update.noise_variance))
        assert {c.collection for c in site.ledger().charges()} == {"wards", "images"}
    assert found[0] == found[1]


def test_a_record_is_charged_in_one_collection(new_site: Callable[..., Site], make_plan: MakePlan, state_for: StateFor) -> None:
    """In whichever was charged first; back in the file of the first one it counts there."""
    plans = [plan_of(make_plan, seed) for seed in (1, 2, 3)]
    site = new_site("site", 6.0)
    for plan, texts, collection in zip(plans, (NEW, [*OLD, NEW[0]], [*NEW, OLD[0]]), ("a", "b", "a"), strict=True):
        hold(site.folder, texts, collection)
        assert answer(plan, site, 1, state_for(plan, 1))[0] == "update"
        assert site.counted_dataset(plan).inputs() == [text for text in texts if text in (NEW if collection == "a" else OLD)]
