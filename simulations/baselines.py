"""What the federated model is compared with: each organisation alone, and all data in one place without privacy.

A baseline is a run like any other, with one participant, through the same loop, client and ledger; it has a folder of its own
inside the run's, and is continued like a run. Alone without privacy is one only where the encoder is trained: a head is fitted to
the end instead (see `personalized`), as whoever trains for itself would do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cotune.client.app import app as client_app
from cotune.models.errors import RunError
from cotune.models.features import feature_head
from cotune.models.holdings import HoldingsFile
from cotune.models.sharing import SharedModel
from cotune.models.tasks import Metrics, score
from cotune.plan.model import model_of
from cotune.plan.schema import Plan
from cotune.plan.tables import Stage
from cotune.server.app import play
from cotune.server.evaluation import predict
from cotune.server.run_folder import Participant, RunFile, RunFolder
from cotune.server.step import served_of
from cotune.simulations.grid import InProcessGrid
from cotune.simulations.sites import Prepared, Share, make_site
from cotune.strategies.strategy import StrategyConfig

ALONE = "alone"
ALONE_WITHOUT_PRIVACY = "alone-without-privacy"


@dataclass(frozen=True)
class Judged:
    """A model on the common test set. told: the class numbers that it gave, in the order of `Holdings.truth`."""

    metrics: Metrics
    told: tuple[int, ...]


def run_baselines(folder: RunFolder, prepared: Prepared) -> dict[str, Judged]:
    """ "alone/<organisation>", "alone-without-privacy/<organisation>" and "pooled" on the common test set.

    As far as the plan asks for them and they could be trained.
    """
    results = {}
    for name, plan, shares in _wanted(prepared, model_of(prepared.plan, folder.file.device)):
        path = folder.path / "baselines" / name
        if not (path / "run.json").exists():
            _make(path, name, plan, shares, folder)
        baseline = RunFolder(path)
        if not baseline.finished:
            folder.events.tell("baseline_started", baseline=name)
            try:
                play(InProcessGrid(client_app), baseline)
            except RunError as error:  # a comparison that cannot be made must not cost the run itself
                folder.events.tell("baseline_failed", baseline=name, reason=str(error))
                continue
        results[name] = _judge(folder, baseline)
        folder.events.tell("baseline_finished", baseline=name, metrics=results[name].metrics.as_dict())
    return results


def fits_alone(plan: Plan, model: SharedModel) -> bool:
    """Whether alone without privacy is a head that is fitted to features, instead of a run."""
    return all(stage.mode == "head" for stage in plan.stages) and feature_head(model) is not None


def _wanted(prepared: Prepared, model: SharedModel) -> Iterator[tuple[str, Plan, tuple[Share, ...]]]:
    plan = _without_others(prepared.plan)
    if "alone" in plan.simulation.baselines:
        for share in prepared.shares:
            yield f"{ALONE}/{share.name}", plan, (share,)
        if plan.privacy != "none" and not fits_alone(plan, model):
            for share in prepared.shares:
                yield f"{ALONE_WITHOUT_PRIVACY}/{share.name}", _without_privacy(plan), (share,)
    if "pooled" in plan.simulation.baselines:
        yield "pooled", _without_privacy(plan), prepared.shares


def _without_others(plan: Plan) -> Plan:
    """Who trains alone is asked in every round, hides from nobody that it takes part, and has nobody to be combined with."""
    everybody = plan.server.model_copy(update={"sample_rate": 1.0, "sample_size": 0})
    lora = plan.lora.model_copy(update={"keep": "nothing"})
    return plan.model_copy(update={"client_privacy": None, "server": everybody, "strategy": StrategyConfig(), "lora": lora})


def _without_privacy(plan: Plan) -> Plan:
    """The same plan without privacy; trained as simulation.pooled says, where it does."""
    own = plan.simulation.pooled
    if own is None:
        return plan.model_copy(update={"privacy": "none"})
    stages = tuple(Stage(**{**dict(stage), "local": own}) for stage in plan.stages)
    return plan.model_copy(update={"privacy": "none", "train": stages, "local": own})


def _make(path: Path, name: str, plan: Plan, shares: tuple[Share, ...], parent: RunFolder) -> None:
    who = Participant(name=name.split("/")[-1], site="site")
    make_site(path / "site", who.name, plan, shares, parent.file.device)
    file = RunFile(
        run=name,
        created=parent.file.created,
        engine="in-process",
        device=parent.file.device,
        participants=(who,),
        silent=True,
    )
    RunFolder.create(path, plan, file)


def _judge(folder: RunFolder, baseline: RunFolder) -> Judged:
    """The finished baseline on the common test set: once, at the end."""
    plan = folder.plan
    model = model_of(plan, folder.file.device)
    test = HoldingsFile.read(folder.path / "test" / "data.json", plan.labels)
    told = predict(model, served_of(baseline.plan, baseline.load()), test, plan.model.precision)
    return Judged(score(test.truth, told, len(test.labels)), tuple(told))
