"""What summary.json says of every run, simulated or real: what the server knows by itself. See docs/run-folder.md."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

from cotune.models.device import peak_memory_bytes
from cotune.plan.card import model_card
from cotune.plan.schema import Plan
from cotune.privacy.accounting import epsilon
from cotune.privacy.statement import client_statement
from cotune.server.base import model_here
from cotune.server.client_level import account_of, client_level_noise
from cotune.server.run_folder import Progress, RunFolder

_ABOUT_THE_RUN = 3  # paragraphs; a simulation's next one is about the models that it compares this one with
_PACKAGES = ("cotune", "flwr", "torch", "transformers", "opacus", "peft", "dp-accounting")


def identity(folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """Which run of which plan, on which model, and how it ended."""
    plan = folder.plan
    return {
        "schema": 1,
        "run": folder.file.run,
        "plan": plan.name,
        "plan_id": plan.plan_id,
        "created": folder.file.created,
        "engine": folder.file.engine,
        "status": "finished" if folder.stopped is None else "stopped",
        "stopped": folder.stopped,
        "client_privacy": client_privacy(folder, progress),
        "model": {
            "base": plan.model.base,
            "base_hash": plan.model.base_hash,
            "parameters": model_here(folder).parameter_count(),
            "shared_parameters": sum(t.numel() for t in progress.state.values()),
        },
        "labels": list(plan.labels),
    }


def performance(progress: Progress, seconds: float) -> dict[str, Any]:
    """What the rounds were, and what they took."""
    return {
        "rounds": list(progress.history),
        "bytes": {"up": _total(progress, "bytes_up"), "down": _total(progress, "bytes_down")},
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES},
    }


def client_privacy(folder: RunFolder, progress: Progress) -> dict[str, Any] | None:
    """From the server's account; None where the plan asks for none."""
    plan, privacy = folder.plan, folder.plan.client_privacy
    if privacy is None:
        return None
    noise = client_level_noise(plan, len(folder.file.participants))
    account = account_of(folder, privacy)
    charged = [steps for _, steps in account.charges()]
    return {
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "epsilon_spent": epsilon(charged, privacy.delta),
        "epsilon_spent_in_all_runs": account.spent_in_all_runs(),
        "delta_in_all_runs": account.delta_of_all_runs(),
        "runs": len(account.runs()),
        "rounds_charged": len(charged),
        "noise_multiplier": noise.charge.noise_multiplier,
        "clipping": privacy.clipping,
        "clip_norm": privacy.clip_norm if progress.clip_norm is None else progress.clip_norm,
        "sample_rate": plan.server.sample_rate,
        "amplification": privacy.amplification,
        "expected_organisations": noise.expected,
        "statement": client_statement(privacy, noise, charged, sample_rate=plan.server.sample_rate),
    }


def run_card(plan: Plan, summary: Mapping[str, Any], length: int) -> str:
    """Return the card of a run's model. length: tokens that it reads of a text."""
    client_level, test = summary["client_privacy"], summary["test"]
    more = [] if client_level is None else [*client_level["statement"]]
    return model_card(
        plan,
        privacy=[*summary["privacy"]["statement"][:_ABOUT_THE_RUN], *more],
        length=length,
        test={"this model": test["federated"], "always the most frequent class": test["majority"]},
        examples=test["examples"],
    )


def dumps(summary: Mapping[str, Any]) -> bytes:
    return json.dumps(summary, indent=1, ensure_ascii=False).encode()


def _total(progress: Progress, key: str) -> int:
    return sum(int(entry[key]) for entry in progress.history)
