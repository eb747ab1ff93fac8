"""What each organization reaches once it has adapted the federated model to itself, and what it reaches alone without any noise.

Both are heads on features, fitted to the organization's own training records (see `client.adaptation`); both are judged once, on
the common test set, of which its own held-out records are a part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cotune.client.adaptation import Adapted, adapt, own_records, units_of
from cotune.models.encoding import encoded_examples, encoded_features
from cotune.models.errors import CotuneError
from cotune.models.features import encode_batch, feature_head
from cotune.models.head_fit import head_names, head_scores, told_by
from cotune.models.holdings import Holdings, HoldingsFile
from cotune.models.sharing import SharedModel, State
from cotune.plan.model import model_of
from cotune.plan.schema import Plan
from cotune.server.run_folder import RunFolder
from cotune.simulations.baselines import fits_alone
from cotune.simulations.sites import Prepared, Share

Told = tuple[int, ...]  # class numbers, in the order of the common test set


@dataclass(frozen=True)
class Personalized:
    """By organization; empty where nothing was fitted.

    Attributes:
        adapted: How each has adapted the federated model.
        told: What its adapted model tells.
        alone: What its head without privacy and without the others tells.
    """

    adapted: dict[str, Adapted] = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)
    alone: dict[str, Told] = field(default_factory=dict)


def personalize(folder: RunFolder, prepared: Prepared, served: State) -> Personalized:
    """Adapt a finished run's model for every organization, as far as the plan asks for a comparison with training alone.

    Nothing is fitted where there are no features to fit a head to, or where every organization has a model of its own.
    """
    plan = prepared.plan
    model = model_of(plan, folder.file.device)
    if "alone" not in plan.simulation.baselines or plan.keeps_personal or feature_head(model) is None:
        return Personalized()
    found = Personalized()
    test = _features(model, plan, served, HoldingsFile.read(folder.path / "test" / "data.json", plan.labels))
    model.load(served)
    shared = model.state(head_names(model))
    for share in prepared.shares:
        try:
            adapted = _adapt(model, prepared, share, served, shared)
        except CotuneError as error:  # a comparison that cannot be made must not cost the run itself
            folder.events.tell("adaptation_failed", organisation=share.name, reason=str(error))
            continue
        if plan.personalize.methods:
            found.adapted[share.name] = adapted
            found.told[share.name] = _told(model, adapted.head, test)
        if fits_alone(plan, model):
            found.alone[share.name] = _told(model, adapted.alone, test)
        folder.events.tell("adapted", organisation=share.name, method=adapted.described)
    return found


def _adapt(model: SharedModel, prepared: Prepared, share: Share, served: State, shared: State) -> Adapted:
    plan, records = prepared.plan, prepared.records[share.file]
    held = Holdings(((records, share.rows),), plan.labels, plan.task)
    own = own_records(_features(model, plan, served, held), held.targets, units_of(held), len(plan.labels))
    return adapt(model, own, shared, plan.personalize, plan.seed)


def _features(model: SharedModel, plan: Plan, served: State, held: Holdings) -> Tensor:
    """Of an encoder as it came they are kept on disk; of one that this run has trained they are computed."""
    model.load(served)
    if any(name.startswith(model.prefix) for name in served):
        return encode_batch(model, encoded_examples(held, model), plan.model.precision)
    return encoded_features(held, model, served, plan.model.precision)


def _told(model: SharedModel, head: State, features: Tensor) -> Told:
    return tuple(told_by(head_scores(model, head, features)).tolist())
