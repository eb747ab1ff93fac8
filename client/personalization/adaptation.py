"""Adapt the final model to an organization's own records. Nothing leaves, so that nothing is noised and no ε is spent.

The candidates are the model as received, and
- prior: its scores, shifted to the organization's own class frequencies (see `head_fit.corrected`);
- head: a new head, fitted from the shared one with a penalty on the distance to it, for several strengths;
- alone: a head that is fitted without the shared one;
- mix: a weighted mean of the parameters of the head fitted alone and the shared one, shifted, for several weights.

The best candidate is selected by cross-validation on the organization's own training records; test records are not used. The
shared model was trained on all these records, usually with privacy, so that it memorizes little; without privacy, its accuracy is
overestimated here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cotune.data.dataset import Dataset
from cotune.data.tasks.task import Target
from cotune.errors import DataError
from cotune.models.features.head_fit import correct_head, fit_head, head_names, head_scores, last_layer
from cotune.models.trainable import State, TrainableModel
from cotune.plan.tables import PersonalizeConfig
from cotune.privacy.mechanisms.random_generators import seeded_generator

_PULLS = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1)  # strengths of the penalty, divided by the number of records
_PARTS = (0.25, 0.5, 0.75)  # weights of the head that was fitted alone, in a mix
MANY_RECORDS = 2000  # records, from which on one fold validates instead of each in turn
SHARED = "federated"  # the model as received


@dataclass(frozen=True)
class OwnRecords:
    """The features and targets that a head is fitted to.

    Attributes:
        features: (n, d), a row for each record, or for each tagged word.
        targets: (n,) class numbers.
        records: (n,) number of the record of each row.
        units: (n,) number of the unit of each row; all rows of a unit are in the same fold.
    """

    features: Tensor
    targets: Tensor
    records: NDArray[np.int64]
    units: NDArray[np.int64]

    @property
    def count(self) -> int:
        """The number of records."""
        return len(np.unique(self.records))

    def at(self, rows: NDArray[np.bool_]) -> OwnRecords:
        """Return the rows for which the mask is true."""
        chosen = torch.as_tensor(np.flatnonzero(rows))
        return OwnRecords(self.features[chosen], self.targets[chosen], self.records[rows], self.units[rows])


@dataclass(frozen=True)
class Candidate:
    """A method of finding a head, with its parameters."""

    method: str
    value: float = 0.0  # the strength of its penalty
    part: float = 0.0  # of the head that was fitted alone, in a mix

    @property
    def described(self) -> str:
        """The method and its parameters in words."""
        strength = f", penalty {self.value:g} / n" if self.value else ""
        return f"{self.method}{strength}{f', {self.part:g} of it alone' if self.part else ''}"


@dataclass(frozen=True)
class Adaptation:
    """The selected head.

    Attributes:
        method: The best method: "federated", "prior", "head", "mix" or "alone".
        described: The method with its parameters in words.
        head: Parameters of the head.
        alone: The best head that was fitted without the shared one.
        tried: Method -> cross-validated accuracy of its best candidate.
    """

    method: str
    described: str
    head: State
    alone: State
    tried: dict[str, float]


def build_own_records(features: Tensor, targets: Sequence[Target], units: Sequence[int], classes: int) -> OwnRecords:
    """Return the usable records: those that could be encoded, and have a class of the plan.

    Args:
        features: (n, d) of the records, or of the words of all records, as `Dataset.features` returns them.
        targets: For each record, the number of its class, or those of its words' tags.
        units: Number of each record's unit.
        classes: Number of the plan's classes.

    Raises:
        DataError: If there are fewer than two.
    """
    answers = [target if isinstance(target, tuple) else (target,) for target in targets]
    records = np.repeat(np.arange(len(answers)), [len(each) for each in answers])
    numbers = torch.as_tensor([number for each in answers for number in each])
    usable = ~features.isnan().any(dim=1) & (numbers >= 0) & (numbers < classes)
    found = OwnRecords(features, numbers, records, np.asarray(units, dtype=np.int64)[records]).at(usable.numpy())
    _check_units(found)
    return found


def _check_units(own: OwnRecords) -> None:
    """Raise DataError if there is only one unit, as cross-validation needs at least two."""
    if (units := len(np.unique(own.units))) < 2:
        raise DataError(
            f"{own.count} records of {units} units (equal ones are one) can be used to adapt a model: expected two units or more;"
            " use the unchanged model, with `cotune predict` and `cotune evaluate`",
            code="data.too_few_records",
        )


def get_unit_numbers(held: Dataset) -> list[int]:
    """Return the number of each record's unit."""
    names = [(records.units or records.identities)[int(row)] for records, rows in held.parts for row in rows]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return [number[name] for name in names]


def load_base_head(model: TrainableModel) -> State:
    """Return the head as initialized from the plan's seed."""
    model.load({})
    return model.state(head_names(model))


def adapt(model: TrainableModel, own: OwnRecords, shared: State, config: PersonalizeConfig, seed: int) -> Adaptation:
    """Select the best head for an organization by cross-validation on its records, and fit it to all of them.

    Args:
        model: Of the plan.
        own: The organization's records.
        shared: The head of the shared model; the features are those of its encoder.
        config: Of the plan, such as the number of folds.
        seed: Of the folds.

    Raises:
        DataError: If all records belong to one unit.
    """
    _check_units(own)
    candidates = _candidates({SHARED, "alone", *config.methods}, has_layer=last_layer(model) is not None)
    start = load_base_head(model)
    scores = _cross_validate(model, own, shared, start, candidates, config.folds, seed)
    allowed = [c for c in candidates if c.method in (SHARED, *config.methods)]
    best = max(allowed, key=lambda candidate: scores[candidate].rank)
    alone = max((c for c in candidates if c.method == "alone"), key=lambda candidate: scores[candidate].rank)
    heads = dict(_fitted(model, own, shared, start, _needed(best, alone)))
    methods = dict.fromkeys(candidate.method for candidate in allowed)
    tried = {method: max(scores[c].accuracy for c in allowed if c.method == method) for method in methods}
    return Adaptation(best.method, best.described, heads[best], heads[alone], tried)


def fit_alone(model: TrainableModel, own: OwnRecords, folds: int, seed: int) -> State:
    """Fit a head to the records without a shared one, with the penalty that cross-validation selects.

    Args:
        model: Of the plan.
        own: The records, of one organization or of several.
        folds: Number of folds.
        seed: Of the folds.

    Raises:
        DataError: If all records belong to one unit.
    """
    _check_units(own)
    start = load_base_head(model)
    candidates = _candidates({"alone"}, has_layer=False)
    scores = _cross_validate(model, own, start, start, candidates, folds, seed)
    best = max(candidates, key=lambda candidate: scores[candidate].rank)
    return dict(_fitted(model, own, start, start, [best]))[best]


def _cross_validate(
    model: TrainableModel, own: OwnRecords, shared: State, start: State, candidates: list[Candidate], folds: int, seed: int
) -> dict[Candidate, _Score]:
    scores = {candidate: _Score() for candidate in candidates}
    for train, judge in split_folds(own, folds, seed):
        for candidate, head in _fitted(model, train, shared, start, candidates):
            scores[candidate].add(head_scores(model, head, judge.features), judge.targets)
    return scores


@dataclass
class _Score:
    """The score of a candidate over the folds that it was not fitted to."""

    right: int = 0
    loss: float = 0.0
    count: int = 0

    def add(self, scores: Tensor, targets: Tensor) -> None:
        self.right += int((scores.argmax(dim=1) == targets).sum())
        self.loss += float(functional.cross_entropy(scores, targets, reduction="sum"))
        self.count += len(targets)

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    @property
    def rank(self) -> tuple[float, float]:
        return self.accuracy, -self.loss


def _candidates(methods: Collection[str], *, has_layer: bool) -> list[Candidate]:
    """Return the candidates in the order in which they are fitted: a mix needs the head that was fitted alone."""
    known = [
        Candidate(SHARED),
        *([Candidate("prior")] if has_layer else []),
        *(Candidate("head", pull) for pull in _PULLS),
        *(Candidate("alone", pull) for pull in _PULLS),
        *(Candidate("mix", pull, part) for pull in _PULLS for part in _PARTS),
    ]
    return [candidate for candidate in known if candidate.method in methods]


def _needed(*chosen: Candidate) -> list[Candidate]:
    """Return the chosen candidates, and those that their fits start from."""
    wanted = set(chosen) | {Candidate("alone", candidate.value) for candidate in chosen if candidate.method == "mix"}
    methods = {candidate.method for candidate in wanted}
    return [candidate for candidate in _candidates(methods, has_layer=True) if candidate in wanted]


def _fitted(
    model: TrainableModel, own: OwnRecords, shared: State, start: State, candidates: Collection[Candidate]
) -> Iterator[tuple[Candidate, State]]:
    """Yield each candidate's head, fitted to the records; each penalty starts from the result of the next stronger one."""
    corrects = last_layer(model) is not None and {candidate.method for candidate in candidates} != {"alone"}
    here = correct_head(model, shared, own.features, own.targets) if corrects else shared
    toward = {"head": here, "alone": start}
    last = dict(toward)
    alone = dict[float, State]()
    for candidate in candidates:
        method = candidate.method
        if method in toward:
            pull = candidate.value / len(own.targets)
            last[method] = fit_head(model, own.features, own.targets, start=last[method], toward=toward[method], pull=pull)
        if method == "alone":
            alone[candidate.value] = last[method]
        if method == "mix":
            yield candidate, _mixed(here, alone[candidate.value], candidate.part)
        else:
            yield candidate, last.get(method, here if method == "prior" else shared)


def _mixed(one: State, other: State, part: float) -> State:
    return {name: (1 - part) * tensor + part * other[name] for name, tensor in one.items()}


def split_folds(own: OwnRecords, folds: int, seed: int) -> Iterator[tuple[OwnRecords, OwnRecords]]:
    """Yield the folds of a cross-validation, stratified by class and grouped by unit.

    Args:
        own: The records; if there are many, only one fold is yielded.
        folds: Number of folds.
        seed: Of the assignment.

    Yields:
        (records to fit to, records to validate on).
    """
    _, first, unit = np.unique(own.units, return_index=True, return_inverse=True)
    strata = own.targets.numpy()[first]
    rng = seeded_generator(seed, "own folds")
    fold = np.empty(len(first), dtype=np.int64)
    dealt = 0
    for stratum in np.unique(strata):
        groups = rng.permutation(np.flatnonzero(strata == stratum))
        fold[groups] = (dealt + np.arange(len(groups))) % folds
        dealt += len(groups)
    for number in range(1 if len(own.targets) >= MANY_RECORDS else folds):
        judging = (fold == number)[unit]
        if judging.any() and not judging.all():
            yield own.at(~judging), own.at(judging)
