"""summary.json: what came out of a run, documented in docs/run-folder.md and stable."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

from cotune.client.site import Site
from cotune.models.device import peak_memory_bytes
from cotune.models.holdings import HoldingsFile
from cotune.models.inputs import names_in
from cotune.models.tasks import Metrics, majority
from cotune.plan.model import model_of
from cotune.plan.schema import Plan
from cotune.privacy.accounting import RecordPrivacy, Steps, epsilon
from cotune.privacy.statement import client_statement, statement
from cotune.server.client_level import account_of
from cotune.server.run_folder import Progress, RunFolder
from cotune.server.step import served_of
from cotune.simulations.fairness import own_accuracies
from cotune.simulations.personal import mean_metrics, personal_metrics, personal_states
from cotune.simulations.sites import Prepared, Share, client_level_noise

__all__ = ["summarise"]

_PACKAGES = ("cotune", "flwr", "torch", "transformers", "opacus", "peft", "dp-accounting")


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
        "schema": 1,
        "run": folder.file.run,
        "plan": plan.name,
        "plan_id": plan.plan_id,
        "created": folder.file.created,
        "engine": folder.file.engine,
        "status": "finished" if folder.stopped is None else "stopped",
        "stopped": folder.stopped,
        "privacy": _privacy(folder, prepared),
        "client_privacy": _client_privacy(folder, prepared, progress),
        "model": _model(folder, progress),
        "labels": list(plan.labels),
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
        "rounds": list(progress.history),
        "bytes": {"up": _total(progress, "bytes_up"), "down": _total(progress, "bytes_down")},
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES},
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


def _client_privacy(folder: RunFolder, prepared: Prepared, progress: Progress) -> dict[str, Any] | None:
    """From the server's account; None where the plan asks for none."""
    plan, privacy = folder.plan, folder.plan.client_privacy
    if privacy is None:
        return None
    noise, charged = client_level_noise(plan, len(prepared.shares)), [steps for _, steps in account_of(folder, privacy).charges()]
    return {
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "epsilon_spent": epsilon(charged, privacy.delta),
        "rounds_charged": len(charged),
        "noise_multiplier": noise.charge.noise_multiplier,
        "clipping": privacy.clipping,
        "clip_norm": privacy.clip_norm if progress.clip_norm is None else progress.clip_norm,
        "sample_rate": plan.server.sample_rate,
        "amplification": privacy.amplification,
        "expected_organisations": noise.expected,
        "statement": client_statement(privacy, noise, charged, sample_rate=plan.server.sample_rate),
    }


def _in_clear(folder: RunFolder) -> bool:
    """Whether any organisation's policy lets it tell the local metrics or the loss that the plan asks for as they are."""
    tell = [Site(folder.path / who.site).policy().tell for who in folder.file.participants]
    metrics = folder.plan.tell.local_metrics and any(rules.local_metrics == "clear" for rules in tell)
    return metrics or ("loss" in folder.plan.strategy.sends and any(rules.local_loss == "clear" for rules in tell))


def _spent(folder: RunFolder, share: Share, privacy: RecordPrivacy) -> tuple[float, float]:
    """(ε spent, δ) of an organisation, from its ledger."""
    delta = privacy.delta_for(len(share.rows))
    return epsilon(Site(folder.path / "sites" / share.name).ledger().spent(), delta), delta


def _training(folder: RunFolder, share: Share) -> list[Steps]:
    """The steps of training that are charged to an organisation."""
    ledger = Site(folder.path / "sites" / share.name).ledger()
    return [charge.steps for charge in ledger.charges() if charge.purpose == "training"]


def _model(folder: RunFolder, progress: Progress) -> dict[str, Any]:
    plan = folder.plan
    model = model_of(plan, folder.file.device)
    return {
        "base": plan.model.base,
        "base_hash": plan.model.base_hash,
        "parameters": model.parameter_count(),
        "shared_parameters": sum(t.numel() for t in progress.state.values()),
    }


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
    plan, examples = folder.plan, len(share.rows)
    reached = personal if plan.keeps_personal else federated
    private = isinstance(plan.privacy, RecordPrivacy)
    charges = _training(folder, share) if private else []
    took_part = [e["round"] for e in progress.history if share.name in e["participants"]]
    spent = _spent(folder, share, plan.privacy) if isinstance(plan.privacy, RecordPrivacy) else (None, None)
    return {
        "name": share.name,
        "examples": examples,
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


def _total(progress: Progress, key: str) -> int:
    return sum(int(entry[key]) for entry in progress.history)


def dumps(summary: Mapping[str, Any]) -> bytes:
    return json.dumps(summary, indent=1, ensure_ascii=False).encode()
