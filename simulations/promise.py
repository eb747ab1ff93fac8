"""What a plan costs its records when it is played, and which records it is judged by: known before anything runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from cotune.client.budget import planned_charges
from cotune.privacy.accounting import Steps
from cotune.privacy.config import RecordPrivacy
from cotune.simulations.sites import Prepared


@dataclass(frozen=True)
class Promise:
    """Of a plan that was checked.

    Attributes:
        charges: For each organization, all that it will be charged if nothing is interrupted; nothing without privacy.
        deltas: δ of each organization.
        held_out: SHA-256 over which records test and validate.
    """

    charges: tuple[tuple[Steps, ...], ...]
    deltas: tuple[float, ...]
    held_out: str


def promise_of(prepared: Prepared) -> Promise:
    """Return what a plan promises, from the noise that is calibrated for all of its rounds."""
    plan, privacy = prepared.plan, prepared.plan.privacy
    if not isinstance(privacy, RecordPrivacy):
        return Promise((), (), _held_out(prepared))
    charges, deltas = [], []
    for share in prepared.shares:
        examples, sigma = share.public_examples(plan), prepared.noise[share.name]
        charges.append(tuple(planned_charges(plan, share.policy(plan), sigma, examples)))
        deltas.append(privacy.delta_for(examples))
    return Promise(tuple(charges), tuple(deltas), _held_out(prepared))


def _held_out(prepared: Prepared) -> str:
    digest = hashlib.sha256()
    for what, portions in (("test", prepared.test), ("validation", prepared.validation)):
        for file, rows in portions:
            digest.update(f"{what}\0{file}\0{len(rows)}\0".encode())
            digest.update(np.asarray(rows, dtype=np.int64).tobytes())
    return digest.hexdigest()
