"""Where organisations keep a part of their models to themselves: how good each of their models is, and each of them as a folder.

A simulation can look into their sites. The own part is the newest that a site holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from cotune.client.personal import PERSONAL
from cotune.client.site import Site
from cotune.models.export import export_model
from cotune.models.holdings import HoldingsFile
from cotune.models.sharing import State
from cotune.models.tasks import Metrics
from cotune.plan.card import CARD, model_card, promised
from cotune.plan.model import model_of
from cotune.server.evaluation import Judge, evaluate
from cotune.server.run_folder import RunFolder


def each_judge(folder: RunFolder) -> Judge:
    """The mean over all organisations that have trained, each with its own model."""

    def judge(state: State) -> Metrics | None:
        metrics = personal_metrics(folder, state)
        return mean_metrics(list(metrics.values())) if metrics else None

    return judge


def personal_metrics(folder: RunFolder, state: State) -> dict[str, Metrics]:
    """Organisation -> metrics of its own model on the common test set."""
    plan = folder.plan
    model = model_of(plan, folder.file.device)
    test = HoldingsFile.read(folder.path / "test" / "data.json", plan.labels)
    return {name: evaluate(model, own, test, plan.model.precision) for name, own in personal_states(folder, state).items()}


def export_each(folder: RunFolder, state: State) -> None:
    """Writes the model of every organisation that has trained to `model/` in its site."""
    model = model_of(folder.plan, folder.file.device)
    for name, own in personal_states(folder, state).items():
        model.load(own)
        card = model_card(folder.plan, privacy=promised(folder.plan), length=model.loaded.max_length)
        export_model(model, folder.path / "sites" / name / "model", {CARD: card})


def mean_metrics(metrics: Sequence[Metrics]) -> Metrics:
    tables = [m.as_dict() for m in metrics]
    return Metrics(**{key: sum(t[key] for t in tables) / len(tables) for key in tables[0]})


def personal_states(folder: RunFolder, state: State) -> dict[str, State]:
    """Organisation -> the shared state with its own part."""
    own = {who.name: Site(folder.path / who.site).newest(folder.plan.plan_id, PERSONAL) for who in folder.file.participants}
    return {name: {**state, **part} for name, part in own.items() if part}
