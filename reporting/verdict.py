"""Answer whether joining is worth it, with the numbers and what a careful reader should know beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cotune.models.evaluation.intervals import MIN_TEST_RECORDS
from cotune.privacy.accounting.display_rounding import round_up
from cotune.reporting.documents.summary import RunSummary
from cotune.reporting.formatting import SPACE
from cotune.reporting.measures import Measure, get_measures, measures_of

Summary = RunSummary | Mapping[str, Any]
_MOST_NAMES = 5
_FLOORS = {  # in a sentence
    "base model": "the unchanged base model",
    "the mean": "always giving the mean",
    "frequencies": "giving each label the probability of its frequency",
}


def is_private(summary: Summary) -> bool:
    """Return whether the run had record-level privacy."""
    return bool(summary["privacy"]["mode"] != "none")


def is_personal(summary: Summary) -> bool:
    """Whether every organization has a model of its own, and there is no common one."""
    return any(organization.get("personal") for organization in summary["organizations"])


def is_real(summary: Summary) -> bool:
    """Whether real organizations took part: then nobody compared, and ε is what they state."""
    return bool(summary["engine"] == "superlink")


@dataclass(frozen=True)
class Verdict:
    """The answer in a few words, the sentence with its numbers, and what a careful reader should know beside it."""

    answer: str  # "Yes", "No", "It depends", "Too close to tell", "Measured" with nothing to compare with, "Not measured"
    sentence: str
    notes: tuple[str, ...]


def conclude_verdict(summary: Summary) -> Verdict:
    """What joining gives each organization on its own held-out records, against training alone without privacy.

    "Yes" where it is better for some and worse for none, by a paired test; "It depends" where it is both.
    """
    test = summary["test"]
    worth = summary["worth"]
    if test["federated"] is None:
        return Verdict("Not measured", _nobody_knows(test), (*_members_note(summary), *_privacy_note(summary)))
    if worth is None:
        notes = (
            *_members_note(summary),
            *predictions_note(summary),
            *personal_note(summary),
            _chance_note(test),
            *_privacy_note(summary),
        )
        return Verdict("Measured", _measured(summary), notes)
    notes = (
        *predictions_note(summary),
        *personal_note(summary),
        _means_note(summary),
        *few_note(summary),
        f"On everybody's records mixed, {_measured(summary)} {_chance_note(test)}",
        *partition_note(summary),
        *_privacy_note(summary),
    )
    return Verdict(worth["answer"].capitalize(), _sentence(summary), notes)


def _members_note(summary: Summary) -> Iterator[str]:
    """How many real organizations have a part in the model."""
    if is_real(summary):
        rounds = [o["rounds"] for o in summary["organizations"]]
        yield f"{sum(1 for count in rounds if count)} of {len(rounds)} organizations are in this model."


def _nobody_knows(test: Summary) -> str:
    if test["examples"]:
        return "every organization has a model of its own, and how good it is only the organization can see."
    return "the coordinator has no test set, so nobody knows how good the federated model is."


def _sentence(summary: Summary) -> str:
    answers = summary["worth"]["answers"]
    compared = [o["worth"] for o in summary["organizations"] if o["worth"]]
    gains = [each["difference"] for each in compared]
    measure = measures_of(summary)[0]
    return (
        f"each on its own held-out records, joining is better than training alone for {answers['yes']} of {len(gains)}"
        f" organizations, worse for {answers['no']} and too close to tell for {answers['too close to tell']}:"
        f" {_range(measure, gains)}."
    )


def _range(measure: Measure, gains: Sequence[float]) -> str:
    low, high = (_signed(measure, gain) for gain in (min(gains), max(gains)))
    return f"by {low} {measure.unit}" if low == high else f"from {low} to {high} {measure.unit}"


def _signed(measure: Measure, gain: float) -> str:
    """A gain of `worth`, which is a share or in nats."""
    return measure.show_gain(100 * gain if measure.share else gain)


_COLUMNS = {
    "majority": "majority class",
    "alone": "alone with the same privacy",
    "alone_without_privacy": "alone without privacy",
    "plain": "federated without personal parts",
    "federated": "federated",
    "adapted": "federated and adapted",
}


def _means_note(summary: Summary) -> str:
    means = summary["worth"]["own_means"]
    names = dict(_COLUMNS)
    if not is_private(summary):
        names["alone"] = "alone, as the plan trains"
    measure = measures_of(summary)[0]
    names["majority"] = measure.floor
    known = {name: means.get(name) for name in names}  # runs of earlier builds lack some
    said = ", ".join(
        f"{names[name]} {measure.show(figures[measure.key])}" for name, figures in known.items() if figures is not None
    )
    how = "the federated model, which each has adapted to itself" if means["adapted"] else "the federated model"
    return (
        f"Joining means {how}; alone means without privacy, which nobody needs who shares nothing. Mean {measure.name} on own"
        f" held-out records: {said}."
    )


def few_note(summary: Summary) -> Iterator[str]:
    """Yield a note about organizations with few test records, if there are any."""
    few = [o["name"] for o in summary["organizations"] if o["worth"] and o["worth"]["few"]]
    if few:
        names = ", ".join(few[:_MOST_NAMES]) + (f" and {len(few) - _MOST_NAMES} more" if len(few) > _MOST_NAMES else "")
        yield (
            f"With fewer than {MIN_TEST_RECORDS} test records of their own, only large differences can be told from chance:"
            f" {names}."
        )


def partition_note(summary: Summary) -> Iterator[str]:
    """Yield a note that the answer depends on the partition, if that was drawn at random."""
    partition = summary["partition"]
    if partition in (None, "files") or partition.startswith("column:"):
        return
    (command, *_) = summary["reproduce"]
    plan = command.removeprefix("cotune simulate ")
    yield (
        f"Who holds which records was drawn ({partition}), and the answer depends on it. See by how much: cotune compare {plan}"
        " --vary partition=iid,dirichlet:1,dirichlet:0.1; or name the column that says it: cotune simulate --by COLUMN."
    )


def _measured(summary: Summary) -> str:
    """Accuracy on the common test set, against a constant answer and the bound."""
    test = summary["test"]
    federated = test["federated"]
    who = "each organization's own model reaches, in the mean," if is_personal(summary) else "the federated model reaches"
    measure = measures_of(summary)[0]
    constant = f"always giving the most frequent label{' of the test set' if is_real(summary) else ''}"
    floor = constant if measure.key == "accuracy" else _FLOORS.get(measure.floor, measure.floor)
    against = [_against(measure, federated, test["majority"], floor)]
    if test["pooled"] is not None:
        against.append(_against(measure, federated, test["pooled"], "pooling all data without privacy"))
    known = summary["worth"] is not None or is_real(summary)
    unknown = "" if known else "; what the organizations reach alone was not measured"
    shown = measure.show(federated[measure.key])
    reached = (
        f"{shown} {measure.name}" if measure.share else f"a {measure.key if measure.key == 'loss' else measure.name} of {shown}"
    )
    return f"{who} {reached}, {', and '.join(against)}{unknown}."


def _against(measure: Measure, ours: Mapping[str, float], theirs: Mapping[str, float], name: str) -> str:
    gain = measure.gain(ours, theirs)
    if not gain:
        return f"level with {name}"
    if measure.share:
        return f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'} {name}"
    return f"{abs(gain):.3f} {measure.unit} {'better' if gain > 0 else 'worse'} than {name}"


def predictions_note(summary: Summary) -> Iterator[str]:
    """What was shared instead of parameters."""
    if summary.get("collaboration") == "predictions":
        public = summary["public"]
        licensed = f" ({public['license']})" if public["license"] else ""
        yield (
            f"Organizations trained models of their own and shared predictions for {public['answers']:,} public inputs{licensed},"
            " no parameters; the federated model has learned what they predict together."
        )


def personal_note(summary: Summary) -> Iterator[str]:
    """Yield notes about personal models and their gain, if organizations have any."""
    if is_personal(summary):
        if summary["model"].get("common"):
            yield "Beside the common model every organization has a copy of its own, in its own folder; figures are theirs."
        else:
            yield "There is no common model: every organization keeps a part of its own, and has its model in its own folder."
    gain = summary.get("personal")
    if gain is not None:
        measure = measures_of(summary)[0]
        unit = "points" if measure.share else f"{measure.unit}, for the better where positive,"
        mean, worst = (_signed(measure, gain[key]) for key in ("mean_gain", "worst_gain"))
        yield (
            f"What is personal changes the {measure.key} on own held-out records by {mean} {unit} in the mean, and by {worst} for"
            f" {gain['worst']}, against the same run with everything shared."
        )


def _chance_note(test: Summary) -> str:
    """The 95 % interval of an accuracy that was measured on the test examples."""
    key = get_measures(test["federated"])[0].key
    if key != "accuracy":
        return f"Measured on {'the target tokens of ' if key == 'loss' else ''}{test['examples']:,} test examples."
    accuracy = test["federated"]["accuracy"]
    margin = 100 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / test["examples"])
    return (
        f"Measured on {test['examples']:,} test examples, where chance moves an accuracy by about ±{margin:.1f} points"
        f" (95{SPACE}%)."
    )


def _privacy_note(summary: Summary) -> Iterator[str]:
    privacy = summary["privacy"]
    spent = [o["epsilon_spent"] for o in summary["organizations"] if o["epsilon_spent"] is not None]
    if is_private(summary) and privacy["epsilon"] is not None:
        delta = f" at δ = {privacy['delta']} for an organization with n examples" if privacy["delta"] else ""
        verb = "states" if is_real(summary) else "spent"
        most = f"; the most that any organization {verb} is {round_up(max(spent))}" if spent else ""
        yield f"Differential privacy for every single record: the plan allows ε = {privacy['epsilon']:g}{delta}{most}."


def results(summary: Summary) -> dict[str, Mapping[str, float] | None]:
    """The rows of the table on the common test set, from floor to bound."""
    test = summary["test"]
    same = ", same privacy" if is_private(summary) else ""
    rows = {
        floor_name(summary): test["majority"],
        f"Each organization alone (mean{same})": test["alone"] and test["alone"]["mean"],
        "Each organization alone (mean, without privacy)": test["alone_without_privacy"]
        and test["alone_without_privacy"]["mean"],
        "Federated, nothing personal": test.get("plain"),
        f"Federated ({'each with its own model, mean of ' if is_personal(summary) else ''}this run)": test["federated"],
        "Federated, adapted by each (mean)": test["adapted"] and test["adapted"]["mean"],
        "All data pooled, without privacy (the bound)": test["pooled"],
    }
    return {name: metrics for name, metrics in rows.items() if metrics is not None or not name.startswith("Federated, ")}


def floor_name(summary: Summary) -> str:
    """What needs no training: the most frequent class; of texts the base model, of numbers their mean."""
    floor = measures_of(summary)[0].floor
    return {"base model": "Base model, untrained", "the mean": "Always the mean", "frequencies": "Each label's frequency"}.get(
        floor, "Majority class"
    )


def own_columns(summary: Summary) -> dict[str, str]:
    """The columns of the table on own records: key in `own` -> heading; those that some organization has."""
    headings = {
        "majority": floor_name(summary),
        "alone": "Alone, same privacy" if is_private(summary) else "Alone, as the plan trains",
        "alone_without_privacy": "Alone, without privacy",
        "plain": "Federated, nothing personal",
        "federated": "Own model" if is_personal(summary) else "Federated",
        "adapted": "Federated, adapted",
    }
    held = [each["own"] for each in summary["organizations"] if each["own"]]
    return {key: heading for key, heading in headings.items() if any(own.get(key) is not None for own in held)}
