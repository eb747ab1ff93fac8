"""summary.json: what came out of a run, documented in docs/run-folder.md and stable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cotune.client.site import Site
from cotune.models.holdings import HoldingsFile
from cotune.models.inputs import names_in
from cotune.models.tasks import Metrics, majority
from cotune.plan.model import model_of
from cotune.plan.schema import Plan
from cotune.privacy.accounting import RecordPrivacy, Steps, epsilon
from cotune.privacy.statement import statement
from cotune.server.run_folder import Progress, RunFolder
from cotune.server.step import served_of
from cotune.server.summary import identity, performance
from cotune.simulations.fairness import own_accuracies
from cotune.simulations.personal import mean_metrics, personal_metrics, personal_states
from cotune.simulations.sites import Prepared, Share

__all__ = ["summarise"]


def summarise(folder: RunFolder, prepared: Prepared, baselines: Mapping[str, Metrics], seconds: float) -> dict[str, Any]:
    """The summary of a finished run as plain values. ε is composed from the organisations' ledgers, not from the plan."""
    plan, progress = folder.plan, folder.load()
    metrics = Metrics(**progress.history[-1]["metrics"])
    alone = {name.removeprefix("alone/"): m for name, m in baselines.items() if name.startswith("alone/")}
    pooled = baselines.get("pooled")
    served, model = served_of(plan, progress), model_of(plan, folder.file.device)
    personal = personal_metrics(folder, served) if plan.keeps_personal else {}
    own = own_accuracies(prepared, model, served, personal_states(folder, served) if plan.keeps_personal else {})
    return {
        **identity(folder, progress),
        "privacy": _privacy(folder, prepared),
        "test": {
            "examples": sum(len(rows) for _, rows in prepared.test),
            "majority": _majority(folder, prepared).as_dict(),
            "alone": {"mean": mean_metrics(list(alone.values())).as_dict(), "each": {n: m.as_dict() for n, m in alone.items()}}
            if alone
            else None,
            "federated": metrics.as_dict(),
            "pooled": pooled.as_dict() if pooled else None,
        },
        "organisations": [
            {
                **_organisation(folder, prepared, s, progress, alone.get(s.name), metrics, personal.get(s.name)),
                "own": _own(own[s.name]),
            }
            for s in prepared.shares
        ],
        **performance(progress, seconds),
        "reproduce": [f"cotune simulate {folder.path / 'plan.toml'}"],
    }


def _privacy(folder: RunFolder, prepared: Prepared) -> dict[str, Any]:
    privacy, client_level = folder.plan.privacy, folder.plan.client_privacy is not None
    if not isinstance(privacy, RecordPrivacy):
        return {
            "mode": "none",
            "epsilon": None,
            "delta": None,
            "clip_norm": None,
            "statement": statement(None, {}, client_level=client_level),
        }
    spent = {s.name: _spent(folder, s, privacy) for s in prepared.shares}
    return {
        "mode": "record",
        "epsilon": privacy.epsilon,
        "delta": str(privacy.delta),
        "clip_norm": privacy.clip_norm,
        "statement": statement(privacy, spent, clear_metrics=_in_clear(folder)),
    }


def _in_clear(folder: RunFolder) -> bool:
    """Whether any organisation's policy lets it tell the local metrics or the loss that the plan asks for as they are."""
    tell = [Site(folder.path / who.site).policy().tell for who in folder.file.participants]
    metrics = folder.plan.tell.local_metrics and any(rules.local_metrics == "clear" for rules in tell)
    return metrics or ("loss" in folder.plan.strategy.sends and any(rules.local_loss == "clear" for rules in tell))


def _spent(folder: RunFolder, share: Share, privacy: RecordPrivacy) -> tuple[float, float]:
    """(ε spent, δ) of an organisation, from its ledger."""
    delta = privacy.delta_for(share.public_examples(folder.plan))
    return epsilon(Site(folder.path / "sites" / share.name).ledger().spent(), delta), delta


def _training(folder: RunFolder, share: Share) -> list[Steps]:
    """The steps of training that are charged to an organisation."""
    ledger = Site(folder.path / "sites" / share.name).ledger()
    return [charge.steps for charge in ledger.charges() if charge.purpose == "training"]


def _majority(folder: RunFolder, prepared: Prepared) -> Metrics:
    test = HoldingsFile.read(folder.path / "test" / "data.json", folder.plan.labels)
    number = {label: i for i, label in enumerate(folder.plan.labels)}
    held = [prepared.records[s.file].labels[i] for s in prepared.shares for i in s.rows]
    train = [number[name] for label in held for name in names_in(label)]
    return majority(train, test.truth, len(folder.plan.labels))


def _organisation(
    folder: RunFolder,
    prepared: Prepared,
    share: Share,
    progress: Progress,
    alone: Metrics | None,
    federated: Metrics,
    personal: Metrics | None,
) -> dict[str, Any]:
    plan, examples = folder.plan, share.public_examples(folder.plan)
    reached = personal if plan.keeps_personal else federated
    private = isinstance(plan.privacy, RecordPrivacy)
    charges = _training(folder, share) if private else []
    took_part = [e["round"] for e in progress.history if share.name in e["participants"]]
    spent = _spent(folder, share, plan.privacy) if isinstance(plan.privacy, RecordPrivacy) else (None, None)
    return {
        "name": share.name,
        "examples": share.units,
        "labels": prepared.label_counts(share),
        "alone": alone.as_dict() if alone else None,
        "personal": personal.as_dict() if personal else None,
        "gain": reached.accuracy - alone.accuracy if alone and reached else None,
        "epsilon_spent": spent[0],
        "epsilon_allowed": _allowed(plan, share),
        "delta": spent[1],
        "noise_multiplier": charges[-1].noise_multiplier if charges else None,
        "sample_rate": plan.stages[-1].local.sample_rate(examples),
        "steps": sum(c.count for c in charges) if private else sum(plan.stage_of(r).local.steps_of(examples) for r in took_part),
        "rounds": len(took_part),
    }


def _own(accuracy: float | None) -> dict[str, float] | None:
    return None if accuracy is None else {"accuracy": accuracy}


def _allowed(plan: Plan, share: Share) -> float | None:
    privacy = plan.privacy
    return min(privacy.epsilon, share.epsilon or privacy.epsilon) if isinstance(privacy, RecordPrivacy) else None
