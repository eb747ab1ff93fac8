"""What the privacy of a run means, in words: nothing that is not so."""

from __future__ import annotations

from collections.abc import Mapping

from cotune.privacy.accounting import RecordPrivacy
from cotune.privacy.rounding import round_up

__all__ = ["statement"]


def statement(privacy: RecordPrivacy | None, spent: Mapping[str, tuple[float, float]]) -> list[str]:
    """Paragraphs. spent: organisation -> (ε spent, δ), from the ledgers; without privacy, None and nothing."""
    if privacy is None:
        return [
            "No differential privacy: the plan says privacy = none. The updates that left the organisations were neither clipped"
            " nor noised, and may reveal single records to whoever sees them. Records themselves did not leave."
        ]
    most = max((epsilon for epsilon, _ in spent.values()), default=0.0)
    return [
        "Record-level differential privacy: for adding or removing any single record of an organisation, what left the "
        f"organisation in this run is (ε, δ)-differentially private, with ε at most {round_up(most)} of "
        f"{privacy.epsilon:g} allowed and δ = {privacy.delta} for n records. Whatever anybody concludes from it about a "
        "record, they would have concluded without that record too, with a probability smaller by a factor of e^ε at "
        "most, but for a chance of δ. An ε of 1 or less is a strong promise, one of 8 a weak one.",
        "How: in every step each record enters the batch by chance (Poisson sampling); the gradient of each record is "
        f"clipped to the norm {privacy.clip_norm:g}; Gaussian noise from a cryptographic generator, seeded by the "
        "operating system, is added to their sum. ε is composed over every step of every round, interrupted ones "
        "included, from the organisations' ledgers, with the privacy loss distribution accountant of dp-accounting. It "
        "holds against everybody who sees all updates, the server included: nothing is taken off for the server not "
        "knowing who took part.",
        "What it does not cover: the number of records of each organisation is told to the server and counts as public. "
        "Several records of the same person are as many records: the protection of the person is weaker. The settings "
        "(rates, clip norm, rounds) must not have been chosen by looking at these data. The noise is drawn in "
        "floating-point arithmetic, whose known side channels are not closed. The test set of this simulation and the baselines "
        "trained beside it are not covered.",
    ]
