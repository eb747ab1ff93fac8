"""How good the federated model is for each organisation, on records like its own.

Where every organisation has a file, it is judged on the test part of its own. Where one file is split, organisation k's accuracy
is Σ_c π_kc · recall_c on the common test set, π_kc being its own mix of classes: exact where organisations differ in their
classes alone, as in all partitions of one file, and it needs no data beyond the common test set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from cotune.models.holdings import Holdings
from cotune.models.sharing import SharedModel, State
from cotune.plan.schema import Plan
from cotune.server.evaluation import evaluate, predict
from cotune.simulations.sites import Prepared

__all__ = ["mixed_accuracy", "own_accuracies"]


def own_accuracies(
    prepared: Prepared, model: SharedModel, state: State, personal: Mapping[str, State]
) -> dict[str, float | None]:
    """Accuracy of the model in a state by organisation; None for one whose records have no like in the test set.

    personal: the states of those that have a model of their own.
    """
    plan, test = prepared.plan, dict(prepared.test)
    held = {file: Holdings(((prepared.records[file], rows),), plan.labels, plan.task) for file, rows in test.items()}
    states = {share.name: personal.get(share.name, state) for share in prepared.shares}
    if None not in held:
        files = {share.name: held[share.file] for share in prepared.shares}
        return {
            n: evaluate(model, states[n], own, plan.model.precision).accuracy if len(own) else None for n, own in files.items()
        }
    judged = {id(s): _recalls_in(s, model, held[None], plan) for s in {id(s): s for s in states.values()}.values()}
    return {s.name: mixed_accuracy(prepared.label_counts(s), judged[id(states[s.name])]) for s in prepared.shares}


def _recalls_in(state: State, model: SharedModel, test: Holdings, plan: Plan) -> dict[str, float | None]:
    """Of each class, the fraction of the common test set that the model in a state tells rightly."""
    told = predict(model, state, test, plan.model.precision)
    return dict(zip(plan.labels, _recalls(test.truth, told, len(plan.labels)), strict=True))


def mixed_accuracy(counts: Mapping[str, int], recalls: Mapping[str, float | None]) -> float | None:
    """Σ_c π_c · recall_c, π_c being the class's part of `counts`; classes without a recall are left out.

    >>> mixed_accuracy({"a": 30, "b": 10}, {"a": 0.9, "b": 0.5})
    0.8
    """
    known = {name: recall for name, recall in recalls.items() if recall is not None and counts.get(name)}
    total = sum(counts[name] for name in known)
    return sum(counts[name] * recall for name, recall in known.items()) / total if total else None


def _recalls(truth: Sequence[int], predicted: Sequence[int], classes: int) -> list[float | None]:
    """Of each class, the fraction that is told rightly; None for one that the test set lacks."""
    there = Counter(truth)
    right = Counter(t for t, p in zip(truth, predicted, strict=True) if t == p)
    return [right[c] / there[c] if there[c] else None for c in range(classes)]
