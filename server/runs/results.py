"""The results of a run: summary.json, and for a real run the exported model and the report.

The parts of the summary that the server knows by itself are shared with simulations. Of a real run a coordinator knows less:
nothing of an organization's records, and of its ε what it states. What is not known is None, and the report does not mention it.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from typing import Any

from cotune.data.dataset import DatasetManifest
from cotune.data.tasks.task import get_task
from cotune.models.adapters.export import has_adapters_alone
from cotune.models.base.lookup import FOLDER
from cotune.models.device import peak_gpu_memory_bytes, peak_memory_bytes
from cotune.models.evaluation.test_set import Floor, measure
from cotune.models.export import export_adapters_alone, export_model
from cotune.models.trainable import State, TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.stacking import list_uncovered
from cotune.privacy.accounting.composition import epsilon
from cotune.privacy.claimed_guarantee import build_claim
from cotune.privacy.config import RecordPrivacy
from cotune.reporting.documents.base import Document
from cotune.reporting.documents.events import Event, Note, RunFinalized
from cotune.reporting.documents.rounds import MetricsEntry
from cotune.reporting.documents.summary import RunSummary
from cotune.reporting.model_card import CARD, model_card
from cotune.reporting.privacy_statement import client_statement, stated
from cotune.reporting.run_report import write_report
from cotune.server.runs.client_privacy import compute_round_noise, open_client_account
from cotune.server.runs.deliveries import read_deliveries
from cotune.server.runs.events import read_events
from cotune.server.runs.exclusions import find_excluded
from cotune.server.runs.generated_texts import BASE, FEDERATED, WritingTest
from cotune.server.runs.organization_history import get_last_weight, get_received_bytes, get_reported_epsilon
from cotune.server.runs.run_folder import Progress, RunFolder, manifest_file
from cotune.server.runs.run_model import final_params, load_run_model
from cotune.storage.files import atomic_write

_ABOUT_THE_RUN = 3  # paragraphs; a simulation's next one is about the models that it compares this one with
_PACKAGES = ("cotune", "flwr", "torch", "transformers", "opacus", "peft", "dp-accounting")


def describe_run(folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """Return which run of which plan it is, on which model, and how it ended."""
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
        "client_privacy": describe_client_privacy(folder, progress),
        "model": {
            "base": plan.model.base,
            "base_hash": plan.model.base_hash,
            "parameters": load_run_model(folder).parameter_count(),
            "common": not plan.keeps_parts,
            "shared_parameters": sum(t.numel() for t in progress.state.values()),
        },
        "task": plan.task,
        "labels": list(plan.labels),
        "collaboration": plan.collaboration,
        "public": describe_public(plan),
    }


def describe_public(plan: Plan) -> dict[str, Any] | None:
    """Return which public inputs models have learned from; None where the plan names none, or states no hash of them."""
    public = plan.public
    return {"answers": public.answers, "license": public.license, "sha256": public.sha256} if public.sha256 else None


def describe_effort(progress: Progress, seconds: float) -> dict[str, Any]:
    """Return what the rounds were, and what they took."""
    return {
        "rounds": list(progress.history),
        "bytes": {"up": _total(progress, "bytes_up"), "down": _total(progress, "bytes_down")},
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES},
    }


def describe_client_privacy(folder: RunFolder, progress: Progress) -> dict[str, Any] | None:
    """Return client-level privacy from the server's account; None where the plan asks for none."""
    plan = folder.plan
    privacy = folder.plan.client_privacy
    if privacy is None:
        return None
    noise = compute_round_noise(plan, len(folder.file.participants))
    account = open_client_account(folder, privacy)
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
        "expected_organizations": noise.expected,
        "statement": client_statement(privacy, noise, charged, sample_rate=plan.server.sample_rate),
    }


def build_model_card(plan: Plan, summary: RunSummary, length: int, *, adapters: bool = False) -> str:
    """Return the model card of a run's final model.

    Args:
        plan: Of the run.
        summary: Of the run, for metrics and privacy.
        length: Number of tokens of a text that the model reads.
        adapters: Whether the card is for the adapters alone.
    """
    test = summary.test
    more = [] if summary.client_privacy is None else summary.client_privacy.statement
    return model_card(
        plan,
        privacy=[*summary.privacy.statement[:_ABOUT_THE_RUN], *more],
        length=length,
        test={"this model": _values(test.federated), get_task(plan.task).floor: _values(test.majority)},
        examples=test.examples,
        adapters=adapters,
    )


def _values(metrics: MetricsEntry | None) -> dict[str, float] | None:
    return None if metrics is None else metrics.as_json()


def to_json(document: Document | Mapping[str, Any]) -> bytes:
    """Return a document as indented JSON."""
    values = document.as_json() if isinstance(document, Document) else document
    return json.dumps(values, indent=1, ensure_ascii=False).encode()


def _total(progress: Progress, key: str) -> int:
    return sum(int(entry[key]) for entry in progress.history)


_TOLD = "what an organization's own policy lets out without noise"
_NOT_KNOWN = (
    "epsilon_all_models",
    "examples",
    "labels",
    "alone",
    "personal",
    "gain",
    "common",
    "worth",
    "adaptation",
    "delta",
    "noise_multiplier",
    "sample_rate",
    "steps",
    "own",
)


def finalize_run(folder: RunFolder) -> RunSummary:
    """Write model/, summary.json and report.html, each in one step, and return the summary.

    Where every organization has a model of its own there is no model/, and without the base model's weights at most adapter/. The
    folder must have a finished round.
    """
    progress = folder.load()
    summary = summarize(folder, progress)
    if not folder.plan.keeps_parts:
        _export(folder, progress, summary)
    atomic_write(folder.path / "summary.json", to_json(summary))
    write_report(summary, folder.path / "report.html")
    folder.events.write(RunFinalized(summary=str(folder.path / "summary.json")))
    return summary


def _export(folder: RunFolder, progress: Progress, summary: RunSummary) -> None:
    model = load_run_model(folder)
    model.load(final_params(folder.plan, progress))
    if not model.loaded.folder.has_weights:
        return _export_without_weights(folder, model, summary)
    export_model(model, folder.path / "model", {CARD: build_model_card(folder.plan, summary, model.loaded.text_length)})


def _export_without_weights(folder: RunFolder, model: TrainableModel, summary: RunSummary) -> None:
    """Write adapter/ where adapters are of use alone, and say what is not written."""
    alone = has_adapters_alone(model)
    if alone:
        card = build_model_card(folder.plan, summary, model.loaded.text_length, adapters=True)
        export_adapters_alone(model, folder.path / "adapter", folder.plan.model.base.removeprefix(FOLDER), card)
    kept = "the adapters are in adapter/" if alone else "what was trained is in checkpoints/"
    folder.events.write(
        Note(
            text="the final model is not written whole, as the server does not hold the weights of the base model:"
            f" {kept}, and organizations have the whole model"
        )
    )


def summarize(folder: RunFolder, progress: Progress) -> RunSummary:
    """Return the summary of a real run."""
    events = read_events(folder.path / "events.jsonl") if (folder.path / "events.jsonl").exists() else []
    table = {
        **describe_run(folder, progress),
        "federation": folder.file.federation,
        "privacy": _privacy(folder, progress),
        "partition": None,
        "worth": None,
        "test": _test(folder, progress),
        "organizations": [_organization(folder, who.name, progress, events) for who in folder.file.participants],
        **describe_effort(progress, sum(float(entry.seconds) for entry in progress.history)),
        "reproduce": [f"cotune server run {folder.file.federation}"],
    }
    return RunSummary.model_validate(table)


def _privacy(folder: RunFolder, progress: Progress) -> dict[str, Any]:
    privacy = folder.plan.privacy
    spent = get_reported_epsilon(progress.history)
    known = privacy if isinstance(privacy, RecordPrivacy) else None
    uncovered = (_TOLD, *list_uncovered(folder.plan.model.members), "the coordinator's test set")
    claim = build_claim(known, None, not_covered=uncovered) if known else None
    return {
        "mode": "record" if known else "none",
        "epsilon": known.epsilon if known else None,
        "delta": str(known.delta) if known else None,
        "clip_norm": known.clip_norm if known and known.pate is None else None,
        "claim": claim.as_dict() if claim else None,
        "claim_table": claim.rows() if claim else [],
        "epsilon_all_models": None,
        "statement": stated(
            known,
            spent,
            client_level=folder.plan.client_privacy is not None,
            silent=len(folder.file.participants) - len(spent),
        ),
    }


def _test(folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """Of the coordinator's own test set; without one, nothing was measured."""
    document = manifest_file(folder.path, "test")
    metrics = progress.history[-1].metrics
    nothing = {
        "examples": 0,
        "majority": None,
        "alone": None,
        "alone_without_privacy": None,
        "federated": metrics,
        "adapted": None,
        "pooled": None,
    }
    if not document.exists():
        return nothing
    test = DatasetManifest.read(document, folder.plan.labels)
    model = load_run_model(folder)
    floor = Floor(model, test, folder.plan.model.precision, folder.plan.physical_rows)
    untrained = measure(model, test, floor.answers(test.held_labels))
    writing = WritingTest.of(folder.plan, model, test)
    states: dict[str, list[State]] = {BASE: [{}], FEDERATED: [final_params(folder.plan, progress)]}
    written = None if writing is None or metrics is None else writing.describe(states)
    return {**nothing, "examples": len(test), "majority": untrained.as_dict(), "written": written}


def _organization(folder: RunFolder, name: str, progress: Progress, events: Iterable[Event]) -> dict[str, Any]:
    privacy = folder.plan.privacy
    return {
        "name": name,
        **dict.fromkeys(_NOT_KNOWN),
        "epsilon_spent": get_reported_epsilon(progress.history).get(name),
        "epsilon_allowed": privacy.epsilon if isinstance(privacy, RecordPrivacy) else None,
        "rounds": sum(name in entry.participants for entry in progress.history),
        "bytes_up": get_received_bytes(events, name),
        "weight": get_last_weight(progress.history, name),
        "dropped": sum(dropped.organization == name for entry in progress.history for dropped in entry.dropped),
        "quarantined": sum(name in entry.quarantined for entry in progress.history),
        "excluded": name in find_excluded(folder, progress.history),
        "delivered": name in read_deliveries(folder),
    }
