"""summary.json of a simulation: its results, documented in docs/run-folder.md and stable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from cotune.client.site import Site
from cotune.data.dataset import DatasetManifest
from cotune.data.metrics.metrics import Metrics
from cotune.models.evaluation.test_set import Floor, measure, predict
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.plan.stacking import list_uncovered
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.claimed_guarantee import Claim, build_claim, compute_figures, max_figures
from cotune.privacy.config import RecordPrivacy
from cotune.reporting.documents.summary import RunSummary
from cotune.reporting.privacy_statement import all_models_statement, statement
from cotune.server.runs.generated_texts import BASE, FEDERATED, WritingTest
from cotune.server.runs.results import describe_effort, describe_run
from cotune.server.runs.run_folder import Progress, RunFolder, manifest_file
from cotune.server.runs.run_model import final_params
from cotune.simulations.baselines import (
    ALONE,
    ALONE_WITHOUT_PRIVACY,
    PLAIN,
    POOLED,
    mean_values,
    personal_metrics,
    personal_states,
)
from cotune.simulations.fitted_heads import Evaluated, Personalized
from cotune.simulations.joint_privacy_loss import get_charged_steps
from cotune.simulations.prepare import Prepared
from cotune.simulations.single_tasks import SINGLE, describe_tasks
from cotune.simulations.split import Share
from cotune.simulations.workers.pool import Peak
from cotune.simulations.worth_of_joining import (
    Choices,
    TestSet,
    held_labels,
    organization_worth,
    overall_worth,
    personal_gains,
    without_intervals,
)

_EXACT = (  # figures of a simulation that are computed from training records as they are
    "the numbers and label counts of records, and the majority class",
    "models that are trained without privacy: all data pooled, alone without privacy, and federated, adapted to own records",
    "the test records, an organization's own held-out ones among them",
)


def summarize(
    folder: RunFolder,
    prepared: Prepared,
    baselines: Mapping[str, Evaluated],
    personalized: Personalized,
    seconds: float,
    beside: Peak,
) -> RunSummary:
    """Return the summary of a finished run. ε is composed from the organizations' ledgers, not from the plan.

    Args:
        folder: Of the run.
        prepared: Its plan with the records of each organization.
        baselines: Name -> what it reached.
        personalized: How organizations have adapted the model.
        seconds: That the run has taken.
        beside: Memory of the processes beside this one.
    """
    plan = folder.plan
    progress = folder.load()
    alone = {name.removeprefix(f"{ALONE}/"): m.metrics for name, m in baselines.items() if name.startswith(f"{ALONE}/")}
    pooled = baselines.get(POOLED)
    plain = baselines.get(PLAIN)
    personal = personal_metrics(folder, final_params(plan, progress)) if plan.keeps_personal else {}
    test = TestSet(prepared)
    floor = _floor(folder)
    choices = _choices(folder, prepared, progress, baselines, personalized, floor)
    organizations = [
        {
            **_organization(folder, prepared, s, progress, alone.get(s.name), personal.get(s.name)),
            **organization_worth(test, s, choices[s.name]),
            "adaptation": _adaptation(personalized, s),
        }
        for s in prepared.shares
    ]
    for each in organizations:
        each["gain"] = each["worth"] and each["worth"]["difference"]
    table = {
        **describe_run(folder, progress),
        "privacy": _privacy(folder, prepared, pooled is not None),
        "partition": partition_of(prepared),
        "data": {
            "records": sum(map(len, prepared.records.values())),
            "left_out": dict(prepared.left_out),
            "notes": prepared.notes,
        },
        "worth": overall_worth(organizations),
        "personal": personal_gains(organizations),
        **_tasks(prepared, test, choices, baselines),
        "test": {
            "examples": sum(len(rows) for _, rows in prepared.test),
            "majority": _floor_metrics(floor, prepared).as_dict(),
            "alone": _each({n: m.as_dict() for n, m in alone.items()}),
            "alone_without_privacy": _common(organizations, "alone_without_privacy"),
            "plain": plain.metrics.as_dict() if plain else None,
            "federated": dict(progress.history[-1].metrics or {}),
            "adapted": _common(organizations, "adapted"),
            "pooled": pooled.metrics.as_dict() if pooled else None,
            "written": _written(folder, floor, progress, baselines),
        },
        "organizations": organizations,
        **_add_memory(describe_effort(progress, seconds), beside),
        "reproduce": [f"cotune simulate {folder.path / 'plan.toml'}"],
    }
    return RunSummary.model_validate(table)


def _add_memory(effort: dict[str, Any], beside: Peak) -> dict[str, Any]:
    """What the run took, with the memory of the processes beside this one."""
    both = Peak(effort["peak_memory_bytes"], effort["peak_gpu_memory_bytes"] or 0) + beside
    return {**effort, "peak_memory_bytes": both.memory, "peak_gpu_memory_bytes": both.gpu or None}


def _choices(
    folder: RunFolder,
    prepared: Prepared,
    progress: Progress,
    baselines: Mapping[str, Evaluated],
    personalized: Personalized,
    floor: Floor,
) -> dict[str, Choices]:
    """Organization -> column -> what that model tells on the common test set."""
    plan = folder.plan
    served = final_params(folder.plan, progress)
    test = floor.test
    model = floor.model
    own = personal_states(folder, served) if plan.keeps_personal else {}
    read = partial(predict, model, test=test, precision=plan.model.precision, rows=plan.physical_rows)
    common = () if plan.keeps_personal else tuple(read(served))
    plain = baselines.get(PLAIN)
    found: dict[str, Choices] = {}
    for share in prepared.shares:
        predicted = read(own[share.name]) if share.name in own else common
        alone = baselines.get(f"{ALONE}/{share.name}")
        private = isinstance(plan.privacy, RecordPrivacy)
        without = baselines.get(f"{ALONE_WITHOUT_PRIVACY}/{share.name}") or (None if private else alone)
        columns = {
            "majority": floor.answers(held_labels(prepared, share)),
            "alone": alone and alone.predicted,
            "alone_without_privacy": personalized.alone.get(share.name) or (without and without.predicted),
            "plain": plain and plain.predicted,
            "federated": predicted,
            "adapted": personalized.predicted.get(share.name),
        }
        found[share.name] = {name: answers for name, answers in columns.items() if answers}
    return found


def _tasks(
    prepared: Prepared, test: TestSet, choices: Mapping[str, Choices], baselines: Mapping[str, Evaluated]
) -> dict[str, Any]:
    """Of several tasks, what each has from sharing the encoder."""
    if not prepared.plan.tasks:
        return {}
    prefix = f"{SINGLE}/"
    single = {n.removeprefix(prefix): (each.metrics, each.predicted) for n, each in baselines.items() if n.startswith(prefix)}
    federated = {name: tuple(columns["federated"]) for name, columns in choices.items()}
    return {"tasks": describe_tasks(prepared, test, federated, single)}


def _adaptation(personalized: Personalized, share: Share) -> dict[str, Any] | None:
    """How an organization has adapted the model, and what each method reached on the parts of its records that judged."""
    found = personalized.adapted.get(share.name)
    return None if found is None else {"method": found.method, "described": found.described, "tried": found.tried}


def partition_of(prepared: Prepared) -> str:
    """How records were shared out: the plan's scheme, or "files"."""
    return prepared.plan.simulation.partition if None in prepared.records else "files"


def _each(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
    if not metrics:
        return None
    return {"mean": mean_values(list(metrics.values())), "each": dict(metrics)}


def _common(organizations: Sequence[Mapping[str, Any]], column: str) -> dict[str, Any] | None:
    """Of each organization on the common test set, without intervals."""
    known = {each["name"]: each["common"][column] for each in organizations if each["common"][column] is not None}
    return _each({name: without_intervals(table) for name, table in known.items()})


def _privacy(folder: RunFolder, prepared: Prepared, pooled: bool) -> dict[str, Any]:
    privacy = folder.plan.privacy
    client_level = folder.plan.client_privacy is not None
    if not isinstance(privacy, RecordPrivacy):
        return {
            "mode": "none",
            "epsilon": None,
            "delta": None,
            "clip_norm": None,
            "claim": None,
            "claim_table": [],
            "epsilon_all_models": None,
            "statement": statement(None, {}, client_level=client_level),
        }
    spent = {s.name: _spent(folder, s, privacy) for s in prepared.shares}
    together = max(_all_models(folder, s, privacy) for s in prepared.shares)
    claim = _claim(folder, prepared, privacy)
    return {
        "mode": "record",
        "epsilon": privacy.epsilon,
        "delta": str(privacy.delta),
        "clip_norm": privacy.clip_norm if privacy.pate is None else None,
        "claim": claim.as_dict(),
        "claim_table": claim.rows(),
        "epsilon_all_models": together,
        "statement": [
            *statement(privacy, spent, clear_metrics=_in_clear(folder)),
            all_models_statement(together, pooled=pooled, plain=folder.plan.keeps_personal),
        ],
    }


def _claim(folder: RunFolder, prepared: Prepared, privacy: RecordPrivacy) -> Claim:
    figures = {}
    for share in prepared.shares:
        spent = _charged(folder, share)
        delta = privacy.delta_for(share.public_examples(folder.plan))
        figures[share.name] = compute_figures(spent, delta)
    clear = ("the local metrics, which organizations disclosed as they are",) if _in_clear(folder) else ()
    return build_claim(privacy, max_figures(figures), not_covered=(*clear, *list_uncovered(folder.plan.model.members), *_EXACT))


def _all_models(folder: RunFolder, share: Share, privacy: RecordPrivacy) -> float:
    """ε of the federated model and of the model that the organization trained alone, together."""
    return epsilon(get_charged_steps(folder.path, share.name), privacy.delta_for(share.public_examples(folder.plan)))


def _in_clear(folder: RunFolder) -> bool:
    """Whether any organization's policy lets it tell the local metrics or the loss that the plan asks for as they are."""
    tell = [Site(folder.path / who.site).policy().disclosures for who in folder.file.participants]
    metrics = folder.plan.disclosures.local_metrics and any(rules.local_metrics == "clear" for rules in tell)
    return metrics or ("loss" in folder.plan.strategy.sends and any(rules.local_loss == "clear" for rules in tell))


def _spent(folder: RunFolder, share: Share, privacy: RecordPrivacy) -> tuple[float, float]:
    """(ε spent, δ) of an organization, from its ledger."""
    delta = privacy.delta_for(share.public_examples(folder.plan))
    return epsilon(_charged(folder, share), delta), delta


def _charged(folder: RunFolder, share: Share) -> list[Steps]:
    return Site(folder.path / "sites" / share.name).ledger().spent()


def _training(folder: RunFolder, share: Share) -> list[Steps]:
    """The steps of training that are charged to an organization."""
    ledger = Site(folder.path / "sites" / share.name).ledger()
    return [charge.steps for charge in ledger.charges() if charge.purpose == "training"]


def _floor(folder: RunFolder) -> Floor:
    plan = folder.plan
    test = DatasetManifest.read(manifest_file(folder.path, "test"), plan.labels)
    return Floor(get_plan_model(plan, folder.file.device), test, plan.model.precision, plan.physical_rows)


def _written(folder: RunFolder, floor: Floor, progress: Progress, baselines: Mapping[str, Evaluated]) -> dict[str, Any] | None:
    """What the models write after prompts of the common test set; None where the plan does not ask for it."""
    plan = folder.plan
    writing = None if plan.keeps_personal else WritingTest.of(plan, floor.model, floor.test)
    if writing is None:
        return None
    columns: dict[str, list[State]] = {BASE: [{}], FEDERATED: [final_params(plan, progress)]}
    for name in baselines:
        baseline = RunFolder(folder.path / "baselines" / name)
        columns.setdefault(name.partition("/")[0].replace("-", "_"), []).append(final_params(baseline.plan, baseline.load()))
    return writing.describe(columns)


def _floor_metrics(floor: Floor, prepared: Prepared) -> Metrics:
    """What is reached on the common test set without any training."""
    held = [label for share in prepared.shares for label in held_labels(prepared, share)]
    return measure(floor.model, floor.test, floor.answers(held))


def _organization(
    folder: RunFolder,
    prepared: Prepared,
    share: Share,
    progress: Progress,
    alone: Metrics | None,
    personal: Metrics | None,
) -> dict[str, Any]:
    plan = folder.plan
    examples = share.public_examples(folder.plan)
    private = isinstance(plan.privacy, RecordPrivacy)
    charges = _training(folder, share) if private else []
    took_part = [e.round for e in progress.history if share.name in e.participants]
    spent = _spent(folder, share, plan.privacy) if isinstance(plan.privacy, RecordPrivacy) else (None, None)
    return {
        "name": share.name,
        "examples": share.units,
        "labels": prepared.label_counts(share),
        "alone": alone.as_dict() if alone else None,
        "personal": personal.as_dict() if personal else None,
        "epsilon_spent": spent[0],
        "epsilon_allowed": _allowed(plan, share),
        "epsilon_all_models": _all_models(folder, share, plan.privacy) if isinstance(plan.privacy, RecordPrivacy) else None,
        "delta": spent[1],
        "noise_multiplier": charges[-1].noise_multiplier if charges else None,
        "sample_rate": plan.charged_rate(plan.stages[-1], examples),
        "steps": sum(c.count for c in charges)
        if private
        else sum(plan.get_stage(r).local.steps_per_round(examples) for r in took_part),
        "rounds": len(took_part),
    }


def _allowed(plan: Plan, share: Share) -> float | None:
    privacy = plan.privacy
    return min(privacy.epsilon, share.epsilon or privacy.epsilon) if isinstance(privacy, RecordPrivacy) else None
