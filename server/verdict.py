"""Is it worth joining? The answer, its numbers, and what a careful reader should know beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cotune.privacy.rounding import round_up
from cotune.server.figures import SPACE, percent, signed

__all__ = ["Summary", "Verdict", "is_personal", "is_private", "is_real", "judge", "results"]

Summary = Mapping[str, Any]


def is_private(summary: Summary) -> bool:
    return bool(summary["privacy"]["mode"] != "none")


def is_personal(summary: Summary) -> bool:
    """Whether every organisation has a model of its own, and there is no common one."""
    return any(organisation.get("personal") for organisation in summary["organisations"])


def is_real(summary: Summary) -> bool:
    """Whether real organisations took part: then nobody compared, and ε is what they state."""
    return bool(summary["engine"] == "superlink")


@dataclass(frozen=True)
class Verdict:
    """The answer in a word, the sentence with its numbers, and what a careful reader should know beside it."""

    answer: str  # "Yes", "No", "Measured" where there is nothing to compare with, or "Not measured"
    sentence: str
    notes: tuple[str, ...]


def judge(summary: Summary) -> Verdict:
    """Yes if the federated model beats the organisations alone (their mean) and the majority class, to 0.1 points."""
    test, gain = summary["test"], _gain(summary["test"])
    if test["federated"] is None:
        return Verdict("Not measured", _nobody_knows(test), tuple(_privacy_note(summary)))
    useful = _points(test["federated"], test["majority"]) > 0
    answer = "Measured" if gain is None else "Yes" if gain > 0 and useful else "No"
    return Verdict(
        answer,
        _sentence(summary, useful),
        (*_personal_note(summary), *_gains_note(summary), _chance_note(test), *_privacy_note(summary)),
    )


def _nobody_knows(test: Summary) -> str:
    if test["examples"]:
        return "every organisation has a model of its own, and how good it is only the organisation can see."
    return "the coordinator has no test set, so nobody knows how good the federated model is."


def _sentence(summary: Summary, useful: bool) -> str:
    test = summary["test"]
    federated, gain = test["federated"], _gain(test)
    who = "each organisation's own model reaches, in the mean," if is_personal(summary) else "the federated model reaches"
    constant = f"always giving the most frequent label{' of the test set' if is_real(summary) else ''}"
    against = []
    if gain is not None:
        against.append(_against(gain, "the mean of the organisations alone"))
    if gain is None or not useful:
        against.append(_against(_points(federated, test["majority"]), constant))
    if test["pooled"] is not None:
        against.append(_against_pooled(_points(federated, test["pooled"]), gain))
    unknown = "" if gain is not None else "; what the organisations reach alone was not measured"
    return f"{who} {percent(federated['accuracy'])} accuracy, {', and '.join(against)}{unknown}."


def _against(points: float, name: str) -> str:
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'} {name}" if points else f"level with {name}"


def _against_pooled(points: float, gain: float | None) -> str:
    """ "within" only where the run closed at least half of the way from alone to pooled."""
    name = "pooling all data without privacy"
    if gain is not None and 0 < -points <= gain:
        return f"within {-points:.1f} points of {name}"
    return _against(points, name)


def _personal_note(summary: Summary) -> Iterator[str]:
    if is_personal(summary):
        yield "There is no common model: every organisation keeps a part of its own, and has its model in its own folder."


def _gains_note(summary: Summary) -> Iterator[str]:
    gains = [round(100 * o["gain"], 1) for o in summary["organisations"] if o["gain"] is not None]
    if gains:
        better = sum(gain > 0 for gain in gains)
        who = f"All {len(gains)}" if better == len(gains) else f"{better} of {len(gains)}"
        yield f"{who} organisations gain over training alone: from {signed(min(gains))} to {signed(max(gains))} points."


def _chance_note(test: Summary) -> str:
    """The 95 % interval of an accuracy on so many examples (normal approximation); a warning if the gain is inside."""
    accuracy, gain = test["federated"]["accuracy"], _gain(test)
    margin = 100 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / test["examples"])
    examples = f"{test['examples']:,} test examples"
    note = f"Measured on {examples}, where chance moves an accuracy by about ±{margin:.1f} points (95{SPACE}%)."
    tie = " The gain over the organisations alone is smaller than that: treat it as a tie until it is measured again."
    return note + tie if gain is not None and 0 < gain < margin else note


def _privacy_note(summary: Summary) -> Iterator[str]:
    privacy = summary["privacy"]
    spent = [o["epsilon_spent"] for o in summary["organisations"] if o["epsilon_spent"] is not None]
    if is_private(summary) and privacy["epsilon"] is not None:
        delta = f" at δ = {privacy['delta']} for an organisation with n examples" if privacy["delta"] else ""
        verb = "states" if is_real(summary) else "spent"
        most = f"; the most that any organisation {verb} is {round_up(max(spent))}" if spent else ""
        yield f"Differential privacy for every single record: the plan allows ε = {privacy['epsilon']:g}{delta}{most}."


def _gain(test: Summary) -> float | None:
    """Points of accuracy over the mean of the organisations alone, None where that was not measured."""
    return None if test["alone"] is None else _points(test["federated"], test["alone"]["mean"])


def _points(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """Percentage points between two accuracies, to the one decimal that is shown: words and numbers agree."""
    return round(100 * (ours["accuracy"] - theirs["accuracy"]), 1)


def results(summary: Summary) -> dict[str, Mapping[str, float] | None]:
    """The rows of the table of results, from floor to bound."""
    test = summary["test"]
    same = ", same privacy" if is_private(summary) else ""
    return {
        "Majority class": test["majority"],
        f"Each organisation alone (mean{same})": test["alone"] and test["alone"]["mean"],
        f"Federated ({'each with its own model, mean of ' if is_personal(summary) else ''}this run)": test["federated"],
        "All data pooled, without privacy (the bound)": test["pooled"],
    }
