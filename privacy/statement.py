"""What the privacy of a run means, in words: nothing that is not so."""

from __future__ import annotations

from collections.abc import Mapping

from cotune.privacy.accounting import RecordPrivacy

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
        f"Record-level differential privacy: what left an organisation in this run reveals almost as little about any single one of"
        f" its records as if that record had not been there. In numbers: (ε, δ)-differential privacy for adding or removing one"
        f" record, with ε at most {most:.2f} of {privacy.epsilon:g} allowed, and δ = {privacy.delta} for n records.",
        f"How: in every step each record enters the batch by chance (Poisson sampling); the gradient of each record is clipped to"
        f" the norm {privacy.clip_norm:g}; Gaussian noise from a cryptographic generator, seeded by the operating system, is added to"
        " their sum. ε is composed over every step of every round, interrupted ones included, from the organisations' ledgers, with"
        " the privacy loss distribution accountant of dp-accounting. It holds against everybody who sees all updates, the server"
        " included: nothing is subtracted for the server not knowing who took part.",
        "What it does not cover: the number of records of each organisation is told to the server and counts as public. Several"
        " records of the same person are as many records: the protection of the person is weaker. The settings (rates, clip norm,"
        " rounds) must not have been chosen by looking at these data. The noise is drawn in floating-point arithmetic, whose known"
        " side channels are not closed. The test set of this simulation and the baselines trained beside it are not protected.",
    ]
