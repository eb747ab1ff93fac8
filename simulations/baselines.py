"""What the federated model is compared with: each organization alone, all data in one place, and the model adapted to each.

A baseline is a run like any other, with one participant, through the same loop, client and ledger; it has a folder of its own
inside the run's, and is continued like a run. Without privacy, alone and pooled are one only where the encoder is trained: a head
is fitted to the end instead (see `fitted_heads`), as anyone would do who need not add noise.

Where organizations keep a part of their models to themselves: how good each of their models is, and each of them as a folder.

A simulation can look into their sites. The own part is the newest that a site holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from cotune.client.app import app as client_app
from cotune.client.site import Site
from cotune.client.training.personal.parameters import PERSONAL, UNNOISED
from cotune.client.training.personal.prediction_model import export_own_model
from cotune.data.dataset import DatasetManifest
from cotune.data.metrics.metrics import Metrics
from cotune.data.tasks.task import Task, get_task
from cotune.errors import CotuneError, RunError
from cotune.flower.inprocess_grid import InProcessGrid
from cotune.models.evaluation.test_set import evaluate, measure, predict
from cotune.models.export import export_model
from cotune.models.trainable import State, TrainableModel
from cotune.plan.local_training import Stage
from cotune.plan.personal import PersonalConfig
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, own_model_config
from cotune.privacy.config import RecordPrivacy
from cotune.reporting.documents.events import BaselineFailed, BaselineFinished, BaselineStarted
from cotune.reporting.documents.rounds import MetricsEntry
from cotune.reporting.model_card import CARD, model_card, promised
from cotune.server.app import train
from cotune.server.rounds.registered_evaluator import Evaluator
from cotune.server.runs.run_folder import Participant, RunFile, RunFolder, manifest_file
from cotune.server.runs.run_model import final_params
from cotune.simulations.fitted_heads import Evaluated, fit_pooled, fits_alone, fits_pooled
from cotune.simulations.prepare import Prepared, make_site, make_sites
from cotune.simulations.single_tasks import SINGLE, evaluate_for, plan_for, shares_for
from cotune.simulations.split import Share
from cotune.simulations.workers.baselines import train_beside
from cotune.simulations.workers.pool import WorkerPool
from cotune.strategies.config import StrategyConfig

ALONE = "alone"
ALONE_WITHOUT_PRIVACY = "alone-without-privacy"
PLAIN = "plain"
POOLED = "pooled"


def run_baselines(folder: RunFolder, prepared: Prepared, pool: WorkerPool | None = None) -> dict[str, Evaluated]:
    """ "alone/<organization>", "alone-without-privacy/<organization>", "pooled", "plain" and "single/<task>" on the test set.

    As far as the plan asks for them and they could be trained.

    Args:
        folder: Of the run.
        prepared: Its plan with the records of each organization.
        pool: Workers that train them beside each other; None: this process does, one after the other.
    """
    model = get_plan_model(prepared.plan, folder.file.device)
    wanted = list(_wanted(prepared, model))
    names = [name for name, _, _ in wanted]
    if pool is not None:  # the longest first, so that workers end together
        wanted.sort(key=lambda each: -sum(len(share.rows) for share in each[2]))
    baselines = [_open(folder, *each) for each in wanted]
    trained = _train_in_turn(folder, baselines) if pool is None else train_beside(folder, baselines, pool)
    results = {baseline.file.run: _tell(folder, baseline.file.run, _evaluate(folder, prepared, baseline)) for baseline in trained}
    found = {name: results[name] for name in names if name in results}
    fitted = POOLED in prepared.plan.simulation.baselines and POOLED not in names
    if fitted and (pooled := _fit_pooled(folder, prepared)) is not None:
        found[POOLED] = pooled
    return found


def _tell(folder: RunFolder, name: str, judged: Evaluated) -> Evaluated:
    folder.events.write(BaselineFinished(baseline=name, metrics=MetricsEntry(**judged.metrics.as_dict())))
    return judged


def _fit_pooled(folder: RunFolder, prepared: Prepared) -> Evaluated | None:
    """Fit and judge it; None where that cannot be done. It is not kept: fitting takes less than reading all records did."""
    folder.events.write(BaselineStarted(baseline=POOLED))
    test = DatasetManifest.read(manifest_file(folder.path, "test"), prepared.plan.labels)
    try:
        judged = fit_pooled(_without_privacy(_without_others(prepared.plan)), prepared, folder.file.device, test)
    except CotuneError as error:
        folder.events.write(BaselineFailed(baseline=POOLED, reason=str(error)))
        return None
    return _tell(folder, POOLED, judged)


def _open(folder: RunFolder, name: str, plan: Plan, shares: tuple[Share, ...]) -> RunFolder:
    """The folder of a baseline, made where it is not there."""
    path = folder.path / "baselines" / name
    if not (path / "run.json").exists():
        _make(path, name, plan, shares, folder)
    return RunFolder(path)


def _train_in_turn(folder: RunFolder, baselines: Sequence[RunFolder]) -> Iterator[RunFolder]:
    """Yields the baselines that are trained, each as soon as it is."""
    for baseline in baselines:
        if not baseline.finished:
            folder.events.write(BaselineStarted(baseline=baseline.file.run))
            try:
                train(InProcessGrid(client_app), baseline)
            except RunError as error:  # a comparison that cannot be made must not cost the run itself
                folder.events.write(BaselineFailed(baseline=baseline.file.run, reason=str(error)))
                continue
        yield baseline


def _wanted(prepared: Prepared, model: TrainableModel) -> Iterator[tuple[str, Plan, tuple[Share, ...]]]:
    plan = _without_others(prepared.plan)
    if "alone" in plan.simulation.baselines:
        for share in prepared.shares:
            yield f"{ALONE}/{share.name}", _on_own_base(plan, share), (share,)
        if plan.privacy != "none" and not fits_alone(plan, model):
            for share in prepared.shares:
                yield f"{ALONE_WITHOUT_PRIVACY}/{share.name}", _on_own_base(_without_privacy(plan), share), (share,)
    records = sum(len(share.rows) for share in prepared.shares)
    if POOLED in plan.simulation.baselines and not fits_pooled(prepared.plan, model, records):
        yield POOLED, _without_privacy(plan), prepared.shares
    if SINGLE in plan.simulation.baselines and len(prepared.plan.tasks) > 1:
        for task in prepared.plan.tasks:
            if shares := shares_for(prepared, task.name):
                yield f"{SINGLE}/{task.name}", plan_for(prepared.plan, task.name), shares
    if PLAIN in plan.simulation.baselines and prepared.plan.keeps_personal:
        yield PLAIN, _without_personal(prepared.plan), prepared.shares


def _without_personal(plan: Plan) -> Plan:
    """The same plan, with the same strategy, rounds and privacy, in which everything that is trained is shared."""
    lora = plan.lora.model_copy(update={"keep": "nothing"})
    return plan.model_copy(update={"personal": PersonalConfig(), "lora": lora})


def _without_others(plan: Plan) -> Plan:
    """Who trains alone is asked in every round, hides from nobody that it takes part, and has nobody to send to.

    The server optimizer stays: with rounds of one step, its momentum is all that there is.
    """
    everybody = plan.server.model_copy(update={"sample_rate": 1.0, "sample_size": 0})
    by_itself = StrategyConfig(server_optimizer=plan.strategy.server_optimizer)
    alone = {"client_privacy": None, "server": everybody, "strategy": by_itself, "wire": "float32", "wire_down": "float32"}
    simulation = plan.simulation.model_copy(update={"bases": ()})
    parameters = {"collaboration": "parameters", "simulation": simulation} if plan.shares_predictions else {}
    return _without_personal(plan).model_copy(update={**alone, **parameters, "privacy": _in_training(plan.privacy)})


def _in_training(privacy: RecordPrivacy | Literal["none"]) -> RecordPrivacy | Literal["none"]:
    """The same promise, by noise in the training where the plan has votes with noise."""
    return privacy.model_copy(update={"pate": None}) if isinstance(privacy, RecordPrivacy) else privacy


def _on_own_base(plan: Plan, share: Share) -> Plan:
    """The same plan on the base model that an organization has of its own."""
    if share.base is None:
        return plan
    return plan.model_copy(update={"model": own_model_config(plan, share.base)})


def _without_privacy(plan: Plan) -> Plan:
    """The same plan without privacy; trained as simulation.pooled says, where it does."""
    own = plan.simulation.pooled
    if own is None:
        return plan.model_copy(update={"privacy": "none"})
    stages = tuple(Stage(**{**dict(stage), "local": own}) for stage in plan.stages)
    return plan.model_copy(update={"privacy": "none", "train": stages, "local": own})


def _make(path: Path, name: str, plan: Plan, shares: tuple[Share, ...], parent: RunFolder) -> None:
    if name == PLAIN or name.startswith(f"{SINGLE}/"):
        people = make_sites(path, plan, shares, parent.file.device)
    else:
        people = (Participant(name=name.split("/")[-1], site="site"),)
        make_site(path / "site", people[0].name, plan, shares, parent.file.device)
    file = RunFile(
        run=name,
        created=parent.file.created,
        engine="in-process",
        device=parent.file.device,
        participants=people,
        silent=True,
    )
    RunFolder.create(path, plan, file)


def _evaluate(folder: RunFolder, prepared: Prepared, baseline: RunFolder) -> Evaluated:
    """The finished baseline on the common test set: once, at the end."""
    plan = folder.plan
    if baseline.plan.tasks != plan.tasks:
        state = final_params(baseline.plan, baseline.load())
        own = get_plan_model(baseline.plan, folder.file.device)
        return Evaluated(*evaluate_for(prepared, baseline.plan, own, state))
    model = get_plan_model(baseline.plan, folder.file.device)
    test = DatasetManifest.read(manifest_file(folder.path, "test"), plan.labels)
    predicted = predict(model, final_params(baseline.plan, baseline.load()), test, plan.model.precision, plan.physical_rows)
    return Evaluated(measure(model, test, predicted), tuple(predicted))


def build_personal_evaluate(folder: RunFolder) -> Evaluator:
    """The mean over all organizations that have trained, each with its own model."""

    def judge(state: State) -> Metrics | None:
        metrics = personal_metrics(folder, state)
        return mean_metrics(get_task(folder.plan.task), list(metrics.values())) if metrics else None

    return judge


def personal_metrics(folder: RunFolder, state: State) -> dict[str, Metrics]:
    """Organization -> metrics of its own model on the common test set."""
    plan = folder.plan
    model = get_plan_model(plan, folder.file.device)
    test = DatasetManifest.read(manifest_file(folder.path, "test"), plan.labels)
    return {
        name: evaluate(model, own, test, plan.model.precision, plan.physical_rows)
        for name, own in personal_states(folder, state).items()
    }


def export_each(folder: RunFolder, state: State) -> None:
    """Writes the model of every organization that has trained to `model/` in its site."""
    model = get_plan_model(folder.plan, folder.file.device)
    unnoised = folder.plan.personal.keeps_copy and not folder.plan.personal.noise
    said = [UNNOISED] if unnoised else promised(folder.plan)
    for name, own in personal_states(folder, state).items():
        model.load(own)
        card = model_card(folder.plan, privacy=said, length=model.loaded.text_length)
        export_model(model, folder.path / "sites" / name / "model", {CARD: card})


def export_own_models(folder: RunFolder) -> None:
    """Writes the model that each organization has of its own, where predictions alone are shared, to `model/` in its site."""
    for who in folder.file.participants:
        site = Site(folder.path / who.site)
        if state := site.load_newest_state(folder.plan.plan_id, PERSONAL):
            export_own_model(folder.plan, site, state, site.folder / "model")


def mean_metrics(task: Task, metrics: Sequence[Metrics]) -> Metrics:
    return task.read_metrics(mean_values([each.as_dict() for each in metrics]))


def mean_values(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each key; the tables have the same ones."""
    return {key: sum(table[key] for table in tables) / len(tables) for key in tables[0]}


def personal_states(folder: RunFolder, state: State) -> dict[str, State]:
    """Organization -> the shared state with its own part."""
    own = {
        who.name: Site(folder.path / who.site).load_newest_state(folder.plan.plan_id, PERSONAL)
        for who in folder.file.participants
    }
    return {name: {**state, **part} for name, part in own.items() if part}
