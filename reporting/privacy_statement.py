"""State in words what the privacy of a run means, and nothing that does not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.accounting.display_rounding import round_up
from cotune.privacy.client_dp import RoundNoise
from cotune.privacy.config import ClientPrivacy, RecordPrivacy

_CLEAR = "the local metrics, which organizations told as they are, without noise; "
_MEANING = (
    "Whatever anybody concludes from it about a record, they would have concluded without that record too, with a probability "
    "smaller by a factor of e^ε at most, but for a chance of δ. An ε of 1 or less is a strong promise, one of 8 a weak one."
)
_AGAINST = (
    "It holds against everybody who sees all updates, the server included: nothing is taken off for the server not knowing who "
    "took part."
)
_LIMITS = (
    "Where the unit is a record, several records of the same person are as many records: the person is protected less. "
    "The settings (rates, clip norm, rounds) must not have been chosen by looking at these data. How long steps and answers take "
    "is not covered. Sum and noise are rounded to a grid, so that low bits tell nothing; the noise is still a rounded "
    "floating-point normal, not an exact discrete Gaussian."
)


def statement(
    privacy: RecordPrivacy | None,
    spent: Mapping[str, tuple[float, float]],
    *,
    client_level: bool = False,
    clear_metrics: bool = False,
) -> list[str]:
    """Return paragraphs about record-level privacy in a simulation.

    Args:
        privacy: Of the plan; None: no record-level privacy.
        spent: Organization -> (ε spent, δ), from the ledgers; empty without privacy.
        client_level: Whether the run has client-level privacy, which `client_statement` describes.
        clear_metrics: Whether an organization disclosed local metrics without noise.
    """
    if privacy is None:
        return [_none(client_level)]
    most = max((epsilon for epsilon, _ in spent.values()), default=0.0)
    return [
        "Record-level differential privacy: for adding or removing any single record of an organization, what left the "
        f"organization in this run{', but for its local metrics,' if clear_metrics else ''} is (ε, δ)-differentially private, "
        f"with ε at most {round_up(most)} of {privacy.epsilon:g} allowed and δ = {privacy.delta} for the public number n of "
        f"its records. {_MEANING}",
        f"{_how(privacy)}{_persons(privacy)} ε is composed over every step of every round, interrupted ones included, from the "
        "organizations' "
        f"ledgers, with the privacy loss distribution accountant of dp-accounting. {_AGAINST}",
        f"What it does not cover: {_CLEAR if clear_metrics else ''}the number that each organization declares for its records is "
        f"public, and rates, noise, steps and δ follow from it alone. {_LIMITS} The test set of this simulation and the "
        f"baselines trained beside it are not "
        "covered.",
    ]


def all_models_statement(together: float, *, pooled: bool, plain: bool = False) -> str:
    """Return the statement that a simulation's comparison models are trained on the same records.

    Args:
        together: Largest ε of the federated model and an organization's model trained alone, together.
        pooled: Whether a model was trained on all data pooled.
        plain: Whether the same run without personal parts may be among the models.
    """
    also = ", the same run without personal parts" if plain else ""
    return (
        f"This report compares several models of the same records. The federated model{also} and the one that each organization"
        f" trained alone with the same privacy cost ε = {round_up(together)} together, the most that any organization spent at"
        " its δ; "
        'they were fixed before training, so that their steps compose as one list. No ε covers the columns "alone without '
        'privacy" and "adapted": these models are fitted to an organization\'s records without noise, and would stay with it. '
        "No ε covers what is computed from records as they are: numbers of records, label counts, the majority class, and every "
        "figure on test records, an organization's own held-out ones included, which no model was trained on"
        + ("; nor the model of all data pooled, which is trained without privacy." if pooled else ".")
    )


def together_statement(runs: int, together: float | None, delta: float | None) -> str:
    """Return the statement of a comparison about all its runs together.

    Args:
        runs: Number of runs.
        together: Their common ε; None if no ε covers all of them.
        delta: δ of that ε.
    """
    if together is None or delta is None:
        return (
            f"No ε covers this table: of its {runs} runs some had no privacy or were compared with models without, or none was"
            " finished."
        )
    return (
        f"The table as a whole: ε = {round_up(together)} at δ = {delta:.1e}, of all {runs} runs together (the column ε is of one "
        "run). It bounds what the table tells about any single record by the runs that train on it, if the values were fixed "
        "before the first run. No ε covers what the accuracies tell about a record in the runs that test on it (a seed draws who "
        "tests), nor worst and spread, which may be computed from exact label counts."
    )


def selection_statement(
    epsilon: float, delta: float, one_run: float, *, plans: int, expected_runs: float, unit: str
) -> list[str]:
    """Return paragraphs about the output of a private selection of a plan.

    Args:
        epsilon: Of the selection.
        delta: δ of both ε.
        one_run: ε of a single run of the costliest plan.
        plans: Number of plans.
        expected_runs: Mean of the geometric distribution of the number of runs.
        unit: The privacy unit.
    """
    who = "record" if unit == "record" else f"{unit}, with all its records,"
    return [
        "Record-level differential privacy of what is released (this plan, its model and its test figures): "
        f"ε = {round_up(epsilon)} at δ = {delta:.1e}, for adding or removing any single {who} of the training data of an "
        f"organization. One run without a choice would cost ε = {round_up(one_run)}. {_MEANING}",
        f"How: the number of runs was drawn from a geometric distribution with mean {expected_runs:g}, and is kept secret; each "
        f"run drew one of {plans} plans, all equally likely; the one with the highest test accuracy is released, and what the "
        "others gave was removed. ε follows from the Rényi divergence of the costliest plan (Papernot & Steinke, ICLR 2022, "
        "theorem 2).",
        "What it does not cover: the test records, which are the same in all runs and count as public; the class names and the "
        "number that each organization declares; how long the selection took; and a second selection on the same records, whose "
        "ε comes on top, also where one was begun and given up. It holds as long as nobody outside learns what the runs that "
        "were not chosen gave, or how many there were, and as long as the plans to choose from were not themselves chosen by "
        "looking at these data. The noise is a rounded floating-point normal, not an exact discrete Gaussian.",
    ]


def stated(
    privacy: RecordPrivacy | None, spent: Mapping[str, float], *, client_level: bool = False, silent: int = 0
) -> list[str]:
    """Return paragraphs about record-level privacy in a real run, from what the coordinator knows.

    Args:
        privacy: Of the plan; None: no record-level privacy.
        spent: Organization -> ε as it last stated it.
        client_level: Whether the run has client-level privacy.
        silent: Number of organizations that stated none, as no update of them was received.
    """
    if privacy is None:
        return [_none(client_level)]
    most = f"the highest stated is {round_up(max(spent.values()))}" if spent else "none was stated"
    rest = f"; {silent} of {silent + len(spent)} stated nothing" if silent and spent else ""
    return [
        "Record-level differential privacy, as the plan asks it of every organization: for adding or removing any single record, "
        "what it sends in this run is (ε, δ)-differentially private, with ε at most "
        f"{privacy.epsilon:g} and δ = {privacy.delta} for n records; its own policy may ask for less. Of the ε that was spent "
        f"{most}{rest}. {_MEANING}",
        f"{_how(privacy)}{_persons(privacy)} Each organization adds the noise itself, on its own machine, and composes ε from "
        f"its own ledger, over "
        "every step of every round, interrupted ones included, with the privacy loss distribution accountant of dp-accounting. "
        "The coordinator knows what the organizations state, and cannot check it: an auditor can, from the ledger that each "
        f"keeps. {_AGAINST}",
        "What it does not cover: what an organization's own policy lets out without noise, such as the exact number of its "
        f"records or its local metrics; its own ledger names that. {_LIMITS} The coordinator's test set is not covered.",
    ]


def _none(client_level: bool) -> str:
    return (
        f"No {'record-level ' if client_level else ''}differential privacy: the plan says privacy = none. The updates that"
        " left the organizations were neither clipped nor noised, and may reveal single records to anyone who sees them. Records"
        " themselves did not leave."
    )


def _how(privacy: RecordPrivacy) -> str:
    if privacy.pate is not None:
        return (
            f"How: each record is learned from by a single one of {privacy.pate.teachers} models, which are trained without noise"
            " and never leave; they vote on public inputs, and a vote leaves where a count with Gaussian noise says that enough"
            f" of them agree, at most {privacy.pate.answers} votes, each with Gaussian noise on the count of every class; the"
            " noise is from a cryptographic generator, seeded by the operating system, and all that may leave is charged, whether"
            " it leaves or not."
        )
    return (
        "How: in every step each record enters the batch by chance (Poisson sampling); the gradient of each record is "
        f"clipped to the norm {privacy.clip_norm:g}{_shares(privacy)}; Gaussian noise from a cryptographic generator, seeded "
        "by the operating system, is added to their sum."
    )


def _persons(privacy: RecordPrivacy) -> str:
    """What the unit is where it is no record."""
    if privacy.unit == "record":
        return ""
    return (
        f" Where this speaks of a record, it is all records of one {privacy.unit} together, of which at most"
        f" {privacy.max_records} count: they are learned from and charged as one."
    )


def _shares(privacy: RecordPrivacy) -> str:
    return ", in equal shares for each parameter tensor" if privacy.clipping == "per_layer" else ""


def client_statement(privacy: ClientPrivacy, noise: RoundNoise, charged: Sequence[Steps], *, sample_rate: float) -> list[str]:
    """Return paragraphs about client-level privacy.

    Args:
        privacy: Of the plan.
        noise: Of each round.
        charged: Charges of the rounds in the server's account, or of the planned ones.
        sample_rate: Probability with which an organization is asked in a round.
    """
    rounds = sum(steps.count for steps in charged)
    z = noise.charge.noise_multiplier
    spent = epsilon(charged, privacy.delta)
    return [
        "Client-level differential privacy: for any single organization, whether its updates entered this run or were left out "
        f"altogether, the models that the server gave out are (ε, δ)-differentially private, with ε at most {round_up(spent)} of "
        f"{privacy.epsilon:g} allowed and δ = {privacy.delta:g}. It protects the organization as a whole, all its records "
        "together, against those who see the models after the server: the other organizations, and anyone who gets the result."
        " It does not protect against the server, which sees every update as it was sent.",
        "How: every update is clipped to a norm C over all its parameters"
        + (", which follows a noised quantile of the norms" if privacy.clipping == "adaptive" else f" = {privacy.clip_norm:g}")
        + f"; the clipped ones are summed with equal weights; Gaussian noise of noise multiplier {z:.4g} from a cryptographic "
        f"generator is added to the sum, which is divided by {noise.expected:g}, the number of organizations that is expected, "
        f"no matter who took part. ε is composed over {rounds} rounds, interrupted ones included: each is charged to a durable"
        " account before its noise is drawn, and the run ends rather than exceed what is allowed.",
        _amplification(privacy, charged, spent, sample_rate),
        "What it does not cover: which organizations are registered, who took part in which round, and whether a round found "
        "enough of them counts as known; so does what else the folder of the run says about updates (sizes, steps, stated ε), "
        "which stays with the server. The settings must not have been chosen by looking at the updates. Sum and noise are "
        "rounded "
        "to a grid; the noise is a rounded floating-point normal, not an exact discrete Gaussian.",
    ]


def _amplification(privacy: ClientPrivacy, charged: Sequence[Steps], spent: float, sample_rate: float) -> str:
    if not privacy.amplification:
        chance = (
            f" They were asked by chance (rate {sample_rate:g}), but for that nothing is taken off." if sample_rate < 1 else ""
        )
        return f"ε counts as if every organization had taken part in every round.{chance}"
    full = epsilon([Steps(steps.noise_multiplier, 1.0, steps.count) for steps in charged], privacy.delta)
    return (
        f"This ε takes into account that each organization is asked in a round by a secret chance of {sample_rate:g} only. That "
        "holds against those who do not learn who took part in which round. The server knows, an organization knows it of itself,"
        f" and anyone who watches the network may find out: against them the same rounds cost ε = {round_up(full)}."
    )
